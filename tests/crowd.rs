//! More threads that make short calls one after another than the machine has CPUs for: they take turns, and nothing else changes. No call is lost, none waits for a
//! thread that has gone, and the threads' affinity is what it was.

#[path = "common/process.rs"]
mod process;

use hotcell::{CallError, Function, Module, Session, WaitPolicy, Worker};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use process::{library, raw_pid, watchdog};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

const FIXTURE: &str = r#"
#include <stdatomic.h>
#include <stdint.h>

static _Atomic uint64_t calls;
uint64_t next(uint64_t a) { calls++; return a + 1; }
uint64_t count(void) { return calls; }
"#;

type Next = fn(u64) -> u64;

fn module(session: &Session) -> Module {
    session.load(Module::ffi(library("crowd", FIXTURE))).unwrap()
}

fn next(session: &Session) -> Function<Next> {
    module(session).function("next").unwrap()
}

/// Dense calls until `enough` says so; gives how many succeeded, and the error that ended them if there was one.
fn call_on(next: &Function<Next>, mut enough: impl FnMut(u64) -> bool) -> (u64, Option<CallError>) {
    let mut done = 0;
    while !enough(done) {
        match next.call(done) {
            Ok(answer) => assert_eq!(answer, done + 1),
            Err(error) => return (done, Some(error)),
        }
        done += 1;
    }
    (done, None)
}

/// Enough calls, or fewer where the machine is so busy that each takes a time slice: a twentieth of them then has to do.
struct Enough(Instant);

impl Enough {
    fn from_now() -> Self {
        Self(Instant::now())
    }

    fn of(&self, done: u64, calls: u64) -> bool {
        let late = || done >= calls.div_ceil(20) && self.0.elapsed() > Duration::from_secs(30);
        done == calls || done.is_multiple_of(16) && late()
    }
}

/// Makes so many calls; none may fail. Gives how many they were.
fn calls_on(next: &Function<Next>, calls: u64, enough: &Enough) -> u64 {
    let (done, error) = call_on(next, |done| enough.of(done, calls));
    assert!(error.is_none(), "{error:?} after {done} calls");
    done
}

/// Runs a thread for each function until each has made `calls` calls; none may fail. Gives how many they were in all.
fn crowd(functions: &[Function<Next>], calls: u64) -> u64 {
    let (barrier, enough) = (Barrier::new(functions.len()), Enough::from_now());
    let call = |next| {
        barrier.wait();
        calls_on(next, calls, &enough)
    };
    std::thread::scope(|scope| {
        let call = &call;
        let threads: Vec<_> = functions.iter().map(|next| scope.spawn(move || call(next))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    })
}

#[test]
fn a_crowd_on_one_session_loses_no_call() {
    let _watchdog = watchdog(300);
    for policy in [WaitPolicy::Adaptive, WaitPolicy::Spin, WaitPolicy::Park] {
        let calls = if policy == WaitPolicy::Park { 300 } else { 20_000 };
        let session = Worker::builder().wait(policy).spawn().unwrap().session().unwrap();
        let functions = vec![next(&session); 8];
        let made = crowd(&functions, calls);
        let count = module(&session).function::<fn() -> u64>("count").unwrap();
        assert_eq!(count.call().unwrap(), made, "{policy:?}");
    }
}

#[test]
fn a_crowd_of_sessions_loses_no_call() {
    let _watchdog = watchdog(300);
    let worker = Worker::spawn().unwrap();
    let sessions: Vec<Session> = (0..8).map(|_| worker.session().unwrap()).collect();
    // Two threads on each.
    let functions: Vec<_> = (0..16).map(|i| next(&sessions[i % 8])).collect();
    let made = crowd(&functions, 10_000);
    let count = module(&sessions[0]).function::<fn() -> u64>("count").unwrap();
    assert_eq!(count.call().unwrap(), made);
}

#[test]
fn threads_that_come_and_go_leave_no_turn_behind() {
    let _watchdog = watchdog(300);
    let worker = Worker::spawn().unwrap();
    let sessions = [worker.session().unwrap(), worker.session().unwrap()];
    let (ended, enough) = (AtomicU64::new(0), Enough::from_now());
    std::thread::scope(|scope| {
        for starter in 0..6 {
            let (next, ended, enough) = (next(&sessions[starter % 2]), &ended, &enough);
            scope.spawn(move || {
                for generation in 0..20u64 {
                    let next = &next;
                    // Each ends in the middle of whatever turn it has.
                    let calls = 500 + 97 * generation;
                    std::thread::scope(|inner| {
                        inner.spawn(move || calls_on(next, calls, enough));
                    });
                    ended.fetch_add(1, Relaxed);
                }
            });
        }
    });
    assert_eq!(ended.load(Relaxed), 120);
    // Who comes after the crowd waits for nobody.
    assert_eq!(call_on(&next(&sessions[0]), |done| done == 1000).0, 1000);
}

#[test]
fn a_callers_long_call_keeps_nobody_waiting_for_its_turn() {
    let _watchdog = watchdog(300);
    let worker = Worker::spawn().unwrap();
    let (busy, other) = (worker.session().unwrap(), worker.session().unwrap());
    let libc = busy.load("libc.so.6").unwrap();
    let usleep = libc.function::<fn(u32) -> i32>("usleep").unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Dense calls, and long ones among them.
        for _ in 0..3 {
            let (next, usleep, stop) = (next(&busy), usleep.clone(), &stop);
            scope.spawn(move || {
                while !stop.load(Relaxed) {
                    assert_eq!(call_on(&next, |done| done == 2000).0, 2000);
                    assert_eq!(usleep.call(50_000).unwrap(), 0);
                }
            });
        }
        calls_on(&next(&other), 100_000, &Enough::from_now());
        stop.store(true, Relaxed);
    });
}

