//! `Session`: a thread and a channel in a worker. This file is the host's half of the channel: who has which slot, and what becomes of a call.
//!
//! A session has one *direct* slot and a ring of slots. A blocking call takes the direct slot if it is free, which it is whenever
//! one thread uses the session: the same cache line then goes out and back for every call, which is the fastest there is. Calls that find it taken, and
//! all submitted calls, go through the ring, which the worker serves in order. Each ring request names the slot where the worker looks next, so a
//! slot that somebody holds on to (a ticket not yet waited for) is simply left out.
//!
//! Everything that decides anything is private to this process: which slots are free, how many requests were published, what each was. From the
//! region come only turns, words and bytes, and they are checked before they are used.

use crate::budget::Budget;
use crate::crash::{Cause, CrashReport, Involvement};
use crate::error::{CallError, FunctionName, LoadError, StartError};
use crate::home::{ASKED, FREE, Home, MOVING, Mark, NOBODY, TAKEN, UNSURE};
use crate::latencies::{Counters, Latencies, Recorder};
use crate::module::Resolved;
use crate::monitor::lock;
use crate::pipeline::StreamBooks;
use crate::placement::{self, Placement};
use crate::supervisor::Place;
use crate::turns::{self, Turns};
use crate::worker::{OnDeadline, WaitPolicy, Worker, WorkerInner, WorkerOwner, printable};
use crossbeam_utils::CachePadded;
use hotcell_channel::arena::{Arena, ArenaBlock};
use hotcell_channel::control::{self, ToWorker};
use hotcell_channel::layout::{
    self, ARENA_BYTES_MAX, FUNCTIONS_BASE, Geometry, HUGE_PAGE_BYTES, PAGE_BYTES, PAYLOAD_ALIGN,
    SCRATCH_BYTES,
};
use hotcell_channel::placement::Wanted;
use hotcell_channel::region::{self, Region};
use hotcell_channel::session::{self as fixed, Answer, FailureKind, Request};
use hotcell_channel::signature::Signature;
use hotcell_channel::slot::{FUNCTIONS_MAX, SLOTS_MAX, Slot, Turn, WORDS_MAX};
use hotcell_channel::sys;
use hotcell_channel::wait::{self, Spin, Waited};
use rustc_hash::FxHashMap;
use std::cell::Cell;
use std::ffi::CString;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
    Ordering::SeqCst, fence,
};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How a session is opened. Every option has a default; give it to [`Worker::session_with`].
#[derive(Clone, Debug)]
#[must_use]
pub struct SessionBuilder {
    timeout: Duration,
    on_deadline: OnDeadline,
    policy: WaitPolicy,
    slots: u32,
    payload_bytes_max: u64,
    string_bytes_max: u64,
    stack_bytes: u64,
    pub(crate) placement: Wanted,
    pub(crate) limits: crate::limits::SessionLimits,
    latencies: bool,
}

impl Default for SessionBuilder {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            on_deadline: OnDeadline::default(),
            policy: WaitPolicy::default(),
            slots: 256,
            payload_bytes_max: 64 << 20,
            string_bytes_max: 16 << 20,
            stack_bytes: 8 << 20,
            placement: Wanted::default(),
            limits: crate::limits::SessionLimits::default(),
            latencies: false,
        }
    }
}

impl SessionBuilder {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Default: 30 s. How long each call may take, for functions that have no timeout of their own. Zero is refused.
    ///
    /// It is one deadline for all that a call may wait for: its turn among many callers, a free slot, the reply, the bytes of a long string. It counts from the moment at which the call first waits. A call that
    /// gets no slot in time is not sent and answers [`CallError::Full`]; one that gets no reply in time answers [`CallError::TimedOut`], and [`SessionBuilder::on_deadline`] says what else happens. The
    /// session's own requests ([`Session::read`], [`Session::write`], [`Session::close`], loading) are calls, also where they take several messages.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Default: [`OnDeadline::KillWorker`]. What a passed deadline does.
    pub fn on_deadline(mut self, policy: OnDeadline) -> Self {
        self.on_deadline = policy;
        self
    }

    /// Default: [`WaitPolicy::Adaptive`]. How both sides wait for each other.
    pub fn wait(mut self, policy: WaitPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Default: 256. How many submitted calls can be in flight, less one; 2 to 4096.
    pub fn slots(mut self, slots: u32) -> Self {
        self.slots = slots;
        self
    }

    /// Default: 64 MiB. Largest argument or result of a call, in bytes; 16 KiB to 8 GiB. Memory is only used for what is passed.
    pub fn payload_bytes_max(mut self, bytes: u64) -> Self {
        self.payload_bytes_max = bytes;
        self
    }

    /// Default: 16 MiB. Longest string that a function may return, in bytes.
    pub fn string_bytes_max(mut self, bytes: u64) -> Self {
        self.string_bytes_max = bytes;
        self
    }

    /// Default: 8 MiB. Stack of the session's thread in the worker, in bytes; 64 KiB to 1 GiB.
    pub fn stack_bytes(mut self, bytes: u64) -> Self {
        self.stack_bytes = bytes;
        self
    }

    /// Default: off. Measures how long calls take: see [`Session::latencies`]. It makes a near call about 10 ns longer on average; a session without it pays nothing.
    pub fn latencies(mut self, measure: bool) -> Self {
        self.latencies = measure;
        self
    }

    pub(crate) fn check(&self) -> Result<(), StartError> {
        let bad = |option, given: u64, expected| {
            Err(StartError::Configuration { option, given: given.to_string(), expected })
        };
        if !(2..=SLOTS_MAX).contains(&self.slots) {
            return bad("slots", self.slots.into(), "2 to 4096");
        }
        if !(fixed::DIRECTORY_BYTES_MAX as u64..=8 << 30).contains(&self.payload_bytes_max) {
            return bad("payload_bytes_max", self.payload_bytes_max, "16 KiB to 8 GiB");
        }
        if !(1..=self.payload_bytes_max).contains(&self.string_bytes_max) && self.string_bytes_max != 16 << 20
        {
            return bad("string_bytes_max", self.string_bytes_max, "1 to payload_bytes_max");
        }
        if !(64 << 10..=1 << 30).contains(&self.stack_bytes) {
            return bad("stack_bytes", self.stack_bytes, "64 KiB to 1 GiB");
        }
        if self.timeout.is_zero() {
            return bad("timeout", 0, "longer than nothing");
        }
        placement::check(&self.placement, self.payload_bytes_max)?;
        self.limits.check()
    }

    pub(crate) fn call_timeout(&self) -> Duration {
        self.timeout
    }

    pub(crate) fn wait_policy(&self) -> WaitPolicy {
        self.policy
    }

    pub(crate) fn longest_string(&self) -> u64 {
        self.string_bytes_max
    }

    fn geometry(&self) -> Geometry {
        // Room for a largest argument, a largest result, what alignment and fragments lose, and blocks beside them. Only used pages cost memory.
        let huge_pages = self.placement.huge_pages;
        let unit = if huge_pages { HUGE_PAGE_BYTES } else { PAGE_BYTES };
        let arena = (4 * self.payload_bytes_max + (1 << 20) + SCRATCH_BYTES).next_multiple_of(unit);
        Geometry { slots: self.slots, arena_bytes: arena.min(ARENA_BYTES_MAX), huge_pages }
    }
}

/// A thread of its own in a worker, and a channel to it, with the modules loaded there.
///
/// Any number of threads may call through one session at the same time; the worker serves their calls one after another, on one native thread.
/// Cloning gives another handle to the same session. It is closed when the last handle (this one, its modules, functions and blocks) is dropped,
/// or at once by [`Session::close`].
#[derive(Clone, Debug)]
pub struct Session {
    pub(crate) owner: Arc<SessionOwner>,
}

/// Closes the session when dropped.
#[derive(Debug)]
pub(crate) struct SessionOwner {
    /// Its place with a supervisor. Before the session: when it is given back the session's calls are counted.
    place: OnceLock<Place>,
    pub(crate) inner: Arc<SessionInner>,
    worker: Arc<WorkerOwner>,
    placement: Placement,
}

impl Drop for SessionOwner {
    fn drop(&mut self) {
        // With the last handle to the worker the process goes, and its sessions with it.
        if Arc::strong_count(&self.worker) > 1 {
            self.inner.close_politely();
        }
        // In a fork the lock may be held for ever, by a thread that was not forked.
        if !self.inner.is_forked() {
            self.inner.worker.forget_session(self.inner.id);
        }
    }
}

impl Session {
    pub(crate) fn open(worker: &Arc<WorkerOwner>, options: SessionBuilder) -> Result<Session, StartError> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        options.check()?;
        Turns::get(); // made here, so that no call makes it
        if sys::original_process().load(Relaxed) == 0 {
            return Err(StartError::Forked);
        }
        // Here, because it allocates, which a call does not.
        Turns::get();
        let id = NEXT.fetch_add(1, Relaxed);
        let geometry = options.geometry();
        let (region, region_fd) =
            Region::create(geometry, id).map_err(|e| StartError::system("making the session's region", e))?;
        let host = placement::back(&region, region_fd.as_fd(), &options.placement)?;
        let inner = Arc::new_cyclic(|me| {
            SessionInner::new(me.clone(), id, region, region_fd, Arc::clone(&worker.inner), options)
        });
        let request = ToWorker::Open {
            session: id,
            slots: geometry.slots,
            arena_bytes: geometry.arena_bytes,
            policy: inner.options.policy,
            stack_bytes: inner.options.stack_bytes,
            placement: inner.options.placement,
        };
        worker.inner.limit_session(&inner)?;
        let (address, placed) = worker.inner.open_session(&inner, inner.region_fd.as_fd(), &request)?;
        inner.arena_address.store(address, Relaxed);
        let placement = Placement::new(host, placed);
        let place = OnceLock::new();
        Ok(Session { owner: Arc::new(SessionOwner { place, inner, worker: Arc::clone(worker), placement }) })
    }

    /// Loads a module. Its constructors run now, in the worker, within the session's deadline.
    ///
    /// # Errors
    /// See [`LoadError`]: each way to fail has its own.
    pub fn load(&self, source: impl Into<ModuleSource>) -> Result<crate::Module, LoadError> {
        let source = source.into();
        if let Some(place) = self.owner.place.get() {
            place.admit(&source.name.to_string_lossy())?;
        }
        crate::Module::load(self, &source)
    }

    /// The worker that this session is in.
    pub fn worker(&self) -> Worker {
        Worker { owner: Arc::clone(&self.owner.worker) }
    }

