//! Where things lie in a session's region, and the numbers both sides must agree on. Bytes only.
//!
//! ```text
//! offset      bytes  what
//! 0             128  SessionHeader   written once by the host, checked once by the worker
//! 128           128  Progress        written by the worker, read by the host after its death
//! 256           128  Doorbell        rung by the host, slept on by the worker's session thread
//! 384           128  Sleepers        who sleeps while the stream is in use
//! 512           128  the direct slot
//! 640       128 * n  the ring's slots
//! page-aligned  20 K  the stream: a ring of requests, a ring of replies; allocated with the first pipeline
//! page-aligned    …  arena: payload blocks; its first SCRATCH_BYTES belong to the direct slot
//! ```

use crate::slot::{Doorbell, Progress, Slot};
use crate::stream::{RECORDS, Reply, Sleepers, Stream};

/// First eight bytes of every hello and of every session header.
pub const MAGIC: u64 = u64::from_le_bytes(*b"hotcell\0");
/// Raised whenever the meaning of any shared byte changes.
pub const PROTOCOL_VERSION: u32 = 3;
/// Granularity of the region and of its parts.
pub const PAGE_BYTES: u64 = 4096;
/// Alignment of an arena that may lie in huge pages, and their size: that of x86-64, and of aarch64 with pages of 4 KiB.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// Offset of [`Progress`].
pub const PROGRESS_OFFSET: u64 = 128;
/// Offset of [`Doorbell`].
pub const DOORBELL_OFFSET: u64 = 256;
/// Offset of [`Sleepers`].
pub const SLEEPERS_OFFSET: u64 = 384;
/// Offset of the direct slot.
pub const DIRECT_OFFSET: u64 = 512;
/// Offset of the ring's first slot.
pub const RING_OFFSET: u64 = 640;
/// The start of the arena that the direct slot uses without asking the allocator.
pub const SCRATCH_BYTES: u64 = 64 * 1024;
/// Every payload block starts on its own cache line.
pub const PAYLOAD_ALIGN: u64 = 64;
/// Lines of [`PAYLOAD_ALIGN`] bytes in the scratch.
#[allow(clippy::cast_possible_truncation)] // a thousand
pub const SCRATCH_LINES: u32 = (SCRATCH_BYTES / PAYLOAD_ALIGN) as u32;
/// Largest arena that a region may have.
pub const ARENA_BYTES_MAX: u64 = 1 << 36;

/// Call index of the first resolved function; the ones below are the session's own.
pub const FUNCTIONS_BASE: u32 = 16;

/// What a direct slot's function word says of a payload in the slot's scratch, of which `bytes` bytes are in use: how many lines.
#[allow(clippy::cast_possible_truncation)] // less than SCRATCH_LINES
pub const fn scratch_number(bytes: u64) -> u32 {
    let lines = bytes.div_ceil(PAYLOAD_ALIGN);
    if lines < SCRATCH_LINES as u64 { lines as u32 } else { SCRATCH_LINES }
}

/// What it says of a payload of `bytes` bytes in a block elsewhere in the arena: [`SCRATCH_LINES`] and how many times [`SCRATCH_BYTES`], as far as there is room for it.
#[allow(clippy::cast_possible_truncation)] // less than SLOTS_MAX
pub const fn block_number(bytes: u64) -> u32 {
    let most = crate::slot::SLOTS_MAX - 1 - SCRATCH_LINES;
    let times = bytes.div_ceil(SCRATCH_BYTES);
    SCRATCH_LINES + if times < most as u64 { times as u32 } else { most }
}

/// About how many bytes of payload a direct slot's function word speaks of.
pub const fn payload_bytes(number: u32) -> u64 {
    match number.checked_sub(SCRATCH_LINES) {
        None | Some(0) => number as u64 * PAYLOAD_ALIGN,
        Some(times) => times as u64 * SCRATCH_BYTES,
    }
}

/// The sizes of one session's region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Slots in the ring.
    pub slots: u32,
    /// Bytes in the arena, a multiple of [`PAGE_BYTES`].
    pub arena_bytes: u64,
    /// Whether the arena starts at a multiple of [`HUGE_PAGE_BYTES`], in the file and in each process, so that huge pages fit into it.
    pub huge_pages: bool,
}

impl Geometry {
    /// The offset of ring slot `index`.
    pub const fn slot_offset(index: u32) -> u64 {
        RING_OFFSET + index as u64 * size_of::<Slot>() as u64
    }

    /// The end of the slots, up to the next page.
    pub const fn slots_end(&self) -> u64 {
        Self::slot_offset(self.slots).next_multiple_of(PAGE_BYTES)
    }

    /// The offset of the stream.
    pub const fn stream_offset(&self) -> u64 {
        self.slots_end()
    }

