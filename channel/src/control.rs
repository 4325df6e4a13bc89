//! Messages on the control socket: the handshake and the lives of sessions. Calls never come this way.
//!
//! The socket is a `SOCK_SEQPACKET` pair, so a frame is a packet: it arrives whole or not at all, and there is no reassembly to get
//! wrong. A frame larger than [`FRAME_BYTES_MAX`] is a breach.
//!
//! The first frame of each side is a [`Hello`] of fixed layout, which stays the same in all versions, so that any two builds can tell each other that they do
//! not fit. Everything after it is postcard-encoded and may change with [`PROTOCOL_VERSION`].

use crate::layout::{LAYOUT_HASH, MAGIC, PROTOCOL_VERSION};
use crate::placement::{Failure, Placed, Wanted};
use crate::wait::Policy;
use serde::{Deserialize, Serialize};

/// The first argument of a worker's command line; the second is the host's process id. The control socket is its standard input.
pub const WORKER_MARKER: &str = "--hotcell-worker";

/// Largest frame on the control socket.
pub const FRAME_BYTES_MAX: usize = 4096;

/// The first frame of each side: 32 bytes, little-endian.
///
/// | bytes | what |
/// |---|---|
/// | 0..8 | magic, `hotcell\0` |
/// | 8..12 | protocol version |
/// | 12..16 | process id of the sender |
/// | 16..24 | layout hash |
/// | 24..32 | zero |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Must be [`MAGIC`].
    pub magic: u64,
    /// The sender's [`PROTOCOL_VERSION`].
    pub protocol: u32,
    /// The sender's process id, for the log only.
    pub pid: u32,
    /// The sender's [`LAYOUT_HASH`].
    pub layout_hash: u64,
}

/// What does not fit between two hellos.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// It is not a hello at all.
    #[error("the first frame is not a hello: {bytes} bytes, magic {magic:#018x}")]
    NotHello {
        /// The frame's length.
        bytes: usize,
        /// Its first eight bytes, or zero.
        magic: u64,
    },
    /// Another protocol version.
    #[error("protocol version {theirs} where {ours} is spoken here")]
    Version {
        /// This build's version.
        ours: u32,
        /// The other side's.
        theirs: u32,
    },
    /// The same version with other sizes: builds that were not made from the same source.
    #[error("layout {theirs:#018x} where this build has {ours:#018x}")]
    Layout {
        /// This build's layout hash.
        ours: u64,
        /// The other side's.
        theirs: u64,
    },
}

impl Hello {
    /// Encoded size.
    pub const BYTES: usize = 32;

    /// This build's hello.
    pub fn ours() -> Self {
        Self { magic: MAGIC, protocol: PROTOCOL_VERSION, pid: std::process::id(), layout_hash: LAYOUT_HASH }
    }

    /// The frame.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut frame = [0; Self::BYTES];
        frame[0..8].copy_from_slice(&self.magic.to_le_bytes());
        frame[8..12].copy_from_slice(&self.protocol.to_le_bytes());
        frame[12..16].copy_from_slice(&self.pid.to_le_bytes());
        frame[16..24].copy_from_slice(&self.layout_hash.to_le_bytes());
        frame
    }

    /// Reads the other side's frame and compares it with this build.
    ///
    /// # Errors
    /// The first thing that does not fit, in the order magic, version, layout.
    pub fn check(frame: &[u8]) -> Result<Self, Mismatch> {
        let u64_at =
            |at: usize| frame.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().unwrap_or([0; 8])));
        let u32_at =
            |at: usize| frame.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().unwrap_or([0; 4])));
        let not_hello = Mismatch::NotHello { bytes: frame.len(), magic: u64_at(0).unwrap_or(0) };
        let (Some(magic), Some(protocol), Some(pid), Some(layout_hash)) =
            (u64_at(0), u32_at(8), u32_at(12), u64_at(16))
        else {
            return Err(not_hello);
        };
        if magic != MAGIC {
            return Err(not_hello);
        }
        if protocol != PROTOCOL_VERSION {
            return Err(Mismatch::Version { ours: PROTOCOL_VERSION, theirs: protocol });
        }
        if layout_hash != LAYOUT_HASH {
            return Err(Mismatch::Layout { ours: LAYOUT_HASH, theirs: layout_hash });
        }
        if frame.len() != Self::BYTES {
            return Err(not_hello);
        }
        Ok(Self { magic, protocol, pid, layout_hash })
    }
}

/// What the host says after its hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToWorker {
    /// Start a session. Comes with one descriptor: its region.
    Open {
        /// The session's number.
        session: u32,
        /// Ring slots of the region.
        slots: u32,
        /// Arena bytes of the region.
        arena_bytes: u64,
        /// How the session's thread waits.
        policy: Policy,
        /// Stack of the session's thread, in bytes.
        stack_bytes: u64,
        /// Where its thread and its memory are to be.
        placement: Wanted,
    },
    /// Limits of the whole process, before the first session is opened. Only sent if they differ from [`WorkerLimits::default`].
    LimitWorker(WorkerLimits),
    /// Limits of a session, before its [`ToWorker::Open`]. Only sent if there are any.
    LimitSession {
        /// The session's number.
        session: u32,
        /// What it may use.
        limits: SessionLimits,
    },
}

