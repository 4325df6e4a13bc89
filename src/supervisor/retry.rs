//! Which failed calls may be made again.

use crate::error::CallError;

/// Which failed calls are made again, and how often.
///
/// A call whose function may have run is never repeated, unless the caller declares that running it twice does no harm.
///
/// ```
/// use hotcell::{CallError, Retry, Worker};
/// # fn main() -> Result<(), hotcell::Error> {
/// let retry = Retry::unseen(2);
/// let session = Worker::spawn()?.session()?;
/// session.close()?;
/// let error = session.ping().unwrap_err(); // the session is closed: nothing has run
/// assert!(retry.allows(0, &error) && retry.allows(1, &error) && !retry.allows(2, &error));
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Retry {
    retries_max: u32,
    idempotent: bool,
}

impl Retry {
    /// No call is made again. The default.
    pub const NEVER: Retry = Retry { retries_max: 0, idempotent: false };

    /// A call that its function never saw is made again, at most `retries_max` times.
    pub const fn unseen(retries_max: u32) -> Self {
        Retry { retries_max, idempotent: false }
    }

    /// Declares that the function may run twice without harm: then a call that may have run is made again too.
    #[must_use]
    pub const fn idempotent(self) -> Self {
        Retry { idempotent: true, ..self }
    }

    /// How often a call may be made again.
    pub const fn retries_max(&self) -> u32 {
        self.retries_max
    }

    /// Whether running the function twice was declared harmless.
    pub const fn is_idempotent(&self) -> bool {
        self.idempotent
    }

    /// Whether a call that has been made again `retries` times already, and failed with `error`, may be made again.
    ///
    /// That is so if another worker could do better (the worker died, was killed or disposed, or its session is closed, given up or not running), and the function has not run. A
    /// refused argument is refused everywhere, so it is not tried again.
    pub fn allows(&self, retries: u32, error: &CallError) -> bool {
        let elsewhere = matches!(
            error,
            CallError::Crashed(_)
                | CallError::CpuTimeExceeded(_)
                | CallError::MemoryExceeded(_)
                | CallError::FileSizeExceeded(_)
                | CallError::Disposed(_)
                | CallError::TimedOut { .. }
                | CallError::Abandoned { .. }
                | CallError::NotRunning { .. }
                | CallError::Closed
        );
        elsewhere && retries < self.retries_max && (self.idempotent || !error.may_have_run())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::FunctionName;
    use std::time::Duration;

    fn function() -> FunctionName {
        FunctionName { module: "m".into(), symbol: "f".into() }
    }

    fn timed_out() -> CallError {
        CallError::TimedOut { function: function(), after: Duration::from_secs(1), worker_killed: true }
    }

    #[test]
    fn a_call_that_may_have_run_is_repeated_only_if_that_is_declared_harmless() {
        assert!(timed_out().may_have_run());
        assert!(!Retry::unseen(9).allows(0, &timed_out()));
        assert!(Retry::unseen(9).idempotent().allows(0, &timed_out()));
    }

    #[test]
    fn an_unseen_call_is_repeated_as_often_as_allowed() {
        assert!(!Retry::NEVER.allows(0, &CallError::Closed));
        assert!(!Retry::NEVER.idempotent().allows(0, &CallError::Closed));
        assert!(Retry::unseen(1).allows(0, &CallError::Closed));
        assert!(!Retry::unseen(1).allows(1, &CallError::Closed));
    }

    #[test]
    fn what_every_worker_would_refuse_is_not_repeated() {
        let wrong = CallError::WrongCount { function: function(), expected: 1, given: 2 };
        assert!(!Retry::unseen(9).idempotent().allows(0, &wrong));
    }
}
