//! What a supervisor's state is at one moment, as plain data.

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
