#![allow(unsafe_code)]
//! Thin, typed system calls that neither the standard library nor `nix` offers in the shape needed here.
//!
//! **Law.** Each function makes the one call that its first line names, passes only values and memory that it owns or borrows for
//! the length of the call, and turns failure into `io::Error`. No pointer from outside is dereferenced by this process.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

#[cfg(not(loom))]
mod futex {
    use super::*;

    /// `futex(FUTEX_WAIT)`, process-shared: sleeps while `*word == expected`, at most `timeout`.
    ///
    /// Returns on a wake-up, on a timeout, on a signal and spuriously: the caller looks again.
    pub fn futex_wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) {
        let timespec = timeout.map(|t| libc::timespec {
            tv_sec: libc::time_t::try_from(t.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(t.subsec_nanos().cast_signed()),
        });
        let timeout = timespec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: `word` is a live, aligned u32; `timeout` is null or points to a live timespec. FUTEX_WAIT without the private
        // flag only compares and sleeps.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, timeout) };
    }

    /// `futex(FUTEX_WAKE)`, process-shared: wakes at most `count` sleepers on `word`.
    pub fn futex_wake(word: &AtomicU32, count: i32) {
        // SAFETY: `word` is a live, aligned u32, used by the kernel only as an address to look sleepers up by.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, count) };
    }
}
#[cfg(not(loom))]
pub use futex::{futex_wait, futex_wake};

/// `pidfd_open`: a descriptor that stands for the process and turns readable when it ends.
///
/// # Errors
/// The call's own: `ESRCH` if no such process exists any more, `EMFILE`, `ENOMEM`.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers, returns a descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just returned this descriptor (close-on-exec by definition of the call); nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `pidfd_send_signal`: signals exactly the process that the descriptor stands for, never a successor with the same number.
///
/// # Errors
/// `ESRCH` if the process has ended.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: passes a live descriptor, a number, no siginfo, no flags.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How a process ended, as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitStatus {
    /// It called `exit` or `_exit`, or returned from `main`.
    Exited(i32),
    /// A signal ended it; `core_dumped` tells whether a core file was written.
    Signaled {
        /// Signal number.
        signal: i32,
        /// Whether the kernel wrote a core file.
        core_dumped: bool,
    },
    /// Somebody else in this process collected the status first (`SIGCHLD` ignored, or a `waitpid(-1)` elsewhere), and the kernel is too
    /// old to tell it again.
    Unknown,
}

/// What a process used in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in user mode.
    pub user: Duration,
    /// CPU time in the kernel.
    pub system: Duration,
    /// Largest resident set, in bytes.
    ///
    /// Linux counts from before the program was started: the least value is what the starting process had resident.
    pub resident_bytes_max: u64,
    /// Page faults that needed no input or output.
    pub minor_faults: u64,
    /// Page faults that did.
    pub major_faults: u64,
}

/// `waitid(P_PIDFD, WEXITED)`: collects a child that has ended, so that it leaves no zombie, with its resource usage.
///
/// Returns `None` while the child still runs. When somebody else has collected it, asks the pidfd itself (`PIDFD_GET_INFO`, Linux
/// 6.15) and failing that answers [`WaitStatus::Unknown`].
pub fn wait_pidfd(pidfd: BorrowedFd<'_>) -> Option<(WaitStatus, Usage)> {
    // SAFETY: all-zero bytes are a valid siginfo_t and a valid rusage (plain C structs of integers).
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    for _ in 0..100 {
        // SAFETY: the raw call (glibc's wrapper drops the fifth argument); both pointers are to live locals of the right type.
        let done = unsafe {
            libc::syscall(
                libc::SYS_waitid,
                libc::P_PIDFD,
                pidfd.as_raw_fd(),
                &raw mut info,
                libc::WEXITED | libc::WNOHANG,
                &raw mut usage,
            )
        };
        if done == 0 {
            // SAFETY: waitid filled `info` in its SIGCHLD form, or left it zero, for which the accessor reads zeroes.
            let pid = unsafe { info.si_pid() };
            // SAFETY: as above.
            let status = unsafe { info.si_status() };
            if pid == 0 {
                return None;
            }
            let status = match info.si_code {
                libc::CLD_EXITED => WaitStatus::Exited(status),
                code => WaitStatus::Signaled { signal: status, core_dumped: code == libc::CLD_DUMPED },
            };
            return Some((status, usage_from(&usage)));
        }
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            break;
        }
    }
    Some((pidfd_exit_info(pidfd), Usage::default()))
}

