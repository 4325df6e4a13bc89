#![allow(unsafe_code)]
//! A hint to the processor about a cache line.
//!
//! **Law.** A hint reads and writes nothing that a program can see: its instruction faults on no address, and moves a line between caches at most. What is
//! unsafe here is only to name the instruction. On machines without it, and where a model is checked, a hint does nothing.

/// Asks for the line of `place`, which is about to be read.
#[inline(always)]
pub(crate) fn read_soon<T>(place: &T) {
    line_soon(std::ptr::from_ref(place).cast());
}

/// Asks for the line at `place`, which may be any address.
#[inline(always)]
pub(crate) fn line_soon(place: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    // SAFETY: every x86-64 processor has the instruction, and it takes any address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(place.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    let _ = place;
}
