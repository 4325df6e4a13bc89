//! The stream as a lane of a session: calls in a row, served in batches between looks at the session's two slots.

use crate::dispatch::{Callable, resolved};
use crate::memory::Blocks;
use hotcell_channel::region::Region;
use hotcell_channel::session::STREAM_END;
use hotcell_channel::slot::Slot;
use hotcell_channel::stream::{self, Barrier, Lane, Lanes, RECORD_WORDS, Record, Width};
use hotcell_channel::wait::Spin;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// The session's half of the stream. Its position is private.
pub(crate) struct StreamLane<'r> {
    region: &'r Region,
    on: bool,
    position: u64,
    width: Width,
    barrier: Barrier,
    /// The lane that was served last.
    last: Lane,
    /// It was said that the barrier fails.
    complained: bool,
    /// Where calls run that are more than registers of one kind.
    slot: Slot,
}

impl<'r> StreamLane<'r> {
    pub(crate) fn new(region: &'r Region) -> Self {
        Self {
            region,
            on: false,
            position: 0,
            width: Width::Wide,
            barrier: Barrier::Fence,
            last: Lane::Direct,
            complained: false,
            slot: Slot::default(),
        }
    }

    #[inline(always)]
    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    /// Switches the stream on. `barrier` is what the host can do; gives what both will.
    pub(crate) fn switch_on(&mut self, position: u64, barrier: u64, width: u64) -> u64 {
        self.barrier = match Barrier::from_word(barrier) {
            Barrier::Membarrier => Barrier::available(),
            Barrier::Fence => Barrier::Fence,
        };
        self.width = Width::from_word(width);
        (self.position, self.last, self.on) = (position, Lane::Direct, true);
        self.barrier as u64
    }

    /// Waits for a request in any lane. `calls`: how many the two slots have served.
    pub(crate) fn wait(&mut self, ring: &Slot, spin: &Spin, calls: u64) -> Lane {
        let region = self.region;
        let lanes = Lanes {
            direct: region.direct(),
            ring,
            stream: region.stream(),
            position: self.position,
            width: self.width,
            sleepers: region.sleepers(),
            barrier: self.barrier,
        };
        let calls = calls.wrapping_add(self.position);
        let (lane, unsure) =
            stream::wait_request(lanes, self.last, spin, region.bell(), region.progress(), calls);
        if unsure && !self.complained {
            self.complained = true;
            eprintln!("hotcell-worker: membarrier fails since a stream was opened: sleeps are cut to 1 ms");
        }
        self.last = lane;
        lane
    }

    /// Serves at most `most` calls that are there.
    #[inline(never)]
    pub(crate) fn serve(
        &mut self,
        most: u32,
        functions: &[Callable],
        blocks: &mut Blocks,
        running: &AtomicU32,
    ) {
        // A loop for each width, in which it is a constant.
        match self.width {
            Width::Narrow => self.serve_as(Width::Narrow, most, functions, blocks, running),
            Width::Wide => self.serve_as(Width::Wide, most, functions, blocks, running),
        }
    }

    #[inline(always)]
    fn serve_as(
        &mut self,
        width: Width,
        most: u32,
        functions: &[Callable],
        blocks: &mut Blocks,
        running: &AtomicU32,
    ) {
        let region = self.region;
        let (stream, sleepers, progress) = (region.stream(), region.sleepers(), region.progress());
        if !self.on {
            return;
        }
        // As few stores as can be, since each to another line than the reply's makes replies wait (see [`hotcell_channel::stream`]). A pipeline calls one function, so it is looked up, and noted as
        // what runs, when it changes.
        let mut position = self.position;
        let mut current = None;
        for _ in 0..most {
            let Some(function) = stream.requested(position, width) else { break };
            progress.take_stream(position + 1);
            let callable = match current {
                Some((last, callable)) if last == function => callable,
                _ => {
                    running.store(function, Relaxed);
                    let Some(callable) = resolved(functions, function) else {
                        stream.answer(position, 0, 0);
                        sleepers.wake_host(self.barrier);
                        position += 1;
                        self.on = function != STREAM_END;
                        break;
                    };
                    current = Some((function, callable));
                    callable
                }
            };
            let request = stream.request(position, width);
            let (word, errno) = match callable.invoke_quick(|at| request.word(at)) {
                Some(result) => (result, 0),
                None => call_in_slot(callable, request, &self.slot, blocks),
            };
            stream.answer(position, word, errno);
            sleepers.wake_host(self.barrier);
            position += 1;
        }
        self.position = position;
    }
}

/// A call that is more than registers of one kind: its words pass through a slot of this thread's own, where every kind of call can run. Gives the result and `errno`. (A returned string does not
/// fit a reply: hosts do not ask for one.)
#[inline(never)]
fn call_in_slot(callable: &Callable, request: Record<'_>, slot: &Slot, blocks: &mut Blocks) -> (u64, i32) {
    for at in 0..RECORD_WORDS {
        slot.set_word(at, request.word(at));
    }
    callable.invoke(slot, blocks);
    (slot.word(0), callable.errno_in(slot))
}
