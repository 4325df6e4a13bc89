//! `Pool`: several workers behind one typed handle, with standbys, replaced one by one.
//!
//! ```text
//!              start                promoted                 replaced, or its end is coming
//!   (thread) ────────► standby ───────────────► seat ───────────────────────────────────► leaving ──► gone
//!                │                                ▲ ready, and a seat is empty                 calls in flight finish
//!                └────────────────────────────────┘
//! ```
//!
//! A pool has a fixed number of *seats*. Who sits in them is published as a *roster*, which callers read without a lock. See `keeper` for who changes it.

mod function;
mod keeper;
mod roster;

pub use function::{PoolCaller, PoolDynFunction, PoolFunction, PoolTicket};

use crate::call::FunctionType;
use crate::crash::CrashReport;
use crate::error::{LoadError, StartError};
use crate::module::Module;
use crate::session::Session;
use crate::supervisor::clock::Clock;
use crate::supervisor::restart::{Restart, RestartPolicy};
use crate::supervisor::retry::Retry;
use crate::supervisor::start::BoxError;
use crate::worker::{Worker, WorkerBuilder};
use crossbeam_channel::Receiver;
use keeper::{Config, Recycling, Setup, Shared};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most workers, and most standbys, of a pool.
const WORKERS_MAX: usize = 1024;

/// Several workers with the same module, behind one handle: one crash takes a fraction of the capacity, never the service.
///
/// Each worker is prepared by the *setup*: a closure that loads the module in a new session and does what the module needs before it can serve (opens its files, sets its
/// options). It runs once for each worker, again whenever one is replaced, on a thread of its own and with no lock held; a setup that fails or panics is a failed start.
///
/// *Standbys* are workers that are ready and wait aside. When a worker dies, the first who notices (as a rule the call that got the error) puts a standby into its seat, so
/// that the next call has a worker at once; the keeper, the pool's own thread, starts the next standby.
///
/// A worker that cannot be started is started again after a pause that grows, and after too many ends not for a while: see [`RestartPolicy`], which counts for the pool as a whole.
///
/// Cloning gives another handle to the same pool. Its workers are ended when the last handle (this one and the functions) is dropped, or at once by [`Pool::dispose`].
///
/// ```
/// use hotcell::Pool;
/// # fn main() -> Result<(), hotcell::Error> {
/// let pool = Pool::builder(|session| Ok(session.load("libc.so.6")?)).workers(2).standby(1).build()?;
/// let labs = pool.function::<fn(i64) -> i64>("labs")?; // resolved in each worker
/// assert_eq!(labs.call(-5)?, 5); // in one of them
///
/// let abort = pool.function::<fn()>("abort")?;
/// assert!(abort.call().is_err()); // that worker is gone, the standby has its seat
/// assert_eq!(labs.call(-6)?, 6);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Pool {
    owner: Arc<PoolOwner>,
}

/// Closes the pool when dropped.
#[derive(Debug)]
pub(crate) struct PoolOwner {
    shared: Arc<Shared>,
}

impl Drop for PoolOwner {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// How a pool is made. Every option has a default; end with [`PoolBuilder::build`].
#[must_use]
pub struct PoolBuilder {
    config: Config,
    setup: Box<Setup>,
}

impl fmt::Debug for PoolBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolBuilder").field("config", &self.config).finish_non_exhaustive()
    }
}

impl PoolBuilder {
    /// Default: 2. How many workers serve; 1 to 1024.
    pub fn workers(mut self, workers: usize) -> Self {
        self.config.workers = workers;
        self
    }

    /// Default: 1. How many more workers wait, ready, for one of them to fail; 0 to 1024.
    pub fn standby(mut self, standbys: usize) -> Self {
        self.config.standby = standbys;
        self
    }

    /// Default: [`Worker::builder`]. Everything about each worker and its session.
    pub fn worker(mut self, worker: WorkerBuilder) -> Self {
        self.config.worker = worker;
        self
    }

