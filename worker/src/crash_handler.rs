#![allow(unsafe_code)]
//! The crash handler: what the worker still does when native code has broken it.
//!
//! **The law.** [`install`], [`enter_thread`] and [`set_session`] run on a healthy process and may do anything. Everything that is
//! reached from [`on_signal`] runs in the middle of whatever broke, on the alternate stack, and so:
//!
//! - it stores into the [`CrashPage`] (atomics), into this thread's [`Here`] (atomics without destructors) and its own
//!   stack, and nowhere else; the one exception is the saved context of the signal, which is its own to change;
//! - it reads foreign memory (stacks, the linker's tables) only through [`Memory`], which asks the kernel first;
//! - it makes only syscalls that native code itself needs for `abort` or `malloc`: `rt_sigprocmask`, `rt_sigaction`, `rt_sigreturn`, `getpid`,
//!   `gettid`, `tgkill`, `clock_nanosleep`, `exit_group`, `futex`, `mmap`, `munmap`, `prlimit64`, `prctl`; a refused one costs detail, not the report;
//! - it takes no lock, allocates nothing, formats nothing, never panics, and each loop has a bound.
//!
//! The one piece that is not ours is `_Unwind_Backtrace`. With a C library that has `_dl_find_object` (glibc 2.35) it is
//! lock-free and allocates nothing; without that function it is not called. It trusts the stack it walks, so it may fault.
//!
//! **Steps.** The handler is a ladder that is only climbed upwards. A fault inside the handler enters it again, on the
//! same alternate stack, above the frames of the broken step; that nested handler goes on with the next
//! step and never returns, so each step is tried at most once, and the death is always that of the first signal.
//!
//! ```text
//! FACTS ──► UNWIND ──► WALK ──► NAME ──► DIE         fault in UNWIND: go on with WALK
//!   │ stage 2   frame by frame     │ stage 3           fault in WALK:   go on with NAME
//!   └ another thread has the page: wait ──► DIE        fault in FACTS or NAME: DIE
//! ```
//!
//! **Death.** The kernel shall see the true signal, at the faulting instruction. So the signal is blocked, sent to this very
//! thread (`tgkill`) with its default action, and unblocked in the saved context: it is pending, and kills
//! between the handler's return and the next instruction. This holds for a faulting load, which would fault again, as well
//! as for a breakpoint, `abort` or a trapped syscall, which would not.

use std::cell::Cell;
use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::marker::PhantomData;
use std::mem::{self, MaybeUninit};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::limits::{self, Accusation};
use hotcell_channel::crash::{
    Access, CrashPage, Exceeded, FRAMES_MAX, Facts, INSTRUCTION_BYTES_MAX, LimitNote, OBJECT_NAME_BYTES_MAX,
    SYMBOL_NAME_BYTES_MAX,
};

/// The signals by which native code dies of its own doing. The last two: it used more CPU time, or wrote more, than it may.
const SIGNALS: [c_int; 9] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGABRT,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGXCPU,
    libc::SIGXFSZ,
];
/// Room for the handler, a nested one, the unwinder, and the registers that the kernel saves for each.
const STACK_BYTES_MIN: usize = 64 * 1024;
/// The page size of the targets, and the grain in which memory is or is not there. (aarch64 may have larger
/// pages, of which this is a part.)
const PAGE_BYTES: u64 = 4096;
/// How far beyond the stack's guard an overflowing frame may reach and is still judged an overflow.
const OVERFLOW_BYTES_MAX: u64 = 64 * 1024;
/// How far below the stack a stack pointer may be that came from there (a large frame, `alloca`).
const ALLOCA_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Most symbols that are looked at in one crash: about a millisecond.
const SYMBOLS_MAX: u64 = 200_000;
/// How long a function may be that tells no size.
const UNSIZED_BYTES_MAX: u64 = 4096;
/// Most entries of an object's dynamic section that are looked at.
const DYNAMIC_ENTRIES_MAX: u64 = 512;
/// Most frames of the handler's own that the unwinder may show before the crashed one.
const OWN_FRAMES_MAX: u32 = 32;
/// How long a second crashing thread waits for the first to end the process: 200 times 1 ms.
const WAITS_MAX: u32 = 200;
/// Most bytes of the serve loop's frame above the number of the running function: it is found if it has no more.
const SERVE_FRAME_BYTES_MAX: u64 = 16 * 1024;
/// "None" for a session or a function.
const NONE: u32 = u32::MAX;

// The steps of the handler, in order; each is entered at most once per crash.
const STEP_NONE: u32 = 0;
const STEP_FACTS: u32 = 1;
const STEP_UNWIND: u32 = 2;
const STEP_WALK: u32 = 3;
const STEP_NAME: u32 = 4;
const STEP_DIE: u32 = 5;

/// What `install` prepares and the handler only reads.
struct Installed {
    page: &'static CrashPage,
    /// A forked child inherits the handler and the page, but its death is not the worker's.
    process: libc::pid_t,
    find_object: Option<FindObject>,
    /// The program's own file name, which the linker's table doesn't hold.
    program: [u8; OBJECT_NAME_BYTES_MAX],
}

static INSTALLED: OnceLock<Installed> = OnceLock::new();

/// What the handler knows of the thread it runs on. Written by the thread itself only, so all accesses are relaxed:
/// a signal handler sees what its own thread stored before.
struct Here {
    session: AtomicU32,
    /// Address of the number of the function that runs; 0 if none was told. Read as foreign memory.
    running: AtomicU64,
    /// Address of the word that callers of the session's direct slot sleep on; 0 if none was told. Only the kernel looks there.
    caller: AtomicU64,
    /// Lowest address of the thread's stack, 0 if not known, and the size of the guard below it.
    stack_low: AtomicU64,
    stack_guard_bytes: AtomicU64,
    /// The step that is being taken, so that a nested handler knows where to go on.
    step: AtomicU32,
    signal: AtomicU32,
    /// Frame pointer and stack pointer of the last frame that was found: where the walk starts.
    frame_pointer: AtomicU64,
    frame_low: AtomicU64,
}

thread_local! {
    // Const and without destructor: an access is an address computation, at any moment, on any thread.
    static HERE: Here = const {
        Here {
            session: AtomicU32::new(NONE),
            running: AtomicU64::new(0),
            caller: AtomicU64::new(0),
            stack_low: AtomicU64::new(0),
            stack_guard_bytes: AtomicU64::new(0),
            step: AtomicU32::new(STEP_NONE),
            signal: AtomicU32::new(0),
            frame_pointer: AtomicU64::new(0),
            frame_low: AtomicU64::new(0),
        }
    };
}

/// Installs the handler for the whole process and names the page it writes to. A second call keeps the first page.
///
/// Call it before foreign code is loaded and before the sandbox closes. Threads that may overflow their stack each need
/// [`enter_thread`] too.
pub(crate) fn install(page: &'static CrashPage) {
    INSTALLED.get_or_init(|| Installed {
        page,
        // SAFETY: has no preconditions.
        process: unsafe { libc::getpid() },
        find_object: FindObject::from_linker(),
        program: program_name(),
    });
    // The unwinder's and the kernel interface's one-time work (pthread_once, lazy binding) is done here, not there.
    // SAFETY: `ignore` is the callback the unwinder expects, and ignores the argument.
    unsafe { _Unwind_Backtrace(ignore, ptr::null_mut()) };
    Memory::new().readable(ptr::from_ref(page).addr() as u64, 8);

    // SAFETY: all zeros are a valid sigaction: default action, empty mask, no flags.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_signal;
    action.sa_sigaction = handler as usize;
    // SA_RESTART for the one signal that the handler may return from: a late SIGXCPU.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER | libc::SA_RESTART;
    // No foreign handler may run in the middle of ours, but our own must, to take a nested fault.
    // SAFETY: the mask is a valid, writable signal set.
    unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    for signal in SIGNALS {
        // SAFETY: as above, and the signal number is valid.
        unsafe { libc::sigdelset(&raw mut action.sa_mask, signal) };
    }
    for signal in SIGNALS {
        // SAFETY: the action is initialised and its handler keeps the law of this file. The call can't fail: the
        // signal may be handled.
        unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
        // A signal mask survives exec; a blocked fault would kill with no report.
        set_blocked(signal, false);
    }
}

