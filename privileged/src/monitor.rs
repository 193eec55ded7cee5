//! Serving the dataplane until one of the two ends.
//!
//! What the dataplane may ask depends on the phase; [`permit`] is the whole table. Anything else is
//! a violation, and the dataplane is killed.

use crate::error::{Error, Result, Step};
use crate::log::{Level, Log};
use crate::notify::ServiceManager;
use crate::offload::{self, Offload};
use crate::spawn::Dataplane;
use crate::sys;
use crate::uapi_socket::UapiSocket;
use crate::udp::UdpSockets;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};
use wgsep_ipc::{LogLevel, Notice, Received, Reply, Request, SealReport};
use wgsep_policy::Grants;

/// How long the dataplane may take to start and to seal itself.
const SEAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to end once told to.
const GRACE: Duration = Duration::from_millis(500);
/// Requests a second that are answered at once; more wait for the next second.
const REQUESTS_PER_SECOND: u32 = 100;
/// Requests that may follow each other without one having been waited for. The real dataplane has
/// one under way, and another when it says goodbye.
const PIPELINED_REQUESTS: u32 = 16;

/// How far the dataplane has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Started, not verified.
    Init,
    /// Verified; has the interface.
    Running,
}

/// The table of what may be asked when. `Sealed` comes once, because it ends its phase.
const fn permit(phase: Phase, request: &Request) -> bool {
    match request {
        Request::Sealed(_) => matches!(phase, Phase::Init),
        Request::OpenUdp { .. } | Request::CloseUdp | Request::SetMark { .. } | Request::Bye => {
            matches!(phase, Phase::Running)
        }
    }
}

/// Why the daemon ends.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// Asked for: by a signal, by removing the socket, or by deleting the interface.
    Orderly(&'static str),
    /// Something went wrong; the line says what.
    Failed(String),
}

/// The running daemon, as the helper sees it.
pub struct Monitor {
    dataplane: Dataplane,
    /// The UAPI socket.
    pub uapi: UapiSocket,
    signals: SignalFd,
    log: Log,
    grants: Grants,
    without: Vec<Offload>,
    gro_is_missed: bool,
    manager: ServiceManager,
    phase: Phase,
    sockets: Option<UdpSockets>,
    second: Instant,
    requests: u32,
    pipelined: u32,
    said_bye: bool,
}

impl Monitor {
    /// A monitor of a dataplane that was just started.
    pub fn new(
        dataplane: Dataplane,
        uapi: UapiSocket,
        signals: SignalFd,
        log: Log,
        grants: Grants,
        without: Vec<Offload>,
        manager: ServiceManager,
    ) -> Self {
        Self {
            dataplane,
            uapi,
            signals,
            log,
            grants,
            without,
            gro_is_missed: false,
            manager,
            phase: Phase::Init,
            sockets: None,
            second: Instant::now(),
            requests: 0,
            pipelined: 0,
            said_bye: false,
        }
    }

    /// The log.
    pub const fn log(&self) -> &Log {
        &self.log
    }

    /// Whoever supervises us.
    pub const fn manager(&self) -> &ServiceManager {
        &self.manager
    }

    // ------------------------------------------------------------ before it is trusted

