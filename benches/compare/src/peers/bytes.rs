//! 64 bytes each way through the kernel: a Unix stream socket and a pair of pipes with blocking reads and writes, and the same socket
//! with both sides polling it, so that nobody is ever woken.

use std::fs::File;
use std::hint::spin_loop;
use std::io::{ErrorKind, Read, Write, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::Result;
use crate::cpus::Cpus;
use crate::floor::{check, operands};
use crate::measure::Row;
use crate::process::{Caller, Peer};

pub const ROLE: &str = "peer/bytes";
pub const POLLING_ROLE: &str = "peer/bytes polling";
pub const LARGE_ROLE: &str = "peer/large bytes";

type Message = [u8; 64];

/// Dropped in this order: the peer ends when it reads the end of its input.
pub struct Bytes {
    output: File,
    input: File,
    peer: Peer,
}

impl Bytes {
    pub fn over_socket(cpus: &Cpus) -> Result<Self> {
        Self::over_socket_to(cpus, ROLE, false)
    }

    pub fn over_pipes(cpus: &Cpus) -> Result<Self> {
        let (their_input, our_output) = pipe()?;
        let (our_input, their_output) = pipe()?;
        let (ours, theirs) =
            ([our_input.into(), our_output.into()], [their_input.into(), their_output.into()]);
        Self::start(cpus, ROLE, ours, theirs)
    }

    fn over_socket_to(cpus: &Cpus, role: &str, polling: bool) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(polling)?;
        theirs.set_nonblocking(polling)?;
        let (our_copy, their_copy) = (ours.try_clone()?, theirs.try_clone()?);
        Self::start(cpus, role, [our_copy.into(), ours.into()], [their_copy.into(), theirs.into()])
    }

    fn start(cpus: &Cpus, role: &str, [input, output]: [OwnedFd; 2], theirs: [OwnedFd; 2]) -> Result<Self> {
        let peer = Peer::start(cpus, role, &[], &theirs.each_ref().map(AsFd::as_fd))?;
        Ok(Self { output: output.into(), input: input.into(), peer })
    }

    /// The peer's process.
    pub fn process(&self) -> u32 {
        self.peer.process()
    }
}

fn request(a: i32, b: i32) -> Message {
    let mut message: Message = [0; 64];
    message[..4].copy_from_slice(&a.to_le_bytes());
    message[4..8].copy_from_slice(&b.to_le_bytes());
    message
}

impl Row for Bytes {
    const IDLES: bool = true;

    #[inline(always)]
    fn step(&mut self, number: u64) {
        let (a, b) = operands(number);
        let mut message = request(a, b);
        self.output.write_all(&message).expect("the peer reads");
        self.input.read_exact(&mut message).expect("the peer answers");
        check(integer(&message, 0), (a, b));
    }
}

fn answer(message: &mut Message) {
    let sum = crate::add(integer(message, 0), integer(message, 4));
    message[..4].copy_from_slice(&sum.to_le_bytes());
}

pub fn serve(mut caller: Caller) -> Result<()> {
    let mut input = File::from(caller.descriptor(0)?);
    let mut output = File::from(caller.descriptor(1)?);
    caller.ready()?;
    let mut message: Message = [0; 64];
    while input.read_exact(&mut message).is_ok() {
        answer(&mut message);
        output.write_all(&message)?;
    }
    Ok(())
}

/// In the last byte of a message: the peer goes back to its gate.
const LEAVE: u8 = 1;

/// The Unix socket, polled by both sides.
pub struct Polled(Bytes);

impl Polled {
    pub fn open(cpus: &Cpus) -> Result<Self> {
        cpus.require_two()?;
        Bytes::over_socket_to(cpus, POLLING_ROLE, true).map(Self)
    }

    #[inline(always)]
    fn exchange(&mut self, message: &mut Message) {
        self.0.output.write_all(message).expect("there is room for one message");
        assert!(poll(&mut self.0.input, message).expect("the peer answers"), "the peer answers");
    }
}

/// Reads a message; `false` at the end of the stream. Messages of this size are written in one piece.
#[inline(always)]
fn poll(input: &mut File, message: &mut Message) -> Result<bool> {
    loop {
        match input.read(message) {
            Ok(64) => return Ok(true),
            Ok(0) => return Ok(false),
            Ok(part) => return Err(format!("a message of {part} bytes").into()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
}

impl Row for Polled {
    #[inline(always)]
    fn step(&mut self, number: u64) {
        let (a, b) = operands(number);
        let mut message = request(a, b);
        self.exchange(&mut message);
        check(integer(&message, 0), (a, b));
    }

    fn wake(&mut self) {
        self.0.peer.wake();
    }

    fn rest(&mut self) {
        let mut message = request(0, 0);
        message[63] = LEAVE;
        self.exchange(&mut message);
    }
}

pub fn serve_polling(mut caller: Caller) -> Result<()> {
    let mut input = File::from(caller.descriptor(0)?);
    let mut output = File::from(caller.descriptor(1)?);
    caller.ready()?;
    let mut message: Message = [0; 64];
    while caller.wait_at_gate() {
        loop {
            if !poll(&mut input, &mut message)? {
                return Ok(());
            }
            answer(&mut message);
            output.write_all(&message)?;
            if message[63] == LEAVE {
                break;
            }
        }
    }
    Ok(())
}

/// Many bytes over the socket and back, with blocking reads and writes: the other side changes the first and the last.
pub struct Large {
    socket: UnixStream,
    bytes: Vec<u8>,
    _peer: Peer,
}

impl Large {
    pub fn open(cpus: &Cpus, bytes: usize) -> Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let peer = Peer::start(cpus, LARGE_ROLE, &[&bytes.to_string()], &[theirs.as_fd()])?;
        Ok(Self { socket, bytes: vec![0; bytes], _peer: peer })
    }
}

impl Row for Large {
    const IDLES: bool = true;

    #[inline(always)]
    fn step(&mut self, _number: u64) {
        let (next, last) = (self.bytes[0].wrapping_add(1), self.bytes.len() - 1);
        self.socket.write_all(&self.bytes).expect("the peer reads all before it answers");
        self.socket.read_exact(&mut self.bytes).expect("the peer answers");
        assert_eq!((self.bytes[0], self.bytes[last]), (next, next), "both edges are changed");
    }
}

pub fn serve_large(mut caller: Caller) -> Result<()> {
    let mut socket = UnixStream::from(caller.descriptor(0)?);
    let mut bytes = vec![0_u8; caller.argument(1)?.parse()?];
    caller.ready()?;
    let last = bytes.len() - 1;
    while socket.read_exact(&mut bytes).is_ok() {
        bytes[0] = bytes[0].wrapping_add(1);
        bytes[last] = bytes[last].wrapping_add(1);
        socket.write_all(&bytes)?;
    }
    Ok(())
}

fn integer(message: &Message, at: usize) -> i32 {
    i32::from_le_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]])
}
