//! A session's own requests: loading, resolving and memory, which go through the slot like any call and so share its deadline,
//! its crash handling and its place in the queue.
//!
//! Function indexes below [`FUNCTIONS_BASE`](crate::layout::FUNCTIONS_BASE) are the session's own. Two kinds:
//!
//! | index | request words | reply words |
//! |---|---|---|
//! | [`NOP`] | | `OK` |
//! | [`DIRECTORY`] | address, length, capacity of a block with a [`Request`] | status, length of the [`Answer`] in the block |
//! | [`READ`] | target address (arena), source address, length | status |
//! | [`WRITE`] | source address (arena), target address, length | status |
//! | [`ALLOCATE`] | bytes | status, address |
//! | [`FREE`] | address | status |
//! | [`READ_STRING`] | target address (arena), source address, capacity | status, length |
//! | [`CLOSE`] | | `OK`, and the session's thread ends |
//! | [`MEMORY`] | | status, bytes in use, most bytes that were, allocations refused |
//! | [`STREAM`] | position of the next request, the host's barrier | `OK`, the barrier for both |
//! | [`STREAM_END`] (in the stream only) | | |

use crate::signature::Signature;
use serde::{Deserialize, Serialize};

/// Does nothing.
pub const NOP: u32 = 0;
/// Loads and resolves: see [`Request`].
pub const DIRECTORY: u32 = 1;
/// Copies worker memory into the arena, or fails with [`FAULT`].
pub const READ: u32 = 2;
/// Copies arena bytes into worker memory, or fails with [`FAULT`].
pub const WRITE: u32 = 3;
/// Allocates zeroed memory in the worker.
pub const ALLOCATE: u32 = 4;
/// Frees what [`ALLOCATE`] gave.
pub const FREE: u32 = 5;
/// Copies a NUL-terminated string into the arena, without its NUL.
pub const READ_STRING: u32 = 6;
/// Ends the session: frees its blocks, unloads its modules, ends its thread.
pub const CLOSE: u32 = 7;
/// Tells what a session with a memory limit has allocated; without one, [`BAD_REQUEST`].
pub const MEMORY: u32 = 8;
/// Switches the stream on: see [`crate::stream`].
pub const STREAM: u32 = 9;
/// The stream's last record: switches it off.
pub const STREAM_END: u32 = 10;
/// The highest of the session's own functions.
pub const FIXED_MAX: u32 = STREAM_END;

/// Status: done.
pub const OK: u64 = 0;
/// Status: an address was not readable or writable.
pub const FAULT: u64 = 1;
/// Status: the answer does not fit the block.
pub const TOO_LONG: u64 = 2;
/// Status: not an address that [`ALLOCATE`] gave.
pub const UNKNOWN_BLOCK: u64 = 3;
/// Status: no memory.
pub const NO_MEMORY: u64 = 4;
/// Status: the request is none of this version, or names a function that was never resolved.
pub const BAD_REQUEST: u64 = 5;

/// In the length word of a returned string: the string is longer than the limit that the request gave.
pub const STRING_LONGER: u64 = u64::MAX;
/// In the length word of a returned string: the function returned a null pointer.
pub const STRING_NULL: u64 = u64::MAX - 1;
/// In the length word of a returned string: the worker had no memory to keep a copy of it.
pub const STRING_LOST: u64 = u64::MAX - 2;
/// Words that a request has behind its arguments when the function returns a string: address of the room for it, bytes of room, longest length.
pub const STRING_WORDS: usize = 3;

/// Largest encoded [`Request`] or [`Answer`].
pub const DIRECTORY_BYTES_MAX: usize = 16 << 10;

/// A request to the session's directory of modules and functions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Load a shared library.
    Load {
        /// Path, or soname for the dynamic linker to find.
        name: Vec<u8>,
        /// Resolve all symbols at once (`RTLD_NOW`) rather than at first use.
        now: bool,
        /// Make its symbols visible to libraries loaded later (`RTLD_GLOBAL`).
        global: bool,
    },
    /// Find a symbol and prepare calls to it.
    Resolve {
        /// The module's number, as [`Answer::Loaded`] gave it.
        module: u32,
        /// The symbol's name.
        symbol: String,
        /// How it is called.
        signature: Signature,
        /// Whether replies carry `errno` as the call left it.
        errno: bool,
    },
}

/// The directory's answer. Untrusted, like everything from a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The module's number.
    Loaded(u32),
    /// The function's call index.
    Resolved(u32),
    /// It could not be done.
    Failed {
        /// What kind of failure.
        kind: FailureKind,
        /// The dynamic linker's or our own words.
        detail: String,
    },
}

/// Why a directory request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum FailureKind {
    /// No such file, or a soname that the dynamic linker does not find.
    NotFound,
    /// The file is there but cannot be read.
    Unreadable,
    /// The file is not an ELF object.
    NotElf,
    /// An ELF object of another machine or kind.
    WrongKind,
    /// A library that the module needs is missing.
    MissingDependency,
    /// A symbol that the module needs is missing.
    MissingImport,
    /// The dynamic linker failed for another reason.
    Linker,
    /// The module does not have the symbol.
    MissingSymbol,
    /// No such module in this session.
    UnknownModule,
    /// The session has as many functions as it can.
    TooManyFunctions,
    /// The signature cannot be called.
    BadSignature,
    /// The process has no descriptor left to open the file with.
    OpenFiles,
}
