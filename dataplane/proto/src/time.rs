//! The protocol's clocks, which callers always pass as arguments.

use core::time::Duration;

/// Nanoseconds since any moment before the first call, such as boot or the start of the program. The clock must keep counting in
/// suspend, as CLOCK_BOOTTIME does and the kernel's WireGuard expects; std's `Instant` stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// A point `nanoseconds` after that moment.
    #[must_use]
    pub const fn from_nanos(nanoseconds: u64) -> Self {
        Self(nanoseconds)
    }

    /// Nanoseconds since that moment.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// This point and `duration` more, stopping at the end of time.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanoseconds))
    }

    /// How long after `earlier` this is; zero if it is not.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// Both clocks, read together by the caller once per batch of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// For every timer and age.
    pub instant: Instant,
    /// Time of day since the Unix epoch, for handshake timestamps and `last_handshake_time`.
    pub wall: Duration,
}
