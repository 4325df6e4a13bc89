#![allow(unsafe_code)]
//! The region as a plain mapping: what the channel's own types do not let one do to it.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// A second mapping of a session's region, or of the crash page, in which every word can be written.
pub(crate) struct Raw {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping lives until the process ends, and all access to it goes through atomics.
unsafe impl Send for Raw {}

impl Raw {
    /// Maps the first `bytes` bytes, at most the whole file.
    pub(crate) fn map(fd: BorrowedFd<'_>, bytes: u64) -> Self {
        let size = nix::sys::stat::fstat(fd).map_or(0, |stat| stat.st_size.cast_unsigned());
        let bytes = usize::try_from(bytes.min(size)).unwrap_or(0);
        let (read_write, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, read_write, shared, fd.as_raw_fd(), 0) };
        assert_ne!(base, libc::MAP_FAILED, "the region can be mapped twice");
        Self { base: base.cast(), bytes }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Stores eight bytes at the offset, rounded down and wrapped round to lie in the mapping.
    pub(crate) fn store(&self, offset: usize, word: u64) {
        let offset = (offset % self.bytes) & !7;
        // SAFETY: in bounds.
        let at = unsafe { self.base.add(offset) };
        // SAFETY: eight bytes from there are in bounds (the mapping is a multiple of eight bytes long), aligned, and accessed by atomics only.
        let cell = unsafe { AtomicU64::from_ptr(at.cast()) };
        cell.store(word, Relaxed);
    }

    /// Stores four bytes.
    pub(crate) fn store_u32(&self, offset: usize, word: u32) {
        let offset = (offset % self.bytes) & !3;
        // SAFETY: in bounds.
        let at = unsafe { self.base.add(offset) };
        // SAFETY: four bytes from there are in bounds (the mapping is a multiple of eight bytes long), aligned, and accessed by atomics only.
        let cell = unsafe { AtomicU32::from_ptr(at.cast()) };
        cell.store(word, Relaxed);
    }
}

/// Moves whoever sleeps on `word` to another word, so that a wake of the first wakes nobody.
pub(crate) fn requeue_sleepers(word: &AtomicU32, other: &AtomicU32) {
    // SAFETY: two live words; FUTEX_REQUEUE wakes none and moves all.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_REQUEUE,
            0,
            i64::from(i32::MAX),
            other.as_ptr(),
        )
    };
}

/// `fallocate(PUNCH_HOLE)` on the whole file.
pub(crate) fn punch_holes(fd: BorrowedFd<'_>, offset: u64, bytes: u64) {
    let _ = hotcell_channel::region::decommit(fd, offset, bytes);
}

/// Everything that could change the size under the host's mapping. One bit for each that worked.
pub(crate) fn break_the_seal(fd: BorrowedFd<'_>) -> u64 {
    use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
    let size = nix::sys::stat::fstat(fd).map_or(0, |stat| stat.st_size);
    let reopened = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .truncate(true)
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let attempts = [
        nix::unistd::ftruncate(fd, 0).is_ok(),
        nix::unistd::ftruncate(fd, size - 4096).is_ok(),
        nix::unistd::ftruncate(fd, size + 4096).is_ok(),
        fallocate(fd, FallocateFlags::empty(), size, 4096).is_ok(),
        fallocate(fd, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 0, 4096).is_ok(),
        fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_ok(),
        fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::empty())).is_ok(),
        reopened.is_ok(),
        nix::sys::stat::fstat(fd).map_or(0, |stat| stat.st_size) != size,
    ];
    attempts.iter().enumerate().map(|(at, worked)| u64::from(*worked) << at).sum()
}

/// A small generator of numbers (xorshift64*): the same ones for the same seed.
#[derive(Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        let mut dice = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            dice.next();
        }
        dice
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    pub(crate) fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap_or(0)
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[5]
    }

    /// A number of the kind that breaks things: edges more often than the middle.
    pub(crate) fn edge(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => u64::MAX - 1,
            3 => 1 << self.below(64),
            4 => (1u64 << self.below(64)).wrapping_sub(1),
            5 => self.below(4096),
            _ => self.next(),
        }
    }

    /// A state word: the protocol's own more often than others.
    pub(crate) fn state(&mut self) -> u32 {
        let [a, b, c, d, ..] = self.next().to_le_bytes();
        let parked = u32::from(a & 1) << 31;
        match b % 8 {
            0..=5 => u32::from(b % 8) | parked,
            6 => 1 << (c % 32),
            _ => u32::from_le_bytes([a, b, c, d]),
        }
    }
}
