//! Actions, which may need the helper and run one after the other, and the handling of its replies.
//!
//! An action sends at most one request and is finished when the reply arrives; packets, handshakes and each
//! `get` are processed meanwhile. A `get` waits only while the link goes up or down. A `set` whose new port may be opened
//! only later is put off, and its port is requested again each second; only sets that open a port wait for it.

use super::{Action, Awaiting, Binding, Control, End, LINK, Listeners, Useless, port, status};
use crate::clock;
use crate::helper::{self, HelperMessage};
use crate::link::LinkMonitor;
use crate::log;
use crate::packets::tun::Tun;
use crate::packets::udp::{BoundSocket, UdpSockets};
use crate::uapi::ClientId;
use nix::libc;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use wgsep_ipc::{Notice, Reply, Request};
use wgsep_policy::{described, remedy};
use wgsep_proto::Configuration;
use wgsep_proto::invariant::present;

/// Messages of the helper that are received before other events are handled.
const MESSAGES_PER_ROUND: usize = 16;

impl Control {
    // ------------------------------------------------------------ actions, and the helper's answers

    /// Starts actions until one awaits the helper, or until a worker must first release the sockets that the
    /// previous action replaced, which still occupy their port. Each action takes one of `steps`. True if any
    /// was started.
    pub(super) fn run_actions(&mut self, steps: &mut usize) -> bool {
        let mut ran = false;
        while *steps > 0 && self.can_run_actions() {
            let Some(action) = present(self.actions.pop_front(), "an action can be started") else {
                break;
            };
            *steps -= 1;
            ran = true;
            match action {
                Action::Configure(client, configuration) => {
                    self.start_configure(client, configuration);
                }
                Action::ConfigureAgain => self.start_configure_again(),
                Action::Configured(client) => self.reply_set(client, 0),
                Action::LinkUp => self.start_link_up(),
                Action::OpenPort => self.start_open_port(),
                Action::ReopenPort(useless) => self.start_reopen_port(useless),
                Action::LinkDown => self.start_link_down(),
                Action::Get(client) => self.get(client),
                Action::HandOver(socket) => self.hand_over(&socket),
            }
        }
        ran
    }

    /// True if an action is queued and can be started.
    pub(super) fn can_run_actions(&self) -> bool {
        !self.actions.is_empty()
            && self.awaiting.is_none()
            && self.end.is_none()
            && self.retiring.strong_count() == 0
    }

    pub(super) fn request(&mut self, request: &Request, awaiting: Awaiting) {
        match self.helper.request(request) {
            Ok(()) => self.awaiting = Some(awaiting),
            Err(error) => self.cannot("ask", error),
        }
    }

    pub(super) fn cannot(&mut self, what: &str, error: wgsep_ipc::Error) {
        let advice = match error {
            wgsep_ipc::Error::Io(errno) => remedy(errno),
            _ => "start wgsep again",
        };
        tracing::error!("cannot {what} the helper: {error}; {advice}");
        self.end = Some(End::HelperLost);
    }

    /// Receives and handles messages of the helper; a limit leaves the rest to the next round.
    pub(super) fn receive_from_helper(&mut self) {
        for _ in 0..MESSAGES_PER_ROUND {
            match self.helper.receive() {
                Ok(None) => return,
                Ok(Some(HelperMessage::Reply(reply, descriptors))) => {
                    self.answered(&reply, descriptors);
                }
                Ok(Some(HelperMessage::Notice(Notice::LogLevel(level), _))) => {
                    log::set_level(level);
                }
                Ok(Some(HelperMessage::Notice(Notice::Shutdown, _))) => {
                    self.end = Some(End::Orderly);
                    return;
                }
                // Handled even if the vmclock page showed it before: only now has the kernel reseeded its
                // random number generator.
                Ok(Some(HelperMessage::Notice(Notice::NewGeneration, _))) => {
                    self.device.vm_notification(clock::now());
                }
                Ok(Some(HelperMessage::Notice(Notice::Ping, _))) => {
                    if let Err(error) = self.helper.pong() {
                        self.cannot("answer", error);
                        return;
                    }
                }
                // After what is under way, which may change sockets.
                Ok(Some(HelperMessage::Notice(Notice::HandOver, sockets))) => {
                    self.actions.extend(sockets.into_iter().map(Action::HandOver));
                }
                Ok(Some(HelperMessage::Closed)) => {
                    tracing::error!("the helper is gone, and so the interface; start wgsep again");
                    self.end = Some(End::HelperLost);
                    return;
                }
                Err(error) => {
                    tracing::error!(
                        "the helper broke the contract: {error}; install both programs from one build"
                    );
                    self.end = Some(End::HelperLost);
                    return;
                }
            }
        }
    }

