//! Accounts: how much each session with a memory limit has allocated, and what it was refused.
//!
//! A thread *works for* a session: the session's own thread, and those that its modules have started. What a thread allocates is charged to the session that it
//! works for ([`current`]); what is freed is credited to the session that was charged, whichever thread frees it ([`Tag`]).
//!
//! **Law.** What is called in the middle of an allocation ([`current`], [`Tag`]'s methods) allocates nothing, takes no lock and never panics. An account is one word, so that a charge sees
//! whether the session is still the one that it means, whether there is room, and takes it, in one step. The word has the generation of the account above the bytes: closing a
//! session raises it, and whatever is left over from that session (a block that it leaked, a thread of its modules) then finds nobody to charge or credit.
//!
//! Orderings are relaxed, for an account guards no memory, but for its handing over: who opens one acquires the generation that the last owner released. Who needs an exact number (a reply that says whether something was refused) asks for what its own thread did, or for what
//! happened before something that synchronised by other means.

use crate::crash_handler;
use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

/// Sessions with a limit that a worker can have at a time.
const ACCOUNTS: usize = 1024;
/// Bits of the balance that count bytes; the generation is above them.
const USED_BITS: u32 = 48;
const USED_MASK: u64 = (1 << USED_BITS) - 1;

/// One session's account.
#[derive(Debug)]
#[repr(align(64))]
struct Account {
    /// The session that has it; 0 for none.
    session: AtomicU32,
    /// Generation and bytes in use.
    balance: AtomicU64,
    limit: AtomicU64,
    peak: AtomicU64,
    refusals: AtomicU64,
    /// Of the last refusal: what was asked for, and what was in use.
    asked: AtomicU64,
    used_then: AtomicU64,
}

static TABLE: [Account; ACCOUNTS] = [const {
    Account {
        session: AtomicU32::new(0),
        balance: AtomicU64::new(0),
        limit: AtomicU64::new(0),
        peak: AtomicU64::new(0),
        refusals: AtomicU64::new(0),
        asked: AtomicU64::new(0),
        used_then: AtomicU64::new(0),
    }
}; ACCOUNTS];

/// What this file knows of a thread.
struct Thread {
    /// The session it works for; 0 for none.
    tag: Cell<u32>,
    /// It is the session's own.
    serves: Cell<bool>,
    /// Which refusal in the crash page is this thread's, plus one; 0 for none.
    refusal: Cell<usize>,
}

thread_local! {
    // Const and without destructor: an access is an address computation, at any moment of a thread's life.
    static THREAD: Thread =
        const { Thread { tag: Cell::new(0), serves: Cell::new(false), refusal: Cell::new(0) } };
}

/// A session's account, as blocks and threads name it: the account's number plus one, and above that its generation. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag(u32);

/// What became of a charge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Charge {
    /// The bytes are the session's now.
    Done,
    /// They would exceed the limit.
    Refused,
    /// There is no such session any more.
    Nobody,
}

/// The session that the calling thread works for.
#[inline]
pub(crate) fn current() -> Option<Tag> {
    THREAD.with(|thread| Tag::from_bits(thread.tag.get()))
}

/// Lets the calling thread work for a session, as one of its modules' threads.
pub(crate) fn work_for(tag: Tag) {
    THREAD.with(|thread| thread.tag.set(tag.0));
}

/// Takes back the calling thread's refusal: it has lived through it.
pub(crate) fn lived_through() {
    THREAD.with(|thread| {
        if let Some(refusal) = thread.refusal.replace(0).checked_sub(1) {
            crash_handler::take_refusal_back(refusal);
        }
    });
}

impl Tag {
    /// The tag that these bits may be.
    pub(crate) fn from_bits(bits: u32) -> Option<Self> {
        let number = bits & 0xffff;
        (number != 0 && number as usize <= ACCOUNTS).then_some(Self(bits))
    }

    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    fn account(self) -> &'static Account {
        // from_bits() has checked it; the other end of the expression is for the compiler.
        &TABLE[((self.0 & 0xffff) as usize).wrapping_sub(1) % ACCOUNTS]
    }

    fn is_of(self, balance: u64) -> bool {
        balance >> USED_BITS == u64::from(self.0 >> 16)
    }

    /// Changes the bytes in use, if the session is still there.
    fn change(self, next: impl Fn(u64) -> Option<u64>) -> Charge {
        let balance = &self.account().balance;
        let mut seen = balance.load(Relaxed);
        loop {
            if !self.is_of(seen) {
                return Charge::Nobody;
            }
            let Some(used) = next(seen & USED_MASK).filter(|used| *used <= USED_MASK) else {
                return Charge::Refused;
            };
            match balance.compare_exchange_weak(seen, (seen & !USED_MASK) | used, Relaxed, Relaxed) {
                Ok(_) => {
                    let peak = &self.account().peak;
                    if used > peak.load(Relaxed) {
                        peak.fetch_max(used, Relaxed);
                    }
                    return Charge::Done;
                }
                Err(now) => seen = now,
            }
        }
    }

    /// Charges bytes if the limit allows. If not, the caller says so by [`Tag::refuse`].
    pub(crate) fn charge(self, bytes: u64) -> Charge {
        let limit = self.account().limit.load(Relaxed);
        let charge = self.change(|used| used.checked_add(bytes).filter(|sum| *sum <= limit));
        if charge == Charge::Done {
            THREAD.with(|thread| {
                // A thread that goes on has lived through it; the session's own when its call returns.
                if thread.refusal.get() != 0 && !thread.serves.get() {
                    lived_through();
                }
            });
        }
        charge
    }

    /// Charges what an allocator gave beyond what it was asked for; that cannot be refused any more.
    pub(crate) fn charge_rounding(self, bytes: u64) {
        self.change(|used| Some(used.saturating_add(bytes).min(USED_MASK)));
    }

    /// Credits bytes that were charged.
    pub(crate) fn credit(self, bytes: u64) {
        self.change(|used| Some(used.saturating_sub(bytes)));
    }

    /// Notes that `asked` bytes were refused: in the account, for the reply, and in the crash page, in case that the code does not live through it.
    #[cold]
    pub(crate) fn refuse(self, asked: u64) {
        let account = self.account();
        let balance = account.balance.load(Relaxed);
        let session = account.session.load(Relaxed);
        if !self.is_of(balance) {
            return;
        }
        let used = balance & USED_MASK;
        account.asked.store(asked, Relaxed);
        account.used_then.store(used, Relaxed);
        account.refusals.fetch_add(1, Relaxed);
        lived_through();
        let refusal = crash_handler::push_refusal(session, asked, used);
        THREAD.with(|thread| thread.refusal.set(refusal.map_or(0, |index| index + 1)));
    }
}