    /// Default: `Retry::unseen(2)`. Which failed calls are made again on another worker. Without [`Retry::idempotent`] that is never a call whose function may have run; single functions can be declared so,
    /// too: [`PoolFunction::idempotent`]. A call that passed its deadline is never made again, nor is a submitted one.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.config.retry = retry;
        self
    }

    /// Default: 1 s. How long a call may wait for a worker when there is none at all at this moment. Without time to wait it fails with
    /// [`CallError::NoWorker`](crate::CallError::NoWorker) at once, as it does in any case while the restart policy's circuit is open.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.config.patience = patience;
        self
    }

    /// Default: [`RestartPolicy::default`], with a limit of 5 restarts for each worker and standby. How often workers of this pool, all of them together, are started again. A pool
    /// replaces every worker that ends, disposed ones too; [`Restart::Never`] is refused.
    pub fn restart(mut self, policy: RestartPolicy) -> Self {
        self.config.restart = Some(policy);
        self
    }

    /// Default: never. Replaces a worker that has had this many calls, at least 1. It is a time to look for a successor, not a last call: the worker serves until that is
    /// ready. No call fails on that account.
    pub fn recycle_after_calls(mut self, calls: u64) -> Self {
        self.config.recycling.calls = Some(calls);
        self
    }

    /// Default: never. Replaces a worker that has served for so long, at least 100 ms, as soon as a successor is ready. No call fails on that account.
    pub fn recycle_after_age(mut self, age: Duration) -> Self {
        self.config.recycling.age = Some(age);
        self
    }

    /// Default: never. Replaces a worker whose private memory has grown by so many bytes, at least 64 KiB, since it became ready, as soon as a successor is ready. Looked at every
    /// second, in `/proc/<pid>/statm`: resident pages that belong to no file and are not shared. No call fails on that account.
    pub fn recycle_after_growth(mut self, bytes: u64) -> Self {
        self.config.recycling.growth_bytes = Some(bytes);
        self
    }

    /// Default: 60 s. How long the calls of a worker that was replaced may take to finish, and its tickets to be waited for. What is not over then ends with
    /// [`CallError::Disposed`](crate::CallError::Disposed).
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.config.drain_timeout = timeout;
        self
    }

    /// Starts all workers and standbys, side by side, and waits until they are ready. That takes as long as they take: a start has a deadline ([`WorkerBuilder::start_timeout`]), as has
    /// each call that the setup makes.
    ///
    /// # Errors
    /// [`StartError::Configuration`] for an option out of its range; otherwise the first error of any start, among them [`StartError::Hook`] if the setup failed. Nothing is left behind.
    pub fn build(self) -> Result<Pool, StartError> {
        let Self { config, setup } = self;
        let config = check(config)?;
        let shared = Shared::new(config, setup);
        let pool = Pool { owner: Arc::new(PoolOwner { shared }) };
        pool.owner.shared.build()?;
        Ok(pool)
    }
}

/// Refuses what makes no sense.
fn check(config: Config) -> Result<Config, StartError> {
    let bad = |option, given: String, expected| Err(StartError::Configuration { option, given, expected });
    let Recycling { calls, age, growth_bytes } = config.recycling;
    if !(1..=WORKERS_MAX).contains(&config.workers) {
        return bad("workers", config.workers.to_string(), "1 to 1024");
    }
    if config.standby > WORKERS_MAX {
        return bad("standby", config.standby.to_string(), "0 to 1024");
    }
    if calls == Some(0) {
        return bad("recycle_after_calls", "0".into(), "at least 1");
    }
    if let Some(age) = age.filter(|age| *age < Duration::from_millis(100)) {
        return bad("recycle_after_age", format!("{age:?}"), "at least 100 ms");
    }
    if let Some(bytes) = growth_bytes.filter(|bytes| *bytes < 64 << 10) {
        return bad("recycle_after_growth", bytes.to_string(), "at least 64 KiB (65536)");
    }
    if config.drain_timeout.is_zero() {
        return bad("drain_timeout", "0".into(), "longer than nothing");
    }
    if let Some(policy) = &config.restart {
        policy.check()?;
        if policy.restart == Restart::Never {
            return bad(
                "restart",
                "Restart::Never".into(),
                "OnCrash or Always: a pool lives from replacing its workers",
            );
        }
    }
    Ok(config)
}

impl Pool {
    /// Begins a pool whose workers are prepared by `setup`: it gets a new session and gives the module whose functions the pool calls.
    pub fn builder(
        setup: impl Fn(&Session) -> Result<Module, BoxError> + Send + Sync + 'static,
    ) -> PoolBuilder {
        let config = Config {
            worker: Worker::builder(),
            workers: 2,
            standby: 1,
            retry: Retry::unseen(2),
            patience: Duration::from_secs(1),
            restart: None,
            recycling: Recycling::default(),
            drain_timeout: Duration::from_secs(60),
            clock: Clock::default(),
        };
        PoolBuilder { config, setup: Box::new(setup) }
    }

