//! The floors: the least that a call to another process costs, awake and asleep, with words and with bytes.

use std::hint::{black_box, spin_loop};
use std::os::fd::AsFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Result;
use crate::cpus::Cpus;
use crate::measure::Row;
use crate::memory::{Atoms, Record, Shared, TwoLines};
use crate::process::{Caller, Peer};

pub const RECORD: &str = "floor/record";
pub const TWO_LINES: &str = "floor/two lines";
pub const FUTEX: &str = "floor/futex";
/// A role, and the beginning of names of rows.
pub const COPY: &str = "floor/copy";

// The states of a record.
const IDLE: u32 = 0;
const REQUEST: u32 = 1;
const REPLY: u32 = 2;
/// The spinning peer goes back to its gate, the sleeping one ends.
const LEAVE: u32 = 3;

/// What a row with two numbers adds in step `number`.
#[inline(always)]
pub fn operands(number: u64) -> (i32, i32) {
    black_box((number as i32, 0x5eed_i32))
}

/// Checks the answer of a row with two numbers.
#[inline(always)]
pub fn check(sum: i32, (a, b): (i32, i32)) {
    assert_eq!(sum, crate::add(a, b), "the row's answer to add({a}, {b})");
}

/// Hands over and spins until it comes back.
#[inline(always)]
fn exchange(state: &AtomicU32) {
    state.store(REQUEST, Ordering::Release);
    while state.load(Ordering::Acquire) != REPLY {
        spin_loop();
    }
}

fn send_to_gate(state: &AtomicU32) {
    state.store(LEAVE, Ordering::Release);
    while state.load(Ordering::Acquire) != IDLE {
        spin_loop();
    }
}

fn serve_spinning(mut caller: Caller, state: &AtomicU32, mut answer: impl FnMut()) -> Result<()> {
    caller.ready()?;
    while caller.wait_at_gate() {
        loop {
            match state.load(Ordering::Acquire) {
                REQUEST => {
                    answer();
                    state.store(REPLY, Ordering::Release);
                }
                LEAVE => break,
                _ => spin_loop(),
            }
        }
        state.store(IDLE, Ordering::Release);
    }
    Ok(())
}

/// Memory and the other side of a row in which both sides spin.
struct Spinning<T> {
    shared: Shared<T>,
    peer: Peer,
}

impl<T: Atoms> Spinning<T> {
    fn open(cpus: &Cpus, role: &str, bytes: usize, arguments: &[&str]) -> Result<Self> {
        cpus.require_two()?;
        let shared = Shared::<T>::create(bytes)?;
        let peer = Peer::start(cpus, role, arguments, &[shared.as_fd()])?;
        Ok(Self { shared, peer })
    }
}

/// One record, two processes that spin, nothing else: no dispatch, no wake-ups, no checks, no deadline.
pub struct RecordRow(Spinning<Record>);

impl RecordRow {
    pub fn open(cpus: &Cpus) -> Result<Self> {
        Spinning::open(cpus, RECORD, 0, &[]).map(Self)
    }
}

impl Row for RecordRow {
    #[inline(always)]
    fn step(&mut self, number: u64) {
        let record = &*self.0.shared;
        let (a, b) = operands(number);
        record.write_request(a, b);
        exchange(&record.state);
        check(record.result(), (a, b));
    }

    fn wake(&mut self) {
        self.0.peer.wake();
    }

    fn rest(&mut self) {
        send_to_gate(&self.0.shared.state);
    }
}

pub fn serve_record(caller: Caller) -> Result<()> {
    let record = Shared::<Record>::open(caller.descriptor(0)?, 0)?;
    serve_spinning(caller, &record.state, || record.answer())
}

/// Eight doubles in a record of two lines, their sum in the first.
pub struct TwoLinesRow(Spinning<TwoLines>);

impl TwoLinesRow {
    pub fn open(cpus: &Cpus) -> Result<Self> {
        Spinning::open(cpus, TWO_LINES, 0, &[]).map(Self)
    }
}

