//! What a worker and its sessions may use: the limits of the builders, and who enforces which.
//!
//! A limit is enforced by the kernel where it can be (resource limits of the worker's process, a control group where one is delegated to the host), by the
//! worker's own watcher thread for CPU time (which reads the kernel's clocks), and by the host itself for what is the host's: payloads, blocks, captured
//! output. `docs/limits.md` has the table. Nothing here changes a limit of the host's own process.

use crate::cgroup::{self, Group, Wanted};
use crate::crash::Cause;
use crate::error::StartError;
use crate::isolated::IsolatedProcessConfig;
use crate::memory;
use crate::session::SessionBuilder;
use crate::worker::WorkerBuilder;
use hotcell_channel::control;
use hotcell_channel::crash::{Exceeded, LimitNote};
use hotcell_channel::sys::{Usage, WaitStatus};
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

/// What a limit holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Limited {
    /// One call.
    Call,
    /// A session: the thread that serves it.
    Session,
    /// The worker: all of its process.
    Worker,
}

impl fmt::Display for Limited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Limited::Call => "call",
            Limited::Session => "session",
            Limited::Worker => "worker",
        })
    }
}

/// What there was not enough of, because of a limit of the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scarce {
    /// Descriptors: see [`WorkerBuilder::open_files_max`].
    OpenFiles,
    /// Processes and threads: see [`WorkerBuilder::processes_max`].
    Processes,
}

impl Scarce {
    /// The option that sets the limit.
    pub(crate) fn option(self) -> &'static str {
        match self {
            Scarce::OpenFiles => "open_files_max",
            Scarce::Processes => "processes_max",
        }
    }
}

impl fmt::Display for Scarce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scarce::OpenFiles => "open files",
            Scarce::Processes => "processes and threads",
        })
    }
}

/// What is known of a worker's end that can tell whether it exceeded a limit.
#[derive(Debug)]
pub(crate) struct Evidence<'a> {
    pub(crate) status: WaitStatus,
    /// The kernel's.
    pub(crate) usage: &'a Usage,
    /// The worker's own word.
    pub(crate) note: Option<LimitNote>,
    /// The kernel's: processes of its control group that were killed for memory.
    pub(crate) memory_kills: u64,
}

/// Shortest CPU time that can be a limit: below it the kernel's tick is all that is measured.
pub(crate) const CPU_TIME_MIN: Duration = Duration::from_millis(10);
/// Least memory that can be a worker's limit: below it the C library and the first module have no room.
const MEMORY_BYTES_MIN: u64 = 1 << 20;
/// Fewest descriptors that can be a worker's limit: what the worker itself has, and one module at a time.
const OPEN_FILES_MIN: u64 = 16;
/// Fewest processes and threads that can be a worker's limit: its main thread, its watcher and one session.
const PROCESSES_MIN: u64 = 3;
/// Longest output that can be kept.
const OUTPUT_BYTES_MAX: usize = 1 << 30;

/// The limits of a worker's process, as configured.
#[derive(Clone, Debug)]
pub(crate) struct WorkerLimits {
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) cpu_time: Option<Duration>,
    pub(crate) open_files: Option<u64>,
    pub(crate) processes: Option<u64>,
    pub(crate) file_bytes: Option<u64>,
    pub(crate) core_bytes: u64,
    pub(crate) output_bytes: usize,
    pub(crate) cgroup: Option<PathBuf>,
}

impl Default for WorkerLimits {
    fn default() -> Self {
        Self {
            memory_bytes: None,
            cpu_time: None,
            open_files: None,
            processes: None,
            file_bytes: None,
            core_bytes: 0,
            output_bytes: crate::worker::OUTPUT_TAIL_BYTES,
            cgroup: None,
        }
    }
}

fn bad<T>(option: &'static str, given: impl fmt::Display, expected: &'static str) -> Result<T, StartError> {
    Err(StartError::Configuration { option, given: given.to_string(), expected })
}

