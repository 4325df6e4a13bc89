//! 64 bytes each way through the kernel, with blocking reads and writes: a Unix stream socket, and a pair of pipes.

use std::fs::File;
use std::io::{Read, Write, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::Result;
use crate::cpus::Cpus;
use crate::measure::Row;
use crate::process::{Caller, Peer};
use crate::roster::Roster;

pub const ROLE: &str = "peer/bytes";

pub fn enlist(roster: &mut Roster) {
    roster.add("peer/unix_socket", ByteRow::over_socket);
    roster.add("peer/pipe", ByteRow::over_pipes);
}

type Message = [u8; 64];

/// Dropped in this order: the peer ends when it reads the end of its input.
struct ByteRow {
    output: File,
    input: File,
    _peer: Peer,
}

impl ByteRow {
    fn over_socket(cpus: &Cpus) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let (our_copy, their_copy) = (ours.try_clone()?, theirs.try_clone()?);
        Self::start(cpus, [our_copy.into(), ours.into()], [their_copy.into(), theirs.into()])
    }

    fn over_pipes(cpus: &Cpus) -> Result<Self> {
        let (their_input, our_output) = pipe()?;
        let (our_input, their_output) = pipe()?;
        Self::start(cpus, [our_input.into(), our_output.into()], [their_input.into(), their_output.into()])
    }

    fn start(cpus: &Cpus, [input, output]: [OwnedFd; 2], theirs: [OwnedFd; 2]) -> Result<Self> {
        let peer = Peer::start(cpus, ROLE, &[], &theirs.each_ref().map(AsFd::as_fd))?;
        Ok(Self { output: output.into(), input: input.into(), _peer: peer })
    }
}

impl Row for ByteRow {
    const IDLES: bool = true;

    #[inline(always)]
    fn call(&mut self, a: i32, b: i32) -> i32 {
        let mut message: Message = [0; 64];
        message[..4].copy_from_slice(&a.to_le_bytes());
        message[4..8].copy_from_slice(&b.to_le_bytes());
        self.output.write_all(&message).expect("the peer reads");
        self.input.read_exact(&mut message).expect("the peer answers");
        integer(&message, 0)
    }
}

pub fn serve(mut caller: Caller) -> Result<()> {
    let mut input = File::from(caller.descriptor(0)?);
    let mut output = File::from(caller.descriptor(1)?);
    caller.ready()?;
    let mut message: Message = [0; 64];
    while input.read_exact(&mut message).is_ok() {
        let sum = crate::add(integer(&message, 0), integer(&message, 4));
        message[..4].copy_from_slice(&sum.to_le_bytes());
        output.write_all(&message)?;
    }
    Ok(())
}

fn integer(message: &Message, at: usize) -> i32 {
    i32::from_le_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]])
}
