//! The stream: two rings for calls in a row, requests one way and replies the other. For the host's pipelines.
//!
//! A slot's state word goes back and forth, so each call through it waits for a cache line twice. In the stream each line goes one way: the host fills requests, the worker
//! fills replies, and neither looks at a line before it has to. That is what makes a call in a row cheaper than a call by itself.
//!
//! **Records are small**: four replies share a cache line, and so do two requests of up to three words, because stores are what limits a row of calls. A processor makes its stores
//! visible in the order of the program, and has but a few of them under way to lines that are elsewhere. Those that follow a record (a side's own counts, the call's own work) wait until the
//! record's line has come from the other side's cache. One such wait for several calls leaves room for that; one a call does not. For the same reason each side writes as little
//! else as it can in between.
//!
//! ```text
//! host                                  requests (256 of a line, or half a line)       worker, session's thread
//! words of call p, then its head ─────► request p % 256: head | 7 words, or 3 ────────► head is that of p: copy words, call
//!                                       replies (256 of a quarter line)
//! head is that of p: copy result ◄───── reply p % 256: head | result ◄───────────────── the result, then the head
//! ```
//!
//! **Law.** Each side writes only its own ring, and only a record that the other side is done with. The host has at most [`IN_FLIGHT_MAX`] calls without a reply
//! (and one [`STREAM_END`](crate::session::STREAM_END) behind them), so request `p` is written after reply `p - 256` was read: by then the worker has read request `p - 256`,
//! which it did before it answered, and the host has read the reply that reply `p` overwrites. Positions are private: nothing that is shared indexes anything. Neighbours in a line are other
//! words, so one may be written while another is read. The width changes only when the worker has taken all that was sent: mostly while the stream is off, and it looks at no request. (If it came to `STREAM` only after the host's deadline it may still look, with the former width, for the next call. That finds none: each head that is written then is the turn of an earlier one.) What stands in place of a head then may be an old
//! argument, which could be any turn: [`Stream::forget_requests`].
//!
//! **Publishing is one plain store.** A head holds the low 32 bits of the call's position plus one, its *turn*, beside the function in a request and `errno` in a reply. It is stored last (release) and
//! looked for by its one expected turn (acquire), so whoever sees the turn sees the words: SYNC stream request, SYNC stream reply. What stood there before is the turn of the
//! position 256 earlier, or 0: never the expected one.
//!
//! **The sleeper pays.** The slot's way to wake a sleeper, one exchange that publishes and sees a bit, costs the publisher 5 to 10 ns, because it waits for all its earlier stores; that
//! is as much as the rest of a call in a row. Here a sleeper announces itself in a word of its own ([`Sleepers`]), which nobody writes while both sides are awake, and the publisher loads that word after its
//! store. That is Dekker's handshake:
//!
//! ```text
//! publisher                              sleeper
//! P1  head := turn                       S1  asleep := 1
//! (barrier)                              (barrier)
//! P2  load asleep: 1 ──► wake            S2  load head: the turn ──► stay awake
//! ```
//!
//! One of P2 and S2 has to see the other side's store, or a wake-up is lost, and for that both sides need a full barrier between their store and their load. The publisher would pay for its own
//! with every record. So the sleeper, who has time, makes it for both, by `membarrier(GLOBAL_EXPEDITED)` between S1 and S2: every running thread of every process that has
//! registered passes a full barrier before the call returns, and threads that do not run passed one when they were put aside. On the publisher's
//! side only the compiler must keep P1 before P2. Wherever in the publisher's program the barrier falls, one of two holds: it falls after P1, then P1 is
//! visible before the sleeper goes on to S2; or before P1, then S1, which came before the barrier, is visible to P2. SYNC asleep.
//!
//! Where a kernel has no such `membarrier` (before Linux 4.16) or a filter forbids it to one of the sides, both agree on [`Barrier::Fence`] when the stream is switched on: then both make a sequentially consistent
//! fence of their own. A side whose `membarrier` fails later sleeps for at most [`UNSURE_SLICE`] at a time.
//!
//! A sleeper that sees its answer, or was woken for another reason, takes the announcement back by itself. A publisher that finds it takes it back too, by an exchange, so that of a burst
//! only the first record costs a system call. If the exchange finds nothing any more, the sleeper is awake, and looks again before it sleeps. All writes of the word are
//! exchanges, the sleeper's too: so they have one order, and a publisher's late exchange either took an announcement, and then wakes, or came before it.
//!
//! Nothing here trusts the other side: a head that is neither the old nor the expected one is told as such, and each sleep of the host ends by itself.

