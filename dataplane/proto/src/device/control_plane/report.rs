//! What is reported of peers to those who may not see a key: counters, states and times.
//!
//! No type here can have a secret: each of them is `Debug`, which the types of secret keys are not.

use super::configure::Step;
use super::{ControlPlane, PeerEntry, StatusCursor};
use crate::config::AllowedIp;
use crate::keys::PublicKey;
use crate::session::handshakes::HandshakeCounters;
use crate::session::keypair::Keypair;
use crate::session::peer::PeerId;
use crate::session::timers::Timer;
use crate::time::Instant;
use core::fmt;
use core::net::SocketAddr;
use core::time::Duration;
use std::sync::Arc;

/// How far a peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub enum SessionState {
    /// There was no handshake yet, and none is under way.
    Idle,
    /// A handshake is under way, and nothing can be sent before it completes.
    Handshaking,
    /// There is a keypair to send with. It is no proof that the peer can still be reached: that shows when it answers, or in
    /// [`PeerReport::handshakes`], which counts each initiation without an answer.
    Established,
    /// There was a handshake, and its keypair can send no more.
    Expired,
}

impl SessionState {
    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Handshaking => "handshaking",
            Self::Established => "established",
            Self::Expired => "expired",
        }
    }
}

impl fmt::Display for SessionState {
    /// Its [`name`](Self::name).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A peer as it is reported: its statistics and its state.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub struct PeerReport {
    /// The peer's key.
    pub public_key: PublicKey,
    /// Where packets to the peer go.
    pub endpoint: Option<SocketAddr>,
    /// Since the epoch, of the last completed handshake; zero if none.
    pub last_handshake: Duration,
    /// UDP payload bytes received and authenticated.
    pub rx_bytes: u64,
    /// UDP payload bytes sent.
    pub tx_bytes: u64,
    /// Authenticated datagrams received, with those whose packet was dropped.
    pub rx_packets: u64,
    /// Datagrams sent.
    pub tx_packets: u64,
    /// Seconds; 0 is off.
    pub persistent_keepalive_interval: u16,
    /// How far it is.
    pub state: SessionState,
    /// Handshakes and their failures.
    pub handshakes: HandshakeCounters,
    /// From our last handshake message to the peer's answer, of the last completed handshake.
    pub round_trip: Option<Duration>,
}

impl PeerReport {
    /// The report of a peer of which nothing is known.
    pub(crate) fn unknown(public_key: PublicKey) -> Self {
        Self {
            public_key,
            endpoint: None,
            last_handshake: Duration::ZERO,
            rx_bytes: 0,
            tx_bytes: 0,
            rx_packets: 0,
            tx_packets: 0,
            persistent_keepalive_interval: 0,
            state: SessionState::Idle,
            handshakes: HandshakeCounters::default(),
            round_trip: None,
        }
    }
}

/// An item of the report of the peers.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum ReportItem {
    /// A peer, whose allowed IPs follow as items of their own.
    Peer(PeerReport),
    /// An allowed IP of the last peer.
    AllowedIp(AllowedIp),
}

impl ControlPlane {
    /// The item at a cursor, which moves to the next one, as [`Self::next_status`].
    pub fn next_report(&self, cursor: &mut StatusCursor, now: Instant) -> Option<ReportItem> {
        Some(match self.step(cursor)? {
            Step::Peer(entry) => ReportItem::Peer(entry.report(now)),
            Step::AllowedIp(allowed_ip) => ReportItem::AllowedIp(allowed_ip),
        })
    }

    /// The report of a peer.
    #[must_use]
    pub fn report(&self, id: PeerId, now: Instant) -> Option<PeerReport> {
        self.entry(id).map(|entry| entry.report(now))
    }

    /// The reports of all peers, in the order of creation.
    pub fn reports(&self, now: Instant) -> impl Iterator<Item = PeerReport> {
        self.peers.values().map(move |entry| entry.report(now))
    }

    /// All peers, each with its endpoint and with the time at which an authenticated message of it was last received.
    pub fn presence(
        &self,
    ) -> impl Iterator<Item = (PublicKey, Option<SocketAddr>, Option<Instant>)> {
        self.peers.values().map(|entry| {
            let state = entry.peer.state();
            let endpoint = state.endpoint.map(|endpoint| endpoint.destination);
            (*entry.peer.public_key(), endpoint, state.last_received)
        })
    }

    /// Where a peer is, if that is known.
    #[must_use]
    pub fn endpoint_of(&self, public_key: &PublicKey) -> Option<SocketAddr> {
        let entry = self.entry(*self.by_key.get(public_key)?)?;
        entry.peer.endpoint().map(|endpoint| endpoint.destination)
    }

    /// When an authenticated message of a peer was last received; the outer `None` if there is no such peer.
    #[must_use]
    pub fn last_received_from(&self, public_key: &PublicKey) -> Option<Option<Instant>> {
        let id = self.by_key.get(public_key)?;
        self.entry(*id).map(|entry| entry.peer.last_received())
    }
}

impl PeerEntry {
    fn report(&self, now: Instant) -> PeerReport {
        let (rx_packets, state) = {
            let state = self.peer.state();
            let can_send =
                |slot: &Option<Arc<Keypair>>| slot.as_ref().is_some_and(|one| one.can_send(now));
            let is_begun = self.peer.timers.is_pending(Timer::RetransmitHandshake);
            let session = if can_send(&state.keypairs.current) {
                SessionState::Established
            } else if is_begun || can_send(&state.keypairs.next) {
                SessionState::Handshaking
            } else if self.last_handshake.is_zero() {
                SessionState::Idle
            } else {
                SessionState::Expired
            };
            (state.rx_packets, session)
        };
        let handshakes = self.peer.handshakes();
        PeerReport {
            public_key: *self.peer.public_key(),
            endpoint: self.peer.endpoint().map(|endpoint| endpoint.destination),
            last_handshake: self.last_handshake,
            rx_bytes: self.peer.rx_bytes(),
            tx_bytes: self.peer.tx_bytes(),
            rx_packets,
            tx_packets: self.peer.tx_packets(),
            persistent_keepalive_interval: self.peer.timers.persistent_keepalive_interval(),
            state,
            handshakes: handshakes.counters,
            round_trip: handshakes.round_trip,
        }
    }
}