fn usage_from(usage: &libc::rusage) -> Usage {
    let time = |t: libc::timeval| {
        Duration::from_secs(u64::try_from(t.tv_sec).unwrap_or(0))
            + Duration::from_micros(u64::try_from(t.tv_usec).unwrap_or(0))
    };
    Usage {
        user: time(usage.ru_utime),
        system: time(usage.ru_stime),
        resident_bytes_max: u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024,
        minor_faults: u64::try_from(usage.ru_minflt).unwrap_or(0),
        major_faults: u64::try_from(usage.ru_majflt).unwrap_or(0),
    }
}

/// `ioctl(PIDFD_GET_INFO)` with `PIDFD_INFO_EXIT` (Linux 6.15): the exit status of a process that was already collected.
fn pidfd_exit_info(pidfd: BorrowedFd<'_>) -> WaitStatus {
    // struct pidfd_info, first published size (64 bytes): mask u64, cgroupid u64, then pid, tgid, ppid, ruid, rgid, euid, egid,
    // suid, sgid, fsuid, fsgid as u32, exit_code i32.
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    const EXIT_CODE_INDEX: usize = 4 + 11;
    let mut info = [0u32; 16];
    info[0] = 1 << 3;
    const PIDFD_GET_INFO: libc::c_ulong = 0xc040_ff0b; // _IOWR(0xff, 11, 64 bytes)
    // SAFETY: the kernel reads and writes at most the 64 bytes whose size the request number carries; `info` is 64 bytes.
    let done = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, info.as_mut_ptr()) };
    if done != 0 || u64::from(info[0]) & PIDFD_INFO_EXIT == 0 {
        return WaitStatus::Unknown;
    }
    let status = info[EXIT_CODE_INDEX].cast_signed();
    if libc::WIFEXITED(status) {
        WaitStatus::Exited(libc::WEXITSTATUS(status))
    } else if libc::WIFSIGNALED(status) {
        WaitStatus::Signaled { signal: libc::WTERMSIG(status), core_dumped: libc::WCOREDUMP(status) }
    } else {
        WaitStatus::Unknown
    }
}

/// `getcpu`: the CPU that the calling thread runs on; `u32::MAX` if unknown.
pub fn current_cpu() -> u32 {
    // SAFETY: takes nothing, returns a number or -1.
    u32::try_from(unsafe { libc::sched_getcpu() }).unwrap_or(u32::MAX)
}

/// CPUs that can be named are below this: `NR_CPUS` of Linux at its largest.
pub const CPUS_MAX: u32 = 8192;
const CPU_WORDS: usize = CPUS_MAX as usize / 64;

/// `sched_setaffinity`: the calling thread runs on `cpu` from now on, and so do threads and processes that it starts.
///
/// # Errors
/// `EINVAL` if the machine has no such CPU, or this process may not use it (`cpuset(7)`).
pub fn pin_thread(cpu: u32) -> io::Result<()> {
    let mut mask = [0u64; CPU_WORDS];
    let word = mask.get_mut(cpu as usize / 64).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    *word = 1 << (cpu % 64);
    // SAFETY: thread 0 is the calling one; the mask is live and as long as said. A cpu_set_t is such an array of words (CPU_ALLOC(3)), and the call takes any length of it.
    let done = unsafe { libc::sched_setaffinity(0, size_of_val(&mask), (&raw const mask).cast()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `sched_getaffinity`: the CPU that the calling thread is pinned to; `None` if it may run on several.
pub fn pinned_cpu() -> Option<u32> {
    let mut mask = [0u64; CPU_WORDS];
    // SAFETY: as for `pin_thread`; the call writes at most the length that it is given.
    let done = unsafe { libc::sched_getaffinity(0, size_of_val(&mask), (&raw mut mask).cast()) };
    let mut set = (0u32..).zip(mask).filter(|(_, word)| *word != 0);
    match (done, set.next(), set.next()) {
        (0, Some((at, word)), None) if word.is_power_of_two() => Some(at * 64 + word.trailing_zeros()),
        _ => None,
    }
}

/// `sched_setscheduler(SCHED_FIFO | SCHED_RESET_ON_FORK)`: the calling thread runs before all ordinary ones, until it sleeps. Threads and processes that it starts are ordinary again.
///
/// # Errors
/// `EPERM` without `CAP_SYS_NICE` where `RLIMIT_RTPRIO` is below the priority, or in a control group without real-time time; `EINVAL` if the priority is not 1 to 99.
pub fn set_real_time(priority: u8) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: priority.into() };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: thread 0 is the calling one; the parameters are live.
    let done = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `sched_getscheduler`, `sched_getparam`: the calling thread's priority under `SCHED_FIFO`; `None` under any other policy.
pub fn real_time_priority() -> Option<u8> {
    // SAFETY: takes a number; thread 0 is the calling one.
    let policy = unsafe { libc::sched_getscheduler(0) };
    let mut parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: thread 0 is the calling one; the call writes the live parameters.
    let done = unsafe { libc::sched_getparam(0, &raw mut parameters) };
    let fifo = policy >= 0 && policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_FIFO;
    (fifo && done == 0).then(|| u8::try_from(parameters.sched_priority).ok())?
}

/// `membarrier(PRIVATE_EXPEDITED)`: every thread of this process that runs now passes a full memory barrier before this returns; one that does
/// not run has passed one when it was put aside. False if the kernel (before Linux 4.14) or a filter does not let us.
///
/// Registers the process on first use.
pub fn process_barrier() -> bool {
    const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
    const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    // SAFETY: the call takes numbers only and changes no memory.
    let call = |command: libc::c_int| unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) } == 0;
    *REGISTERED.get_or_init(|| call(REGISTER_PRIVATE_EXPEDITED)) && call(PRIVATE_EXPEDITED)
}

