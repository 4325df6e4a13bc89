//! Who has which part of a session's arena. The books are in the host's private memory; the worker never sees them.
//!
//! Blocks are handed out by a constant-time allocator (`offset-allocator`, two-level size classes) in units of
//! [`PAYLOAD_ALIGN`] bytes. Pages are committed before a block is handed out and given back when the last block of a busy time is gone, so
//! an arena may be as large as the payload limit asks and still cost only what is used.

use crate::layout::{PAGE_BYTES, PAYLOAD_ALIGN, SCRATCH_BYTES};
use offset_allocator::{Allocation, Allocator};
use std::io;

/// Most blocks that may be out at the same time.
pub const BLOCKS_MAX: u32 = 4096;
/// Committed bytes that an idle arena keeps.
pub const RETAINED_BYTES: u64 = 4 << 20;
/// Pages are committed in steps of at least this.
const COMMIT_STEP: u64 = 256 << 10;

/// A block of the arena. Give it back with [`Arena::free`].
pub struct ArenaBlock {
    /// Offset from the arena's start.
    pub offset: u64,
    /// Usable bytes.
    pub bytes: u64,
    allocation: Allocation,
}

impl std::fmt::Debug for ArenaBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArenaBlock")
            .field("offset", &self.offset)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

/// Why the arena has no block.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArenaError {
    /// No free range is large enough, or too many blocks are out.
    #[error("no room for {bytes} bytes in an arena of {arena_bytes}: {in_use} blocks are in use")]
    Full {
        /// What was asked for.
        bytes: u64,
        /// The arena's size.
        arena_bytes: u64,
        /// Blocks out.
        in_use: u32,
    },
    /// The operating system has no memory for the pages.
    #[error("no memory for {bytes} more bytes of arena")]
    OutOfMemory {
        /// Bytes to be committed.
        bytes: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The allocator of one arena.
pub struct Arena {
    bytes: u64,
    committed: u64,
    retained: u64,
    in_use: u32,
    allocator: Option<Allocator>,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena")
            .field("bytes", &self.bytes)
            .field("committed", &self.committed)
            .field("in_use", &self.in_use)
            .finish_non_exhaustive()
    }
}

impl Arena {
    /// An arena of `bytes` bytes whose first [`SCRATCH_BYTES`] are committed and belong to the direct slot.
    pub fn new(bytes: u64) -> Self {
        Self::with_committed(bytes, SCRATCH_BYTES)
    }

    /// The same, with more of its first bytes committed. They stay so.
    pub fn with_committed(bytes: u64, committed: u64) -> Self {
        Self { bytes, committed, retained: committed.max(RETAINED_BYTES), in_use: 0, allocator: None }
    }

    /// Hands out a block of at least `bytes` bytes, after `commit(offset, bytes)` has given it pages where it had none.
    ///
    /// # Errors
    /// [`ArenaError::Full`], or [`ArenaError::OutOfMemory`] with the error of `commit`.
    pub fn allocate(
        &mut self,
        bytes: u64,
        commit: impl FnOnce(u64, u64) -> io::Result<()>,
    ) -> Result<ArenaBlock, ArenaError> {
        let full = |in_use| ArenaError::Full { bytes, arena_bytes: self.bytes, in_use };
        let units = u32::try_from(bytes.max(1).div_ceil(PAYLOAD_ALIGN)).map_err(|_| full(self.in_use))?;
        let all = u32::try_from((self.bytes - SCRATCH_BYTES) / PAYLOAD_ALIGN).unwrap_or(u32::MAX);
        // Made on first use: a session that passes no large buffers never pays for the books.
        let allocator = self.allocator.get_or_insert_with(|| Allocator::with_max_allocs(all, BLOCKS_MAX));
        if self.in_use + 2 >= BLOCKS_MAX {
            return Err(full(self.in_use));
        }
        let allocation = allocator.allocate(units).ok_or_else(|| full(self.in_use))?;
        let offset = SCRATCH_BYTES + u64::from(allocation.offset) * PAYLOAD_ALIGN;
        let bytes = u64::from(units) * PAYLOAD_ALIGN;
        let end = offset + bytes;
        if end > self.committed {
            let target = end.max(self.committed + COMMIT_STEP).next_multiple_of(PAGE_BYTES).min(self.bytes);
            let more = target - self.committed;
            if let Err(source) = commit(self.committed, more) {
                allocator.free(allocation);
                return Err(ArenaError::OutOfMemory { bytes: more, source });
            }
            self.committed = target;
        }
        self.in_use += 1;
        Ok(ArenaBlock { offset, bytes, allocation })
    }

