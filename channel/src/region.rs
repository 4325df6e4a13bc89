#![allow(unsafe_code)]
//! The shared region: the only owner of the mapping's base pointer.
//!
//! **Law.**
//! - The region is a memfd whose size can no longer change: it is sealed with `SHRINK`, `GROW` and `SEAL` before anybody maps it,
//!   and whoever maps it verifies the seals and then the size. So no access inside the mapping can raise `SIGBUS` for want of a file.
//! - No Rust reference to its bytes leaves this module, except to structs that consist of atomics ([`Slot`], [`Doorbell`],
//!   [`Progress`], [`Stream`], [`Sleepers`]): the other process may write any byte at any moment.
//! - Payload bytes are copied by [`Region::write`] and [`Region::read`] through the module `copy`, which makes no Rust access to the shared side but
//!   atomic ones. What arrives is a snapshot without any promise about its content.
//! - Every offset is checked against the mapping's length, in release builds too.

use crate::copy;
use crate::hint;
use crate::layout::{
    DIRECT_OFFSET, DOORBELL_OFFSET, Geometry, HUGE_PAGE_BYTES, LAYOUT_HASH, MAGIC, PAYLOAD_ALIGN,
    PROGRESS_OFFSET, PROTOCOL_VERSION, SCRATCH_BYTES, SLEEPERS_OFFSET,
};
use crate::slot::{Doorbell, Progress, Slot};
use crate::stream::{Sleepers, Stream};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// `MFD_NOEXEC_SEAL` (Linux 6.3): the memory can never be made executable through its descriptor.
const MFD_NOEXEC_SEAL: u32 = 0x0008;

/// `MADV_COLLAPSE` (Linux 6.1), which the C library's headers may not have yet.
const MADV_COLLAPSE: i32 = 25;

/// The seals without which a region is not mapped.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// Why a region cannot be made or trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// A system call failed.
    #[error("{call} failed for a shared region of {bytes} bytes")]
    System {
        /// The call.
        call: &'static str,
        /// The region's size.
        bytes: u64,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The descriptor lacks a seal, so its size could change under the mapping.
    #[error("the shared region lacks a seal: it has {0:#x}")]
    NotSealed(i32),
    /// The file is not as large as announced.
    #[error("the shared region has {actual} bytes where {expected} were announced")]
    WrongSize {
        /// The file's size.
        actual: u64,
        /// The announced size.
        expected: u64,
    },
    /// The header in the region is not one of this version.
    #[error("the shared region's header is not one of this version and layout")]
    WrongHeader,
}

/// Makes a sealed, still empty memfd of `bytes` bytes. Nothing is mapped.
///
/// # Errors
/// [`RegionError::System`] when the kernel refuses (out of descriptors or memory).
pub fn sealed_memfd(name: &std::ffi::CStr, bytes: u64) -> Result<OwnedFd, RegionError> {
    let fail = |call| move |errno: nix::Error| RegionError::System { call, bytes, source: errno.into() };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = memfd_create(name, flags | MFdFlags::from_bits_retain(MFD_NOEXEC_SEAL))
        // Before Linux 6.3 the flag is unknown.
        .or_else(|_| memfd_create(name, flags))
        .map_err(fail("memfd_create"))?;
    let length = i64::try_from(bytes).map_err(|_| fail("ftruncate")(nix::Error::EFBIG))?;
    nix::unistd::ftruncate(&fd, length).map_err(fail("ftruncate"))?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SEALS)).map_err(fail("fcntl(F_ADD_SEALS)"))?;
    Ok(fd)
}

