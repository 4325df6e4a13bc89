//! hotcell runs native code in a process of its own and lets a Rust host call it as if it were linked in.

mod call;
mod crash;
mod dynamic;
mod error;
mod events;
mod isolated;
mod module;
mod monitor;
#[cfg(feature = "self-exec")]
mod self_exec;
mod session;
mod signature;
mod worker;

pub use bytemuck;
pub use call::{
    Callback, Errno, Function, FunctionType, In, InOut, Nullable, Out, Param, PointerParam, Returned, Ticket,
    WithErrno,
};
pub use crash::{Access, Cause, CrashReport, Frame, Involvement, Usage};
pub use dynamic::{Arg, DynFunction, IntoArgs, Value, out};
pub use error::{CallError, Error, FunctionName, LoadError, Mismatch, StartError};
pub use events::{Event, EventData, Exit, ListenerId};
pub use hotcell_channel::signature::{ARGS_MAX, Signature, Type};
pub use isolated::{Binding, ErrorMode, IsolatedProcess, IsolatedProcessConfig, create_isolated_process};
pub use module::Module;
pub use session::{Block, ModuleSource, RemotePtr, Session, SessionBuilder};
pub use signature::{
    Place, SignatureError, SymbolDefinition, parse_c, parse_c_list, parse_json, parse_json_one, parse_symbols,
};
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