    /// Waits for the dataplane to say that it is sealed; its report, and the number to answer to.
    ///
    /// # Errors
    /// If it says anything else, dies, or takes too long.
    pub fn wait_for_seal(&mut self) -> Result<(u32, SealReport)> {
        let deadline = Instant::now() + SEAL_TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(
                    "the dataplane did not seal itself in time; is the machine overloaded? start it again",
                ));
            }
            let ready = poll(
                [self.dataplane.log.as_fd(), self.dataplane.channel.as_fd(), self.signals.as_fd()],
                left,
            )?;
            let [log, channel, signal] = ready;
            if log {
                self.log.forward(self.dataplane.log.as_fd());
            }
            if signal {
                return Err(Error::new(
                    "interrupted before the dataplane was ready; start it again",
                ));
            }
            if channel {
                match self.dataplane.channel.receive_request() {
                    Ok(Received::Nothing) => {}
                    Ok(Received::Message((sequence, request), _))
                        if permit(self.phase, &request) =>
                    {
                        if let Request::Sealed(report) = request {
                            return Ok((sequence, report));
                        }
                    }
                    Ok(Received::Message((_, request), _)) => {
                        return Err(Error::new(format!(
                            "the dataplane sent {} before it was sealed; install both programs from one build",
                            request.name()
                        )));
                    }
                    Ok(Received::Closed) => return Err(Error::new(self.death())),
                    Err(error) => {
                        return Err(Error::new(format!(
                            "the dataplane broke the contract: {error}; install both programs from one build"
                        )));
                    }
                }
            }
        }
    }

    /// The dataplane was verified: hands over the interface.
    ///
    /// # Errors
    /// If it is gone.
    pub fn grant(
        &mut self,
        sequence: u32,
        reply: &Reply,
        netlink: BorrowedFd<'_>,
        queues: &[BorrowedFd<'_>],
    ) -> Result<()> {
        self.phase = Phase::Running;
        let listener = self.uapi.take_listener();
        let listener = listener.as_ref().ok_or_else(|| {
            Error::new("no UAPI socket to hand over; this is a fault, please report it")
        })?;
        let descriptors = [&[listener.as_fd(), netlink], queues].concat();
        let sent = self.dataplane.channel.send_reply(sequence, reply, &descriptors);
        sent.map_err(|error| {
            Error::new(format!("hand over the interface: {error}; see the dataplane's lines above"))
        })
    }

    // ------------------------------------------------------------ serving

    /// Serves until the end, and ends the dataplane.
    pub fn serve(mut self) -> End {
        let end = match self.serve_until_end() {
            Ok(end) => end,
            Err(error) => End::Failed(error.to_string()),
        };
        match &end {
            End::Orderly(why) => {
                self.manager.stopping(why);
                self.ask_to_end();
            }
            End::Failed(why) => self.manager.stopping(why),
        }
        self.kill();
        match &end {
            End::Orderly(why) => self.log.info(&format!("ended: {why}")),
            End::Failed(why) => self.log.error(&format!("ended: {why}")),
        }
        end
    }

    fn serve_until_end(&mut self) -> Result<End> {
        loop {
            let wait = self.back_pressure();
            let alive = self.manager.keep_alive();
            let dataplane = &self.dataplane;
            let sources = [
                dataplane.log.as_fd(),
                self.signals.as_fd(),
                self.uapi.watch(),
                dataplane.pidfd.as_fd(),
                dataplane.channel.as_fd(),
            ];
            // Requests beyond the rate stay where they are until the next second.
            let [log, signal, watch, died, asked] = match wait {
                None => poll(sources, alive)?,
                Some(wait) => {
                    let [log, signal, watch, died, _] = sources;
                    let [log, signal, watch, died] =
                        poll([log, signal, watch, died], wait.min(alive))?;
                    [log, signal, watch, died, false]
                }
            };
            if log && !self.log.forward(self.dataplane.log.as_fd()) {
                return Ok(self.died());
            }
            if signal && let Some(end) = self.signal() {
                return Ok(end);
            }
            if watch && self.uapi.was_removed() {
                return Ok(End::Orderly("the UAPI socket was removed"));
            }
            if asked && let Some(end) = self.request() {
                return Ok(end);
            }
            if died {
                return Ok(self.died());
            }
        }
    }

    /// How long to leave requests unread, if there were too many in this second.
    fn back_pressure(&mut self) -> Option<Duration> {
        const SECOND: Duration = Duration::from_secs(1);
        let elapsed = self.second.elapsed();
        if elapsed >= SECOND {
            self.second = Instant::now();
            self.requests = 0;
        }
        (self.requests >= REQUESTS_PER_SECOND).then(|| SECOND.saturating_sub(elapsed))
    }

    fn signal(&mut self) -> Option<End> {
        let info = self.signals.read_signal().ok().flatten()?;
        match Signal::try_from(info.ssi_signo.cast_signed()).ok()? {
            Signal::SIGTERM => Some(End::Orderly("SIGTERM")),
            Signal::SIGINT => Some(End::Orderly("SIGINT")),
            _hang_up => {
                self.switch_log_level();
                None
            }
        }
    }

    /// There is no configuration file to read again; what SIGHUP changes is how much both processes log.
    fn switch_log_level(&mut self) {
        let level = match self.log.switch_level() {
            None => LogLevel::Silent,
            Some(Level::Error) => LogLevel::Error,
            Some(Level::Warn | Level::Info) => LogLevel::Info,
            Some(Level::Debug) => LogLevel::Debug,
        };
        if let Err(error) = self.dataplane.channel.send_notice(&Notice::LogLevel(level)) {
            self.log.error(&format!(
                "the dataplane logs as before ({error}); send SIGHUP twice to try again"
            ));
        }
    }

    /// Answers one request; `Some` if it was the last.
    fn request(&mut self) -> Option<End> {
        let (sequence, request) = match self.dataplane.channel.receive_request() {
            Ok(Received::Nothing) => return None,
            Ok(Received::Closed) => return Some(self.died()),
            Ok(Received::Message((sequence, request), _)) => (sequence, request),
            Err(error) => return Some(violation(&error.to_string())),
        };
        if !permit(self.phase, &request) {
            return Some(violation(&format!("{} is not permitted now", request.name())));
        }
        self.requests += 1;
        if self.is_flooded() {
            return Some(violation("a flood of requests"));
        }
        let answered = match request {
            Request::OpenUdp { port, mark } => self.open_udp(sequence, port, mark),
            Request::SetMark { mark } => {
                self.answer(sequence, self.grants.permit_mark(mark), |monitor| {
                    monitor.sockets.as_mut().map_or(Ok(()), |sockets| sockets.set_mark(mark))
                })
            }
            Request::CloseUdp => {
                self.sockets = None;
                self.answer(sequence, Ok(()), |_| Ok(()))
            }
            Request::Bye => {
                self.said_bye = true;
                self.answer(sequence, Ok(()), |_| Ok(()))
            }
            Request::Sealed(_) => return Some(violation("a second Sealed")),
        };
        match answered {
            Ok(()) => None,
            // It did not wait for the answer, as after Bye.
            Err(wgsep_ipc::Error::Io(nix::Error::EPIPE | nix::Error::ECONNRESET)) => {
                Some(self.died())
            }
            Err(wgsep_ipc::Error::Io(nix::Error::EAGAIN)) => {
                Some(violation("it does not read its replies"))
            }
            Err(error) => Some(violation(&error.to_string())),
        }
    }

    /// Whether requests go on coming before those that precede them are answered.
    fn is_flooded(&mut self) -> bool {
        let another = poll([self.dataplane.channel.as_fd()], Duration::ZERO);
        self.pipelined = if another.is_ok_and(|[waits]| waits) { self.pipelined + 1 } else { 0 };
        self.pipelined > PIPELINED_REQUESTS
    }

    fn answer(
        &mut self,
        sequence: u32,
        permitted: nix::Result<()>,
        act: impl FnOnce(&mut Self) -> nix::Result<()>,
    ) -> core::result::Result<(), wgsep_ipc::Error> {
        let reply = match permitted.and_then(|()| act(self)) {
            Ok(()) => Reply::Done,
            Err(errno) => Reply::Refused { errno: errno as i32 },
        };
        self.dataplane.channel.send_reply(sequence, &reply, &[])
    }

    fn open_udp(
        &mut self,
        sequence: u32,
        port: u16,
        mark: u32,
    ) -> core::result::Result<(), wgsep_ipc::Error> {
        let gro = !self.without.contains(&Offload::UdpGro);
        let permitted = self.grants.permit_mark(mark).and_then(|()| self.grants.permit_port(port));
        let opened = permitted.and_then(|port| ensure_open(&mut self.sockets, port, mark, gro));
        let (reply, descriptors) = match opened {
            Ok(sockets) => {
                if !sockets.joins && !self.gro_is_missed {
                    self.gro_is_missed = true;
                    self.log.info(&offload::missing(Offload::UdpGro, &self.without));
                }
                let families = sockets.families();
                let [v4, v6] = families.map(|family| family.is_some());
                let reply = Reply::UdpOpened { port: sockets.port, v4, v6 };
                (reply, families.into_iter().flatten().collect())
            }
            Err(errno) => (Reply::Refused { errno: errno as i32 }, Vec::new()),
        };
        self.dataplane.channel.send_reply(sequence, &reply, &descriptors)
    }

    // ------------------------------------------------------------ the end

    /// Gives the dataplane a moment to end by itself.
    fn ask_to_end(&mut self) {
        let _already_gone = self.dataplane.channel.send_notice(&Notice::Shutdown);
        let _either_way = poll([self.dataplane.pidfd.as_fd()], GRACE);
    }

    /// Makes sure that it is gone, and passes on its last words. Where the launcher has no CAP_KILL it
    /// may outlive this, until it sees that its channel is closed.
    fn kill(&mut self) {
        let pidfd = self.dataplane.pidfd.as_fd();
        let _already_gone = sys::kill(pidfd);
        let _either_way = poll([pidfd], GRACE);
        let _reaped = waitid(Id::PIDFd(pidfd), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
        while poll([self.dataplane.log.as_fd()], Duration::ZERO).is_ok_and(|[log]| log)
            && self.log.forward(self.dataplane.log.as_fd())
        {}
    }

    /// It is gone, or has closed what it talks to us by.
    fn died(&mut self) -> End {
        let ended_by_itself = poll([self.dataplane.pidfd.as_fd()], GRACE).is_ok_and(|[gone]| gone);
        let _already_gone = sys::kill(self.dataplane.pidfd.as_fd());
        // A Bye may have crossed with the end.
        while let Ok(Received::Message((_, request), _)) = self.dataplane.channel.receive_request()
        {
            self.said_bye |= request == Request::Bye;
        }
        if self.said_bye {
            return End::Orderly("the interface was deleted");
        }
        if !ended_by_itself {
            return violation("it closed its channel or its log");
        }
        End::Failed(self.death())
    }

    /// How the dataplane ended.
    fn death(&self) -> String {
        let pidfd = self.dataplane.pidfd.as_fd();
        let _gone = poll([pidfd], GRACE);
        match waitid(
            Id::PIDFd(pidfd),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG,
        ) {
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                format!(
                    "the dataplane was killed by {signal}; start it again, and report it unless you did that"
                )
            }
            Ok(WaitStatus::Exited(_, status)) => {
                format!("the dataplane exited with status {status}; see its lines above")
            }
            _ => "the dataplane closed its channel; see its lines above".to_owned(),
        }
    }
}

