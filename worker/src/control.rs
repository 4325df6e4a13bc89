//! The worker's main thread: its start, and the control socket until the host is gone.

use crate::{limits, serve};
use hotcell_channel::control::{self, Hello, Scarce, SessionLimits, ToHost, ToWorker};
use hotcell_channel::crash::CrashPage;
use hotcell_channel::layout::Geometry;
use hotcell_channel::placement::{self, Wanted};
use hotcell_channel::region::{CrashRegion, Region};
use hotcell_channel::{socket, sys};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

/// Exit code: standard input is not a control socket.
pub const EXIT_NO_SOCKET: i32 = 121;
/// Exit code: the host is gone.
pub const EXIT_HOST_GONE: i32 = 122;
/// Exit code: the host speaks another version or layout, or broke the protocol.
pub const EXIT_PROTOCOL: i32 = 123;
/// Exit code: the limits that the host asked for cannot be put in force.
pub const EXIT_LIMITS: i32 = 120;

fn give_up(code: i32, why: &dyn std::fmt::Display) -> ! {
    eprintln!("hotcell-worker: {why}");
    sys::exit_now(code)
}

/// Moves the control socket away from standard input, which becomes `/dev/null`, as do standard output and standard error if the host has none to inherit.
pub(crate) fn take_socket() -> OwnedFd {
    let Some(socket) = sys::take_stdin() else { give_up(EXIT_NO_SOCKET, &"standard input is closed") };
    if let Err(error) = sys::null_stdin().and_then(|()| sys::fill_standard_output()) {
        give_up(
            EXIT_NO_SOCKET,
            &format_args!("/dev/null cannot take the place of a standard stream: {error}"),
        );
    }
    socket
}

/// Makes the kernel kill this process when its host is gone, and checks that it is not gone already.
pub(crate) fn tie_to_host(host: u32) {
    // The signal is sent when the *thread* that started us ends; hotcell starts workers from a thread that lives as long as
    // the host. The control socket's end is the second string: see `serve`.
    if let Err(error) = sys::set_parent_death_signal(libc::SIGKILL) {
        give_up(EXIT_HOST_GONE, &format_args!("prctl(PR_SET_PDEATHSIG): {error}"));
    }
    // If the host ended before the line above, we have a new parent and no signal will come.
    if std::os::unix::process::parent_id() != host {
        sys::exit_now(EXIT_HOST_GONE);
    }
}

/// Closes whatever the host's process let slip through `exec`.
pub(crate) fn close_other_descriptors(socket: &OwnedFd) {
    let ours = socket.as_raw_fd().cast_unsigned();
    for (first, last) in [(3, ours - 1), (ours + 1, u32::MAX)] {
        if first <= last && sys::close_range(first, last).is_err() {
            // Before Linux 5.9: one by one.
            close_each(first, last);
        }
    }
}

fn close_each(first: u32, last: u32) {
    let Ok(list) = std::fs::read_dir("/proc/self/fd") else { return };
    let open: Vec<i32> = list.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for fd in open {
        if (first..=last).contains(&fd.cast_unsigned()) {
            let _ = nix_close(fd);
        }
    }
}

#[allow(unsafe_code)]
fn nix_close(fd: i32) -> i32 {
    // SAFETY: called at the start of the process for descriptors that nothing here owns.
    unsafe { libc::close(fd) }
}

/// Says hello, checks the host's hello and maps the crash page that comes with it.
pub(crate) fn handshake(socket: &OwnedFd) -> &'static CrashPage {
    if socket::send(socket.as_fd(), &Hello::ours().encode(), None).is_err() {
        sys::exit_now(EXIT_HOST_GONE);
    }
    let packet = match socket::receive(socket.as_fd(), true) {
        Ok(packet) if packet.bytes.is_empty() => sys::exit_now(EXIT_HOST_GONE),
        Ok(packet) => packet,
        Err(error) => give_up(EXIT_PROTOCOL, &error),
    };
    // Nothing of the host's is mapped before this check.
    if let Err(mismatch) = Hello::check(&packet.bytes) {
        give_up(EXIT_PROTOCOL, &format_args!("the host does not fit this worker: {mismatch}"));
    }
    let Some(fd) = packet.fd else { give_up(EXIT_PROTOCOL, &"the host's hello brought no crash page") };
    match CrashRegion::open(fd.as_fd()) {
        Ok(region) => Box::leak(Box::new(region)).page(),
        Err(error) => give_up(EXIT_PROTOCOL, &error),
    }
}

