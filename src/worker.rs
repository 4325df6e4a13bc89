//! `Worker`: one process, its handshake, its end.

use crate::cgroup::Group;
use crate::crash::{Cause, CrashReport, Death, Involvement};
use crate::error::{FunctionName, StartError};
use crate::limits::{Evidence, WorkerLimits};
use crate::memory;
use crate::monitor::{self, Runtime, Source, Spawned, lock};
use crate::placement;
use crate::session::{Session, SessionBuilder, SessionInner};
use hotcell_channel::control::{self, Hello, Mismatch, ToHost, ToWorker};
use hotcell_channel::placement::{Failure, Placed};
use hotcell_channel::region::CrashRegion;
use hotcell_channel::socket::{self, PacketError};
use hotcell_channel::sys::{self, WaitStatus};
pub use hotcell_channel::wait::Policy as WaitPolicy;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

/// The environment variable that names the worker program when the configuration names none.
pub const WORKER_VARIABLE: &str = "HOTCELL_WORKER";

/// Captured output that is kept, for each of the two streams, unless [`WorkerBuilder::output_bytes_max`] says otherwise.
pub const OUTPUT_TAIL_BYTES: usize = 8 << 10;
/// Output pieces that wait for a slow receiver of events; more are dropped.
const OUTPUT_EVENTS_MAX: usize = 256;
/// How long a worker whose control socket has closed may take to die before that counts as a breach.
const HANG_UP_GRACE: Duration = Duration::from_millis(200);
/// Looks at a lock that is about to become free, each with the CPU given away, before sleeping on it: some 100 µs.
const COLLECTING_LOOKS: u32 = 200;
/// How long a caller looks for the end of a worker that says that it is dying. The backtrace takes some 50 µs and the kernel some 200 µs, longer for a large worker.
const FOLLOW_MAX: Duration = Duration::from_millis(1);

/// Where a worker's standard output or standard error goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Output {
    /// To the host's own.
    Inherit,
    /// Nowhere.
    Discard,
    /// Into the library: the last [`OUTPUT_TAIL_BYTES`] are kept, or as many as [`WorkerBuilder::output_bytes_max`] says (and, for standard error, shown in crash reports), and each piece is an event to whoever
    /// [listens](Worker::events). The worker never waits for a reader. The default for both streams.
    #[default]
    Capture,
}

/// What becomes of the worker when a call passes its deadline. Native code cannot be stopped safely inside a living process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnDeadline {
    /// The worker is killed. The default.
    #[default]
    KillWorker,
    /// The session is given up until the call returns by itself: calls on it answer
    /// [`CallError::Abandoned`](crate::CallError::Abandoned) meanwhile. Other sessions go on.
    AbandonSession,
}

/// What happens to a worker, for whoever [listens](Worker::events).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum WorkerEvent {
    /// A piece of its standard output.
    Stdout(Vec<u8>),
    /// A piece of its standard error.
    Stderr(Vec<u8>),
    /// It has ended. The last event.
    Ended(CrashReport),
}

/// How a worker is started. Every option has a default; end with [`WorkerBuilder::spawn`].
#[derive(Clone, Debug)]
#[must_use]
pub struct WorkerBuilder {
    program: Option<PathBuf>,
    environment: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    stdout: Output,
    stderr: Output,
    start_timeout: Duration,
    grace: Duration,
    pub(crate) session: SessionBuilder,
    pub(crate) limits: WorkerLimits,
}

impl Default for WorkerBuilder {
    fn default() -> Self {
        Self {
            program: None,
            environment: Vec::new(),
            directory: None,
            stdout: Output::default(),
            stderr: Output::default(),
            start_timeout: Duration::from_secs(10),
            grace: Duration::from_secs(1),
            session: SessionBuilder::default(),
            limits: WorkerLimits::default(),
        }
    }
}