fn check_cpu_time(option: &'static str, time: Option<Duration>) -> Result<(), StartError> {
    match time {
        Some(time) if !(CPU_TIME_MIN..=Duration::from_secs(1 << 30)).contains(&time) => {
            bad(option, format_args!("{time:?}"), "10 ms to 34 years")
        }
        _ => Ok(()),
    }
}

impl WorkerLimits {
    pub(crate) fn check(&self) -> Result<(), StartError> {
        check_cpu_time("cpu_time_max", self.cpu_time)?;
        if let Some(bytes) = self.memory_bytes
            && !(MEMORY_BYTES_MIN..=1 << 60).contains(&bytes)
        {
            return bad("memory_bytes_max", bytes, "1 MiB to 1 EiB");
        }
        if let Some(files) = self.open_files
            && files < OPEN_FILES_MIN
        {
            return bad("open_files_max", files, "16 or more");
        }
        if let Some(processes) = self.processes
            && !(PROCESSES_MIN..=1 << 22).contains(&processes)
        {
            return bad("processes_max", processes, "3 to 4194304");
        }
        if self.output_bytes > OUTPUT_BYTES_MAX {
            return bad("output_bytes_max", self.output_bytes, "0 to 1 GiB");
        }
        Ok(())
    }
}

fn nanoseconds(time: Option<Duration>) -> Option<u64> {
    // The check has bounded it.
    time.map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

impl WorkerLimits {
    /// Puts a started worker, which has loaded nothing so far, into a control group if it needs one; gives what it has to do itself.
    pub(crate) fn put_in_force(
        &self,
        pid: u32,
    ) -> Result<(Option<Group>, control::WorkerLimits), StartError> {
        let mut limits = control::WorkerLimits {
            data_bytes: None,
            cpu_time_ns: nanoseconds(self.cpu_time),
            open_files: self.open_files,
            user_processes: None,
            file_bytes: self.file_bytes,
            core_bytes: self.core_bytes,
        };
        if self.memory_bytes.is_none() && self.processes.is_none() {
            return Ok((None, limits));
        }
        let wanted = Wanted { memory_bytes: self.memory_bytes, processes: self.processes };
        let make = |folder: PathBuf| {
            let group = Group::create(&folder, wanted)?;
            group.place(pid)?;
            Ok::<_, String>(group)
        };
        let why = match cgroup::named(self.cgroup.as_deref()) {
            // Somebody means this one: there is no next best.
            Some(folder) => match make(folder) {
                Ok(group) => return Ok((Some(group), limits)),
                Err(reason) => return Err(StartError::LimitUnavailable { option: "cgroup", reason }),
            },
            None => match cgroup::above_own().and_then(make) {
                Ok(group) => return Ok((Some(group), limits)),
                Err(why) => why,
            },
        };
        tracing::debug!(pid, why, "no control group for the worker: its limits are resource limits");
        limits.data_bytes = self.memory_bytes;
        if let Some(processes) = self.processes {
            limits.user_processes = Some(user_processes(&why)?.saturating_add(processes));
        }
        Ok((None, limits))
    }

    /// A session was not opened, because there was not enough of something.
    pub(crate) fn no_room(&self, what: control::Scarce) -> StartError {
        match what {
            control::Scarce::OpenFiles => StartError::Scarce { what: Scarce::OpenFiles },
            control::Scarce::Processes if self.processes.is_some() => {
                StartError::Scarce { what: Scarce::Processes }
            }
            control::Scarce::Processes => StartError::Refused {
                reason:
                    "the session's thread cannot be started: the system gives the worker no further thread"
                        .into(),
            },
        }
    }

    /// The limit that a worker's end comes of, and the session that it is about. The worker's word counts only for a limit that was set, and CPU time only as far as the kernel's
    /// own account of the process bears it out.
    pub(crate) fn exceeded<'a>(
        &self,
        evidence: &Evidence<'_>,
        of_session: impl Fn(u32) -> &'a SessionLimits,
    ) -> Option<(Cause, Option<u32>)> {
        let WaitStatus::Signaled { signal, .. } = evidence.status else { return None };
        let memory = |scope, bytes_max| Cause::MemoryExceeded { scope, bytes_max, signal: Some(signal) };
        if signal == libc::SIGKILL
            && evidence.memory_kills > 0
            && let Some(bytes_max) = self.memory_bytes
        {
            return Some((memory(Limited::Worker, bytes_max), None));
        }
        let session = evidence.note.and_then(|note| note.session);
        let (scope, max) = match evidence.note.map(|note| note.exceeded) {
            Some(Exceeded::WorkerMemory) => {
                return self.memory_bytes.map(|bytes_max| (memory(Limited::Worker, bytes_max), session));
            }
            Some(Exceeded::CallCpuTime) => (Limited::Call, of_session(session?).cpu_time_per_call),
            Some(Exceeded::SessionCpuTime) => (Limited::Session, of_session(session?).cpu_time),
            Some(Exceeded::WorkerCpuTime) => (Limited::Worker, self.cpu_time),
            None if signal == libc::SIGXFSZ => {
                return self.file_bytes.map(|bytes_max| (Cause::FileSizeExceeded { bytes_max }, None));
            }
            // The kernel's own limit, behind the watcher's.
            None if matches!(signal, libc::SIGXCPU | libc::SIGKILL) => (Limited::Worker, self.cpu_time),
            None => return None,
        };
        let max = max?;
        let used = evidence.usage.user + evidence.usage.system;
        (used + USAGE_GRAIN >= max).then_some((Cause::CpuTimeExceeded { scope, max }, session))
    }
}

