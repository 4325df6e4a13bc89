//! The crash page: what a dying worker leaves behind for its host.
//!
//! **The law.** The page is shared memory and lies outside of every lock. The *worker's signal handler* is the
//! only writer of all but the refusals; it writes once in the worker's life, with plain (relaxed) atomic stores, and publishes each step by
//! a Release store of the stage. A refusal belongs to the thread that claimed it, which writes it when its session's memory limit has refused it an
//! allocation and takes it back when it has lived through that. The *host* only reads, and trusts nothing: each word is copied once, checked,
//! and used from the copy; whatever the bytes are, [`CrashPage::read`] gives owned, printable facts or `None`. The page
//! is made of atomics only, so a `&CrashPage` to a mapping that another process writes is legitimate.
//!
//! ```text
//! stage   0 nothing ──claim()──► 1 claimed ──write_facts()──► 2 facts ──push_frame()*, name_frame()*, finish()──► 3 frames
//!
//! offset  0   stage u32    │ flags u32            each 8-byte row, little-endian
//!         8   signal u32   │ code u32             siginfo's si_signo, si_code
//!         16  thread u32   │ session u32          u32::MAX: no session
//!         24  function u32 │ syscall u32          u32::MAX: no call in flight; denied syscall, if so flagged
//!         32  access u32   │ instruction_bytes u32
//!         40  frame_count u32 │ reserved u32
//!         48  fault_address u64                   if so flagged
//!         56  pc u64
//!         64  sp u64
//!         72  instruction [u8; 16]                the bytes at pc
//!         88  limit u32    │ limit_session u32    which limit was exceeded: outside of the stages, first writer wins
//!         96  limit_amount u64
//!         104 reserved [u64; 3]
//!         128 frames [frame; 48]
//!         8960 refusals [refusal; 32]
//!         9984 reserved up to 12288
//!
//! frame   0 pc u64 │ 8 object_offset u64 │ 16 symbol_offset u64 │ 24 object [u8; 64] │ 88 symbol [u8; 96]
//! refusal 0 state u32 │ 4 session u32 │ 8 thread u32 │ 12 reserved u32 │ 16 asked u64 │ 24 used u64
//! ```
//!
//! The frames are published one by one (the count is a Release store), so a worker that dies for good in the middle
//! of its backtrace still leaves those it had found; [`CrashFacts::complete`] then is false.

// Always the real atomics: under loom the page would no longer be the bytes that are shared.
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::fmt;

/// Size of the crash page.
pub const CRASH_PAGE_BYTES: usize = 12288;
/// Most frames in a backtrace.
pub const FRAMES_MAX: usize = 48;
/// Most threads that can stand refused memory at a time.
pub const REFUSALS_MAX: usize = 32;
/// Most bytes of an object's name; what is longer is cut.
pub const OBJECT_NAME_BYTES_MAX: usize = 64;
/// Most bytes of a symbol's name; what is longer is cut.
pub const SYMBOL_NAME_BYTES_MAX: usize = 96;
/// Most bytes that are kept of the faulting instruction.
pub const INSTRUCTION_BYTES_MAX: usize = 16;

const OBJECT_WORDS: usize = OBJECT_NAME_BYTES_MAX / 8;
const SYMBOL_WORDS: usize = SYMBOL_NAME_BYTES_MAX / 8;
const INSTRUCTION_WORDS: usize = INSTRUCTION_BYTES_MAX / 8;
const TAIL_WORDS: usize = (CRASH_PAGE_BYTES - 128 - FRAMES_MAX * 184 - REFUSALS_MAX * 32) / 8;

/// Largest signal number of Linux.
const SIGNAL_MAX: i32 = 64;
/// "None" for a session or a function.
const NONE: u32 = u32::MAX;

/// No crash so far.
const STAGE_NOTHING: u32 = 0;
/// A thread has the page to itself and is writing.
const STAGE_CLAIMED: u32 = 1;
/// Everything but the backtrace is there.
const STAGE_FACTS: u32 = 2;
/// The backtrace is there too.
const STAGE_FRAMES: u32 = 3;

const FLAG_STACK_OVERFLOW: u32 = 1;
const FLAG_NESTED: u32 = 1 << 1;
const FLAG_FAULT_ADDRESS: u32 = 1 << 2;
const FLAG_SYSCALL: u32 = 1 << 3;

/// Nobody's refusal.
const REFUSAL_FREE: u32 = 0;
/// A thread is writing it.
const REFUSAL_CLAIMED: u32 = 1;
/// It is there.
const REFUSAL_STANDS: u32 = 2;

const ACCESS_UNKNOWN: u32 = 0;
const ACCESS_READ: u32 = 1;
const ACCESS_WRITE: u32 = 2;
const ACCESS_EXECUTE: u32 = 3;

