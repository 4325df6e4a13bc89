//! What it costs to start: a worker, a session, a module; and to start again after a crash.
//!
//! ```text
//! cargo bench --bench startup
//! cargo bench --bench startup -- --test       each once, as a test
//! ```
//!
//! Workers are this very executable, started again (the feature `self-exec`); its size is part of the result.
//! Ending a worker or a session is not timed.

mod common;

use common::Library;
use criterion::{Criterion, criterion_group, criterion_main};
use hotcell::{CallError, Module, Session, Worker};
use std::time::{Duration, Instant};

/// The sum of what `timed` takes; what it gives is dropped, and with it ended, off the clock.
fn total<T>(rounds: u64, mut timed: impl FnMut() -> T, mut end: impl FnMut(T)) -> Duration {
    let mut sum = Duration::ZERO;
    for _ in 0..rounds {
        let start = Instant::now();
        let made = timed();
        sum += start.elapsed();
        end(made);
    }
    sum
}

/// A new worker, up to its first result; with the module, which keeps its session open.
fn first_result(library: &Library) -> (Worker, Module) {
    let worker = Worker::spawn().expect("a worker starts");
    let module = library.load(&worker.session().expect("a session opens"));
    let add = module.function::<fn(i32, i32) -> i32>("add").unwrap();
    assert_eq!(add.call(2, 3).unwrap(), 5);
    (worker, module)
}

fn start(c: &mut Criterion) {
    let library = Library::compile();
    let mut group = c.benchmark_group("start");
    group.sample_size(50);
    group.bench_function("spawn to ready", |b| {
        b.iter_custom(|rounds| total(rounds, || Worker::spawn().unwrap(), |worker| worker.dispose()));
    });
    group.bench_function("spawn to first result", |b| {
        b.iter_custom(|rounds| total(rounds, || first_result(&library), |(worker, _)| worker.dispose()));
    });

    let (worker, _module) = first_result(&library);
    group.bench_function("session open", |b| {
        b.iter_custom(|rounds| {
            let end = |session: Session| {
                session.ping().unwrap();
                session.close().unwrap();
            };
            total(rounds, || worker.session().unwrap(), end)
        });
    });
    // In a session of its own each time: closing it unloads the module, so that the next load is a real one.
    group.bench_function("module load", |b| {
        b.iter_custom(|rounds| {
            let mut sum = Duration::ZERO;
            for _ in 0..rounds {
                let session = worker.session().unwrap();
                sum += total(1, || library.load(&session), drop);
                session.close().unwrap();
            }
            sum
        });
    });
    group.bench_function("function resolve", |b| {
        b.iter_custom(|rounds| {
            // A session can resolve a million functions, and the rounds may be more.
            let sessions = std::iter::repeat_with(|| library.load(&worker.session().unwrap()));
            (0..rounds.div_ceil(1000))
                .zip(sessions)
                .map(|(thousand, module)| {
                    let resolve = || module.function::<fn(i32, i32) -> i32>("add").unwrap();
                    total((rounds - thousand * 1000).min(1000), resolve, drop)
                })
                .sum()
        });
    });
    group.finish();
}

fn restart(c: &mut Criterion) {
    let library = Library::compile();
    let mut group = c.benchmark_group("restart");
    group.sample_size(50);
    // Gives the moment at which the fatal call was made.
    let crash = |module: &Module| {
        let die = module.function::<fn()>("die").unwrap();
        let start = Instant::now();
        match die.call() {
            Err(CallError::Crashed(report)) => assert_eq!(report.signal(), Some(6)),
            other => panic!("expected a crash, got {other:?}"),
        }
        start
    };
    group.bench_function("crash to error", |b| {
        b.iter_custom(|rounds| {
            let one = |_| {
                let (_worker, module) = first_result(&library);
                crash(&module).elapsed()
            };
            (0..rounds).map(one).sum()
        });
    });
    group.bench_function("crash to first result", |b| {
        b.iter_custom(|rounds| {
            let (_, mut module) = first_result(&library);
            let one = |_| {
                let start = crash(&module);
                let (_, next) = first_result(&library);
                let took = start.elapsed();
                module = next;
                took
            };
            (0..rounds).map(one).sum()
        });
    });
    group.finish();
}

criterion_group!(benches, start, restart);
criterion_main!(benches);
