#![allow(unsafe_code)]
//! Copies of bytes between private and shared memory: the only code that touches payloads in the region.
//!
//! **Law.** The other process may write the shared side at any moment.
//! - So no Rust access is made to it but atomic ones. On x86-64 the copy is the C library's `memcpy`, called from an `asm!` block: to the compiler that is a
//!   block of machine code that may read and write any memory, and accesses of machine code are not Rust accesses. As machine code, `memcpy` decides nothing
//!   by the bytes that it copies, so a write by the other process in the middle of it makes the copied bytes arbitrary and nothing else. Elsewhere the copy is by
//!   relaxed atomic words, and atomic bytes at the ends.
//! - Called as a plain function, `memcpy` would be a Rust access: the compiler knows what it does, and reasons from the absence of races.
//!
//! Why `memcpy` and no loop of our own: the C library chooses it for the processor when the process starts, and has a way for each size.

#[cfg(target_arch = "x86_64")]
use machine as way;
#[cfg(not(target_arch = "x86_64"))]
use words as way;

/// Copies private bytes into shared memory.
///
/// # Safety
/// `source` is readable and `target` writable for `bytes` bytes, and they do not overlap. Nobody writes the bytes at `source` meanwhile; those at `target`
/// are in memory that is shared with another process and accessed by atomics, or through this module, only.
#[inline(always)]
pub(crate) unsafe fn to_shared(source: *const u8, target: *mut u8, bytes: usize) {
    // SAFETY: the caller's promise is the same.
    unsafe { way::to_shared(source, target, bytes) }
}

/// Copies bytes of shared memory into private memory: a snapshot.
///
/// # Safety
/// `source` is readable and `target` writable for `bytes` bytes, and they do not overlap. Nobody else uses the bytes at `target` meanwhile; those at `source`
/// are in memory that is shared with another process and accessed by atomics, or through this module, only.
#[inline(always)]
pub(crate) unsafe fn from_shared(source: *const u8, target: *mut u8, bytes: usize) {
    // SAFETY: the caller's promise is the same.
    unsafe { way::from_shared(source, target, bytes) }
}

#[cfg(target_arch = "x86_64")]
mod machine {
    // To the machine's code both are the same.
    pub(super) use self::{copy as from_shared, copy as to_shared};

    /// # Safety
    /// `source` is readable and `target` writable for `bytes` bytes, and they do not overlap.
    #[inline(always)]
    pub(super) unsafe fn copy(source: *const u8, target: *mut u8, bytes: usize) {
        // SAFETY: calls `memcpy(target, source, bytes)` by the System V ABI: its three arguments are in their registers, all registers that a callee may change are
        // declared as changed, and without `nostack` the stack is aligned for a call and nothing of ours lies below its pointer. `memcpy` does not unwind. What it
        // reads and writes is what the caller promises.
        unsafe {
            core::arch::asm!(
                "call {memcpy}",
                memcpy = in(reg) libc::memcpy as unsafe extern "C" fn(_, _, _) -> _,
                in("rdi") target,
                in("rsi") source,
                in("rdx") bytes,
                clobber_abi("sysv64"),
            );
        }
    }
}

/// The copy that every processor has. Compiled for the tests everywhere.
#[cfg(any(test, not(target_arch = "x86_64")))]
mod words {
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

    const WORD: usize = size_of::<u64>();

    /// How many of `bytes` bytes lie before the first aligned word at `at`.
    fn head(at: *const u8, bytes: usize) -> usize {
        (at.addr().next_multiple_of(WORD) - at.addr()).min(bytes)
    }

