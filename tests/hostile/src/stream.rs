//! Lies in the stream: about turns, sleepers, barriers and counts.

use crate::memory::Dice;
use crate::peer::Session;
use crate::process::{self, sleep_for_ever};
use crate::session::beside;
use crate::{Lie, session};
use hotcell_channel::session::{self as fixed};
use hotcell_channel::stream::{ASLEEP, AWAKE, Barrier, RECORDS, Width};
use hotcell_channel::wait;
use std::time::Duration;

/// A call of the stream.
#[derive(Clone, Copy)]
struct At {
    position: u64,
    width: Width,
}

/// Never returns: lies, or serves honestly if the lie is none of these.
pub(crate) fn tell(session: Session, lie: &Lie) {
    let number = lie.number;
    match &*lie.name {
        // Any head in place of each reply.
        "stream-head" => serve(session, move |session, at| {
            session.region.stream().forge_reply(at.position, number);
            wake(session);
        }),
        // The reply of a call that is as far from the one that was made as the number says.
        "stream-shifted" => serve(session, move |session, at| {
            let head = at.position.wrapping_add(1).wrapping_add(number) & u64::from(u32::MAX);
            session.region.stream().forge_reply(at.position, head);
            wake(session);
        }),
        "stream-silence" => serve(session, |_, _| sleep_for_ever()),
        // All replies there can be, before anything was asked.
        "stream-before-requests" => {
            for position in 0..RECORDS as u64 {
                session.region.stream().answer(position, 0, 0);
            }
            serve(session, honestly)
        }
        // Turns that change while the host looks at them.
        "stream-flipping" => serve(
            session,
            from_the_first_call(move |session| {
                let mut dice = Dice::new(number);
                while !session.is_stopped() {
                    let position = dice.below(RECORDS as u64);
                    let head = if dice.below(2) == 0 { dice.edge() } else { dice.below(1024) };
                    session.region.stream().forge_reply(position, head);
                }
            }),
        ),
        "stream-sleepers" => {
            beside(session.clone(), move |session| {
                let mut dice = Dice::new(number);
                while !session.is_stopped() {
                    let mut flag = || [AWAKE, ASLEEP, 2, u32::MAX][dice.index(4)];
                    session.region.sleepers().forge(flag(), flag());
                }
            });
            serve(session, honestly)
        }
        // The replies are there, and nobody is woken.
        "stream-without-waking" => serve(session, |session, at| {
            std::thread::sleep(Duration::from_millis(5));
            answer(session, at);
        }),
        "stream-taken-and-exit" => serve(session, move |session, at| {
            if at.position == 3 {
                session.region.progress().take_stream(number);
                process::die(9);
            }
            honestly(session, at);
        }),
        // A barrier that there is none of.
        "stream-barrier" => serve_with(session, fixed::OK, number, honestly),
        "stream-refused" => serve_with(session, number, 0, honestly),
        "stream-random" => {
            serve(session, from_the_first_call(move |session| session::scribble(&session, number)))
        }
        _ => session.be_honest(),
    }
}

/// Serves honestly, and lies beside that from the first call on.
fn from_the_first_call(lie: impl FnOnce(Session) + Send + 'static) -> impl FnMut(&Session, At) {
    let mut lie = Some(lie);
    move |session, at| {
        if let Some(lie) = lie.take() {
            beside(session.clone(), lie);
        }
        honestly(session, at);
    }
}

fn wake(session: &Session) {
    session.region.sleepers().wake_host(Barrier::Fence);
}

/// As a worker whose functions return their first argument.
fn answer(session: &Session, at: At) {
    let stream = session.region.stream();
    stream.answer(at.position, stream.request(at.position, at.width).word(0), 0);
}

fn honestly(session: &Session, at: At) {
    answer(session, at);
    wake(session);
}

fn serve(session: Session, reply: impl FnMut(&Session, At)) -> ! {
    serve_with(session, fixed::OK, Barrier::Fence as u64, reply)
}

/// Answers everything but the stream honestly, `STREAM` with these words, and each of its calls by `reply`. Never sleeps on the bell, so the host need not ring.
fn serve_with(mut session: Session, status: u64, barrier: u64, mut reply: impl FnMut(&Session, At)) -> ! {
    let mut next: Option<At> = None;
    loop {
        if let Some(at) = next
            && let Some(function) = session.region.stream().requested(at.position, at.width)
        {
            session.region.progress().take_stream(at.position + 1);
            if function == fixed::STREAM_END {
                honestly(&session, at);
                next = None;
            } else {
                reply(&session, at);
                next = Some(At { position: at.position + 1, ..at });
            }
            continue;
        }
        match session.look() {
            Some(seen) if seen.function == fixed::STREAM => {
                next = Some(At { position: seen.slot.word(0), width: Width::from_word(seen.slot.word(2)) });
                seen.slot.set_word(0, status);
                seen.slot.set_word(1, barrier);
                wait::reply(seen.slot);
            }
            Some(seen) => session.answer_honestly(seen),
            None => std::thread::sleep(Duration::from_micros(20)),
        }
    }
}
