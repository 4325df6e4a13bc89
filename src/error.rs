//! The public errors. Each says what happened, to which function of which module, whether the function may have run, and what to do.

use crate::crash::CrashReport;
use crate::limits::Scarce;
use crate::signature::SignatureError;
use hotcell_channel::signature::Type;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

pub use hotcell_channel::control::Mismatch;

/// What stands for the symbol where a module was being loaded.
pub(crate) const LOAD: &str = "(load)";

/// A function of a module, as errors and reports name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FunctionName {
    /// The module as it was loaded: a path or a soname.
    pub module: Arc<str>,
    /// The symbol; `(load)` where the module was being loaded.
    pub symbol: Arc<str>,
}

impl std::fmt::Display for FunctionName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &*self.symbol {
            LOAD => write!(f, "the load of {}", self.module),
            symbol => write!(f, "{symbol} of {}", self.module),
        }
    }
}

/// Why no worker, or no session in it, could be started.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// The worker's program could not be started at all.
    #[error("the worker program {} cannot be started: {source}", .program.display())]
    Program {
        /// The program.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// This library is not part of the running executable (it was loaded into it, by Python for instance), so starting the executable again would not make a
    /// worker but run its `main`.
    #[error(
        "hotcell was loaded into {}, which is not a hotcell program, so it cannot be started again as a worker: \
         install the program hotcell-worker and name its path in Worker::builder().program(..) or in the \
         environment variable HOTCELL_WORKER", .executable.display()
    )]
    ForeignExecutable {
        /// The running executable.
        executable: PathBuf,
    },
    /// The feature `self-exec` is off and no program is named.
    #[error(
        "no worker program is named and the feature self-exec is off: name the path of hotcell-worker in \
         Worker::builder().program(..) or in the environment variable HOTCELL_WORKER"
    )]
    NoProgram,
    /// The worker speaks another version or layout, or is no hotcell worker.
    #[error("the worker program {} does not fit this host: {mismatch}", .program.display())]
    Mismatch {
        /// The program.
        program: PathBuf,
        /// What does not fit.
        mismatch: Mismatch,
    },
    /// The worker was not ready, or had not opened the session, within the [start timeout](crate::WorkerBuilder::start_timeout), and was killed.
    #[error(
        "the worker program {} was not ready, or had not opened its session, within {after:?} and was killed: \
         see WorkerBuilder::start_timeout", .program.display()
    )]
    TimedOut {
        /// The program.
        program: PathBuf,
        /// The start timeout.
        after: Duration,
    },
    /// The worker ended before it, or the session, was ready.
    #[error("the worker has ended: {0}")]
    Died(Box<CrashReport>),
    /// The worker could not open the session.
    #[error("the worker refused the session: {reason}")]
    Refused {
        /// The worker's reason; untrusted text, bounded.
        reason: String,
    },
    /// The worker was disposed, or the [`Supervisor`](crate::Supervisor) or [`Pool`](crate::Pool) that keeps it.
    #[error("the worker was disposed of, or the supervisor or pool that keeps it")]
    Disposed,
    /// The operating system refused something that a worker or session needs.
    #[error("{what} failed: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// A configured value is out of its range.
    #[error("{option} is {given}, but must be {expected}")]
    Configuration {
        /// The option.
        option: &'static str,
        /// The given value.
        given: String,
        /// Its range.
        expected: &'static str,
    },
    /// A limit that was asked for cannot be enforced here.
    #[error("{option} cannot be enforced: {reason}")]
    LimitUnavailable {
        /// The option.
        option: &'static str,
        /// Why not, and what to do.
        reason: String,
    },
    /// The worker has no room for the session because of one of its limits.
    #[error("the worker has no {what} left for the session within its limit: see WorkerBuilder::{}", .what.option())]
    Scarce {
        /// What there is not enough of.
        what: Scarce,
    },
    /// A limit of a [`Supervisor`](crate::Supervisor)'s sessions is reached. Nothing was started.
    #[error("{scope} has no place for another session: {} open, the limit is {max}{}", sessions(*.open), waited_for(*.waited))]
    SessionLimit {
        /// Whose limit it is.
        scope: LimitScope,
        /// How many sessions are open under it.
        open: u32,
        /// The limit.
        max: u32,
        /// How long the request waited for a place; `None` if it was not to wait.
        waited: Option<Duration>,
    },
    /// Somebody else was starting the worker, and had not finished when this request had waited as long as it may.
    #[error(
        "the worker is being started by another request, which has not finished after {after:?}: see SupervisorBuilder::start_patience"
    )]
    StillStarting {
        /// How long this request waited.
        after: Duration,
    },
    /// The worker has ended several times, and the next start is held back for longer than this request may wait.
    #[error("the worker is not started again before {retry_after:?} have passed; it was gone because {last}")]
    BackingOff {
        /// When it may be started again.
        until: Instant,
        /// How long that was away when the request was refused.
        retry_after: Duration,
        /// Why there is no worker.
        last: Arc<StartError>,
    },
    /// The worker has ended more often than its [`RestartPolicy`](crate::RestartPolicy) allows, and is not started for a while.
    #[error(
        "the worker has ended more than {} within {within:?} and is not started again before {retry_after:?} have passed; the last time: {last}",
        times(*.restarts_max)
    )]
    CircuitOpen {
        /// When it may be started again.
        until: Instant,
        /// How long that was away when the request was refused.
        retry_after: Duration,
        /// How many restarts there may be in the window.
        restarts_max: u32,
        /// The window.
        within: Duration,
        /// Why there is no worker.
        last: Arc<StartError>,
    },
    /// The worker could not be started, and [`Restart::Never`](crate::Restart::Never) allows no second try.
    #[error("the worker could not be started, and its policy allows no second try: {last}")]
    NotRestarted {
        /// Why it could not be started.
        last: Arc<StartError>,
    },
    /// The host's own hook that prepares each worker, or each session, has failed. What it was to prepare was ended.
    #[error("the hook {hook} has failed: {source}")]
    Hook {
        /// Which hook.
        hook: &'static str,
        /// What it said.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The kernel refused what a placement option of [`SessionBuilder`](crate::SessionBuilder) asks for. The session was not opened.
    #[error("{option} cannot be {given} in {place}: {source}; {advice}")]
    Placement {
        /// The option.
        option: &'static str,
        /// The given value.
        given: String,
        /// Which of the two processes was refused.
        place: &'static str,
        /// What the kernel said; for the worker, what it says that the kernel said.
        #[source]
        source: Arc<io::Error>,
        /// What to do about it.
        advice: &'static str,
    },
    /// A [`Pool`](crate::Pool) does not have all its workers and standbys.
    #[error("the pool still lacks {} after {after:?}", workers(*.missing))]
    Incomplete {
        /// How many are missing.
        missing: usize,
        /// How long they were waited for.
        after: Duration,
    },
    /// This process is a fork of the one that uses hotcell. Its workers belong to the original.
    #[error("this process is a fork of the one that uses hotcell: it can use hotcell again after exec")]
    Forked,
}

