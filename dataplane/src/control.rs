//! The control thread: everything that is not a packet.
//!
//! It alone owns the [`Device`]. It waits for UAPI clients, the helper, the interface's state, the
//! earliest timer and the workers' notes, and after each round lets out what that caused. What needs
//! the helper is a job; jobs run one after the other, and nothing else ever waits for them.

use crate::clock;
use crate::helper::{Helper, Said};
use crate::link::{LinkMonitor, LinkState};
use crate::log;
use crate::random::KernelRandom;
use crate::shared::Shared;
use crate::start::Arguments;
use crate::tun::Tun;
use crate::uapi::{ClientId, Operation, Server};
use crate::udp::UdpSockets;
use nix::libc;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use wgsep_ipc::{LogLevel, Notice, Reply, Request};
use wgsep_proto::config::Configuration;
use wgsep_proto::device::{Device, Event};
use wgsep_proto::time::Instant;

/// What an epoll event is about; UAPI descriptors come after.
const WORKERS: u64 = 0;
const TIMER: u64 = 1;
const HELPER: u64 = 2;
const LINK: u64 = 3;
const FIRST_UAPI: u64 = 16;

/// Handshake messages consumed before the other events get their turn: about 10 ms of work.
const HANDSHAKES_PER_ROUND: usize = 64;

/// Why the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Asked for: the helper said so, or the interface was deleted.
    Orderly,
    /// The helper is gone or broke the contract.
    HelperLost,
    /// The kernel refused something without which nothing goes on.
    Failed,
}

/// Something that may need the helper.
enum Job {
    Configure(ClientId, Configuration),
    LinkUp,
    LinkDown,
}

/// What happens when the helper has answered.
enum Awaiting {
    Sealed,
    /// A `set` that opened a port or moved the mark; it takes effect only now.
    Configure(ClientId, Configuration),
    LinkUp,
    LinkDown,
}

/// The control thread's state.
pub(crate) struct Control {
    shared: Arc<Shared>,
    device: Device,
    epoll: Epoll,
    timer: TimerFd,
    armed: Option<Instant>,
    helper: Helper,
    uapi: Server,
    interface: String,
    link: Option<LinkMonitor>,
    link_state: LinkState,
    jobs: VecDeque<Job>,
    awaiting: Option<Awaiting>,
    end: Option<End>,
}

impl Control {
    /// A device with nothing configured but port and mark, and everything it waits on.
    ///
    /// # Errors
    /// If the kernel refuses an epoll instance, a timer or an eventfd.
    pub(crate) fn new(helper: Helper, settings: Arguments) -> nix::Result<Self> {
        let mut device = Device::new(Box::new(KernelRandom));
        let initial = Configuration {
            listen_port: Some(settings.listen_port),
            fwmark: Some(settings.fwmark),
            ..Configuration::default()
        };
        device.configure(initial, clock::now());
        let shared = Arc::new(Shared::new(Arc::clone(device.data_path()), settings.workers)?);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer = TimerFd::new(
            ClockId::CLOCK_BOOTTIME,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        epoll.add(&shared.control, EpollEvent::new(EpollFlags::EPOLLIN, WORKERS))?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        epoll.add(&helper, EpollEvent::new(EpollFlags::EPOLLIN, HELPER))?;
        Ok(Self {
            shared,
            device,
            epoll,
            timer,
            armed: None,
            helper,
            uapi: Server::new(FIRST_UAPI),
            interface: settings.interface,
            link: None,
            link_state: LinkState::default(),
            jobs: VecDeque::new(),
            awaiting: None,
            end: None,
        })
    }

    /// What the workers are given.
    pub(crate) const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Tells the helper that the process is sealed, and serves until the end.
    pub(crate) fn run(mut self, report: wgsep_ipc::SealReport) -> End {
        self.request(&Request::Sealed(report), Awaiting::Sealed);
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let more = self.consume_handshakes();
            if let Some(end) = self.end {
                return end;
            }
            let timeout = if more { EpollTimeout::ZERO } else { EpollTimeout::NONE };
            let ready = match self.epoll.wait(&mut events, timeout) {
                Ok(ready) => ready,
                Err(nix::Error::EINTR) => 0,
                Err(error) => {
                    tracing::error!("epoll_wait: {error}");
                    return End::Failed;
                }
            };
            for event in events.get(..ready).unwrap_or_default() {
                self.dispatch(event);
            }
            self.take_operations();
            while self.run_jobs() {
                self.take_operations();
            }
            self.settle();
        }
    }

