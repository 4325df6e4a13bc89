//! The other process: this executable, started once more with a role.
//!
//! ```text
//! caller                                                peer
//! start ── argv: --peer ROLE PARENT ARGUMENTS.. ──────►  dies with its parent; opens its side
//!       ◄── control socket (its stdin): "ready\n" ─────  or the reason why it cannot, and exit
//! wake  ── one byte ──────────────────────────────────►  a spinning peer leaves its gate
//! drop  ── end of file ───────────────────────────────►  a spinning peer in its gate returns
//! ```
//!
//! Peers that block in their own mechanism need no gate: they end when that closes. Whoever does not end in time is
//! killed, by pid, and every peer is waited for.

use std::env;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, parent_id};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::Result;
use crate::cpus::Cpus;

const MARKER: &str = "--peer";
const READY: &str = "ready";
const START_LIMIT: Duration = Duration::from_secs(10);
const END_LIMIT: Duration = Duration::from_secs(2);

/// A running peer, as the caller holds it. Dropping it ends the process.
pub struct Peer {
    child: Child,
    control: UnixStream,
}

impl Peer {
    /// Starts a peer, waits until it is ready, and puts it on its CPU. It inherits `descriptors`, in this order, and nothing else.
    pub fn start(cpus: &Cpus, role: &str, arguments: &[&str], descriptors: &[BorrowedFd]) -> Result<Self> {
        let (control, theirs) = UnixStream::pair()?;
        let descriptors: Vec<_> = descriptors.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
        let mut command = Command::new(env::current_exe()?);
        command.args([MARKER, role, &std::process::id().to_string()]);
        command.args(descriptors.iter().map(ToString::to_string)).args(arguments);
        command.stdin(Stdio::from(OwnedFd::from(theirs)));
        let before_exec = move || {
            set_pdeathsig(Signal::SIGKILL)?;
            for &descriptor in &descriptors {
                // SAFETY: the caller borrows the descriptor to `start`, which outlives the fork.
                let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
                fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls only; it neither allocates nor locks.
        unsafe { command.pre_exec(before_exec) };

        let mut peer = Self { child: command.spawn()?, control };
        peer.await_ready()?;
        cpus.pin_peer(peer.child.id())?;
        Ok(peer)
    }

    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Opens the gate of a peer that is in it, or will be.
    pub fn wake(&mut self) {
        self.control.write_all(&[1]).expect("the peer lives, and reads its gate");
    }

    fn await_ready(&mut self) -> Result<()> {
        self.control.set_read_timeout(Some(START_LIMIT))?;
        let mut line = String::new();
        let read = BufReader::new(&self.control).read_line(&mut line);
        read.map_err(|error| format!("the peer did not get ready: {error}"))?;
        match line.trim_end() {
            READY => Ok(()),
            "" => Err("the peer ended before it was ready".into()),
            reason => Err(reason.into()),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.control.shutdown(std::net::Shutdown::Both);
        let limit = Instant::now() + END_LIMIT;
        while Instant::now() < limit {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        eprintln!("peer {} did not end by itself and is killed", self.child.id());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The caller, as the peer sees it.
pub struct Caller {
    control: UnixStream,
    arguments: Vec<String>,
}

impl Caller {
    /// An argument from [`Peer::start`]: first the descriptors, then the others.
    pub fn argument(&self, index: usize) -> Result<&str> {
        self.arguments.get(index).map(String::as_str).ok_or_else(|| "an argument is missing".into())
    }

    /// An inherited descriptor. Each may be taken once.
    pub fn descriptor(&self, index: usize) -> Result<OwnedFd> {
        let descriptor = self.argument(index)?.parse()?;
        // SAFETY: the caller left this descriptor open for us, and each role takes each of its own once.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }

    /// The peer's side is open: calls may come.
    pub fn ready(&mut self) -> Result<()> {
        Ok(writeln!(self.control, "{READY}")?)
    }

    /// Sleeps until this row's turn; `false` when there will be none.
    pub fn wait_at_gate(&mut self) -> bool {
        self.control.read_exact(&mut [0]).is_ok()
    }
}

/// The role these arguments name, if this process was started as a peer.
pub fn role(arguments: &[String]) -> Option<&str> {
    match arguments {
        [marker, role, ..] if marker == MARKER => Some(role),
        _ => None,
    }
}

/// The main function of a peer.
pub fn run_as_peer(
    role: &str,
    arguments: &[String],
    serve: impl FnOnce(&str, Caller) -> Result<()>,
) -> ExitCode {
    let (parent, arguments) = match arguments {
        [_, _, parent, rest @ ..] => (parent.parse().ok(), rest.to_vec()),
        _ => (None, Vec::new()),
    };
    if parent != Some(parent_id()) {
        return ExitCode::FAILURE; // orphaned before the death signal was set, or started by hand
    }
    let Ok(control) = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from) else {
        return ExitCode::FAILURE;
    };
    let Ok(mut reply) = control.try_clone() else { return ExitCode::FAILURE };
    match serve(role, Caller { control, arguments }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let reason = error.to_string().replace('\n', " ");
            let _ = writeln!(reply, "{reason}");
            ExitCode::FAILURE
        }
    }
}

/// The role of a process that has nothing to do with anybody, and is never idle.
pub const BUSY: &str = "busy";

/// Counts for ever, until its parent ends it.
pub fn serve_busy(mut caller: Caller) -> Result<()> {
    let mut hang_up = caller.control.try_clone()?;
    thread::spawn(move || {
        let _ = hang_up.read(&mut [0]);
        std::process::exit(0);
    });
    caller.ready()?;
    let mut number = 0_u64;
    loop {
        number = std::hint::black_box(number.wrapping_add(1));
    }
}