/// Whose limit of sessions it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LimitScope {
    /// Each worker's.
    Worker,
    /// Each tenant's; this one's is reached.
    Tenant(Arc<str>),
    /// The supervisor's.
    Supervisor,
}

impl std::fmt::Display for LimitScope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LimitScope::Worker => f.write_str("the worker"),
            LimitScope::Tenant(tenant) => write!(f, "tenant {tenant:?}"),
            LimitScope::Supervisor => f.write_str("the supervisor"),
        }
    }
}

fn sessions(open: u32) -> String {
    if open == 1 { "1 session is".to_owned() } else { format!("{open} sessions are") }
}

fn last_of(reports: &[CrashReport]) -> String {
    reports.last().map_or_else(String::new, |report| report.headline())
}

fn workers(count: usize) -> String {
    if count == 1 { "1 worker".to_owned() } else { format!("{count} workers") }
}

fn why_missing(detail: &str) -> String {
    if detail.is_empty() {
        " (nm -D lists those that a module has)".to_owned()
    } else {
        format!(": {detail}")
    }
}

fn times(count: u32) -> String {
    if count == 1 { "once".to_owned() } else { format!("{count} times") }
}

fn waited_for(waited: Option<Duration>) -> String {
    waited.map_or_else(String::new, |waited| format!(", and none was closed within {waited:?}"))
}

impl StartError {
    pub(crate) fn system(
        what: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        StartError::System { what, source: source.into().into() }
    }

    /// A stable name for programs: see [`CallError::code`].
    pub fn code(&self) -> &'static str {
        match self {
            StartError::Program { .. } => "ERR_WORKER_PROGRAM",
            StartError::ForeignExecutable { .. } => "ERR_FOREIGN_EXECUTABLE",
            StartError::NoProgram => "ERR_NO_WORKER_PROGRAM",
            StartError::Mismatch { .. } => "ERR_WORKER_MISMATCH",
            StartError::TimedOut { .. } => "ERR_START_TIMEOUT",
            StartError::Died(_) => "ERR_WORKER_CRASH",
            StartError::Refused { .. } => "ERR_SESSION_REFUSED",
            StartError::Disposed => "ERR_WORKER_DISPOSED",
            StartError::System { .. } => "ERR_SYSTEM",
            StartError::Configuration { .. } => "ERR_CONFIGURATION",
            StartError::LimitUnavailable { .. } => "ERR_LIMIT_UNAVAILABLE",
            StartError::Scarce { what: Scarce::OpenFiles } => "ERR_OPEN_FILES_EXCEEDED",
            StartError::Scarce { what: Scarce::Processes } => "ERR_PROCESSES_EXCEEDED",
            StartError::Placement { .. } => "ERR_PLACEMENT",
            StartError::SessionLimit { .. } => "ERR_SESSION_LIMIT",
            StartError::StillStarting { .. } => "ERR_STILL_STARTING",
            StartError::BackingOff { .. } => "ERR_BACKING_OFF",
            StartError::CircuitOpen { .. } => "ERR_CIRCUIT_OPEN",
            StartError::NotRestarted { last } => last.code(),
            StartError::Hook { .. } => "ERR_HOOK",
            StartError::Incomplete { .. } => "ERR_NO_WORKER",
            StartError::Forked => "ERR_FORKED",
        }
    }
}

