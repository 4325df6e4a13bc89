//! Spin, park, wake: how each side waits for the other.
//!
//! Both waits have the same shape: look, spin for a while, announce the sleep in the word that is waited for, look again, sleep.
//! What differs is what ends them. The host's ends by the reply, by its deadline, or by the worker's death, which the monitor
//! announces by closing the slot; it also wakes up by itself every [`SLICE`] to look at facts that only the host can
//! write, so that no worker can make it sleep for ever. The worker's ends by a request only: a worker trusts its host, and
//! the kernel ends it when the host is gone.
//!
//! **How long to spin.** Spinning pays if the answer comes sooner than a sleep and a wake-up would take (about 5 µs where cores are
//! near, 10 µs where they are far), so a caller spins for at most [`SPIN_MAX`]. A budget adapts: a spin that missed halves it, a sleep that turned
//! out shorter than [`SPIN_MAX`] restores it, and while both sides were last seen on the same CPU it is zero, since the
//! other cannot run while we spin.

use crate::slot::{Doorbell, Progress, Slot, Turn};
use serde::{Deserialize, Serialize};
use std::sync::atomic::AtomicU32 as StdAtomicU32;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

#[cfg(loom)]
use loom::sync::atomic::fence;
#[cfg(not(loom))]
use std::sync::atomic::fence;

#[cfg(loom)]
use self::model::{futex_wait, futex_wake};
#[cfg(not(loom))]
use crate::sys::{futex_wait, futex_wake};

/// Longest sleep of a host before it looks at its own facts again.
pub const SLICE: Duration = Duration::from_millis(50);
/// Longest spin under [`Policy::Adaptive`].
pub const SPIN_MAX: Duration = Duration::from_micros(25);
const SPIN_NS_MAX: u32 = 25_000;
const SPIN_NS_MIN: u32 = 500;
/// Looks between two looks at the clock. The model check explores every order of them, so there it makes do with one.
const LOOKS: u32 = if cfg!(loom) { 1 } else { 64 };
/// A worker that expects its next request in one slot looks at the other once in so many looks.
const OTHER_EVERY: u32 = 8;

/// How a side waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Policy {
    /// Spin for about as long as a sleep and wake-up would cost, then sleep. The default.
    #[default]
    Adaptive,
    /// Never sleep: a whole core for each waiting side, and the shortest answer.
    Spin,
    /// Sleep at once: no CPU is spent on waiting.
    Park,
}

/// One side's private memory of how spinning has gone.
#[derive(Debug)]
pub struct Spin {
    policy: Policy,
    budget_ns: StdAtomicU32,
}

impl Spin {
    /// Starts with the full budget.
    pub fn new(policy: Policy) -> Self {
        // Under the model check no time passes: one look, then sleep.
        let start = if policy == Policy::Park || cfg!(loom) { 0 } else { SPIN_NS_MAX };
        Self { policy, budget_ns: StdAtomicU32::new(start) }
    }

    /// The policy.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Spins until `ready` or the budget is used up. True if ready. `keep_on` is asked from time to time under [`Policy::Spin`], which
    /// has no budget.
    #[cold]
    #[inline(never)]
    fn spin_on(&self, ready: impl Fn() -> bool, mut keep_on: impl FnMut() -> bool) -> bool {
        let budget = Duration::from_nanos(self.budget_ns.load(Relaxed).into());
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if ready() {
                    return true;
                }
                pause();
            }
            if self.policy == Policy::Spin {
                if !keep_on() {
                    return false;
                }
            } else if start.elapsed() >= budget {
                return false;
            }
        }
    }

    /// Learns from a spin that missed and the sleep after it.
    fn learn(&self, waited: Duration, same_cpu: bool) {
        if self.policy != Policy::Adaptive {
            return;
        }
        let now = self.budget_ns.load(Relaxed);
        let next = if same_cpu {
            0
        } else if waited < SPIN_MAX {
            SPIN_NS_MAX
        } else {
            (now / 2).max(SPIN_NS_MIN)
        };
        if next != now {
            self.budget_ns.store(next, Relaxed);
        }
    }
}

