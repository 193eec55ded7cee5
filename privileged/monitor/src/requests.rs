//! What the dataplane may ask for, and the answers.
//!
//! What may be asked depends on the phase; [`permit`] is the whole table. Anything else is a violation,
//! for which the helper kills the dataplane.

use crate::udp::{NOT_SILENCED, UdpOptions, UdpSockets};
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};
use wgsep_host::poll;
use wgsep_ipc::{Channel, Error, Notice, Received, Reply, Request, SandboxReport};
use wgsep_policy::{Grants, NewPorts, described, remedy};

const SECOND: Duration = Duration::from_secs(1);
/// Requests a second that are answered at once; more wait for the next second.
const REQUESTS_PER_SECOND: u32 = 100;
/// Requests that may follow each other without one having been waited for. The real dataplane has
/// one under way, and another when it says goodbye.
const PIPELINED_REQUESTS: u32 = 16;

/// The dataplane is killed, because it could continue to receive.
const NOT_SILENCED_LINE: &str = "cannot close UDP sockets: the kernel refused both to filter and to bind what a copy would receive; raise net.core.optmem_max where it is lower than this: sysctl net.core.optmem_max=131072; or take Linux 5.7 or later";

/// How far the dataplane has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Started, not verified.
    Init,
    /// Verified; has the interface.
    Running,
    /// Has said goodbye, and only ends.
    Ending,
}

/// What the dataplane reports once it is locked down: the number to answer to, and how each layer turned out.
pub(crate) type LockedDown = (u32, SandboxReport);

/// The table of what may be asked when. `LockedDown` comes once, because it ends its phase.
const fn permit(phase: Phase, request: &Request) -> bool {
    match request {
        Request::LockedDown(_) => matches!(phase, Phase::Init),
        Request::OpenUdp { .. } | Request::CloseUdp | Request::SetMark { .. } | Request::Bye => {
            matches!(phase, Phase::Running)
        }
        // A ping may cross with the goodbye.
        Request::Pong => matches!(phase, Phase::Running | Phase::Ending),
    }
}

/// The outcome of [`Requests::serve`].
#[derive(Debug, PartialEq, Eq)]
pub enum Served {
    /// It was answered, or there was none.
    Answered,
    /// The dataplane answered [`Requests::ping`].
    Alive,
    /// The number to answer to, and what the dataplane says of itself.
    LockedDown(u32, SandboxReport),
    /// The dataplane has closed the channel.
    Closed,
    /// The kernel refused what the contract needs, and not the dataplane to keep it.
    Failed(String),
    /// It broke the contract.
    Violation(String),
}

fn violation(what: impl Into<String>) -> Served {
    Served::Violation(what.into())
}

/// What the kernel refused, and no doing of the dataplane's.
fn failed(step: &str, errno: Errno) -> Served {
    Served::Failed(format!("{step}: {}; {}", described(errno), remedy(errno)))
}

/// The reply to a request that the kernel or the policy refused. EAGAIN, by a filter, would be taken for
/// [`Reply::TOO_EARLY`].
fn refused(errno: Errno) -> Reply {
    let errno = if errno == Errno::EAGAIN { Errno::ENOSYS } else { errno };
    Reply::Refused { errno: errno as i32 }
}

/// What came of sending a reply.
fn replied(sent: Result<(), Error>) -> Served {
    match sent {
        Ok(()) => Served::Answered,
        // It did not wait for the answer, as after Bye.
        Err(Error::Io(Errno::EPIPE | Errno::ECONNRESET)) => Served::Closed,
        Err(Error::Io(Errno::EAGAIN)) => violation("it does not read its replies"),
        Err(Error::Io(errno)) => failed("send a reply", errno),
        Err(error) => violation(error.to_string()),
    }
}