/// `fallocate`: gives the file's range its pages now, so that touching it later cannot fail.
///
/// # Errors
/// The call's own, `ENOSPC` and `ENOMEM` above all.
pub fn commit(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> io::Result<()> {
    change(fd, FallocateFlags::empty(), offset, bytes)
}

/// `fallocate`: gives the stream of a region its pages, before the host's first look at it.
///
/// # Errors
/// As [`commit`].
pub fn commit_stream(fd: BorrowedFd<'_>, geometry: Geometry) -> io::Result<()> {
    commit(fd, geometry.stream_offset(), size_of::<Stream>() as u64)
}

/// `fallocate(PUNCH_HOLE)`: gives the range's pages back; it reads as zero afterwards.
///
/// # Errors
/// The call's own.
pub fn decommit(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> io::Result<()> {
    change(fd, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, bytes)
}

fn change(fd: BorrowedFd<'_>, flags: FallocateFlags, offset: u64, bytes: u64) -> io::Result<()> {
    let number = |n: u64| i64::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    loop {
        match fallocate(fd, flags, number(offset)?, number(bytes)?) {
            Err(nix::Error::EINTR) => {}
            done => return done.map_err(Into::into),
        }
    }
}

fn verify(fd: BorrowedFd<'_>, expected: u64) -> Result<(), RegionError> {
    let fail =
        |call| move |errno: nix::Error| RegionError::System { call, bytes: expected, source: errno.into() };
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map_err(fail("fcntl(F_GET_SEALS)"))?;
    if !SealFlag::from_bits_retain(seals).contains(SEALS) {
        return Err(RegionError::NotSealed(seals));
    }
    // Only after the seals are known to hold does the size mean anything.
    let actual = nix::sys::stat::fstat(fd).map_err(fail("fstat"))?.st_size;
    let actual = u64::try_from(actual).unwrap_or(0);
    if actual == expected { Ok(()) } else { Err(RegionError::WrongSize { actual, expected }) }
}

#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is shared memory that both processes write at any time anyway. Every access goes through atomics or through the
// copy functions below, which are sound from any thread; the fields never change after construction.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, bytes: u64, huge_pages: bool) -> Result<Self, RegionError> {
        verify(fd, bytes)?;
        let fail = |errno: nix::Error| RegionError::System { call: "mmap", bytes, source: errno.into() };
        let length = usize::try_from(bytes)
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or(nix::Error::EINVAL)
            .map_err(fail)?;
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        if huge_pages {
            let place = Reserved::new(length).map_err(fail)?;
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            // SAFETY: replaces `length` bytes of an address range that was reserved for this just now and that nobody else knows. The file is sealed and has
            // exactly `length` bytes (verified above), so every byte of the mapping is backed.
            let base = unsafe { mmap(Some(place.aligned), length, rights, flags, fd, 0) };
            let base = base.map_err(fail)?.cast();
            place.keep_only_the_mapping(length);
            return Ok(Self { base, bytes: length.get() });
        }
        // SAFETY: a new shared mapping at an address of the kernel's choice, so it replaces nothing. The file is sealed against shrinking and
        // has exactly `length` bytes (verified above), so every byte of the mapping is backed.
        let base = unsafe { mmap(None, length, rights, MapFlags::MAP_SHARED, fd, 0) };
        Ok(Self { base: base.map_err(fail)?.cast(), bytes: length.get() })
    }

    /// The address of `bytes` bytes at `offset`, if they lie in the mapping.
    #[inline(always)]
    fn at(&self, offset: u64, bytes: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        if offset.checked_add(bytes)? > self.bytes {
            return None;
        }
        // SAFETY: offset <= self.bytes, so the result is inside the mapping or one past its end; the mapping is one allocation.
        Some(unsafe { self.base.as_ptr().add(offset) })
    }

    /// # Safety
    /// `T` must consist of atomics only, and all bit patterns must be valid for it.
    #[inline(always)]
    unsafe fn atomics<T>(&self, offset: u64) -> &T {
        let at = self.at(offset, size_of::<T>()).filter(|at| at.addr().is_multiple_of(align_of::<T>()));
        let at = at.expect("layout offsets lie inside the region and are aligned");
        // SAFETY: in bounds and aligned (checked above); lives as long as the mapping, which `self` borrows; T consists of atomics (the
        // caller's promise), so writes by the other process are data races of nobody.
        unsafe { &*at.cast::<T>() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping made in `new`; all borrows of it have ended, since they borrow `self`.
        // munmap can only fail for arguments that are not a mapping's.
        let _ = unsafe { munmap(self.base.cast(), self.bytes) };
    }
}

/// Addresses, with nothing behind them, for a mapping that has to start at a multiple of [`HUGE_PAGE_BYTES`].
struct Reserved {
    start: NonNull<u8>,
    bytes: usize,
    aligned: NonZeroUsize,
}

impl Reserved {
    fn new(length: NonZeroUsize) -> Result<Self, nix::Error> {
        let unit = usize::try_from(HUGE_PAGE_BYTES).map_err(|_| nix::Error::EINVAL)?;
        let bytes = length.checked_add(unit).ok_or(nix::Error::EINVAL)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping without access at an address of the kernel's choice, so it replaces nothing.
        let start = unsafe { nix::sys::mman::mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, flags) }?;
        let aligned = start.addr().get().next_multiple_of(unit);
        // At most `unit` above the start, which leaves `length` bytes; an address of a mapping is not zero.
        let aligned = NonZeroUsize::new(aligned).ok_or(nix::Error::EINVAL)?;
        Ok(Self { start: start.cast(), bytes: bytes.get(), aligned })
    }

    /// Gives back what lies before and behind the mapping of `length` bytes at `aligned`.
    fn keep_only_the_mapping(self, length: NonZeroUsize) {
        let before = self.aligned.get() - self.start.addr().get();
        let behind = before + length.get();
        for (offset, bytes) in [(0, before), (behind, self.bytes - behind)] {
            if bytes > 0 {
                // SAFETY: offset <= self.bytes, so the result is inside the reserved range or at its end.
                let at = unsafe { self.start.add(offset) };
                // SAFETY: `bytes` bytes of the range that `new` reserved, without those that the mapping has taken; nobody else knows them. (Should the kernel
                // refuse, they stay reserved and harm nobody.)
                let _ = unsafe { munmap(at.cast(), bytes) };
            }
        }
        std::mem::forget(self);
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: the range that `new` reserved; nothing was mapped into it, or `keep_only_the_mapping` would have forgotten it.
        let _ = unsafe { munmap(self.start.cast(), self.bytes) };
    }
}

