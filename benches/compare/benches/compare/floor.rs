//! The floors: the least that a call to another process costs, awake and asleep.

use std::hint::spin_loop;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Result;
use crate::cpus::Cpus;
use crate::measure::Row;
use crate::memory::SharedRecord;
use crate::process::{Caller, Peer};
use crate::roster::Roster;

pub const RECORD: &str = "floor/record";
pub const FUTEX: &str = "floor/futex";

// The states of a record.
const IDLE: u32 = 0;
const REQUEST: u32 = 1;
const REPLY: u32 = 2;
/// The spinning peer goes back to its gate, the sleeping one ends.
const LEAVE: u32 = 3;

pub fn enlist(roster: &mut Roster) {
    roster.add_in_places(RECORD, RecordRow::open);
    roster.add(FUTEX, FutexRow::open);
}

/// One record, two processes that spin, nothing else: no dispatch, no wake-ups, no checks, no deadline.
struct RecordRow {
    record: SharedRecord,
    peer: Peer,
}

impl RecordRow {
    fn open(cpus: &Cpus) -> Result<Self> {
        cpus.require_two()?;
        let record = SharedRecord::create()?;
        let peer = Peer::start(cpus, RECORD, &[], &[record.as_fd()])?;
        Ok(Self { record, peer })
    }
}

impl Row for RecordRow {
    #[inline(always)]
    fn call(&mut self, a: i32, b: i32) -> i32 {
        self.record.write_request(a, b);
        self.record.state.store(REQUEST, Ordering::Release);
        while self.record.state.load(Ordering::Acquire) != REPLY {
            spin_loop();
        }
        self.record.result()
    }

    fn wake(&mut self) {
        self.peer.wake();
    }

    fn rest(&mut self) {
        self.record.state.store(LEAVE, Ordering::Release);
        while self.record.state.load(Ordering::Acquire) != IDLE {
            spin_loop();
        }
    }
}

pub fn serve_record(mut caller: Caller) -> Result<()> {
    let record = SharedRecord::open(caller.descriptor(0)?)?;
    caller.ready()?;
    while caller.wait_at_gate() {
        loop {
            match record.state.load(Ordering::Acquire) {
                REQUEST => {
                    record.answer();
                    record.state.store(REPLY, Ordering::Release);
                }
                LEAVE => break,
                _ => spin_loop(),
            }
        }
        record.state.store(IDLE, Ordering::Release);
    }
    Ok(())
}

/// The same record, and a futex wait and wake each way: neither side ever spins.
struct FutexRow {
    record: SharedRecord,
    _peer: Peer,
}

impl FutexRow {
    fn open(cpus: &Cpus) -> Result<Self> {
        let record = SharedRecord::create()?;
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
    fn call(&mut self, a: i32, b: i32) -> i32 {
        self.record.write_request(a, b);
        self.publish(REQUEST);
        while self.record.state.load(Ordering::Acquire) == REQUEST {
            futex_wait(&self.record.state, REQUEST);
        }
        self.record.result()
    }
}

impl Drop for FutexRow {
    fn drop(&mut self) {
        self.publish(LEAVE);
    }
}

pub fn serve_futex(mut caller: Caller) -> Result<()> {
    let record = SharedRecord::open(caller.descriptor(0)?)?;
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
