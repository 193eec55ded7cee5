//! How a child ended. The unsafe code of this crate is here and in `unread`.

use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::unistd::Pid;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A child that has ended and was not reaped.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Its number.
    pub pid: Pid,
    /// CLD_EXITED, or that a signal killed it.
    pub how: c_int,
    /// The exit status, or the number of the signal, which may be a real-time signal: nix has no name for those, and
    /// its waitid reports the child as an error.
    pub status: c_int,
}

/// The child of this pidfd, or any child, if it has ended; does not wait for that.
///
/// # Errors
/// ECHILD if there is no such child.
pub fn ended_child(pidfd: Option<BorrowedFd<'_>>) -> nix::Result<Option<Ended>> {
    let one = |pidfd: BorrowedFd<'_>| (libc::P_PIDFD, pidfd.as_raw_fd().cast_unsigned());
    let (kind, id) = pidfd.map_or((libc::P_ALL, 0), one);
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: an all-zero siginfo_t is a valid one: of no signal.
    let mut info: libc::siginfo_t = unsafe { core::mem::zeroed() };
    // SAFETY: plain integers, and a live structure, which waitid(2) writes.
    Errno::result(unsafe { libc::waitid(kind, id, &raw mut info, flags) })?;
    // SAFETY: the fields are those of SIGCHLD, or zero; this one is a plain integer,
    let pid = Pid::from_raw(unsafe { info.si_pid() });
    // SAFETY: and so is this.
    let status = unsafe { info.si_status() };
    Ok((pid.as_raw() != 0).then_some(Ended { pid, how: info.si_code, status }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn the_end_of_a_child_is_seen_whatever_the_signal() {
        for (script, how, status) in [
            ("exit 7", libc::CLD_EXITED, 7),
            ("ulimit -c 0; kill -9 $$", libc::CLD_KILLED, libc::SIGKILL),
            ("kill -37 $$", libc::CLD_KILLED, 37),
        ] {
            let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            let pid = Pid::from_raw(child.id().cast_signed());
            // SAFETY: plain integers.
            let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
            // SAFETY: the kernel has just made this descriptor for us alone.
            let pidfd = unsafe { OwnedFd::from_raw_fd(opened as c_int) };
            let began = Instant::now();
            let ended = loop {
                match ended_child(Some(pidfd.as_fd())).unwrap() {
                    Some(ended) => break ended,
                    None => assert!(began.elapsed() < Duration::from_secs(20), "{script}"),
                }
            };
            assert_eq!((ended.pid, ended.how, ended.status), (pid, how, status), "{script}");
            let reaped = child.wait().unwrap();
            assert!(reaped.code() == Some(status) || reaped.signal() == Some(status));
        }
    }
}
