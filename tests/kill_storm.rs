//! Workers are killed by the hundred, at random moments of a stream of calls: every call is accounted for exactly once, no result is ever wrong, what a report says about
//! having run is true, and nothing is left behind.
//!
//! The worker keeps a ledger in a file: one byte for each call, raised when the call runs. It survives the worker and is compared with what the host was told.
//!
//! `HOTCELL_STORM_KILLS` sets the number of kills, `HOTCELL_STORM_SEED` repeats a storm.

#[path = "common/ledger.rs"]
mod ledger;
#[path = "common/process.rs"]
mod process;

use hotcell::{
    CallError, CrashReport, Error, Function, In, InOut, Involvement, Module, PIPELINE_DEPTH, Session,
    SessionBuilder, Worker,
};
use ledger::{Booked, FIXTURE, Told, mixed};
use nix::sys::signal::{Signal, kill};
use process::{Process, Random, isolated, library, raw_pid, until};
use std::collections::VecDeque;
use std::ffi::CStr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Entries of the ledger: more calls than a worker serves in its short life.
const LEDGER: usize = 1 << 20;
/// Entries that one calling thread may use.
const SHARE: u64 = 1 << 16;
/// Tickets that one submitting thread keeps in flight.
const IN_FLIGHT: usize = 120;

/// What became of the calls of all threads.
#[derive(Debug, Default)]
struct Tally {
    issued: AtomicU64,
    right: AtomicU64,
    crashed: AtomicU64,
    may_have_run: AtomicU64,
    forgotten: AtomicU64,
    killed_while_opening: AtomicU64,
    in_flight_max: AtomicU64,
}

type Mix = fn(u64, u64) -> u64;
type RaiseBy = fn(u64, InOut<[u8]>, u64, u8) -> u64;

#[derive(Clone, Debug)]
struct Functions {
    mix: Function<Mix>,
    raise_by: Function<RaiseBy>,
}

/// What one thread does until its worker is dead.
type Work = fn(&mut Caller, &Functions);

/// A thread's own calls: their numbers, and what became of them.
struct Caller {
    first: u64,
    told: Vec<Told>,
    random: Random,
    tally: Arc<Tally>,
    /// How often the submitting threads of this worker had all the tickets that they want.
    started: Arc<AtomicU32>,
}

impl Caller {
    /// The number of the next call; `None` when the thread has used its share.
    fn next(&mut self) -> Option<u64> {
        let used = self.told.len() as u64;
        if used == SHARE {
            return None;
        }
        self.told.push(Told::DidNotRun);
        self.tally.issued.fetch_add(1, Relaxed);
        Some(self.first + used)
    }

    /// Books the outcome of a call that was issued. Whether the worker is alive, as far as this call knows.
    fn book(&mut self, call: u64, outcome: Result<bool, CallError>) -> bool {
        let told = &mut self.told[usize::try_from(call - self.first).unwrap()];
        match outcome {
            Ok(right) => {
                assert!(right, "call {call} gave a wrong result");
                self.tally.right.fetch_add(1, Relaxed);
                *told = Told::Ran;
                true
            }
            Err(error) => {
                let CallError::Crashed(report) = &error else { panic!("call {call}: {error:?}") };
                check_report(report);
                self.tally.crashed.fetch_add(1, Relaxed);
                assert_eq!(error.may_have_run(), report.involvement() != Involvement::NotRun);
                if error.may_have_run() {
                    self.tally.may_have_run.fetch_add(1, Relaxed);
                    *told = Told::MayHaveRun;
                }
                false
            }
        }
    }

    fn bytes(&mut self) -> (Vec<u8>, u8) {
        // Sometimes more than the direct slot's own room, so that the arena has work too.
        let count = match self.random.below(8) {
            0 => 80_000 + self.random.below(100_000),
            1..4 => self.random.below(64),
            _ => self.random.below(5000),
        };
        let with = self.random.next().to_le_bytes()[0];
        (vec![with; usize::try_from(count).unwrap()], with)
    }