/// Lets eight threads call until each has met an error, which `end` brings about while they call.
fn errors_of_a_crowd(functions: &[Function<Next>], end: impl FnOnce()) -> Vec<CallError> {
    let calls = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = functions
            .iter()
            .map(|next| {
                let calls = &calls;
                scope.spawn(move || {
                    let error = call_on(next, |done| {
                        calls.fetch_add(u64::from(done != 0), Relaxed);
                        false
                    });
                    error.1.expect("it calls until an error")
                })
            })
            .collect();
        let enough = Enough::from_now();
        while !enough.of(calls.load(Relaxed).min(50_000) / 16 * 16, 50_000) {
            std::thread::sleep(Duration::from_millis(1));
        }
        end();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn a_worker_that_dies_in_a_crowd_ends_every_call() {
    let _watchdog = watchdog(300);
    let worker = Worker::spawn().unwrap();
    let sessions: Vec<Session> = (0..4).map(|_| worker.session().unwrap()).collect();
    let functions: Vec<_> = (0..8).map(|i| next(&sessions[i % 4])).collect();
    let kill = || nix::sys::signal::kill(raw_pid(worker.pid()), nix::sys::signal::SIGKILL).unwrap();
    for error in errors_of_a_crowd(&functions, kill) {
        assert!(matches!(error, CallError::Crashed(_)), "{error}");
    }
}

#[test]
fn a_session_closed_in_a_crowd_ends_its_calls_and_no_others() {
    let _watchdog = watchdog(300);
    let worker = Worker::spawn().unwrap();
    let (closed, open) = (worker.session().unwrap(), worker.session().unwrap());
    let functions = vec![next(&closed); 6];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let others = (next(&open), &stop);
        scope.spawn(move || {
            let (next, stop) = others;
            assert!(call_on(&next, |_| stop.load(Relaxed)).1.is_none());
        });
        for error in errors_of_a_crowd(&functions, || closed.close().unwrap()) {
            assert!(matches!(error, CallError::Closed), "{error}");
        }
        stop.store(true, Relaxed);
    });
}

#[test]
fn the_callers_affinity_is_as_it_was() {
    let _watchdog = watchdog(300);
    let this = nix::unistd::Pid::from_raw(0);
    let allowed = sched_getaffinity(this).unwrap();
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap()).collect();
    let session = Worker::spawn().unwrap().session().unwrap();
    let next = next(&session);
    let (barrier, enough) = (Barrier::new(8), Enough::from_now());
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (next, barrier, cpus, enough) = (&next, &barrier, &cpus, &enough);
            scope.spawn(move || {
                let mut mine = allowed;
                if thread % 2 == 1 {
                    // Confined to one CPU by its owner: it has to stay there.
                    mine = CpuSet::new();
                    mine.set(cpus[thread / 2 % cpus.len()]).unwrap();
                    sched_setaffinity(this, &mine).unwrap();
                }
                barrier.wait();
                for _ in 0..20 {
                    calls_on(next, 1000, enough);
                    assert_eq!(sched_getaffinity(this).unwrap(), mine);
                }
            });
        }
    });
}
