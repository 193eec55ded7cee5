//! A WireGuard daemon that serves one interface in a namespace.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Pid;

use crate::implementation::Implementation;
use crate::netns::{Netns, next_number};
use crate::process::Process;
use crate::sweep::INTERFACE_PREFIX;
use crate::{procfs, uapi, wait};

/// Where the UAPI sockets of all implementations are, in every network namespace.
pub const SOCKETS: &str = "/var/run/wireguard";

/// How long a daemon may take to answer on its UAPI socket. Generous: the machine may be busy.
const START_LIMIT: Duration = Duration::from_secs(10);

/// A name for an interface that no other test on this machine uses.
#[must_use]
pub fn unique_interface() -> String {
    format!("{INTERFACE_PREFIX}{}n{}", process::id(), next_number())
}

/// The path of an interface's UAPI socket.
#[must_use]
pub fn socket_path(interface: &str) -> PathBuf {
    Path::new(SOCKETS).join(format!("{interface}.sock"))
}

/// Removes what a killed daemon cannot: its sockets and its report. One that still runs does not mind.
pub fn remove_files(interface: &str) {
    for extension in ["sock", "sandbox", "status", "psk", "upgrade"] {
        let _ = fs::remove_file(socket_path(interface).with_extension(extension));
    }
}

/// A daemon in the foreground; killed, and its files removed, when dropped.
#[derive(Debug)]
pub struct Daemon {
    /// The program started, in wgsep's case the helper.
    pub process: Process,
    /// The interface it serves.
    pub interface: String,
    /// The namespace its interface is in.
    pub netns: Arc<Netns>,
}

impl Daemon {
    /// Starts an implementation on an interface of a unique name and waits until it answers.
    ///
    /// # Panics
    ///
    /// When it ends or does not answer in time; its log is printed.
    #[track_caller]
    #[must_use]
    pub fn start(implementation: Implementation, netns: &Arc<Netns>) -> Self {
        Self::start_with(implementation, netns, |_command| {})
    }

    /// As [`Daemon::start`], with a command that `adjust` may add options or environment to.
    #[track_caller]
    #[must_use]
    pub fn start_with(
        implementation: Implementation,
        netns: &Arc<Netns>,
        adjust: impl FnOnce(&mut Command),
    ) -> Self {
        Self::start_on(&unique_interface(), implementation, netns, adjust)
    }

    /// As [`Daemon::start_with`], on an interface of a given name: for a restart.
    #[track_caller]
    #[must_use]
    pub fn start_on(
        interface: &str,
        implementation: Implementation,
        netns: &Arc<Netns>,
        adjust: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = implementation.command(netns, interface);
        adjust(&mut command);
        let label = format!("{implementation:?} on {interface}");
        let process = Process::spawn(command, label);
        let mut daemon =
            Self { process, interface: interface.to_owned(), netns: Arc::clone(netns) };
        daemon.wait_until_ready();
        daemon
    }

    #[track_caller]
    fn wait_until_ready(&mut self) {
        let interface = self.interface.clone();
        wait::until("the daemon answers on its UAPI socket", START_LIMIT, || {
            let ended = self.process.try_exit();
            assert!(ended.is_none(), "the daemon ended: {ended:?}");
            uapi::is_answering(&interface)
        });
    }

    /// wgsep's dataplane: the helper's only child.
    ///
    /// # Panics
    ///
    /// When there is not exactly one child.
    #[track_caller]
    #[must_use]
    pub fn dataplane(&self) -> Pid {
        let children = procfs::children(self.process.pid());
        assert_eq!(children.len(), 1, "the helper's children: {children:?}");
        children[0]
    }

    /// How each layer of both processes turned out, as the helper wrote it down for the audit.
    #[track_caller]
    #[must_use]
    pub fn sandbox_report(&self) -> String {
        let path = socket_path(&self.interface).with_extension("sandbox");
        match std::fs::read_to_string(&path) {
            Ok(report) => report,
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }

    /// Moves the interface to another namespace; the sockets stay where the daemon was started.
    #[track_caller]
    pub fn move_interface(&mut self, to: &Arc<Netns>) {
        self.netns.run(format!("ip link set {} netns {}", self.interface, to.name()));
        self.netns = Arc::clone(to);
    }

    /// Whether the interface is there.
    #[must_use]
    pub fn has_interface(&self) -> bool {
        self.netns.output(format!("ip link show {}", self.interface)).status.success()
    }

    /// Whether the socket file is there.
    #[must_use]
    pub fn has_socket(&self) -> bool {
        socket_path(&self.interface).symlink_metadata().is_ok()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The process is killed after this, as a field.
        remove_files(&self.interface);
    }
}
