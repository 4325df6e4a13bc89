//! The slot: one cache line out and back, and whose turn it is.
//!
//! A slot belongs to one call at a time. Its state word says whose turn it is, and is also the futex that the
//! caller sleeps on:
//!
//! ```text
//!   host                         state                        worker
//!   ----                         -----                        ------
//!                                IDLE | REPLY
//!   write words
//!   swap(REQUEST) ─────────────► REQUEST ───────────────────► copy words, call
//!   spin; then                   REQUEST|PARKED
//!   compare_exchange(+PARKED),
//!   futex_wait
//!   copy result ◄─────────────── REPLY ◄───────────────────── swap(REPLY), futex_wake if PARKED was set
//! ```
//!
//! **Law.** Only the side whose turn it is writes the words. Whoever is about to sleep first sets [`PARKED`] by
//! compare-exchange in the word it waits for; whoever publishes does it with one `swap` and sees that bit in the
//! old value. Publishing and "is the other side asleep?" are therefore one instruction, and no wake-up can be lost:
//! either the sleeper's compare-exchange comes first and the swap sees the bit, or the swap comes first and the
//! compare-exchange fails because the state has changed.
//!
//! The worker waits for a request in more than one slot (see [`crate::wait`]), so it cannot sleep on one
//! state word. It sleeps on the session's [`Doorbell`] instead: it reads the bell, arms each slot it listens to
//! with `PARKED`, and sleeps only while the bell still has the value that it read. A host whose swap finds `PARKED`
//! rings the bell. The same argument holds: a publish before the arming makes the arming fail; a publish
//! after it rings a bell that was read before.
//!
//! **Orderings**, derived from the one guarantee that is owed (who sees the turn sees the words):
//! - `swap(REQUEST)`, `swap(REPLY)` release the words written before them; the loads that see them acquire.
//!   // SYNC request: publish → [`Slot::has_request`]/[`Slot::arm_request`]; SYNC reply: reply → [`Slot::turn`].
//! - The words themselves are relaxed: they are never read unless the turn was acquired.
//! - `swap` also acquires (`AcqRel`): the publisher that sees `PARKED` goes on to ring or wake, and must not do so
//!   before the sleeper's arming is visible; acquire keeps that order without a fence.
//!
//! Nothing here trusts the other side: an unknown state is an answer ([`Turn::Unknown`]), not a panic.

use crate::hint;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64};

/// Payload words of a slot: seven share the first cache line with the state, eight are on the second.
pub const WORDS_MAX: usize = 15;

/// The first word of the second line.
const SECOND_LINE: usize = 7;

/// Nobody has used the slot yet.
pub const IDLE: u32 = 0;
/// The worker's turn: a request is in the words.
pub const REQUEST: u32 = 1;
/// The host's turn: a reply is in the words.
pub const REPLY: u32 = 2;
/// The host's turn: the worker asks for an upcall inside the running call. Reserved; a breach in this version.
pub const UPCALL: u32 = 3;
/// The host gave the slot up: its worker is dead. Set by the host only.
pub const CLOSED: u32 = 4;
/// The host's turn: the call has returned, but the session's memory limit refused an allocation while it ran. The words say how much was asked for and how much was in use.
pub const REFUSED: u32 = 5;
/// Added by whoever is about to sleep until this word changes.
pub const PARKED: u32 = 1 << 31;

/// Bits of the function word that name the function; the upper twelve hold a number: see [`Slot::set_function`].
pub const FUNCTION_BITS: u32 = 20;
/// Most functions that a session may resolve.
pub const FUNCTIONS_MAX: u32 = (1 << FUNCTION_BITS) - 1;
/// Most slots that a session's ring may have.
pub const SLOTS_MAX: u32 = 1 << (32 - FUNCTION_BITS);

/// Whose turn it is, as far as a host may believe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Not answered yet.
    Pending,
    /// The reply is there.
    Reply,
    /// The reply is there; the call was refused memory.
    Refused,
    /// The host closed the slot because the worker died.
    Closed,
    /// A state that the protocol does not have: a breach.
    Unknown(u32),
}

impl Turn {
    /// Whether the worker has answered.
    pub fn is_answered(self) -> bool {
        matches!(self, Turn::Reply | Turn::Refused)
    }
}

