//! What precedes the first byte that could be hostile: the dataplane is verified, this process confined, and
//! the interface handed over.

use crate::monitor::GRACE;
use crate::requests::{LockedDown, Requests};
use crate::state::{End, Monitor, Process};
use crate::udp::UdpOptions;
use nix::errno::Errno;
use nix::sys::signalfd::SignalFd;
use nix::unistd::{Gid, Pid, Uid};
use std::ops::ControlFlow::{Break, Continue};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use wgsep_host::{BREACH, Error, Generation, Result, SocketFile};
use wgsep_ipc::{Channel, Reply};
use wgsep_journal::{Level, Log, ServiceManager};
use wgsep_policy::{Grants, Layer, Named, Process as Confined, Report, Sandboxes, State};
use wgsep_upgrade::{Predecessor, Successors};

/// How long the dataplane may take to start and to lock itself down.
const LOCK_DOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// A dataplane that was started, and is not verified yet.
pub struct Dataplane {
    /// The process, and its log.
    pub process: Process,
    /// Requests.
    pub channel: Channel,
    /// To look it up in /proc.
    pub pid: Pid,
    /// Its uid and gid.
    pub ids: (Uid, Gid),
    /// How many threads it has, once it is locked down.
    pub threads: usize,
    /// The state of the layers that were applied before it was executed.
    pub report: Report,
}

/// What the dataplane receives once it is verified.
pub struct Interface {
    /// Its name in the kernel.
    pub name: String,
    /// [`Reply::Granted`].
    pub granted: Reply,
    /// The descriptors of the reply.
    pub descriptors: Vec<OwnedFd>,
    /// A line of the log about an offload that its queues do not have.
    pub missing: Option<String>,
}

/// The helper before its lock-down: everything opened and started, nothing handed over, all privileges kept.
pub struct Unconfined {
    /// Of this build, for the log.
    pub version: &'static str,
    /// The dataplane, to be verified.
    pub dataplane: Dataplane,
    /// For the dataplane.
    pub interface: Interface,
    /// What the dataplane may ask for.
    pub grants: Grants,
    /// How UDP sockets are set up.
    pub udp: UdpOptions,
    /// The line of the log about sockets without UDP_GRO.
    pub missing_gro: String,
    /// Refuse to run with any layer of the sandbox degraded.
    pub strict: bool,
    /// The file that wg(8) looks for.
    pub socket_file: SocketFile,
    /// SIGTERM, SIGINT, SIGHUP and SIGCHLD.
    pub signals: SignalFd,
    /// The source of new generations of this virtual machine.
    pub generation: Generation,
    /// The log of both processes.
    pub log: Log,
    /// The service manager.
    pub manager: ServiceManager,
    /// Whether the interface is that of a daemon that crashed.
    pub is_restored: bool,
    /// What is kept for a helper that replaces this one.
    pub successors: Option<Successors>,
    /// What this one replaces.
    pub predecessor: Option<Predecessor>,
}

