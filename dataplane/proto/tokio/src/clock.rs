//! The two clocks of the protocol, of the system.

use std::time::{Duration, SystemTime, UNIX_EPOCH};
use wgsep_proto::{Instant, Now};

/// Reads the time of day, and a clock that never goes back: on Linux and Android CLOCK_BOOTTIME, which counts in suspend
/// as the kernel's WireGuard expects, elsewhere std's.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    #[cfg_attr(any(target_os = "linux", target_os = "android"), expect(dead_code))]
    started: std::time::Instant,
}

impl Clock {
    /// Starts the clock, which is std's where there is none of the system's.
    #[must_use]
    pub fn start() -> Self {
        Self { started: std::time::Instant::now() }
    }

    /// The time of both clocks.
    #[must_use]
    pub fn now(&self) -> Now {
        let nanoseconds = u64::try_from(self.since_start().as_nanos()).unwrap_or(u64::MAX);
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Now { instant: Instant::from_nanos(nanoseconds), wall }
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn since_start(&self) -> Duration {
        use nix::time::{ClockId, clock_gettime};
        clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
    }

    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    fn since_start(&self) -> Duration {
        self.started.elapsed()
    }
}