    /// The offset of the arena.
    pub const fn arena_offset(&self) -> u64 {
        let stream_end = self.stream_offset() + size_of::<Stream>() as u64;
        if self.huge_pages { stream_end.next_multiple_of(HUGE_PAGE_BYTES) } else { stream_end }
    }

    /// The size of the whole region.
    pub const fn region_bytes(&self) -> u64 {
        self.arena_offset() + self.arena_bytes
    }

    /// Whether these sizes are ones that a region may have.
    pub const fn is_valid(&self) -> bool {
        self.slots >= 2
            && self.slots <= crate::slot::SLOTS_MAX
            && self.arena_bytes >= SCRATCH_BYTES
            && self.arena_bytes <= ARENA_BYTES_MAX
            && self.arena_bytes.is_multiple_of(PAGE_BYTES)
    }
}

/// A digest of every size and offset that the two sides must agree on. Two builds that differ in any of them refuse each other
/// in the handshake.
pub const LAYOUT_HASH: u64 = {
    let parts = [
        PROTOCOL_VERSION as u64,
        size_of::<Slot>() as u64,
        size_of::<Progress>() as u64,
        size_of::<Doorbell>() as u64,
        size_of::<Sleepers>() as u64,
        size_of::<Stream>() as u64,
        size_of::<Reply>() as u64,
        RECORDS as u64,
        PROGRESS_OFFSET,
        DOORBELL_OFFSET,
        SLEEPERS_OFFSET,
        DIRECT_OFFSET,
        RING_OFFSET,
        SCRATCH_BYTES,
        PAYLOAD_ALIGN,
        FUNCTIONS_BASE as u64,
        crate::slot::FUNCTION_BITS as u64,
        crate::slot::WORDS_MAX as u64,
        crate::crash::CRASH_PAGE_BYTES as u64,
        crate::signature::ARGS_MAX as u64,
        crate::session::FIXED_MAX as u64,
    ];
    // FNV-1a over the numbers.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut i = 0;
    while i < parts.len() {
        hash = (hash ^ parts[i]).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
};

const _: () = {
    assert!(SCRATCH_LINES < crate::slot::SLOTS_MAX);
    assert!(PROGRESS_OFFSET.is_multiple_of(128) && DOORBELL_OFFSET.is_multiple_of(128));
    assert!(DIRECT_OFFSET.is_multiple_of(128) && RING_OFFSET.is_multiple_of(128));
    assert!(RING_OFFSET == DIRECT_OFFSET + 128);
    assert!(SLEEPERS_OFFSET == DOORBELL_OFFSET + 128 && SLEEPERS_OFFSET + 128 == DIRECT_OFFSET);
    assert!(SCRATCH_BYTES.is_multiple_of(PAGE_BYTES));
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap() {
        let g = Geometry { slots: 256, arena_bytes: SCRATCH_BYTES, huge_pages: false };
        assert!(g.is_valid());
        assert!(Geometry::slot_offset(255) + 128 <= g.stream_offset());
        assert_eq!(g.stream_offset() % PAGE_BYTES, 0);
        assert_eq!(g.arena_offset() % PAGE_BYTES, 0);
        assert_eq!(g.region_bytes(), g.arena_offset() + SCRATCH_BYTES);
        let huge = Geometry { huge_pages: true, ..g };
        assert_eq!((huge.arena_offset(), huge.slots_end()), (HUGE_PAGE_BYTES, g.slots_end()));
    }

    #[test]
    fn a_number_tells_scratch_from_block_and_about_how_much() {
        for (bytes, number) in [(0, 0), (1, 1), (64, 1), (65, 2), (SCRATCH_BYTES, 1024), (u64::MAX, 1024)] {
            assert_eq!(scratch_number(bytes), number, "{bytes} bytes in the scratch");
        }
        for (bytes, number) in [(1, 1025), (SCRATCH_BYTES, 1025), (1 << 20, 1040), (u64::MAX, 4095)] {
            assert_eq!(block_number(bytes), number, "{bytes} bytes in a block");
        }
        assert_eq!(block_number(ARENA_BYTES_MAX), crate::slot::SLOTS_MAX - 1);
        let told = [0, 1, 16, 1024, 1025, 1040].map(payload_bytes);
        assert_eq!(told, [0, 64, 1 << 10, 64 << 10, 64 << 10, 1 << 20]);
    }

    #[test]
    fn odd_sizes_are_refused() {
        for (slots, arena_bytes) in [
            (1, SCRATCH_BYTES),
            (5000, SCRATCH_BYTES),
            (8, 0),
            (8, SCRATCH_BYTES + 1),
            (8, ARENA_BYTES_MAX * 2),
        ] {
            let huge_pages = false;
            assert!(!Geometry { slots, arena_bytes, huge_pages }.is_valid(), "{slots} {arena_bytes}");
        }
    }
}
