//! Many threads on one session, many sessions, many calls in flight: no call is lost, no result goes to the wrong caller, and every thread makes progress.

#[path = "common/process.rs"]
mod process;

use hotcell::{CallError, Function, In, InOut, Module, Session, SessionBuilder, Ticket, WaitPolicy, Worker};
use process::{Random, library, until, watchdog};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Barrier, mpsc};
use std::time::Duration;

const FIXTURE: &str = r#"
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

uint64_t mix(uint64_t a, uint64_t b) { return (a ^ a >> 31) * 0x9e3779b97f4a7c15u + b; }

/* Which call of its library this is, from 1. */
uint64_t ordinal(void) {
  static _Atomic uint64_t count;
  return ++count;
}

/* Whether nobody else was inside; of a session's calls, one runs at a time. */
int alone(void) {
  static _Thread_local int inside;
  int before = inside++;
  for (volatile int i = 0; i < 50; i++) {}
  inside--;
  return before == 0;
}

uint64_t sum_and_raise(uint8_t *bytes, uint64_t count) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < count; i++) sum += bytes[i]++;
  return sum;
}
uint64_t sum(const uint8_t *bytes, uint64_t count) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < count; i++) sum += bytes[i];
  return sum;
}

/* Waits until the file is there. */
int wait_for(const char *path) {
  for (int i = 0; i < 60000; i++) {
    if (access(path, F_OK) == 0) return i;
    nanosleep(&(struct timespec){ 0, 1000000 }, 0);
  }
  return -1;
}
"#;

fn mixed(a: u64, b: u64) -> u64 {
    (a ^ (a >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b)
}

type Mix = fn(u64, u64) -> u64;
type Sum = fn(In<[u8]>, u64) -> u64;
type SumAndRaise = fn(InOut<[u8]>, u64) -> u64;

#[derive(Clone, Debug)]
struct Functions {
    mix: Function<Mix>,
    ordinal: Function<fn() -> u64>,
    alone: Function<fn() -> bool>,
    sum_and_raise: Function<SumAndRaise>,
    sum: Function<Sum>,
    wait_for: Function<fn(In<str>) -> i32>,
}

fn functions(session: &Session) -> Functions {
    let module = session.load(Module::ffi(library("concurrency", FIXTURE))).unwrap();
    Functions {
        mix: module.function("mix").unwrap(),
        ordinal: module.function("ordinal").unwrap(),
        alone: module.function("alone").unwrap(),
        sum_and_raise: module.function("sum_and_raise").unwrap(),
        sum: module.function("sum").unwrap(),
        wait_for: module.function("wait_for").unwrap(),
    }
}

/// A function that returns when it is let go, with the file that lets it go.
struct Gate {
    _folder: tempfile::TempDir,
    path: String,
}

impl Gate {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("open").to_str().unwrap().to_owned();
        Self { _folder: folder, path }
    }

    fn open(&self) {
        std::fs::write(&self.path, "").unwrap();
    }
}

/// One thread's share: calls of every kind, blocking and submitted, each result checked.
fn work(functions: &Functions, seed: u64, rounds: u64, done: &AtomicU64) {
    let mut random = Random(seed);
    let mut flying = VecDeque::<(u64, u64, Ticket<'_, Mix>)>::new();
    for _ in 0..rounds {
        let (a, b) = (random.next(), random.next());
        match random.below(6) {
            0 | 1 => assert_eq!(functions.mix.call(a, b).unwrap(), mixed(a, b)),
            2 => {
                let mut bytes = vec![a.to_le_bytes()[0]; usize::try_from(b % 3000).unwrap()];
                let count = bytes.len() as u64;
                let sum = functions.sum_and_raise.call(&mut bytes, count).unwrap();
                assert_eq!(sum, count * (a & 0xff));
                assert!(bytes.iter().all(|byte| *byte == a.to_le_bytes()[0].wrapping_add(1)));
            }
            3 => assert!(functions.alone.call().unwrap()),
            _ => flying.push_back((a, b, functions.mix.submit(a, b).unwrap())),
        }
        while flying.len() > 5 {
            let ticket = if random.below(2) == 0 { flying.pop_front() } else { flying.pop_back() };
            let (a, b, ticket) = ticket.unwrap();
            if random.below(10) == 0 {
                drop(ticket); // the call runs, its result is nobody's
            } else {
                assert_eq!(ticket.wait().unwrap(), mixed(a, b));
            }
        }
        done.fetch_add(1, Relaxed);
    }
    for (a, b, ticket) in flying {
        assert_eq!(ticket.wait().unwrap(), mixed(a, b));
    }
}

fn threads_on_one_session(threads: u64, policy: WaitPolicy, rounds: u64) {
    let worker = Worker::builder().wait(policy).spawn().unwrap();
    let functions = functions(&worker.session().unwrap());
    let counts: Vec<AtomicU64> = (0..threads).map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        for (seed, done) in counts.iter().enumerate() {
            let functions = &functions;
            scope.spawn(move || work(functions, seed as u64, rounds, done));
        }
    });
    assert!(counts.iter().all(|done| done.load(Relaxed) == rounds));
    assert!(worker.is_alive());
}

