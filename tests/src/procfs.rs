//! What the kernel says of a process: its threads, capabilities, identity and descriptors.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Pid;

/// The fields of a `status` file, by name.
#[derive(Debug)]
pub struct Status {
    fields: BTreeMap<String, String>,
    origin: PathBuf,
}

impl Status {
    /// A field's text.
    ///
    /// # Panics
    ///
    /// When the kernel does not show it.
    #[track_caller]
    #[must_use]
    pub fn text(&self, field: &str) -> &str {
        match self.fields.get(field) {
            Some(text) => text,
            None => panic!("{} has no {field}", self.origin.display()),
        }
    }

    /// A set of capabilities or signals, one bit each.
    ///
    /// # Panics
    ///
    /// When the field is missing or not hexadecimal.
    #[track_caller]
    #[must_use]
    pub fn capabilities(&self, field: &str) -> u64 {
        match u64::from_str_radix(self.text(field), 16) {
            Ok(set) => set,
            Err(error) => panic!("{field} of {}: {error}", self.origin.display()),
        }
    }

    /// Real, effective, saved and file-system id, from `Uid` or `Gid`.
    #[track_caller]
    #[must_use]
    pub fn ids(&self, field: &str) -> Vec<u32> {
        self.text(field).split_whitespace().filter_map(|id| id.parse().ok()).collect()
    }
}

/// The status of every thread of a process.
///
/// # Panics
///
/// When the process has none, that is, does not exist.
#[track_caller]
#[must_use]
pub fn threads(pid: Pid) -> Vec<Status> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let threads: Vec<_> = tasks.filter_map(|task| status(&task.path().join("status"))).collect();
    assert!(!threads.is_empty(), "process {pid} does not exist");
    threads
}

/// What each thread of a process does: its name, state, system call, and where in the kernel it waits.
#[must_use]
pub fn describe_threads(pid: Pid) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lines = tasks.map(|task| {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let state = status(&task.path().join("status")).map(|one| one.text("State").to_owned());
        let [name, call, place] = ["comm", "syscall", "wchan"].map(read);
        format!(
            "{pid} {} {}: {}; {}; {}\n",
            task.file_name().display(),
            name.trim(),
            state.unwrap_or_default(),
            call.trim(),
            place.trim()
        )
    });
    lines.collect()
}

/// The threads of a process that could run, by number, with the nanoseconds that each has run so far: one
/// whose figure does not change waits for a CPU, which [`time_waited`] counts only once it gets one.
#[must_use]
pub fn runnable(pid: Pid) -> BTreeMap<String, String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let running = tasks.filter_map(|task| {
        let status = status(&task.path().join("status"))?;
        let times = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let ran = times.split(' ').next()?.to_owned();
        let name = task.file_name().to_string_lossy().into_owned();
        status.text("State").starts_with('R').then_some((name, ran))
    });
    running.collect()
}

/// How long the threads of a process have been runnable without running, in total (proc(5), the second
/// field of `schedstat`). Zero when the process does not exist or the kernel keeps no such statistics.
#[must_use]
pub fn time_waited(pid: Pid) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let nanoseconds: u64 = tasks
        .filter_map(|task| {
            let fields = fs::read_to_string(task.path().join("schedstat")).ok()?;
            fields.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .sum();
    Duration::from_nanos(nanoseconds)
}

/// Name and niceness of every thread of a process (proc(5), the fields of `stat`).
///
/// # Panics
///
/// When the process does not exist.
#[track_caller]
#[must_use]
pub fn niceness(pid: Pid) -> Vec<(String, i32)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let niceness = tasks.filter_map(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        let (name, fields) = stat.split_once('(')?.1.rsplit_once(')')?;
        // The 19th, of which the first two are before these.
        Some((name.to_owned(), fields.split_whitespace().nth(16)?.parse().ok()?))
    });
    let niceness: Vec<_> = niceness.collect();
    assert!(!niceness.is_empty(), "process {pid} does not exist");
    niceness
}

fn status(path: &Path) -> Option<Status> {
    let text = fs::read_to_string(path).ok()?;
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    let fields = fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect();
    Some(Status { fields, origin: path.to_owned() })
}

/// Whether a process exists and is not a zombie.
#[must_use]
pub fn is_running(pid: Pid) -> bool {
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    status(&path).is_some_and(|status| !status.text("State").starts_with('Z'))
}

/// The children of a process, zombies not counted.
#[must_use]
pub fn children(parent: Pid) -> Vec<Pid> {
    let is_child = |pid: &Pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name, in parentheses, may contain anything; state and parent follow it.
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let state = fields.next();
        state != Some("Z") && fields.next() == Some(&parent.to_string())
    };
    processes().into_iter().filter(is_child).collect()
}

/// A process, its children, theirs, and so on, each after its parent.
#[must_use]
pub fn tree(root: Pid) -> Vec<Pid> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(children(parent));
        next += 1;
    }
    found
}

/// Every running process that was started with `argument` among its arguments.
#[must_use]
pub fn with_argument(argument: &str) -> Vec<Pid> {
    let has_argument = |pid: &Pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == argument.as_bytes())
    };
    processes().into_iter().filter(has_argument).collect()
}

fn processes() -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| name.parse().ok()).map(Pid::from_raw).collect()
}

/// Whether a thread of a process sleeps in read(2).
#[must_use]
pub fn is_reading(pid: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut calls =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("syscall")).ok());
    calls.any(|call| call.split(' ').next() == Some(&nix::libc::SYS_read.to_string()))
}

/// Kilobytes of memory of a process that still runs, by a field such as `VmRSS`.
#[must_use]
pub fn memory(pid: Pid, field: &str) -> Option<u64> {
    let status = status(&PathBuf::from(format!("/proc/{pid}/status")))?;
    status.fields.get(field)?.strip_suffix(" kB")?.parse().ok()
}

/// What each descriptor of a process refers to, as the kernel names it.
///
/// # Panics
///
/// When the table may not be read.
#[track_caller]
#[must_use]
pub fn descriptors(pid: Pid) -> BTreeMap<i32, String> {
    let directory = format!("/proc/{pid}/fd");
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries.flatten(),
        Err(error) => panic!("cannot read {directory}: {error}"),
    };
    let named = entries.filter_map(|entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        let target = fs::read_link(entry.path()).ok()?;
        Some((number, target.to_string_lossy().into_owned()))
    });
    named.collect()
}

/// A namespace's identity, such as `net:[4026531840]`.
///
/// # Panics
///
/// When it may not be read.
#[track_caller]
#[must_use]
pub fn namespace(pid: Pid, kind: &str) -> String {
    let path = format!("/proc/{pid}/ns/{kind}");
    match fs::read_link(&path) {
        Ok(target) => target.to_string_lossy().into_owned(),
        Err(error) => panic!("cannot read {path}: {error}"),
    }
}
