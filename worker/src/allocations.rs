#![allow(unsafe_code)]
//! Allocation functions that count: what modules call in place of the C library's, once a session with a memory limit has loaded one.
//!
//! **Law.** Each function here keeps the contract of the one whose place it takes, towards callers that know nothing of this: blocks come from the real allocator and
//! can be given back to it by anybody, past us, at any time. They run in the middle of foreign code, on any thread, so they take no lock (but [`MAPPINGS`]' in the
//! functions that map memory, where a fork's child does without), allocate nothing of their own in the functions of the heap, and never panic or unwind.
//!
//! **A seal at the end of each block** says whose it is. A session's thread that asks for `n` bytes is given a block of `n + 16`, and the last sixteen bytes that are usable hold the session's
//! [`Tag`] and a check that only this address and this process's key give. So a block is charged by what [`Real::usable_size`] says it is, freed by whoever frees it, and credited to
//! whom it was charged. There is no table of blocks, which would need a lock and would go stale whenever a block is freed past us. What is lost when that happens is the
//! credit, until the allocator gives the same bytes out again.
//!
//! A block without a seal is not ours: it was there before, or was given to a thread that works for nobody, and is passed through.
//!
//! Who reallocates a block takes it over: it is credited to the old owner and charged to the session that the calling thread works for, if any.

use crate::meter::{self, Charge, Tag};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_int, c_void};
use std::hash::BuildHasher;
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Size of the seal behind a block's bytes.
const SEAL_BYTES: usize = 16;

type Start = unsafe extern "C-unwind" fn(*mut c_void) -> *mut c_void;

type OfSize = unsafe extern "C" fn(usize) -> *mut c_void;
type OfTwo = unsafe extern "C" fn(usize, usize) -> *mut c_void;
type Realloc = unsafe extern "C" fn(*mut c_void, usize) -> *mut c_void;
type ReallocArray = unsafe extern "C" fn(*mut c_void, usize, usize) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void);
type PosixMemalign = unsafe extern "C" fn(*mut *mut c_void, usize, usize) -> c_int;
type UsableSize = unsafe extern "C" fn(*mut c_void) -> usize;
type Mmap = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, c_int, i64) -> *mut c_void;
type Munmap = unsafe extern "C" fn(*mut c_void, usize) -> c_int;
type Mremap = unsafe extern "C" fn(*mut c_void, usize, usize, c_int, *mut c_void) -> *mut c_void;
type PthreadCreate = unsafe extern "C" fn(*mut libc::pthread_t, *const c_void, Start, *mut c_void) -> c_int;

/// The functions of the process's own allocator and C library, as a module would find them.
struct Real {
    malloc: OfSize,
    calloc: OfTwo,
    realloc: Realloc,
    reallocarray: ReallocArray,
    free: Free,
    posix_memalign: PosixMemalign,
    aligned_alloc: OfTwo,
    memalign: OfTwo,
    valloc: OfSize,
    pvalloc: OfSize,
    usable_size: UsableSize,
    mmap: Mmap,
    munmap: Munmap,
    mremap: Mremap,
    pthread_create: PthreadCreate,
    /// Makes seals unlike any bytes that code may leave behind a block by chance.
    key: u64,
    process: libc::pid_t,
    thread_end: libc::pthread_key_t,
    replaced: Vec<Replaced>,
}

/// A function of the C library, and the one that takes its place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replaced {
    pub(crate) name: &'static CStr,
    pub(crate) real: usize,
    pub(crate) ours: usize,
}

static REAL: OnceLock<Result<Real, String>> = OnceLock::new();

fn real() -> Option<&'static Real> {
    REAL.get()?.as_ref().ok()
}

/// Finds the real functions. Gives what is to take the place of what.
///
/// # Errors
/// If this process has an allocator that cannot be counted: one that does not tell the size of a block.
pub(crate) fn prepare() -> Result<&'static [Replaced], String> {
    let real = REAL.get_or_init(find_real).as_ref().map_err(Clone::clone)?;
    Ok(&real.replaced)
}

/// The function that modules call in place of the one at this address; the address itself if there is none.
pub(crate) fn in_place_of(address: usize) -> usize {
    let replaced = real().and_then(|real| real.replaced.iter().find(|function| function.real == address));
    replaced.map_or(address, |function| function.ours)
}

