//! The direct slot's home: the one thread that may take the slot, and how that changes hands.
//!
//! **Law.** Only the home raises `busy`, so it does so with a plain store, where a thread among equals would need a read-modify-write, which takes as long as a tenth of a call.
//! Only whoever changes `owner` by a compare-exchange that succeeded changes it: from nobody to itself, from itself to nobody, from somebody else to [`MOVING`] and on from there. So at each
//! moment there is at most one home, and a thread that is not becomes it only by a step of its own, which acquires what the last home has left.
//!
//! ```text
//! home, for each call                       another thread, to become the home
//! T1  owner is mine, busy is free           M1  owner: somebody's ──► moving
//! T2  busy := taken                         (barrier, for all threads of the process)
//! (barrier)                                 M2  busy is free ──► owner := mine; else as it was
//! T3  owner is mine ──► the slot is taken
//! ```
//!
//! One of T3 and M2 has to see the other side's store, or both take the slot. That takes a full barrier on both sides, and the home's, which it would pay for in each call, is made by
//! the mover: `process_barrier` makes every thread of the process pass one. On the home's side only the compiler must keep T2 before T3. Wherever the barrier falls in the home's program:
//! after T2, then M2 sees it raised; or before T2, then T3 sees the owner changed. SYNC home
//!
//! A thread that was the home until a moment ago can raise `busy` at T2 over the word of a new home whose call has begun since. It must not lower it again at T3: the slot would show
//! as free in the middle of that call. So it leaves [`UNSURE`], which is as good as taken to everybody, until the home, which knows what it holds, lowers it ([`Home::settle`]).
//!
//! The file stands by itself, so that the model check can take it in: `channel/tests/loom.rs`.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU32, AtomicUsize};

#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, AtomicUsize};

/// A thread's mark, which no other living thread has: the address of a word of its own, so that the low bits are free. None is [`NOBODY`] or [`MOVING`].
pub(crate) type Mark = usize;

/// Nobody is the home.
pub(crate) const NOBODY: Mark = 0;
/// Added to the home's mark by a thread that waits for its turn: the home goes away before its next call.
pub(crate) const ASKED: usize = 1;
/// The home is about to move.
pub(crate) const MOVING: Mark = 2;
/// Nobody holds the slot.
pub(crate) const FREE: u32 = 0;
/// The home holds the slot.
pub(crate) const TAKEN: u32 = 1;
/// The home may hold the slot.
pub(crate) const UNSURE: u32 = 2;

/// Who may take the direct slot, and whether it is taken.
#[derive(Debug)]
pub(crate) struct Home {
    owner: AtomicUsize,
    busy: AtomicU32,
}

impl Default for Home {
    fn default() -> Self {
        Self { owner: AtomicUsize::new(NOBODY), busy: AtomicU32::new(FREE) }
    }
}

impl Home {
    /// The home's mark, or [`NOBODY`] or [`MOVING`]; with [`ASKED`] if it was asked to go away. Others may change it at any moment.
    #[inline(always)]
    pub(crate) fn owner(&self) -> Mark {
        self.owner.load(Relaxed)
    }

    /// [`FREE`], [`TAKEN`] or [`UNSURE`]. Others may change it at any moment. Acquires what the last holder did.
    #[inline(always)]
    pub(crate) fn busy(&self) -> u32 {
        self.busy.load(Acquire)
    }

    /// Takes the slot if the calling thread is the home, nobody has asked it to go away, and the slot is free.
    #[inline(always)]
    pub(crate) fn take(&self, here: Mark) -> bool {
        if self.owner.load(Relaxed) != here || self.busy.load(Acquire) != FREE {
            return false;
        }
        self.busy.store(TAKEN, Relaxed);
        // The processor's barrier is the mover's: SYNC home. The model has no such thing: a fence stands for it.
        #[cfg(not(loom))]
        std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
        #[cfg(loom)]
        loom::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if self.owner.load(Relaxed) != here {
            self.busy.store(UNSURE, Relaxed);
            return false;
        }
        true
    }

    /// Gives the slot back. Only for who has taken it.
    #[inline(always)]
    pub(crate) fn release(&self) {
        self.busy.store(FREE, Release);
    }

    /// Makes the calling thread the home if nobody is.
    pub(crate) fn enter(&self, here: Mark) -> bool {
        // Acquires what the last home left in the books. SYNC vacate
        self.owner.compare_exchange(NOBODY, here, Acquire, Relaxed).is_ok()
    }

    /// Leaves the slot to whoever comes next. Only for the home, between two calls. Fails if somebody is moving the home at this moment; then it is theirs, or as it was.
    pub(crate) fn vacate(&self, owner: Mark) {
        let _ = self.owner.compare_exchange(owner, NOBODY, Release, Relaxed); // SYNC vacate
    }

    /// Asks `home`, if it is the home, to go away before its next call.
    pub(crate) fn ask(&self, home: Mark) {
        // It carries no data, and the asked thread is the only one that acts on it.
        let _ = self.owner.compare_exchange(home, home | ASKED, Relaxed, Relaxed);
    }

    /// Makes the calling thread the home in place of another, unless that one holds the slot. `barrier` makes all threads of this process pass a full barrier, and says whether it could.
    pub(crate) fn move_to(&self, here: Mark, barrier: impl FnOnce() -> bool) -> bool {
        let owner = self.owner.load(Relaxed);
        if owner == NOBODY || owner == MOVING {
            return false;
        }
        // An exchange, because the home may have gone away since, and another thread come: what is put back below has to be what was there, or there would be two that
        // each know to be alone. Acquires what a home before this one left. SYNC home
        if self.owner.compare_exchange(owner, MOVING, Acquire, Relaxed).is_err() {
            return false;
        }
        let moved = barrier() && self.busy.load(Acquire) == FREE;
        self.owner.store(if moved { here } else { owner }, Release);
        moved
    }

    /// Lowers `busy` where a former home left it [`UNSURE`]. For the home, which is about to make a call and so is not in the middle of one, while nobody moves it. `given_up`: whether the
    /// slot still has a request, which is then one that the home gave up.
    pub(crate) fn settle(&self, here: Mark, given_up: impl FnOnce() -> bool) {
        if self.owner.load(Relaxed) == here && self.busy.load(Acquire) == UNSURE && !given_up() {
            self.busy.store(FREE, Release);
        }
    }

    /// Leaves the slot as a thread does that found the home moved after it had raised `busy`.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn forge_unsure(&self) {
        self.busy.store(UNSURE, Relaxed);
    }
}
