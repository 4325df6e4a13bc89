//! Memory that two processes share: a few atomics, and bytes behind them.

use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::ftruncate;

use crate::Result;

/// State and words of one call. Request and reply take turns in the same cache line.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Record {
    pub state: AtomicU32,
    pub words: [AtomicU64; 6],
}

const _: () = assert!(size_of::<Record>() == 64);

impl Record {
    /// Writes all six words; the state that publishes them comes after.
    #[inline(always)]
    pub fn write_request(&self, a: i32, b: i32) {
        for (word, value) in self.words.iter().zip([a, b, 0, 0, 0, 0]) {
            word.store(value as u64, Ordering::Relaxed);
        }
    }

    /// Reads all six words, and writes the result over the first.
    #[inline(always)]
    pub fn answer(&self) {
        let [a, b, ..] = self.words.each_ref().map(|word| word.load(Ordering::Relaxed));
        self.words[0].store(crate::add(a as i32, b as i32) as u64, Ordering::Relaxed);
    }

    #[inline(always)]
    pub fn result(&self) -> i32 {
        self.words[0].load(Ordering::Relaxed) as i32
    }
}

/// A record of eight words: the state and seven of them fill a cache line, the eighth needs another.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub struct TwoLines {
    pub state: AtomicU32,
    pub words: [AtomicU64; 8],
}

const _: () = assert!(size_of::<TwoLines>() == 128 && std::mem::offset_of!(TwoLines, words) == 8);

/// Types of which every bit pattern is a value, and which are accessed by atomics only.
///
/// # Safety
/// The implementor has no field but atomic integers, and needs no drop.
pub unsafe trait Atoms {}
// SAFETY: atomic integers only.
unsafe impl Atoms for Record {}
// SAFETY: atomic integers only.
unsafe impl Atoms for TwoLines {}

/// A `T` in a memfd, mapped shared, and `bytes` more behind it, from the next page on.
pub struct Shared<T> {
    file: OwnedFd,
    address: NonNull<u8>,
    length: NonZeroUsize,
    bytes: usize,
    _type: PhantomData<T>,
}

const PAGE: usize = 4096;

impl<T: Atoms> Shared<T> {
    pub fn create(bytes: usize) -> Result<Self> {
        let file = memfd_create("hotcell-compare", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&file, (PAGE + bytes) as i64)?;
        Self::open(file, bytes)
    }

    /// Maps what the other process created.
    pub fn open(file: OwnedFd, bytes: usize) -> Result<Self> {
        const { assert!(size_of::<T>() <= PAGE && align_of::<T>() <= PAGE) };
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let length = NonZeroUsize::new(PAGE + bytes).ok_or("the length overflows")?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping, at an address of the kernel's choice, touches no memory in use.
        let address = unsafe { mmap(None, length, access, flags, &file, 0) }?;
        Ok(Self { file, address: address.cast(), length, bytes, _type: PhantomData })
    }

    /// Where the bytes behind the `T` begin. Who may touch them is a matter of the state in the `T`.
    pub fn bytes(&self) -> *mut u8 {
        self.address.as_ptr().wrapping_add(PAGE)
    }

    /// Copies `from` to the shared bytes. It must be this side's turn, as the state in the `T` has it.
    #[inline(always)]
    pub fn copy_in(&self, from: &[u8]) {
        assert!(from.len() <= self.bytes);
        // SAFETY: the mapping has room for so many, the other side leaves them alone while it is our turn, and private memory
        // does not overlap with them.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.bytes(), from.len()) };
    }

    /// Copies the shared bytes to `into`, on the same condition.
    #[inline(always)]
    pub fn copy_out(&self, into: &mut [u8]) {
        assert!(into.len() <= self.bytes);
        // SAFETY: as in `copy_in`.
        unsafe { std::ptr::copy_nonoverlapping(self.bytes(), into.as_mut_ptr(), into.len()) };
    }
}

impl<T> AsFd for Shared<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl<T: Atoms> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mapping is page-aligned, longer than a `T`, lives as long as `self`, and holds only atomics,
        // for which every bit pattern is valid and which the other process accesses atomically too.
        unsafe { self.address.cast().as_ref() }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: it is this mapping, and no reference to it outlives `self`.
        let unmapped = unsafe { munmap(self.address.cast(), self.length.get()) };
        debug_assert!(unmapped.is_ok());
    }
}
