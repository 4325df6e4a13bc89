//! Options for hosts that own their cores: where a session's thread runs and where its memory lies, and what became of that.

use crate::error::StartError;
use crate::session::SessionBuilder;
use hotcell_channel::placement::{self as channel, CPUS_MAX, Failure, PRIORITY_MAX, Placed, Wanted, Wish};
pub use hotcell_channel::placement::{Backing, Prefault};
use hotcell_channel::region::{self, Region};
use std::io;
use std::os::fd::BorrowedFd;

/// # Where it runs, and on which memory
///
/// For hosts that own their cores. An option that cannot be honoured is a [`StartError::Placement`] when the session is opened, never left out in silence;
/// [`Session::placement`](crate::Session::placement) gives what was done. What each is worth is measured in `docs/performance.md`; most programs need none of them.
///
/// The calling thread is the host's own: pin it with a crate for that, or with `nix` and its feature `sched`, to a CPU near that of the session's thread.
///
/// ```
/// # use hotcell::{SessionBuilder, Worker};
/// use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
/// use nix::unistd::Pid;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let this_thread = Pid::from_raw(0);
/// let allowed = sched_getaffinity(this_thread)?;
/// let mut cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
/// if let (Some(first), Some(second)) = (cpus.next(), cpus.next()) {
///     let mut here = CpuSet::new();
///     here.set(first)?;
///     sched_setaffinity(this_thread, &here)?; // this thread, and the threads that it starts from now on
///     let options = SessionBuilder::new().pin_to(u32::try_from(second)?);
///     let session = Worker::spawn()?.session_with(options)?;
///     println!("{}", session.placement());
/// }
/// # Ok(()) }
/// ```
///
/// Threads and processes inherit the CPUs of the thread that starts them: start the worker before its host's thread is pinned, or what native code starts in the worker
/// shares that CPU.
impl SessionBuilder {
    /// Default: any CPU that the worker may use. The CPU on which the session's thread in the worker runs, by its number in `/proc/cpuinfo` (`sched_setaffinity`). Threads that native code
    /// starts on it run there too.
    ///
    /// A thread of the host on the same CPU makes calls sleep instead of spin.
    pub fn pin_to(mut self, cpu: u32) -> Self {
        self.placement.cpu = Some(cpu);
        self
    }

    /// Default: an ordinary thread. The session's thread runs under `SCHED_FIFO` with this priority, 1 to 99: before every ordinary thread of its CPU, until it sleeps.
    /// Threads and processes that native code starts are ordinary again (`SCHED_RESET_ON_FORK`). For use with [`SessionBuilder::pin_to`]: alone it tends to make calls slower, since the scheduler wakes
    /// such a thread on its caller's CPU, and there it stays.
    ///
    /// Needs `CAP_SYS_NICE`, or an `RLIMIT_RTPRIO` of at least the priority. Native code that loops then keeps its CPU from everybody else for as long as the system lets it
    /// (`/proc/sys/kernel/sched_rt_runtime_us`, 95 % as a rule): on a machine with one CPU the library's own threads, which end calls at their deadline, too. Under
    /// [`WaitPolicy::Spin`](crate::WaitPolicy::Spin) it does so whether it has calls to serve or not.
    pub fn real_time(mut self, priority: u8) -> Self {
        self.placement.real_time = Some(priority);
        self
    }

    /// Default: 0, and pages are mapped when they are first used. The slots and the first so many bytes of the arena have their pages, in both processes, before the session
    /// opens, and keep them. At most four times [`SessionBuilder::payload_bytes_max`].
    ///
    /// Payloads take the lowest free place in the arena; 64 KiB of it are the direct slot's, which takes what fits there.
    pub fn prefault_bytes(mut self, bytes: u64) -> Self {
        self.placement.prefault_bytes = bytes;
        self
    }

    /// Default: off. Keeps the slots and the arena's first bytes, 64 KiB or [`SessionBuilder::prefault_bytes`], in memory, in both processes (`mlock`): they are never swapped out. What the arena
    /// uses beyond them, and native code's own memory, is not locked.
    ///
    /// Needs `CAP_IPC_LOCK`, or room under `RLIMIT_MEMLOCK` in the host and in the worker, which inherits it.
    pub fn lock_memory(mut self, lock: bool) -> Self {
        self.placement.lock_memory = lock;
        self
    }

