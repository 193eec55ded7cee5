//! Notifications to a service manager about the state of the daemon (sd_notify(3)).
//!
//! The socket is opened before the helper is locked down; from then on it is only written to.

use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

/// Shortest time between two watchdog messages: a shorter one would keep the processor busy.
const SHORTEST_WATCHDOG: Duration = Duration::from_millis(100);

/// Name of each TUN queue in the manager's descriptor store.
pub const STORED_QUEUE: &str = "wgsep-tun";

/// The service manager that receives notifications, if any.
#[derive(Default)]
pub struct ServiceManager {
    socket: Option<UnixDatagram>,
    /// How often the dataplane is asked whether it runs, and when next.
    pub(crate) watchdog: Option<(Duration, Instant)>,
    /// The status without trouble.
    serving: String,
    trouble: Option<String>,
}

impl ServiceManager {
    /// The manager that receives at `socket`, whose watchdog expects a message once per `watchdog`.
    #[must_use]
    pub fn new(socket: UnixDatagram, watchdog: Option<Duration>) -> Self {
        let half = |whole: Duration| (whole / 2).max(SHORTEST_WATCHDOG);
        let watchdog = watchdog.map(|whole| (half(whole), Instant::now()));
        Self { socket: Some(socket), watchdog, ..Self::default() }
    }

    /// Where it receives, if there is one.
    #[must_use]
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Has it close the TUN queues that it stores, so that the interface ends with the daemon.
    pub fn remove_queues(&self) {
        let _lost = self.send(&format!("FDSTOREREMOVE=1\nFDNAME={STORED_QUEUE}"));
    }

    /// Notifies that the interface exists and is served.
    pub fn ready(&mut self, status: &str) {
        status.clone_into(&mut self.serving);
        let _lost = self.send(&format!("READY=1\nSTATUS={status}"));
    }

    /// Notifies of trouble while serving, or of its end; sends only changes.
    pub fn trouble(&mut self, trouble: Option<String>) {
        if self.trouble == trouble {
            return;
        }
        self.trouble = trouble;
        let but = self.trouble.as_ref().map_or(String::new(), |trouble| format!(", but {trouble}"));
        let _lost = self.send(&format!("STATUS={}{but}", self.serving));
    }

    /// Notifies that the daemon ends, and why.
    pub fn stopping(&self, status: &str) {
        let _lost = self.send(&format!("STOPPING=1\nSTATUS={status}"));
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
        let _lost = self.send("WATCHDOG=1");
    }

    /// Sends without blocking; what a manager that does not read has no space for is lost, and the result is false.
    pub(crate) fn send(&self, message: &str) -> bool {
        let write = |socket: &UnixDatagram| nix::unistd::write(socket, message.as_bytes());
        self.socket.as_ref().map(write) != Some(Err(Errno::EAGAIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchdog_messages_are_sent_twice_in_the_interval_and_at_most_ten_times_a_second() {
        let socket = UnixDatagram::unbound().unwrap();
        for (watchdog, interval) in [(3_000_000, 1500), (200_002, 100), (2000, 100)] {
            let watchdog = Duration::from_micros(watchdog);
            let mut manager = ServiceManager::new(socket.try_clone().unwrap(), Some(watchdog));
            let (is_due, until_next) = manager.watchdog();
            assert_eq!((is_due, until_next.as_millis()), (true, interval), "{watchdog:?}");
            assert!(!manager.watchdog().0);
        }
    }
}
