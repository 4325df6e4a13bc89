//! The canary: a sign of life asked of each worker at an interval, so that a hung one is found before a user's call hangs in it.
//!
//! Each worker that the supervisor has started gets a session for this purpose, which counts towards no limit. A thread of the supervisor's, `hotcell-keeper`, asks all of them at the same time.

use super::Inner;
use super::clock::Clock;
use super::start::{BoxError, SessionHook};
use crate::crash::Cause;
use crate::error::StartError;
use crate::monitor::{self, lock};
use crate::session::{Session, SessionBuilder};
use crate::worker::OnDeadline;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

/// Asks each worker for a sign of life at an interval, and kills one that gives none in time: its report says [`Cause::Unresponsive`].
///
/// The sign is a [ping](Session::ping) of a session of its own, or a call of the host's. It finds a worker that is stopped, or deadlocked as a whole, not a single session whose call takes long: that is
/// what the call's deadline is for.
#[derive(Clone, Debug)]
#[must_use]
pub struct Canary {
    every: Duration,
    timeout: Duration,
    check: Option<SessionHook>,
}

impl Canary {
    /// A ping every so often, to be answered within `timeout`. On a machine that is busy an answer can take long: seconds are a sound choice.
    pub fn new(every: Duration, timeout: Duration) -> Self {
        Self { every, timeout, check: None }
    }

    /// Default: a ping. What to ask instead: calls through the given session, whose deadline is the canary's. An error, or a panic, condemns the worker.
    pub fn call<E: Into<BoxError>>(
        mut self,
        check: impl Fn(&Session) -> Result<(), E> + Send + Sync + 'static,
    ) -> Self {
        self.check = Some(SessionHook::new("canary", check));
        self
    }

    pub(crate) fn check_options(&self) -> Result<(), StartError> {
        let bad = |option, given: Duration| {
            let expected = "longer than nothing";
            Err(StartError::Configuration { option, given: format!("{given:?}"), expected })
        };
        if self.every.is_zero() {
            return bad("the canary's interval", self.every);
        }
        if self.timeout.is_zero() {
            return bad("the canary's timeout", self.timeout);
        }
        Ok(())
    }

    /// How its sessions are opened.
    pub(crate) fn session(&self) -> SessionBuilder {
        // A passed deadline is no end yet: the canary's own cause is to be told.
        SessionBuilder::new().timeout(self.timeout).on_deadline(OnDeadline::AbandonSession).slots(8)
    }

    /// Asks one worker.
    fn ask(&self, session: &Session) {
        let asked = match &self.check {
            None => session.ping().map_err(|error| error.to_string()),
            Some(check) => check.run(session).map_err(|error| error.to_string()),
        };
        let worker = &session.inner().worker;
        if let Err(what) = asked
            && !worker.is_dead()
            && !worker.is_disposing()
        {
            worker.end(Cause::Unresponsive { what }, None);
        }
    }
}

/// Tells the keeper's thread to end.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    pub(crate) fn stop(&self) {
        *lock(&self.stopped) = true;
        self.changed.notify_all();
    }

    /// Waits for the interval to pass. False if it is over.
    fn wait(&self, clock: &Clock, every: Duration) -> bool {
        let until = clock.now().checked_add(every);
        let mut stopped = lock(&self.stopped);
        while !*stopped && until.is_none_or(|until| clock.now() < until) {
            stopped = clock.wait(&self.changed, stopped, until);
        }
        !*stopped
    }
}

/// Starts the thread that asks the workers of a supervisor. It ends with the supervisor's last handle.
pub(crate) fn keep(
    supervisor: Weak<Inner>,
    canary: Canary,
    clock: Clock,
    stop: Arc<Stop>,
) -> Result<(), StartError> {
    monitor::start_thread("hotcell-keeper", move || {
        while stop.wait(&clock, canary.every) {
            let Some(inner) = supervisor.upgrade() else { return };
            let sessions = inner.canaries();
            drop(inner);
            // Side by side: one that hangs does not keep the others from being asked.
            std::thread::scope(|scope| {
                for session in &sessions {
                    let asked = std::thread::Builder::new().spawn_scoped(scope, || canary.ask(session));
                    if asked.is_err() {
                        canary.ask(session);
                    }
                }
            });
        }
    })
}
