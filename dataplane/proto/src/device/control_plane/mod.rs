//! The part of an interface that belongs to one thread: configuration, handshakes, cookies and the expiry of
//! timers.
//!
//! Packets do not pass through it: the packet path ([`crate::path`]) works on the [`DataPath`] that it shares.
//! [`ControlPlane::poll_transmit`], [`ControlPlane::poll_staged`] and [`ControlPlane::poll_event`] return what is to be done.

mod configure;
mod expiry;
#[cfg(feature = "internals")]
mod handover;
mod handshaking;
mod job;
mod load;
mod report;

pub use configure::{StatusCursor, StatusItem};
pub use expiry::PEERS_PER_ROUND;
#[cfg(feature = "internals")]
pub use handover::Restore;
pub use handshaking::{HANDSHAKE_TRAFFIC_CLASS, HandshakeDatagram, StartHandshakeError};
pub use job::{CryptoJob, Inline, JobRunner};
pub use load::{MAX_QUEUED_HANDSHAKES, UNDER_LOAD_REFUSALS, UNDER_LOAD_THRESHOLD, UNDER_LOAD_TIME};
pub use report::{PeerReport, ReportItem, SessionState};

use crate::config::AllowedIp;
use crate::invariant::present;
use crate::keys::{PrivateKey, PublicKey};
use crate::noise::cookie::{CookieChecker, CookieGenerator};
use crate::noise::handshake::{Handshake, StaticIdentity};
use crate::noise::ratelimiter::RateLimiter;
use crate::path::data_path::{AllowedIpTable, DataPath, DropCause};
use crate::random::Random;
use crate::session::handshakes::HandshakeFailure;
use crate::session::keypair::{Keypair, Keypairs};
use crate::session::peer::{Endpoint, Peer, PeerId, StagedPackets};
use crate::session::timers::Timer;
use crate::time::{Instant, Now};
use crate::timer_parameters::TimerParameters;
use core::fmt;
use core::net::SocketAddr;
use core::time::Duration;
use expiry::Pending;
use load::Load;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

/// Most events that are kept for the log; the oldest are dropped first.
const MAX_EVENTS: usize = 256;

/// Number of unanswered initiations, or of responses without data, that is logged. It takes about ten
/// seconds to reach.
pub const MANY_UNANSWERED: u32 = 3;

/// Why the entry of a `PeerId` always exists.
const PEER_EXISTS: &str = "a PeerId is dropped with its peer";

/// A handshake message or cookie reply to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandshakeTransmit {
    /// Where to, and from where.
    pub endpoint: Endpoint,
    /// Traffic class of the outer header.
    pub traffic_class: u8,
    /// UDP payload.
    pub datagram: Vec<u8>,
    /// The peer that it is counted for; `None` for a cookie reply, whose receiver need not be a peer.
    pub peer: Option<PeerId>,
}

/// An event for the operator's log; its `Display` is a line with what happened and what to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub enum Event {
    /// A handshake completed.
    HandshakeComplete {
        /// With whom.
        peer: PublicKey,
        /// It is the first with this peer.
        first: bool,
    },
    /// Three initiations in a row went unanswered; the last was sent to this address.
    HandshakeUnanswered(PublicKey, SocketAddr),
    /// 20 initiations went unanswered.
    HandshakeGivenUp(PublicKey),
    /// The peer used none of three responses: its preshared key differs, or they get lost.
    NeverConfirmed(PublicKey),
    /// The peer's initiation was not newer than one before it: replayed, or its clock went back.
    InitiationReplayed(PublicKey),
    /// An initiation by a public key that no peer has. It does not prove possession of that key.
    UnknownPeer(SocketAddr, PublicKey),
    /// A handshake message for another public key than ours.
    InvalidMac(SocketAddr),
    /// A response that is not authentic, mostly because the preshared keys differ.
    ResponseRefused(PublicKey),
    /// A peer's endpoint changed, as an authentic message proved.
    EndpointMoved(PublicKey, SocketAddr),
    /// No handshake completed for 540 s, three times REJECT_AFTER_TIME: the keypairs that were left were erased.
    SessionExpired(PublicKey),
    /// A packet waits for a handshake, and there is no private key.
    NoPrivateKey,
    /// Too many handshakes: from now on, senders have to prove their address.
    UnderLoad,
    /// This virtual machine is a copy: every keypair and handshake was dropped.
    NewGeneration,
}

