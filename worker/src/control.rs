//! The worker's main thread: its start, and the control socket until the host is gone.

use crate::serve;
use hotcell_channel::control::{self, Hello, ToHost, ToWorker};
use hotcell_channel::crash::CrashPage;
use hotcell_channel::layout::Geometry;
use hotcell_channel::placement::{self, Wanted};
use hotcell_channel::region::{CrashRegion, Region};
use hotcell_channel::{socket, sys};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

/// Exit code: standard input is not a control socket.
pub const EXIT_NO_SOCKET: i32 = 121;
/// Exit code: the host is gone.
pub const EXIT_HOST_GONE: i32 = 122;
/// Exit code: the host speaks another version or layout, or broke the protocol.
pub const EXIT_PROTOCOL: i32 = 123;

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
    loop {
        let packet = match socket::receive(socket.as_fd(), true) {
            Ok(packet) if packet.bytes.is_empty() => sys::exit_now(EXIT_HOST_GONE),
            Ok(packet) => packet,
            Err(error) => give_up(EXIT_PROTOCOL, &error),
        };
        match control::decode::<ToWorker>(&packet.bytes) {
            Ok(ToWorker::Open { session, slots, arena_bytes, policy, stack_bytes, placement }) => {
                let geometry = Geometry { slots, arena_bytes, huge_pages: placement.huge_pages };
                let opened = open(socket, packet.fd, session, geometry, policy, stack_bytes, placement);
                if let Err(reason) = opened {
                    let refused = ToHost::Refused { session, reason };
                    if socket::send(socket.as_fd(), &control::encode(&refused), None).is_err() {
                        sys::exit_now(EXIT_HOST_GONE);
                    }
                }
            }
            Err(error) => give_up(EXIT_PROTOCOL, &error),
        }
    }
}

fn open(
    socket: &OwnedFd,
    fd: Option<OwnedFd>,
    session: u32,
    geometry: Geometry,
    policy: hotcell_channel::wait::Policy,
    stack_bytes: u64,
    placement: Wanted,
) -> Result<(), String> {
    let fd = fd.ok_or("no region came with the request")?;
    let region = Region::open(fd.as_fd(), geometry, session).map_err(|e| e.to_string())?;
    let answers = socket.try_clone().map_err(|e| e.to_string())?;
    std::thread::Builder::new()
        .name(format!("session-{session}"))
        .stack_size(usize::try_from(stack_bytes).unwrap_or(usize::MAX))
        .spawn(move || {
            let region = Arc::new(region);
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
            serve::serve(session, &region, policy, || {
                let _ = socket::send(answers.as_fd(), &control::encode(&opened), None);
                drop(answers);
            });
        })
        .map(drop)
        .map_err(|e| format!("the session's thread cannot be started: {e}"))
}
