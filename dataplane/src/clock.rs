//! Both clocks of the protocol, read together.

use nix::time::{ClockId, clock_gettime};
use std::time::Duration;
use wgsep_proto::time::{Instant, Now};

/// The time: CLOCK_BOOTTIME for timers, because it goes on in suspend, and the time of day.
pub(crate) fn now() -> Now {
    Now { instant: instant(), wall: read(ClockId::CLOCK_REALTIME) }
}

/// The time for timers alone.
pub(crate) fn instant() -> Instant {
    Instant::from_nanos(0).after(read(ClockId::CLOCK_BOOTTIME))
}

/// Linux refuses neither clock; should it, time stands still rather than the daemon.
fn read(clock: ClockId) -> Duration {
    clock_gettime(clock).map(Duration::from).unwrap_or_default()
}
