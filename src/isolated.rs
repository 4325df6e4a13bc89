//! `IsolatedProcess`: the short form. One worker, one session, one module, called by name.
//!
//! What runs at a moment is one *generation*: a worker, its session, and the functions resolved in it, published as a whole. Callers read it without a lock;
//! whoever starts or ends a process holds the `life` lock and replaces it as a whole. Nothing in one generation refers to another (workers are known by
//! pidfd, not by number or name), so no timer or late exit of an old process can touch a new one.

use crate::dynamic::{DynFunction, IntoArgs, Value};
use crate::error::{CallError, Error, FunctionName, LoadError, StartError};
use crate::events::{Emitter, Event, EventData, Exit, ListenerId};
use crate::monitor::lock;
use crate::session::{ModuleSource, Session};
use crate::signature::{self, SymbolDefinition};
use crate::worker::{Output, Worker, WorkerBuilder, WorkerEvent};
use crate::{Cause, CrashReport};
use arc_swap::ArcSwapOption;
use crossbeam_channel::Receiver;
use rustc_hash::FxHashMap;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What kind of module an [`IsolatedProcess`] loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Binding {
    /// A shared library with C functions. The default.
    #[default]
    Ffi,
}

/// What [`IsolatedProcess::call`] does when a call fails, for whatever reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ErrorMode {
    /// Gives the error. The default.
    #[default]
    Throw,
    /// Gives [`Value::Null`].
    Null,
    /// Emits [`Event::Error`] and gives [`Value::Null`].
    Event,
}

/// What an [`IsolatedProcess`] runs, and how. Every option but the module and its symbols has a default.
///
/// ```
/// use hotcell::{ErrorMode, IsolatedProcessConfig, Value};
/// use std::time::Duration;
/// # fn main() -> Result<(), hotcell::Error> {
/// let cell = IsolatedProcessConfig::new("libm.so.6", "double pow(double, double);")
///     .timeout(Duration::from_secs(2))
///     .on_error(ErrorMode::Null)
///     .start()?;
/// assert_eq!(cell.call("pow", (2, 10))?, Value::F64(1024.0));
/// assert_eq!(cell.call("sin", [1.0])?, Value::Null); // not declared
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct IsolatedProcessConfig {
    module: ModuleSource,
    symbols: String,
    binding: Binding,
    timeout: Option<Duration>,
    on_error: ErrorMode,
    debug: bool,
    pub(crate) worker: WorkerBuilder,
}

impl IsolatedProcessConfig {
    /// A module, and its functions: C prototypes separated by `;`, or a JSON object such as
    /// `{"add":{"args":["i32","i32"],"returns":"i32"}}`.
    pub fn new(module: impl Into<ModuleSource>, symbols: impl Into<String>) -> Self {
        Self {
            module: module.into(),
            symbols: symbols.into(),
            binding: Binding::default(),
            timeout: None,
            on_error: ErrorMode::default(),
            debug: false,
            worker: WorkerBuilder::default(),
        }
    }

    /// Default: [`Binding::Ffi`]. What kind of module it is.
    pub fn binding(mut self, binding: Binding) -> Self {
        self.binding = binding;
        self
    }

    /// Default: what [`IsolatedProcessConfig::worker`] says, else 30 s. Deadline of each call, of loading the module, and of each function's look-up. Zero is refused when the process is started.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Default: [`ErrorMode::Throw`]. What a failed call does.
    pub fn on_error(mut self, mode: ErrorMode) -> Self {
        self.on_error = mode;
        self
    }

    /// Default: off. Passes the process's output on to the host's own, instead of to [`Event::Stdout`] and [`Event::Stderr`], and writes a line to standard error
    /// for each start and end.
    pub fn debug(mut self, debug: bool) -> Self {
        self.debug = debug;
        self
    }

    /// Default: [`Worker::builder`]. Everything else about the process.
    pub fn worker(mut self, worker: WorkerBuilder) -> Self {
        self.worker = worker;
        self
    }

    /// Makes the isolated process and starts it.
    ///
    /// # Errors
    /// As [`IsolatedProcess::start`].
    pub fn start(self) -> Result<IsolatedProcess, Error> {
        let cell = IsolatedProcess::new(self)?;
        cell.launch()?;
        Ok(cell)
    }

