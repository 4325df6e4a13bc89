//! What one would write with `shared_memory` and `raw_sync`: a named segment, a record in it, and an auto-reset event
//! each way (a process-shared pthread mutex and condition variable).

use std::sync::atomic::Ordering;

use nix::sys::mman::shm_unlink;
use raw_sync::Timeout;
use raw_sync::events::{Event, EventImpl, EventInit, EventState};
use shared_memory::{Shmem, ShmemConf};

use crate::Result;
use crate::cpus::Cpus;
use crate::measure::Row;
use crate::memory::Record;
use crate::process::{Caller, Peer};
use crate::roster::Roster;

pub const NAME: &str = "peer/raw_sync";

// The segment: the record in its own cache line, the events in theirs.
const REQUEST_EVENT: usize = 256;
const REPLY_EVENT: usize = 512;
const EVENT_ROOM: usize = 256;
const SIZE: usize = 4096;

/// The record's state when the peer shall end.
const END: u32 = 1;

pub fn enlist(roster: &mut Roster) {
    roster.add(NAME, EventRow::open);
}

struct EventRow {
    channel: Channel,
    _peer: Peer,
}

impl EventRow {
    fn open(cpus: &Cpus) -> Result<Self> {
        let segment = ShmemConf::new().size(SIZE).create()?;
        let name = segment.get_os_id().to_owned();
        let mut channel = Channel::over(segment, |address| {
            // SAFETY: the channel has room for an event here, in a segment that outlives it.
            unsafe { Event::new(address, true) }
        })?;
        let peer = Peer::start(cpus, NAME, &[&name], &[])?;
        // Both sides have it mapped: unlink it now, so that it is gone even if this process is killed.
        shm_unlink(name.as_str())?;
        channel.segment.set_owner(false);
        Ok(Self { channel, _peer: peer })
    }
}

impl Row for EventRow {
    const IDLES: bool = true;

    #[inline(always)]
    fn call(&mut self, a: i32, b: i32) -> i32 {
        self.channel.record().write_request(a, b);
        self.channel.request.set(EventState::Signaled).expect("the request event can be set");
        self.channel.reply.wait(Timeout::Infinite).expect("the reply event can be awaited");
        self.channel.record().result()
    }
}

impl Drop for EventRow {
    fn drop(&mut self) {
        self.channel.record().state.store(END, Ordering::Release);
        let _ = self.channel.request.set(EventState::Signaled);
    }
}

pub fn serve(mut caller: Caller) -> Result<()> {
    let segment = ShmemConf::new().os_id(caller.argument(0)?).open()?;
    let channel = Channel::over(segment, |address| {
        // SAFETY: the caller made an event at each of these places before it started this process.
        unsafe { Event::from_existing(address) }
    })?;
    caller.ready()?;
    loop {
        channel.request.wait(Timeout::Infinite)?;
        if channel.record().state.load(Ordering::Acquire) == END {
            return Ok(());
        }
        channel.record().answer();
        channel.reply.set(EventState::Signaled)?;
    }
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
