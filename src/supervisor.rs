//! `Supervisor`: places sessions on workers by topology, keeps to limits, and replaces workers that have ended.
//!
//! **The locks.** One lock guards the state. Under it nothing is waited for but the lock's own condition, no worker is started, and no code of the host's user runs: hooks and
//! starts run between two holds of it, event handlers on the thread of the events. What decides is plain data without threads: [`places`], [`restart`], [`quarantine`].
//!
//! **A worker's end** is told by the monitor, after the calls in flight have their errors. A caller may come back with such an error sooner than the monitor comes here, so
//! whoever looks at a worker that is dead settles its end first ([`Inner::settle`]); the second to come finds nothing to do.

pub(crate) mod canary;
pub(crate) mod clock;
pub(crate) mod events;
#[cfg(feature = "metrics")]
mod metrics;
mod places;
pub(crate) mod quarantine;
pub(crate) mod restart;
pub(crate) mod retry;
pub(crate) mod snapshot;
pub(crate) mod start;
#[cfg(test)]
mod tests;

use crate::error::{LoadError, StartError};
use crate::events::{Emitter, ListenerId, drop_elsewhere};
use crate::monitor::lock;
use crate::session::{Session, SessionBuilder, SessionInner};
use crate::worker::{Worker, WorkerBuilder, WorkerEvent, WorkerInner};
use canary::{Canary, Stop};
use clock::Clock;
use crossbeam_channel::Receiver;
use events::{SupervisorEvent, SupervisorEventData};
use hotcell_channel::sys;
use places::{Key, Limits, Places, Want};
use quarantine::{Quarantine, Ward, module_key};
use restart::{Gate, RestartPolicy, Restarts, why_ended};
use rustc_hash::FxHashMap;
use snapshot::{SessionSnapshot, SupervisorSnapshot, WorkerSnapshot};
use start::{BoxError, SessionHook, Starter};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

/// How sessions are placed on workers: what shares a process, and with it its fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Topology {
    /// One worker for all sessions. The default: the cheapest, and a crash ends all of them.
    #[default]
    Shared,
    /// One worker for each tenant: a crash ends that tenant's sessions.
    PerTenant,
    /// One worker for each session: a crash ends that session.
    PerSession,
}

/// What becomes of a request for a session when a limit is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum OnFull {
    /// It is refused at once with [`StartError::SessionLimit`]. The default.
    #[default]
    Refuse,
    /// It waits for a place in the order of arrival, at most this long.
    Wait(Duration),
}

/// A request for a session: for which tenant, on which worker, with which options. A tenant's name alone, or a [`Worker`], is one too.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct SessionRequest {
    tenant: Option<Arc<str>>,
    worker: Option<Worker>,
    options: Option<SessionBuilder>,
    on_full: Option<OnFull>,
}

impl SessionRequest {
    /// A request for no tenant in particular.
    pub fn new() -> Self {
        Self::default()
    }

    /// Default: none. Whose session it is. Needed under [`Topology::PerTenant`]; elsewhere it counts towards the tenant's limit and shows in snapshots.
    pub fn tenant(mut self, tenant: impl Into<Arc<str>>) -> Self {
        self.tenant = Some(tenant.into());
        self
    }

    /// Default: as the topology says. A worker of the caller's, who keeps it and disposes of it; it is not replaced. Limits count its sessions too.
    pub fn on(mut self, worker: &Worker) -> Self {
        self.worker = Some(worker.clone());
        self
    }

    /// Default: what [`SupervisorBuilder::session_defaults`] or [`SupervisorBuilder::worker`] says. Options of the session.
    pub fn options(mut self, options: SessionBuilder) -> Self {
        self.options = Some(options);
        self
    }

    /// Default: what [`SupervisorBuilder::on_full`] says. What happens when a limit is reached.
    pub fn on_full(mut self, on_full: OnFull) -> Self {
        self.on_full = Some(on_full);
        self
    }
}

impl From<&str> for SessionRequest {
    fn from(tenant: &str) -> Self {
        Self::new().tenant(tenant)
    }
}

impl From<String> for SessionRequest {
    fn from(tenant: String) -> Self {
        Self::new().tenant(tenant)
    }
}

impl From<&Worker> for SessionRequest {
    fn from(worker: &Worker) -> Self {
        Self::new().on(worker)
    }
}

/// How sessions are supervised. Every option has a default; end with [`SupervisorBuilder::build`].
#[derive(Clone, Debug)]
#[must_use]
pub struct SupervisorBuilder {
    topology: Topology,
    worker: WorkerBuilder,
    session: Option<SessionBuilder>,
    limits: Limits,
    on_full: OnFull,
    restart: Option<RestartPolicy>,
    quarantine: Option<Quarantine>,
    canary: Option<Canary>,
    start_patience: Duration,
    on_start: Option<start::StartHook>,
    on_session: Option<SessionHook>,
    clock: Clock,
}