impl Event {
    /// The peer that it concerns; `None` for one of the whole device, and of a sender that proved nothing.
    #[must_use]
    pub const fn peer(&self) -> Option<&PublicKey> {
        match self {
            Self::HandshakeComplete { peer, .. }
            | Self::HandshakeUnanswered(peer, _)
            | Self::HandshakeGivenUp(peer)
            | Self::NeverConfirmed(peer)
            | Self::InitiationReplayed(peer)
            | Self::ResponseRefused(peer)
            | Self::EndpointMoved(peer, _)
            | Self::SessionExpired(peer) => Some(peer),
            Self::UnknownPeer(..)
            | Self::InvalidMac(_)
            | Self::NoPrivateKey
            | Self::UnderLoad
            | Self::NewGeneration => None,
        }
    }

    /// Why a handshake failed, if that is what it reports.
    #[must_use]
    pub const fn failure(&self) -> Option<HandshakeFailure> {
        match self {
            Self::HandshakeUnanswered(..) => Some(HandshakeFailure::Unanswered),
            Self::HandshakeGivenUp(_) => Some(HandshakeFailure::GivenUp),
            Self::NeverConfirmed(_) => Some(HandshakeFailure::Unconfirmed),
            Self::InitiationReplayed(_) => Some(HandshakeFailure::OldTimestamp),
            Self::ResponseRefused(_) => Some(HandshakeFailure::BadResponse),
            Self::NoPrivateKey => Some(HandshakeFailure::NoPrivateKey),
            Self::HandshakeComplete { .. }
            | Self::UnknownPeer(..)
            | Self::InvalidMac(_)
            | Self::EndpointMoved(..)
            | Self::SessionExpired(_)
            | Self::UnderLoad
            | Self::NewGeneration => None,
        }
    }
}

impl fmt::Display for Event {
    /// A line for a log: what happened, to whom, and what to check.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HandshakeComplete { peer, .. } => write!(f, "{peer}: handshake complete"),
            Self::HandshakeUnanswered(peer, to) => write!(
                f,
                "{peer}: no answer to 3 initiations; check that it runs, that {to} is its address and not routed into the tunnel itself, that no firewall on the way drops UDP, and that each side has the other's public key"
            ),
            // Timer parameters may be others than the protocol's.
            Self::HandshakeGivenUp(peer) => write!(
                f,
                "{peer}: handshake given up, no answer to any initiation; the next packet to it tries again"
            ),
            Self::NeverConfirmed(peer) => write!(
                f,
                "{peer}: 3 of our responses and no data since; check that both sides have the same preshared key, and that what we send reaches it (this end cannot distinguish the two)"
            ),
            Self::InitiationReplayed(peer) => write!(
                f,
                "{peer}: its initiation is not newer than one before; check its clock (a replayed initiation looks the same, and for 27 s also a peer that was boringtun)"
            ),
            Self::UnknownPeer(from, key) => write!(
                f,
                "{from}: handshake by {key}, a key that no peer here has; add it, or correct the public key of the peer it should be"
            ),
            Self::InvalidMac(from) => write!(
                f,
                "{from}: handshake for another key than ours, mac1 is wrong; check the public key that it has for this end"
            ),
            Self::ResponseRefused(peer) => write!(
                f,
                "{peer}: its response does not open; check that both sides have the same preshared key (a forged response looks the same)"
            ),
            Self::EndpointMoved(peer, to) => write!(f, "{peer}: endpoint is now {to}"),
            Self::SessionExpired(peer) => {
                write!(f, "{peer}: no handshake for 540 s, its session keys are erased")
            }
            Self::NoPrivateKey => f.write_str(
                "no private key is set, so no handshake begins: packets to peers wait and are dropped; set one",
            ),
            Self::UnderLoad => f.write_str("under load: handshakes need a cookie from now on"),
            Self::NewGeneration => f.write_str(
                "this virtual machine was cloned or restored: keys and handshakes of before are dropped, and peers get new ones",
            ),
        }
    }
}