/// Why a module could not be loaded, or a function of it not be resolved.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// No such file, or a name that the dynamic linker does not find.
    #[error("module {module} was not found: {detail}")]
    NotFound {
        /// The module.
        module: Arc<str>,
        /// The system's words; untrusted text.
        detail: String,
    },
    /// The file cannot be read.
    #[error("module {module} cannot be read: {detail}")]
    Unreadable {
        /// The module.
        module: Arc<str>,
        /// The system's words; untrusted text.
        detail: String,
    },
    /// The file is not an ELF object.
    #[error("module {module} is not an ELF shared object: {detail}")]
    NotElf {
        /// The module.
        module: Arc<str>,
        /// What it is; untrusted text.
        detail: String,
    },
    /// An ELF object for another machine, or not a shared object.
    #[error("module {module} is not a shared object for this machine: {detail}")]
    WrongKind {
        /// The module.
        module: Arc<str>,
        /// What was found and expected; untrusted text.
        detail: String,
    },
    /// A library that the module needs was not found.
    #[error("module {module} needs a library that was not found: {detail}")]
    MissingDependency {
        /// The module.
        module: Arc<str>,
        /// The dynamic linker's words; untrusted text.
        detail: String,
    },
    /// A symbol that the module needs from elsewhere was not found.
    #[error("module {module} needs a symbol that no loaded library has: {detail}")]
    MissingImport {
        /// The module.
        module: Arc<str>,
        /// The dynamic linker's words; untrusted text.
        detail: String,
    },
    /// The dynamic linker refused the module for another reason.
    #[error("module {module} cannot be loaded: {detail}")]
    Linker {
        /// The module.
        module: Arc<str>,
        /// The dynamic linker's words; untrusted text.
        detail: String,
    },
    /// The module has no such symbol.
    #[error("there is no symbol {function}{}", why_missing(.detail))]
    MissingSymbol {
        /// The function asked for.
        function: FunctionName,
        /// What else is known, if anything; untrusted text.
        detail: String,
    },
    /// The function cannot be called with this signature.
    #[error("{function} cannot be called as declared: {detail}")]
    BadSignature {
        /// The function asked for.
        function: FunctionName,
        /// What is wrong.
        detail: String,
    },
    /// The signature's text is wrong.
    #[error("the signatures for module {module} cannot be read: {source}")]
    Signature {
        /// The module.
        module: Arc<str>,
        /// What is wrong, and where.
        #[source]
        source: SignatureError,
    },
    /// The session has as many functions as it can have.
    #[error("{function} is one function too many for its session: {detail}")]
    TooManyFunctions {
        /// The function asked for.
        function: FunctionName,
        /// How many there are.
        detail: String,
    },
    /// The module has crashed its worker so often that the [`Supervisor`](crate::Supervisor) loads it no more, until it is [released](crate::Supervisor::release).
    #[error("module {module} is in quarantine: it has ended {}, the last of them: {}; Supervisor::release lets it out", workers(.reports.len()), last_of(.reports))]
    Quarantined {
        /// The module.
        module: Arc<str>,
        /// The last crashes, the oldest first.
        reports: Vec<CrashReport>,
    },
    /// The worker has as many descriptors open as it may have: see [`WorkerBuilder::open_files_max`](crate::WorkerBuilder::open_files_max).
    #[error(
        "module {module} cannot be opened, since the worker has as many files open as it may (WorkerBuilder::open_files_max): {detail}"
    )]
    OpenFilesExceeded {
        /// The module.
        module: Arc<str>,
        /// The system's words; untrusted text.
        detail: String,
    },
    /// The request itself failed: the module crashed or hung its worker while it was loaded, or the worker was gone before.
    #[error("module {module} could not be loaded, or a function of it not be found: {source}")]
    Call {
        /// The module.
        module: Arc<str>,
        /// What happened.
        #[source]
        source: CallError,
    },
}

impl LoadError {
    /// A stable name for programs: see [`CallError::code`].
    pub fn code(&self) -> &'static str {
        match self {
            LoadError::NotFound { .. } => "ERR_MODULE_NOT_FOUND",
            LoadError::Unreadable { .. } => "ERR_MODULE_UNREADABLE",
            LoadError::NotElf { .. } => "ERR_MODULE_NOT_ELF",
            LoadError::WrongKind { .. } => "ERR_MODULE_WRONG_KIND",
            LoadError::MissingDependency { .. } => "ERR_MISSING_DEPENDENCY",
            LoadError::MissingImport { .. } => "ERR_MISSING_IMPORT",
            LoadError::Linker { .. } => "ERR_LINKER",
            LoadError::MissingSymbol { .. } => "ERR_MISSING_SYMBOL",
            LoadError::BadSignature { .. } => "ERR_BAD_SIGNATURE",
            LoadError::Signature { .. } => "ERR_SIGNATURE_TEXT",
            LoadError::TooManyFunctions { .. } => "ERR_TOO_MANY_FUNCTIONS",
            LoadError::OpenFilesExceeded { .. } => "ERR_OPEN_FILES_EXCEEDED",
            LoadError::Quarantined { .. } => "ERR_MODULE_QUARANTINED",
            LoadError::Call { source, .. } => source.code(),
        }
    }
}

