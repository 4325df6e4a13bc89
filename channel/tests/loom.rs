//! Model check of the slot's state machine with loom: the code of `slot` and `wait` itself, with loom's atomics, its futex modelled as a condition
//! variable with a compare before the sleep (`wait::model`).
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p hotcell-channel --release --test loom --target-dir target/loom`
//!
//! What is checked, in every interleaving and with every value that the memory model lets a load return: no wake-up is lost (loom reports a deadlock),
//! whoever sees the turn sees the words, each call gets its own answer, and a death ends every wait but hides no reply.
//!
//! The stream's publisher has no fence of its own, since the sleeper's `membarrier` makes it one. Loom knows no such barrier, so under `--cfg loom` a sequentially consistent fence
//! stands in its place, on the publisher's side (`Barrier::after_publish`) as on the sleeper's (`Barrier::before_sleep`). That the model sees what is at stake was checked by hand: with either of the two
//! fences taken out, `both_sides_of_the_stream_park` and `a_pipeline_and_a_caller_wake_one_worker` end in a deadlock, the lost wake-up.
//!
//! The direct slot's home is the host's own, so its code lies there (`src/home.rs`) and is taken in as it is. Its `membarrier` is modelled in the same way: with
//! the fence taken out of `Home::take`, or with a store in place of the mover's exchange, `a_mover_puts_back_only_what_was_there` finds two threads that hold the slot.
#![cfg(loom)]

#[path = "../../src/home.rs"]
#[allow(dead_code)] // the model needs less of it than the host
mod home;

use hotcell_channel::slot::{Doorbell, Progress, Slot};
use hotcell_channel::stream::{self, Barrier, Lane, Lanes, Sleepers, Stream, Width};
use hotcell_channel::wait::{self, Policy, Spin, Waited, Which};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering::SeqCst};
use loom::thread;
use std::time::Duration;

#[derive(Default)]
struct Shared {
    direct: Slot,
    ring: Slot,
    bell: Doorbell,
    progress: Progress,
}

/// Explores all interleavings of `body`; with `preemptions`, all that switch threads against their will at most so often.
fn check(preemptions: Option<usize>, body: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = preemptions;
    model.check(body);
}

/// The worker's loop for `count` requests: answers each word with its successor.
fn serve(shared: &Shared, policy: Policy, count: u32) {
    let spin = Spin::new(policy);
    let mut last = Which::Direct;
    for served in 0..count {
        let which = wait::wait_request(
            &shared.direct,
            &shared.ring,
            last,
            &spin,
            &shared.bell,
            &shared.progress,
            served.into(),
        );
        let slot = match which {
            Which::Direct => &shared.direct,
            Which::Ring => &shared.ring,
        };
        last = which;
        slot.set_word(0, slot.word(0) + 1);
        wait::reply(slot);
    }
}

fn call(shared: &Shared, slot: &Slot, policy: Policy, word: u64) {
    slot.set_word(0, word);
    wait::publish(slot, &shared.bell);
    let waited =
        wait::wait_reply(slot, &Spin::new(policy), &shared.bell, &shared.progress, 1, Duration::MAX, || true);
    assert_eq!(waited, Waited::Replied);
    assert_eq!(slot.word(0), word + 1);
}

/// One caller, two calls one after the other on the same slot, which is how the direct slot lives.
fn two_calls(host: Policy, worker: Policy) {
    check(Some(4), move || {
        let shared = Arc::new(Shared::default());
        let served = Arc::clone(&shared);
        let thread = thread::spawn(move || serve(&served, worker, 2));
        call(&shared, &shared.direct, host, 10);
        call(&shared, &shared.direct, host, 20);
        thread.join().unwrap();
    });
}

#[test]
fn both_sides_park() {
    two_calls(Policy::Park, Policy::Park);
}

#[test]
fn the_host_looks_before_it_parks() {
    two_calls(Policy::Adaptive, Policy::Park);
}

#[test]
fn the_worker_looks_before_it_parks() {
    two_calls(Policy::Park, Policy::Adaptive);
}

#[test]
fn both_look_before_they_park() {
    two_calls(Policy::Adaptive, Policy::Adaptive);
}

/// Two callers on the two slots that the worker listens to, with one bell between them.
#[test]
fn two_callers_ring_one_bell() {
    check(Some(2), || {
        let shared = Arc::new(Shared::default());
        let served = Arc::clone(&shared);
        let worker = thread::spawn(move || serve(&served, Policy::Park, 2));
        let other = Arc::clone(&shared);
        let caller = thread::spawn(move || call(&other, &other.ring, Policy::Park, 30));
        call(&shared, &shared.direct, Policy::Park, 10);
        caller.join().unwrap();
        worker.join().unwrap();
    });
}

/// The worker dies without an answer: the monitor writes the fact, then closes the slot. The caller may be anywhere in its wait, or not yet have published.
#[test]
fn a_death_ends_the_wait() {
    check(None, || {
        let shared = Arc::new(Shared::default());
        let alive = Arc::new(AtomicBool::new(true));
        let (seen, fact) = (Arc::clone(&shared), Arc::clone(&alive));
        let monitor = thread::spawn(move || {
            fact.store(false, SeqCst);
            wait::close(&seen.direct);
        });
        wait::publish(&shared.direct, &shared.bell);
        let waited = wait::wait_reply(
            &shared.direct,
            &Spin::new(Policy::Park),
            &shared.bell,
            &shared.progress,
            1,
            Duration::MAX,
            || alive.load(SeqCst),
        );
        assert_eq!(waited, Waited::Dead);
        monitor.join().unwrap();
    });
}

/// The worker answers and then dies: the caller gets the answer, whatever the monitor does meanwhile.
#[test]
fn a_death_hides_no_reply() {
    check(Some(3), || {
        let shared = Arc::new(Shared::default());
        let alive = Arc::new(AtomicBool::new(true));
        let (seen, fact) = (Arc::clone(&shared), Arc::clone(&alive));
        shared.direct.set_word(0, 10);
        wait::publish(&shared.direct, &shared.bell);
        let worker = thread::spawn(move || {
            serve(&seen, Policy::Park, 1);
            // Dead from here on; what follows is the monitor's.
            fact.store(false, SeqCst);
            wait::close(&seen.direct);
        });
        let waited = wait::wait_reply(
            &shared.direct,
            &Spin::new(Policy::Park),
            &shared.bell,
            &shared.progress,
            1,
            Duration::MAX,
            || alive.load(SeqCst),
        );
        assert_eq!(waited, Waited::Replied);
        assert_eq!(shared.direct.word(0), 11);
        worker.join().unwrap();
    });
}

/// The stream under loom: two rings of two records, one call in flight.
#[derive(Default)]
struct Streaming {
    shared: Shared,
    stream: Stream,
    sleepers: Sleepers,
}

/// The worker's loop for `count` requests out of any lane.
fn serve_stream(all: &Streaming, policy: Policy, count: u32) {
    let (spin, shared) = (Spin::new(policy), &all.shared);
    let (mut last, mut position) = (Lane::Direct, 0);
    for served in 0..count {
        let lanes = Lanes {
            direct: &shared.direct,
            ring: &shared.ring,
            stream: &all.stream,
            position,
            width: Width::Wide,
            sleepers: &all.sleepers,
            barrier: Barrier::Membarrier,
        };
        let (lane, unsure) =
            stream::wait_request(lanes, last, &spin, &shared.bell, &shared.progress, served.into());
        assert!(!unsure);
        last = lane;
        let slot = match lane {
            Lane::Stream => {
                assert_eq!(all.stream.requested(position, Width::Wide), Some(7));
                let word = all.stream.request(position, Width::Wide).word(0);
                all.stream.answer(position, word + 1, 0);
                all.sleepers.wake_host(Barrier::Membarrier);
                position += 1;
                continue;
            }
            Lane::Direct => &shared.direct,
            Lane::Ring => &shared.ring,
        };
        slot.set_word(0, slot.word(0) + 1);
        wait::reply(slot);
    }
}

fn send(all: &Streaming, position: u64, word: u64) {
    all.stream.request(position, Width::Wide).set_word(0, word);
    all.stream.publish(position, Width::Wide, 7);
    all.sleepers.wake_worker(Barrier::Membarrier, &all.shared.bell);
}

fn receive(all: &Streaming, policy: Policy, position: u64, alive: impl Fn() -> bool) -> Waited {
    let (spin, shared) = (Spin::new(policy), &all.shared);
    stream::wait_reply(
        &all.stream,
        &all.sleepers,
        position,
        1,
        Barrier::Membarrier,
        &spin,
        &shared.bell,
        &shared.progress,
        Duration::MAX,
        alive,
    )
}

/// Two calls, one after the other.
fn two_calls_in_a_row(host: Policy, worker: Policy) {
    check(Some(3), move || {
        let all = Arc::new(Streaming::default());
        let served = Arc::clone(&all);
        let thread = thread::spawn(move || serve_stream(&served, worker, 2));
        for position in 0..2 {
            send(&all, position, 10 * position);
            assert_eq!(receive(&all, host, position, || true), Waited::Replied);
            assert_eq!(all.stream.reply(position).word(), 10 * position + 1);
        }
        thread.join().unwrap();
    });
}

#[test]
fn both_sides_of_the_stream_park() {
    two_calls_in_a_row(Policy::Park, Policy::Park);
}

#[test]
fn both_sides_of_the_stream_look_before_they_park() {
    two_calls_in_a_row(Policy::Adaptive, Policy::Adaptive);
}

/// A pipeline and a blocking call at once: the worker sleeps for both on one bell.
#[test]
fn a_pipeline_and_a_caller_wake_one_worker() {
    check(Some(2), || {
        let all = Arc::new(Streaming::default());
        let (served, other) = (Arc::clone(&all), Arc::clone(&all));
        let worker = thread::spawn(move || serve_stream(&served, Policy::Park, 2));
        let caller = thread::spawn(move || call(&other.shared, &other.shared.direct, Policy::Park, 30));
        send(&all, 0, 10);
        assert_eq!(receive(&all, Policy::Park, 0, || true), Waited::Replied);
        caller.join().unwrap();
        worker.join().unwrap();
    });
}

/// As `a_death_ends_the_wait`, for the stream.
#[test]
fn a_death_ends_the_wait_for_the_stream() {
    check(None, || {
        let all = Arc::new(Streaming::default());
        let alive = Arc::new(AtomicBool::new(true));
        let (seen, fact) = (Arc::clone(&all), Arc::clone(&alive));
        let monitor = thread::spawn(move || {
            fact.store(false, SeqCst);
            seen.sleepers.end_wait();
        });
        send(&all, 0, 10);
        assert_eq!(receive(&all, Policy::Park, 0, || alive.load(SeqCst)), Waited::Dead);
        monitor.join().unwrap();
    });
}

/// The direct slot, as far as its home goes: whoever holds it writes the books, and loom tells if two do, or one without seeing what the last one wrote.
struct Held {
    home: home::Home,
    books: loom::cell::UnsafeCell<u64>,
    strangers: loom::sync::Mutex<()>,
}

// SAFETY: the books are only touched by who holds the slot; that this is one thread at a time is what the model checks.
#[allow(unsafe_code)]
unsafe impl Sync for Held {}

impl Held {
    fn new() -> Arc<Self> {
        let books = loom::cell::UnsafeCell::new(0);
        Arc::new(Self { home: home::Home::default(), books, strangers: loom::sync::Mutex::new(()) })
    }

    /// One call, as `SessionInner` makes it: straight, or after an attempt to become the home.
    fn call(&self, here: home::Mark) -> bool {
        if self.call_straight(here) {
            return true;
        }
        let owner = self.home.owner();
        if owner == here | home::ASKED {
            self.home.vacate(owner);
        }
        self.become_home(here) && self.call_straight(here)
    }

    fn call_straight(&self, here: home::Mark) -> bool {
        let taken = self.home.take(here);
        if taken {
            // SAFETY: as above. Nothing outlives the closure.
            #[allow(unsafe_code)]
            self.books.with_mut(|books| unsafe { *books += 1 });
            self.home.release();
        }
        taken
    }

    fn become_home(&self, here: home::Mark) -> bool {
        match self.home.owner() {
            home::NOBODY => self.home.enter(here),
            owner if owner == here => {
                if let Ok(_no_mover) = self.strangers.try_lock() {
                    self.home.settle(here, || false);
                }
                true
            }
            _ => {
                let Ok(_one_mover) = self.strangers.try_lock() else { return false };
                let barrier = || {
                    loom::sync::atomic::fence(SeqCst);
                    true
                };
                self.home.move_to(here, barrier)
            }
        }
    }
}

/// Runs one thread for each list of steps.
fn homes(preemptions: Option<usize>, threads: &'static [fn(&Held)]) {
    check(preemptions, move || {
        let held = Held::new();
        assert!(held.call(8), "nobody else is there");
        let others: Vec<_> = threads[1..]
            .iter()
            .map(|steps| {
                let held = Arc::clone(&held);
                thread::spawn(move || steps(&held))
            })
            .collect();
        threads[0](&held);
        for other in others {
            other.join().unwrap();
        }
    });
}

/// The home goes away and another thread comes, while a third is moving it.
#[test]
fn a_mover_puts_back_only_what_was_there() {
    homes(
        Some(3),
        &[
            |held| {
                held.home.vacate(8);
                held.call(8);
            },
            |held| {
                if held.home.enter(16) {
                    held.call_straight(16);
                }
            },
            |held| {
                held.become_home(24);
            },
        ],
    );
}
