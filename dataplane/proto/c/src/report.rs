//! What a tunnel reports of its peer.

use core::net::SocketAddr;
use core::time::Duration;

use crate::address::wgsep_address;
use wgsep_proto::{Event, PeerReport, SessionState};

/// How far a tunnel is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum wgsep_state {
    /// There was no handshake yet, and none is under way.
    WGSEP_STATE_IDLE = 0,
    /// A handshake is under way, and nothing can be sent before it completes.
    WGSEP_STATE_HANDSHAKING = 1,
    /// There is a keypair to send with.
    WGSEP_STATE_ESTABLISHED = 2,
    /// There was a handshake, and its keypair can send no more.
    WGSEP_STATE_EXPIRED = 3,
}

/// Statistics of a tunnel, since it was created.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct wgsep_statistics {
    /// How far it is.
    pub state: wgsep_state,
    /// Where the peer is; version 0 if that is not known yet.
    pub endpoint: wgsep_address,
    /// UDP payload bytes received and authenticated.
    pub rx_bytes: u64,
    /// UDP payload bytes of the datagrams to send.
    pub tx_bytes: u64,
    /// Authenticated datagrams received.
    pub rx_packets: u64,
    /// Datagrams to send.
    pub tx_packets: u64,
    /// When the last handshake completed, in nanoseconds since 1970-01-01 00:00:00 UTC; 0 if none did.
    pub latest_handshake: u64,
    /// Nanoseconds from our last handshake message to the peer's answer, of the last complete handshake; 0 if unknown.
    pub round_trip: u64,
    /// Initiations sent.
    pub initiations: u64,
    /// Responses sent.
    pub responses: u64,
    /// Handshakes that completed.
    pub completed: u64,
    /// Handshakes that failed, of any cause.
    pub failed: u64,
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl From<PeerReport> for wgsep_statistics {
    fn from(report: PeerReport) -> Self {
        let failures = report.handshakes.failures().map(|(_, count)| count);
        Self {
            state: match report.state {
                SessionState::Handshaking => wgsep_state::WGSEP_STATE_HANDSHAKING,
                SessionState::Established => wgsep_state::WGSEP_STATE_ESTABLISHED,
                SessionState::Expired => wgsep_state::WGSEP_STATE_EXPIRED,
                _ => wgsep_state::WGSEP_STATE_IDLE,
            },
            endpoint: report.endpoint.map(Into::into).unwrap_or_default(),
            rx_bytes: report.rx_bytes,
            tx_bytes: report.tx_bytes,
            rx_packets: report.rx_packets,
            tx_packets: report.tx_packets,
            latest_handshake: nanoseconds(report.last_handshake),
            round_trip: report.round_trip.map_or(0, nanoseconds),
            initiations: report.handshakes.initiations,
            responses: report.handshakes.responses,
            completed: report.handshakes.completed,
            failed: failures.fold(0, u64::saturating_add),
        }
    }
}

/// What happened to a tunnel.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum wgsep_event_kind {
    /// Something that this version of the header has no name for.
    WGSEP_EVENT_OTHER = 0,
    /// A handshake completed.
    WGSEP_EVENT_HANDSHAKE_COMPLETE = 1,
    /// Three initiations in a row went unanswered; the last was sent to the address.
    WGSEP_EVENT_HANDSHAKE_UNANSWERED = 2,
    /// The handshake was given up. The next packet starts another.
    WGSEP_EVENT_HANDSHAKE_GIVEN_UP = 3,
    /// The peer used none of three responses: its preshared key differs, or they get lost.
    WGSEP_EVENT_NEVER_CONFIRMED = 4,
    /// The peer's initiation was not newer than one before it: replayed, or its clock went back.
    WGSEP_EVENT_INITIATION_REPLAYED = 5,
    /// An initiation from the address by another public key than the peer's.
    WGSEP_EVENT_UNKNOWN_PEER = 6,
    /// A handshake message from the address for another public key than ours.
    WGSEP_EVENT_INVALID_MAC = 7,
    /// A response that is not authentic, mostly because the preshared keys differ.
    WGSEP_EVENT_RESPONSE_REFUSED = 8,
    /// The peer moved to the address.
    WGSEP_EVENT_ENDPOINT_MOVED = 9,
    /// No handshake completed for nine minutes: the keypairs that were left were erased.
    WGSEP_EVENT_SESSION_EXPIRED = 10,
    /// Too many handshake messages: from now on, senders have to prove their address.
    WGSEP_EVENT_UNDER_LOAD = 11,
}

/// Something that happened to a tunnel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct wgsep_event {
    /// What it was.
    pub kind: wgsep_event_kind,
    /// The address that is part of it; version 0 if none is.
    pub address: wgsep_address,
}

impl From<Event> for wgsep_event {
    fn from(event: Event) -> Self {
        use wgsep_event_kind::*;
        let (kind, address): (_, Option<SocketAddr>) = match event {
            Event::HandshakeComplete { .. } => (WGSEP_EVENT_HANDSHAKE_COMPLETE, None),
            Event::HandshakeUnanswered(_, at) => (WGSEP_EVENT_HANDSHAKE_UNANSWERED, Some(at)),
            Event::HandshakeGivenUp(_) => (WGSEP_EVENT_HANDSHAKE_GIVEN_UP, None),
            Event::NeverConfirmed(_) => (WGSEP_EVENT_NEVER_CONFIRMED, None),
            Event::InitiationReplayed(_) => (WGSEP_EVENT_INITIATION_REPLAYED, None),
            Event::UnknownPeer(from, _) => (WGSEP_EVENT_UNKNOWN_PEER, Some(from)),
            Event::InvalidMac(from) => (WGSEP_EVENT_INVALID_MAC, Some(from)),
            Event::ResponseRefused(_) => (WGSEP_EVENT_RESPONSE_REFUSED, None),
            Event::EndpointMoved(_, to) => (WGSEP_EVENT_ENDPOINT_MOVED, Some(to)),
            Event::SessionExpired(_) => (WGSEP_EVENT_SESSION_EXPIRED, None),
            Event::UnderLoad => (WGSEP_EVENT_UNDER_LOAD, None),
            _ => (WGSEP_EVENT_OTHER, None),
        };
        Self { kind, address: address.map(Into::into).unwrap_or_default() }
    }
}