    /// How long calls took up to now; `None` unless [`SessionBuilder::latencies`] is on. Any thread may ask at any time, also when the session is closed or its worker dead; calls go
    /// on meanwhile.
    pub fn latencies(&self) -> Option<Latencies> {
        self.owner.inner.latencies().map(Recorder::read)
    }

    /// How many requests were sent, and how the waits for them ended. Always counted, since only waits that are long already are. Any thread may ask at any time; calls go on meanwhile.
    pub fn counters(&self) -> Counters {
        self.owner.inner.counters()
    }

    /// What became of the options for where the session runs and on which memory, when it was opened.
    pub fn placement(&self) -> &Placement {
        &self.owner.placement
    }

    /// Calls the worker's session thread and does nothing there: a sign of life.
    ///
    /// # Errors
    /// As for any call.
    pub fn ping(&self) -> Result<(), CallError> {
        self.owner.inner.fixed(fixed::NOP, &[], "ping").map(drop)
    }

    /// Allocates `bytes` zeroed bytes of worker memory. They are freed by [`Session::free`], or with the session.
    ///
    /// # Errors
    /// [`CallError::OutOfMemory`], [`CallError::TooManyBlocks`], and those of any call.
    pub fn alloc(&self, bytes: u64) -> Result<RemotePtr, CallError> {
        let inner = &self.owner.inner;
        // Counted before it is asked for, so that threads which ask at the same time do not get one too many. A request that is lost stays counted: nobody knows its outcome.
        let max = inner.options.limits.remote_blocks;
        let counted =
            inner.blocks.fetch_update(Relaxed, Relaxed, |blocks| (blocks < max).then_some(blocks + 1));
        if counted.is_err() {
            return Err(CallError::TooManyBlocks { max });
        }
        let error = match inner.fixed(fixed::ALLOCATE, &[bytes], "alloc") {
            Ok([fixed::OK, address]) => return Ok(inner.pointer(address)),
            Ok(_) => CallError::OutOfMemory { bytes },
            // The worker keeps nothing of a request that was refused memory.
            Err(refused @ CallError::SessionMemoryExceeded { .. }) => refused,
            Err(lost) => return Err(lost),
        };
        inner.blocks.fetch_sub(1, Relaxed);
        Err(error)
    }

    /// Frees what [`Session::alloc`] gave.
    ///
    /// # Errors
    /// [`CallError::UnknownBlock`] for any other address, and those of any call.
    pub fn free(&self, pointer: RemotePtr) -> Result<(), CallError> {
        let inner = &self.owner.inner;
        let address = inner.address_of(pointer, || inner.own_name("free"))?;
        match inner.fixed(fixed::FREE, &[address], "free")? {
            [fixed::OK, _] => {
                // A hostile worker may free what it never gave.
                let _ = inner.blocks.fetch_update(Relaxed, Relaxed, |blocks| blocks.checked_sub(1));
                Ok(())
            }
            _ => Err(CallError::UnknownBlock { address }),
        }
    }

    /// Copies worker memory, all of it within the session's timeout. A bad address is an error here and does the worker no harm.
    ///
    /// # Errors
    /// [`CallError::BadAddress`] (then `into` is partly filled), and those of any call.
    pub fn read(&self, pointer: RemotePtr, into: &mut [u8]) -> Result<(), CallError> {
        let inner = &self.owner.inner;
        let address = inner.address_of(pointer, || inner.own_name("read"))?;
        let mut budget = inner.budget();
        inner.read_memory(address, into, &mut budget, |budget| inner.claim(budget, || inner.own_name("read")))
    }

    /// Writes worker memory, all of it within the session's timeout. A bad address is an error here and does the worker no harm.
    ///
    /// # Errors
    /// [`CallError::BadAddress`] (then the part before it is written), and those of any call.
    pub fn write(&self, pointer: RemotePtr, from: &[u8]) -> Result<(), CallError> {
        let inner = &self.owner.inner;
        let address = inner.address_of(pointer, || inner.own_name("write"))?;
        let (mut done, mut budget) = (0, inner.budget());
        for piece in from.chunks(inner.piece_bytes()) {
            let mut frame = inner.claim(&mut budget, || inner.own_name("write"))?;
            frame.reserve(Need::of(piece.len()), || inner.own_name("write"))?;
            let source = frame.lend(piece);
            let words = [address.wrapping_add(done), source, piece.len() as u64];
            match frame.run_fixed(fixed::WRITE, &words, "write", &mut budget)? {
                [fixed::OK, _] => {}
                _ => return Err(CallError::BadAddress { address, bytes: done + piece.len() as u64 }),
            }
            done += piece.len() as u64;
        }
        Ok(())
    }

    /// Copies a NUL-terminated string of at most `bytes_max` bytes out of the worker.
    ///
    /// # Errors
    /// [`CallError::StringTooLong`], [`CallError::BadAddress`], and those of any call.
    pub fn read_string(&self, pointer: RemotePtr, bytes_max: u64) -> Result<CString, CallError> {
        let inner = &self.owner.inner;
        let name = || inner.own_name("read_string");
        inner.read_string(inner.address_of(pointer, name)?, bytes_max, name)
    }

    /// Makes a block of `bytes` bytes in the session's shared memory: host and worker both see it, so it can be passed again and
    /// again without a copy. It goes back when the [`Block`] is dropped. Its first content is unspecified.
    ///
    /// # Errors
    /// [`CallError::TooLarge`] over the payload limit, [`CallError::NoRoom`].
    pub fn block(&self, bytes: u64) -> Result<Block, CallError> {
        let inner = &self.owner.inner;
        let name = || inner.own_name("block");
        let max = inner.options.payload_bytes_max;
        if bytes > max {
            return Err(CallError::TooLarge { function: name(), bytes, max });
        }
        let block = inner.allocate(bytes, name)?;
        Ok(Block { owner: Arc::clone(&self.owner), block: Some(block), bytes })
    }

    /// Closes the session now: frees its blocks, unloads its modules (their destructors run in the worker, within the session's deadline), ends
    /// its thread. Later calls through any handle answer [`CallError::Closed`].
    ///
    /// # Errors
    /// As for any call; the session is unusable all the same. Only after [`CallError::Abandoned`] it is still open: it can be closed when the abandoned
    /// call has returned, or dropped, and is then closed by itself.
    pub fn close(&self) -> Result<(), CallError> {
        let closed = self.owner.inner.close();
        if let Some(place) = self.owner.place.get()
            && self.owner.inner.is_over()
        {
            place.closed(&self.worker());
        }
        closed
    }

    /// Gives the session its place with a supervisor.
    pub(crate) fn take_place(&self, place: Place) {
        let seated = self.owner.place.set(place);
        debug_assert!(seated.is_ok(), "a session is placed once");
    }

    pub(crate) fn inner(&self) -> &Arc<SessionInner> {
        &self.owner.inner
    }
}

/// What to load: see [`Module::ffi`](crate::Module::ffi).
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct ModuleSource {
    pub(crate) name: std::path::PathBuf,
    pub(crate) now: bool,
    pub(crate) global: bool,
}

impl ModuleSource {
    /// Default: off. Resolve all symbols that the module needs when it is loaded (`RTLD_NOW`), not when they are first used.
    pub fn resolve_now(mut self, now: bool) -> Self {
        self.now = now;
        self
    }

    /// Default: off. Let modules loaded later use this module's symbols (`RTLD_GLOBAL`).
    pub fn global(mut self, global: bool) -> Self {
        self.global = global;
        self
    }
}

impl<P: Into<std::path::PathBuf>> From<P> for ModuleSource {
    fn from(name: P) -> Self {
        crate::Module::ffi(name)
    }
}

/// An address in a worker. It can be kept, passed back and tested for null; the host never dereferences it.
///
/// It belongs to the session that it came from: another session refuses it, a restarted worker's too. What it points to may be freed or
/// changed by the worker at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct RemotePtr {
    address: u64,
    session: u32,
}

impl RemotePtr {
    /// The null pointer, which belongs to every session.
    pub const NULL: RemotePtr = RemotePtr { address: 0, session: 0 };

    /// Whether it is null.
    pub fn is_null(self) -> bool {
        self.address == 0
    }

    /// The address as a number, for structs that contain pointers.
    pub fn address(self) -> u64 {
        self.address
    }

    /// The pointer `bytes` bytes further on.
    pub fn offset(self, bytes: u64) -> Self {
        Self { address: self.address.wrapping_add(bytes), ..self }
    }
}

impl std::fmt::Display for RemotePtr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.address)
    }
}

/// Bytes that live in a session's shared memory. Passing them copies nothing.
///
/// The worker can change them at any time, also between calls: [`Block::read`] gives a snapshot, to be checked before it is used.
#[derive(Debug)]
pub struct Block {
    owner: Arc<SessionOwner>,
    block: Option<ArenaBlock>,
    bytes: u64,
}

impl Block {
    /// Its size.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Whether its size is zero.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Where it is in the worker, for structs that contain pointers.
    pub fn pointer(&self) -> RemotePtr {
        let inner = &self.owner.inner;
        inner.pointer(inner.address_at(self.offset()))
    }

    fn offset(&self) -> u64 {
        self.block.as_ref().map_or(0, |block| block.offset)
    }

    /// Copies bytes in, at `offset`. False, and nothing is copied, if they do not fit there, or in a fork of the host.
    #[must_use]
    pub fn write(&self, offset: u64, from: &[u8]) -> bool {
        self.fits(offset, from.len()) && self.owner.inner.region.write(self.offset() + offset, from)
    }

    /// Copies bytes out, from `offset`. False, and nothing is copied, if there are not as many, or in a fork of the host.
    #[must_use]
    pub fn read(&self, offset: u64, into: &mut [u8]) -> bool {
        self.fits(offset, into.len()) && self.owner.inner.region.read(self.offset() + offset, into)
    }

    /// Copies a plain value in. False if it does not fit there.
    #[must_use]
    pub fn write_value<T: bytemuck::NoUninit>(&self, offset: u64, value: &T) -> bool {
        self.write(offset, bytemuck::bytes_of(value))
    }

    /// Copies a plain value out. `None` if the block ends before it does.
    pub fn read_value<T: bytemuck::Pod>(&self, offset: u64) -> Option<T> {
        let mut value = T::zeroed();
        self.read(offset, bytemuck::bytes_of_mut(&mut value)).then_some(value)
    }

    fn fits(&self, offset: u64, bytes: usize) -> bool {
        offset.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes) && !self.owner.inner.is_forked()
    }

    pub(crate) fn session_id(&self) -> u32 {
        self.owner.inner.id
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.owner.inner.free_when_unused(block);
        }
    }
}

