//! Limits: what they hold for.

use std::fmt;

/// What a limit holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LimitScope {
    /// One call.
    Call,
    /// A session: the thread that serves it.
    Session,
    /// The worker: all of its process.
    Worker,
}

impl fmt::Display for LimitScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LimitScope::Call => "call",
            LimitScope::Session => "session",
            LimitScope::Worker => "worker",
        })
    }
}