    fn answered(&mut self, reply: &Reply, descriptors: Vec<OwnedFd>) {
        match self.awaiting.take() {
            Some(Awaiting::LockedDown) => self.granted(reply, descriptors),
            Some(Awaiting::Configure(client, configuration)) => {
                self.finish_configure(client, configuration, reply, descriptors);
            }
            Some(Awaiting::LinkUp) => self.finish_link_up(reply, descriptors),
            Some(Awaiting::LinkDown) | None => {}
        }
    }

    /// Takes the TUN device, the listeners and the netlink socket, which the helper sends once it has
    /// verified the sandbox.
    fn granted(&mut self, reply: &Reply, descriptors: Vec<OwnedFd>) {
        let mut descriptors = descriptors.into_iter();
        let (
            Reply::Granted {
                ifindex,
                netns,
                follows_moves,
                offload,
                tun_queues,
                status,
                psk,
                take_over,
            },
            Some(listener),
            Some(netlink),
            Some(writer),
        ) = (reply, descriptors.next(), descriptors.next(), descriptors.next())
        else {
            tracing::error!(
                "the helper refused to hand over the interface; see its line in the log"
            );
            self.end = Some(End::HelperLost);
            return;
        };
        let queues = descriptors.by_ref().take(usize::from(*tun_queues) - 1).collect();
        let status = status.then(|| descriptors.next()).flatten();
        let psk = psk.then(|| descriptors.next()).flatten();
        let shared = Arc::clone(&self.shared);
        let tun = shared.set_tun(Tun::new(writer, queues, *offload));
        if *take_over {
            let Some(state) = present(descriptors.next(), "the message has as many as it says")
            else {
                return;
            };
            if !self.take_over(&state) {
                return;
            }
        }
        // Packets that are read before the sockets of the other dataplane are there would be lost.
        let read = if self.awaits_sockets { Ok(()) } else { shared.read_tun(tun) };
        let watched = read.and_then(|()| self.probe.watch(tun));
        self.listeners = Some(Listeners { uapi: listener, status, psk });
        // Until the sockets are there, an answer about the port would be wrong.
        let listens = |()| if self.awaits_sockets { Ok(()) } else { self.listen() };
        let ready = watched.and_then(listens).and_then(|()| {
            let (location, now) = ((*netns, *ifindex), clock::instant());
            let link = LinkMonitor::new(netlink, location, *follows_moves, &self.interface, now);
            self.epoll.add(&link, EpollEvent::new(EpollFlags::EPOLLIN, LINK))?;
            self.link = Some(link);
            Ok(())
        });
        if let Err(error) = ready {
            tracing::error!("cannot serve the interface: {}; {}", described(error), remedy(error));
            self.end = Some(End::Failed);
        }
    }

    pub(super) fn bye(&mut self) {
        if self.end.is_none() {
            self.helper.bye();
            self.end = Some(End::Orderly);
        }
    }

    fn start_link_up(&mut self) {
        let request =
            Request::OpenUdp { port: self.device.listen_port(), mark: self.device.fwmark() };
        self.request(&request, Awaiting::LinkUp);
    }

