//! A dataplane that says anything at all to the helper's side of the contract, and knows what must
//! come of it.

use super::Input;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, getsockopt, sendmsg,
    socketpair, sockopt,
};
use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::IoSlice;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Once;
use std::time::Duration;
use wgsep_ipc::startup::Listen;
use wgsep_ipc::{
    Channel, FromHelper, MAX_FRAME, Notice, Received, Reply, Request, SandboxReport, TunOffload,
    VERSION, decode,
};
use wgsep_monitor::{Grants, Requests, Served, UdpOptions};

/// Requests in a row that each have another waiting behind them; the next is a flood.
const FLOOD: usize = 16;

/// New ports that are opened without a delay.
const NEW_PORTS: usize = 4;

/// What was sent and not yet looked at.
enum Sent {
    Request(u32, Request),
    /// Nothing that the contract knows.
    Nonsense,
    /// An empty frame, which is the end as the kernel shows it.
    End,
}

/// The dataplane's end, and what it knows.
pub(super) struct Dataplane {
    grants: Grants,
    /// `None` once closed.
    channel: Option<Channel>,
    sent: VecDeque<Sent>,
    /// Requests since one had none behind it.
    in_a_row: usize,
    is_granted: bool,
    /// It has said Bye.
    is_ending: bool,
    has_closed: bool,
    /// Whether the helper waits for a Pong.
    is_pinged: bool,
    /// Ports that were opened.
    ports: BTreeSet<u16>,
    sockets: Vec<OwnedFd>,
}

/// Enters a network namespace, so that UDP sockets on any port conflict with no other process.
fn enter_own_network() {
    thread_local! { static ENTERED: Once = const { Once::new() }; }
    // Without the privilege they are opened where we are; nothing is ever sent.
    ENTERED.with(|entered| {
        entered.call_once(|| {
            let _without = unshare(CloneFlags::CLONE_NEWNET);
        });
    });
}

fn some_grants(input: &mut Input<'_>) -> Grants {
    let kind = input.byte();
    Grants {
        port: (kind & 1 != 0).then(|| input.word().max(1)),
        mark: (kind & 2 != 0).then(|| (input.number(), input.number())),
        low_ports: kind & 4 != 0,
        first_unprivileged: None,
    }
}

fn some_options(input: &mut Input<'_>) -> UdpOptions {
    let kind = input.byte();
    let mut listen = Listen::default();
    if kind & 2 != 0 {
        listen.addresses[0] = Some([127, 0, 0, 1].into());
        listen.addresses[1] = (kind & 4 != 0).then_some([127, 0, 0, 2].into());
    }
    UdpOptions { listen, gro: kind & 1 == 0, large_buffers: false }
}

impl Dataplane {
    /// Both ends, with some grants.
    pub(super) fn start(input: &mut Input<'_>) -> (Self, Requests) {
        enter_own_network();
        let grants = some_grants(input);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
        let Ok((ours, theirs)) = pair else { panic!("socketpair: {pair:?}") };
        let [ours, theirs] = [ours, theirs].map(Channel::new);
        let (Ok(ours), Ok(theirs)) = (ours, theirs) else { panic!("not a channel") };
        let (sent, sockets) = (VecDeque::new(), Vec::new());
        let (channel, is_granted, has_closed, is_pinged) = (Some(ours), false, false, false);
        let dataplane = Self {
            grants,
            channel,
            sent,
            in_a_row: 0,
            is_granted,
            is_ending: false,
            has_closed,
            is_pinged,
            ports: BTreeSet::new(),
            sockets,
        };
        (dataplane, Requests::new(theirs, grants, some_options(input)))
    }

    /// Says something, sensible or not.
    pub(super) fn speak(&mut self, input: &mut Input<'_>) {
        let kind = input.byte();
        let request = match kind % 8 {
            _ if kind >= 0xc0 => Request::Pong,
            0 => Request::LockedDown(SandboxReport::default()),
            1 | 2 => Request::OpenUdp { port: input.word(), mark: input.number() },
            3 => Request::OpenUdp { port: 0, mark: u32::from(input.byte()) },
            4 => Request::SetMark { mark: input.number() },
            5 => Request::CloseUdp,
            6 => Request::Bye,
            _ => return self.say_anything(input),
        };
        let sequence = input.number();
        let Some(channel) = &self.channel else { return };
        if channel.send_request(sequence, &request).is_ok() {
            self.sent.push_back(Sent::Request(sequence, request));
        }
    }