/// `membarrier(REGISTER_GLOBAL_EXPEDITED)`: from now on [`global_barrier`] of any process reaches the threads of this one. False if the kernel (before
/// Linux 4.16) or a filter does not let us.
///
/// Cheap in a process with one thread; otherwise the kernel waits until every CPU has passed through it once, some milliseconds.
pub fn register_global_barrier() -> bool {
    const REGISTER_GLOBAL_EXPEDITED: libc::c_int = 1 << 2;
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    // SAFETY: the call takes numbers only and changes no memory.
    *REGISTERED
        .get_or_init(|| unsafe { libc::syscall(libc::SYS_membarrier, REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0 })
}

/// `membarrier(GLOBAL_EXPEDITED)`: every running thread of every registered process passes a full memory barrier before this returns; one that does not run
/// has passed one when it was put aside. So does the caller. False if the kernel (before Linux 4.16) or a filter does not let us.
pub fn global_barrier() -> bool {
    const GLOBAL_EXPEDITED: libc::c_int = 1 << 1;
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL_EXPEDITED, 0, 0) == 0 }
}

/// `prctl(PR_SET_PDEATHSIG)`: the calling process gets `signal` when the thread that started it ends.
///
/// # Errors
/// `EINVAL` for a bad signal number.
pub fn set_parent_death_signal(signal: i32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    let done = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0, 0, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `close_range`: closes every descriptor from `first` to `last`, both included.
///
/// # Errors
/// `ENOSYS` before Linux 5.9.
pub fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: closing descriptors is only sound if nobody owns them: the worker calls this at its start, when it owns nothing but
    // the control socket, which the caller leaves out of the range.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `pthread_sigmask(SIG_BLOCK)` for all signals: the calling thread leaves signals to the threads of its host.
pub fn block_all_signals() {
    // SAFETY: an all-zero sigset_t is valid storage; sigfillset fills it.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is live; the call writes it.
    unsafe { libc::sigfillset(&raw mut set) };
    // SAFETY: `set` is initialised; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// `sigaction(SIG_DFL)` for every signal, and an empty mask: undoes what the starting process had ignored or blocked.
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL runs no code of ours. Fails harmlessly for SIGKILL, SIGSTOP and the C library's own numbers.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an all-zero sigset_t is valid storage; sigemptyset fills it.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is live; the call writes it.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: `set` is initialised; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
}

/// Descriptor 0, once, as an owned descriptor; `None` if it is not open.
///
/// The worker's control socket arrives there. Call it once, at the start, before anything else uses standard input.
pub fn take_stdin() -> Option<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes numbers; it fails if descriptor 0 is not open.
    let fd = unsafe { libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 3) };
    if fd < 0 {
        return None;
    }
    // SAFETY: fcntl has just made this descriptor; nobody else owns it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `dup2` of `/dev/null` onto descriptor 0.
