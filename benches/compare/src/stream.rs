//! Calls that do not wait for each other: a bare stream of records, and how rows of bursts are made of whatever can send and receive.

use std::collections::VecDeque;
use std::hint::{black_box, spin_loop};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use hotcell::{Function, Ticket};

use crate::Result;
use crate::cell::Cell;
use crate::cpus::Cpus;
use crate::floor::{check, operands};
use crate::measure::Row;
use crate::memory::{Record, Shared};
use crate::process::{Caller, Peer};

pub const STREAM: &str = "floor/stream";

/// Calls that are sent, and whose results come back in the same order.
pub trait Stream {
    /// How many can be in flight.
    const ROOM: u64 = 256;

    fn send(&mut self, a: i32, b: i32);
    fn receive(&mut self) -> i32;
    fn wake(&mut self) {}
    fn rest(&mut self) {}
}

/// `CALLS` calls are sent, then all their results are received. If there is no room for all of them, the last are sent one by one as results come.
pub struct Burst<S, const CALLS: usize>(pub S);

impl<S: Stream, const CALLS: usize> Row for Burst<S, CALLS> {
    const CALLS: usize = CALLS;

    #[inline(always)]
    fn step(&mut self, number: u64) {
        let (count, sum) = (CALLS as u64, |call| operands(number + call));
        let mut received = 0;
        for call in 0..count {
            if call >= S::ROOM {
                check(self.0.receive(), sum(received));
                received += 1;
            }
            let (a, b) = sum(call);
            self.0.send(a, b);
        }
        (received..count).for_each(|call| check(self.0.receive(), sum(call)));
    }

    fn wake(&mut self) {
        self.0.wake();
    }

    fn rest(&mut self) {
        self.0.rest();
    }
}

/// As many calls as `DEPTH` are always in flight: one is sent whenever one has come back.
pub struct Sustained<S> {
    stream: S,
    sent: u64,
    received: u64,
}

const DEPTH: u64 = 128;

impl<S> Sustained<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, sent: 0, received: 0 }
    }
}

impl<S: Stream> Sustained<S> {
    #[inline(always)]
    fn receive(&mut self) {
        check(self.stream.receive(), operands(self.received));
        self.received += 1;
    }
}

impl<S: Stream> Row for Sustained<S> {
    const CALLS: usize = 1024;

    #[inline(always)]
    fn step(&mut self, _number: u64) {
        for _ in 0..Self::CALLS {
            if self.sent - self.received == DEPTH {
                self.receive();
            }
            let (a, b) = operands(self.sent);
            self.stream.send(a, b);
            self.sent += 1;
        }
    }

    fn wake(&mut self) {
        self.stream.wake();
    }

    fn rest(&mut self) {
        while self.received < self.sent {
            self.receive();
        }
        self.stream.rest();
    }
}

/// A ring of records each way, one cache line a call each way, and two processes that spin. A record's state is the number of its call, so each line says by
/// itself whose turn it is; nothing else is shared. Asking early for the lines that are about to be written (`prefetchw`) makes no difference to it. The caller never has more in flight than the rings hold, so nobody looks for room.
pub struct BareStream {
    shared: Shared<Record>,
    peer: Peer,
    sent: u32,
    received: u32,
}

const RECORDS: u32 = 256;
const BYTES: usize = 2 * RECORDS as usize * size_of::<Record>();
/// In the first record's state: the peer goes back to its gate, and says so by [`AT_GATE`].
const LEAVE: u32 = 1;
const AT_GATE: u32 = 0;

/// The record of call `number` in the ring of requests (0) or of replies (1).
#[inline(always)]
fn record(shared: &Shared<Record>, ring: u32, number: u32) -> &Record {
    let index = ring * RECORDS + number % RECORDS;
    let place = shared.bytes().cast::<Record>().wrapping_add(index as usize);
    // SAFETY: `index` is below `2 * RECORDS`, for which `BYTES` has room behind the first page; a record holds only atomics, for which every bit pattern is valid,
    // and the mapping is page-aligned and lives as long as `shared`.
    unsafe { &*place }
}

/// What the state of call `number`'s record is once it is written: never that of the calls before it in the same place.
fn written(number: u32) -> u32 {
    number.wrapping_add(1)
}

impl BareStream {
    pub fn open(cpus: &Cpus) -> Result<Self> {
        cpus.require_two()?;
        let shared = Shared::<Record>::create(BYTES)?;
        let peer = Peer::start(cpus, STREAM, &[], &[shared.as_fd()])?;
        Ok(Self { shared, peer, sent: 0, received: 0 })
    }
}

impl Stream for BareStream {
    #[inline(always)]
    fn send(&mut self, a: i32, b: i32) {
        let record = record(&self.shared, 0, self.sent);
        record.write_request(a, b);
        record.state.store(written(self.sent), Ordering::Release);
        self.sent = self.sent.wrapping_add(1);
    }

    #[inline(always)]
    fn receive(&mut self) -> i32 {
        let record = record(&self.shared, 1, self.received);
        while record.state.load(Ordering::Acquire) != written(self.received) {
            spin_loop();
        }
        self.received = self.received.wrapping_add(1);
        record.result()
    }

    fn wake(&mut self) {
        self.peer.wake();
    }

    fn rest(&mut self) {
        self.shared.state.store(LEAVE, Ordering::Release);
        while self.shared.state.load(Ordering::Acquire) != AT_GATE {
            spin_loop();
        }
    }
}

pub fn serve(mut caller: Caller) -> Result<()> {
    let shared = Shared::<Record>::open(caller.descriptor(0)?, BYTES)?;
    caller.ready()?;
    let mut number = 0;
    while caller.wait_at_gate() {
        loop {
            let request = record(&shared, 0, number);
            if request.state.load(Ordering::Acquire) == written(number) {
                let [a, b, ..] = request.words.each_ref().map(|word| word.load(Ordering::Relaxed));
                let reply = record(&shared, 1, number);
                reply.write_request(crate::add(a as i32, b as i32), 0);
                reply.state.store(written(number), Ordering::Release);
                number = number.wrapping_add(1);
            } else if shared.state.load(Ordering::Acquire) == LEAVE {
                break;
            } else {
                spin_loop();
            }
        }
        shared.state.store(AT_GATE, Ordering::Release);
    }
    Ok(())
}

pub type Add = fn(i32, i32) -> i32;

/// Our own calls by ticket.
pub struct Tickets {
    add: Function<Add>,
    tickets: VecDeque<Ticket<'static, Add>>,
    _cell: Rc<Cell>,
}

impl Tickets {
    pub fn new(cell: &Rc<Cell>) -> Result<Self> {
        Ok(Self { add: cell.module.function("add")?, tickets: VecDeque::new(), _cell: Rc::clone(cell) })
    }
}

impl Stream for Tickets {
    #[inline(always)]
    fn send(&mut self, a: i32, b: i32) {
        self.tickets.push_back(self.add.submit(black_box(a), b).expect("there is a slot"));
    }

    #[inline(always)]
    fn receive(&mut self) -> i32 {
        let ticket = self.tickets.pop_front().expect("a call is in flight");
        ticket.wait().expect("the worker lives")
    }
}