/// Readies the calling thread for its crash: gives it a stack for its signal handlers and notes where its own stack ends.
///
/// A thread that gets no memory for the stack does without: it reports its crashes all the same, but for a stack overflow.
/// For the main thread, set the stack's rlimit before: the end of its stack is computed from it.
pub(crate) fn enter_thread() -> ThreadGuard {
    let (low, guard_bytes) = stack_bounds().unwrap_or((0, 0));
    HERE.with(|here| {
        here.stack_low.store(low, Ordering::Relaxed);
        here.stack_guard_bytes.store(guard_bytes, Ordering::Relaxed);
    });
    ThreadGuard { stack: AltStack::new().ok() }
}

/// Notes which session the calling thread serves, where it keeps the number of the function that it is calling
/// (`u32::MAX` for none), and the word that the direct slot's caller sleeps on, until the thread's guard drops. `running` has to lie in the frame of the serve loop: the backtrace ends there.
///
/// The serve loop notes a call by one relaxed store to its own memory. The handler takes the address for what it is, a number:
/// it asks the kernel before it reads, so an address gone stale gives a wrong function and no harm.
pub(crate) fn set_session(session: u32, running: &AtomicU32, caller: &AtomicU32) {
    HERE.with(|here| {
        here.session.store(session, Ordering::Relaxed);
        here.running.store(ptr::from_ref(running).expose_provenance() as u64, Ordering::Relaxed);
        here.caller.store(ptr::from_ref(caller).expose_provenance() as u64, Ordering::Relaxed);
    });
}

/// Notes in the crash page that a session's memory limit has refused the calling thread something; [`take_refusal_back`] takes it back. Allocates nothing: it is
/// called in the middle of an allocation.
pub(crate) fn push_refusal(session: u32, asked: u64, used: u64) -> Option<usize> {
    let installed = INSTALLED.get()?;
    // SAFETY: has no preconditions.
    if unsafe { libc::getpid() } != installed.process {
        return None; // the page is the worker's, not its children's
    }
    installed.page.push_refusal(session, thread_id().cast_unsigned(), asked, used)
}

/// The thread has lived through what [`push_refusal`] noted.
pub(crate) fn take_refusal_back(index: usize) {
    let Some(installed) = INSTALLED.get() else { return };
    // SAFETY: has no preconditions.
    if unsafe { libc::getpid() } == installed.process {
        installed.page.take_refusal_back(index);
    }
}

/// What [`enter_thread`] and [`set_session`] noted, for as long as it holds.
#[derive(Debug)]
#[must_use = "the thread loses its signal stack when this drops"]
pub(crate) struct ThreadGuard {
    stack: Option<AltStack>,
}

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        HERE.with(|here| {
            here.session.store(NONE, Ordering::Relaxed);
            here.running.store(0, Ordering::Relaxed);
            here.caller.store(0, Ordering::Relaxed);
            here.stack_low.store(0, Ordering::Relaxed);
        });
        drop(self.stack.take());
    }
}

/// The calling thread's alternate signal stack; dropping it gives the previous one back.
///
/// Owns the mapping `base..base + bytes`, whose first page is a guard. Not `Send`: only the thread that
/// uses the stack can stop using it.
#[derive(Debug)]
struct AltStack {
    base: *mut c_void,
    bytes: usize,
    previous: libc::stack_t,
    not_send: PhantomData<Cell<*mut ()>>,
}