    fn finish_link_up(&mut self, reply: &Reply, descriptors: Vec<OwnedFd>) {
        let taken = self.take_sockets(reply, descriptors);
        let occasion = if self.awaits_sockets { "tunnel taken over, " } else { "interface up, " };
        self.await_no_sockets();
        match taken {
            Ok(port) => {
                self.device.set_listen_port(port);
                self.device.set_up(true);
                self.port_opened(occasion);
                // A `get` that waited for this shows the first peers' handshakes.
                self.flush();
            }
            Err(errno) => self.port_refused(errno),
        }
    }

    /// Accepts clients from now on.
    fn listen(&mut self) -> nix::Result<()> {
        let Some(Listeners { uapi, status, psk }) = self.listeners.take() else { return Ok(()) };
        self.uapi.listen(uapi, &self.epoll)?;
        if let Some(status) = status {
            self.status.listen(status, &self.epoll)?;
        }
        if let Some(psk) = psk {
            self.psk.listen(psk, &self.epoll)?;
        }
        Ok(())
    }

    /// Begins to read the TUN device and to accept clients, for which the sockets of another dataplane were awaited.
    fn await_no_sockets(&mut self) {
        if !core::mem::take(&mut self.awaits_sockets) {
            return;
        }
        let read = self.shared.tun.get().map_or(Ok(()), |tun| self.shared.read_tun(tun));
        if let Err(error) = read.and_then(|()| self.listen()) {
            tracing::error!("cannot serve the interface: {}; {}", described(error), remedy(error));
            self.end = Some(End::Failed);
        }
    }

    /// Tries again to open a port that was refused, unless it is open by now or the interface is down.
    fn start_open_port(&mut self) {
        if self.lacks_port() {
            self.start_link_up();
        }
    }

    /// Replaces sockets that receive nothing any more.
    fn start_reopen_port(&mut self, useless: Useless) {
        if !self.link_state.up || self.lacks_port() {
            return;
        }
        match useless {
            Useless::Destroyed => tracing::error!(
                "another program had the kernel destroy the UDP sockets (as `ss -K` does); opening them again"
            ),
            Useless::OtherDevice => tracing::warn!(
                "the interface of --bind-device is gone, or another one has its name: {}; opening the UDP sockets again",
                self.bind_device
            ),
        }
        self.replace_sockets(UdpSockets::default());
        self.actions.push_front(Action::OpenPort);
        self.request(&Request::CloseUdp, Awaiting::LinkDown);
    }

    /// True if the interface is up without a UDP port.
    pub(super) fn lacks_port(&self) -> bool {
        self.link_state.up && self.open_families() == [false; 2]
    }

    /// Whether there is an IPv4 socket, and an IPv6 socket.
    pub(super) fn open_families(&self) -> [bool; 2] {
        status::open_families(&self.shared)
    }

    /// Schedules another try to open the UDP port, and logs the refusal.
    fn port_refused(&mut self, errno: i32) {
        let now = clock::instant();
        if errno == libc::EADDRINUSE && self.predecessor_ends.is_some_and(|limit| now < limit) {
            self.port_retry.is_being_closed(now);
            return;
        }
        let port = self.device.listen_port();
        let line = self.port_refusal(port, errno);
        let is_news = self.port_retry.refused(errno, now);
        if errno == port::TOO_EARLY {
            if is_news {
                let which = match port {
                    0 => "a UDP port".to_owned(),
                    port => format!("UDP port {port}"),
                };
                tracing::info!(
                    "interface up; {which} is opened later: of new ports, four are opened at once and then one in ten seconds"
                );
            }
        } else if is_news {
            tracing::error!("interface up, but {line}; trying again until it opens");
        } else {
            tracing::debug!("still {line}");
        }
    }

