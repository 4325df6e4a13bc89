//! Lets a program under valgrind 3.19 have a `pidfd`, which that version does not know.
//!
//! **Law.** This file defines the C library's `syscall` for the whole bench, so it must do what that does for every number: hand over to the kernel, and turn an error into −1 and `errno`. Only
//! `pidfd_open` is looked at: where the kernel (or valgrind in its place) says `ENOSYS`, a helper process that is not under valgrind is asked for the descriptor, over the socket whose number is
//! in the environment.

use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitStatus};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Number of the helper's socket.
const VARIABLE: &str = "HOTCELL_BENCH_PIDFD_SOCKET";

/// Runs a program for which this process opens pidfds.
pub(crate) fn run_with_helper(command: &mut Command) -> std::io::Result<ExitStatus> {
    let (mut ours, theirs) = UnixStream::pair()?;
    // Valgrind keeps high numbers for itself; a low one is inherited.
    let inherited = nix::unistd::dup(&theirs)?;
    command.env(VARIABLE, inherited.as_raw_fd().to_string());
    let mut child = command.spawn()?;
    drop((theirs, inherited));
    let mut pid = [0; 4];
    while ours.read_exact(&mut pid).is_ok() {
        let pidfd = open_pidfd(i32::from_le_bytes(pid))?;
        let descriptors = [pidfd.as_raw_fd()];
        let message = [ControlMessage::ScmRights(&descriptors)];
        sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(&[0])], &message, MsgFlags::empty(), None)?;
    }
    child.wait()
}

fn open_pidfd(pid: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match i32::try_from(fd) {
        // SAFETY: the descriptor was just made and belongs to nobody else.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Asks the helper.
fn asked_pidfd(pid: usize) -> Option<i32> {
    let socket: i32 = std::env::var(VARIABLE).ok()?.parse().ok()?;
    let pid = i32::try_from(pid).ok()?.to_le_bytes();
    sendmsg::<()>(socket, &[IoSlice::new(&pid)], &[], MsgFlags::empty(), None).ok()?;
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    let mut room = nix::cmsg_space!([i32; 1]);
    let message = recvmsg::<()>(socket, &mut bytes, Some(&mut room), MsgFlags::MSG_CMSG_CLOEXEC).ok()?;
    message.cmsgs().ok()?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    })
}

/// The C library's `syscall`, for this program.
///
/// # Safety
/// As for the kernel's call `number`.
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall(number: i64, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> i64 {
    let result: i64;
    // SAFETY: the kernel's calling convention: number in rax, arguments in these six registers, rcx and r11 lost. What the call does to memory is its caller's promise.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack)
        );
    }
    if number == libc::SYS_pidfd_open
        && result == -i64::from(libc::ENOSYS)
        && let Some(fd) = asked_pidfd(a)
    {
        return fd.into();
    }
    if !(-4095..0).contains(&result) {
        return result;
    }
    // SAFETY: takes nothing, gives the address of the thread's own errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: that address is always valid.
    unsafe { *errno = i32::try_from(-result).unwrap_or(libc::EINVAL) };
    -1
}
