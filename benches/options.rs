//! What each option for hosts that own their cores is worth, beside the default, interleaved in one run.
//!
//! ```text
//! cargo bench --bench options
//! cargo bench --bench options -- --seconds 20    longer, and steadier
//! cargo bench --bench options -- --test          each once, as a test
//! ```
//!
//! Two tables. The first has the typed call `add(int, int)`: every row is a session of its own, in one worker; rows take turns of a few milliseconds, in an order that changes, so that whatever
//! the machine does meanwhile happens to all of them. The calling thread stays on the first CPU that this process may use, rows with `pin_to` have the session's thread on the last.
//! The second has the first call that passes a payload to a new session (every page of it is new in both processes) and one of those after it.
//!
//! What this machine does not permit says so in its row.

mod common;

use common::Library;
use hotcell::{Function, In, Module, Session, SessionBuilder, StartError, Worker};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::time::{Duration, Instant};

type Add = fn(i32, i32) -> i32;
type Take = fn(In<[u8]>, u64) -> u32;

/// How long a row has its turn.
const TURN: Duration = Duration::from_millis(4);
/// Calls of a turn that are not timed: both sides wake up.
const WARM_UP: i32 = 200;
const PAYLOADS: [usize; 3] = [64 << 10, 1 << 20, 16 << 20];
/// Two payloads of the largest kind, and what alignment needs.
const PREFAULT: u64 = 40 << 20;

struct Row {
    name: &'static str,
    session: Result<(Session, Module, Function<Add>), StartError>,
    nanoseconds: Vec<u32>,
}

fn cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).expect("the kernel tells which CPUs may be used");
    (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect()
}

fn stay_on(cpu: usize) {
    let mut here = CpuSet::new();
    here.set(cpu).expect("a CPU that may be used");
    sched_setaffinity(Pid::from_raw(0), &here).expect("a thread can be pinned to a CPU that it may use");
}

/// Makes calls for a while. Adds how long each took, less what reading the clock takes.
fn turn(add: &Function<Add>, length: Duration, clock: u32, into: &mut Vec<u32>) {
    for i in 0..WARM_UP {
        assert_eq!(add.call(i, 2).expect("the worker lives"), i + 2);
    }
    let start = Instant::now();
    let mut last = start;
    let mut i = 0;
    while last.duration_since(start) < length {
        assert_eq!(add.call(i, 3).expect("the worker lives"), i + 3);
        let now = Instant::now();
        let took = now.duration_since(last).as_nanos();
        into.push(u32::try_from(took).unwrap_or(u32::MAX).saturating_sub(clock));
        last = now;
        i += 1;
    }
}

/// What reading the clock once takes: the median.
fn clock_nanoseconds() -> u32 {
    let mut times: Vec<u32> =
        (0..10_001).map(|_| u32::try_from(Instant::now().elapsed().as_nanos()).unwrap_or(u32::MAX)).collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn show(nanoseconds: f64) -> String {
    match nanoseconds {
        n if n < 1e3 => format!("{n:.0} ns"),
        n if n < 1e6 => format!("{:.1} µs", n / 1e3),
        n => format!("{:.2} ms", n / 1e6),
    }
}

fn calls(library: &Library, seconds: f64) {
    let cpus = cpus();
    let (here, there) = (cpus[0], u32::try_from(cpus[cpus.len() - 1]).expect("a CPU's number"));
    // Before this thread is pinned: what it starts inherits that.
    let worker = Worker::spawn().expect("a worker starts");
    stay_on(here);
    let options = SessionBuilder::new;
    let kinds = [
        ("default", options()),
        ("default, again", options()),
        ("prefault_bytes(1 MiB)", options().prefault_bytes(1 << 20)),
        ("lock_memory", options().lock_memory(true)),
        ("huge_pages, prefault_bytes(2 MiB)", options().prefault_bytes(2 << 20).huge_pages(true)),
        ("pin_to", options().pin_to(there)),
        ("real_time(10)", options().real_time(10)),
        ("pin_to, real_time(10)", options().pin_to(there).real_time(10)),
        (
            "pin_to, real_time(10), lock_memory, huge_pages",
            options().pin_to(there).real_time(10).lock_memory(true).prefault_bytes(2 << 20).huge_pages(true),
        ),
        ("latencies", options().latencies(true)),
    ];
    let mut rows: Vec<Row> = kinds
        .map(|(name, options)| {
            let session = worker.session_with(options).map(|session| {
                let module = library.load(&session);
                let add = module.function::<Add>("add").expect("the library has it");
                (session, module, add)
            });
            Row { name, session, nanoseconds: Vec::new() }
        })
        .into();
    let clock = clock_nanoseconds();
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let mut round = 0;
    while round == 0 || Instant::now() < end {
        let count = rows.len();
        for at in 0..count {
            // Each round starts with another row and every other one goes backwards.
            let at = (if round % 2 == 0 { at } else { count - 1 - at } + round) % count;
            let row = &mut rows[at];
            if let Ok((_, _, add)) = &row.session {
                turn(add, TURN, clock, &mut row.nanoseconds);
            }
        }
        round += 1;
    }
    println!(
        "\n`add(int, int)`, caller on CPU {here}, `pin_to({there})`, {round} rounds; reading the clock ({clock} ns) is taken off\n"
    );
    println!("| session | calls | mean | p50 | p99.9 | max |\n|---|--:|--:|--:|--:|--:|");
    for row in &mut rows {
        match &row.session {
            Err(error) => println!("| {} | not permitted here: {error} | | | | |", row.name),
            Ok((session, ..)) => {
                let times = &mut row.nanoseconds;
                times.sort_unstable();
                let at = |percent: f64| {
                    #[allow(
                        clippy::cast_possible_truncation,
                        clippy::cast_sign_loss,
                        clippy::cast_precision_loss
                    )]
                    let rank = (times.len() as f64 * percent / 100.0) as usize;
                    f64::from(times[rank.min(times.len() - 1)])
                };
                let sum: u64 = times.iter().map(|ns| u64::from(*ns)).sum();
                #[allow(clippy::cast_precision_loss)]
                let mean = sum as f64 / times.len() as f64;
                println!(
                    "| {} | {} | {} | {} | {} | {} |",
                    row.name,
                    times.len(),
                    show(mean),
                    show(at(50.0)),
                    show(at(99.9)),
                    show(at(100.0))
                );
                if let Some(latencies) = session.latencies() {
                    println!(
                        "| (by its own histogram) | {} | {} | {} | {} | {} |",
                        latencies.count(),
                        show(nanoseconds(latencies.mean())),
                        show(nanoseconds(latencies.percentile(50.0))),
                        show(nanoseconds(latencies.percentile(99.9))),
                        show(nanoseconds(latencies.max()))
                    );
                }
            }
        }
    }
}

