//! The path of a packet from the TUN device to the network.
//!
//! Stage 1, *read*, is the caller's.
//!
//! 2. [`OutboundBatch::route`]: the longest allowed IP that contains the destination selects the peer. Without one,
//!    or if the peer has no endpoint, [`DataPath::unreachable`] writes an ICMP error for the sender. A datagram that
//!    is itself one of ours to this peer is dropped. (sequential; no lock but for what is rare: a packet that
//!    contains a WireGuard message takes the peer's or one of the indices, and routes with an MTU of their own have one)
//! 3. [`OutboundBatch::reserve_nonces`]: under the peer's lock, either take the keypair and one nonce for each
//!    packet of a run, together with the packets that were staged before, or stage the run and ask the control
//!    thread for a handshake. A copy of the virtual machine in which the keypair was made always stages.
//!    (sequential: this fixes the order of packets; the peer's lock, once for each run)
//! 4. [`OutboundBatch::seal`]: write each packet into its datagram, which splits super-packets, then pad, encrypt and
//!    tag a few datagrams at once while they are in the cache. (parallel; no lock, but for that of routes with an MTU, for
//!    staged packets)
//! 5. [`OutboundBatch::send`]: the caller sends the datagrams of each run to the endpoint of its reservation, in the
//!    order of the reservations, and says how many bytes the socket took. (in order; no lock here)

use crate::invariant::{part, present};
use crate::path::Parts;
use crate::path::data_path::{AllowedIpTable, DataPath, DropCause};
use crate::session::index_table::Entry;
use crate::session::keypair::{Keypair, SealJob, seal_batch};
use crate::session::peer::{Endpoint, Peer, PeerState, StagedPackets, event};
use crate::session::timers::Timer;
use crate::time::Instant;
use crate::wire::icmp::{host_unreachable, may_answer};
use crate::wire::ip::{Ecn, InnerPacket, nested_message, padding};
use crate::wire::messages::{
    Initiation, MAX_INNER_LEN, Message, Response, SenderIndex, TAG_LEN, TRANSPORT_HEADER_LEN,
};
use crate::wire::ndisc::is_solicitation_or_redirect;
use core::ops::Range;
use std::collections::VecDeque;
use std::sync::Arc;

/// Datagrams that are written before they are sealed, all of which fit into the L1 cache.
const SEALED_AT_ONCE: usize = 16;

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
}

/// A packet or super-packet in the caller's memory.
struct RoutedPacket<S> {
    bytes: Range<usize>,
    segments: S,
    ecn: Ecn,
    /// Bounds the padding of each segment.
    mtu: usize,
}

/// Consecutive packets to one peer.
struct PeerRun {
    peer: Arc<Peer>,
    packets: Range<usize>,
    /// `None` until nonces are reserved, and for packets that were staged or dropped instead.
    reservation: Option<NonceReservation>,
    /// Bytes that the socket took.
    sent: usize,
}

/// A datagram in the caller's memory.
pub struct SealedDatagram {
    /// Where it lies.
    pub bytes: Range<usize>,
    /// The ECN bits of the packet inside.
    pub ecn: Ecn,
    run: usize,
    counter: u64,
    /// Until then its bytes are plaintext.
    is_sealed: bool,
}

/// The segment that is sealed next.
#[derive(Default)]
struct Position {
    run: usize,
    /// Number of the packet in its run, which begins with the staged ones.
    packet: usize,
    segment: usize,
    /// Segments of the run before this one: what its counter is above the first.
    counter: u64,
}

