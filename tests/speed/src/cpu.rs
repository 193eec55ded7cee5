//! Who used the processors while something was measured.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process;
use std::time::Instant;

use nix::unistd::{SysconfVar, sysconf};

use crate::bed::Bed;

/// The ancestor of all kernel threads.
const KTHREADD: i32 = 2;

/// Processor time up to a moment, in ticks.
struct Reading {
    at: Instant,
    daemons: u64,
    /// Of processes that are not ours.
    others: u64,
    /// All, the kernel's own threads and interrupts too.
    busy: u64,
    /// Taken away by the machine's host.
    stolen: u64,
}

/// Processor time used from [`Meter::start`] to [`Meter::stop`].
pub(crate) struct Meter<'a> {
    bed: &'a Bed,
    start: Reading,
}

/// Processor time, in seconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Of both ends' programs together.
    pub(crate) daemons: f64,
    /// Of the machine, used by any process.
    pub(crate) machine: f64,
    /// The share of the machine that went to programs that are no part of this, or to other
    /// machines on the same host: from 0 to 1.
    pub(crate) disturbance: f64,
}

impl<'a> Meter<'a> {
    /// Begins.
    pub(crate) fn start(bed: &'a Bed) -> Self {
        Self { start: reading(bed), bed }
    }

    /// Ends.
    pub(crate) fn stop(self) -> Usage {
        let (start, end) = (self.start, reading(self.bed));
        let ticks_a_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
        let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 / ticks_a_second;
        let elapsed = end.at.duration_since(start.at).as_secs_f64();
        let foreign = seconds(start.others, end.others) + seconds(start.stolen, end.stolen);
        Usage {
            daemons: seconds(start.daemons, end.daemons),
            machine: seconds(start.busy, end.busy),
            disturbance: foreign / (elapsed * processors()),
        }
    }
}

/// How many processors there are.
pub(crate) fn processors() -> f64 {
    std::thread::available_parallelism().map_or(1, usize::from) as f64
}

fn reading(bed: &Bed) -> Reading {
    let processes = processes();
    let daemons = bed.places().map(|place| place.program.as_raw());
    let daemons = descendants(&processes, &daemons);
    let ours = descendants(&processes, &[process::id().cast_signed()]);
    let kernel = descendants(&processes, &[KTHREADD]);
    let sum = |wanted: &dyn Fn(&i32) -> bool| {
        processes.iter().filter(|(pid, _)| wanted(pid)).map(|(_, (_, ticks))| ticks).sum()
    };
    let (busy, stolen) = machine();
    Reading {
        at: Instant::now(),
        daemons: sum(&|pid| daemons.contains(pid)),
        others: sum(&|pid| !ours.contains(pid) && !kernel.contains(pid)),
        busy,
        stolen,
    }
}

/// The parent and the ticks of every process, those of its children that ended included.
fn processes() -> BTreeMap<i32, (i32, u64)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let pids = names.filter_map(|name| name.parse().ok());
    pids.filter_map(|pid: i32| Some((pid, stat(pid)?))).collect()
}

fn stat(pid: i32) -> Option<(i32, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain anything; see proc_pid_stat(5) for what follows.
    let fields: Vec<_> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let parent = fields.get(1)?.parse().ok()?;
    Some((parent, number(11)? + number(12)? + number(13)? + number(14)?))
}

fn descendants(processes: &BTreeMap<i32, (i32, u64)>, roots: &[i32]) -> BTreeSet<i32> {
    let mut found: BTreeSet<i32> = roots.iter().copied().collect();
    loop {
        let children = processes.iter().filter(|(_, (parent, _))| found.contains(parent));
        let more: Vec<i32> =
            children.map(|(pid, _)| *pid).filter(|pid| !found.contains(pid)).collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

/// Ticks in which the processors worked, and ticks that were stolen from them (proc_stat(5)).
fn machine() -> (u64, u64) {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let first = text.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = first.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    match ticks[..] {
        [user, nice, system, _idle, _iowait, irq, softirq, stolen, ..] => {
            (user + nice + system + irq + softirq, stolen)
        }
        _ => (0, 0),
    }
}
