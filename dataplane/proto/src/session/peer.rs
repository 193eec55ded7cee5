//! The state of a peer that the threads share: keypairs, endpoint, staged packets, timers and counters.
//!
//! The rest of a peer belongs to the control thread (see `device::control_plane`): its handshake, its cookie, the list
//! of its allowed IPs.

use crate::keys::PublicKey;
use crate::session::handshakes::HandshakeLog;
use crate::session::keypair::Keypairs;
use crate::session::timers::Timers;
use crate::time::Instant;
use core::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most packets that wait for a keypair; the oldest are dropped first.
pub const MAX_STAGED_PACKETS: usize = 128;

/// Number of a peer in a device, in the order of creation; never reused after removal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub(crate) u64);

/// Our address to which a peer sent, and from which it expects the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Our address.
    pub address: IpAddr,
    /// Index of the network interface the datagram came in by; 0 where any will do.
    pub interface: u32,
}

/// The address of a peer, and our address that answers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The peer's address and port.
    pub destination: SocketAddr,
    /// The cached source of ours, if any.
    pub source: Option<Source>,
}

impl Endpoint {
    /// An endpoint with no cached source; an IPv4-mapped address becomes IPv4.
    #[must_use]
    pub fn new(destination: SocketAddr) -> Self {
        Self { destination: canonical(destination), source: None }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(destination: SocketAddr) -> Self {
        Self::new(destination)
    }
}

/// Converts an IPv4-mapped address to IPv4, and removes a scope from an address that is not link-local.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => (v4, v6.port()).into(),
            None => SocketAddrV6::new(*v6.ip(), v6.port(), 0, scope(v6)).into(),
        },
        SocketAddr::V4(_) => address,
    }
}

fn scope(address: SocketAddrV6) -> u32 {
    if is_link_local(address.ip()) { address.scope_id() } else { 0 }
}

