//! Control groups that limit the memory, or the processor time, of what runs in them, or in which a machine has its own.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::unistd::Pid;

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

/// Where the hierarchy of version 2 may be: on its own, beside those of version 1.
const UNIFIED: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// That of version 1 which has no controller. systemd-nspawn makes the same groups there.
const NAMED: &str = "/sys/fs/cgroup/systemd";

/// A control group for a machine, which makes others in it; all are removed when dropped.
#[derive(Debug)]
pub struct MachineCgroup {
    path: PathBuf,
    twin: PathBuf,
}

impl MachineCgroup {
    /// Makes an empty group.
    ///
    /// # Errors
    ///
    /// Where there is no hierarchy of version 2 that may be written: why.
    pub fn new() -> Result<Self, String> {
        let name = format!("wgsep-tests-{}", unique_interface());
        let is_unified = |root: &&&str| Path::new(**root).join("cgroup.procs").exists();
        let Some(root) = UNIFIED.iter().find(is_unified) else {
            return Err("no control groups of version 2".to_owned());
        };
        let (path, twin) = (Path::new(root).join(&name), Path::new(NAMED).join(&name));
        match fs::create_dir(&path) {
            Ok(()) => Ok(Self { path, twin }),
            Err(error) => Err(format!("cannot make {}: {error}", path.display())),
        }
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

    /// Whether a process is in the group, or in one below it.
    #[must_use]
    pub fn has_in_it(&self, pid: Pid) -> bool {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let name = self.path.file_name().unwrap_or_default();
        groups
            .lines()
            .filter_map(|line| line.strip_prefix("0::"))
            .any(|path| Path::new(path).components().any(|part| part.as_os_str() == name))
    }
}

impl Drop for MachineCgroup {
    fn drop(&mut self) {
        remove_tree(&self.path);
        if self.twin.exists() {
            remove_tree(&self.twin);
        }
    }
}

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

fn remove_tree(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    remove(cgroup);
}

fn remove(cgroup: &Path) {
    // Who was killed is in it until reaped.
    wait::poll(Duration::from_secs(10), || fs::remove_dir(cgroup).ok());
}