impl Default for SupervisorBuilder {
    fn default() -> Self {
        Self {
            topology: Topology::default(),
            worker: WorkerBuilder::default(),
            session: None,
            limits: Limits::default(),
            on_full: OnFull::default(),
            restart: None,
            quarantine: Some(Quarantine::default()),
            canary: None,
            start_patience: Duration::from_secs(30),
            on_start: None,
            on_session: None,
            clock: Clock::default(),
        }
    }
}

impl SupervisorBuilder {
    /// Default: [`Topology::Shared`]. How sessions are placed on workers.
    pub fn topology(mut self, topology: Topology) -> Self {
        self.topology = topology;
        self
    }

    /// Default: [`Worker::builder`]. How workers are started.
    pub fn worker(mut self, worker: WorkerBuilder) -> Self {
        self.worker = worker;
        self
    }

    /// Default: those of the worker's builder. What sessions get whose request says nothing.
    pub fn session_defaults(mut self, session: SessionBuilder) -> Self {
        self.session = Some(session);
        self
    }

    /// Default: no limit. How many sessions there may be at once on one worker, at least 1.
    pub fn sessions_max_per_worker(mut self, sessions: u32) -> Self {
        self.limits.worker = Some(sessions);
        self
    }

    /// Default: no limit. How many sessions one tenant may have at once, at least 1. Requests without a tenant are not counted.
    pub fn sessions_max_per_tenant(mut self, sessions: u32) -> Self {
        self.limits.tenant = Some(sessions);
        self
    }

    /// Default: no limit. How many sessions there may be at once in all, at least 1.
    pub fn sessions_max(mut self, sessions: u32) -> Self {
        self.limits.supervisor = Some(sessions);
        self
    }

    /// Default: [`OnFull::Refuse`]. What happens to a request when a limit is reached.
    pub fn on_full(mut self, on_full: OnFull) -> Self {
        self.on_full = on_full;
        self
    }

    /// Default: [`RestartPolicy::default`]. When a shared worker or a tenant's is replaced: by the next request for a session after its end, if the policy allows. Has no
    /// meaning under [`Topology::PerSession`], where no worker is replaced, and is refused there.
    pub fn restart(mut self, policy: impl Into<RestartPolicy>) -> Self {
        self.restart = Some(policy.into());
        self
    }

    /// Default: [`Quarantine::default`]. When a module is loaded no more because of the workers that it has ended.
    pub fn quarantine(mut self, quarantine: Quarantine) -> Self {
        self.quarantine = Some(quarantine);
        self
    }

    /// No module is put into quarantine, whatever it does.
    pub fn no_quarantine(mut self) -> Self {
        self.quarantine = None;
        self
    }

    /// Default: none. Asks each worker that the supervisor starts for a sign of life at an interval.
    pub fn canary(mut self, canary: Canary) -> Self {
        self.canary = Some(canary);
        self
    }

    /// Default: 30 s. How long a request waits for a worker that another request is starting, or whose next start is held back after a crash.
    pub fn start_patience(mut self, patience: Duration) -> Self {
        self.start_patience = patience;
        self
    }

    /// Default: none. Prepares each worker after its start, before any session of it is given out: at the first start and after each crash. A hook that fails or panics counts as a failed start, and
    /// ends the worker. It runs on the thread of the request that starts the worker, with no lock held.
    pub fn on_start<E: Into<BoxError>>(
        mut self,
        hook: impl Fn(&Worker) -> Result<(), E> + Send + Sync + 'static,
    ) -> Self {
        self.on_start = Some(start::StartHook::new("on_start", hook));
        self
    }

    /// Default: none. Prepares each session before it is given out: loads modules, opens handles, replays configuration. If the hook fails or panics the session is closed, and
    /// its request fails with [`StartError::Hook`]. It runs on the thread of the request, with no lock held.
    pub fn on_session<E: Into<BoxError>>(
        mut self,
        hook: impl Fn(&Session) -> Result<(), E> + Send + Sync + 'static,
    ) -> Self {
        self.on_session = Some(SessionHook::new("on_session", hook));
        self
    }

    #[cfg(test)]
    pub(crate) fn clock(mut self, clock: &Clock) -> Self {
        self.clock = clock.clone();
        self
    }

