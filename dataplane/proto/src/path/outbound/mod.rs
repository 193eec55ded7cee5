//! The path of a packet from the TUN device to the network.
//!
//! Stage 1, *read*, is the caller's. The others have a file each, and none calls back into another:
//!
//! 2. `route`, [`OutboundBatch::route`]: the longest allowed IP that contains the destination selects the peer. Without
//!    one, or if the peer has no endpoint, the sender gets an ICMP error. A datagram that is itself one of ours to this
//!    peer is dropped. (sequential; no lock, with two exceptions: a packet that contains a WireGuard message takes the peer's
//!    lock or that of a shard of the indices, and routes with an MTU have a lock of their own)
//! 3. `reserve`, [`OutboundBatch::reserve_nonces`]: under the peer's lock, either take the keypair and one nonce for
//!    each packet of a run, together with the packets that were staged before, or stage the run and ask the control
//!    thread for a handshake. In a clone of the virtual machine in which the keypair was made, packets are always staged. Then
//!    [`OutboundBatch::reserve_staged`] for the peers of which nothing was read and whose staged packets can be sent.
//!    (sequential: this fixes the order of packets; the peer's lock, once for each run)
//! 4. `seal`, [`OutboundBatch::seal`]: write each packet into its datagram, which splits super-packets, then pad,
//!    encrypt and tag a few datagrams at once while they are in the cache. (parallel; no lock, except that of routes with
//!    an MTU, for staged packets)
//!
//! Stage 5, *send*, is the caller's: it sends the datagrams of [`OutboundBatch::sealed_runs`] in that order.

mod reserve;
mod route;
mod seal;

pub use reserve::NonceReservation;
pub use seal::{SealedDatagram, SealedRun, datagram_len};

use crate::secret::Secret;
use crate::session::index_table::IndexTable;
use crate::session::keypair::Keypair;
use crate::session::peer::Peer;
use crate::wire::ip::Ecn;
use core::ops::Range;
use seal::Position;
use std::sync::Arc;
use wgsep_aead::KeystreamCache;
use zeroize::Zeroize;

/// How a packet of the caller is written into its datagrams: a super-packet is split while it is copied.
pub trait Segmentation {
    /// Number of packets that go through the tunnel.
    fn count(&self) -> usize;

    /// Length in bytes of the packet with this number.
    fn len_of(&self, number: usize) -> usize;

    /// Writes the packet with this number to `segment`, which is [`Self::len_of`] bytes long. `None` if the
    /// bytes of the caller's `packet` contradict what was parsed of it.
    fn write(&self, packet: &[u8], number: usize, segment: &mut [u8]) -> Option<()>;
}

/// A packet of this length in bytes, which goes through the tunnel as it is.
pub struct Whole(pub usize);

impl Whole {
    /// The packet, which needs no parsing.
    #[must_use]
    pub const fn new(packet: &[u8]) -> Option<Self> {
        Some(Self(packet.len()))
    }
}

impl Segmentation for Whole {
    fn count(&self) -> usize {
        1
    }

    fn len_of(&self, _: usize) -> usize {
        self.0
    }

    fn write(&self, packet: &[u8], _: usize, segment: &mut [u8]) -> Option<()> {
        segment.copy_from_slice(packet.get(..self.0)?);
        Some(())
    }
}

/// Packets on their way out, of one or of several peers.
pub struct OutboundBatch<S> {
    packets: Vec<RoutedPacket<S>>,
    runs: Vec<PeerRun>,
    datagrams: Vec<SealedDatagram>,
    max_datagrams: usize,
    next: Position,
    /// Of the latest run, if [`Self::recycle`] emptied the batch.
    peer: Option<Arc<Peer>>,
    keypair: Option<Arc<Keypair>>,
    /// [`IndexTable::releases`] when they were in use.
    releases: u64,
    keystream: Option<Box<Secret<KeystreamCache>>>,
}

/// A packet or super-packet in the caller's memory.
struct RoutedPacket<S> {
    bytes: Range<usize>,
    segments: S,
    ecn: Ecn,
    /// Bounds the padding of each segment.
    mtu: usize,
}

impl<S: Segmentation> RoutedPacket<S> {
    /// Writes a segment; `memory` is the caller's.
    fn write(&self, memory: &[u8], number: usize, segment: &mut [u8]) -> Option<()> {
        self.segments.write(memory.get(self.bytes.clone())?, number, segment)
    }
}

/// Consecutive packets to one peer.
struct PeerRun {
    peer: Arc<Peer>,
    packets: Range<usize>,
    /// `None` until nonces are reserved, and for packets that were staged or dropped instead.
    reservation: Option<NonceReservation>,
}

impl<S: Segmentation> OutboundBatch<S> {
    /// An empty batch, with room for this many packets, and for datagrams that are sealed at once.
    #[must_use]
    pub fn with_capacity(packets: usize, datagrams: usize) -> Self {
        Self {
            packets: Vec::with_capacity(packets),
            runs: Vec::with_capacity(packets),
            datagrams: Vec::with_capacity(datagrams),
            max_datagrams: datagrams,
            next: Position::default(),
            peer: None,
            keypair: None,
            releases: 0,
            keystream: None,
        }
    }

    /// The batch, with keystream that is computed ahead for datagrams that are sealed singly, which the caller must keep in memory for secrets.
    /// [`Self::forget_released`] must be called after whatever may release a keypair.
    pub(crate) fn with_keystream_cache(mut self) -> Self {
        self.keystream = Some(Box::default());
        self
    }

    /// The batch, with as many datagrams sealed at once as the memory for them holds.
    pub(crate) const fn without_limit(mut self) -> Self {
        self.max_datagrams = usize::MAX;
        self
    }

    /// True if there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// True if packets that waited for a keypair go before those that were routed.
    pub(crate) fn has_staged(&self) -> bool {
        self.runs.iter().any(|run| {
            run.reservation.as_ref().is_some_and(|reservation| !reservation.staged.is_empty())
        })
    }

    /// Empties the batch, and keeps references to its latest peer and keypair: one that sends packet after packet to the same
    /// peer need not count them anew. Until then [`Self::forget_released`] must be called after whatever may release the
    /// keypair.
    pub(crate) fn recycle(&mut self) {
        if let Some(PeerRun { peer, reservation, .. }) = self.runs.pop() {
            self.peer = Some(peer);
            self.keypair = reservation.map(|reservation| reservation.keypair);
        }
        self.clear();
    }

    /// Drops these references, and erases keystream, if a keypair was released since.
    pub(crate) fn forget_released(&mut self, index_table: &IndexTable) {
        let releases = index_table.releases();
        if self.releases != releases {
            self.releases = releases;
            (self.peer, self.keypair) = (None, None);
            if let Some(keystream) = &mut self.keystream {
                keystream.zeroize();
            }
        }
    }

    /// Whether its cache has a key or keystream.
    #[cfg(test)]
    pub(crate) fn has_keystream(&self) -> bool {
        self.keystream.as_ref().is_some_and(|keystream| !keystream.is_empty())
    }

    /// Empties the batch.
    pub fn clear(&mut self) {
        self.packets.clear();
        self.runs.clear();
        self.datagrams.clear();
        self.next = Position::default();
    }
}
