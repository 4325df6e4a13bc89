//! placeholder until the crash page lands
use std::sync::atomic::AtomicU64;
/// Bytes.
pub const CRASH_PAGE_BYTES: usize = 16384;
/// page
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct CrashPage {
    words: [AtomicU64; CRASH_PAGE_BYTES / 8],
}
