//! The public errors. Each says what happened, to which function of which module, whether the function may have run, and what to do.

use crate::crash::CrashReport;
use crate::signature::SignatureError;
use hotcell_channel::signature::Type;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

pub use hotcell_channel::control::Mismatch;

/// A function of a module, as errors and reports name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FunctionName {
    /// The module as it was loaded: a path or a soname.
    pub module: Arc<str>,
    /// The symbol.
    pub symbol: Arc<str>,
}

impl std::fmt::Display for FunctionName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {}", self.symbol, self.module)
    }
}

/// Why no worker, or no session in it, could be started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// The worker's program could not be started at all.
    #[error("the worker program {} cannot be started: {source}", .program.display())]
    Program {
        /// The program.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
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
    /// The worker was not ready within the start timeout and was killed.
    #[error("the worker was not ready after {after:?} and was killed")]
    TimedOut {
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
    /// The worker was disposed.
    #[error("the worker was disposed")]
    Disposed,
    /// The operating system refused something that a worker or session needs.
    #[error("{what} failed")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
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
        source: io::Error,
        /// What to do about it.
        advice: &'static str,
    },
    /// This process is a fork of the one that uses hotcell. Its workers belong to the original.
    #[error("this process is a fork of the one that uses hotcell: it can use hotcell again after exec")]
    Forked,
}

impl StartError {
    pub(crate) fn system(
        what: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        StartError::System { what, source: source.into() }
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
    #[error("there is no symbol {function}: {detail}")]
    MissingSymbol {
        /// The function asked for.
        function: FunctionName,
        /// The dynamic linker's words; untrusted text.
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
    #[error("the session is given up: {function} passed its deadline and still runs")]
    Abandoned {
        /// The function that still runs.
        function: FunctionName,
    },
    /// All slots are taken by calls that have not been waited for.
    #[error("all {slots} slots of the session are in use by calls that were not waited for")]
    Full {
        /// How many slots there are.
        slots: u32,
    },
    /// Another pipeline of the session was in use for as long as this one's function may take.
    #[error(
        "a pipeline for {function} waited {after:?} for another one of the session, which is still in use"
    )]
    PipelineTaken {
        /// The function.
        function: FunctionName,
        /// How long it waited.
        after: Duration,
    },
    /// An argument or result is larger than the payload limit. Nothing was allocated or sent.
    #[error("{function} was given {bytes} bytes where the payload limit is {max}")]
    TooLarge {
        /// The function.
        function: FunctionName,
        /// Size of the largest argument.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The session's arena has no room now: too much is in flight, or kept in blocks.
    #[error("no room for the bytes of {function}")]
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
    #[error("no function {0} is declared")]
    Undeclared(FunctionName),
    /// An [`IsolatedProcess`](crate::IsolatedProcess) has no process now: it was not launched yet, was shut down, could not be restarted, or is being
    /// restarted by somebody else at this moment.
    #[error("no process is running that could call {function}: launch or restart it")]
    NotRunning {
        /// The function.
        function: FunctionName,
    },
    /// The function takes a callback. Declaring it is possible, calling it is not yet.
    #[error("{function} takes a callback, which is not yet supported")]
    CallbackUnsupported {
        /// The function.
        function: FunctionName,
    },
    /// A pointer or block of another session was passed.
    #[error("{function} was given a pointer or block that belongs to another session")]
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
    #[error("{function} returned a null pointer, not a string")]
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
    #[error("{function} returned, but its long string could not be fetched")]
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
    /// The session was closed, or its worker disposed.
    #[error("the session is closed")]
    Closed,
    /// This process is a fork of the one that opened the session.
    #[error("this process is a fork of the one that opened the session")]
    Forked,
}

impl CallError {
    /// Whether the function may have run, in part or in whole. A call for which this is false can be repeated elsewhere without harm.
    pub fn may_have_run(&self) -> bool {
        match self {
            CallError::Crashed(report) | CallError::Disposed(report) => report.involvement().may_have_run(),
            CallError::TimedOut { .. }
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
            CallError::Crashed(_) | CallError::Disposed(_) | CallError::Closed | CallError::Forked => false,
            CallError::NotRunning { .. } => false,
            _ => true,
        }
    }

    /// The report, if the worker died.
    pub fn crash_report(&self) -> Option<&CrashReport> {
        match self {
            CallError::Crashed(report) | CallError::Disposed(report) => Some(report),
            _ => None,
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
    /// The report, if a worker died.
    pub fn crash_report(&self) -> Option<&CrashReport> {
        match self {
            Error::Start(StartError::Died(report)) => Some(report),
            Error::Call(call) | Error::Load(LoadError::Call { source: call, .. }) => call.crash_report(),
            _ => None,
        }
    }
}
