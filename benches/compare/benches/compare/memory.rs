//! Memory that two processes share: one record in one cache line.

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

const SIZE: NonZeroUsize = NonZeroUsize::new(size_of::<Record>()).unwrap();
const _: () = assert!(SIZE.get() == 64);

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

/// A [`Record`] in a memfd, mapped shared.
pub struct SharedRecord {
    file: OwnedFd,
    address: NonNull<Record>,
}

impl SharedRecord {
    pub fn create() -> Result<Self> {
        let file = memfd_create("hotcell-compare", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&file, SIZE.get() as i64)?;
        Self::open(file)
    }

    /// Maps a record that the other process created.
    pub fn open(file: OwnedFd) -> Result<Self> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice, touches no memory in use.
        let address = unsafe { mmap(None, SIZE, access, MapFlags::MAP_SHARED, &file, 0) }?;
        Ok(Self { file, address: address.cast() })
    }
}

impl AsFd for SharedRecord {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Deref for SharedRecord {
    type Target = Record;

    fn deref(&self) -> &Record {
        // SAFETY: the mapping is page-aligned, as long as a record, lives as long as `self`, and holds only atomics,
        // for which every bit pattern is valid and which the other process accesses atomically too.
        unsafe { self.address.as_ref() }
    }
}

impl Drop for SharedRecord {
    fn drop(&mut self) {
        // SAFETY: it is this mapping, and no reference to it outlives `self`.
        let unmapped = unsafe { munmap(self.address.cast(), SIZE.get()) };
        debug_assert!(unmapped.is_ok());
    }
}
