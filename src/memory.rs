//! Memory of a session: its limit, what it has in use, and a death that comes of it.
//!
//! The worker counts, since only it sees the allocations, and refuses. What it says of that is untrusted like everything from a worker: a limit that the host did not set was not
//! exceeded, whatever a worker says.

use crate::crash::Cause;
use crate::error::{CallError, StartError};
use crate::limits::Limited;
use crate::session::{Session, SessionBuilder, SessionInner};
use hotcell_channel::crash::{CrashFacts, Refusal};
use hotcell_channel::sys::WaitStatus;
use std::sync::Arc;

/// Smallest limit of a session's memory: less than that is used up by what a C library allocates for itself.
const BYTES_MIN: u64 = 64 << 10;
/// Largest: more than a process has addresses for.
const BYTES_MAX: u64 = 1 << 47;

/// Whether a session can have this limit.
pub(crate) fn check(limit: Option<u64>) -> Result<(), StartError> {
    match limit {
        Some(bytes) if !(BYTES_MIN..=BYTES_MAX).contains(&bytes) => Err(StartError::Configuration {
            option: "memory_bytes_max",
            given: bytes.to_string(),
            expected: "64 KiB to 128 TiB",
        }),
        _ => Ok(()),
    }
}

/// # Memory
impl SessionBuilder {
    /// Default: none. Most bytes that the session's thread, and the threads that its modules start, may have allocated at a time; 64 KiB to 128 TiB.
    ///
    /// An allocation beyond it gives the code a null pointer, as if there were no more memory. If the call lives through that, it ends as
    /// [`CallError::SessionMemoryExceeded`] and the session goes on; if the code crashes, aborts or exits, the worker has ended by [`Cause::MemoryExceeded`].
    ///
    /// Counted are the calls of `malloc` and its kin, `operator new` and `mmap`, made by any library in the worker, the C library included. Not counted are the arena and the
    /// stacks of threads, static data of libraries, and what code allocates in ways of its own: by system calls, by an allocator that is linked into it, through pointers
    /// that it looked up itself. So the limit holds for code that allocates as code does, not for code that means to get around it: give a session that must have a hard
    /// limit a worker of its own. `docs/limits.md` has the whole account.
    ///
    /// A call of a session with a limit costs a comparison more than without; an allocation in it an addition to the session's account, and sixteen bytes.
    pub fn memory_bytes_max(mut self, bytes: u64) -> Self {
        self.limits.memory_bytes = Some(bytes);
        self
    }
}

/// What a session with a memory limit has allocated, as its worker counts it: [`Session::memory`]. Untrusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionMemory {
    /// Bytes in use, as the allocator rounds them up.
    pub used_bytes: u64,
    /// The most that were in use at a time.
    pub peak_bytes: u64,
    /// The limit.
    pub bytes_max: u64,
    /// Allocations that were refused so far, in calls and between them.
    pub refusals: u64,
}

/// # Memory
impl Session {
    /// What the session has allocated, if it has a [limit](SessionBuilder::memory_bytes_max); without one nothing is counted and this is `None`. It is a request to
    /// the session's thread: it waits for the calls before it. Threads of the session's modules may be changing the numbers meanwhile.
    ///
    /// # Errors
    /// As for any call.
    pub fn memory(&self) -> Result<Option<SessionMemory>, CallError> {
        let Some(bytes_max) = self.inner().options.limits.memory_bytes else { return Ok(None) };
        let [used_bytes, peak_bytes, refusals] = self.inner().memory_counts()?;
        Ok(Some(SessionMemory { used_bytes, peak_bytes, bytes_max, refusals }))
    }
}

/// The cause of a death that comes of a session's limit, and the session: code that was refused memory and did not live through it.
pub(crate) fn exceeded(
    refusals: &[Refusal],
    sessions: &[Arc<SessionInner>],
    status: WaitStatus,
    facts: Option<&CrashFacts>,
) -> Option<(Cause, u32)> {
    let died_of = |refusal: &&Refusal| match (status, facts) {
        (WaitStatus::Exited(_), _) => true,
        (WaitStatus::Signaled { signal, .. }, Some(facts)) => {
            facts.signal == signal
                && !facts.stack_overflow
                && (facts.thread == refusal.thread || facts.session == Some(refusal.session))
        }
        // No crash handler ran: a signal that code raises by its own doing, with the handler gone.
        (WaitStatus::Signaled { signal, .. }, None) => {
            matches!(signal, libc::SIGSEGV | libc::SIGBUS | libc::SIGABRT | libc::SIGILL | libc::SIGTRAP)
        }
        (WaitStatus::Unknown, _) => false,
    };
    refusals.iter().filter(died_of).find_map(|refusal| {
        let session = sessions.iter().find(|session| session.id() == refusal.session)?;
        let bytes_max = session.options.limits.memory_bytes?;
        let signal = match status {
            WaitStatus::Signaled { signal, .. } => Some(signal),
            _ => None,
        };
        Some((Cause::MemoryExceeded { scope: Limited::Session, bytes_max, signal }, refusal.session))
    })
}
