//! Lies on the control socket.

use crate::Lie;
use crate::peer::Peer;
use crate::process::{self, sleep_for_ever};
use hotcell_channel::control::{self, FRAME_BYTES_MAX, Hello, ToHost};
use hotcell_channel::placement::{Failure, Placed, Wish};
use nix::sys::socket::{ControlMessage, MsgFlags, Shutdown, sendmsg, shutdown};
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// Tells the lie if it is one of these; returns, with the handshake done, if it is not.
pub(crate) fn tell(peer: &Peer, lie: &Lie) {
    before_hello(peer, lie);
    peer.hello();
    after_hello(peer, lie);
}

fn before_hello(peer: &Peer, lie: &Lie) {
    let ours = Hello::ours();
    let number = usize::try_from(lie.number).unwrap_or(usize::MAX);
    match &*lie.name {
        "wrong-magic" => peer.send(&Hello { magic: lie.number, ..ours }.encode()),
        "wrong-version" => peer.send(&Hello { protocol: u32::MAX, ..ours }.encode()),
        "wrong-layout" => peer.send(&Hello { layout_hash: !ours.layout_hash, ..ours }.encode()),
        // Too short or too long by the number, and right otherwise.
        "hello-of-bytes" => {
            let mut frame = ours.encode().to_vec();
            frame.resize(number, 0);
            peer.send(&frame);
        }
        "no-hello" => {}
        "late-hello" => {
            std::thread::sleep(Duration::from_millis(lie.number));
            return;
        }
        "hello-with-descriptors" => send_descriptors(peer, &ours.encode(), number),
        "close-before-hello" => process::close_socket(peer),
        "exit-before-hello" => process::exit(lie.number),
        "signal-before-hello" => process::signal(lie.number),
        _ => return,
    }
    sleep_for_ever();
}

