//! Both clocks of the protocol, read together.

use nix::time::{ClockId, clock_gettime};
use std::time::Duration;
use wgsep_proto::{Instant, Now};

/// The time: CLOCK_BOOTTIME for timers, because it keeps counting in suspend, and the time of day.
pub(crate) fn now() -> Now {
    Now { instant: instant(), wall: read(ClockId::CLOCK_REALTIME) }
}

/// The time for timers alone.
pub(crate) fn instant() -> Instant {
    Instant::from_nanos(0).after(read(ClockId::CLOCK_BOOTTIME))
}

/// Reads a clock. Linux refuses neither; an error would yield zero instead of a panic.
fn read(clock: ClockId) -> Duration {
    clock_gettime(clock).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// What the same test does in a time namespace, where only CLOCK_BOOTTIME is a day ahead.
    const INSIDE: &str = "WGSEP_TEST_BOOTTIME";

    /// Without a suspend the two clocks agree, so one is moved.
    #[test]
    fn timers_use_the_clock_that_counts_in_suspend() {
        if std::env::var_os(INSIDE).is_some() {
            let ahead = instant().since(Instant::from_nanos(0)) - read(ClockId::CLOCK_MONOTONIC);
            assert!(ahead >= Duration::from_secs(86_000), "{ahead:?}");
            return;
        }
        let name = "clock::tests::timers_use_the_clock_that_counts_in_suspend";
        let mut command = Command::new("unshare");
        command.args(["--time", "--boottime", "86400", "--fork"]);
        command.arg(std::env::current_exe().unwrap()).args(["--exact", name]).env(INSIDE, "1");
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        if stderr.contains("Operation not permitted") {
            assert!(!nix::unistd::geteuid().is_root(), "{stderr}");
            eprintln!("skipped: only root makes a time namespace");
            return;
        }
        assert!(output.status.success(), "{output:?}");
    }
}