impl AltStack {
    fn new() -> io::Result<Self> {
        let guard_bytes = usize::try_from(page_bytes()).unwrap_or(1 << 16);
        // SAFETY: has no preconditions. 0 (a kernel that doesn't tell) leaves the minimum.
        let frame_bytes = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) };
        let frame_bytes = usize::try_from(frame_bytes).unwrap_or(0);
        let usable = STACK_BYTES_MIN.max(frame_bytes.saturating_mul(6)).next_multiple_of(guard_bytes);
        let bytes = usable + guard_bytes;
        // SAFETY: an anonymous mapping at an address that the kernel chooses touches no other memory.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let none = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
        // From here on the drop unmaps, whatever fails.
        let mut guard = Self { base, bytes, previous: none, not_send: PhantomData };
        // SAFETY: the page lies in the mapping made above, and nothing uses it yet.
        if unsafe { libc::mprotect(base, guard_bytes, libc::PROT_NONE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let stack =
            libc::stack_t { ss_sp: base.wrapping_byte_add(guard_bytes), ss_flags: 0, ss_size: usable };
        // SAFETY: the stack is the mapping above its guard; it stays mapped until the drop takes it out of use.
        if unsafe { libc::sigaltstack(&raw const stack, &raw mut guard.previous) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(guard)
    }
}

impl Drop for AltStack {
    fn drop(&mut self) {
        let mut current = self.previous;
        // SAFETY: only asks; `current` is writable.
        let asked = unsafe { libc::sigaltstack(ptr::null(), &raw mut current) } == 0;
        let range = self.base.addr()..self.base.addr() + self.bytes;
        // Foreign code may have put a stack of its own in place: then that one stays.
        if asked && range.contains(&current.ss_sp.addr()) {
            // SS_ONSTACK is what the kernel tells, not what it takes.
            self.previous.ss_flags &= libc::SS_DISABLE;
            // SAFETY: the previous stack is the caller's, as it was before `new`; `SS_DISABLE` names none.
            if unsafe { libc::sigaltstack(&raw const self.previous, ptr::null_mut()) } != 0 {
                // Still in use (a drop inside of a handler): a leak is the lesser evil.
                return;
            }
        }
        // SAFETY: the mapping is ours alone (`new`), and no longer this thread's signal stack (above).
        unsafe { libc::munmap(self.base, self.bytes) };
    }
}

fn page_bytes() -> u64 {
    // SAFETY: has no preconditions.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(PAGE_BYTES)
}

/// Lowest address of the calling thread's stack and the size of the guard below it; `None` where the C library can't
/// tell (the main thread without `/proc`).
fn stack_bounds() -> Option<(u64, u64)> {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: has no preconditions.
    let thread = unsafe { libc::pthread_self() };
    // SAFETY: the thread is alive, it is this one; the call initialises the attributes.
    if unsafe { libc::pthread_getattr_np(thread, attributes.as_mut_ptr()) } != 0 {
        return None;
    }
    let mut low = ptr::null_mut();
    let mut bytes = 0;
    let mut guard_bytes = 0;
    // SAFETY: the attributes are initialised (above); the outputs are writable.
    let got = unsafe { libc::pthread_attr_getstack(attributes.as_ptr(), &raw mut low, &raw mut bytes) };
    // SAFETY: as above.
    let got_guard = unsafe { libc::pthread_attr_getguardsize(attributes.as_ptr(), &raw mut guard_bytes) };
    // SAFETY: initialised by pthread_getattr_np, and not used after this.
    unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    (got == 0 && got_guard == 0).then_some((low.addr() as u64, guard_bytes as u64))
}

/// The file name of the running program, NUL-padded; empty where `/proc` is missing.
fn program_name() -> [u8; OBJECT_NAME_BYTES_MAX] {
    let mut name = [0; OBJECT_NAME_BYTES_MAX];
    let program = std::env::current_exe().unwrap_or_default();
    let file = program.file_name().unwrap_or_default().as_encoded_bytes();
    for (target, source) in name.iter_mut().zip(file) {
        *target = *source;
    }
    name
}

// ---- from here on: reached from the handler ------------------------------------------------------------------

/// The handler; see the module's law.
extern "C" fn on_signal(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let context = Context(context.cast());
    let Some(installed) = INSTALLED.get() else { return die(signal, Some(context)) };
    // SAFETY: has no preconditions.
    if unsafe { libc::getpid() } != installed.process {
        return die(signal, Some(context));
    }
    // As the broken code left it.
    let errno = errno();
    if signal == libc::SIGXCPU && sent_by_thread(info, installed.process) {
        match limits::accusation() {
            // The call for which the signal was meant has returned. Nothing has happened.
            Accusation::Withdrawn => return,
            Accusation::True(note) => drop(installed.page.note_limit(&note)),
            Accusation::None => {}
        }
    }
    HERE.with(|here| {
        let broken = here.step.load(Ordering::Relaxed);
        if broken != STEP_NONE {
            let next = if broken == STEP_FACTS { STEP_DIE } else { broken + 1 };
            // Before anything that could fault again. A fault in FACTS may have been the page itself, which native code can unmap.
            here.step.store(next, Ordering::Relaxed);
            if next < STEP_DIE {
                installed.page.mark_nested();
            }
            climb(installed, here, next, true);
            // This context is that of a fault in the handler, to which there is no way back.
            return die(here.signal.load(Ordering::Relaxed).cast_signed(), None);
        }
        here.signal.store(signal.cast_unsigned(), Ordering::Relaxed);
        here.step.store(STEP_FACTS, Ordering::Relaxed);
        if installed.page.claim() {
            let access = write_facts(installed.page, here, signal, errno, info, context);
            here.step.store(STEP_UNWIND, Ordering::Relaxed);
            unwind(installed, here, context, access);
            climb(installed, here, STEP_WALK, false);
        } else {
            here.step.store(STEP_DIE, Ordering::Relaxed);
            wait_for_the_end();
        }
        die(signal, Some(context));
    });
}

/// Whether a thread of this process sent the signal to this one, rather than the kernel or somebody else.
fn sent_by_thread(info: *const libc::siginfo_t, process: libc::pid_t) -> bool {
    // SAFETY: the kernel gave the handler this siginfo (SA_SIGINFO), and nobody changes it.
    let information = unsafe { &*info };
    information.si_code == libc::SI_TKILL && {
        // SAFETY: the union holds the sender for this code.
        let sender = unsafe { information.si_pid() };
        sender == process
    }
}

/// Takes the steps from `step` on up to the last before death. `nested`: an earlier step faulted.
fn climb(installed: &Installed, here: &Here, step: u32, nested: bool) {
    if step <= STEP_WALK {
        here.step.store(STEP_WALK, Ordering::Relaxed);
        walk(installed, here, nested);
    }
    if step <= STEP_NAME {
        here.step.store(STEP_NAME, Ordering::Relaxed);
        name_frames(installed);
        installed.page.finish();
        wake_caller(here);
    }
    here.step.store(STEP_DIE, Ordering::Relaxed);
}

/// Step FACTS: what the kernel and this thread know without a look at the stack.
fn write_facts(
    page: &CrashPage,
    here: &Here,
    signal: c_int,
    errno: c_int,
    info: *const libc::siginfo_t,
    context: Context,
) -> Option<Access> {
    // SAFETY: the kernel gave the handler this siginfo (SA_SIGINFO), and nobody changes it.
    let information = unsafe { &*info };
    let code = information.si_code;
    // Only a fault that the kernel raised itself has an address; SI_KERNEL says that the processor gave none.
    let faulted = code > 0
        && code != SI_KERNEL
        && matches!(signal, libc::SIGSEGV | libc::SIGBUS | libc::SIGFPE | libc::SIGILL);
    let fault_address = faulted.then(|| {
        // SAFETY: the union holds an address for these signals and codes.
        unsafe { information.si_addr() }.addr() as u64
    });
    let syscall = (signal == libc::SIGSYS && code > 0).then(|| {
        // siginfo of SIGSYS: three ints, padding, the caller's address, then the number of the syscall.
        // SAFETY: a siginfo is 128 bytes, aligned for an int, and the kernel filled in this part for SIGSYS.
        unsafe { info.cast::<u32>().wrapping_add(6).read() }
    });
    let memory_fault = matches!(signal, libc::SIGSEGV | libc::SIGBUS);
    let access = if memory_fault && faulted { context.access() } else { None };
    let (pc, sp) = (context.pc(), context.sp());
    let stack_overflow = memory_fault
        && fault_address.is_some_and(|address| {
            let low = here.stack_low.load(Ordering::Relaxed);
            is_stack_overflow(address, sp, low, here.stack_guard_bytes.load(Ordering::Relaxed))
        });
    let mut instruction = [0; INSTRUCTION_BYTES_MAX];
    let instruction_bytes = Memory::new().copy(pc, &mut instruction);
    let session = here.session.load(Ordering::Relaxed);
    let function = Memory::new().half(here.running.load(Ordering::Relaxed));
    // What native code does that does not get memory: it follows a null pointer, or gives up.
    let followed = if memory_fault { Some(fault_address.unwrap_or(u64::MAX)) } else { None };
    if (memory_fault || matches!(signal, libc::SIGABRT | libc::SIGTRAP | libc::SIGILL))
        && !stack_overflow
        && limits::memory_was_refused(errno, followed)
    {
        let session = (session != NONE).then_some(session);
        page.note_limit(&LimitNote { exceeded: Exceeded::WorkerMemory, session, amount: 0 });
    }
    page.write_facts(&Facts {
        signal,
        code,
        thread: thread_id().cast_unsigned(),
        session: (session != NONE).then_some(session),
        function: function.filter(|function| *function != NONE),
        stack_overflow,
        access,
        syscall,
        fault_address,
        pc,
        sp,
        instruction,
        instruction_bytes,
    });
    here.frame_pointer.store(context.frame_pointer(), Ordering::Relaxed);
    here.frame_low.store(sp, Ordering::Relaxed);
    access
}

/// Whether a fault at `address` with this stack pointer ran over the end of the stack that starts at `low`.
fn is_stack_overflow(address: u64, sp: u64, low: u64, guard_bytes: u64) -> bool {
    if low == 0 {
        return false;
    }
    // The usual case: the next frame reached into the guard.
    let guard_low = low.saturating_sub(guard_bytes.saturating_add(OVERFLOW_BYTES_MAX));
    let in_guard = (guard_low..low.saturating_add(PAGE_BYTES)).contains(&address);
    // A frame so large that it leapt over the guard. (A stack pointer far away belongs to another stack.)
    let leapt = sp < low
        && low - sp <= ALLOCA_BYTES_MAX
        && (sp.saturating_sub(OVERFLOW_BYTES_MAX)..low).contains(&address);
    in_guard || leapt
}

/// Step UNWIND: the backtrace by the unwind tables, published frame by frame.
fn unwind(installed: &Installed, here: &Here, context: Context, access: Option<Access>) {
    let page = installed.page;
    let pc = context.pc();
    page.push_frame(pc);
    let Some(find_object) = installed.find_object else { return };
    let mut memory = Memory::new();
    let mut trace = Trace { page, here, start: pc, own_frames: 0, found: false, push_start: None };
    if access != Some(Access::Execute) && memory.readable(pc, 16) {
        // SAFETY: `on_frame` gets the trace it expects; it lives and is not used otherwise during the call.
        unsafe { _Unwind_Backtrace(on_frame, (&raw mut trace).cast()) };
        return;
    }
    // A call to where no code is. The unwinder can't start there (it would read the code), but it can start at
    // the call: let the saved context be as if the call were about to be made, and put it back afterwards.
    let Some(return_address) = context.return_address(&mut memory) else { return };
    if find_object.find(return_address).is_none() {
        return;
    }
    let saved = context.registers();
    trace.start = return_address.wrapping_sub(1);
    trace.push_start = Some(return_address);
    context.leave_call(trace.start);
    // SAFETY: as above.
    unsafe { _Unwind_Backtrace(on_frame, (&raw mut trace).cast()) };
    context.set_registers(&saved);
    if !trace.found {
        page.push_frame(return_address);
    }
}

/// What the unwinder's callback works on.
struct Trace<'a> {
    page: &'a CrashPage,
    here: &'a Here,
    /// The pc of the first frame that is not the handler's.
    start: u64,
    own_frames: u32,
    found: bool,
    /// What to push for the first frame; `None` if it was pushed already.
    push_start: Option<u64>,
}