fn after_hello(peer: &Peer, lie: &Lie) {
    let number = usize::try_from(lie.number).unwrap_or(usize::MAX);
    match &*lie.name {
        "hello-twice" => peer.send(&Hello::ours().encode()),
        "close-after-hello" => process::close_socket(peer),
        "shut-down-reading" => drop(shutdown(peer.socket().as_raw_fd(), Shutdown::Read)),
        "shut-down-writing" => drop(shutdown(peer.socket().as_raw_fd(), Shutdown::Write)),
        "exit-after-hello" => process::exit(lie.number),
        "unasked-opened" => peer.say(&ToHost::Opened { session: u32::MAX, arena_address: 0 }),
        "unasked-refused" => peer.say(&ToHost::Refused { session: 0, reason: "no".to_owned() }),
        "garbage-frame" => peer.send(&random_bytes(lie.number, 1 + number % FRAME_BYTES_MAX)),
        "empty-frame" => peer.send(&[]),
        "frame-over-the-cap" => peer.send(&vec![1; FRAME_BYTES_MAX + 1 + number]),
        "flood-of-hellos" => loop {
            peer.send(&Hello::ours().encode());
        },
        "flood-of-garbage" => loop {
            peer.send(&[0xff; FRAME_BYTES_MAX]);
        },
        "frame-with-descriptors" => send_descriptors(peer, b"x", number),
        // With a session to be opened.
        "never-opens" => drop(peer.next_open()),
        "never-reads" => {}
        "opens-another" => {
            let session = peer.next_open();
            peer.say(&ToHost::Opened { session: session.id.wrapping_add(1), arena_address: 0 });
        }
        "opens-twice" => {
            let session = peer.next_open();
            peer.opened(&session);
            peer.opened(&session);
            session.be_honest();
        }
        "opens-then-refuses" => {
            let session = peer.next_open();
            peer.opened(&session);
            peer.say(&ToHost::Refused { session: session.id, reason: String::new() });
            session.be_honest();
        }
        "refuses-a-placement" => {
            let session = peer.next_open().id;
            let errno = i32::try_from(lie.number).unwrap_or(i32::MIN);
            let failure = Failure { wish: Wish::RealTime, errno };
            peer.say(&ToHost::Unplaced { session, failure });
        }
        "places-at-will" => {
            let session = peer.next_open();
            let mut placed = Placed { cpu: Some(u32::MAX), real_time: Some(0), ..Placed::default() };
            placed.backing.locked_bytes = u64::MAX;
            let arena_address = session.arena_address;
            peer.say(&ToHost::Placed { session: session.id, arena_address, placed });
            session.be_honest();
        }
        "refuses-with-control-characters" => loop {
            let session = peer.next_open().id;
            peer.say(&ToHost::Refused { session, reason: nasty_text(4000) });
        },
        "refuses-with-a-lie-about-length" => {
            let session = peer.next_open().id;
            let mut frame = control::encode(&ToHost::Refused { session, reason: String::new() });
            // The length, as a varint: all ones.
            frame.pop();
            frame.extend([0xff; 9]);
            frame.push(1);
            peer.send(&frame);
        }
        "refuses-in-no-text" => {
            let session = peer.next_open().id;
            let mut frame = control::encode(&ToHost::Refused { session, reason: "ab".to_owned() });
            let end = frame.len();
            frame[end - 2..].copy_from_slice(&[0xff, 0xfe]);
            peer.send(&frame);
        }
        "half-an-answer" => {
            let session = peer.next_open();
            let frame = control::encode(&ToHost::Opened { session: session.id, arena_address: u64::MAX });
            peer.send(&frame[..frame.len() / 2]);
        }
        "answer-and-more" => {
            let session = peer.next_open();
            let mut frame = control::encode(&ToHost::Opened { session: session.id, arena_address: 0 });
            frame.push(0);
            peer.send(&frame);
        }
        "answer-with-descriptors" => {
            let session = peer.next_open();
            let frame = control::encode(&ToHost::Opened { session: session.id, arena_address: 0 });
            send_descriptors(peer, &frame, number);
        }
        "answer-over-the-cap" => {
            let session = peer.next_open().id;
            peer.say(&ToHost::Refused { session, reason: "x".repeat(FRAME_BYTES_MAX) });
        }
        "exit-at-open" => {
            drop(peer.next_open());
            process::exit(lie.number);
        }
        "arena-address" => {
            let mut session = peer.next_open();
            session.arena_address = lie.number;
            peer.opened(&session);
            open_further(peer);
            session.be_honest();
        }
        _ => return,
    }
    sleep_for_ever();
}

/// Goes on opening sessions, honestly.
fn open_further(peer: &Peer) {
    let peer = peer.clone();
    std::thread::spawn(move || -> () { peer.serve(|session| -> () { session.be_honest() }) });
}

/// One frame with so many descriptors.
pub(crate) fn send_descriptors(peer: &Peer, frame: &[u8], count: usize) {
    let raw = vec![peer.socket().as_raw_fd(); count];
    let rights = [ControlMessage::ScmRights(&raw)];
    let socket = peer.socket().as_raw_fd();
    let sent = sendmsg::<()>(socket, &[IoSlice::new(frame)], &rights, MsgFlags::MSG_NOSIGNAL, None);
    if let Err(error) = sent {
        eprintln!("hotcell-hostile: {count} descriptors could not be sent: {error}");
    }
}

/// Text that a terminal or a log should never see as it is.
pub(crate) fn nasty_text(bytes: usize) -> String {
    let piece = "\x1b]0;owned\x07\x1b[2J\r\n\0\u{9b}31m\u{202e}txt.exe\u{2066}\u{2028}\x7f";
    let mut text = piece.repeat(bytes / piece.len() + 1);
    let mut end = bytes;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// Bytes that differ with the seed and are the same for the same seed.
pub(crate) fn random_bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut dice = crate::memory::Dice::new(seed);
    (0..count).map(|_| dice.byte()).collect()
}