    /// One call after the other, until the worker is dead, or the share used: the killer may be held up for that long.
    fn blocking(&mut self, functions: &Functions) {
        loop {
            let Some(call) = self.next() else { return };
            let outcome = if self.random.below(4) == 0 {
                let (mut bytes, with) = self.bytes();
                let count = bytes.len() as u64;
                let sum = functions.raise_by.call(call, &mut bytes, count, 3);
                sum.map(|sum| {
                    sum == count * u64::from(with) && bytes.iter().all(|byte| *byte == with.wrapping_add(3))
                })
            } else {
                let x = self.random.next();
                functions.mix.call(call, x).map(|y| y == mixed(call, x))
            };
            if !self.book(call, outcome) {
                return;
            }
        }
    }

    /// Many calls in flight, redeemed in any order, until the worker is dead. Then every ticket is redeemed all the same.
    fn submitting(&mut self, functions: &Functions) {
        let mut flying = Vec::new();
        let mut alive = true;
        while alive {
            while alive && flying.len() < IN_FLIGHT {
                let Some(call) = self.next() else {
                    alive = false;
                    break;
                };
                let x = self.random.next();
                match functions.mix.submit(call, x) {
                    Ok(ticket) => flying.push((call, x, ticket)),
                    Err(error) => {
                        assert!(!error.may_have_run(), "a call that was not sent: {error:?}");
                        alive = self.book(call, Err(error));
                    }
                }
            }
            self.tally.in_flight_max.fetch_max(flying.len() as u64, Relaxed);
            self.started.fetch_add(1, Relaxed);
            for _ in 0..IN_FLIGHT / 2 {
                let Some(last) = flying.len().checked_sub(1) else { break };
                let at = usize::try_from(self.random.below(flying.len() as u64)).unwrap().min(last);
                let (call, x, ticket) = flying.swap_remove(at);
                let outcome = ticket.wait().map(|y| y == mixed(call, x));
                alive &= self.book(call, outcome);
            }
        }
        for (call, x, ticket) in flying {
            let outcome = ticket.wait().map(|y| y == mixed(call, x));
            self.book(call, outcome);
        }
    }

    /// Calls in a row, in pipelines of random length, some of which are given up with calls in flight. Then every call is received all the same.
    fn pipelining(&mut self, functions: &Functions) {
        /// Bursts of one pipeline.
        const BURSTS: u64 = 20;
        let mut alive = true;
        while alive {
            // A pipeline makes calls so fast that a late kill would come after the thread's share: then others, which no ledger counts, until it comes.
            if self.told.len() as u64 + BURSTS * PIPELINE_DEPTH >= SHARE {
                while functions.mix.call(u64::MAX, 0).is_ok() {}
                return;
            }
            let mut pipeline = match functions.mix.pipeline() {
                Ok(pipeline) => pipeline,
                Err(error) => {
                    // Nothing was sent: a call of its own stands for it.
                    let Some(call) = self.next() else { panic!("the kill never came") };
                    self.book(call, Err(error));
                    return;
                }
            };
            let mut flying = VecDeque::new();
            for _ in 0..self.random.below(BURSTS) {
                for _ in 0..self.random.below(PIPELINE_DEPTH + 1) {
                    if !alive || pipeline.in_flight() == PIPELINE_DEPTH {
                        break;
                    }
                    let Some(call) = self.next() else { panic!("the kill never came") };
                    let x = self.random.next();
                    match pipeline.send(call, x) {
                        Ok(()) => flying.push_back((call, x)),
                        Err(error) => {
                            assert!(!error.may_have_run(), "a call that was not sent: {error:?}");
                            alive = self.book(call, Err(error));
                        }
                    }
                }
                self.tally.in_flight_max.fetch_max(flying.len() as u64, Relaxed);
                for _ in 0..self.random.below(PIPELINE_DEPTH + 1) {
                    let Some((call, x)) = flying.pop_front() else { break };
                    let result = pipeline.receive().transpose().expect("it is in flight");
                    alive &= self.book(call, result.map(|y| y == mixed(call, x)));
                }
            }
            if alive && self.random.below(4) == 0 {
                // Forgotten: they may have run when the worker dies, or not.
                for (call, _) in flying {
                    self.told[usize::try_from(call - self.first).unwrap()] = Told::MayHaveRun;
                    self.tally.forgotten.fetch_add(1, Relaxed);
                }
                continue;
            }
            for (call, x) in flying {
                let result = pipeline.receive().transpose().expect("it is in flight");
                alive &= self.book(call, result.map(|y| y == mixed(call, x)));
            }
        }
    }