fn symbol(name: &CStr) -> Result<*mut c_void, String> {
    // SAFETY: the name is a C string. The default scope is the one in which a module's own references are looked up first.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    if found.is_null() {
        return Err(format!("this process has no function {}", name.to_string_lossy()));
    }
    Ok(found)
}

/// Where the object is mapped that this address lies in.
fn object_of(address: *mut c_void) -> *mut c_void {
    // SAFETY: all zeros are a valid Dl_info: null pointers.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: any address may be asked for; the result is writable.
    unsafe { libc::dladdr(address, &raw mut info) };
    info.dli_fbase
}

fn find_real() -> Result<Real, String> {
    let malloc = symbol(c"malloc")?;
    // Blocks pass between these, so they have to be of one allocator.
    let heap = |name: &'static CStr| {
        let found = symbol(name)?;
        if object_of(found) == object_of(malloc) {
            return Ok(found);
        }
        let name = name.to_string_lossy();
        Err(format!(
            "malloc and {name} of this process are not of the same library, so blocks cannot be counted"
        ))
    };
    // The functions by name, with what takes their place.
    macro_rules! find {
        ($($field:ident: $type:ty = $name:literal by $find:ident for $ours:expr,)+) => {{
            let mut replaced = Vec::new();
            $(
                let found = $find($name)?;
                replaced.push(Replaced { name: $name, real: found.expose_provenance(), ours: $ours as *const () as usize });
                // SAFETY: the address is that of the C library's function of this name, whose type this is.
                let $field = unsafe { std::mem::transmute::<*mut c_void, $type>(found) };
            )+
            Real { $($field,)+ key: 0, process: 0, thread_end: 0, replaced }
        }};
    }
    let mut real = find! {
        malloc: OfSize = c"malloc" by heap for self::malloc,
        calloc: OfTwo = c"calloc" by heap for self::calloc,
        realloc: Realloc = c"realloc" by heap for self::realloc,
        reallocarray: ReallocArray = c"reallocarray" by symbol for self::reallocarray,
        free: Free = c"free" by heap for self::free,
        posix_memalign: PosixMemalign = c"posix_memalign" by heap for self::posix_memalign,
        aligned_alloc: OfTwo = c"aligned_alloc" by heap for self::aligned_alloc,
        memalign: OfTwo = c"memalign" by symbol for self::memalign,
        valloc: OfSize = c"valloc" by symbol for self::valloc,
        pvalloc: OfSize = c"pvalloc" by symbol for self::pvalloc,
        usable_size: UsableSize = c"malloc_usable_size" by heap for self::malloc_usable_size,
        mmap: Mmap = c"mmap" by symbol for self::mmap,
        munmap: Munmap = c"munmap" by symbol for self::munmap,
        mremap: Mremap = c"mremap" by symbol for self::mremap,
        pthread_create: PthreadCreate = c"pthread_create" by symbol for self::pthread_create,
    };
    // An allocator of another library's making need not have these; what the C library's give is not its own then, and stays uncounted.
    real.replaced.retain(|function| {
        let with_malloc = [c"memalign", c"valloc", c"pvalloc"].contains(&function.name);
        !with_malloc || object_of(ptr::with_exposed_provenance_mut(function.real)) == object_of(malloc)
    });
    if let Ok(mmap64) = symbol(c"mmap64")
        && mmap64.addr() != real.mmap as *const () as usize
    {
        let ours = self::mmap as *const () as usize;
        real.replaced.push(Replaced { name: c"mmap64", real: mmap64.expose_provenance(), ours });
    }
    real.key = std::hash::RandomState::new().hash_one(0u64);
    // SAFETY: has no preconditions.
    real.process = unsafe { libc::getpid() };
    // SAFETY: the key is writable; the destructor is a plain function that lives as long as the program.
    if unsafe { libc::pthread_key_create(&raw mut real.thread_end, Some(at_thread_end)) } != 0 {
        return Err("this process has no pthread key left".into());
    }
    Ok(real)
}

fn set_errno(value: c_int) {
    // SAFETY: takes nothing, gives the address of the thread's own errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: that address is always valid.
    unsafe { *errno = value }
}

/// Notes a refusal, and gives what an allocation function gives then.
#[cold]
fn refuse(tag: Tag, bytes: usize) -> *mut c_void {
    tag.refuse(bytes as u64);
    set_errno(libc::ENOMEM);
    ptr::null_mut()
}