/// Called by the unwinder for each frame, the handler's own first.
extern "C" fn on_frame(unwinder: *mut UnwindContext, trace: *mut c_void) -> c_int {
    // SAFETY: `unwind` lent its trace to the unwinder for the time of the call, and uses it nowhere else meanwhile.
    let trace = unsafe { &mut *trace.cast::<Trace<'_>>() };
    let mut exact = 0;
    // SAFETY: the unwinder gave this context to the callback; `exact` is writable.
    let pc = unsafe { _Unwind_GetIPInfo(unwinder, &raw mut exact) } as u64;
    let push = if trace.found {
        Some(pc)
    } else if pc == trace.start && exact != 0 {
        trace.found = true;
        trace.push_start
    } else {
        trace.own_frames += 1;
        return if trace.own_frames < OWN_FRAMES_MAX { URC_NO_REASON } else { URC_END_OF_STACK };
    };
    // SAFETY: as above.
    let frame_low = unsafe { _Unwind_GetCFA(unwinder) } as u64;
    if is_beyond_serve_loop(trace.here, frame_low) {
        return URC_END_OF_STACK;
    }
    if push.is_some_and(|pc| pc == 0 || !trace.page.push_frame(pc)) {
        return URC_END_OF_STACK;
    }
    // SAFETY: as above; the register number is one that the unwinder knows for each frame.
    let frame_pointer = unsafe { _Unwind_GetGR(unwinder, FRAME_POINTER_REGISTER) } as u64;
    trace.here.frame_pointer.store(frame_pointer, Ordering::Relaxed);
    trace.here.frame_low.store(frame_low, Ordering::Relaxed);
    URC_NO_REASON
}

/// Whether the frame that begins at this address is one with which every thread starts, above the session's serve loop: that one has the number of the running function in its frame.
/// Such frames say nothing, and their tables and names cost more than a third of the handler's time.
fn is_beyond_serve_loop(here: &Here, frame_low: u64) -> bool {
    let running = here.running.load(Ordering::Relaxed);
    // Native code may be on another stack, which may be at any other address.
    running != 0 && (1..=SERVE_FRAME_BYTES_MAX).contains(&frame_low.wrapping_sub(running))
}

/// The callback of `install`'s rehearsal.
extern "C" fn ignore(_: *mut UnwindContext, _: *mut c_void) -> c_int {
    URC_NO_REASON
}

/// Step WALK: goes on by frame pointers where the unwind tables end before the stack does: in generated code, which has
/// none, and where the unwinder faulted. What is not an address in a loaded object is no frame.
fn walk(installed: &Installed, here: &Here, unwinder_faulted: bool) {
    let page = installed.page;
    let Some(find_object) = installed.find_object else { return };
    let count = page.frame_count();
    let last = count.checked_sub(1).and_then(|index| page.frame_pc(index));
    let tables_end = last.is_some_and(|pc| find_object.find(pc).is_none());
    if !tables_end && !unwinder_faulted {
        return;
    }
    let mut memory = Memory::new();
    let mut low = here.frame_low.load(Ordering::Relaxed);
    let mut frame_pointer = here.frame_pointer.load(Ordering::Relaxed);
    // The page takes FRAMES_MAX frames, so this is the bound of the loop.
    for _ in 0..FRAMES_MAX {
        // Frames lie upwards on one stack, and the walk is not lured to another.
        let near = frame_pointer >= low && frame_pointer - low <= ALLOCA_BYTES_MAX;
        if !near || !frame_pointer.is_multiple_of(8) {
            return;
        }
        let Some([next, return_address]) = memory.words(frame_pointer) else { return };
        if find_object.find(return_address).is_none() || !page.push_frame(return_address) {
            return;
        }
        low = frame_pointer + 16;
        frame_pointer = next;
    }
}

/// Step NAME: the object and the function of each frame. The symbols of an object are scanned once, for all frames in it.
fn name_frames(installed: &Installed) {
    let page = installed.page;
    let Some(find_object) = installed.find_object else { return };
    let mut memory = Memory::new();
    let mut named = [false; FRAMES_MAX];
    let mut symbols_left = SYMBOLS_MAX;
    for first in 0..page.frame_count() {
        if named.get(first) != Some(&false) {
            continue;
        }
        let Some(found) = lookup_pc(page, first).and_then(|pc| find_object.find(pc)) else { continue };
        let Some(object) = Object::read(&mut memory, &found) else { continue };
        let mut name = [0; OBJECT_NAME_BYTES_MAX];
        let name: &[u8] = match memory.file_name(object.name, &mut name) {
            0 => &installed.program,
            _ => &name,
        };
        let mut wanted = [Wanted::NONE; FRAMES_MAX];
        let frames = first..page.frame_count();
        // The frames of this object, by way of their pc: `f(index, pc as pushed, pc to look up)`.
        let each = |f: &mut dyn FnMut(usize, u64, u64)| {
            for index in frames.clone() {
                if let (Some(pc), Some(lookup)) = (page.frame_pc(index), lookup_pc(page, index))
                    && (found.start..found.end).contains(&lookup)
                {
                    f(index, pc, lookup);
                }
            }
        };
        let mut count = 0;
        each(&mut |index, pc, lookup| {
            if let Some(named) = named.get_mut(index) {
                *named = true;
            }
            page.name_object(index, name, pc.wrapping_sub(object.base));
            let offset = lookup.wrapping_sub(object.base);
            // A recursion gives the same pc many times.
            if !wanted.iter().take(count).any(|wanted| wanted.offset == offset)
                && let Some(slot) = wanted.get_mut(count)
            {
                slot.offset = offset;
                count += 1;
            }
        });
        let wanted = wanted.get_mut(..count).unwrap_or(&mut []);
        let Some(symbols) = Symbols::read(&mut memory, &object) else { continue };
        symbols.search(&mut memory, wanted, &mut symbols_left);
        each(&mut |index, pc, lookup| {
            let offset = lookup.wrapping_sub(object.base);
            let Some(wanted) = wanted.iter().find(|wanted| wanted.offset == offset) else { return };
            let Some(Named { start, name }) = wanted.answer() else { return };
            let mut text = [0; SYMBOL_NAME_BYTES_MAX];
            if memory.text(symbols.strings.wrapping_add(u64::from(name)), &mut text) != 0 {
                page.name_symbol(index, &text, pc.wrapping_sub(object.base.wrapping_add(start)));
            }
        });
    }
}

/// The address by which a frame is looked up: a call that never returns may be the last instruction of its function, so a
/// return address may lie in the next one.
fn lookup_pc(page: &CrashPage, index: usize) -> Option<u64> {
    let pc = page.frame_pc(index)?;
    Some(if index == 0 { pc } else { pc.saturating_sub(1) })
}

/// A search for the function at one address. Addresses are less the object's load base; name 0 is none.
#[derive(Clone, Copy)]
struct Wanted {
    offset: u64,
    /// The innermost function so far that reaches over the address.
    around: Named,
    /// The last function so far that starts before the address and does not, or is not known to, reach over it.
    before: Named,
    before_is_sized: bool,
}

#[derive(Clone, Copy)]
struct Named {
    start: u64,
    name: u32,
}

impl Wanted {
    const NONE: Self = Self {
        offset: 0,
        around: Named { start: 0, name: 0 },
        before: Named { start: 0, name: 0 },
        before_is_sized: false,
    };

    /// Takes a function into account. `is_internal` tells a name that people know less than another of the same function.
    fn offer(&mut self, symbol: &Symbol, mut is_internal: impl FnMut(u32) -> bool) {
        let Symbol { name, value: start, size, .. } = *symbol;
        if start > self.offset {
            return;
        }
        if self.offset - start < size {
            let than = self.around;
            let mut is_better_name = || is_internal(than.name) && !is_internal(name);
            if than.name == 0 || start > than.start || (start == than.start && is_better_name()) {
                self.around = Named { start, name };
            }
        } else if self.before.name == 0 || start > self.before.start {
            self.before = Named { start, name };
            self.before_is_sized = size != 0;
        } else if start == self.before.start {
            self.before_is_sized |= size != 0;
        }
    }

    /// The function that reaches over the address, else one just below that tells no size (assembler), else none: the
    /// name of a function from before would be a wrong name.
    fn answer(&self) -> Option<Named> {
        if self.around.name != 0 {
            return Some(self.around);
        }
        let near = self.before.name != 0
            && !self.before_is_sized
            && self.offset - self.before.start < UNSIZED_BYTES_MAX;
        near.then_some(self.before)
    }
}

/// A loaded object, from its `struct link_map` (the part that is the linker's public interface).
struct Object {
    base: u64,
    name: u64,
    dynamic: u64,
}

impl Object {
    fn read(memory: &mut Memory, found: &Found) -> Option<Self> {
        let [base, name, dynamic] = memory.words(found.link_map)?;
        Some(Self { base, name, dynamic })
    }
}

/// An object's dynamic symbols.
struct Symbols {
    table: u64,
    strings: u64,
    count: u64,
}

impl Symbols {
    fn read(memory: &mut Memory, object: &Object) -> Option<Self> {
        const DT_NULL: u64 = 0;
        const DT_HASH: u64 = 4;
        const DT_STRTAB: u64 = 5;
        const DT_SYMTAB: u64 = 6;
        const DT_GNU_HASH: u64 = 0x6fff_fef5;
        let (mut table, mut strings, mut hash, mut gnu_hash) = (0, 0, 0, 0);
        for entry in 0..DYNAMIC_ENTRIES_MAX {
            let [tag, value] = memory.words(object.dynamic.wrapping_add(entry * 16))?;
            // The linker has added the load base, but for objects whose section is read-only.
            let address = if value < object.base { value.wrapping_add(object.base) } else { value };
            match tag {
                DT_NULL => break,
                DT_HASH => hash = address,
                DT_STRTAB => strings = address,
                DT_SYMTAB => table = address,
                DT_GNU_HASH => gnu_hash = address,
                _ => {}
            }
        }
        if table == 0 || strings == 0 {
            return None;
        }
        let count = if hash != 0 {
            // nbucket, nchain: the second is the number of symbols.
            u64::from(memory.half(hash.wrapping_add(4))?)
        } else if gnu_hash != 0 {
            gnu_hash_count(memory, gnu_hash)?
        } else {
            // By habit, not by law, the strings follow the symbols.
            strings.saturating_sub(table) / SYMBOL_BYTES
        };
        Some(Self { table, strings, count })
    }

    /// Offers the functions to each wanted address.
    fn search(&self, memory: &mut Memory, wanted: &mut [Wanted], symbols_left: &mut u64) {
        let low = wanted.iter().map(|wanted| wanted.offset).min().unwrap_or(u64::MAX);
        let high = wanted.iter().map(|wanted| wanted.offset).max().unwrap_or(0);
        // All of them know a function that starts here or later.
        let mut floor = 0;
        let count = self.count.min(*symbols_left);
        *symbols_left -= count;
        for index in 0..count {
            let address = self.table.wrapping_add(index * SYMBOL_BYTES);
            let Some([word, value, size]) = memory.words(address) else { return };
            let symbol = Symbol::new(word, value, size);
            // Most symbols are of no interest to any frame.
            if !symbol.is_function || value > high || (value < floor && value.wrapping_add(size) <= low) {
                continue;
            }
            for wanted in &mut *wanted {
                wanted.offer(&symbol, |name| self.is_internal(memory, name));
            }
            floor = wanted.iter().map(|wanted| wanted.before.start).min().unwrap_or(0);
        }
    }

    /// Whether a name starts with an underscore: of two names of one function, the other is the one people know.
    fn is_internal(&self, memory: &mut Memory, name: u32) -> bool {
        let mut first = [0];
        memory.copy(self.strings.wrapping_add(u64::from(name)), &mut first);
        first == *b"_"
    }
}

/// Size of an `Elf64_Sym`.
const SYMBOL_BYTES: u64 = 24;

/// What is of use in an `Elf64_Sym`.
struct Symbol {
    name: u32,
    is_function: bool,
    value: u64,
    size: u64,
}

impl Symbol {
    /// From the three words: name u32, info u8, other u8, section u16 │ value u64 │ size u64.
    fn new(word: u64, value: u64, size: u64) -> Self {
        const STT_FUNC: u64 = 2;
        const STT_GNU_IFUNC: u64 = 10;
        let kind = (word >> 32) & 0xf;
        let is_defined = word >> 48 != 0;
        let is_function = is_defined && matches!(kind, STT_FUNC | STT_GNU_IFUNC);
        // The mask makes the conversion exact.
        let name = u32::try_from(word & 0xffff_ffff).unwrap_or(0);
        Self { name, is_function, value, size }
    }
}

/// The number of symbols, which a `DT_GNU_HASH` tells only by way of its last chain.
fn gnu_hash_count(memory: &mut Memory, table: u64) -> Option<u64> {
    // Header: bucket count, first hashed symbol, bloom words, bloom shift; then bloom u64s, buckets u32, chains u32.
    let mut header = [0; 3];
    for (field, offset) in header.iter_mut().zip([0, 4, 8]) {
        *field = u64::from(memory.half(table.wrapping_add(offset))?);
    }
    let [buckets, first, bloom_words] = header;
    let bucket_table = table.wrapping_add(16 + 8 * bloom_words);
    let chains = bucket_table.wrapping_add(4 * buckets);
    let mut last = 0;
    for bucket in 0..buckets.min(SYMBOLS_MAX) {
        last = last.max(u64::from(memory.half(bucket_table.wrapping_add(4 * bucket))?));
    }
    if last < first {
        return Some(first);
    }
    while last < SYMBOLS_MAX {
        let hash = memory.half(chains.wrapping_add(4 * (last - first)))?;
        last += 1;
        // The lowest bit marks the end of a chain.
        if hash & 1 != 0 {
            break;
        }
    }
    Some(last)
}

/// glibc's lock-free way from an address to its object; published before an object's constructors run.
#[derive(Clone, Copy)]
struct FindObject(unsafe extern "C" fn(*mut c_void, *mut DlFindObject) -> c_int);

/// `struct dl_find_object`, with room to spare.
#[repr(C)]
struct DlFindObject {
    flags: u64,
    map_start: u64,
    map_end: u64,
    link_map: u64,
    other: [u64; 12],
}

/// Where an object is mapped, and the address of its `link_map`.
struct Found {
    start: u64,
    end: u64,
    link_map: u64,
}

impl FindObject {
    /// The function, if the C library has it. Not for the handler: `dlsym` takes locks.
    fn from_linker() -> Option<Self> {
        const NAME: &CStr = c"_dl_find_object";
        // SAFETY: the name is a C string.
        let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, NAME.as_ptr()) };
        // SAFETY: an address from dlsym is null, which is None, or the function, which has this type
        // since glibc 2.35.
        unsafe { mem::transmute::<*mut c_void, Option<unsafe extern "C" fn(_, _) -> _>>(symbol) }.map(Self)
    }

    fn find(self, pc: u64) -> Option<Found> {
        let mut result = DlFindObject { flags: 0, map_start: 0, map_end: 0, link_map: 0, other: [0; 12] };
        // SAFETY: any address may be asked for; the result has at least the room of the C library's struct.
        let failed = unsafe { self.0(pointer::<c_void>(pc).cast_mut(), &raw mut result) };
        (failed == 0).then_some(Found {
            start: result.map_start,
            end: result.map_end,
            link_map: result.link_map,
        })
    }
}