fn nanoseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// The first call with a payload in a new session, and the second.
fn payloads(library: &Library, rounds: usize) {
    let options = SessionBuilder::new;
    let kinds = [
        ("default", options()),
        ("prefault_bytes(40 MiB)", options().prefault_bytes(PREFAULT)),
        ("huge_pages, prefault_bytes(40 MiB)", options().prefault_bytes(PREFAULT).huge_pages(true)),
    ];
    let worker = Worker::spawn().expect("a worker starts");
    // By kind: opening; by kind and payload: first call, later call.
    let mut opening = vec![Vec::new(); kinds.len()];
    let mut times = vec![vec![(Vec::new(), Vec::new()); PAYLOADS.len()]; kinds.len()];
    let mut refused: Vec<Option<StartError>> = kinds.iter().map(|_| None).collect();
    for _ in 0..rounds {
        for (at, bytes) in PAYLOADS.into_iter().enumerate() {
            let payload = vec![7u8; bytes];
            for (kind, (_, options)) in kinds.iter().enumerate() {
                let start = Instant::now();
                let session = match worker.session_with(options.clone()) {
                    Ok(session) => session,
                    Err(error) => {
                        refused[kind] = Some(error);
                        continue;
                    }
                };
                opening[kind].push(nanoseconds(start.elapsed()));
                let take = library.load(&session).function::<Take>("skim").expect("the library has it");
                let call = || {
                    let start = Instant::now();
                    assert_eq!(
                        take.call(&payload, bytes as u64).expect("the worker lives"),
                        7 * u32::try_from(bytes / 64).unwrap_or(0)
                    );
                    nanoseconds(start.elapsed())
                };
                times[kind][at].0.push(call());
                call();
                times[kind][at].1.push(call());
            }
        }
    }
    println!(
        "\nA payload of which the function reads a byte of each cache line, medians of {rounds} new sessions each: its first call, and the third\n"
    );
    println!("| session | opening | 64 KiB: first, third | 1 MiB: first, third | 16 MiB: first, third |");
    println!("|---|--:|--:|--:|--:|");
    for (kind, (name, _)) in kinds.iter().enumerate() {
        if opening[kind].is_empty() {
            if let Some(error) = &refused[kind] {
                println!("| {name} | not permitted here: {error} | | | |");
            }
            continue;
        }
        print!("| {name} | {} |", show(median(opening[kind].clone())));
        for (first, later) in &times[kind] {
            print!(" {}, {} |", show(median(first.clone())), show(median(later.clone())));
        }
        println!();
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let once = arguments.iter().any(|a| a == "--test") || !arguments.iter().any(|a| a == "--bench");
    let seconds =
        arguments.iter().position(|a| a == "--seconds").and_then(|at| arguments.get(at + 1)?.parse().ok());
    let library = Library::compile();
    // Payloads first: the calling thread is pinned for the calls.
    payloads(&library, if once { 1 } else { 15 });
    calls(&library, if once { 0.0 } else { seconds.unwrap_or(12.0) });
}