/// The session's states. The first is what [`sys::original_process`] holds in the process that opened it, and none is what it holds in a fork, so that one comparison of the two
/// tells whether calls can be made.
const OPEN: u32 = sys::ORIGINAL;
const DEAD: u32 = 2;
const ABANDONED: u32 = 3;
const CLOSED: u32 = 4;
const _: () = assert!(OPEN != 0 && OPEN != DEAD && OPEN != ABANDONED && OPEN != CLOSED);

/// The direct slot's private books: see [`crate::home`].
#[derive(Debug, Default)]
struct DirectBooks {
    home: Home,
    label: AtomicU32,
    published: AtomicU64,
}

/// How often a session is called, looked at from time to time.
#[derive(Debug, Default)]
struct CallRate {
    /// Calls of threads that were not at home.
    strangers: u64,
    /// What was on the clock, and the counts, when it was last looked at after enough calls.
    at: Option<Instant>,
    published: u64,
    strangers_then: u64,
    dense: bool,
}

impl CallRate {
    /// Whether calls follow each other closely.
    fn is_dense(&mut self, published: u64, now: Instant) -> bool {
        let calls = published.wrapping_sub(self.published) + self.strangers.wrapping_sub(self.strangers_then);
        if calls >= turns::DENSE_CALLS {
            let time = self.at.map(|at| now.saturating_duration_since(at));
            self.dense =
                time.is_some_and(|time| time.as_nanos() <= turns::DENSE_CALL.as_nanos() * u128::from(calls));
            (self.at, self.published, self.strangers_then) = (Some(now), published, self.strangers);
        }
        self.dense
    }
}

/// What other threads than the direct slot's home have seen of it.
#[derive(Debug, Default)]
struct Strangers {
    calls: u32,
    published: u64,
}

/// Calls of strangers, with none of the home's among them, after which the home moves.
const CALLS_TO_MOVE: u32 = 32;

/// The calling thread's mark.
#[inline(always)]
fn this_thread() -> Mark {
    thread_local! {
        static MARK: u64 = const { 0 };
    }
    MARK.with(|mark| std::ptr::from_ref(mark).addr())
}

/// One ring slot's private books.
#[derive(Debug, Default)]
struct RingBooks {
    busy: AtomicBool,
    label: AtomicU32,
    sequence: AtomicU64,
}

#[derive(Debug, Default)]
struct Ring {
    /// The slot where the worker looks next; busy, so that nobody else gets it.
    tail: u32,
    published: u64,
    /// Slots whose callers went away before the reply: free once it is there.
    orphans: Vec<(u32, Option<ArenaBlock>)>,
    /// Dropped blocks that a call nobody waits for may still use, each with the numbers of the last requests, of the ring and of the stream, that can have been given it.
    kept_blocks: Vec<(u64, u64, ArenaBlock)>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Lane {
    Direct,
    Ring { slot: u32, next: u32 },
}

/// Where an abandoned call's reply will come.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ReplyPlace {
    Slot(Lane),
    /// In the stream, at this position.
    Stream(u64),
}

#[derive(Debug)]
struct AbandonedCall {
    place: ReplyPlace,
    block: Option<ArenaBlock>,
    function: FunctionName,
    /// It ends the session's thread when it returns.
    closes: bool,
}

/// What tells one resolved function from another: module, symbol, signature, and whether its replies carry `errno`.
pub(crate) type ResolveKey = (u32, Arc<str>, Signature, bool);

/// What the session does on its own account, by the numbers of the functions, which are their labels too. Those of modules come behind.
const OWN_WORK: [&str; fixed::FIXED_MAX as usize + 1] = [
    "ping",
    "(directory)",
    "read",
    "write",
    "alloc",
    "free",
    "read_string",
    "close",
    "memory",
    "pipeline",
    "(end of a pipeline)",
];
const _: () = assert!(fixed::NOP == 0 && fixed::CLOSE == 7 && fixed::STREAM_END == 10);

/// In place of the fork marker: no call is a plain one.
static MEASURED: AtomicU32 = AtomicU32::new(0);

/// The host's half of a session, shared by its handles and the monitor.
pub struct SessionInner {
    me: Weak<SessionInner>,
    status: AtomicU32,
    /// 1 where the way of a plain call may be taken: as `original`, and always 0 where calls are measured.
    plain: &'static AtomicU32,
    original: &'static AtomicU32,
    pub(crate) region: Region,
    arena_address: AtomicU64,
    spin: Spin,
    direct: CachePadded<DirectBooks>,
    ring_books: Box<[RingBooks]>,
    /// The books of the session's pipeline.
    pub(crate) stream: CachePadded<StreamBooks>,
    ring: Mutex<Ring>,
    arena: Mutex<Arena>,
    /// Callers that wait for a free ring slot.
    waiting: AtomicU32,
    freed: (Mutex<()>, Condvar),
    strangers: Mutex<Strangers>,
    rate: Mutex<CallRate>,
    abandoned: Mutex<Vec<AbandonedCall>>,
    labels: Mutex<Vec<FunctionName>>,
    /// Blocks that `alloc` gave and `free` did not take back.
    blocks: AtomicU64,
    /// What was resolved before, by module, symbol, signature and errno: a host that resolves again and again costs nobody anything.
    resolved: Mutex<FxHashMap<ResolveKey, u32>>,
    latencies: Option<Recorder>,
    id: u32,
    pub(crate) options: SessionBuilder,
    region_fd: OwnedFd,
    pub(crate) worker: Arc<WorkerInner>,
}

impl std::fmt::Debug for SessionInner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("id", &self.id).field("worker", &self.worker).finish_non_exhaustive()
    }
}

impl SessionInner {
    fn new(
        me: Weak<SessionInner>,
        id: u32,
        region: Region,
        region_fd: OwnedFd,
        worker: Arc<WorkerInner>,
        options: SessionBuilder,
    ) -> Self {
        let ring_books: Box<[RingBooks]> = (0..options.slots).map(|_| RingBooks::default()).collect();
        ring_books[0].busy.store(true, Relaxed);
        Self {
            me,
            status: AtomicU32::new(OPEN),
            plain: if options.latencies { &MEASURED } else { sys::original_process() },
            original: sys::original_process(),
            latencies: options.latencies.then(Recorder::new),
            arena: Mutex::new(Arena::with_committed(
                region.geometry().arena_bytes,
                options.placement.committed_bytes(),
            )),
            region,
            arena_address: AtomicU64::new(0),
            spin: Spin::new(options.policy),
            direct: CachePadded::default(),
            ring_books,
            stream: CachePadded::default(),
            ring: Mutex::default(),
            waiting: AtomicU32::new(0),
            freed: Default::default(),
            strangers: Mutex::default(),
            rate: Mutex::default(),
            abandoned: Mutex::default(),
            labels: Mutex::default(),
            blocks: AtomicU64::new(0),
            resolved: Mutex::default(),
            id,
            options,
            region_fd,
            worker,
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn own_name(&self, what: &str) -> FunctionName {
        FunctionName { module: "the session".into(), symbol: what.into() }
    }

    /// Where calls are measured: what measures them.
    #[inline(always)]
    pub(crate) fn latencies(&self) -> Option<&Recorder> {
        self.latencies.as_ref()
    }

    pub(crate) fn counters(&self) -> Counters {
        let (spun, parked) = self.spin.waits();
        let (worker_spun, worker_parked) = self.region.progress().waits();
        let direct = self.direct.published.load(Relaxed);
        // In a fork the lock may be held for ever, by a thread that was not forked.
        let ring = if self.is_forked() { 0 } else { lock(&self.ring).published };
        Counters { requests: direct + ring + self.stream.sent(), spun, parked, worker_spun, worker_parked }
    }

    /// The label by which reports find a function's name. The same name has the same label.
    pub(crate) fn label(&self, function: FunctionName) -> u32 {
        let mut labels = lock(&self.labels);
        let known = labels.iter().position(|name| *name == function);
        let at = known.unwrap_or_else(|| {
            labels.push(function);
            labels.len() - 1
        });
        u32::try_from(OWN_WORK.len() + at).unwrap_or(fixed::NOP)
    }

    pub(crate) fn label_name(&self, label: u32) -> FunctionName {
        let label = label as usize;
        match OWN_WORK.get(label) {
            Some(own) => self.own_name(own),
            None => lock(&self.labels)
                .get(label - OWN_WORK.len())
                .map_or_else(|| self.own_name("(unknown)"), Clone::clone),
        }
    }

    pub(crate) fn pointer(&self, address: u64) -> RemotePtr {
        RemotePtr { address, session: if address == 0 { 0 } else { self.id } }
    }

    /// A pointer's address, if it may be passed to this session.
    #[inline]
    pub(crate) fn address_of(
        &self,
        pointer: RemotePtr,
        function: impl FnOnce() -> FunctionName,
    ) -> Result<u64, CallError> {
        self.address_here(pointer).ok_or_else(|| CallError::ForeignPointer { function: function() })
    }

    /// A pointer's address; `None` if it is another session's.
    #[inline(always)]
    pub(crate) fn address_here(&self, pointer: RemotePtr) -> Option<u64> {
        (pointer.session == self.id || pointer.is_null()).then_some(pointer.address)
    }

    fn address_at(&self, offset: u64) -> u64 {
        self.arena_address.load(Relaxed).wrapping_add(offset)
    }

    // The life of a call.

    /// Takes the direct slot for a blocking call, if that is possible at once: the way of every call of a session that one thread uses. What is `None` here
    /// goes through [`SessionInner::claim`].
    ///
    /// The two are not one function because a frame that can come from either is put together in memory, in pieces, and read back whole, and the processor
    /// stalls on that for longer than everything else here takes.
    #[inline(always)]
    pub(crate) fn claim_direct(&self) -> Option<Frame<'_>> {
        let sequence = self.take_direct(self.plain)?;
        Some(Frame::new(self, Lane::Direct, self.region.direct(), sequence))
    }

    /// [`SessionInner::claim_direct`] for a call that is measured, which is no plain one.
    #[inline(always)]
    pub(crate) fn claim_direct_measured(&self) -> Option<Frame<'_>> {
        let sequence = self.take_direct(self.original)?;
        Some(Frame::new(self, Lane::Direct, self.region.direct(), sequence))
    }

    /// Takes the direct slot if that is possible at once, and gives the number of its next request. `may` is the fork marker, or what stands in its place.
    #[inline(always)]
    fn take_direct(&self, may: &AtomicU32) -> Option<u64> {
        // Both are facts of this process; together one branch.
        if self.status.load(Acquire) != may.load(Relaxed) {
            return None;
        }
        let direct = &self.direct;
        if !direct.home.take(this_thread()) {
            return None;
        }
        Some(direct.published.load(Relaxed) + 1)
    }