/// What the worker's process limits itself to, before it loads anything. `None`: as the operating system has it for the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerLimits {
    /// `RLIMIT_DATA`, in bytes beyond what the worker itself has and what its sessions' threads take.
    pub data_bytes: Option<u64>,
    /// CPU time of all threads, in nanoseconds.
    pub cpu_time_ns: Option<u64>,
    /// `RLIMIT_NOFILE`.
    pub open_files: Option<u64>,
    /// `RLIMIT_NPROC`: processes and threads of the whole user.
    pub user_processes: Option<u64>,
    /// `RLIMIT_FSIZE`, in bytes.
    pub file_bytes: Option<u64>,
    /// `RLIMIT_CORE`, in bytes.
    pub core_bytes: u64,
}

/// What a session may use. `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionLimits {
    /// CPU time of its thread in one call, in nanoseconds.
    pub cpu_time_per_call_ns: Option<u64>,
    /// CPU time of its thread in all, in nanoseconds.
    pub cpu_time_ns: Option<u64>,
    /// Bytes that its thread and modules may have allocated at a time.
    pub memory_bytes: Option<u64>,
}

/// What a session could not have because of a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scarce {
    /// A descriptor: `RLIMIT_NOFILE`.
    OpenFiles,
    /// A thread: `RLIMIT_NPROC` or `pids.max`.
    Processes,
}

/// What the worker says after its hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// The session's thread listens.
    Opened {
        /// The session's number.
        session: u32,
        /// Where the arena lies in the worker: the base of the addresses that the host writes into requests. The host never dereferences it.
        arena_address: u64,
    },
    /// The session could not be started.
    Refused {
        /// The session's number.
        session: u32,
        /// Why; untrusted text.
        reason: String,
    },
    /// As `Opened`, for a session that asked for a placement: it was all done, and this is the kernel's account of it.
    Placed {
        /// The session's number.
        session: u32,
        /// As in `Opened`.
        arena_address: u64,
        /// What was done.
        placed: Placed,
    },
    /// As `Refused`: a part of the placement could not be done.
    Unplaced {
        /// The session's number.
        session: u32,
        /// Which, and what the kernel said.
        failure: Failure,
    },
    /// The session could not be started because of a limit.
    Scarce {
        /// The session's number.
        session: u32,
        /// Of what there was not enough.
        what: Scarce,
    },
}

/// A frame that is no message of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a control frame of {bytes} bytes is no message of this version")]
pub struct BadFrame {
    /// The frame's length.
    pub bytes: usize,
}

/// Encodes a message as one frame.
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    // Encoding plain enums and strings into memory cannot fail.
    postcard::to_allocvec(message).unwrap_or_default()
}

/// Decodes one frame, all of it.
///
/// # Errors
/// [`BadFrame`] if it is no message, or has bytes behind it.
pub fn decode<'a, M: Deserialize<'a>>(frame: &'a [u8]) -> Result<M, BadFrame> {
    let bad = BadFrame { bytes: frame.len() };
    match postcard::take_from_bytes(frame) {
        Ok((message, [])) => Ok(message),
        _ => Err(bad),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hello_comes_back_as_sent() {
        assert_eq!(Hello::check(&Hello::ours().encode()), Ok(Hello::ours()));
    }

    #[test]
    fn each_mismatch_has_its_own_error() {
        let ours = Hello::ours();
        let check = |h: Hello| Hello::check(&h.encode());
        assert!(matches!(check(Hello { magic: 1, ..ours }), Err(Mismatch::NotHello { magic: 1, .. })));
        assert!(matches!(check(Hello { protocol: 9, ..ours }), Err(Mismatch::Version { theirs: 9, .. })));
        assert!(matches!(check(Hello { layout_hash: 9, ..ours }), Err(Mismatch::Layout { theirs: 9, .. })));
        assert!(matches!(Hello::check(&ours.encode()[..31]), Err(Mismatch::NotHello { .. })));
        assert!(matches!(Hello::check(&[]), Err(Mismatch::NotHello { .. })));
    }

    #[test]
    fn messages_come_back_and_trailing_bytes_are_refused() {
        let message = ToHost::Refused { session: 3, reason: "no".into() };
        let mut frame = encode(&message);
        assert_eq!(decode::<ToHost>(&frame), Ok(message));
        frame.push(0);
        assert!(decode::<ToHost>(&frame).is_err());
    }

    proptest! {
        #[test]
        fn no_frame_makes_the_decoders_panic(frame in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Hello::check(&frame);
            let _ = decode::<ToHost>(&frame);
            let _ = decode::<ToWorker>(&frame);
        }
    }
}