/// Reads of memory that may not be there.
///
/// **Invariant:** `low..high` was readable when it was probed. A thread that unmaps it meanwhile makes the
/// read fault; that is a fault of this process like any other, and the nested handler goes on after it.
struct Memory {
    low: u64,
    high: u64,
}

impl Memory {
    const fn new() -> Self {
        Self { low: 0, high: 0 }
    }

    /// Whether these bytes can be read, by one syscall per page that is not known yet.
    fn readable(&mut self, address: u64, bytes: u64) -> bool {
        let Some(end) = address.checked_add(bytes) else { return false };
        if self.low <= address && end <= self.high {
            return true;
        }
        let first = address & !(PAGE_BYTES - 1);
        let mut page = first;
        while page < end {
            if !(self.low..self.high).contains(&page) && !probe(page) {
                return false;
            }
            page = page.saturating_add(PAGE_BYTES);
        }
        if first <= self.high && self.low < page && self.low <= first {
            // Reading upwards, as nearly all do.
            self.high = self.high.max(page);
        } else {
            (self.low, self.high) = (first, page);
        }
        true
    }

    /// `N` words, in the machine's byte order.
    fn words<const N: usize>(&mut self, address: u64) -> Option<[u64; N]> {
        self.readable(address, 8 * N as u64).then(|| {
            // SAFETY: readable (the type's invariant), any bytes are valid words, no alignment is assumed.
            unsafe { pointer::<[u64; N]>(address).read_unaligned() }
        })
    }