/// The words at the start of a session's region. Written once by the host, before the worker gets the descriptor.
#[repr(C, align(128))]
pub(crate) struct SessionHeader {
    magic: AtomicU64,
    layout_hash: AtomicU64,
    arena_bytes: AtomicU64,
    protocol: AtomicU32,
    slots: AtomicU32,
    session: AtomicU32,
    reserved: AtomicU32,
}

const _: () = {
    assert!(size_of::<SessionHeader>() == 128);
    assert!(std::mem::offset_of!(SessionHeader, magic) == 0);
    assert!(std::mem::offset_of!(SessionHeader, layout_hash) == 8);
    assert!(std::mem::offset_of!(SessionHeader, arena_bytes) == 16);
    assert!(std::mem::offset_of!(SessionHeader, protocol) == 24);
    assert!(std::mem::offset_of!(SessionHeader, slots) == 28);
    assert!(std::mem::offset_of!(SessionHeader, session) == 32);
};

/// One session's shared memory, mapped.
#[derive(Debug)]
pub struct Region {
    mapping: Mapping,
    geometry: Geometry,
    arena_offset: u64,
    /// Where the hot path goes, so that it neither computes nor checks.
    direct: Hot<Slot>,
    bell: Hot<Doorbell>,
    progress: Hot<Progress>,
    stream: Hot<Stream>,
    sleepers: Hot<Sleepers>,
}

/// A pointer into the region's own mapping, to a struct of atomics.
#[derive(Debug)]
struct Hot<T>(NonNull<T>);

// SAFETY: as for `Mapping`, of which it is a part: T consists of atomics.
unsafe impl<T> Send for Hot<T> {}
// SAFETY: as for Send.
unsafe impl<T> Sync for Hot<T> {}

