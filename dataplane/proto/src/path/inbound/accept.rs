//! Stage 4 of the way in: authenticated messages update their peers, and the packets inside are checked.

use super::{InboundBatch, Origin, ReceivingKeypair, TransportMessage};
use crate::path::data_path::{AllowedIpTable, DataPath, DropCause};
use crate::session::keypair::Keypair;
use crate::session::peer::{Endpoint, Peer, PeerId, dirty};
use crate::session::timers::RECEIVE_REKEY_AGE;
use crate::time::Instant;
use crate::wire::ip::{Ecn, InnerPacket, propagate_ecn};
use crate::wire::messages::{TAG_LEN, TRANSPORT_OVERHEAD};
use crate::wire::ndisc;
use core::net::SocketAddr;
use core::ops::Range;
use std::sync::Arc;

impl InboundBatch {
    /// Stage 4: accepts the messages that opened, in the order of arrival: updates their peers' state, and finds the
    /// packets inside. What must not reach the TUN device is counted, but for keepalives.
    pub fn accept(
        &mut self,
        data_path: &DataPath,
        allowed_ips: &AllowedIpTable,
        memory: &mut [u8],
        now: Instant,
    ) {
        let Self { origins, messages, keypairs, .. } = self;
        for message in messages.iter_mut().filter(|message| message.is_authentic) {
            let Some(received) = message.received(origins, keypairs) else { continue };
            let Range { start, end } = message.sealed;
            let text = end.checked_sub(TAG_LEN).and_then(|end| memory.get_mut(start..end));
            let Some(plaintext) = text else { continue };
            let Accepted { has_moved, packet } =
                data_path.accept_message(&received, allowed_ips, plaintext, now);
            message.has_moved = has_moved;
            match packet {
                Ok(packet) => {
                    message.packet = packet.map(|packet| start..start.saturating_add(packet.len()));
                }
                Err(cause) => {
                    data_path.drops.add(cause, 1);
                    message.dropped = Some(cause);
                }
            }
        }
    }

    /// Where the packets of accepted messages lie in the caller's memory, in ascending order.
    pub fn accepted(&self) -> impl Iterator<Item = Range<usize>> {
        self.messages.iter().filter_map(|message| message.packet.clone())
    }

    /// As [`Self::accepted`], each with the peer that it is from.
    pub(crate) fn accepted_from(&self) -> impl Iterator<Item = (PeerId, Range<usize>)> {
        self.messages.iter().filter_map(|message| {
            let peer = self.keypairs.get(message.keypair)?.peer.id();
            Some((peer, message.packet.clone()?))
        })
    }

    /// The peers whose messages moved their endpoints, each with the address that it sent from.
    pub(crate) fn moved(&self) -> impl Iterator<Item = (&Peer, SocketAddr)> {
        self.messages.iter().filter(|message| message.has_moved).filter_map(|message| {
            let destination = self.origins.get(message.origin)?.endpoint.destination;
            Some((&*self.keypairs.get(message.keypair)?.peer, destination))
        })
    }

    /// Why the last message has no packet; `None` if it has one or is a keepalive.
    pub(crate) fn dropped(&self) -> Option<DropCause> {
        self.messages.last()?.dropped
    }
}

impl TransportMessage {
    fn received<'a>(
        &self,
        origins: &[Origin],
        keypairs: &'a [ReceivingKeypair],
    ) -> Option<Received<'a>> {
        let Origin { endpoint, ecn } = *origins.get(self.origin)?;
        let ReceivingKeypair { peer, keypair, .. } = keypairs.get(self.keypair)?;
        Some(Received { peer, keypair, counter: self.counter, endpoint, ecn })
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

/// The outcome of an authenticated message.
struct Accepted<'p> {
    /// Its peer was at another address before.
    has_moved: bool,
    /// The packet inside, trimmed; `None` for a keepalive.
    packet: Result<Option<&'p mut [u8]>, DropCause>,
}

