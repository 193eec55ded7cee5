//! A Debian booted with its own systemd, in namespaces of its own: where the package is tried.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cache;
use crate::cgroup::MachineCgroup;
use crate::implementation::wgsep_program;
use crate::netns::Netns;
use crate::process::{self, Process};
use crate::{procfs, skip, wait};

/// How long it may take to boot; two seconds where nothing else runs.
const BOOT_LIMIT: Duration = Duration::from_secs(30);

/// `make deb` lays out the files of every package in one directory of the target: one test at a time.
static STAGE: Mutex<()> = Mutex::new(());

/// Holds off other tests that build a Debian package.
pub fn stage() -> MutexGuard<'static, ()> {
    STAGE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Builds the Debian package of the programs as they are, without building those, into a directory.
///
/// # Panics
///
/// When it cannot be built, or is not all that the directory has then.
#[track_caller]
#[must_use]
pub fn package(directory: &Path) -> PathBuf {
    let _stage = stage();
    let built = wgsep_program("wgsep");
    let Some(target) = built.ancestors().nth(2) else {
        panic!("{} is in no target", built.display());
    };
    let mut make = Command::new("make");
    make.current_dir(crate::repository());
    make.args(["--no-print-directory", "--old-file=build", "deb"]);
    make.arg(format!("DEBDIR={}", directory.display()));
    process::run(make.env("CARGO_TARGET_DIR", target).env_remove("MAKEFLAGS"));
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    let files: Vec<_> = files.map(|entry| entry.path()).collect();
    match &files[..] {
        [package] if package.extension() == Some("deb".as_ref()) => package.clone(),
        _ => panic!("README's wgsep_*.deb is one of {files:?}"),
    }
}

/// Writes a file for a machine, in the form of wg-quick(8), as an operator keeps it.
///
/// # Panics
///
/// When it cannot be written, or is not root's.
#[track_caller]
pub fn write_configuration(path: &Path, text: &str) {
    let private = Permissions::from_mode(0o600);
    let written = fs::write(path, text).and_then(|()| fs::set_permissions(path, private));
    let owner = written.and_then(|()| Ok(fs::metadata(path)?.uid()));
    assert!(matches!(owner, Ok(0)), "cannot write {}: {owner:?}", path.display());
}

/// A release of Debian that a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Debian {
    /// 12, with systemd 252.
    Bookworm,
    /// 13, with systemd 257, and with needrestart(1).
    Trixie,
}

impl Debian {
    /// The cache entry that `make deps` makes.
    const fn entry(self) -> &'static str {
        match self {
            Self::Bookworm => "debian",
            Self::Trixie => "debian-13",
        }
    }

    /// The image of it, where root runs the test; says so when not, or when it is missing.
    #[must_use]
    pub fn image_or_skips(self) -> Option<PathBuf> {
        if !skip::is_root_or_skips() {
            return None;
        }
        Machine::image(self).inspect_err(|reason| skip::skip(reason)).ok()
    }
}

/// A running machine; all that runs in it is killed when dropped, and what it wrote is forgotten.
#[derive(Debug)]
pub struct Machine {
    container: Process,
    init: Pid,
    /// Otherwise all machines would be in one, and the systemd of each would remove the groups of units, and kill the
    /// processes in them, that another has as well.
    cgroup: MachineCgroup,
}

impl Machine {
    /// Where `make deps` keeps the Debian.
    ///
    /// # Errors
    ///
    /// Where there is none, or nothing to boot it with: why, and what to do.
    fn image(debian: Debian) -> Result<PathBuf, String> {
        if Command::new("systemd-nspawn").arg("--version").output().is_err() {
            return Err("systemd-nspawn is missing: run `make deps`".to_owned());
        }
        cache::entry(debian.entry())
    }

    /// The image of the older Debian, as [`Debian::image_or_skips`].
    #[must_use]
    pub fn image_or_skips() -> Option<PathBuf> {
        Debian::Bookworm.image_or_skips()
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
        // As Debian boots, whatever this machine has.
        command.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1");
        // It would withhold system calls that it does not know from what the machine starts, and a real machine has them.
        command.env("SYSTEMD_SECCOMP", "0");
        command.arg("--directory").arg(image);
        command.args(["--volatile=overlay", "--register=no", "--keep-unit", "--console=pipe"]);
        command.args(["--boot", "--bind=/dev/net/tun", "--capability=CAP_NET_ADMIN"]);
        command.arg(format!("--machine={}", netns.name()));
        command.arg(format!("--network-namespace-path=/run/netns/{}", netns.name()));
        for (file, seen_as) in files {
            command.arg(format!("--bind={}:{seen_as}", file.display()));
        }
        let cgroup = match MachineCgroup::new() {
            Ok(cgroup) => cgroup,
            Err(why) => panic!("{why}"),
        };
        cgroup.enter(&mut command);
        let mut container = Process::spawn(command, "systemd-nspawn");
        let init = wait::poll(BOOT_LIMIT, || {
            let ended = container.try_exit();
            assert!(ended.is_none(), "systemd-nspawn ended: {ended:?}\n{}", container.log());
            // The container's first children only prepare the last one, which becomes systemd.
            let is_systemd = |pid: &Pid| {
                fs::read_to_string(format!("/proc/{pid}/comm"))
                    .is_ok_and(|name| name == "systemd\n")
            };
            procfs::children(container.pid()).into_iter().find(is_systemd)
        });
        let Some(init) = init else { panic!("systemd-nspawn starts no machine") };
        let machine = Self { container, init, cgroup };
        assert!(machine.cgroup.has_in_it(init), "the machine is in the control group of others");
        wait::until("the machine has booted", BOOT_LIMIT, || {
            let state = machine.output("systemctl is-system-running").stdout;
            matches!(String::from_utf8_lossy(&state).trim(), "running" | "degraded")
        });
        machine
    }

    /// Writes the configuration of an interface that has a key and nothing else.
    #[track_caller]
    pub fn write_configuration_with_a_key(&self, interface: &str) {
        self.run(&format!(
            "umask 077; mkdir -p /etc/wireguard; printf '[Interface]\\nPrivateKey = %s\\n' $(wg genkey) \
             >/etc/wireguard/{interface}.conf"
        ));
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
