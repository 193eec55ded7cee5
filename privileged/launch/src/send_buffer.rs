//! The send buffer that UDP sockets get here: all peers share it.

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use std::os::unix::net::UnixDatagram;

/// In bytes, what the UDP sockets ask for.
const WANTED: usize = 64 << 20;
/// In bytes as the kernel counts them, which doubles what is asked for. A link's queue is 1,000 packets long by
/// default, each of which may be a super-packet of 64 KiB: with a smaller buffer, one congested link fills it
/// before its queue drops anything.
const ENOUGH: usize = 1000 << 16;

/// A warning where the limits of the system keep the send buffer small; `may_exceed` as for the UDP sockets.
///
/// The limit is read off another socket: sysctl files may be hidden, and a limit does not bind all callers.
pub fn warning(may_exceed: bool) -> Option<String> {
    let socket = UnixDatagram::unbound().ok()?;
    let exceeds = may_exceed && setsockopt(&socket, sockopt::SndBufForce, &WANTED).is_ok();
    if !exceeds {
        let _smaller = setsockopt(&socket, sockopt::SndBuf, &WANTED);
    }
    getsockopt(&socket, sockopt::SndBuf).ok().and_then(line)
}

fn line(len: usize) -> Option<String> {
    (len < ENOUGH).then(|| {
        format!(
            "all peers share a send buffer of only {len} bytes, so that a congested link delays or drops datagrams to all peers, on other links too; raise the limit on the host and start wgsep again: sysctl net.core.wmem_max={WANTED}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_send_buffer_that_one_link_can_fill_is_warned_of() {
        // With the kernel's default of net.core.wmem_max, and as wanted.
        let warning = line(2 * 212_992).unwrap();
        assert!(warning.contains("425984 bytes") && warning.ends_with("wmem_max=67108864"));
        assert_eq!(line(2 * WANTED), None);
        assert_eq!(line(ENOUGH), None);
    }
}