    /// A whole call whose arguments and result are plain words, in a straight line: takes the direct slot, lets `words` fill it, publishes, waits, and gives the
    /// reply's first word. Whatever is not at hand is done elsewhere: a slot that is not to be had at once, a reply that takes long, a call that is lost.
    ///
    /// It has no [`Frame`], whose destructor needs it to be in memory: putting it there took half of a call's instructions. Nothing between the claim and the reply can
    /// panic, and no payload is held, so there is nothing for a destructor to do.
    #[inline(always)]
    pub(crate) fn call_straight(&self, target: &Target, words: impl FnOnce(&Slot)) -> Straight {
        self.call_straight_if(target, || true, words)
    }

    /// The same, but not here if `still` says no when the slot is taken.
    #[inline(always)]
    pub(crate) fn call_straight_if(
        &self,
        target: &Target,
        still: impl FnOnce() -> bool,
        words: impl FnOnce(&Slot),
    ) -> Straight {
        let Some(sequence) = self.take_direct(self.plain) else { return Straight::Elsewhere };
        if !still() {
            self.direct.home.release();
            return Straight::Elsewhere;
        }
        let slot = self.region.direct();
        words(slot);
        self.publish_direct(slot, target.index, 0, target.label, sequence);
        if !wait::look_for_reply(slot, &self.spin)
            && let Some(error) = self.wait_straight(target, sequence)
        {
            return Straight::Failed(error);
        }
        let word = slot.word(0);
        self.direct.home.release();
        Straight::Replied(word)
    }