/// The part of a peer that belongs to the device.
struct PeerEntry {
    peer: Arc<Peer>,
    handshake: Handshake,
    cookie: CookieGenerator,
    allowed_ips: BTreeMap<u64, AllowedIp>,
    last_handshake: Duration,
    /// Initiations since a packet of the peer was last received.
    unanswered: u32,
    /// Responses since a handshake last completed on both sides.
    unconfirmed: u32,
    /// What is to be sent to it; if anything, it is in the queue of pending peers.
    pending: Pending,
    /// The deadline at which the timer queue has this peer.
    queued_at: Option<Instant>,
}

/// Our keys, with what depends on them.
struct Identity {
    private_key: PrivateKey,
    keys: Arc<StaticIdentity>,
    cookie_checker: CookieChecker,
}

/// The control half of a WireGuard interface.
pub struct ControlPlane {
    data_path: Arc<DataPath>,
    identity: Option<Identity>,
    listen_port: u16,
    fwmark: u32,
    up: bool,
    /// Boxed, because moving an entry would leave a copy of its keys behind.
    peers: BTreeMap<PeerId, Box<PeerEntry>>,
    next_id: PeerId,
    by_key: HashMap<PublicKey, PeerId>,
    allowed_ips: AllowedIpTable,
    next_order: u64,
    timer_queue: BTreeSet<(Instant, PeerId)>,
    /// Peers to which something is sent after a change that concerns many.
    pending: VecDeque<PeerId>,
    /// When dirty or pending peers were left to another call.
    left_since: Option<Instant>,
    /// That there is no private key was logged, and none was set since.
    no_private_key_logged: bool,
    rate_limiter: RateLimiter,
    load: Load,
    transmits: VecDeque<HandshakeTransmit>,
    can_send_staged: VecDeque<Arc<Peer>>,
    events: VecDeque<Event>,
    random: Box<dyn Random>,
    timer_parameters: TimerParameters,
}

impl ControlPlane {
    /// An interface with no key and no peers, down.
    #[must_use]
    pub fn new(random: Box<dyn Random>) -> Self {
        Self {
            data_path: Arc::default(),
            identity: None,
            listen_port: 0,
            fwmark: 0,
            up: false,
            peers: BTreeMap::new(),
            next_id: PeerId::default(),
            by_key: HashMap::new(),
            allowed_ips: AllowedIpTable::default(),
            next_order: 0,
            timer_queue: BTreeSet::new(),
            pending: VecDeque::new(),
            left_since: None,
            no_private_key_logged: false,
            rate_limiter: RateLimiter::default(),
            load: Load::default(),
            transmits: VecDeque::new(),
            can_send_staged: VecDeque::new(),
            events: VecDeque::new(),
            random,
            timer_parameters: TimerParameters::default(),
        }
    }

    /// The state that the packet path shares.
    #[must_use]
    pub const fn data_path(&self) -> &Arc<DataPath> {
        &self.data_path
    }

    /// A datagram to send, if any.
    pub fn poll_transmit(&mut self) -> Option<HandshakeTransmit> {
        self.transmits.pop_front()
    }

    /// Sets the times of all peers' timers: of those that are armed, and of keypairs that are derived, from now on.
    pub(crate) fn set_timer_parameters(&mut self, parameters: TimerParameters) {
        self.timer_parameters = parameters;
        for entry in self.peers.values() {
            entry.peer.timers.set_parameters(&parameters);
        }
    }