#[inline(always)]
fn pause() {
    #[cfg(loom)]
    loom::thread::yield_now();
    #[cfg(not(loom))]
    std::hint::spin_loop();
}

fn cpu() -> u32 {
    #[cfg(loom)]
    return 0;
    #[cfg(not(loom))]
    crate::sys::current_cpu()
}

/// Why a host's wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The reply is in the slot.
    Replied,
    /// The worker is dead and left no reply.
    Dead,
    /// The deadline passed.
    TimedOut,
    /// The worker wrote a state that the protocol does not have.
    Breach(u32),
}

/// Host: waits for the reply in `slot`.
///
/// `alive` reads facts that only this process writes; once it answers false, a slot without a reply is given up. `timeout` counts from now.
#[inline(always)]
pub fn wait_reply(
    slot: &Slot,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
    timeout: Duration,
    alive: impl Fn() -> bool,
) -> Waited {
    if spin.policy != Policy::Park {
        for _ in 0..LOOKS {
            if slot.turn() == Turn::Reply {
                return Waited::Replied;
            }
            pause();
        }
    }
    wait_reply_slow(slot, spin, bell, progress, timeout, alive)
}

#[cold]
#[inline(never)]
fn wait_reply_slow(
    slot: &Slot,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
    timeout: Duration,
    alive: impl Fn() -> bool,
) -> Waited {
    let start = Instant::now();
    let mut missed = false;
    // A deadline so far away that the clock cannot hold it is no deadline.
    let left = || timeout.saturating_sub(start.elapsed());
    if spin.policy != Policy::Park {
        spin.spin_on(|| slot.turn() != Turn::Pending, || alive() && !left().is_zero());
    }
    let waited = loop {
        match slot.turn() {
            Turn::Reply => break Waited::Replied,
            Turn::Unknown(state) => break Waited::Breach(state),
            Turn::Closed => break Waited::Dead,
            Turn::Pending => {}
        }
        let left = left();
        if left.is_zero() {
            break Waited::TimedOut;
        }
        // Announce, then look at the facts, then sleep. The monitor does it the other way round: it writes the facts, then looks at the slot,
        // closes it if a request is pending, and wakes whoever has announced. Each writes one place and then reads the other's, so both
        // need a sequentially consistent fence in between, or both could miss: SYNC death. (The close of a slot that was still idle is only a
        // load; without the fences the model check finds the sleeper that nobody wakes.)
        let Some(armed) = slot.arm_reply() else { continue };
        fence(SeqCst); // SYNC death
        if !alive() {
            // Dead, and the monitor has not yet come to this slot, or found it idle before we published.
            if slot.turn() != Turn::Reply {
                break Waited::Dead;
            }
            continue;
        }
        missed = true;
        bell.set_host_cpu(cpu());
        futex_wait(slot.futex(), armed, Some(left.min(SLICE)));
    };
    if missed {
        spin.learn(start.elapsed(), progress.worker_cpu() == cpu());
    }
    waited
}

/// Host: hands a request over and wakes a sleeping worker.
#[inline(always)]
pub fn publish(slot: &Slot, bell: &Doorbell) {
    if slot.publish() {
        wake_worker(bell);
    }
}

#[cold]
#[inline(never)]
fn wake_worker(bell: &Doorbell) {
    bell.set_host_cpu(cpu());
    bell.ring();
    futex_wake(bell.futex(), 1);
}

/// Host: closes a slot whose worker is dead, and wakes its caller. What `alive` reads must say so already.
pub fn close(slot: &Slot) {
    fence(SeqCst); // SYNC death
    if slot.close() {
        futex_wake(slot.futex(), i32::MAX);
    }
}

