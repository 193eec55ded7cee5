//! Stage 4 of the way in: authenticated messages update their peers, and the packets inside are checked.

use super::{InboundBatch, Origin, ReceivingKeypair, TransportMessage};
use crate::path::data_path::{AllowedIpTable, DataPath, DropCause};
use crate::session::keypair::Keypair;
use crate::session::peer::{Endpoint, Peer, dirty};
use crate::session::timers::RECEIVE_REKEY_AGE;
use crate::time::Instant;
use crate::wire::ip::{Ecn, InnerPacket, propagate_ecn};
use crate::wire::messages::{TAG_LEN, TRANSPORT_OVERHEAD};
use crate::wire::ndisc;
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
        let Self { origins, messages, keypairs } = self;
        for message in messages.iter_mut().filter(|message| message.is_authentic) {
            message.packet = message.received(origins, keypairs).and_then(|received| {
                let Range { start, end } = message.sealed;
                let plaintext = memory.get_mut(start..end.checked_sub(TAG_LEN)?)?;
                let packet = data_path.accept_message(&received, allowed_ips, plaintext, now)?;
                Some(start..start.checked_add(packet.len())?)
            });
        }
    }

    /// Where the packets of accepted messages lie in the caller's memory, in ascending order.
    pub fn accepted(&self) -> impl Iterator<Item = Range<usize>> {
        self.messages.iter().filter_map(|message| message.packet.clone())
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
            state.received(now);
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
            self.mark(peer, dirty::CONFIRMED);
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
