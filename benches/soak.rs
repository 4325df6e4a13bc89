//! A pool under load whose workers are killed and abort at random, for as long as is asked: is it as good at the end as at the beginning?
//!
//! ```text
//! cargo bench --bench soak -- --seconds 600
//! ```
//!
//! *Pool A* has four workers and two standbys, and four threads that call it. For five seconds of every ten its workers are killed (`SIGKILL`) or made to `abort`, twenty a second; then it has
//! peace. *Pool B*, of one worker, is called by one thread all the time. Every ten seconds a line is printed: calls and errors of A by cause, latency of A's calls, and, taken while both
//! pools are complete, what the host and its workers have. At the end: whether that is flat, and what A's crashes did to B.
//!
//! Fails, with exit code 1, if descriptors or threads grow at all, or memory by more than 32 MiB, from the second line to the last.

mod common;

use common::Library;
use hdrhistogram::Histogram;
use hotcell::{BoxError, CallError, Module, Pool, PoolWorker, Restart, RestartPolicy, Role, Session};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

type Add = fn(i32, i32) -> i32;

const CALLERS: usize = 4;
/// One line, and one round of crashes and peace.
const ROUND: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(60);
const GROWTH_MAX_KIB: u64 = 32 << 10;

/// Latencies of one kind of calls, in nanoseconds.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("the bounds are sound")
}

fn row(times: &Histogram<u64>) -> String {
    let at = |quantile| format_ns(times.value_at_quantile(quantile));
    format!("{} / {} / {}", at(0.5), at(0.99), at(0.999))
}

fn format_ns(ns: u64) -> String {
    format!("{:.1?}", Duration::from_nanos(ns))
}

fn pool(library: PathBuf, workers: usize, standbys: usize) -> Pool {
    let setup = move |session: &Session| -> Result<Module, BoxError> { Ok(session.load(&library)?) };
    // What is measured is the pool, not its pauses.
    let policy = RestartPolicy::new(Restart::OnCrash)
        .limit(u32::MAX, PATIENCE)
        .backoff(Duration::ZERO, Duration::ZERO);
    let pool = Pool::builder(setup).workers(workers).standby(standbys).restart(policy).patience(PATIENCE);
    pool.build().expect("a pool can be built")
}

/// What this process and its workers have.
#[derive(Clone, Copy, Debug)]
struct Belongings {
    host_kib: u64,
    workers_kib: u64,
    descriptors: usize,
    threads: usize,
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn count(folder: &str) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}

fn belongings(pools: [&Pool; 2]) -> Belongings {
    for pool in pools {
        pool.wait_ready(PATIENCE).expect("a pool recovers");
        let started = Instant::now();
        while pool.capacity().leaving > 0 && started.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    // The threads that ended workers, and what the host had of them, go a moment later.
    std::thread::sleep(Duration::from_millis(200));
    let workers = pools.into_iter().flat_map(|pool| pool.snapshot().workers);
    Belongings {
        host_kib: resident_kib(std::process::id()),
        workers_kib: workers.map(|worker| resident_kib(worker.pid)).sum(),
        descriptors: count("/proc/self/fd"),
        threads: count("/proc/self/task"),
    }
}

/// A small random number generator (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % bound as u64).unwrap_or(0)
    }
}