    /// Buffers in flight: each ticket borrows its own.
    fn submitting_buffers(&mut self, functions: &Functions) {
        let mut alive = true;
        while alive {
            let mut buffers: Vec<_> = (0..40).map(|_| self.bytes()).collect();
            let mut flying = Vec::new();
            for (bytes, with) in &mut buffers {
                let Some(call) = self.next() else {
                    alive = false;
                    break;
                };
                let count = bytes.len() as u64;
                let expected = count * u64::from(*with);
                match functions.raise_by.submit(call, bytes, count, 5) {
                    Ok(ticket) => flying.push((call, expected, ticket)),
                    Err(error) => {
                        alive = self.book(call, Err(error));
                        break;
                    }
                }
            }
            let mut all_right = alive;
            for (call, expected, ticket) in flying {
                let outcome = ticket.wait().map(|sum| sum == expected);
                all_right &= self.book(call, outcome);
            }
            if all_right {
                for (bytes, with) in &buffers {
                    assert!(bytes.iter().all(|byte| *byte == with.wrapping_add(5)), "wrong bytes came back");
                }
            }
            alive = all_right;
        }
    }
}

fn check_report(report: &CrashReport) {
    assert_eq!(report.signal(), Some(libc::SIGKILL), "{report}");
}

/// Opens sessions and loads the library in them. The worker may be killed meanwhile.
fn open(worker: &Worker, ledger: &CStr) -> Result<(Vec<Session>, Vec<Functions>), Error> {
    let mut opened = (Vec::new(), Vec::new());
    for slots in [256, 300] {
        let session = worker.session_with(SessionBuilder::new().slots(slots))?;
        let module = session.load(Module::ffi(library("kill_storm", FIXTURE)))?;
        let open_ledger = module.function::<fn(In<CStr>, u64) -> i32>("open_ledger")?;
        assert_eq!(open_ledger.call(ledger, LEDGER as u64)?, 0);
        opened.1.push(Functions { mix: module.function("mix")?, raise_by: module.function("raise_by")? });
        opened.0.push(session);
    }
    Ok(opened)
}

/// A file for the ledger of one worker after the other.
struct Ledger {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Ledger {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = folder.path().join("ledger");
        Self { _folder: folder, path }
    }

    fn clear(&self) {
        let file = std::fs::File::create(&self.path).unwrap();
        file.set_len(LEDGER as u64).unwrap();
    }
}

/// One worker from its start to its violent end.
fn one_worker(random: &mut Random, ledger: &Ledger, tally: &Arc<Tally>) {
    ledger.clear();
    let worker = Worker::spawn().unwrap();
    let process = Process::of(worker.pid());
    let path = std::ffi::CString::new(ledger.path.to_str().unwrap()).unwrap();
    let early = random.below(10) == 0;
    let delay = Duration::from_micros(random.below(if early { 8000 } else { 6000 }));
    let pid = raw_pid(worker.pid());
    let killer = move || {
        std::thread::sleep(delay);
        kill(pid, Signal::SIGKILL).unwrap();
    };
    // Most are killed while the calls stream, some before that.
    let streaming = random.below(4) > 0;
    if early {
        // Not collected before the report is there, so the number is still its own.
        let killer = std::thread::spawn(killer);
        let opened = open(&worker, &path);
        killer.join().unwrap();
        match opened {
            Ok(_) => {}
            Err(error) => {
                let report = error.crash_report().unwrap_or_else(|| panic!("{error:?}"));
                check_report(report);
                tally.killed_while_opening.fetch_add(1, Relaxed);
            }
        }
    } else {
        let (_sessions, functions) = open(&worker, &path).unwrap();
        let next = AtomicU32::new(0);
        let started = Arc::new(AtomicU32::new(0));
        let told = std::thread::scope(|scope| {
            let works: [(usize, Work); 8] = [
                (0, Caller::pipelining),
                (1, Caller::pipelining),
                (0, Caller::blocking),
                (0, Caller::blocking),
                (0, Caller::submitting),
                (1, Caller::submitting),
                (1, Caller::submitting_buffers),
                (1, Caller::blocking),
            ];
            let threads = works.map(|(session, work)| {
                let first = u64::from(next.fetch_add(1, Relaxed)) * SHARE;
                let mut caller = Caller {
                    first,
                    told: Vec::new(),
                    random: Random(random.next()),
                    tally: Arc::clone(tally),
                    started: Arc::clone(&started),
                };
                let functions = &functions[session];
                scope.spawn(move || {
                    work(&mut caller, functions);
                    Booked { first: caller.first, times_max: 1, told: caller.told }
                })
            });
            if streaming {
                until("calls in flight", || (started.load(Relaxed) > 1).then_some(()));
            }
            killer();
            threads.map(|thread| thread.join().unwrap())
        });
        until("the report", || worker.crash_report());
        ledger::check(&ledger.path, &told);
        // After the end there is only the end.
        assert!(matches!(functions[0].mix.call(0, 0), Err(CallError::Crashed(_))));
    }
    let report = until("the report", || worker.crash_report());
    check_report(&report);
    assert!(process.is_gone(), "the report comes after the process was collected");
}

