//! Spin, park, wake: how each side waits for the other.
//!
//! Both waits have the same shape: look, spin for a while, announce the sleep in the word that is waited for, look again, sleep.
//! What differs is what ends them. The host's ends by the reply, by its deadline, or by the worker's death, which the monitor
//! announces by closing the slot; it also wakes up by itself every [`SLICE`] to look at facts that only the host can
//! write, so that no worker can make it sleep for ever. The worker's ends by a request only: a worker trusts its host, and
//! the kernel ends it when the host is gone.
//!
//! **How long to spin.** Spinning pays if the answer comes sooner than a sleep and a wake-up would take: about 5 µs where a core is kept awake, 50 µs where it halts
//! (a virtual machine's). So a side spins for at most [`SPIN_MAX`]. It spins less when that keeps missing: each miss in a row halves
//! the time. It goes back to the full time as soon as a longer spin hits, or a miss comes after many quick calls in a row; and every 16
//! misses it tries the full time once, so that a caller whose calls have become shorter finds out. While both sides were last seen on the same CPU it does not spin at
//! all, since the other cannot run while we do.
//!
//! A large payload takes the other side time that has nothing to do with how often calls come: the host copies it out and the next one in, the worker's function goes through it. For 1 MiB that is just about
//! [`SPIN_MAX`], so a side that spun no longer fell asleep at the moment when it was needed, and each such call paid for a wake-up. So a spin after a payload is longer by what such copies take, within limits.

use crate::layout::{self, SCRATCH_LINES};
use crate::slot::{Doorbell, Progress, Slot, Turn};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32 as StdAtomicU32, AtomicU64 as StdAtomicU64};
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
/// Longest spin under [`Policy::Adaptive`], but for payloads.
pub const SPIN_MAX: Duration = Duration::from_micros(50);
/// Twice the time in which 1 KiB is copied out and in again.
const COPY_NANOS_IN_KIB: u64 = 100;
/// Longest time added to a spin for a payload.
const COPIES_MAX: Duration = Duration::from_micros(200);
/// Halvings of [`SPIN_MAX`] at most.
const HALVINGS_MAX: u32 = 7;
/// Misses in a row between two attempts with the full time.
const PROBE_EVERY: u32 = 16;
/// Calls without a miss that show that spinning pays.
const DENSE_CALLS: u64 = 16;
/// In place of the misses in a row: both sides share a CPU.
const SAME_CPU: u32 = u32::MAX;
/// Looks between two looks at the clock. The model check explores every order of them, so there it makes do with one.
const LOOKS: u32 = if cfg!(loom) { 1 } else { 64 };
/// A worker that expects its next request in one slot looks at the other once in so many looks.
pub(crate) const OTHER_EVERY: u32 = 8;

/// Looks that are left out after a payload was handed over: a line takes longer than that to the other side and back.
const LOOKS_LEFT_OUT: u32 = 2;
/// Lines of payload that a host copies out and in again in the time of a look.
const LINES_IN_A_LOOK: u32 = 16;
/// Most looks that are left out for the copies.
const COPY_LOOKS_MAX: u32 = 14;

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
    /// How often to look before anything else: not at all while both sides share a CPU, nor under [`Policy::Park`].
    looks: StdAtomicU32,
    /// Misses in a row, or [`SAME_CPU`].
    misses: StdAtomicU32,
    /// How many calls there had been at the last miss.
    calls_at_miss: StdAtomicU64,
    /// Waits that ended in a spin longer than the first looks, and in a sleep.
    spun: StdAtomicU64,
    parked: StdAtomicU64,
}

impl Spin {
    /// Starts with the full time.
    pub fn new(policy: Policy) -> Self {
        let looks = if policy == Policy::Park { 0 } else { LOOKS };
        Self {
            policy,
            looks: StdAtomicU32::new(looks),
            misses: StdAtomicU32::new(0),
            calls_at_miss: StdAtomicU64::new(0),
            spun: StdAtomicU64::new(0),
            parked: StdAtomicU64::new(0),
        }
    }