/// How far the kernel's account of a process may lie below its clocks: each of the two times is cut to whole microseconds.
const USAGE_GRAIN: Duration = Duration::from_millis(1);

/// Processes and threads that the user has now, for `RLIMIT_NPROC`, which counts them all.
fn user_processes(no_group: &str) -> Result<u64, StartError> {
    let unavailable = |reason: String| StartError::LimitUnavailable { option: "processes_max", reason };
    let status = std::fs::read_to_string("/proc/self/status")
        .map_err(|e| unavailable(format!("/proc/self/status: {e}")))?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let user = field("Uid:").and_then(|ids| ids.split_ascii_whitespace().next()?.parse::<u32>().ok());
    let capabilities = field("CapEff:").and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    // The kernel asks for CAP_SYS_ADMIN and CAP_SYS_RESOURCE.
    const EXEMPT: u64 = 1 << 21 | 1 << 24;
    let (Some(user), Some(capabilities)) = (user, capabilities) else {
        return Err(unavailable("the host's own user cannot be read in /proc/self/status".into()));
    };
    if user == 0 || capabilities & EXEMPT != 0 {
        return Err(unavailable(format!(
            "the kernel does not bind root by RLIMIT_NPROC, and there is no control group to use instead: {no_group}"
        )));
    }
    let mut count = 0;
    for process in std::fs::read_dir("/proc").map_err(|e| unavailable(format!("/proc: {e}")))?.flatten() {
        if process.file_name().to_str().is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()))
            && process.metadata().is_ok_and(|metadata| metadata.uid() == user)
        {
            count += std::fs::read_dir(process.path().join("task")).map_or(0, Iterator::count) as u64;
        }
    }
    Ok(count)
}

/// The limits of a session, as configured.
#[derive(Clone, Debug)]
pub(crate) struct SessionLimits {
    pub(crate) cpu_time_per_call: Option<Duration>,
    pub(crate) cpu_time: Option<Duration>,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) remote_blocks: u64,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self { cpu_time_per_call: None, cpu_time: None, memory_bytes: None, remote_blocks: 1 << 16 }
    }
}

impl SessionLimits {
    /// What the worker has to watch.
    pub(crate) fn for_worker(&self) -> control::SessionLimits {
        control::SessionLimits {
            cpu_time_per_call_ns: nanoseconds(self.cpu_time_per_call),
            cpu_time_ns: nanoseconds(self.cpu_time),
            memory_bytes: self.memory_bytes,
        }
    }

