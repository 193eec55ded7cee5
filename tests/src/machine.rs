//! A Debian booted with its own systemd, in namespaces of its own: where the package is tried.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cache;
use crate::implementation::wgsep_program;
use crate::netns::Netns;
use crate::process::{self, Process};
use crate::{procfs, wait};

/// How long it may take to boot; two seconds where nothing else runs.
const BOOT_LIMIT: Duration = Duration::from_secs(30);

/// What systemd-nspawn keeps from its machines by default and a real one has.
const SYSTEM_CALLS: &str =
    "landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret";

/// Builds the Debian package of the programs as they are, without building those, into a directory.
///
/// # Panics
///
/// When it cannot be built.
#[track_caller]
#[must_use]
pub fn package(directory: &Path) -> PathBuf {
    let built = wgsep_program("wgsep");
    let Some(target) = built.ancestors().nth(2) else {
        panic!("{} is in no target", built.display());
    };
    let mut make = Command::new("make");
    make.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    make.args(["--no-print-directory", "--old-file=build", "deb"]);
    make.arg(format!("DEBDIR={}", directory.display()));
    process::run(make.env("CARGO_TARGET_DIR", target).env_remove("MAKEFLAGS"));
    let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let package =
        files.map(|entry| entry.path()).find(|path| path.extension() == Some("deb".as_ref()));
    match package {
        Some(package) => package,
        None => panic!("no package in {}", directory.display()),
    }
}

/// A running machine; all that runs in it is killed when dropped, and what it wrote is forgotten.
#[derive(Debug)]
pub struct Machine {
    container: Process,
    init: Pid,
}

impl Machine {
    /// Where `make deps` keeps the Debian.
    ///
    /// # Errors
    ///
    /// Where there is none, or nothing to boot it with: why, and what to do.
    pub fn image() -> Result<PathBuf, String> {
        if Command::new("systemd-nspawn").arg("--version").output().is_err() {
            return Err("systemd-nspawn is missing: run `make deps`".to_owned());
        }
        cache::entry("debian")
    }

    /// Boots the image with the network of `netns`. Of each pair, the first file is seen in the
    /// machine as the second. What the machine writes goes to memory.
    ///
    /// # Panics
    ///
    /// When it does not boot in time.
    #[track_caller]
    #[must_use]
    pub fn boot(image: &Path, netns: &Netns, files: &[(&Path, &str)]) -> Self {
        let mut command = Command::new("systemd-nspawn");
        command.arg("--directory").arg(image);
        command.args(["--volatile=overlay", "--register=no", "--keep-unit", "--console=pipe"]);
        command.args(["--boot", "--bind=/dev/net/tun", "--capability=CAP_NET_ADMIN"]);
        command.arg(format!("--machine={}", netns.name()));
        command.arg(format!("--network-namespace-path=/run/netns/{}", netns.name()));
        command.arg(format!("--system-call-filter={SYSTEM_CALLS}"));
        for (file, seen_as) in files {
            command.arg(format!("--bind={}:{seen_as}", file.display()));
        }
        let mut container = Process::spawn(command, "systemd-nspawn");
        let init = wait::poll(BOOT_LIMIT, || {
            let ended = container.try_exit();
            assert!(ended.is_none(), "systemd-nspawn ended: {ended:?}\n{}", container.log());
            // The container's first children only prepare the last one, which becomes systemd.
            let is_systemd = |pid: &Pid| {
                std::fs::read_to_string(format!("/proc/{pid}/comm"))
                    .is_ok_and(|name| name == "systemd\n")
            };
            procfs::children(container.pid()).into_iter().find(is_systemd)
        });
        let Some(init) = init else { panic!("systemd-nspawn starts no machine") };
        let machine = Self { container, init };
        wait::until("the machine has booted", BOOT_LIMIT, || {
            let state = machine.output("systemctl is-system-running").stdout;
            matches!(String::from_utf8_lossy(&state).trim(), "running" | "degraded")
        });
        machine
    }

    /// Runs a line of shell as the machine's root.
    #[track_caller]
    pub fn output(&self, line: &str) -> Output {
        process::output(&mut self.command(line))
    }

    /// As [`Machine::output`], and returns its stdout.
    ///
    /// # Panics
    ///
    /// When it fails.
    #[track_caller]
    pub fn run(&self, line: &str) -> String {
        process::run(&mut self.command(line))
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--all", "--target", &self.init.to_string()]);
        command.args(["/usr/bin/env", "--ignore-environment", "LC_ALL=C"]);
        command.arg("PATH=/usr/sbin:/usr/bin:/sbin:/bin").args(["/bin/sh", "-c", line]);
        command
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() {
            let journal = self.command("journalctl --no-pager --boot --lines 100").output();
            let journal = journal.map_or_else(|_| Vec::new(), |output| output.stdout);
            let _ = io::stderr().write_all(&journal);
        }
        // With the first process of its namespace ends every other; killing the container first, as
        // a field, would let the machine live on.
        let _ = kill(self.init, Signal::SIGKILL);
        let _ = wait::poll(BOOT_LIMIT, || self.container.try_exit());
    }
}
