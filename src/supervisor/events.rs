//! What a supervisor tells whoever listens.

use crate::crash::{Cause, CrashReport};
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
    /// A module was put into quarantine.
    Quarantined,
    /// A load of a module in quarantine was refused.
    LoadRefused,
    /// A module was released from quarantine.
    Released,
    /// The supervisor was disposed.
    Disposed,
}

impl SupervisorEvent {
    /// All of them.
    pub const ALL: [SupervisorEvent; 11] = [
        SupervisorEvent::WorkerStarted,
        SupervisorEvent::WorkerEnded,
        SupervisorEvent::StartFailed,
        SupervisorEvent::CircuitOpened,
        SupervisorEvent::SessionOpened,
        SupervisorEvent::SessionClosed,
        SupervisorEvent::SessionRefused,
        SupervisorEvent::Quarantined,
        SupervisorEvent::LoadRefused,
        SupervisorEvent::Released,
        SupervisorEvent::Disposed,
    ];
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
    /// A module was put into quarantine: its loads are refused.
    Quarantined {
        /// The module.
        module: Arc<str>,
        /// The last crash.
        report: CrashReport,
    },
    /// A load of a module in quarantine was refused.
    LoadRefused {
        /// The module.
        module: Arc<str>,
    },
    /// A module was released from quarantine.
    Released {
        /// The module.
        module: Arc<str>,
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
            SupervisorEventData::Quarantined { .. } => SupervisorEvent::Quarantined,
            SupervisorEventData::LoadRefused { .. } => SupervisorEvent::LoadRefused,
            SupervisorEventData::Released { .. } => SupervisorEvent::Released,
            SupervisorEventData::Disposed => SupervisorEvent::Disposed,
        }
    }

    /// Whether it is the end of a worker that the host disposed of.
    fn is_wished_for(&self) -> bool {
        matches!(self, SupervisorEventData::WorkerEnded { report, .. } if *report.cause() == Cause::Disposed)
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
            SupervisorEventData::Quarantined { .. }
            | SupervisorEventData::LoadRefused { .. }
            | SupervisorEventData::Released { .. }
            | SupervisorEventData::Disposed => None,
        }
    }
}

/// Tells the host's `tracing` subscriber. On the thread of the events: a subscriber may do anything.
pub(crate) fn trace(data: &SupervisorEventData) {
    let (event, tenant) = (data.event(), data.tenant());
    match event {
        SupervisorEvent::SessionOpened | SupervisorEvent::SessionClosed => {
            tracing::debug!(?event, tenant, "{data}");
        }
        SupervisorEvent::WorkerEnded if data.is_wished_for() => tracing::info!(?event, tenant, "{data}"),
        SupervisorEvent::WorkerStarted | SupervisorEvent::Released | SupervisorEvent::Disposed => {
            tracing::info!(?event, tenant, "{data}");
        }
        _ => tracing::warn!(?event, tenant, "{data}"),
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
            SupervisorEventData::WorkerEnded { report, .. } => f.write_str(&report.headline()),
            SupervisorEventData::StartFailed { error, .. } => write!(f, "no worker was started: {error}"),
            SupervisorEventData::CircuitOpened { open_for, last, .. } => {
                write!(f, "no worker is started for {open_for:?}: {last}")
            }
            SupervisorEventData::SessionOpened { pid, .. } => write!(f, "session opened on worker {pid}"),
            SupervisorEventData::SessionClosed { pid, .. } => write!(f, "session closed on worker {pid}"),
            SupervisorEventData::SessionRefused { reason, .. } => write!(f, "session refused: {reason}"),
            SupervisorEventData::Quarantined { module, report } => {
                write!(f, "module {module} is in quarantine: {}", report.headline())
            }
            SupervisorEventData::LoadRefused { module } => {
                write!(f, "module {module} was not loaded: it is in quarantine")
            }
            SupervisorEventData::Released { module } => {
                write!(f, "module {module} is released from quarantine")
            }
            SupervisorEventData::Disposed => f.write_str("the supervisor was disposed"),
        }
    }
}
