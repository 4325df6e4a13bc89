//! Tests of short deadlines on machines that may be busy.
#![allow(dead_code)] // each test binary uses a part

use hotcell::{CallError, LoadError};
use std::time::Duration;

/// Makes an attempt at something whose preparations have to be over within the short time that it is about. A machine may be too busy for them (`None`): then
/// it says so, and gives the next attempt more time.
pub(crate) fn in_time<T>(shortest: Duration, attempt: impl Fn(Duration) -> Option<T>) -> T {
    for time in [1, 5, 25, 125].map(|factor| shortest * factor) {
        if let Some(done) = attempt(time) {
            return done;
        }
        eprintln!("{time:?} were too short for the preparations");
    }
    panic!("the preparations took longer than {:?}", shortest * 125);
}

/// What was loaded or resolved; `None` if the session's timeout passed before that.
pub(crate) fn prepared<T: std::fmt::Debug>(result: Result<T, LoadError>) -> Option<T> {
    match result {
        Err(LoadError::Call { source: CallError::TimedOut { .. }, .. }) => None,
        done => Some(done.unwrap()),
    }
}