use crate::slot::{AtomicU32, AtomicU64, Doorbell, Progress, Slot};
use crate::wait::{self, SLICE, Spin, Waited};
use std::sync::atomic::AtomicU32 as StdAtomicU32;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::time::{Duration, Instant};

#[cfg(not(loom))]
use crate::sys::{futex_wait, futex_wake};
#[cfg(loom)]
use crate::wait::model::{futex_wait, futex_wake};
#[cfg(loom)]
use loom::sync::atomic::fence;
#[cfg(not(loom))]
use std::sync::atomic::fence;

/// Requests and replies in the two rings. (The model check makes do with two.)
pub const RECORDS: usize = if cfg!(loom) { 2 } else { 256 };
/// Most payload words of a request.
pub const RECORD_WORDS: usize = 7;
/// Words of a cache line.
const LINE_WORDS: usize = RECORD_WORDS + 1;
/// Most calls without a reply: one record is kept for the stream's end.
pub const IN_FLIGHT_MAX: u64 = RECORDS as u64 - 1;
/// Longest sleep of a side whose `membarrier` fails although it did not when the stream was switched on.
pub const UNSURE_SLICE: Duration = Duration::from_millis(1);
/// The part of a head that is the turn; the function or `errno` is above it.
const TURN_MASK: u64 = u32::MAX as u64;
/// Records that the worker serves in a row before it looks at the other lanes.
pub const BATCH: u32 = 16;

/// Who makes the publisher's barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Barrier {
    /// The sleeper, for both sides, by `membarrier`.
    Membarrier = 0,
    /// Each side for itself, by a fence after each publish.
    Fence = 1,
}

impl Barrier {
    /// The barrier that a word stands for: [`Barrier::Fence`], which is always right, for anything unknown.
    pub fn from_word(word: u64) -> Self {
        if word == Barrier::Membarrier as u64 { Barrier::Membarrier } else { Barrier::Fence }
    }

    /// What this process can do: registers it with the kernel and tries the barrier once.
    #[cfg(not(loom))]
    pub fn available() -> Self {
        if crate::sys::register_global_barrier() && crate::sys::global_barrier() {
            Barrier::Membarrier
        } else {
            Barrier::Fence
        }
    }

    /// Between the publishing store and the look for a sleeper. SYNC asleep
    #[inline(always)]
    fn after_publish(self) {
        match self {
            // The model has no membarrier: a fence stands for the barrier that the sleeper's makes here.
            Barrier::Membarrier if !cfg!(loom) => std::sync::atomic::compiler_fence(SeqCst),
            _ => fence(SeqCst),
        }
    }

    /// Between the announcement and the last look before the sleep. False if the barrier could not be made. SYNC asleep
    fn before_sleep(self) -> bool {
        fence(SeqCst); // also SYNC stream death
        #[cfg(not(loom))]
        if self == Barrier::Membarrier {
            return crate::sys::global_barrier();
        }
        true
    }
}

/// How large the requests of a pipeline are: as its function needs. Agreed on when the stream is switched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Width {
    /// Up to three words: two requests share a cache line.
    Narrow = 3,
    /// Up to seven words: a cache line each.
    Wide = RECORD_WORDS as u64,
}

impl Width {
    /// What requests with so many words need.
    pub const fn of(words: usize) -> Self {
        if words <= Width::Narrow.words() { Width::Narrow } else { Width::Wide }
    }

    /// The width that a word stands for: [`Width::Wide`] for anything unknown.
    pub fn from_word(word: u64) -> Self {
        if word == Width::Narrow as u64 { Width::Narrow } else { Width::Wide }
    }

    /// Payload words of a request.
    #[inline(always)]
    pub const fn words(self) -> usize {
        self as usize
    }
}

/// One request: its head, and as many words as its width says.
#[derive(Clone, Copy, Debug)]
pub struct Record<'s> {
    head: &'s AtomicU64,
    words: &'s [AtomicU64],
}