/// A packet of a run.
enum Queued<'p, S> {
    /// It waited for the keypair. An empty one is a keepalive.
    Staged(&'p [u8]),
    /// It was routed just now.
    Routed(&'p RoutedPacket<S>),
}

impl<S: Segmentation> Queued<'_, S> {
    fn count(&self) -> usize {
        match self {
            Self::Staged(_) => 1,
            Self::Routed(packet) => packet.segments.count(),
        }
    }

    /// Length of a segment, and the MTU that bounds its padding.
    fn len_of(&self, number: usize, data_path: &DataPath) -> (usize, usize) {
        match self {
            Self::Staged(packet) => (packet.len(), data_path.mtu_of(packet)),
            Self::Routed(packet) => (packet.segments.len_of(number), packet.mtu),
        }
    }

    fn ecn(&self) -> Ecn {
        match self {
            Self::Staged(packet) => {
                InnerPacket::parse(packet).map_or(Ecn::NOT_CAPABLE, |inner| inner.ecn)
            }
            Self::Routed(packet) => packet.ecn,
        }
    }

    fn write(&self, memory: &[u8], number: usize, segment: &mut [u8]) -> Option<()> {
        match self {
            Self::Staged(packet) => {
                segment.copy_from_slice(packet);
                Some(())
            }
            Self::Routed(packet) => {
                packet.segments.write(memory.get(packet.bytes.clone())?, number, segment)
            }
        }
    }
}

