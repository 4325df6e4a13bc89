//! Lies in the shared memory of a session.

use crate::control::nasty_text;
use crate::memory::{self, Dice, Raw};
use crate::peer::{Seen, Session};
use crate::process::{self, sleep_for_ever};
use crate::{Lie, control, stream};
use hotcell_channel::control::encode;
use hotcell_channel::crash::{Access, CrashPage, Facts};
use hotcell_channel::layout::FUNCTIONS_BASE;
use hotcell_channel::region::CrashRegion;
use hotcell_channel::session::{self as fixed, Answer, FailureKind, STRING_LONGER};
use hotcell_channel::slot::{PARKED, REPLY, REQUEST, UPCALL};
use hotcell_channel::{sys, wait};
use std::os::fd::AsFd;
use std::time::Duration;

/// Never returns: lies, or serves honestly if the lie is none of these.
pub(crate) fn tell(mut session: Session, lie: &Lie) {
    let number = lie.number;
    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is meant")]
    let word = number as u32;
    match &*lie.name {
        "state" => session.lie_in_calls(move |_, seen| {
            seen.slot.forge_state(word);
            sys::futex_wake(seen.slot.futex(), i32::MAX);
        }),
        "silence" => session.lie_in_calls(|_, _| sleep_for_ever()),
        "silence-from-the-start" => sleep_for_ever(),
        "silence-at-close" => loop {
            let seen = session.next_request();
            if seen.function == fixed::CLOSE {
                sleep_for_ever();
            }
            session.answer_honestly(seen);
        },
        "exit-at-close" => loop {
            let seen = session.next_request();
            if seen.function == fixed::CLOSE {
                process::exit(number);
            }
            session.answer_honestly(seen);
        },
        "lives-on-after-close" => loop {
            let seen = session.next_request();
            session.answer_honestly(seen);
            if seen.function == fixed::CLOSE {
                flip(&session, &[0, 1, 2, 3, 4, UPCALL | PARKED]);
            }
        },
        // The reply is there, and nobody is woken.
        "reply-without-waking" => session.lie_in_calls(|_, seen| {
            std::thread::sleep(Duration::from_millis(20));
            seen.slot.set_word(0, 42);
            seen.slot.forge_state(REPLY);
        }),
        "requeued-sleeper" => session.lie_in_calls(|session, seen| {
            let bell = session.region.bell();
            for _ in 0..100 {
                memory::requeue_sleepers(seen.slot.futex(), bell.futex());
                std::thread::sleep(Duration::from_micros(200));
            }
            seen.slot.set_word(0, 42);
            wait::reply(seen.slot);
        }),
        "replies-before-requests" => {
            beside(session.clone(), |session| flip(&session, &[REPLY, REPLY | PARKED]));
            session.be_honest()
        }
        "replies-to-nobody" => {
            beside(session.clone(), |session| {
                loop {
                    for slot in &session.slots() {
                        if !slot.has_request() {
                            slot.forge_state(REPLY | PARKED);
                        }
                    }
                    std::thread::yield_now();
                }
            });
            session.be_honest()
        }
        "flipping-states" => {
            session.lie_in_calls(|session, _| flip(session, &[0, 1, 2, 3, 4, 5, PARKED, REQUEST | PARKED]));
        }
        "flipping-pending-states" => {
            session.lie_in_calls(|session, _| flip(session, &[REQUEST, REQUEST | PARKED]));
        }
        "wake-storm" => session.lie_in_calls(|session, _| {
            let slots = session.slots();
            loop {
                for slot in &slots {
                    sys::futex_wake(slot.futex(), i32::MAX);
                }
            }
        }),
        "string-length" => session.lie_in_calls(move |_, seen| {
            seen.slot.set_word(1, number);
            wait::reply(seen.slot);
        }),
        "string-with-nul" => session.lie_in_calls(|session, seen| {
            let target = seen.slot.word(0).wrapping_sub(session.arena_address);
            let _ = session.region.write(target, b"ab\0cd");
            seen.slot.set_word(1, 5);
            wait::reply(seen.slot);
        }),
        "string-too-long" => session.lie_in_calls(|_, seen| {
            seen.slot.set_word(1, STRING_LONGER);
            wait::reply(seen.slot);
        }),
        // A string that the host has to fetch; what it is told when it does is the number.
        "string-to-fetch" => loop {
            let seen = session.next_request();
            if seen.function == fixed::READ && number != 3 {
                let status = match number {
                    0 => fixed::FAULT,
                    1 => 12345,
                    _ => fixed::OK,
                };
                seen.slot.set_word(0, status);
                wait::reply(seen.slot);
            } else if seen.function == fixed::FREE {
                seen.slot.set_word(0, fixed::UNKNOWN_BLOCK);
                wait::reply(seen.slot);
            } else if seen.function < FUNCTIONS_BASE {
                session.answer_honestly(seen);
            } else {
                seen.slot.set_word(0, 8);
                seen.slot.set_word(1, 5000);
                wait::reply(seen.slot);
            }
        },
        "directory" => lie_in_directory(session, number, 0),
        // The first request, the load, is answered honestly.
        "directory-resolve" => lie_in_directory(session, number, 1),
        "exit-in-directory" => {
            session.next_request();
            process::exit(number);
        }
        "exit-in-call" => session.lie_in_calls(move |_, _| {
            // The other threads of the host get their calls out meanwhile.
            std::thread::sleep(Duration::from_millis(50));
            process::exit(number);
        }),
        "signal-in-call" => session.lie_in_calls(move |_, _| process::signal(number)),
        "progress-and-exit" => session.lie_in_calls(move |session, _| {
            session.region.progress().take_direct(number);
            session.region.progress().take_ring(number);
            process::die(9);
        }),
        "stop" => session.lie_in_calls(|_, _| process::stop()),
        "deaf-to-termination" => {
            process::ignore_termination();
            session.be_honest()
        }
        "scribble" => {
            let calm = Duration::from_millis(5);
            beside(session.clone(), move |session| {
                // The first answers are honest, so that the host has functions to call.
                std::thread::sleep(calm);
                scribble(&session, number)
            });
            session.be_honest()
        }
        "holes" => {
            beside(session.clone(), move |session| punch(&session, number));
            session.be_honest()
        }
        "break-the-seal" => session.lie_in_calls(|session, seen| {
            let worked = memory::break_the_seal(session.fd.as_fd());
            let page = session.peer.crash_page.get().map_or(0, |fd| memory::break_the_seal(fd.as_fd()));
            seen.slot.set_word(0, worked | page << 16);
            wait::reply(seen.slot);
        }),
        "crash-page" => session.lie_in_calls(move |session, seen| {
            forge_crash_page(session, number);
            // Odd numbers of dying, even ones of living on.
            match number % 4 {
                0 => {
                    seen.slot.set_word(0, 42);
                    wait::reply(seen.slot);
                }
                1 => process::signal(libc::SIGSEGV.unsigned_abs().into()),
                2 => process::signal(libc::SIGTERM.unsigned_abs().into()),
                _ => process::die(9),
            }
        }),
        "dying-for-ever" => session.lie_in_calls(|session, seen| {
            forge_crash_page(session, 4);
            // The caller is about to sleep, or sleeps and is woken for nothing.
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(1));
                sys::futex_wake(seen.slot.futex(), i32::MAX);
            }
            seen.slot.set_word(0, 42);
            wait::reply(seen.slot);
        }),
        "grandchild-scribbles" => session.lie_in_calls(move |session, _| {
            let states: &[&[u32]] = &[&[REQUEST, REQUEST | PARKED], &[0, 1, 2, 3, 4, 5], &[REPLY], &[UPCALL]];
            process::leave_a_scribbler(session, states[usize::try_from(number).unwrap_or(0) % states.len()]);
            process::die(9);
        }),
        "grandchild-holds" => session.lie_in_calls(|_, _| {
            process::leave_a_holder();
            process::die(9);
        }),
        "grandchild-traces" => session.lie_in_calls(|_, _| {
            process::leave_a_tracer(false);
            process::die(9);
        }),
        "grandchild-stops-the-exit" => session.lie_in_calls(|_, _| {
            process::leave_a_tracer(true);
            sleep_for_ever();
        }),
        "shouts" => session.lie_in_calls(|_, _| {
            let text = nasty_text(60_000);
            for _ in 0..100 {
                eprint!("{text}");
                print!("{text}");
            }
            eprint!("last words");
            process::die(9);
        }),
        "control-frames-while-calling" => session.lie_in_calls(move |session, _| {
            control::send_descriptors(&session.peer, b"x", usize::try_from(number).unwrap_or(0));
            sleep_for_ever();
        }),
        _ => stream::tell(session, lie),
    }
}

