//! The program in the hot cell: it loads native modules, serves calls from shared memory and leaves a report when it crashes.
//!
//! There are two ways to run it: the lean binary `hotcell-worker` of this package, and the host's own executable, started again by
//! `hotcell`'s feature `self-exec`. Both end in [`run`].
//!
//! **What it does not do:** decide anything. It trusts its host, does what the host says, and dies with it. Its API is
//! for `hotcell` and is not stable.
//!
//! Order of a start, one step per line of [`run`]: take the control socket from standard input, tie to the host, close every other descriptor,
//! reset signals, say hello and check the host's, map the crash page, install the crash handler and the limits, serve the control socket. No foreign code is
//! loaded before all of that is done.

mod allocations;
mod control;
mod crash_handler;
mod dispatch;
mod library;
mod limits;
mod linker;
mod memory;
mod meter;
mod serve;
mod stream;

pub use control::{EXIT_HOST_GONE, EXIT_LIMITS, EXIT_NO_SOCKET, EXIT_PROTOCOL};
#[doc(hidden)]
pub use dispatch::InProcess;
use hotcell_channel::control::WORKER_MARKER;

/// The host's process id, if these are a worker's arguments (without the program's name).
pub fn host_of_worker_arguments<'a>(mut arguments: impl Iterator<Item = &'a [u8]>) -> Option<u32> {
    if arguments.next()? != WORKER_MARKER.as_bytes() {
        return None;
    }
    let host = std::str::from_utf8(arguments.next()?).ok()?.parse().ok()?;
    arguments.next().is_none().then_some(host)
}

/// Becomes a worker of the process `host` and does not return.
///
/// Standard input must be the worker's end of the control socket. Exit codes of its own: [`EXIT_NO_SOCKET`],
/// [`EXIT_HOST_GONE`], [`EXIT_PROTOCOL`], [`EXIT_LIMITS`].
pub fn run(host: u32) -> ! {
    let socket = control::take_socket();
    control::tie_to_host(host);
    control::close_other_descriptors(&socket);
    hotcell_channel::sys::reset_signals();
    let crash_page = control::handshake(&socket);
    crash_handler::install(crash_page);
    limits::install(crash_page);
    control::serve(&socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_arguments_make_a_worker() {
        let host = |arguments: &[&str]| host_of_worker_arguments(arguments.iter().map(|a| a.as_bytes()));
        assert_eq!(host(&["--hotcell-worker", "12"]), Some(12));
        for other in [
            &[][..],
            &["12"],
            &["--hotcell-worker"],
            &["--hotcell-worker", "x"],
            &["--hotcell-worker", "1", "2"],
        ] {
            assert_eq!(host(other), None, "{other:?}");
        }
    }
}
