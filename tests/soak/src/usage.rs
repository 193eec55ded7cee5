//! What a process holds: descriptors, threads and memory, to be compared with what it held before.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::thread;
use std::time::Duration;

use nix::unistd::Pid;
use wgsep_tests::{descriptors, procfs};

/// How many times [`Usage::at_rest`] reads, and how long after one another.
const SAMPLES: usize = 5;
const SAMPLE_INTERVAL: Duration = Duration::from_millis(20);

/// What a process holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    /// By kind.
    descriptors: BTreeMap<String, usize>,
    threads: usize,
    /// Kilobytes of secret memory that are mapped.
    secret: u64,
    /// Kilobytes that are resident.
    resident: u64,
}

impl Usage {
    /// Reads it from `/proc`. `netns_of` is a process in the namespace of its sockets.
    pub(crate) fn of(process: Pid, netns_of: Pid) -> Self {
        Self {
            descriptors: descriptors::count(process, netns_of),
            threads: procfs::threads(process).len(),
            secret: secret_memory(process),
            resident: procfs::memory(process, "VmRSS").unwrap_or(0),
        }
    }

    /// Reads it several times and leaves out the descriptors that are not there each time, such as those
    /// of a UAPI client.
    pub(crate) fn at_rest(process: Pid, netns_of: Pid) -> Self {
        let mut usage = Self::of(process, netns_of);
        for _ in 1..SAMPLES {
            thread::sleep(SAMPLE_INTERVAL);
            let again = Self::of(process, netns_of);
            usage.descriptors.retain(|kind, count| {
                *count = (*count).min(again.descriptors.get(kind).copied().unwrap_or(0));
                *count > 0
            });
        }
        usage
    }

    /// What is more or less than it was, and how much memory was gained beyond what may be.
    pub(crate) fn compare(&self, before: &Self, allowed: Growth) -> Result<(), String> {
        let mut differences = Vec::new();
        if self.descriptors != before.descriptors {
            differences.push(format!(
                "descriptors were {:?} and are {:?}",
                before.descriptors, self.descriptors
            ));
        }
        if self.threads != before.threads {
            differences.push(format!("{} threads became {}", before.threads, self.threads));
        }
        for (what, before, after, allowed) in [
            ("secret memory", before.secret, self.secret, allowed.secret),
            ("resident memory", before.resident, self.resident, allowed.resident),
        ] {
            if after > before + allowed {
                differences.push(format!(
                    "{what} grew from {before} to {after} KiB, more than by {allowed}"
                ));
            }
        }
        if differences.is_empty() { Ok(()) } else { Err(differences.join("; ")) }
    }
}

impl Display for Usage {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let descriptors: usize = self.descriptors.values().sum();
        write!(
            f,
            "{descriptors} descriptors, {} threads, {} KiB resident, {} KiB secret",
            self.threads, self.resident, self.secret
        )
    }
}

/// How many kilobytes a process may have gained.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Growth {
    pub(crate) resident: u64,
    pub(crate) secret: u64,
}

/// Kilobytes of a process's mappings of secret memory (proc(5), `maps`).
fn secret_memory(process: Pid) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
    let lines = maps.lines().filter(|line| line.contains("/secretmem"));
    let sizes = lines.filter_map(|line| {
        let (begin, end) = line.split_whitespace().next()?.split_once('-')?;
        let [begin, end] = [begin, end].map(|address| u64::from_str_radix(address, 16));
        Some(end.ok()?.saturating_sub(begin.ok()?) / 1024)
    });
    sizes.sum()
}