    /// Takes a block back. When it was the last one, `decommit(offset, bytes)` gives back what an idle arena does not keep.
    pub fn free(&mut self, block: ArenaBlock, decommit: impl FnOnce(u64, u64) -> io::Result<()>) {
        if let Some(allocator) = &mut self.allocator {
            allocator.free(block.allocation);
            self.in_use -= 1;
        }
        if self.in_use == 0 && self.committed > self.retained {
            // If the system cannot take the pages back they stay committed, and the books keep saying so.
            if decommit(self.retained, self.committed - self.retained).is_ok() {
                self.committed = self.retained;
            }
        }
    }

    /// Blocks that are out.
    pub fn in_use(&self) -> u32 {
        self.in_use
    }

    /// Bytes that have pages.
    pub fn committed(&self) -> u64 {
        self.committed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn blocks_do_not_overlap_and_come_back() {
        let mut arena = Arena::new(8 * MIB);
        let mut blocks = Vec::new();
        for i in 1..100u64 {
            blocks.push(arena.allocate(i * 777, |_, _| Ok(())).unwrap());
        }
        let mut ranges: Vec<_> = blocks.iter().map(|b| (b.offset, b.offset + b.bytes)).collect();
        ranges.sort_unstable();
        assert!(ranges[0].0 >= SCRATCH_BYTES);
        assert!(ranges.windows(2).all(|w| w[0].1 <= w[1].0));
        assert!(ranges.last().unwrap().1 <= arena.committed());
        for block in blocks {
            arena.free(block, |_, _| Ok(()));
        }
        assert_eq!(arena.in_use(), 0);
        assert!(arena.allocate(7 * MIB, |_, _| Ok(())).is_ok());
    }

    #[test]
    fn pages_are_committed_before_use_and_given_back_when_idle() {
        let mut arena = Arena::new(64 * MIB);
        let mut committed = SCRATCH_BYTES;
        let block = arena
            .allocate(40 * MIB, |offset, bytes| {
                assert_eq!(offset, committed);
                committed += bytes;
                Ok(())
            })
            .unwrap();
        assert!(block.offset + block.bytes <= committed);
        let mut given_back = None;
        arena.free(block, |offset, bytes| {
            given_back = Some((offset, bytes));
            Ok(())
        });
        assert_eq!(given_back, Some((RETAINED_BYTES, committed - RETAINED_BYTES)));
        assert_eq!(arena.committed(), RETAINED_BYTES);
    }

    #[test]
    fn what_was_committed_from_the_start_stays() {
        let mut arena = Arena::with_committed(64 * MIB, 16 * MIB);
        let small = arena.allocate(8 * MIB, |_, _| panic!("these pages are there")).unwrap();
        let large = arena.allocate(20 * MIB, |_, _| Ok(())).unwrap();
        let mut given_back = None;
        arena.free(large, |_, _| panic!("a block is out"));
        arena.free(small, |offset, _| {
            given_back = Some(offset);
            Ok(())
        });
        assert_eq!((given_back, arena.committed()), (Some(16 * MIB), 16 * MIB));
    }

    #[test]
    fn a_full_arena_and_a_system_without_memory_are_told_apart() {
        let mut arena = Arena::new(4 * MIB);
        assert!(matches!(arena.allocate(5 * MIB, |_, _| Ok(())), Err(ArenaError::Full { .. })));
        let failing = |_, _| Err(io::Error::from_raw_os_error(libc::ENOSPC));
        assert!(matches!(arena.allocate(MIB, failing), Err(ArenaError::OutOfMemory { .. })));
        assert_eq!(arena.in_use(), 0);
        let block = arena.allocate(MIB, |_, _| Ok(())).unwrap();
        arena.free(block, |_, _| Ok(()));
    }

    #[test]
    fn the_number_of_blocks_is_bounded() {
        let mut arena = Arena::new(64 * MIB);
        let mut out = Vec::new();
        while let Ok(block) = arena.allocate(64, |_, _| Ok(())) {
            out.push(block);
        }
        assert!(out.len() < BLOCKS_MAX as usize && out.len() > 4000);
    }
}
