//! The time, which the caller passes to each call that needs it.

use core::mem::MaybeUninit;
use core::time::Duration;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::status::{guard, wgsep_status};
use wgsep_proto::{Instant, Now};

/// Both clocks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct wgsep_now {
    /// Nanoseconds on a clock that never goes back, and counts while the machine is suspended, such as CLOCK_BOOTTIME
    /// on Linux. All calls of a tunnel must have it of one clock.
    pub monotonic: u64,
    /// Nanoseconds since 1970-01-01 00:00:00 UTC.
    pub wall: u64,
}

impl From<wgsep_now> for Now {
    fn from(now: wgsep_now) -> Self {
        let instant = Instant::from_nanos(now.monotonic);
        Self { instant, wall: Duration::from_nanos(now.wall) }
    }
}

/// Reads the clocks of the standard library into `now`, for a program that has none of its own. That clock does not count
/// in suspend on Linux and macOS: peers are then silent for up to two minutes after a resume.
#[unsafe(no_mangle)]
pub extern "C" fn wgsep_read_clocks(now: Option<&mut MaybeUninit<wgsep_now>>) -> wgsep_status {
    static START: OnceLock<std::time::Instant> = OnceLock::new();
    guard(|| {
        let now = now.ok_or(wgsep_status::WGSEP_ERROR_NULL)?;
        let start = START.get_or_init(std::time::Instant::now);
        let nanoseconds =
            |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        // Zero is when it started, and there were timers at negative times otherwise.
        let monotonic = nanoseconds(start.elapsed()).saturating_add(1);
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        now.write(wgsep_now { monotonic, wall: nanoseconds(wall) });
        Ok(wgsep_status::WGSEP_OK)
    })
}