/// The doubles of step `number`; their sum has no rounding.
#[inline(always)]
pub fn eight_doubles(number: u64) -> [f64; 8] {
    black_box([number as f64, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
}

impl Row for TwoLinesRow {
    #[inline(always)]
    fn step(&mut self, number: u64) {
        let record = &*self.0.shared;
        for (word, value) in record.words.iter().zip(eight_doubles(number)) {
            word.store(value.to_bits(), Ordering::Relaxed);
        }
        exchange(&record.state);
        assert_eq!(f64::from_bits(record.words[0].load(Ordering::Relaxed)), number as f64 + 28.0);
    }

    fn wake(&mut self) {
        self.0.peer.wake();
    }

    fn rest(&mut self) {
        send_to_gate(&self.0.shared.state);
    }
}

pub fn serve_two_lines(caller: Caller) -> Result<()> {
    let record = Shared::<TwoLines>::open(caller.descriptor(0)?, 0)?;
    serve_spinning(caller, &record.state, || {
        let sum: f64 = record.words.iter().map(|word| f64::from_bits(word.load(Ordering::Relaxed))).sum();
        record.words[0].store(sum.to_bits(), Ordering::Relaxed);
    })
}

/// The same record, and a futex wait and wake each way: neither side ever spins.
pub struct FutexRow {
    record: Shared<Record>,
    _peer: Peer,
}

impl FutexRow {
    pub fn open(cpus: &Cpus) -> Result<Self> {
        let record = Shared::<Record>::create(0)?;
        let peer = Peer::start(cpus, FUTEX, &[], &[record.as_fd()])?;
        Ok(Self { record, _peer: peer })
    }

    fn publish(&self, state: u32) {
        self.record.state.store(state, Ordering::Release);
        futex_wake(&self.record.state);
    }
}

impl Row for FutexRow {
    const IDLES: bool = true;

    #[inline(always)]
    fn step(&mut self, number: u64) {
        let (a, b) = operands(number);
        self.record.write_request(a, b);
        self.publish(REQUEST);
        while self.record.state.load(Ordering::Acquire) == REQUEST {
            futex_wait(&self.record.state, REQUEST);
        }
        check(self.record.result(), (a, b));
    }
}

impl Drop for FutexRow {
    fn drop(&mut self) {
        self.publish(LEAVE);
    }
}

pub fn serve_futex(mut caller: Caller) -> Result<()> {
    let record = Shared::<Record>::open(caller.descriptor(0)?, 0)?;
    caller.ready()?;
    loop {
        match record.state.load(Ordering::Acquire) {
            REQUEST => {
                record.answer();
                record.state.store(REPLY, Ordering::Release);
                futex_wake(&record.state);
            }
            LEAVE => return Ok(()),
            waiting => futex_wait(&record.state, waiting),
        }
    }
}

/// Bytes to the other process and back: a copy into shared memory, a bare record, a copy out. With `touch` the other side changes every
/// byte in between, otherwise the first and the last.
pub struct CopyRow {
    spinning: Spinning<Record>,
    bytes: Vec<u8>,
}

impl CopyRow {
    pub fn open(cpus: &Cpus, bytes: usize, touch: bool) -> Result<Self> {
        let touched = if touch { "touch" } else { "edges" };
        let spinning = Spinning::open(cpus, COPY, bytes, &[&bytes.to_string(), touched])?;
        Ok(Self { spinning, bytes: vec![0; bytes] })
    }
}

impl Row for CopyRow {
    #[inline(always)]
    fn step(&mut self, _number: u64) {
        let next = self.bytes[0].wrapping_add(1);
        self.spinning.shared.copy_in(&self.bytes);
        exchange(&self.spinning.shared.state);
        self.spinning.shared.copy_out(&mut self.bytes);
        assert_eq!((self.bytes[0], self.bytes[self.bytes.len() - 1]), (next, next), "both edges are changed");
    }

    fn wake(&mut self) {
        self.spinning.peer.wake();
    }

    fn rest(&mut self) {
        send_to_gate(&self.spinning.shared.state);
    }
}

pub fn serve_copy(caller: Caller) -> Result<()> {
    let (length, touch) = (caller.argument(1)?.parse()?, caller.argument(2)? == "touch");
    let shared = Shared::<Record>::open(caller.descriptor(0)?, length)?;
    serve_spinning(caller, &shared.state, || {
        // SAFETY: so many bytes are mapped, for as long as `shared` lives, and they are this side's until it answers.
        let bytes = unsafe { std::slice::from_raw_parts_mut(shared.bytes(), length) };
        if touch {
            bytes.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
        } else {
            bytes[0] = bytes[0].wrapping_add(1);
            bytes[length - 1] = bytes[length - 1].wrapping_add(1);
        }
    })
}

/// The same bytes copied twice within this process: what the bar for buffers counts besides the record.
pub struct MemcpyRow {
    from: Vec<u8>,
    between: Vec<u8>,
}

impl MemcpyRow {
    pub fn new(bytes: usize) -> Self {
        Self { from: vec![0; bytes], between: vec![0; bytes] }
    }
}

impl Row for MemcpyRow {
    #[inline(always)]
    fn step(&mut self, _number: u64) {
        let next = self.from[0].wrapping_add(1);
        self.from[0] = next;
        black_box(&mut self.between).copy_from_slice(black_box(&self.from));
        black_box(&mut self.from).copy_from_slice(black_box(&self.between));
        assert_eq!(self.from[0], next);
    }
}

/// Sleeps while `word` is `expected`; may return early. Shared between processes: the private flag would be wrong.
fn futex_wait(word: &AtomicU32, expected: u32) {
    let no_deadline = ptr::null::<libc::timespec>();
    // SAFETY: the word outlives the call, and the null deadline is allowed.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, no_deadline) };
}

/// Wakes whoever sleeps on `word`.
fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word outlives the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}
