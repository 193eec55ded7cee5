//! Control groups that limit the memory, or the processor time, of what runs in them.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::daemon::unique_interface;
use crate::wait;

/// Where the memory controller may be, with its files for the limit and the usage: version 1, version 2.
const CONTROLLERS: [[&str; 3]; 2] = [
    ["/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"],
    ["/sys/fs/cgroup", "memory.max", "memory.current"],
];

/// Where the processor controller may be, with its file for the limit, in microseconds of each 100,000: version 1,
/// version 2.
const CPU_CONTROLLERS: [[&str; 2]; 2] =
    [["/sys/fs/cgroup/cpu", "cpu.cfs_quota_us"], ["/sys/fs/cgroup", "cpu.max"]];

/// A control group of a test's own that limits processor time, removed when dropped.
#[derive(Debug)]
pub struct CpuCgroup {
    path: PathBuf,
    limit: PathBuf,
}

impl CpuCgroup {
    /// Makes a group without a limit.
    ///
    /// # Errors
    ///
    /// Where no processor controller may be written: why.
    pub fn new() -> Result<Self, String> {
        let name = format!("wgsep-tests-{}", unique_interface());
        for [root, limit] in CPU_CONTROLLERS {
            let path = PathBuf::from(root).join(&name);
            if fs::create_dir(&path).is_err() {
                continue;
            }
            let cgroup = Self { limit: path.join(limit), path };
            if cgroup.limit.exists() {
                return Ok(cgroup);
            }
        }
        Err("no processor controller of control groups that may be written".to_owned())
    }

    /// Lets a command run in the group.
    ///
    /// # Panics
    ///
    /// When the group's list of processes cannot be opened.
    #[track_caller]
    pub fn enter(&self, command: &mut Command) {
        enter(&self.path, command);
    }

    /// Lets the group use so many percent of one processor.
    ///
    /// # Panics
    ///
    /// When the kernel does not set it.
    #[track_caller]
    pub fn limit_to_percent(&self, percent: u32) {
        let set = fs::write(&self.limit, (percent * 1000).to_string());
        assert!(set.is_ok(), "cannot write {}: {set:?}", self.limit.display());
    }
}

impl Drop for CpuCgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// A control group of a test's own that limits memory, removed when dropped.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    limit: PathBuf,
    usage: PathBuf,
}

impl Cgroup {
    /// Makes a group without a limit.
    ///
    /// # Errors
    ///
    /// Where no memory controller may be written: why.
    pub fn new() -> Result<Self, String> {
        let name = format!("wgsep-tests-{}", unique_interface());
        for [root, limit, usage] in CONTROLLERS {
            let path = PathBuf::from(root).join(&name);
            if fs::create_dir(&path).is_err() {
                continue;
            }
            let cgroup = Self { limit: path.join(limit), usage: path.join(usage), path };
            if cgroup.limit.exists() {
                return Ok(cgroup);
            }
        }
        Err("no memory controller of control groups that may be written".to_owned())
    }

    /// Lets a command run in the group.
    ///
    /// # Panics
    ///
    /// When the group's list of processes cannot be opened.
    #[track_caller]
    pub fn enter(&self, command: &mut Command) {
        enter(&self.path, command);
    }

    /// Lets the group use so many bytes more than it does now. Who asks for more is killed.
    ///
    /// # Panics
    ///
    /// When the kernel does not tell or set it.
    #[track_caller]
    pub fn limit_to_more(&self, bytes: u64) {
        let used = fs::read_to_string(&self.usage).ok().and_then(|text| text.trim().parse().ok());
        let Some(used): Option<u64> = used else { panic!("cannot read {}", self.usage.display()) };
        let set = fs::write(&self.limit, (used + bytes).to_string());
        assert!(set.is_ok(), "cannot write {}: {set:?}", self.limit.display());
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

#[track_caller]
fn enter(cgroup: &Path, command: &mut Command) {
    let path = cgroup.join("cgroup.procs");
    let processes = match OpenOptions::new().write(true).open(&path) {
        Ok(processes) => processes,
        Err(error) => panic!("cannot open {}: {error}", path.display()),
    };
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are
    // allowed: it writes to a descriptor that it owns.
    unsafe {
        command.pre_exec(move || (&processes).write_all(b"0"));
    }
}

fn remove(cgroup: &Path) {
    // Who was killed is in it until reaped.
    wait::poll(Duration::from_secs(10), || fs::remove_dir(cgroup).ok());
}
