//! How fast the dataplane gets UDP ports that it has not had before.
//!
//! A dataplane that was taken over can keep every socket it ever got, and with it the port. An operator
//! changes the port now and then, and a script goes back and forth between a few.

use std::time::{Duration, Instant};

/// New ports that are opened at once, one after the other.
const BURST: u32 = 4;
/// Time for each further one.
const INTERVAL: Duration = Duration::from_secs(10);

/// The ports that were opened, and when more may be.
pub struct NewPorts {
    known: Vec<u16>,
    /// When a whole burst is possible again.
    full: Instant,
}

impl NewPorts {
    /// None opened yet.
    pub fn new() -> Self {
        Self { known: Vec::new(), full: Instant::now() }
    }

    /// How long to wait before `port` is opened; 0, any port, is taken for a new one.
    pub fn delay(&self, port: u16, now: Instant) -> Duration {
        if self.known.contains(&port) {
            return Duration::ZERO;
        }
        self.full.saturating_duration_since(now).saturating_sub(INTERVAL * (BURST - 1))
    }

    /// Notes that `port` was opened.
    pub fn opened(&mut self, port: u16, now: Instant) {
        if !self.known.contains(&port) {
            self.known.push(port);
            self.full = self.full.max(now) + INTERVAL;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_new_ports_at_once_then_one_in_ten_seconds_and_old_ones_always() {
        let (mut ports, start) = (NewPorts::new(), Instant::now());
        for port in 1..=4 {
            assert_eq!(ports.delay(port, start), Duration::ZERO);
            ports.opened(port, start);
            ports.opened(port, start);
        }
        assert_eq!((ports.delay(5, start), ports.delay(0, start)), (INTERVAL, INTERVAL));
        assert_eq!((1..=4).map(|port| ports.delay(port, start)).max(), Some(Duration::ZERO));
        let later = start + INTERVAL;
        assert_eq!(ports.delay(5, later), Duration::ZERO);
        ports.opened(5, later);
        assert_eq!(ports.delay(6, later), INTERVAL);
        let much_later = later + 100 * INTERVAL;
        for port in 6..=9 {
            assert_eq!(ports.delay(port, much_later), Duration::ZERO);
            ports.opened(port, much_later);
        }
        assert_eq!(ports.delay(10, much_later), INTERVAL);
    }
}