    /// Uncounts a datagram of `len` bytes to a peer that the network refused.
    pub fn transmit_failed(&mut self, peer: Option<PeerId>, len: usize) {
        if let Some(entry) = peer.and_then(|id| self.entry(id)) {
            entry.peer.take_back_tx(u64::try_from(len).unwrap_or(u64::MAX));
            entry.peer.handshakes().fail(HandshakeFailure::Unsent);
        }
    }

    /// The public key of a peer.
    #[must_use]
    pub fn public_key(&self, id: PeerId) -> Option<PublicKey> {
        self.entry(id).map(|entry| *entry.peer.public_key())
    }

    /// The number of the peer with a public key.
    #[must_use]
    pub fn peer_id(&self, public_key: &PublicKey) -> Option<PeerId> {
        self.by_key.get(public_key).copied()
    }

    /// Whether a public key is that of a peer.
    #[must_use]
    pub fn has_peer(&self, public_key: &PublicKey) -> bool {
        self.by_key.contains_key(public_key)
    }

    /// Clears the source of a datagram that was sent without it, as it is no longer an address of ours.
    pub fn source_failed(&mut self, transmit: &HandshakeTransmit) {
        if let Some(entry) = transmit.peer.and_then(|id| self.entry(id)) {
            entry.peer.clear_source();
        }
    }

    /// A peer whose staged packets can be sent, if any: the caller sends them after
    /// [`reserve_staged`](crate::path::outbound::OutboundBatch::reserve_staged).
    pub fn poll_staged(&mut self) -> Option<Arc<Peer>> {
        self.can_send_staged.pop_front()
    }

