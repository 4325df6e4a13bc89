//! What each topology costs in memory and start-up, and what one tenant's crashes do to another's calls.
//!
//! ```text
//! cargo bench --bench topologies
//! cargo bench --bench topologies -- --test       each once, as a test
//! ```
//!
//! Workers are this very executable, started again (the feature `self-exec`). Memory is private: what the kernel lists as `Private_Clean` and `Private_Dirty`, of all workers together.

mod common;

use common::Library;
use hotcell::{Function, Restart, RestartPolicy, Session, Supervisor, Topology};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

const TENANTS: usize = 8;
const SESSIONS: usize = 4;

fn supervisor(topology: Topology) -> Supervisor {
    let builder = Supervisor::builder().topology(topology).no_quarantine();
    let restarts = RestartPolicy::new(Restart::OnCrash)
        .limit(u32::MAX, Duration::from_secs(1))
        .backoff(Duration::ZERO, Duration::ZERO);
    let builder = if topology == Topology::PerSession { builder } else { builder.restart(restarts) };
    builder.build().expect("the options are sound")
}

fn prepared(session: &Session, library: &Library) -> Function<fn(i32, i32) -> i32> {
    let add = library.load(session).function::<fn(i32, i32) -> i32>("add").expect("the library has it");
    assert_eq!(add.call(2, 3).unwrap(), 5);
    add
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Private memory of a process in KiB.
fn private(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("the worker lives");
    let kib =
        |line: &str| line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
    rollup.lines().filter(|line| line.starts_with("Private_")).map(kib).sum()
}

/// One row: a supervisor with all its sessions.
fn cost(topology: Topology, library: &Library, rounds: usize) {
    let (mut first, mut further, mut again, mut memory, mut workers) = (vec![], vec![], vec![], 0, 0);
    for _ in 0..rounds {
        let supervisor = supervisor(topology);
        let mut held = Vec::new();
        for tenant in 0..TENANTS {
            for session in 0..SESSIONS {
                let name = format!("tenant {tenant}");
                let start = Instant::now();
                let opened = supervisor.session(&*name).expect("a session opens");
                let add = prepared(&opened, library);
                let times = if session == 0 { &mut first } else { &mut further };
                times.push(start.elapsed());
                held.push((opened, add));
            }
        }
        let pids: Vec<u32> = supervisor.snapshot().workers.iter().filter_map(|worker| worker.pid).collect();
        workers = pids.len();
        memory = pids.into_iter().map(private).sum();
        let (session, _) = &held[0];
        let die = library.load(session).function::<fn()>("die").expect("the library has it");
        die.call().expect_err("it ends its worker");
        let start = Instant::now();
        let session = supervisor.session("tenant 0").expect("a session opens");
        prepared(&session, library);
        again.push(start.elapsed());
    }
    println!(
        "| {topology:?} | {workers} | {memory} KiB | {:.2?} | {:.2?} | {:.2?} |",
        median(&mut first),
        median(&mut further),
        median(&mut again)
    );
}

struct Latencies {
    p50: f64,
    p99: f64,
    p999: f64,
}

/// B's calls, one after another, until `meanwhile` has returned.
fn latencies(add: &Function<fn(i32, i32) -> i32>, meanwhile: impl FnOnce() + Send) -> Latencies {
    let over = AtomicBool::new(false);
    let mut times: Vec<u32> = Vec::with_capacity(1 << 24);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            meanwhile();
            over.store(true, Relaxed);
        });
        while !over.load(Relaxed) {
            let start = Instant::now();
            assert_eq!(add.call(2, 3).expect("b's calls succeed"), 5);
            if times.len() < times.capacity() {
                times.push(u32::try_from(start.elapsed().as_nanos()).unwrap_or(u32::MAX));
            }
        }
    });
    times.sort_unstable();
    let at = |per_mille: usize| f64::from(times[(times.len() - 1) * per_mille / 1000]);
    Latencies { p50: at(500), p99: at(990), p999: at(999) }
}

/// What A's crashes do to B's calls, against what as many starts of another process do, and against peace.
fn disturbance(library: &Library, crashes: usize) {
    let supervisor = supervisor(Topology::PerTenant);
    let b = supervisor.session("b").expect("a session opens");
    let add = prepared(&b, library);
    let start = Instant::now();
    let crashing = latencies(&add, || {
        for _ in 0..crashes {
            let session = supervisor.session("a").expect("a's worker is replaced");
            let die = library.load(&session).function::<fn()>("die").expect("the library has it");
            die.call().expect_err("it ends its worker");
        }
    });
    let took = start.elapsed();
    let spawning = latencies(&add, || {
        for _ in 0..crashes {
            let mut command = Command::new("/bin/true");
            command.stdin(Stdio::null()).status().expect("/bin/true runs");
        }
    });
    let peace = latencies(&add, || std::thread::sleep(took));
    println!("\nb's calls: p50, p99, p99.9 in ns, and to those in peace");
    for (name, l) in
        [("in peace", &peace), ("while /bin/true runs", &spawning), ("while a crashes", &crashing)]
    {
        println!(
            "| {name} | {:.0} | {:.0} | {:.0} | {:.2} | {:.2} | {:.2} |",
            l.p50,
            l.p99,
            l.p999,
            l.p50 / peace.p50,
            l.p99 / peace.p99,
            l.p999 / peace.p999
        );
    }
    println!("({crashes} crashes and restarts in {took:.0?}; all of b's calls succeeded)");
}

fn main() {
    let test = std::env::args().any(|argument| argument == "--test");
    let (rounds, crashes) = if test || cfg!(debug_assertions) { (1, 3) } else { (20, 100) };
    let library = Library::compile();
    println!("{TENANTS} tenants with {SESSIONS} sessions each; medians of {rounds} rounds");
    println!(
        "| topology | workers | private memory | a tenant's first session | a further one | after a crash |"
    );
    for topology in [Topology::Shared, Topology::PerTenant, Topology::PerSession] {
        cost(topology, &library, rounds);
    }
    disturbance(&library, crashes);
}