    /// How much of the longest time `most` to spin.
    fn budget(&self, most: Duration) -> Duration {
        // Under the model check no time passes: one look, then sleep.
        match self.misses.load(Relaxed) {
            _ if self.policy == Policy::Park || cfg!(loom) => Duration::ZERO,
            SAME_CPU => Duration::ZERO,
            misses if misses % PROBE_EVERY == 0 => most,
            misses => most / (1 << misses.min(HALVINGS_MAX)),
        }
    }

    #[inline(always)]
    pub(crate) fn looks(&self) -> u32 {
        self.looks.load(Relaxed)
    }

    /// How many waits of this side ended in a spin longer than the first looks, and in a sleep.
    pub fn waits(&self) -> (u64, u64) {
        (self.spun.load(Relaxed), self.parked.load(Relaxed))
    }

    fn count(&self, parked: bool) {
        let counter = if parked { &self.parked } else { &self.spun };
        counter.fetch_add(1, Relaxed);
    }

    /// The policy.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Spins until `ready` or the time is used up, at most `most`. `keep_on` is asked from time to time under [`Policy::Spin`], which has no such time.
    #[cold]
    #[inline(never)]
    pub(crate) fn spin_on(
        &self,
        most: Duration,
        ready: impl Fn() -> bool,
        mut keep_on: impl FnMut() -> bool,
    ) {
        let budget = self.budget(most);
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if ready() {
                    // A spin longer than the first looks has paid.
                    if self.misses.load(Relaxed) != 0 {
                        self.misses.store(0, Relaxed);
                    }
                    return;
                }
                pause();
            }
            if self.policy == Policy::Spin {
                if !keep_on() {
                    return;
                }
            } else if start.elapsed() >= budget {
                return;
            }
        }
    }

    /// Learns from a spin that missed, at the `calls`-th call of this side.
    pub(crate) fn missed(&self, calls: u64, same_cpu: bool) {
        let since = calls.wrapping_sub(self.calls_at_miss.swap(calls, Relaxed));
        let next = match self.misses.load(Relaxed) {
            _ if same_cpu => SAME_CPU,
            _ if since >= DENSE_CALLS => 0,
            SAME_CPU => 1,
            misses => (misses + 1) % (PROBE_EVERY << 16),
        };
        self.misses.store(next, Relaxed);
        if self.policy == Policy::Adaptive {
            self.looks.store(if next == SAME_CPU { 0 } else { LOOKS }, Relaxed);
        }
    }
}

#[inline(always)]
pub(crate) fn pause() {
    #[cfg(loom)]
    loom::thread::yield_now();
    #[cfg(not(loom))]
    std::hint::spin_loop();
}

pub(crate) fn cpu() -> u32 {
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
    /// The reply is in the slot, and says that the call was refused memory.
    Refused,
    /// The worker is dead and left no reply.
    Dead,
    /// The deadline passed.
    TimedOut,
    /// The worker wrote a state that the protocol does not have.
    Breach(u32),
}

/// Host: waits for the reply in `slot`.
///
/// `alive` reads facts that only this process writes; once it answers false, a slot without a reply is given up. `timeout` counts from now. `calls` is how many calls this side has made,
/// for the rule of how long to spin.
#[inline(always)]
pub fn wait_reply(
    slot: &Slot,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
    calls: u64,
    timeout: Duration,
    alive: impl Fn() -> bool,
) -> Waited {
    if look_for_reply(slot, spin) {
        return Waited::Replied;
    }
    wait_reply_slow(slot, spin, bell, progress, calls, 0, timeout, alive)
}

/// Host: the first looks of [`wait_reply`]. Whether they found the reply; if not, [`wait_reply_slow`] goes on.
#[inline(always)]
#[must_use]
pub fn look_for_reply(slot: &Slot, spin: &Spin) -> bool {
    for _ in 0..spin.looks() {
        if slot.turn() == Turn::Reply {
            return true;
        }
        pause();
    }
    false
}