impl WorkerBuilder {
    /// Default: the variable `HOTCELL_WORKER`, and without it the running executable. The path of the `hotcell-worker` program.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = Some(path.into());
        self
    }

    /// Default: none. Sets a variable in the worker's environment, which is empty otherwise.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Default: none. Passes a variable of the host's environment on, if it is set now.
    pub fn inherit_env(self, name: impl Into<OsString>) -> Self {
        let name = name.into();
        match std::env::var_os(&name) {
            Some(value) => self.env(name, value),
            None => self,
        }
    }

    /// Default: the host's. The worker's working directory.
    pub fn current_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Default: [`Output::Capture`]. Where standard output goes.
    pub fn stdout(mut self, output: Output) -> Self {
        self.stdout = output;
        self
    }

    /// Default: [`Output::Capture`]. Where standard error goes.
    pub fn stderr(mut self, output: Output) -> Self {
        self.stderr = output;
        self
    }

    /// Default: 10 s. How long the worker may take to be ready, and a session to be opened. Zero is refused.
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// Default: 1 s. How long the worker has between `SIGTERM` and `SIGKILL` when it is disposed.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Default: 30 s. How long each call may take, for sessions and functions that set nothing themselves: see [`SessionBuilder::timeout`]. Zero is refused.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.session = self.session.timeout(timeout);
        self
    }

    /// Default: [`OnDeadline::KillWorker`]. What a passed deadline does.
    pub fn on_deadline(mut self, policy: OnDeadline) -> Self {
        self.session = self.session.on_deadline(policy);
        self
    }

    /// Default: [`WaitPolicy::Adaptive`]. How both sides of each session wait.
    pub fn wait(mut self, policy: WaitPolicy) -> Self {
        self.session = self.session.wait(policy);
        self
    }

    /// Default: 64 MiB. Largest argument or result of a call, in bytes.
    pub fn payload_bytes_max(mut self, bytes: u64) -> Self {
        self.session = self.session.payload_bytes_max(bytes);
        self
    }

    /// Default: those of [`SessionBuilder`]. What sessions get that [`Worker::session`] opens.
    pub fn session_defaults(mut self, session: SessionBuilder) -> Self {
        self.session = session;
        self
    }

    pub(crate) fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    pub(crate) fn session_options(&self) -> &SessionBuilder {
        &self.session
    }

    pub(crate) fn grace_period(&self) -> Duration {
        self.grace
    }

    /// Starts the worker and waits until it is ready.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is left behind.
    pub fn spawn(self) -> Result<Worker, StartError> {
        self.session.check()?;
        self.limits.check()?;
        self.check()?;
        let runtime = monitor::runtime()?;
        let started = Instant::now();
        let (program, mut command) = self.command()?;
        let (host_end, worker_end) = socket::pair().map_err(|e| StartError::system("socketpair", e))?;
        let crash_page = CrashRegion::create().map_err(|e| StartError::system("making the crash page", e))?;
        // The host's hello waits in the socket before the worker has been started: one round trip less.
        socket::send(host_end.as_fd(), &Hello::ours().encode(), Some(crash_page.as_fd()))
            .map_err(|e| StartError::system("writing to the control socket", e))?;
        let crash_page = CrashRegion::open(crash_page.as_fd())
            .map_err(|e| StartError::system("mapping the crash page", e))?;
        command.stdin(Stdio::from(worker_end));
        let spawned = runtime
            .spawn(command)
            .map_err(|source| StartError::Program { program: program.clone(), source: source.into() })?;
        let inner = Arc::new(WorkerInner::new(spawned, host_end, crash_page, program, self));
        if let Err(error) = runtime.add(&inner) {
            // Nobody watches it, so it is ended and collected here.
            inner.kill();
            runtime.remove(&inner);
            if socket::readable(inner.pidfd.as_fd(), Duration::from_secs(10)) {
                inner.collect();
            }
            return Err(StartError::system("watching the worker", error));
        }
        // From here on dropping the owner ends the worker.
        let worker = Worker { owner: Arc::new(WorkerOwner { inner }) };
        worker.owner.inner.limit()?;
        worker.owner.inner.wait_ready()?;
        tracing::debug!(pid = worker.pid(), elapsed = ?started.elapsed(), "worker started");
        Ok(worker)
    }

    /// What the system would otherwise refuse in words that name the program, or take for something else.
    fn check(&self) -> Result<(), StartError> {
        let bad =
            |option, given: String, expected| Err(StartError::Configuration { option, given, expected });
        if self.start_timeout.is_zero() {
            return bad("start_timeout", "0".into(), "longer than nothing");
        }
        for (name, value) in &self.environment {
            let (name_bytes, value) = (name.as_bytes(), value.as_bytes());
            if name_bytes.is_empty() || name_bytes.contains(&b'=') || name_bytes.contains(&0) {
                return bad(
                    "env",
                    format!("{name:?}"),
                    "a name that is not empty and has neither = nor NUL inside",
                );
            }
            if value.contains(&0) {
                return bad(
                    "env",
                    format!("{name:?} with a NUL in its value"),
                    "a name and a value without NUL",
                );
            }
        }
        match &self.directory {
            Some(directory) if !directory.is_dir() => {
                bad("current_dir", directory.display().to_string(), "a folder that exists")
            }
            _ => Ok(()),
        }
    }

    fn command(&self) -> Result<(PathBuf, Command), StartError> {
        let named = self
            .program
            .clone()
            .or_else(|| std::env::var_os(WORKER_VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from));
        let program = match named {
            Some(program) => program,
            None => own_program()?,
        };
        let mut command = Command::new(&program);
        command
            .arg0("hotcell-worker")
            .arg(control::WORKER_MARKER)
            .arg(std::process::id().to_string())
            .env_clear()
            .envs(self.environment.iter().map(|(k, v)| (k, v)))
            .stdout(stdio(self.stdout))
            .stderr(stdio(self.stderr));
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        Ok((program, command))
    }
}

#[cfg(feature = "self-exec")]
fn own_program() -> Result<PathBuf, StartError> {
    crate::self_exec::own_program()
}

#[cfg(not(feature = "self-exec"))]
fn own_program() -> Result<PathBuf, StartError> {
    Err(StartError::NoProgram)
}