/// Why a call gave no result.
///
/// Two questions are answered in code: [`may_have_run`](CallError::may_have_run) and
/// [`session_usable`](CallError::session_usable).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CallError {
    /// The worker died. The report says why, and what this call had to do with it.
    #[error("{0}")]
    Crashed(Box<CrashReport>),
    /// This call used more CPU time than it may, or was running when its session or worker did; the worker has ended. Other calls in flight have
    /// [`CallError::Crashed`] with the same report.
    #[error("{0}")]
    CpuTimeExceeded(Box<CrashReport>),
    /// This call asked for more memory than there may be; the worker has ended. So may a call have that was running when the kernel ended a worker for its memory and did not tell
    /// on whose account. Other calls in flight have [`CallError::Crashed`] with the same report.
    #[error("{0}")]
    MemoryExceeded(Box<CrashReport>),
    /// The session's memory limit refused an allocation while this call ran. The code has lived through that, and the session goes on; the call's result is not given,
    /// because it is that of code which did not get what it needed.
    #[error(
        "{function} asked for {asked} bytes when {used} of the {bytes_max} of its session were in use: \
         see SessionBuilder::memory_bytes_max"
    )]
    SessionMemoryExceeded {
        /// The call.
        function: FunctionName,
        /// How many bytes were asked for when the limit was last exceeded. The worker's word.
        asked: u64,
        /// How many bytes were in use then. The worker's word.
        used: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// This call wrote a file beyond the limit; the worker has ended. Other calls in flight have [`CallError::Crashed`] with the same report.
    #[error("{0}")]
    FileSizeExceeded(Box<CrashReport>),
    /// The worker was disposed while the call was in flight or waiting.
    #[error("{0}")]
    Disposed(Box<CrashReport>),
    /// The deadline passed. The worker was killed, or the session given up, as configured.
    #[error("{function} did not return within {after:?}{}", if *.worker_killed { "; its worker was killed" } else { "; its session is given up until it does" })]
    TimedOut {
        /// The function.
        function: FunctionName,
        /// The timeout.
        after: Duration,
        /// Whether the worker was killed, rather than the session given up.
        worker_killed: bool,
    },
    /// An earlier call on this session passed its deadline and still runs. The session can be used again when it returns.
    #[error("the session is given up until {function} returns, which passed its deadline and still runs")]
    Abandoned {
        /// The function that still runs.
        function: FunctionName,
    },
    /// A function was given a timeout of zero, in which no call can be answered. Nothing was sent.
    #[error("{function} was given a timeout of zero, in which no call can be answered: give it more time")]
    ZeroTimeout {
        /// The function.
        function: FunctionName,
    },
    /// All slots are taken by calls that have not been waited for.
    #[error(
        "all {slots} slots of the session are in use by calls that were not waited for: take some of their results first"
    )]
    Full {
        /// How many slots there are.
        slots: u32,
    },
    /// The session has a memory limit, which is told call by call; a pipeline's replies have no room for that. `call` and `submit` do.
    #[error("{function} cannot have a pipeline in a session with a memory limit: call or submit it")]
    PipelineUnsupported {
        /// The function.
        function: FunctionName,
    },
    /// Another pipeline of the session was in use for as long as this one's function may take.
    #[error(
        "a pipeline for {function} waited {after:?} for another one of the session, which is still in use{}",
        if *.by_this_thread { ": this thread has taken it, and has to drop it first; a second session has a pipeline of its own" } else { "" }
    )]
    PipelineTaken {
        /// The function.
        function: FunctionName,
        /// How long it waited.
        after: Duration,
        /// Whether the other one was taken by the thread that waited for it, which then waits in vain unless it has moved that to another thread.
        by_this_thread: bool,
    },
    /// An argument or result is larger than the payload limit. Nothing was allocated or sent.
    #[error(
        "{function} was given {bytes} bytes where the payload limit is {max}: see SessionBuilder::payload_bytes_max"
    )]
    TooLarge {
        /// The function.
        function: FunctionName,
        /// Size of the largest argument.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The session's arena has no room now: too much is in flight, or kept in blocks.
    #[error(
        "the session has no room now for the bytes of {function}: {source}; wait for calls in flight, or drop blocks"
    )]
    NoRoom {
        /// The function.
        function: FunctionName,
        /// What the arena said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A call by name has the wrong number of arguments.
    #[error("{function} takes {expected} arguments, {given} were given")]
    WrongCount {
        /// The function.
        function: FunctionName,
        /// How many it takes.
        expected: usize,
        /// How many were given.
        given: usize,
    },
    /// A call by name has an argument of the wrong kind, or out of its type's range.
    #[error("argument {index} of {function} is {given}, expected {expected}")]
    WrongArgument {
        /// The function.
        function: FunctionName,
        /// Which argument, counted from 1.
        index: usize,
        /// The declared type.
        expected: Type,
        /// What was given.
        given: String,
    },
    /// A result by name was asked for as a type that it does not have.
    #[error("the result is {given}, not {expected}")]
    WrongResult {
        /// The type asked for.
        expected: &'static str,
        /// What it is.
        given: String,
    },
    /// The module has no function declared by this name.
    #[error("{0} is not declared: add it to the symbols")]
    Undeclared(FunctionName),
    /// An [`IsolatedProcess`](crate::IsolatedProcess) has no process now: it was not launched yet, was shut down, could not be restarted, or is being
    /// restarted by somebody else at this moment.
    #[error("no process is running that could call {function}: launch or restart it")]
    NotRunning {
        /// The function.
        function: FunctionName,
    },
    /// A [`Pool`](crate::Pool) has no worker now, and the call did not wait longer for one.
    #[error("no worker of the pool could serve {function} within {waited:?}{}", match .source { Some(source) => format!(": {source}"), None => String::new() })]
    NoWorker {
        /// The function.
        function: FunctionName,
        /// How long the call waited for one.
        waited: Duration,
        /// Why the last one ended or could not be started; [`StartError::CircuitOpen`] says until when none is started.
        #[source]
        source: Option<Arc<StartError>>,
    },
    /// The function takes a callback. Declaring it is possible, calling it is not yet.
    #[error("{function} takes a callback, and calling such a function is not yet supported")]
    CallbackUnsupported {
        /// The function.
        function: FunctionName,
    },
    /// A pointer or block of another session was passed.
    #[error(
        "{function} was given a pointer or block that belongs to another session, where it means nothing"
    )]
    ForeignPointer {
        /// The function.
        function: FunctionName,
    },
    /// A string with a NUL byte inside cannot be passed as a C string.
    #[error("{} of {function} has a NUL byte inside", if *.index == 0 { "a string argument".to_owned() } else { format!("argument {index}") })]
    InteriorNul {
        /// The function.
        function: FunctionName,
        /// Which argument, counted from 1; 0 if unknown.
        index: usize,
    },
    /// The function returned a null pointer where a string was expected.
    #[error("{function} returned a null pointer, not a string: declare a Nullable<CString> if it may")]
    NullString {
        /// The function.
        function: FunctionName,
    },
    /// A returned string is longer than the limit.
    #[error("{function} gave a string longer than {max} bytes")]
    StringTooLong {
        /// The function.
        function: FunctionName,
        /// The limit.
        max: u64,
    },
    /// The function returned a string of 1024 bytes or more, which is fetched after the call, and that failed.
    #[error("{function} returned, but its long string could not be fetched: {source}")]
    StringLost {
        /// The function.
        function: FunctionName,
        /// Why not.
        #[source]
        source: Box<CallError>,
    },
    /// Worker memory is not accessible at this address. The worker is unharmed.
    #[error("{bytes} bytes at {address:#x} in the worker are not accessible")]
    BadAddress {
        /// Where.
        address: u64,
        /// How many.
        bytes: u64,
    },
    /// The address is not one that `alloc` of this session gave.
    #[error("{address:#x} is not a block that this session allocated")]
    UnknownBlock {
        /// The address.
        address: u64,
    },
    /// The worker has no memory for the block.
    #[error("the worker has no memory for {bytes} bytes")]
    OutOfMemory {
        /// How many.
        bytes: u64,
    },
    /// The session has as many blocks as it may have: see [`SessionBuilder::remote_blocks_max`](crate::SessionBuilder::remote_blocks_max).
    #[error(
        "the session has {max} blocks that were not freed, and may have no more: see SessionBuilder::remote_blocks_max"
    )]
    TooManyBlocks {
        /// The limit.
        max: u64,
    },
    /// The [`Pool`](crate::Pool) was disposed of. Nothing was sent.
    #[error("{function} cannot be called any more: its pool was disposed of; build another one")]
    PoolDisposed {
        /// The function.
        function: FunctionName,
    },
    /// The session was closed.
    #[error("the session is closed: open another one")]
    Closed,
    /// This process is a fork of the one that opened the session.
    #[error("this process is a fork of the one that opened the session, which alone can use it")]
    Forked,
}

