//! Notifications to a service manager about the state of the daemon (sd_notify(3)).
//!
//! The socket is opened before the helper is locked down; from then on it is only written to.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

/// Shortest time between two watchdog messages: a shorter one would keep the processor busy.
const SHORTEST_WATCHDOG: Duration = Duration::from_millis(100);

/// The service manager that receives notifications, if any.
#[derive(Default)]
pub struct ServiceManager {
    socket: Option<UnixDatagram>,
    /// How often the dataplane is asked whether it runs, and when next.
    watchdog: Option<(Duration, Instant)>,
    /// The status without trouble.
    serving: String,
    trouble: Option<String>,
}

impl ServiceManager {
    /// Connects to the manager that NOTIFY_SOCKET names; WATCHDOG_USEC is the interval of its watchdog.
    ///
    /// # Errors
    /// If the socket cannot be connected to, or is not a Unix socket.
    pub fn of_environment() -> io::Result<Self> {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(Self::default());
        };
        let socket = connect(name.as_bytes())?;
        let interval = std::env::var("WATCHDOG_USEC").ok().and_then(|value| half_of(&value));
        let watchdog = interval.map(|interval| (interval, Instant::now()));
        Ok(Self { socket: Some(socket), watchdog, ..Self::default() })
    }

    /// Notifies that the interface exists and is served.
    pub fn ready(&mut self, status: &str) {
        status.clone_into(&mut self.serving);
        self.send(&format!("READY=1\nSTATUS={status}"));
    }

    /// Notifies of trouble while serving, or of its end; sends only changes.
    pub fn trouble(&mut self, trouble: Option<String>) {
        if self.trouble == trouble {
            return;
        }
        self.trouble = trouble;
        let but = self.trouble.as_ref().map_or(String::new(), |trouble| format!(", but {trouble}"));
        self.send(&format!("STATUS={}{but}", self.serving));
    }

    /// Notifies that the daemon ends, and why.
    pub fn stopping(&self, status: &str) {
        self.send(&format!("STOPPING=1\nSTATUS={status}"));
    }

    /// Whether it is time to ask the dataplane whether it runs, which [`Self::alive`] passes on; and how
    /// long until the next time.
    pub fn watchdog(&mut self) -> (bool, Duration) {
        let Some((interval, next)) = self.watchdog else { return (false, Duration::MAX) };
        let now = Instant::now();
        if now < next {
            return (false, next.duration_since(now));
        }
        self.watchdog = now.checked_add(interval).map(|next| (interval, next));
        (true, interval)
    }

    /// Says that the daemon is alive.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    /// Sends without blocking; what a manager that does not read has no space for is lost.
    fn send(&self, message: &str) {
        let write = |socket: &UnixDatagram| nix::unistd::write(socket, message.as_bytes());
        let _lost = self.socket.as_ref().map(write);
    }
}

/// The interval of watchdog messages, two in each WATCHDOG_USEC.
fn half_of(watchdog: &str) -> Option<Duration> {
    let whole: u64 = watchdog.parse().ok().filter(|whole| *whole > 0)?;
    Some(Duration::from_micros(whole / 2).max(SHORTEST_WATCHDOG))
}

/// Connects to an absolute path, or with a leading `@` to a name in the abstract namespace.
fn connect(name: &[u8]) -> io::Result<UnixDatagram> {
    let address = match name {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
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
    fn watchdog_messages_are_sent_twice_in_the_interval_and_at_most_ten_times_a_second() {
        for (microseconds, milliseconds) in [
            ("3000000", Some(1500)),
            ("200002", Some(100)),
            ("2000", Some(100)),
            ("0", None),
            ("x", None),
        ] {
            let interval = half_of(microseconds).map(|interval| interval.as_millis());
            assert_eq!(interval, milliseconds, "{microseconds}");
        }
    }
}