/// The seal of a block: the words that lie at its end.
fn seal(real: &Real, block: *mut c_void, tag: Tag) -> [u64; 2] {
    let place = real.key ^ block.addr() as u64;
    let first = place ^ u64::from(tag.bits());
    [first, (first ^ real.key.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)]
}

/// The place of a block's seal; `None` if it has no room for one.
fn seal_place(block: *mut c_void, usable: usize) -> Option<*mut [u64; 2]> {
    Some(block.wrapping_byte_add(usable.checked_sub(SEAL_BYTES)?).cast())
}

/// Whose a block is.
///
/// # Safety
/// The block is one that the real allocator gave, with `usable` bytes, and its caller's to free.
unsafe fn owner(real: &Real, block: *mut c_void, usable: usize) -> Option<Tag> {
    let place = seal_place(block, usable)?;
    // SAFETY: the last sixteen usable bytes of a block that is the caller's. They may be any bytes.
    let found = unsafe { place.read_unaligned() };
    let bits = u32::try_from(found[0] ^ real.key ^ block.addr() as u64).ok()?;
    let tag = Tag::from_bits(bits)?;
    (seal(real, block, tag) == found).then_some(tag)
}

/// Writes the seal of a block, or with no tag wipes it, so that no later block in the same place is taken for this one.
///
/// # Safety
/// As for [`owner`], and the last sixteen bytes are not the caller's data.
unsafe fn write_seal(real: &Real, block: *mut c_void, usable: usize, tag: Option<Tag>) {
    let Some(place) = seal_place(block, usable) else { return };
    let words = tag.map_or([0; 2], |tag| seal(real, block, tag));
    // SAFETY: as the caller says.
    unsafe { place.write_unaligned(words) };
}

/// What the allocator makes of `bytes` bytes as a rule: glibc's chunks are multiples of sixteen bytes less eight. A wrong guess costs a second addition, not the count.
fn usual_size(bytes: usize) -> usize {
    (bytes.saturating_add(8 + 15) & !15).saturating_sub(8).max(24)
}

/// Allocates by `get`, which is given the bytes to ask the real allocator for.
///
/// # Safety
/// `get` gives a block of at least as many usable bytes as it is given, fresh from the real allocator, or null.
unsafe fn allocate(bytes: usize, get: impl Fn(&Real, usize) -> *mut c_void) -> *mut c_void {
    let Some(real) = real() else { return ptr::null_mut() };
    let Some(tag) = meter::current() else { return get(real, bytes) };
    let Some(padded) = bytes.checked_add(SEAL_BYTES) else { return refuse(tag, bytes) };
    let expected = usual_size(padded);
    match tag.charge(expected as u64) {
        Charge::Done => {}
        Charge::Refused => return refuse(tag, bytes),
        Charge::Nobody => return get(real, bytes),
    }
    let block = get(real, padded);
    if block.is_null() {
        tag.credit(expected as u64);
        return block;
    }
    // SAFETY: the block was just given out by this allocator.
    let usable = unsafe { (real.usable_size)(block) };
    correct(tag, expected, usable);
    // A seal in this place is that of a block which was freed past us.
    // SAFETY: the block is ours to give; its seal's bytes are beyond those that were asked for.
    if let Some(former) = unsafe { owner(real, block, usable) } {
        former.credit(usable as u64);
    }
    // SAFETY: as above.
    unsafe { write_seal(real, block, usable, Some(tag)) };
    block
}

/// Brings what was charged for a block to what it is.
fn correct(tag: Tag, charged: usize, is: usize) {
    match is.checked_sub(charged) {
        Some(0) => {}
        Some(more) => tag.charge_rounding(more as u64),
        None => tag.credit((charged - is) as u64),
    }
}

/// Credits a block to its owner, before it is freed.
///
/// # Safety
/// The block is not null, one that the real allocator gave, and the caller's to free.
unsafe fn forget(real: &Real, block: *mut c_void) {
    // SAFETY: as the caller says. A block that was not given by the allocator is as much a fault here as in the real `free`.
    let usable = unsafe { (real.usable_size)(block) };
    // SAFETY: as the caller says.
    if let Some(owner) = unsafe { owner(real, block, usable) } {
        // SAFETY: the bytes hold the seal.
        unsafe { write_seal(real, block, usable, None) };
        owner.credit(usable as u64);
    }
}

