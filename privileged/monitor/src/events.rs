//! What the operator and the host do while the dataplane is served. None of it comes from the dataplane.

use crate::state::{End, Monitor};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use std::ops::ControlFlow::{self, Break, Continue};
use wgsep_host::{Change, FAILURE, ended_child};
use wgsep_ipc::Notice;

/// Children that are reaped before other events are handled. If there are more, the next that ends is reaped with them.
const ORPHANS_AT_ONCE: usize = 1000;

impl Monitor {
    /// Deals with SIGTERM, SIGINT, SIGHUP and SIGCHLD.
    pub(crate) fn signal(&mut self) -> ControlFlow<End> {
        let Ok(Some(info)) = self.signals.read_signal() else { return Continue(()) };
        self.deal_with(info.ssi_signo.cast_signed())
    }

    /// Deals with a signal of this number.
    pub(crate) fn deal_with(&mut self, number: i32) -> ControlFlow<End> {
        match Signal::try_from(number) {
            // A service manager sends it also where the configuration failed that follows a start, and starts the
            // daemon again. After a crash the interface stays until that succeeds.
            Ok(Signal::SIGTERM) if self.is_restored => return Break(End::Orderly("SIGTERM")),
            Ok(Signal::SIGTERM) => return self.end_with_interface("SIGTERM"),
            Ok(Signal::SIGINT) => return self.end_with_interface("SIGINT"),
            Ok(Signal::SIGHUP) => self.switch_log_level(),
            _child => self.reap_orphans(),
        }
        Continue(())
    }

    /// An orderly end of which the service manager keeps nothing.
    fn end_with_interface(&self, why: &'static str) -> ControlFlow<End> {
        self.manager.remove_queues();
        Break(End::Orderly(why))
    }

    /// Reaps children other than the dataplane, whose end has a descriptor of its own: those that the launcher started
    /// before it executed this program, and as process 1 of a container every orphan.
    pub(crate) fn reap_orphans(&self) {
        let exited = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        for _ in 0..ORPHANS_AT_ONCE {
            let ended = ended_child(None).ok().flatten();
            match ended.filter(|ended| ended.pid != self.pid) {
                Some(orphan) => _ = waitid(Id::Pid(orphan.pid), exited),
                None => return,
            }
        }
    }

    /// There is no configuration file to read again; what SIGHUP changes is how much both processes log.
    fn switch_log_level(&mut self) {
        let level = self.log.switch_level();
        if let Err(error) = self.requests.notice(&Notice::LogLevel(level)) {
            self.log.error(&format!(
                "the dataplane logs as before ({error}); send SIGHUP twice to try again"
            ));
        }
    }

    /// Has the dataplane drop the keys that a copy of this machine has, too.
    pub(crate) fn announce_generation(&self) {
        if let Err(error) = self.requests.notice(&Notice::NewGeneration) {
            self.log.error(&format!(
                "this virtual machine was copied, and the dataplane continues with the keys of before ({error}); start wgsep again"
            ));
        }
    }

    /// Follows a renaming of the UAPI socket, and ends when it is removed.
    pub(crate) fn watch_socket_file(&mut self) -> ControlFlow<End> {
        match self.socket_file.changes() {
            Change::None => Continue(()),
            Change::Renamed(line) => {
                self.log.info(&line);
                Continue(())
            }
            Change::Removed => self.end_with_interface("the UAPI socket was removed"),
            Change::Unsafe(line) => Break(End::Failed(FAILURE, line)),
        }
    }
}
