//! The path of a packet from the TUN device to the network.
//!
//! 1. `route`: the longest allowed IP that contains the destination selects the peer. Without one, or
//!    if the peer has no endpoint, `unreachable` writes an ICMP error for the sender. A datagram that is
//!    itself one of ours to this peer is dropped. (sequential)
//! 2. `reserve_nonces`: under the peer's lock, either take the keypair and one nonce for each packet of
//!    a run, together with the packets that were staged before, or stage the run and ask the control
//!    thread for a handshake. A copy of the virtual machine in which the keypair was made always stages.
//!    (sequential: this fixes the order of packets)
//! 3. `seal`: pad, encrypt and tag each datagram in place. (parallel)
//! 4. The caller sends the datagrams to the reservation's endpoint, in the order of the reservations,
//!    and counts the bytes that the socket took.

use crate::data_path::{AllowedIpTable, DataPath, DropCause};
use crate::icmp::{host_unreachable, may_answer};
use crate::index_table::Entry;
use crate::ip::{InnerPacket, nested_message, padding};
use crate::keypair::Keypair;
use crate::messages::{Initiation, Message, Response, SenderIndex, TAG_LEN, TRANSPORT_HEADER_LEN};
use crate::ndisc::is_solicitation_or_redirect;
use crate::peer::{Endpoint, Peer, PeerState, StagedPackets, event};
use crate::time::Instant;
use crate::timers::Timer;
use std::collections::VecDeque;
use std::sync::Arc;

/// Nonces reserved for packets to one peer: a keypair, a first counter and an endpoint.
pub struct NonceReservation {
    /// The keypair that seals the packets.
    pub keypair: Arc<Keypair>,
    /// Where the datagrams are sent.
    pub endpoint: Endpoint,
    /// Counter of the first packet; the staged ones come first.
    pub first_counter: u64,
    /// Packets that waited for the keypair, oldest first.
    pub staged: VecDeque<Vec<u8>>,
}

/// Length of the datagram that carries a packet of `len` bytes.
#[must_use]
pub const fn datagram_len(len: usize, mtu: usize) -> usize {
    TRANSPORT_HEADER_LEN + len + padding(len, mtu) + TAG_LEN
}

impl DataPath {
    /// Finds the peer for a packet.
    ///
    /// # Errors
    /// Why the packet is dropped, which is counted: it is malformed, concerns only the link, is a datagram
    /// of our own, has no peer, or its peer has no endpoint. In the latter two cases
    /// [`Self::unreachable`] writes an answer.
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

    /// Writes to `buffer` the ICMP error for a packet that [`Self::route`] refused with `cause`;
    /// returns its length. `None` where none may be sent, or too many were (kernel device.c, wg_xmit).
    pub fn unreachable(
        &self,
        cause: DropCause,
        packet: &[u8],
        now: Instant,
        buffer: &mut [u8],
    ) -> Option<usize> {
        let answered = matches!(cause, DropCause::NoPeer | DropCause::NoEndpoint);
        if answered && may_answer(packet) && self.icmp_errors.allow(now) {
            host_unreachable(packet, buffer)
        } else {
            None
        }
    }

    /// Length of the datagram that carries a staged packet, which may be empty.
    #[must_use]
    pub fn datagram_len(&self, packet: &[u8]) -> usize {
        let mtu = InnerPacket::parse(packet)
            .map_or_else(|| self.mtu(), |inner| self.mtu_towards(inner.destination, inner.len));
        datagram_len(packet.len(), mtu)
    }