impl CallError {
    /// Whether the function may have run, in part or in whole. A call for which this is false can be repeated elsewhere without harm.
    pub fn may_have_run(&self) -> bool {
        match self {
            CallError::Crashed(report)
            | CallError::CpuTimeExceeded(report)
            | CallError::MemoryExceeded(report)
            | CallError::FileSizeExceeded(report)
            | CallError::Disposed(report) => report.involvement().may_have_run(),
            CallError::TimedOut { .. }
            | CallError::SessionMemoryExceeded { .. }
            | CallError::NullString { .. }
            | CallError::StringTooLong { .. }
            | CallError::StringLost { .. } => true,
            _ => false,
        }
    }

    /// Whether the session can take further calls (now, or for [`CallError::Abandoned`] later).
    pub fn session_usable(&self) -> bool {
        match self {
            CallError::TimedOut { worker_killed, .. } => !worker_killed,
            CallError::StringLost { source, .. } => source.session_usable(),
            CallError::Crashed(_)
            | CallError::CpuTimeExceeded(_)
            | CallError::MemoryExceeded(_)
            | CallError::FileSizeExceeded(_)
            | CallError::Disposed(_)
            | CallError::Closed
            | CallError::Forked => false,
            CallError::NotRunning { .. } | CallError::NoWorker { .. } | CallError::PoolDisposed { .. } => {
                false
            }
            _ => true,
        }
    }

    /// The report, if the worker died.
    pub fn crash_report(&self) -> Option<&CrashReport> {
        match self {
            CallError::Crashed(report)
            | CallError::CpuTimeExceeded(report)
            | CallError::MemoryExceeded(report)
            | CallError::FileSizeExceeded(report)
            | CallError::Disposed(report) => Some(report),
            _ => None,
        }
    }

