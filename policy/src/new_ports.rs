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
#[derive(Default)]
pub struct NewPorts {
    known: Vec<u16>,
    /// When a whole burst is possible again, if any port was opened.
    full: Option<Instant>,
}

impl NewPorts {
    /// True if `port` may not be opened yet; 0, any port, is taken for a new one.
    #[must_use]
    pub fn is_too_early(&self, port: u16, now: Instant) -> bool {
        !self.known.contains(&port)
            && self.full.is_some_and(|full| full > now + INTERVAL * (BURST - 1))
    }

    /// Notes that `port` was opened.
    pub fn opened(&mut self, port: u16, now: Instant) {
        if !self.known.contains(&port) {
            self.known.push(port);
            self.full = Some(self.full.map_or(now, |full| full.max(now)) + INTERVAL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_new_ports_at_once_then_one_in_ten_seconds_and_old_ones_always() {
        let (mut ports, start) = (NewPorts::default(), Instant::now());
        for port in 2001..=2004 {
            assert!(!ports.is_too_early(port, start));
            ports.opened(port, start);
            ports.opened(port, start);
        }
        let (later, almost) = (start + INTERVAL, INTERVAL - Duration::from_nanos(1));
        for new in [2005, 0] {
            assert!(ports.is_too_early(new, start) && ports.is_too_early(new, start + almost));
        }
        assert!((2001..=2004).all(|port| !ports.is_too_early(port, start)));
        assert!(!ports.is_too_early(2005, later));
        ports.opened(2005, later);
        assert!(ports.is_too_early(2006, later + almost));
        let much_later = later + 100 * INTERVAL;
        for port in 2006..=2009 {
            assert!(!ports.is_too_early(port, much_later));
            ports.opened(port, much_later);
        }
        assert!(ports.is_too_early(2010, much_later + almost));
        assert!(!ports.is_too_early(2010, much_later + INTERVAL));
    }

    /// A dataplane that was taken over asks without a pause.
    #[test]
    fn asking_again_and_again_opens_no_port_earlier() {
        let (mut ports, start) = (NewPorts::default(), Instant::now());
        let (mut opened, mut port) = (Vec::new(), 2001);
        for millisecond in 0..35_000 {
            let now = start + Duration::from_millis(millisecond);
            if !ports.is_too_early(port, now) {
                ports.opened(port, now);
                opened.push(millisecond);
                port += 1;
            }
        }
        assert_eq!(opened, [0, 1, 2, 3, 10_000, 20_000, 30_000]);
    }
}