    /// A function of the module, resolved in every worker, also in those to come. The same function is resolved once, however often it is asked for.
    ///
    /// # Errors
    /// [`LoadError::MissingSymbol`], [`LoadError::BadSignature`], and [`LoadError::Call`] if there is no worker to look it up in.
    pub fn function<F: FunctionType + Send + Sync + 'static>(
        &self,
        symbol: &str,
    ) -> Result<PoolFunction<F>, LoadError> {
        PoolFunction::new(&self.owner, symbol, None)
    }

    /// A variadic function: see [`Module::variadic_function`].
    ///
    /// # Errors
    /// As [`Pool::function`].
    pub fn variadic_function<F: FunctionType + Send + Sync + 'static>(
        &self,
        symbol: &str,
        fixed: u8,
    ) -> Result<PoolFunction<F>, LoadError> {
        PoolFunction::new(&self.owner, symbol, Some(fixed))
    }

    /// A function with its C prototype, called with arguments that are checked when the call is made: see [`Module::prototype`].
    ///
    /// # Errors
    /// As [`Module::prototype`].
    pub fn prototype(&self, prototype: &str) -> Result<PoolDynFunction, LoadError> {
        PoolDynFunction::new(&self.owner, prototype)
    }

    /// How many workers there are in which state, at this moment.
    pub fn capacity(&self) -> Capacity {
        self.owner.shared.capacity()
    }

    /// What has happened so far, and every worker, at this moment.
    pub fn snapshot(&self) -> PoolSnapshot {
        self.owner.shared.snapshot()
    }

    /// A channel of what happens from now on. Everything comes, in the order in which it happened, and waits until it is received: drop a receiver that is not read.
    pub fn events(&self) -> Receiver<PoolEvent> {
        self.owner.shared.events.receiver(&[()])
    }

    /// Waits until every seat has its worker and every standby is ready, at most `timeout`.
    ///
    /// # Errors
    /// [`StartError::Incomplete`] when the time is up, [`StartError::CircuitOpen`] while nothing is started, [`StartError::Disposed`].
    pub fn wait_ready(&self, timeout: Duration) -> Result<(), StartError> {
        self.owner.shared.wait_ready(timeout)
    }

    /// Ends all workers: `SIGTERM`, and `SIGKILL` after their [grace period](WorkerBuilder::grace). Returns when they are gone. Calls in flight end with
    /// [`CallError::Disposed`](crate::CallError::Disposed), later ones with [`CallError::PoolDisposed`](crate::CallError::PoolDisposed). Disposing again does nothing.
    pub fn dispose(&self) {
        self.owner.shared.close();
        self.owner.shared.wait_gone();
    }
}

/// How many workers of a pool are in which state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capacity {
    /// Seats: how many workers should serve.
    pub workers: usize,
    /// How many do.
    pub serving: usize,
    /// How many standbys there should be.
    pub standbys: usize,
    /// How many wait, ready.
    pub standby: usize,
    /// Workers that are being started.
    pub starting: usize,
    /// Workers that were replaced or are dying, and are not gone yet.
    pub leaving: usize,
}

/// What a worker of a pool does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Role {
    /// It has a seat and serves calls.
    Serving {
        /// Which seat, counted from 0.
        seat: usize,
    },
    /// It is ready and waits aside.
    Standby,
    /// It gets no more calls.
    Leaving,
}

/// Why a worker was replaced that could have gone on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// It has had as many calls as [`PoolBuilder::recycle_after_calls`] says.
    Calls,
    /// It has served for as long as [`PoolBuilder::recycle_after_age`] says.
    Age,
    /// Its memory has grown by as much as [`PoolBuilder::recycle_after_growth`] says.
    Growth,
    /// Its session was given up after a deadline ([`OnDeadline::AbandonSession`](crate::OnDeadline::AbandonSession)).
    Abandoned,
    /// Its session was closed by somebody, or lacks a function that the others have.
    Closed,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Calls => "it has had its number of calls",
            Reason::Age => "it has had its time",
            Reason::Growth => "its memory has grown",
            Reason::Abandoned => "its session was given up",
            Reason::Closed => "its session was closed",
        })
    }
}

/// What happens in a pool. `worker` is a number that no other worker of this process has, or will have.
///
/// A worker's first event is `Ready`, its last one `Lost` or `Recycled`; those that are ended with the pool have no last one. `Promoted` is of a worker that was ready as a standby.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PoolEvent {
    /// A worker is ready.
    Ready {
        /// The worker.
        worker: u64,
        /// Its process.
        pid: u32,
        /// Whether it serves at once or waits as a standby.
        role: Role,
    },
    /// A standby has got an empty seat.
    Promoted {
        /// The standby.
        worker: u64,
        /// Which seat.
        seat: usize,
    },
    /// A worker has died, or was killed for a deadline, a limit or a breach of the protocol.
    Lost {
        /// The worker.
        worker: u64,
        /// What it was.
        role: Role,
        /// Why it ended.
        report: CrashReport,
    },
    /// A worker has handed its seat to a successor, and finishes its calls.
    Replaced {
        /// The worker.
        worker: u64,
        /// Who serves instead; it was ready.
        successor: u64,
        /// Which seat.
        seat: usize,
        /// Why.
        reason: Reason,
    },
    /// A worker that left its seat has finished its calls and was ended.
    Recycled {
        /// The worker.
        worker: u64,
        /// Why it left.
        reason: Reason,
        /// Whether it had to be ended with calls or tickets that were not over ([`PoolBuilder::drain_timeout`]).
        forced: bool,
    },
    /// A worker could not be started, or not be prepared. Another start follows when the restart policy allows it.
    StartFailed {
        /// Why not.
        error: Arc<StartError>,
    },
    /// Workers have ended too often: none is started for a while.
    CircuitOpened {
        /// Until then.
        until: Instant,
    },
}

