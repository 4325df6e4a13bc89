//! What one would write with `shared_memory` and `raw_sync`: a named segment, a record in it, and an auto-reset event
//! each way. `Event` is a process-shared pthread mutex and condition variable, `BusyEvent` spins on a byte. (The latter orders nothing but
//! itself, so by the letter the record's words may be stale; on x86-64 its compare-and-swap happens to be a full barrier.)

use std::sync::atomic::Ordering;

use nix::sys::mman::shm_unlink;
use raw_sync::Timeout;
use raw_sync::events::{BusyEvent, Event, EventImpl, EventInit, EventState};
use shared_memory::{Shmem, ShmemConf};

use crate::Result;
use crate::cpus::Cpus;
use crate::floor::{check, operands};
use crate::measure::Row;
use crate::memory::Record;
use crate::process::{Caller, Peer};

pub const EVENT: &str = "peer/raw_sync";
pub const BUSY: &str = "peer/raw_sync busy";

// The segment: the record in its own cache line, the events in theirs.
const REQUEST_EVENT: usize = 256;
const REPLY_EVENT: usize = 512;
const EVENT_ROOM: usize = 256;
const SIZE: usize = 4096;

// The record's states.
const CALL: u32 = 0;
/// The peer shall end.
const END: u32 = 1;
/// The peer shall go back to its gate; it answers.
const LEAVE: u32 = 2;

struct EventRow {
    channel: Channel,
    peer: Peer,
}

impl EventRow {
    fn open<E: EventInit>(cpus: &Cpus, role: &str) -> Result<Self> {
        let segment = ShmemConf::new().size(SIZE).create()?;
        let name = segment.get_os_id().to_owned();
        let mut channel = Channel::over(segment, |address| {
            // SAFETY: the channel has room for an event here, in a segment that outlives it.
            unsafe { E::new(address, true) }
        })?;
        let peer = Peer::start(cpus, role, &[&name], &[])?;
        // Both sides have it mapped: unlink it now, so that it is gone even if this process is killed.
        shm_unlink(name.as_str())?;
        channel.segment.set_owner(false);
        Ok(Self { channel, peer })
    }
}

impl EventRow {
    #[inline(always)]
    fn exchange(&self) {
        self.channel.request.set(EventState::Signaled).expect("the request event can be set");
        self.channel.reply.wait(Timeout::Infinite).expect("the reply event can be awaited");
    }

    #[inline(always)]
    fn step(&self, number: u64) {
        let (a, b) = operands(number);
        self.channel.record().write_request(a, b);
        self.exchange();
        check(self.channel.record().result(), (a, b));
    }
}

/// Both sides sleep in `Event::wait`.
pub struct Sleeping(EventRow);

impl Sleeping {
    pub fn open(cpus: &Cpus) -> Result<Self> {
        let mut row = EventRow::open::<Event>(cpus, EVENT)?;
        row.peer.wake();
        Ok(Self(row))
    }
}

impl Row for Sleeping {
    const IDLES: bool = true;

    #[inline(always)]
    fn step(&mut self, number: u64) {
        self.0.step(number);
    }
}

/// Both sides spin in `BusyEvent::wait`.
pub struct Busy(EventRow);

impl Busy {
    pub fn open(cpus: &Cpus) -> Result<Self> {
        cpus.require_two()?;
        EventRow::open::<BusyEvent>(cpus, BUSY).map(Self)
    }
}

impl Row for Busy {
    #[inline(always)]
    fn step(&mut self, number: u64) {
        self.0.step(number);
    }

    fn wake(&mut self) {
        self.0.peer.wake();
    }

    fn rest(&mut self) {
        self.0.channel.record().state.store(LEAVE, Ordering::Release);
        self.0.exchange();
        self.0.channel.record().state.store(CALL, Ordering::Release);
    }
}

impl Drop for EventRow {
    fn drop(&mut self) {
        self.channel.record().state.store(END, Ordering::Release);
        let _ = self.channel.request.set(EventState::Signaled);
    }
}

pub fn serve(role: &str, mut caller: Caller) -> Result<()> {
    let segment = ShmemConf::new().os_id(caller.argument(0)?).open()?;
    let existing = if role == BUSY { BusyEvent::from_existing } else { Event::from_existing };
    let channel = Channel::over(segment, |address| {
        // SAFETY: the caller made an event of this kind at each of these places before it started this process.
        unsafe { existing(address) }
    })?;
    caller.ready()?;
    while caller.wait_at_gate() {
        let mut awake = true;
        while awake {
            channel.request.wait(Timeout::Infinite)?;
            match channel.record().state.load(Ordering::Acquire) {
                END => return Ok(()),
                LEAVE => awake = false,
                _ => channel.record().answer(),
            }
            channel.reply.set(EventState::Signaled)?;
        }
    }
    Ok(())
}

/// Dropped in this order: the segment outlives what lies in it.
struct Channel {
    request: Box<dyn EventImpl>,
    reply: Box<dyn EventImpl>,
    segment: Shmem,
}

impl Channel {
    /// Takes both events from the segment: `event` makes one at an address, or finds it there.
    fn over(segment: Shmem, event: impl Fn(*mut u8) -> Result<(Box<dyn EventImpl>, usize)>) -> Result<Self> {
        let event_at = |offset: usize| -> Result<_> {
            let (event, length) = event(segment.as_ptr().wrapping_add(offset))?;
            if length <= EVENT_ROOM { Ok(event) } else { Err("an event is longer than its place".into()) }
        };
        let (request, reply) = (event_at(REQUEST_EVENT)?, event_at(REPLY_EVENT)?);
        Ok(Self { request, reply, segment })
    }

    fn record(&self) -> &Record {
        // SAFETY: the segment is mapped, page-aligned and longer than a record, and begins with one; a record holds
        // only atomics, for which every bit pattern is valid and which the other process accesses atomically too.
        unsafe { &*self.segment.as_ptr().cast::<Record>() }
    }
}
