//! Stage 2 of the way out: the peer of each packet.

use super::{OutboundBatch, PeerRun, RoutedPacket, Segmentation};
use crate::invariant::part;
use crate::path::data_path::{AllowedIpTable, DataPath, DropCause};
use crate::session::index_table::Entry;
use crate::session::peer::Peer;
use crate::time::Instant;
use crate::wire::icmp::{MAX_ERROR_LEN, host_unreachable, may_answer};
use crate::wire::ip::{InnerPacket, nested_message};
use crate::wire::messages::{Initiation, Message, Response, SenderIndex};
use crate::wire::ndisc::is_solicitation_or_redirect;
use core::ops::Range;
use std::sync::Arc;

impl<S: Segmentation> OutboundBatch<S> {
    /// Stage 2: finds the peer of each packet that was read, and keeps the packets that have one. Each comes with
    /// where it lies in `memory` and with what parses how it is split, which returns `None` if the packet contradicts
    /// itself. What is dropped is counted; `answer` is called with the ICMP error for its sender, if there is one.
    pub fn route<F: FnOnce(&[u8]) -> Option<S>>(
        &mut self,
        data_path: &DataPath,
        allowed_ips: &AllowedIpTable,
        memory: &[u8],
        packets: impl IntoIterator<Item = (Range<usize>, F)>,
        now: Instant,
        mut answer: impl FnMut(&[u8]),
    ) {
        for (bytes, segments) in packets {
            let packet = part(memory, bytes.clone());
            let start = bytes.start;
            if let Err(cause) = self.route_packet(data_path, allowed_ips, packet, start, segments) {
                data_path.answer_unreachable(cause, packet, now, &mut answer);
            }
        }
    }

    /// Stage 2 for one packet, which begins at `start` of the caller's memory.
    ///
    /// # Errors
    /// Why it is dropped, which is counted.
    pub(crate) fn route_packet(
        &mut self,
        data_path: &DataPath,
        allowed_ips: &AllowedIpTable,
        packet: &[u8],
        start: usize,
        segments: impl FnOnce(&[u8]) -> Option<S>,
    ) -> Result<(), DropCause> {
        let (peer, inner) = data_path.route(allowed_ips, packet)?;
        let Some(segments) = packet.get(..inner.len).and_then(segments) else {
            data_path.drops.add(DropCause::OutboundMalformed, 1);
            return Err(DropCause::OutboundMalformed);
        };
        let bytes = start..start + inner.len;
        let mtu = data_path.mtu_towards(inner.destination, segments.len_of(0));
        self.keep(peer, RoutedPacket { bytes, segments, ecn: inner.ecn, mtu });
        Ok(())
    }

    /// Adds a packet to the run of its peer, or begins one.
    fn keep(&mut self, peer: &Arc<Peer>, packet: RoutedPacket<S>) {
        let at = self.packets.len();
        self.packets.push(packet);
        match self.runs.last_mut() {
            Some(run) if Arc::ptr_eq(&run.peer, peer) && run.reservation.is_none() => {
                run.packets.end += 1;
            }
            _ => {
                let kept = self.peer.take_if(|kept| Arc::ptr_eq(kept, peer));
                let peer = kept.unwrap_or_else(|| Arc::clone(peer));
                self.runs.push(PeerRun { peer, packets: at..at + 1, reservation: None });
            }
        }
    }
}

impl DataPath {
    /// Finds the peer for a packet.
    ///
    /// # Errors
    /// Why the packet is dropped, which is counted: it is malformed, concerns only the link, is a datagram
    /// of our own, has no peer, or its peer has no endpoint.
    pub fn route<'r>(
        &self,
        allowed_ips: &'r AllowedIpTable,
        packet: &[u8],
    ) -> Result<(&'r Arc<Peer>, InnerPacket), DropCause> {
        let found =
            InnerPacket::parse(packet).ok_or(DropCause::OutboundMalformed).and_then(|inner| {
                if is_solicitation_or_redirect(packet) {
                    return Err(DropCause::SolicitationOrRedirect);
                }
                match allowed_ips.lookup(inner.destination) {
                    Some(owner) if self.is_own_datagram(&owner.peer, packet) => {
                        Err(DropCause::Loop)
                    }
                    Some(owner) if owner.peer.has_endpoint() => Ok((&owner.peer, inner)),
                    Some(_) => Err(DropCause::NoEndpoint),
                    None => Err(DropCause::NoPeer),
                }
            });
        found.inspect_err(|cause| self.drops.add(*cause, 1))
    }

    /// True if a packet is a datagram that we sent to this very peer and that was routed back to the
    /// interface: sent to it again, a transport message would loop and grow, and a handshake message would
    /// wait for the handshake it begins.
    fn is_own_datagram(&self, peer: &Peer, packet: &[u8]) -> bool {
        match nested_message(packet) {
            Some(Message::Transport(header)) => {
                peer.state().keypairs.seals_for(header.receiver_index)
            }
            Some(
                Message::Initiation(Initiation { sender_index, .. })
                | Message::Response(Response { sender_index, .. }),
            ) => self.is_index_of(peer, sender_index),
            Some(Message::CookieReply(_)) | None => false,
        }
    }

    /// True if an index names a handshake or a keypair of this peer.
    fn is_index_of(&self, peer: &Peer, index: SenderIndex) -> bool {
        match self.index_table.lookup(index) {
            Some(Entry::Handshake(of)) => of == peer.id(),
            Some(Entry::Keypair(of, _)) => of.id() == peer.id(),
            None => false,
        }
    }

    /// Calls `answer` with the ICMP error for a packet that [`Self::route`] refused with `cause`, unless none may be
    /// sent, or too many were (kernel device.c, wg_xmit).
    fn answer_unreachable(
        &self,
        cause: DropCause,
        packet: &[u8],
        now: Instant,
        answer: impl FnOnce(&[u8]),
    ) {
        let answered = matches!(cause, DropCause::NoPeer | DropCause::NoEndpoint);
        if answered && may_answer(packet) && self.icmp_errors.allow(now) {
            let mut error = [0; MAX_ERROR_LEN];
            if let Some(len) = host_unreachable(packet, &mut error) {
                answer(part(&error, 0..len));
            }
        }
    }
}
