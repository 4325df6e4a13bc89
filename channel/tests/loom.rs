//! Model check of the slot's state machine with loom: the code of `slot` and `wait` itself, with loom's atomics, its futex modelled as a condition
//! variable with a compare before the sleep (`wait::model`).
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p hotcell-channel --release --test loom --target-dir target/loom`
//!
//! What is checked, in every interleaving and with every value that the memory model lets a load return: no wake-up is lost (loom reports a deadlock),
//! whoever sees the turn sees the words, each call gets its own answer, and a death ends every wait but hides no reply.
#![cfg(loom)]

use hotcell_channel::slot::{Doorbell, Progress, Slot};
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