fn stdio(output: Output) -> Stdio {
    match output {
        Output::Inherit => Stdio::inherit(),
        Output::Discard => Stdio::null(),
        Output::Capture => Stdio::piped(),
    }
}

/// One process that runs native code. Sessions in it are opened with [`Worker::session`].
///
/// Cloning gives another handle to the same process. The process is disposed when the last handle to it (this one, its sessions, their modules
/// and functions) is dropped, or at once by [`Worker::dispose`]. It never outlives its host, however that ends.
#[derive(Clone, Debug)]
pub struct Worker {
    pub(crate) owner: Arc<WorkerOwner>,
}

/// Disposes of the process when dropped.
#[derive(Debug)]
pub(crate) struct WorkerOwner {
    pub(crate) inner: Arc<WorkerInner>,
}

impl Drop for WorkerOwner {
    fn drop(&mut self) {
        self.inner.begin_dispose();
    }
}

impl Worker {
    /// Starts a worker with the defaults.
    ///
    /// # Errors
    /// See [`StartError`].
    ///
    /// ```
    /// # fn main() -> Result<(), hotcell::Error> {
    /// let worker = hotcell::Worker::spawn()?;
    /// assert!(worker.is_alive());
    /// # Ok(()) }
    /// ```
    pub fn spawn() -> Result<Worker, StartError> {
        WorkerBuilder::default().spawn()
    }

    /// Starts with options.
    pub fn builder() -> WorkerBuilder {
        WorkerBuilder::default()
    }

    /// Opens a session: a thread of its own in the worker, and a channel to it.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn session(&self) -> Result<Session, StartError> {
        self.session_with(self.owner.inner.session_defaults.clone())
    }

    /// Opens a session with options of its own, which start from the library's defaults, not from the worker's.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn session_with(&self, options: SessionBuilder) -> Result<Session, StartError> {
        Session::open(&self.owner, options)
    }

    /// The worker's process id. After its death the number may belong to another process.
    pub fn pid(&self) -> u32 {
        self.owner.inner.pid
    }

    /// Whether the worker has not ended, as far as the host knows now. It may end at any moment.
    pub fn is_alive(&self) -> bool {
        !self.owner.inner.is_dead()
    }

    /// The report, once the worker has ended.
    pub fn crash_report(&self) -> Option<CrashReport> {
        self.owner.inner.report()
    }

    /// The last of the worker's captured standard output: at most [`output_bytes_max`](WorkerBuilder::output_bytes_max).
    pub fn stdout_tail(&self) -> Vec<u8> {
        lock(&self.owner.inner.stdout_tail).iter().copied().collect()
    }

    /// Bytes of captured standard output that were dropped before what [`Worker::stdout_tail`] has.
    pub fn stdout_dropped(&self) -> u64 {
        self.owner.inner.stdout_dropped.load(Ordering::Relaxed)
    }

    /// Bytes of captured standard error that were dropped before what [`Worker::stderr_tail`] has.
    pub fn stderr_dropped(&self) -> u64 {
        self.owner.inner.stderr_dropped.load(Ordering::Relaxed)
    }

    /// The last of the worker's captured standard error: at most [`output_bytes_max`](WorkerBuilder::output_bytes_max).
    pub fn stderr_tail(&self) -> Vec<u8> {
        lock(&self.owner.inner.stderr_tail).iter().copied().collect()
    }

    /// A receiver of the worker's events from now on. Output that comes faster than it is received is dropped (only the tail is kept);
    /// [`WorkerEvent::Ended`] always comes, and comes last; at once if the worker has ended already.
    pub fn events(&self) -> crossbeam_channel::Receiver<WorkerEvent> {
        self.owner.inner.subscribe()
    }

    /// Ends the worker: `SIGTERM`, and `SIGKILL` after the grace period. Returns when it is gone, which takes as long as it takes to die; the
    /// operating system allows at most the grace period and a moment.
    ///
    /// Calls in flight end with [`CallError::Disposed`](crate::CallError::Disposed). Disposing again does nothing. Any thread may call it, an
    /// event handler too.
    pub fn dispose(&self) {
        self.owner.inner.begin_dispose();
        self.owner.inner.wait_disposed();
    }
}

#[derive(Debug, Default)]
pub(crate) struct Inbox {
    hello: Option<Result<(), Mismatch>>,
    greeted: bool,
    /// Sessions that were asked for; with the worker's answer once it is there.
    opening: HashMap<u32, Option<Answer>>,
    dead: bool,
}

/// A worker's answer to the request for a session: the address of the arena there, and how the session is placed.
type Answer = Result<(u64, Placed), Refusal>;

#[derive(Debug)]
enum Refusal {
    Scarce(control::Scarce),
    Other(String),
    Placement(Failure),
}

/// Why the host ended a worker, and on account of which session.
#[derive(Debug)]
struct Verdict {
    cause: Cause,
    session: Option<u32>,
}

