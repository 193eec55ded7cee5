//! A refusal of the kernel that expires after some minutes, because its cause may have disappeared.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use wgsep_proto::Instant;

/// Time until a refusal expires.
pub(crate) const HOLDS: Duration = Duration::from_secs(120);

/// Whole seconds of the clock, which wrap around after 136 years.
pub(crate) fn seconds(now: Instant) -> u32 {
    (now.as_nanos() / 1_000_000_000) as u32
}

/// When the refusal expires, in seconds; 0 if there was none since the last success.
#[derive(Debug, Default)]
pub(crate) struct Refusal(AtomicU32);

impl Refusal {
    /// True until the refusal expires.
    pub(crate) fn holds(&self, now: Instant) -> bool {
        let until = self.0.load(Ordering::Relaxed);
        until != 0 && u64::from(until.wrapping_sub(seconds(now))).wrapping_sub(1) < HOLDS.as_secs()
    }

    /// Records a refusal; true for the first one after a success.
    pub(crate) fn set(&self, now: Instant) -> bool {
        self.0.swap(seconds(now.after(HOLDS)).max(1), Ordering::Relaxed) == 0
    }

    /// Records a success; true if there was a refusal before. It costs one load if there was none.
    pub(crate) fn clear(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0 && self.0.swap(0, Ordering::Relaxed) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_holds_for_two_minutes_and_is_new_only_after_it_was_accepted() {
        let (refusal, start) = (Refusal::default(), Instant::from_nanos(5_000_000_000));
        assert!(!refusal.holds(start) && !refusal.clear());
        assert!(refusal.set(start));
        assert!(refusal.holds(start.after(HOLDS - Duration::from_secs(1))));
        assert!(!refusal.holds(start.after(HOLDS)));
        assert!(!refusal.set(start.after(HOLDS)), "it is the same one");
        assert!(refusal.holds(start.after(HOLDS)));
        assert!(refusal.clear() && !refusal.clear());
        assert!(!refusal.holds(start) && refusal.set(start));
    }
}