/// A session's account, while it is open. Made and dropped on the session's thread.
#[derive(Debug)]
pub(crate) struct Meter {
    tag: Tag,
}

impl Meter {
    /// Opens an account for a session; what the calling thread allocates is charged to it from now on. `None` if there are as many as there can be.
    pub(crate) fn open(session: u32, limit: u64) -> Option<Self> {
        let free = |account: &Account| account.session.compare_exchange(0, session, Acquire, Relaxed).is_ok(); // SYNC account
        let at = TABLE.iter().position(free)?;
        let account = TABLE.get(at)?;
        account.limit.store(limit, Relaxed);
        account.peak.store(0, Relaxed);
        account.refusals.store(0, Relaxed);
        let generation = u32::try_from(account.balance.load(Relaxed) >> USED_BITS).ok()?;
        let tag = Tag::from_bits((generation << 16) | u32::try_from(at + 1).ok()?)?;
        THREAD.with(|thread| {
            thread.tag.set(tag.0);
            thread.serves.set(true);
        });
        Some(Self { tag })
    }

    /// How many allocations were refused so far.
    pub(crate) fn refusals(&self) -> u64 {
        self.tag.account().refusals.load(Relaxed)
    }

    /// Of the last refusal: how many bytes were asked for, and how many were in use.
    pub(crate) fn last_refusal(&self) -> (u64, u64) {
        let account = self.tag.account();
        (account.asked.load(Relaxed), account.used_then.load(Relaxed))
    }

    /// Bytes in use, and the most that were at a time.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let account = self.tag.account();
        (account.balance.load(Relaxed) & USED_MASK, account.peak.load(Relaxed))
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        lived_through();
        let account = self.tag.account();
        // The next generation, with nothing in use. (It wraps after 65536 sessions in one account.)
        crate::allocations::forget_mappings(self.tag);
        let generation = (account.balance.load(Relaxed) >> USED_BITS).wrapping_add(1) & 0xffff;
        account.balance.store(generation << USED_BITS, Relaxed);
        account.session.store(0, Release); // SYNC account
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_charged_is_credited_and_the_limit_is_the_limit() {
        let meter = Meter::open(1, 1000).unwrap();
        let tag = current().unwrap();
        assert_eq!(tag.charge(600), Charge::Done);
        assert_eq!(tag.charge(401), Charge::Refused);
        assert_eq!(tag.charge(400), Charge::Done);
        assert_eq!(tag.charge(u64::MAX), Charge::Refused);
        assert_eq!(meter.counts(), (1000, 1000));
        tag.credit(700);
        tag.charge_rounding(800);
        assert_eq!(meter.counts(), (1100, 1100));
        tag.refuse(401);
        assert_eq!((meter.refusals(), meter.last_refusal()), (1, (401, 1100)));
        assert_eq!(tag.charge(1), Charge::Refused);
        tag.credit(u64::MAX);
        assert_eq!(meter.counts(), (0, 1100));
    }

    #[test]
    fn a_closed_session_is_charged_no_more_and_its_successor_does_not_pay_for_it() {
        std::thread::spawn(|| {
            let first = Meter::open(2, 1000).unwrap();
            let old = current().unwrap();
            assert_eq!(old.charge(10), Charge::Done);
            drop(first);
            assert_eq!(old.charge(10), Charge::Nobody);
            let second = Meter::open(3, 1000).unwrap();
            let new = current().unwrap();
            assert_ne!(old, new);
            assert_eq!(new.charge(20), Charge::Done);
            old.credit(10);
            old.refuse(5);
            assert_eq!((second.counts(), second.refusals()), ((20, 20), 0));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn threads_of_one_session_never_have_more_than_its_limit() {
        let meter = Meter::open(4, 100_000).unwrap();
        let tag = current().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    work_for(tag);
                    let mut granted = 0;
                    for _ in 0..20_000 {
                        if current().unwrap().charge(7) == Charge::Done {
                            granted += 1;
                        }
                        if granted > 100 {
                            tag.credit(7 * granted);
                            granted = 0;
                        }
                    }
                    tag.credit(7 * granted);
                });
            }
        });
        let (used, peak) = meter.counts();
        assert_eq!(used, 0);
        assert!(peak <= 100_000, "{peak}");
    }
}