/// Worker: hands a reply over and wakes a sleeping caller.
#[inline(always)]
pub fn reply(slot: &Slot) {
    if slot.reply() {
        wake_caller(slot);
    }
}

#[cold]
#[inline(never)]
fn wake_caller(slot: &Slot) {
    futex_wake(slot.futex(), 1);
}

/// Which of the worker's two slots has a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The direct slot.
    Direct,
    /// The ring slot that is next.
    Ring,
}

/// Worker: waits for a request in the direct slot or in the ring's next slot. `last` is the one served last: the next request is expected there, and
/// it is looked at every time; the other one first of all, so that neither starves, and then every [`OTHER_EVERY`] looks. (Looking at both every time costs a
/// near call a tenth of its time.)
#[inline(always)]
pub fn wait_request(
    direct: &Slot,
    ring: &Slot,
    last: Which,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
) -> Which {
    let (warm, other, else_which) = match last {
        Which::Direct => (direct, ring, Which::Ring),
        Which::Ring => (ring, direct, Which::Direct),
    };
    if spin.policy != Policy::Park {
        for look in 0..LOOKS {
            if look % OTHER_EVERY == 0 && other.has_request() {
                return else_which;
            }
            if warm.has_request() {
                return last;
            }
            pause();
        }
    }
    wait_request_slow(direct, ring, last, spin, bell, progress)
}

#[cold]
#[inline(never)]
fn wait_request_slow(
    direct: &Slot,
    ring: &Slot,
    last: Which,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
) -> Which {
    let found = || {
        let (direct, ring) = (direct.has_request(), ring.has_request());
        match (direct, ring) {
            (true, true) if last == Which::Direct => Some(Which::Ring),
            (true, _) => Some(Which::Direct),
            (false, true) => Some(Which::Ring),
            (false, false) => None,
        }
    };
    if spin.policy != Policy::Park {
        spin.spin_on(|| direct.has_request() || ring.has_request(), || true);
    }
    match found() {
        Some(which) => which,
        None => park_for_request(direct, ring, found, spin, bell, progress),
    }
}

fn park_for_request(
    direct: &Slot,
    ring: &Slot,
    found: impl Fn() -> Option<Which>,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
) -> Which {
    let start = Instant::now();
    let spun = Duration::from_nanos(spin.budget_ns.load(Relaxed).into());
    progress.set_worker_cpu(cpu());
    loop {
        let heard = bell.read();
        let quiet = direct.arm_request() && ring.arm_request();
        if quiet {
            futex_wait(bell.futex(), heard, None);
        }
        if let Some(which) = found() {
            direct.disarm_request();
            ring.disarm_request();
            progress.set_worker_cpu(cpu());
            spin.learn(spun + start.elapsed(), bell.host_cpu() == cpu());
            return which;
        }
    }
}

/// Futexes for the model check: loom has none, so a sleep is a wait on a condition variable that every wake notifies, with the same
/// compare-before-sleep under one lock. Timeouts never fire: the model has to be right without them.
#[cfg(loom)]
pub(crate) mod model {
    use loom::sync::atomic::{AtomicU32, Ordering::Acquire};
    use loom::sync::{Condvar, Mutex};
    use std::time::Duration;

    loom::lazy_static! {
        static ref KERNEL: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
    }

    pub(crate) fn futex_wait(word: &AtomicU32, expected: u32, _timeout: Option<Duration>) {
        let (lock, bell) = &*KERNEL;
        let guard = lock.lock().unwrap();
        if word.load(Acquire) == expected {
            drop(bell.wait(guard).unwrap());
        }
    }