    /// A stable name of what went wrong, for programs and logs; the words of an error may change, its code does not. What caused an error decides the code where one
    /// error wraps another.
    ///
    /// | code | what | errors |
    /// |---|---|---|
    /// | `ERR_WORKER_CRASH` | the worker died: by a signal, an exit, another call's doing | [`CallError::Crashed`], [`StartError::Died`] |
    /// | `ERR_WORKER_DISPOSED` | it was disposed | [`CallError::Disposed`], [`StartError::Disposed`] |
    /// | `ERR_CPU_TIME_EXCEEDED` | more CPU time than allowed | [`CallError::CpuTimeExceeded`] |
    /// | `ERR_MEMORY_EXCEEDED` | more memory than allowed | [`CallError::MemoryExceeded`], [`CallError::SessionMemoryExceeded`] |
    /// | `ERR_FILE_SIZE_EXCEEDED` | a longer file than allowed | [`CallError::FileSizeExceeded`] |
    /// | `ERR_OPEN_FILES_EXCEEDED` | more open files than allowed | [`LoadError::OpenFilesExceeded`], [`StartError::Scarce`] |
    /// | `ERR_PROCESSES_EXCEEDED` | more processes and threads than allowed | [`StartError::Scarce`] |
    /// | `ERR_PAYLOAD_TOO_LARGE` | a larger argument, result or string than allowed | [`CallError::TooLarge`], [`CallError::StringTooLong`] |
    /// | `ERR_TOO_MANY_BLOCKS` | more blocks than allowed | [`CallError::TooManyBlocks`] |
    /// | `ERR_OUT_OF_MEMORY` | the worker has no memory for a block | [`CallError::OutOfMemory`] |
    /// | `ERR_CALL_TIMEOUT` | a deadline passed | [`CallError::TimedOut`] |
    /// | `ERR_SESSION_ABANDONED` | an earlier call still runs past its deadline | [`CallError::Abandoned`] |
    /// | `ERR_SESSION_CLOSED` | the session is closed | [`CallError::Closed`] |
    /// | `ERR_POOL_DISPOSED` | a pool was disposed of | [`CallError::PoolDisposed`] |
    /// | `ERR_SESSION_FULL` | all slots are in use | [`CallError::Full`] |
    /// | `ERR_PIPELINE_TAKEN` | another pipeline of the session is in use | [`CallError::PipelineTaken`] |
    /// | `ERR_PIPELINE_UNSUPPORTED` | the session has a memory limit | [`CallError::PipelineUnsupported`] |
    /// | `ERR_CONFIGURATION` | an option has a value that makes no sense | [`StartError::Configuration`], [`CallError::ZeroTimeout`] |
    /// | `ERR_ARENA_FULL` | no room for the bytes of a call now | [`CallError::NoRoom`] |
    /// | `ERR_NOT_RUNNING` | an isolated process does not run | [`CallError::NotRunning`] |
    /// | `ERR_NO_WORKER` | a pool has no worker now | [`CallError::NoWorker`], [`StartError::Incomplete`] |
    /// | `ERR_STACK_OVERFLOW`, `ERR_PROTOCOL`, `ERR_WORKER_UNRESPONSIVE` | why a worker died, as its report has it | [`Cause::StackOverflow`](crate::Cause::StackOverflow), [`Cause::ProtocolBreach`](crate::Cause::ProtocolBreach), [`Cause::Unresponsive`](crate::Cause::Unresponsive) |
    /// | `ERR_MODULE_QUARANTINED` | a supervisor does not load the module | [`LoadError::Quarantined`] |
    /// | `ERR_SESSION_LIMIT`, `ERR_STILL_STARTING`, `ERR_BACKING_OFF`, `ERR_CIRCUIT_OPEN`, `ERR_HOOK` | a supervisor does not open the session | [`StartError`]'s |
    /// | `ERR_FORKED` | this process is a fork of the host | [`CallError::Forked`], [`StartError::Forked`] |
    /// | `ERR_ARGUMENT_COUNT`, `ERR_ARGUMENT_TYPE`, `ERR_RESULT_TYPE`, `ERR_INTERIOR_NUL`, `ERR_FOREIGN_POINTER`, `ERR_UNDECLARED`, `ERR_CALLBACK` | a call that cannot be made as it was written | the errors of these names |
    /// | `ERR_NULL_STRING`, `ERR_STRING_LOST`, `ERR_BAD_ADDRESS`, `ERR_UNKNOWN_BLOCK` | what a call, or the worker's memory, did not give | the errors of these names |
    /// | `ERR_WORKER_PROGRAM`, `ERR_NO_WORKER_PROGRAM`, `ERR_FOREIGN_EXECUTABLE`, `ERR_WORKER_MISMATCH`, `ERR_START_TIMEOUT`, `ERR_SESSION_REFUSED`, `ERR_SYSTEM`, `ERR_LIMIT_UNAVAILABLE`, `ERR_PLACEMENT` | no worker, or no session in it | [`StartError`]'s |
    /// | `ERR_MODULE_NOT_FOUND`, `ERR_MODULE_UNREADABLE`, `ERR_MODULE_NOT_ELF`, `ERR_MODULE_WRONG_KIND`, `ERR_MISSING_DEPENDENCY`, `ERR_MISSING_IMPORT`, `ERR_LINKER`, `ERR_MISSING_SYMBOL`, `ERR_BAD_SIGNATURE`, `ERR_TOO_MANY_FUNCTIONS`, `ERR_SIGNATURE_TEXT` | no module, or no function in it | [`LoadError`]'s |
    ///
    /// A report's [cause](CrashReport::cause) has a code too: [`Cause::code`](crate::Cause::code). It is the more exact one where the error's is `ERR_WORKER_CRASH`.
    pub fn code(&self) -> &'static str {
        match self {
            CallError::Crashed(_) => "ERR_WORKER_CRASH",
            CallError::CpuTimeExceeded(_) => "ERR_CPU_TIME_EXCEEDED",
            CallError::MemoryExceeded(_) | CallError::SessionMemoryExceeded { .. } => "ERR_MEMORY_EXCEEDED",
            CallError::FileSizeExceeded(_) => "ERR_FILE_SIZE_EXCEEDED",
            CallError::Disposed(_) => "ERR_WORKER_DISPOSED",
            CallError::TimedOut { .. } => "ERR_CALL_TIMEOUT",
            CallError::Abandoned { .. } => "ERR_SESSION_ABANDONED",
            CallError::ZeroTimeout { .. } => "ERR_CONFIGURATION",
            CallError::Full { .. } => "ERR_SESSION_FULL",
            CallError::PipelineTaken { .. } => "ERR_PIPELINE_TAKEN",
            CallError::PipelineUnsupported { .. } => "ERR_PIPELINE_UNSUPPORTED",
            CallError::TooLarge { .. } | CallError::StringTooLong { .. } => "ERR_PAYLOAD_TOO_LARGE",
            CallError::NoRoom { .. } => "ERR_ARENA_FULL",
            CallError::WrongCount { .. } => "ERR_ARGUMENT_COUNT",
            CallError::WrongArgument { .. } => "ERR_ARGUMENT_TYPE",
            CallError::WrongResult { .. } => "ERR_RESULT_TYPE",
            CallError::Undeclared(_) => "ERR_UNDECLARED",
            CallError::NotRunning { .. } => "ERR_NOT_RUNNING",
            CallError::NoWorker { .. } => "ERR_NO_WORKER",
            CallError::CallbackUnsupported { .. } => "ERR_CALLBACK",
            CallError::ForeignPointer { .. } => "ERR_FOREIGN_POINTER",
            CallError::InteriorNul { .. } => "ERR_INTERIOR_NUL",
            CallError::NullString { .. } => "ERR_NULL_STRING",
            CallError::StringLost { .. } => "ERR_STRING_LOST",
            CallError::BadAddress { .. } => "ERR_BAD_ADDRESS",
            CallError::UnknownBlock { .. } => "ERR_UNKNOWN_BLOCK",
            CallError::OutOfMemory { .. } => "ERR_OUT_OF_MEMORY",
            CallError::TooManyBlocks { .. } => "ERR_TOO_MANY_BLOCKS",
            CallError::PoolDisposed { .. } => "ERR_POOL_DISPOSED",
            CallError::Closed => "ERR_SESSION_CLOSED",
            CallError::Forked => "ERR_FORKED",
        }
    }
}