    /// [`SessionInner::claim_direct`] for a straight call with a payload: one that fits the direct slot's scratch. `None` for any other.
    ///
    /// The frame is only a place for the payload's books, which stay in registers: nobody drops it. Whoever claims it goes through
    /// [`SessionInner::run_straight`] and [`SessionInner::release_straight`] itself. Should a panic come between, the slot stays taken, and the session goes on
    /// with its ring.
    #[inline(always)]
    pub(crate) fn claim_straight(&self, need: Need) -> Option<ManuallyDrop<Frame<'_>>> {
        if need.total > SCRATCH_BYTES || need.largest > self.options.payload_bytes_max {
            return None;
        }
        let mut frame = ManuallyDrop::new(self.claim_direct()?);
        frame.end = need.total;
        Some(frame)
    }

    /// Publishes a straight call and waits for its reply. After `None` the reply can be read, and the slot is to be released; after an error it is not the caller's any more.
    #[inline(always)]
    pub(crate) fn run_straight(&self, target: &Target, frame: &Frame<'_>) -> Option<Box<CallError>> {
        self.publish_direct(frame.slot, target.index, frame.payload_number(), target.label, frame.sequence);
        if wait::look_for_payload_reply(frame.slot, &self.spin) {
            return None;
        }
        self.wait_straight(target, frame.sequence)
    }

    /// Gives back what [`SessionInner::claim_straight`] gave.
    #[inline(always)]
    pub(crate) fn release_straight(&self) {
        self.direct.home.release();
    }

    /// The rest of a straight call whose reply was not there at the first looks. What comes back fits a register.
    #[cold]
    #[inline(never)]
    fn wait_straight(&self, target: &Target, sequence: u64) -> Option<Box<CallError>> {
        let mut frame = Frame::new(self, Lane::Direct, self.region.direct(), sequence);
        frame.stage.set(Stage::Published);
        let waited = frame.wait_slowly(target.timeout);
        if waited != Waited::Replied {
            let name = FunctionName::clone(&target.name);
            return Some(Box::new(frame.lost(waited, target.timeout, name)));
        }
        // The slot stays taken until the caller has read the reply.
        std::mem::forget(frame);
        None
    }

    /// Hands the direct slot's request over, with what is to be said of its payload, and keeps the books.
    #[inline(always)]
    fn publish_direct(&self, slot: &Slot, function: u32, payload: u32, label: u32, sequence: u64) {
        slot.set_function(function, payload);
        // The books are for the monitor, after a death. They are kept when the request is on its way, because the exchange that sends it waits for every
        // store before it. Should the worker die and the monitor look within that nanosecond, the report names no culprit.
        wait::publish_then(slot, self.region.bell(), || {
            self.direct.label.store(label, Relaxed);
            self.direct.published.store(sequence, Release); // SYNC books
        });
    }

    /// The budget of one of the session's own requests.
    fn budget(&self) -> Budget {
        Budget::new(self.options.timeout)
    }

    /// Takes a slot for a blocking call, waiting for one if all are taken.
    pub(crate) fn claim(
        &self,
        budget: &mut Budget,
        function: impl Fn() -> FunctionName,
    ) -> Result<Frame<'_>, CallError> {
        if self.status.load(Acquire) != self.original.load(Relaxed) {
            self.refuse(&function)?;
        }
        self.take_turns(budget);
        if self.move_home()
            && let Some(frame) = self.claim_direct_measured()
        {
            return Ok(frame);
        }
        self.claim_ring(budget, function)
    }

    /// Hands the calling thread's turn on if it was asked to, notices a crowd, and waits for the thread's turn in it. See [`crate::turns`].
    #[cold]
    #[inline(never)]
    fn take_turns(&self, budget: &mut Budget) {
        if self.options.policy == WaitPolicy::Park {
            return; // sleeps for each reply anyway
        }
        let here = this_thread();
        let home = self.direct.home.owner();
        if home == here | ASKED {
            // Not in the middle of a call: it is about to begin one.
            self.direct.home.vacate(home);
            Turns::get().leave(here);
        } else {
            let joins = match home {
                // A session that is new, or seldom called, is not held up by what others do.
                NOBODY => Turns::get().waited_for() && self.rate.try_lock().is_ok_and(|rate| rate.dense),
                home => home != here && self.stranger_in_crowd(here, home),
            };
            if !joins {
                return;
            }
        }
        Turns::get().wait(here, &self.me, budget.wait());
        self.leave_workers_cpu();
    }

    /// Whether the calling thread, which is a stranger to the direct slot, should take turns with the other callers. Looked at in one call of sixteen.
    fn stranger_in_crowd(&self, here: usize, home: usize) -> bool {
        let Ok(mut rate) = self.rate.try_lock() else { return false };
        rate.strangers += 1;
        if rate.strangers % turns::LOOK_EVERY != 0 {
            return false;
        }
        let published = self.direct.published.load(Relaxed);
        let home_calls = published != rate.published && home & ASKED == 0 && home != MOVING;
        let dense = rate.is_dense(published, Instant::now());
        drop(rate);
        if !dense {
            return false;
        }
        if !home_calls {
            return Turns::get().note(&[here]);
        }
        let crowded = Turns::get().note(&[home, here]);
        if crowded {
            Turns::get().adopt(home, &self.me);
        }
        crowded
    }

    /// For a wait that is about to sleep: whether there is any sense in waiting. Notices a crowd, since in one the worker has lost its CPU.
    fn still_waits(&self, lane: Lane) -> bool {
        let waits = self.has_live_worker();
        if waits && matches!(lane, Lane::Direct) {
            self.notice_crowd();
        }
        waits
    }

    fn notice_crowd(&self) {
        let Ok(mut rate) = self.rate.try_lock() else { return };
        let published = self.direct.published.load(Relaxed);
        // Under the policy `Spin` this is asked again and again in one wait.
        if published.wrapping_sub(rate.published) < turns::DENSE_CALLS
            || self.options.policy == WaitPolicy::Park
        {
            return;
        }
        let dense = rate.is_dense(published, Instant::now());
        drop(rate);
        let here = this_thread();
        if dense && Turns::get().note(&[here]) {
            // It asks itself: after this call it waits for its turn.
            self.ask_home(here);
        }
    }

    /// Asks `home`, if it is the direct slot's home, to go away before its next call.
    pub(crate) fn ask_home(&self, home: usize) {
        self.direct.home.ask(home);
    }

    /// Moves the calling thread off the CPU on which the worker was last seen, where they would wait for each other. The thread's affinity is what it was when this returns.
    fn leave_workers_cpu(&self) {
        let worker = self.region.progress().worker_cpu();
        if worker == sys::current_cpu() {
            // A thread that may run on one CPU only stays there; and where the kernel refuses, so be it: it is slower.
            let _ = turns::avoid_cpu(worker);
        }
    }

    /// Makes the calling thread the direct slot's home if it is time for that. True if it is at home now.
    #[cold]
    fn move_home(&self) -> bool {
        let direct = &self.direct;
        let here = this_thread();
        match direct.home.owner() {
            NOBODY => return direct.home.enter(here),
            home if home == here => {
                self.settle_direct(here);
                return true;
            }
            _ => {}
        }
        // One mover at a time; who finds another at it has not waited long enough anyway.
        let Ok(mut strangers) = self.strangers.try_lock() else { return false };
        let published = direct.published.load(Relaxed);
        if published != strangers.published {
            *strangers = Strangers { calls: 0, published };
        }
        strangers.calls += 1;
        if strangers.calls < CALLS_TO_MOVE {
            return false;
        }
        strangers.calls = 0;
        direct.home.move_to(here, sys::process_barrier)
    }

    /// Leaves the direct slot to whoever calls next, if the calling thread is its home. For a thread that has prepared a session for others and will not call again: without it they would
    /// have to wear out the home's claim first ([`CALLS_TO_MOVE`]).
    pub(crate) fn leave_home(&self) {
        let here = this_thread();
        let home = self.direct.home.owner();
        if home & !ASKED == here {
            self.direct.home.vacate(home);
            Turns::get().leave(here);
        }
    }

    /// Lowers the direct slot's mark where a former home left it unsure. For the home, which is about to make a call.
    fn settle_direct(&self, here: Mark) {
        if self.direct.home.busy() != UNSURE {
            return;
        }
        // Under the lock the home stays where it is.
        let Ok(_no_mover) = self.strangers.try_lock() else { return };
        // A pending request is one that the home has given up, to a worker that is being killed.
        self.direct.home.settle(here, || self.region.direct().turn() == Turn::Pending);
    }

    /// Takes a ring slot, waiting for one to become free.
    pub(crate) fn claim_ring(
        &self,
        budget: &mut Budget,
        function: impl Fn() -> FunctionName,
    ) -> Result<Frame<'_>, CallError> {
        loop {
            if self.status.load(Acquire) != self.original.load(Relaxed) {
                self.refuse(&function)?;
            }
            // A call that has no time left is not sent: its worker would be killed for it.
            if budget.is_over() {
                return Err(CallError::Full { slots: self.options.slots - 1 });
            }
            if let Some(frame) = self.try_claim_ring() {
                return Ok(frame);
            }
            let slice = budget.wait().min(Duration::from_millis(1));
            if slice.is_zero() {
                continue;
            }
            self.waiting.fetch_add(1, Relaxed);
            // A wake-up can be missed between the look above and the wait below, and a dropped ticket's slot becomes free without one: hence
            // the short slice. It only matters when all slots are taken.
            let (mutex, freed) = &self.freed;
            drop(freed.wait_timeout(lock(mutex), slice).unwrap_or_else(PoisonError::into_inner));
            self.waiting.fetch_sub(1, Relaxed);
        }
    }

    fn try_claim_ring(&self) -> Option<Frame<'_>> {
        let mut ring = lock(&self.ring);
        if !ring.orphans.is_empty() {
            self.reclaim(&mut ring);
        }
        // Once a round.
        if ring.tail == 0 {
            self.reclaim_blocks(&mut ring);
        }
        let slots = self.options.slots;
        let slot = ring.tail;
        let next =
            (1..slots).map(|step| (slot + step) % slots).find(|at| !self.books(*at).busy.load(Acquire))?;
        self.books(next).busy.store(true, Relaxed);
        ring.tail = next;
        ring.published += 1;
        Some(Frame::new(self, Lane::Ring { slot, next }, self.region.slot(slot), ring.published))
    }

    fn books(&self, slot: u32) -> &RingBooks {
        &self.ring_books[slot as usize]
    }

    /// How many calls hold a slot: those in flight, and submitted ones that are answered and neither waited for nor dropped. Unlike [`SessionInner::calls`] it counts a call from the moment at
    /// which it has its slot until it has given it back. Looks at every slot, so it is not for every call.
    pub(crate) fn slots_held(&self) -> usize {
        if self.status.load(Acquire) == ABANDONED {
            // The slots of abandoned calls that have returned are given back by the next caller, who may never come.
            let _ = self.refuse(&|| self.own_name("look"));
        }
        let mut ring = lock(&self.ring);
        self.reclaim(&mut ring);
        let busy = self.ring_books.iter().filter(|books| books.busy.load(Acquire)).count();
        drop(ring);
        let direct = match self.direct.home.busy() {
            FREE => false,
            // Left by a former home, and lowered only by the next call of the present one: what tells is the slot.
            UNSURE => self.region.direct().turn() == Turn::Pending,
            _ => true,
        };
        // The slot at the tail is busy and has no call in it.
        busy.saturating_sub(1) + usize::from(direct)
    }

    /// Whether a call holds the direct slot, as far as one load can tell.
    #[inline(always)]
    pub(crate) fn is_direct_busy(&self) -> bool {
        self.direct.home.busy() == TAKEN
    }

    /// Frees the slots of callers that went away, where the reply has come.
    fn reclaim(&self, ring: &mut Ring) {
        let mut kept = Vec::new();
        for (slot, block) in ring.orphans.drain(..) {
            if self.region.slot(slot).turn().is_answered() {
                self.books(slot).busy.store(false, Release);
                if let Some(block) = block {
                    self.free_block(block);
                }
            } else {
                kept.push((slot, block));
            }
        }
        ring.orphans = kept;
    }

    /// Frees dropped blocks that no call can be using any more. Looks at all slots, so it is not for every call.
    fn reclaim_blocks(&self, ring: &mut Ring) {
        if !ring.kept_blocks.is_empty() {
            let (oldest, oldest_of_stream) = (self.oldest_in_use(), self.oldest_of_stream());
            let over = |(last, last_of_stream, _): &mut (u64, u64, ArenaBlock)| {
                *last < oldest && *last_of_stream <= oldest_of_stream
            };
            for (_, _, block) in ring.kept_blocks.extract_if(.., over) {
                self.free_block(block);
            }
        }
    }

    /// The number of the oldest request of the ring that the worker has not answered; after it, and while an abandoned call runs, blocks are in use. It counts those that nobody
    /// knows of any more, because their tickets were forgotten.
    fn oldest_in_use(&self) -> u64 {
        if !lock(&self.abandoned).is_empty() {
            return 0;
        }
        let pending = (0..self.options.slots)
            .filter(|at| self.books(*at).busy.load(Acquire) && self.region.slot(*at).turn() == Turn::Pending);
        pending.map(|at| self.books(at).sequence.load(Relaxed)).min().unwrap_or(u64::MAX)
    }

    #[inline(always)]
    fn release(&self, lane: Lane) {
        match lane {
            Lane::Direct => self.direct.home.release(),
            Lane::Ring { slot, .. } => {
                self.books(slot).busy.store(false, Release);
                if self.waiting.load(Relaxed) > 0 {
                    self.freed.1.notify_one();
                }
            }
        }
    }

    /// Why no call can be made now; or that it can after all, because what was abandoned has returned.
    #[cold]
    pub(crate) fn refuse(&self, function: &dyn Fn() -> FunctionName) -> Result<(), CallError> {
        if self.original.load(Relaxed) == 0 {
            return Err(CallError::Forked);
        }
        match self.status.load(Acquire) {
            DEAD => Err(self.death_error(Some(function()), false)),
            CLOSED => Err(CallError::Closed),
            ABANDONED => {
                let mut closed = false;
                let mut abandoned = lock(&self.abandoned);
                abandoned.retain_mut(|call| {
                    let returned = match call.place {
                        ReplyPlace::Slot(lane) => self.slot(lane).turn().is_answered(),
                        ReplyPlace::Stream(position) => self.region.stream().has_reply(position),
                    };
                    if !returned {
                        return true;
                    }
                    closed |= call.closes;
                    if let ReplyPlace::Slot(lane) = call.place {
                        self.release(lane);
                    }
                    if let Some(block) = call.block.take() {
                        self.free_block(block);
                    }
                    false
                });
                if closed {
                    if self.status.compare_exchange(ABANDONED, CLOSED, SeqCst, Relaxed).is_ok() {
                        self.close_slots();
                    }
                    return Err(CallError::Closed);
                }
                match abandoned.first() {
                    Some(call) => Err(CallError::Abandoned { function: call.function.clone() }),
                    None => {
                        // Fails if the worker died meanwhile; the next look at the status tells.
                        let _ = self.status.compare_exchange(ABANDONED, OPEN, Acquire, Relaxed);
                        Ok(())
                    }
                }
            }
            _ => Ok(()),
        }
    }

    fn slot(&self, lane: Lane) -> &Slot {
        match lane {
            Lane::Direct => self.region.direct(),
            Lane::Ring { slot, .. } => self.region.slot(slot),
        }
    }

    /// Leaves what `place` names to a call that passed its deadline, until it returns.
    fn abandon(&self, place: ReplyPlace, block: Option<ArenaBlock>, function: FunctionName, closes: bool) {
        lock(&self.abandoned).push(AbandonedCall { place, block, function, closes });
        // Fails if the session is abandoned already, or dead.
        let _ = self.status.compare_exchange(OPEN, ABANDONED, Acquire, Relaxed);
    }

    /// What a passed deadline of the call at `position` of the stream does. Whether the worker was killed.
    pub(crate) fn stream_timed_out(&self, position: u64, function: &FunctionName, after: Duration) -> bool {
        let worker_killed = self.options.on_deadline == OnDeadline::KillWorker;
        if worker_killed {
            let cause = Cause::DeadlineExceeded { function: function.clone(), after };
            self.worker.end(cause, Some(self.id));
        } else {
            self.abandon(ReplyPlace::Stream(position), None, function.clone(), false);
        }
        worker_killed
    }

    /// The error of a call whose worker is dead. `taken`: whether the worker had taken it.
    #[cold]
    pub(crate) fn death_error(&self, function: Option<FunctionName>, taken: bool) -> CallError {
        // The death is known before the status says so; a breach is followed by a kill whose report is on its way.
        if self.worker.death().is_none() {
            self.worker.wait_gone();
        }
        let Some(death) = self.worker.death().cloned() else { return CallError::Closed };
        let involvement = match (taken, death.culprit == Some(self.id)) {
            (false, _) => Involvement::NotRun,
            (true, true) => Involvement::Culprit,
            (true, false) => Involvement::Bystander,
        };
        let report = Box::new(CrashReport { death, function, involvement });
        // A limit's own error is for the call that exceeded it, or, where nobody can tell which did, for each that ran.
        let blamed = taken && (involvement == Involvement::Culprit || report.death.culprit.is_none());
        match report.cause() {
            Cause::Disposed => CallError::Disposed(report),
            Cause::CpuTimeExceeded { .. } if blamed => CallError::CpuTimeExceeded(report),
            Cause::MemoryExceeded { .. } if blamed => CallError::MemoryExceeded(report),
            Cause::FileSizeExceeded { .. } if blamed => CallError::FileSizeExceeded(report),
            _ => CallError::Crashed(report),
        }
    }

    // Called by the monitor when the worker has ended.

    /// The function that was running: taken by the worker, and not answered.
    pub(crate) fn running_function(&self) -> Option<FunctionName> {
        let (direct_taken, ring_taken) = self.region.progress().taken();
        // A ring slot's books are kept before its request is published: who has seen the request sees them. The direct slot's come after it, the number last: who
        // has seen that sees the label.
        let direct = self.region.direct().turn() == Turn::Pending
            && self.direct.home.busy() != FREE
            && self.direct.published.load(Acquire) == direct_taken; // SYNC books
        if direct {
            return Some(self.label_name(self.direct.label.load(Relaxed)));
        }
        if let Some(running) = self.running_in_stream() {
            return Some(running);
        }
        let running = (0..self.options.slots).find(|at| {
            let books = self.books(*at);
            ring_taken != 0
                && self.region.slot(*at).turn() == Turn::Pending
                && books.busy.load(Acquire)
                && books.sequence.load(Relaxed) == ring_taken
        })?;
        Some(self.label_name(self.books(running).label.load(Relaxed)))
    }

    /// Ends every wait of this session. The worker's death is known already.
    pub(crate) fn worker_died(&self) {
        if self.status.load(Acquire) != CLOSED {
            self.status.store(DEAD, SeqCst);
        }
        self.close_slots();
    }

    /// Ends every wait for a reply that will never come. The status says so already.
    fn close_slots(&self) {
        wait::close(self.region.direct());
        // Nobody waits for a slot that no request was ever in, and its page has not been touched. A caller who publishes there just now notes that, announces its sleep, and looks at the
        // status behind a fence; the status was written before this fence. So it sees the status, or we see its note: SYNC death.
        fence(SeqCst);
        for slot in (0..self.options.slots).filter(|slot| self.books(*slot).sequence.load(Relaxed) != 0) {
            wait::close(self.region.slot(slot));
        }
        self.region.sleepers().end_wait();
        self.freed.1.notify_all();
    }

    // Memory.

    /// Largest piece in which worker memory is copied.
    fn piece_bytes(&self) -> usize {
        usize::try_from(self.options.payload_bytes_max.min(4 << 20)).unwrap_or(1 << 20)
    }

    /// Whether this process is a fork of the one that opened the session. It has copies of the books, but the memory is still shared: what it gave away or
    /// handed out would be missing in the original.
    #[inline(always)]
    pub(crate) fn is_forked(&self) -> bool {
        self.original.load(Relaxed) == 0
    }

    /// Whether calls can be made now. If not, [`SessionInner::refuse`] says why.
    #[inline(always)]
    pub(crate) fn is_open(&self) -> bool {
        // Both are facts of this process; together one branch.
        self.status.load(Acquire) | (self.original.load(Relaxed) ^ 1) == 0
    }

    /// For a wait that is about to sleep: whether a reply may still come. If the worker says that it is dying, waits a moment for the kernel to say so too.
    pub(crate) fn has_live_worker(&self) -> bool {
        if self.options.policy != WaitPolicy::Park {
            self.worker.follow_crash();
        }
        self.is_alive()
    }

    /// Whether a reply may still come.
    pub(crate) fn is_alive(&self) -> bool {
        matches!(self.status.load(SeqCst), OPEN | ABANDONED)
    }

    /// Whether the session was closed in good order: what was not answered did not run.
    pub(crate) fn is_closed(&self) -> bool {
        self.status.load(Acquire) == CLOSED
    }

    /// Gives the stream its pages.
    pub(crate) fn commit_stream(&self) -> std::io::Result<()> {
        region::commit_stream(self.region_fd.as_fd(), self.region.geometry())
    }

    fn allocate(&self, bytes: u64, function: impl FnOnce() -> FunctionName) -> Result<ArenaBlock, CallError> {
        if self.is_forked() {
            return Err(CallError::Forked);
        }
        let base = self.region.geometry().arena_offset();
        let allocate = || {
            lock(&self.arena)
                .allocate(bytes, |offset, bytes| region::commit(self.region_fd.as_fd(), base + offset, bytes))
        };
        allocate()
            .or_else(|_| {
                // Dropped tickets whose calls are over still have their blocks, until somebody looks.
                let mut ring = lock(&self.ring);
                self.reclaim(&mut ring);
                self.reclaim_blocks(&mut ring);
                drop(ring);
                allocate()
            })
            .map_err(|source| CallError::NoRoom { function: function(), source: source.into() })
    }

    /// Frees a block that calls may have been given. A call that nobody waits for any more (a dropped or forgotten ticket, an abandoned call) may still use it: then it is kept
    /// until that is over.
    fn free_when_unused(&self, block: ArenaBlock) {
        if self.is_forked() {
            return; // the lock may be held for ever, by a thread that was not forked
        }
        let mut ring = lock(&self.ring);
        let last = ring.published;
        ring.kept_blocks.push((last, self.stream.sent(), block));
        self.reclaim_blocks(&mut ring);
    }

    fn free_block(&self, block: ArenaBlock) {
        if self.is_forked() {
            return;
        }
        let base = self.region.geometry().arena_offset();
        lock(&self.arena)
            .free(block, |offset, bytes| region::decommit(self.region_fd.as_fd(), base + offset, bytes));
    }

    /// Runs one of the session's own functions that needs no payload. Gives its first two reply words.
    pub(crate) fn fixed(
        &self,
        function: u32,
        words: &[u64],
        what: &'static str,
    ) -> Result<[u64; 2], CallError> {
        let mut budget = self.budget();
        self.claim(&mut budget, || self.own_name(what))?.run_fixed(function, words, what, &mut budget)
    }

    /// What a session with a memory limit has in use, had at most, and was refused.
    pub(crate) fn memory_counts(&self) -> Result<[u64; 3], CallError> {
        let name = || self.own_name("memory");
        let mut budget = self.budget();
        let mut frame = self.claim(&mut budget, name)?;
        match frame.run_fixed(fixed::MEMORY, &[], "memory", &mut budget)? {
            [fixed::OK, used] => Ok([used, frame.reply(2), frame.reply(3)]),
            _ => {
                drop(frame);
                Err(self.wrong_answer(&name()))
            }
        }
    }

    /// Copies worker memory, in pieces, each through a frame that `claim` gives.
    fn read_memory<'s>(
        &self,
        address: u64,
        into: &mut [u8],
        budget: &mut Budget,
        claim: impl Fn(&mut Budget) -> Result<Frame<'s>, CallError>,
    ) -> Result<(), CallError> {
        let mut done = 0;
        for piece in into.chunks_mut(self.piece_bytes()) {
            let mut frame = claim(budget)?;
            frame.reserve(Need::of(piece.len()), || self.own_name("read"))?;
            let target = frame.room(piece.len());
            let words = [target, address.wrapping_add(done), piece.len() as u64];
            match frame.run_fixed(fixed::READ, &words, "read", budget)? {
                [fixed::OK, _] => frame.read_back(target, piece),
                _ => return Err(CallError::BadAddress { address, bytes: done + piece.len() as u64 }),
            }
            done += piece.len() as u64;
        }
        Ok(())
    }

    pub(crate) fn read_string(
        &self,
        address: u64,
        bytes_max: u64,
        name: impl Fn() -> FunctionName,
    ) -> Result<CString, CallError> {
        let max = bytes_max.min(self.options.payload_bytes_max);
        let (mut room, mut budget) = (max.min(16 << 10), self.budget());
        loop {
            let bytes = usize::try_from(room).unwrap_or(usize::MAX);
            let mut frame = self.claim(&mut budget, &name)?;
            frame.reserve(Need::of(bytes), &name)?;
            let target = frame.room(bytes);
            let words = [target, address, room];
            match frame.run_fixed(fixed::READ_STRING, &words, "read_string", &mut budget)? {
                [fixed::OK, length] if length <= room => return Ok(frame.string(target, length)),
                [fixed::OK, length] => {
                    return Err(
                        self.broken(format!("a string of {length} bytes in room for {room}"), &name())
                    );
                }
                [fixed::TOO_LONG, _] if room < max => room = max.min(room * 16),
                [fixed::TOO_LONG, _] => return Err(CallError::StringTooLong { function: name(), max }),
                [_, length] => return Err(CallError::BadAddress { address, bytes: length.min(room) + 1 }),
            }
        }
    }

    /// Asks the session's directory of modules and functions. `name` is what a report says was running.
    pub(crate) fn directory(&self, request: &Request, name: &FunctionName) -> Result<Answer, CallError> {
        if self.is_forked() {
            return Err(CallError::Forked); // the lock may be held for ever, by a thread that was not forked
        }
        let label = self.label(name.clone());
        let bytes = control::encode(request);
        let capacity = fixed::DIRECTORY_BYTES_MAX;
        let max = capacity as u64;
        if bytes.len() > capacity {
            return Err(CallError::TooLarge { function: name.clone(), bytes: bytes.len() as u64, max });
        }
        let mut budget = self.budget();
        let mut frame = self.claim(&mut budget, || name.clone())?;
        frame.reserve(Need::of(capacity), || name.clone())?;
        let block = frame.room(capacity);
        frame.write_at(block, &bytes);
        for (i, word) in [block, bytes.len() as u64, max].into_iter().enumerate() {
            frame.set(i, word);
        }
        frame.publish(fixed::DIRECTORY, label);
        frame.wait(&mut budget, || name.clone())?;
        let (status, length) = (frame.reply(0), frame.reply(1));
        let mut answer = vec![0; usize::try_from(length.min(max)).unwrap_or(0)];
        frame.read_back(block, &mut answer);
        // Copied, then decoded; a worker that cannot answer its own host's request is broken.
        let decoded = control::decode::<Answer>(&answer).ok().filter(|_| status == fixed::OK);
        drop(frame);
        decoded.ok_or_else(|| self.wrong_answer(name))
    }

    /// Whether a call index that the worker gave can be a resolved function's.
    pub(crate) fn is_function_index(&self, index: u32) -> bool {
        (FUNCTIONS_BASE..FUNCTIONS_MAX).contains(&index)
    }

    /// The call index of a function that was resolved before.
    pub(crate) fn resolved_before(&self, key: &ResolveKey) -> Option<u32> {
        lock(&self.resolved).get(key).copied()
    }

    pub(crate) fn remember_resolved(&self, key: ResolveKey, index: u32) {
        lock(&self.resolved).insert(key, index);
    }

    /// A worker that answers something else than was asked is broken.
    pub(crate) fn wrong_answer(&self, name: &FunctionName) -> CallError {
        self.broken("an answer that is none".into(), name)
    }

    /// Ends a worker that gave something impossible as the result of a function.
    #[cold]
    pub(crate) fn broken(&self, what: String, name: &FunctionName) -> CallError {
        self.worker.breach(format!("{what} from {name}"), Some(self.id));
        self.death_error(Some(name.clone()), true)
    }

    /// How many calls are over, and how many are in flight or were not yet waited for. From the host's own books, but for the direct slot's turn; read while calls go on.
    pub(crate) fn calls(&self) -> (u64, u64) {
        let mut ring = lock(&self.ring);
        if self.is_over() {
            return (self.direct.published.load(Relaxed) + ring.published + self.stream.sent(), 0);
        }
        // Slots of dropped tickets whose calls are over.
        self.reclaim(&mut ring);
        let busy = self.ring_books.iter().filter(|books| books.busy.load(Relaxed)).count() as u64;
        let direct = u64::from(self.region.direct().turn() == Turn::Pending);
        // The slot at the tail is busy and has no call in it.
        let in_flight = busy.saturating_sub(1) + direct + self.stream_in_flight();
        let published = self.direct.published.load(Relaxed) + ring.published + self.stream.sent();
        (published.saturating_sub(in_flight), in_flight)
    }

    /// Whether it was closed, or its worker has ended.
    fn is_over(&self) -> bool {
        matches!(self.status.load(Acquire), CLOSED | DEAD)
    }

    /// Asks the session's thread to end, and waits for it at most the worker's grace period. If the thread is busy with something longer it ends when that does, and
    /// the worker is left alone: nobody asked for anything of it.
    fn close_politely(&self) {
        if matches!(self.refuse(&|| self.own_name("close")), Err(CallError::Abandoned { .. })) {
            return self.close_later();
        }
        // A grace period without an end is not one for a drop.
        self.close_within(self.worker.grace().min(Duration::from_secs(10)));
        let _ = self.status.compare_exchange(OPEN, CLOSED, SeqCst, Relaxed);
    }

    fn close(&self) -> Result<(), CallError> {
        let mut budget = self.budget();
        let mut frame = self.claim(&mut budget, || self.own_name("close"))?;
        let closed = frame.run_fixed(fixed::CLOSE, &[], "close", &mut budget).map(drop);
        drop(frame);
        // From here on the session's thread is gone, or its worker is.
        if closed.is_ok() {
            self.thread_ended();
        }
        closed
    }

    /// Closes the session if that takes no longer than `timeout`, calls in flight included. If it takes longer nothing is ended on that account.
    pub(crate) fn close_within(&self, timeout: Duration) -> bool {
        // Through the ring: the direct slot may be taken, and is not waited for.
        let mut budget = Budget::new(timeout);
        let Ok(mut frame) = self.claim_ring(&mut budget, || self.own_name("close")) else { return false };
        frame.publish(fixed::CLOSE, fixed::CLOSE);
        let closed = frame.wait_at_most(&mut budget) == Waited::Replied;
        frame.stage.set(if closed { Stage::Replied } else { Stage::Lost });
        drop(frame);
        if closed {
            self.thread_ended();
        }
        closed
    }

    /// The session's thread has ended at the host's request: ends the waits of the calls that were behind that, abandoned ones too.
    fn thread_ended(&self) {
        let closed = self.status.fetch_update(SeqCst, SeqCst, |status| {
            matches!(status, OPEN | ABANDONED).then_some(CLOSED) // a death stays one
        });
        if closed.is_ok() {
            self.close_slots();
        }
    }

    /// Closes a session whose abandoned call still runs: when that returns, with nobody waiting. Only for the last handle.
    fn close_later(&self) {
        // Without a free slot (each is held by a dropped ticket behind the abandoned call) the thread stays until the worker ends.
        if let Some(mut frame) = self.try_claim_ring() {
            frame.publish(fixed::CLOSE, fixed::CLOSE);
            frame.stage.set(Stage::Lost);
        }
    }
}

