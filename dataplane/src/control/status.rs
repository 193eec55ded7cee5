//! What is reported on the status socket: counters, peers, and events while anybody watches.
//!
//! What crosses from here to `wgsep_status` is public: a `PeerReport` of the protocol, in which there is no place for
//! a secret. It is formatted in ordinary memory.
//!
//! Nothing is recorded for events while no client watches. An endpoint that moves with a data packet, and what offloads are
//! in use, is looked at every few seconds, so that no packet pays for it.

use super::{Control, port::PortRetry, sources::SourceCheck};
use crate::clock;
use crate::line_limit::LineLimit;
use crate::packets::gso::Gso;
use crate::uapi;
use crate::workers::shared::Shared;
use nix::sys::epoll::{Epoll, EpollEvent};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;
use wgsep_proto::device::control_plane::{ControlPlane, PeerReport, ReportItem, StatusCursor};
use wgsep_proto::secret::in_ordinary_memory;
use wgsep_proto::session::handshakes::HandshakeFailure;
use wgsep_proto::{DropCause, Event, Instant, Now, PublicKey};
use wgsep_status::{self as status, Counters, Item, Presence, Source, Udp};

/// How often endpoints and offloads are looked at while anybody watches.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(5);

/// A point on the boot clock, as the status socket has it.
fn since_boot(at: Instant) -> Duration {
    at.since(Instant::default())
}

/// The status socket, and what is remembered for those who watch.
pub(super) struct Status {
    server: status::Server<StatusCursor>,
    presence: Presence,
    /// The endpoint of each peer, and the offloads in use, when they were last looked at.
    endpoints: HashMap<PublicKey, SocketAddr>,
    offloads: Vec<(&'static str, bool)>,
    sample_due: Instant,
    /// Of events that senders who are no peers can cause at will.
    unknown_senders: LineLimit,
}

/// What is reported, at one time.
pub(super) struct Reported<'a> {
    device: &'a ControlPlane,
    shared: &'a Shared,
    gso: &'a Gso,
    port_retry: &'a PortRetry,
    source_check: &'a SourceCheck,
    now: Instant,
}

impl Source<StatusCursor> for Reported<'_> {
    fn counters(&self) -> Counters {
        let (udp_gso, peers_without_gso) = self.gso.in_use(self.device.shared_peers(), self.now);
        let [ipv4, ipv6] = open_families(self.shared);
        let offloads = self.shared.offloads(udp_gso, self.now);
        Counters {
            drops: self.shared.drops().counts().collect(),
            udp: Udp {
                port: self.device.listen_port(),
                ipv4,
                ipv6,
                errno: self.port_retry.errno(),
                missing: self.source_check.missing().collect(),
            },
            offloads: offloads.map(|(offload, in_use)| (offload.name(), in_use)).into(),
            peers_without_gso,
        }
    }

    fn next(&self, position: &mut StatusCursor) -> Option<Item> {
        Some(match self.device.next_report(position, self.now)? {
            ReportItem::Peer(report) => Item::Peer(Box::new(peer(&report))),
            ReportItem::AllowedIp(allowed_ip) => {
                Item::AllowedIp(allowed_ip.address(), allowed_ip.cidr())
            }
        })
    }

    fn accept(&self, listener: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
        uapi::accept(listener)
    }
}

/// Whether there is an IPv4 socket, and an IPv6 socket.
pub(super) fn open_families(shared: &Shared) -> [bool; 2] {
    shared.sockets.reader().value().families()
}

fn peer(report: &PeerReport) -> status::Peer {
    let failures = report.handshakes.failures().map(|(failure, count)| (failure.name(), count));
    status::Peer {
        public_key: *report.public_key.as_bytes(),
        endpoint: report.endpoint,
        state: report.state.name(),
        last_handshake: report.last_handshake,
        rx_bytes: report.rx_bytes,
        tx_bytes: report.tx_bytes,
        rx_packets: report.rx_packets,
        tx_packets: report.tx_packets,
        persistent_keepalive_interval: report.persistent_keepalive_interval,
        initiations: report.handshakes.initiations,
        responses: report.handshakes.responses,
        completed: report.handshakes.completed,
        failures: failures.collect(),
        round_trip: report.round_trip,
    }
}