    pub(crate) fn futex_wake(_word: &AtomicU32, _count: i32) {
        let (lock, bell) = &*KERNEL;
        let _guard = lock.lock().unwrap();
        bell.notify_all();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    struct Pair {
        direct: Slot,
        ring: Slot,
        bell: Doorbell,
        progress: Progress,
    }

    fn pair() -> Pair {
        Pair {
            direct: Slot::default(),
            ring: Slot::default(),
            bell: Doorbell::default(),
            progress: Progress::default(),
        }
    }

    #[test]
    fn every_policy_pair_completes_calls_on_both_slots() {
        for host in [Policy::Adaptive, Policy::Spin, Policy::Park] {
            for worker in [Policy::Adaptive, Policy::Spin, Policy::Park] {
                let p = pair();
                std::thread::scope(|s| {
                    s.spawn(|| {
                        let spin = Spin::new(worker);
                        let mut last = Which::Direct;
                        for _ in 0..400 {
                            let which = wait_request(&p.direct, &p.ring, last, &spin, &p.bell, &p.progress);
                            let slot = if which == Which::Direct { &p.direct } else { &p.ring };
                            last = which;
                            slot.set_word(0, slot.word(0) + 1);
                            reply(slot);
                        }
                    });
                    let spin = Spin::new(host);
                    for i in 0..400 {
                        let slot = if i % 3 == 0 { &p.ring } else { &p.direct };
                        slot.set_word(0, i);
                        publish(slot, &p.bell);
                        let waited =
                            wait_reply(slot, &spin, &p.bell, &p.progress, Duration::from_secs(20), || true);
                        assert_eq!(waited, Waited::Replied);
                        assert_eq!(slot.word(0), i + 1);
                    }
                });
            }
        }
    }

    #[test]
    fn silence_ends_at_the_deadline_under_every_policy() {
        for policy in [Policy::Adaptive, Policy::Spin, Policy::Park] {
            let p = pair();
            publish(&p.direct, &p.bell);
            let start = Instant::now();
            let waited = wait_reply(
                &p.direct,
                &Spin::new(policy),
                &p.bell,
                &p.progress,
                Duration::from_millis(30),
                || true,
            );
            assert_eq!(waited, Waited::TimedOut);
            assert!(start.elapsed() >= Duration::from_millis(30));
        }
    }

    #[test]
    fn death_ends_the_wait_even_if_nobody_closes_the_slot() {
        for policy in [Policy::Adaptive, Policy::Spin, Policy::Park] {
            let p = pair();
            let alive = AtomicBool::new(true);
            publish(&p.direct, &p.bell);
            std::thread::scope(|s| {
                s.spawn(|| {
                    std::thread::sleep(Duration::from_millis(5));
                    alive.store(false, std::sync::atomic::Ordering::Release);
                });
                let waited = wait_reply(
                    &p.direct,
                    &Spin::new(policy),
                    &p.bell,
                    &p.progress,
                    Duration::from_secs(20),
                    || alive.load(std::sync::atomic::Ordering::Acquire),
                );
                assert_eq!(waited, Waited::Dead);
            });
        }
    }

    #[test]
    fn forged_states_end_the_wait_as_a_breach() {
        let p = pair();
        for state in [0, 3, 77, 0x8000_0003] {
            p.direct.forge_state(state);
            let waited = wait_reply(
                &p.direct,
                &Spin::new(Policy::Park),
                &p.bell,
                &p.progress,
                Duration::from_secs(20),
                || true,
            );
            assert_eq!(waited, Waited::Breach(state & 0x7fff_ffff));
        }
    }

    #[test]
    fn missing_spins_shrink_the_budget_and_short_sleeps_restore_it() {
        let spin = Spin::new(Policy::Adaptive);
        for _ in 0..20 {
            spin.learn(Duration::from_millis(3), false);
        }
        assert_eq!(spin.budget_ns.load(Relaxed), SPIN_NS_MIN);
        spin.learn(Duration::from_micros(9), false);
        assert_eq!(spin.budget_ns.load(Relaxed), SPIN_NS_MAX);
        spin.learn(Duration::from_micros(9), true);
        assert_eq!(spin.budget_ns.load(Relaxed), 0);
    }
}
