//! hotcell runs native code (C shared libraries) in a process of its own and lets a Rust host call it as if it were linked in.
//!
//! Calls go through shared memory: both processes look at the same cache line, and while both are awake a call makes no system call. When
//! the native code crashes, hangs or scribbles over its memory, the host gets a [`CallError`] that says what happened, and lives on.
//!
//! ```
//! use hotcell::{CallError, In, RemotePtr, Worker};
//!
//! # fn main() -> Result<(), hotcell::Error> {
//! let worker = Worker::spawn()?; // a process
//! let session = worker.session()?; // a thread in it, and a channel to it
//! let libc = session.load("libc.so.6")?;
//!
//! let strlen = libc.function::<fn(In<str>) -> usize>("strlen")?; // resolved once
//! assert_eq!(strlen.call("hello")?, 5);
//!
//! let strlen = libc.function::<fn(RemotePtr) -> usize>("strlen")?; // the same, called with an address
//! match strlen.call(RemotePtr::NULL) {
//!     Err(CallError::Crashed(report)) => assert_eq!(report.signal(), Some(11)), // SIGSEGV, and this process lives
//!     other => panic!("{other:?}"),
//! }
//! # Ok(()) }
//! ```
//!
//! # Words
//!
//! A [`Worker`] is one process. A [`Session`] is a native thread in it with a channel of its own; calls through a session are served one after another, and any
//! number of threads may make them. A [`Module`] is a library loaded in a session. A [`Function`] is a symbol of it with a Rust type, a [`DynFunction`] one with a
//! signature that is known at run time. [`IsolatedProcess`] is the short form of all of these: one module in one worker, called by name. A [`Supervisor`] places sessions on workers, keeps to limits and replaces workers that have ended. A [`Pool`] has several workers with one module behind one handle. A [`Pipeline`] sends calls to one function in a row. [`CrashReport`] is what is known of a worker's end.
//!
//! # What it does not do
//!
//! - **It is no sandbox**: a worker has the rights of its host. It contains broken code, not malicious code.
//! - It cannot check signatures against the code. A wrong one breaks the worker, not the host.
//! - It does not make results true: they have the declared type and size, and are otherwise input from an untrusted process.
//! - It does not repeat calls, nor restart workers that no [`Supervisor`] or [`Pool`] keeps. [`CallError::may_have_run`] and [`CallError::session_usable`] say what can be done.
//! - It passes no structs by value, and native code cannot yet call back into the host.
//!
//! # Platform
//!
//! Linux 5.4 or newer on x86-64 with glibc. Other Linux targets may build and are untested.
//!
//! # Features
//!
//! - `self-exec` (default): the worker is the host's own executable, started again; an initialiser turns it into a worker before `main`. Without the feature, or in
//!   a program that hotcell was loaded into as part of a library, the worker is the program `hotcell-worker`, named by [`WorkerBuilder::program`] or the environment
//!   variable [`WORKER_VARIABLE`].
//! - `metrics`: supervisors tell the recorder that the host has installed with the crate `metrics` of their workers and sessions.

mod budget;
mod call;
mod cgroup;
mod crash;
mod dynamic;
mod error;
mod events;
mod home;
mod isolated;
mod latencies;
mod limits;
mod memory;
mod module;
mod monitor;
mod pipeline;
mod placement;
mod pool;
#[cfg(feature = "self-exec")]
mod self_exec;
mod session;
mod signature;
mod supervisor;
mod turns;
mod worker;

pub use bytemuck;
pub use call::{
    Callback, Errno, Function, FunctionType, In, InOut, Nullable, Out, Param, PointerParam, Returned, Ticket,
    WithErrno,
};
pub use cgroup::CGROUP_VARIABLE;
pub use crash::{Access, Cause, CrashReport, Frame, Involvement, Usage};
pub use dynamic::{Arg, DynFunction, IntoArgs, Value, out};
pub use error::{CallError, Error, FunctionName, LimitScope, LoadError, Mismatch, StartError};
pub use events::{Event, EventData, Exit, ListenerId};
pub use hotcell_channel::signature::{ARGS_MAX, Signature, Type};
pub use isolated::{Binding, ErrorMode, IsolatedProcess, IsolatedProcessConfig, create_isolated_process};
pub use latencies::{Counters, Latencies};
pub use limits::{Limited, Scarce};
pub use memory::SessionMemory;
pub use module::Module;
pub use pipeline::{Calls, PIPELINE_DEPTH, Pipeline, Pipelined, WordParam, WordReturned};
pub use placement::{Backing, Placement, Prefault};
pub use pool::{
    Capacity, Pool, PoolBuilder, PoolCaller, PoolDynFunction, PoolErrors, PoolEvent, PoolFunction,
    PoolSnapshot, PoolTicket, PoolWorker, Reason, Role,
};
pub use session::{Block, ModuleSource, RemotePtr, Session, SessionBuilder};
pub use signature::{
    Place, SignatureError, SymbolDefinition, parse_c, parse_c_list, parse_json, parse_json_one, parse_symbols,
};
pub use supervisor::canary::Canary;
pub use supervisor::events::{SupervisorEvent, SupervisorEventData};
pub use supervisor::quarantine::Quarantine;
pub use supervisor::restart::{Restart, RestartPolicy};
pub use supervisor::retry::Retry;
pub use supervisor::snapshot::{LatencySnapshot, SessionSnapshot, SupervisorSnapshot, WorkerSnapshot};
pub use supervisor::start::BoxError;
pub use supervisor::{OnFull, SessionRequest, Supervisor, SupervisorBuilder, Topology};
pub use worker::{
    OUTPUT_TAIL_BYTES, OnDeadline, Output, WORKER_VARIABLE, WaitPolicy, Worker, WorkerBuilder, WorkerEvent,
};

/// Whether this process was started as a worker. For code of a host that runs before `main` (constructors) and must not run in its workers.
///
/// With the feature `self-exec` a worker never reaches the host's `main`, nor constructors with default priority. A constructor with a higher priority, or in a
/// library that the host links to, runs in both: it can ask here.
pub fn is_worker() -> bool {
    #[cfg(feature = "self-exec")]
    return self_exec::is_worker();
    #[cfg(not(feature = "self-exec"))]
    false
}

/// The readme's example, as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