    /// Default: off. Puts the prefaulted bytes, rounded up to 2 MiB, into huge pages, in both processes; so it needs [`SessionBuilder::prefault_bytes`].
    ///
    /// Needs Linux 6.1 (`MADV_COLLAPSE`), as much free memory in pieces of 2 MiB, and a `/sys/kernel/mm/transparent_hugepage/shmem_enabled` other than `deny`.
    pub fn huge_pages(mut self, huge: bool) -> Self {
        self.placement.huge_pages = huge;
        self
    }
}

/// What became of a session's placement options, right after it was opened. What was not asked for is `None` or 0.
///
/// The host's part is what the kernel told this process. The rest is the worker's own account of what the kernel told it: untrusted, and nothing depends on it. Later changes (by native code,
/// by an administrator) are not seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Placement {
    /// The one CPU that the session's thread may run on (`sched_getaffinity` after `sched_setaffinity`). Untrusted.
    pub cpu: Option<u32>,
    /// The priority of the session's thread under `SCHED_FIFO` (`sched_getparam` after `sched_setscheduler`). Untrusted.
    pub real_time: Option<u8>,
    /// The session's memory as this process has it mapped.
    pub host: Backing,
    /// The session's memory as the worker has it mapped. Untrusted.
    pub worker: Backing,
}

impl std::fmt::Display for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.cpu {
            Some(cpu) => write!(f, "session thread: on CPU {cpu}")?,
            None => write!(f, "session thread: on any CPU")?,
        }
        match self.real_time {
            Some(priority) => write!(f, ", SCHED_FIFO {priority}")?,
            None => write!(f, ", ordinary scheduling")?,
        }
        for (place, backing) in [("host", &self.host), ("worker", &self.worker)] {
            write!(f, "; memory in the {place}: {} KiB mapped ahead", backing.prefaulted_bytes >> 10)?;
            match backing.prefault {
                Some(Prefault::Populated) => write!(f, " by MADV_POPULATE_WRITE")?,
                Some(_) => write!(f, " by touching each page")?,
                None => {}
            }
            let (huge, locked) = (backing.huge_page_bytes >> 10, backing.locked_bytes >> 10);
            write!(f, ", {huge} KiB in huge pages, {locked} KiB locked")?;
        }
        Ok(())
    }
}

impl Placement {
    pub(crate) fn new(host: Backing, worker: Placed) -> Self {
        Self { cpu: worker.cpu, real_time: worker.real_time, host, worker: worker.backing }
    }
}

pub(crate) fn check(wanted: &Wanted, payload_bytes_max: u64) -> Result<(), StartError> {
    let bad = |option, given: u64, expected| {
        Err(StartError::Configuration { option, given: given.to_string(), expected })
    };
    if let Some(cpu) = wanted.cpu.filter(|cpu| *cpu >= CPUS_MAX) {
        return bad("pin_to", cpu.into(), "0 to 8191");
    }
    if let Some(priority) = wanted.real_time.filter(|priority| !(1..=PRIORITY_MAX).contains(priority)) {
        return bad("real_time", priority.into(), "1 to 99");
    }
    if wanted.prefault_bytes > 4 * payload_bytes_max {
        return bad("prefault_bytes", wanted.prefault_bytes, "0 to four times payload_bytes_max");
    }
    if wanted.huge_pages && wanted.prefault_bytes == 0 {
        let expected = "above 0 where huge_pages is on: only memory that is there from the start can be put into huge pages";
        return bad("prefault_bytes", 0, expected);
    }
    Ok(())
}

/// The host's half: its own mapping.
pub(crate) fn back(region: &Region, fd: BorrowedFd<'_>, wanted: &Wanted) -> Result<Backing, StartError> {
    if !wanted.is_any() {
        return Ok(Backing::default());
    }
    // Given out by the file first, so that a machine without the memory says so instead of raising SIGBUS.
    region::commit(fd, region.geometry().arena_offset(), wanted.committed_bytes())
        .map_err(|error| Failure { wish: Wish::Prefault, errno: error.raw_os_error().unwrap_or(0) })
        .and_then(|()| channel::back(region, wanted))
        .map_err(|failure| explain(wanted, failure, "this process"))
}