/// What a dying worker leaves behind for its host; see the module's law.
#[repr(C, align(4096))]
pub struct CrashPage {
    stage: AtomicU32,
    flags: AtomicU32,
    signal: AtomicU32,
    code: AtomicU32,
    thread: AtomicU32,
    session: AtomicU32,
    function: AtomicU32,
    syscall: AtomicU32,
    access: AtomicU32,
    instruction_bytes: AtomicU32,
    frame_count: AtomicU32,
    reserved: AtomicU32,
    fault_address: AtomicU64,
    pc: AtomicU64,
    sp: AtomicU64,
    instruction: [AtomicU64; INSTRUCTION_WORDS],
    limit: AtomicU32,
    limit_session: AtomicU32,
    limit_amount: AtomicU64,
    reserved_words: [AtomicU64; 3],
    frames: [FrameCell; FRAMES_MAX],
    refusals: [RefusalCell; REFUSALS_MAX],
    reserved_tail: [AtomicU64; TAIL_WORDS],
}

/// One frame of the backtrace, as it lies in the page.
#[repr(C)]
pub(crate) struct FrameCell {
    pc: AtomicU64,
    object_offset: AtomicU64,
    symbol_offset: AtomicU64,
    object: [AtomicU64; OBJECT_WORDS],
    symbol: [AtomicU64; SYMBOL_WORDS],
}

/// An allocation that a session's memory limit has refused, as it lies in the page.
#[repr(C)]
pub(crate) struct RefusalCell {
    state: AtomicU32,
    session: AtomicU32,
    thread: AtomicU32,
    reserved: AtomicU32,
    asked: AtomicU64,
    used: AtomicU64,
}

const _: () = {
    use std::mem::{align_of, offset_of, size_of};
    assert!(size_of::<CrashPage>() == CRASH_PAGE_BYTES);
    assert!(align_of::<CrashPage>() == 4096);
    assert!(offset_of!(CrashPage, stage) == 0);
    assert!(offset_of!(CrashPage, flags) == 4);
    assert!(offset_of!(CrashPage, signal) == 8);
    assert!(offset_of!(CrashPage, code) == 12);
    assert!(offset_of!(CrashPage, thread) == 16);
    assert!(offset_of!(CrashPage, session) == 20);
    assert!(offset_of!(CrashPage, function) == 24);
    assert!(offset_of!(CrashPage, syscall) == 28);
    assert!(offset_of!(CrashPage, access) == 32);
    assert!(offset_of!(CrashPage, instruction_bytes) == 36);
    assert!(offset_of!(CrashPage, frame_count) == 40);
    assert!(offset_of!(CrashPage, reserved) == 44);
    assert!(offset_of!(CrashPage, fault_address) == 48);
    assert!(offset_of!(CrashPage, pc) == 56);
    assert!(offset_of!(CrashPage, sp) == 64);
    assert!(offset_of!(CrashPage, instruction) == 72);
    assert!(offset_of!(CrashPage, limit) == 88);
    assert!(offset_of!(CrashPage, limit_session) == 92);
    assert!(offset_of!(CrashPage, limit_amount) == 96);
    assert!(offset_of!(CrashPage, reserved_words) == 104);
    assert!(offset_of!(CrashPage, frames) == 128);
    assert!(offset_of!(CrashPage, refusals) == 8960);
    assert!(offset_of!(CrashPage, reserved_tail) == 9984);
    // No padding: the sum of the fields is the page.
    assert!(
        14 * 4 + 4 * 8 + 16 + 3 * 8 + FRAMES_MAX * 184 + REFUSALS_MAX * 32 + TAIL_WORDS * 8
            == CRASH_PAGE_BYTES
    );
    assert!(size_of::<RefusalCell>() == 32);
    assert!(offset_of!(RefusalCell, state) == 0);
    assert!(offset_of!(RefusalCell, session) == 4);
    assert!(offset_of!(RefusalCell, thread) == 8);
    assert!(offset_of!(RefusalCell, asked) == 16);
    assert!(offset_of!(RefusalCell, used) == 24);
    assert!(size_of::<FrameCell>() == 184);
    assert!(align_of::<FrameCell>() == 8);
    assert!(offset_of!(FrameCell, pc) == 0);
    assert!(offset_of!(FrameCell, object_offset) == 8);
    assert!(offset_of!(FrameCell, symbol_offset) == 16);
    assert!(offset_of!(FrameCell, object) == 24);
    assert!(offset_of!(FrameCell, symbol) == 88);
};

/// What a faulting instruction was about to do with the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It loaded.
    Read,
    /// It stored.
    Write,
    /// It was to be fetched from there: a jump to where no code is.
    Execute,
}

/// Which limit a worker says it exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exceeded {
    /// CPU time of one call. The amount is nanoseconds.
    CallCpuTime,
    /// CPU time of a session's thread. The amount is nanoseconds.
    SessionCpuTime,
    /// CPU time of the process. The amount is nanoseconds.
    WorkerCpuTime,
    /// Memory of the process: some was refused. The amount is bytes, 0 if not known.
    WorkerMemory,
}

/// No limit was exceeded.
const LIMIT_NONE: u32 = 0;
const LIMIT_CALL_CPU_TIME: u32 = 1;
const LIMIT_SESSION_CPU_TIME: u32 = 2;
const LIMIT_WORKER_CPU_TIME: u32 = 3;
const LIMIT_WORKER_MEMORY: u32 = 4;
/// A thread is writing which.
const LIMIT_CLAIMED: u32 = u32::MAX;

/// What a worker says of a limit that it exceeded; see [`CrashPage::note_limit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitNote {
    /// Which limit.
    pub exceeded: Exceeded,
    /// The session whose limit it is, or whose call was running.
    pub session: Option<u32>,
    /// How much was used or asked for.
    pub amount: u64,
}