    /// Makes the supervisor. No worker is started before a session asks for one.
    ///
    /// # Errors
    /// [`StartError::Configuration`] for a value that makes no sense.
    pub fn build(self) -> Result<Supervisor, StartError> {
        let bad = |option, given: &dyn std::fmt::Debug, expected| {
            Err(StartError::Configuration { option, given: format!("{given:?}"), expected })
        };
        let limits = [
            ("sessions_max_per_worker", self.limits.worker),
            ("sessions_max_per_tenant", self.limits.tenant),
            ("sessions_max", self.limits.supervisor),
        ];
        for (option, limit) in limits {
            if limit == Some(0) {
                return bad(option, &0, "at least 1");
            }
        }
        if self.topology == Topology::PerSession && self.limits.worker.is_some_and(|max| max > 1) {
            let expected = "1 or left out where each session has a worker of its own";
            return bad("sessions_max_per_worker", &self.limits.worker.unwrap_or(0), expected);
        }
        if self.topology == Topology::PerSession && self.restart.is_some() {
            let expected = "left out where each session has a worker of its own, which is never replaced";
            return bad("restart", &self.restart, expected);
        }
        if let OnFull::Wait(Duration::ZERO) = self.on_full {
            return bad("on_full", &self.on_full, "Refuse, or a wait longer than nothing");
        }
        let restart = self.restart.clone().unwrap_or_default();
        restart.check()?;
        self.quarantine.as_ref().map_or(Ok(()), Quarantine::check)?;
        let session = self.session.clone().unwrap_or_else(|| self.worker.session_options().clone());
        session.check()?;
        self.canary.as_ref().map_or(Ok(()), Canary::check_options)?;
        let state = State {
            places: Places::new(self.limits),
            groups: FxHashMap::default(),
            seats: FxHashMap::default(),
            ward: Ward::new(self.quarantine),
            module_keys: FxHashMap::default(),
            totals: Totals::default(),
            groups_before_tidying: 64,
            disposed: false,
        };
        let inner = Arc::new(Inner {
            topology: self.topology,
            starter: Starter { builder: self.worker, hook: self.on_start },
            session,
            on_full: self.on_full,
            restart,
            start_patience: self.start_patience,
            on_session: self.on_session,
            canary: self.canary.clone(),
            since: self.clock.now(),
            clock: self.clock.clone(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            emitter: Arc::default(),
        });
        inner.emitter.on(&SupervisorEvent::ALL, false, true, events::trace);
        #[cfg(feature = "metrics")]
        metrics::attach(&inner);
        let stop = Arc::<Stop>::default();
        if let Some(canary) = self.canary {
            canary::keep(Arc::downgrade(&inner), canary, self.clock, Arc::clone(&stop))?;
        }
        Ok(Supervisor { handle: Arc::new(Handle { inner, stop }) })
    }
}

/// Places sessions on workers, keeps to limits, and replaces workers that have ended.
///
/// Cloning gives another handle to the same supervisor. With the last handle it lets go of its workers: one without sessions ends, one with sessions ends with the last of
/// them. [`Supervisor::dispose`] ends all at once.
///
/// ```
/// use hotcell::{Supervisor, Topology};
/// # fn main() -> Result<(), hotcell::Error> {
/// let supervisor = Supervisor::builder().topology(Topology::PerTenant).sessions_max_per_tenant(2).build()?;
/// let (a, b) = (supervisor.session("a")?, supervisor.session("b")?);
/// assert_ne!(a.worker().pid(), b.worker().pid());
///
/// let abort = a.load("libc.so.6")?.function::<fn()>("abort")?;
/// abort.call().unwrap_err(); // ends a's worker, and nothing else
/// b.ping()?;
/// supervisor.session("a")?.ping()?; // a new worker
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Supervisor {
    handle: Arc<Handle>,
}

/// Lets go of the workers when dropped: what sessions and the monitor hold does not keep them.
#[derive(Debug)]
struct Handle {
    inner: Arc<Inner>,
    /// Ends the keeper, if there is one.
    stop: Arc<Stop>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        // In a fork the lock may be held for ever.
        if sys::original_process().load(Relaxed) == 1 {
            self.stop.stop();
            drop(self.inner.let_go());
        }
    }
}

impl Supervisor {
    /// Starts with options.
    pub fn builder() -> SupervisorBuilder {
        SupervisorBuilder::default()
    }

    /// A supervisor with the defaults: one worker for all, started with the first session.
    ///
    /// # Errors
    /// None that the defaults can cause.
    pub fn new() -> Result<Self, StartError> {
        SupervisorBuilder::default().build()
    }

    /// Opens a session on the worker that the topology gives it, which is started or replaced if need be: for no tenant (`SessionRequest::new()`), for a tenant (`"name"`), on a worker of the
    /// caller's (`&worker`), or as a [`SessionRequest`] says.
    ///
    /// The session has its place until it is closed, its last handle is dropped, or its worker ends.
    ///
    /// # Errors
    /// [`StartError::SessionLimit`] at a limit; [`StartError::CircuitOpen`], [`StartError::BackingOff`], [`StartError::NotRestarted`], [`StartError::Died`] as the policy says, after ends of
    /// the worker; [`StartError::Hook`]; and those of [`WorkerBuilder::spawn`] and [`Worker::session`].
    pub fn session(&self, request: impl Into<SessionRequest>) -> Result<Session, StartError> {
        self.handle.inner.session(request.into())
    }

