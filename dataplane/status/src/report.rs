//! What is reported. Each value is public; a caller that has keys passes none of them, as there is no place for one.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// The UDP sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Udp {
    /// Configured, whether or not it is open.
    pub port: u16,
    /// An IPv4 socket is open.
    pub ipv4: bool,
    /// An IPv6 socket is open.
    pub ipv6: bool,
    /// Why none is open though the interface is up, or 0.
    pub errno: i32,
    /// The addresses that it is open on and that no interface has.
    pub missing: Vec<IpAddr>,
}

/// The counters of a device, and the state of what it uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets dropped, by cause.
    pub drops: Vec<(&'static str, u64)>,
    /// The UDP sockets.
    pub udp: Udp,
    /// Offloads by name, and whether each is in use.
    pub offloads: Vec<(&'static str, bool)>,
    /// Peers whose path refuses UDP segmentation offload.
    pub peers_without_gso: usize,
}

/// A peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Its public key.
    pub public_key: [u8; 32],
    /// Where packets to it go.
    pub endpoint: Option<SocketAddr>,
    /// How far it is: `idle`, `handshaking`, `established` or `expired`.
    pub state: &'static str,
    /// Since the epoch, of the last completed handshake; zero if none.
    pub last_handshake: Duration,
    /// Bytes received, as UDP payload.
    pub rx_bytes: u64,
    /// Bytes sent, as UDP payload.
    pub tx_bytes: u64,
    /// Datagrams received.
    pub rx_packets: u64,
    /// Datagrams sent.
    pub tx_packets: u64,
    /// Seconds; 0 is off.
    pub persistent_keepalive_interval: u16,
    /// Initiations sent.
    pub initiations: u64,
    /// Responses sent.
    pub responses: u64,
    /// Handshakes completed.
    pub completed: u64,
    /// Failures of handshakes by cause.
    pub failures: Vec<(&'static str, u64)>,
    /// From our handshake message to the peer's answer.
    pub round_trip: Option<Duration>,
}

/// An item of the peers' part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A peer, whose allowed IPs follow.
    Peer(Box<Peer>),
    /// An allowed IP of the last peer.
    AllowedIp(IpAddr, u8),
}