    /// A 32-bit number, in the machine's byte order.
    fn half(&mut self, address: u64) -> Option<u32> {
        self.readable(address, 4).then(|| {
            // SAFETY: readable (the type's invariant), any bytes are a valid number, no alignment is assumed.
            unsafe { pointer::<u32>(address).read_unaligned() }
        })
    }

    fn byte(&mut self, address: u64) -> Option<u8> {
        self.readable(address, 1).then(|| {
            // SAFETY: readable (the type's invariant), and any byte is valid.
            unsafe { pointer::<u8>(address).read() }
        })
    }

    /// Copies as many bytes as can be read, up to the target's length; says how many.
    fn copy(&mut self, address: u64, target: &mut [u8]) -> usize {
        for (at, byte) in target.iter_mut().enumerate() {
            match self.byte(address.wrapping_add(at as u64)) {
                Some(read) => *byte = read,
                None => return at,
            }
        }
        target.len()
    }

    /// Copies a C string, cut to the target; says how long it is.
    fn text(&mut self, address: u64, target: &mut [u8]) -> usize {
        for (at, byte) in target.iter_mut().enumerate() {
            match self.byte(address.wrapping_add(at as u64)) {
                None | Some(0) => return at,
                Some(read) => *byte = read,
            }
        }
        target.len()
    }

    /// Copies what follows the last slash of a path, cut to the target; says how long it is.
    fn file_name(&mut self, path: u64, target: &mut [u8]) -> usize {
        const PATH_MAX: u64 = 4096;
        let mut start = path;
        for at in 0..PATH_MAX {
            match self.byte(path.wrapping_add(at)) {
                None | Some(0) => break,
                Some(b'/') => start = path.wrapping_add(at + 1),
                Some(_) => {}
            }
        }
        self.text(start, target)
    }
}

/// Whether the page at `address` can be read: `rt_sigprocmask(-1, address, NULL, 8)`.
///
/// The kernel copies the new mask in, then refuses the unknown first argument: `EFAULT` or `EINVAL`, and nothing
/// changes. So this is a look through the kernel's eyes that no sandbox forbids (`process_vm_readv` would do the same
/// for several bytes, but is a way into other processes).
fn probe(address: u64) -> bool {
    const NO_SUCH_ACTION: libc::c_long = -1;
    const MASK_BYTES: usize = 8;
    let set = pointer::<u64>(address);
    let old_set = ptr::null_mut::<u64>();
    // SAFETY: the kernel checks the address; it writes nothing, as the old set is null.
    let answer = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, NO_SUCH_ACTION, set, old_set, MASK_BYTES) };
    answer == -1 && errno() == libc::EINVAL
}

fn errno() -> c_int {
    // SAFETY: has no preconditions.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: the C library gives the address of this thread's errno.
    unsafe { location.read() }
}

/// An address that native code, the kernel or the linker told; it need not be readable.
fn pointer<T>(address: u64) -> *const T {
    const { assert!(size_of::<usize>() == size_of::<u64>(), "hotcell runs on 64-bit targets") };
    ptr::with_exposed_provenance(usize::try_from(address).unwrap_or(0))
}

fn thread_id() -> libc::pid_t {
    // SAFETY: has no preconditions.
    unsafe { libc::gettid() }
}

/// Lets another thread, which has the crash page, finish its report and end the process; for a while.
fn wait_for_the_end() {
    let millisecond = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    let remaining = ptr::null_mut::<libc::timespec>();
    for _ in 0..WAITS_MAX {
        // The bare syscall: the C library's function is a point where threads may be cancelled.
        // SAFETY: the time is readable, and no remaining time is asked for.
        unsafe {
            libc::syscall(
                libc::SYS_clock_nanosleep,
                libc::CLOCK_MONOTONIC,
                0,
                &raw const millisecond,
                remaining,
            )
        };
    }
}