/// One call's place in the region. Two cache lines; the second is only touched by calls with more than seven words.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct Slot {
    state: AtomicU32,
    function: AtomicU32,
    words: [AtomicU64; WORDS_MAX],
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            state: AtomicU32::new(IDLE),
            function: AtomicU32::new(0),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl Slot {
    /// Stores one word. Only the side whose turn it is may call this.
    ///
    /// # Panics
    /// If `index` is not below [`WORDS_MAX`].
    #[inline(always)]
    pub fn set_word(&self, index: usize, word: u64) {
        self.words[index].store(word, Relaxed);
    }

    /// Stores the first words, the last of them first: the slot's first line, which has the state, is then the one written last, and it is the one
    /// that the publishing exchange needs.
    ///
    /// # Panics
    /// If there are more than [`WORDS_MAX`].
    #[inline(always)]
    pub fn set_words(&self, words: &[u64]) {
        for (at, word) in words.iter().enumerate().rev() {
            self.set_word(at, *word);
        }
    }

    /// Loads one word. Meaningful after the turn was acquired; the other side may be lying.
    ///
    /// # Panics
    /// If `index` is not below [`WORDS_MAX`].
    #[inline(always)]
    pub fn word(&self, index: usize) -> u64 {
        self.words[index].load(Relaxed)
    }

    /// Stores the function index and a number below [`SLOTS_MAX`]: for ring slots where the worker looks next, for the direct slot how large its payload is ([`crate::layout::scratch_number`], [`crate::layout::block_number`]).
    #[inline(always)]
    pub fn set_function(&self, index: u32, number: u32) {
        self.function.store(index | (number << FUNCTION_BITS), Relaxed);
    }

    /// Loads the function word once: function index, and next ring slot or size of the payload.
    #[inline(always)]
    pub fn function(&self) -> (u32, u32) {
        let word = self.function.load(Relaxed);
        (word & FUNCTIONS_MAX, word >> FUNCTION_BITS)
    }

    /// Worker: says that the second line may be about to be read.
    #[inline(always)]
    pub(crate) fn read_second_line_soon(&self) {
        hint::read_soon(&self.words[SECOND_LINE]);
    }

    /// Host: hands the slot to the worker. True if the worker sleeps and its doorbell must be rung.
    #[inline(always)]
    #[must_use]
    pub fn publish(&self) -> bool {
        self.state.swap(REQUEST, AcqRel) & PARKED != 0 // SYNC request
    }

    /// Host: whose turn it is.
    #[inline(always)]
    pub fn turn(&self) -> Turn {
        // SYNC reply
        match self.state.load(Acquire) & !PARKED {
            REPLY => Turn::Reply,
            REFUSED => Turn::Refused,
            REQUEST => Turn::Pending,
            CLOSED => Turn::Closed,
            other => Turn::Unknown(other),
        }
    }

    /// Host: announces that the caller is about to sleep until the reply. Returns the value to sleep on, or `None` if the
    /// state is no longer [`REQUEST`], in which case there is no reason to sleep.
    pub fn arm_reply(&self) -> Option<u32> {
        match self.state.compare_exchange(REQUEST, REQUEST | PARKED, AcqRel, Acquire) {
            Ok(_) => Some(REQUEST | PARKED),
            Err(seen) if seen == REQUEST | PARKED => Some(seen),
            Err(_) => None,
        }
    }

    /// Host: marks a slot whose request nobody will answer any more. Never overwrites a reply. True if it was pending.
    pub fn close(&self) -> bool {
        for pending in [REQUEST, REQUEST | PARKED] {
            if self.state.compare_exchange(pending, CLOSED, AcqRel, Acquire).is_ok() {
                return true;
            }
        }
        // The caller may have armed between the two attempts above; one more look settles it, since only the
        // caller itself moves the state now.
        self.state.compare_exchange(REQUEST, CLOSED, AcqRel, Acquire).is_ok()
    }

    /// Worker: is there a request?
    #[inline(always)]
    pub fn has_request(&self) -> bool {
        self.state.load(Acquire) & !PARKED == REQUEST // SYNC request
    }

    /// Worker: hands the slot back. True if the caller sleeps and must be woken.
    #[inline(always)]
    #[must_use]
    pub fn reply(&self) -> bool {
        self.state.swap(REPLY, AcqRel) & PARKED != 0 // SYNC reply
    }

    /// Worker: hands the slot back after a call that was refused memory. True if the caller sleeps and must be woken.
    #[must_use]
    pub fn reply_refused(&self) -> bool {
        self.state.swap(REFUSED, AcqRel) & PARKED != 0 // SYNC reply
    }

    /// Worker: announces that it is about to sleep until a request. False if there is one already.
    pub fn arm_request(&self) -> bool {
        let mut seen = self.state.load(Acquire);
        // Bounded: the host changes the state once (to REQUEST) while the worker has no turn here; a third round
        // would mean that a host misbehaves, and then not sleeping is the harmless answer.
        for _ in 0..4 {
            if seen & !PARKED == REQUEST {
                return false;
            }
            if seen & PARKED != 0 {
                return true;
            }
            match self.state.compare_exchange(seen, seen | PARKED, AcqRel, Acquire) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Worker: takes back [`Slot::arm_request`], so that a host that publishes later does not ring for nothing.
    pub fn disarm_request(&self) {
        let seen = self.state.load(Relaxed);
        if seen & PARKED != 0 && seen & !PARKED != REQUEST {
            // Failure means that the host has just published and rung: nothing left to take back.
            let _ = self.state.compare_exchange(seen, seen & !PARKED, Relaxed, Relaxed);
        }
    }

    /// The word that the caller sleeps on.
    pub fn futex(&self) -> &AtomicU32 {
        &self.state
    }

    /// Puts any value into the state word, as only a lying worker does.
    #[doc(hidden)]
    pub fn forge_state(&self, state: u32) {
        self.state.store(state, Release);
    }
}

/// What the worker's session thread sleeps on: a count that the host raises when it finds `PARKED` in a slot.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct Doorbell {
    count: AtomicU32,
    /// The CPU that the host was on when it last slept or rang; a hint for the worker's spinning.
    host_cpu: AtomicU32,
}

impl Default for Doorbell {
    fn default() -> Self {
        Self { count: AtomicU32::new(0), host_cpu: AtomicU32::new(u32::MAX) }
    }
}

impl Doorbell {
    /// Host: makes a sleeper's next look differ. The futex wake is the caller's.
    pub fn ring(&self) {
        self.count.fetch_add(1, Release); // SYNC bell
    }

    /// Worker: the value to sleep on. Read it before arming any slot.
    pub fn read(&self) -> u32 {
        self.count.load(Acquire) // SYNC bell
    }

    /// The word that the worker sleeps on.
    pub fn futex(&self) -> &AtomicU32 {
        &self.count
    }

    /// Host: leaves its CPU for the worker's spin rule.
    pub fn set_host_cpu(&self, cpu: u32) {
        self.host_cpu.store(cpu, Relaxed);
    }

    /// Worker: the CPU that the host last slept on; `u32::MAX` if unknown.
    pub fn host_cpu(&self) -> u32 {
        self.host_cpu.load(Relaxed)
    }
}

/// What the worker leaves for a host that has to explain its death. Written by the worker with plain stores to a line that
/// the host does not read while it lives; so it costs the call no cache traffic.
///
/// Each counter is raised *before* the call runs. A request whose number the counter has not reached was never taken.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct Progress {
    direct_taken: AtomicU64,
    ring_taken: AtomicU64,
    worker_cpu: AtomicU32,
    reserved: AtomicU32,
    spun: AtomicU64,
    parked: AtomicU64,
    stream_taken: AtomicU64,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            direct_taken: AtomicU64::new(0),
            ring_taken: AtomicU64::new(0),
            worker_cpu: AtomicU32::new(u32::MAX),
            reserved: AtomicU32::new(0),
            spun: AtomicU64::new(0),
            parked: AtomicU64::new(0),
            stream_taken: AtomicU64::new(0),
        }
    }
}