unsafe extern "C" fn malloc(bytes: usize) -> *mut c_void {
    // SAFETY: the real function, with its own argument.
    let get = |real: &Real, bytes| unsafe { (real.malloc)(bytes) };
    // SAFETY: `get` gives a fresh block.
    unsafe { allocate(bytes, get) }
}

unsafe extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    // An overflow is the real function's to refuse.
    let bytes = count.saturating_mul(size);
    // SAFETY: the real function, for one element of so many bytes.
    let get = |real: &Real, bytes| unsafe { (real.calloc)(1, bytes) };
    // SAFETY: `get` gives a fresh block.
    unsafe { allocate(bytes, get) }
}

unsafe extern "C" fn aligned_alloc(alignment: usize, bytes: usize) -> *mut c_void {
    // SAFETY: the real function, with its own arguments.
    let get = |real: &Real, bytes| unsafe { (real.aligned_alloc)(alignment, bytes) };
    // SAFETY: `get` gives a fresh block.
    unsafe { allocate(bytes, get) }
}

unsafe extern "C" fn memalign(alignment: usize, bytes: usize) -> *mut c_void {
    // SAFETY: the real function, with its own arguments.
    let get = |real: &Real, bytes| unsafe { (real.memalign)(alignment, bytes) };
    // SAFETY: `get` gives a fresh block.
    unsafe { allocate(bytes, get) }
}

unsafe extern "C" fn valloc(bytes: usize) -> *mut c_void {
    // SAFETY: the real function, with its own argument.
    let get = |real: &Real, bytes| unsafe { (real.valloc)(bytes) };
    // SAFETY: `get` gives a fresh block.
    unsafe { allocate(bytes, get) }
}

unsafe extern "C" fn pvalloc(bytes: usize) -> *mut c_void {
    // SAFETY: the real function, with its own argument.
    let get = |real: &Real, bytes| unsafe { (real.pvalloc)(bytes) };
    // SAFETY: `get` gives a fresh block.
    unsafe { allocate(bytes, get) }
}

unsafe extern "C" fn posix_memalign(block: *mut *mut c_void, alignment: usize, bytes: usize) -> c_int {
    let status = std::cell::Cell::new(libc::ENOMEM);
    let get = |real: &Real, bytes| {
        let mut given = ptr::null_mut();
        // SAFETY: the real function; the result is writable.
        status.set(unsafe { (real.posix_memalign)(&raw mut given, alignment, bytes) });
        if status.get() == 0 { given } else { ptr::null_mut() }
    };
    // SAFETY: `get` gives a fresh block.
    let given = unsafe { allocate(bytes, get) };
    if !given.is_null() {
        // SAFETY: the caller's pointer is writable, by the function's contract.
        unsafe { block.write(given) };
    }
    status.get()
}

unsafe extern "C" fn free(block: *mut c_void) {
    let Some(real) = real() else { return };
    if !block.is_null() {
        // SAFETY: the caller's to free, by the function's contract.
        unsafe { forget(real, block) };
    }
    // SAFETY: as above.
    unsafe { (real.free)(block) };
}

unsafe extern "C" fn realloc(block: *mut c_void, bytes: usize) -> *mut c_void {
    let Some(real) = real() else { return ptr::null_mut() };
    if block.is_null() {
        // SAFETY: any size.
        return unsafe { self::malloc(bytes) };
    }
    if bytes == 0 {
        // SAFETY: the caller's to free, by the function's contract, and the real function frees it.
        unsafe { forget(real, block) };
        // SAFETY: as above.
        return unsafe { (real.realloc)(block, 0) };
    }
    // SAFETY: the caller's, by the function's contract.
    let old_usable = unsafe { (real.usable_size)(block) };
    // SAFETY: as above.
    let old = unsafe { owner(real, block, old_usable) };
    let mut new = meter::current();
    let expected = usual_size(bytes.saturating_add(SEAL_BYTES));
    let had = if old == new { old_usable } else { 0 };
    let growth = expected.saturating_sub(had);
    if let Some(tag) = new {
        match tag.charge(growth as u64) {
            Charge::Done => {}
            Charge::Refused => return refuse(tag, bytes),
            Charge::Nobody => new = None,
        }
    }
    if old.is_some() {
        // What the block loses by shrinking, or where it was before, must not look like a block of its own.
        // SAFETY: the bytes hold the seal.
        unsafe { write_seal(real, block, old_usable, None) };
    }
    let asked = if new.is_some() { bytes.saturating_add(SEAL_BYTES) } else { bytes };
    // SAFETY: the real function, with a block that is the caller's.
    let grown = unsafe { (real.realloc)(block, asked) };
    if grown.is_null() {
        if let Some(old) = old {
            // SAFETY: the old block is there still, as it was.
            unsafe { write_seal(real, block, old_usable, Some(old)) };
        }
        if let Some(tag) = new {
            tag.credit(growth as u64);
        }
        return grown;
    }
    let Some(tag) = new else {
        if let Some(old) = old {
            old.credit(old_usable as u64);
        }
        return grown;
    };
    // SAFETY: the block was just given out by this allocator.
    let usable = unsafe { (real.usable_size)(grown) };
    match old {
        Some(old) if old != tag => {
            old.credit(old_usable as u64);
            correct(tag, expected, usable);
        }
        Some(_) => correct(tag, old_usable + growth, usable),
        None => correct(tag, expected, usable),
    }
    // SAFETY: as in `allocate`.
    unsafe { write_seal(real, grown, usable, Some(tag)) };
    grown
}

