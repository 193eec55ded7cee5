//! No way out for descriptors. sendmsg(2) is the packet path's, and no filter sees the control messages that
//! its pointers lead to; so the kernel's own quota refuses to send a descriptor over a unix socket.
//!
//! A user without privilege may have as many descriptors in flight, sent and not received yet, as
//! RLIMIT_NOFILE allows; one more is ETOOMANYREFS (linux/net/unix/af_unix.c, `too_many_unix_fds`). Before the
//! dataplane is executed, its user has more of them in flight than its limit, which it cannot raise, in a
//! socket whose other end the helper holds and never reads.

use crate::limits::MAX_DESCRIPTORS;
use crate::report::State;
use nix::Error as Errno;

/// Sends so many descriptors with one message, to a socket that is never read.
pub type Send<'a> = &'a dyn Fn(usize) -> nix::Result<()>;

/// Most descriptors that the kernel passes with one message (SCM_MAX_FD).
const AT_ONCE: usize = 253;
/// Messages that take more descriptors than any limit of a dataplane.
const MESSAGES: usize = MAX_DESCRIPTORS as usize / AT_ONCE + 1;

/// Puts more descriptors in flight than the dataplane's limit, counted as those of this process's real uid.
///
/// # Errors
/// ETOOMANYREFS if others of that user had used the quota up before, without CAP_SYS_RESOURCE or
/// CAP_SYS_ADMIN; as sendmsg(2).
pub(crate) fn fill(send: Send<'_>) -> nix::Result<()> {
    (0..MESSAGES).try_for_each(|_| send(AT_ONCE))
}

/// Whether the kernel refuses one more, once limit, user and capabilities are as they stay.
pub(crate) fn is_full(send: Send<'_>) -> State {
    match send(1) {
        Err(Errno::ETOOMANYREFS) => State::Applied,
        Ok(()) => State::Unsupported,
        Err(errno) => State::degraded(errno),
    }
}

const _: () = assert!(MESSAGES * AT_ONCE > MAX_DESCRIPTORS as usize);

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    #[test]
    fn more_is_sent_than_any_limit_and_only_a_full_quota_is_one() {
        let sent = Cell::new(0);
        let count = |descriptors| {
            sent.set(sent.get() + descriptors);
            Ok(())
        };
        fill(&count).unwrap();
        assert!(sent.get() as u64 > MAX_DESCRIPTORS);
        assert_eq!(fill(&|_| Err(Errno::EPERM)), Err(Errno::EPERM));
        assert_eq!(is_full(&|_| Err(Errno::ETOOMANYREFS)), State::Applied);
        assert_eq!(is_full(&|_| Err(Errno::EPERM)), State::degraded(Errno::EPERM));
        assert_eq!(is_full(&|_| Ok(())), State::Unsupported);
    }
}