impl Progress {
    /// Worker: notes that it takes the direct slot's `count`-th request.
    #[inline(always)]
    pub fn take_direct(&self, count: u64) {
        self.direct_taken.store(count, Relaxed);
    }

    /// Worker: notes that it takes the ring's `count`-th request.
    #[inline(always)]
    pub fn take_ring(&self, count: u64) {
        self.ring_taken.store(count, Relaxed);
    }

    /// Worker: notes that it takes the stream's `count`-th request.
    #[inline(always)]
    pub fn take_stream(&self, count: u64) {
        self.stream_taken.store(count, Relaxed);
    }

    /// Host: how many requests of the stream the worker says it took. As [`Progress::taken`].
    pub fn stream_taken(&self) -> u64 {
        self.stream_taken.load(Relaxed)
    }

    /// Host: how many requests the worker says it took, direct and ring. Untrusted; exact once the worker is dead, because the
    /// kernel reports an exit only after the last store.
    pub fn taken(&self) -> (u64, u64) {
        (self.direct_taken.load(Relaxed), self.ring_taken.load(Relaxed))
    }

    /// Worker: leaves how many of its waits ended in a spin beyond the first looks, and in a sleep.
    pub fn set_waits(&self, spun: u64, parked: u64) {
        self.spun.store(spun, Relaxed);
        self.parked.store(parked, Relaxed);
    }