    /// Sends any bytes, perhaps behind a true version, with any number of descriptors.
    fn say_anything(&mut self, input: &mut Input<'_>) {
        let Some(channel) = &self.channel else { return };
        let (len, kind) = (usize::from(input.word()) % (2 * MAX_FRAME), input.byte());
        let mut frame = input.bytes(len).to_vec();
        if let (Some(version), true) = (frame.first_mut(), kind & 0x80 == 0) {
            *version = VERSION;
        }
        let null = File::open("/dev/null").into_iter().next();
        let count = if kind & 0x40 == 0 { 0 } else { usize::from(kind % 0x40) };
        let descriptors: Vec<RawFd> =
            null.iter().map(AsRawFd::as_raw_fd).cycle().take(count).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let control = if descriptors.is_empty() { &[][..] } else { &rights };
        let (raw, flags) =
            (channel.as_fd().as_raw_fd(), MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
        if sendmsg::<UnixAddr>(raw, &[IoSlice::new(&frame)], control, flags, None).is_err() {
            return;
        }
        self.sent.push_back(match decode(&frame) {
            _ if !descriptors.is_empty() => Sent::Nonsense,
            Ok((sequence, request)) => Sent::Request(sequence, request),
            Err(_) if frame.is_empty() => Sent::End,
            Err(_) => Sent::Nonsense,
        });
    }

    /// Has the helper ask for a Pong, which it does once until there is one.
    ///
    /// # Panics
    /// If it asks before it has granted anything, again, or after the Bye.
    pub(super) fn ping(&mut self, requests: &mut Requests) {
        requests.ping();
        let Some(channel) = &self.channel else { return };
        let received = channel.receive_from_helper();
        if self.is_granted && !self.is_ending && !self.is_pinged {
            let ping = FromHelper::Notice(Notice::Ping);
            assert!(matches!(&received, Ok(Received::Message(said, _)) if *said == ping));
            self.is_pinged = true;
        } else {
            assert!(matches!(received, Ok(Received::Nothing)), "{received:?}");
        }
    }

    /// Ends the conversation.
    pub(super) fn close(&mut self) {
        self.channel = None;
        self.has_closed = true;
    }

    /// Checks how the helper served the next sent message; false if it ends the channel.
    ///
    /// # Panics
    /// If it is not what had to come of it.
    pub(super) fn check(&mut self, requests: &mut Requests, served: &Served) -> bool {
        let received = self.receive();
        let sent = self.sent.pop_front();
        let more = self.has_closed || !self.sent.is_empty();
        self.in_a_row = if more { self.in_a_row + 1 } else { 0 };
        match (sent, served) {
            (None, Served::Answered) => assert!(received.is_none() && !self.has_closed),
            (None | Some(Sent::End), Served::Closed)
            | (Some(Sent::Nonsense), Served::Violation(_)) => {
                assert!(received.is_none());
                return false;
            }
            (
                Some(Sent::Request(number, Request::LockedDown(sent_report))),
                Served::LockedDown(sequence, report),
            ) => {
                assert!(!self.is_granted && received.is_none());
                assert_eq!((number, sent_report), (*sequence, *report));
                self.grant(requests, number);
            }
            (Some(Sent::Request(_, request)), Served::Violation(_)) => {
                let is_early = !self.is_granted;
                let is_after_bye = self.is_ending && request != Request::Pong;
                let is_late = matches!(request, Request::LockedDown(_)) && self.is_granted;
                let is_unasked = request == Request::Pong && !self.is_pinged;
                assert!(
                    is_early || is_late || is_after_bye || is_unasked || self.in_a_row > FLOOD,
                    "{request:?}: {served:?}"
                );
                return false;
            }
            (Some(Sent::Request(_, Request::Pong)), Served::Alive) => {
                assert!(core::mem::take(&mut self.is_pinged) && received.is_none());
            }
            // The answer has no receiver any more.
            (Some(Sent::Request(..)), Served::Closed) => {
                assert!(self.has_closed);
                return false;
            }
            (Some(Sent::Request(number, request)), Served::Answered) => {
                assert!(self.is_granted, "{request:?} before the lock-down was verified");
                assert!(self.in_a_row <= FLOOD, "a flood was let through");
                let Some((sequence, reply)) = received else { panic!("{request:?}: no answer") };
                assert_eq!(sequence, number);
                self.is_ending |= request == Request::Bye;
                self.check_reply(request, reply);
            }
            (_, served) => panic!("{served:?}"),
        }
        true
    }

    /// Hands over what stands for the interface.
    fn grant(&mut self, requests: &mut Requests, sequence: u32) {
        let Ok(null) = File::open("/dev/null") else { panic!("no /dev/null") };
        let reply = Reply::Granted {
            ifindex: 1,
            netns: None,
            follows_moves: true,
            tun_queues: 1,
            offload: TunOffload::default(),
            status: false,
            psk: false,
            take_over: false,
        };
        let granted = requests.grant(sequence, &reply, &[null.as_fd(); 3]);
        assert!(granted.is_ok() || self.has_closed, "{granted:?}");
        assert!(self.has_closed || self.receive() == Some((sequence, reply)));
        self.sockets.clear();
        self.is_granted = true;
    }

    /// The next message, whose descriptors become ours; there is never more than one.
    fn receive(&mut self) -> Option<(u32, Reply)> {
        let received = self.channel.as_ref()?.receive_from_helper();
        let (sequence, reply) = match received {
            Ok(Received::Nothing) => return None,
            Ok(Received::Message(FromHelper::Reply { sequence, reply }, descriptors)) => {
                if !descriptors.is_empty() {
                    self.sockets = descriptors;
                }
                (sequence, reply)
            }
            other => panic!("{other:?}"),
        };
        let more = self.channel.as_ref()?.receive_from_helper();
        assert!(matches!(more, Ok(Received::Nothing)), "{more:?}");
        Some((sequence, reply))
    }

    /// The operator's word counts, whatever is asked for.
    fn check_reply(&mut self, request: Request, reply: Reply) {
        let refused = |errno: Errno| Reply::Refused { errno: errno as i32 };
        match (request, reply) {
            (Request::OpenUdp { mark, .. } | Request::SetMark { mark }, reply)
                if self.grants.permit_mark(mark).is_err() =>
            {
                assert_eq!(reply, refused(Errno::EPERM));
            }
            // No input takes as long as until the next.
            (Request::OpenUdp { port, .. }, Reply::TOO_EARLY) => {
                assert!(self.ports.len() >= NEW_PORTS && !self.ports.contains(&port));
            }
            (Request::OpenUdp { port, mark }, reply) => match self.grants.permit_port(port) {
                Err(errno) => assert_eq!(reply, refused(errno)),
                Ok(permitted) => self.check_opened(permitted, mark, reply),
            },
            (Request::SetMark { mark }, Reply::Done) => self.check_mark(mark),
            (Request::SetMark { .. }, Reply::Refused { .. })
            | (Request::CloseUdp | Request::Bye, Reply::Done) => {}
            other => panic!("{other:?}"),
        }
        if matches!(request, Request::CloseUdp) {
            self.sockets.clear();
        }
    }

    fn check_opened(&mut self, permitted: u16, mark: u32, reply: Reply) {
        let Reply::UdpOpened { port, sockets } = reply else {
            // A port in use, or no privilege to mark.
            assert!(matches!(reply, Reply::Refused { .. }), "{reply:?}");
            return;
        };
        assert!(port != 0 && (permitted == 0 || permitted == port));
        assert_eq!(self.sockets.len(), usize::from(sockets));
        self.ports.insert(port);
        assert!(self.ports.len() <= NEW_PORTS, "{:?}", self.ports);
        self.check_mark(mark);
        for socket in &self.sockets {
            let bound = socket.try_clone().map(UdpSocket::from).and_then(|one| one.local_addr());
            assert!(bound.is_ok_and(|bound| bound.port() == port));
        }
    }

    fn check_mark(&self, mark: u32) {
        for socket in &self.sockets {
            assert_eq!(getsockopt(socket, sockopt::Mark), Ok(mark));
        }
    }
}

/// The helper never has requests wait longer than until the next second.
///
/// # Panics
/// If it would.
pub(super) fn check_delay(requests: &mut Requests) {
    assert!(requests.back_pressure().is_none_or(|delay| delay <= Duration::from_secs(1)));
}
