//! The control socket: packets out and in, with at most one descriptor each.
//!
//! **Law.** A packet is at most [`FRAME_BYTES_MAX`] bytes; a longer one, or one whose descriptors do not fit, is refused whole. Descriptors
//! that arrive unasked are closed before anything else is looked at. Neither direction blocks for ever: the host's end is non-blocking.

use crate::control::FRAME_BYTES_MAX;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// One arrived packet.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes; empty at the end of the stream.
    pub bytes: Vec<u8>,
    /// The descriptor that came with it, if the receiver allowed one.
    pub fd: Option<OwnedFd>,
    /// A descriptor came, and this process has no number left for it (`RLIMIT_NOFILE`): the kernel closed it.
    pub lost_fd: bool,
}

/// Why a packet could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PacketError {
    /// Nothing there now (non-blocking socket).
    #[error("no packet is waiting")]
    Empty,
    /// The packet was longer than a frame may be.
    #[error("a control packet was longer than {FRAME_BYTES_MAX} bytes")]
    TooLong,
    /// Descriptors came that nobody asked for, or more than one. They have been closed.
    #[error("a control packet brought unexpected descriptors")]
    UnexpectedDescriptors,
    /// The system call failed.
    #[error("recvmsg on the control socket failed")]
    System(#[source] io::Error),
}

/// Makes the pair: the host's end, non-blocking, and the worker's. Both are close-on-exec.
///
/// # Errors
/// The call's own (`EMFILE` above all).
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (host, worker) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    nix::fcntl::fcntl(&host, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    Ok((host, worker))
}

/// Sends one packet, with `fd` if given.
///
/// # Errors
/// `EAGAIN` when the other side does not read, `EPIPE` when it is gone; never a `SIGPIPE`.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let raw: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None)
        {
            Ok(sent) if sent == bytes.len() => return Ok(()),
            Ok(_) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives one packet. `want_fd`: whether one descriptor may come with it.
///
/// # Errors
/// See [`PacketError`]. A packet that is refused is consumed.
pub fn receive(socket: BorrowedFd<'_>, want_fd: bool) -> Result<Packet, PacketError> {
    // One byte more than a frame, so that a longer packet shows.
    let mut buffer = vec![0u8; FRAME_BYTES_MAX + 1];
    let mut space = cmsg_space!(RawFd);
    let (length, flags, mut fds) = loop {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        // Without room for control data the kernel installs no descriptor at all: it closes what came and says so in the flags.
        let room = want_fd.then_some(space.as_mut_slice());
        match recvmsg::<()>(socket.as_raw_fd(), &mut slices, room, MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => {
                let mut fds = Vec::new();
                for one in message.cmsgs().into_iter().flatten() {
                    if let ControlMessageOwned::ScmRights(raw) = one {
                        fds.extend(raw.into_iter().map(own));
                    }
                }
                break (message.bytes, message.flags, fds);
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(PacketError::Empty),
            // A reset is the end of the stream told differently: the other side died with packets unread.
            Err(Errno::ECONNRESET) => return Ok(Packet { bytes: Vec::new(), fd: None, lost_fd: false }),
            Err(errno) => return Err(PacketError::System(errno.into())),
        }
    };
    // Where one was wanted and not even one is there, this process has no number left for it.
    let lost_fd = want_fd && fds.is_empty() && flags.contains(MsgFlags::MSG_CTRUNC);
    if (flags.contains(MsgFlags::MSG_CTRUNC) && !lost_fd) || fds.len() > usize::from(want_fd) {
        return Err(PacketError::UnexpectedDescriptors); // dropping `fds` closes them
    }
    if flags.contains(MsgFlags::MSG_TRUNC) || length > FRAME_BYTES_MAX {
        return Err(PacketError::TooLong);
    }
    buffer.truncate(length);
    Ok(Packet { bytes: buffer, fd: fds.pop(), lost_fd })
}

#[allow(unsafe_code)]
fn own(fd: RawFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: the kernel has just installed this descriptor for us with SCM_RIGHTS; nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// `poll`: waits until the socket can be read or the timeout has passed. True if it can.
pub fn readable(socket: BorrowedFd<'_>, timeout: std::time::Duration) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    matches!(poll(&mut fds, timeout), Ok(n) if n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_keep_their_borders_and_the_end_is_an_empty_one() {
        let (host, worker) = pair().unwrap();
        send(worker.as_fd(), b"one", None).unwrap();
        send(worker.as_fd(), b"two", None).unwrap();
        assert_eq!(receive(host.as_fd(), false).unwrap().bytes, b"one");
        assert_eq!(receive(host.as_fd(), false).unwrap().bytes, b"two");
        assert!(matches!(receive(host.as_fd(), false), Err(PacketError::Empty)));
        drop(worker);
        assert!(receive(host.as_fd(), false).unwrap().bytes.is_empty());
        assert_eq!(send(host.as_fd(), b"x", None).unwrap_err().raw_os_error(), Some(libc::EPIPE));
    }

    #[test]
    fn one_descriptor_passes_and_unexpected_ones_are_closed() {
        let (host, worker) = pair().unwrap();
        // Other tests open descriptors meanwhile: count only those that lead to the same file as the one that is sent.
        let count = || {
            let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            links.filter(|l| std::fs::read_link(l.path()).is_ok_and(|to| to.ends_with("socket.rs"))).count()
        };
        let file = std::fs::File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/src/socket.rs")).unwrap();
        send(host.as_fd(), b"fd", Some(file.as_fd())).unwrap();
        assert!(receive(worker.as_fd(), true).unwrap().fd.is_some());
        let before = count();
        for n in [1usize, 2, 3, 9] {
            let raw = vec![file.as_raw_fd(); n];
            let rights = [ControlMessage::ScmRights(&raw)];
            sendmsg::<()>(worker.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)
                .unwrap();
            assert!(matches!(receive(host.as_fd(), false), Err(PacketError::UnexpectedDescriptors)));
        }
        assert_eq!(count(), before);
    }

    #[test]
    fn a_packet_over_the_cap_is_refused_and_consumed() {
        let (host, worker) = pair().unwrap();
        send(worker.as_fd(), &vec![1; FRAME_BYTES_MAX + 1], None).unwrap();
        send(worker.as_fd(), &vec![2; FRAME_BYTES_MAX], None).unwrap();
        assert!(matches!(receive(host.as_fd(), false), Err(PacketError::TooLong)));
        assert_eq!(receive(host.as_fd(), false).unwrap().bytes.len(), FRAME_BYTES_MAX);
    }
}