    fn port_opened(&mut self, occasion: &str) {
        let port = self.device.listen_port();
        let families = match self.open_families() {
            _ if !self.listens_everywhere => {
                ", on the addresses and the interface of --listen-address and --bind-device"
            }
            [true, true] => "",
            [_, false] => {
                ", IPv4 only: this machine opens no IPv6 socket; once it does, take the interface down and up"
            }
            [false, _] => {
                ", IPv6 only: this machine opens no IPv4 socket; once it does, take the interface down and up"
            }
        };
        let again = if self.port_retry.clear() { ", which was refused before" } else { "" };
        tracing::info!("{occasion}UDP port {port}{again}{families}");
    }

    fn start_link_down(&mut self) {
        self.device.set_up(false);
        self.port_retry.clear();
        // Without sockets they need no port, and take effect at once.
        while let Some((client, configuration)) = self.put_off.pop_last() {
            self.actions.push_front(Action::Configure(client, configuration));
        }
        self.replace_sockets(UdpSockets::default());
        self.shared.clear_handshakes();
        self.handshakes.clear();
        tracing::info!("interface down, UDP port closed");
        self.request(&Request::CloseUdp, Awaiting::LinkDown);
    }

    /// Takes over new sockets.
    ///
    /// # Errors
    /// The errno with which the helper refused them.
    fn take_sockets(&mut self, reply: &Reply, descriptors: Vec<OwnedFd>) -> Result<u16, i32> {
        let port = match reply {
            Reply::UdpOpened { port, .. } => *port,
            Reply::Refused { errno } => return Err(*errno),
            Reply::Granted { .. } | Reply::Done => return Err(libc::EPROTO),
        };
        let bound = |socket: OwnedFd| {
            let address = helper::bound_address(socket.as_fd(), port)?;
            Some(BoundSocket { socket, address })
        };
        let Some(bound) = descriptors.into_iter().map(bound).collect() else {
            tracing::error!(
                "the helper broke the contract: that is no UDP socket on port {port}; this is a bug, please report it"
            );
            self.end = Some(End::HelperLost);
            return Err(libc::EPROTO);
        };
        let route_sources = Arc::clone(self.source_check.route_sources());
        self.replace_sockets(UdpSockets::new(bound, Arc::clone(&self.gso), route_sources));
        Ok(port)
    }

    fn replace_sockets(&mut self, sockets: UdpSockets) {
        let addresses: Vec<_> = sockets.bound().iter().map(|one| one.address).collect();
        let binding = match (self.listens_everywhere, self.bind_device.is_empty()) {
            (true, _) => Binding::Everywhere,
            (false, true) => Binding::Addresses,
            (false, false) => Binding::Device,
        };
        self.source_check.bound(&addresses, binding, clock::instant());
        // Here, because the next change that is read may be that of the name.
        self.device_had_name =
            sockets.bound().first().is_some_and(|one| self.is_named_as_bound(&one.socket));
        self.retiring = self.shared.sockets.reader().value().until_closed();
        if let Err(errno) = self.shared.replace_sockets(sockets) {
            tracing::error!(
                "cannot watch the UDP sockets: {}; {}",
                described(errno),
                remedy(errno)
            );
            self.end = Some(End::Failed);
        }
    }

    /// Applies a `set`, or puts it off if it must open a port and others wait for theirs, so that the last one counts.
    fn start_configure(&mut self, client: ClientId, configuration: Box<Configuration>) {
        if !self.put_off.is_empty() && self.must_open(&configuration) {
            self.put_off.push((client, configuration));
        } else {
            self.apply_or_ask(client, configuration);
        }
    }

    /// Tries the first `set` again that was put off.
    fn start_configure_again(&mut self) {
        if let Some((client, configuration)) = self.put_off.pop() {
            self.apply_or_ask(client, configuration);
            if self.awaiting.is_none() {
                self.put_off.hasten(clock::instant());
            }
        }
    }

    /// True if a `set` takes effect only on a port that is not open.
    fn must_open(&self, configuration: &Configuration) -> bool {
        self.link_state.up
            && configuration
                .listen_port
                .is_some_and(|port| port != self.device.listen_port() || self.lacks_port())
    }