/// Bytes as a C string, which ends at the first NUL should there be one: native threads may change a string while it is copied.
fn c_string(mut bytes: Vec<u8>) -> CString {
    if let Some(end) = bytes.iter().position(|b| *b == 0) {
        bytes.truncate(end);
    }
    CString::new(bytes).unwrap_or_default()
}

/// The dynamic linker's words without the names that the error around them has already.
fn without_names(detail: String, function: &FunctionName) -> String {
    let missing = format!("undefined symbol: {}", function.symbol);
    if detail == missing || detail.ends_with(&format!(": {missing}")) {
        return String::new();
    }
    match detail.strip_prefix(&*function.module).and_then(|rest| rest.strip_prefix(": ")) {
        Some(rest) => rest.to_owned(),
        None => detail,
    }
}

/// What the directory could not do, as an error that names it.
pub(crate) fn load_failure(kind: FailureKind, detail: &str, function: FunctionName) -> LoadError {
    let detail = without_names(printable(detail.as_bytes()), &function);
    let module = Arc::clone(&function.module);
    match kind {
        FailureKind::NotFound => LoadError::NotFound { module, detail },
        FailureKind::Unreadable => LoadError::Unreadable { module, detail },
        FailureKind::NotElf => LoadError::NotElf { module, detail },
        FailureKind::WrongKind => LoadError::WrongKind { module, detail },
        FailureKind::MissingDependency => LoadError::MissingDependency { module, detail },
        FailureKind::MissingImport => LoadError::MissingImport { module, detail },
        FailureKind::MissingSymbol => LoadError::MissingSymbol { function, detail },
        FailureKind::BadSignature => LoadError::BadSignature { function, detail },
        FailureKind::OpenFiles => LoadError::OpenFilesExceeded { module, detail },
        FailureKind::TooManyFunctions => LoadError::TooManyFunctions { function, detail },
        _ => LoadError::Linker { module, detail },
    }
}

