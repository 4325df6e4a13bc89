#![allow(unsafe_code)]
//! What the worker limits itself to: resource limits of its process, and CPU time of calls, sessions and the whole, which one thread watches.
//!
//! **Law.** [`apply`] runs on the main thread before any foreign code is loaded. What is called from the crash handler ([`is_withdrawn`], [`memory_was_refused`]) allocates
//! nothing, takes no lock and makes only the calls that it names. Pointers passed to the kernel are to live locals.
//!
//! **CPU time.** Each watched session has a timer on the CPU clock of its thread, and the process has one on its own clock. They go off only while the thread uses CPU, so an idle
//! worker never wakes up. They do not signal the thread that they measure, which native code could prevent, but wake the *watcher*, a thread that runs no foreign
//! code and takes the signal with `sigwaitinfo`. It looks whether the same call still runs as the last time, by the progress counter and the slots, which the serve loop keeps anyway:
//! a call costs nothing more for being watched.
//!
//! ```text
//! session's thread   ──── call 7 ────────────────────────────────────────►        CPU time of the thread
//! timer                 ▲        ▲        ▲        ▲                ▲
//! watcher               first    same     same     same   ...       same call since `since`, and now - since ≥ limit
//! ```
//!
//! So a call is never ended before it has used its limit, and at most two periods of the timer and the kernel's tick after it.
//!
//! **The end.** The watcher *accuses* the call and sends `SIGXCPU` to its thread, where the crash handler takes the backtrace and dies of it. If the call has returned meanwhile the
//! handler finds the accusation void and returns. A thread that does not take the signal (native code has blocked it, or put a handler of its own in place) is not waited for long:
//! then the watcher leaves a note in the crash page and kills the process.

use hotcell_channel::control::{SessionLimits, WorkerLimits};
use hotcell_channel::crash::{CrashPage, Exceeded, LimitNote};
use hotcell_channel::region::Region;
use hotcell_channel::slot::Turn;
use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::Duration;

/// Timers go off this many times in the time that they limit.
const LOOKS: u64 = 8;
/// The shortest and the longest time between two looks, in nanoseconds.
const PERIOD_NS_MIN: u64 = 1_000_000;
const PERIOD_NS_MAX: u64 = 100_000_000;
/// How long a thread may take to die of its accusation: 1000 times 2 ms, long enough for a backtrace on a machine that does something else.
const PATIENCE_STEPS: u32 = 1000;
const PATIENCE_STEP: Duration = Duration::from_millis(2);
/// What the watcher needs: it calls nothing deep.
const WATCHER_STACK_BYTES: usize = 64 << 10;
/// What a session's thread takes beside its stack: the crash handler's stack, the C library's first arena and its thread-local memory.
const THREAD_BYTES: u64 = 2 << 20;
/// How close to its limit the process's memory is for used up.
const NEARLY_BYTES: usize = 256 << 10;
/// Addresses below are near null: a null pointer and an offset. Nothing is mapped there in a program of these targets.
const NEAR_NULL: u64 = 1 << 40;
/// No call is accused.
const NOBODY: u64 = 0;
/// Whatever the thread does, it is accused.
const ANYBODY: u64 = u64::MAX;

/// The limits of the process, once they are in force.
struct Process {
    page: &'static CrashPage,
    data: Mutex<Data>,
    watcher: OnceLock<Watcher>,
    cpu_time_ns: OnceLock<u64>,
}

/// The soft limit of `RLIMIT_DATA`: what is allowed, and the room for sessions' threads in it.
#[derive(Debug, Default)]
struct Data {
    base_bytes: u64,
    /// Room that open sessions take, and the most that they ever took: a thread's stack is kept for the next by the C library.
    open_bytes: u64,
    granted_bytes: u64,
}

static PROCESS: OnceLock<Process> = OnceLock::new();
/// Whether memory is limited. Read by the crash handler.
static MEMORY_LIMITED: AtomicBool = AtomicBool::new(false);

struct Watcher {
    thread: libc::pid_t,
    sessions: Mutex<Vec<Arc<Watched>>>,
}

/// A session whose CPU time is limited.
struct Watched {
    session: u32,
    thread: libc::pid_t,
    clock: libc::clockid_t,
    region: Arc<Region>,
    limits: SessionLimits,
    /// The accused call: the number of calls that the thread had taken, or [`NOBODY`] or [`ANYBODY`].
    accused: AtomicU64,
    exceeded: AtomicU64,
    seen: Mutex<Seen>,
}