    /// # Safety
    /// As [`super::to_shared`].
    pub(super) unsafe fn to_shared(source: *const u8, target: *mut u8, bytes: usize) {
        let byte = |i: usize| {
            // SAFETY: `i` is below `bytes` at each call; `target + i` is shared memory, accessed by atomics.
            let shared = unsafe { AtomicU8::from_ptr(target.wrapping_add(i)) };
            // SAFETY: `source + i` is readable and private.
            shared.store(unsafe { source.wrapping_add(i).read() }, Relaxed);
        };
        let mut i = head(target, bytes);
        (0..i).for_each(byte);
        while bytes - i >= WORD {
            // SAFETY: a word at `target + i` is inside the range and aligned, since `head` is what was missing; shared memory, accessed by atomics.
            let shared = unsafe { AtomicU64::from_ptr(target.wrapping_add(i).cast()) };
            // SAFETY: a word at `source + i` is inside the readable range, and private.
            shared.store(unsafe { source.wrapping_add(i).cast::<u64>().read_unaligned() }, Relaxed);
            i += WORD;
        }
        (i..bytes).for_each(byte);
    }

    /// # Safety
    /// As [`super::from_shared`].
    pub(super) unsafe fn from_shared(source: *const u8, target: *mut u8, bytes: usize) {
        let byte = |i: usize| {
            // SAFETY: `i` is below `bytes` at each call; `source + i` is shared memory, accessed by atomics.
            let shared = unsafe { AtomicU8::from_ptr(source.cast_mut().wrapping_add(i)) };
            // SAFETY: `target + i` is writable and private.
            unsafe { target.wrapping_add(i).write(shared.load(Relaxed)) };
        };
        let mut i = head(source, bytes);
        (0..i).for_each(byte);
        while bytes - i >= WORD {
            // SAFETY: a word at `source + i` is inside the range and aligned, since `head` is what was missing; shared memory, accessed by atomics.
            let shared = unsafe { AtomicU64::from_ptr(source.cast_mut().wrapping_add(i).cast()) };
            // SAFETY: a word at `target + i` is inside the writable range, and private.
            unsafe { target.wrapping_add(i).cast::<u64>().write_unaligned(shared.load(Relaxed)) };
            i += WORD;
        }
        (i..bytes).for_each(byte);
    }
}

#[cfg(test)]
mod tests {
    type Routine = unsafe fn(*const u8, *mut u8, usize);

    const WAYS: [(&str, Routine); 4] = [
        ("to shared memory", super::to_shared),
        ("from shared memory", super::from_shared),
        ("to shared memory, by words", super::words::to_shared),
        ("from shared memory, by words", super::words::from_shared),
    ];
    const GUARD: usize = 64;

    fn number(seed: usize) -> u8 {
        u8::try_from(seed.wrapping_mul(0x9e37_79b1) >> 7 & 0xff).unwrap()
    }

    /// Copies `bytes` bytes by `copy`, which has to do what a plain loop does: these bytes, and none beside them.
    fn check(what: &str, copy: Routine, from: usize, to: usize, bytes: usize) {
        let source: Vec<u8> = (0..from + bytes + GUARD).map(number).collect();
        let before: Vec<u8> = (0..to + bytes + GUARD).map(|i| number(i + 7919)).collect();
        let mut expected = before.clone();
        expected[to..to + bytes].copy_from_slice(&source[from..from + bytes]);
        let mut target = before;
        let (at, into) = (source[from..].as_ptr(), target[to..].as_mut_ptr());
        // SAFETY: both vectors have GUARD bytes more behind these places than are copied, do not overlap, and are this thread's own.
        unsafe { copy(at, into, bytes) };
        assert!(target == expected, "{what}: {bytes} bytes from offset {from} to {to}");
    }

    #[test]
    fn every_length_at_every_alignment() {
        for (what, copy) in WAYS {
            for bytes in 0..=300 {
                for at in 0..=64 {
                    check(what, copy, at, 64 - at, bytes);
                    check(what, copy, at, at * 7 % 65, bytes);
                }
            }
        }
    }

    #[test]
    fn lengths_about_the_thresholds_of_copies() {
        for (what, copy) in WAYS {
            for power in 9..=17 {
                for bytes in [(1 << power) - 1, 1 << power, (1 << power) + 1] {
                    for (from, to) in [(0, 0), (1, 0), (0, 1), (3, 61)] {
                        check(what, copy, from, to, bytes);
                    }
                }
            }
            check(what, copy, 1, 2, (1 << 20) + 5);
        }
    }
}
