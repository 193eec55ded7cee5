//! Connects to the service manager (sd_notify(3)).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;
use wgsep_journal::ServiceManager;

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