impl PeerRun {
    /// The packet with this number, of the staged ones and then of those in `packets`.
    fn packet<'p, S>(
        &'p self,
        packets: &'p [RoutedPacket<S>],
        number: usize,
    ) -> Option<Queued<'p, S>> {
        let staged = self.reservation.as_ref().map(|reservation| &reservation.staged)?;
        match number.checked_sub(staged.len()) {
            None => staged.get(number).map(|packet| Queued::Staged(packet)),
            Some(routed) => {
                packets.get(self.packets.clone())?.get(routed).map(|packet| Queued::Routed(packet))
            }
        }
    }
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
        }
    }

    /// Number of packets and super-packets that were routed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// True if there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Stage 2: finds the peer of the packet that lies at `bytes` of `memory`, and keeps it. `segments` parses
    /// how it is split; `None` means that it contradicts itself. Returns where the packet ends, which may be
    /// before `bytes` do.
    ///
    /// # Errors
    /// As [`DataPath::route`]; the drop is counted.
    pub fn route(
        &mut self,
        data_path: &DataPath,
        allowed_ips: &AllowedIpTable,
        memory: &[u8],
        bytes: Range<usize>,
        segments: impl FnOnce(&[u8]) -> Option<S>,
    ) -> Result<usize, DropCause> {
        let packet = part(memory, bytes.clone());
        let (peer, inner) = data_path.route(allowed_ips, packet)?;
        let Some(segments) = packet.get(..inner.len).and_then(segments) else {
            data_path.drops.add(DropCause::OutboundMalformed, 1);
            return Err(DropCause::OutboundMalformed);
        };
        let bytes = bytes.start..bytes.start + inner.len;
        let end = bytes.end;
        let mtu = data_path.mtu_towards(inner.destination, segments.len_of(0));
        let at = self.packets.len();
        self.packets.push(RoutedPacket { bytes, segments, ecn: inner.ecn, mtu });
        match self.runs.last_mut() {
            Some(run) if Arc::ptr_eq(&run.peer, peer) && run.reservation.is_none() => {
                run.packets.end += 1;
            }
            _ => self.runs.push(PeerRun {
                peer: Arc::clone(peer),
                packets: at..at + 1,
                reservation: None,
                sent: 0,
            }),
        }
        Ok(end)
    }

    /// Stage 3 for a peer that has staged packets and, now, a keypair. Returns how many packets are added.
    pub fn reserve_staged(&mut self, data_path: &DataPath, peer: Arc<Peer>, now: Instant) -> usize {
        let Some(reservation) = data_path.reserve_nonces(&peer, 0, now, |_| 0) else { return 0 };
        let (at, staged) = (self.packets.len(), reservation.staged.len());
        let reservation = Some(reservation);
        self.runs.push(PeerRun { peer, packets: at..at, reservation, sent: 0 });
        staged
    }

    /// Stage 3: reserves nonces for each run, or stages its packets, which it copies by way of `scratch`.
    pub fn reserve_nonces(
        &mut self,
        data_path: &DataPath,
        memory: &[u8],
        scratch: &mut [u8],
        now: Instant,
    ) {
        let Self { packets, runs, .. } = self;
        for run in runs.iter_mut().filter(|run| run.reservation.is_none()) {
            let packets = part(packets, run.packets.clone());
            let count = packets.iter().map(|packet| packet.segments.count()).sum();
            run.reservation = data_path.reserve_nonces(&run.peer, count, now, |staged| {
                let stage = |packet| stage(packet, memory, scratch, staged, data_path);
                packets.iter().map(stage).sum()
            });
        }
        runs.retain(|run| run.reservation.is_some());
    }

    /// Stage 4: makes datagrams of the packets that are left, as far as `datagrams` has room. False if
    /// none is left.
    pub fn seal(&mut self, data_path: &DataPath, memory: &[u8], datagrams: &mut [u8]) -> bool {
        self.datagrams.clear();
        let mut used = 0;
        loop {
            let before = self.datagrams.len();
            self.write_datagrams(data_path, memory, datagrams, &mut used);
            let Self { runs, datagrams: written, .. } = self;
            let (_, written) = written.split_at_mut_checked(before).unwrap_or_default();
            if written.is_empty() {
                return before > 0;
            }
            let mut parts = Parts::new(datagrams);
            seal_batch(written.iter_mut().filter_map(|datagram| {
                let reservation = runs.get(datagram.run)?.reservation.as_ref()?;
                let SealedDatagram { bytes, counter, is_sealed, .. } = datagram;
                let (keypair, datagram) = (&*reservation.keypair, parts.take(bytes.clone())?);
                Some(SealJob { keypair, counter: *counter, datagram, is_sealed })
            }));
            // What is not sealed is plaintext, and must not be sent.
            let unsealed = written.iter().position(|datagram| !datagram.is_sealed);
            debug_assert_eq!(unsealed, None, "lengths are checked, and ranges ascend");
            if let Some(unsealed) = unsealed {
                self.datagrams.truncate(before + unsealed);
                return before + unsealed > 0;
            }
        }
    }

    /// Writes the next few packets to where they are sealed in place.
    fn write_datagrams(
        &mut self,
        data_path: &DataPath,
        memory: &[u8],
        datagrams: &mut [u8],
        used: &mut usize,
    ) {
        let Self { packets, runs, datagrams: sealed, next, max_datagrams } = self;
        let most = (*max_datagrams).min(sealed.len() + SEALED_AT_ONCE);
        while let Some(run) = runs.get(next.run)
            && sealed.len() < most
        {
            let (Some(reservation), Some(packet)) =
                (&run.reservation, run.packet(packets, next.packet))
            else {
                *next = Position { run: next.run + 1, ..Position::default() };
                continue;
            };
            if next.segment >= packet.count() {
                (next.packet, next.segment) = (next.packet + 1, 0);
                continue;
            }
            let room = datagrams.get_mut(*used..).unwrap_or_default();
            match write_datagram(&packet, next.segment, data_path, memory, room) {
                Ok(len) => {
                    let bytes = *used..*used + len;
                    *used = bytes.end;
                    let counter = reservation.first_counter + next.counter;
                    sealed.push(SealedDatagram {
                        bytes,
                        ecn: packet.ecn(),
                        run: next.run,
                        counter,
                        is_sealed: false,
                    });
                }
                Err(NotWritten::NoRoom) if *used > 0 => return,
                Err(NotWritten::NoRoom) => data_path.drops.add(DropCause::TooLong, 1),
                Err(NotWritten::Dropped(cause)) => data_path.drops.add(cause, 1),
            }
            next.segment += 1;
            next.counter += 1;
        }
    }

    /// Stage 5: calls `send` with the datagrams of each run, in order; it returns the bytes that the socket
    /// took.
    pub fn send(&mut self, mut send: impl FnMut(&Peer, &Endpoint, &[SealedDatagram]) -> usize) {
        let mut rest = self.datagrams.as_slice();
        while let [first, ..] = rest {
            let same = rest.iter().take_while(|datagram| datagram.run == first.run).count();
            let (of_run, others) = rest.split_at(same);
            rest = others;
            let run = self.runs.get_mut(first.run);
            let Some(run) = present(run, "a datagram is of a run of its batch") else { return };
            let reservation = present(run.reservation.as_ref(), "its nonces were reserved");
            let Some(reservation) = reservation else { return };
            run.sent += send(&run.peer, &reservation.endpoint, of_run);
        }
    }

    /// Counts the bytes sent, and empties the batch.
    pub fn clear(&mut self) {
        for run in self.runs.drain(..) {
            if run.sent > 0 {
                run.peer.add_tx_bytes(run.sent as u64);
            }
        }
        self.packets.clear();
        self.datagrams.clear();
        self.next = Position::default();
    }
}

