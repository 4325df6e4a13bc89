#![allow(unsafe_code)]
//! Loading a module for a session with a memory limit: its calls of allocation functions lead to [`crate::allocations`], and so do those of every other library
//! in this process, the C library included; not those of the program itself, which has an allocator of its own to look after.
//!
//! A library calls a function of another through a slot that the dynamic linker has filled with the function's address. [`redirect`] goes through the relocations
//! of each loaded library and puts another address into the slots that lead to one of the functions in question. A slot that leads elsewhere (a library with an allocator of its
//! own) is left alone.
//!
//! A module's constructors run inside of `dlopen`, and may allocate. To come before them, [`open`] loads not the module but an empty library that needs it ([`stub`]):
//! the dynamic linker maps and relocates both, then runs the constructors, the stub's first, because it is marked `DF_1_INITFIRST`; and that one is [`redirect`]. The stub
//! has no code. It stays loaded as long as the module, whose symbols are found through it.
//!
//! **Law.** What is read is the linker's tables in memory, of files that may be malformed: each table and each entry is used only if it lies in a mapped segment of its library.
//! What is written is slots: aligned words in writable segments whose content is the address of a function that is replaced, or not resolved so far. A function that takes another's place
//! keeps its contract, so it does not matter when a running thread sees the change.

use crate::allocations::{self, Replaced};
use libloading::os::unix::Library;
use std::cell::RefCell;
use std::ffi::{CStr, CString, OsStr, c_int, c_void};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};

/// Why a module could not be loaded.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// The dynamic linker's words.
    Linker(libloading::Error),
    /// It is loaded, but its allocations cannot be counted, so it was unloaded.
    Uncounted(String),
}

/// Loads a module whose allocations are counted from its first constructor on.
pub(crate) fn open(name: &OsStr, flags: c_int) -> Result<Library, OpenError> {
    allocations::prepare().map_err(OpenError::Uncounted)?;
    if let Some(library) = open_by_stub(name, flags) {
        let (library, redirected) = library;
        redirected.map_err(OpenError::Uncounted)?;
        return Ok(library);
    }
    // Where that fails the module itself does as a rule, and the linker's words about it are wanted. If it does not (no /proc, files that may only be shorter than the stub, or a module that
    // only the program's own search path leads to), what its constructors allocate is not counted.
    // SAFETY: runs the library's constructors, as the host asks; see `library.rs`.
    let library = unsafe { Library::open(Some(name), flags) }.map_err(OpenError::Linker)?;
    redirect().map_err(OpenError::Uncounted)?;
    Ok(library)
}

thread_local! {
    /// What became of [`redirect`] when the stub's constructor ran it; `None` if it did not run.
    static REDIRECTED: RefCell<Option<Result<(), String>>> = const { RefCell::new(None) };
}

extern "C" fn redirect_before_constructors() {
    let result = redirect();
    REDIRECTED.with_borrow_mut(|redirected| *redirected = Some(result));
}

fn open_by_stub(name: &OsStr, flags: c_int) -> Option<(Library, Result<(), String>)> {
    let (path, _file) = write_stub(name)?;
    REDIRECTED.with_borrow_mut(|redirected| *redirected = None);
    // SAFETY: runs the stub's one constructor, which is a function of this program, and those of the module, as the host asks.
    let library = unsafe { Library::open(Some(OsStr::from_bytes(path.as_bytes())), flags) }.ok()?;
    // A linker that did not run it leaves it to us.
    let redirected = REDIRECTED.with_borrow_mut(Option::take).unwrap_or_else(redirect);
    Some((library, redirected))
}

/// Writes the stub for a module into a memfd, and gives a path to it that no other loaded stub has: the dynamic linker takes equal paths for the same library.
fn write_stub(name: &OsStr) -> Option<(CString, OwnedFd)> {
    use std::io::Write;
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let hook: extern "C" fn() = redirect_before_constructors;
    let bytes = stub(name.as_bytes(), hook as usize as u64)?;
    // Beyond the limit of a file's size a write is not an error but the process's end.
    if file_bytes_max() < bytes.len() as u64 {
        return None;
    }
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"module-stub".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    // SAFETY: just opened, and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut file = std::fs::File::from(fd);
    file.write_all(&bytes).ok()?;
    let fd = OwnedFd::from(file);
    let count = COUNT.fetch_add(1, Relaxed);
    Some((CString::new(stub_path(std::os::fd::AsRawFd::as_raw_fd(&fd), count)).ok()?, fd))
}