///
/// # Errors
/// Those of opening `/dev/null`.
pub fn null_stdin() -> io::Result<()> {
    let null = std::fs::File::open("/dev/null")?;
    // SAFETY: replaces descriptor 0, which `take_stdin` has copied away and nothing in the worker reads.
    let done = unsafe { libc::dup2(null.as_raw_fd(), 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `open` of `/dev/null` for standard output and standard error, where they are closed.
///
/// Otherwise the next file that anybody opens gets their number, and what is printed goes into it.
///
/// # Errors
/// Those of opening `/dev/null`.
pub fn fill_standard_output() -> io::Result<()> {
    use std::os::fd::IntoRawFd;
    for fd in [1, 2] {
        // SAFETY: takes numbers only.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            // The lowest free number: `fd`, since those below are open.
            let _stays_open = std::fs::OpenOptions::new().write(true).open("/dev/null")?.into_raw_fd();
        }
    }
    Ok(())
}

/// `_exit`: ends the process at once, without destructors of any kind.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: takes a number and does not return.
    unsafe { libc::_exit(code) }
}

/// What [`original_process`] holds in the process that first asked.
pub const ORIGINAL: u32 = 1;

/// Whether this process is the one that first asked ([`ORIGINAL`]), rather than a fork of it (0).
///
/// The answer comes from a page that the kernel wipes in every child (`MADV_WIPEONFORK`, Linux 4.14), so it holds for raw `fork` and `clone`
/// too, where `pthread_atfork` does not. Reading it costs one load.
pub fn original_process() -> &'static AtomicU32 {
    static PAGE: OnceLock<&'static AtomicU32> = OnceLock::new();
    static UNKNOWN: AtomicU32 = AtomicU32::new(ORIGINAL);
    PAGE.get_or_init(|| {
        // SAFETY: a fresh private anonymous mapping; no address is asked for.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return &UNKNOWN;
        }
        // SAFETY: `page` is the mapping just made, 4096 bytes long.
        unsafe { libc::madvise(page, 4096, libc::MADV_WIPEONFORK) };
        // SAFETY: the page is zeroed, aligned and never unmapped, so a &'static AtomicU32 to its first word is valid for ever.
        let word = unsafe { AtomicU32::from_ptr(page.cast()) };
        word.store(ORIGINAL, Relaxed);
        word
    })
}

/// `process_vm_readv` on the calling process: copies `bytes` bytes from one address to another without ever faulting.
///
/// # Errors
/// `EFAULT` if not all of both ranges is accessible. What was copied up to there stays copied.
///
/// # Safety
/// The target range may be overwritten: it is not memory that Rust code relies on.
pub unsafe fn copy_own_memory(target: u64, source: u64, bytes: u64) -> io::Result<()> {
    let fault = || io::Error::from_raw_os_error(libc::EFAULT);
    let range = |address: u64| -> io::Result<libc::iovec> {
        Ok(libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(usize::try_from(address).map_err(|_| fault())?),
            iov_len: usize::try_from(bytes).map_err(|_| fault())?,
        })
    };
    let (target, source) = (range(target)?, range(source)?);
    // SAFETY: both ranges are only addresses for the kernel, which checks every page of them and never faults this process; the caller vouches
    // for what is overwritten.
    let moved = unsafe {
        libc::process_vm_readv(
            std::process::id().cast_signed(),
            &raw const target,
            1,
            &raw const source,
            1,
            0,
        )
    };
    match u64::try_from(moved) {
        Ok(moved) if moved == bytes => Ok(()),
        Ok(_) => Err(fault()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn own_memory_is_copied_and_a_bad_address_is_an_error() {
        let source = *b"hello";
        let mut target = [0u8; 5];
        let from = source.as_ptr().expose_provenance() as u64;
        let to = target.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: the target is a local array that is read only afterwards.
        unsafe { copy_own_memory(to, from, 5) }.unwrap();
        assert_eq!(target, source);
        for (to, from) in [(to, 8), (8, from), (to, u64::MAX)] {
            // SAFETY: as above; these copy nothing.
            let error = unsafe { copy_own_memory(to, from, 5) }.unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        }
    }

    #[test]
    fn exit_status_is_told_even_after_somebody_else_collected_it() {
        let mut child = std::process::Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        let pidfd = pidfd_open(child.id()).unwrap();
        child.wait().unwrap();
        match wait_pidfd(pidfd.as_fd()) {
            Some((WaitStatus::Exited(7), _)) => {}
            Some((WaitStatus::Unknown, _)) => {
                eprintln!("kernel before 6.15: a stolen exit status stays unknown")
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_process_barrier_is_there() {
        assert!(process_barrier(), "membarrier is missing or filtered here");
    }

    #[test]
    fn a_fork_is_not_the_original_process() {
        assert_eq!(original_process().load(Relaxed), 1);
    }
}
