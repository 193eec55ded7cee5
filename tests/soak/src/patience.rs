//! Deadlines that are extended by the time the daemons spend waiting for a CPU, so that load from other
//! programs does not fail a run.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use wgsep_tests::{procfs, wait};

/// The most that a limit is extended by. With group scheduling (autogroups, cgroups) a thread of a mostly
/// idle group can wait seconds for a CPU when both are busy.
const LONGEST_WAIT: Duration = Duration::from_secs(20);
/// Shorter waits are not reported.
const NOTABLE_WAIT: Duration = Duration::from_secs(1);

/// How long a condition took to become true, and how long the daemons waited for a CPU in that time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Took {
    pub(crate) time: Duration,
    pub(crate) waited: Duration,
}

impl Display for Took {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} s", self.time.as_secs_f64())?;
        if self.waited >= NOTABLE_WAIT {
            write!(f, "; the daemons' threads waited {:.1} s", self.waited.as_secs_f64())?;
            write!(f, " for a CPU in total")?;
        }
        Ok(())
    }
}

/// Waits until a condition is true, at most for `limit` plus the time these processes wait for a CPU.
///
/// # Errors
/// How long it waited, when the condition did not become true.
pub(crate) fn until(
    processes: &[Pid],
    limit: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<Took, Took> {
    let total = || -> Duration { processes.iter().copied().map(procfs::time_waited).sum() };
    let runnable =
        || -> BTreeMap<_, _> { processes.iter().copied().flat_map(procfs::runnable).collect() };
    let (begin, before) = (Instant::now(), total());
    let mut took = Took { time: Duration::ZERO, waited: Duration::ZERO };
    // Waits that are in no total yet, because they go on.
    let (mut unfinished, mut runnable_before) = (Duration::ZERO, runnable());
    wait::poll(limit + LONGEST_WAIT, || {
        let holds = condition();
        let (elapsed, runnable_now) = (begin.elapsed(), runnable());
        if runnable_now.iter().any(|(thread, ran)| runnable_before.get(thread) == Some(ran)) {
            unfinished += elapsed - took.time;
        }
        (took.time, runnable_before) = (elapsed, runnable_now);
        // The figures of a process disappear with it.
        let waited = total().saturating_sub(before).max(unfinished);
        took.waited = took.waited.max(waited).min(LONGEST_WAIT);
        if holds {
            return Some(Ok(took));
        }
        (took.time > limit + took.waited).then_some(Err(took))
    })
    .unwrap_or(Err(took))
}

/// Waits like [`until`] for a condition that has to become true.
///
/// # Panics
/// When it does not; the message names what was waited for.
#[track_caller]
pub(crate) fn expect(
    what: &str,
    processes: &[Pid],
    limit: Duration,
    condition: impl FnMut() -> bool,
) -> Took {
    match until(processes, limit, condition) {
        Ok(took) => took,
        Err(took) => {
            let threads: String = processes.iter().copied().map(procfs::describe_threads).collect();
            panic!("timed out waiting until {what}: limit {limit:?}, waited {took}\n{threads}")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::{hint, thread};

    use super::*;

    #[test]
    fn a_limit_is_extended_by_the_time_the_processes_wait_for_a_cpu_and_no_more() {
        let limit = Duration::from_millis(50);
        let took = until(&[], limit, || false).unwrap_err();
        assert!(took.time > limit && took.waited.is_zero(), "{took}");
        // With more busy threads than CPUs, some always wait.
        let processors = thread::available_parallelism().unwrap().get();
        let ends = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 * processors {
                scope.spawn(|| {
                    while !ends.load(Ordering::Relaxed) {
                        hint::spin_loop();
                    }
                });
            }
            let begin = Instant::now();
            let took = until(&[Pid::this()], limit, || begin.elapsed() > 4 * limit);
            ends.store(true, Ordering::Relaxed);
            let took = took.unwrap();
            assert!(took.time > 4 * limit && took.waited > 3 * limit, "{took}");
        });
    }
}