    pub(crate) fn check(&self) -> Result<(), StartError> {
        memory::check(self.memory_bytes)?;
        check_cpu_time("cpu_time_per_call", self.cpu_time_per_call)?;
        check_cpu_time("cpu_time_max", self.cpu_time)
    }
}

/// # Limits
///
/// What the worker's process may use. See `docs/limits.md` for what each does and does not stop.
impl WorkerBuilder {
    /// Default: none, so the machine's memory is the limit. Memory of the worker, in bytes, beyond what it has before its first module is loaded; 1 MiB to 1 EiB.
    ///
    /// Where a control group of version 2 with a memory controller is delegated to the host (see [`WorkerBuilder::cgroup`]) the worker is put into a group of its own
    /// (`memory.max`, no swap), which counts every page that the worker is the first to touch: private and shared memory, page cache, kernel memory on its account. The
    /// kernel ends all of the worker when there is no more.
    ///
    /// Elsewhere it is `RLIMIT_DATA`, which counts private writable memory as it is reserved, touched or not; stacks of the sessions' threads are not charged to you. Shared
    /// anonymous mappings and files in memory are not counted. More is refused (`malloc` gives `NULL`), and a worker that crashes on that has [`Cause::MemoryExceeded`](crate::Cause::MemoryExceeded)
    /// as its cause.
    pub fn memory_bytes_max(mut self, bytes: u64) -> Self {
        self.limits.memory_bytes = Some(bytes);
        self
    }

    /// Default: none. CPU time of the worker, all its threads together over its whole life; 10 ms and more. At the limit it ends with
    /// [`Cause::CpuTimeExceeded`](crate::Cause::CpuTimeExceeded).
    ///
    /// A process CPU clock (`timer_create(2)`), accurate to a tick of the kernel; `RLIMIT_CPU`, which the worker cannot turn off, is behind it, one second later.
    pub fn cpu_time_max(mut self, time: Duration) -> Self {
        self.limits.cpu_time = Some(time);
        self
    }

    /// Default: none. CPU time of each call, for the sessions that [`Worker::session`](crate::Worker::session) opens: see [`SessionBuilder::cpu_time_per_call`].
    pub fn cpu_time_per_call(mut self, time: Duration) -> Self {
        self.session = self.session.cpu_time_per_call(time);
        self
    }

    /// Default: the host's own limit. Descriptors that the worker may have open (`RLIMIT_NOFILE`); 16 and more. The worker itself needs about six, and one more while a session opens.
    ///
    /// Native code that opens one more gets `EMFILE`. A module that cannot be opened any more is [`LoadError::OpenFilesExceeded`](crate::LoadError::OpenFilesExceeded), a session
    /// [`StartError::Scarce`].
    pub fn open_files_max(mut self, files: u64) -> Self {
        self.limits.open_files = Some(files);
        self
    }

    /// Default: none. Processes and threads of the worker, its own included (a main thread, one watcher if CPU time is limited, one for each session); 3 to 4194304.
    ///
    /// Where a control group with a pids controller is delegated to the host (see [`WorkerBuilder::cgroup`]) it is `pids.max` and exact. Elsewhere it is `RLIMIT_NPROC`, which counts
    /// *all* processes and threads of the user: the limit is set to as many as the user has at the start and `processes` more, so what the user starts elsewhere counts too. Root is not bound by it: without
    /// a control group a worker of root is refused with [`StartError::LimitUnavailable`].
    ///
    /// Native code that starts one more gets `EAGAIN`; a session that cannot be started is [`StartError::Scarce`].
    pub fn processes_max(mut self, processes: u64) -> Self {
        self.limits.processes = Some(processes);
        self
    }

    /// Default: the host's own limit. Length to which the worker may write a file, in bytes (`RLIMIT_FSIZE`). Beyond it the worker ends with
    /// [`Cause::FileSizeExceeded`](crate::Cause::FileSizeExceeded), unless native code ignores `SIGXFSZ` and takes `EFBIG`.
    pub fn file_bytes_max(mut self, bytes: u64) -> Self {
        self.limits.file_bytes = Some(bytes);
        self
    }

