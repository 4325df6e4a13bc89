//! Lies in the stream: about turns, sleepers, barriers and counts.

use crate::memory::Dice;
use crate::peer::Session;
use crate::process::{self, sleep_for_ever};
use crate::session::beside;
use crate::{Lie, session};
use hotcell_channel::session::{self as fixed};
use hotcell_channel::stream::{ASLEEP, AWAKE, Barrier, RECORDS};
use hotcell_channel::wait;
use std::time::Duration;

/// Never returns: lies, or serves honestly if the lie is none of these.
pub(crate) fn tell(session: Session, lie: &Lie) {
    let number = lie.number;
    match &*lie.name {
        // Any head in place of each reply.
        "stream-head" => serve(session, move |session, position| {
            session.region.stream().forge_reply(position, number);
            wake(session);
        }),
        // The reply of a call that is as far from the one that was made as the number says.
        "stream-shifted" => serve(session, move |session, position| {
            let head = position.wrapping_add(1).wrapping_add(number) & u64::from(u32::MAX);
            session.region.stream().forge_reply(position, head);
            wake(session);
        }),
        "stream-silence" => serve(session, |_, _| sleep_for_ever()),
        // All replies there can be, before anything was asked.
        "stream-before-requests" => {
            for position in 0..RECORDS as u64 {
                session.region.stream().answer(position);
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
        "stream-without-waking" => serve(session, |session, position| {
            std::thread::sleep(Duration::from_millis(5));
            answer(session, position);
        }),
        "stream-taken-and-exit" => serve(session, move |session, position| {
            if position == 3 {
                session.region.progress().take_stream(number);
                process::die(9);
            }
            honestly(session, position);
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
fn from_the_first_call(lie: impl FnOnce(Session) + Send + 'static) -> impl FnMut(&Session, u64) {
    let mut lie = Some(lie);
    move |session, position| {
        if let Some(lie) = lie.take() {
            beside(session.clone(), lie);
        }
        honestly(session, position);
    }
}

fn wake(session: &Session) {
    session.region.sleepers().wake_host(Barrier::Fence);
}

/// As a worker whose functions return their first argument.
fn answer(session: &Session, position: u64) {
    let stream = session.region.stream();
    stream.reply(position).set_word(0, stream.request(position).word(0));
    stream.answer(position);
}

fn honestly(session: &Session, position: u64) {
    answer(session, position);
    wake(session);
}

fn serve(session: Session, reply: impl FnMut(&Session, u64)) -> ! {
    serve_with(session, fixed::OK, Barrier::Fence as u64, reply)
}

/// Answers everything but the stream honestly, `STREAM` with these words, and each of its calls by `reply`. Never sleeps on the bell, so the host need not ring.
fn serve_with(mut session: Session, status: u64, barrier: u64, mut reply: impl FnMut(&Session, u64)) -> ! {
    let mut position = None;
    loop {
        if let Some(at) = position
            && let Some(function) = session.region.stream().requested(at)
        {
            session.region.progress().take_stream(at + 1);
            if function == fixed::STREAM_END {
                honestly(&session, at);
                position = None;
            } else {
                reply(&session, at);
                position = Some(at + 1);
            }
            continue;
        }
        match session.look() {
            Some(seen) if seen.function == fixed::STREAM => {
                position = Some(seen.slot.word(0));
                seen.slot.set_word(0, status);
                seen.slot.set_word(1, barrier);
                wait::reply(seen.slot);
            }
            Some(seen) => session.answer_honestly(seen),
            None => std::thread::sleep(Duration::from_micros(20)),
        }
    }
}