impl Region {
    /// Host: makes, seals, allocates (header, slots and the direct slot's scratch) and maps a region, and writes its header.
    ///
    /// # Errors
    /// [`RegionError::System`] when the kernel refuses.
    ///
    /// # Panics
    /// If the geometry is not valid.
    pub fn create(geometry: Geometry, session: u32) -> Result<(Self, OwnedFd), RegionError> {
        assert!(geometry.is_valid(), "geometry is checked by the configuration");
        let bytes = geometry.region_bytes();
        let fd = sealed_memfd(c"hotcell", bytes)?;
        // The stream lies between the two and gets its pages with the first pipeline: see `commit_stream`.
        for (offset, part) in [(0, geometry.stream_offset()), (geometry.arena_offset(), SCRATCH_BYTES)] {
            commit(fd.as_fd(), offset, part).map_err(|source| RegionError::System {
                call: "fallocate",
                bytes,
                source,
            })?;
        }
        let region = Self::new(Mapping::new(fd.as_fd(), bytes, geometry.huge_pages)?, geometry);
        let header = region.header();
        header.magic.store(MAGIC, Relaxed);
        header.layout_hash.store(LAYOUT_HASH, Relaxed);
        header.arena_bytes.store(geometry.arena_bytes, Relaxed);
        header.protocol.store(PROTOCOL_VERSION, Relaxed);
        header.slots.store(geometry.slots, Relaxed);
        header.session.store(session, Relaxed);
        Ok((region, fd))
    }

    /// Worker: verifies and maps the region that the host announced.
    ///
    /// # Errors
    /// A missing seal, a wrong size, a wrong header, or a refusal of the kernel.
    pub fn open(fd: BorrowedFd<'_>, geometry: Geometry, session: u32) -> Result<Self, RegionError> {
        if !geometry.is_valid() {
            return Err(RegionError::WrongHeader);
        }
        let region = Self::new(Mapping::new(fd, geometry.region_bytes(), geometry.huge_pages)?, geometry);
        let header = region.header();
        let same = header.magic.load(Relaxed) == MAGIC
            && header.layout_hash.load(Relaxed) == LAYOUT_HASH
            && header.arena_bytes.load(Relaxed) == geometry.arena_bytes
            && header.protocol.load(Relaxed) == PROTOCOL_VERSION
            && header.slots.load(Relaxed) == geometry.slots
            && header.session.load(Relaxed) == session;
        if !same {
            return Err(RegionError::WrongHeader);
        }
        region.keep_slots_from_forks()?;
        Ok(region)
    }

    /// Takes everything but the arena away from processes that native code forks. A child that comes back from the call would otherwise be a second worker
    /// on the same slots: it would take requests and answer them. The arena stays, for a child that uses the arguments of its call.
    fn keep_slots_from_forks(&self) -> Result<(), RegionError> {
        let bytes = self.geometry.arena_offset();
        let length = usize::try_from(bytes).unwrap_or(self.mapping.bytes).min(self.mapping.bytes);
        let advice = nix::sys::mman::MmapAdvise::MADV_DONTFORK;
        // SAFETY: the range lies in this region's own mapping, and the advice changes nothing in this process.
        unsafe { nix::sys::mman::madvise(self.mapping.base.cast(), length, advice) }
            .map_err(|errno| RegionError::System { call: "madvise", bytes, source: errno.into() })
    }

    fn new(mapping: Mapping, geometry: Geometry) -> Self {
        // SAFETY: Slot consists of atomics only.
        let direct = Hot(NonNull::from(unsafe { mapping.atomics::<Slot>(DIRECT_OFFSET) }));
        // SAFETY: Doorbell consists of atomics only.
        let bell = Hot(NonNull::from(unsafe { mapping.atomics::<Doorbell>(DOORBELL_OFFSET) }));
        // SAFETY: Progress consists of atomics only.
        let progress = Hot(NonNull::from(unsafe { mapping.atomics::<Progress>(PROGRESS_OFFSET) }));
        // SAFETY: Stream consists of atomics only.
        let stream = Hot(NonNull::from(unsafe { mapping.atomics::<Stream>(geometry.stream_offset()) }));
        // SAFETY: Sleepers consists of atomics only.
        let sleepers = Hot(NonNull::from(unsafe { mapping.atomics::<Sleepers>(SLEEPERS_OFFSET) }));
        let arena_offset = geometry.arena_offset();
        Self { mapping, arena_offset, geometry, direct, bell, progress, stream, sleepers }
    }