/// Host: [`look_for_reply`] for a call with a payload: see [`expect_payload`].
#[inline(always)]
#[must_use]
pub fn look_for_payload_reply(slot: &Slot, spin: &Spin) -> bool {
    if spin.looks() != 0 {
        (0..LOOKS_LEFT_OUT).for_each(|_| pause());
    }
    look_for_reply(slot, spin)
}

/// Host: what [`wait_reply`] does after the first looks. It spins longer for a call with a payload of so many bytes.
#[cold]
#[inline(never)]
#[allow(clippy::too_many_arguments)]
pub fn wait_reply_slow(
    slot: &Slot,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
    calls: u64,
    payload: u64,
    timeout: Duration,
    alive: impl Fn() -> bool,
) -> Waited {
    let start = Instant::now();
    let mut missed = false;
    // A deadline so far away that the clock cannot hold it is no deadline.
    let left = || timeout.saturating_sub(start.elapsed());
    if spin.looks() != 0 {
        let most = SPIN_MAX + copies(payload);
        spin.spin_on(most, || slot.turn() != Turn::Pending, || alive() && !left().is_zero());
    }
    let waited = loop {
        match slot.turn() {
            Turn::Reply => break Waited::Replied,
            Turn::Refused => break Waited::Refused,
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
            if !slot.turn().is_answered() {
                break Waited::Dead;
            }
            continue;
        }
        missed = true;
        bell.set_host_cpu(cpu());
        futex_wait(slot.futex(), armed, Some(left.min(SLICE)));
    };
    spin.count(missed);
    if missed {
        spin.missed(calls, progress.worker_cpu() == cpu());
    }
    waited
}

/// Host: hands a request over and wakes a sleeping worker.
#[inline(always)]
pub fn publish(slot: &Slot, bell: &Doorbell) {
    publish_then(slot, bell, || ());
}

/// Like [`publish`]; `note` is run when the request is on its way, but before a sleeping worker is woken: that may cost the caller its CPU for as long as the
/// call takes.
#[inline(always)]
pub fn publish_then(slot: &Slot, bell: &Doorbell, note: impl FnOnce()) {
    let asleep = slot.publish();
    note();
    if asleep {
        wake_worker(bell);
    }
}

