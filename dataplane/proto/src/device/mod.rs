//! A WireGuard interface: its peers, and all that one thread alone does for them.
//!
//! A `Device` owns configuration, handshakes, cookies and the expiry of timers. Packets do not pass
//! through it: whoever carries them (the daemon's workers, or [`crate::inline`] on a single thread)
//! works on its shared [`DataPath`]. What the device wants done comes out of `poll_transmit`,
//! `poll_flush` and `poll_event`.

mod configure;
mod expiry;
mod handshaking;
mod job;
mod load;

pub use handshaking::{HANDSHAKE_TRAFFIC_CLASS, HandshakeDatagram};
pub use job::{CryptoJob, Inline, JobRunner};
pub use load::{MAX_QUEUED_HANDSHAKES, UNDER_LOAD_REFUSALS, UNDER_LOAD_THRESHOLD, UNDER_LOAD_TIME};

use crate::config::AllowedIp;
use crate::cookie::{CookieChecker, CookieGenerator};
use crate::data_path::{DataPath, DropCause, Routes};
use crate::handshake::{Handshake, StaticIdentity};
use crate::keypair::{Keypair, Keypairs};
use crate::keys::{PrivateKey, PublicKey};
use crate::peer::{Endpoint, Peer, PeerId, StagedPackets};
use crate::ratelimiter::RateLimiter;
use crate::time::{Instant, Now};
use crate::timers::Timer;
use core::net::SocketAddr;
use core::time::Duration;
use load::Load;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

/// Events kept for the log; older ones go first.
const MAX_EVENTS: usize = 256;

/// Initiations without an answer, or responses without data, after which something seems wrong. The
/// first three take about ten seconds.
pub const MANY_UNANSWERED: u32 = 3;

/// Where the device gets its random numbers.
pub trait Random: Send {
    /// Fills `bytes` from a cryptographically secure generator.
    fn fill(&mut self, bytes: &mut [u8]);
}

/// A datagram to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Where to, and from where.
    pub endpoint: Endpoint,
    /// Traffic class of the outer header.
    pub traffic_class: u8,
    /// UDP payload.
    pub datagram: Vec<u8>,
    /// Whom it is counted for; `None` for a cookie, which goes to whoever asked.
    pub peer: Option<PeerId>,
}

/// What an operator might want to read of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A handshake completed.
    HandshakeComplete {
        /// With whom.
        peer: PublicKey,
        /// It is the first with this peer.
        first: bool,
    },
    /// Nobody answered [`MANY_UNANSWERED`] initiations, which went to this address last.
    HandshakeUnanswered(PublicKey, SocketAddr),
    /// Nobody answered 20 initiations.
    HandshakeGivenUp(PublicKey),
    /// As many responses, and the peer never used one: its preshared key differs, or they get lost.
    NeverConfirmed(PublicKey),
    /// The peer's initiation was not newer than one before it: replayed, or its clock went back.
    InitiationReplayed(PublicKey),
    /// Someone knows our public key but is none of our peers. Whether the key is their own is not known.
    UnknownPeer(SocketAddr, PublicKey),
    /// A handshake message for another key than ours.
    InvalidMac(SocketAddr),
    /// A response that does not fit: mostly a preshared key that differs.
    ResponseRefused(PublicKey),
    /// A peer moved, and a handshake message from the new place proved it.
    EndpointMoved(PublicKey, SocketAddr),
    /// Too many handshakes: from now on, senders have to prove their address.
    UnderLoad,
    /// This virtual machine is a copy: every keypair and handshake was dropped.
    NewGeneration,
}

/// What the device alone keeps of a peer.
struct PeerEntry {
    peer: Arc<Peer>,
    handshake: Handshake,
    cookie: CookieGenerator,
    allowed_ips: BTreeMap<u64, AllowedIp>,
    last_handshake: Duration,
    /// Initiations since the peer was last heard.
    unanswered: u32,
    /// Responses since a handshake was last complete on both sides.
    unconfirmed: u32,
    /// When the agenda has this peer.
    agenda: Option<Instant>,
}

/// Our keys, with what depends on them.
struct Identity {
    private_key: PrivateKey,
    keys: Arc<StaticIdentity>,
    cookie_checker: CookieChecker,
}

/// A WireGuard interface.
pub struct Device {
    data_path: Arc<DataPath>,
    identity: Option<Identity>,
    listen_port: u16,
    fwmark: u32,
    up: bool,
    /// In boxes: what an entry is moved out of would keep a copy of its keys.
    peers: BTreeMap<PeerId, Box<PeerEntry>>,
    next_id: PeerId,
    by_key: HashMap<PublicKey, PeerId>,
    routes: Routes,
    next_order: u64,
    agenda: BTreeSet<(Instant, PeerId)>,
    rate_limiter: RateLimiter,
    load: Load,
    transmits: VecDeque<Transmit>,
    flushes: VecDeque<Arc<Peer>>,
    events: VecDeque<Event>,
    random: Box<dyn Random>,
}