/// What the worker knows of a crash before it looks at the stack: the input of [`CrashPage::write_facts`].
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// `si_signo`
    pub signal: i32,
    /// `si_code`
    pub code: i32,
    /// The thread's kernel id.
    pub thread: u32,
    /// The session that the thread serves.
    pub session: Option<u32>,
    /// Index of the function that was being called.
    pub function: Option<u32>,
    /// The fault was in or near the guard below the thread's stack.
    pub stack_overflow: bool,
    /// What the instruction did with `fault_address`.
    pub access: Option<Access>,
    /// Number of the denied syscall (`SIGSYS`).
    pub syscall: Option<u32>,
    /// The address that could not be accessed.
    pub fault_address: Option<u64>,
    /// The program counter.
    pub pc: u64,
    /// The stack pointer.
    pub sp: u64,
    /// The bytes at `pc`.
    pub instruction: [u8; INSTRUCTION_BYTES_MAX],
    /// How many of `instruction` could be read.
    pub instruction_bytes: usize,
}

/// The worker's side: the signal handler's. Nothing here allocates, locks, formats or panics.
impl CrashPage {
    /// A page on which nothing is written. (The host's comes from zeroed memory, which is the same.)
    #[must_use]
    pub const fn new() -> Self {
        Self {
            stage: AtomicU32::new(STAGE_NOTHING),
            flags: AtomicU32::new(0),
            signal: AtomicU32::new(0),
            code: AtomicU32::new(0),
            thread: AtomicU32::new(0),
            session: AtomicU32::new(0),
            function: AtomicU32::new(0),
            syscall: AtomicU32::new(0),
            access: AtomicU32::new(0),
            instruction_bytes: AtomicU32::new(0),
            frame_count: AtomicU32::new(0),
            reserved: AtomicU32::new(0),
            fault_address: AtomicU64::new(0),
            pc: AtomicU64::new(0),
            sp: AtomicU64::new(0),
            instruction: [const { AtomicU64::new(0) }; INSTRUCTION_WORDS],
            limit: AtomicU32::new(LIMIT_NONE),
            limit_session: AtomicU32::new(0),
            limit_amount: AtomicU64::new(0),
            reserved_words: [const { AtomicU64::new(0) }; 3],
            frames: [const { FrameCell::new() }; FRAMES_MAX],
            refusals: [const { RefusalCell::new() }; REFUSALS_MAX],
            reserved_tail: [const { AtomicU64::new(0) }; TAIL_WORDS],
        }
    }

    /// Takes the page for the calling thread; false if another thread has it.
    pub fn claim(&self) -> bool {
        // Acquire is not needed: the claimer reads nothing that another thread wrote.
        let claim =
            self.stage.compare_exchange(STAGE_NOTHING, STAGE_CLAIMED, Ordering::Relaxed, Ordering::Relaxed);
        claim.is_ok()
    }

    /// Writes and publishes everything but the backtrace. Only for the thread that claimed the page.
    pub fn write_facts(&self, facts: &Facts) {
        let mut flags = 0;
        if facts.stack_overflow {
            flags |= FLAG_STACK_OVERFLOW;
        }
        if facts.fault_address.is_some() {
            flags |= FLAG_FAULT_ADDRESS;
        }
        if facts.syscall.is_some() {
            flags |= FLAG_SYSCALL;
        }
        let access = match facts.access {
            None => ACCESS_UNKNOWN,
            Some(Access::Read) => ACCESS_READ,
            Some(Access::Write) => ACCESS_WRITE,
            Some(Access::Execute) => ACCESS_EXECUTE,
        };
        self.flags.store(flags, Ordering::Relaxed);
        self.signal.store(facts.signal.cast_unsigned(), Ordering::Relaxed);
        self.code.store(facts.code.cast_unsigned(), Ordering::Relaxed);
        self.thread.store(facts.thread, Ordering::Relaxed);
        self.session.store(facts.session.unwrap_or(NONE), Ordering::Relaxed);
        self.function.store(facts.function.unwrap_or(NONE), Ordering::Relaxed);
        self.syscall.store(facts.syscall.unwrap_or(0), Ordering::Relaxed);
        self.access.store(access, Ordering::Relaxed);
        self.fault_address.store(facts.fault_address.unwrap_or(0), Ordering::Relaxed);
        self.pc.store(facts.pc, Ordering::Relaxed);
        self.sp.store(facts.sp, Ordering::Relaxed);
        store_bytes(&self.instruction, &facts.instruction);
        let bytes = u32::try_from(facts.instruction_bytes.min(INSTRUCTION_BYTES_MAX)).unwrap_or(0);
        self.instruction_bytes.store(bytes, Ordering::Relaxed);
        // SYNC crash-stage: publishes the facts to read()
        self.stage.store(STAGE_FACTS, Ordering::Release);
    }