impl Record<'_> {
    /// Stores one word, before the record is published.
    ///
    /// # Panics
    /// If `index` is not below the width's words.
    #[inline(always)]
    pub fn set_word(&self, index: usize, word: u64) {
        self.words[index].store(word, Relaxed);
    }

    /// Loads one word; 0 beyond the width. Meaningful after the turn was acquired; the other side may be lying.
    #[inline(always)]
    pub fn word(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(Relaxed))
    }
}

/// One reply: a quarter of a cache line.
#[repr(C, align(16))]
#[derive(Debug)]
pub struct Reply {
    head: AtomicU64,
    word: AtomicU64,
}

impl Reply {
    fn new() -> Self {
        Self { head: AtomicU64::new(0), word: AtomicU64::new(0) }
    }

    /// The result. Meaningful after the turn was acquired; the worker may be lying.
    #[inline(always)]
    pub fn word(&self) -> u64 {
        self.word.load(Relaxed)
    }

    /// `errno`, if the function's is wanted. Meaningful after the turn was acquired; the worker may be lying.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)]
    pub fn errno(&self) -> i32 {
        ((self.head.load(Relaxed) >> 32) as u32).cast_signed()
    }
}

/// The turn of the call at `position`.
#[inline(always)]
const fn turn(position: u64) -> u64 {
    position.wrapping_add(1) & TURN_MASK
}

/// The two rings.
#[repr(C)]
#[derive(Debug)]
pub struct Stream {
    /// A head and its words, one request after the other.
    requests: [AtomicU64; RECORDS * LINE_WORDS],
    replies: [Reply; RECORDS],
}

impl Default for Stream {
    fn default() -> Self {
        Self {
            requests: std::array::from_fn(|_| AtomicU64::new(0)),
            replies: std::array::from_fn(|_| Reply::new()),
        }
    }
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation)]
const fn index(position: u64) -> usize {
    position as usize & (RECORDS - 1)
}

impl Stream {
    /// The record in which call `position` goes out.
    #[inline(always)]
    pub fn request(&self, position: u64, width: Width) -> Record<'_> {
        let bytes = width.words() + 1;
        let at = index(position) * bytes;
        let record = &self.requests[at..at + bytes];
        Record { head: &record[0], words: &record[1..] }
    }

    /// Host, before it switches the stream on with another width than the last: no head looks like a call at or behind `position` then, whatever word stood there.
    pub fn forget_requests(&self, position: u64, width: Width) {
        for earlier in 0..RECORDS as u64 {
            let before = turn(position.wrapping_add(earlier).wrapping_sub(RECORDS as u64));
            self.request(position.wrapping_add(earlier), width).head.store(before, Relaxed);
        }
    }

    /// Where the reply to call `position` comes back.
    #[inline(always)]
    pub fn reply(&self, position: u64) -> &Reply {
        &self.replies[index(position)]
    }

    /// Host: hands call `position` over. The words are in its record. The worker may be asleep: see [`Sleepers::wake_worker`].
    #[inline(always)]
    pub fn publish(&self, position: u64, width: Width, function: u32) {
        let head = turn(position) | u64::from(function) << 32;
        self.request(position, width).head.store(head, Release); // SYNC stream request
    }

    /// Worker: the function of call `position`, if it is there.
    #[inline(always)]
    pub fn requested(&self, position: u64, width: Width) -> Option<u32> {
        let head = self.request(position, width).head.load(Acquire); // SYNC stream request
        #[allow(clippy::cast_possible_truncation)]
        (head & TURN_MASK == turn(position)).then_some((head >> 32) as u32)
    }

    /// Worker: hands the reply to call `position` over. The host may be asleep: see [`Sleepers::wake_host`].
    #[inline(always)]
    pub fn answer(&self, position: u64, word: u64, errno: i32) {
        let reply = self.reply(position);
        reply.word.store(word, Relaxed);
        let head = turn(position) | u64::from(errno.cast_unsigned()) << 32;
        reply.head.store(head, Release); // SYNC stream reply
    }

    /// Host: whether the reply to call `position` is there.
    #[inline(always)]
    pub fn has_reply(&self, position: u64) -> bool {
        self.reply(position).head.load(Acquire) & TURN_MASK == turn(position) // SYNC stream reply
    }

    /// Host: the turn that stands in place of the reply to call `position`, if that is neither the reply's nor what was there before it.
    pub fn foreign_reply(&self, position: u64) -> Option<u64> {
        let head = self.reply(position).head.load(Acquire) & TURN_MASK;
        let before = match position.checked_sub(RECORDS as u64) {
            Some(earlier) => turn(earlier),
            None => 0,
        };
        (head != turn(position) && head != before).then_some(head)
    }

    /// Puts any value into the head of a reply, as only a lying worker does.
    #[doc(hidden)]
    pub fn forge_reply(&self, position: u64, head: u64) {
        self.reply(position).head.store(head, Release);
    }
}