/// Wakes the caller whose call runs, if it sleeps on the direct slot: it sees that this process is about to die, and looks for its end. The kernel takes some 200 µs to get there, in
/// which the caller's CPU wakes up.
fn wake_caller(here: &Here) {
    let word = pointer::<u32>(here.caller.load(Ordering::Relaxed));
    // SAFETY: the address is only a number for the kernel, which looks up who sleeps there and refuses one that is not mapped.
    unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAKE, 1) };
}

/// Step DIE: lets `signal` kill the process, as the module's law says. With a context, the death comes when the
/// handler returns; with none, before this function does.
fn die(signal: c_int, context: Option<Context>) {
    // SAFETY: all zeros are a valid sigaction: SIG_DFL, empty mask, no flags.
    let action: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: the action is valid; the old one is not asked for.
    unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    set_blocked(signal, context.is_some());
    forbid_core_dump();
    // SAFETY: has no preconditions.
    let process = unsafe { libc::getpid() };
    // SAFETY: a signal to the calling thread itself.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, thread_id(), signal) } == 0;
    match context {
        Some(context) => {
            context.unblock(signal);
            let faults_again = matches!(signal, libc::SIGSEGV | libc::SIGBUS | libc::SIGFPE | libc::SIGILL);
            if sent || faults_again {
                return;
            }
        }
        None => set_blocked(signal, false),
    }
    // The kernel refused to kill: an exit status that at least looks like the signal's in a shell.
    // SAFETY: ends the process; nothing runs afterwards.
    unsafe { libc::_exit(128 + signal) }
}

/// Keeps the kernel from beginning a core dump that the limit forbids. It would stop the other threads one by one before it looked at the limit, and where
/// `kernel.core_pattern` names a program it would not look at it at all, but hand the whole worker to that program while callers wait.
fn forbid_core_dump() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a live rlimit that the call fills.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_CORE, &raw mut limit) } == 0;
    if known && limit.rlim_cur == 0 {
        // SAFETY: takes numbers only; the process is about to end.
        unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    }
}

