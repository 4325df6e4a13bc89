//! What a session tells of its calls: how long they take, and how its waits end.

#[path = "common/process.rs"]
mod process;

use hotcell::{CallError, DynFunction, Function, Module, SessionBuilder, WaitPolicy, Worker};
use process::{library, until, watchdog};
use std::time::{Duration, Instant};

const FIXTURE: &str = r#"
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
uint64_t add(uint64_t a, uint64_t b) { return a + b; }
void nap(uint32_t microseconds) {
  struct timespec time = { 0, microseconds * 1000 };
  nanosleep(&time, 0);
}
void die(void) { abort(); }
"#;

/// One call in so many is measured.
const EVERY: u64 = 17;

struct Cell {
    worker: Worker,
    session: hotcell::Session,
    module: Module,
    add: Function<fn(u64, u64) -> u64>,
    by_name: DynFunction,
}

fn cell(options: SessionBuilder) -> Cell {
    let worker = Worker::spawn().unwrap();
    let session = worker.session_with(options).unwrap();
    let module = session.load(library("latencies", FIXTURE)).unwrap();
    let (add, by_name) =
        (module.function("add").unwrap(), module.prototype("uint64_t add(uint64_t, uint64_t)").unwrap());
    Cell { worker, session, module, add, by_name }
}

fn measured() -> SessionBuilder {
    SessionBuilder::new().latencies(true)
}

#[test]
fn nothing_is_measured_where_it_is_off() {
    let _watchdog = watchdog(60);
    let cell = cell(SessionBuilder::new());
    for i in 0..100 {
        assert_eq!(cell.add.call(i, 1).unwrap(), i + 1);
    }
    assert_eq!(cell.session.latencies(), None);
}

#[test]
fn one_call_in_seventeen_is_measured_typed_or_by_name() {
    let _watchdog = watchdog(60);
    let cell = cell(measured());
    // Neither loading nor resolving is a call.
    assert_eq!(cell.session.latencies().unwrap().count(), 0);
    let started = Instant::now();
    for i in 0..5 * EVERY {
        assert_eq!(cell.add.call(i, 1).unwrap(), i + 1);
    }
    for i in 0..5 * EVERY {
        assert_eq!(cell.by_name.call((i, 2u64)).unwrap(), hotcell::Value::Unsigned(i + 2));
    }
    // Nor is what is submitted, or the session's own.
    for i in 0..2 * EVERY {
        assert_eq!(cell.add.submit(i, 3).unwrap().wait().unwrap(), i + 3);
        cell.session.ping().unwrap();
    }
    let took = started.elapsed();
    let read = cell.session.latencies().unwrap();
    assert_eq!(read.count(), 10);
    assert!(!read.mean().is_zero() && read.mean() <= read.max() && read.max() <= took, "{read}");
    assert!(read.percentile(10.0) <= read.percentile(90.0) && read.percentile(100.0) == read.max(), "{read}");
    assert_eq!(cell.session.clone().latencies(), Some(read), "every handle shows the same");
}

#[test]
fn a_measured_time_is_at_least_what_the_function_took() {
    let _watchdog = watchdog(60);
    let cell = cell(measured());
    let nap = cell.module.function::<fn(u32)>("nap").unwrap();
    let started = Instant::now();
    nap.call(20_000).unwrap();
    let took = started.elapsed();
    for i in 1..EVERY {
        assert_eq!(cell.add.call(i, 0).unwrap(), i);
    }
    let read = cell.session.latencies().unwrap();
    assert_eq!(read.count(), 1);
    let nap = Duration::from_millis(20);
    assert!(read.max() >= nap && read.mean() == read.max() && read.percentile(50.0) == read.max());
    assert!(read.max() <= took, "{read} {took:?}");
}

#[test]
fn many_threads_call_while_others_read() {
    let _watchdog = watchdog(120);
    let cell = cell(measured());
    let (threads, each) = (4u64, 3_000u64);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let add = cell.add.clone();
            scope.spawn(move || {
                for i in 0..each {
                    assert_eq!(add.call(i, thread).unwrap(), i + thread);
                }
            });
        }
        let mut before = 0;
        for _ in 0..200 {
            let (read, counters) = (cell.session.latencies().unwrap(), cell.session.counters());
            assert!(read.count() >= before && read.percentile(50.0) <= read.percentile(99.9));
            assert!(counters.requests <= threads * each + 100);
            before = read.count();
            std::thread::yield_now();
        }
    });
    let read = cell.session.latencies().unwrap();
    // Threads may take each other's place in the count, so neither number is exact.
    assert!(read.count() > 0 && read.count() <= threads * each, "{read}");
    assert!(cell.session.counters().requests >= threads * each);
}

#[test]
fn what_was_measured_outlives_worker_and_session() {
    let _watchdog = watchdog(60);
    let cell = cell(measured());
    for i in 0..=EVERY {
        assert_eq!(cell.add.call(i, 1).unwrap(), i + 1);
    }
    let die = cell.module.function::<fn()>("die").unwrap();
    for _ in 0..2 * EVERY {
        assert!(matches!(die.call(), Err(CallError::Crashed(_))));
    }
    // A call without a result is not counted.
    let dead = cell.session.latencies().unwrap();
    assert!(!cell.worker.is_alive() && dead.count() == 2, "{dead}");
    let closed = Worker::spawn().unwrap().session_with(measured()).unwrap();
    closed.close().unwrap();
    assert_eq!(closed.latencies().unwrap().count(), 0);
    assert!(closed.counters().requests >= 1);
}

#[test]
fn counters_tell_how_waits_end() {
    let _watchdog = watchdog(120);
    for policy in [WaitPolicy::Park, WaitPolicy::Spin, WaitPolicy::Adaptive] {
        let cell = cell(SessionBuilder::new().wait(policy));
        let nap = cell.module.function::<fn(u32)>("nap").unwrap();
        let before = cell.session.counters();
        let mut calls = 0;
        // A caller that does not get a CPU for as long as the function takes finds the reply there: then it neither spins nor sleeps. Hence the patience.
        let now = until("a wait that ends as the policy has it", || {
            nap.call(20_000).unwrap();
            calls += 1;
            let now = cell.session.counters();
            let ended = match policy {
                WaitPolicy::Spin => now.spun > before.spun,
                WaitPolicy::Park => now.parked > before.parked && now.worker_parked > 0,
                WaitPolicy::Adaptive => now.parked > before.parked,
            };
            ended.then_some(now)
        });
        assert_eq!(now.requests - before.requests, calls, "{policy:?}");
        let waits = now.spun - before.spun + now.parked - before.parked;
        match policy {
            WaitPolicy::Spin => assert_eq!((now.parked, now.worker_parked), (0, 0)),
            // It has no first looks.
            WaitPolicy::Park => assert_eq!(waits, calls, "{now:?}"),
            WaitPolicy::Adaptive => {}
        }
        assert!(waits <= calls, "{policy:?} {now:?}");
    }
}
