//! Waiting for a condition, with a deadline. No test sleeps and hopes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const INTERVAL: Duration = Duration::from_millis(10);

/// Returns the first `Some` that `probe` gives within `limit`, or `None` when time is up.
///
/// The probe is always run at least once, and once more after the limit has passed, so a machine
/// that was busy elsewhere does not turn a fulfilled condition into a failure.
pub fn poll<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        let late = Instant::now() >= deadline;
        if let Some(value) = probe() {
            return Some(value);
        }
        if late {
            return None;
        }
        thread::sleep(INTERVAL);
    }
}

/// Waits until `condition` holds.
///
/// # Panics
///
/// When it does not within `limit`; the message says what was waited for.
#[track_caller]
pub fn until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let met = poll(limit, || condition().then_some(()));
    assert!(met.is_some(), "waited {limit:?} without success until {what}");
}

/// Sets a flag when it is dropped: ends what another thread does meanwhile, also when a test fails.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