impl Device {
    /// A device with no key and no peers, down.
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
            routes: Routes::default(),
            next_order: 0,
            agenda: BTreeSet::new(),
            rate_limiter: RateLimiter::default(),
            load: Load::default(),
            transmits: VecDeque::new(),
            flushes: VecDeque::new(),
            events: VecDeque::new(),
            random,
        }
    }

    /// What whoever carries packets works on.
    #[must_use]
    pub const fn data_path(&self) -> &Arc<DataPath> {
        &self.data_path
    }

    /// A datagram to send, if any.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The network did not take a datagram: it counts as never sent.
    pub fn transmit_failed(&mut self, transmit: &Transmit) {
        if let Some(entry) = transmit.peer.and_then(|id| self.entry(id)) {
            entry.peer.take_back_tx_bytes(u64::try_from(transmit.datagram.len()).unwrap_or(0));
        }
    }

    /// The name of a peer.
    #[must_use]
    pub fn public_key(&self, id: PeerId) -> Option<PublicKey> {
        self.entry(id).map(|entry| *entry.peer.public_key())
    }

    /// Whether a public key is that of a peer.
    #[must_use]
    pub fn has_peer(&self, public_key: &PublicKey) -> bool {
        self.by_key.contains_key(public_key)
    }

    /// The network took a datagram, but not from its source, which is no address of ours any more.
    pub fn source_failed(&mut self, transmit: &Transmit) {
        if let Some(entry) = transmit.peer.and_then(|id| self.entry(id)) {
            entry.peer.clear_source();
        }
    }

    pub(crate) fn push_transmit(&mut self, transmit: Transmit) {
        self.transmits.push_back(transmit);
    }

    /// A peer whose staged packets can go now, if any: take a lease of 0 packets and send them.
    pub fn poll_flush(&mut self) -> Option<Arc<Peer>> {
        self.flushes.pop_front()
    }

    /// Something for the log, if any.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Self::handle_timeout`] is due next; `None` if nothing waits.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        self.agenda.first().map(|(at, _)| *at)
    }

    /// True between link up and link down.
    #[must_use]
    pub const fn is_up(&self) -> bool {
        self.up
    }

    /// Link up lets staged packets and persistent keepalives go; link down forgets all keypairs,
    /// handshakes and staged packets and stops the timers (kernel device.c, wg_open and wg_stop).
    pub fn set_up(&mut self, up: bool, now: Now) {
        if self.up == up {
            return;
        }
        self.up = up;
        for id in self.ids() {
            if up {
                self.send_staged_packets(id, now);
                self.send_persistent_keepalive(id, now);
            } else {
                self.quiesce(id);
            }
            self.reschedule(id);
        }
        if !up {
            self.transmits.clear();
            self.flushes.clear();
        }
    }

    /// This virtual machine was cloned, or restored from a snapshot: another copy may use the same keys
    /// with the same nonces. Forgets every keypair, handshake and cookie, and initiates a handshake with
    /// each peer that had a keypair or has packets waiting (kernel device.c, wg_vm_notification).
    ///
    /// The kernel only stops sending with the keypairs. Here they do not receive either: the replay
    /// windows are those of the snapshot, so what came after it could be replayed.
    pub fn vm_notification(&mut self, now: Now) {
        self.data_path.note_generation();
        self.log(Event::NewGeneration);
        if let Some(identity) = &mut self.identity {
            identity.cookie_checker.forget_secret();
        }
        // An initiation just before the new one would have the peer refuse that as part of a flood.
        self.transmits.clear();
        self.flushes.clear();
        for id in self.ids() {
            let Some(entry) = self.entry_mut(id) else { continue };
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
                self.request_initiation(id, now);
            }
            self.reschedule(id);
        }
    }

    /// The peers, as the threads share them.
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

    /// Ends everything under way with a peer.
    fn quiesce(&mut self, id: PeerId) {
        self.clear_handshake(id);
        self.clear_keypairs(id);
        let Some(entry) = self.entry_mut(id) else { return };
        entry.peer.timers.stop();
        let purged = entry.peer.state().take_staged();
        self.count_expired(&purged);
    }

    /// Counts staged packets that are given up, without the empty one of a keepalive.
    fn count_expired(&self, staged: &VecDeque<Vec<u8>>) {
        let packets = staged.iter().filter(|packet| !packet.is_empty()).count();
        self.data_path.drops.add(DropCause::StagedExpired, packets);
    }

    fn clear_handshake(&mut self, id: PeerId) {
        let index = self.entry_mut(id).and_then(|entry| entry.handshake.clear());
        if let Some(index) = index {
            self.data_path.index_table.release(index);
        }
    }

    fn clear_keypairs(&self, id: PeerId) {
        let Some(entry) = self.entry(id) else { return };
        let cleared = entry.peer.state().keypairs.clear();
        for keypair in cleared.iter().flatten() {
            self.data_path.index_table.release(keypair.sender_index());
        }
    }

    /// Lets the staged packets of a peer go, or asks for the handshake they need.
    fn send_staged_packets(&mut self, id: PeerId, now: Now) {
        let Some(entry) = self.entry(id).filter(|_| self.up) else { return };
        let peer = Arc::clone(&entry.peer);
        let (waiting, can_send) = {
            let state = peer.state();
            let current = state.keypairs.current.as_ref();
            (!state.staged.is_empty(), current.is_some_and(|keypair| keypair.can_send(now.instant)))
        };
        match (waiting, can_send) {
            (false, _) => {}
            (true, true) => self.flushes.push_back(peer),
            (true, false) => self.request_initiation(id, now),
        }
    }

    /// Sends what is staged, or an empty packet if there is nothing.
    fn send_keepalive(&mut self, id: PeerId, now: Now) {
        if let Some(entry) = self.entry(id).filter(|_| self.up) {
            let staged: &mut StagedPackets = &mut entry.peer.state().staged;
            if staged.is_empty() {
                staged.stage_packet(&[]);
            }
        }
        self.send_staged_packets(id, now);
    }

    fn send_persistent_keepalive(&mut self, id: PeerId, now: Now) {
        if self.entry(id).is_some_and(|entry| entry.peer.timers.persistent_keepalive_interval() > 0)
        {
            self.send_keepalive(id, now);
        }
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