    /// Reserves nonces for the staged packets of `peer` and `count` more; without a keypair, stages those
    /// by calling `stage`, which returns how many packets the queue dropped.
    pub fn reserve_nonces(
        &self,
        peer: &Arc<Peer>,
        count: usize,
        now: Instant,
        stage: impl FnOnce(&mut StagedPackets) -> usize,
    ) -> Option<NonceReservation> {
        let mut state = peer.state();
        if !peer.is_alive() {
            // It was removed after the lookup.
            self.drops.add(DropCause::NoPeer, count);
            return None;
        }
        if count == 0 && state.staged.is_empty() {
            return None;
        }
        if state.endpoint.is_none() {
            self.drops.add(DropCause::NoEndpoint, count);
            return None;
        }
        let reservation = try_reserve(&mut state, count, now);
        // Read after the nonces are taken: a copy that is made later uses each for the same packet.
        let is_in_a_copy = reservation.is_some() && self.is_in_a_copy();
        match reservation {
            Some(reservation) if is_in_a_copy => {
                state.staged.put_back(reservation.staged);
                let dropped = stage(&mut state.staged);
                drop(state);
                self.drops.add(DropCause::StagedOverflow, dropped);
                self.mark(peer, event::HANDSHAKE);
                None
            }
            Some(reservation) => {
                drop(state);
                let has_data =
                    count > 0 || reservation.staged.iter().any(|packet| !packet.is_empty());
                self.sent(peer, &reservation.keypair, has_data, now);
                Some(reservation)
            }
            None => {
                let dropped = stage(&mut state.staged);
                let wanted = !state.staged.is_empty();
                drop(state);
                self.drops.add(DropCause::StagedOverflow, dropped);
                if wanted {
                    self.need_handshake(peer, now);
                }
                None
            }
        }
    }

    /// Updates the timers for packets that are about to be sent, and checks the age of their keypair.
    fn sent(&self, peer: &Peer, keypair: &Keypair, has_data: bool, now: Instant) {
        let timers = &peer.timers;
        let mut examination = timers.any_authenticated_packet_traversal(now);
        timers.any_authenticated_packet_sent();
        if has_data {
            examination = examination | timers.data_sent(now);
        }
        self.mark_timer(peer, examination);
        if keypair.wants_rekey_after_send(now) {
            self.want_handshake(peer, now);
        }
    }

    /// Requests an initiation for packets that wait for one, unless it is under way. If it may not be sent
    /// yet, the control thread schedules it.
    ///
    /// While a retransmission is scheduled, its timer sends the initiation. The kernel also sends it for
    /// the first packet after REKEY_TIMEOUT, without jitter. If both ends have steady traffic and their
    /// initiations cross, they would cross again after each REKEY_TIMEOUT.
    fn need_handshake(&self, peer: &Peer, now: Instant) {
        if !self.has_identity() {
            return;
        }
        peer.timers.reset_handshake_attempts();
        let is_scheduled = peer.timers.is_pending(Timer::RetransmitHandshake);
        if !is_scheduled || peer.timers.is_initiation_overdue(now) {
            self.mark(peer, event::HANDSHAKE);
        }
    }

    /// Asks the control thread for an initiation, unless one was sent within `REKEY_TIMEOUT`.
    pub(crate) fn want_handshake(&self, peer: &Peer, now: Instant) {
        peer.timers.reset_handshake_attempts();
        if peer.timers.may_send_initiation(now) {
            self.mark(peer, event::HANDSHAKE);
        }
    }
}

fn try_reserve(state: &mut PeerState, count: usize, now: Instant) -> Option<NonceReservation> {
    let endpoint = state.endpoint?;
    let keypair = state.keypairs.current.as_ref()?;
    let packets = u64::try_from(state.staged.len().checked_add(count)?).ok()?;
    let first_counter = keypair.assign_nonces(packets, now)?;
    let keypair = Arc::clone(keypair);
    Some(NonceReservation { keypair, endpoint, first_counter, staged: state.take_staged() })
}

/// Seals a packet that lies `TRANSPORT_HEADER_LEN` bytes into `datagram`, which is
/// [`datagram_len`] bytes long: zeroes the padding, encrypts, writes header and tag. False if the
/// datagram is too short for that, or longer than any can be.
#[must_use]
pub fn seal(keypair: &Keypair, counter: u64, datagram: &mut [u8], packet_len: usize) -> bool {
    let Some(end) = datagram.len().checked_sub(TAG_LEN) else { return false };
    let Some(padding) = datagram.get_mut(TRANSPORT_HEADER_LEN + packet_len..end) else {
        return false;
    };
    padding.fill(0);
    keypair.seal(counter, datagram)
}