/// The helper's side of the contract.
pub struct Requests {
    pub(crate) channel: Channel,
    grants: Grants,
    /// Of UDP sockets.
    options: UdpOptions,
    phase: Phase,
    pub(crate) sockets: Option<UdpSockets>,
    pub(crate) new_ports: NewPorts,
    /// The port that was refused last, if nothing was opened or closed since.
    refused: Option<(u16, Errno)>,
    second: Instant,
    /// In this second.
    requests: u32,
    pipelined: u32,
    /// Whether a ping is not answered yet, or what is answered as a ping is.
    pub(crate) has_pinged: bool,
    pub(crate) said_bye: bool,
}

impl Requests {
    /// Those of a dataplane that was just started.
    #[must_use]
    pub fn new(channel: Channel, grants: Grants, options: UdpOptions) -> Self {
        Self {
            channel,
            grants,
            options,
            phase: Phase::Init,
            sockets: None,
            new_ports: NewPorts::default(),
            refused: None,
            second: Instant::now(),
            requests: 0,
            pipelined: 0,
            has_pinged: false,
            said_bye: false,
        }
    }

    /// The dataplane was verified: it gets what `reply` says with `descriptors`, and may ask.
    ///
    /// # Errors
    /// If it is gone.
    pub fn grant(
        &mut self,
        sequence: u32,
        reply: &Reply,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        self.phase = Phase::Running;
        self.has_pinged = matches!(reply, Reply::Granted { take_over: true, .. });
        self.channel.send_reply(sequence, reply, descriptors)
    }

    /// Says something unasked.
    ///
    /// # Errors
    /// If the dataplane is gone or does not listen.
    pub fn notice(&self, notice: &Notice) -> Result<(), Error> {
        self.channel.send_notice(notice)
    }

    /// Asks a dataplane that serves whether its control thread runs, unless it has not answered the last
    /// time yet.
    pub fn ping(&mut self) {
        if self.phase == Phase::Running && !self.has_pinged {
            self.has_pinged = self.channel.send_notice(&Notice::Ping).is_ok();
        }
    }

    /// How long to leave requests unread, if there were too many in this second.
    pub fn back_pressure(&mut self) -> Option<Duration> {
        let elapsed = self.second.elapsed();
        if elapsed >= SECOND {
            (self.second, self.requests) = (Instant::now(), 0);
        }
        (self.requests >= REQUESTS_PER_SECOND).then(|| SECOND.saturating_sub(elapsed))
    }

    /// Answers one request, if there is one.
    pub fn serve(&mut self) -> Served {
        let (sequence, request) = match self.channel.receive_request() {
            Ok(Received::Nothing) => return Served::Answered,
            Ok(Received::Closed) => return Served::Closed,
            Ok(Received::Message(message, _)) => message,
            Err(Error::Io(errno)) => {
                return failed("receive a request", errno);
            }
            Err(error) => return violation(error.to_string()),
        };
        if !permit(self.phase, &request) {
            return violation(format!("{} is not permitted now", request.name()));
        }
        self.requests += 1;
        if self.is_flooded() {
            return violation("a flood of requests");
        }
        let done = match request {
            Request::Pong if core::mem::take(&mut self.has_pinged) => return Served::Alive,
            Request::Pong => return violation("Pong without a ping"),
            Request::LockedDown(report) => return Served::LockedDown(sequence, report),
            Request::OpenUdp { port, mark } => {
                let opened = self.open_udp(port, mark);
                if opened != Ok(Reply::TOO_EARLY) {
                    self.refused = opened.as_ref().err().map(|errno| (port, *errno));
                }
                opened
            }
            Request::SetMark { mark } => self.set_mark(mark),
            Request::CloseUdp => {
                self.refused = None;
                let closed = self.sockets.take().map_or(Ok(()), UdpSockets::give_up);
                closed.map(|()| Reply::Done)
            }
            Request::Bye => {
                (self.said_bye, self.phase) = (true, Phase::Ending);
                Ok(Reply::Done)
            }
        };
        if done == Err(NOT_SILENCED) {
            return Served::Failed(NOT_SILENCED_LINE.to_owned());
        }
        self.answer(sequence, done.unwrap_or_else(refused))
    }