    fn dispatch(&mut self, event: &EpollEvent) {
        match event.data() {
            WORKERS => {
                let _count = self.shared.control.read();
                if self.shared.is_device_gone() {
                    tracing::info!("the interface was deleted");
                    self.bye();
                }
            }
            TIMER => {
                let _expirations = self.timer.wait();
                self.armed = None;
            }
            HELPER => self.helper_spoke(),
            LINK => self.link_spoke(),
            _ => self.uapi.handle(event, &self.epoll),
        }
    }

    // ------------------------------------------------------------ the protocol

    /// Consumes handshake messages the workers queued; true if more are left.
    fn consume_handshakes(&mut self) -> bool {
        for _ in 0..HANDSHAKES_PER_ROUND {
            let Some((message, waiting)) = self.shared.next_handshake() else { return false };
            self.device.receive_handshake(
                message.endpoint,
                message.datagram(),
                waiting,
                clock::now(),
            );
            self.transmit();
        }
        self.settle();
        true
    }

    /// Lets out what this round caused.
    fn settle(&mut self) {
        let now = clock::now();
        self.device.handle_attention(now);
        self.device.handle_timeout(now);
        self.transmit();
        let device = &mut self.device;
        self.shared.request_flushes(std::iter::from_fn(|| device.poll_flush()));
        while let Some(event) = self.device.poll_event() {
            report(event);
        }
        self.arm_timer();
    }

    /// Sends handshake messages; one that the network refuses is as lost as one it drops.
    fn transmit(&mut self) {
        let sockets = self.shared.sockets.reader();
        while let Some(transmit) = self.device.poll_transmit() {
            let class = transmit.traffic_class;
            let sent =
                sockets.value().send_once(&transmit.endpoint, class, &transmit.datagram, None);
            if let Err(error) = sent {
                tracing::debug!("handshake message to {}: {error}", transmit.endpoint.destination);
            }
        }
    }

    fn arm_timer(&mut self) {
        let due = self.device.next_timeout();
        if due == self.armed {
            return;
        }
        self.armed = due;
        let set = match due {
            Some(at) => {
                // An absolute time of 0 would disarm the timer.
                let nanoseconds = i64::try_from(at.as_nanos()).unwrap_or(i64::MAX).max(1);
                self.timer.set(
                    Expiration::OneShot(TimeSpec::nanoseconds(nanoseconds)),
                    TimerSetTimeFlags::TFD_TIMER_ABSTIME,
                )
            }
            None => self.timer.unset(),
        };
        if let Err(error) = set {
            tracing::error!("timerfd_settime: {error}");
            self.end = Some(End::Failed);
        }
    }

    // ------------------------------------------------------------ jobs, and the helper's answers

    /// Starts jobs until one has to wait for the helper; true if there were any.
    fn run_jobs(&mut self) -> bool {
        let mut ran = false;
        while self.awaiting.is_none() && self.end.is_none() {
            let Some(job) = self.jobs.pop_front() else { break };
            ran = true;
            match job {
                Job::Configure(client, configuration) => {
                    self.start_configure(client, configuration)
                }
                Job::LinkUp => self.start_link_up(),
                Job::LinkDown => self.start_link_down(),
            }
        }
        ran
    }

    fn request(&mut self, request: &Request, awaiting: Awaiting) {
        match self.helper.request(request) {
            Ok(()) => self.awaiting = Some(awaiting),
            Err(error) => {
                tracing::error!("cannot ask the helper: {error}");
                self.end = Some(End::HelperLost);
            }
        }
    }

    fn helper_spoke(&mut self) {
        loop {
            match self.helper.receive() {
                Ok(None) => return,
                Ok(Some(Said::Reply(reply, descriptors))) => self.answered(&reply, descriptors),
                Ok(Some(Said::Notice(Notice::LogLevel(level)))) => {
                    log::set_verbosity(verbosity(level))
                }
                Ok(Some(Said::Notice(Notice::Shutdown))) => {
                    self.end = Some(End::Orderly);
                    return;
                }
                Ok(Some(Said::Closed)) => {
                    tracing::error!("the helper is gone");
                    self.end = Some(End::HelperLost);
                    return;
                }
                Err(error) => {
                    tracing::error!("the helper broke the contract: {error}");
                    self.end = Some(End::HelperLost);
                    return;
                }
            }
        }
    }

