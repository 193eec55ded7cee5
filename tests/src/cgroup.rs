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
/// The hierarchy of version 1 that has no controller. systemd-nspawn makes the same groups there.
const NAMED: &str = "/sys/fs/cgroup/systemd";

/// A group of a test's own; it and those in it are removed when dropped.
#[derive(Debug)]
struct Group(PathBuf);

impl Group {
    /// Makes a group in a hierarchy whose groups have a file of this name.
    fn new(hierarchy: &str, file: &str) -> Option<Self> {
        let path = Path::new(hierarchy).join(format!("wgsep-tests-{}", unique_interface()));
        fs::create_dir(&path).ok()?;
        let group = Self(path);
        group.0.join(file).exists().then_some(group)
    }

    /// Lets a command run in the group.
    #[track_caller]
    fn enter(&self, command: &mut Command) {
        let path = self.0.join("cgroup.procs");
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
}

impl Drop for Group {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    // Who was killed is in it until reaped.
    wait::poll(Duration::from_secs(10), || fs::remove_dir(group).ok());
}

/// A control group for a machine, which makes others in it.
#[derive(Debug)]
pub struct MachineCgroup {
    group: Group,
}

impl MachineCgroup {
    /// Makes an empty group.
    ///
    /// # Errors
    ///
    /// Where there is no hierarchy of version 2 that may be written: why.
    pub fn new() -> Result<Self, String> {
        let group = UNIFIED.iter().find_map(|root| Group::new(root, "cgroup.controllers"));
        let none = || "no control groups of version 2 that may be written".to_owned();
        Ok(Self { group: group.ok_or_else(none)? })
    }

    /// Lets a command run in the group.
    ///
    /// # Panics
    ///
    /// When the group's list of processes cannot be opened.
    #[track_caller]
    pub fn enter(&self, command: &mut Command) {
        self.group.enter(command);
    }

    /// Whether a process is in the group, or in one below it.
    #[must_use]
    pub fn has_in_it(&self, pid: Pid) -> bool {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let name = self.group.0.file_name().unwrap_or_default();
        groups
            .lines()
            .filter_map(|line| line.strip_prefix("0::"))
            .any(|path| Path::new(path).components().any(|part| part.as_os_str() == name))
    }
}

impl Drop for MachineCgroup {
    fn drop(&mut self) {
        let twin = self.group.0.file_name().map(|name| Path::new(NAMED).join(name));
        if let Some(twin) = twin.filter(|twin| twin.exists()) {
            remove(&twin);
        }
    }
}

/// A control group that limits processor time.
#[derive(Debug)]
pub struct CpuCgroup {
    group: Group,
    limit: PathBuf,
}

impl CpuCgroup {
    /// Makes a group without a limit.
    ///
    /// # Errors
    ///
    /// Where no processor controller may be written: why.
    pub fn new() -> Result<Self, String> {
        CPU_CONTROLLERS
            .into_iter()
            .find_map(|[root, limit]| {
                let group = Group::new(root, limit)?;
                Some(Self { limit: group.0.join(limit), group })
            })
            .ok_or_else(|| {
                "no processor controller of control groups that may be written".to_owned()
            })
    }

    /// Lets a command run in the group.
    ///
    /// # Panics
    ///
    /// When the group's list of processes cannot be opened.
    #[track_caller]
    pub fn enter(&self, command: &mut Command) {
        self.group.enter(command);
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

/// A control group that limits memory.
#[derive(Debug)]
pub struct Cgroup {
    group: Group,
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
        CONTROLLERS
            .into_iter()
            .find_map(|[root, limit, usage]| {
                let group = Group::new(root, limit)?;
                Some(Self { limit: group.0.join(limit), usage: group.0.join(usage), group })
            })
            .ok_or_else(|| "no memory controller of control groups that may be written".to_owned())
    }

    /// Lets a command run in the group.
    ///
    /// # Panics
    ///
    /// When the group's list of processes cannot be opened.
    #[track_caller]
    pub fn enter(&self, command: &mut Command) {
        self.group.enter(command);
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