fn file_bytes_max() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the result is writable.
    unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) };
    limit.rlim_cur
}

/// A path to the descriptor, spelled in a way that only this count has: descriptors' numbers are used again, and the dynamic linker knows loaded libraries by path.
fn stub_path(fd: c_int, count: u32) -> String {
    let mut path = String::from("/proc");
    for bit in 0..u32::BITS {
        path.push_str(if count >> bit & 1 == 0 { "/" } else { "/." });
    }
    path + &format!("/self/fd/{fd}")
}

// The parts of an ELF file that are used here, all for 64 bits.
const HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;
const RELOCATION_BYTES: u64 = 24;
const SYMBOL_BYTES: u64 = 24;
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_PLTRELSZ: u64 = 2;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const DT_STRSZ: u64 = 10;
const DT_SYMENT: u64 = 11;
const DT_JMPREL: u64 = 23;
const DT_INIT_ARRAY: u64 = 25;
const DT_INIT_ARRAYSZ: u64 = 27;
const DT_FLAGS_1: u64 = 0x6fff_fffb;
const DF_1_INITFIRST: u64 = 0x20;
/// Most entries of a dynamic section that are looked at.
const DYNAMIC_ENTRIES_MAX: u64 = 512;
/// Longest name of a function that is looked for, with its NUL.
const NAME_BYTES_MAX: usize = 24;

#[cfg(target_arch = "x86_64")]
mod machine {
    pub(super) const NUMBER: u16 = 62;
    /// A whole address, a slot for data, a slot for calls.
    pub(super) const ABSOLUTE: u64 = 1;
    pub(super) const SLOT: u64 = 6;
    pub(super) const CALL_SLOT: u64 = 7;
}
#[cfg(target_arch = "aarch64")]
mod machine {
    pub(super) const NUMBER: u16 = 183;
    pub(super) const ABSOLUTE: u64 = 257;
    pub(super) const SLOT: u64 = 1025;
    pub(super) const CALL_SLOT: u64 = 1026;
}