    fn answered(&mut self, reply: &Reply, descriptors: Vec<OwnedFd>) {
        match self.awaiting.take() {
            Some(Awaiting::Sealed) => self.granted(reply, descriptors),
            Some(Awaiting::Configure(client, configuration)) => {
                self.finish_configure(client, configuration, reply, descriptors);
            }
            Some(Awaiting::LinkUp) => self.finish_link_up(reply, descriptors),
            Some(Awaiting::LinkDown) | None => {}
        }
    }

    /// The helper has verified the sandbox: here are the TUN device, the UAPI and the link monitor.
    fn granted(&mut self, reply: &Reply, descriptors: Vec<OwnedFd>) {
        let mut descriptors = descriptors.into_iter();
        let (Reply::Granted { ifindex, vnet_hdr, .. }, Some(listener), Some(netlink)) =
            (reply, descriptors.next(), descriptors.next())
        else {
            tracing::error!("the helper refused to hand over the interface");
            self.end = Some(End::HelperLost);
            return;
        };
        self.shared.set_tuns(descriptors.map(|queue| Tun::new(queue, *vnet_hdr)).collect());
        self.shared.wake_workers();
        let ready = self.uapi.listen(listener, &self.epoll).and_then(|()| {
            let link = LinkMonitor::new(netlink, *ifindex, &self.interface)?;
            self.epoll.add(&link, EpollEvent::new(EpollFlags::EPOLLIN, LINK))?;
            self.link = Some(link);
            Ok(())
        });
        if let Err(error) = ready {
            tracing::error!("cannot serve the interface: {error}");
            self.end = Some(End::Failed);
        }
    }

    fn bye(&mut self) {
        if self.end.is_none() {
            let _gone = self.helper.request(&Request::Bye);
            self.end = Some(End::Orderly);
        }
    }

    // ------------------------------------------------------------ the interface

    fn link_spoke(&mut self) {
        let Some(link) = &mut self.link else { return };
        let changes = link.read();
        if changes.routes {
            self.device.clear_sources();
        }
        let Some(state) = changes.link else { return };
        if state.mtu != self.link_state.mtu {
            self.device.data_path().set_mtu(state.mtu);
            tracing::debug!("MTU is {}", state.mtu);
        }
        if state.up != self.link_state.up {
            self.jobs.push_back(if state.up { Job::LinkUp } else { Job::LinkDown });
        }
        self.link_state = state;
    }

    fn start_link_up(&mut self) {
        let request =
            Request::OpenUdp { port: self.device.listen_port(), mark: self.device.fwmark() };
        self.request(&request, Awaiting::LinkUp);
    }

    fn finish_link_up(&mut self, reply: &Reply, descriptors: Vec<OwnedFd>) {
        match self.take_sockets(reply, descriptors) {
            Ok(port) => {
                self.device.set_listen_port(port);
                self.device.set_up(true, clock::now());
                tracing::info!("interface up, UDP port {port}");
            }
            Err(errno) => tracing::error!(
                "interface up, but UDP port {} cannot be opened: {}; choose another: wg set {} listen-port PORT",
                self.device.listen_port(),
                nix::Error::from_raw(errno).desc(),
                self.interface,
            ),
        }
    }

    fn start_link_down(&mut self) {
        self.device.set_up(false, clock::now());
        self.publish_sockets(UdpSockets::default());
        self.shared.clear_handshakes();
        tracing::info!("interface down, UDP port closed");
        self.request(&Request::CloseUdp, Awaiting::LinkDown);
    }

    /// Takes over new sockets; or the errno that there are none.
    fn take_sockets(&mut self, reply: &Reply, descriptors: Vec<OwnedFd>) -> Result<u16, i32> {
        let (port, v4, v6) = match reply {
            Reply::UdpOpened { port, v4, v6 } => (*port, *v4, *v6),
            Reply::Refused { errno } => return Err(*errno),
            Reply::Granted { .. } | Reply::Done => return Err(libc::EPROTO),
        };
        let mut descriptors = descriptors.into_iter();
        let v4 = v4.then(|| descriptors.next()).flatten();
        let v6 = v6.then(|| descriptors.next()).flatten();
        self.publish_sockets(UdpSockets::new(v4, v6));
        Ok(port)
    }