unsafe extern "C" fn reallocarray(block: *mut c_void, count: usize, size: usize) -> *mut c_void {
    let Some(real) = real() else { return ptr::null_mut() };
    match count.checked_mul(size) {
        // SAFETY: as the caller's call of the function.
        Some(bytes) => unsafe { self::realloc(block, bytes) },
        // SAFETY: the real function, which refuses.
        None => unsafe { (real.reallocarray)(block, count, size) },
    }
}

unsafe extern "C" fn malloc_usable_size(block: *mut c_void) -> usize {
    let Some(real) = real() else { return 0 };
    if block.is_null() {
        return 0;
    }
    // SAFETY: the caller's block, by the function's contract.
    let usable = unsafe { (real.usable_size)(block) };
    // The seal's bytes are not the caller's to use.
    // SAFETY: as above.
    let sealed = unsafe { owner(real, block, usable) }.is_some();
    if sealed { usable - SEAL_BYTES } else { usable }
}

/// Mapped memory that was charged, by its first address: the end, and whose it is. Ranges do not overlap.
static MAPPINGS: Mutex<BTreeMap<usize, (usize, Tag)>> = Mutex::new(BTreeMap::new());

type Mappings = BTreeMap<usize, (usize, Tag)>;

/// Takes `start..end` out of the mappings, and credits it to its owners.
fn unmap(mappings: &mut Mappings, start: usize, end: usize) {
    while let Some((&from, &(to, tag))) = mappings.range(..end).next_back().filter(|(_, (to, _))| *to > start)
    {
        mappings.remove(&from);
        if from < start {
            mappings.insert(from, (start, tag));
        }
        if to > end {
            mappings.insert(end, (to, tag));
        }
        tag.credit((to.min(end) - from.max(start)) as u64);
        if from < start {
            return;
        }
    }
}

/// How many bytes of `start..end` are charged to `tag`.
fn charged_in(mappings: &Mappings, start: usize, end: usize, tag: Tag) -> usize {
    let overlapping = mappings.range(..end).rev().take_while(|(_, (to, _))| *to > start);
    let own = overlapping.filter(|(_, (_, owner))| *owner == tag);
    own.map(|(from, (to, _))| (*to).min(end) - (*from).max(start)).sum()
}

/// Forgets the mappings of a session that has ended.
pub(crate) fn forget_mappings(tag: Tag) {
    MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, (_, owner)| *owner != tag);
}

fn whole_pages(bytes: usize) -> usize {
    // SAFETY: has no preconditions.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    bytes.checked_next_multiple_of(page.max(1)).unwrap_or(usize::MAX)
}

/// Whether the calling process is the worker and not a fork of it, in which the lock may be held for ever.
fn is_worker(real: &Real) -> bool {
    // SAFETY: has no preconditions.
    unsafe { libc::getpid() == real.process }
}

