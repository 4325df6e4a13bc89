//! The honest part: hello, sessions, and the answers that a worker gives.

use crate::process;
use hotcell_channel::control::{self, Hello, ToHost, ToWorker};
use hotcell_channel::layout::{FUNCTIONS_BASE, Geometry};
use hotcell_channel::region::Region;
use hotcell_channel::session::{self as fixed, Answer, Request};
use hotcell_channel::slot::Slot;
use hotcell_channel::{socket, sys, wait};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

/// The liar's end of the control socket.
#[derive(Clone)]
pub(crate) struct Peer {
    socket: Arc<OwnedFd>,
    pub(crate) crash_page: Arc<OnceLock<OwnedFd>>,
}

impl Peer {
    pub(crate) fn from_stdin() -> Option<Self> {
        let socket = sys::take_stdin()?;
        sys::null_stdin().ok()?;
        Some(Self { socket: Arc::new(socket), crash_page: Arc::default() })
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends one frame; that the host has hung up is no concern of a liar's.
    pub(crate) fn send(&self, frame: &[u8]) {
        let _ = socket::send(self.socket(), frame, None);
    }

    pub(crate) fn say(&self, message: &ToHost) {
        self.send(&control::encode(message));
    }

    pub(crate) fn hello(&self) {
        self.send(&Hello::ours().encode());
        self.take_hello();
    }

    /// Reads the host's hello, with which the crash page comes.
    pub(crate) fn take_hello(&self) {
        if let Some(fd) = self.receive().1 {
            let _ = self.crash_page.set(fd);
        }
    }

    /// Waits for a frame of the host. Without a host the process ends.
    fn receive(&self) -> (Vec<u8>, Option<OwnedFd>) {
        match socket::receive(self.socket(), true) {
            Ok(packet) if !packet.bytes.is_empty() => (packet.bytes, packet.fd),
            _ => std::process::exit(122),
        }
    }

    /// Waits for a request to open a session and maps its region.
    pub(crate) fn next_open(&self) -> Session {
        loop {
            let (bytes, fd) = self.receive();
            let Ok(ToWorker::Open { session, slots, arena_bytes, placement, .. }) = control::decode(&bytes)
            else {
                continue;
            };
            let Some(fd) = fd else { continue };
            let geometry = Geometry { slots, arena_bytes, huge_pages: placement.huge_pages };
            let Ok(region) = Region::open(fd.as_fd(), geometry, session) else { process::die(3) };
            // Threads of the liar use it until the process ends.
            let region: &'static Region = Box::leak(Box::new(region));
            return Session {
                id: session,
                region,
                arena_address: region.arena_address(),
                fd: Arc::new(fd),
                peer: self.clone(),
                next: 0,
                resolved: 0,
                taken: (0, 0),
                stop: Arc::default(),
            };
        }
    }

    pub(crate) fn opened(&self, session: &Session) {
        self.say(&ToHost::Opened { session: session.id, arena_address: session.arena_address });
    }

    /// Opens each session that is asked for, and lets a thread of its own lie in it.
    pub(crate) fn serve(&self, tell: impl Fn(Session) + Send + Clone + 'static) -> ! {
        loop {
            let session = self.next_open();
            let tell = tell.clone();
            self.opened(&session);
            std::thread::spawn(move || tell(session));
        }
    }
}

/// A session as the liar sees it.
#[derive(Clone)]
pub(crate) struct Session {
    pub(crate) id: u32,
    pub(crate) region: &'static Region,
    /// Where the host believes the arena to be.
    pub(crate) arena_address: u64,
    pub(crate) fd: Arc<OwnedFd>,
    pub(crate) peer: Peer,
    /// The ring slot whose turn is next.
    next: u32,
    resolved: u32,
    /// What was taken, as an honest worker counts it.
    taken: (u64, u64),
    pub(crate) stop: Arc<AtomicBool>,
}

/// A request that was seen and not answered.
#[derive(Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) slot: &'static Slot,
    pub(crate) function: u32,
}

impl Session {
    /// Looks for requests without ever sleeping on the bell: the host then need not ring.
    pub(crate) fn next_request(&mut self) -> Seen {
        loop {
            if let Some(seen) = self.look() {
                return seen;
            }
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }

    pub(crate) fn look(&mut self) -> Option<Seen> {
        let direct = self.region.direct();
        if direct.has_request() {
            self.taken.0 += 1;
            self.region.progress().take_direct(self.taken.0);
            return Some(Seen { slot: direct, function: direct.function().0 });
        }
        let slots = self.region.geometry().slots;
        let ring = self.region.slot(self.next % slots);
        if ring.has_request() {
            self.taken.1 += 1;
            self.region.progress().take_ring(self.taken.1);
            let (function, next) = ring.function();
            self.next = next;
            return Some(Seen { slot: ring, function });
        }
        None
    }

    /// Answers as a worker would whose functions return their first argument.
    pub(crate) fn answer_honestly(&mut self, seen: Seen) {
        let slot = seen.slot;
        match seen.function {
            fixed::DIRECTORY => {
                let answer = match self.directory_request(slot) {
                    Some(Request::Load { .. }) => Answer::Loaded(0),
                    _ => {
                        self.resolved += 1;
                        Answer::Resolved(FUNCTIONS_BASE + self.resolved - 1)
                    }
                };
                self.answer_directory(slot, fixed::OK, &control::encode(&answer), None);
            }
            function if function < FUNCTIONS_BASE => slot.set_word(0, fixed::OK),
            _ => slot.set_word(1, 0),
        }
        wait::reply(slot);
    }

    pub(crate) fn directory_request(&self, slot: &Slot) -> Option<Request> {
        let mut bytes = vec![0; usize::try_from(slot.word(1).min(fixed::DIRECTORY_BYTES_MAX as u64)).ok()?];
        self.region.read(slot.word(0).wrapping_sub(self.arena_address), &mut bytes).then_some(())?;
        control::decode(&bytes).ok()
    }

    /// Puts bytes where the directory's answer belongs. `length`: what is said about them, if not the truth.
    pub(crate) fn answer_directory(&self, slot: &Slot, status: u64, bytes: &[u8], length: Option<u64>) {
        let _ = self.region.write(slot.word(0).wrapping_sub(self.arena_address), bytes);
        slot.set_word(0, status);
        slot.set_word(1, length.unwrap_or(bytes.len() as u64));
    }

    /// Answers everything honestly, but each function call by `lie`.
    pub(crate) fn lie_in_calls(mut self, mut lie: impl FnMut(&mut Self, Seen)) -> ! {
        loop {
            let seen = self.next_request();
            if seen.function < FUNCTIONS_BASE {
                self.answer_honestly(seen);
            } else {
                lie(&mut self, seen);
            }
        }
    }

    /// Answers everything honestly.
    pub(crate) fn be_honest(mut self) -> ! {
        loop {
            let seen = self.next_request();
            self.answer_honestly(seen);
        }
    }

    /// All slots: the direct one, then the ring's.
    pub(crate) fn slots(&self) -> Vec<&'static Slot> {
        let region = self.region;
        std::iter::once(region.direct()).chain((0..region.geometry().slots).map(|i| region.slot(i))).collect()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }
}