    /// Notes which limit is the reason for what comes. The first note counts; it needs no claim, and can be all that there is: a worker may end itself
    /// by `SIGKILL` after it. Async-signal-safe. False if there is a note already.
    pub fn note_limit(&self, note: &LimitNote) -> bool {
        let claim =
            self.limit.compare_exchange(LIMIT_NONE, LIMIT_CLAIMED, Ordering::Relaxed, Ordering::Relaxed);
        if claim.is_err() {
            return false;
        }
        let code = match note.exceeded {
            Exceeded::CallCpuTime => LIMIT_CALL_CPU_TIME,
            Exceeded::SessionCpuTime => LIMIT_SESSION_CPU_TIME,
            Exceeded::WorkerCpuTime => LIMIT_WORKER_CPU_TIME,
            Exceeded::WorkerMemory => LIMIT_WORKER_MEMORY,
        };
        self.limit_session.store(note.session.unwrap_or(NONE), Ordering::Relaxed);
        self.limit_amount.store(note.amount, Ordering::Relaxed);
        // SYNC crash-limit: publishes the note to limit()
        self.limit.store(code, Ordering::Release);
        true
    }

    /// Notes that the handler itself faulted, so the rest of the backtrace is the fallback's.
    pub fn mark_nested(&self) {
        self.flags.fetch_or(FLAG_NESTED, Ordering::Relaxed);
    }

    /// Adds a frame that has no name yet; false once the page is full.
    pub fn push_frame(&self, pc: u64) -> bool {
        let count = self.frame_count.load(Ordering::Relaxed);
        let Some(frame) = self.frames.get(count as usize) else { return false };
        frame.pc.store(pc, Ordering::Relaxed);
        // SYNC crash-frames: publishes the frame's pc to read()
        self.frame_count.store(count + 1, Ordering::Release);
        true
    }

    /// How many frames were pushed.
    pub fn frame_count(&self) -> usize {
        (self.frame_count.load(Ordering::Relaxed) as usize).min(FRAMES_MAX)
    }

    /// The program counter of a frame that was pushed.
    pub fn frame_pc(&self, index: usize) -> Option<u64> {
        let frame = self.frames.get(index).filter(|_| index < self.frame_count())?;
        Some(frame.pc.load(Ordering::Relaxed))
    }

    /// Says which object (library) a frame lies in, how far above the object's load base.
    pub fn name_object(&self, index: usize, name: &[u8], offset: u64) {
        if let Some(frame) = self.frames.get(index) {
            frame.object_offset.store(offset, Ordering::Relaxed);
            store_bytes(&frame.object, name);
        }
    }

    /// Says which function a frame lies in, how far above the function's start.
    pub fn name_symbol(&self, index: usize, name: &[u8], offset: u64) {
        if let Some(frame) = self.frames.get(index) {
            frame.symbol_offset.store(offset, Ordering::Relaxed);
            store_bytes(&frame.symbol, name);
        }
    }

    /// Publishes the whole page. Only for the thread that claimed it.
    pub fn finish(&self) {
        // SYNC crash-stage: publishes the names of the frames to read()
        self.stage.store(STAGE_FRAMES, Ordering::Release);
    }
}

/// The worker's side: any thread whose session has a memory limit. Nothing here allocates, locks, formats or panics: it is called in the
/// middle of an allocation.
impl CrashPage {
    /// Notes that `session`'s limit has refused the calling thread `asked` bytes while `used` were in use. Gives what takes it back; `None` if as many
    /// threads as there is room for stand refused.
    pub fn push_refusal(&self, session: u32, thread: u32, asked: u64, used: u64) -> Option<usize> {
        let claim = |cell: &RefusalCell| {
            // Acquire is not needed: nothing is read that another thread wrote.
            let claim = cell.state.compare_exchange(
                REFUSAL_FREE,
                REFUSAL_CLAIMED,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            claim.is_ok()
        };
        let index = self.refusals.iter().position(claim)?;
        let cell = self.refusals.get(index)?;
        cell.session.store(session, Ordering::Relaxed);
        cell.thread.store(thread, Ordering::Relaxed);
        cell.asked.store(asked, Ordering::Relaxed);
        cell.used.store(used, Ordering::Relaxed);
        // SYNC crash-refusal: publishes the refusal to refusals()
        cell.state.store(REFUSAL_STANDS, Ordering::Release);
        Some(index)
    }

    /// Takes back what [`CrashPage::push_refusal`] noted. Only for the thread that noted it.
    pub fn take_refusal_back(&self, index: usize) {
        if let Some(cell) = self.refusals.get(index) {
            cell.state.store(REFUSAL_FREE, Ordering::Relaxed);
        }
    }
}

impl Default for CrashPage {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for CrashPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CrashPage").field("stage", &self.stage).finish_non_exhaustive()
    }
}

impl RefusalCell {
    const fn new() -> Self {
        Self {
            state: AtomicU32::new(REFUSAL_FREE),
            session: AtomicU32::new(0),
            thread: AtomicU32::new(0),
            reserved: AtomicU32::new(0),
            asked: AtomicU64::new(0),
            used: AtomicU64::new(0),
        }
    }
}

impl FrameCell {
    const fn new() -> Self {
        Self {
            pc: AtomicU64::new(0),
            object_offset: AtomicU64::new(0),
            symbol_offset: AtomicU64::new(0),
            object: [const { AtomicU64::new(0) }; OBJECT_WORDS],
            symbol: [const { AtomicU64::new(0) }; SYMBOL_WORDS],
        }
    }
}