    /// Whether requests go on coming before those that precede them are answered.
    fn is_flooded(&mut self) -> bool {
        let waits = poll([self.as_fd()], Duration::ZERO).is_ok_and(|[waits]| waits);
        self.pipelined = if waits { self.pipelined + 1 } else { 0 };
        self.pipelined > PIPELINED_REQUESTS
    }

    fn open_udp(&mut self, port: u16, mark: u32) -> Result<Reply, Errno> {
        self.grants.permit_mark(mark)?;
        let port = self.grants.permit_port(port)?;
        if self.new_ports.is_too_early(port, Instant::now()) {
            return Ok(Reply::TOO_EARLY);
        }
        let opened = UdpSockets::ensure(&mut self.sockets, port, mark, self.options)?;
        self.new_ports.opened(opened.port, Instant::now());
        Ok(Reply::UdpOpened { port: opened.port, sockets: opened.sockets.len() as u8 })
    }

    fn set_mark(&mut self, mark: u32) -> Result<Reply, Errno> {
        self.grants.permit_mark(mark)?;
        self.sockets.as_mut().map_or(Ok(()), |sockets| sockets.set_mark(mark))?;
        Ok(Reply::Done)
    }

    fn answer(&self, sequence: u32, reply: Reply) -> Served {
        let opened = self.sockets.as_ref().filter(|_| matches!(reply, Reply::UdpOpened { .. }));
        let descriptors: Vec<_> = opened.into_iter().flat_map(UdpSockets::descriptors).collect();
        replied(self.channel.send_reply(sequence, &reply, &descriptors))
    }

    /// True if the UDP sockets are open and receive datagrams one by one.
    #[must_use]
    pub fn lack_gro(&self) -> bool {
        self.sockets.as_ref().is_some_and(|sockets| !sockets.joins)
    }

    /// The UDP port that the interface lacks, and why it could not be opened.
    #[must_use]
    pub fn lacking_port(&self) -> Option<(u16, Errno)> {
        self.refused.filter(|_| self.sockets.is_none())
    }

    /// True if a dataplane that is gone has said goodbye, which may have crossed with its end. One that
    /// could not be killed may go on sending, so no more is read than may be under way.
    pub fn said_bye(&mut self) -> bool {
        for _ in 0..=PIPELINED_REQUESTS {
            let Ok(Received::Message((_, request), _)) = self.channel.receive_request() else {
                break;
            };
            self.said_bye |= request == Request::Bye;
        }
        self.said_bye
    }
}

