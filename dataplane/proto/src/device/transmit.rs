//! Datagrams to send: in a queue of ours, or in the caller's memory.

use crate::path::Parts;
use crate::path::outbound::{OutboundBatch, SealedRun, Whole};
use crate::session::peer::{Endpoint, PeerId};
use core::ops::Range;
use core::slice;
use std::collections::VecDeque;

/// A datagram to send.
#[derive(Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub struct Transmit<'d> {
    /// Where to, and from where. A program whose socket cannot choose the source, as std's, ignores `endpoint.source`, and
    /// the system chooses.
    pub endpoint: Endpoint,
    /// Traffic class of the outer header: the ECN bits of the packet (RFC 6040), or DSCP AF41 of a handshake message. A
    /// program whose socket cannot set it, as std's, ignores it.
    pub traffic_class: u8,
    /// UDP payload.
    pub datagram: &'d mut [u8],
    /// The peer that it is counted for; `None` for a cookie reply, whose receiver need not be a peer.
    pub peer: Option<PeerId>,
}

/// A datagram to send, which lies in a buffer beside it.
pub(super) struct Queued {
    endpoint: Endpoint,
    traffic_class: u8,
    bytes: Range<usize>,
    peer: Option<PeerId>,
}

impl Queued {
    fn transmit<'d>(&self, datagram: &'d mut [u8]) -> Transmit<'d> {
        let &Self { endpoint, traffic_class, peer, .. } = self;
        Transmit { endpoint, traffic_class, datagram, peer }
    }
}

/// The datagrams that a batch sealed last, where they lie in the memory that it was given. They are counted as sent.
pub(super) fn sealed(outbound: &OutboundBatch<Whole>) -> impl Iterator<Item = Queued> {
    outbound.sealed_runs().flat_map(|SealedRun { peer, endpoint, datagrams }| {
        let bytes = datagrams.iter().map(|datagram| datagram.bytes.len() as u64).sum();
        peer.add_tx(bytes, datagrams.len() as u64);
        datagrams.iter().map(move |datagram| Queued {
            endpoint: *endpoint,
            traffic_class: datagram.ecn.encapsulated().bits(),
            bytes: datagram.bytes.clone(),
            peer: Some(peer.id()),
        })
    })
}

/// Datagrams to send, in memory that is reused.
#[derive(Default)]
pub(super) struct TransmitQueue {
    bytes: Vec<u8>,
    queued: VecDeque<Queued>,
}

impl TransmitQueue {
    pub(super) fn push(
        &mut self,
        endpoint: Endpoint,
        traffic_class: u8,
        peer: Option<PeerId>,
        datagram: &[u8],
    ) {
        let bytes = 0..datagram.len();
        self.push_from(datagram, Queued { endpoint, traffic_class, bytes, peer });
    }

    /// Adds a copy of a datagram that lies in other memory.
    pub(super) fn push_from(&mut self, memory: &[u8], mut queued: Queued) {
        if self.queued.is_empty() {
            self.bytes.clear();
        }
        let start = self.bytes.len();
        self.bytes.extend_from_slice(memory.get(queued.bytes.clone()).unwrap_or_default());
        queued.bytes = start..self.bytes.len();
        self.queued.push_back(queued);
    }

    pub(super) fn pop(&mut self) -> Option<Transmit<'_>> {
        let queued = self.queued.pop_front()?;
        let datagram = self.bytes.get_mut(queued.bytes.clone())?;
        Some(queued.transmit(datagram))
    }

    pub(super) fn clear(&mut self) {
        self.queued.clear();
    }
}

/// The datagrams of a batch, to be sent in this order. They lie in the caller's memory, one directly behind the other.
pub struct Transmits<'b, 'd> {
    queued: slice::Iter<'b, Queued>,
    parts: Parts<'d>,
}

impl<'b, 'd> Transmits<'b, 'd> {
    pub(super) fn new(queued: &'b [Queued], memory: &'d mut [u8]) -> Self {
        Self { queued: queued.iter(), parts: Parts::new(memory) }
    }
}

impl<'d> Iterator for Transmits<'_, 'd> {
    type Item = Transmit<'d>;

    fn next(&mut self) -> Option<Transmit<'d>> {
        let queued = self.queued.next()?;
        Some(queued.transmit(self.parts.take(queued.bytes.clone())?))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.queued.size_hint()
    }
}

impl ExactSizeIterator for Transmits<'_, '_> {}
