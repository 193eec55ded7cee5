//! How fast the dataplane gets UDP ports that it has not had before.
//!
//! A dataplane that was taken over can keep every socket it ever got, and with it the port. An operator
//! changes the port now and then, and a script goes back and forth between a few.

use crate::Grants;
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
    /// When `port` may be opened, if that is later than now; 0, any port, is taken for a new one. What the
    /// policy forbids is refused at once.
    #[must_use]
    pub fn delay(&self, grants: &Grants, port: u16, now: Instant) -> Option<Instant> {
        let port = grants.permit_port(port).ok()?;
        let earliest = self.full?.checked_sub(INTERVAL * (BURST - 1))?;
        (earliest > now && !self.known.contains(&port)).then_some(earliest)
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
        let (mut ports, start) = (NewPorts::default(), Instant::now() + INTERVAL);
        let delay = |ports: &NewPorts, port, now| ports.delay(&Grants::default(), port, now);
        for port in 2001..=2004 {
            assert_eq!(delay(&ports, port, start), None);
            ports.opened(port, start);
            ports.opened(port, start);
        }
        let later = start + INTERVAL;
        for new in [2005, 0] {
            assert_eq!(delay(&ports, new, start), Some(later));
        }
        assert!((2001..=2004).all(|port| delay(&ports, port, start).is_none()));
        assert_eq!(delay(&ports, 1, start), None, "it is refused at once");
        let pinned = Grants { port: Some(2001), ..Grants::default() };
        assert_eq!(ports.delay(&pinned, 0, start), None);
        assert_eq!(delay(&ports, 2005, later), None);
        ports.opened(2005, later);
        assert_eq!(delay(&ports, 2006, later), Some(later + INTERVAL));
        let much_later = later + 100 * INTERVAL;
        for port in 2006..=2009 {
            assert_eq!(delay(&ports, port, much_later), None);
            ports.opened(port, much_later);
        }
        assert_eq!(delay(&ports, 2010, much_later), Some(much_later + INTERVAL));
    }
}