unsafe extern "C" fn mmap(
    at: *mut c_void,
    bytes: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    let Some(real) = real() else { return libc::MAP_FAILED };
    // SAFETY: the real function, with its own arguments.
    let map = || unsafe { (real.mmap)(at, bytes, protection, flags, fd, offset) };
    if !is_worker(real) {
        return map();
    }
    let whole = whole_pages(bytes);
    let replaces = flags & libc::MAP_FIXED != 0;
    // A file's own pages, or shared ones of it, are not this process's memory.
    let counts = flags & libc::MAP_ANONYMOUS != 0
        || (flags & libc::MAP_PRIVATE != 0 && protection & libc::PROT_WRITE != 0);
    let mut tag = meter::current().filter(|_| counts);
    if tag.is_none() && !replaces {
        return map();
    }
    let mut mappings = MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner);
    // What it replaces of the session's own is paid for: a reservation that is put to use.
    let end = at.addr().saturating_add(whole);
    let paid = tag.filter(|_| replaces).map_or(0, |tag| charged_in(&mappings, at.addr(), end, tag));
    if let Some(payer) = tag {
        match payer.charge((whole - paid) as u64) {
            Charge::Done => {}
            Charge::Refused => {
                drop(mappings);
                refuse(payer, bytes);
                return libc::MAP_FAILED;
            }
            Charge::Nobody => tag = None,
        }
    }
    let mapped = map();
    if mapped == libc::MAP_FAILED {
        if let Some(payer) = tag {
            payer.credit((whole - paid) as u64);
        }
        return mapped;
    }
    let start = mapped.addr();
    // What was there before is gone: by MAP_FIXED, or by calls past us.
    unmap(&mut mappings, start, start.saturating_add(whole));
    if let Some(payer) = tag {
        payer.charge_rounding(paid as u64);
        mappings.insert(start, (start.saturating_add(whole), payer));
    }
    mapped
}

unsafe extern "C" fn munmap(at: *mut c_void, bytes: usize) -> c_int {
    let Some(real) = real() else { return -1 };
    // SAFETY: the real function, with its own arguments.
    let unmap_it = || unsafe { (real.munmap)(at, bytes) };
    if !is_worker(real) {
        return unmap_it();
    }
    // Under the lock, so that nobody is given the same addresses before they are forgotten.
    let mut mappings = MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner);
    let status = unmap_it();
    if status == 0 {
        unmap(&mut mappings, at.addr(), at.addr().saturating_add(whole_pages(bytes)));
    }
    status
}

// Variadic in C; the fifth argument travels in the same register either way, and is only read if the flags say so.
unsafe extern "C" fn mremap(
    at: *mut c_void,
    old_bytes: usize,
    new_bytes: usize,
    flags: c_int,
    target: *mut c_void,
) -> *mut c_void {
    let Some(real) = real() else { return libc::MAP_FAILED };
    // SAFETY: the real function, with its own arguments.
    let remap = || unsafe { (real.mremap)(at, old_bytes, new_bytes, flags, target) };
    if !is_worker(real) {
        return remap();
    }
    let (old, new) = (whole_pages(old_bytes), whole_pages(new_bytes));
    let mut mappings = MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner);
    let start = at.addr();
    let owner =
        mappings.range(..=start).next_back().filter(|(_, (to, _))| *to > start).map(|(_, (_, tag))| *tag);
    let Some(tag) = owner.filter(|_| old != 0) else {
        drop(mappings);
        return remap();
    };
    let growth = new.saturating_sub(old);
    let charged = tag.charge(growth as u64);
    if charged == Charge::Refused {
        drop(mappings);
        refuse(tag, new_bytes);
        return libc::MAP_FAILED;
    }
    let mapped = remap();
    if charged == Charge::Done {
        // What is charged below is all that there is then.
        tag.credit(growth as u64);
    }
    if mapped == libc::MAP_FAILED {
        return mapped;
    }
    unmap(&mut mappings, start, start.saturating_add(old));
    let start = mapped.addr();
    unmap(&mut mappings, start, start.saturating_add(new));
    tag.charge_rounding(new as u64);
    mappings.insert(start, (start.saturating_add(new), tag));
    mapped
}

/// What a thread that a module starts is to do.
struct NewThread {
    start: Start,
    argument: *mut c_void,
    tag: Tag,
    thread_end: libc::pthread_key_t,
}

unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attributes: *const c_void,
    start: Start,
    argument: *mut c_void,
) -> c_int {
    let Some(real) = real() else { return libc::EAGAIN };
    let Some(tag) = meter::current() else {
        // SAFETY: the real function, with its own arguments.
        return unsafe { (real.pthread_create)(thread, attributes, start, argument) };
    };
    let new = Box::into_raw(Box::new(NewThread { start, argument, tag, thread_end: real.thread_end }));
    // SAFETY: the real function; `run_thread` takes what it is given, and takes it over.
    let status = unsafe { (real.pthread_create)(thread, attributes, run_thread, new.cast()) };
    if status != 0 {
        // SAFETY: made above, and no thread was started that would take it.
        drop(unsafe { Box::from_raw(new) });
    }
    status
}

/// The first function of a thread that a module has started: it works for the session that its starter worked for. Nothing here has a destructor when the thread's own
/// function is called, so that the thread may end in the middle of it (`pthread_exit`).
unsafe extern "C-unwind" fn run_thread(new: *mut c_void) -> *mut c_void {
    // SAFETY: `pthread_create` above made it for this thread alone.
    let NewThread { start, argument, tag, thread_end } = *unsafe { Box::from_raw(new.cast::<NewThread>()) };
    meter::work_for(tag);
    // Any value but null makes the thread's end known; without it a refusal may outlive the thread, which only words of a report depend on.
    // SAFETY: the key exists for as long as the process.
    unsafe { libc::pthread_setspecific(thread_end, ptr::dangling::<c_void>()) };
    // SAFETY: the function and its argument as the module gave them to `pthread_create`.
    unsafe { start(argument) }
}

unsafe extern "C" fn at_thread_end(_: *mut c_void) {
    meter::lived_through();
}

/// Zeroed memory for the host, charged to the session whose thread asks.
pub(crate) fn zeroed(bytes: usize) -> *mut c_void {
    if real().is_some() {
        // SAFETY: any size.
        unsafe { self::calloc(1, bytes) }
    } else {
        // SAFETY: any size.
        unsafe { libc::calloc(1, bytes) }
    }
}

/// Frees what [`zeroed`] gave.
///
/// # Safety
/// The block was given by [`zeroed`] and not freed since.
pub(crate) unsafe fn release(block: *mut c_void) {
    if real().is_some() {
        // SAFETY: as the caller says; both ways to get one can be freed by this.
        unsafe { self::free(block) }
    } else {
        // SAFETY: as the caller says.
        unsafe { libc::free(block) }
    }
}

#[cfg(test)]
#[allow(clippy::multiple_unsafe_ops_per_block)] // foreign functions, called one after another
mod tests {
    use super::*;
    use crate::meter::Meter;