    fn worker_builder(&self) -> WorkerBuilder {
        let mut builder = self.worker.clone();
        if let Some(timeout) = self.timeout {
            builder = builder.timeout(timeout);
        }
        if self.debug {
            builder = builder.stdout(Output::Inherit).stderr(Output::Inherit);
        }
        builder
    }
}

/// Makes an isolated process without starting it, so that listeners can be there before it is [launched](IsolatedProcess::launch).
///
/// # Errors
/// As [`IsolatedProcess::new`].
pub fn create_isolated_process(config: IsolatedProcessConfig) -> Result<IsolatedProcess, Error> {
    IsolatedProcess::new(config)
}

/// What runs now.
#[derive(Debug)]
struct Generation {
    // Before the session: the last handle to a session closes it politely only if its worker has other handles.
    worker: Worker,
    session: Session,
    functions: FxHashMap<String, DynFunction>,
}

/// One native module in a process of its own, called by name.
///
/// Any number of threads may call, restart and shut down the same `IsolatedProcess` (share it with `Arc` or by reference); the process serves calls one after
/// another. When the process dies, calls answer why, until somebody [restarts](IsolatedProcess::restart) it. Dropping it ends the process without waiting;
/// [`IsolatedProcess::shutdown`] is the polite way.
///
/// Results are untrusted input: they come from the isolated code.
///
/// ```
/// use hotcell::{CallError, Event, IsolatedProcess};
/// # fn main() -> Result<(), hotcell::Error> {
/// let cell = IsolatedProcess::start("libc.so.6", r#"{"labs":{"args":["i64"],"returns":"i64"},"abort":{}}"#)?;
/// cell.on(Event::Death, |report| eprintln!("{report}"));
/// let five: i32 = cell.call("labs", [-5])?.try_into()?;
/// assert_eq!(five, 5);
///
/// match cell.call("abort", ()) {
///     Err(CallError::Crashed(report)) => assert_eq!(report.signal(), Some(6)),
///     other => panic!("{other:?}"),
/// }
/// assert!(!cell.is_alive());
/// cell.restart()?;
/// assert!(cell.is_alive());
/// # Ok(()) }
/// ```
///
/// # Events
///
/// Handlers run on one thread of the library, `hotcell-events`, in the order in which things happened, shortly after they happened. They may call anything, this
/// process's own methods too, and block for as long as they like: only other handlers wait for them. When more than a thousand events wait for
/// them, pieces of output and results of calls are dropped; what is told once in a process's life never is. A handler that panics is caught, reported through `tracing`,
/// and stays registered. A handler that owns an `Arc` of its own `IsolatedProcess` keeps it alive for ever: give it a `Weak`.
#[derive(Debug)]
pub struct IsolatedProcess {
    config: IsolatedProcessConfig,
    symbols: Vec<SymbolDefinition>,
    current: ArcSwapOption<Generation>,
    emitter: Arc<Emitter>,
    /// Held while a process is started or ended. How many have been started.
    life: Mutex<u64>,
    /// The worker whose module is being loaded: whoever shuts down does not wait for that.
    loading: Mutex<Option<Worker>>,
    /// Callers of `shutdown` that have not got their way yet.
    stopping: AtomicUsize,
    /// The report of the last process that is not the current one.
    report: Mutex<Option<CrashReport>>,
}

impl IsolatedProcess {
    /// Starts a process, loads a module and resolves its functions, with the defaults. Symbols are written as for [`IsolatedProcessConfig::new`].
    ///
    /// # Errors
    /// [`LoadError::Signature`] inside if the symbols cannot be read, [`Error::Start`] if there is no process, another [`Error::Load`] if the module cannot be loaded: it is missing, has no such
    /// symbol, crashes or hangs in its constructors. Nothing is left behind. All of it ends within the start timeout and the call timeout.
    pub fn start(module: impl Into<ModuleSource>, symbols: impl Into<String>) -> Result<Self, Error> {
        IsolatedProcessConfig::new(module, symbols).start()
    }