#[test]
fn two_threads_share_a_session() {
    let _watchdog = watchdog(120);
    for policy in [WaitPolicy::Adaptive, WaitPolicy::Park, WaitPolicy::Spin] {
        threads_on_one_session(2, policy, 3000);
    }
}

#[test]
fn four_threads_share_a_session() {
    let _watchdog = watchdog(120);
    for policy in [WaitPolicy::Adaptive, WaitPolicy::Park] {
        threads_on_one_session(4, policy, 2000);
    }
}

#[test]
fn sixteen_threads_share_a_session() {
    let _watchdog = watchdog(120);
    for policy in [WaitPolicy::Adaptive, WaitPolicy::Park] {
        threads_on_one_session(16, policy, 500);
    }
}

#[test]
fn more_sessions_than_cores_each_with_its_thread() {
    let _watchdog = watchdog(120);
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let worker = Worker::spawn().unwrap();
    let all = AtomicU64::new(0);
    let sessions: Vec<Functions> =
        (0..2 * cores + 2).map(|_| functions(&worker.session().unwrap())).collect();
    std::thread::scope(|scope| {
        for (seed, functions) in sessions.iter().enumerate() {
            let all = &all;
            scope.spawn(move || work(functions, seed as u64, 1000, all));
        }
    });
    assert_eq!(all.load(Relaxed), 1000 * sessions.len() as u64);
}

#[test]
fn every_call_runs_exactly_once() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let functions = functions(&worker.session().unwrap());
    const THREADS: usize = 8;
    const EACH: usize = 1000;
    let mut ordinals: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let ordinal = &functions.ordinal;
                scope.spawn(move || {
                    let mut got = Vec::new();
                    for i in 0..EACH / 2 {
                        let ticket = ordinal.submit().unwrap();
                        let one = ordinal.call().unwrap();
                        let other = ticket.wait().unwrap();
                        got.extend([one, other]);
                        if (i + thread) % 50 == 0 {
                            std::thread::yield_now();
                        }
                    }
                    got
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    ordinals.sort_unstable();
    assert!(ordinals.into_iter().eq(1..=(THREADS * EACH) as u64), "each number once, none missing");
}

#[test]
fn submitted_calls_run_in_order() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let functions = functions(&worker.session().unwrap());
    for round in 0..20 {
        let tickets: Vec<_> = (0..200).map(|_| functions.ordinal.submit().unwrap()).collect();
        // Redeemed backwards.
        let ordinals: Vec<u64> = tickets.into_iter().rev().map(|ticket| ticket.wait().unwrap()).collect();
        assert!(ordinals.into_iter().rev().eq(round * 200 + 1..=(round + 1) * 200));
    }
}

#[test]
fn no_thread_starves() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let functions = functions(&worker.session().unwrap());
    // Two threads that never let the direct slot be free for long, two that submit as fast as they can, and two that come along now and then: until each of those
    // has had its calls.
    let stop = AtomicBool::new(false);
    let (hungry_calls, slow_calls) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for seed in 0..4u64 {
            let (functions, stop, hungry_calls) = (&functions, &stop, &hungry_calls);
            scope.spawn(move || {
                let mut i = seed;
                while !stop.load(Relaxed) {
                    i += 1;
                    if seed < 2 {
                        assert_eq!(functions.mix.call(i, seed).unwrap(), mixed(i, seed));
                    } else {
                        let tickets: Vec<_> = (0..50).map(|j| functions.mix.submit(i, j).unwrap()).collect();
                        for (j, ticket) in (0..).zip(tickets) {
                            assert_eq!(ticket.wait().unwrap(), mixed(i, j));
                        }
                    }
                    hungry_calls.fetch_add(1, Relaxed);
                }
            });
        }
        let slow: Vec<_> = (0..2u64)
            .map(|seed| {
                let (functions, slow_calls) = (&functions, &slow_calls);
                scope.spawn(move || {
                    for i in 0..200 {
                        assert_eq!(functions.mix.call(i, seed).unwrap(), mixed(i, seed));
                        assert_eq!(functions.mix.submit(seed, i).unwrap().wait().unwrap(), mixed(seed, i));
                        slow_calls.fetch_add(1, Relaxed);
                        std::thread::sleep(Duration::from_micros(300));
                    }
                })
            })
            .collect();
        for thread in slow {
            thread.join().unwrap();
        }
        stop.store(true, Relaxed);
    });
    assert_eq!(slow_calls.load(Relaxed), 400);
    assert!(hungry_calls.load(Relaxed) > 0);
}