    /// Runs on a thread of its own that works for a session with this limit.
    fn metered(session: u32, limit: u64, body: impl FnOnce(&Meter) + Send) {
        prepare().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| body(&Meter::open(session, limit).unwrap()));
        });
    }

    #[test]
    fn every_block_is_charged_and_credited() {
        metered(101, 1 << 20, |meter| {
            // SAFETY: each block is used as the functions allow, and freed once.
            unsafe {
                let block = malloc(1000).cast::<u8>();
                assert!((1016..1100).contains(&meter.counts().0), "{:?}", meter.counts());
                // All that the block says it has is the caller's.
                let usable = malloc_usable_size(block.cast());
                assert!((1000..1040).contains(&usable), "{usable}");
                block.write_bytes(7, usable);
                let block = realloc(block.cast(), 5000).cast::<u8>();
                assert!((5016..5100).contains(&meter.counts().0), "{:?}", meter.counts());
                assert!((0..1000).all(|at| block.add(at).read() == 7));
                let block = reallocarray(block.cast(), 10, 10);
                assert!((116..200).contains(&meter.counts().0), "{:?}", meter.counts());
                free(block);
                let zeroed = calloc(100, 10).cast::<u8>();
                assert!((0..1000).all(|at| zeroed.add(at).read() == 0));
                let mut aligned = ptr::null_mut();
                assert_eq!(posix_memalign(&raw mut aligned, 4096, 10), 0);
                assert_eq!(posix_memalign(&raw mut aligned, 3, 10), libc::EINVAL);
                let others = [aligned_alloc(64, 128), memalign(64, 10), valloc(10), pvalloc(10)];
                assert!(others.iter().all(|block| !block.is_null()) && aligned.addr() % 4096 == 0);
                for block in others.into_iter().chain([zeroed.cast(), aligned]) {
                    free(block);
                }
            }
            assert_eq!((meter.counts().0, meter.refusals()), (0, 0));
        });
    }

    #[test]
    fn beyond_the_limit_there_is_no_memory_and_the_old_block_stays() {
        metered(102, 100_000, |meter| {
            // SAFETY: as above.
            unsafe {
                let block = malloc(60_000).cast::<u8>();
                block.write_bytes(1, 60_000);
                assert!(malloc(60_000).is_null());
                assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOMEM));
                assert!(realloc(block.cast(), 120_000).is_null() && calloc(1, 60_000).is_null());
                assert!(calloc(usize::MAX, 2).is_null() && malloc(usize::MAX).is_null());
                let mut aligned = ptr::null_mut();
                assert_eq!(posix_memalign(&raw mut aligned, 64, 60_000), libc::ENOMEM);
                assert_eq!(meter.refusals(), 6);
                assert_eq!(block.add(59_999).read(), 1);
                free(block.cast());
            }
            assert_eq!(meter.counts().0, 0);
        });
    }

    #[test]
    fn blocks_of_others_pass_and_who_reallocates_takes_over() {
        metered(103, 1 << 20, |meter| {
            // SAFETY: as above.
            unsafe {
                let strange = libc::malloc(500);
                assert_eq!(meter.counts().0, 0);
                let taken = realloc(strange, 1000);
                assert!(meter.counts().0 >= 1016);
                let taken = std::thread::scope(|scope| {
                    let taken = taken.expose_provenance();
                    let other =
                        move || realloc(ptr::with_exposed_provenance_mut(taken), 2000).expose_provenance();
                    ptr::with_exposed_provenance_mut(scope.spawn(other).join().unwrap())
                });
                assert_eq!(meter.counts().0, 0, "the other thread works for nobody");
                free(taken);
                free(ptr::null_mut());
                // Freed past us, which costs the credit until the place is used again.
                let lost = malloc(3000);
                libc::free(lost);
                let again = malloc(3000);
                if again == lost {
                    free(again);
                    assert_eq!(meter.counts().0, 0);
                }
            }
        });
    }

    #[test]
    fn mappings_are_charged_whole_and_credited_in_parts() {
        const PAGE: usize = 4096;
        metered(104, 64 * PAGE as u64, |meter| {
            let (rw, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let used = || meter.counts().0 / PAGE as u64;
            // SAFETY: mappings of this test's own, in which nothing is.
            unsafe {
                let base = mmap(ptr::null_mut(), 40 * PAGE - 1, rw, private, -1, 0);
                assert_eq!(used(), 40);
                assert_eq!(mmap(ptr::null_mut(), 25 * PAGE, rw, private, -1, 0), libc::MAP_FAILED);
                assert_eq!(meter.refusals(), 1);
                // What is in use again is not paid for twice.
                let fixed = private | libc::MAP_FIXED;
                assert_eq!(mmap(base, 40 * PAGE, rw, fixed, -1, 0), base);
                assert_eq!(used(), 40);
                assert_eq!(munmap(base.byte_add(10 * PAGE), 10 * PAGE), 0);
                assert_eq!(used(), 30);
                let tail = mremap(
                    base.byte_add(20 * PAGE),
                    20 * PAGE,
                    50 * PAGE,
                    libc::MREMAP_MAYMOVE,
                    ptr::null_mut(),
                );
                assert_eq!(used(), 60);
                assert_eq!(
                    mremap(tail, 50 * PAGE, 90 * PAGE, libc::MREMAP_MAYMOVE, ptr::null_mut()),
                    libc::MAP_FAILED
                );
                assert_eq!(munmap(tail, 50 * PAGE), 0);
                assert_eq!(munmap(base, 10 * PAGE), 0);
                assert_eq!(used(), 0);
            }
        });
    }

    #[test]
    fn a_range_is_taken_out_of_the_middle() {
        metered(105, 1 << 20, |meter| {
            let tag = meter::current().unwrap();
            let mut mappings = Mappings::from([(100, (200, tag)), (300, (400, tag))]);
            tag.charge_rounding(200);
            unmap(&mut mappings, 150, 310);
            assert_eq!(mappings, Mappings::from([(100, (150, tag)), (310, (400, tag))]));
            unmap(&mut mappings, 110, 120);
            assert_eq!(charged_in(&mappings, 0, 1000, tag), 130);
            unmap(&mut mappings, 0, 1000);
            assert_eq!((mappings.len(), meter.counts().0), (0, 0));
        });
    }
}