/// An ELF library without code that needs `module`, and whose one constructor, run before all others, is the function at `hook`. `None` for a name with a NUL.
///
/// ```text
/// header │ segments: load, dynamic, stack │ dynamic section │ symbol 0 │ constructor │ strings
/// ```
fn stub(module: &[u8], hook: u64) -> Option<Vec<u8>> {
    if module.contains(&0) {
        return None;
    }
    const DYNAMIC: usize = HEADER_BYTES + 3 * SEGMENT_BYTES;
    const ENTRIES: usize = 9;
    const SYMBOLS: usize = DYNAMIC + ENTRIES * 16;
    const CONSTRUCTOR: usize = SYMBOLS + 24;
    const STRINGS: usize = CONSTRUCTOR + 8;
    let strings = [b"\0", module, b"\0"].concat();
    let total = (STRINGS + strings.len()) as u64;
    let mut file = Vec::with_capacity(STRINGS + strings.len());
    // Class 64, little-endian, version 1, System V.
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend(3u16.to_le_bytes()); // a shared object
    file.extend(machine::NUMBER.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for word in [0, HEADER_BYTES as u64, 0] {
        file.extend(u64::to_le_bytes(word)); // entry, segments, sections
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 3, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    const READ_WRITE: u32 = 6;
    let dynamic = DYNAMIC as u64;
    // Type; flags; offset; address; bytes; alignment. Without the third, glibc would make stacks executable.
    for (kind, at, bytes, align) in
        [(1u32, 0, total, 4096u64), (2, dynamic, 16 * ENTRIES as u64, 8), (0x6474_e551, 0, 0, 16)]
    {
        file.extend(kind.to_le_bytes());
        file.extend(READ_WRITE.to_le_bytes());
        for word in [at, at, at, bytes, bytes, align] {
            file.extend(u64::to_le_bytes(word));
        }
    }
    let entries: [[u64; 2]; ENTRIES] = [
        [DT_NEEDED, 1],
        [DT_STRTAB, STRINGS as u64],
        [DT_STRSZ, strings.len() as u64],
        [DT_SYMTAB, SYMBOLS as u64],
        [DT_SYMENT, SYMBOL_BYTES],
        [DT_INIT_ARRAY, CONSTRUCTOR as u64],
        [DT_INIT_ARRAYSZ, 8],
        [DT_FLAGS_1, DF_1_INITFIRST],
        [DT_NULL, 0],
    ];
    for word in entries.as_flattened() {
        file.extend(word.to_le_bytes());
    }
    file.extend([0; 24]);
    // An absolute address: the linker runs what stands here, and no relocation says that it is to be changed.
    file.extend(hook.to_le_bytes());
    file.extend(strings);
    Some(file)
}

/// Leads the allocations of all libraries that are loaded now to functions that count. What leads there already stays.
///
/// # Errors
/// If the memory protection of a library's slots cannot be changed.
pub(crate) fn redirect() -> Result<(), String> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let replaced = allocations::prepare()?;
    // What may be needed below besides: it must not be looked for while the linker's lock is held.
    // SAFETY: has no preconditions.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    // SAFETY: has no preconditions.
    let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let mut visit = Visit { replaced, vdso, page, seen: 0, failure: None };
    let _guard = ONE_AT_A_TIME.lock();
    // SAFETY: `visit_object` gets the value it expects, which lives and is not used otherwise during the call. The linker holds its lock meanwhile, so
    // that no object goes away.
    unsafe { libc::dl_iterate_phdr(Some(visit_object), (&raw mut visit).cast()) };
    visit.failure.map_or(Ok(()), Err)
}

struct Visit {
    replaced: &'static [Replaced],
    vdso: u64,
    page: u64,
    seen: usize,
    failure: Option<String>,
}

unsafe extern "C" fn visit_object(info: *mut libc::dl_phdr_info, _: usize, visit: *mut c_void) -> c_int {
    // SAFETY: `redirect` lent it for the time of the call.
    let visit = unsafe { &mut *visit.cast::<Visit>() };
    // SAFETY: the linker gave it to the callback.
    let info = unsafe { &*info };
    visit.seen += 1;
    // The first is the program.
    if visit.seen > 1 && info.dlpi_addr != visit.vdso && !info.dlpi_phdr.is_null() {
        // SAFETY: the object's program headers, as many as the linker says, in memory for as long as it is loaded.
        let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
        let object = Object { base: info.dlpi_addr, headers };
        if let Err(failure) = object.redirect(visit.replaced, visit.page) {
            visit.failure = Some(failure);
            return 1;
        }
    }
    0
}

/// A loaded library.
struct Object<'a> {
    base: u64,
    headers: &'a [libc::Elf64_Phdr],
}

/// The tables of a dynamic section that are of use here: addresses and sizes, 0 if absent.
#[derive(Default)]
struct Tables {
    symbols: u64,
    strings: u64,
    string_bytes: u64,
    relocations: u64,
    relocation_bytes: u64,
    calls: u64,
    call_bytes: u64,
}