/// Ends one worker of the pool, in one of two ways.
fn harm(pool: &Pool, die: &hotcell::PoolFunction<fn()>, random: &mut Random) {
    if random.below(2) == 0 {
        let error = die.call().expect_err("nobody survives this");
        assert!(matches!(error, CallError::Crashed(_)), "{error}");
        return;
    }
    let mut workers: Vec<PoolWorker> = pool.snapshot().workers;
    workers.retain(|worker| worker.role != Role::Leaving);
    if workers.is_empty() {
        return;
    }
    // A worker that the pool has is not collected, as a rule: its number is its own. Who wants to be sure asks again, as the tests do.
    let pid = nix::unistd::Pid::from_raw(workers[random.below(workers.len())].pid.cast_signed());
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value =
        arguments.iter().position(|argument| argument == "--seconds").and_then(|at| arguments.get(at + 1));
    // Without `--bench` it is run as a test: once, shortly.
    let benched = arguments.iter().any(|argument| argument == "--bench");
    let round = if benched { ROUND } else { Duration::from_secs(1) };
    let seconds = match value.map(|text| text.parse::<u64>()) {
        Some(Ok(seconds)) => Duration::from_secs(seconds),
        Some(Err(_)) => panic!("--seconds takes a whole number"),
        None if benched => Duration::from_secs(60),
        None => 3 * round,
    };
    // At least a line to begin with, one to compare with, and one to compare.
    let rounds = seconds.as_secs().div_ceil(round.as_secs()).max(3);

    let library = Library::compile();
    let (a, b) = (pool(library.path().into(), 4, 2), pool(library.path().into(), 1, 0));
    let (add, die) = (a.function::<Add>("add").unwrap(), a.function::<fn()>("die").unwrap());
    let other_add = b.function::<Add>("add").unwrap();
    let (over, crashing) = (AtomicBool::new(false), AtomicBool::new(false));
    let times = Mutex::new(histogram());
    let (quiet, troubled) = (Mutex::new(histogram()), Mutex::new(histogram()));
    let mut rows: Vec<Belongings> = Vec::new();
    std::thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                let (mut caller, mut own) = (add.caller(), histogram());
                let mut n = 0;
                while !over.load(Relaxed) {
                    let started = Instant::now();
                    match caller.call(n, 1) {
                        Ok(sum) => assert_eq!(sum, n + 1),
                        Err(CallError::Crashed(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                    own.saturating_record(u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX));
                    n = (n + 1) % 1_000_000;
                    if n % 10_000 == 0 {
                        times.lock().unwrap().add(&own).expect("the same bounds");
                        own.reset();
                    }
                    // Four callers and their workers would otherwise be all that two CPUs do.
                    if n % 100 == 0 {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                }
            });
        }
        scope.spawn(|| {
            let mut caller = other_add.caller();
            while !over.load(Relaxed) {
                let (was, started) = (crashing.load(Relaxed), Instant::now());
                assert_eq!(caller.call(2, 3).expect("nobody harms pool B"), 5);
                let took = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
                if was == crashing.load(Relaxed) {
                    let times = if was { &troubled } else { &quiet };
                    times.lock().unwrap().saturating_record(took);
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        let mut random = Random(u64::from(std::process::id()));
        let mut before = a.snapshot();
        let started = Instant::now();
        println!("A's latencies are p50 / p99 / p99.9; memory is resident: host, all workers");
        for _ in 0..rounds {
            let begun = Instant::now();
            crashing.store(true, Relaxed);
            while begun.elapsed() < round / 2 {
                harm(&a, &die, &mut random);
                std::thread::sleep(Duration::from_millis(50));
            }
            crashing.store(false, Relaxed);
            let has = belongings([&a, &b]);
            std::thread::sleep(round.saturating_sub(begun.elapsed()));
            let now = a.snapshot();
            let latencies = std::mem::replace(&mut *times.lock().unwrap(), histogram());
            println!(
                "{:>5.0?} s: {} calls, {} crashed, {} timed out, {} without a worker, {} other; {} lost, {} promoted, {} made again; {}; {} + {} KiB, {} descriptors, {} threads",
                started.elapsed().as_secs(),
                now.calls - before.calls,
                now.errors.crashed - before.errors.crashed,
                now.errors.timed_out - before.errors.timed_out,
                now.errors.no_worker - before.errors.no_worker,
                now.errors.other - before.errors.other,
                now.lost - before.lost,
                now.promoted - before.promoted,
                now.retried - before.retried,
                row(&latencies),
                has.host_kib,
                has.workers_kib,
                has.descriptors,
                has.threads,
            );
            before = now;
            rows.push(has);
        }
        over.store(true, Relaxed);
    });
    let (quiet, troubled) = (quiet.into_inner().unwrap(), troubled.into_inner().unwrap());
    println!("B while A is at peace: {} ({} calls)", row(&quiet), quiet.len());
    println!("B while A crashes:     {} ({} calls)", row(&troubled), troubled.len());
    #[allow(clippy::cast_precision_loss)] // a ratio to two places
    let ratio = |quantile| {
        troubled.value_at_quantile(quantile) as f64 / quiet.value_at_quantile(quantile).max(1) as f64
    };
    println!("ratio: {:.2} / {:.2} / {:.2}", ratio(0.5), ratio(0.99), ratio(0.999));
    // The first round costs everything that is needed once.
    let (first, last) = (rows[1], rows[rows.len() - 1]);
    let grew = [
        ("descriptors", last.descriptors > first.descriptors),
        ("threads", last.threads > first.threads),
        ("the host's memory", last.host_kib > first.host_kib + GROWTH_MAX_KIB),
        ("the workers' memory", last.workers_kib > first.workers_kib + GROWTH_MAX_KIB),
    ];
    let grew: Vec<&str> = grew.iter().filter(|(_, grew)| *grew).map(|(what, _)| *what).collect();
    if grew.is_empty() {
        println!("verdict: flat, from {first:?} to {last:?}");
    } else {
        println!("verdict: NOT FLAT: {} grew, from {first:?} to {last:?}", grew.join(", "));
        std::process::exit(1);
    }
}