fn set_blocked(signal: c_int, blocked: bool) {
    // SAFETY: all zeros are a valid, empty signal set.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: the set is valid and writable.
    unsafe { libc::sigaddset(&raw mut set, signal) };
    let how = if blocked { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    // SAFETY: the set is valid; the old one is not asked for.
    unsafe { libc::pthread_sigmask(how, &raw const set, ptr::null_mut()) };
}

/// The registers and the mask of the interrupted code, as the kernel saved them for the handler.
///
/// **Invariant:** the pointer is the third argument of a handler installed with `SA_SIGINFO`, used before that handler returns:
/// valid, aligned, and changed by nobody else.
#[derive(Clone, Copy)]
struct Context(*mut libc::ucontext_t);

impl Context {
    /// Takes a signal out of the mask that the kernel restores.
    fn unblock(self, signal: c_int) {
        // SAFETY: the type's invariant.
        let mask = unsafe { &raw mut (*self.0).uc_sigmask };
        // The C library's set is larger than the kernel's, which is the first word; no more may be touched.
        let bit = 1u64 << (signal - 1).clamp(0, 63);
        // SAFETY: the mask's first word is in the context (the type's invariant).
        let old = unsafe { mask.cast::<u64>().read() };
        // SAFETY: as above.
        unsafe { mask.cast::<u64>().write(old & !bit) };
    }
}

#[cfg(target_arch = "x86_64")]
impl Context {
    fn register(self, register: c_int) -> u64 {
        let index = usize::try_from(register).unwrap_or(0);
        // SAFETY: the type's invariant.
        let registers = unsafe { &(*self.0).uc_mcontext.gregs };
        registers.get(index).copied().unwrap_or(0).cast_unsigned()
    }

    fn set_register(self, register: c_int, value: u64) {
        let index = usize::try_from(register).unwrap_or(0);
        // SAFETY: the type's invariant.
        let registers = unsafe { &mut (*self.0).uc_mcontext.gregs };
        if let Some(register) = registers.get_mut(index) {
            *register = value.cast_signed();
        }
    }

    fn pc(self) -> u64 {
        self.register(libc::REG_RIP)
    }

    fn sp(self) -> u64 {
        self.register(libc::REG_RSP)
    }

    fn frame_pointer(self) -> u64 {
        self.register(libc::REG_RBP)
    }

    /// From the error code of a page fault.
    fn access(self) -> Option<Access> {
        const PAGE_FAULT: u64 = 14;
        const WRITE: u64 = 1 << 1;
        const FETCH: u64 = 1 << 4;
        let error = self.register(libc::REG_ERR);
        (self.register(libc::REG_TRAPNO) == PAGE_FAULT).then_some(if error & FETCH != 0 {
            Access::Execute
        } else if error & WRITE != 0 {
            Access::Write
        } else {
            Access::Read
        })
    }

    /// Where the running function returns to, if it has done nothing so far.
    fn return_address(self, memory: &mut Memory) -> Option<u64> {
        memory.words(self.sp()).map(|[address]| address)
    }

    /// The registers as before the call that led to pc, with the pc in that call.
    fn leave_call(self, pc: u64) {
        self.set_register(libc::REG_RSP, self.sp().wrapping_add(8));
        self.set_register(libc::REG_RIP, pc);
    }

    fn registers(self) -> [u64; 2] {
        [self.pc(), self.sp()]
    }

    fn set_registers(self, [pc, sp]: &[u64; 2]) {
        self.set_register(libc::REG_RIP, *pc);
        self.set_register(libc::REG_RSP, *sp);
    }
}

#[cfg(target_arch = "aarch64")]
impl Context {
    fn pc(self) -> u64 {
        // SAFETY: the type's invariant.
        unsafe { (*self.0).uc_mcontext.pc }
    }

    fn sp(self) -> u64 {
        // SAFETY: the type's invariant.
        unsafe { (*self.0).uc_mcontext.sp }
    }

    fn frame_pointer(self) -> u64 {
        // SAFETY: the type's invariant.
        unsafe { (*self.0).uc_mcontext.regs[29] }
    }

    /// The kernel tells it only in the extension records of the context, but a fetch tells itself.
    fn access(self) -> Option<Access> {
        // SAFETY: the type's invariant.
        let address = unsafe { (*self.0).uc_mcontext.fault_address };
        (address == self.pc()).then_some(Access::Execute)
    }

    /// Where the running function returns to, if it has done nothing so far.
    fn return_address(self, _: &mut Memory) -> Option<u64> {
        // SAFETY: the type's invariant.
        Some(unsafe { (*self.0).uc_mcontext.regs[30] })
    }

    /// The registers as before the call that led to pc, with the pc in that call.
    fn leave_call(self, pc: u64) {
        // SAFETY: the type's invariant.
        unsafe { (*self.0).uc_mcontext.pc = pc };
    }

    fn registers(self) -> [u64; 2] {
        [self.pc(), self.sp()]
    }

    fn set_registers(self, [pc, _]: &[u64; 2]) {
        self.leave_call(*pc);
    }
}

/// Linux's `SI_KERNEL`: a fault of which the processor gives no address.
const SI_KERNEL: c_int = 0x80;

/// DWARF's number of the frame pointer.
#[cfg(target_arch = "x86_64")]
const FRAME_POINTER_REGISTER: c_int = 6;
/// DWARF's number of the frame pointer.
#[cfg(target_arch = "aarch64")]
const FRAME_POINTER_REGISTER: c_int = 29;

/// The unwinder's `_Unwind_Context`.
enum UnwindContext {}

const URC_NO_REASON: c_int = 0;
const URC_END_OF_STACK: c_int = 5;

// From libgcc_s (or the unwinder in its place), which the standard library links.
unsafe extern "C" {
    fn _Unwind_Backtrace(
        callback: extern "C" fn(*mut UnwindContext, *mut c_void) -> c_int,
        argument: *mut c_void,
    ) -> c_int;
    fn _Unwind_GetIPInfo(context: *mut UnwindContext, exact: *mut c_int) -> usize;
    fn _Unwind_GetGR(context: *mut UnwindContext, register: c_int) -> usize;
    fn _Unwind_GetCFA(context: *mut UnwindContext) -> usize;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_at_the_end_of_the_stack_is_an_overflow() {
        let (low, guard) = (0x7f00_0000_0000, 0x1000);
        let overflow = |address, sp| is_stack_overflow(address, sp, low, guard);
        assert!(overflow(low - 8, low), "the next push");
        assert!(overflow(low - guard - OVERFLOW_BYTES_MAX, low + 64), "a large frame");
        assert!(overflow(low - (1 << 20), low - (1 << 20)), "alloca beyond the guard");
        assert!(!overflow(0, low + 0x8000), "a null pointer");
        assert!(!overflow(0, low - (1 << 20)), "a null pointer, below");
        assert!(!overflow(low + PAGE_BYTES, low + 0x8000), "inside the stack");
        assert!(!overflow(low - (1 << 30), low - (1 << 30)), "on another stack");
        assert!(!is_stack_overflow(0, 0, 0, 0), "bounds that are not known");
        assert!(!is_stack_overflow(u64::MAX, u64::MAX, u64::MAX, u64::MAX));
    }

    #[test]
    fn the_thread_knows_its_stack_while_it_has_a_signal_stack() {
        std::thread::spawn(|| {
            let here = 0u8;
            let address = ptr::from_ref(&here).addr() as u64;
            let entered = enter_thread();
            let guard = entered.stack.as_ref().unwrap();
            let low = HERE.with(|here| here.stack_low.load(Ordering::Relaxed));
            assert!(low != 0 && low < address && address - low < (1 << 30));
            let current = || {
                let mut stack = guard.previous;
                // SAFETY: only asks.
                assert_eq!(unsafe { libc::sigaltstack(ptr::null(), &raw mut stack) }, 0);
                stack
            };
            let (mine, base, before) = (current(), guard.base.addr(), guard.previous);
            assert!(mine.ss_sp.addr() > base && mine.ss_size >= STACK_BYTES_MIN);
            drop(entered);
            assert_eq!(HERE.with(|here| here.stack_low.load(Ordering::Relaxed)), 0);
            let mut after = before;
            // SAFETY: only asks.
            assert_eq!(unsafe { libc::sigaltstack(ptr::null(), &raw mut after) }, 0);
            assert_eq!((after.ss_flags, after.ss_sp), (before.ss_flags, before.ss_sp));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn memory_that_is_not_there_is_told_from_memory_that_is() {
        let mut memory = Memory::new();
        let bytes = *b"some/where\0 else";
        let address = ptr::from_ref(&bytes).expose_provenance() as u64;
        let mut copy = [0; 16];
        assert_eq!((memory.copy(address, &mut copy), copy), (16, bytes));
        let mut name = [0; 8];
        assert_eq!((memory.file_name(address, &mut name), &name), (5, b"where\0\0\0"));
        assert_eq!(memory.text(address, &mut name[..3]), 3);
        for hole in [0, 8, 0x1000, 0x4141_4141_4141, 1 << 63, u64::MAX - 7, u64::MAX] {
            assert_eq!(memory.words::<1>(hole), None, "{hole:#x}");
            assert_eq!(memory.words::<1>(hole), None, "{hole:#x}, again");
        }
        let word = memory.words::<2>(address).map(|[word, _]| word.to_le());
        assert_eq!(word, Some(u64::from_le_bytes(*b"some/whe")));
    }

    #[test]
    fn reads_stop_at_the_end_of_a_mapping() {
        let bytes = usize::try_from(2 * page_bytes()).unwrap();
        let (readable, private) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: an anonymous mapping at an address that the kernel chooses.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, readable, private, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        let hole = base.wrapping_byte_add(bytes / 2);
        // SAFETY: the second page of that mapping.
        assert_eq!(unsafe { libc::mprotect(hole, bytes / 2, libc::PROT_NONE) }, 0);
        let end = hole.expose_provenance() as u64;
        let mut memory = Memory::new();
        let mut copy = [1; 16];
        assert_eq!(memory.copy(end - 5, &mut copy), 5);
        assert_eq!(memory.words::<1>(end - 8), Some([0]));
        assert_eq!(memory.words::<1>(end - 4), None);
        assert_eq!(memory.half(end - 4), Some(0));
        assert!(!memory.readable(end - 4, PAGE_BYTES));
        // SAFETY: the mapping made above, which nothing points to any more.
        assert_eq!(unsafe { libc::munmap(base, bytes) }, 0);
    }

    #[test]
    fn a_function_of_the_c_library_is_found_by_an_address_inside_of_it() {
        let Some(find_object) = FindObject::from_linker() else { return };
        let mut memory = Memory::new();
        let inside = (libc::qsort as *const ()).expose_provenance() as u64 + 3;
        let found = find_object.find(inside).unwrap();
        let object = Object::read(&mut memory, &found).unwrap();
        let mut name = [0; OBJECT_NAME_BYTES_MAX];
        assert!(memory.file_name(object.name, &mut name) > 0 && name.starts_with(b"libc.so"));
        let symbols = Symbols::read(&mut memory, &object).unwrap();
        assert!((1000..SYMBOLS_MAX).contains(&symbols.count), "{}", symbols.count);
        let mut wanted = [Wanted { offset: inside - object.base, ..Wanted::NONE }];
        symbols.search(&mut memory, &mut wanted, &mut 200_000);
        let mut symbol = [0; 6];
        let Named { start, name } = wanted[0].answer().unwrap();
        memory.text(symbols.strings + u64::from(name), &mut symbol);
        assert_eq!((&symbol, start + 3), (b"qsort\0", wanted[0].offset));
        assert!(find_object.find(8).is_none());
    }

    #[test]
    fn the_innermost_function_wins_then_the_one_with_no_size_then_none() {
        const FUNCTION: u64 = (1 << 48) | (2 << 32);
        let symbol = |name: u64, value, size| Symbol::new(FUNCTION | name, value, size);
        let table = [
            symbol(1, 100, 50),
            symbol(2, 120, 10),
            symbol(3, 200, 0),
            symbol(100, 300, 8),
            symbol(4, 300, 8),
            symbol(101, 300, 8),
            symbol(5, 310, 0),
            symbol(6, 310, 2),
            symbol(7, 400, 0),
            Symbol::new(9, 0, 1000),
        ];
        let search = |offset, order: &mut dyn Iterator<Item = &Symbol>| {
            let mut wanted = Wanted { offset, ..Wanted::NONE };
            order.filter(|symbol| symbol.is_function).for_each(|s| wanted.offer(s, |name| name >= 100));
            wanted.answer().map_or(0, |named| named.name)
        };
        let cases = [(99, 0), (100, 1), (125, 2), (130, 1), (150, 0), (260, 3), (304, 4), (308, 0), (313, 0)];
        for (offset, name) in cases.into_iter().chain([(400, 7), (4495, 7), (4496, 0)]) {
            assert_eq!(search(offset, &mut table.iter()), name, "{offset}");
            assert_eq!(search(offset, &mut table.iter().rev()), name, "{offset}, the other way round");
        }
    }
}