impl DataPath {
    /// Accepts an authenticated message: updates its peer's state and finds the packet inside, unless that must not
    /// reach the TUN device.
    fn accept_message<'p>(
        &self,
        received: &Received<'_>,
        allowed_ips: &AllowedIpTable,
        plaintext: &'p mut [u8],
        now: Instant,
    ) -> Accepted<'p> {
        let dropped = |cause| Accepted { has_moved: false, packet: Err(cause) };
        if !received.keypair.validate_counter(received.counter) {
            return dropped(DropCause::Replayed);
        }
        match self.update_peer_state(received, now) {
            None => dropped(DropCause::UnknownIndex),
            Some(has_moved) => {
                let packet = self.accept_packet(received, allowed_ips, plaintext, now);
                Accepted { has_moved, packet }
            }
        }
    }

    /// Counts the message, updates the timers, and finds the packet inside.
    fn accept_packet<'p>(
        &self,
        received: &Received<'_>,
        allowed_ips: &AllowedIpTable,
        plaintext: &'p mut [u8],
        now: Instant,
    ) -> Result<Option<&'p mut [u8]>, DropCause> {
        let peer = received.peer;
        let timers = &peer.timers;
        timers.any_authenticated_packet_received();
        let mut examination = timers.any_authenticated_packet_traversal(now);
        let message_len =
            u64::try_from(plaintext.len().saturating_add(TRANSPORT_OVERHEAD)).unwrap_or(0);
        if plaintext.is_empty() {
            self.mark_timer(peer, examination);
            peer.add_rx_bytes(message_len);
            return Ok(None);
        }
        examination = examination | timers.data_received(now);
        self.mark_timer(peer, examination);
        let packet = Self::check_inner(received, allowed_ips, plaintext)?;
        peer.add_rx_bytes(message_len);
        Ok(Some(packet))
    }

    /// Updates the peer's endpoint and keypair slots from this message, and returns whether the endpoint is another now.
    /// `None` if the peer was removed after the lookup.
    fn update_peer_state(&self, received: &Received<'_>, now: Instant) -> Option<bool> {
        let Received { peer, keypair, .. } = received;
        let (has_moved, confirmed, current_is_old) = {
            let mut state = peer.state();
            if !peer.is_alive() {
                return None;
            }
            let has_moved = peer.store_endpoint(&mut state, received.endpoint);
            state.received(now);
            let confirmed = state.keypairs.received_with_keypair(keypair);
            // The current keypair, which need not be the one of this message.
            let current = state.keypairs.current.as_ref();
            (
                has_moved,
                confirmed,
                current.is_some_and(|c| c.wants_rekey_after_receive(RECEIVE_REKEY_AGE, now)),
            )
        };
        if let Some(displaced) = confirmed {
            for keypair in displaced.iter().flatten() {
                self.index_table.release(keypair.sender_index());
            }
            peer.timers.handshake_complete();
            self.mark(peer, dirty::CONFIRMED);
        }
        if current_is_old && peer.timers.take_lastminute_handshake() {
            self.initiate_rekey(peer, now);
        }
        Some(has_moved)
    }

    /// Returns the inner packet, unless it is malformed, has a source that is not the peer's, or must not reach the
    /// kernel.
    fn check_inner<'p>(
        received: &Received<'_>,
        allowed_ips: &AllowedIpTable,
        plaintext: &'p mut [u8],
    ) -> Result<&'p mut [u8], DropCause> {
        let inner = InnerPacket::parse(plaintext).ok_or(DropCause::InnerMalformed)?;
        let owner = allowed_ips.lookup(inner.source);
        if !owner.is_some_and(|owner| Arc::ptr_eq(&owner.peer, received.peer)) {
            return Err(DropCause::WrongSource);
        }
        let packet = plaintext.get_mut(..inner.len).ok_or(DropCause::InnerMalformed)?;
        if ndisc::is_router_advertisement(packet) {
            return Err(DropCause::RouterAdvertisement);
        }
        propagate_ecn(packet, received.ecn);
        Ok(packet)
    }
}