    /// Default: 0, no core files. Length of the core file that a crash may leave, in bytes (`RLIMIT_CORE`), at most the host's own hard limit.
    ///
    /// Where `kernel.core_pattern` starts a program, the kernel does not apply a limit above 0; with 0 the crash handler forbids the dump (`PR_SET_DUMPABLE`).
    pub fn core_bytes_max(mut self, bytes: u64) -> Self {
        self.limits.core_bytes = bytes;
        self
    }

    /// Default: [`OUTPUT_TAIL_BYTES`](crate::OUTPUT_TAIL_BYTES). Captured output that is kept, in bytes, for each of the two streams; at most 1 GiB. What came before is dropped, and
    /// [counted](crate::Worker::stdout_dropped).
    pub fn output_bytes_max(mut self, bytes: usize) -> Self {
        self.limits.output_bytes = bytes;
        self
    }

    /// Default: the variable `HOTCELL_CGROUP`, else the folder above the host's own group if that can be used. The control group (version 2) in which groups for workers are made,
    /// as a folder under `/sys/fs/cgroup`.
    ///
    /// The host must be allowed to write there, and no process may be in the folder's group itself. Only used for [`WorkerBuilder::memory_bytes_max`] and
    /// [`WorkerBuilder::processes_max`]. If a folder is named here and cannot be used, the start fails with [`StartError::LimitUnavailable`] instead of taking the next best.
    pub fn cgroup(mut self, folder: impl Into<PathBuf>) -> Self {
        self.limits.cgroup = Some(folder.into());
        self
    }
}

/// # Limits
///
/// What the session may use. See `docs/limits.md` for what each does and does not stop.
impl SessionBuilder {
    /// Default: none. CPU time of each call, loading a module (its constructors) included; 10 ms and more. A call that uses more ends its worker with
    /// [`CallError::CpuTimeExceeded`](crate::CallError::CpuTimeExceeded). The time that a call sleeps does not count, nor that of threads which it has started: see
    /// [`WorkerBuilder::cpu_time_max`] for those. The [deadline](SessionBuilder::timeout) holds as well.
    ///
    /// No call gets slower: a timer on the CPU clock of the session's thread goes off eight times in the given time, and only then is looked whether the same call still runs.
    /// A call is never ended before the given time, and at most a quarter of it and two ticks of the kernel (up to 20 ms) after it.
    pub fn cpu_time_per_call(mut self, time: Duration) -> Self {
        self.limits.cpu_time_per_call = Some(time);
        self
    }

    /// Default: none. CPU time of the session's thread, in calls and between them (it spins for at most 50 µs before it sleeps, up to 200 µs more after a large payload); 10 ms and more. At the limit its worker ends with
    /// [`Cause::CpuTimeExceeded`](crate::Cause::CpuTimeExceeded).
    pub fn cpu_time_max(mut self, time: Duration) -> Self {
        self.limits.cpu_time = Some(time);
        self
    }

    /// Default: 65536. Blocks that [`Session::alloc`](crate::Session::alloc) has given and that were not freed. One more is [`CallError::TooManyBlocks`](crate::CallError::TooManyBlocks).
    pub fn remote_blocks_max(mut self, blocks: u64) -> Self {
        self.limits.remote_blocks = blocks;
        self
    }
}

/// # Limits
///
/// The commonest ones; [`IsolatedProcessConfig::worker`] takes all others.
impl IsolatedProcessConfig {
    /// Default: none. Memory of the process: see [`WorkerBuilder::memory_bytes_max`].
    pub fn memory_bytes_max(mut self, bytes: u64) -> Self {
        self.worker = self.worker.memory_bytes_max(bytes);
        self
    }

