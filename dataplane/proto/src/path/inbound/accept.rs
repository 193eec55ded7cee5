//! Stage 4 of the way in: authenticated messages update their peers, and the packets inside are checked.

use super::{InboundBatch, Origin, ReceivingKeypair, TransportMessage};
use crate::path::data_path::{AllowedIpTable, DataPath, DropCause};
use crate::session::keypair::Keypair;
use crate::session::peer::{Peer, PeerId, dirty};
use crate::session::timers::{NeedsReschedule, RECEIVE_REKEY_AGE};
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
        for messages in messages.chunk_by_mut(|one, next| one.keypair == next.keypair) {
            let keypair = messages.first().and_then(|message| keypairs.get(message.keypair));
            let Some(ReceivingKeypair { peer, keypair, .. }) = keypair else { continue };
            let mut run = Run { peer, keypair, messages };
            run.drop_replays(data_path);
            if run.kept().next().is_some() {
                run.update_peer_state(data_path, origins, now);
                run.find_packets(data_path, origins, allowed_ips, memory, now);
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
    fn drop_for(&mut self, cause: DropCause, data_path: &DataPath) {
        data_path.drops.add(cause, 1);
        self.dropped = Some(cause);
    }
}

/// Consecutive messages of one keypair, so that each lock is taken once for all of them.
struct Run<'b> {
    peer: &'b Arc<Peer>,
    keypair: &'b Arc<Keypair>,
    messages: &'b mut [TransportMessage],
}

impl Run<'_> {
    /// The messages that opened and have not been dropped since.
    fn kept(&mut self) -> impl Iterator<Item = &mut TransportMessage> {
        self.messages.iter_mut().filter(|message| message.is_authentic && message.dropped.is_none())
    }

    fn drop_replays(&mut self, data_path: &DataPath) {
        let mut window = self.keypair.replay_window();
        for message in self.kept() {
            if !window.validate(message.counter) {
                message.drop_for(DropCause::Replayed, data_path);
            }
        }
    }

    /// Updates the peer's endpoint and keypair slots from these messages, and notes which moved the endpoint. They are
    /// dropped if the peer was removed after the lookup.
    fn update_peer_state(&mut self, data_path: &DataPath, origins: &[Origin], now: Instant) {
        let Self { peer, keypair, .. } = *self;
        let (confirmed, current_is_old) = {
            let mut state = peer.state();
            if !peer.is_alive() {
                drop(state);
                self.kept()
                    .for_each(|message| message.drop_for(DropCause::UnknownIndex, data_path));
                return;
            }
            for message in self.kept() {
                let origin = origins.get(message.origin);
                message.has_moved =
                    origin.is_some_and(|origin| peer.store_endpoint(&mut state, origin.endpoint));
                state.received(now);
            }
            let confirmed = state.keypairs.received_with_keypair(keypair);
            // The current keypair, which need not be the one of these messages.
            let current = state.keypairs.current.as_ref();
            (
                confirmed,
                current.is_some_and(|c| c.wants_rekey_after_receive(RECEIVE_REKEY_AGE, now)),
            )
        };
        if let Some(displaced) = confirmed {
            for keypair in displaced.iter().flatten() {
                data_path.index_table.release(keypair.sender_index());
            }
            peer.timers.handshake_complete();
            data_path.mark(peer, dirty::CONFIRMED);
        }
        if current_is_old && peer.timers.take_lastminute_handshake() {
            data_path.initiate_rekey(peer, now);
        }
    }

    /// Updates the timers, and finds the packets inside, which are counted for the peer unless they must not reach the
    /// TUN device.
    fn find_packets(
        &mut self,
        data_path: &DataPath,
        origins: &[Origin],
        allowed_ips: &AllowedIpTable,
        memory: &mut [u8],
        now: Instant,
    ) {
        let peer = self.peer;
        let timers = &peer.timers;
        let (mut examination, mut rx_bytes) = (NeedsReschedule::NONE, 0u64);
        for message in self.kept() {
            timers.any_authenticated_packet_received();
            examination = examination | timers.any_authenticated_packet_traversal(now);
            let Range { start, end } = message.sealed;
            let plaintext = end.checked_sub(TAG_LEN).and_then(|end| memory.get_mut(start..end));
            let Some(plaintext) = plaintext else { continue };
            let message_len = plaintext.len().saturating_add(TRANSPORT_OVERHEAD);
            if !plaintext.is_empty() {
                examination = examination | timers.data_received(now);
                let ecn = origins.get(message.origin).map_or(Ecn::NOT_CAPABLE, |origin| origin.ecn);
                match check_inner(peer, ecn, allowed_ips, plaintext) {
                    Ok(len) => message.packet = Some(start..start.saturating_add(len)),
                    Err(cause) => {
                        message.drop_for(cause, data_path);
                        continue;
                    }
                }
            }
            rx_bytes = rx_bytes.saturating_add(u64::try_from(message_len).unwrap_or(0));
        }
        data_path.mark_timer(peer, examination);
        peer.add_rx_bytes(rx_bytes);
    }
}

/// Returns the length of the inner packet, unless that is malformed, has a source that is not the peer's, or must not
/// reach the kernel.
fn check_inner(
    peer: &Arc<Peer>,
    outer_ecn: Ecn,
    allowed_ips: &AllowedIpTable,
    plaintext: &mut [u8],
) -> Result<usize, DropCause> {
    let inner = InnerPacket::parse(plaintext).ok_or(DropCause::InnerMalformed)?;
    let owner = allowed_ips.lookup(inner.source);
    if !owner.is_some_and(|owner| Arc::ptr_eq(&owner.peer, peer)) {
        return Err(DropCause::WrongSource);
    }
    let packet = plaintext.get_mut(..inner.len).ok_or(DropCause::InnerMalformed)?;
    if ndisc::is_router_advertisement(packet) {
        return Err(DropCause::RouterAdvertisement);
    }
    propagate_ecn(packet, outer_ecn);
    Ok(packet.len())
}
