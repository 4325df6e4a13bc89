//! What a supervisor tells whoever listens.

use crate::crash::CrashReport;
use crate::error::StartError;
use crate::events::Telling;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The kinds of events of a [`Supervisor`](crate::Supervisor).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SupervisorEvent {
    /// A worker was started and prepared.
    WorkerStarted,
    /// A worker has ended, for whatever reason.
    WorkerEnded,
    /// A worker could not be started or prepared.
    StartFailed,
    /// A circuit has opened: that worker is not started for a while.
    CircuitOpened,
    /// A session was opened.
    SessionOpened,
    /// A session was closed, or ended with its worker.
    SessionClosed,
    /// A request for a session was refused.
    SessionRefused,
    /// The supervisor was disposed.
    Disposed,
}

/// What happened. `Display` says it in words.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SupervisorEventData {
    /// A worker was started and prepared.
    WorkerStarted {
        /// Its process.
        pid: u32,
        /// The tenant whose worker it is.
        tenant: Option<Arc<str>>,
        /// How often a worker was started in this place before.
        restarts: u64,
    },
    /// A worker has ended.
    WorkerEnded {
        /// The tenant whose worker it was.
        tenant: Option<Arc<str>>,
        /// Its report.
        report: CrashReport,
    },
    /// A worker could not be started or prepared.
    StartFailed {
        /// The tenant whose worker it was to be.
        tenant: Option<Arc<str>>,
        /// Why not.
        error: Arc<StartError>,
    },
    /// A circuit has opened.
    CircuitOpened {
        /// The tenant whose worker it is about.
        tenant: Option<Arc<str>>,
        /// How long it stays open.
        open_for: Duration,
        /// The last end.
        last: Arc<StartError>,
    },
    /// A session was opened.
    SessionOpened {
        /// The tenant whose session it is.
        tenant: Option<Arc<str>>,
        /// Its worker's process.
        pid: u32,
    },
    /// A session was closed, or ended with its worker.
    SessionClosed {
        /// The tenant whose session it was.
        tenant: Option<Arc<str>>,
        /// Its worker's process.
        pid: u32,
    },
    /// A request for a session was refused.
    SessionRefused {
        /// The tenant whose session it was to be.
        tenant: Option<Arc<str>>,
        /// Why, in words; the error itself went to whoever asked.
        reason: String,
    },
    /// The supervisor was disposed.
    Disposed,
}

impl Telling for SupervisorEventData {
    type Kind = SupervisorEvent;

    fn bit(kind: SupervisorEvent) -> u32 {
        1 << (kind as u32)
    }

    fn kind(&self) -> SupervisorEvent {
        self.event()
    }

    /// Sessions come and go as often as the host likes; so do restarts, within the policy.
    fn is_frequent(&self) -> bool {
        !matches!(self, SupervisorEventData::Disposed)
    }
}

impl SupervisorEventData {
    /// Which event this is the data of.
    pub fn event(&self) -> SupervisorEvent {
        match self {
            SupervisorEventData::WorkerStarted { .. } => SupervisorEvent::WorkerStarted,
            SupervisorEventData::WorkerEnded { .. } => SupervisorEvent::WorkerEnded,
            SupervisorEventData::StartFailed { .. } => SupervisorEvent::StartFailed,
            SupervisorEventData::CircuitOpened { .. } => SupervisorEvent::CircuitOpened,
            SupervisorEventData::SessionOpened { .. } => SupervisorEvent::SessionOpened,
            SupervisorEventData::SessionClosed { .. } => SupervisorEvent::SessionClosed,
            SupervisorEventData::SessionRefused { .. } => SupervisorEvent::SessionRefused,
            SupervisorEventData::Disposed => SupervisorEvent::Disposed,
        }
    }

    /// The tenant that it is about.
    pub fn tenant(&self) -> Option<&str> {
        match self {
            SupervisorEventData::WorkerStarted { tenant, .. }
            | SupervisorEventData::WorkerEnded { tenant, .. }
            | SupervisorEventData::StartFailed { tenant, .. }
            | SupervisorEventData::CircuitOpened { tenant, .. }
            | SupervisorEventData::SessionOpened { tenant, .. }
            | SupervisorEventData::SessionClosed { tenant, .. }
            | SupervisorEventData::SessionRefused { tenant, .. } => tenant.as_deref(),
            SupervisorEventData::Disposed => None,
        }
    }
}

impl fmt::Display for SupervisorEventData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(tenant) = self.tenant() {
            write!(f, "{tenant}: ")?;
        }
        match self {
            SupervisorEventData::WorkerStarted { pid, restarts: 0, .. } => write!(f, "worker {pid} started"),
            SupervisorEventData::WorkerStarted { pid, restarts, .. } => {
                write!(f, "worker {pid} started, restart {restarts}")
            }
            SupervisorEventData::WorkerEnded { report, .. } => report.fmt(f),
            SupervisorEventData::StartFailed { error, .. } => write!(f, "no worker was started: {error}"),
            SupervisorEventData::CircuitOpened { open_for, last, .. } => {
                write!(f, "no worker is started for {open_for:?}: {last}")
            }
            SupervisorEventData::SessionOpened { pid, .. } => write!(f, "session opened on worker {pid}"),
            SupervisorEventData::SessionClosed { pid, .. } => write!(f, "session closed on worker {pid}"),
            SupervisorEventData::SessionRefused { reason, .. } => write!(f, "session refused: {reason}"),
            SupervisorEventData::Disposed => f.write_str("the supervisor was disposed"),
        }
    }
}