    fn header(&self) -> &SessionHeader {
        // SAFETY: SessionHeader consists of atomics only.
        unsafe { self.mapping.atomics(0) }
    }

    /// The sizes.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The direct slot.
    #[inline(always)]
    pub fn direct(&self) -> &Slot {
        // SAFETY: made in `new` from this region's mapping, which lives as long as `self`; consists of atomics only.
        unsafe { self.direct.0.as_ref() }
    }

    /// Ring slot `index`.
    ///
    /// # Panics
    /// If `index` is not below the region's slot count.
    #[inline]
    pub fn slot(&self, index: u32) -> &Slot {
        assert!(index < self.geometry.slots);
        // SAFETY: Slot consists of atomics only.
        unsafe { self.mapping.atomics(Geometry::slot_offset(index)) }
    }

    /// The doorbell.
    #[inline(always)]
    pub fn bell(&self) -> &Doorbell {
        // SAFETY: made in `new` from this region's mapping, which lives as long as `self`; consists of atomics only.
        unsafe { self.bell.0.as_ref() }
    }

    /// The worker's progress.
    #[inline(always)]
    pub fn progress(&self) -> &Progress {
        // SAFETY: made in `new` from this region's mapping, which lives as long as `self`; consists of atomics only.
        unsafe { self.progress.0.as_ref() }
    }

    /// The stream. The host looks at it only after [`commit_stream`], the worker only when the host has switched it on.
    #[inline(always)]
    pub fn stream(&self) -> &Stream {
        // SAFETY: made in `new` from this region's mapping, which lives as long as `self`; consists of atomics only.
        unsafe { self.stream.0.as_ref() }
    }

    /// Who sleeps while the stream is in use.
    #[inline(always)]
    pub fn sleepers(&self) -> &Sleepers {
        // SAFETY: made in `new` from this region's mapping, which lives as long as `self`; consists of atomics only.
        unsafe { self.sleepers.0.as_ref() }
    }

    /// Where the arena lies in this process, as a number.
    pub fn arena_address(&self) -> u64 {
        (self.mapping.base.as_ptr().expose_provenance() as u64) + self.arena_offset
    }

    // Where the memory is. Ranges are offsets from the region's start.