impl fmt::Display for PoolEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PoolEvent::Ready { worker, pid, role: Role::Serving { seat } } => {
                write!(f, "worker {worker} (process {pid}) is ready and has seat {seat}")
            }
            PoolEvent::Ready { worker, pid, .. } => {
                write!(f, "worker {worker} (process {pid}) is ready and stands by")
            }
            PoolEvent::Promoted { worker, seat } => write!(f, "standby {worker} has got seat {seat}"),
            PoolEvent::Lost { worker, role: Role::Serving { seat }, report } => {
                write!(f, "worker {worker} of seat {seat} is lost: {}", report.cause())
            }
            PoolEvent::Lost { worker, role: Role::Standby, report } => {
                write!(f, "standby {worker} is lost: {}", report.cause())
            }
            PoolEvent::Lost { worker, report, .. } => {
                write!(f, "worker {worker} is lost: {}", report.cause())
            }
            PoolEvent::Replaced { worker, successor, seat, reason } => {
                write!(f, "worker {worker} has left seat {seat} to {successor}: {reason}")
            }
            PoolEvent::Recycled { worker, forced: false, .. } => {
                write!(f, "worker {worker} has finished its calls and was ended")
            }
            PoolEvent::Recycled { worker, .. } => {
                write!(f, "worker {worker} was ended before its calls were over")
            }
            PoolEvent::StartFailed { error } => write!(f, "a worker could not be made ready: {error}"),
            PoolEvent::CircuitOpened { .. } => {
                f.write_str("workers have ended too often, and none is started for a while")
            }
        }
    }
}

/// There is one kind of listener: for everything.
impl crate::events::Telling for PoolEvent {
    type Kind = ();

    fn bit((): ()) -> u32 {
        1
    }

    fn kind(&self) {}

    // As many as workers are started, and the restart policy bounds those.
    fn is_frequent(&self) -> bool {
        false
    }
}

/// What has happened in a pool, and its workers.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PoolSnapshot {
    /// How many workers are in which state.
    pub capacity: Capacity,
    /// Requests that workers were given since they were ready and that are over: calls, repeated ones as often as they were made, and what a call needs besides (the rest of a long string).
    pub calls: u64,
    /// Calls in flight, and submitted ones that nobody has waited for.
    pub in_flight: usize,
    /// Calls that ended with an error about the pool or its workers. A call is counted once, with its last error.
    pub errors: PoolErrors,
    /// Calls made again by the retry policy.
    pub retried: u64,
    /// Calls that found their worker just replaced and went to another; no error, and no retry.
    pub redirected: u64,
    /// Workers that became ready.
    pub started: u64,
    /// Those of them that were started in the place of others.
    pub restarts: u64,
    /// Starts that failed.
    pub start_failures: u64,
    /// Workers that died, or were killed for what they did.
    pub lost: u64,
    /// Standbys that got an empty seat.
    pub promoted: u64,
    /// Workers that were replaced without having died, and are gone.
    pub recycled: u64,
    /// Until when nothing is started, if the restart policy's circuit is open.
    pub circuit_open_until: Option<Instant>,
    /// The workers: serving ones by seat, then standbys, then those that leave.
    pub workers: Vec<PoolWorker>,
}

/// Calls that ended with an error, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolErrors {
    /// The worker died.
    pub crashed: u64,
    /// The call passed its deadline.
    pub timed_out: u64,
    /// The call went over a limit on what its worker may use.
    pub limit_exceeded: u64,
    /// The worker was disposed.
    pub disposed: u64,
    /// There was no worker.
    pub no_worker: u64,
    /// Anything else: a refused argument, a closed pool.
    pub other: u64,
}

/// One worker of a pool.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct PoolWorker {
    /// Its number, as in [`PoolEvent`]s.
    pub worker: u64,
    /// Its process.
    pub pid: u32,
    /// What it does.
    pub role: Role,
    /// Requests that it was given since it was ready, and that are over.
    pub calls: u64,
    /// Calls in flight, and submitted ones that nobody has waited for.
    pub in_flight: usize,
}