    /// Makes an isolated process without starting it: see [`IsolatedProcess::launch`].
    ///
    /// # Errors
    /// [`LoadError::Signature`] inside if the symbols cannot be read.
    pub fn new(config: IsolatedProcessConfig) -> Result<Self, Error> {
        let Binding::Ffi = config.binding;
        let symbols = signature::parse_symbols(&config.symbols).map_err(|source| {
            let module = config.module.name.to_string_lossy().into();
            LoadError::Signature { module, source }
        })?;
        let emitter = Arc::<Emitter>::default();
        if config.debug {
            let module = config.module.name.clone();
            emitter.on(&[Event::Ready, Event::Death, Event::Error], false, true, move |data| {
                debug_line(&format!("{}: {data}", module.display()));
            });
        }
        Ok(Self {
            config,
            symbols,
            current: ArcSwapOption::empty(),
            emitter,
            life: Mutex::new(0),
            loading: Mutex::default(),
            stopping: AtomicUsize::new(0),
            report: Mutex::default(),
        })
    }

    /// Starts the process, unless it runs. One that has died is replaced, as by [`IsolatedProcess::restart`].
    ///
    /// # Errors
    /// As [`IsolatedProcess::start`]; [`StartError::Disposed`] or [`CallError::Disposed`] inside if somebody shuts down meanwhile.
    pub fn launch(&self) -> Result<(), Error> {
        let mut life = lock(&self.life);
        if self.is_alive() {
            return Ok(());
        }
        self.end_current();
        self.start_next(&mut life)
    }

    /// Ends the process, as [`IsolatedProcess::shutdown`] does, and starts another with the module loaded anew. Listeners stay. Returns when the old process
    /// is gone and the new one is ready.
    ///
    /// Calls that other threads make meanwhile reach the old process or the new one, or fail with [`CallError::NotRunning`], [`CallError::Closed`] or
    /// [`CallError::Disposed`]; none waits for the restart. [Handles](IsolatedProcess::function), [sessions](IsolatedProcess::session) and pointers of the old process are
    /// void.
    ///
    /// # Errors
    /// As [`IsolatedProcess::launch`]. Then no process runs, and another restart can be tried.
    pub fn restart(&self) -> Result<(), Error> {
        let mut life = lock(&self.life);
        self.end_current();
        self.start_next(&mut life)
    }

    /// Ends the process: closes its session, which lets calls in flight finish and runs the module's destructors, if both can be done within the
    /// [grace period](WorkerBuilder::grace); then `SIGTERM`, and `SIGKILL` after another grace period. Returns when it is gone.
    ///
    /// A process that is still loading its module is ended at once. Shutting down again does nothing. Any thread may call it, a handler too.
    pub fn shutdown(&self) {
        self.stopping.fetch_add(1, SeqCst);
        let loading = lock(&self.loading).clone();
        if let Some(worker) = loading {
            worker.dispose();
        }
        let life = lock(&self.life);
        self.end_current();
        // Before the lock is free: whoever gets it next starts after this.
        self.stopping.fetch_sub(1, SeqCst);
        drop(life);
    }