    /// Host: the same. Untrusted.
    pub fn waits(&self) -> (u64, u64) {
        (self.spun.load(Relaxed), self.parked.load(Relaxed))
    }

    /// Worker: leaves its CPU for the host's spin rule.
    pub fn set_worker_cpu(&self, cpu: u32) {
        self.worker_cpu.store(cpu, Relaxed);
    }

    /// Host: the CPU that the worker last slept on; `u32::MAX` if unknown.
    pub fn worker_cpu(&self) -> u32 {
        self.worker_cpu.load(Relaxed)
    }
}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Slot>() == 128 && align_of::<Slot>() == 128);
    assert!(std::mem::offset_of!(Slot, state) == 0);
    assert!(std::mem::offset_of!(Slot, function) == 4);
    assert!(std::mem::offset_of!(Slot, words) == 8);
    assert!(4 + 4 + 8 * WORDS_MAX == 128);
    assert!(size_of::<Doorbell>() == 128 && std::mem::offset_of!(Doorbell, count) == 0);
    assert!(std::mem::offset_of!(Doorbell, host_cpu) == 4);
    assert!(size_of::<Progress>() == 128 && std::mem::offset_of!(Progress, direct_taken) == 0);
    assert!(std::mem::offset_of!(Progress, ring_taken) == 8);
    assert!(std::mem::offset_of!(Progress, worker_cpu) == 16);
    assert!(std::mem::offset_of!(Progress, spun) == 24 && std::mem::offset_of!(Progress, parked) == 32);
    assert!(std::mem::offset_of!(Progress, stream_taken) == 40);
};

#[cfg(all(test, not(loom)))]
mod wire {
    use super::*;
    crate::wire_format::shared!(Slot: state, function, words);
    crate::wire_format::shared!(Doorbell: count, host_cpu);
    crate::wire_format::shared!(Progress: direct_taken, ring_taken, worker_cpu, reserved, spun, parked, stream_taken);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_call_goes_out_and_back() {
        let slot = Slot::default();
        assert!(!slot.has_request());
        slot.set_function(7, 3);
        slot.set_word(0, 42);
        assert!(!slot.publish());
        assert_eq!(slot.turn(), Turn::Pending);
        assert!(slot.has_request());
        assert_eq!((slot.function(), slot.word(0)), ((7, 3), 42));
        slot.set_word(0, 43);
        assert!(!slot.reply());
        assert_eq!((slot.turn(), slot.word(0)), (Turn::Reply, 43));
    }

    #[test]
    fn a_parked_caller_is_seen_by_the_reply() {
        let slot = Slot::default();
        let _ = slot.publish();
        assert_eq!(slot.arm_reply(), Some(REQUEST | PARKED));
        assert!(slot.has_request());
        assert!(slot.reply());
        assert_eq!(slot.arm_reply(), None);
    }

    #[test]
    fn a_parked_worker_is_seen_by_the_publish_and_leaves_the_reply_readable() {
        let slot = Slot::default();
        let _ = slot.publish();
        let _ = slot.reply();
        assert!(slot.arm_request());
        assert_eq!(slot.turn(), Turn::Reply);
        assert!(slot.publish());
        assert!(!slot.arm_request());
    }

    #[test]
    fn disarming_leaves_the_turn_alone() {
        let slot = Slot::default();
        assert!(slot.arm_request());
        slot.disarm_request();
        assert!(!slot.publish());
        slot.disarm_request();
        assert!(slot.has_request());
    }

    #[test]
    fn closing_never_hides_a_reply() {
        let slot = Slot::default();
        let _ = slot.publish();
        let _ = slot.reply();
        assert!(!slot.close());
        assert_eq!(slot.turn(), Turn::Reply);
        let _ = slot.publish();
        let _ = slot.arm_reply();
        assert!(slot.close());
        assert_eq!(slot.turn(), Turn::Closed);
    }

    #[test]
    fn forged_states_are_told_apart() {
        let slot = Slot::default();
        slot.forge_state(UPCALL);
        assert_eq!(slot.turn(), Turn::Unknown(UPCALL));
        slot.forge_state(0x7fff_ffff);
        assert_eq!(slot.turn(), Turn::Unknown(0x7fff_ffff));
    }

    #[test]
    fn function_word_keeps_its_parts_apart() {
        let slot = Slot::default();
        slot.set_function(FUNCTIONS_MAX, SLOTS_MAX - 1);
        assert_eq!(slot.function(), (FUNCTIONS_MAX, SLOTS_MAX - 1));
    }
}