impl Object<'_> {
    fn segments(&self, kind: u32) -> impl Iterator<Item = (u64, u64, u32)> {
        let of_kind = self.headers.iter().filter(move |header| header.p_type == kind);
        of_kind.map(|h| (self.base.wrapping_add(h.p_vaddr), h.p_memsz, h.p_flags))
    }

    /// Whether these bytes lie in one loaded segment that has all the rights.
    fn has(&self, address: u64, bytes: u64, rights: u32) -> bool {
        self.segments(libc::PT_LOAD).any(|(start, length, flags)| {
            let at = address.wrapping_sub(start);
            address >= start && at <= length && bytes <= length - at && flags & rights == rights
        })
    }

    /// Words of the library; `None` if they do not lie in it.
    fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]> {
        self.has(address, 8 * N as u64, libc::PF_R).then(|| {
            // SAFETY: in a readable segment of an object that stays loaded for the time of the visit. No alignment is assumed.
            unsafe { pointer::<[u64; N]>(address).read_unaligned() }
        })
    }

    fn tables(&self) -> Option<Tables> {
        let (dynamic, ..) = self.segments(libc::PT_DYNAMIC).next()?;
        let mut tables = Tables::default();
        for entry in 0..DYNAMIC_ENTRIES_MAX {
            let [tag, value] = self.words(dynamic.wrapping_add(entry * 16))?;
            // The linker has added the load base, but for objects whose section is read-only.
            let address = if self.has(value, 1, libc::PF_R) { value } else { value.wrapping_add(self.base) };
            match tag {
                DT_NULL => break,
                DT_SYMTAB => tables.symbols = address,
                DT_STRTAB => tables.strings = address,
                DT_STRSZ => tables.string_bytes = value,
                DT_RELA => tables.relocations = address,
                DT_RELASZ => tables.relocation_bytes = value,
                DT_JMPREL => tables.calls = address,
                DT_PLTRELSZ => tables.call_bytes = value,
                _ => {}
            }
        }
        Some(tables)
    }

    /// The slots to change, and what to.
    fn slots(&self, tables: &Tables, replaced: &[Replaced]) -> Vec<(u64, usize)> {
        let mut slots = Vec::new();
        for (table, bytes) in
            [(tables.relocations, tables.relocation_bytes), (tables.calls, tables.call_bytes)]
        {
            for index in 0..bytes / RELOCATION_BYTES {
                let Some([offset, info, addend]) = self.words(table.wrapping_add(index * RELOCATION_BYTES))
                else {
                    break;
                };
                let kind = info & 0xffff_ffff;
                if !matches!(kind, machine::ABSOLUTE | machine::SLOT | machine::CALL_SLOT) || addend != 0 {
                    continue;
                }
                let slot = self.base.wrapping_add(offset);
                if !slot.is_multiple_of(8) || !self.has(slot, 8, libc::PF_R | libc::PF_W) {
                    continue;
                }
                let Some([value]) = self.words(slot) else { continue };
                let resolved = replaced.iter().find(|function| function.real as u64 == value);
                let target = resolved.or_else(|| {
                    // A call slot that was not used so far leads back into the library, to code that asks the linker.
                    let unresolved = kind == machine::CALL_SLOT && self.has(value, 1, libc::PF_X);
                    if unresolved { self.wanted(tables, info >> 32, replaced) } else { None }
                });
                if let Some(function) = target {
                    slots.push((slot, function.ours));
                }
            }
        }
        slots
    }

    /// Which of the functions a symbol names that the library does not define itself.
    fn wanted<'r>(&self, tables: &Tables, symbol: u64, replaced: &'r [Replaced]) -> Option<&'r Replaced> {
        let [word] = self.words(tables.symbols.wrapping_add(symbol.wrapping_mul(SYMBOL_BYTES)))?;
        // name u32, info u8, other u8, section u16
        let (name, section) = (word & 0xffff_ffff, word >> 48);
        if section != 0 || name >= tables.string_bytes {
            return None;
        }
        let mut text = [0u8; NAME_BYTES_MAX];
        let bytes = (tables.string_bytes - name).min(NAME_BYTES_MAX as u64);
        let address = tables.strings.wrapping_add(name);
        if !self.has(address, bytes, libc::PF_R) {
            return None;
        }
        for (at, byte) in text.iter_mut().enumerate().take(usize::try_from(bytes).ok()?) {
            // SAFETY: in a readable segment, as was just checked for all of them.
            *byte = unsafe { pointer::<u8>(address).wrapping_add(at).read() };
        }
        let text = CStr::from_bytes_until_nul(&text).ok()?;
        replaced.iter().find(|function| function.name == text)
    }

    fn redirect(&self, replaced: &[Replaced], page: u64) -> Result<(), String> {
        let Some(tables) = self.tables() else { return Ok(()) };
        let slots = self.slots(&tables, replaced);
        // What the linker has made read-only after it was done: whole pages.
        let guarded = self
            .segments(libc::PT_GNU_RELRO)
            .next()
            .map(|(start, bytes, _)| (start / page * page, start.saturating_add(bytes) / page * page));
        let is_guarded = |slot: u64| guarded.is_some_and(|(start, end)| (start..end).contains(&slot));
        let open = guarded.filter(|_| slots.iter().any(|(slot, _)| is_guarded(*slot)));
        if let Some((start, end)) = open {
            protect(start, end, libc::PROT_READ | libc::PROT_WRITE)?;
        }
        for (slot, target) in slots {
            // SAFETY: an aligned word in a writable segment (`slots`), made writable again if the linker had closed it; an atomic because threads
            // may be calling through it, and the linker resolving it.
            let slot = unsafe { AtomicUsize::from_ptr(pointer::<usize>(slot).cast_mut()) };
            slot.store(target, Relaxed);
        }
        match open {
            Some((start, end)) => protect(start, end, libc::PROT_READ),
            None => Ok(()),
        }
    }
}