#[test]
fn a_full_session_refuses_or_waits_as_asked() {
    let _watchdog = watchdog(120);
    const SLOTS: u32 = 8;
    let worker = Worker::spawn().unwrap();
    let session = worker.session_with(SessionBuilder::new().slots(SLOTS)).unwrap();
    let functions = functions(&session);
    let mut tickets: VecDeque<_> =
        (1..u64::from(SLOTS)).map(|i| (i, functions.mix.submit(i, 9).unwrap())).collect();
    // Full, although all of them have long been answered: a slot is taken until its ticket is redeemed.
    until("the answers", || tickets.iter().all(|(_, ticket)| ticket.is_done()).then_some(()));
    for _ in 0..3 {
        match functions.mix.try_submit_tuple((1, 1)) {
            Err(error @ CallError::Full { slots }) => {
                assert_eq!(slots, SLOTS - 1);
                assert!(!error.may_have_run() && error.session_usable());
            }
            other => panic!("{other:?}"),
        }
    }
    let patience = Duration::from_millis(30);
    assert!(matches!(
        functions.mix.with_timeout(patience).unwrap().submit(1, 1),
        Err(CallError::Full { .. })
    ));
    // A blocking call has a slot of its own.
    assert_eq!(functions.mix.call(5, 5).unwrap(), mixed(5, 5));
    // One slot free: one more goes, a second does not.
    let (i, ticket) = tickets.pop_front().unwrap();
    assert_eq!(ticket.wait().unwrap(), mixed(i, 9));
    tickets.push_back((77, functions.mix.try_submit_tuple((77, 9)).unwrap()));
    assert!(matches!(functions.mix.try_submit_tuple((1, 1)), Err(CallError::Full { .. })));
    // Whoever waits gets the slot of the next ticket that is redeemed, or dropped.
    for drop_it in [false, true] {
        std::thread::scope(|scope| {
            let (started, start) = mpsc::channel();
            let functions = &functions;
            let waiting = scope.spawn(move || {
                started.send(()).unwrap();
                functions.mix.submit(1000, 1).unwrap().wait().unwrap()
            });
            start.recv().unwrap();
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished(), "there is no slot to be had");
            let (i, ticket) = tickets.pop_front().unwrap();
            if drop_it {
                drop(ticket)
            } else {
                assert_eq!(ticket.wait().unwrap(), mixed(i, 9))
            }
            assert_eq!(waiting.join().unwrap(), mixed(1000, 1));
        });
        tickets.push_back((88, functions.mix.submit(88, 9).unwrap()));
    }
    for (i, ticket) in tickets {
        assert_eq!(ticket.wait().unwrap(), mixed(i, 9));
    }
}

#[test]
fn the_smallest_ring_works() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let session = worker.session_with(SessionBuilder::new().slots(2)).unwrap();
    let functions = functions(&session);
    for i in 0..500 {
        let ticket = functions.mix.submit(i, 1).unwrap();
        assert!(matches!(functions.mix.try_submit_tuple((1, 1)), Err(CallError::Full { slots: 1 })));
        assert_eq!(functions.mix.call(i, 2).unwrap(), mixed(i, 2));
        assert_eq!(ticket.wait().unwrap(), mixed(i, 1));
    }
}

