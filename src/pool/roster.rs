//! Who serves now: what a caller reads, and how it chooses.
//!
//! A roster never changes; whoever changes the pool publishes another one. So a caller reads one pointer, and what it sees fits together.

use crate::module::Module;
use crate::session::Session;
use crate::worker::Worker;
use crossbeam_utils::CachePadded;
use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// One worker of the pool, with the session and the module that its setup made.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) id: u64,
    // Before the session and the module: the last handle to a session closes it politely only if its worker has other handles.
    pub(crate) worker: Worker,
    pub(crate) session: Session,
    pub(crate) module: Module,
    /// When it got its seat.
    pub(crate) serving_since: OnceLock<Instant>,
    /// Requests that the session had made when it became ready.
    pub(crate) calls_before: u64,
    /// Private memory in bytes when it became ready; `None` if the system did not tell.
    pub(crate) private_bytes_before: Option<u64>,
    /// Set before its session is closed: a call that finds it closed goes elsewhere.
    pub(crate) leaving: AtomicBool,
    /// It has had as many calls as it should.
    pub(crate) worn_out: AtomicBool,
    /// It uses as much more memory as it may.
    pub(crate) has_grown: AtomicBool,
    /// Calls until it has had as many as it should.
    pub(crate) calls_left: AtomicI64,
    /// Calls and tickets of [`PoolFunction`](super::PoolFunction)s.
    pub(crate) in_flight: CachePadded<AtomicU32>,
}

impl Member {
    /// Calls that the worker was given since it became ready.
    pub(crate) fn calls(&self) -> u64 {
        self.session.inner().calls().0.saturating_sub(self.calls_before)
    }

    /// Notes that it was given calls. True once: when it has had as many as it should.
    #[inline]
    pub(crate) fn spend(&self, calls: i64) -> bool {
        let before = self.calls_left.fetch_sub(calls, Relaxed);
        before > 0 && before <= calls
    }

    /// How busy it is. A caller compares these numbers and believes none of them: they change at any moment.
    #[inline(always)]
    fn load(&self) -> u32 {
        self.in_flight.load(Relaxed) + u32::from(self.session.inner().is_direct_busy())
    }
}

/// A function of a member, of the type that its registration says.
pub(crate) type AnyFunction = Arc<dyn Any + Send + Sync>;

/// A member with the pool's functions resolved in it, by their number in the pool.
#[derive(Clone, Debug)]
pub(crate) struct Seat {
    pub(crate) member: Arc<Member>,
    pub(crate) functions: Arc<[AnyFunction]>,
}

impl Seat {
    #[inline(always)]
    pub(crate) fn function<H: 'static>(&self, index: usize) -> &H {
        let function = self.functions.get(index).and_then(|function| function.downcast_ref());
        // A handle exists only once its function is in every seat, and it has the type of its registration.
        function.expect("every seat has every function of the pool")
    }
}

/// How a handle chooses its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// The calling thread's own seat if it is idle, else the least loaded.
    LeastLoaded,
    /// The seat of this number, as long as it is taken.
    Sticky(usize),
}

#[derive(Debug)]
pub(crate) struct Roster {
    pub(crate) seats: Box<[Option<Seat>]>,
}

impl Roster {
    /// The seat for a call; `None` if there is no worker at all.
    #[inline(always)]
    pub(crate) fn pick(&self, placement: Placement) -> Option<&Seat> {
        match placement {
            Placement::LeastLoaded => match &self.seats[thread_number() % self.seats.len()] {
                // The same thread comes back to the same session, whose direct slot is then its own.
                Some(seat) if seat.member.load() == 0 => Some(seat),
                _ => self.least_loaded(),
            },
            Placement::Sticky(at) => self.from(at % self.seats.len()).next(),
        }
    }

    #[inline(never)]
    fn least_loaded(&self) -> Option<&Seat> {
        self.from(thread_number() % self.seats.len()).min_by_key(|seat| seat.member.load())
    }

    /// The taken seats, from one of them on.
    fn from(&self, at: usize) -> impl Iterator<Item = &Seat> {
        let (before, after) = self.seats.split_at(at);
        after.iter().chain(before).flatten()
    }
}

/// A small number for each thread, so that threads spread over the seats.
#[inline(always)]
pub(crate) fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: usize = NEXT.fetch_add(1, Relaxed);
    }
    NUMBER.with(|number| *number)
}