/// How many payload bytes a call needs, and the largest piece among them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Need {
    total: u64,
    largest: u64,
}

impl Need {
    pub(crate) fn of(bytes: usize) -> Self {
        let mut need = Self::default();
        need.add(bytes);
        need
    }

    #[inline(always)]
    pub(crate) fn add(&mut self, bytes: usize) {
        let bytes = bytes as u64;
        self.total =
            self.total.saturating_add(bytes.saturating_add(PAYLOAD_ALIGN - 1) & !(PAYLOAD_ALIGN - 1));
        self.largest = self.largest.max(bytes);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The slot is ours, the request not yet out.
    Claimed,
    /// The worker has it.
    Published,
    /// The reply is in; the slot is ours again.
    Replied,
    /// The slot is not ours any more: its worker is dead, or it was abandoned to its call.
    Lost,
}

/// What a call calls: the half of a function's handle that the session needs.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) index: u32,
    pub(crate) label: u32,
    pub(crate) timeout: Duration,
    pub(crate) name: Arc<FunctionName>,
}

impl Target {
    pub(crate) fn new(resolved: Resolved, timeout: Duration) -> Self {
        let Resolved { index, label, name } = resolved;
        Self { index, label, timeout, name }
    }
}

/// Refuses a timeout in which no call can be answered.
pub(crate) fn check_timeout(timeout: Duration, function: &FunctionName) -> Result<(), CallError> {
    if timeout.is_zero() {
        return Err(CallError::ZeroTimeout { function: function.clone() });
    }
    Ok(())
}

/// What became of [`SessionInner::call_straight`]. Small, so that it travels in registers.
pub(crate) enum Straight {
    /// The reply's first word. Untrusted.
    Replied(u64),
    /// The direct slot is not to be had at once, and nothing has been done.
    Elsewhere,
    /// The call is lost.
    Failed(Box<CallError>),
}

/// One call's claim on a slot and on payload bytes. Given back when dropped, whatever happened.
#[derive(Debug)]
pub struct Frame<'s> {
    session: &'s SessionInner,
    slot: &'s Slot,
    lane: Lane,
    /// In a cell: a frame on loan may lose the slot.
    stage: Cell<Stage>,
    sequence: u64,
    /// Next free payload byte and the end of what was reserved, as offsets in the arena.
    cursor: u64,
    end: u64,
    block: Option<ArenaBlock>,
    /// The request is the session's end.
    closes: bool,
    /// The slot belongs to another frame, which waits for this one: it is not given back, nor is its scratch used.
    borrowed: bool,
}

impl<'s> Frame<'s> {
    #[inline(always)]
    fn new(session: &'s SessionInner, lane: Lane, slot: &'s Slot, sequence: u64) -> Self {
        Self {
            session,
            slot,
            lane,
            stage: Cell::new(Stage::Claimed),
            sequence,
            cursor: 0,
            end: 0,
            block: None,
            closes: false,
            borrowed: false,
        }
    }