#[test]
fn a_ticket_that_is_held_does_not_hold_up_the_ring() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let session = worker.session_with(SessionBuilder::new().slots(16)).unwrap();
    let functions = functions(&session);
    let held: Vec<_> = (0..5u64).map(|i| (i, functions.mix.submit(i, 3).unwrap())).collect();
    let mut bytes = vec![4; 200_000];
    let held_bytes = functions.sum_and_raise.submit(&mut bytes, 200_000).unwrap();
    // Many times round the ring.
    for i in 0..500 {
        let a = functions.mix.submit(i, 4).unwrap();
        let b = functions.mix.submit(i, 5).unwrap();
        assert_eq!(functions.mix.call(i, 6).unwrap(), mixed(i, 6));
        assert_eq!(b.wait().unwrap(), mixed(i, 5));
        assert_eq!(a.wait().unwrap(), mixed(i, 4));
    }
    for (i, ticket) in held.into_iter().rev() {
        assert_eq!(ticket.wait().unwrap(), mixed(i, 3));
    }
    assert_eq!(held_bytes.wait().unwrap(), 800_000);
    assert!(bytes.iter().all(|byte| *byte == 5));
}

#[test]
fn dropped_tickets_give_their_slots_and_bytes_back() {
    let _watchdog = watchdog(100);
    let worker = Worker::spawn().unwrap();
    let session = worker.session_with(SessionBuilder::new().slots(8).payload_bytes_max(1 << 20)).unwrap();
    let functions = functions(&session);
    let bytes = vec![1; 1 << 20];
    // Far more than the slots and the arena could hold if anything were lost. A call that is still running keeps its own, so a submitter who drops can be too fast.
    for i in 0..200 {
        drop(until("room", || match functions.sum.submit(&bytes, 1 << 20) {
            Err(CallError::NoRoom { .. }) => None,
            submitted => Some(submitted.unwrap()),
        }));
        if i % 20 == 19 {
            // A blocking call, which does not pass through the ring, finds room too once the dropped calls are over.
            let sum = until("room", || match functions.sum.call(&bytes, 1 << 20) {
                Err(CallError::NoRoom { .. }) => None,
                called => Some(called.unwrap()),
            });
            assert_eq!(sum, 1 << 20);
        }
    }
    // Dropped before it has run: its bytes are not given to others meanwhile.
    let gate = Gate::new();
    let blocked = functions.wait_for.submit(&gate.path).unwrap();
    let mut scrap = vec![0; 100_000];
    drop(functions.sum_and_raise.submit(&mut scrap, 100_000).unwrap());
    let (mut ones, mut twos) = (vec![1; 100_000], vec![2; 100_000]);
    let first = functions.sum_and_raise.submit(&mut ones, 100_000).unwrap();
    let second = functions.sum_and_raise.submit(&mut twos, 100_000).unwrap();
    gate.open();
    assert!(blocked.wait().unwrap() >= 0);
    assert_eq!(second.wait().unwrap(), 200_000);
    assert_eq!(first.wait().unwrap(), 100_000);
    assert!(ones.iter().all(|byte| *byte == 2) && twos.iter().all(|byte| *byte == 3));
    assert!(scrap.iter().all(|byte| *byte == 0), "a dropped ticket writes nothing back");
}

#[test]
fn tickets_are_redeemed_on_other_threads() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let functions = functions(&worker.session().unwrap());
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel::<(u64, Ticket<'_, Mix>)>(50);
        let redeemed = scope.spawn(move || {
            let mut count = 0;
            for (i, ticket) in receiver {
                assert_eq!(ticket.wait().unwrap(), mixed(i, 1));
                count += 1;
            }
            count
        });
        for i in 0..5000 {
            sender.send((i, functions.mix.submit(i, 1).unwrap())).unwrap();
        }
        drop(sender);
        assert_eq!(redeemed.join().unwrap(), 5000);
    });
}

#[test]
fn a_slow_call_on_one_session_does_not_hold_up_another() {
    let _watchdog = watchdog(120);
    let worker = Worker::spawn().unwrap();
    let (slow, fast) = (functions(&worker.session().unwrap()), functions(&worker.session().unwrap()));
    let gate = Gate::new();
    let blocked = slow.wait_for.submit(&gate.path).unwrap();
    for i in 0..1000 {
        assert_eq!(fast.mix.call(i, 1).unwrap(), mixed(i, 1));
    }
    assert!(!blocked.is_done());
    // On the slow session itself, calls wait for their turn, and get it.
    let barrier = Barrier::new(5);
    std::thread::scope(|scope| {
        for i in 0..4 {
            let (slow, barrier) = (&slow, &barrier);
            scope.spawn(move || {
                barrier.wait();
                assert_eq!(slow.mix.call(i, 2).unwrap(), mixed(i, 2));
            });
        }
        barrier.wait();
        std::thread::sleep(Duration::from_millis(5));
        gate.open();
    });
    assert!(blocked.wait().unwrap() >= 0);
}