/// The host's side of one worker process, shared by its handles and the monitor.
pub(crate) struct WorkerInner {
    id: u64,
    pub(crate) pid: u32,
    pidfd: OwnedFd,
    socket: OwnedFd,
    crash_page: CrashRegion,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    program: PathBuf,
    start_timeout: Duration,
    grace: Duration,
    session_defaults: SessionBuilder,
    limits: WorkerLimits,
    /// Its control group, if it needs one, until it has ended.
    group: Mutex<Option<Group>>,
    /// The first reason for which the host ended it.
    verdict: OnceLock<Verdict>,
    /// Held by whoever collects the process: the monitor, or a caller who follows its crash.
    collecting: Mutex<()>,
    /// A caller has followed the crash page's word: see [`WorkerInner::follow_crash`].
    followed: AtomicBool,
    death: OnceLock<Arc<Death>>,
    /// Output that was read together with the end. The monitor tells it before the end.
    untold: Mutex<Vec<WorkerEvent>>,
    disposing: AtomicBool,
    inbox: Mutex<Inbox>,
    inbox_changed: Condvar,
    sessions: Mutex<HashMap<u32, Weak<SessionInner>>>,
    stdout_tail: Mutex<VecDeque<u8>>,
    stderr_tail: Mutex<VecDeque<u8>>,
    stdout_dropped: AtomicU64,
    stderr_dropped: AtomicU64,
    listeners: Mutex<Vec<Listener>>,
}

/// Told of a worker's events, on the monitor's thread: it must not block, and must not run code of the host's user. Answers whether it wants to hear more.
struct Listener(Box<dyn FnMut(&WorkerEvent) -> bool + Send>);

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener")
    }
}

impl std::fmt::Debug for WorkerInner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("pid", &self.pid).finish_non_exhaustive()
    }
}