impl Status {
    /// With the tokens of epoll that begin with this one, for so many clients.
    pub(super) fn new(first_token: u64, max_clients: usize) -> Self {
        Self {
            server: status::Server::new(first_token, max_clients),
            presence: Presence::new(),
            endpoints: HashMap::new(),
            offloads: Vec::new(),
            sample_due: Instant::from_nanos(0),
            unknown_senders: LineLimit::new(),
        }
    }

    /// Starts accepting clients.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(super) fn listen(&mut self, listener: OwnedFd, epoll: &Epoll) -> nix::Result<()> {
        self.server.listen(listener, epoll)
    }

    /// When [`Control::handle_status_timeout`] is due.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let clients = self.server.next_timeout();
        let peers = self.presence.next_timeout().filter(|_| self.server.is_watched());
        let first = [clients, peers].into_iter().flatten().min();
        let first = first.map(|at| Instant::default().after(at));
        let sample = self.server.is_watched().then_some(self.sample_due);
        [first, sample].into_iter().flatten().min()
    }

    /// Reports an event of the protocol to those who watch.
    pub(super) fn observe(
        &mut self,
        event: &Event,
        device: &ControlPlane,
        epoll: &Epoll,
        now: Now,
    ) {
        if self.server.is_watched() {
            in_ordinary_memory(|| {
                if let Some(event) = self.event(event, device, now.instant) {
                    self.publish(&event, epoll);
                }
            });
        }
    }

    /// The network did not take a handshake message to a peer.
    pub(super) fn unsent(&mut self, peer: PublicKey, to: SocketAddr, epoll: &Epoll) {
        if self.server.is_watched() {
            let event = failed(Some(peer), Some(to), HandshakeFailure::Unsent.name());
            in_ordinary_memory(|| self.publish(&event, epoll));
        }
    }

    /// The configuration was changed.
    pub(super) fn configured(&mut self, device: &ControlPlane, epoll: &Epoll) {
        if self.server.is_watched() {
            in_ordinary_memory(|| {
                // An endpoint that was set did not move.
                self.endpoints = endpoints(device);
                let peers = device.presence().count();
                self.publish(&status::Event::Configured { peers }, epoll);
            });
        }
    }

    fn publish(&mut self, event: &status::Event, epoll: &Epoll) {
        let now = clock::now();
        self.server.publish(event, epoll, since_boot(now.instant), now.wall);
    }

    fn event(
        &mut self,
        event: &Event,
        device: &ControlPlane,
        now: Instant,
    ) -> Option<status::Event> {
        Some(match *event {
            Event::HandshakeComplete { peer, .. } => {
                let public_key = *peer.as_bytes();
                if self.presence.handshake_complete(public_key, since_boot(now)) {
                    let endpoint = device.endpoint_of(&peer);
                    self.endpoints.extend(endpoint.map(|endpoint| (peer, endpoint)));
                    status::Event::Connected { public_key, endpoint }
                } else {
                    status::Event::Rekeyed { public_key }
                }
            }
            Event::EndpointMoved(peer, endpoint) => {
                let public_key = *peer.as_bytes();
                self.endpoints.insert(peer, endpoint);
                status::Event::EndpointMoved { public_key, endpoint }
            }
            Event::HandshakeUnanswered(peer, to) => {
                failed(Some(peer), Some(to), HandshakeFailure::Unanswered.name())
            }
            Event::HandshakeGivenUp(peer) => {
                failed(Some(peer), None, HandshakeFailure::GivenUp.name())
            }
            Event::NeverConfirmed(peer) => {
                failed(Some(peer), None, HandshakeFailure::Unconfirmed.name())
            }
            Event::InitiationReplayed(peer) => {
                failed(Some(peer), None, HandshakeFailure::OldTimestamp.name())
            }
            Event::ResponseRefused(peer) => {
                failed(Some(peer), None, HandshakeFailure::BadResponse.name())
            }
            Event::NoPrivateKey => failed(None, None, HandshakeFailure::NoPrivateKey.name()),
            Event::UnknownPeer(from, key) if self.unknown_senders.allow(now) => {
                failed(Some(key), Some(from), DropCause::UnknownPeer.name())
            }
            Event::InvalidMac(from) if self.unknown_senders.allow(now) => {
                failed(None, Some(from), DropCause::InvalidMac.name())
            }
            Event::UnknownPeer(..)
            | Event::InvalidMac(_)
            | Event::SessionExpired(_)
            | Event::UnderLoad
            | Event::NewGeneration => return None,
        })
    }

    /// Begins to remember what is needed for events, if no client has watched before.
    fn begin(&mut self, reported: &Reported<'_>) {
        let device = reported.device;
        let peers = device.presence();
        let peers = peers.map(|(key, _, last)| (*key.as_bytes(), last.map(since_boot)));
        self.presence.begin(peers, since_boot(reported.now));
        self.endpoints = endpoints(device);
        self.offloads = reported.counters().offloads;
        self.sample_due = reported.now.after(SAMPLE_INTERVAL);
    }

    /// Forgets it.
    fn end(&mut self) {
        self.presence = Presence::new();
        (self.endpoints, self.offloads) = (HashMap::new(), Vec::new());
    }

    /// Looks what has changed without an event of its own.
    fn sample(&mut self, reported: &Reported<'_>, epoll: &Epoll) {
        self.sample_due = reported.now.after(SAMPLE_INTERVAL);
        let now = endpoints(reported.device);
        for (peer, endpoint) in &now {
            let before = self.endpoints.get(peer);
            if before.is_some_and(|before| before != endpoint) {
                let (public_key, endpoint) = (*peer.as_bytes(), *endpoint);
                self.publish(&status::Event::EndpointMoved { public_key, endpoint }, epoll);
            }
        }
        self.endpoints = now;
        let offloads = reported.counters().offloads;
        let before = core::mem::replace(&mut self.offloads, offloads.clone());
        for event in changed_offloads(&before, &offloads) {
            self.publish(&event, epoll);
        }
    }

    fn handle_timeout(&mut self, reported: &Reported<'_>, epoll: &Epoll) {
        let now = since_boot(reported.now);
        self.server.handle_timeout(epoll, now);
        if !self.server.is_watched() {
            return;
        }
        let last_received = |key: &[u8; 32]| {
            let last = reported.device.last_received_from(&PublicKey::from_bytes(*key))?;
            Some(last.map(since_boot))
        };
        while let Some(public_key) = self.presence.handle_timeout(now, last_received) {
            self.publish(&status::Event::Disconnected { public_key }, epoll);
        }
        if self.sample_due <= reported.now {
            self.sample(reported, epoll);
        }
    }

    fn serve(&mut self, event: &EpollEvent, reported: &Reported<'_>, epoll: &Epoll) {
        let was_watched = self.server.is_watched();
        let now = since_boot(reported.now);
        self.server.handle(event, reported, epoll, now);
        match (was_watched, self.server.is_watched()) {
            (false, true) => self.begin(reported),
            (true, false) => self.end(),
            _ => {}
        }
        let greeting = status::Event::Watching { connected: self.presence.connected() };
        self.server.greet(&greeting, epoll, now, clock::now().wall);
    }
}

