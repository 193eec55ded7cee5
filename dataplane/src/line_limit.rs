//! A rate limit on log lines of one kind that other hosts or programs can cause at will.

use std::cmp::Ordering;
use std::time::Duration;
use wgsep_proto::Instant;

/// Lines of one kind in one [`PERIOD`].
const MOST_LINES: u32 = 10;
const PERIOD: Duration = Duration::from_secs(60);

/// A limit of ten lines a minute. Further lines are omitted, which the last line reports.
#[derive(Default)]
pub(crate) struct LineLimit {
    since: Instant,
    lines: u32,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Write,
    WriteLast,
    LeaveOut,
}

impl LineLimit {
    /// A limit of which nothing is used.
    pub(crate) const fn new() -> Self {
        Self { since: Instant::from_nanos(0), lines: 0 }
    }

    /// Whether one more of a kind that is not logged is within the limit.
    pub(crate) fn allow(&mut self, now: Instant) -> bool {
        self.admit(now) != Verdict::LeaveOut
    }

    /// Calls `write`, unless there were too many lines; true if it was called.
    pub(crate) fn write(&mut self, now: Instant, write: impl FnOnce()) -> bool {
        let verdict = self.admit(now);
        match verdict {
            Verdict::Write => write(),
            Verdict::WriteLast => {
                write();
                tracing::info!("more lines of this kind are left out for a minute");
            }
            Verdict::LeaveOut => {}
        }
        verdict != Verdict::LeaveOut
    }

    fn admit(&mut self, now: Instant) -> Verdict {
        if self.lines == 0 || now.since(self.since) >= PERIOD {
            *self = Self { since: now, lines: 0 };
        }
        self.lines = self.lines.saturating_add(1);
        match self.lines.cmp(&MOST_LINES) {
            Ordering::Less => Verdict::Write,
            Ordering::Equal => Verdict::WriteLast,
            Ordering::Greater => Verdict::LeaveOut,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_a_minute_are_written_and_the_last_names_the_limit() {
        let mut limit = LineLimit::default();
        let start = Instant::from_nanos(1);
        for number in 1..=20 {
            let expected = match number {
                1..=9 => Verdict::Write,
                10 => Verdict::WriteLast,
                _ => Verdict::LeaveOut,
            };
            assert_eq!(limit.admit(start), expected, "line {number}");
        }
        assert_eq!(limit.admit(start.after(PERIOD - Duration::from_nanos(1))), Verdict::LeaveOut);
        assert_eq!(limit.admit(start.after(PERIOD)), Verdict::Write);
    }
}
