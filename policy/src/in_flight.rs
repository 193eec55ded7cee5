//! No way out for descriptors. sendmsg(2) is the packet path's, and no filter sees the control messages that
//! its pointers lead to; so the kernel's own quota refuses to send a descriptor over a unix socket.
//!
//! A user without privilege may have as many descriptors in flight, sent and not received yet, as
//! RLIMIT_NOFILE allows; once there are more, each further message is ETOOMANYREFS (linux/net/unix/af_unix.c,
//! `too_many_unix_fds`). Before the dataplane is executed, its user has more of them in flight than its limit,
//! which it cannot raise, in a socket whose other end the helper holds and never reads.
//!
//! The user may have others in flight, of another daemon that has the same account. They go with that daemon, so
//! each puts as many in flight as its own dataplane takes, however many there are. Where these are more than the
//! limit of the launcher, the kernel refuses it to a launcher without privilege, and the layer is degraded.

use crate::limits::MAX_DESCRIPTORS;
use crate::report::State;
use nix::Error as Errno;

/// Sends so many descriptors with one message, to a socket that is never read.
pub type Send<'a> = &'a dyn Fn(usize) -> nix::Result<()>;

/// Most descriptors that the kernel passes with one message (SCM_MAX_FD).
const AT_ONCE: u64 = 253;

/// Puts more descriptors in flight than a process may have whose limit is this one and at most
/// [`MAX_DESCRIPTORS`], counted as those of this process's real uid. Returns the limit that they suffice for, which
/// may be lower: of what one message more would have brought, the kernel refuses all.
///
/// # Errors
/// ETOOMANYREFS if the user has more in flight already than this process's limit, without CAP_SYS_RESOURCE and
/// CAP_SYS_ADMIN; as sendmsg(2).
pub(crate) fn fill(send: Send<'_>, limit: u64) -> nix::Result<u64> {
    let enough = limit.min(MAX_DESCRIPTORS) + 1;
    let mut sent = 0;
    while sent < enough {
        let count = AT_ONCE.min(enough - sent);
        match send(count as usize) {
            Ok(()) => sent += count,
            Err(Errno::ETOOMANYREFS) if sent > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(sent - 1)
}

/// Whether the kernel refuses one more, once limit, user and capabilities are as they stay.
pub(crate) fn is_full(send: Send<'_>) -> State {
    match send(1) {
        Err(Errno::ETOOMANYREFS) => State::Applied,
        Ok(()) => State::Unsupported,
        Err(errno) => State::degraded(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    /// Fills, with a launcher's limit and so many in flight already; the outcome, and what was sent.
    fn filled(limit: u64, before: u64) -> (nix::Result<u64>, u64) {
        let sent = Cell::new(0);
        let count = |descriptors| {
            if before + sent.get() > limit {
                return Err(Errno::ETOOMANYREFS);
            }
            sent.set(sent.get() + descriptors as u64);
            Ok(())
        };
        (fill(&count, limit), sent.get())
    }

    #[test]
    fn more_is_sent_than_the_limit_that_it_is_for() {
        assert_eq!(filled(1024, 0), (Ok(256), 257));
        assert_eq!(filled(100, 0), (Ok(100), 101));
        assert_eq!(filled(1024, 1024), (Ok(252), 253), "the last that fit");
        assert_eq!(filled(1024, 1025), (Err(Errno::ETOOMANYREFS), 0));
        assert_eq!(fill(&|_| Err(Errno::EPERM), 1024), Err(Errno::EPERM));
    }

    #[test]
    fn only_a_full_quota_is_one() {
        assert_eq!(is_full(&|_| Err(Errno::ETOOMANYREFS)), State::Applied);
        assert_eq!(is_full(&|_| Err(Errno::EPERM)), State::degraded(Errno::EPERM));
        assert_eq!(is_full(&|_| Ok(())), State::Unsupported);
    }
}