/// Whether an address is of `fe80::/10`, so that it needs a scope.
#[must_use]
pub const fn is_link_local(address: &Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

/// Packets that wait for a keypair. An empty packet is a keepalive.
#[derive(Default)]
pub struct StagedPackets(VecDeque<Vec<u8>>);

impl StagedPackets {
    /// Adds a packet, dropping the oldest if there are too many; returns how many were dropped.
    pub fn stage_packet(&mut self, packet: &[u8]) -> usize {
        let mut dropped = 0;
        while self.0.len() >= MAX_STAGED_PACKETS {
            self.0.pop_front();
            dropped += 1;
        }
        self.0.push_back(packet.to_vec());
        dropped
    }

    /// Returns packets that were taken and not sent, before any was added.
    pub(crate) fn put_back(&mut self, packets: VecDeque<Vec<u8>>) {
        debug_assert!(self.0.is_empty(), "taken under the same lock");
        self.0 = packets;
    }

    /// The packets, the oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(Vec::as_slice)
    }

    /// Packets waiting.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The state under the lock of a peer.
#[derive(Default)]
pub(crate) struct PeerState {
    pub(crate) keypairs: Keypairs,
    pub(crate) endpoint: Option<Endpoint>,
    pub(crate) staged: StagedPackets,
    /// Authenticated messages received. Here, because each is received under the lock.
    pub(crate) rx_packets: u64,
    /// When the last of them was received.
    pub(crate) last_received: Option<Instant>,
}

impl PeerState {
    /// Counts an authenticated message of the peer.
    pub(crate) fn received(&mut self, now: Instant) {
        self.rx_packets = self.rx_packets.wrapping_add(1);
        self.last_received = Some(now);
    }

    pub(crate) fn take_staged(&mut self) -> VecDeque<Vec<u8>> {
        core::mem::take(&mut self.staged.0)
    }
}

/// The reasons for which the control thread must examine a dirty peer.
pub(crate) mod dirty {
    /// A timer expires before the next scheduled examination.
    pub(crate) const TIMER: u8 = 1;
    /// A handshake is needed.
    pub(crate) const HANDSHAKE: u8 = 2;
    /// The peer used the next keypair, which confirms it.
    pub(crate) const CONFIRMED: u8 = 4;
}

/// A peer, shared by the control thread and the workers.
pub struct Peer {
    id: PeerId,
    public_key: PublicKey,
    pub(crate) timers: Timers,
    state: Mutex<PeerState>,
    handshakes: Mutex<HandshakeLog>,
    dirty: AtomicU8,
    alive: AtomicBool,
    has_endpoint: AtomicBool,
    rx_bytes: AtomicU64,
    tx_bytes: AtomicU64,
    tx_packets: AtomicU64,
    /// See [`Self::path_cache`].
    path_cache: AtomicU64,
}

impl Peer {
    pub(crate) fn new(id: PeerId, public_key: PublicKey) -> Self {
        Self {
            id,
            public_key,
            timers: Timers::default(),
            state: Mutex::default(),
            handshakes: Mutex::default(),
            dirty: AtomicU8::new(0),
            alive: AtomicBool::new(true),
            has_endpoint: AtomicBool::new(false),
            rx_bytes: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            tx_packets: AtomicU64::new(0),
            path_cache: AtomicU64::new(0),
        }
    }

    /// Its number in the device.
    #[must_use]
    pub const fn id(&self) -> PeerId {
        self.id
    }

    /// Its public key.
    #[must_use]
    pub const fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, PeerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is counted of its handshakes, by the control thread alone.
    pub(crate) fn handshakes(&self) -> MutexGuard<'_, HandshakeLog> {
        self.handshakes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the peer is.
    #[must_use]
    pub fn endpoint(&self) -> Option<Endpoint> {
        self.state().endpoint
    }

    /// Sets where the peer is.
    pub fn set_endpoint(&self, endpoint: Endpoint) {
        let _moved = self.store_endpoint(&mut self.state(), endpoint);
    }

    /// Returns whether the peer was somewhere else before.
    pub(crate) fn store_endpoint(&self, state: &mut PeerState, endpoint: Endpoint) -> bool {
        let Some(before) = state.endpoint.replace(endpoint) else {
            self.has_endpoint.store(true, Ordering::Release);
            return false;
        };
        before.destination != endpoint.destination
    }

    /// True if the peer ever had an endpoint. It takes no lock, because it is read for each packet.
    pub(crate) fn has_endpoint(&self) -> bool {
        self.has_endpoint.load(Ordering::Acquire)
    }

    /// Clears the cached source address, so that the kernel's routing chooses one.
    pub fn clear_source(&self) {
        if let Some(endpoint) = &mut self.state().endpoint {
            endpoint.source = None;
        }
    }

    /// As [`Self::clear_source`], if the endpoint is still this one.
    pub(crate) fn clear_source_of(&self, expected: &Endpoint) {
        if let Some(endpoint) = &mut self.state().endpoint
            && endpoint == expected
        {
            endpoint.source = None;
        }
    }

    /// False once the peer was removed.
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    pub(crate) fn retire(&self) {
        self.alive.store(false, Ordering::Release);
    }

    /// Marks the peer as dirty for a reason; true if it was not dirty before, so that it must be queued.
    pub(crate) fn mark(&self, reason: u8) -> bool {
        // Reads first, because under load the peer is mostly marked already.
        self.dirty.load(Ordering::SeqCst) & reason == 0
            && self.dirty.fetch_or(reason, Ordering::SeqCst) == 0
    }

    pub(crate) fn take_dirty(&self) -> u8 {
        self.dirty.swap(0, Ordering::SeqCst)
    }

    /// A value that the sending code caches for the path to the peer, in its own format (in wgsep's dataplane, the
    /// `packets::gso` of where the kernel refused segmentation); initially 0.
    /// The protocol neither reads nor writes it.
    #[must_use]
    pub const fn path_cache(&self) -> &AtomicU64 {
        &self.path_cache
    }

    /// UDP payload bytes received and authenticated.
    #[must_use]
    pub fn rx_bytes(&self) -> u64 {
        self.rx_bytes.load(Ordering::Relaxed)
    }

    /// UDP payload bytes sent.
    #[must_use]
    pub fn tx_bytes(&self) -> u64 {
        self.tx_bytes.load(Ordering::Relaxed)
    }

    /// Datagrams sent.
    #[must_use]
    pub fn tx_packets(&self) -> u64 {
        self.tx_packets.load(Ordering::Relaxed)
    }

    /// When an authenticated message was last received.
    pub(crate) fn last_received(&self) -> Option<Instant> {
        self.state().last_received
    }

    /// Counts UDP payload received from the peer.
    pub fn add_rx_bytes(&self, bytes: u64) {
        self.rx_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Subtracts a datagram that was counted before the socket refused it.
    pub(crate) fn take_back_tx(&self, bytes: u64) {
        self.tx_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.tx_packets.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts UDP payload that the socket took, in so many datagrams.
    pub fn add_tx(&self, bytes: u64, packets: u64) {
        self.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.tx_packets.fetch_add(packets, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn staging_keeps_the_newest_128() {
        let mut staged = StagedPackets::default();
        for number in 0..130u8 {
            assert_eq!(staged.stage_packet(&[number]), usize::from(number >= 128));
        }
        assert_eq!(staged.len(), MAX_STAGED_PACKETS);
        assert_eq!(staged.0.front().unwrap(), &[2]);
    }

    #[test]
    fn endpoints_are_canonical() {
        for (given, kept) in [
            ("[::ffff:192.0.2.1]:1", "192.0.2.1:1"),
            ("[fe80::1%3]:1", "[fe80::1%3]:1"),
            ("[2001:db8::1%3]:1", "[2001:db8::1]:1"),
        ] {
            assert_eq!(Endpoint::new(given.parse().unwrap()).destination, kept.parse().unwrap());
        }
    }

    #[test]
    fn a_source_is_cleared_only_of_the_endpoint_that_was_looked_at() {
        let peer = Peer::new(PeerId(1), PublicKey::from_bytes([1; 32]));
        let source = Some(Source { address: [192, 0, 2, 1].into(), interface: 2 });
        let endpoint = Endpoint { source, ..Endpoint::new(([192, 0, 2, 9], 7).into()) };
        let moved = Endpoint { source, ..Endpoint::new(([192, 0, 2, 9], 8).into()) };
        peer.set_endpoint(moved);
        peer.clear_source_of(&endpoint);
        assert_eq!(peer.endpoint(), Some(moved));
        peer.clear_source_of(&moved);
        assert_eq!(peer.endpoint(), Some(Endpoint { source: None, ..moved }));
    }

    #[test]
    fn a_peer_that_becomes_dirty_is_queued_once() {
        let peer = Peer::new(PeerId(1), PublicKey::from_bytes([1; 32]));
        assert!(peer.mark(dirty::TIMER));
        assert!(!peer.mark(dirty::TIMER));
        assert!(!peer.mark(dirty::HANDSHAKE));
        assert_eq!(peer.take_dirty(), dirty::TIMER | dirty::HANDSHAKE);
        assert!(peer.mark(dirty::TIMER));
    }
}
