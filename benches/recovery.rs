//! What standing by is worth, and what a pool's handles cost.
//!
//! ```text
//! cargo bench --bench recovery
//! ```
//!
//! *Recovery*: from the error of a call that killed its worker to the result of the next call, with a standby and without one (a cold start: process, session, module, functions). In turns.
//! *Handles*: `add(int, int)` by a plain function, a pool's caller and a pool function, in turns; each is set beside the plain function of its own round.

mod common;

use common::Library;
use hotcell::{BoxError, Module, Pool, PoolFunction, Restart, RestartPolicy, Session, Worker};
use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

type Add = fn(i32, i32) -> i32;

const PATIENCE: Duration = Duration::from_secs(60);

fn pool(library: PathBuf, standbys: usize) -> Pool {
    let setup = move |session: &Session| -> Result<Module, BoxError> { Ok(session.load(&library)?) };
    let policy = RestartPolicy::new(Restart::OnCrash)
        .limit(u32::MAX, PATIENCE)
        .backoff(Duration::ZERO, Duration::ZERO);
    let pool = Pool::builder(setup).workers(1).standby(standbys).restart(policy).patience(PATIENCE);
    pool.build().expect("a pool can be built")
}

/// From the error to the next result.
fn recover(pool: &Pool, die: &PoolFunction<fn()>, add: &PoolFunction<Add>) -> Duration {
    pool.wait_ready(PATIENCE).expect("a pool recovers");
    // Let what the last round has left behind come to rest.
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(add.call(1, 2).unwrap(), 3);
    assert!(die.call().is_err());
    let started = Instant::now();
    assert_eq!(add.call(2, 3).unwrap(), 5);
    started.elapsed()
}

fn quantile(times: &[Duration], of: usize) -> Duration {
    times[(times.len() - 1) * of / 1000]
}

fn row(name: &str, times: &mut [Duration]) {
    times.sort_unstable();
    println!(
        "{name:<28} p50 {:>9.1?}  p90 {:>9.1?}  p99 {:>9.1?}  max {:>9.1?}",
        quantile(times, 500),
        quantile(times, 900),
        quantile(times, 990),
        quantile(times, 1000),
    );
}

/// Nanoseconds a call.
fn each(calls: u32, mut call: impl FnMut(i32) -> i32) -> f64 {
    let started = Instant::now();
    for n in 0..calls {
        let n = (n % 1000).cast_signed();
        assert_eq!(call(black_box(n)), n + 1);
    }
    started.elapsed().as_secs_f64() * 1e9 / f64::from(calls)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // Without `--bench` it is run as a test: each once, shortly.
    let benched = std::env::args().any(|argument| argument == "--bench");
    let (rounds, turns, calls) = if benched { (300, 60, 100_000) } else { (3, 2, 100) };
    let library = Library::compile();
    let (warm, cold) = (pool(library.path().into(), 1), pool(library.path().into(), 0));
    let functions =
        |pool: &Pool| (pool.function::<fn()>("die").unwrap(), pool.function::<Add>("add").unwrap());
    let (warm_functions, cold_functions) = (functions(&warm), functions(&cold));
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        with.push(recover(&warm, &warm_functions.0, &warm_functions.1));
        without.push(recover(&cold, &cold_functions.0, &cold_functions.1));
    }
    println!("from the error to the next result, {rounds} crashes each");
    row("with a standby", &mut with);
    row("without", &mut without);
    println!();

    let worker = Worker::spawn().unwrap();
    let module = library.load(&worker.session().unwrap());
    let plain = module.function::<Add>("add").unwrap();
    let pooled = &warm_functions.1;
    let mut caller = pooled.caller();
    let (mut plains, mut callers, mut pooleds) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..turns {
        let base = each(calls, |n| plain.call(n, 1).unwrap());
        plains.push(base);
        callers.push(each(calls, |n| caller.call(n, 1).unwrap()) / base);
        pooleds.push(each(calls, |n| pooled.call(n, 1).unwrap()) / base);
    }
    println!("add(int, int), medians of {turns} turns of {calls} calls");
    println!("{:<28} {:.1} ns", "function", median(plains));
    println!("{:<28} {:.2} times that", "pool's caller", median(callers));
    println!("{:<28} {:.2} times that", "pool function", median(pooleds));
}
