#![allow(unsafe_code)]
//! How a process ends, or does not, and whom it leaves behind.

use crate::peer::{Peer, Session};
use hotcell_channel::slot::Progress;
use nix::sys::signal::{SigHandler, Signal, raise};
use nix::unistd::{ForkResult, Pid, fork, getppid};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// `alarm`: the kernel ends this process after so many seconds.
pub(crate) fn end_after_seconds(seconds: u32) {
    nix::unistd::alarm::set(seconds);
}

pub(crate) fn sleep_for_ever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

pub(crate) fn die(code: i32) -> ! {
    hotcell_channel::sys::exit_now(code)
}

pub(crate) fn exit(code: u64) -> ! {
    die(i32::try_from(code).unwrap_or(1))
}

/// Ends this process by a signal, without any handler.
pub(crate) fn signal(number: u64) -> ! {
    if let Ok(signal) = i32::try_from(number).map_err(drop).and_then(|n| Signal::try_from(n).map_err(drop)) {
        // SAFETY: SIG_DFL runs no code. It fails for SIGKILL and SIGSTOP, which have no handlers anyway.
        let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) };
        let _ = raise(signal);
    }
    sleep_for_ever()
}

/// Leaves SIGTERM without effect.
pub(crate) fn ignore_termination() {
    // SAFETY: SIG_IGN runs no code.
    let _ = unsafe { nix::sys::signal::signal(Signal::SIGTERM, SigHandler::SigIgn) };
}

/// Closes the control socket and lives on.
pub(crate) fn close_socket(peer: &Peer) -> ! {
    // SAFETY: the descriptor's owner is never dropped or used again: this function does not return, and other threads only find a closed
    // descriptor.
    unsafe { libc::close(peer.socket().as_raw_fd()) };
    sleep_for_ever()
}

/// Forks. The parent returns; the child runs `body` and ends. It tells its number on standard error, so that the test can end it.
fn grandchild(body: impl FnOnce()) {
    // SAFETY: the child is a copy of the calling thread only. It uses no lock that another thread could have held: no allocation, only atomics and
    // system calls; and the write below, which takes no lock of the standard library's either.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            // The parent's alarm is not inherited.
            end_after_seconds(600);
            body();
            die(0)
        }
        Ok(ForkResult::Parent { child }) => eprintln!("grandchild {child}"),
        Err(error) => eprintln!("hotcell-hostile: fork: {error}"),
    }
}

/// A process that goes on writing states, words and counters when its parent has died. It has the socket, the pipes and the region.
pub(crate) fn leave_a_scribbler(session: &Session, states: &'static [u32]) {
    let (region, slots) = (session.region, session.slots());
    grandchild(move || {
        let progress: &Progress = region.progress();
        loop {
            for state in states {
                for slot in &slots {
                    slot.forge_state(*state);
                    slot.set_word(1, u64::MAX);
                }
                progress.take_direct(u64::MAX);
                region.bell().ring();
            }
        }
    });
}

/// A process that traces its parent, so that nobody else can collect it, and never lets go. `stop_at_exit`: it also has the kernel stop the parent in the
/// middle of its end, killed or not.
pub(crate) fn leave_a_tracer(stop_at_exit: bool) {
    use nix::sys::ptrace::Options;
    grandchild(move || {
        let parent = getppid();
        let options = if stop_at_exit { Options::PTRACE_O_TRACEEXIT } else { Options::empty() };
        let traced = nix::sys::ptrace::seize(parent, options);
        // The parent waits for this signal to know that it is traced.
        if traced.is_ok() {
            let _ = nix::sys::signal::kill(parent, Signal::SIGCONT);
        }
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    // Until the kernel says that somebody traces us.
    for _ in 0..500 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        if tracer.is_some_and(|pid| pid.trim() != "0") {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    eprintln!("hotcell-hostile: tracing the parent is not allowed here");
}

/// A process that only holds on to everything.
pub(crate) fn leave_a_holder() {
    grandchild(|| {
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    });
}

/// Stops this process, as a debugger would.
pub(crate) fn stop() {
    let _ = nix::sys::signal::kill(Pid::this(), Signal::SIGSTOP);
}