/// Stores `bytes` as little-endian words, cut to the room there is and filled up with NUL.
fn store_bytes(words: &[AtomicU64], bytes: &[u8]) {
    let mut chunks = bytes.chunks(8);
    for word in words {
        let mut value = 0;
        for (at, byte) in chunks.next().unwrap_or(&[]).iter().enumerate() {
            value |= u64::from(*byte) << (8 * at);
        }
        word.store(value, Ordering::Relaxed);
    }
}

/// The host's side.
impl CrashPage {
    /// Which limit the worker says it exceeded; `None` if it says nothing, or nonsense. The host believes it only of a limit that it has set itself.
    pub fn limit(&self) -> Option<LimitNote> {
        // SYNC crash-limit: pairs with note_limit()
        let exceeded = match self.limit.load(Ordering::Acquire) {
            LIMIT_CALL_CPU_TIME => Exceeded::CallCpuTime,
            LIMIT_SESSION_CPU_TIME => Exceeded::SessionCpuTime,
            LIMIT_WORKER_CPU_TIME => Exceeded::WorkerCpuTime,
            LIMIT_WORKER_MEMORY => Exceeded::WorkerMemory,
            _ => return None,
        };
        let session = Some(self.limit_session.load(Ordering::Relaxed)).filter(|session| *session != NONE);
        Some(LimitNote { exceeded, session, amount: self.limit_amount.load(Ordering::Relaxed) })
    }

    /// Whether the worker says that it is dying. That is its word and no more: a reason to look at the process, which the kernel knows the truth of.
    pub fn says_dying(&self) -> bool {
        self.stage.load(Ordering::Relaxed) >= STAGE_FACTS
    }

    /// Copies what the worker wrote, checked; `None` if it wrote nothing, not enough, or nonsense.
    ///
    /// The worker may still be running and may write while this reads: the facts are then those of some moment, but
    /// always bounded, printable and owned.
    pub fn read(&self) -> Option<CrashFacts> {
        // SYNC crash-stage: pairs with write_facts() and finish()
        let stage = self.stage.load(Ordering::Acquire);
        let complete = match stage {
            STAGE_FACTS => false,
            STAGE_FRAMES => true,
            _ => return None,
        };
        let signal = self.signal.load(Ordering::Relaxed).cast_signed();
        if !(1..=SIGNAL_MAX).contains(&signal) {
            return None;
        }
        let flags = self.flags.load(Ordering::Relaxed);
        let flag = |bit| flags & bit != 0;
        let index = |word: &AtomicU32| Some(word.load(Ordering::Relaxed)).filter(|index| *index != NONE);
        let access = match self.access.load(Ordering::Relaxed) {
            ACCESS_READ => Some(Access::Read),
            ACCESS_WRITE => Some(Access::Write),
            ACCESS_EXECUTE => Some(Access::Execute),
            _ => None,
        };
        let mut instruction = load_bytes(&self.instruction);
        // truncate() bounds the count: a larger one keeps all there is.
        instruction.truncate(self.instruction_bytes.load(Ordering::Relaxed) as usize);
        // SYNC crash-frames: pairs with push_frame()
        let frame_count = self.frame_count.load(Ordering::Acquire) as usize;
        Some(CrashFacts {
            signal,
            code: self.code.load(Ordering::Relaxed).cast_signed(),
            thread: self.thread.load(Ordering::Relaxed),
            session: index(&self.session),
            function: index(&self.function),
            stack_overflow: flag(FLAG_STACK_OVERFLOW),
            nested: flag(FLAG_NESTED),
            access,
            syscall: flag(FLAG_SYSCALL).then(|| self.syscall.load(Ordering::Relaxed)),
            fault_address: flag(FLAG_FAULT_ADDRESS).then(|| self.fault_address.load(Ordering::Relaxed)),
            pc: self.pc.load(Ordering::Relaxed),
            sp: self.sp.load(Ordering::Relaxed),
            instruction,
            // take() bounds the count: a larger one keeps all there is.
            frames: self.frames.iter().take(frame_count).map(FrameCell::read).collect(),
            complete,
        })
    }
}

impl CrashPage {
    /// Copies the refusals that stand: those that the worker noted and did not take back. At most [`REFUSALS_MAX`].
    pub fn refusals(&self) -> Vec<Refusal> {
        // SYNC crash-refusal: pairs with push_refusal()
        let stands = |cell: &&RefusalCell| cell.state.load(Ordering::Acquire) == REFUSAL_STANDS;
        let copy = |cell: &RefusalCell| Refusal {
            session: cell.session.load(Ordering::Relaxed),
            thread: cell.thread.load(Ordering::Relaxed),
            asked: cell.asked.load(Ordering::Relaxed),
            used: cell.used.load(Ordering::Relaxed),
        };
        self.refusals.iter().filter(stands).map(copy).collect()
    }
}

/// An allocation that a session's memory limit refused, and that its thread had not lived through: by [`CrashPage::refusals`]. Untrusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The session.
    pub session: u32,
    /// The kernel id of the thread that asked.
    pub thread: u32,
    /// How many bytes it asked for.
    pub asked: u64,
    /// How many bytes the session had in use.
    pub used: u64,
}

