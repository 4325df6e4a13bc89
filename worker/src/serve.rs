//! One session: take a request, dispatch it, publish the reply.

use crate::crash_handler;
use crate::dispatch::{Callable, resolved};
use crate::library::Libraries;
use crate::memory::Blocks;
use crate::meter::{self, Meter};
use crate::stream::StreamLane;
use hotcell_channel::layout::FUNCTIONS_BASE;
use hotcell_channel::region::Region;
use hotcell_channel::session::{self, Answer, FailureKind, Request};
use hotcell_channel::slot::{FUNCTIONS_MAX, Slot};
use hotcell_channel::stream::{BATCH, Lane, RECORDS};
use hotcell_channel::wait::{self, Policy, Spin, Which};
use hotcell_channel::{control, sys};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

struct Session<'r> {
    region: &'r Region,
    libraries: Libraries,
    functions: Vec<Callable>,
    blocks: Blocks,
    meter: Option<Meter>,
    stream: StreamLane<'r>,
}

/// Serves a session on the calling thread until the host closes it. `listening` is called once, when requests can come. A session without a memory limit has a
/// loop of its own, in which nothing is metered.
pub(crate) fn serve(
    id: u32,
    region: &Region,
    policy: Policy,
    memory_bytes_max: Option<u64>,
    listening: impl FnOnce(Result<(), &'static str>),
) {
    let Some(limit) = memory_bytes_max else {
        return serve_as::<false>(id, region, policy, None, || listening(Ok(())));
    };
    match Meter::open(id, limit) {
        Some(meter) => serve_as::<true>(id, region, policy, Some(meter), || listening(Ok(()))),
        None => listening(Err("the worker has as many sessions with a memory limit as it can have")),
    }
}

fn serve_as<const METERED: bool>(
    id: u32,
    region: &Region,
    policy: Policy,
    meter: Option<Meter>,
    listening: impl FnOnce(),
) {
    // A panic here is a bug of the worker; the host must see a dead worker, not a session that never answers.
    let bomb = AbortOnPanic;
    let _stack = crash_handler::enter_thread();
    // What runs now, or ran last, for the crash handler: the thread's own memory, one plain store a call.
    let running = AtomicU32::new(u32::MAX);
    crash_handler::set_session(id, &running, region.direct().futex());

    let mut session = Session {
        region,
        libraries: Libraries::new(METERED),
        functions: Vec::new(),
        blocks: Blocks::default(),
        meter,
        stream: StreamLane::new(region),
    };
    let (direct, bell, progress) = (region.direct(), region.bell(), region.progress());
    let slots = region.geometry().slots;
    let spin = Spin::new(policy);
    let (mut direct_count, mut ring_count) = (0u64, 0u64);
    let mut ring = region.slot(0);
    let mut last = Which::Direct;
    listening();
    loop {
        let which = if session.stream.is_on() {
            match session.stream.wait(ring, &spin, direct_count + ring_count) {
                Lane::Direct => Which::Direct,
                Lane::Ring => Which::Ring,
                Lane::Stream => {
                    session.serve_stream(BATCH, &running);
                    continue;
                }
            }
        } else {
            wait::wait_request(direct, ring, last, &spin, bell, progress, direct_count + ring_count)
        };
        last = which;
        let slot = match which {
            Which::Direct => {
                direct_count += 1;
                progress.take_direct(direct_count);
                direct
            }
            Which::Ring => {
                ring_count += 1;
                progress.take_ring(ring_count);
                ring
            }
        };
        let (function, next) = slot.function();
        let refusals = if METERED { session.refusals() } else { 0 };
        running.store(function, Relaxed);
        if let Some(callable) = resolved(&session.functions, function) {
            // What may have a payload stands apart, so that the loop of calls of numbers has the registers to itself.
            if !callable.invoke_plain(slot) {
                let payload = (!METERED && which == Which::Direct).then_some((ring, &spin));
                if session.invoke_other(function, slot, payload) {
                    continue;
                }
            }
        } else if function == session::CLOSE {
            // Calls that were sent before it run before it, whether somebody waits for them or not. No more than the stream holds: a pipeline may go on sending.
            session.serve_stream(u32::try_from(RECORDS).unwrap_or(u32::MAX), &running);
            break close(session, slot, bomb);
        } else {
            session.fixed(function, slot);
        }
        if which == Which::Ring {
            ring = region.slot(next % slots);
        }
        if METERED && session.was_refused(refusals, function, slot) {
            wait::reply_refused(slot);
        } else {
            wait::reply(slot);
        }
    }
}

#[cold]
fn close(session: Session<'_>, slot: &Slot, bomb: AbortOnPanic) {
    // Frees blocks and unloads libraries, whose destructors run here, inside the call's deadline. Then the account is closed.
    drop(session);
    slot.set_word(0, session::OK);
    wait::reply(slot);
    std::mem::forget(bomb);
}

impl Session<'_> {
    /// Serves at most `most` calls of the stream that are there.
    fn serve_stream(&mut self, most: u32, running: &AtomicU32) {
        self.stream.serve(most, &self.functions, &mut self.blocks, running);
    }

    /// Calls a function that takes more than numbers. With `payload`, a call that has one is answered here, and the next one expected: then the answer is true.
    #[inline(never)]
    fn invoke_other(&mut self, function: u32, slot: &Slot, payload: Option<(&Slot, &Spin)>) -> bool {
        let Some(callable) = resolved(&self.functions, function) else { return false };
        let (_, number) = slot.function();
        callable.invoke(slot, &mut self.blocks);
        let Some((ring, spin)) = payload.filter(|_| number != 0) else { return false };
        wait::reply(slot);
        if !self.stream.is_on() {
            let progress = self.region.progress();
            wait::expect_payload(slot, ring, spin, progress, number, |line| self.region.scratch_soon(line));
        }
        true
    }

    /// How many allocations the memory limit has refused so far.
    fn refusals(&self) -> u64 {
        self.meter.as_ref().map_or(0, Meter::refusals)
    }

    /// Whether there are more refusals than `before`; then the reply's words say what the last one was. The call has returned, so it has lived through them.
    fn was_refused(&mut self, before: u64, function: u32, slot: &Slot) -> bool {
        meter::lived_through();
        // Requests that allocate nothing for the session have answers of their own: what another thread was refused meanwhile stays counted.
        if function < FUNCTIONS_BASE && !matches!(function, session::ALLOCATE | session::DIRECTORY) {
            return false;
        }
        let Some(meter) = self.meter.as_ref().filter(|meter| meter.refusals() != before) else {
            return false;
        };
        let (asked, used) = meter.last_refusal();
        // The host is told of the refusal, and not of a block that the call gave: nobody would free it.
        if function == session::ALLOCATE && slot.word(0) == session::OK {
            self.blocks.free(slot.word(1));
        }
        if resolved(&self.functions, function).is_some_and(Callable::returns_string) {
            self.blocks.free_string();
        }
        slot.set_word(0, asked);
        slot.set_word(1, used);
        true
    }

    fn memory(&self, slot: &Slot) -> u64 {
        let Some(meter) = &self.meter else { return session::BAD_REQUEST };
        let (used, peak) = meter.counts();
        for (at, word) in [used, peak, meter.refusals()].into_iter().enumerate() {
            slot.set_word(at + 1, word);
        }
        session::OK
    }

    /// The session's own functions: see [`hotcell_channel::session`].
    #[cold]
    #[inline(never)]
    fn fixed(&mut self, function: u32, slot: &Slot) {
        let word = |i| slot.word(i);
        let status = match function {
            session::NOP => session::OK,
            session::DIRECTORY => {
                let (status, length) = self.directory(word(0), word(1), word(2));
                slot.set_word(1, length);
                status
            }
            session::READ | session::WRITE => self.blocks.copy(word(0), word(1), word(2)),
            session::ALLOCATE => {
                let (status, address) = self.blocks.allocate(word(0));
                slot.set_word(1, address);
                status
            }
            session::FREE => self.blocks.free(word(0)),
            session::READ_STRING => {
                let (status, length) = self.blocks.copy_string(word(0), word(1), word(2));
                slot.set_word(1, length);
                status
            }
            session::STREAM => {
                slot.set_word(1, self.stream.switch_on(word(0), word(1), word(2)));
                session::OK
            }
            session::MEMORY => self.memory(slot),
            _ => session::BAD_REQUEST,
        };
        slot.set_word(0, status);
    }

    fn load(&mut self, name: &[u8], now: bool, global: bool) -> Answer {
        let refusals = self.refusals();
        let answer = self.libraries.load(name, now, global);
        if matches!(answer, Answer::Loaded(_)) && self.refusals() != refusals {
            // The host will be told of the refusal and not of the module, whose constructors did not get what they need.
            self.libraries.unload_last();
        }
        answer
    }

    fn directory(&mut self, address: u64, length: u64, capacity: u64) -> (u64, u64) {
        let offset = address.wrapping_sub(self.region.arena_address());
        let Ok(length) = usize::try_from(length.min(session::DIRECTORY_BYTES_MAX as u64)) else {
            return (session::BAD_REQUEST, 0);
        };
        let mut request = vec![0; length];
        if !self.region.read(offset, &mut request) {
            return (session::BAD_REQUEST, 0);
        }
        let Ok(request) = control::decode::<Request>(&request) else { return (session::BAD_REQUEST, 0) };
        let mut answer = match request {
            Request::Load { name, now, global } => self.load(&name, now, global),
            Request::Resolve { module, symbol, signature, errno } => {
                if self.functions.len() >= (FUNCTIONS_MAX - FUNCTIONS_BASE) as usize {
                    failed(FailureKind::TooManyFunctions, format!("{} functions", self.functions.len()))
                } else {
                    match self.libraries.resolve(module, &symbol, &signature, errno) {
                        Ok(callable) => {
                            self.functions.push(callable);
                            // Fits: the length was just checked against FUNCTIONS_MAX.
                            let index = u32::try_from(self.functions.len() - 1).unwrap_or(u32::MAX);
                            Answer::Resolved(FUNCTIONS_BASE + index)
                        }
                        Err(answer) => answer,
                    }
                }
            }
        };
        if let Answer::Failed { detail, .. } = &mut answer {
            // The linker's words can be as long as a path list; what does not fit the block is cut.
            let room = usize::try_from(capacity).unwrap_or(0).saturating_sub(64);
            let mut end = detail.len().min(room);
            while !detail.is_char_boundary(end) {
                end -= 1;
            }
            detail.truncate(end);
        }
        let bytes = control::encode(&answer);
        if bytes.len() as u64 > capacity || !self.region.write(offset, &bytes) {
            return (session::TOO_LONG, 0);
        }
        (session::OK, bytes.len() as u64)
    }
}

pub(crate) fn failed(kind: FailureKind, detail: impl Into<String>) -> Answer {
    Answer::Failed { kind, detail: detail.into() }
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
        // The thread's end without CLOSE: foreign code ended it (pthread_exit). Nobody would ever answer.
        eprintln!("hotcell-worker: foreign code ended the session's thread");
        sys::exit_now(134);
    }
}