    #[inline(always)]
    pub(crate) fn session(&self) -> &'s SessionInner {
        self.session
    }

    /// Makes sure of payload bytes. At most once in a call, before any of [`Frame::room`] and [`Frame::lend`].
    #[inline(always)]
    pub(crate) fn reserve(
        &mut self,
        need: Need,
        function: impl FnOnce() -> FunctionName,
    ) -> Result<(), CallError> {
        if need.total == 0 {
            return Ok(());
        }
        if matches!(self.lane, Lane::Direct) && need.total <= SCRATCH_BYTES && !self.borrowed {
            // The direct slot's scratch is its own: whoever has claimed the slot has the scratch.
            (self.cursor, self.end) = (0, need.total);
            let max = self.session.options.payload_bytes_max;
            if need.largest > max {
                return Err(CallError::TooLarge { function: function(), bytes: need.largest, max });
            }
            return Ok(());
        }
        self.reserve_block(need, function())
    }

    #[cold]
    #[inline(never)]
    fn reserve_block(&mut self, need: Need, function: FunctionName) -> Result<(), CallError> {
        let max = self.session.options.payload_bytes_max;
        if need.largest > max {
            return Err(CallError::TooLarge { function, bytes: need.largest, max });
        }
        let block = self.session.allocate(need.total, || function)?;
        (self.cursor, self.end) = (block.offset, block.offset + block.bytes);
        self.block = Some(block);
        Ok(())
    }

    /// Takes `bytes` of the reserved payload. Gives their address in the worker.
    #[inline(always)]
    pub(crate) fn room(&mut self, bytes: usize) -> u64 {
        let at = self.cursor;
        self.cursor = (at + bytes as u64).next_multiple_of(PAYLOAD_ALIGN);
        assert!(self.cursor <= self.end, "payload was reserved for every argument");
        self.session.address_at(at)
    }

    /// Copies bytes into the reserved payload. Gives their address in the worker.
    #[inline(always)]
    pub(crate) fn lend(&mut self, bytes: &[u8]) -> u64 {
        let address = self.room(bytes.len());
        self.write_at(address, bytes);
        address
    }

    /// Copies bytes to an address that [`Frame::room`] gave, or behind it in the same room.
    #[inline(always)]
    pub(crate) fn write_at(&self, address: u64, bytes: &[u8]) {
        let offset = address.wrapping_sub(self.session.arena_address.load(Relaxed));
        assert!(self.session.region.write(offset, bytes), "room lies in the arena");
    }

    /// Copies bytes from an address that [`Frame::room`] gave. A snapshot of what the worker left there.
    #[inline(always)]
    pub(crate) fn read_back(&self, address: u64, into: &mut [u8]) {
        let offset = address.wrapping_sub(self.session.arena_address.load(Relaxed));
        assert!(self.session.region.read(offset, into), "room lies in the arena");
    }

    /// What the direct slot's function word says of the payload.
    #[inline(always)]
    fn payload_number(&self) -> u32 {
        match &self.block {
            None => layout::scratch_number(self.cursor),
            Some(block) => layout::block_number(block.bytes),
        }
    }

    /// How many payload bytes were reserved.
    fn payload_bytes(&self) -> u64 {
        self.block.as_ref().map_or(self.end, |block| block.bytes)
    }

    /// Stores one request word.
    #[inline(always)]
    pub(crate) fn set(&self, index: usize, word: u64) {
        self.slot.set_word(index, word);
    }

    /// One reply word. Untrusted.
    #[inline(always)]
    pub(crate) fn reply(&self, index: usize) -> u64 {
        self.slot.word(index)
    }

    /// Stores request words that do not fit the slot: they go to the payload, and word 0 says where.
    pub(crate) fn spill(&mut self, words: &[u64]) {
        debug_assert!(words.len() > WORDS_MAX);
        let address = self.lend(bytemuck::cast_slice(words));
        self.set(0, address);
    }

    /// Hands the request to the worker.
    #[inline(always)]
    pub(crate) fn publish(&mut self, function: u32, label: u32) {
        let session = self.session;
        self.stage.set(Stage::Published);
        match self.lane {
            Lane::Direct => {
                session.publish_direct(self.slot, function, self.payload_number(), label, self.sequence);
            }
            Lane::Ring { slot, next } => {
                let books = session.books(slot);
                books.label.store(label, Relaxed);
                books.sequence.store(self.sequence, Relaxed);
                self.slot.set_function(function, next);
                wait::publish(self.slot, session.region.bell());
            }
        }
    }

    /// Waits for the reply. After `Ok` the reply words can be read.
    #[inline(always)]
    pub(crate) fn wait(
        &mut self,
        budget: &mut Budget,
        function: impl FnOnce() -> FunctionName,
    ) -> Result<(), CallError> {
        let waited = self.wait_at_most(budget);
        if waited == Waited::Replied {
            self.stage.set(Stage::Replied);
            return Ok(());
        }
        Err(self.lost(waited, budget.timeout(), function()))
    }

    #[inline(always)]
    fn wait_at_most(&self, budget: &mut Budget) -> Waited {
        if wait::look_for_reply(self.slot, &self.session.spin) {
            return Waited::Replied;
        }
        self.wait_slowly(budget.wait())
    }

    #[inline(always)]
    fn wait_slowly(&self, timeout: Duration) -> Waited {
        let session = self.session;
        wait::wait_reply_slow(
            self.slot,
            &session.spin,
            session.region.bell(),
            session.region.progress(),
            self.sequence,
            self.payload_bytes(),
            timeout,
            || session.still_waits(self.lane),
        )
    }

    #[cold]
    #[inline(never)]
    fn lost(&mut self, waited: Waited, timeout: Duration, function: FunctionName) -> CallError {
        self.stage.set(Stage::Lost);
        let session = self.session;
        match waited {
            Waited::TimedOut => {
                let worker_killed = session.options.on_deadline == OnDeadline::KillWorker;
                if worker_killed {
                    let cause = Cause::DeadlineExceeded { function: function.clone(), after: timeout };
                    session.worker.end(cause, Some(session.id));
                    if self.borrowed {
                        // The other frame will give the slot back, with a request in it that a worker about to die could still answer: no call may get that.
                        let _ = session.status.compare_exchange(OPEN, DEAD, SeqCst, Relaxed);
                    }
                } else {
                    let place = ReplyPlace::Slot(self.lane);
                    session.abandon(place, self.block.take(), function.clone(), self.closes);
                }
                CallError::TimedOut { function, after: timeout, worker_killed }
            }
            Waited::Refused => {
                let Some(bytes_max) = session.options.limits.memory_bytes else {
                    return session.broken("a refusal of memory that has no limit".into(), &function);
                };
                self.stage.set(Stage::Replied);
                let (asked, used) = (self.reply(0), self.reply(1));
                CallError::SessionMemoryExceeded { function, asked, used, bytes_max }
            }
            Waited::Breach(state) => {
                session
                    .worker
                    .breach(format!("it wrote state {state} into the slot of {function}"), Some(session.id));
                session.worker.wait_gone();
                session.death_error(Some(function), self.was_taken())
            }
            _ if session.status.load(Acquire) == CLOSED => CallError::Closed,
            _ => {
                if session.worker.death().is_none() {
                    if session.status.load(Acquire) != DEAD {
                        // Only the host closes slots, and only of dead workers.
                        session.worker.breach(format!("it closed the slot of {function}"), Some(session.id));
                    }
                    session.worker.wait_gone();
                }
                session.death_error(Some(function), self.was_taken())
            }
        }
    }

    /// Whether the worker had taken the request. Exact once the worker is dead: before, it may take it at any moment.
    fn was_taken(&self) -> bool {
        let (direct_taken, ring_taken) = self.session.region.progress().taken();
        self.sequence <= if matches!(self.lane, Lane::Direct) { direct_taken } else { ring_taken }
    }

    /// Publishes one of the session's own functions and waits for it. Gives its first two reply words.
    fn run_fixed(
        &mut self,
        function: u32,
        words: &[u64],
        what: &'static str,
        budget: &mut Budget,
    ) -> Result<[u64; 2], CallError> {
        for (i, word) in words.iter().enumerate() {
            self.set(i, *word);
        }
        self.closes = function == fixed::CLOSE;
        self.publish(function, function);
        let session = self.session;
        self.wait(budget, || session.own_name(what))?;
        Ok([self.reply(0), self.reply(1)])
    }

    /// Copies a string of `length` bytes out of the room at `target`, which has as many.
    pub(crate) fn string(&self, target: u64, length: u64) -> CString {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        self.read_back(target, &mut bytes);
        c_string(bytes)
    }

    /// A frame for a request of the session's own that belongs to this call, whose reply is in: on the same slot if that is the direct one, else on any.
    fn follow_up(&self, what: &'static str, budget: &mut Budget) -> Result<Frame<'s>, CallError> {
        let session = self.session;
        if !matches!(self.lane, Lane::Direct) {
            return session.claim(budget, || session.own_name(what));
        }
        let sequence = session.direct.published.load(Relaxed) + 1;
        let mut frame = Frame::new(session, Lane::Direct, self.slot, sequence);
        frame.borrowed = true;
        Ok(frame)
    }

    /// Copies a returned string out of the block in which the worker keeps it, and frees that. Overwrites the reply.
    pub(crate) fn fetch_string(
        &self,
        address: u64,
        length: u64,
        mut budget: Budget,
    ) -> Result<CString, CallError> {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        let claim = |budget: &mut Budget| self.follow_up("read", budget);
        let fetched = self.session.read_memory(address, &mut bytes, &mut budget, claim).and_then(|()| {
            self.follow_up("free", &mut budget)?.run_fixed(fixed::FREE, &[address], "free", &mut budget)
        });
        if matches!(self.lane, Lane::Direct)
            && matches!(fetched, Err(CallError::TimedOut { worker_killed: false, .. }))
        {
            // The slot was on loan to a request that it is abandoned to: not ours to give back any more.
            self.stage.set(Stage::Lost);
        }
        fetched.map(|_| c_string(bytes))
    }

    /// Takes the frame apart for a ticket.
    pub(crate) fn detach(self) -> Detached {
        let mut frame = ManuallyDrop::new(self);
        Detached { lane: frame.lane, sequence: frame.sequence, block: frame.block.take() }
    }
}

/// A published frame without its borrow of the session.
#[derive(Debug)]
pub(crate) struct Detached {
    lane: Lane,
    sequence: u64,
    block: Option<ArenaBlock>,
}

impl Detached {
    /// Puts the frame together again.
    pub(crate) fn attach(self, session: &SessionInner) -> Frame<'_> {
        let mut frame = Frame::new(session, self.lane, session.slot(self.lane), self.sequence);
        frame.stage.set(Stage::Published);
        frame.block = self.block;
        frame
    }

    /// Whether this process is the one that published it.
    pub(crate) fn is_ours(&self, session: &SessionInner) -> bool {
        session.original.load(Relaxed) == 1
    }

    pub(crate) fn is_over(&self, session: &SessionInner) -> bool {
        session.slot(self.lane).turn() != Turn::Pending
            || !matches!(session.status.load(Acquire), OPEN | ABANDONED)
    }
}

impl Drop for Frame<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.stage.get() == Stage::Replied && self.block.is_none() && !self.borrowed {
            return self.session.release(self.lane);
        }
        self.drop_slowly();
    }
}

impl Frame<'_> {
    #[inline(never)]
    fn drop_slowly(&mut self) {
        if self.borrowed {
            if let Some(block) = self.block.take() {
                self.session.free_block(block);
            }
            return;
        }
        if self.session.is_forked() {
            return; // its locks may be held for ever, by threads that were not forked
        }
        match (self.stage.get(), self.lane) {
            (Stage::Replied, _) | (Stage::Claimed, Lane::Direct) => {
                if let Some(block) = self.block.take() {
                    self.session.free_block(block);
                }
                self.session.release(self.lane);
            }
            (Stage::Claimed, Lane::Ring { slot, .. }) => {
                // The worker's path leads through this slot: something has to be there.
                self.publish(fixed::NOP, fixed::NOP);
                lock(&self.session.ring).orphans.push((slot, self.block.take()));
            }
            (Stage::Published, Lane::Ring { slot, .. }) => {
                // A dropped ticket: its bytes stay until the function is done with them.
                lock(&self.session.ring).orphans.push((slot, self.block.take()));
            }
            // A direct request is always waited for; should a panic unwind through the wait, the slot stays taken.
            (Stage::Published, Lane::Direct) => {}
            // The bytes of a dead worker's call are nobody's; an abandoned call's were moved to the session.
            (Stage::Lost, _) => {
                if let Some(block) = self.block.take() {
                    self.session.free_block(block);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::InOut;

    fn calls(session: &Session, count: u32) -> u64 {
        let direct = &session.inner().direct;
        let before = direct.published.load(Relaxed);
        for _ in 0..count {
            session.ping().unwrap();
        }
        direct.published.load(Relaxed) - before
    }

    #[test]
    fn the_direct_slot_says_how_large_the_payload_is() {
        let session = Worker::spawn().unwrap().session().unwrap();
        let libc = session.load("libc.so.6").unwrap();
        let memfrob = libc.function::<fn(InOut<[u8]>, usize) -> crate::RemotePtr>("memfrob").unwrap();
        let number = || session.inner().region.direct().function().1;
        for (bytes, expected) in
            [(0, 0), (1, 1), (64, 1), (65, 2), (1024, 16), (64 << 10, 1024), (1 << 20, 1040)]
        {
            let mut payload = vec![1; bytes];
            memfrob.call(&mut payload, bytes).unwrap();
            assert!(payload.iter().all(|byte| *byte == 1 ^ 42));
            assert_eq!(number(), expected, "{bytes} bytes");
        }
        session.ping().unwrap();
        assert_eq!(number(), 0, "a call without a payload");
    }

    #[test]
    fn a_former_homes_mark_keeps_everybody_out_until_the_home_takes_it_away() {
        let session = Worker::spawn().unwrap().session().unwrap();
        let direct = &session.inner().direct;
        assert_eq!(calls(&session, 1), 1, "the first caller is at home");
        // What a thread leaves that found the home moved after it had raised the word.
        direct.home.forge_unsure();
        std::thread::scope(|scope| {
            let stranger = || calls(&session, 4 * CALLS_TO_MOVE);
            assert_eq!(scope.spawn(stranger).join().unwrap(), 0, "it may lie over a call of the home's");
        });
        assert_eq!(direct.home.busy(), UNSURE);
        assert_eq!(calls(&session, 10), 10);
        assert_eq!(direct.home.busy(), FREE);
        std::thread::scope(|scope| {
            let stranger = || calls(&session, 4 * CALLS_TO_MOVE);
            assert!(scope.spawn(stranger).join().unwrap() > 0, "now it may move");
        });
    }
}