impl FrameCell {
    fn read(&self) -> Frame {
        Frame {
            pc: self.pc.load(Ordering::Relaxed),
            object: printable(&load_bytes(&self.object)),
            object_offset: self.object_offset.load(Ordering::Relaxed),
            symbol: printable(&load_bytes(&self.symbol)),
            symbol_offset: self.symbol_offset.load(Ordering::Relaxed),
        }
    }
}

fn load_bytes(words: &[AtomicU64]) -> Vec<u8> {
    words.iter().flat_map(|word| little_endian(word.load(Ordering::Relaxed))).collect()
}

/// The bytes of a word in the page's order, which is little-endian.
fn little_endian(word: u64) -> [u8; 8] {
    std::array::from_fn(|at| {
        // The mask makes the conversion exact.
        u8::try_from((word >> (8 * at)) & 0xff).unwrap_or(0)
    })
}

/// The text before the first NUL, with everything escaped that could do more than print: control characters, marks
/// that reorder text, and the backslash itself. `None` if there is no text.
fn printable(bytes: &[u8]) -> Option<String> {
    let text = bytes.split(|byte| *byte == 0).next().filter(|text| !text.is_empty())?;
    let mut clean = String::with_capacity(text.len());
    for character in String::from_utf8_lossy(text).chars() {
        match character {
            '"' | '\'' => clean.push(character),
            _ => clean.extend(character.escape_debug()),
        }
    }
    Some(clean)
}

/// What is known of a crash, as read from the page by [`CrashPage::read`].
///
/// All of it is the word of a process that was breaking: bounded and printable, but not necessarily true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrashFacts {
    /// The signal, 1 to 64.
    pub signal: i32,
    /// The signal's `si_code`: above 0 if the kernel raised it, else sent by a process.
    pub code: i32,
    /// The thread's kernel id.
    pub thread: u32,
    /// The session that the thread served; `None` if it was not a session's.
    pub session: Option<u32>,
    /// Index of the function that was being called; `None` outside of calls.
    pub function: Option<u32>,
    /// The thread ran over the end of its stack.
    pub stack_overflow: bool,
    /// The handler faulted too, so the backtrace may be shorter or worse than usual.
    pub nested: bool,
    /// What the instruction did with `fault_address`.
    pub access: Option<Access>,
    /// Number of the denied syscall (`SIGSYS`).
    pub syscall: Option<u32>,
    /// The address that could not be accessed, where the processor tells it.
    pub fault_address: Option<u64>,
    /// The program counter.
    pub pc: u64,
    /// The stack pointer.
    pub sp: u64,
    /// The bytes at `pc`: up to 16, none if they can't be read.
    pub instruction: Vec<u8>,
    /// The backtrace, innermost first; `frames[0].pc` is `pc`.
    pub frames: Vec<Frame>,
    /// The backtrace was finished.
    pub complete: bool,
}

impl CrashFacts {
    /// The backtrace as text: a numbered line for each frame, with no newline at the end.
    #[must_use]
    pub fn backtrace(&self) -> Backtrace<'_> {
        Backtrace { frames: &self.frames }
    }
}

/// Displays frames as numbered lines; see [`CrashFacts::backtrace`].
#[derive(Clone, Copy, Debug)]
pub struct Backtrace<'a> {
    frames: &'a [Frame],
}

impl fmt::Display for Backtrace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, frame) in self.frames.iter().enumerate() {
            let separator = if number == 0 { "" } else { "\n" };
            write!(f, "{separator}#{number} {frame}")?;
        }
        Ok(())
    }
}

/// One frame of a backtrace: `0x7f3c5e0014f0 crc32+0x1a (libz.so.1+0x4f20)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Where the frame was: the faulting instruction, or the address the call would have returned to.
    pub pc: u64,
    /// File name of the library (or program) that `pc` lies in.
    pub object: Option<String>,
    /// `pc` less the object's load base: what `addr2line` wants.
    pub object_offset: u64,
    /// Name of the function that `pc` lies in, as the linker knows it (mangled).
    pub symbol: Option<String>,
    /// `pc` less the function's start.
    pub symbol_offset: u64,
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.pc)?;
        if let Some(symbol) = &self.symbol {
            write!(f, " {symbol}+{:#x}", self.symbol_offset)?;
        }
        if let Some(object) = &self.object {
            write!(f, " ({object}+{:#x})", self.object_offset)?;
        }
        Ok(())
    }
}

/// The numbers that only this file knows, for the comparison with their documentation.
#[cfg(all(test, not(loom)))]
pub(crate) const WIRE_CONSTANTS: &[(&str, u32)] = &[
    ("STAGE_NOTHING", STAGE_NOTHING),
    ("STAGE_CLAIMED", STAGE_CLAIMED),
    ("STAGE_FACTS", STAGE_FACTS),
    ("STAGE_FRAMES", STAGE_FRAMES),
    ("FLAG_STACK_OVERFLOW", FLAG_STACK_OVERFLOW),
    ("FLAG_NESTED", FLAG_NESTED),
    ("FLAG_FAULT_ADDRESS", FLAG_FAULT_ADDRESS),
    ("FLAG_SYSCALL", FLAG_SYSCALL),
    ("REFUSAL_FREE", REFUSAL_FREE),
    ("REFUSAL_CLAIMED", REFUSAL_CLAIMED),
    ("REFUSAL_STANDS", REFUSAL_STANDS),
    ("ACCESS_UNKNOWN", ACCESS_UNKNOWN),
    ("ACCESS_READ", ACCESS_READ),
    ("ACCESS_WRITE", ACCESS_WRITE),
    ("ACCESS_EXECUTE", ACCESS_EXECUTE),
    ("LIMIT_NONE", LIMIT_NONE),
    ("LIMIT_CALL_CPU_TIME", LIMIT_CALL_CPU_TIME),
    ("LIMIT_SESSION_CPU_TIME", LIMIT_SESSION_CPU_TIME),
    ("LIMIT_WORKER_CPU_TIME", LIMIT_WORKER_CPU_TIME),
    ("LIMIT_WORKER_MEMORY", LIMIT_WORKER_MEMORY),
    ("LIMIT_CLAIMED", LIMIT_CLAIMED),
];

