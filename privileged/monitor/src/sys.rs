//! The system calls that no safe crate offers. All the unsafe code of this crate is here.

use nix::errno::Errno;
use nix::libc::{self, c_int};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sets a socket option whose value is an int.
pub(crate) fn set_option(
    socket: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    value: c_int,
) -> nix::Result<()> {
    let (value, len) = (&raw const value, size_of::<c_int>() as libc::socklen_t);
    // SAFETY: the value is live and as long as said.
    Errno::result(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.cast(), len) })
        .map(drop)
}

/// Has a socket drop every packet that arrives, for good: no process can take the filter away.
pub(crate) fn reject_packets(socket: BorrowedFd<'_>) -> nix::Result<()> {
    // One instruction: return 0, the number of bytes to keep.
    let mut code = [libc::sock_filter { code: libc::BPF_RET as u16, jt: 0, jf: 0, k: 0 }];
    let program = libc::sock_fprog { len: 1, filter: code.as_mut_ptr() };
    let (value, len) = (&raw const program, size_of::<libc::sock_fprog>() as libc::socklen_t);
    let (level, name) = (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER);
    // SAFETY: the value is live and as long as said, and leads to as many instructions as it says.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.cast(), len) };
    Errno::result(set)?;
    set_option(socket, level, libc::SO_LOCK_FILTER, 1)
}

/// Kills the process that a pidfd refers to.
pub(crate) fn kill(child: BorrowedFd<'_>) -> nix::Result<()> {
    let none: *const libc::siginfo_t = core::ptr::null();
    // SAFETY: plain integers, and a null pointer, which means no further information.
    let sent = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, child.as_raw_fd(), libc::SIGKILL, none, 0)
    };
    Errno::result(sent).map(drop)
}