pub(crate) fn beside(session: Session, body: impl FnOnce(Session) + Send + 'static) {
    std::thread::spawn(move || body(session));
}

/// Writes the states into all slots, one after another, as fast as it can.
pub(crate) fn flip(session: &Session, states: &[u32]) {
    let slots = session.slots();
    while !session.is_stopped() {
        for state in states {
            for slot in &slots {
                slot.forge_state(*state);
            }
        }
    }
}

/// Writes anything anywhere: header, counters, bell, slots, the arena's first MiB.
pub(crate) fn scribble(session: &Session, seed: u64) {
    let raw = Raw::map(session.fd.as_fd(), 1 << 20);
    let mut dice = Dice::new(seed);
    let slots = session.slots();
    while !session.is_stopped() {
        match dice.below(8) {
            0 => raw.store(dice.index(raw.bytes()), dice.edge()),
            1 => raw.store(dice.index(640), dice.edge()),
            2 => raw.store_u32(dice.index(1024), dice.state()),
            3 | 4 => {
                let slot = slots[dice.index(slots.len())];
                slot.set_word(dice.index(15), dice.edge());
            }
            5 => slots[0].set_word(dice.index(3), dice.edge()),
            6 => {
                let [a, b, ..] = dice.next().to_le_bytes();
                slots[dice.index(slots.len())].set_function(u32::from(a), u32::from(b));
            }
            // Rarely: most unknown states end the liar at once.
            _ if dice.below(64) == 0 => slots[dice.index(slots.len())].forge_state(dice.state()),
            _ => session.region.progress().take_ring(dice.edge()),
        }
    }
}