    /// The next event for the log, if any.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Self::handle_timeout`] and [`Self::handle_dirty_peers`] are due next; `None` if no timer is pending and
    /// no peer was left.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        let first = self.timer_queue.first().map(|(at, _)| *at);
        [self.left_since, first].into_iter().flatten().min()
    }

    /// True between link up and link down.
    #[must_use]
    pub const fn is_up(&self) -> bool {
        self.up
    }

    /// Sets whether the link is up. Link up queues the peers to which staged packets and persistent keepalives are
    /// sent; link down drops all keypairs, handshakes and staged packets and stops the timers (kernel device.c,
    /// wg_open and wg_stop).
    pub fn set_up(&mut self, up: bool) {
        if self.up == up {
            return;
        }
        self.up = up;
        for id in self.ids() {
            if up {
                self.queue_pending(id, Pending::STAGED_AND_KEEPALIVE);
            } else {
                self.quiesce(id);
            }
            self.reschedule(id);
        }
        if !up {
            self.transmits.clear();
            self.can_send_staged.clear();
            self.clear_pending();
        }
    }

    /// Handles that this virtual machine was cloned or restored from a snapshot, so that another copy may
    /// use the same keys with the same nonces. Drops every keypair, handshake and cookie, and queues each peer that had
    /// a keypair or has packets waiting, for an initiation (kernel device.c, wg_vm_notification).
    ///
    /// The kernel only stops sending with the keypairs. Here they do not receive either: the replay
    /// windows are those of the snapshot, so what came after it could be replayed.
    pub fn vm_notification(&mut self, now: Now) {
        self.data_path.update_generation();
        self.log(Event::NewGeneration);
        if let Some(identity) = &mut self.identity {
            identity.cookie_checker.forget_secret();
        }
        // An initiation just before the new one would have the peer refuse that as part of a flood.
        self.transmits.clear();
        self.can_send_staged.clear();
        for id in self.ids() {
            let Some(entry) = present(self.entry_mut(id), PEER_EXISTS) else { continue };
            entry.cookie.forget_cookie();
            let peer = Arc::clone(&entry.peer);
            peer.timers.reset_last_sent_handshake();
            let is_wanted = peer.timers.is_pending(Timer::RetransmitHandshake) || {
                let state = peer.state();
                let Keypairs { current, next, .. } = &state.keypairs;
                let is_live = |keypair: &Arc<Keypair>| keypair.can_send(now.instant);
                [current, next].into_iter().flatten().any(is_live) || !state.staged.is_empty()
            };
            self.clear_handshake(id);
            self.clear_keypairs(id);
            if is_wanted {
                self.queue_pending(id, Pending::INITIATION);
            }
            self.reschedule(id);
        }
    }

    /// The shared state of all peers.
    pub fn shared_peers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.peers.values().map(|entry| &entry.peer)
    }

    fn ids(&self) -> Vec<PeerId> {
        self.peers.keys().copied().collect()
    }

    fn entry(&self, id: PeerId) -> Option<&PeerEntry> {
        self.peers.get(&id).map(|entry| &**entry)
    }

    fn entry_mut(&mut self, id: PeerId) -> Option<&mut PeerEntry> {
        self.peers.get_mut(&id).map(|entry| &mut **entry)
    }

    /// Stops the handshake, keypairs and timers of a peer and drops its staged packets.
    fn quiesce(&mut self, id: PeerId) {
        self.clear_handshake(id);
        self.clear_keypairs(id);
        let Some(entry) = present(self.entry_mut(id), PEER_EXISTS) else { return };
        entry.peer.timers.stop();
        let purged = entry.peer.state().take_staged();
        self.count_expired(&purged);
    }

    /// Counts staged packets that are given up, without the empty one of a keepalive.
    fn count_expired(&self, staged: &VecDeque<Vec<u8>>) {
        let packets = staged.iter().filter(|packet| !packet.is_empty()).count();
        let cause = match self.identity {
            Some(_) => DropCause::StagedExpired,
            None => DropCause::NoPrivateKey,
        };
        self.data_path.drops.add(cause, packets);
    }

    fn clear_handshake(&mut self, id: PeerId) {
        let entry = present(self.entry_mut(id), PEER_EXISTS);
        let index = entry.and_then(|entry| entry.handshake.clear());
        if let Some(index) = index {
            self.data_path.index_table.release(index);
        }
    }

    /// Returns whether there were any.
    fn clear_keypairs(&self, id: PeerId) -> bool {
        let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return false };
        let cleared = entry.peer.state().keypairs.clear();
        for keypair in cleared.iter().flatten() {
            self.data_path.index_table.release(keypair.sender_index());
        }
        cleared.iter().any(Option::is_some)
    }

    /// Queues a peer whose staged packets can be sent, or requests the handshake that they need.
    fn send_staged_packets(&mut self, id: PeerId, now: Now) {
        if !self.up {
            return;
        }
        let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return };
        let peer = Arc::clone(&entry.peer);
        let (waiting, can_send) = {
            let state = peer.state();
            let current = state.keypairs.current.as_ref();
            (!state.staged.is_empty(), current.is_some_and(|keypair| keypair.can_send(now.instant)))
        };
        match (waiting, can_send) {
            (false, _) => {}
            (true, true) => self.can_send_staged.push_back(peer),
            (true, false) => self.request_initiation(id, now),
        }
    }

    /// Sends the staged packets, or an empty one if there are none.
    fn send_keepalive(&mut self, id: PeerId, now: Now) {
        if !self.up {
            return;
        }
        let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return };
        {
            let staged: &mut StagedPackets = &mut entry.peer.state().staged;
            if staged.is_empty() {
                staged.stage_packet(&[]);
            }
        }
        self.send_staged_packets(id, now);
    }

    fn send_persistent_keepalive(&mut self, id: PeerId, now: Now) {
        let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return };
        if entry.peer.timers.persistent_keepalive_interval() > 0 {
            self.send_keepalive(id, now);
        }
    }

    /// Logs the endpoint to which a transport message moved a peer.
    pub(super) fn log_endpoint(&mut self, peer: &Peer, destination: SocketAddr) {
        self.log(Event::EndpointMoved(*peer.public_key(), destination));
    }

    fn log(&mut self, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn random_array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.random.fill(&mut bytes);
        bytes
    }
}
