//! The pool's books, and the thread that keeps it complete.
//!
//! *The books* say which worker has which place: in a seat (it serves), aside (a standby), or leaving. They are behind one lock, which is held for moments: no call, no start and
//! no code of the host's user runs under it. Every change goes through [`Shared::change`], which afterwards fills what is empty from the standbys and publishes a new [`Roster`]. Whoever
//! notices a loss first makes the change: the caller that got the error, or the keeper.
//!
//! *The keeper*, one thread for each pool, does what takes time or has to wait: it has workers started and ended, on threads that live as long as that takes, and looks after recycling.
//! It sleeps while nothing happens.

use super::roster::{AnyFunction, Member, Placement, Roster, Seat};
use super::{Capacity, PoolErrors, PoolEvent, PoolSnapshot, PoolWorker, Reason, Role};
use crate::crash::Cause;
use crate::error::{CallError, FunctionName, LoadError, StartError};
use crate::events::Emitter;
use crate::module::Module;
use crate::monitor::{self, lock};
use crate::session::Session;
use crate::supervisor::clock::Clock;
use crate::supervisor::restart::{Gate, Restart, RestartPolicy, Restarts, why_ended};
use crate::supervisor::retry::Retry;
use crate::supervisor::start::BoxError;
use crate::worker::{WorkerBuilder, WorkerEvent};
use arc_swap::ArcSwap;
use crossbeam_utils::CachePadded;
use hotcell_channel::layout::PAGE_BYTES;
use hotcell_channel::signature::Signature;
use hotcell_channel::sys;
use std::any::TypeId;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering::Acquire, Ordering::Relaxed,
    Ordering::Release, Ordering::SeqCst,
};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a worker that leaves is looked at, until its calls are over.
const DRAIN_LOOK: Duration = Duration::from_millis(5);
/// How often the memory of workers is looked at, if that matters.
const MEMORY_LOOK: Duration = Duration::from_secs(1);
/// Most calls that a caller makes before it tells its member of them.
const CALLER_BATCH_MAX: i64 = 1024;

pub(super) type Setup = dyn Fn(&Session) -> Result<Module, BoxError> + Send + Sync;

/// How a function of the pool is resolved in a new worker.
pub(super) type Resolver = Arc<dyn Fn(&Module) -> Result<AnyFunction, LoadError> + Send + Sync>;

/// What tells one function of the pool from another: the symbol, the handle's type, and the signature if that is not part of the type.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct FunctionKey {
    pub(super) symbol: String,
    pub(super) handle: TypeId,
    pub(super) signature: Option<Signature>,
    pub(super) variadic_after: Option<u8>,
}

/// When a worker is replaced without need.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Recycling {
    pub(super) calls: Option<u64>,
    pub(super) age: Option<Duration>,
    pub(super) growth_bytes: Option<u64>,
}

#[derive(Clone, Debug)]
pub(super) struct Config {
    pub(super) worker: WorkerBuilder,
    pub(super) workers: usize,
    pub(super) standby: usize,
    pub(super) retry: Retry,
    pub(super) patience: Duration,
    pub(super) restart: Option<RestartPolicy>,
    pub(super) recycling: Recycling,
    pub(super) drain_timeout: Duration,
    pub(super) clock: Clock,
}

/// Why a worker has left its place.
#[derive(Clone, Copy, Debug)]
enum Why {
    /// Its end is known or on its way: it died, or was killed for a deadline.
    Lost,
    /// It was replaced, and its calls may finish until the deadline.
    Replaced { reason: Reason, deadline: Instant },
    /// Its calls are over, or their time is up, and it is being ended.
    Ending { reason: Reason, forced: bool },
}

#[derive(Debug)]
struct Leaving {
    seat: Seat,
    role: Role,
    why: Why,
}

#[derive(Debug, Default)]
struct Totals {
    started: u64,
    start_failures: u64,
    lost: u64,
    promoted: u64,
    recycled: u64,
    calls_of_the_gone: u64,
}

struct Books {
    closed: bool,
    /// The first workers are being started: a failure ends the building, and is not tried again.
    building: bool,
    seats: Vec<Option<Seat>>,
    standbys: VecDeque<Seat>,
    leaving: Vec<Leaving>,
    /// Dropped by the keeper, without the lock.
    gone: Vec<Seat>,
    /// The worker that is to be replaced next.
    due: Option<(u64, Reason)>,
    starting: usize,
    functions: Vec<(FunctionKey, Resolver)>,
    restarts: Restarts,
    /// The first failure while building.
    failure: Option<StartError>,
    totals: Totals,
    /// The seats are not those of the published roster.
    moved: bool,
    told: Vec<PoolEvent>,
}