    fn publish_sockets(&self, sockets: UdpSockets) {
        self.shared.sockets.publish(Arc::new(sockets));
        self.shared.wake_workers();
    }

    // ------------------------------------------------------------ UAPI

    /// Takes every transaction that is whole by now.
    fn take_operations(&mut self) {
        loop {
            let Self { uapi, link, epoll, .. } = self;
            let Some((client, operation)) = uapi.next_operation(&Scopes(link.as_ref()), epoll)
            else {
                return;
            };
            match operation {
                Operation::Get => self.get(client),
                Operation::Set(configuration) => {
                    self.jobs.push_back(Job::Configure(client, configuration));
                }
            }
        }
    }

    fn get(&mut self, client: ClientId) {
        let Self { uapi, device, epoll, link, .. } = self;
        uapi.reply_get(client, &device.status(), device.peers(), &Scopes(link.as_ref()), epoll);
    }

    /// Applies a `set`, after the helper has opened the new port or moved the mark if it has to.
    fn start_configure(&mut self, client: ClientId, configuration: Configuration) {
        let (old_port, old_mark) = (self.device.listen_port(), self.device.fwmark());
        let mark = configuration.fwmark.unwrap_or(old_mark);
        let port = configuration.listen_port.unwrap_or(old_port);
        let must_open = self.link_state.up
            && (port != old_port || (configuration.listen_port.is_some() && !self.device.is_up()));
        if must_open {
            self.request(
                &Request::OpenUdp { port, mark },
                Awaiting::Configure(client, configuration),
            );
        } else if mark != old_mark {
            self.request(&Request::SetMark { mark }, Awaiting::Configure(client, configuration));
        } else {
            self.apply(client, configuration);
        }
    }

    fn finish_configure(
        &mut self,
        client: ClientId,
        mut configuration: Configuration,
        reply: &Reply,
        descriptors: Vec<OwnedFd>,
    ) {
        match reply {
            Reply::Done => self.apply(client, configuration),
            _ => match self.take_sockets(reply, descriptors) {
                Ok(port) => {
                    configuration.listen_port = Some(port);
                    self.apply(client, configuration);
                    self.device.set_up(true, clock::now());
                    tracing::info!("UDP port {port}");
                }
                Err(errno) => {
                    tracing::warn!(
                        "UAPI set refused, nothing changed: {}",
                        nix::Error::from_raw(errno).desc()
                    );
                    self.reply_set(client, -errno);
                }
            },
        }
    }

    fn apply(&mut self, client: ClientId, configuration: Configuration) {
        self.device.configure(configuration, clock::now());
        self.reply_set(client, 0);
    }

    fn reply_set(&mut self, client: ClientId, errno: i32) {
        let Self { uapi, epoll, .. } = self;
        uapi.reply_set(client, errno, epoll);
    }
}

/// Interface names, as the link monitor knows them.
struct Scopes<'a>(Option<&'a LinkMonitor>);

impl crate::uapi::Scopes for Scopes<'_> {
    fn index_of(&self, name: &str) -> Option<u32> {
        self.0.and_then(|link| link.index_of(name))
    }

    fn name_of(&self, index: u32) -> Option<String> {
        self.0.and_then(|link| link.name_of(index))
    }
}

const fn verbosity(level: LogLevel) -> u8 {
    match level {
        LogLevel::Silent => 0,
        LogLevel::Error => 1,
        LogLevel::Info => 3,
        LogLevel::Debug => 4,
    }
}

/// Writes an event that an operator acts on.
fn report(event: Event) {
    match event {
        Event::HandshakeComplete(peer) => tracing::debug!("{peer}: handshake complete"),
        Event::HandshakeGivenUp(peer) => tracing::info!(
            "{peer}: no answer to 20 initiations in 90 s; check its endpoint, the route there and both public keys"
        ),
        Event::InitiationReplayed(peer) => tracing::info!(
            "{peer}: initiation with an old timestamp ignored: a replay, or its clock went back"
        ),
        Event::UnknownPeer(from) => {
            tracing::debug!("initiation from {from} by a key that is no peer's")
        }
        Event::ResponseRefused(peer) => {
            tracing::info!(
                "{peer}: response does not fit; check that both sides have the same preshared key"
            );
        }
        Event::EndpointMoved(peer, to) => tracing::info!("{peer}: endpoint is now {to}"),
        Event::UnderLoad => tracing::info!("under load: handshakes need a cookie from now on"),
    }
}
