//! The state of an interface as one process hands it over to another, in records.
//!
//! The records have types of their own, because the two processes may be of different versions. What has no effect
//! beyond a second (the rates of senders under load, and of ICMP errors) is not in them, nor what can be computed again. A receiver trusts nothing in them: [`decode`] and
//! [`Restore`](crate::device::control_plane::Restore) refuse what no interface has.
//!
//! Points in time are nanoseconds on the boot clock, which both processes read.

use crate::keys::PublicKey;
use crate::secret::Secret;
use crate::session::handshakes::HandshakeCounters;
use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// Of the records. It changes with their types and their meaning.
pub const VERSION: u32 = 2;

/// The longest encoded record, in bytes: one of a packet that waits.
pub const MAX_RECORD_LEN: usize = 65_536 + 64;

/// Allowed IPs in a record.
pub(crate) const ALLOWED_IPS_PER_RECORD: usize = 512;

const CODEC: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Fixint,
    bincode::config::Limit<MAX_RECORD_LEN>,
> = bincode::config::standard().with_fixed_int_encoding().with_limit::<MAX_RECORD_LEN>();

/// A part of the state. An interface is an [`Interface`](Self::Interface), its peers in the order of creation, each
/// followed by what else it has, and an [`End`](Self::End).
#[derive(Serialize, Deserialize)]
pub enum Record {
    /// What is not of a peer.
    Interface(Interface),
    /// A peer.
    Peer(Box<Peer>),
    /// Allowed IPs of the last peer, in the order of configuration.
    AllowedIps(Vec<(IpAddr, u8)>),
    /// A keypair of the last peer.
    Keypair(Slot, Box<Keypair>),
    /// A packet of the last peer that waits for a keypair.
    Staged(Vec<u8>),
    /// Everything was sent.
    End {
        /// Records before this one.
        records: u64,
    },
}

/// The state that is not of a peer.
#[derive(Serialize, Deserialize)]
pub struct Interface {
    pub(crate) private_key: Option<Secret>,
    pub(crate) listen_port: u16,
    pub(crate) fwmark: u32,
    pub(crate) up: bool,
    pub(crate) mtu: u32,
    pub(crate) no_private_key_logged: bool,
    pub(crate) cookie_secret: Secret,
    pub(crate) cookie_secret_born: Option<u64>,
    /// When the load was last high, if it is.
    pub(crate) load_since: Option<u64>,
    /// Refused handshake messages, and since when they are counted.
    pub(crate) refused: (u32, Option<u64>),
    /// By the names of the causes. (The codec decodes no String.)
    pub(crate) drops: Vec<(Vec<u8>, u64)>,
}

/// The state of a peer.
#[derive(Serialize, Deserialize)]
pub struct Peer {
    pub(crate) public_key: PublicKey,
    pub(crate) preshared_key: Secret,
    pub(crate) destination: Option<SocketAddr>,
    /// Our address, and the index of an interface.
    pub(crate) source: Option<(IpAddr, u32)>,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_bytes: u64,
    pub(crate) rx_packets: u64,
    pub(crate) tx_packets: u64,
    pub(crate) last_received: Option<u64>,
    pub(crate) handshakes: HandshakeCounters,
    pub(crate) round_trip: Option<Duration>,
    pub(crate) last_handshake: Duration,
    pub(crate) unanswered: u32,
    pub(crate) unconfirmed: u32,
    pub(crate) pending: [bool; 3],
    pub(crate) cookie: Secret<[u8; 16]>,
    pub(crate) cookie_born: Option<u64>,
    pub(crate) last_mac1: Option<[u8; 16]>,
    pub(crate) handshake: Handshake,
    pub(crate) timers: Timers,
}

/// What outlives a handshake with a peer, and the initiation that waits for its response. (A consumed initiation is
/// answered before the state is saved.)
#[derive(Serialize, Deserialize)]
pub struct Handshake {
    pub(crate) initiation: Option<Initiation>,
    pub(crate) latest_timestamp: [u8; 12],
    pub(crate) last_initiation_consumption: Option<u64>,
}

/// An initiation of ours.
#[derive(Serialize, Deserialize)]
pub struct Initiation {
    pub(crate) chaining_key: Secret,
    pub(crate) hash: Secret,
    pub(crate) ephemeral: Secret,
    pub(crate) sender_index: u32,
}

/// The deadlines of a peer, and what its timers remember.
#[derive(Serialize, Deserialize)]
pub struct Timers {
    /// In the order of [`Timer::ALL`](crate::session::timers::Timer::ALL); the last number for none.
    pub(crate) deadlines: [u64; 5],
    /// When they are examined next, at the latest at the earliest deadline.
    pub(crate) examined_at: u64,
    pub(crate) jitter: u64,
    pub(crate) need_another_keepalive: bool,
    pub(crate) persistent_keepalive_interval: u16,
    pub(crate) handshake_attempts: u32,
    pub(crate) sent_lastminute_handshake: bool,
    pub(crate) last_sent_handshake: u64,
}

/// Which of a peer's keypairs it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Slot {
    /// The one before the current one.
    Previous,
    /// The one to send with.
    Current,
    /// One that the peer has not used yet.
    Next,
}

/// A keypair.
#[derive(Serialize, Deserialize)]
pub struct Keypair {
    pub(crate) sending: Secret,
    pub(crate) receiving: Secret,
    /// The next counter to send with.
    pub(crate) sending_counter: u64,
    pub(crate) sending_valid: bool,
    /// One past the newest counter that was received.
    pub(crate) replay_next: u64,
    /// The words of the window.
    pub(crate) replay_seen: Vec<u64>,
    pub(crate) created: u64,
    pub(crate) initiator: bool,
    pub(crate) sender_index: u32,
    pub(crate) receiver_index: u32,
}

/// Why a state was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub &'static str);

impl core::fmt::Display for Refused {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        formatter.write_str(self.0)
    }
}

impl core::error::Error for Refused {}

/// Encodes a record; returns its length. The buffer then holds keys.
///
/// # Errors
/// If it is longer than the buffer, or than [`MAX_RECORD_LEN`].
pub fn encode(record: &Record, buffer: &mut [u8]) -> Result<usize, Refused> {
    bincode::serde::encode_into_slice(record, buffer, CODEC)
        .map_err(|_| Refused("a record is too long"))
}

/// Decodes one record.
///
/// # Errors
/// If the bytes are not exactly one record.
pub fn decode(bytes: &[u8]) -> Result<Record, Refused> {
    match bincode::serde::decode_from_slice(bytes, CODEC) {
        Ok((record, len)) if len == bytes.len() => Ok(record),
        _ => Err(Refused("a record is malformed")),
    }
}