fn endpoints(device: &ControlPlane) -> HashMap<PublicKey, SocketAddr> {
    let peers = device.presence();
    peers.filter_map(|(key, endpoint, _)| Some((key, endpoint?))).collect()
}

fn failed(
    peer: Option<PublicKey>,
    endpoint: Option<SocketAddr>,
    cause: &'static str,
) -> status::Event {
    let public_key = peer.map(|peer| *peer.as_bytes());
    status::Event::HandshakeFailed { public_key, endpoint, cause }
}

/// An event for each offload that differs.
fn changed_offloads<'a>(
    before: &'a [(&'static str, bool)],
    now: &'a [(&'static str, bool)],
) -> impl Iterator<Item = status::Event> + 'a {
    before.iter().zip(now).filter(|(before, now)| before != now).map(|(_, (offload, in_use))| {
        if *in_use {
            status::Event::OffloadRegained { offload }
        } else {
            status::Event::OffloadLost { offload }
        }
    })
}

impl Control {
    /// What can be reported now.
    pub(super) fn reported(&self) -> Reported<'_> {
        let Self { device, shared, gso, port_retry, source_check, .. } = self;
        Reported { device, shared, gso, port_retry, source_check, now: clock::instant() }
    }

    /// Handles an event of the status socket or one of its clients.
    pub(super) fn serve_status(&mut self, event: &EpollEvent) {
        let Self { status, device, shared, gso, port_retry, source_check, epoll, .. } = self;
        let reported =
            Reported { device, shared, gso, port_retry, source_check, now: clock::instant() };
        in_ordinary_memory(|| status.serve(event, &reported, epoll));
    }

    /// Closes clients, and reports what has changed meanwhile, where that is due.
    pub(super) fn handle_status_timeout(&mut self) {
        let now = clock::instant();
        let Self { status, device, shared, gso, port_retry, source_check, epoll, .. } = self;
        if status.next_timeout().is_some_and(|due| due <= now) {
            let reported = Reported { device, shared, gso, port_retry, source_check, now };
            in_ordinary_memory(|| status.handle_timeout(&reported, epoll));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offload_is_lost_and_regained() {
        let with = |udp_gso| vec![("tso", true), ("udp-gso", udp_gso)];
        let changes = |before, now| changed_offloads(&with(before), &with(now)).collect::<Vec<_>>();
        assert_eq!(changes(true, false), [status::Event::OffloadLost { offload: "udp-gso" }]);
        assert_eq!(changes(false, true), [status::Event::OffloadRegained { offload: "udp-gso" }]);
        assert_eq!(changes(true, true), []);
    }

    #[test]
    fn each_kind_of_failure_has_its_cause() {
        let mut status = Status::new(0, 1);
        let device = ControlPlane::new(Box::new(crate::random::KernelRandom));
        let (key, at) = (PublicKey::from_bytes([1; 32]), "192.0.2.1:7".parse().unwrap());
        for (event, cause) in [
            (Event::HandshakeUnanswered(key, at), "unanswered"),
            (Event::HandshakeGivenUp(key), "given_up"),
            (Event::NeverConfirmed(key), "unconfirmed"),
            (Event::InitiationReplayed(key), "old_timestamp"),
            (Event::ResponseRefused(key), "bad_response"),
            (Event::NoPrivateKey, "no_private_key"),
            (Event::UnknownPeer(at, key), "unknown_peer"),
            (Event::InvalidMac(at), "bad_mac1"),
        ] {
            let reported = status.event(&event, &device, Instant::from_nanos(1));
            let Some(status::Event::HandshakeFailed { cause: found, .. }) = reported else {
                panic!("{event:?}: {reported:?}")
            };
            assert_eq!(found, cause);
        }
    }

    /// Peers are reported however many handshakes others make up.
    #[test]
    fn a_flood_of_unknown_senders_causes_ten_events_a_minute() {
        let mut status = Status::new(0, 1);
        let device = ControlPlane::new(Box::new(crate::random::KernelRandom));
        let flood = Event::InvalidMac("192.0.2.1:7".parse().unwrap());
        let now = Instant::from_nanos(1);
        let count = (0..1000).filter(|_| status.event(&flood, &device, now).is_some()).count();
        assert_eq!(count, 10);
        let peer = Event::HandshakeGivenUp(PublicKey::from_bytes([1; 32]));
        assert!(status.event(&peer, &device, now).is_some());
    }

    #[test]
    fn the_first_handshake_connects_and_the_next_is_a_rekey() {
        let mut status = Status::new(0, 1);
        let device = ControlPlane::new(Box::new(crate::random::KernelRandom));
        let complete =
            Event::HandshakeComplete { peer: PublicKey::from_bytes([1; 32]), first: false };
        let mut name = |now| status.event(&complete, &device, now).map(|event| event.name());
        let now = Instant::from_nanos(1);
        assert_eq!(name(now), Some("connect"));
        assert_eq!(name(now.after(Duration::from_secs(120))), Some("rekey"));
    }
}
