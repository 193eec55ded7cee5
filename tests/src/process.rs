//! Children of a test: run to their end, or kept running with their output at hand.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;
use std::{env, thread};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::procfs::{self, Status};
use crate::wait;

/// How long a process may take to heed a signal on a machine that is busy elsewhere.
const HEEDS_WITHIN: Duration = Duration::from_secs(10);

/// Stops a process that need not be a child, and returns when every thread of it is stopped: until then
/// one may still be at work.
///
/// # Panics
///
/// When it does not exist, or does not stop.
#[track_caller]
pub fn stop(pid: Pid) {
    if let Err(error) = kill(pid, Signal::SIGSTOP) {
        panic!("cannot stop {pid}: {error}");
    }
    let is_stopped = |thread: &Status| thread.text("State").starts_with('T');
    wait::until("every thread is stopped", HEEDS_WITHIN, || {
        procfs::threads(pid).iter().all(is_stopped)
    });
}

/// Runs a command to its end and returns what it printed on stdout.
///
/// # Panics
///
/// When it cannot be started or does not exit with status 0; the message has its stderr.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command to its end, however that turns out.
///
/// # Panics
///
/// When it cannot be started.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => panic!("cannot start {command:?}: {error}"),
    }
}

/// A running child in a process group of its own, killed with its group when dropped.
///
/// What it prints goes to an unnamed file; the file is shown when a test fails.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: File,
    label: String,
}

impl Process {
    /// Starts `command` with stdin at `/dev/null` and both outputs in the log.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[track_caller]
    pub fn spawn(mut command: Command, label: impl Into<String>) -> Self {
        let log = unnamed_file();
        let (Ok(stdout), Ok(stderr)) = (log.try_clone(), log.try_clone()) else {
            panic!("cannot duplicate a log file's descriptor");
        };
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).process_group(0);
        match command.spawn() {
            Ok(child) => Self { child, log, label: label.into() },
            Err(error) => panic!("cannot start {command:?}: {error}"),
        }
    }

    /// The child's process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// All that the child and its descendants have printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&self.log_from(0)).into_owned()
    }

    /// What they have printed so far, without its first `offset` bytes.
    #[must_use]
    pub fn log_from(&self, offset: u64) -> Vec<u8> {
        let length = self.log.metadata().map_or(0, |metadata| metadata.len());
        let mut bytes = vec![0; usize::try_from(length.saturating_sub(offset)).unwrap_or(0)];
        let read = self.log.read_at(&mut bytes, offset).unwrap_or(0);
        bytes.truncate(read);
        bytes
    }

    /// Sends a signal to the child alone, not to its group.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        if let Err(error) = kill(self.pid(), signal) {
            panic!("cannot send {signal} to {}: {error}", self.label);
        }
    }

    /// The exit status, if the child has ended.
    pub fn try_exit(&mut self) -> Option<ExitStatus> {
        match self.child.try_wait() {
            Ok(status) => status,
            Err(error) => panic!("cannot wait for {}: {error}", self.label),
        }
    }

    /// Waits for the child's end.
    ///
    /// # Panics
    ///
    /// When it still runs after `limit`.
    #[track_caller]
    pub fn exit_within(&mut self, limit: Duration) -> ExitStatus {
        match wait::poll(limit, || self.try_exit()) {
            Some(status) => status,
            None => panic!("{} still runs after {limit:?}", self.label),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The group may outlive its leader; an empty one gives ESRCH.
        match killpg(self.pid(), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => {
                let _ = writeln!(io::stderr(), "cannot kill {}: {error}", self.label);
            }
        }
        let _ = self.child.wait();
        if thread::panicking() {
            let _ = writeln!(io::stderr(), "--- log of {} ---\n{}---", self.label, self.log());
        }
    }
}

/// A file without a name: nothing to clean up, whatever becomes of the test.
fn unnamed_file() -> File {
    let mut options = OpenOptions::new();
    options.read(true).append(true).custom_flags(OFlag::O_TMPFILE.bits());
    match options.open(env::temp_dir()) {
        Ok(file) => file,
        Err(error) => panic!("cannot make a log file in {}: {error}", env::temp_dir().display()),
    }
}