#[cold]
#[inline(never)]
pub(crate) fn wake_worker(bell: &Doorbell) {
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

/// Worker: hands the reply of a call over that was refused memory, and wakes a sleeping caller.
#[cold]
pub fn reply_refused(slot: &Slot) {
    if slot.reply_refused() {
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
/// it is looked at every time; the other one first of all, so that neither starves, and then every eighth look. (Looking at both every time costs a
/// near call a tenth of its time.) `calls` is how many requests it has served, for the rule of how long to spin.
#[inline(always)]
pub fn wait_request(
    direct: &Slot,
    ring: &Slot,
    last: Which,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
    calls: u64,
) -> Which {
    let (warm, other, else_which) = match last {
        Which::Direct => (direct, ring, Which::Ring),
        Which::Ring => (ring, direct, Which::Direct),
    };
    for look in 0..spin.looks() {
        if look % OTHER_EVERY == 0 && other.has_request() {
            return else_which;
        }
        if warm.has_request() {
            return last;
        }
        // A wide request's second line is written before the first one; so it comes while the first is still on its way, and not after it. In a session
        // without wide requests the line does not leave this processor.
        warm.read_second_line_soon();
        pause();
    }
    wait_request_slow(direct, ring, last, spin, bell, progress, calls)
}

/// Worker: the first looks after the reply to a call in the direct slot that had a payload: `number` is what the function word said of it ([`layout::scratch_number`], [`layout::block_number`]). They end with a request in
/// either slot, or without one after some time; [`wait_request`] goes on in both cases. `soon` asks for a line of the scratch.
///
/// The next call will most likely have as much. What is different from the looks for a call of numbers serves one purpose: that the payload's lines travel together with
/// the slot's, and not after it.
/// - A side that copies a payload writes several lines and the slot's at last, and needs all of them to itself. A look at the slot in the middle of that takes its line
///   away, and the writer has to get it back before it can go on. So neither side looks while the other cannot be done yet: the host leaves out the looks that a round trip takes at the least
///   ([`look_for_payload_reply`]), the worker those that the host needs to see the reply, and to copy out and in.
/// - The lines are asked for before the request is there: the first at each look, which costs nothing as long as it stays where it is; the last as soon as the turn is seen. Both addresses are known
///   before the words of the request are, so a processor that expects the turn in this look asks while the slot's line is still on its way.
#[cold]
#[inline(never)]
pub fn expect_payload(
    direct: &Slot,
    ring: &Slot,
    spin: &Spin,
    progress: &Progress,
    number: u32,
    soon: impl Fn(u32),
) {
    if spin.looks() == 0 {
        return;
    }
    if number <= SCRATCH_LINES {
        (0..looks_left_out(number)).for_each(|_| pause());
        for look in 0..spin.looks() {
            soon(0);
            if direct.has_request() {
                return soon(number.saturating_sub(1));
            }
            if look % OTHER_EVERY == 0 && ring.has_request() {
                return;
            }
            pause();
        }
    }
    if spin.policy != Policy::Spin {
        let most = copies(layout::payload_bytes(number));
        let found = || direct.has_request() || ring.has_request();
        spin.spin_on(most, found, || true);
        // Else the wait goes on in [`wait_request`], and is counted there.
        if found() {
            count_wait(spin, progress, false);
        }
    }
}

/// Worker: counts a wait for a request that ended later than at the first looks.
fn count_wait(spin: &Spin, progress: &Progress, parked: bool) {
    spin.count(parked);
    let (spins, sleeps) = spin.waits();
    progress.set_waits(spins, sleeps);
}

/// How much longer than [`SPIN_MAX`] to spin for a payload of so many bytes. Twice what copies out and in take here; no more than a few wake-ups, which are little beside
/// copies of more.
fn copies(bytes: u64) -> Duration {
    Duration::from_nanos(bytes.saturating_mul(COPY_NANOS_IN_KIB) / 1024).min(COPIES_MAX)
}

/// How many looks a worker leaves out after a call with so many lines of payload: a copy out and in of 1 KiB takes about as long as a look. Bounded, because the next call may be another.
const fn looks_left_out(lines: u32) -> u32 {
    let copies = (lines + LINES_IN_A_LOOK / 2) / LINES_IN_A_LOOK;
    LOOKS_LEFT_OUT + if copies < COPY_LOOKS_MAX { copies } else { COPY_LOOKS_MAX }
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
    calls: u64,
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
    if spin.looks() != 0 {
        spin.spin_on(SPIN_MAX, || direct.has_request() || ring.has_request(), || true);
    }
    let spun = found();
    count_wait(spin, progress, spun.is_none());
    match spun {
        Some(which) => which,
        None => park_for_request(direct, ring, found, spin, bell, progress, calls),
    }
}

fn park_for_request(
    direct: &Slot,
    ring: &Slot,
    found: impl Fn() -> Option<Which>,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
    calls: u64,
) -> Which {
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
            spin.missed(calls, bell.host_cpu() == cpu());
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
                        for served in 0..400 {
                            let which =
                                wait_request(&p.direct, &p.ring, last, &spin, &p.bell, &p.progress, served);
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
                            wait_reply(slot, &spin, &p.bell, &p.progress, i, Duration::from_secs(20), || {
                                true
                            });
                        assert_eq!(waited, Waited::Replied);
                        assert_eq!(slot.word(0), i + 1);
                    }
                });
            }
        }
    }

    #[test]
    fn looks_for_a_payload_find_a_request_in_either_slot_and_end_without_one() {
        for policy in [Policy::Adaptive, Policy::Spin, Policy::Park] {
            let p = pair();
            let asked = std::cell::RefCell::new(Vec::new());
            let expect = || {
                asked.borrow_mut().clear();
                expect_payload(&p.direct, &p.ring, &Spin::new(policy), &p.progress, 16, |line| {
                    asked.borrow_mut().push(line);
                });
                asked.borrow().clone()
            };
            let looks = if policy == Policy::Park { 0 } else { LOOKS as usize };
            assert_eq!(expect(), vec![0; looks], "nobody asks for anything");
            publish(&p.ring, &p.bell);
            assert_eq!(expect(), vec![0; looks.min(1)], "the other slot is seen at the first look");
            publish(&p.direct, &p.bell);
            let both = if looks == 0 { vec![] } else { vec![0, 15] };
            assert_eq!(expect(), both, "the first line is asked for before the look, the last one after it");
        }
    }

    #[test]
    fn a_wait_that_ends_in_the_spin_for_a_payload_is_counted() {
        for (policy, spun) in [(Policy::Adaptive, 1), (Policy::Spin, 0), (Policy::Park, 0)] {
            let (p, spin) = (pair(), Spin::new(policy));
            // One that lies in a block: no looks come before the spin.
            let expect = || expect_payload(&p.direct, &p.ring, &spin, &p.progress, SCRATCH_LINES + 1, |_| ());
            expect();
            assert_eq!(p.progress.waits(), (0, 0), "it has not ended");
            publish(&p.direct, &p.bell);
            expect();
            assert_eq!(p.progress.waits(), (spun, 0));
        }
    }

    #[test]
    fn a_payload_lengthens_the_spin_up_to_a_bound_and_misses_shorten_it() {
        let of = |kib: u64| copies(kib << 10).as_nanos();
        assert_eq!([0, 64, 1024, 2048, 1 << 20].map(of), [0, 6_400, 102_400, 200_000, 200_000]);
        let spin = Spin::new(Policy::Adaptive);
        assert_eq!(spin.budget(SPIN_MAX + copies(1 << 20)).as_nanos(), 152_400);
        spin.missed(1, false);
        assert_eq!(spin.budget(SPIN_MAX + copies(1 << 20)).as_nanos(), 76_200);
        assert_eq!(Spin::new(Policy::Park).budget(copies(1 << 20)), Duration::ZERO);
    }

    #[test]
    fn the_more_was_lent_the_more_looks_are_left_out_up_to_a_bound() {
        let left_out = [1, 4, 8, 16, 64, 1024, u32::from(u16::MAX)].map(looks_left_out);
        assert_eq!(left_out, [2, 2, 3, 3, 6, 16, 16]);
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
                1,
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
                    1,
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
                1,
                Duration::from_secs(20),
                || true,
            );
            assert_eq!(waited, Waited::Breach(state & 0x7fff_ffff));
        }
    }

    #[test]
    fn missing_spins_shrink_and_paying_ones_grow_back() {
        let spin = Spin::new(Policy::Adaptive);
        assert_eq!(spin.budget(SPIN_MAX), SPIN_MAX);
        let budgets: Vec<_> = (1..=15)
            .map(|call| {
                spin.missed(call, false);
                spin.budget(SPIN_MAX)
            })
            .collect();
        assert_eq!(budgets[0], SPIN_MAX / 2);
        assert!(budgets.windows(2).all(|w| w[1] <= w[0]));
        assert_eq!(budgets[14], SPIN_MAX / 128);
        spin.missed(16, false);
        assert_eq!(
            spin.budget(SPIN_MAX),
            SPIN_MAX,
            "the sixteenth miss is followed by a try of the full time"
        );
        spin.missed(17, false);
        assert!(spin.budget(SPIN_MAX) < SPIN_MAX / 100);
        spin.spin_on(SPIN_MAX, || true, || true);
        assert_eq!(spin.budget(SPIN_MAX), SPIN_MAX, "a spin that hits");
        spin.missed(18, false);
        spin.missed(40, false);
        assert_eq!(spin.budget(SPIN_MAX), SPIN_MAX, "a miss after many calls without one");
        spin.missed(41, true);
        assert_eq!((spin.budget(SPIN_MAX), spin.looks()), (Duration::ZERO, 0), "both on one CPU");
        spin.missed(42, false);
        assert_eq!((spin.budget(SPIN_MAX), spin.looks()), (SPIN_MAX / 2, LOOKS));
    }
}