/// What the keeper is woken for.
#[derive(Debug, Default)]
struct Notes {
    ended: Vec<u64>,
    look: bool,
}

/// Where the monitor leaves what the keeper is to look at: it must not take the pool's lock, nor own the pool.
#[derive(Debug, Default)]
pub(super) struct Desk {
    notes: Mutex<Notes>,
    noted: Condvar,
}

impl Desk {
    fn note(&self, write: impl FnOnce(&mut Notes)) {
        write(&mut lock(&self.notes));
        self.noted.notify_one();
    }

    fn look(&self) {
        self.note(|notes| notes.look = true);
    }
}

/// Calls that failed, by cause, and calls that were made again.
#[derive(Debug, Default)]
pub(super) struct Tally {
    retried: AtomicU64,
    redirected: AtomicU64,
    crashed: AtomicU64,
    timed_out: AtomicU64,
    limit_exceeded: AtomicU64,
    disposed: AtomicU64,
    no_worker: AtomicU64,
    other: AtomicU64,
}

/// What all handles of a pool share.
pub(crate) struct Shared {
    /// Raised after each new roster: what a caller that keeps its function compares.
    generation: CachePadded<AtomicU64>,
    pub(super) roster: ArcSwap<Roster>,
    pub(super) config: Config,
    tally: Tally,
    pub(super) events: Arc<Emitter<PoolEvent>>,
    /// After how many calls a caller tells its member of them.
    pub(super) batch: i64,
    /// Seats that callers were given, in turn.
    homes: AtomicUsize,
    books: Mutex<Books>,
    changed: Condvar,
    /// Held while a function is registered.
    registering: Mutex<()>,
    desk: Arc<Desk>,
    setup: Box<Setup>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("config", &self.config).finish_non_exhaustive()
    }
}

/// In a fork, locks may be held for ever by threads that were not forked, and there is no keeper.
pub(super) fn is_forked() -> bool {
    sys::original_process().load(Relaxed) == 0
}

impl Shared {
    pub(super) fn new(config: Config, setup: Box<Setup>) -> Arc<Shared> {
        let seats = vec![None; config.workers];
        let limit = u32::try_from(5 * (config.workers + config.standby)).unwrap_or(u32::MAX);
        let policy = config.restart.clone();
        let mut policy =
            policy.unwrap_or_else(|| RestartPolicy::default().limit(limit, Duration::from_secs(60)));
        policy.restart = Restart::Always;
        let batch =
            config.recycling.calls.map_or(i64::MAX, |calls| i64::try_from(calls / 8).unwrap_or(i64::MAX));
        Arc::new(Shared {
            generation: CachePadded::default(),
            roster: ArcSwap::from_pointee(Roster { seats: seats.clone().into_boxed_slice() }),
            tally: Tally::default(),
            events: Arc::default(),
            batch: batch.clamp(1, CALLER_BATCH_MAX),
            homes: AtomicUsize::new(0),
            books: Mutex::new(Books {
                closed: false,
                building: true,
                seats,
                standbys: VecDeque::new(),
                leaving: Vec::new(),
                gone: Vec::new(),
                due: None,
                starting: 0,
                functions: Vec::new(),
                restarts: Restarts::new(policy),
                failure: None,
                totals: Totals::default(),
                moved: false,
                told: Vec::new(),
            }),
            changed: Condvar::new(),
            registering: Mutex::new(()),
            desk: Arc::default(),
            config,
            setup,
        })
    }