/// Stages each segment of a packet. Returns how many packets the queue dropped.
fn stage<S: Segmentation>(
    packet: &RoutedPacket<S>,
    memory: &[u8],
    scratch: &mut [u8],
    staged: &mut StagedPackets,
    data_path: &DataPath,
) -> usize {
    let queued = Queued::Routed(packet);
    let mut dropped = 0;
    for number in 0..packet.segments.count() {
        let segment = scratch.get_mut(..packet.segments.len_of(number));
        let written = segment.and_then(|segment| {
            queued.write(memory, number, segment)?;
            Some(&*segment)
        });
        match written {
            Some(segment) => dropped += staged.stage_packet(segment),
            None => data_path.drops.add(DropCause::OutboundMalformed, 1),
        }
    }
    dropped
}

/// Why no datagram was written.
enum NotWritten {
    /// It is longer than what is left of the memory for datagrams.
    NoRoom,
    /// The packet cannot be sent at all.
    Dropped(DropCause),
}

/// Writes a segment and its padding to the start of `room`, behind space for the header and before space for
/// the tag. Returns the length of the datagram.
fn write_datagram<S: Segmentation>(
    packet: &Queued<'_, S>,
    number: usize,
    data_path: &DataPath,
    memory: &[u8],
    room: &mut [u8],
) -> Result<usize, NotWritten> {
    let (len, mtu) = packet.len_of(number, data_path);
    let datagram_len = datagram_len(len, mtu);
    if datagram_len - TRANSPORT_HEADER_LEN - TAG_LEN > MAX_INNER_LEN {
        return Err(NotWritten::Dropped(DropCause::TooLong));
    }
    let datagram = room.get_mut(..datagram_len).ok_or(NotWritten::NoRoom)?;
    let body = datagram.get_mut(TRANSPORT_HEADER_LEN..datagram_len - TAG_LEN).unwrap_or_default();
    let (segment, padding) = body.split_at_mut_checked(len).unwrap_or_default();
    if packet.write(memory, number, segment).is_none() {
        datagram.fill(0);
        return Err(NotWritten::Dropped(DropCause::OutboundMalformed));
    }
    padding.fill(0);
    Ok(datagram_len)
}

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

    /// The MTU that bounds the padding of a staged packet, which may be empty.
    fn mtu_of(&self, packet: &[u8]) -> usize {
        InnerPacket::parse(packet)
            .map_or_else(|| self.mtu(), |inner| self.mtu_towards(inner.destination, inner.len))
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
        let vm_generation_changed = reservation.is_some() && self.vm_generation_changed();
        match reservation {
            Some(reservation) if vm_generation_changed => {
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
                    self.initiate_for_staged(peer, now);
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
            self.initiate_rekey(peer, now);
        }
    }

    /// Requests an initiation for packets that wait for one, unless it is under way. If it may not be sent
    /// yet, the control thread schedules it.
    ///
    /// While a retransmission is scheduled, its timer sends the initiation. The kernel also sends it for
    /// the first packet after REKEY_TIMEOUT, without jitter. If both ends have steady traffic and their
    /// initiations cross, they would cross again after each REKEY_TIMEOUT.
    fn initiate_for_staged(&self, peer: &Peer, now: Instant) {
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
    pub(crate) fn initiate_rekey(&self, peer: &Peer, now: Instant) {
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
