//! What a supervisor's state is at one moment, as plain data.

use crate::session::SessionInner;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A supervisor at one moment. Plain data, to be kept, compared or serialised; taking it costs the calls nothing.
///
/// What concerns different workers and sessions was read one after the other, while they went on.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct SupervisorSnapshot {
    /// The workers that live, and the places of those that have ended and may be started again.
    pub workers: Vec<WorkerSnapshot>,
    /// Sessions that have a place.
    pub sessions_open: usize,
    /// Requests that wait for a place.
    pub sessions_waiting: usize,
    /// Sessions opened since the start.
    pub sessions_opened: u64,
    /// Requests for sessions refused, or failed, since the start.
    pub sessions_refused: u64,
    /// Calls answered since the start, by sessions that are open or were.
    pub calls_done: u64,
    /// Calls that are in flight now.
    pub calls_in_flight: u64,
    /// Workers started since the start of the supervisor.
    pub workers_started: u64,
    /// Starts that failed.
    pub starts_failed: u64,
    /// Workers that took the place of one that had ended.
    pub restarts: u64,
    /// Ends of workers, by cause: `SIGSEGV`, `exit`, `deadline`, …
    pub ends: BTreeMap<String, u64>,
    /// Modules in quarantine.
    pub quarantined: Vec<String>,
    /// How long the supervisor exists.
    pub uptime: Duration,
}

/// A worker at one moment.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct WorkerSnapshot {
    /// The tenant whose worker it is.
    pub tenant: Option<Arc<str>>,
    /// Its process; `None` if it has ended and was not started again.
    pub pid: Option<u32>,
    /// Its sessions.
    pub sessions: Vec<SessionSnapshot>,
    /// How often a worker was started again in this place.
    pub restarts: u64,
    /// How long the circuit stays open.
    pub circuit_open_for: Option<Duration>,
    /// Why the last one ended or could not be started.
    pub last_end: Option<String>,
    /// How long it exists.
    pub uptime: Option<Duration>,
    /// Resident memory in bytes, as the kernel says; shared memory and files that were touched included.
    pub resident_bytes: Option<u64>,
    /// Processor time that it has used.
    pub cpu_time: Option<Duration>,
}

/// A session at one moment.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct SessionSnapshot {
    /// The tenant whose session it is.
    pub tenant: Option<Arc<str>>,
    /// Calls answered since it was opened, the session's own (pings, loads, copies of memory) included.
    pub calls_done: u64,
    /// Calls that are in flight now.
    pub calls_in_flight: u64,
    /// Waits of callers that ended while they spun on: see [`Counters`](crate::Counters).
    pub spun: u64,
    /// Waits of callers in which they slept.
    pub parked: u64,
    /// Waits of the worker that ended while it spun on. Untrusted.
    pub worker_spun: u64,
    /// Waits of the worker in which it slept. Untrusted.
    pub worker_parked: u64,
    /// How long its calls take, if [`SessionBuilder::latencies`](crate::SessionBuilder::latencies) is on.
    pub latencies: Option<LatencySnapshot>,
}

/// How long a session's calls took: see [`Latencies`](crate::Latencies).
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct LatencySnapshot {
    /// How many calls were measured.
    pub count: u64,
    /// Their mean.
    pub mean: Duration,
    /// Half of them took at most this.
    pub p50: Duration,
    /// 99 of 100 took at most this.
    pub p99: Duration,
    /// 999 of 1000 took at most this.
    pub p999: Duration,
    /// The longest.
    pub max: Duration,
}

impl SessionSnapshot {
    pub(super) fn of(session: &SessionInner, tenant: Option<Arc<str>>) -> Self {
        let (calls_done, calls_in_flight) = session.calls();
        let waits = session.counters();
        let latencies = session.latencies().map(|recorder| {
            let latencies = recorder.read();
            LatencySnapshot {
                count: latencies.count(),
                mean: latencies.mean(),
                p50: latencies.percentile(50.0),
                p99: latencies.percentile(99.0),
                p999: latencies.percentile(99.9),
                max: latencies.max(),
            }
        });
        Self {
            tenant,
            calls_done,
            calls_in_flight,
            spun: waits.spun,
            parked: waits.parked,
            worker_spun: waits.worker_spun,
            worker_parked: waits.worker_parked,
            latencies,
        }
    }
}

/// A process's resident memory, from `/proc/<pid>/status`, and the processor time of all its threads, ended ones too, from its CPU clock (`clock_getcpuclockid`).
pub(crate) fn process(pid: u32) -> (Option<u64>, Option<Duration>) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let resident = resident.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    let clock = nix::time::clock_getcpuclockid(nix::unistd::Pid::from_raw(pid.cast_signed()));
    let ran = clock.and_then(|clock| clock.now()).ok().map(Duration::from);
    (resident.map(|kib| kib * 1024), ran)
}