    /// The number of the published roster. Who has read it and then reads the roster has that one or a newer one. SYNC roster
    #[inline(always)]
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Acquire)
    }

    /// Changes the books, and what follows from that: standbys into empty seats, the roster, events, and whoever waits.
    fn change<R>(&self, change: impl FnOnce(&mut Books) -> R) -> R {
        let mut books = lock(&self.books);
        let result = change(&mut books);
        self.fill(&mut books);
        if std::mem::take(&mut books.moved) {
            self.roster.store(Arc::new(Roster { seats: books.seats.clone().into_boxed_slice() }));
            self.generation.fetch_add(1, Release); // SYNC roster
        }
        let told = std::mem::take(&mut books.told);
        for event in &told {
            // Under the lock, so that everybody hears of things in the order in which they happened. It only fills queues.
            self.events.emit(event.clone());
        }
        drop(books);
        self.changed.notify_all();
        self.desk.look();
        for event in told {
            tracing::debug!(%event, "pool");
        }
        result
    }

    /// Puts standbys into empty seats, and one into the seat of the worker that is due to be replaced.
    fn fill(&self, books: &mut Books) {
        if books.closed {
            return;
        }
        for at in 0..books.seats.len() {
            if books.seats[at].is_some() {
                continue;
            }
            let Some(seat) = Self::living_standby(books) else { return };
            books.totals.promoted += 1;
            books.told.push(PoolEvent::Promoted { worker: seat.member.id, seat: at });
            self.take_seat(books, at, seat);
        }
        let Some((id, reason)) = books.due else { return };
        let Some(at) = books.seat_of(id) else {
            books.due = None;
            return;
        };
        let Some(successor) = Self::living_standby(books) else { return };
        books.due = None;
        books.told.push(PoolEvent::Replaced { worker: id, successor: successor.member.id, seat: at, reason });
        self.leave(books, at, Why::Replaced { reason, deadline: self.drain_deadline() });
        self.take_seat(books, at, successor);
    }

    fn drain_deadline(&self) -> Instant {
        let now = self.config.clock.now();
        now.checked_add(self.config.drain_timeout).unwrap_or(now)
    }

    fn living_standby(books: &mut Books) -> Option<Seat> {
        loop {
            let seat = books.standbys.pop_front()?;
            if seat.member.worker.is_alive() {
                return Some(seat);
            }
            // The keeper is about to hear of it.
            seat.member.leaving.store(true, SeqCst);
            books.leaving.push(Leaving { seat, role: Role::Standby, why: Why::Lost });
        }
    }

    fn take_seat(&self, books: &mut Books, at: usize, seat: Seat) {
        seat.member.serving_since.get_or_init(|| self.config.clock.now());
        books.seats[at] = Some(seat);
        books.moved = true;
    }

    fn leave(&self, books: &mut Books, at: usize, why: Why) {
        if let Some(seat) = books.seats[at].take() {
            // Before its session is closed: a call that finds it closed then knows that it may go elsewhere. SYNC leaving
            seat.member.leaving.store(true, SeqCst);
            books.leaving.push(Leaving { seat, role: Role::Serving { seat: at }, why });
            books.moved = true;
        }
    }

    // What callers do.

    /// A function's name for errors that no worker's module has to do with.
    pub(super) fn pool_name(&self, symbol: &str) -> FunctionName {
        FunctionName { module: "the pool".into(), symbol: symbol.into() }
    }

    /// A seat for one more caller.
    pub(super) fn next_home(&self) -> usize {
        self.homes.fetch_add(1, Relaxed)
    }

    /// A call on this member has failed: takes the member out of its seat if it cannot serve any more, so that the next call finds another.
    #[cold]
    pub(super) fn failed(&self, member: &Member, error: &CallError) {
        let why = match error {
            _ if error.crash_report().is_some() => Why::Lost,
            CallError::TimedOut { worker_killed: true, .. } => Why::Lost,
            // The session is given up until the call returns, if it ever does: others need not wait for it.
            CallError::TimedOut { .. } | CallError::Abandoned { .. } => {
                Why::Replaced { reason: Reason::Abandoned, deadline: self.drain_deadline() }
            }
            CallError::Closed => Why::Replaced { reason: Reason::Closed, deadline: self.drain_deadline() },
            CallError::StringLost { source, .. } => return self.failed(member, source),
            _ => return,
        };
        if is_forked() || member.leaving.load(Relaxed) {
            return;
        }
        if member.worker.crash_report().is_some() {
            return self.ended(member.id);
        }
        self.change(|books| {
            if let Some(at) = books.seat_of(member.id) {
                self.leave(books, at, why);
            }
        });
    }

    /// A call is given up: counts it.
    #[cold]
    pub(super) fn count_error(&self, error: &CallError) {
        let tally = &self.tally;
        let count = match error {
            CallError::Crashed(_) => &tally.crashed,
            CallError::TimedOut { .. } => &tally.timed_out,
            CallError::Disposed(_) => &tally.disposed,
            CallError::CpuTimeExceeded(_) | CallError::MemoryExceeded(_) | CallError::FileSizeExceeded(_) => {
                &tally.limit_exceeded
            }
            CallError::NoWorker { .. } => &tally.no_worker,
            _ => &tally.other,
        };
        count.fetch_add(1, Relaxed);
    }

    pub(super) fn count_retry(&self) {
        self.tally.retried.fetch_add(1, Relaxed);
    }

    pub(super) fn count_redirect(&self) {
        self.tally.redirected.fetch_add(1, Relaxed);
    }

    /// A seat for a call that found none: waits at most the pool's patience for one, and not at all while nothing is started.
    #[cold]
    pub(super) fn wait_for_seat(
        &self,
        placement: Placement,
        function: &FunctionName,
    ) -> Result<Seat, CallError> {
        if is_forked() {
            return Err(CallError::Forked);
        }
        let started = Instant::now();
        let mut books = lock(&self.books);
        loop {
            if books.closed {
                return Err(CallError::PoolDisposed { function: function.clone() });
            }
            // Published under this lock.
            if let Some(seat) = self.roster.load().pick(placement) {
                return Ok(seat.clone());
            }
            let waited = started.elapsed();
            let left = self.config.patience.saturating_sub(waited);
            let no_worker = |source| CallError::NoWorker { function: function.clone(), waited, source };
            match books.restarts.gate(self.config.clock.now()) {
                Gate::Refused(refusal) => return Err(no_worker(Some(Arc::new(refusal)))),
                _ if left.is_zero() => return Err(no_worker(books.restarts.last().cloned())),
                _ => {}
            }
            // The circuit opens with a change, which is notified.
            books = self.changed.wait_timeout(books, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A member has had as many calls as it should.
    #[cold]
    pub(super) fn worn_out(&self, member: &Member) {
        member.worn_out.store(true, Release);
        self.desk.look();
    }

    /// Registers a function, unless it is, and resolves it in every worker there is. Gives its number.
    pub(super) fn register(&self, key: FunctionKey, resolve: Resolver) -> Result<usize, LoadError> {
        let name = self.pool_name(&key.symbol);
        let fail = |source| LoadError::Call { module: Arc::clone(&name.module), source };
        if is_forked() {
            return Err(fail(CallError::Forked));
        }
        // One at a time, so that functions have the same order in every worker. Whoever waits here waits for calls, which have deadlines.
        let _registering = lock(&self.registering);
        if let Some(index) = lock(&self.books).functions.iter().position(|(known, _)| *known == key) {
            return Ok(index);
        }
        // In one worker first: what is not found there is not registered.
        let started = Instant::now();
        loop {
            let seat = self.wait_for_seat(Placement::LeastLoaded, &name).map_err(fail)?;
            match resolve(&seat.member.module) {
                Ok(_) => break,
                // The worker died under it, which says nothing about the function, as long as others serve and the patience lasts.
                Err(LoadError::Call { source, .. })
                    if started.elapsed() < self.config.patience && !source.session_usable() =>
                {
                    self.failed(&seat.member, &source);
                }
                Err(error) => return Err(error),
            }
        }
        // From here on every new worker has it, so these are all that have not.
        let (index, seats) = self.change(|books| {
            books.functions.push((key, Arc::clone(&resolve)));
            let seats: Vec<Seat> = books.seats.iter().flatten().chain(&books.standbys).cloned().collect();
            (books.functions.len() - 1, seats)
        });
        for seat in seats {
            let resolved = resolve(&seat.member.module);
            self.change(|books| books.add_function(&seat.member, resolved.ok(), self.drain_deadline()));
        }
        Ok(index)
    }

    // What the keeper and its helpers do.

    /// Starts the keeper and the first workers, and waits until all are ready. A start that fails ends it all.
    pub(super) fn build(self: &Arc<Self>) -> Result<(), StartError> {
        let keeper = Arc::clone(self);
        monitor::start_thread("hotcell-pool", move || keeper.keep())?;
        self.desk.look();
        let mut books = lock(&self.books);
        loop {
            if let Some(failure) = books.failure.take() {
                drop(books);
                self.close();
                return Err(failure);
            }
            if books.is_complete(&self.config) {
                books.building = false;
                return Ok(());
            }
            books = self.changed.wait(books).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The keeper's thread.
    fn keep(self: Arc<Self>) {
        let mut memory_look = None;
        loop {
            let notes = std::mem::take(&mut *lock(&self.desk.notes));
            for worker in notes.ended {
                self.ended(worker);
            }
            let Some(next) = self.look(&mut memory_look) else { return };
            let notes = lock(&self.desk.notes);
            if !notes.look && notes.ended.is_empty() {
                drop(self.config.clock.wait(&self.desk.noted, notes, next));
            }
        }
    }

    /// Does what is due. Gives when to look again, or nothing when the pool is closed and everybody gone.
    fn look(self: &Arc<Self>, memory_look: &mut Option<Instant>) -> Option<Option<Instant>> {
        let now = self.config.clock.now();
        let mut next = Next(None);
        self.look_at_memory(now, memory_look, &mut next);
        let mut ends = Vec::new();
        let (gone, starts, swap) = {
            let mut books = lock(&self.books);
            let gone = std::mem::take(&mut books.gone);
            if books.closed && books.leaving.is_empty() {
                drop(books);
                drop(gone);
                return None;
            }
            if books.leaving.iter().any(|leaving| matches!(leaving.why, Why::Replaced { .. })) {
                // A caller takes its slot and then looks whether its member is leaving; here that is known, and then the slots are looked at. With the barrier, which every thread is made to
                // pass, either the call is seen here or it sees that it has to go elsewhere. Where the kernel has none, a call that comes behind the end of the session goes elsewhere too.
                sys::process_barrier();
            }
            for leaving in &mut books.leaving {
                let Why::Replaced { reason, deadline } = leaving.why else { continue };
                let member = &leaving.seat.member;
                let over = member.in_flight.load(SeqCst) == 0 && member.session.inner().slots_held() == 0;
                if over || now >= deadline {
                    leaving.why = Why::Ending { reason, forced: !over };
                    ends.push((Arc::clone(&leaving.seat.member), over));
                } else {
                    next.at(deadline.min(now + DRAIN_LOOK));
                }
            }
            self.find_due(&mut books, now, &mut next);
            let starts = self.count_starts(&mut books, now, &mut next);
            (gone, starts, books.due.is_some() && !books.standbys.is_empty())
        };
        drop(gone);
        for (member, politely) in ends {
            self.end(member, politely);
        }
        for _ in 0..starts {
            let starter = Arc::clone(self);
            if let Err(error) = monitor::start_thread("hotcell-start", move || starter.start()) {
                self.arrived(Err(error));
            }
        }
        if swap {
            self.change(|_| ());
        }
        Some(next.0)
    }

    /// Notes that a serving worker should be replaced, one at a time and never while many are leaving: a pool that replaces its workers must not become many pools.
    fn find_due(&self, books: &mut Books, now: Instant, next: &mut Next) {
        if books.closed || books.due.is_some_and(|(id, _)| books.seat_of(id).is_some()) {
            return;
        }
        books.due = None;
        let old = self.config.recycling.age;
        let many = books.leaving.len() >= books.seats.len();
        for seat in books.seats.iter().flatten() {
            let member = &seat.member;
            let old_at = old.and_then(|age| member.serving_since.get()?.checked_add(age));
            let reason = if member.worn_out.load(Acquire) {
                Reason::Calls
            } else if member.has_grown.load(Relaxed) {
                Reason::Growth
            } else if old_at.is_some_and(|at| at <= now) {
                Reason::Age
            } else {
                old_at.into_iter().for_each(|at| next.at(at));
                continue;
            };
            if many {
                // It is looked at again when one of those has gone.
                return;
            }
            books.due = Some((member.id, reason));
            return;
        }
    }

    /// How many workers to start now.
    fn count_starts(&self, books: &mut Books, now: Instant, next: &mut Next) -> usize {
        if books.closed {
            return 0;
        }
        let empty = books.seats.iter().filter(|seat| seat.is_none()).count();
        let wanted = empty + self.config.standby + usize::from(books.due.is_some());
        let mut starts = 0;
        while books.standbys.len() + books.starting < wanted {
            // After a circuit was open one start is a trial: the others wait for its outcome.
            if books.restarts.is_trial() && books.starting > 0 {
                break;
            }
            match books.restarts.gate(now) {
                Gate::Now => {
                    books.restarts.starting(now);
                    books.starting += 1;
                    starts += 1;
                }
                Gate::Wait(at) => {
                    next.at(at);
                    break;
                }
                Gate::Refused(StartError::CircuitOpen { until, .. }) => {
                    next.at(until);
                    break;
                }
                Gate::Refused(_) => break,
            }
        }
        starts
    }

    /// Looks at how much private memory the workers have come to use, if that matters.
    fn look_at_memory(&self, now: Instant, last: &mut Option<Instant>, next: &mut Next) {
        let Some(growth) = self.config.recycling.growth_bytes else { return };
        if let Some(at) = last.map(|last| last + MEMORY_LOOK).filter(|at| *at > now) {
            return next.at(at);
        }
        *last = Some(now);
        next.at(now + MEMORY_LOOK);
        // Not under the pool's lock: the system may take its time.
        for seat in self.roster.load().seats.iter().flatten() {
            let member = &seat.member;
            if let (Some(before), Some(bytes)) = (member.private_bytes_before, private_bytes(member))
                && bytes.saturating_sub(before) >= growth
            {
                member.has_grown.store(true, Relaxed);
            }
        }
    }

    /// Makes one worker ready; on a thread of its own.
    fn start(self: Arc<Self>) {
        let made = catch_unwind(AssertUnwindSafe(|| self.make()));
        let made = made.unwrap_or_else(|panic| {
            let what = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let what = what.or_else(|| panic.downcast_ref::<String>().cloned());
            // Dropping a payload can panic too.
            std::mem::forget(panic);
            let source = format!("it panicked: {}", what.as_deref().unwrap_or("?")).into();
            Err(setup_failed(source))
        });
        self.arrived(made);
    }

    fn make(&self) -> Result<Seat, StartError> {
        let worker = self.config.worker.clone().spawn()?;
        let session = worker.session()?;
        let module = (self.setup)(&session).map_err(setup_failed)?;
        if module.session().inner().id() != session.inner().id() {
            return Err(setup_failed("it gave a module of another session than the one it was given".into()));
        }
        let id = worker.owner.inner.id();
        let desk = Arc::clone(&self.desk);
        worker.owner.inner.listen(move |event| {
            let ended = matches!(event, WorkerEvent::Ended(_));
            if ended {
                desk.note(|notes| notes.ended.push(id));
            }
            !ended
        });
        let mut functions: Vec<AnyFunction> = Vec::new();
        loop {
            let missing: Vec<Resolver> = {
                let books = lock(&self.books);
                books.functions.iter().skip(functions.len()).map(|(_, resolve)| Arc::clone(resolve)).collect()
            };
            if missing.is_empty() {
                break;
            }
            for resolve in missing {
                functions.push(resolve(&module).map_err(|error| setup_failed(error.into()))?);
            }
        }
        // Whoever calls next, not this thread, is to be at home in the direct slot.
        session.inner().leave_home();
        let member = Member {
            id,
            calls_before: session.inner().calls().0,
            worker,
            session,
            module,
            serving_since: std::sync::OnceLock::new(),
            private_bytes_before: None,
            leaving: AtomicBool::new(false),
            worn_out: AtomicBool::new(false),
            has_grown: AtomicBool::new(false),
            calls_left: AtomicI64::new(
                self.config.recycling.calls.map_or(i64::MAX, |n| n.try_into().unwrap_or(i64::MAX)),
            ),
            in_flight: CachePadded::new(AtomicU32::new(0)),
        };
        let private_bytes_before = private_bytes(&member);
        Ok(Seat { member: Arc::new(Member { private_bytes_before, ..member }), functions: functions.into() })
    }

    /// A start has ended, one way or the other.
    fn arrived(&self, made: Result<Seat, StartError>) {
        let mut made = match made {
            // What is told here has been told to the desk already, when nobody knew the worker.
            Ok(seat) => match seat.member.worker.crash_report() {
                Some(report) => Err(StartError::Died(Box::new(report))),
                None => Ok(seat),
            },
            Err(error) => Err(error),
        };
        loop {
            let seat = match made {
                Ok(seat) => seat,
                Err(error) => return self.start_failed(error),
            };
            // A function may have been registered since the worker had its functions resolved.
            let (mut seat, missing) = match self.change(|books| books.admit(seat, &self.config)) {
                Admission::Admitted => return,
                Admission::Closed(seat) => return seat.member.worker.owner.inner.begin_dispose(),
                Admission::Lacks(seat, missing) => (seat, missing),
            };
            let mut functions = seat.functions.to_vec();
            let resolved = missing.iter().try_for_each(|resolve| {
                functions.push(resolve(&seat.member.module)?);
                Ok(())
            });
            seat.functions = functions.into();
            made = match resolved {
                Ok(()) => Ok(seat),
                Err(error) => Err(setup_failed(LoadError::into(error))),
            };
        }
    }

    fn start_failed(&self, error: StartError) {
        let now = self.config.clock.now();
        self.change(|books| {
            books.starting -= 1;
            books.totals.start_failures += 1;
            if books.building {
                books.failure.get_or_insert(error);
                return;
            }
            let error = Arc::new(error);
            let open_until = books.restarts.failed(now, Arc::clone(&error));
            books.told.push(PoolEvent::StartFailed { error });
            if let Some(until) = open_until {
                books.told.push(PoolEvent::CircuitOpened { until });
            }
        });
    }

    /// A worker has ended.
    fn ended(&self, id: u64) {
        let now = self.config.clock.now();
        self.change(|books| {
            let Some(Leaving { seat, role, why }) = books.take(id) else { return };
            seat.member.leaving.store(true, SeqCst);
            books.totals.calls_of_the_gone += seat.member.calls();
            let report = seat.member.worker.crash_report();
            books.gone.push(seat);
            if books.closed {
                return;
            }
            match (why, report) {
                (Why::Ending { reason, forced }, Some(report)) if *report.cause() == Cause::Disposed => {
                    books.totals.recycled += 1;
                    books.told.push(PoolEvent::Recycled { worker: id, reason, forced });
                }
                (_, Some(report)) => {
                    books.totals.lost += 1;
                    let open_until = books.restarts.ended(now, why_ended(&report));
                    books.told.push(PoolEvent::Lost { worker: id, role, report });
                    if let Some(until) = open_until {
                        books.told.push(PoolEvent::CircuitOpened { until });
                    }
                }
                // Only those whose end is known are told of.
                (_, None) => {}
            }
        });
    }

    /// Ends a worker that was replaced; on a thread of its own, because its destructors may take their time.
    fn end(&self, member: Arc<Member>, politely: bool) {
        let inner = Arc::clone(&member.worker.owner.inner);
        let end = move || {
            let grace = member.worker.owner.inner.grace();
            if politely && !member.session.inner().close_within(grace) {
                tracing::debug!(
                    pid = member.worker.pid(),
                    "the session of a replaced worker could not be closed in time"
                );
            }
            member.worker.dispose();
        };
        if monitor::start_thread("hotcell-end", end).is_err() {
            inner.begin_dispose();
        }
    }

    // What owners do.

    /// Ends all workers and lets the keeper go. Does not wait.
    pub(super) fn close(&self) {
        if is_forked() {
            return;
        }
        self.change(|books| {
            books.closed = true;
            for at in 0..books.seats.len() {
                self.leave(books, at, Why::Lost);
            }
            let standbys = std::mem::take(&mut books.standbys);
            let standbys =
                standbys.into_iter().map(|seat| Leaving { seat, role: Role::Standby, why: Why::Lost });
            books.leaving.extend(standbys);
            for leaving in &books.leaving {
                leaving.seat.member.leaving.store(true, SeqCst);
                leaving.seat.member.worker.owner.inner.begin_dispose();
            }
        });
    }

    /// Waits until all workers are gone, which takes as long as they take to die.
    pub(super) fn wait_gone(&self) {
        let patience = self.config.worker.grace_period().saturating_add(Duration::from_secs(10));
        self.wait(patience, |books, _| books.leaving.is_empty().then_some(()));
    }

    /// Waits until every seat is taken and every standby ready.
    pub(super) fn wait_ready(&self, timeout: Duration) -> Result<(), StartError> {
        let ready = self.wait(timeout, |books, clock| {
            if books.closed {
                return Some(Err(StartError::Disposed));
            }
            if books.is_complete(&self.config) {
                return Some(Ok(()));
            }
            match books.restarts.gate(clock.now()) {
                Gate::Refused(refusal) => Some(Err(refusal)),
                _ => None,
            }
        });
        ready.unwrap_or_else(|| {
            let capacity = self.capacity();
            let missing =
                capacity.workers - capacity.serving + capacity.standbys.saturating_sub(capacity.standby);
            Err(StartError::Incomplete { missing, after: timeout })
        })
    }

    fn wait<T>(&self, timeout: Duration, look: impl Fn(&Books, &Clock) -> Option<T>) -> Option<T> {
        if is_forked() {
            return None;
        }
        let started = Instant::now();
        let mut books = lock(&self.books);
        loop {
            if let Some(found) = look(&books, &self.config.clock) {
                return Some(found);
            }
            let left = timeout.checked_sub(started.elapsed()).filter(|left| !left.is_zero())?;
            books = self.changed.wait_timeout(books, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn capacity(&self) -> Capacity {
        lock(&self.books).capacity(&self.config)
    }

    pub(super) fn snapshot(&self) -> PoolSnapshot {
        let books = lock(&self.books);
        let look = |seat: &Seat, role| PoolWorker {
            worker: seat.member.id,
            pid: seat.member.worker.pid(),
            role,
            calls: seat.member.calls(),
            in_flight: seat.member.session.inner().slots_held(),
        };
        let serving = books.seats.iter().enumerate();
        let serving = serving.filter_map(|(at, seat)| Some(look(seat.as_ref()?, Role::Serving { seat: at })));
        let standbys = books.standbys.iter().map(|seat| look(seat, Role::Standby));
        let leaving = books.leaving.iter().map(|leaving| look(&leaving.seat, Role::Leaving));
        let workers: Vec<PoolWorker> = serving.chain(standbys).chain(leaving).collect();
        let totals = &books.totals;
        let tally = &self.tally;
        PoolSnapshot {
            capacity: books.capacity(&self.config),
            calls: totals.calls_of_the_gone + workers.iter().map(|worker| worker.calls).sum::<u64>(),
            in_flight: workers.iter().map(|worker| worker.in_flight).sum(),
            errors: PoolErrors {
                crashed: tally.crashed.load(Relaxed),
                timed_out: tally.timed_out.load(Relaxed),
                limit_exceeded: tally.limit_exceeded.load(Relaxed),
                disposed: tally.disposed.load(Relaxed),
                no_worker: tally.no_worker.load(Relaxed),
                other: tally.other.load(Relaxed),
            },
            retried: tally.retried.load(Relaxed),
            redirected: tally.redirected.load(Relaxed),
            started: totals.started,
            restarts: totals.started.saturating_sub((self.config.workers + self.config.standby) as u64),
            start_failures: totals.start_failures,
            lost: totals.lost,
            promoted: totals.promoted,
            recycled: totals.recycled,
            circuit_open_until: books.restarts.open_until(self.config.clock.now()),
            workers,
        }
    }
}

fn setup_failed(source: BoxError) -> StartError {
    StartError::Hook { hook: "setup", source: source.into() }
}

/// What becomes of a worker that is ready.
enum Admission {
    Admitted,
    /// The pool was closed meanwhile.
    Closed(Seat),
    /// It lacks functions that were registered meanwhile.
    Lacks(Seat, Vec<Resolver>),
}

impl Books {
    fn seat_of(&self, id: u64) -> Option<usize> {
        self.seats.iter().position(|seat| seat.as_ref().is_some_and(|seat| seat.member.id == id))
    }

    /// Takes a worker from wherever it is.
    fn take(&mut self, id: u64) -> Option<Leaving> {
        if let Some(at) = self.leaving.iter().position(|leaving| leaving.seat.member.id == id) {
            return Some(self.leaving.remove(at));
        }
        if let Some(at) = self.standbys.iter().position(|seat| seat.member.id == id) {
            return self.standbys.remove(at).map(|seat| Leaving {
                seat,
                role: Role::Standby,
                why: Why::Lost,
            });
        }
        let at = self.seat_of(id)?;
        self.moved = true;
        self.seats[at].take().map(|seat| Leaving { seat, role: Role::Serving { seat: at }, why: Why::Lost })
    }

    fn is_complete(&self, config: &Config) -> bool {
        self.seats.iter().all(Option::is_some) && self.standbys.len() >= config.standby
    }

    fn capacity(&self, config: &Config) -> Capacity {
        Capacity {
            workers: config.workers,
            serving: self.seats.iter().flatten().count(),
            standbys: config.standby,
            standby: self.standbys.len(),
            starting: self.starting,
            leaving: self.leaving.len(),
        }
    }

    /// Gives a new worker its place: a seat if one is empty, else aside.
    fn admit(&mut self, seat: Seat, config: &Config) -> Admission {
        let missing = self.functions.iter().skip(seat.functions.len());
        let missing: Vec<Resolver> = missing.map(|(_, resolve)| Arc::clone(resolve)).collect();
        if !missing.is_empty() && !self.closed {
            return Admission::Lacks(seat, missing);
        }
        self.starting -= 1;
        if self.closed {
            return Admission::Closed(seat);
        }
        self.totals.started += 1;
        let (worker, pid) = (seat.member.id, seat.member.worker.pid());
        // With a standby waiting there is no empty seat.
        let empty = self.seats.iter().position(Option::is_none);
        let role = empty.map_or(Role::Standby, |at| Role::Serving { seat: at });
        self.told.push(PoolEvent::Ready { worker, pid, role });
        match empty {
            Some(at) => {
                seat.member.serving_since.get_or_init(|| config.clock.now());
                self.seats[at] = Some(seat);
                self.moved = true;
            }
            None => self.standbys.push_back(seat),
        }
        Admission::Admitted
    }

    /// Gives a worker one more function, or takes it out of service if it has not got it.
    fn add_function(&mut self, member: &Member, function: Option<AnyFunction>, drain_deadline: Instant) {
        let mut all = self.seats.iter_mut().flatten().chain(&mut self.standbys);
        let Some(seat) = all.find(|seat| seat.member.id == member.id) else { return };
        if let Some(function) = function {
            seat.functions = seat.functions.iter().cloned().chain([function]).collect();
            self.moved = true;
            return;
        }
        // It is dying, or not like the others.
        if let Some(mut leaving) = self.take(member.id) {
            leaving.seat.member.leaving.store(true, SeqCst);
            leaving.why = Why::Replaced { reason: Reason::Closed, deadline: drain_deadline };
            self.leaving.push(leaving);
        }
    }
}

/// The earliest of several times.
struct Next(Option<Instant>);

impl Next {
    fn at(&mut self, at: Instant) {
        self.0 = Some(self.0.map_or(at, |next| next.min(at)));
    }
}

/// The memory that a worker has for itself: its resident pages without shared and file ones, in bytes.
///
/// `/proc/<pid>/statm`, fields 2 and 3.
fn private_bytes(member: &Member) -> Option<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", member.worker.pid())).ok()?;
    let mut fields = statm.split_ascii_whitespace().skip(1).map(|field| field.parse::<u64>().ok());
    let (resident, shared) = (fields.next()??, fields.next()??);
    // Once it has ended its number may be another process's.
    member.worker.is_alive().then(|| resident.saturating_sub(shared) * PAGE_BYTES)
}
