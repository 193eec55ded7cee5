//! The path of a datagram from the network to the TUN device.
//!
//! Stages 1, *read*, and 5, *write*, are the caller's.
//!
//! 2. [`InboundBatch::parse`]: which of the four messages; handshake messages go to the control thread. The receiver
//!    index of a transport message names its keypair and peer. (parallel; a read lock on a shard of the indices,
//!    once for each keypair of the batch)
//! 3. [`InboundBatch::open`]: decrypt all transport messages of the batch in place. (parallel; no lock)
//! 4. [`InboundBatch::accept`]: drop replays; move endpoint, keypair slots and timers; trim to the inner length. The
//!    inner source must be an allowed IP of this peer. Router advertisements, which would change the kernel's
//!    configuration, are dropped. (in the order of arrival; the locks of the replay window and of the peer, one
//!    after the other, and where a keypair is confirmed those of the indices and of the dirty peers)
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use crate::path::Parts;
use crate::path::data_path::{AllowedIpTable, DataPath, DropCause};
use crate::session::keypair::{Keypair, OpenError, OpenJob, open_batch};
use crate::session::peer::{Endpoint, Peer, event};
use crate::session::timers::RECEIVE_REKEY_AGE;
use crate::time::Instant;
use crate::wire::ip::{Ecn, InnerPacket, propagate_ecn};
use crate::wire::messages::{
    Message, ReceiverIndex, TAG_LEN, TRANSPORT_HEADER_LEN, TRANSPORT_OVERHEAD,
};
use crate::wire::ndisc;
use core::ops::Range;
use std::sync::Arc;

/// The latest keypairs of a batch that are searched for a receiver index: consecutive messages mostly belong to one.
const LOOK_BACK: usize = 8;

/// Transport messages on their way in.
pub struct InboundBatch {
    reads: Vec<Origin>,
    messages: Vec<TransportMessage>,
    keypairs: Vec<ReceivingKeypair>,
}

/// From where the datagrams of one read came.
#[derive(Clone, Copy)]
struct Origin {
    /// From where, and to which address of ours.
    endpoint: Endpoint,
    /// The outer header's ECN bits.
    ecn: Ecn,
}

/// A receiver index with what it names.
struct ReceivingKeypair {
    receiver_index: ReceiverIndex,
    peer: Arc<Peer>,
    keypair: Arc<Keypair>,
}

/// A transport message in the caller's memory.
struct TransportMessage {
    /// What follows its header.
    sealed: Range<usize>,
    counter: u64,
    /// Index of its read.
    read: usize,
    /// Index of its keypair.
    keypair: usize,
    opened: Result<(), OpenError>,
}

/// What a datagram is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A transport message, which the batch keeps.
    Transport,
    /// A handshake message or a cookie reply, for the control thread.
    Handshake,
    /// Neither, or of no keypair of ours; it is counted.
    Dropped,
}

impl InboundBatch {
    /// An empty batch, with room for this many reads of a socket and for their datagrams.
    #[must_use]
    pub fn with_capacity(reads: usize, datagrams: usize) -> Self {
        Self {
            reads: Vec::with_capacity(reads),
            messages: Vec::with_capacity(datagrams),
            keypairs: Vec::with_capacity(reads),
        }
    }

    /// Number of transport messages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// True if there is no transport message.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Begins another read of a socket: where its datagrams came from, and the outer header's ECN bits.
    pub fn begin_read(&mut self, endpoint: Endpoint, ecn: Ecn) {
        self.reads.push(Origin { endpoint, ecn });
    }

    /// Stage 2: finds out what the datagram at `bytes` of `memory` is, and keeps a transport message with its
    /// keypair. Datagrams come in ascending order.
    pub fn parse(&mut self, data_path: &DataPath, memory: &[u8], bytes: Range<usize>) -> Parsed {
        let header = match memory.get(bytes.clone()).and_then(Message::parse) {
            Some(Message::Transport(header)) => header,
            Some(_) => return Parsed::Handshake,
            None => {
                data_path.drops.add(DropCause::InboundMalformed, 1);
                return Parsed::Dropped;
            }
        };
        let (Some(keypair), Some(read)) =
            (self.find_keypair(data_path, header.receiver_index), self.reads.len().checked_sub(1))
        else {
            data_path.drops.add(DropCause::UnknownIndex, 1);
            return Parsed::Dropped;
        };
        self.messages.push(TransportMessage {
            sealed: bytes.start.saturating_add(TRANSPORT_HEADER_LEN)..bytes.end,
            counter: header.counter,
            read,
            keypair,
            opened: Err(OpenError::Unauthentic),
        });
        Parsed::Transport
    }

    /// The index of the keypair that a receiver index names, among the keypairs of this batch, to which it is
    /// added if necessary.
    fn find_keypair(&mut self, data_path: &DataPath, index: ReceiverIndex) -> Option<usize> {
        let mut latest = self.keypairs.iter().enumerate().rev().take(LOOK_BACK);
        if let Some((known, _)) = latest.find(|(_, keypair)| keypair.receiver_index == index) {
            return Some(known);
        }
        let (peer, keypair) = data_path.index_table.lookup_keypair(index)?;
        self.keypairs.push(ReceivingKeypair { receiver_index: index, peer, keypair });
        self.keypairs.len().checked_sub(1)
    }

