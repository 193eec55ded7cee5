//! Connects to the service manager (sd_notify(3)), and has it store the TUN queues, so that a daemon that is started
//! after a crash finds the interface as it was.

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;
use wgsep_journal::{STORED_QUEUE, ServiceManager};
use wgsep_monitor::Step;

/// Connects to the manager that NOTIFY_SOCKET names; WATCHDOG_USEC is the interval of its watchdog.
///
/// # Errors
/// If the socket cannot be connected to, or is not a Unix socket.
pub fn manager_of_environment() -> io::Result<ServiceManager> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
        return Ok(ServiceManager::default());
    };
    let watchdog = std::env::var("WATCHDOG_USEC").ok().and_then(|value| parse_interval(&value));
    Ok(ServiceManager::new(connect(name.as_bytes())?, watchdog))
}

/// The descriptor store of the service manager.
pub struct Store {
    /// The TUN queues in it, of a daemon that crashed.
    pub queues: Vec<OwnedFd>,
    /// How many descriptors it takes.
    pub capacity: usize,
}

/// Descriptors that the manager stores. systemd sets the variable since version 254, the unit for versions before. A
/// manager without it might leave the queues unread, and the interface would outlive the daemon.
pub fn capacity_of_environment() -> usize {
    std::env::var("FDSTORE").ok().and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// Has the manager store all queues of an interface, under one name: which of them is detached, the kernel says.
/// Returns a line for the log if it does not.
pub fn store(manager: &ServiceManager, capacity: usize, queues: &[RawFd]) -> Option<String> {
    let socket = manager.socket().filter(|_| capacity > 0)?;
    let needed = queues.len();
    if capacity < needed {
        return Some(format!(
            "the interface does not outlive a crash: it has {needed} queues, and the service manager stores {capacity} descriptors (FDSTORE); raise FileDescriptorStoreMax= of the unit, or start with --without flow-queues"
        ));
    }
    // Not watched for an end, which would cost time for each packet.
    let message = format!("FDSTORE=1\nFDNAME={STORED_QUEUE}\nFDPOLL=0");
    let bytes = [IoSlice::new(message.as_bytes())];
    let (rights, flags) = ([ControlMessage::ScmRights(queues)], MsgFlags::MSG_NOSIGNAL);
    let sent = sendmsg::<UnixAddr>(socket.as_raw_fd(), &bytes, &rights, flags, None);
    let error = sent.step("the interface does not outlive a crash: store its queues").err();
    error.map(|error| error.line)
}

/// Microseconds, and not 0.
fn parse_interval(value: &str) -> Option<Duration> {
    value.parse().ok().filter(|microseconds| *microseconds > 0).map(Duration::from_micros)
}

/// Connects to an absolute path, or with a leading `@` to a name in the abstract namespace.
fn connect(name: &[u8]) -> io::Result<UnixDatagram> {
    let address = match name {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(OsStr::from_bytes(name))?,
        _ => {
            return Err(io::Error::other(
                "not a Unix socket; other forms, such as vsock:, are not supported",
            ));
        }
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_interval_is_a_positive_number_of_microseconds() {
        assert_eq!(parse_interval("3000000"), Some(Duration::from_secs(3)));
        for wrong in ["0", "", "x", "-1", "99999999999999999999"] {
            assert_eq!(parse_interval(wrong), None, "{wrong}");
        }
    }
}