    /// Runs `handler` at each such event from now on, on the thread `hotcell-events`: see [`IsolatedProcess`](crate::IsolatedProcess#events).
    pub fn on(
        &self,
        event: SupervisorEvent,
        handler: impl FnMut(&SupervisorEventData) + Send + 'static,
    ) -> ListenerId {
        self.handle.inner.emitter.on(&[event], false, false, handler)
    }

    /// Runs `handler` at the next such event, and then no more.
    pub fn once(
        &self,
        event: SupervisorEvent,
        handler: impl FnMut(&SupervisorEventData) + Send + 'static,
    ) -> ListenerId {
        self.handle.inner.emitter.on(&[event], true, false, handler)
    }

    /// Takes a handler back. False if it was not there any more.
    pub fn off(&self, listener: ListenerId) -> bool {
        self.handle.inner.emitter.off(listener)
    }

    /// A channel of the given kinds of events from now on.
    pub fn receiver(&self, events: &[SupervisorEvent]) -> Receiver<SupervisorEventData> {
        self.handle.inner.emitter.receiver(events)
    }

    /// The modules that are in quarantine. Files are named by their true paths.
    pub fn quarantined(&self) -> Vec<String> {
        let inner = &self.handle.inner;
        let mut state = lock(&inner.state);
        inner.settle_all(&mut state);
        state.ward.quarantined()
    }

    /// Releases a module from quarantine and forgets its crashes. False if it was not in quarantine.
    pub fn release(&self, module: impl AsRef<Path>) -> bool {
        let inner = &self.handle.inner;
        let key = module_key(inner.starter.builder.directory(), &module.as_ref().to_string_lossy());
        let mut state = lock(&inner.state);
        inner.settle_all(&mut state);
        let released = state.ward.release(&key);
        if released {
            inner.emitter.emit(SupervisorEventData::Released { module: key.into() });
        }
        released
    }

    /// What it has at this moment, and what it has counted, as plain data.
    pub fn snapshot(&self) -> SupervisorSnapshot {
        self.handle.inner.snapshot()
    }

    /// Ends all workers that it has started, and with them their sessions, whose calls answer [`CallError::Disposed`](crate::CallError::Disposed); requests that wait or come later
    /// answer [`StartError::Disposed`]. Returns when the workers are gone. Disposing again does nothing. Workers of the caller's go on.
    pub fn dispose(&self) {
        if sys::original_process().load(Relaxed) == 0 {
            return;
        }
        let inner = &self.handle.inner;
        let workers = {
            let mut state = lock(&inner.state);
            if !std::mem::replace(&mut state.disposed, true) {
                inner.emitter.emit(SupervisorEventData::Disposed);
            }
            let kept = state.groups.iter().filter(|(key, _)| !matches!(key, Key::Given(_)));
            let workers: Vec<_> = kept.filter_map(|(_, group)| group.inner.clone()).collect();
            inner.changed.notify_all();
            workers
        };
        // All are asked to end before the first is waited for.
        workers.iter().for_each(|worker| worker.begin_dispose());
        workers.iter().for_each(|worker| worker.wait_disposed());
        drop(inner.let_go());
    }
}

/// The worker of one key.
#[derive(Debug)]
struct Group {
    /// Keeps it alive. `None` for a worker that its session or the caller keeps.
    worker: Option<Worker>,
    /// Until its end is settled.
    inner: Option<Arc<WorkerInner>>,
    /// The session that is asked for signs of life.
    canary: Option<Session>,
    since: Instant,
    tenant: Option<Arc<str>>,
    /// Somebody is starting it.
    starting: bool,
    restarts: Restarts,
}

#[derive(Debug)]
struct State {
    places: Places,
    groups: FxHashMap<Key, Group>,
    /// The open sessions, by their places.
    seats: FxHashMap<u64, Seat>,
    ward: Ward,
    /// The modules that were loaded: the name in reports, and the one in the ward's books. Looked up here, since the file system is not asked under the lock.
    module_keys: FxHashMap<Arc<str>, String>,
    totals: Totals,
    groups_before_tidying: usize,
    disposed: bool,
}

/// What is counted from the start on.
#[derive(Clone, Debug, Default)]
struct Totals {
    sessions_opened: u64,
    sessions_refused: u64,
    /// Calls of sessions that are gone.
    calls_done: u64,
    workers_started: u64,
    starts_failed: u64,
    restarts: u64,
    ends: BTreeMap<String, u64>,
}

/// What all handles share, and the monitor.
#[derive(Debug)]
pub(crate) struct Inner {
    topology: Topology,
    starter: Starter,
    session: SessionBuilder,
    on_full: OnFull,
    restart: RestartPolicy,
    start_patience: Duration,
    on_session: Option<SessionHook>,
    canary: Option<Canary>,
    clock: Clock,
    since: Instant,
    state: Mutex<State>,
    /// A place was given back, a start is over, a worker has ended, or everything was disposed.
    changed: Condvar,
    emitter: Arc<Emitter<SupervisorEventData>>,
}