impl WorkerInner {
    fn new(
        spawned: Spawned,
        socket: OwnedFd,
        crash_page: CrashRegion,
        program: PathBuf,
        config: WorkerBuilder,
    ) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            pid: spawned.pid,
            pidfd: spawned.pidfd,
            socket,
            crash_page,
            stdout: spawned.stdout,
            stderr: spawned.stderr,
            program,
            start_timeout: config.start_timeout,
            grace: config.grace,
            session_defaults: config.session,
            limits: config.limits,
            group: Mutex::default(),
            verdict: OnceLock::new(),
            collecting: Mutex::default(),
            followed: AtomicBool::new(false),
            death: OnceLock::new(),
            untold: Mutex::default(),
            disposing: AtomicBool::new(false),
            inbox: Mutex::default(),
            inbox_changed: Condvar::new(),
            sessions: Mutex::default(),
            stdout_tail: Mutex::default(),
            stderr_tail: Mutex::default(),
            stdout_dropped: AtomicU64::new(0),
            stderr_dropped: AtomicU64::new(0),
            listeners: Mutex::default(),
        }
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn descriptor(&self, source: Source) -> Option<BorrowedFd<'_>> {
        match source {
            Source::Exit => Some(self.pidfd.as_fd()),
            Source::Socket => Some(self.socket.as_fd()),
            Source::Stdout => self.stdout.as_ref().map(AsFd::as_fd),
            Source::Stderr => self.stderr.as_ref().map(AsFd::as_fd),
        }
    }

    pub(crate) fn grace(&self) -> Duration {
        self.grace
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.death.get().is_some()
    }

    pub(crate) fn death(&self) -> Option<&Arc<Death>> {
        self.death.get()
    }

    pub(crate) fn is_disposing(&self) -> bool {
        self.disposing.load(Ordering::Acquire)
    }

    /// The report for nobody's call in particular.
    pub(crate) fn report(&self) -> Option<CrashReport> {
        let death = Arc::clone(self.death.get()?);
        let function = death.culprit_function().cloned();
        let involvement = if function.is_some() { Involvement::Culprit } else { Involvement::NotRun };
        Some(CrashReport { death, function, involvement })
    }

    fn subscribe(&self) -> crossbeam_channel::Receiver<WorkerEvent> {
        let (sender, receiver) = crossbeam_channel::unbounded();
        self.listen(move |event| {
            let ended = matches!(event, WorkerEvent::Ended(_));
            if !ended && sender.len() >= OUTPUT_EVENTS_MAX {
                return true; // dropped for a receiver that does not keep up
            }
            sender.send(event.clone()).is_ok()
        });
        receiver
    }

    /// Has `tell` told of every event from now on, until it answers false or has been told of the end: see [`Listener`]. If the worker has ended, it is told so at once, here.
    pub(crate) fn listen(&self, mut tell: impl FnMut(&WorkerEvent) -> bool + Send + 'static) {
        let mut listeners = lock(&self.listeners);
        // Under the listeners' lock: the monitor tells the death under it, after the death is known.
        match self.report() {
            Some(report) => drop(tell(&WorkerEvent::Ended(report))),
            None => listeners.push(Listener(Box::new(tell))),
        }
    }

    fn tell(&self, event: &WorkerEvent) {
        let ended = matches!(event, WorkerEvent::Ended(_));
        lock(&self.listeners).retain_mut(|listener| (listener.0)(event) && !ended);
    }

    /// Waits until `look` finds what it looks for in the inbox, or the worker is dead (`look` sees that too), or the time is up.
    fn wait_inbox<T>(&self, timeout: Duration, look: impl Fn(&mut Inbox) -> Option<T>) -> Option<T> {
        let start = Instant::now();
        let mut inbox = lock(&self.inbox);
        loop {
            if let Some(found) = look(&mut inbox) {
                return Some(found);
            }
            let left = timeout.checked_sub(start.elapsed()).filter(|left| !left.is_zero())?;
            inbox = self.inbox_changed.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn wait_ready(&self) -> Result<(), StartError> {
        let ready = self.wait_inbox(self.start_timeout, |inbox| match inbox.hello.take() {
            Some(hello) => Some(Some(hello)),
            None => inbox.dead.then_some(None),
        });
        match ready {
            Some(Some(Ok(()))) => Ok(()),
            Some(Some(Err(mismatch))) => {
                Err(StartError::Mismatch { program: self.program.clone(), mismatch })
            }
            Some(None) => Err(self.died_early()),
            None => {
                let after = self.start_timeout;
                self.end(Cause::NeverReady { after }, None);
                self.wait_gone();
                Err(StartError::TimedOut { program: self.program.clone(), after })
            }
        }
    }

    fn died_early(&self) -> StartError {
        match self.report() {
            Some(_) if self.is_disposing() => StartError::Disposed,
            Some(report) => StartError::Died(Box::new(report)),
            None => StartError::Disposed,
        }
    }

    /// After a kill: until the kernel has reported the end, which takes microseconds unless the machine is in trouble.
    pub(crate) fn wait_gone(&self) {
        self.wait_inbox(Duration::from_secs(10), |inbox| inbox.dead.then_some(()));
    }

    /// Puts the worker under its limits. Before it loads anything: it opens no session before it has taken them.
    fn limit(&self) -> Result<(), StartError> {
        let (group, limits) = self.limits.put_in_force(self.pid)?;
        *lock(&self.group) = group;
        if limits == control::WorkerLimits::default() {
            return Ok(());
        }
        self.send_ahead(&ToWorker::LimitWorker(limits))
    }

    /// Tells the worker the limits of a session that it will be asked for.
    pub(crate) fn limit_session(&self, session: &SessionInner) -> Result<(), StartError> {
        let limits = session.options.limits.for_worker();
        if limits == control::SessionLimits::default() {
            return Ok(());
        }
        self.send_ahead(&ToWorker::LimitSession { session: session.id(), limits })
    }

    /// Sends what has no answer. A worker that takes nothing any more tells why by its death, which the next question comes upon.
    fn send_ahead(&self, message: &ToWorker) -> Result<(), StartError> {
        match socket::send(self.socket.as_fd(), &control::encode(message), None) {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                Ok(())
            }
            Err(error) => Err(StartError::system("writing to the control socket", error)),
        }
    }

    /// Asks the worker for a session and waits for its answer: the address of the arena in the worker, and how the session is placed.
    pub(crate) fn open_session(
        &self,
        session: &Arc<SessionInner>,
        region: BorrowedFd<'_>,
        request: &ToWorker,
    ) -> Result<(u64, Placed), StartError> {
        let id = session.id();
        lock(&self.sessions).insert(id, Arc::downgrade(session));
        lock(&self.inbox).opening.insert(id, None);
        let sent = socket::send(self.socket.as_fd(), &control::encode(request), Some(region));
        let answer = match sent {
            Ok(()) => self.wait_inbox(self.start_timeout, |inbox| {
                // Taken out with its entry: a second answer finds none and is a breach.
                if let Some(Some(_)) = inbox.opening.get(&id) {
                    return inbox.opening.remove(&id);
                }
                inbox.dead.then_some(None)
            }),
            // The other end takes nothing any more: its death is on its way to the monitor, or else it lives on without a tie to this host.
            // While it is being closed the kernel says that it was reset.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                if self.wait_inbox(HANG_UP_GRACE, |inbox| inbox.dead.then_some(())).is_none() {
                    self.breach("it shut its control socket and lived on", None);
                    self.wait_gone();
                }
                Some(None)
            }
            Err(error) => {
                lock(&self.inbox).opening.remove(&id);
                self.forget_session(id);
                return Err(StartError::system("writing to the control socket", error));
            }
        };
        lock(&self.inbox).opening.remove(&id);
        let refused = match answer {
            Some(Some(Ok(opened))) => return Ok(opened),
            Some(Some(Err(Refusal::Other(reason)))) => StartError::Refused { reason },
            Some(Some(Err(Refusal::Scarce(what)))) => self.limits.no_room(what),
            Some(Some(Err(Refusal::Placement(failure)))) => {
                placement::refused(&session.options.placement, failure).unwrap_or_else(|| {
                    self.breach("it refused a placement that was not asked for", Some(id));
                    self.wait_gone();
                    self.died_early()
                })
            }
            Some(None) => self.died_early(),
            None => {
                let after = self.start_timeout;
                self.end(Cause::NeverReady { after }, None);
                StartError::TimedOut { program: self.program.clone(), after }
            }
        };
        self.forget_session(id);
        Err(refused)
    }

    pub(crate) fn forget_session(&self, id: u32) {
        lock(&self.sessions).remove(&id);
    }

    /// Ends the worker for a reason. The first reason counts.
    pub(crate) fn end(&self, cause: Cause, session: Option<u32>) {
        let _ = self.verdict.set(Verdict { cause, session });
        self.kill();
    }

    /// Ends the worker because it broke the protocol.
    pub(crate) fn breach(&self, what: impl Into<String>, session: Option<u32>) {
        let what = what.into();
        monitor::guarded(|| tracing::warn!(pid = self.pid, what, "worker broke the protocol"));
        self.end(Cause::ProtocolBreach { what }, session);
    }

    /// `SIGKILL`, to exactly this process. A process that has ended already is none the worse.
    pub(crate) fn kill(&self) {
        // In a fork of the host the worker is somebody else's.
        if sys::original_process().load(Ordering::Relaxed) == 1 {
            let _ = sys::pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL);
        }
    }

    /// `SIGTERM` now, `SIGKILL` after the grace period. Does not wait.
    pub(crate) fn begin_dispose(&self) {
        if sys::original_process().load(Ordering::Relaxed) == 0 || self.disposing.swap(true, Ordering::AcqRel)
        {
            return;
        }
        if self.is_dead() {
            return;
        }
        let _ = self.verdict.set(Verdict { cause: Cause::Disposed, session: None });
        let _ = sys::pidfd_send_signal(self.pidfd.as_fd(), libc::SIGTERM);
        match monitor::runtime() {
            Ok(runtime) if !self.grace.is_zero() => runtime.end_after(self, self.grace, None),
            _ => self.kill(),
        }
    }

    /// After [`WorkerInner::begin_dispose`]: until it is gone.
    pub(crate) fn wait_disposed(&self) {
        if sys::original_process().load(Ordering::Relaxed) == 1 {
            let patience = self.grace.saturating_add(Duration::from_secs(10));
            self.wait_inbox(patience, |inbox| inbox.dead.then_some(()));
        }
    }

    /// For a caller who is about to sleep: if the crash page says that the worker is dying, looks at the pidfd for up to [`FOLLOW_MAX`], and collects the worker
    /// when the kernel says that it has ended. That saves the wake-ups of the monitor and of the caller, each of which takes as long as a third of a bare
    /// process's end.
    ///
    /// The page is believed nothing: it only makes one caller look, once in a worker's life, so a worker that lies costs that caller [`FOLLOW_MAX`], in which a reply is noticed late.
    /// Who looks gives its CPU away between the looks: the worker may need it to end.
    pub(crate) fn follow_crash(&self) {
        if !self.crash_page.page().says_dying()
            || self.followed.swap(true, Ordering::Relaxed)
            || sys::original_process().load(Ordering::Relaxed) == 0
        {
            return;
        }
        let start = Instant::now();
        while !self.is_dead() && start.elapsed() < FOLLOW_MAX {
            if socket::readable(self.pidfd.as_fd(), Duration::ZERO) {
                // If a process that traces it keeps it, the rest is the monitor's.
                self.take_status();
                return;
            }
            std::thread::yield_now();
        }
    }

    /// Collects the process if it has ended, and ends all waits for its replies. Whoever comes first does it; false if it still runs, or if a process that
    /// traces it keeps it.
    fn take_status(&self) -> bool {
        let _collecting = self.lock_collecting();
        if self.is_dead() {
            return true;
        }
        let Some((status, usage)) = sys::wait_pidfd(self.pidfd.as_fd()) else { return false };
        self.ended(status, usage);
        true
    }

    /// Whoever has the lock has it for some 50 µs. To sleep on it would be to have a caller, who is in a hurry, wake the monitor.
    fn lock_collecting(&self) -> MutexGuard<'_, ()> {
        for _ in 0..COLLECTING_LOOKS {
            if let Ok(guard) = self.collecting.try_lock() {
                return guard;
            }
            std::thread::yield_now();
        }
        lock(&self.collecting)
    }

    // What follows runs on the monitor's thread, but for `ended` and what it calls.

    /// The process may have ended: collects it, unless a caller has, and tells everybody. False if it still runs, or if a process that traces it keeps it.
    pub(crate) fn collect(&self) -> bool {
        let collected = self.take_status();
        if collected {
            self.tell_end();
        }
        collected
    }

    /// The process has ended, but a process that traces it has not let go of it: tells everybody without its status. It still has to be
    /// collected.
    pub(crate) fn ended_but_traced(&self) {
        {
            let _collecting = self.lock_collecting();
            if !self.is_dead() {
                self.ended(WaitStatus::Unknown, sys::Usage::default());
            }
        }
        self.tell_end();
    }

    /// Whether the process, whose end has been told, leaves no zombie.
    pub(crate) fn is_collected(&self) -> bool {
        sys::wait_pidfd(self.pidfd.as_fd()).is_some()
    }

    /// Makes the report and ends all waits for replies; with `collecting` held. Runs no code of the host's user: that is for [`WorkerInner::tell_end`], since a caller who
    /// collects the worker may hold any lock.
    fn ended(&self, status: WaitStatus, usage: sys::Usage) {
        self.drain_output();
        let page = self.crash_page.page();
        let facts = page.read();
        let group = lock(&self.group).take();
        let evidence = Evidence {
            status,
            usage: &usage,
            note: page.limit(),
            memory_kills: group.as_ref().map_or(0, Group::memory_kills),
        };
        let sessions: Vec<Arc<SessionInner>> =
            lock(&self.sessions).values().filter_map(Weak::upgrade).collect();
        // They lie in a page of their own.
        let metered = sessions.iter().any(|session| session.options.limits.memory_bytes.is_some());
        let refusals = if metered { page.refusals() } else { Vec::new() };
        let mut running: Vec<(u32, FunctionName)> = Vec::new();
        for session in &sessions {
            if let Some(function) = session.running_function() {
                running.push((session.id(), function));
            }
        }
        let (cause, blamed) = match self.verdict.get() {
            Some(verdict) => (verdict.cause.clone(), verdict.session),
            None => {
                let limits = |id| {
                    let session = sessions.iter().find(|session| session.id() == id);
                    session.map_or(&self.session_defaults.limits, |session| &session.options.limits)
                };
                let session = facts.as_ref().and_then(|facts| facts.session);
                let of_session = memory::exceeded(&refusals, &sessions, status, facts.as_ref());
                match of_session
                    .map(|(cause, session)| (cause, Some(session)))
                    .or_else(|| self.limits.exceeded(&evidence, limits))
                {
                    Some((cause, noted)) => (cause, noted.or(session)),
                    None => (Self::cause_of(status, facts.as_ref()), session),
                }
            }
        };
        drop(group);
        let culprit = blamed.or(match (&cause, &running[..]) {
            // The crash handler ran, on a thread of no session: a thread that foreign code has started.
            (Cause::Signaled { .. } | Cause::StackOverflow { .. }, _) if facts.is_some() => None,
            (Cause::MemoryExceeded { .. } | Cause::FileSizeExceeded { .. }, _) if facts.is_some() => None,
            // With one call running there is only one that can have done it.
            (
                Cause::Exited { .. }
                | Cause::Signaled { .. }
                | Cause::StackOverflow { .. }
                | Cause::MemoryExceeded { .. }
                | Cause::FileSizeExceeded { .. },
                [(session, _)],
            ) => Some(*session),
            _ => None,
        });
        let stderr_tail: Vec<u8> = lock(&self.stderr_tail).iter().copied().collect();
        let stderr_tail = printable(&stderr_tail);
        let stderr_dropped = self.stderr_dropped.load(Ordering::Relaxed);
        let greeted = lock(&self.inbox).greeted;
        let death = Death {
            pid: self.pid,
            cause,
            greeted,
            usage,
            facts,
            running,
            culprit,
            stderr_tail,
            stderr_dropped,
        };
        let _ = self.death.set(Arc::new(death));
        for session in &sessions {
            session.worker_died();
        }
        lock(&self.inbox).dead = true;
        self.inbox_changed.notify_all();
    }

    /// Tells the worker's end, once it is known and the callers have it.
    fn tell_end(&self) {
        if let Some(death) = self.death() {
            monitor::guarded(|| tracing::debug!(pid = self.pid, cause = %death.cause, "worker ended"));
        }
        for event in std::mem::take(&mut *lock(&self.untold)) {
            self.tell(&event);
        }
        if let Some(report) = self.report() {
            self.tell(&WorkerEvent::Ended(report));
        }
    }

    fn cause_of(status: WaitStatus, facts: Option<&hotcell_channel::crash::CrashFacts>) -> Cause {
        match status {
            WaitStatus::Exited(code) => Cause::Exited { code },
            WaitStatus::Signaled { signal, core_dumped } => match facts {
                // The kernel says which signal, the handler which address; both must agree that it was a fault.
                Some(facts)
                    if facts.stack_overflow
                        && facts.signal == signal
                        && matches!(signal, libc::SIGSEGV | libc::SIGBUS) =>
                {
                    Cause::StackOverflow { signal, core_dumped }
                }
                _ => Cause::Signaled { signal, core_dumped },
            },
            WaitStatus::Unknown => Cause::Unknown,
        }
    }

    /// The control socket can be read, or its other end is closed.
    pub(crate) fn read_control(&self, runtime: &Runtime) {
        // Every message is an answer to something asked, so a flood ends at its first message too many.
        loop {
            let packet = match socket::receive(self.socket.as_fd(), false) {
                Ok(packet) => packet,
                Err(PacketError::Empty) => return,
                Err(error) => {
                    runtime.forget(self, Source::Socket);
                    return self.breach(error.to_string(), None);
                }
            };
            if packet.bytes.is_empty() {
                // Hang-up, or an empty packet, which nobody has a use for. A dying worker's exit follows within microseconds; one that lives on
                // has lost its tie to this host.
                runtime.forget(self, Source::Socket);
                runtime.end_after(self, HANG_UP_GRACE, Some("it closed its control socket and lived on"));
                return;
            }
            if let Err(what) = self.take_message(&packet.bytes) {
                runtime.forget(self, Source::Socket);
                return self.breach(what, None);
            }
        }
    }

    fn take_message(&self, frame: &[u8]) -> Result<(), String> {
        let mut inbox = lock(&self.inbox);
        if !inbox.greeted {
            inbox.greeted = true;
            let checked = Hello::check(frame);
            inbox.hello = Some(checked.map(drop));
            self.inbox_changed.notify_all();
            return checked.map(drop).map_err(|mismatch| mismatch.to_string());
        }
        let (session, answer) = match control::decode::<ToHost>(frame).map_err(|bad| bad.to_string())? {
            ToHost::Opened { session, arena_address } => (session, Ok((arena_address, Placed::default()))),
            ToHost::Placed { session, arena_address, placed } => (session, Ok((arena_address, placed))),
            ToHost::Refused { session, reason } => {
                (session, Err(Refusal::Other(printable(reason.as_bytes()))))
            }
            ToHost::Scarce { session, what } => (session, Err(Refusal::Scarce(what))),
            ToHost::Unplaced { session, failure } => (session, Err(Refusal::Placement(failure))),
        };
        match inbox.opening.get_mut(&session) {
            Some(waiting @ None) => *waiting = Some(answer),
            _ => return Err(format!("it answered for session {session}, which was not asked for")),
        }
        self.inbox_changed.notify_all();
        Ok(())
    }

    /// Captured output can be read, or its end has come.
    pub(crate) fn read_output(&self, runtime: &Runtime, source: Source) {
        if !self.read_piece(source, |event| self.tell(&event)) {
            runtime.forget(self, source);
        }
    }

    /// Reads one piece of output, and has `tell` told of it if anybody listens. False at its end.
    // Not inlined: its buffer would be part of the frame of whoever collects a worker, and the pages of that would be touched for a worker that has written nothing.
    #[inline(never)]
    fn read_piece(&self, source: Source, tell: impl FnOnce(WorkerEvent)) -> bool {
        let (fd, tail, dropped) = match source {
            Source::Stdout => (&self.stdout, &self.stdout_tail, &self.stdout_dropped),
            _ => (&self.stderr, &self.stderr_tail, &self.stderr_dropped),
        };
        let Some(fd) = fd else { return false };
        let mut buffer = [0u8; 32 << 10];
        // The tail is locked before the read: a caller who collects the worker reads too, and pieces stay in order.
        let mut tail = lock(tail);
        let Some(count) = monitor::read_some(fd, &mut buffer) else { return false };
        if count == 0 {
            return true;
        }
        let piece = &buffer[..count];
        tail.extend(piece);
        let excess = tail.len().saturating_sub(self.limits.output_bytes);
        tail.drain(..excess);
        dropped.fetch_add(excess as u64, Ordering::Relaxed);
        drop(tail);
        if !lock(&self.listeners).is_empty() {
            let piece = piece.to_vec();
            tell(if source == Source::Stdout {
                WorkerEvent::Stdout(piece)
            } else {
                WorkerEvent::Stderr(piece)
            });
        }
        true
    }

    /// What the pipes still hold at the end. Bounded: a process that the worker left behind may go on writing.
    fn drain_output(&self) {
        for source in [Source::Stdout, Source::Stderr] {
            let mut pipe_bytes_left = 1usize << 20;
            loop {
                let before = self.descriptor(source).map_or(0, |fd| waiting_bytes(fd));
                let hold = |event| lock(&self.untold).push(event);
                if before == 0 || pipe_bytes_left == 0 || !self.read_piece(source, hold) {
                    break;
                }
                pipe_bytes_left = pipe_bytes_left.saturating_sub(before);
            }
        }
    }
}

/// Whether a pipe has something to read, rather than only its end: 1 if so, for the bound above at most the size of one read.
fn waiting_bytes(fd: BorrowedFd<'_>) -> usize {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    let readable = fds.iter().filter_map(PollFd::revents).any(|ready| ready.contains(PollFlags::POLLIN));
    if polled.is_ok() && readable { 32 << 10 } else { 0 }
}

/// Untrusted bytes as text for a report: lossily decoded, and everything but the line feed escaped that could do more than print: control
/// characters, and marks that reorder or hide text.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for c in String::from_utf8_lossy(bytes).chars() {
        match c {
            '\n' | '"' | '\'' | '\\' => text.push(c),
            _ => text.extend(c.escape_debug()),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untrusted_text_is_escaped() {
        assert_eq!(printable(b"a\x1b[2Jb\xff\nc"), "a\\u{1b}[2Jb\u{fffd}\nc");
        assert_eq!(
            printable("\u{202e}gpj.exe\u{2028}\u{2066}".as_bytes()),
            "\\u{202e}gpj.exe\\u{2028}\\u{2066}"
        );
        assert_eq!(printable("C:\\x \"ß\" 'é'".as_bytes()), "C:\\x \"ß\" 'é'");
    }
}