impl Drop for Monitor {
    /// However we get here, no dataplane stays behind.
    fn drop(&mut self) {
        self.kill();
    }
}

/// Opens new sockets beside the old, which go only once the new ones are there; on the same port the
/// old ones stay.
fn ensure_open(
    held: &mut Option<UdpSockets>,
    port: u16,
    mark: u32,
    gro: bool,
) -> nix::Result<&mut UdpSockets> {
    match held.take_if(|sockets| sockets.port == port) {
        Some(mut sockets) => {
            let marked = sockets.set_mark(mark);
            let kept = held.insert(sockets);
            marked.map(|()| kept)
        }
        None => UdpSockets::open(port, mark, gro).map(|new| held.insert(new)),
    }
}

fn violation(what: &str) -> End {
    End::Failed(format!(
        "the dataplane broke the contract and was killed: {what}; it may be under attack, see SECURITY.md"
    ))
}

/// Waits until one of the descriptors is readable or closed, or the time is over.
fn poll<const N: usize>(descriptors: [BorrowedFd<'_>; N], wait: Duration) -> Result<[bool; N]> {
    let mut polled = descriptors.map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN));
    let timeout = match wait {
        Duration::MAX => None,
        wait => Some(nix::sys::time::TimeSpec::from(wait)),
    };
    match nix::poll::ppoll(&mut polled, timeout, None) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(errno) => return Err(errno).step("ppoll"),
    }
    Ok(polled.map(|polled| polled.any().unwrap_or(false)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgsep_ipc::REPORT_LAYERS;

    #[test]
    fn the_same_port_keeps_its_sockets_and_a_failure_keeps_the_old_ones() {
        let mut held = None;
        let port = ensure_open(&mut held, 0, 0, true).unwrap().port;
        let taken = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let taken_port = taken.local_addr().unwrap().port();
        assert_eq!(ensure_open(&mut held, taken_port, 7, true).err(), Some(nix::Error::EADDRINUSE));
        assert_eq!(held.as_ref().map(|sockets| (sockets.port, sockets.mark)), Some((port, 0)));
        assert_eq!(ensure_open(&mut held, port, 7, true).unwrap().mark, 7);
        assert_ne!(ensure_open(&mut held, 0, 7, true).unwrap().port, port);
    }

    #[test]
    fn only_sealed_is_permitted_before_and_everything_else_after() {
        let sealed = Request::Sealed([[0; 3]; REPORT_LAYERS]);
        let others = [
            Request::OpenUdp { port: 1, mark: 0 },
            Request::CloseUdp,
            Request::SetMark { mark: 0 },
            Request::Bye,
        ];
        assert!(permit(Phase::Init, &sealed) && !permit(Phase::Running, &sealed));
        for other in &others {
            assert!(!permit(Phase::Init, other) && permit(Phase::Running, other));
        }
    }
}
