//! A liar that decides by dice: honest for a while, then any of the lies, at any step.

use crate::memory::{self, Dice};
use crate::peer::{Peer, Seen, Session};
use crate::{control, process, session};
use hotcell_channel::control::{Hello, ToHost, encode};
use hotcell_channel::layout::FUNCTIONS_BASE;
use hotcell_channel::session::STRING_LONGER;
use hotcell_channel::{sys, wait};
use std::os::fd::AsFd;
use std::time::Duration;

pub(crate) fn run(peer: Peer, seed: u64) -> ! {
    let mut dice = Dice::new(seed);
    match dice.below(40) {
        0 => process::exit(dice.below(256)),
        1 => peer.send(&control::random_bytes(seed, dice.index(5000))),
        2 => control::send_descriptors(&peer, &Hello::ours().encode(), dice.index(253)),
        _ => {}
    }
    peer.hello();
    if dice.below(3) == 0 {
        let (peer, dice) = (peer.clone(), Dice::new(seed ^ 1));
        std::thread::spawn(move || disturb(&peer, dice));
    }
    loop {
        let session = peer.next_open();
        match dice.below(30) {
            0 => control::send_descriptors(&peer, b"", dice.index(253)),
            1 => peer.say(&ToHost::Refused { session: session.id, reason: control::nasty_text(3000) }),
            2 => peer.say(&ToHost::Opened { session: dice.state(), arena_address: dice.edge() }),
            3 => process::exit(dice.below(256)),
            4 => peer.say(&ToHost::Opened { session: session.id, arena_address: dice.edge() }),
            _ => peer.opened(&session),
        }
        let dice = Dice::new(seed ^ u64::from(session.id) << 32);
        std::thread::spawn(move || lie(session, dice));
    }
}

/// Says something on the control socket some time.
fn disturb(peer: &Peer, mut dice: Dice) {
    std::thread::sleep(Duration::from_micros(dice.below(20_000)));
    match dice.below(5) {
        0 => process::exit(dice.below(256)),
        1 => peer.send(&control::random_bytes(dice.next(), dice.index(4200))),
        2 => peer.say(&ToHost::Opened { session: dice.state(), arena_address: dice.edge() }),
        3 => peer.send(&Hello::ours().encode()),
        _ => control::send_descriptors(
            peer,
            &encode(&ToHost::Refused { session: 1, reason: String::new() }),
            3,
        ),
    }
}

fn lie(mut session: Session, mut dice: Dice) {
    match dice.below(6) {
        0 => session::beside(session.clone(), {
            let seed = dice.next();
            move |session| session::scribble(&session, seed)
        }),
        1 => session::beside(session.clone(), {
            let seed = dice.next();
            move |session| session::punch(&session, seed)
        }),
        _ => {}
    }
    loop {
        let seen = session.next_request();
        if dice.below(4) > 0 {
            session.answer_honestly(seen);
        } else {
            misbehave(&mut session, seen, &mut dice);
        }
    }
}

fn misbehave(session: &mut Session, seen: Seen, dice: &mut Dice) {
    let slot = seen.slot;
    match dice.below(14) {
        0 => slot.forge_state(dice.state()),
        1 => {
            (0..15).for_each(|at| slot.set_word(at, dice.edge()));
            wait::reply(slot);
        }
        2 if seen.function < FUNCTIONS_BASE => {
            session::forge_directory_answer(session, seen, dice.below(session::DIRECTORY_LIES));
            wait::reply(slot);
        }
        2 | 3 => {
            slot.set_word(1, STRING_LONGER);
            wait::reply(slot);
        }
        4 => {
            slot.set_word(1, dice.edge());
            wait::reply(slot);
        }
        5 => {
            session::forge_crash_page(session, dice.below(80));
            session.answer_honestly(seen);
        }
        6 => {
            session::forge_crash_page(session, dice.below(80));
            process::signal([4, 6, 7, 8, 11, 15, 9][dice.index(7)]);
        }
        7 => process::exit(dice.below(256)),
        8 => {
            for _ in 0..1000 {
                sys::futex_wake(slot.futex(), i32::MAX);
            }
            session.answer_honestly(seen);
        }
        9 => {
            session.region.progress().take_direct(dice.edge());
            session.region.progress().take_ring(dice.edge());
            session.answer_honestly(seen);
        }
        10 => {
            memory::requeue_sleepers(slot.futex(), session.region.bell().futex());
            session.answer_honestly(seen);
        }
        11 => {
            memory::break_the_seal(session.fd.as_fd());
            session.answer_honestly(seen);
        }
        12 => {
            std::thread::sleep(Duration::from_millis(dice.below(30)));
            session.answer_honestly(seen);
        }
        // No answer, and a word somewhere.
        _ => memory::Raw::map(session.fd.as_fd(), 1 << 16).store(dice.index(1 << 16), dice.edge()),
    }
}