    /// `madvise(MADV_POPULATE_WRITE)` (Linux 5.14): maps the range's pages in this process, allocating those that are missing.
    ///
    /// # Errors
    /// `EINVAL` before Linux 5.14, `ENOMEM` or `EFAULT` if there is no memory, or the range is not in the region.
    pub fn populate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.advise(offset, bytes, libc::MADV_POPULATE_WRITE)
    }

    /// `madvise(MADV_COLLAPSE)` (Linux 6.1): puts the range into huge pages now. Both ends are multiples of [`HUGE_PAGE_BYTES`].
    ///
    /// # Errors
    /// `EINVAL` before Linux 6.1 or where huge pages are denied; `ENOMEM`, `EAGAIN`, `EBUSY` if there are none now; `EFAULT` if the range is not in the region.
    pub fn collapse(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.advise(offset, bytes, MADV_COLLAPSE)
    }

    /// `mlock`: keeps the range in memory.
    ///
    /// # Errors
    /// `EPERM` or `ENOMEM` over `RLIMIT_MEMLOCK`, `EAGAIN` if there is no memory, `EFAULT` if the range is not in the region.
    pub fn lock(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let (at, length) = self.range(offset, bytes)?;
        // SAFETY: the range lies in this region's own mapping; a lock changes nothing that can be observed but where the pages are.
        unsafe { nix::sys::mman::mlock(at.cast(), length) }.map_err(Into::into)
    }

    /// One access to each page of the range, which changes nothing: for kernels without [`Region::populate`]. The pages must be allocated ([`commit`]); what is not in the region is left out.
    pub fn touch(&self, offset: u64, bytes: u64) {
        let step = usize::try_from(crate::layout::PAGE_BYTES).unwrap_or(usize::MAX);
        for at in (offset..offset.saturating_add(bytes)).step_by(step) {
            let Some(byte) = self.mapping.at(at, 1) else { return };
            // SAFETY: in bounds (checked above), never null, and shared memory is only accessed by atomics or by the copies below.
            let byte = unsafe { std::sync::atomic::AtomicU8::from_ptr(byte) };
            byte.fetch_or(0, Relaxed);
        }
    }

    /// How many bytes of the mappings that have a part in the range lie in huge pages in this process, as `/proc/self/smaps` has it.
    ///
    /// # Errors
    /// Those of reading `/proc`, and `EFAULT` if the range is not in the region.
    pub fn huge_bytes(&self, offset: u64, bytes: u64) -> io::Result<u64> {
        let (at, _) = self.range(offset, bytes)?;
        let start = at.addr().get() as u64;
        let smaps = std::fs::read_to_string("/proc/self/smaps")?;
        Ok(crate::placement::huge_bytes_in(&smaps, start, start + bytes))
    }

    fn advise(&self, offset: u64, bytes: u64, advice: i32) -> io::Result<()> {
        let (at, length) = self.range(offset, bytes)?;
        loop {
            // SAFETY: the range lies in this region's own mapping, and both kinds of advice that come here only bring pages in or move them: what they hold stays.
            if unsafe { libc::madvise(at.as_ptr().cast(), length, advice) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    fn range(&self, offset: u64, bytes: u64) -> io::Result<(NonNull<u8>, usize)> {
        let outside = || io::Error::from_raw_os_error(libc::EFAULT);
        let length = usize::try_from(bytes).map_err(|_| outside())?;
        let at = self.mapping.at(offset, length).and_then(NonNull::new).ok_or_else(outside)?;
        Ok((at, length))
    }

    #[inline(always)]
    fn arena(&self, offset: u64, bytes: usize) -> Option<*mut u8> {
        let end = offset.checked_add(bytes as u64)?;
        if end > self.geometry.arena_bytes {
            return None;
        }
        self.mapping.at(self.arena_offset + offset, bytes)
    }

    /// Asks for line `line` of the direct slot's scratch, which is about to be read; the last one if it has fewer.
    #[inline(always)]
    pub fn scratch_soon(&self, line: u32) {
        let offset = (u64::from(line) * PAYLOAD_ALIGN).min(SCRATCH_BYTES - 1);
        if let Some(at) = self.arena(offset, 1) {
            hint::line_soon(at);
        }
    }

    /// Copies `from` into the arena at `offset`. False if it does not fit there.
    #[inline]
    #[must_use]
    pub fn write(&self, offset: u64, from: &[u8]) -> bool {
        let Some(at) = self.arena(offset, from.len()) else { return false };
        // SAFETY: `from` is readable, `at` is writable for `from.len()` bytes (checked), and they do not overlap: `from` is memory that
        // Rust code can name, the region never is.
        unsafe { copy::to_shared(from.as_ptr(), at, from.len()) };
        true
    }

    /// Copies from the arena at `offset` into `into`. False if the range is not in the arena.
    #[inline]
    #[must_use]
    pub fn read(&self, offset: u64, into: &mut [u8]) -> bool {
        let Some(at) = self.arena(offset, into.len()) else { return false };
        // SAFETY: as in `write`, the other way round.
        unsafe { copy::from_shared(at, into.as_mut_ptr(), into.len()) };
        true
    }
}

/// One sealed page area of its own: the worker's crash page.
#[derive(Debug)]
pub struct CrashRegion {
    mapping: Mapping,
}

impl CrashRegion {
    /// Host: makes a sealed and allocated memfd for the crash page. It maps nothing: see [`CrashRegion::open`].
    ///
    /// # Errors
    /// [`RegionError::System`] when the kernel refuses.
    pub fn create() -> Result<OwnedFd, RegionError> {
        let bytes = crate::crash::CRASH_PAGE_BYTES as u64;
        let fd = sealed_memfd(c"hotcell-crash", bytes)?;
        commit(fd.as_fd(), 0, bytes).map_err(|source| RegionError::System {
            call: "fallocate",
            bytes,
            source,
        })?;
        Ok(fd)
    }

    /// Verifies and maps the crash page.
    ///
    /// # Errors
    /// A missing seal, a wrong size, or a refusal of the kernel.
    pub fn open(fd: BorrowedFd<'_>) -> Result<Self, RegionError> {
        Ok(Self { mapping: Mapping::new(fd, crate::crash::CRASH_PAGE_BYTES as u64, false)? })
    }

    /// The page.
    pub fn page(&self) -> &crate::crash::CrashPage {
        // SAFETY: CrashPage consists of atomics only.
        unsafe { self.mapping.atomics(0) }
    }
}

#[cfg(test)]
mod wire {
    use super::SessionHeader;
    crate::wire_format::shared!(SessionHeader: magic, layout_hash, arena_bytes, protocol, slots, session, reserved);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::SCRATCH_BYTES;

    const GEOMETRY: Geometry = Geometry { slots: 4, arena_bytes: 2 * SCRATCH_BYTES, huge_pages: false };

    #[test]
    fn both_mappings_see_the_same_slot_and_bytes() {
        let (host, fd) = Region::create(GEOMETRY, 9).unwrap();
        let worker = Region::open(fd.as_fd(), GEOMETRY, 9).unwrap();
        host.slot(3).set_word(14, 77);
        assert_eq!(worker.slot(3).word(14), 77);
        for len in [0usize, 1, 7, 8, 63, 64, 65, 4097] {
            let bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
            assert!(host.write(5, &bytes));
            let mut back = vec![0; len];
            assert!(worker.read(5, &mut back));
            assert_eq!(back, bytes);
        }
    }

    #[test]
    fn ranges_outside_the_arena_are_refused() {
        let (host, _fd) = Region::create(GEOMETRY, 1).unwrap();
        let end = GEOMETRY.arena_bytes;
        assert!(host.write(end, &[]));
        assert!(!host.write(end, &[1]));
        assert!(!host.write(u64::MAX, &[1, 2]));
        assert!(!host.read(end - 1, &mut [0; 2]));
    }

    #[test]
    fn the_size_can_no_longer_change() {
        let (_host, fd) = Region::create(GEOMETRY, 1).unwrap();
        assert!(nix::unistd::ftruncate(&fd, 0).is_err());
        assert!(nix::unistd::ftruncate(&fd, 1 << 30).is_err());
        assert!(fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
    }

    #[test]
    fn an_unsealed_or_wrongly_sized_or_foreign_region_is_refused() {
        let bytes = GEOMETRY.region_bytes();
        let unsealed = memfd_create(c"t", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&unsealed, i64::try_from(bytes).unwrap()).unwrap();
        assert!(matches!(Region::open(unsealed.as_fd(), GEOMETRY, 1), Err(RegionError::NotSealed(_))));
        let short = sealed_memfd(c"t", bytes - 4096).unwrap();
        assert!(matches!(Region::open(short.as_fd(), GEOMETRY, 1), Err(RegionError::WrongSize { .. })));
        let blank = sealed_memfd(c"t", bytes).unwrap();
        assert!(matches!(Region::open(blank.as_fd(), GEOMETRY, 1), Err(RegionError::WrongHeader)));
        let (_host, fd) = Region::create(GEOMETRY, 1).unwrap();
        assert!(matches!(Region::open(fd.as_fd(), GEOMETRY, 2), Err(RegionError::WrongHeader)));
    }
}
