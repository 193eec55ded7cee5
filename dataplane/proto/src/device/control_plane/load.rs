//! Whether a device is under load, so that a sender must prove its address before a handshake.

use crate::time::Instant;
use core::time::Duration;

/// Most handshake messages that wait to be consumed; more are dropped.
pub const MAX_QUEUED_HANDSHAKES: usize = 4096;
/// Number of waiting handshake messages from which the device is under load.
pub const UNDER_LOAD_THRESHOLD: usize = MAX_QUEUED_HANDSHAKES / 8;
/// Number of refused handshake messages within a second from which the device is under load.
///
/// The kernel only looks at the queue: a flood that it can just keep up with costs it a Diffie-Hellman
/// for each message.
pub const UNDER_LOAD_REFUSALS: u32 = 256;
/// Time for which the device stays under load after the last sign of it.
pub const UNDER_LOAD_TIME: Duration = Duration::from_secs(1);

/// Time after which the count of refusals starts again.
const REFUSALS_TIME: Duration = Duration::from_secs(1);

/// The load of a device.
#[derive(Default)]
pub(super) struct Load {
    since: Option<Instant>,
    /// Refused messages, and the start of the count.
    refused: (u32, Option<Instant>),
}

/// The change of load that a message caused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Begins,
    Ends,
}

impl Load {
    /// Records a received message, with the number that wait behind it.
    pub(super) fn record(&mut self, waiting: usize, now: Instant) -> Option<Change> {
        if waiting >= UNDER_LOAD_THRESHOLD {
            return self.begin(now);
        }
        let ends = self.is_high() && !self.is_high_at(now);
        ends.then(|| {
            self.since = None;
            Change::Ends
        })
    }

    /// Records a message that was refused after it had cost a Diffie-Hellman, or because it had no cookie.
    /// The latter count so that a continuing flood keeps the device under load and costs the
    /// Diffie-Hellmans only once.
    pub(super) fn refuse(&mut self, now: Instant) -> Option<Change> {
        let (refused, since) = &mut self.refused;
        if since.is_none_or(|since| now.since(since) >= REFUSALS_TIME) {
            (*refused, *since) = (0, Some(now));
        }
        *refused = refused.saturating_add(1);
        if *refused < UNDER_LOAD_REFUSALS { None } else { self.begin(now) }
    }

    /// True if senders must prove their address.
    pub(super) const fn is_high(&self) -> bool {
        self.since.is_some()
    }

    /// True if they still must at `now`, if no message arrives before.
    pub(super) fn is_high_at(&self, now: Instant) -> bool {
        self.since.is_some_and(|since| now.since(since) < UNDER_LOAD_TIME)
    }

    /// When it was last high, and the refused messages, for another process.
    #[cfg(feature = "internals")]
    pub(super) fn save(&self) -> (Option<u64>, (u32, Option<u64>)) {
        let (refused, since) = self.refused;
        (self.since.map(Instant::as_nanos), (refused, since.map(Instant::as_nanos)))
    }

    /// The load that [`Self::save`] returned.
    #[cfg(feature = "internals")]
    pub(super) fn restore(
        since: Option<u64>,
        (refused, refused_since): (u32, Option<u64>),
    ) -> Self {
        let instant = Instant::from_nanos;
        Self { since: since.map(instant), refused: (refused, refused_since.map(instant)) }
    }

    fn begin(&mut self, now: Instant) -> Option<Change> {
        let before = self.since.replace(now);
        before.is_none().then_some(Change::Begins)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: u64 = 1_000_000;

    fn at(milliseconds: u64) -> Instant {
        Instant::from_nanos(milliseconds * MILLISECOND)
    }

    #[test]
    fn the_256th_refusal_within_a_second_is_load_for_a_second() {
        let mut load = Load::default();
        for number in 1..UNDER_LOAD_REFUSALS {
            assert_eq!(load.refuse(at(number.into())), None);
        }
        assert!(!load.is_high());
        assert_eq!(load.refuse(at(1000)), Some(Change::Begins));
        assert_eq!(load.record(0, at(1999)), None);
        assert!(load.is_high());
        assert_eq!(load.record(0, at(2000)), Some(Change::Ends));
        assert!(!load.is_high());
    }

    #[test]
    fn refusals_of_another_second_do_not_count() {
        let mut load = Load::default();
        for number in 1..UNDER_LOAD_REFUSALS {
            assert_eq!(load.refuse(at(number.into())), None);
        }
        for _ in 1..UNDER_LOAD_REFUSALS {
            assert_eq!(load.refuse(at(1001)), None);
        }
        assert_eq!(load.refuse(at(1001)), Some(Change::Begins));
    }

    #[test]
    fn load_that_persists_begins_once_and_lasts_from_its_last_sign() {
        let mut load = Load::default();
        assert_eq!(load.record(UNDER_LOAD_THRESHOLD - 1, at(0)), None);
        assert_eq!(load.record(UNDER_LOAD_THRESHOLD, at(0)), Some(Change::Begins));
        assert_eq!(load.record(UNDER_LOAD_THRESHOLD, at(900)), None);
        assert_eq!(load.record(0, at(1899)), None);
        assert_eq!(load.record(0, at(1900)), Some(Change::Ends));
        assert_eq!(load.record(0, at(1901)), None);
    }
}
