//! What the helper has while it serves the dataplane.

use crate::requests::Requests;
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;
use std::os::fd::OwnedFd;
use wgsep_host::{Generation, SocketFile};
use wgsep_ipc::Channel;
use wgsep_journal::{Log, ServiceManager};
use wgsep_upgrade::Successors;

/// Why the daemon ends.
pub(crate) enum End {
    /// Asked for: by a signal, by removing the socket, or by deleting the interface.
    Orderly(&'static str),
    /// Something went wrong: the exit status, and a line that says what.
    Failed(u8, String),
}

/// The dataplane's process.
pub struct Process {
    /// For signals and for its end.
    pub pidfd: OwnedFd,
    /// What it logs.
    pub log: OwnedFd,
    /// Held and never read: what its user has in flight there keeps it from sending descriptors.
    pub unread: OwnedFd,
}

/// The running daemon, as the helper sees it.
pub struct Monitor {
    /// The dataplane's process.
    pub(crate) process: Process,
    /// Its number, which is no other process's until this one has reaped it.
    pub(crate) pid: Pid,
    /// What it asks for.
    pub(crate) requests: Requests,
    /// The file that wg(8) looks for.
    pub(crate) socket_file: SocketFile,
    /// SIGTERM, SIGINT, SIGHUP and SIGCHLD.
    pub(crate) signals: SignalFd,
    /// What reports a new generation of this virtual machine.
    pub(crate) generation: Generation,
    /// Where both processes' lines go.
    pub(crate) log: Log,
    /// Whoever supervises us.
    pub(crate) manager: ServiceManager,
    /// Whether the interface is that of a daemon that crashed.
    pub(crate) is_restored: bool,
    /// The line that is yet to be logged where UDP datagrams come one by one.
    pub(crate) missing_gro: Option<String>,
    /// What is kept for a helper that replaces this one. `None` where there is no socket for it.
    pub(crate) successors: Option<Successors>,
    /// The helper that waits for the end of this one, in the place of its launcher.
    pub(crate) waiter: Option<Channel>,
}