    /// Applies a `set`, after the helper has opened a new port or set a new mark if necessary.
    fn apply_or_ask(&mut self, client: ClientId, configuration: Box<Configuration>) {
        let (old_port, old_mark) = (self.device.listen_port(), self.device.fwmark());
        let mark = configuration.fwmark.unwrap_or(old_mark);
        let port = configuration.listen_port.unwrap_or(old_port);
        let must_open = self.must_open(&configuration);
        let is_asked_for = configuration.listen_port.is_some() && port != 0;
        if is_asked_for && !must_open && !self.ports.contains(&port) {
            // Nothing is opened now, so the helper would refuse it only when the link comes up.
            let pinned = self.ports.start() == self.ports.end();
            let errno = if pinned { libc::EPERM } else { libc::EACCES };
            self.refuse(client, errno, &self.port_refusal(port, errno));
        } else if must_open {
            self.request(
                &Request::OpenUdp { port, mark },
                Awaiting::Configure(client, configuration),
            );
        } else if mark != old_mark {
            self.request(&Request::SetMark { mark }, Awaiting::Configure(client, configuration));
        } else {
            self.apply(client, *configuration);
        }
    }

    fn finish_configure(
        &mut self,
        client: ClientId,
        mut configuration: Box<Configuration>,
        reply: &Reply,
        descriptors: Vec<OwnedFd>,
    ) {
        if *reply == Reply::TOO_EARLY {
            self.put_off.too_early((client, configuration), clock::instant());
            return;
        }
        self.put_off.hasten(clock::instant());
        match reply {
            Reply::Done => {
                // Another mark may select other routes.
                self.gso.forget_paths();
                self.apply(client, *configuration);
            }
            _ => match self.take_sockets(reply, descriptors) {
                Ok(port) => {
                    configuration.listen_port = Some(port);
                    self.configure(*configuration);
                    self.device.set_up(true);
                    self.actions.push_front(Action::Configured(client));
                    self.port_opened("");
                }
                Err(errno) => {
                    let line = self.configure_refusal(&configuration, errno);
                    self.refuse(client, errno, &line);
                }
            },
        }
    }

    /// The error line of a `set` that the helper refused: about the port if it had to be opened, or the mark.
    fn configure_refusal(&self, configuration: &Configuration, errno: i32) -> String {
        let needed_port = configuration
            .listen_port
            .filter(|port| *port != self.device.listen_port() || self.lacks_port());
        match (needed_port, configuration.fwmark) {
            (None, Some(mark)) => port::mark_refusal(mark, errno),
            (port, _) => {
                let port = port.unwrap_or(self.device.listen_port());
                self.port_refusal(port, errno)
            }
        }
    }

    fn port_refusal(&self, port: u16, errno: i32) -> String {
        port::refusal(port, errno, &self.interface, &self.ports)
    }

    fn refuse(&mut self, client: ClientId, errno: i32, line: &str) {
        self.refusals.write(clock::instant(), || {
            tracing::error!("UAPI set refused, nothing changed: {line}");
        });
        self.reply_set(client, -errno);
    }

    fn apply(&mut self, client: ClientId, configuration: Configuration) {
        self.configure(configuration);
        // The change may have removed the reason for which the port was refused.
        self.port_retry.hasten(clock::instant());
        self.reply_set(client, 0);
    }

    pub(super) fn configure(&mut self, configuration: Configuration) {
        self.uapi.complete_answers(&self.device);
        self.device.configure(configuration);
        self.status.configured(&self.device, &self.epoll);
        let Self { reporter, device, .. } = self;
        reporter.retain_peers(|peer| device.has_peer(peer));
    }

    fn reply_set(&mut self, client: ClientId, errno: i32) {
        let Self { uapi, epoll, .. } = self;
        uapi.reply_set(client, errno, epoll);
    }
}
