//! Connects to the UAPI socket of a running daemon, which need not be ours, nor answer.

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Where the sockets of all implementations are.
pub const DIRECTORY: &str = "/var/run/wireguard";

/// How often a daemon is asked that has more clients waiting than it allows.
const INTERVAL: Duration = Duration::from_millis(20);

/// The path of an interface's socket.
pub fn path(interface: &str) -> String {
    format!("{DIRECTORY}/{interface}.sock")
}

/// Connects to a socket without being blocked by a daemon that accepts no client.
///
/// # Errors
/// As connect(2); EAGAIN if as many clients as the daemon allows still wait at the deadline.
pub fn connect_until(path: &str, deadline: Instant) -> nix::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    loop {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let client = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        match connect(client.as_raw_fd(), &address) {
            Err(Errno::EAGAIN) if Instant::now() < deadline => sleep(INTERVAL),
            connected => return connected.map(|()| UnixStream::from(client)),
        }
    }
}

/// The line for a socket that cannot be connected to.
pub fn refusal(interface: &str, errno: Errno) -> String {
    let path = path(interface);
    match errno {
        Errno::ENOENT | Errno::ECONNREFUSED => {
            format!(
                "no daemon serves {interface}: no process listens on {path}; start it: wgsep {interface}"
            )
        }
        Errno::EAGAIN => {
            format!(
                "the daemon of {interface} accepts no clients: {path} has as many waiting as it allows; see its log, and if it is stopped or hangs, restart it"
            )
        }
        errno => format!("{path}: {}; run as root or as its owner", errno.desc()),
    }
}