#[cfg(all(test, not(loom)))]
mod wire {
    use super::{CrashPage, FrameCell, RefusalCell};
    crate::wire_format::shared!(FrameCell: pc, object_offset, symbol_offset, object, symbol);
    crate::wire_format::shared!(RefusalCell: state, session, thread, reserved, asked, used);
    crate::wire_format::shared!(CrashPage:
        stage, flags, signal, code, thread, session, function, syscall, access, instruction_bytes, frame_count, reserved,
        fault_address, pc, sp, instruction, limit, limit_session, limit_amount, reserved_words, frames, refusals,
        reserved_tail);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn facts() -> Facts {
        Facts {
            signal: 11,
            code: 1,
            thread: 77,
            session: Some(3),
            function: Some(5),
            stack_overflow: true,
            access: Some(Access::Write),
            syscall: None,
            fault_address: Some(0xdead),
            pc: 0x1000,
            sp: 0x2000,
            instruction: *b"0123456789abcdef",
            instruction_bytes: 3,
        }
    }

    /// Every 32-bit field and every word of the page, set to what `word` gives: a worker may write anything.
    fn fill(page: &CrashPage, mut word: impl FnMut() -> u64) {
        let halves = [
            &page.stage,
            &page.flags,
            &page.signal,
            &page.code,
            &page.thread,
            &page.session,
            &page.function,
            &page.syscall,
            &page.access,
            &page.instruction_bytes,
            &page.frame_count,
            &page.reserved,
        ];
        for half in halves {
            half.store(u32::try_from(word() >> 32).unwrap(), Ordering::Relaxed);
        }
        let frames = page.frames.iter().flat_map(|frame| {
            [&frame.pc, &frame.object_offset, &frame.symbol_offset]
                .into_iter()
                .chain(&frame.object)
                .chain(&frame.symbol)
        });
        for cell in &page.refusals {
            for half in [&cell.state, &cell.session, &cell.thread] {
                half.store(u32::try_from(word() >> 32).unwrap(), Ordering::Relaxed);
            }
            cell.asked.store(word(), Ordering::Relaxed);
            cell.used.store(word(), Ordering::Relaxed);
        }
        for cell in
            [&page.fault_address, &page.pc, &page.sp].into_iter().chain(&page.instruction).chain(frames)
        {
            cell.store(word(), Ordering::Relaxed);
        }
    }

    #[test]
    fn zeroed_or_only_claimed_page_reads_as_nothing() {
        let page = CrashPage::new();
        assert_eq!(page.read(), None);
        assert!(page.claim());
        assert!(!page.claim());
        assert_eq!(page.read(), None);
    }

    #[test]
    fn facts_come_back_as_written_before_the_frames_are() {
        let page = CrashPage::new();
        page.write_facts(&facts());
        let read = page.read().unwrap();
        assert_eq!((read.signal, read.code, read.thread), (11, 1, 77));
        assert_eq!((read.session, read.function), (Some(3), Some(5)));
        assert_eq!((read.access, read.fault_address), (Some(Access::Write), Some(0xdead)));
        assert_eq!((read.pc, read.sp, read.syscall), (0x1000, 0x2000, None));
        assert_eq!(read.instruction, b"012");
        assert!(read.stack_overflow && !read.nested && !read.complete && read.frames.is_empty());
    }

    #[test]
    fn absent_facts_come_back_as_none() {
        let page = CrashPage::new();
        page.write_facts(&Facts {
            code: -6,
            session: None,
            function: None,
            access: None,
            syscall: Some(0),
            fault_address: None,
            instruction_bytes: usize::MAX,
            ..facts()
        });
        page.mark_nested();
        let read = page.read().unwrap();
        assert_eq!((read.session, read.function, read.access, read.fault_address), (None, None, None, None));
        assert_eq!((read.code, read.syscall, read.nested), (-6, Some(0), true));
        assert_eq!(read.instruction.len(), INSTRUCTION_BYTES_MAX);
    }