impl AsFd for Requests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use wgsep_ipc::{FromHelper, REPORT_LAYERS};

    #[test]
    fn only_locked_down_is_permitted_before_and_everything_else_after() {
        let locked_down = Request::LockedDown([[0; 3]; REPORT_LAYERS]);
        let others = [
            Request::OpenUdp { port: 1, mark: 0 },
            Request::CloseUdp,
            Request::SetMark { mark: 0 },
            Request::Bye,
            Request::Pong,
        ];
        assert!(permit(Phase::Init, &locked_down) && !permit(Phase::Running, &locked_down));
        for other in &others {
            assert!(!permit(Phase::Init, other) && permit(Phase::Running, other));
        }
    }

    #[test]
    fn a_reply_that_the_host_lacks_memory_or_descriptors_for_is_no_breach() {
        for errno in [Errno::ENOBUFS, Errno::ENOMEM, Errno::ETOOMANYREFS] {
            let Served::Failed(line) = replied(Err(Error::Io(errno))) else { panic!("{errno}") };
            assert!(line.contains(remedy(errno)), "{line}");
        }
        let unread = replied(Err(Error::Io(Errno::EAGAIN)));
        assert_eq!(unread, violation("it does not read its replies"));
    }

    fn pair() -> (Requests, Channel) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, its) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let requests =
            Requests::new(Channel::new(ours).unwrap(), Grants::default(), UdpOptions::default());
        (requests, Channel::new(its).unwrap())
    }

    #[test]
    fn a_fifth_new_port_is_put_off_and_everything_else_is_answered() {
        let (mut requests, dataplane) = pair();
        requests.phase = Phase::Running;
        let (any, mut sequence) = (Request::OpenUdp { port: 0, mark: 0 }, 0);
        let mut answer = |requests: &mut Requests, request| {
            sequence += 1;
            dataplane.send_request(sequence, &request).unwrap();
            assert_eq!((requests.back_pressure(), requests.serve()), (None, Served::Answered));
            match dataplane.receive_from_helper().unwrap() {
                Received::Message(FromHelper::Reply { sequence: to, reply }, sockets) => {
                    assert_eq!((to, sockets.len()), (sequence, reply.descriptors()));
                    reply
                }
                other => panic!("{other:?}"),
            }
        };
        let port = |reply| match reply {
            Reply::UdpOpened { port, .. } => port,
            other => panic!("{other:?}"),
        };
        let opened: Vec<_> = (0..4).map(|_| port(answer(&mut requests, any))).collect();
        let [low_port, another_mark] =
            [Errno::EACCES, Errno::EPERM].map(|errno| Reply::Refused { errno: errno as i32 });
        requests.grants.mark = Some((0, 2));
        for _ in 0..3 {
            assert_eq!(answer(&mut requests, any), Reply::TOO_EARLY);
            assert_eq!(requests.lacking_port(), None, "it is not refused");
            assert_eq!(answer(&mut requests, Request::SetMark { mark: 0 }), Reply::Done);
            // One that it had, and what the policy forbids.
            let again = Request::OpenUdp { port: opened[0], mark: 0 };
            assert_eq!(port(answer(&mut requests, again)), opened[0]);
            assert_eq!(answer(&mut requests, Request::OpenUdp { port: 1, mark: 0 }), low_port);
            let marked = Request::OpenUdp { port: 0, mark: 2 };
            assert_eq!(answer(&mut requests, marked), another_mark);
            assert_eq!(answer(&mut requests, Request::CloseUdp), Reply::Done);
        }
        requests.new_ports = NewPorts::default();
        assert!(!opened.contains(&port(answer(&mut requests, any))));
    }

    #[test]
    fn asking_for_a_port_that_is_put_off_again_and_again_is_slowed_down() {
        let (mut requests, dataplane) = pair();
        requests.phase = Phase::Running;
        let until = Instant::now() + Duration::from_secs(60);
        (2001..=2004).for_each(|port| requests.new_ports.opened(port, until));
        for sequence in 0..REQUESTS_PER_SECOND {
            assert_eq!(requests.back_pressure(), None, "{sequence}");
            dataplane.send_request(sequence, &Request::OpenUdp { port: 0, mark: 0 }).unwrap();
            assert_eq!(requests.serve(), Served::Answered);
            let Received::Message(FromHelper::Reply { reply, .. }, _) =
                dataplane.receive_from_helper().unwrap()
            else {
                panic!("no answer")
            };
            assert_eq!(reply, Reply::TOO_EARLY);
        }
        assert!(requests.back_pressure().is_some());
    }

    #[test]
    fn no_refusal_of_the_kernel_looks_like_a_port_that_is_put_off() {
        assert_ne!(refused(Errno::EAGAIN), Reply::TOO_EARLY);
        assert_eq!(refused(Errno::EPERM), Reply::Refused { errno: Errno::EPERM as i32 });
    }

    #[test]
    fn a_dataplane_that_keeps_sending_does_not_keep_the_helper_from_its_end() {
        let (mut requests, dataplane) = pair();
        for _ in 0..2 * PIPELINED_REQUESTS {
            dataplane.send_request(1, &Request::CloseUdp).unwrap();
        }
        assert!(!requests.said_bye());
        let waits = || poll([requests.as_fd()], Duration::ZERO).unwrap() == [true];
        assert!(waits(), "all was read");
        while let Ok(Received::Message(..)) = requests.channel.receive_request() {}
        dataplane.send_request(1, &Request::CloseUdp).unwrap();
        dataplane.send_request(2, &Request::Bye).unwrap();
        assert!(requests.said_bye());
    }
}