/// How often a session is tried again whose worker dies while it is opened.
const OPEN_AGAIN_MAX: u32 = 3;

/// Names of modules that are remembered.
const MODULE_KEYS_MAX: usize = 4096;

/// An open session, as the supervisor sees it.
#[derive(Debug)]
struct Seat {
    worker: u64,
    pid: u32,
    tenant: Option<Arc<str>>,
    session: Weak<SessionInner>,
}

impl Seat {
    fn calls(&self) -> (u64, u64) {
        self.session.upgrade().map_or((0, 0), |session| session.calls())
    }
}

impl Inner {
    fn session(self: &Arc<Self>, request: SessionRequest) -> Result<Session, StartError> {
        if sys::original_process().load(Relaxed) == 0 {
            return Err(StartError::Forked);
        }
        let tenant = request.tenant.clone();
        let span = tracing::debug_span!("session", tenant = tenant.as_deref(), topology = ?self.topology);
        let opened = span.in_scope(|| self.open(request));
        if let Err(error) = &opened {
            lock(&self.state).totals.sessions_refused += 1;
            if self.emitter.wants(SupervisorEvent::SessionRefused) {
                self.emitter.emit(SupervisorEventData::SessionRefused { tenant, reason: error.to_string() });
            }
        }
        opened
    }

    fn open(self: &Arc<Self>, request: SessionRequest) -> Result<Session, StartError> {
        let SessionRequest { tenant, worker: given, options, on_full } = request;
        let options = options.unwrap_or_else(|| self.session.clone());
        options.check()?;
        let worker = match (&given, self.topology, &tenant) {
            (Some(worker), ..) => Some(Key::Given(worker.owner.inner.id())),
            (None, Topology::Shared, _) => Some(Key::Shared),
            (None, Topology::PerTenant, Some(tenant)) => Some(Key::Tenant(Arc::clone(tenant))),
            (None, Topology::PerTenant, None) => {
                return Err(StartError::Configuration {
                    option: "the tenant of the request",
                    given: "missing".to_owned(),
                    expected: "named, since each tenant has a worker of its own",
                });
            }
            (None, Topology::PerSession, _) => None,
        };
        let want = Want { worker: worker.clone(), tenant: tenant.clone() };
        let place = self.take_place(want, on_full.unwrap_or(self.on_full))?;
        let key = worker.unwrap_or(Key::Own(place.id));
        let deadline = self.clock.now().checked_add(self.start_patience);
        let mut attempts = 0;
        let session = loop {
            let worker = self.worker_for(&key, tenant.as_ref(), given.as_ref(), deadline)?;
            match Session::open(&worker.owner, options.clone()) {
                Ok(session) => break session,
                // It died between the two lines above; the session never was, so another try does no harm.
                Err(StartError::Died(_)) if attempts < OPEN_AGAIN_MAX && key.is_replaced() => attempts += 1,
                Err(error) => return Err(error),
            }
        };
        self.seat(&session, place, &key, tenant);
        if let Some(hook) = &self.on_session
            && let Err(error) = hook.run(&session)
        {
            // Whatever closing it says: the session is of no use.
            let _ = session.close();
            return Err(error);
        }
        Ok(session)
    }

    /// Takes a place, or waits for one.
    fn take_place(self: &Arc<Self>, want: Want, on_full: OnFull) -> Result<Place, StartError> {
        let asked = self.clock.now();
        let wait = match on_full {
            OnFull::Refuse => None,
            OnFull::Wait(time) => Some(time),
        };
        let until = wait.and_then(|time| asked.checked_add(time));
        let mut state = lock(&self.state);
        let id = state.places.request(want);
        if !state.places.is_taken(id) {
            // A worker may be dead whose end has not been told yet: its places are free.
            self.settle_all(&mut state);
        }
        while !state.places.is_taken(id) && !state.disposed {
            let over = wait.is_none() || until.is_some_and(|until| self.clock.now() >= until);
            if over && let Some(full) = state.places.give_up(id) {
                self.changed.notify_all();
                return Err(full.error(wait));
            }
            state = self.clock.wait(&self.changed, state, until);
        }
        if state.disposed {
            if state.places.give_up(id).is_none() {
                state.places.release(id);
            }
            return Err(StartError::Disposed);
        }
        drop(state);
        Ok(Place { supervisor: Arc::downgrade(self), id })
    }