    #[test]
    fn frames_come_back_named_and_numbered() {
        let page = CrashPage::new();
        page.write_facts(&facts());
        for pc in [0x7f00, 0x7f10, 0x7f20] {
            assert!(page.push_frame(pc));
        }
        assert_eq!((page.frame_pc(1), page.frame_pc(3)), (Some(0x7f10), None));
        page.name_object(0, b"libz.so.1", 0x4f20);
        page.name_symbol(0, b"crc32", 0x1a);
        page.name_object(1, &[b'o'; 200], 1);
        page.name_symbol(1, &[b's'; 200], 2);
        page.name_object(FRAMES_MAX, b"beyond", 0);
        page.finish();
        let read = page.read().unwrap();
        assert!(read.complete);
        assert_eq!(read.frames[1].object.as_ref().map(String::len), Some(OBJECT_NAME_BYTES_MAX));
        assert_eq!(read.frames[1].symbol.as_ref().map(String::len), Some(SYMBOL_NAME_BYTES_MAX));
        let text = read.backtrace().to_string();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "#0 0x7f00 crc32+0x1a (libz.so.1+0x4f20)");
        assert_eq!(lines[2], "#2 0x7f20");
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn the_page_takes_no_more_frames_than_it_has_room_for() {
        let page = CrashPage::new();
        page.write_facts(&facts());
        let taken = (0..100).filter(|pc| page.push_frame(*pc)).count();
        assert_eq!((taken, page.frame_count()), (FRAMES_MAX, FRAMES_MAX));
        assert_eq!(page.read().unwrap().frames.len(), FRAMES_MAX);
    }

    #[test]
    fn refusals_stand_until_they_are_taken_back() {
        let page = CrashPage::new();
        assert!(page.refusals().is_empty());
        let first = page.push_refusal(3, 77, 4096, 100).unwrap();
        let second = page.push_refusal(4, 78, 1, 2).unwrap();
        page.take_refusal_back(first);
        assert_eq!(page.refusals(), [Refusal { session: 4, thread: 78, asked: 1, used: 2 }]);
        let more = (0..100).filter(|_| page.push_refusal(5, 79, 1, 2).is_some()).count();
        assert_eq!(more, REFUSALS_MAX - 1);
        page.take_refusal_back(second);
        page.take_refusal_back(REFUSALS_MAX);
        assert_eq!(page.refusals().len(), REFUSALS_MAX - 1);
    }

    #[test]
    fn all_ones_read_as_nothing_and_as_bounded_facts_once_the_stage_is_valid() {
        let page = CrashPage::new();
        fill(&page, || u64::MAX);
        assert_eq!(page.read(), None);
        page.stage.store(STAGE_FRAMES, Ordering::Relaxed);
        assert_eq!(page.read(), None, "no such signal");
        page.signal.store(11, Ordering::Relaxed);
        let read = page.read().unwrap();
        assert_eq!(read.frames.len(), FRAMES_MAX);
        assert_eq!(read.instruction.len(), INSTRUCTION_BYTES_MAX);
        assert_eq!((read.session, read.access), (None, None));
        assert_eq!(read.frames[0].object.as_ref().unwrap().chars().next(), Some('\u{fffd}'));
    }

    #[test]
    fn the_first_note_of_a_limit_counts_and_nonsense_is_none() {
        let page = CrashPage::new();
        assert_eq!(page.limit(), None);
        let note = LimitNote { exceeded: Exceeded::WorkerMemory, session: None, amount: 7 };
        assert!(page.note_limit(&note));
        assert!(!page.note_limit(&LimitNote {
            exceeded: Exceeded::CallCpuTime,
            session: Some(3),
            amount: 1
        }));
        assert_eq!(page.limit(), Some(note));
        for nonsense in [6, 77, LIMIT_CLAIMED] {
            page.limit.store(nonsense, Ordering::Relaxed);
            assert_eq!(page.limit(), None);
        }
    }

    #[test]
    fn names_are_cut_at_nul_and_can_not_drive_a_terminal() {
        assert_eq!(printable(b""), None);
        assert_eq!(printable(b"\0hidden"), None);
        assert_eq!(printable(b"lib.so\0hidden").unwrap(), "lib.so");
        assert_eq!(printable(b"\x1b[31m\n").unwrap(), "\\u{1b}[31m\\n");
        assert_eq!(printable("a\u{202e}b\\'\"".as_bytes()).unwrap(), "a\\u{202e}b\\\\'\"");
    }

    proptest! {
        #[test]
        fn garbage_reads_without_panic_and_prints_clean(words in prop::collection::vec(any::<u64>(), 64), stage in 0u32..6, signal in 0u32..70) {
            let page = CrashPage::new();
            let mut at = 0usize;
            fill(&page, || {
                at += 1;
                words[at % words.len()].rotate_left(u32::try_from(at % 64).unwrap())
            });
            page.stage.store(stage, Ordering::Relaxed);
            page.signal.store(signal, Ordering::Relaxed);
            prop_assert!(page.refusals().len() <= REFUSALS_MAX);
            if let Some(read) = page.read() {
                prop_assert!(matches!(stage, 2 | 3) && (1..=64).contains(&read.signal));
                prop_assert!(read.frames.len() <= FRAMES_MAX && read.instruction.len() <= INSTRUCTION_BYTES_MAX);
                for frame in &read.frames {
                    prop_assert!(!frame.to_string().chars().any(char::is_control));
                }
            }
        }

        #[test]
        fn bytes_survive_the_words(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let words = [const { AtomicU64::new(u64::MAX) }; 5];
            store_bytes(&words, &bytes);
            let mut padded = bytes.clone();
            padded.resize(40, 0);
            prop_assert_eq!(load_bytes(&words), padded);
        }
    }
}