/// Who sleeps: one line for each side, written by the sleeper, and by the publisher that wakes it.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct Sleepers {
    worker: AtomicU32,
    reserved: [StdAtomicU32; 15],
    host: AtomicU32,
    reserved_tail: [StdAtomicU32; 15],
}

impl Default for Sleepers {
    fn default() -> Self {
        Self {
            worker: AtomicU32::new(AWAKE),
            reserved: Default::default(),
            host: AtomicU32::new(AWAKE),
            reserved_tail: Default::default(),
        }
    }
}

/// In [`Sleepers`]: nobody sleeps.
pub const AWAKE: u32 = 0;
/// In [`Sleepers`]: about to sleep, or asleep.
pub const ASLEEP: u32 = 1;

impl Sleepers {
    /// Host, after [`Stream::publish`]: wakes the worker if it sleeps.
    #[inline(always)]
    pub fn wake_worker(&self, barrier: Barrier, bell: &Doorbell) {
        barrier.after_publish();
        if self.worker.load(Relaxed) != AWAKE {
            self.ring(bell);
        }
    }

    #[cold]
    #[inline(never)]
    fn ring(&self, bell: &Doorbell) {
        if self.worker.swap(AWAKE, AcqRel) != AWAKE {
            wait::wake_worker(bell);
        }
    }

    /// Worker, after [`Stream::answer`]: wakes the host if it sleeps.
    #[inline(always)]
    pub fn wake_host(&self, barrier: Barrier) {
        barrier.after_publish();
        if self.host.load(Relaxed) != AWAKE {
            self.wake_host_now();
        }
    }

    #[cold]
    #[inline(never)]
    fn wake_host_now(&self) {
        if self.host.swap(AWAKE, AcqRel) != AWAKE {
            futex_wake(&self.host, i32::MAX);
        }
    }

    /// Host: ends a wait for a reply that will never come. What `alive` reads (see [`wait_reply`]) must say so already.
    pub fn end_wait(&self) {
        fence(SeqCst); // SYNC stream death
        self.wake_host_now();
    }

    /// Says that the host sleeps, as only a lying worker does.
    #[doc(hidden)]
    pub fn forge(&self, worker: u32, host: u32) {
        self.worker.store(worker, Release);
        self.host.store(host, Release);
    }
}

/// Host: waits for the reply to call `position`, behind which are `others` more. `alive` and `timeout` as in [`wait::wait_reply`]; `calls` is how many calls this
/// side has made, for the rule of how long to spin.
#[inline(never)]
#[allow(clippy::too_many_arguments)]
pub fn wait_reply(
    stream: &Stream,
    sleepers: &Sleepers,
    position: u64,
    others: u64,
    barrier: Barrier,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
    timeout: Duration,
    alive: impl Fn() -> bool,
) -> Waited {
    // Each look at a line that the worker is about to write takes it away from the worker. With many calls in flight many replies come, so a look can wait for some.
    let pauses = (others / 16).clamp(1, 8);
    for _ in 0..spin.looks() {
        if stream.has_reply(position) {
            return Waited::Replied;
        }
        for _ in 0..pauses {
            wait::pause();
        }
    }
    let start = Instant::now();
    let left = || timeout.saturating_sub(start.elapsed());
    if spin.looks() != 0 {
        let other = || stream.has_reply(position) || stream.foreign_reply(position).is_some();
        spin.spin_on(wait::SPIN_MAX, other, || alive() && !left().is_zero());
    }
    let mut missed = false;
    let waited = loop {
        if stream.has_reply(position) {
            break Waited::Replied;
        }
        if let Some(head) = stream.foreign_reply(position) {
            break Waited::Breach(u32::try_from(head).unwrap_or(u32::MAX));
        }
        let left = left();
        if left.is_zero() {
            break Waited::TimedOut;
        }
        sleepers.host.swap(ASLEEP, AcqRel);
        let sure = barrier.before_sleep();
        // The monitor writes its facts, then takes the announcement back and wakes; we announce, then look at the facts, with a fence in between on both
        // sides: SYNC stream death.
        if !alive() {
            sleepers.host.swap(AWAKE, AcqRel);
            break if stream.has_reply(position) { Waited::Replied } else { Waited::Dead };
        }
        if !stream.has_reply(position) {
            missed = true;
            bell.set_host_cpu(wait::cpu());
            futex_wait(&sleepers.host, ASLEEP, Some(left.min(if sure { SLICE } else { UNSURE_SLICE })));
        }
        sleepers.host.swap(AWAKE, AcqRel);
    };
    if missed {
        spin.missed(position, progress.worker_cpu() == wait::cpu());
    }
    waited
}