    /// Calls a function by its declared name and waits for its result. The hot path takes no lock and allocates nothing.
    ///
    /// # Errors
    /// Under [`ErrorMode::Throw`]: see [`CallError`]; among them [`CallError::Undeclared`], [`CallError::NotRunning`], and after a crash [`CallError::Crashed`] until the
    /// next restart. Under the other modes there are none.
    #[inline]
    pub fn call<'a>(&self, name: &str, args: impl IntoArgs<'a>) -> Result<Value, CallError> {
        let result = match &*self.current.load() {
            Some(generation) => match generation.functions.get(name) {
                Some(function) => function.call(args),
                None => Err(CallError::Undeclared(self.function_name(name))),
            },
            None => Err(CallError::NotRunning { function: self.function_name(name) }),
        };
        if result.is_ok() && !self.emitter.wants(Event::Exit) {
            return result;
        }
        self.settle(result)
    }

    /// What becomes of a failed call, and of any call while somebody listens to results.
    #[cold]
    fn settle(&self, result: Result<Value, CallError>) -> Result<Value, CallError> {
        let exit = self.emitter.wants(Event::Exit).then(|| match &result {
            Ok(value) => Exit::Success(value.clone()),
            Err(error) => Exit::Error(error.to_string()),
        });
        let settled = match (result, self.config.on_error) {
            (Err(error), ErrorMode::Null) => {
                tracing::debug!(%error, "a call failed");
                Ok(Value::Null)
            }
            (Err(error), ErrorMode::Event) => {
                let error = Arc::new(error);
                if !self.emitter.emit(EventData::Error(Arc::clone(&error))) {
                    tracing::warn!(%error, "a call failed, and nobody listens to errors");
                }
                Ok(Value::Null)
            }
            (result, _) => result,
        };
        if let Some(exit) = exit {
            self.emitter.emit(EventData::Exit(exit));
        }
        settled
    }

    /// A function of the current process, to call without the look-up and with options of its own. It answers [`CallError::Disposed`] or [`CallError::Crashed`] after that process's end:
    /// get it anew after a restart. Error modes and [`Event::Exit`] do not apply to it.
    ///
    /// # Errors
    /// [`CallError::Undeclared`], [`CallError::NotRunning`].
    pub fn function(&self, name: &str) -> Result<DynFunction, CallError> {
        let current = self.current.load();
        let Some(generation) = &*current else {
            return Err(CallError::NotRunning { function: self.function_name(name) });
        };
        let found = generation.functions.get(name).cloned();
        found.ok_or_else(|| CallError::Undeclared(self.function_name(name)))
    }

    /// The current process's session, for memory, blocks and further modules. It ends with that process.
    pub fn session(&self) -> Option<Session> {
        self.current.load().as_ref().map(|generation| generation.session.clone())
    }

    /// Whether the process runs with its module loaded, as far as the host knows now. It may end at any moment.
    pub fn is_alive(&self) -> bool {
        self.current.load().as_ref().is_some_and(|generation| generation.worker.is_alive())
    }

    /// The process id, while the process is [alive](IsolatedProcess::is_alive).
    pub fn pid(&self) -> Option<u32> {
        let current = self.current.load();
        current.as_ref().filter(|generation| generation.worker.is_alive()).map(|g| g.worker.pid())
    }

    /// The report of the process that ended last, however it ended: one that was shut down has [`Cause::Disposed`]. `None` while the first one lives.
    pub fn last_report(&self) -> Option<CrashReport> {
        let current = self.current.load().as_ref().and_then(|generation| generation.worker.crash_report());
        current.or_else(|| lock(&self.report).clone())
    }

    /// Runs `handler` at each such event from now on, on the thread `hotcell-events`.
    pub fn on(&self, event: Event, handler: impl FnMut(&EventData) + Send + 'static) -> ListenerId {
        self.emitter.on(&[event], false, false, handler)
    }

    /// Runs `handler` at the next such event, and then no more.
    pub fn once(&self, event: Event, handler: impl FnMut(&EventData) + Send + 'static) -> ListenerId {
        self.emitter.on(&[event], true, false, handler)
    }

    /// Takes a handler back. False if it was not there any more. It is not started again; on another thread than that of the events it may be running still.
    pub fn off(&self, listener: ListenerId) -> bool {
        self.emitter.off(listener)
    }

    /// Tells listeners of an event that the host makes up, behind those that happened before. False if nobody listens.
    pub fn emit(&self, data: EventData) -> bool {
        self.emitter.emit(data)
    }

    /// Takes back all handlers and closes all receivers of one event, or of all.
    pub fn remove_all_listeners(&self, event: Option<Event>) {
        self.emitter.remove_all(event);
    }

    /// A channel of the given kinds of events from now on; it needs no handler and does not wait for any. Frequent events are dropped while a thousand wait in it.
    /// It is disconnected when this `IsolatedProcess` has been dropped and its process has ended.
    ///
    /// ```
    /// use hotcell::{Event, EventData, IsolatedProcess};
    /// # fn main() -> Result<(), hotcell::Error> {
    /// let cell = IsolatedProcess::start("libc.so.6", "int puts(const char *text); int fflush(void *stream);")?;
    /// let output = cell.receiver(&[Event::Stdout]);
    /// cell.call("puts", ["hello"])?;
    /// cell.call("fflush", [None::<&str>])?;
    /// assert_eq!(output.recv().unwrap().to_string(), "hello\n");
    /// # Ok(()) }
    /// ```
    pub fn receiver(&self, events: &[Event]) -> Receiver<EventData> {
        self.emitter.receiver(events)
    }

    fn function_name(&self, name: &str) -> FunctionName {
        let module = self.config.module.name.to_string_lossy().into();
        FunctionName { module, symbol: name.into() }
    }

    // With the life lock held.

    fn end_current(&self) {
        if let Some(generation) = self.current.swap(None) {
            self.end(&generation.worker, &generation.session);
        }
    }

    fn end(&self, worker: &Worker, session: &Session) {
        if worker.is_alive() {
            if self.config.debug {
                debug_line(&format!("{}: ending worker {}", self.config.module.name.display(), worker.pid()));
            }
            if !session.inner().close_within(worker.owner.inner.grace()) {
                tracing::debug!(
                    pid = worker.pid(),
                    "the session could not be closed within the grace period"
                );
            }
        }
        self.dispose(worker);
    }

    fn dispose(&self, worker: &Worker) {
        worker.dispose();
        *lock(&self.report) = worker.crash_report();
    }

    fn start_next(&self, started: &mut u64) -> Result<(), Error> {
        let worker = self.config.worker_builder().spawn()?;
        *started += 1;
        self.listen(&worker, *started);
        *lock(&self.loading) = Some(worker.clone());
        // Whoever shuts down either has seen the worker in `loading`, or is seen here.
        let loaded = match self.stopping.load(SeqCst) {
            0 => self.load(worker.clone()),
            _ => Err(StartError::Disposed.into()),
        };
        *lock(&self.loading) = None;
        match loaded {
            Ok(generation) => {
                self.current.store(Some(Arc::new(generation)));
                self.emitter.ready(*started, worker.pid());
                Ok(())
            }
            Err(error) => {
                self.dispose(&worker);
                Err(error)
            }
        }
    }

    fn load(&self, worker: Worker) -> Result<Generation, Error> {
        let session = worker.session()?;
        match self.resolve(&session) {
            Ok(functions) => Ok(Generation { worker, session, functions }),
            Err(error) => {
                // While the session is held: what dropping it does has no grace period.
                self.end(&worker, &session);
                Err(error.into())
            }
        }
    }

    fn resolve(&self, session: &Session) -> Result<FxHashMap<String, DynFunction>, LoadError> {
        let module = session.load(self.config.module.clone())?;
        let resolve = |SymbolDefinition { name, symbol, signature }: &SymbolDefinition| {
            Ok((name.clone(), module.dynamic(symbol, signature.clone())?))
        };
        self.symbols.iter().map(resolve).collect()
    }

    /// Passes the worker's events on. What runs on the monitor's thread here only fills queues.
    fn listen(&self, worker: &Worker, number: u64) {
        let mut emitter = Some(Arc::clone(&self.emitter));
        worker.owner.inner.listen(move |event| {
            let Some(to) = &emitter else { return false };
            match event {
                WorkerEvent::Stdout(piece) if to.wants(Event::Stdout) => {
                    to.emit(EventData::Stdout(piece.clone()));
                }
                WorkerEvent::Stderr(piece) if to.wants(Event::Stderr) => {
                    to.emit(EventData::Stderr(piece.clone()));
                }
                WorkerEvent::Stdout(_) | WorkerEvent::Stderr(_) => {}
                WorkerEvent::Ended(report) => {
                    to.ended(number, Some(report).filter(|report| *report.cause() != Cause::Disposed));
                    if let Some(emitter) = emitter.take() {
                        emitter.release();
                    }
                }
            }
            emitter.is_some()
        });
    }
}

impl Drop for IsolatedProcess {
    fn drop(&mut self) {
        if let Some(generation) = self.current.swap(None) {
            generation.worker.owner.inner.begin_dispose();
        }
    }
}

/// Like `eprintln`, but a closed standard error is no reason to panic.
fn debug_line(text: &str) {
    let _ = writeln!(std::io::stderr(), "hotcell: {text}");
}