    /// The worker of a key, started if there is none.
    fn worker_for(
        self: &Arc<Self>,
        key: &Key,
        tenant: Option<&Arc<str>>,
        given: Option<&Worker>,
        deadline: Option<Instant>,
    ) -> Result<Worker, StartError> {
        if let Some(worker) = given {
            self.watch(key, worker, tenant, None)?;
            return Ok(worker.clone());
        }
        let asked = self.clock.now();
        let mut state = lock(&self.state);
        loop {
            if state.disposed {
                return Err(StartError::Disposed);
            }
            self.settle(&mut state, key);
            let now = self.clock.now();
            let over = deadline.is_some_and(|deadline| now >= deadline);
            let group = self.group(&mut state, key, tenant);
            match &group.worker {
                Some(worker) if !worker.owner.inner.is_disposing() => return Ok(worker.clone()),
                // It is on its way out; the monitor will tell.
                Some(_) if over => return Err(StartError::Disposed),
                Some(_) => {}
                None if group.starting && over => {
                    return Err(StartError::StillStarting { after: now - asked });
                }
                None if group.starting => {}
                None => match group.restarts.gate(now) {
                    Gate::Now => {
                        group.restarts.starting(now);
                        group.starting = true;
                        break;
                    }
                    Gate::Refused(error) => return Err(error),
                    Gate::Wait(at) if deadline.is_none_or(|deadline| at <= deadline) => {
                        state = self.clock.wait(&self.changed, state, Some(at));
                        continue;
                    }
                    Gate::Wait(at) => {
                        let last =
                            group.restarts.last().map_or_else(|| Arc::new(StartError::Disposed), Arc::clone);
                        return Err(StartError::BackingOff { until: at, retry_after: at - now, last });
                    }
                },
            }
            state = self.clock.wait(&self.changed, state, deadline);
        }
        drop(state);
        let _starting = Starting { inner: self, key };
        let started = self.starter.start().and_then(|worker| match &self.canary {
            None => Ok((worker, None)),
            Some(canary) => {
                Session::open(&worker.owner, canary.session()).map(|canary| (worker, Some(canary)))
            }
        });
        match started {
            Ok((worker, canary)) => self.watch(key, &worker, tenant, Some(canary)).map(|()| worker),
            Err(error) => Err(self.start_failed(key, tenant, error)),
        }
    }