    /// Default: none. CPU time of each call: see [`SessionBuilder::cpu_time_per_call`]. Call it after [`IsolatedProcessConfig::worker`], which replaces it.
    pub fn cpu_time_per_call(mut self, time: Duration) -> Self {
        self.worker = self.worker.cpu_time_per_call(time);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_secs(2);

    fn limits() -> (WorkerLimits, SessionLimits) {
        let worker = WorkerLimits {
            memory_bytes: Some(5 << 20),
            cpu_time: Some(MAX),
            file_bytes: Some(7),
            ..WorkerLimits::default()
        };
        let session =
            SessionLimits { cpu_time_per_call: Some(MAX), cpu_time: Some(MAX), ..SessionLimits::default() };
        (worker, session)
    }

    fn signaled(signal: i32) -> WaitStatus {
        WaitStatus::Signaled { signal, core_dumped: false }
    }

    fn note(exceeded: Exceeded) -> Option<LimitNote> {
        Some(LimitNote { exceeded, session: Some(4), amount: 0 })
    }

    /// The cause for a worker with all limits, and that for one with none.
    fn causes(status: WaitStatus, used: Duration, note: Option<LimitNote>, kills: u64) -> [Option<Cause>; 2] {
        let usage = Usage { user: used, ..Usage::default() };
        let evidence = Evidence { status, usage: &usage, note, memory_kills: kills };
        let (worker, session) = limits();
        let cause = |worker: &WorkerLimits, session: &SessionLimits| {
            worker.exceeded(&evidence, |_| session).map(|(cause, _)| cause)
        };
        [cause(&worker, &session), cause(&WorkerLimits::default(), &SessionLimits::default())]
    }

    fn memory(signal: i32) -> Option<Cause> {
        Some(Cause::MemoryExceeded { scope: Limited::Worker, bytes_max: 5 << 20, signal: Some(signal) })
    }

    fn cpu_time(scope: Limited) -> Option<Cause> {
        Some(Cause::CpuTimeExceeded { scope, max: MAX })
    }

    #[test]
    fn a_control_groups_kill_is_memory_and_any_other_kill_is_not() {
        let kill = signaled(libc::SIGKILL);
        assert_eq!(causes(kill, Duration::ZERO, None, 1), [memory(libc::SIGKILL), None]);
        assert_eq!(causes(kill, Duration::ZERO, None, 0), [None, None]);
        assert_eq!(
            causes(WaitStatus::Exited(1), Duration::ZERO, None, 1),
            [None, None],
            "a child was killed"
        );
        assert_eq!(causes(signaled(libc::SIGSEGV), Duration::ZERO, None, 1), [None, None]);
    }

    #[test]
    fn a_workers_word_counts_for_limits_that_it_has_and_as_far_as_the_kernel_bears_it_out() {
        let (xcpu, segv) = (signaled(libc::SIGXCPU), signaled(libc::SIGSEGV));
        for (exceeded, scope) in [
            (Exceeded::CallCpuTime, Limited::Call),
            (Exceeded::SessionCpuTime, Limited::Session),
            (Exceeded::WorkerCpuTime, Limited::Worker),
        ] {
            assert_eq!(causes(xcpu, MAX, note(exceeded), 0), [cpu_time(scope), None]);
            assert_eq!(causes(xcpu, MAX / 2, note(exceeded), 0), [None, None], "it has not used as much");
        }
        assert_eq!(causes(segv, MAX, note(Exceeded::WorkerMemory), 0), [memory(libc::SIGSEGV), None]);
        assert_eq!(causes(WaitStatus::Exited(0), MAX, note(Exceeded::WorkerMemory), 0), [None, None]);
        assert_eq!(causes(WaitStatus::Unknown, MAX, note(Exceeded::CallCpuTime), 0), [None, None]);
    }

    #[test]
    fn the_kernels_own_signals_are_limits_where_there_are_limits() {
        let cause = Cause::FileSizeExceeded { bytes_max: 7 };
        assert_eq!(causes(signaled(libc::SIGXFSZ), Duration::ZERO, None, 0), [Some(cause), None]);
        for signal in [libc::SIGXCPU, libc::SIGKILL] {
            assert_eq!(causes(signaled(signal), MAX, None, 0), [cpu_time(Limited::Worker), None]);
        }
        assert_eq!(causes(signaled(libc::SIGSEGV), MAX, None, 0), [None, None]);
    }
}