/// A worker's refusal as an error. `None` if it refuses what it was not asked for.
pub(crate) fn refused(wanted: &Wanted, failure: Failure) -> Option<StartError> {
    let asked = match failure.wish {
        Wish::Cpu => wanted.cpu.is_some(),
        Wish::RealTime => wanted.real_time.is_some(),
        Wish::Prefault => wanted.prefault_bytes > 0,
        Wish::Lock => wanted.lock_memory,
        Wish::HugePages => wanted.huge_pages,
    };
    asked.then(|| explain(wanted, failure, "the worker"))
}

fn explain(wanted: &Wanted, failure: Failure, place: &'static str) -> StartError {
    let (option, given) = match failure.wish {
        Wish::Cpu => ("pin_to", wanted.cpu.unwrap_or_default().to_string()),
        Wish::RealTime => ("real_time", wanted.real_time.unwrap_or_default().to_string()),
        Wish::Prefault => ("prefault_bytes", wanted.prefault_bytes.to_string()),
        Wish::Lock => ("lock_memory", true.to_string()),
        Wish::HugePages => ("huge_pages", true.to_string()),
    };
    let advice = match (failure.wish, failure.errno) {
        (Wish::Cpu, _) => {
            "name a CPU that the machine has and this process may use: see Cpus_allowed_list in /proc/self/status, and cpuset(7)"
        }
        (Wish::RealTime, _) => {
            "raise RLIMIT_RTPRIO to the priority, or give the process CAP_SYS_NICE; if its control group has real-time time of its own (cpu.rt_runtime_us), give it some"
        }
        (Wish::Prefault, _) => {
            "lower prefault_bytes, or raise the memory limit of the machine or the control group"
        }
        (Wish::Lock, _) => {
            "raise RLIMIT_MEMLOCK (ulimit -l) of this process, which its workers inherit, or give it CAP_IPC_LOCK; or lower prefault_bytes"
        }
        (Wish::HugePages, libc::EINVAL) => {
            "Linux 6.1 with transparent huge pages is needed, and /sys/kernel/mm/transparent_hugepage/shmem_enabled must not be deny"
        }
        (Wish::HugePages, _) => {
            "there is not as much memory in pieces of 2 MiB now: lower prefault_bytes, or open the session when more is free (/proc/buddyinfo)"
        }
    };
    let source = match failure.errno {
        0 => io::Error::other("the kernel said yes and did something else"),
        errno => io::Error::from_raw_os_error(errno),
    };
    StartError::Placement { option, given, place, source: source.into(), advice }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_of_what_was_not_asked_for_is_no_answer() {
        let wishes = [
            (Wish::Cpu, Wanted { cpu: Some(0), ..Wanted::default() }),
            (Wish::RealTime, Wanted { real_time: Some(1), ..Wanted::default() }),
            (Wish::Prefault, Wanted { prefault_bytes: 1, ..Wanted::default() }),
            (Wish::Lock, Wanted { lock_memory: true, ..Wanted::default() }),
            (Wish::HugePages, Wanted { huge_pages: true, ..Wanted::default() }),
        ];
        for (wish, _) in &wishes {
            for (asked, wanted) in &wishes {
                let errno = libc::EPERM;
                let error = refused(wanted, Failure { wish: *wish, errno });
                assert_eq!(error.is_some(), wish == asked, "{wish:?} {wanted:?}");
            }
        }
    }

    #[test]
    fn any_error_number_of_a_worker_is_a_readable_error() {
        let wanted = Wanted { cpu: Some(3), ..Wanted::default() };
        for errno in [i32::MIN, -1, 0, libc::EINVAL, i32::MAX] {
            let text = refused(&wanted, Failure { wish: Wish::Cpu, errno }).unwrap().to_string();
            assert!(text.starts_with("pin_to cannot be 3 in the worker: "), "{text}");
        }
    }
}