pub(crate) fn punch(session: &Session, seed: u64) {
    let mut dice = Dice::new(seed);
    let geometry = session.region.geometry();
    while !session.is_stopped() {
        match dice.below(3) {
            0 => memory::punch_holes(session.fd.as_fd(), 0, geometry.region_bytes()),
            1 => memory::punch_holes(session.fd.as_fd(), geometry.arena_offset(), 1 << 20),
            _ => memory::punch_holes(session.fd.as_fd(), 4096 * dice.below(512), 4096),
        }
    }
}

fn lie_in_directory(mut session: Session, number: u64, honest: usize) {
    for _ in 0..honest {
        let seen = session.next_request();
        session.answer_honestly(seen);
    }
    loop {
        let seen = session.next_request();
        forge_directory_answer(&session, seen, number);
        wait::reply(seen.slot);
    }
}

/// The number of directory lies.
pub(crate) const DIRECTORY_LIES: u64 = 26;

pub(crate) fn forge_directory_answer(session: &Session, seen: Seen, number: u64) {
    const KINDS: [FailureKind; 11] = [
        FailureKind::NotFound,
        FailureKind::Unreadable,
        FailureKind::NotElf,
        FailureKind::WrongKind,
        FailureKind::MissingDependency,
        FailureKind::MissingImport,
        FailureKind::Linker,
        FailureKind::MissingSymbol,
        FailureKind::UnknownModule,
        FailureKind::TooManyFunctions,
        FailureKind::BadSignature,
    ];
    let slot = seen.slot;
    let say = |answer: &Answer| session.answer_directory(slot, fixed::OK, &encode(answer), None);
    match number {
        0 => session.answer_directory(slot, fixed::OK, &control::random_bytes(7, 200), None),
        1 => session.answer_directory(slot, fixed::OK, &[], None),
        2 => session.answer_directory(slot, fixed::OK, &[0], Some(u64::MAX)),
        3 => session.answer_directory(slot, fixed::OK, &[0xff; 64], Some(slot.word(2) + 1)),
        4 => session.answer_directory(slot, fixed::OK, &[1; 16 << 10], None),
        5 => session.answer_directory(slot, fixed::BAD_REQUEST, &encode(&Answer::Loaded(0)), None),
        6 => session.answer_directory(slot, fixed::TOO_LONG, &[], Some(u64::MAX)),
        7 => session.answer_directory(slot, u64::MAX, &encode(&Answer::Loaded(0)), None),
        // A string that says it is longer than the frame.
        8 => session.answer_directory(slot, fixed::OK, &[2, 0, 0xff, 0xff, 0xff, 0xff, 0x0f, b'x'], None),
        9 => say(&Answer::Resolved(FUNCTIONS_BASE)),
        10 => say(&Answer::Resolved(0)),
        11 => say(&Answer::Resolved(FUNCTIONS_BASE - 1)),
        12 => say(&Answer::Resolved(u32::MAX)),
        13 => say(&Answer::Resolved(hotcell_channel::slot::FUNCTIONS_MAX)),
        14 => say(&Answer::Loaded(u32::MAX)),
        _ => {
            let kind = KINDS[usize::try_from(number - 15).unwrap_or(0) % KINDS.len()];
            say(&Answer::Failed { kind, detail: nasty_text(16_000) });
        }
    }
}