    fn group<'a>(&self, state: &'a mut State, key: &Key, tenant: Option<&Arc<str>>) -> &'a mut Group {
        if state.groups.len() >= state.groups_before_tidying && !state.groups.contains_key(key) {
            // Tenants come and go; what is known of one without a worker is of no use for ever.
            let now = self.clock.now();
            state.groups.retain(|_, group| {
                group.inner.is_some() || group.starting || !group.restarts.is_forgettable(now)
            });
            state.groups_before_tidying = 64 + 2 * state.groups.len();
        }
        state.groups.entry(key.clone()).or_insert_with(|| Group {
            worker: None,
            inner: None,
            canary: None,
            since: self.since,
            tenant: tenant.filter(|_| !matches!(key, Key::Shared)).cloned(),
            starting: false,
            restarts: Restarts::new(self.restart.clone()),
        })
    }

    /// Enters a worker under its key, and has its end told. `started`: by this supervisor, with a canary if there is to be one.
    fn watch(
        self: &Arc<Self>,
        key: &Key,
        worker: &Worker,
        tenant: Option<&Arc<str>>,
        started: Option<Option<Session>>,
    ) -> Result<(), StartError> {
        let inner = &worker.owner.inner;
        let mut state = lock(&self.state);
        if state.disposed {
            drop(state);
            if started.is_some() {
                worker.dispose();
            }
            return Err(StartError::Disposed);
        }
        let group = self.group(&mut state, key, tenant);
        if group.inner.as_ref().is_some_and(|known| known.id() == inner.id()) {
            return Ok(());
        }
        group.inner = Some(Arc::clone(inner));
        group.since = self.clock.now();
        let by_us = started.is_some();
        group.canary = started.flatten();
        // A session keeps the worker that is its own; the caller keeps his.
        group.worker = key.is_replaced().then(|| worker.clone());
        let (tenant, restarts) = (group.tenant.clone(), group.restarts.restarts());
        if by_us {
            state.totals.workers_started += 1;
            state.totals.restarts += u64::from(restarts > 0);
            self.emitter.emit(SupervisorEventData::WorkerStarted { pid: inner.pid, tenant, restarts });
        }
        drop(state);
        let (supervisor, key) = (Arc::downgrade(self), key.clone());
        // Told on the monitor's thread, and at once if it has ended.
        inner.listen(move |event| {
            if !matches!(event, WorkerEvent::Ended(_)) {
                return true;
            }
            if let Some(supervisor) = supervisor.upgrade() {
                supervisor.settle(&mut lock(&supervisor.state), &key);
                // What hooks own is the user's, and may do anything when it is dropped.
                drop_elsewhere(supervisor);
            }
            false
        });
        Ok(())
    }

    fn start_failed(&self, key: &Key, tenant: Option<&Arc<str>>, error: StartError) -> StartError {
        let error = Arc::new(error);
        {
            let mut state = lock(&self.state);
            state.totals.starts_failed += 1;
            let now = self.clock.now();
            let group = self.group(&mut state, key, tenant);
            let tenant = group.tenant.clone();
            let opened = group.restarts.failed(now, Arc::clone(&error));
            let error = Arc::clone(&error);
            self.emitter.emit(SupervisorEventData::StartFailed { tenant: tenant.clone(), error });
            self.circuit(opened, now, tenant, group.restarts.last());
            if !key.is_replaced() {
                state.groups.remove(key);
            }
        }
        Arc::unwrap_or_clone(error)
    }

    fn circuit(
        &self,
        opened: Option<Instant>,
        now: Instant,
        tenant: Option<Arc<str>>,
        last: Option<&Arc<StartError>>,
    ) {
        if let (Some(until), Some(last)) = (opened, last) {
            let (open_for, last) = (until - now, Arc::clone(last));
            self.emitter.emit(SupervisorEventData::CircuitOpened { tenant, open_for, last });
        }
    }

    /// Books the end of a key's worker, if it has ended and that has not been done.
    fn settle(&self, state: &mut State, key: &Key) {
        let Some(group) = state.groups.get_mut(key) else { return };
        let Some(ended) = group.inner.take_if(|inner| inner.is_dead()) else { return };
        let Some(report) = ended.report() else { return };
        // The supervisor's last handles; the process is dead, so nothing comes of that.
        (group.worker, group.canary) = (None, None);
        let (now, tenant) = (self.clock.now(), group.tenant.clone());
        let opened = group.restarts.ended(now, why_ended(&report));
        if let Some(culprit) = report.culprit() {
            let module =
                state.module_keys.get(&culprit.module).cloned().unwrap_or_else(|| culprit.module.to_string());
            if state.ward.crashed(now, &module, &report) {
                let (module, report) = (module.into(), report.clone());
                self.emitter.emit(SupervisorEventData::Quarantined { module, report });
            }
        }
        *state.totals.ends.entry(report.cause().kind()).or_default() += 1;
        self.emitter.emit(SupervisorEventData::WorkerEnded { tenant: tenant.clone(), report });
        self.circuit(opened, now, tenant, group.restarts.last());
        if !key.is_replaced() {
            state.groups.remove(key);
        }
        let seated = state.seats.extract_if(|_, seat| seat.worker == ended.id()).collect::<Vec<_>>();
        for (id, seat) in seated {
            state.places.release(id);
            state.totals.calls_done += seat.calls().0;
            self.emitter.emit(SupervisorEventData::SessionClosed { tenant: seat.tenant, pid: seat.pid });
        }
        self.changed.notify_all();
    }

    fn settle_all(&self, state: &mut State) {
        let ended = |group: &Group| group.inner.as_ref().is_some_and(|inner| inner.is_dead());
        let keys: Vec<Key> =
            state.groups.iter().filter(|(_, group)| ended(group)).map(|(key, _)| key.clone()).collect();
        keys.iter().for_each(|key| self.settle(state, key));
    }

    /// Gives an open session its place.
    fn seat(&self, session: &Session, place: Place, key: &Key, tenant: Option<Arc<str>>) {
        let worker = session.worker();
        let (worker, pid) = (worker.owner.inner.id(), worker.pid());
        let mut state = lock(&self.state);
        let is_current = |group: &Group| group.inner.as_ref().is_some_and(|inner| inner.id() == worker);
        // If its worker's end has been settled already, nobody would take the place back.
        if state.groups.get(key).is_some_and(is_current) {
            self.emitter.emit(SupervisorEventData::SessionOpened { tenant: tenant.clone(), pid });
            state.totals.sessions_opened += 1;
            let seated = Arc::downgrade(session.inner());
            state.seats.insert(place.id, Seat { worker, pid, tenant, session: seated });
            drop(state);
            session.take_place(place);
        }
    }

    fn snapshot(&self) -> SupervisorSnapshot {
        let mut state = lock(&self.state);
        self.settle_all(&mut state);
        let now = self.clock.now();
        let (mut calls_done, mut calls_in_flight) = (state.totals.calls_done, 0);
        let mut sessions: FxHashMap<u64, Vec<SessionSnapshot>> = FxHashMap::default();
        for seat in state.seats.values() {
            let Some(session) = seat.session.upgrade() else { continue };
            let session = SessionSnapshot::of(&session, seat.tenant.clone());
            calls_done += session.calls_done;
            calls_in_flight += session.calls_in_flight;
            sessions.entry(seat.worker).or_default().push(session);
        }
        let worker = |group: &Group| WorkerSnapshot {
            tenant: group.tenant.clone(),
            pid: group.inner.as_ref().map(|inner| inner.pid),
            sessions: group.inner.as_ref().and_then(|inner| sessions.remove(&inner.id())).unwrap_or_default(),
            restarts: group.restarts.restarts(),
            circuit_open_for: group.restarts.open_until(now).map(|until| until - now),
            last_end: group.restarts.last().map(|last| last.to_string()),
            uptime: group.inner.as_ref().map(|_| now.saturating_duration_since(group.since)),
            resident_bytes: None,
            cpu_time: None,
        };
        let mut workers: Vec<_> = state.groups.values().map(worker).collect();
        let totals = state.totals.clone();
        let quarantined = state.ward.quarantined();
        let (sessions_open, sessions_waiting) = (state.places.taken(), state.places.waiting());
        // Reading files takes its time.
        drop(state);
        for worker in &mut workers {
            if let Some(pid) = worker.pid {
                (worker.resident_bytes, worker.cpu_time) = snapshot::process(pid);
            }
        }
        workers.sort_by(|a, b| (&a.tenant, a.pid).cmp(&(&b.tenant, b.pid)));
        let Totals {
            sessions_opened, sessions_refused, workers_started, starts_failed, restarts, ends, ..
        } = totals;
        SupervisorSnapshot {
            workers,
            sessions_open,
            sessions_waiting,
            sessions_opened,
            sessions_refused,
            calls_done,
            calls_in_flight,
            workers_started,
            starts_failed,
            restarts,
            ends,
            quarantined,
            uptime: now.saturating_duration_since(self.since),
        }
    }

    #[cfg(feature = "metrics")]
    fn metered(&self) -> (Totals, metrics::Gauges) {
        let state = lock(&self.state);
        let gauges = metrics::Gauges {
            workers: state.groups.values().filter(|group| group.inner.is_some()).count(),
            sessions: state.seats.len(),
            quarantined: state.ward.quarantined().len(),
        };
        (state.totals.clone(), gauges)
    }

    /// The sessions to ask for signs of life.
    fn canaries(&self) -> Vec<Session> {
        lock(&self.state).groups.values().filter_map(|group| group.canary.clone()).collect()
    }

    /// Takes the supervisor's own handles to its workers. To be dropped without the lock: closing a session waits for its answer.
    fn let_go(&self) -> Vec<(Option<Worker>, Option<Session>)> {
        let mut state = lock(&self.state);
        state.groups.values_mut().map(|group| (group.worker.take(), group.canary.take())).collect()
    }
}