/// Serves the control socket until the host is gone. Calls never pass here, so a call that hangs does not keep this thread from noticing.
pub(crate) fn serve(socket: &OwnedFd) -> ! {
    // Limits that came for sessions that are about to be asked for.
    let mut limited: BTreeMap<u32, SessionLimits> = BTreeMap::new();
    loop {
        let packet = match socket::receive(socket.as_fd(), true) {
            Ok(packet) if packet.bytes.is_empty() => sys::exit_now(EXIT_HOST_GONE),
            Ok(packet) => packet,
            Err(error) => give_up(EXIT_PROTOCOL, &error),
        };
        match control::decode::<ToWorker>(&packet.bytes) {
            Ok(ToWorker::Open { session, slots, arena_bytes, policy, stack_bytes, placement }) => {
                let geometry = Geometry { slots, arena_bytes, huge_pages: placement.huge_pages };
                let limits = limited.remove(&session).unwrap_or_default();
                let fd =
                    if packet.lost_fd { Err(NotOpened::Scarce(Scarce::OpenFiles)) } else { Ok(packet.fd) };
                let opened = fd.and_then(|fd| {
                    open(socket, fd, session, geometry, How { policy, stack_bytes, placement, limits })
                });
                if let Err(not_opened) = opened {
                    not_opened.tell(socket, session);
                }
            }
            Ok(ToWorker::LimitWorker(limits)) => {
                if let Err(why) = limits::apply(&limits) {
                    give_up(EXIT_LIMITS, &format_args!("its limits cannot be put in force: {why}"));
                }
            }
            Ok(ToWorker::LimitSession { session, limits }) => drop(limited.insert(session, limits)),
            Err(error) => give_up(EXIT_PROTOCOL, &error),
        }
    }
}

/// Why a session is not opened.
enum NotOpened {
    Refused(String),
    Scarce(Scarce),
}

impl NotOpened {
    /// With its own words, unless the system says that there are no more descriptors or threads.
    fn because(what: &str) -> impl Fn(std::io::Error) -> Self {
        move |error| match error.raw_os_error() {
            Some(libc::EMFILE) => Self::Scarce(Scarce::OpenFiles),
            Some(libc::EAGAIN) => Self::Scarce(Scarce::Processes),
            _ => Self::Refused(format!("{what}: {error}")),
        }
    }

    fn tell(self, socket: &OwnedFd, session: u32) {
        let message = match self {
            Self::Refused(reason) => ToHost::Refused { session, reason },
            Self::Scarce(what) => ToHost::Scarce { session, what },
        };
        if socket::send(socket.as_fd(), &control::encode(&message), None).is_err() {
            sys::exit_now(EXIT_HOST_GONE);
        }
    }
}

/// How a session's thread is to be.
struct How {
    policy: hotcell_channel::wait::Policy,
    stack_bytes: u64,
    placement: Wanted,
    limits: SessionLimits,
}

fn open(
    socket: &OwnedFd,
    fd: Option<OwnedFd>,
    session: u32,
    geometry: Geometry,
    how: How,
) -> Result<(), NotOpened> {
    let How { policy, stack_bytes, placement, limits } = how;
    let fd = fd.ok_or_else(|| NotOpened::Refused("no region came with the request".into()))?;
    let region =
        Region::open(fd.as_fd(), geometry, session).map_err(|e| NotOpened::Refused(e.to_string()))?;
    let answers =
        socket.try_clone().map_err(NotOpened::because("the control socket cannot be duplicated"))?;
    let room = limits::make_room(stack_bytes);
    std::thread::Builder::new()
        .name(format!("session-{session}"))
        .stack_size(usize::try_from(stack_bytes).unwrap_or(usize::MAX))
        .spawn(move || {
            let _room = room;
            let region = Arc::new(region);
            let _watched = match limits::watch_session(session, limits, &region) {
                Ok(watched) => watched,
                Err(why) => return NotOpened::Refused(why).tell(&answers, session),
            };
            let arena_address = region.arena_address();
            let opened = match placement::place(&region, &placement) {
                Ok(placed) if placement.is_any() => ToHost::Placed { session, arena_address, placed },
                Ok(_) => ToHost::Opened { session, arena_address },
                Err(failure) => {
                    let unplaced = ToHost::Unplaced { session, failure };
                    let _ = socket::send(answers.as_fd(), &control::encode(&unplaced), None);
                    return;
                }
            };
            serve::serve(session, &region, policy, limits.memory_bytes, |listens| {
                let answer = match listens {
                    Ok(()) => opened,
                    Err(reason) => ToHost::Refused { session, reason: reason.into() },
                };
                let _ = socket::send(answers.as_fd(), &control::encode(&answer), None);
                drop(answers);
            });
        })
        .map(drop)
        .map_err(NotOpened::because("the session's thread cannot be started"))
}