#[test]
fn every_call_is_accounted_for_when_workers_are_killed() {
    let number = |name, default| match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is {text}, which is no number")),
        Err(_) => default,
    };
    let kills: u64 = number("HOTCELL_STORM_KILLS", 500);
    let seed: u64 = number("HOTCELL_STORM_SEED", 20_260_101);
    isolated("every_call_is_accounted_for_when_workers_are_killed", 180 + kills / 2, || {
        let tally = Arc::new(Tally::default());
        let storm = |seed: u64, kills: u64| {
            let tally = Arc::clone(&tally);
            std::thread::spawn(move || {
                let (mut random, ledger) = (Random(seed), Ledger::new());
                for round in 0..kills {
                    let at_round = random.clone();
                    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        one_worker(&mut random, &ledger, &tally);
                    }));
                    if let Err(panic) = done {
                        eprintln!(
                            "round {round} of the storm with seed {seed}; the round alone has seed {}",
                            at_round.0
                        );
                        std::panic::resume_unwind(panic);
                    }
                }
            })
        };
        let both = |seed: u64, kills: u64| {
            eprintln!("storms with seeds {seed} and {}: {kills} kills", seed + 1);
            let storms = [storm(seed, kills / 2), storm(seed + 1, kills - kills / 2)];
            let ends = storms.map(std::thread::JoinHandle::join);
            assert!(ends.iter().all(Result::is_ok));
        };
        let me = std::process::id();
        // The library's own threads come with the first worker.
        Worker::spawn().unwrap().dispose();
        let threads = process::threads(me);
        // The first of everything costs memory once: threads' arenas.
        both(seed, 20);
        let settled = || {
            until("the library to let go", || {
                (process::region_mappings(me) == 0 && process::pidfds(me) == 0).then_some(())
            });
            // A thread that was joined is seen by the kernel for a moment longer.
            until("the storms' threads to end", || (process::threads(me) == threads).then_some(()));
            (process::descriptors(me), process::kib(me, "VmRSS"))
        };
        let before = settled();
        both(seed + 2, kills.max(20) - 20);
        let after = settled();
        eprintln!("{tally:?}");
        eprintln!("resident before and after: {} and {} KiB", before.1, after.1);
        let forgotten = tally.forgotten.load(Relaxed);
        assert_eq!(
            tally.issued.load(Relaxed),
            tally.right.load(Relaxed) + tally.crashed.load(Relaxed) + forgotten
        );
        assert!(tally.right.load(Relaxed) > 0 && tally.may_have_run.load(Relaxed) > 0);
        // How many of those in flight the worker had still to answer when it was killed is the scheduler's choice.
        assert!(tally.in_flight_max.load(Relaxed) >= IN_FLIGHT as u64 && tally.crashed.load(Relaxed) > kills);
        assert_eq!(after.0, before.0, "descriptors");
        assert!(after.1 < before.1 + 64 * 1024, "{} KiB before, {} KiB after", before.1, after.1);
        assert_eq!(process::workers_of(me), Vec::<u32>::new());
        assert_eq!(process::zombies(), Vec::<u32>::new());
    });
}