    /// Stage 3: opens every message. Those that do not open are counted.
    pub fn open(&mut self, data_path: &DataPath, memory: &mut [u8], now: Instant) {
        let Self { messages, keypairs, .. } = self;
        let mut parts = Parts::new(memory);
        let jobs = messages.iter_mut().filter_map(|message| {
            let keypair = &*keypairs.get(message.keypair)?.keypair;
            let sealed = parts.take(message.sealed.clone())?;
            Some(OpenJob { keypair, counter: message.counter, sealed, result: &mut message.opened })
        });
        open_batch(jobs, now);
        for error in messages.iter().filter_map(|message| message.opened.err()) {
            data_path.drops.add(error.into(), 1);
        }
    }

    /// Stage 4: accepts the message with this number, in ascending order: updates its peer's state and returns
    /// where in `memory` the packet inside lies. `None` for a message that did not open, for a keepalive and for
    /// anything that must not reach the TUN device; but for keepalives, each is counted.
    pub fn accept(
        &self,
        number: usize,
        data_path: &DataPath,
        allowed_ips: &AllowedIpTable,
        memory: &mut [u8],
        now: Instant,
    ) -> Option<Range<usize>> {
        let message = self.messages.get(number).filter(|message| message.opened.is_ok())?;
        let Origin { endpoint, ecn } = *self.reads.get(message.read)?;
        let ReceivingKeypair { peer, keypair, .. } = self.keypairs.get(message.keypair)?;
        let received = Received { peer, keypair, counter: message.counter, endpoint, ecn };
        let Range { start, end } = message.sealed;
        let plaintext = memory.get_mut(start..end.checked_sub(TAG_LEN)?)?;
        let packet = data_path.accept_message(&received, allowed_ips, plaintext, now)?;
        Some(start..start.checked_add(packet.len())?)
    }

    /// Empties the batch.
    pub fn clear(&mut self) {
        self.reads.clear();
        self.messages.clear();
        self.keypairs.clear();
    }
}

/// An authenticated transport message.
struct Received<'a> {
    peer: &'a Arc<Peer>,
    keypair: &'a Arc<Keypair>,
    counter: u64,
    endpoint: Endpoint,
    ecn: Ecn,
}

impl DataPath {
    /// Accepts an authenticated message: updates its peer's state and returns the packet inside, trimmed,
    /// or `None` for a keepalive and for anything that must not reach the TUN device (which is counted).
    fn accept_message<'p>(
        &self,
        received: &Received<'_>,
        allowed_ips: &AllowedIpTable,
        plaintext: &'p mut [u8],
        now: Instant,
    ) -> Option<&'p mut [u8]> {
        let Received { peer, keypair, .. } = received;
        if !keypair.validate_counter(received.counter) {
            self.drops.add(DropCause::Replayed, 1);
            return None;
        }
        if !self.update_peer_state(received, now) {
            self.drops.add(DropCause::UnknownIndex, 1);
            return None;
        }
        let timers = &peer.timers;
        timers.any_authenticated_packet_received();
        let mut examination = timers.any_authenticated_packet_traversal(now);
        let message_len =
            u64::try_from(plaintext.len().saturating_add(TRANSPORT_OVERHEAD)).unwrap_or(0);
        if plaintext.is_empty() {
            self.mark_timer(peer, examination);
            peer.add_rx_bytes(message_len);
            return None;
        }
        examination = examination | timers.data_received(now);
        self.mark_timer(peer, examination);
        let packet = self.check_inner(received, allowed_ips, plaintext)?;
        peer.add_rx_bytes(message_len);
        Some(packet)
    }

    /// Updates the peer's endpoint and keypair slots from this message. False if the peer was removed
    /// after the lookup.
    fn update_peer_state(&self, received: &Received<'_>, now: Instant) -> bool {
        let Received { peer, keypair, .. } = received;
        let (confirmed, current_is_old) = {
            let mut state = peer.state();
            if !peer.is_alive() {
                return false;
            }
            peer.store_endpoint(&mut state, received.endpoint);
            let confirmed = state.keypairs.received_with_keypair(keypair);
            // The current keypair, which need not be the one of this message.
            let current = state.keypairs.current.as_ref();
            (
                confirmed,
                current.is_some_and(|c| c.wants_rekey_after_receive(RECEIVE_REKEY_AGE, now)),
            )
        };
        if let Some(displaced) = confirmed {
            for keypair in displaced.iter().flatten() {
                self.index_table.release(keypair.sender_index());
            }
            peer.timers.handshake_complete();
            self.mark(peer, event::CONFIRMED);
        }
        if current_is_old && peer.timers.take_lastminute_handshake() {
            self.initiate_rekey(peer, now);
        }
        true
    }

    /// Returns the inner packet, or drops one that is malformed, has a source that is not the peer's, or
    /// must not reach the kernel.
    fn check_inner<'p>(
        &self,
        received: &Received<'_>,
        allowed_ips: &AllowedIpTable,
        plaintext: &'p mut [u8],
    ) -> Option<&'p mut [u8]> {
        let Some(inner) = InnerPacket::parse(plaintext) else {
            self.drops.add(DropCause::InnerMalformed, 1);
            return None;
        };
        let owner = allowed_ips.lookup(inner.source);
        if !owner.is_some_and(|owner| Arc::ptr_eq(&owner.peer, received.peer)) {
            self.drops.add(DropCause::WrongSource, 1);
            return None;
        }
        let packet = plaintext.get_mut(..inner.len)?;
        if ndisc::is_router_advertisement(packet) {
            self.drops.add(DropCause::RouterAdvertisement, 1);
            return None;
        }
        propagate_ecn(packet, received.ecn);
        Some(packet)
    }
}