/// Where a request came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// The direct slot.
    Direct,
    /// The ring slot that is next.
    Ring,
    /// The stream.
    Stream,
}

/// What the worker listens to while the stream is on.
#[derive(Clone, Copy, Debug)]
pub struct Lanes<'a> {
    /// The direct slot.
    pub direct: &'a Slot,
    /// The ring's next slot.
    pub ring: &'a Slot,
    /// The stream.
    pub stream: &'a Stream,
    /// Its next position.
    pub position: u64,
    /// Its requests' width.
    pub width: Width,
    /// Who sleeps.
    pub sleepers: &'a Sleepers,
    /// Who makes the publisher's barrier.
    pub barrier: Barrier,
}

impl Lanes<'_> {
    #[inline(always)]
    fn has(&self, which: Lane) -> bool {
        match which {
            Lane::Direct => self.direct.has_request(),
            Lane::Ring => self.ring.has_request(),
            Lane::Stream => self.stream.requested(self.position, self.width).is_some(),
        }
    }

    /// The first lane behind `last`, in turn, that has a request.
    #[inline(always)]
    fn found(&self, last: Lane) -> Option<Lane> {
        let [second, third] = others(last);
        [second, third, last].into_iter().find(|which| self.has(*which))
    }
}

/// The other two lanes, in the order in which they take turns.
#[inline(always)]
const fn others(last: Lane) -> [Lane; 2] {
    match last {
        Lane::Direct => [Lane::Ring, Lane::Stream],
        Lane::Ring => [Lane::Stream, Lane::Direct],
        Lane::Stream => [Lane::Direct, Lane::Ring],
    }
}

/// Worker: waits for a request in any of three lanes. As [`wait::wait_request`], which it replaces while the stream is on. True beside the lane: a `membarrier` failed on the way, and the
/// sleep was cut short instead.
#[inline(always)]
pub fn wait_request(
    lanes: Lanes<'_>,
    last: Lane,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
    calls: u64,
) -> (Lane, bool) {
    let [second, third] = others(last);
    for look in 0..spin.looks() {
        if look % wait::OTHER_EVERY == 0 {
            for other in [second, third] {
                if lanes.has(other) {
                    return (other, false);
                }
            }
        }
        if lanes.has(last) {
            return (last, false);
        }
        wait::pause();
    }
    wait_request_slow(lanes, last, spin, bell, progress, calls)
}

#[cold]
#[inline(never)]
fn wait_request_slow(
    lanes: Lanes<'_>,
    last: Lane,
    spin: &Spin,
    bell: &Doorbell,
    progress: &Progress,
    calls: u64,
) -> (Lane, bool) {
    if spin.looks() != 0 {
        spin.spin_on(wait::SPIN_MAX, || lanes.found(last).is_some(), || true);
    }
    if let Some(which) = lanes.found(last) {
        return (which, false);
    }
    progress.set_worker_cpu(wait::cpu());
    let mut sure = true;
    loop {
        let heard = bell.read();
        if lanes.direct.arm_request() && lanes.ring.arm_request() {
            lanes.sleepers.worker.swap(ASLEEP, AcqRel);
            sure &= lanes.barrier.before_sleep();
            if !lanes.has(Lane::Stream) {
                futex_wait(bell.futex(), heard, (!sure).then_some(UNSURE_SLICE));
            }
            lanes.sleepers.worker.swap(AWAKE, AcqRel);
        }
        if let Some(which) = lanes.found(last) {
            lanes.direct.disarm_request();
            lanes.ring.disarm_request();
            progress.set_worker_cpu(wait::cpu());
            spin.missed(calls, bell.host_cpu() == wait::cpu());
            return (which, !sure);
        }
    }
}

