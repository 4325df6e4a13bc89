//! The clock of supervision: the system's, or in tests one that stands still until the test moves it.

use std::sync::{Condvar, MutexGuard, PoisonError};
use std::time::Instant;

#[cfg(test)]
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

/// Where supervision gets its time from. Deadlines of calls do not: they are measured by the system's clock.
#[derive(Clone, Debug, Default)]
pub(crate) enum Clock {
    /// `CLOCK_MONOTONIC`.
    #[default]
    System,
    /// Stands still until the test moves it.
    #[cfg(test)]
    Manual(Arc<Mutex<Instant>>),
}

impl Clock {
    /// A clock that stands still.
    #[cfg(test)]
    pub(crate) fn manual() -> Self {
        Clock::Manual(Arc::new(Mutex::new(Instant::now())))
    }

    /// Moves a clock that stands still.
    #[cfg(test)]
    pub(crate) fn advance(&self, by: Duration) {
        match self {
            Clock::System => panic!("nobody moves the system's clock"),
            Clock::Manual(now) => *crate::monitor::lock(now) += by,
        }
    }

    pub(crate) fn now(&self) -> Instant {
        match self {
            Clock::System => Instant::now(),
            #[cfg(test)]
            Clock::Manual(now) => *crate::monitor::lock(now),
        }
    }

    /// Waits until `changed` is notified or this clock shows `until`. May return early, so the caller looks again. `None`: no end but a change.
    pub(crate) fn wait<'a, T>(
        &self,
        changed: &Condvar,
        guard: MutexGuard<'a, T>,
        until: Option<Instant>,
    ) -> MutexGuard<'a, T> {
        match self {
            Clock::System => match until {
                None => changed.wait(guard).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    changed.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
                }
            },
            // Nobody is told when a test moves the clock: looking again is.
            #[cfg(test)]
            Clock::Manual(_) => {
                let slice = Duration::from_millis(1);
                changed.wait_timeout(guard, slice).unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }
}