/// A start that is being made. Over when dropped, however it went.
struct Starting<'a> {
    inner: &'a Inner,
    key: &'a Key,
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        if let Some(group) = lock(&self.inner.state).groups.get_mut(self.key) {
            group.starting = false;
        }
        self.inner.changed.notify_all();
    }
}

/// A session's place. Given back when the session is closed, or dropped.
#[derive(Debug)]
pub(crate) struct Place {
    supervisor: Weak<Inner>,
    id: u64,
}

impl Place {
    /// Refuses a module that is in quarantine.
    pub(crate) fn admit(&self, module: &str) -> Result<(), LoadError> {
        if sys::original_process().load(Relaxed) == 0 {
            return Ok(()); // the lock may be held for ever; the load itself refuses
        }
        let Some(inner) = self.supervisor.upgrade() else { return Ok(()) };
        let key = module_key(inner.starter.builder.directory(), module);
        let mut state = lock(&inner.state);
        inner.settle_all(&mut state);
        if let Some(reports) = state.ward.reports(&key) {
            inner.emitter.emit(SupervisorEventData::LoadRefused { module: module.into() });
            return Err(LoadError::Quarantined { module: module.into(), reports });
        }
        if state.module_keys.len() >= MODULE_KEYS_MAX {
            // Those that are loaded again come back; until then their names stand for themselves.
            state.module_keys.clear();
        }
        state.module_keys.insert(module.into(), key);
        Ok(())
    }

    /// The session was closed: its place is free, and the worker that was its own ends.
    pub(crate) fn closed(&self, worker: &Worker) {
        let Some(inner) = self.supervisor.upgrade() else { return };
        if self.give_back(&inner) && inner.topology == Topology::PerSession {
            let own = lock(&inner.state).groups.contains_key(&Key::Own(self.id));
            if own {
                worker.owner.inner.begin_dispose();
            }
        }
    }

    /// False if that has been done.
    fn give_back(&self, inner: &Inner) -> bool {
        let mut state = lock(&inner.state);
        // If the worker has ended, that comes first: who listens hears of a crash before he hears of the sessions that it closed.
        inner.settle_all(&mut state);
        // A worker of its own is not to be kept by its canary. Dropped without the lock.
        let own = state.groups.get_mut(&Key::Own(self.id));
        let _canary = own.and_then(|group| group.canary.take());
        let given = state.places.release(self.id);
        if let Some(seat) = state.seats.remove(&self.id) {
            state.totals.calls_done += seat.calls().0;
            inner.emitter.emit(SupervisorEventData::SessionClosed { tenant: seat.tenant, pid: seat.pid });
        }
        inner.changed.notify_all();
        drop(state);
        given
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // In a fork the lock may be held for ever.
        if sys::original_process().load(Relaxed) == 1
            && let Some(inner) = self.supervisor.upgrade()
        {
            self.give_back(&inner);
        }
    }
}