fn protect(start: u64, end: u64, protection: c_int) -> Result<(), String> {
    let bytes = usize::try_from(end.saturating_sub(start)).unwrap_or(0);
    // SAFETY: pages of a library's data that the dynamic linker has closed, of which only slots are written, and that are closed again. The C library's own function:
    // the slots of this program are not changed.
    if unsafe { libc::mprotect(pointer::<c_void>(start).cast_mut(), bytes, protection) } == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(format!("allocations cannot be counted: mprotect of a library's slots: {error}"))
}

/// An address that the linker's tables told, and that was checked.
fn pointer<T>(address: u64) -> *const T {
    const { assert!(size_of::<usize>() == size_of::<u64>(), "hotcell runs on 64-bit targets") };
    std::ptr::with_exposed_provenance(usize::try_from(address).unwrap_or(0))
}

#[cfg(test)]
#[allow(clippy::multiple_unsafe_ops_per_block)] // foreign functions, called one after another
mod tests {
    use super::*;

    #[test]
    fn a_stub_leads_to_its_module_and_lets_it_go() {
        use libloading::os::unix::{RTLD_LAZY, RTLD_LOCAL};
        let flags = RTLD_LAZY | RTLD_LOCAL;
        let open = |name: &str| open_by_stub(OsStr::new(name), flags);
        // Twice at a time: neither is taken for the other.
        let (first, second) = (open("libm.so.6").unwrap(), open("libz.so.1").unwrap());
        assert!(first.1.is_ok() && second.1.is_ok());
        // SAFETY: the type is that of the functions.
        unsafe {
            let cos = first.0.get::<extern "C" fn(f64) -> f64>(b"cos\0").unwrap();
            assert_eq!(cos(0.0), 1.0);
            assert!(first.0.get::<extern "C" fn()>(b"crc32\0").is_err());
            assert!(second.0.get::<extern "C" fn()>(b"crc32\0").is_ok());
        }
        assert!(open("libno-such-thing.so.9").is_none());
        assert!(open("with\0nul").is_none());
        first.0.close().unwrap();
        second.0.close().unwrap();
    }

    #[test]
    fn paths_of_stubs_differ_and_lead_to_the_same_place() {
        let paths: std::collections::HashSet<String> = (0..3000).map(|count| stub_path(0, count)).collect();
        assert_eq!(paths.len(), 3000);
        let target = std::fs::canonicalize("/proc/self/status").unwrap();
        for count in [0, 1, 2, 0x5555_5555, u32::MAX] {
            let path = stub_path(0, count).replace("fd/0", "status");
            assert_eq!(std::fs::canonicalize(&path).unwrap(), target, "{path}");
            assert!(path.len() < 128);
        }
    }

    #[test]
    fn redirecting_twice_is_redirecting_once() {
        redirect().unwrap();
        redirect().unwrap();
    }

    #[test]
    fn tables_that_lie_outside_are_not_followed() {
        // A "library" in this test's own memory: a dynamic section whose tables are anywhere.
        let wild = [0, 8, 0x1000, u64::MAX, u64::MAX - 7, 1 << 47, 1 << 63];
        let replaced = allocations::prepare().unwrap();
        for address in wild {
            for bytes in wild {
                let memory: Box<[u64; 64]> = Box::new(std::array::from_fn(|at| {
                    let entry =
                        [DT_SYMTAB, DT_STRTAB, DT_STRSZ, DT_RELA, DT_RELASZ, DT_JMPREL, DT_PLTRELSZ, DT_NULL];
                    let tag = entry.get(at / 2).copied().unwrap_or(0);
                    match (at % 2, tag) {
                        (0, tag) => tag,
                        (_, DT_STRSZ | DT_RELASZ | DT_PLTRELSZ) => bytes,
                        _ => address,
                    }
                }));
                let base = std::ptr::from_ref(&*memory).expose_provenance() as u64;
                let header = |kind, flags| libc::Elf64_Phdr {
                    p_type: kind,
                    p_flags: flags,
                    p_offset: 0,
                    p_vaddr: 0,
                    p_paddr: 0,
                    p_filesz: 512,
                    p_memsz: 512,
                    p_align: 8,
                };
                let headers = [header(libc::PT_LOAD, libc::PF_R | libc::PF_W), header(libc::PT_DYNAMIC, 6)];
                let object = Object { base, headers: &headers };
                let tables = object.tables().unwrap();
                assert!(object.slots(&tables, replaced).is_empty(), "{address:#x} {bytes:#x}");
                assert!(object.wanted(&tables, address, replaced).is_none());
                assert!(!object.has(address, bytes.max(513), 0));
            }
        }
    }
}