impl Unconfined {
    /// Verifies the dataplane, locks this process down and hands the interface over; the order matters.
    ///
    /// # Errors
    /// If the dataplane does not lock itself down or the kernel shows that it did not, if this process cannot
    /// be confined, or if a layer is degraded where none may be. The dataplane is killed then.
    pub fn lock_down(self) -> Result<Monitor> {
        let Self { version, dataplane, interface, grants, udp, missing_gro, strict, .. } = self;
        let Self { socket_file, signals, generation, log, manager, is_restored, .. } = self;
        let Self { successors, predecessor, .. } = self;
        let Dataplane { process, channel, pid, ids, threads, mut report } = dataplane;
        let requests = Requests::new(channel, grants, udp);
        let missing_gro = Some(missing_gro);
        let mut monitor = Monitor {
            process,
            pid,
            requests,
            socket_file,
            signals,
            generation,
            log,
            manager,
            is_restored,
            missing_gro,
            successors,
            waiter: None,
        };
        let helper_report = wgsep_policy::drop_helper_privileges(grants.needs_low_ports())?;
        if let Err(error) = monitor.socket_file.check_removable() {
            monitor.log.line(Level::Warn, &error.to_string());
        }

        let (sequence, sandbox) = monitor.wait_for_lock_down()?;
        let sandbox = Report::from_bytes(&sandbox).ok_or_else(|| {
            Error::new(
                "the report of its sandbox makes no sense; install both programs from one build",
            )
        })?;
        let untraceable = report.state(Layer::Untraceable);
        report.merge(&sandbox);
        let verified = wgsep_policy::verify(pid, ids, threads, &report);
        let tracer = verified.map_err(|refused| monitor.end_or(refused.into()))?;
        wgsep_policy::drop_reserve(grants.needs_low_ports())?;
        // Never as the dataplane itself reports it.
        let untraceable = match untraceable {
            State::Absent => wgsep_policy::untraceable(pid, tracer.as_deref()),
            known => known,
        };
        report.note(Layer::Untraceable, untraceable);
        let directory = monitor.socket_file.directory();
        let named = Named {
            child: Some(monitor.process.pidfd.as_fd()),
            channel: Some(monitor.requests.as_fd()),
            system_log: monitor.log.system_log(),
            successor: monitor.successors.as_ref().map(Successors::channel),
        };
        let helper_report = wgsep_policy::lock_down_helper(helper_report, directory, named)?;
        if strict {
            report.refuse_degraded(Confined::Dataplane)?;
            helper_report.refuse_degraded(Confined::Helper)?;
        }
        if let Some(predecessor) = &predecessor {
            report.refuse_lost(Confined::Dataplane, &predecessor.claims)?;
            helper_report.refuse_lost(Confined::Helper, &predecessor.claims)?;
        }

        let sandboxes = Sandboxes { dataplane: report, helper: helper_report };
        let claims = format!("helper: {helper_report}\ndataplane: {report}\n");
        // Before any client is served, so that each finds it. That of a helper that is replaced is written later.
        monitor.write_report(&interface.name, &claims);
        let Interface { name, granted, descriptors, missing } = interface;
        let granted = {
            let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            monitor.requests.grant(sequence, &granted, &descriptors)
        };
        granted.map_err(|error| {
            let line = match error {
                wgsep_ipc::Error::Io(errno @ (Errno::ENOBUFS | Errno::ETOOMANYREFS)) => {
                    format!("hand over the interface: {error}; {}", wgsep_policy::remedy(errno))
                }
                _ => monitor.with_reason(&format!("hand over the interface: {error}")),
            };
            monitor.end_or(Error::new(line))
        })?;
        // Of the listener and the TUN queues, a helper that replaces this one gets duplicates. The interface goes with
        // this process and the dataplane, of which neither outlives the other. The others close here, before the
        // state with the keys passes between the dataplanes.
        if let Some(successors) = &mut monitor.successors {
            successors.keep(descriptors);
        }
        if let Some(predecessor) = predecessor {
            monitor.take_over(predecessor)?;
            monitor.write_report(&name, &claims);
        }
        if let Some(successors) = &mut monitor.successors {
            successors.begin();
        }
        monitor.log.started();
        let line = format!(
            "started: version {version}, dataplane pid {pid} uid {}; sandbox: {sandboxes}",
            ids.0
        );
        monitor.log.event(&line, &sandboxes.members(version, pid, ids.0));
        monitor.log.line(Level::Debug, &claims.trim_end().replace('\n', "; "));
        if let Some(tracer) = tracer {
            monitor.log.line(Level::Warn, &format!(
                "process {tracer} traces the dataplane and can read its keys; end that process, and start wgsep again"
            ));
        }
        if let Some(missing) = missing {
            monitor.log.info(&missing);
        }
        monitor.manager.ready(&format!("serving {name}"));
        Ok(monitor)
    }
}

impl Monitor {
    fn write_report(&mut self, interface: &str, claims: &str) {
        if let Err(error) = self.socket_file.write_report(interface, claims) {
            self.log.line(Level::Warn, &error.to_string());
        }
    }

    /// How the dataplane ended, if it has ended, which is the cause of `error`; otherwise `error`.
    fn end_or(&mut self, error: Error) -> Error {
        if !self.has_ended(GRACE) {
            return error;
        }
        match self.died() {
            End::Failed(status, line) => self.failed(status, line),
            End::Orderly(_) => error,
        }
    }

    fn failed(&self, status: u8, line: String) -> Error {
        if status == BREACH {
            self.manager.remove_queues();
        }
        Error { line, status }
    }

    /// Waits for the dataplane's report of its lock-down. Returns the sequence number to answer, and the
    /// report.
    ///
    /// # Errors
    /// If it ends, breaks the contract or takes too long. The status is 0 after SIGTERM or SIGINT.
    fn wait_for_lock_down(&mut self) -> Result<LockedDown> {
        let late = "the dataplane did not lock itself down within 10 s";
        self.wait_until(LOCK_DOWN_TIMEOUT, late, |_, locked_down| locked_down)
    }

    /// Serves until something is there.
    ///
    /// # Errors
    /// As [`Self::wait_for_lock_down`].
    pub(crate) fn wait_until<T>(
        &mut self,
        timeout: Duration,
        late: &str,
        found: impl Fn(&Self, Option<LockedDown>) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(self.with_reason(late)));
            }
            match self.turn(left) {
                Continue(locked_down) => {
                    if let Some(found) = found(self, locked_down) {
                        return Ok(found);
                    }
                }
                Break(End::Failed(status, line)) => return Err(self.failed(status, line)),
                Break(End::Orderly(why)) => {
                    let line = format!("ended: {why}, before the dataplane was ready");
                    self.log.info(&line);
                    return Err(Error { line, status: 0 });
                }
            }
        }
    }
}