/// What the watcher saw at its last look.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    taken: u64,
    /// The thread's CPU time when this call was first seen, in nanoseconds.
    since: u64,
}

thread_local! {
    // Const and without destructor: an access is an address computation, in a signal handler too.
    static WATCHED: Cell<*const Watched> = const { Cell::new(ptr::null()) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn last_error(what: &str) -> String {
    format!("{what}: {}", io::Error::last_os_error())
}

/// Readies the limits, and turns core files off until the host says otherwise.
pub(crate) fn install(page: &'static CrashPage) {
    PROCESS.get_or_init(|| Process {
        page,
        data: Mutex::default(),
        watcher: OnceLock::new(),
        cpu_time_ns: OnceLock::new(),
    });
    // A limit can always be lowered.
    let _ = set_limit(libc::RLIMIT_CORE, 0, 0);
}

/// Limits the process. Before any foreign code is loaded.
pub(crate) fn apply(limits: &WorkerLimits) -> Result<(), String> {
    let process = PROCESS.get().ok_or("the limits are not installed")?;
    if let Some(ns) = limits.cpu_time_ns {
        let _ = process.cpu_time_ns.set(ns);
        let watcher = watcher(process)?;
        let timer = Timer::new(libc::CLOCK_PROCESS_CPUTIME_ID, watcher.thread, 0)?;
        timer.start(ns, PERIOD_NS_MAX)?;
        std::mem::forget(timer); // for the life of the process
        // The kernel's own, should the watcher be hindered: whole seconds, so a second later.
        let seconds = ns.div_ceil(1_000_000_000).saturating_add(1);
        set_limit(libc::RLIMIT_CPU, seconds, seconds.saturating_add(2))?;
    }
    let each = [
        (libc::RLIMIT_NOFILE, limits.open_files),
        (libc::RLIMIT_NPROC, limits.user_processes),
        (libc::RLIMIT_FSIZE, limits.file_bytes),
        (libc::RLIMIT_CORE, (limits.core_bytes > 0).then_some(limits.core_bytes)),
    ];
    for (resource, limit) in each {
        if let Some(limit) = limit {
            set_limit(resource, limit, limit)?;
        }
    }
    // Last: what is above takes memory.
    if let Some(bytes) = limits.data_bytes {
        let mut data = lock(&process.data);
        data.base_bytes = data_bytes()?.saturating_add(THREAD_BYTES).saturating_add(bytes);
        set_limit(libc::RLIMIT_DATA, data.base_bytes, u64::MAX)?;
        MEMORY_LIMITED.store(true, Relaxed);
    }
    Ok(())
}

/// `setrlimit`. The hard limit is never raised, so what is asked for beyond it is what there is.
fn set_limit(resource: libc::__rlimit_resource_t, soft: u64, hard: u64) -> Result<(), String> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a live rlimit that the call fills.
    if unsafe { libc::getrlimit(resource, &raw mut limit) } != 0 {
        return Err(last_error("getrlimit"));
    }
    // RLIMIT_CORE was lowered by `install`, in its soft half only.
    let hard = hard.max(soft).min(limit.rlim_max);
    let limit = libc::rlimit {
        rlim_cur: soft.min(hard),
        rlim_max: if resource == libc::RLIMIT_CORE { limit.rlim_max } else { hard },
    };
    // SAFETY: `limit` is a live rlimit that the call reads.
    if unsafe { libc::setrlimit(resource, &raw const limit) } != 0 {
        return Err(last_error("setrlimit"));
    }
    Ok(())
}

/// What `RLIMIT_DATA` counts of this process now.
fn data_bytes() -> Result<u64, String> {
    let status =
        std::fs::read_to_string("/proc/self/status").map_err(|e| format!("/proc/self/status: {e}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmData:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| "/proc/self/status has no VmData".to_owned())
}

/// Makes room within the memory limit for what a session's thread takes of its own. Given back when it drops.
pub(crate) fn make_room(stack_bytes: u64) -> Room {
    let bytes = stack_bytes.saturating_add(THREAD_BYTES);
    change_room(|data| data.open_bytes = data.open_bytes.saturating_add(bytes));
    Room { bytes }
}

/// Room for one session's thread.
#[derive(Debug)]
pub(crate) struct Room {
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        change_room(|data| data.open_bytes = data.open_bytes.saturating_sub(self.bytes));
    }
}

fn change_room(change: impl FnOnce(&mut Data)) {
    let Some(process) = PROCESS.get() else { return };
    let mut data = lock(&process.data);
    if data.base_bytes == 0 {
        return;
    }
    change(&mut data);
    if data.open_bytes > data.granted_bytes {
        data.granted_bytes = data.open_bytes;
        // Without it the thread may not start, which is an error of its own.
        let _ = set_limit(libc::RLIMIT_DATA, data.base_bytes.saturating_add(data.granted_bytes), u64::MAX);
    }
}

// ---- the watcher ---------------------------------------------------------------------------------------------------

/// The signal by which timers wake the watcher. Every other thread leaves it alone: it is sent to the watcher only.
fn wake_signal() -> libc::c_int {
    libc::SIGRTMAX() - 3
}

/// The watcher, started on first use.
fn watcher(process: &'static Process) -> Result<&'static Watcher, String> {
    if let Some(watcher) = process.watcher.get() {
        return Ok(watcher);
    }
    let (tell, told) = mpsc::channel();
    std::thread::Builder::new()
        .name("limits".into())
        .stack_size(WATCHER_STACK_BYTES)
        .spawn(move || {
            block_all_but_faults();
            let _ = tell.send(thread_id());
            watch(process);
        })
        .map_err(|e| format!("the thread that watches CPU time cannot be started: {e}"))?;
    let thread = told.recv().map_err(|e| e.to_string())?;
    Ok(process.watcher.get_or_init(|| Watcher { thread, sessions: Mutex::default() }))
}

fn thread_id() -> libc::pid_t {
    // SAFETY: has no preconditions.
    unsafe { libc::gettid() }
}

/// Signals for the process go to its other threads; faults of this one are its own.
fn block_all_but_faults() {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the call fills the set.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGABRT, libc::SIGTRAP] {
        // SAFETY: the set is initialised (above), the number is a signal's.
        unsafe { libc::sigdelset(set.as_mut_ptr(), fault) };
    }
    // SAFETY: the set is initialised; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), ptr::null_mut()) };
}

/// The watcher's life.
fn watch(process: &'static Process) {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the call fills the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: the set is initialised (above), the number is a signal's.
    unsafe { libc::sigaddset(set.as_mut_ptr(), wake_signal()) };
    loop {
        let mut information = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: the set is initialised, the information is writable.
        let signal = unsafe { libc::sigwaitinfo(set.as_ptr(), information.as_mut_ptr()) };
        if signal != wake_signal() {
            continue;
        }
        // SAFETY: a siginfo of zeroes is valid, and the call has filled it in.
        let information = unsafe { information.assume_init() };
        // Not a timer's: somebody else uses this signal, and it is not for us.
        if information.si_code != libc::SI_TIMER {
            continue;
        }
        // SAFETY: the union holds a value for a timer's signal.
        let value = unsafe { information.si_value() };
        look(process, value.sival_ptr.addr());
    }
}

/// A timer has gone off: the process's (0) or a session's.
fn look(process: &'static Process, timer: usize) {
    let session = u32::try_from(timer).unwrap_or(0);
    if session == 0 {
        let used = clock_ns(libc::CLOCK_PROCESS_CPUTIME_ID);
        if process.cpu_time_ns.get().is_some_and(|max| used >= *max) {
            end(process, &LimitNote { exceeded: Exceeded::WorkerCpuTime, session: None, amount: used });
        }
        return;
    }
    let Some(watcher) = process.watcher.get() else { return };
    let watched = lock(&watcher.sessions).iter().find(|watched| watched.session == session).cloned();
    if let Some(watched) = watched {
        watched.look(process);
    }
}

/// Ends the process, with a note of why.
fn end(process: &Process, note: &LimitNote) {
    process.page.note_limit(note);
    // SAFETY: has no preconditions.
    let own = unsafe { libc::getpid() };
    // SAFETY: takes numbers only; ends this process.
    unsafe { libc::kill(own, libc::SIGKILL) };
}

impl Watched {
    /// How many calls the thread has taken, in all lanes.
    fn taken(&self) -> u64 {
        let progress = self.region.progress();
        let (direct, ring) = progress.taken();
        direct.wrapping_add(ring).wrapping_add(progress.stream_taken())
    }

    /// Whether the thread is in a call. It may be about to take one that has just come; then it is not a look later.
    fn in_call(&self) -> bool {
        let pending = |turn: Turn| {
            let idle = matches!(turn, Turn::Closed | Turn::Unknown(hotcell_channel::slot::IDLE));
            !turn.is_answered() && !idle
        };
        // The stream has its pages once something was taken from it.
        let last = self.region.progress().stream_taken().checked_sub(1);
        last.is_some_and(|last| !self.region.stream().has_reply(last))
            || pending(self.region.direct().turn())
            || (0..self.region.geometry().slots).any(|slot| pending(self.region.slot(slot).turn()))
    }

    fn look(&self, process: &'static Process) {
        let now = clock_ns(self.clock);
        if self.limits.cpu_time_ns.is_some_and(|max| now >= max) {
            return self.accuse(process, ANYBODY, Exceeded::SessionCpuTime, now);
        }
        let taken = self.taken();
        let mut seen = lock(&self.seen);
        if seen.taken != taken || !self.in_call() {
            *seen = Seen { taken, since: now };
            return;
        }
        let used = now.saturating_sub(seen.since);
        drop(seen);
        if self.limits.cpu_time_per_call_ns.is_some_and(|max| used >= max) {
            // One more than the number, so that none is NOBODY.
            self.accuse(process, taken.wrapping_add(1), Exceeded::CallCpuTime, used);
        }
    }

    fn accuse(&self, process: &'static Process, call: u64, exceeded: Exceeded, used: u64) {
        self.exceeded.store(used, SeqCst);
        self.accused.store(call, SeqCst);
        // SAFETY: has no preconditions.
        let own = unsafe { libc::getpid() };
        // SAFETY: takes numbers only. The thread is one of this process; should it have ended, nothing happens.
        unsafe { libc::syscall(libc::SYS_tgkill, own, self.thread, libc::SIGXCPU) };
        for _ in 0..PATIENCE_STEPS {
            std::thread::sleep(PATIENCE_STEP);
            if self.accused.load(SeqCst) == NOBODY {
                return; // withdrawn by the handler
            }
            if call != ANYBODY && self.taken().wrapping_add(1) != call {
                // The call has returned and the signal is late: the handler must not believe it any more.
                self.accused.store(NOBODY, SeqCst);
                return;
            }
        }
        end(process, &LimitNote { exceeded, session: Some(self.session), amount: used });
    }
}

/// `clock_gettime`, in nanoseconds; 0 for the clock of a thread that has ended.
fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live timespec that the call fills.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return 0;
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// A timer that wakes the watcher. Deleted when dropped.
#[derive(Debug)]
struct Timer(libc::timer_t);

impl Timer {
    /// `timer_create`, on a CPU clock, with `value` for the watcher.
    fn new(clock: libc::clockid_t, watcher: libc::pid_t, value: usize) -> Result<Self, String> {
        // SAFETY: all zeroes are a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = wake_signal();
        event.sigev_value = libc::sigval { sival_ptr: ptr::without_provenance_mut(value) };
        event.sigev_notify_thread_id = watcher;
        let mut timer = MaybeUninit::<libc::timer_t>::uninit();
        // SAFETY: the event is initialised, the timer is writable.
        if unsafe { libc::timer_create(clock, &raw mut event, timer.as_mut_ptr()) } != 0 {
            return Err(last_error("timer_create"));
        }
        // SAFETY: the call has succeeded and written it.
        Ok(Self(unsafe { timer.assume_init() }))
    }

    /// `timer_settime`: goes off after `first_ns` of the clock, and each `period_ns` after that.
    fn start(&self, first_ns: u64, period_ns: u64) -> Result<(), String> {
        let time = |ns: u64| libc::timespec {
            tv_sec: libc::time_t::try_from(ns / 1_000_000_000).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::try_from(ns % 1_000_000_000).unwrap_or(0),
        };
        let times = libc::itimerspec { it_value: time(first_ns), it_interval: time(period_ns) };
        // SAFETY: the timer exists until the drop; the times are live, the old ones are not asked for.
        if unsafe { libc::timer_settime(self.0, 0, &raw const times, ptr::null_mut()) } != 0 {
            return Err(last_error("timer_settime"));
        }
        Ok(())
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer exists: it was made by `new` and is deleted here only.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// Watches the calling thread, which serves `session`, until the guard drops.
pub(crate) fn watch_session(
    session: u32,
    limits: SessionLimits,
    region: &Arc<Region>,
) -> Result<Option<SessionGuard>, String> {
    let shortest = [limits.cpu_time_per_call_ns, limits.cpu_time_ns].into_iter().flatten().min();
    let Some(shortest) = shortest else { return Ok(None) };
    let process = PROCESS.get().ok_or("the limits are not installed")?;
    let watcher = watcher(process)?;
    let mut clock = 0;
    // SAFETY: has no preconditions.
    let thread = unsafe { libc::pthread_self() };
    // SAFETY: the thread is alive, it is this one; the clock is writable.
    let error = unsafe { libc::pthread_getcpuclockid(thread, &raw mut clock) };
    if error != 0 {
        return Err(format!("pthread_getcpuclockid: {}", io::Error::from_raw_os_error(error)));
    }
    let watched = Arc::new(Watched {
        session,
        thread: thread_id(),
        clock,
        region: Arc::clone(region),
        limits,
        accused: AtomicU64::new(NOBODY),
        exceeded: AtomicU64::new(0),
        seen: Mutex::default(),
    });
    lock(&watcher.sessions).push(Arc::clone(&watched));
    WATCHED.set(Arc::as_ptr(&watched));
    // From here on the drop takes it back.
    let mut guard = SessionGuard { watched, timer: None };
    let value = usize::try_from(session).map_err(|e| e.to_string())?;
    let timer = Timer::new(libc::CLOCK_THREAD_CPUTIME_ID, watcher.thread, value)?;
    let period = (shortest / LOOKS).clamp(PERIOD_NS_MIN, PERIOD_NS_MAX);
    timer.start(period, period)?;
    guard.timer = Some(timer);
    Ok(Some(guard))
}

/// A session is watched for as long as this lives. It belongs to the session's thread.
pub(crate) struct SessionGuard {
    watched: Arc<Watched>,
    timer: Option<Timer>,
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        drop(self.timer.take());
        // An accusation that comes now is of a thread that ends in peace.
        self.watched.accused.store(NOBODY, SeqCst);
        if let Some(watcher) = PROCESS.get().and_then(|process| process.watcher.get()) {
            lock(&watcher.sessions).retain(|watched| !Arc::ptr_eq(watched, &self.watched));
        }
        WATCHED.set(ptr::null());
    }
}

// ---- from here on: called by the crash handler ---------------------------------------------------------------------

/// What a `SIGXCPU` means to the thread that it hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accusation {
    /// None of ours: the kernel's own limit, or native code's doing.
    None,
    /// The call that was meant has returned. Nothing is to happen.
    Withdrawn,
    /// It is true.
    True(LimitNote),
}

/// Whether the calling thread is accused of too much CPU time. Async-signal-safe.
pub(crate) fn accusation() -> Accusation {
    let watched = WATCHED.get();
    if watched.is_null() {
        return Accusation::None;
    }
    // SAFETY: the thread's own guard holds the `Watched` alive and sets this to null before it lets go of it; both happen on this thread.
    let watched = unsafe { &*watched };
    let session = Some(watched.session);
    let amount = watched.exceeded.load(SeqCst);
    match watched.accused.load(SeqCst) {
        // Also a signal that was late: the watcher has taken it back.
        NOBODY if amount != 0 => {
            watched.exceeded.store(0, SeqCst);
            Accusation::Withdrawn
        }
        NOBODY => Accusation::None,
        ANYBODY => Accusation::True(LimitNote { exceeded: Exceeded::SessionCpuTime, session, amount }),
        call if call == watched.taken().wrapping_add(1) && watched.in_call() => {
            Accusation::True(LimitNote { exceeded: Exceeded::CallCpuTime, session, amount })
        }
        _ => {
            watched.accused.store(NOBODY, SeqCst);
            watched.exceeded.store(0, SeqCst);
            Accusation::Withdrawn
        }
    }
}

/// Whether a fault, or an abort, comes of memory that the process was not given. `errno` is that of the moment of the signal. Makes `mmap` and `munmap`.
///
/// Two signs: there is next to nothing left, or else the last thing that failed on this thread failed for want of memory, and the fault is what a null pointer leads to.
pub(crate) fn memory_was_refused(errno: i32, fault_address: Option<u64>) -> bool {
    if !MEMORY_LIMITED.load(Relaxed) {
        return false;
    }
    let near_null = fault_address.is_none_or(|address| address < NEAR_NULL);
    (errno == libc::ENOMEM && near_null) || nearly_used_up()
}

fn nearly_used_up() -> bool {
    // SAFETY: an anonymous mapping at an address that the kernel chooses touches no other memory.
    let probe = unsafe {
        libc::mmap(
            ptr::null_mut(),
            NEARLY_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if probe == libc::MAP_FAILED {
        return true;
    }
    // SAFETY: the mapping made above, which nothing points to.
    unsafe { libc::munmap(probe, NEARLY_BYTES) };
    false
}