#[cfg(not(loom))]
const _: () = {
    assert!(RECORDS.is_power_of_two() && RECORDS > 2 * BATCH as usize);
    assert!(size_of::<Reply>() == 16 && std::mem::offset_of!(Reply, word) == 8);
    assert!(size_of::<Stream>() == 20 * 1024);
    assert!(std::mem::offset_of!(Stream, replies) == 16 * 1024);
    assert!(size_of::<Sleepers>() == 128 && std::mem::offset_of!(Sleepers, host) == 64);
};

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn no_old_argument_is_a_request_of_another_width() {
        let stream = Stream::default();
        for (first, last, next, lookalikes) in [
            (1024, Width::Wide, Width::Narrow, RECORDS / 2),
            (5120, Width::Narrow, Width::Wide, 0), // there a head stands where a head stood
            (u64::from(u32::MAX) - 255, Width::Wide, Width::Narrow, RECORDS / 2),
        ] {
            let end = first + RECORDS as u64;
            for position in first..end {
                stream.publish(position, last, 7);
            }
            // The worst arguments: each is the turn of the call whose head will stand in its place.
            for position in end..end + RECORDS as u64 {
                let place = index(position) * (next.words() + 1);
                let (record, word) = (place / (last.words() + 1), place % (last.words() + 1));
                if let Some(word) = word.checked_sub(1) {
                    stream.request(record as u64, last).set_word(word, turn(position));
                }
            }
            let found =
                || (end..end + RECORDS as u64).filter(|at| stream.requested(*at, next).is_some()).count();
            assert_eq!(found(), lookalikes);
            stream.forget_requests(end, next);
            assert_eq!(found(), 0);
            stream.publish(end, next, 8);
            assert_eq!(stream.requested(end, next), Some(8));
            assert_eq!(stream.requested(end + 1, next), None);
        }
    }

    #[test]
    fn widths_have_room_for_their_words() {
        assert_eq!([0, 3, 4, 7].map(Width::of), [Width::Narrow, Width::Narrow, Width::Wide, Width::Wide]);
        for width in [Width::Narrow, Width::Wide] {
            assert_eq!(Width::from_word(width as u64), width);
        }
        assert_eq!(Width::from_word(u64::MAX), Width::Wide);
        let stream = Stream::default();
        for width in [Width::Narrow, Width::Wide] {
            // All records of the ring at once, the words of each its own.
            for position in 0..RECORDS as u64 {
                let record = stream.request(position, width);
                (0..width.words()).for_each(|at| record.set_word(at, position * 8 + at as u64));
                stream.publish(position, width, u32::try_from(position).unwrap());
            }
            for position in 0..RECORDS as u64 {
                assert_eq!(stream.requested(position, width), u32::try_from(position).ok());
                let record = stream.request(position, width);
                for at in 0..width.words() {
                    assert_eq!(record.word(at), position * 8 + at as u64);
                }
                assert_eq!(record.word(width.words()), 0, "beyond the width");
            }
        }
    }

    #[test]
    fn a_reply_carries_its_word_and_errno() {
        let stream = Stream::default();
        assert!(!stream.has_reply(3));
        stream.answer(3, 99, -5);
        assert!(stream.has_reply(3) && !stream.has_reply(2) && !stream.has_reply(4));
        assert_eq!((stream.reply(3).word(), stream.reply(3).errno()), (99, -5));
        assert_eq!(stream.foreign_reply(3), None);
        stream.forge_reply(3, 77);
        assert_eq!(stream.foreign_reply(3), Some(77));
    }
}

#[cfg(all(test, not(loom)))]
mod wire {
    use super::*;
    crate::wire_format::shared!(Reply: head, word);
    crate::wire_format::shared!(Stream: requests, replies);
    crate::wire_format::shared!(Sleepers: worker, reserved, host, reserved_tail);
}