/// Any of hotcell's errors, so that `?` works in a function that does several things.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// Starting failed.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Loading or resolving failed.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A call failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A signature cannot be read.
    #[error(transparent)]
    Signature(#[from] SignatureError),
}

impl Error {
    /// A stable name for programs: see [`CallError::code`].
    pub fn code(&self) -> &'static str {
        match self {
            Error::Start(start) => start.code(),
            Error::Load(load) => load.code(),
            Error::Call(call) => call.code(),
            Error::Signature(_) => "ERR_SIGNATURE_TEXT",
        }
    }

    /// The report, if a worker died.
    pub fn crash_report(&self) -> Option<&CrashReport> {
        match self {
            Error::Start(StartError::Died(report)) => Some(report),
            Error::Call(call) | Error::Load(LoadError::Call { source: call, .. }) => call.crash_report(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each error by itself, and what it has to say: whom it is about, and what to do where that does not go without saying.
    fn said() -> Vec<(Error, &'static [&'static str])> {
        let function = || FunctionName { module: "./libplugin.so".into(), symbol: "add".into() };
        let module = || Arc::<str>::from("./libplugin.so");
        let detail = || "why".to_owned();
        let second = Duration::from_secs(1);
        let last = || Arc::new(StartError::Refused { reason: "it is full".into() });
        let system = || Arc::new(io::Error::from_raw_os_error(libc::EPERM));
        let signature = || crate::signature::parse_c("int add(struct pair)").unwrap_err();
        const ADD: &str = "add of ./libplugin.so";
        let starts: Vec<(StartError, &[&str])> = vec![
            (
                StartError::Program { program: "worker".into(), source: system() },
                &["worker program worker", "not permitted"],
            ),
            (StartError::ForeignExecutable { executable: "python3".into() }, &["python3", "HOTCELL_WORKER"]),
            (StartError::NoProgram, &["HOTCELL_WORKER"]),
            (
                StartError::TimedOut { program: "worker".into(), after: second },
                &["worker program worker", "1s", "WorkerBuilder::start_timeout"],
            ),
            (StartError::Refused { reason: detail() }, &["refused the session: why"]),
            (StartError::Disposed, &["disposed of"]),
            (
                StartError::system("memfd_create", io::Error::from_raw_os_error(libc::EPERM)),
                &["memfd_create", "not permitted"],
            ),
            (
                StartError::Configuration { option: "slots", given: "1".into(), expected: "2 to 4096" },
                &["slots is 1, but must be 2 to 4096"],
            ),
            (
                StartError::LimitUnavailable { option: "processes_max", reason: detail() },
                &["processes_max cannot be enforced: why"],
            ),
            (
                StartError::Scarce { what: Scarce::OpenFiles },
                &["open files", "WorkerBuilder::open_files_max"],
            ),
            (
                StartError::Scarce { what: Scarce::Processes },
                &["processes and threads", "WorkerBuilder::processes_max"],
            ),
            (
                StartError::SessionLimit {
                    scope: LimitScope::Tenant("a".into()),
                    open: 1,
                    max: 1,
                    waited: Some(second),
                },
                &["tenant \"a\"", "1 session is open", "the limit is 1", "within 1s"],
            ),
            (StartError::StillStarting { after: second }, &["1s", "SupervisorBuilder::start_patience"]),
            (
                StartError::BackingOff { until: Instant::now(), retry_after: second, last: last() },
                &["before 1s", "it is full"],
            ),
            (
                StartError::CircuitOpen {
                    until: Instant::now(),
                    retry_after: second,
                    restarts_max: 1,
                    within: second,
                    last: last(),
                },
                &["more than once within 1s", "it is full"],
            ),
            (StartError::NotRestarted { last: last() }, &["it is full"]),
            (
                StartError::Hook { hook: "on_start", source: Arc::from(Box::from(detail())) },
                &["on_start", "why"],
            ),
            (
                StartError::Placement {
                    option: "lock_memory",
                    given: "true".into(),
                    place: "the worker",
                    source: system(),
                    advice: "raise RLIMIT_MEMLOCK",
                },
                &["lock_memory", "the worker", "not permitted", "raise RLIMIT_MEMLOCK"],
            ),
            (StartError::Incomplete { missing: 1, after: second }, &["1 worker", "1s"]),
            (StartError::Forked, &["fork", "exec"]),
        ];
        let loads: Vec<(LoadError, &[&str])> = vec![
            (LoadError::NotFound { module: module(), detail: detail() }, &["./libplugin.so", "why"]),
            (LoadError::Unreadable { module: module(), detail: detail() }, &["./libplugin.so", "why"]),
            (LoadError::NotElf { module: module(), detail: detail() }, &["./libplugin.so", "why"]),
            (LoadError::WrongKind { module: module(), detail: detail() }, &["./libplugin.so", "why"]),
            (LoadError::MissingDependency { module: module(), detail: detail() }, &["./libplugin.so", "why"]),
            (LoadError::MissingImport { module: module(), detail: detail() }, &["./libplugin.so", "why"]),
            (LoadError::Linker { module: module(), detail: detail() }, &["./libplugin.so", "why"]),
            (LoadError::MissingSymbol { function: function(), detail: String::new() }, &[ADD, "nm -D"]),
            (LoadError::BadSignature { function: function(), detail: detail() }, &[ADD, "why"]),
            (LoadError::Signature { module: module(), source: signature() }, &["./libplugin.so", "pair"]),
            (LoadError::TooManyFunctions { function: function(), detail: detail() }, &[ADD, "why"]),
            (
                LoadError::Quarantined { module: module(), reports: Vec::new() },
                &["./libplugin.so", "Supervisor::release"],
            ),
            (
                LoadError::OpenFilesExceeded { module: module(), detail: detail() },
                &["./libplugin.so", "WorkerBuilder::open_files_max"],
            ),
            (LoadError::Call { module: module(), source: CallError::Closed }, &["./libplugin.so", "closed"]),
        ];
        let calls: Vec<(CallError, &[&str])> = vec![
            (
                CallError::SessionMemoryExceeded { function: function(), asked: 7, used: 8, bytes_max: 9 },
                &[ADD, "7", "8", "9", "SessionBuilder::memory_bytes_max"],
            ),
            (
                CallError::TimedOut { function: function(), after: second, worker_killed: true },
                &[ADD, "1s", "killed"],
            ),
            (
                CallError::TimedOut { function: function(), after: second, worker_killed: false },
                &[ADD, "1s", "given up"],
            ),
            (CallError::Abandoned { function: function() }, &[ADD, "until"]),
            (CallError::ZeroTimeout { function: function() }, &[ADD, "zero"]),
            (CallError::Full { slots: 255 }, &["255 slots", "results first"]),
            (CallError::PipelineUnsupported { function: function() }, &[ADD, "call or submit"]),
            (
                CallError::PipelineTaken { function: function(), after: second, by_this_thread: true },
                &[ADD, "1s", "this thread has taken it"],
            ),
            (
                CallError::PipelineTaken { function: function(), after: second, by_this_thread: false },
                &[ADD, "1s", "still in use"],
            ),
            (
                CallError::TooLarge { function: function(), bytes: 8, max: 7 },
                &[ADD, "8 bytes", "7", "SessionBuilder::payload_bytes_max"],
            ),
            (CallError::NoRoom { function: function(), source: detail().into() }, &[ADD, "why", "blocks"]),
            (CallError::WrongCount { function: function(), expected: 2, given: 3 }, &[ADD, "2", "3"]),
            (
                CallError::WrongArgument {
                    function: function(),
                    index: 2,
                    expected: Type::I32,
                    given: "null".into(),
                },
                &[ADD, "argument 2", "null", "i32"],
            ),
            (
                CallError::WrongResult { expected: "an i32", given: "a string".into() },
                &["an i32", "a string"],
            ),
            (CallError::Undeclared(function()), &[ADD, "symbols"]),
            (CallError::NotRunning { function: function() }, &[ADD, "restart"]),
            (
                CallError::NoWorker { function: function(), waited: second, source: Some(last()) },
                &[ADD, "1s", "it is full"],
            ),
            (CallError::PoolDisposed { function: function() }, &[ADD, "disposed of", "another"]),
            (CallError::CallbackUnsupported { function: function() }, &[ADD, "callback"]),
            (CallError::ForeignPointer { function: function() }, &[ADD, "another session"]),
            (CallError::InteriorNul { function: function(), index: 2 }, &[ADD, "argument 2"]),
            (CallError::InteriorNul { function: function(), index: 0 }, &[ADD, "a string argument"]),
            (CallError::NullString { function: function() }, &[ADD, "Nullable<CString>"]),
            (CallError::StringTooLong { function: function(), max: 7 }, &[ADD, "7 bytes"]),
            (
                CallError::StringLost { function: function(), source: Box::new(CallError::Closed) },
                &[ADD, "closed"],
            ),
            (CallError::BadAddress { address: 16, bytes: 7 }, &["0x10", "7 bytes"]),
            (CallError::UnknownBlock { address: 16 }, &["0x10"]),
            (CallError::OutOfMemory { bytes: 7 }, &["7 bytes"]),
            (CallError::TooManyBlocks { max: 7 }, &["7 blocks", "SessionBuilder::remote_blocks_max"]),
            (CallError::Closed, &["open another"]),
            (CallError::Forked, &["fork"]),
        ];
        let starts = starts.into_iter().map(|(error, words)| (error.into(), words));
        let loads = loads.into_iter().map(|(error, words)| (error.into(), words));
        starts.chain(loads).chain(calls.into_iter().map(|(error, words)| (error.into(), words))).collect()
    }

    #[test]
    fn errors_say_what_happened_to_whom_and_what_to_do() {
        for (error, words) in said() {
            let text = error.to_string();
            println!("{}: {text}", error.code());
            for word in words {
                assert!(text.contains(word), "{error:?} says {text:?} without {word:?}");
            }
            assert!(!text.ends_with('.') && !text.contains('\n'), "{text:?}");
            // A name once, in what is not another error's words.
            if std::error::Error::source(&error).is_none() {
                assert!(text.matches("./libplugin.so").count() <= 1, "{text:?}");
            }
        }
    }
}
