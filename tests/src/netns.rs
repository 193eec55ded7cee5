//! Network namespaces, and programs and code that run in them.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::process::{Process, output, run};
use crate::sweep;

/// Where `ip netns` keeps its handles.
const HANDLES: &str = "/run/netns";

/// Numbers the namespaces and interfaces of this process.
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// The next number that this process has not used in a name.
pub(crate) fn next_number() -> u32 {
    COUNTER.fetch_add(1, Ordering::Relaxed)
}

/// A network namespace of a test, loopback up; deleted, and all in it killed, when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
    handle: File,
}

impl Netns {
    /// Makes a namespace. Its name carries this process's id, so that a later run can tell
    /// whether its maker still lives.
    ///
    /// # Panics
    ///
    /// When `ip netns add` fails.
    #[track_caller]
    #[must_use]
    pub fn new() -> Arc<Self> {
        sweep::once();
        let name = format!("{}{}-{}", sweep::NETNS_PREFIX, process::id(), next_number());
        run(Command::new("ip").args(["netns", "add", &name]));
        let path = handle_path(&name);
        let Ok(handle) = File::open(&path) else {
            panic!("cannot open {}", path.display());
        };
        let netns = Self { name, handle };
        netns.run("ip link set lo up");
        Arc::new(netns)
    }

    /// The name under which `ip -n` knows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that will run in this namespace and die with the test's thread.
    ///
    /// # Panics
    ///
    /// When the namespace's descriptor cannot be duplicated.
    #[track_caller]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        // The command has the namespace to itself, however long it is kept.
        let handle = match self.handle.try_clone() {
            Ok(handle) => handle,
            Err(error) => panic!("cannot duplicate the handle of {}: {error}", self.name),
        };
        // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are
        // allowed: it makes two bare system calls on what it owns, and allocates nothing.
        unsafe {
            command.pre_exec(move || enter(&handle));
        }
        command
    }

    /// Runs a command line, split at white space, and returns its stdout.
    ///
    /// # Panics
    ///
    /// When it fails.
    #[track_caller]
    pub fn run(&self, line: impl AsRef<str>) -> String {
        run(&mut self.command_line(line.as_ref()))
    }

    /// Runs a command line, split at white space, that may fail.
    #[track_caller]
    pub fn output(&self, line: impl AsRef<str>) -> Output {
        output(&mut self.command_line(line.as_ref()))
    }

    /// Starts a command line, split at white space, and leaves it running.
    #[track_caller]
    pub fn spawn(&self, line: impl AsRef<str>) -> Process {
        let line = line.as_ref();
        Process::spawn(self.command_line(line), line)
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets it makes belong to the
    /// namespace and may be returned.
    #[track_caller]
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let entered = || match setns(&self.handle, CloneFlags::CLONE_NEWNET) {
            Ok(()) => work(),
            Err(error) => panic!("cannot enter {}: {error}", self.name),
        };
        match thread::scope(|scope| scope.spawn(entered).join()) {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    fn command_line(&self, line: &str) -> Command {
        let mut words = line.split_ascii_whitespace();
        let mut command = self.command(words.next().unwrap_or_default());
        command.args(words);
        command
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        sweep::remove_netns(&self.name);
    }
}

/// The file that stands for a named namespace.
pub(crate) fn handle_path(name: &str) -> PathBuf {
    Path::new(HANDLES).join(name)
}

/// In a child between fork and exec: joins the namespace and asks to die with the parent thread. What the tests are
/// run by may ignore SIGHUP, as nohup(1) does.
fn enter(handle: &File) -> io::Result<()> {
    setns(handle, CloneFlags::CLONE_NEWNET)?;
    // SAFETY: no handler is installed.
    unsafe { signal(Signal::SIGHUP, SigHandler::SigDfl)? };
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    Ok(())
}