/// Writes into the crash page what no crash handler would.
pub(crate) fn forge_crash_page(session: &Session, number: u64) {
    let Some(fd) = session.peer.crash_page.get() else { return };
    let raw = Raw::map(fd.as_fd(), u64::MAX);
    let mut dice = Dice::new(number);
    match number / 4 {
        0 => (0..raw.bytes()).step_by(8).for_each(|at| raw.store(at, u64::MAX)),
        1 => claim(fd, Some(session.id.wrapping_add(1)), Some(FUNCTIONS_BASE)),
        2 => claim(fd, Some(session.id), Some(u32::MAX - 1)),
        3 => claim(fd, Some(session.id), None),
        kind => {
            (0..raw.bytes()).step_by(8).for_each(|at| raw.store(at, dice.edge()));
            // A stage and a signal that are believed, so that the rest is read.
            raw.store_u32(0, 2 + u32::from(dice.byte() & 1));
            raw.store_u32(8, 1 + u32::from(dice.byte() % 64));
            if kind % 2 == 0 {
                raw.store_u32(40, u32::MAX);
            }
        }
    }
}

fn claim(fd: &std::os::fd::OwnedFd, session: Option<u32>, function: Option<u32>) {
    let Ok(region) = CrashRegion::open(fd.as_fd()) else { return };
    let page: &CrashPage = region.page();
    page.claim();
    page.write_facts(&Facts {
        signal: libc::SIGSEGV,
        code: 1,
        thread: 1,
        session,
        function,
        stack_overflow: true,
        access: Some(Access::Execute),
        syscall: Some(u32::MAX),
        fault_address: Some(u64::MAX),
        pc: u64::MAX,
        sp: 0,
        instruction: [0xff; 16],
        instruction_bytes: usize::MAX,
    });
    while page.push_frame(u64::MAX) {
        let last = page.frame_count() - 1;
        page.name_object(last, nasty_text(64).as_bytes(), u64::MAX);
        page.name_symbol(last, &[0xff; 96], u64::MAX);
    }
    page.finish();
}
