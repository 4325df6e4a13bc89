#![allow(unsafe_code)]
//! Worker memory that the host reads, writes, allocates and frees by address.
//!
//! **Law.** Addresses come from the host's caller and may be wrong. They are only ever handed to the kernel
//! (`process_vm_readv`, which answers a bad one with an error) or compared with the list of blocks that were allocated here; none is
//! dereferenced by this code.

use crate::allocations;
use hotcell_channel::session::{FAULT, NO_MEMORY, OK, TOO_LONG, UNKNOWN_BLOCK};
use hotcell_channel::sys;
use std::collections::HashSet;

/// The blocks that one session has allocated and not freed.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    addresses: HashSet<u64>,
    /// The block that the last returned string was copied to, if it took one.
    string: Option<u64>,
}

/// Strings are looked at in steps that never cross a page: one readable byte makes the rest of its page readable.
const PAGE: usize = 4096;

impl Blocks {
    pub(crate) fn allocate(&mut self, bytes: u64) -> (u64, u64) {
        let Ok(size) = usize::try_from(bytes) else { return (NO_MEMORY, 0) };
        // One byte at least, so that the address is unique.
        let block = allocations::zeroed(size.max(1));
        if block.is_null() {
            return (NO_MEMORY, 0);
        }
        let address = block.expose_provenance() as u64;
        self.addresses.insert(address);
        (OK, address)
    }

    /// Allocates room for a returned string, which the host fetches and frees.
    pub(crate) fn allocate_string(&mut self, bytes: u64) -> Option<u64> {
        self.string =
            Some(self.allocate(bytes)).filter(|(status, _)| *status == OK).map(|(_, address)| address);
        self.string
    }

    /// The last returned string is the host's from here on.
    pub(crate) fn forget_string(&mut self) {
        self.string = None;
    }

    /// Frees the copy of the last returned string, if there is one: the host will not come to fetch it.
    pub(crate) fn free_string(&mut self) {
        if let Some(address) = self.string.take() {
            self.free(address);
        }
    }

    pub(crate) fn free(&mut self, address: u64) -> u64 {
        if !self.addresses.remove(&address) {
            return UNKNOWN_BLOCK;
        }
        release(address);
        OK
    }

    /// Copies `bytes` bytes; a fault-tolerant memcpy between two addresses of this process.
    #[allow(clippy::unused_self)]
    pub(crate) fn copy(&self, target: u64, source: u64, bytes: u64) -> u64 {
        if bytes == 0 {
            return OK;
        }
        // SAFETY: what is overwritten is the arena, or memory that the host's caller names: foreign memory, on which no Rust code of the
        // worker relies unless the caller is wrong, and then only this worker suffers, which is what a cell is for.
        match unsafe { sys::copy_own_memory(target, source, bytes) } {
            Ok(()) => OK,
            Err(_) => FAULT,
        }
    }

    /// Copies a NUL-terminated string without its NUL, at most `capacity` bytes. Gives its length, or with `TOO_LONG` what was copied.
    pub(crate) fn copy_string(&self, target: u64, source: u64, capacity: u64) -> (u64, u64) {
        let mut done = 0;
        let mut step = [0u8; PAGE];
        loop {
            let Some(at) = source.checked_add(done) else { return (FAULT, done) };
            let bytes = PAGE as u64 - at % PAGE as u64;
            let buffer = step.as_mut_ptr().expose_provenance() as u64;
            if self.copy(buffer, at, bytes) != OK {
                return (FAULT, done);
            }
            let seen = &step[..usize::try_from(bytes).unwrap_or(0)];
            let string = seen.iter().position(|b| *b == 0);
            let length = string.map_or(bytes, |n| n as u64);
            let fits = length.min(capacity - done);
            if self.copy(target.saturating_add(done), buffer, fits) != OK {
                return (FAULT, done);
            }
            done += fits;
            if fits < length {
                return (TOO_LONG, done);
            }
            if string.is_some() {
                return (OK, done);
            }
        }
    }
}

fn release(address: u64) {
    let Ok(address) = usize::try_from(address) else { return };
    // SAFETY: callers pass addresses from `addresses`, which holds what `zeroed` gave and nobody has freed through us.
    unsafe { allocations::release(std::ptr::with_exposed_provenance_mut(address)) };
}

impl Drop for Blocks {
    fn drop(&mut self) {
        for address in self.addresses.drain() {
            release(address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_blocks_are_freed() {
        let mut blocks = Blocks::default();
        let (status, address) = blocks.allocate(10);
        assert_eq!(status, OK);
        assert_eq!(blocks.free(address + 1), UNKNOWN_BLOCK);
        assert_eq!(blocks.free(address), OK);
        assert_eq!(blocks.free(address), UNKNOWN_BLOCK);
        assert_eq!(blocks.allocate(u64::MAX / 2).0, NO_MEMORY);
    }

    #[test]
    fn strings_are_bounded_and_bad_addresses_are_faults() {
        let blocks = Blocks::default();
        let text = vec![b'x'; 5000].into_iter().chain([0]).collect::<Vec<u8>>();
        let mut target = vec![0u8; 6000];
        let from = text.as_ptr().expose_provenance() as u64;
        let to = target.as_mut_ptr().expose_provenance() as u64;
        assert_eq!(blocks.copy_string(to, from, 6000), (OK, 5000));
        assert_eq!(&target[..5000], &text[..5000]);
        assert_eq!(blocks.copy_string(to, from, 100), (TOO_LONG, 100));
        assert_eq!(blocks.copy_string(to, 16, 100), (FAULT, 0));
        assert_eq!(blocks.copy(16, from, 8), FAULT);
    }
}
