//! Batches of packets, in memory that is allocated once and reused.

use crate::offload::{Segments, VNET_HDR_LEN, VnetHeader};
use crate::tun::MAX_FRAME_LEN;
use crate::udp::{Datagrams, MAX_SEGMENTS, MAX_SEND, UdpSockets};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use wgsep_proto::data_path::{DataPath, DropCause};
use wgsep_proto::ip::{Ecn, InnerPacket};
use wgsep_proto::keypair::Keypair;
use wgsep_proto::messages::TRANSPORT_HEADER_LEN;
use wgsep_proto::peer::{Endpoint, Peer, StagedPackets};
use wgsep_proto::send::{NonceReservation, datagram_len, seal};
use wgsep_proto::time::Instant;

/// Bytes of packets after which a worker stops reading the TUN device: less than the longest
/// super-packet, so that one of those fills a batch and small packets wait for one at most.
const ENOUGH_LEN: usize = 49_152;
/// Capacity of a batch for packets from the TUN device, in bytes.
const PACKETS_LEN: usize = ENOUGH_LEN + MAX_FRAME_LEN;
/// Most packets and super-packets of one batch.
const MAX_PACKETS: usize = 128;
/// Bytes that one batch sends at once: two of the longest sends.
const DATAGRAMS_LEN: usize = 2 * 65_536;
/// Most datagrams that one batch sends at once; more would have to be shorter than a handshake.
const MAX_DATAGRAMS: usize = 1024;
/// Most times that a worker reads a socket at once.
const MAX_RECEIVES: usize = 64;
/// Length of the longest datagram, or of as many as the kernel coalesces.
const MAX_RECEIVE_LEN: usize = 65_536;
/// Bytes that a worker reads from a socket at once: twice what the kernel coalesces, and some small
/// datagrams between. Four times is no faster, and makes a small packet among large ones wait longer.
const RECEIVED_LEN: usize = 2 * MAX_RECEIVE_LEN + 4096;

fn storage(len: usize) -> Box<[u8]> {
    vec![0; len].into_boxed_slice()
}

/// Packets from the TUN device, and the datagrams that they become.
pub(crate) struct OutboundBatch {
    /// Frames of the TUN device, end to end.
    frames: Box<[u8]>,
    used: usize,
    packets: Vec<Outgoing>,
    runs: Vec<PeerRun>,
    /// Datagrams, end to end.
    datagrams: Box<[u8]>,
    sealed: Vec<SealedDatagram>,
    next: Position,
}

/// A packet or super-packet among the frames.
struct Outgoing {
    packet: Range<usize>,
    segments: Segments,
    ecn: Ecn,
    /// Bounds the padding of each segment.
    mtu: usize,
    /// Counter of the first segment.
    counter: u64,
}

/// Consecutive packets to one peer.
struct PeerRun {
    peer: Arc<Peer>,
    packets: Range<usize>,
    /// `None` until nonces are reserved, and for packets that were staged or dropped instead.
    reservation: Option<NonceReservation>,
    /// Packets that were staged before, sealed, each with its traffic class. They are sent first.
    staged: Vec<(Vec<u8>, u8)>,
    /// Bytes sent.
    sent: usize,
}

/// A sealed datagram.
struct SealedDatagram {
    bytes: Range<usize>,
    ecn: Ecn,
    run: usize,
}

/// The position of the segment that is sealed next.
#[derive(Default)]
struct Position {
    run: usize,
    packet: usize,
    segment: usize,
}

impl PeerRun {
    fn new(peer: Arc<Peer>, packets: Range<usize>, reservation: Option<NonceReservation>) -> Self {
        Self { peer, packets, reservation, staged: Vec::new(), sent: 0 }
    }
}

impl OutboundBatch {
    /// An empty batch.
    pub(crate) fn new() -> Self {
        Self {
            frames: storage(PACKETS_LEN),
            used: 0,
            packets: Vec::with_capacity(MAX_PACKETS),
            runs: Vec::with_capacity(MAX_PACKETS),
            datagrams: storage(DATAGRAMS_LEN),
            sealed: Vec::with_capacity(MAX_DATAGRAMS),
            next: Position::default(),
        }
    }

    /// The buffer for the next frame; `None` when the batch is full.
    pub(crate) fn spare_capacity(&mut self) -> Option<&mut [u8]> {
        if self.packets.len() >= MAX_PACKETS {
            return None;
        }
        self.frames.get_mut(self.used..).filter(|spare| spare.len() >= MAX_FRAME_LEN)
    }

    /// The packet of `len` bytes in the frame that was read into [`Self::spare_capacity`].
    pub(crate) fn latest(&self, len: usize) -> &[u8] {
        let start = self.used + VNET_HDR_LEN;
        self.frames.get(start..start + len).unwrap_or_default()
    }

    /// Keeps the latest packet, for `peer`. False, and it is not kept, if it contradicts its `header`.
    #[must_use]
    pub(crate) fn keep(
        &mut self,
        peer: &Arc<Peer>,
        header: &VnetHeader,
        inner: &InnerPacket,
        data_path: &DataPath,
    ) -> bool {
        let Some(segments) = Segments::new(header, self.latest(inner.len)) else { return false };
        let start = self.used + VNET_HDR_LEN;
        let end = start + inner.len;
        let at = self.packets.len();
        let mtu = data_path.mtu_towards(inner.destination, segments.len_of(0));
        let (packet, ecn) = (start..end, inner.ecn);
        self.packets.push(Outgoing { packet, segments, ecn, mtu, counter: 0 });
        self.used = end;
        match self.runs.last_mut() {
            Some(run) if Arc::ptr_eq(&run.peer, peer) && run.reservation.is_none() => {
                run.packets.end += 1;
            }
            _ => self.runs.push(PeerRun::new(Arc::clone(peer), at..at + 1, None)),
        }
        true
    }

    /// Adds staged packets that can be sent now.
    pub(crate) fn add_staged(&mut self, peer: Arc<Peer>, reservation: NonceReservation) {
        let at = self.packets.len();
        self.runs.push(PeerRun::new(peer, at..at, Some(reservation)));
    }

    /// Reserves nonces for each run, or stages it.
    pub(crate) fn reserve_nonces(&mut self, data_path: &DataPath, now: Instant) {
        let Self { frames, packets, runs, datagrams, .. } = self;
        for run in runs.iter_mut().filter(|run| run.reservation.is_none()) {
            let Some(packets) = packets.get_mut(run.packets.clone()) else { continue };
            let count = packets.iter().map(|packet| packet.segments.count()).sum();
            run.reservation = data_path.reserve_nonces(&run.peer, count, now, |staged| {
                let stage = |packet: &Outgoing| packet.stage(frames, datagrams, staged, data_path);
                packets.iter().map(stage).sum()
            });
            if let Some(reservation) = &run.reservation {
                let mut counter = reservation.first_counter + reservation.staged.len() as u64;
                for packet in packets {
                    packet.counter = counter;
                    counter += packet.segments.count() as u64;
                }
            }
        }
        runs.retain(|run| run.reservation.is_some());
    }

    /// True if nothing is to be sent.
    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Splits and seals the packets that are left, as far as the datagrams fit. False if none were left.
    pub(crate) fn seal(&mut self, data_path: &DataPath) -> bool {
        let Self { frames, packets, runs, datagrams, sealed, next, .. } = self;
        let mut used = 0;
        sealed.clear();
        let before = next.run;
        while let Some(run) = runs.get_mut(next.run) {
            let Some(reservation) = &mut run.reservation else { return false };
            if !reservation.staged.is_empty() {
                run.staged = seal_staged(reservation, data_path);
            }
            let of_run = packets.get(run.packets.clone()).unwrap_or_default();
            while let Some(packet) = of_run.get(next.packet) {
                while next.segment < packet.segments.count() {
                    let len = datagram_len(packet.segments.len_of(next.segment), packet.mtu);
                    let bytes = used..used + len;
                    let Some(datagram) = datagrams.get_mut(bytes.clone()) else { return true };
                    if sealed.len() >= MAX_DATAGRAMS {
                        return true;
                    }
                    match packet.seal(frames, next.segment, &reservation.keypair, datagram) {
                        Ok(()) => {
                            sealed.push(SealedDatagram { bytes, ecn: packet.ecn, run: next.run });
                            used += len;
                        }
                        Err(cause) => data_path.drops.add(cause, 1),
                    }
                    next.segment += 1;
                }
                next.segment = 0;
                next.packet += 1;
            }
            next.packet = 0;
            next.run += 1;
        }
        before < runs.len()
    }

    /// Sends the sealed datagrams, in order.
    pub(crate) fn send(&mut self, sockets: &UdpSockets, data_path: &DataPath, now: Instant) {
        for run in &mut self.runs {
            let Some(reservation) = &run.reservation else { continue };
            for (datagram, class) in run.staged.drain(..) {
                let datagrams = Datagrams {
                    payload: &datagram,
                    segment_len: datagram.len(),
                    traffic_class: class,
                };
                run.sent +=
                    sockets.send(&run.peer, &reservation.endpoint, &datagrams, data_path, now);
            }
        }
        let mut rest = self.sealed.as_slice();
        while let [first, ..] = rest {
            let (group, others) = rest.split_at(segments(rest));
            rest = others;
            let end = group.last().map_or(first.bytes.end, |last| last.bytes.end);
            let Some(payload) = self.datagrams.get(first.bytes.start..end) else { return };
            let Some(run) = self.runs.get_mut(first.run) else { return };
            let Some(reservation) = &run.reservation else { return };
            let datagrams = Datagrams {
                payload,
                segment_len: first.bytes.len(),
                traffic_class: first.ecn.encapsulated().bits(),
            };
            run.sent += sockets.send(&run.peer, &reservation.endpoint, &datagrams, data_path, now);
        }
    }

    /// Counts the bytes sent, and empties the batch.
    pub(crate) fn clear(&mut self) {
        for run in self.runs.drain(..) {
            if run.sent > 0 {
                run.peer.add_tx_bytes(run.sent as u64);
            }
        }
        self.used = 0;
        self.packets.clear();
        self.sealed.clear();
        self.next = Position::default();
    }
}

impl Outgoing {
    /// Stages each segment, which it copies by way of `scratch`. Returns how many packets the queue
    /// dropped.
    fn stage(
        &self,
        frames: &[u8],
        scratch: &mut [u8],
        staged: &mut StagedPackets,
        data_path: &DataPath,
    ) -> usize {
        let Some(packet) = frames.get(self.packet.clone()) else { return 0 };
        let mut stage_one = |number| {
            let segment = scratch.get_mut(..self.segments.len_of(number))?;
            self.segments.write(packet, number, segment)?;
            Some(staged.stage_packet(segment))
        };
        let dropped = (0..self.segments.count()).map(|number| {
            stage_one(number).unwrap_or_else(|| {
                data_path.drops.add(DropCause::OutboundMalformed, 1);
                0
            })
        });
        dropped.sum()
    }

    /// Makes a datagram of one segment.
    ///
    /// # Errors
    /// The drop cause, and `datagram` is zeroed: the headers contradict the TUN device's, or the segment is
    /// longer than any datagram.
    fn seal(
        &self,
        frames: &[u8],
        number: usize,
        keypair: &Keypair,
        datagram: &mut [u8],
    ) -> Result<(), DropCause> {
        let len = self.segments.len_of(number);
        let written = frames.get(self.packet.clone()).and_then(|packet| {
            let destination = datagram.get_mut(TRANSPORT_HEADER_LEN..TRANSPORT_HEADER_LEN + len)?;
            self.segments.write(packet, number, destination)
        });
        let sealed = match written {
            None => Err(DropCause::OutboundMalformed),
            Some(()) if seal(keypair, self.counter + number as u64, datagram, len) => Ok(()),
            Some(()) => Err(DropCause::SendTooLong),
        };
        if sealed.is_err() {
            datagram.fill(0);
        }
        sealed
    }
}

/// Number of datagrams at the front that can be segments of one send: to one peer, equal in
/// length and class, the last may be shorter.
fn segments(datagrams: &[SealedDatagram]) -> usize {
    let Some(first) = datagrams.first() else { return 0 };
    let (mut count, mut total, mut previous) = (0, 0, first.bytes.len());
    for datagram in datagrams.iter().take(MAX_SEGMENTS) {
        let len = datagram.bytes.len();
        let fits = previous == first.bytes.len()
            && len <= previous
            && datagram.ecn == first.ecn
            && datagram.run == first.run
            && total + len <= MAX_SEND;
        if !fits && count > 0 {
            break;
        }
        count += 1;
        total += len;
        previous = len;
    }
    count
}

/// Turns each staged packet into its datagram, with its traffic class.
fn seal_staged(reservation: &mut NonceReservation, data_path: &DataPath) -> Vec<(Vec<u8>, u8)> {
    let staged: VecDeque<Vec<u8>> = core::mem::take(&mut reservation.staged);
    let seal_one = |(packet, counter): (Vec<u8>, u64)| {
        let class = InnerPacket::parse(&packet).map_or(0, |inner| inner.ecn.encapsulated().bits());
        let mut datagram = vec![0; data_path.datagram_len(&packet)];
        let destination =
            datagram.get_mut(TRANSPORT_HEADER_LEN..TRANSPORT_HEADER_LEN + packet.len())?;
        destination.copy_from_slice(&packet);
        let sealed = seal(&reservation.keypair, counter, &mut datagram, packet.len());
        if !sealed {
            data_path.drops.add(DropCause::SendTooLong, 1);
        }
        sealed.then_some((datagram, class))
    };
    staged.into_iter().zip(reservation.first_counter..).filter_map(seal_one).collect()
}

/// Received datagrams.
pub(crate) struct InboundBatch {
    storage: Box<[u8]>,
    used: usize,
    /// Reads so far, including those whose datagram was not kept, so that a flood of malformed datagrams
    /// does not hold the source lock for ever.
    reads: usize,
    /// The results of the reads, each maybe of several segments.
    pub(crate) received: Vec<Receipt>,
    /// The transport messages that opened, in order.
    pub(crate) opened: Vec<Opened>,
    /// The senders of `opened`, which refers to them by index.
    pub(crate) sessions: Vec<(u32, Arc<Peer>, Arc<Keypair>)>,
}

/// The result of one read of a socket.
pub(crate) struct Receipt {
    pub(crate) bytes: Range<usize>,
    pub(crate) segment_len: usize,
    pub(crate) endpoint: Endpoint,
    pub(crate) ecn: Ecn,
}

/// A transport message that opened.
pub(crate) struct Opened {
    /// The plaintext.
    pub(crate) plaintext: Range<usize>,
    /// Index of its sender among the sessions.
    pub(crate) session: usize,
    /// Its counter.
    pub(crate) counter: u64,
    /// Index of its read in `received`.
    pub(crate) receipt: usize,
}

impl InboundBatch {
    /// An empty batch.
    pub(crate) fn new() -> Self {
        Self {
            storage: storage(RECEIVED_LEN),
            used: 0,
            reads: 0,
            received: Vec::with_capacity(MAX_RECEIVES),
            opened: Vec::with_capacity(MAX_RECEIVES * MAX_SEGMENTS),
            sessions: Vec::with_capacity(MAX_RECEIVES),
        }
    }

    /// The buffer for the next read; `None` when the batch is full.
    pub(crate) fn spare_capacity(&mut self) -> Option<&mut [u8]> {
        if self.reads >= MAX_RECEIVES {
            return None;
        }
        self.storage.get_mut(self.used..).filter(|spare| spare.len() >= MAX_RECEIVE_LEN)
    }

    /// Counts a read whose datagram is not kept.
    pub(crate) const fn discard(&mut self) {
        self.reads += 1;
    }

    /// Keeps what was read into [`Self::spare_capacity`].
    pub(crate) fn keep(&mut self, datagram: &crate::sys::Datagram) {
        self.reads += 1;
        let end = self.used + datagram.len;
        self.received.push(Receipt {
            bytes: self.used..end,
            segment_len: datagram.segment_len.max(1),
            endpoint: datagram.endpoint,
            ecn: Ecn::of_traffic_class(datagram.traffic_class),
        });
        self.used = end;
    }

    /// The bytes of a range.
    pub(crate) fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        self.storage.get_mut(range).unwrap_or_default()
    }

    /// All the bytes, with the ranges and indices that refer to them.
    pub(crate) fn parts(&mut self) -> (&mut [u8], &[Receipt], &[Opened], &Sessions) {
        (&mut self.storage, &self.received, &self.opened, &self.sessions)
    }

    /// True if nothing was received.
    pub(crate) fn is_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// Empties the batch.
    pub(crate) fn clear(&mut self) {
        (self.used, self.reads) = (0, 0);
        self.received.clear();
        self.opened.clear();
        self.sessions.clear();
    }
}

/// Receiver index, peer and keypair of the senders in a batch.
pub(crate) type Sessions = [(u32, Arc<Peer>, Arc<Keypair>)];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Datagram;

    #[test]
    fn small_datagrams_between_do_not_keep_out_the_second_of_the_longest() {
        let mut batch = InboundBatch::new();
        let endpoint = Endpoint::new(([192, 0, 2, 1], 7).into());
        let mut keep = |len| {
            let fits = batch.spare_capacity().is_some();
            if fits {
                batch.keep(&Datagram { len, segment_len: len, endpoint, traffic_class: 0 });
            }
            fits
        };
        assert!([148, 148, MAX_SEND, 148, 1452, MAX_SEND].into_iter().all(&mut keep));
        assert!(!keep(148), "no more than two of them");
    }

    #[test]
    fn datagrams_that_are_not_kept_fill_a_batch_as_well() {
        let mut batch = InboundBatch::new();
        let mut reads = 0;
        while batch.spare_capacity().is_some() && reads < 10_000 {
            batch.discard();
            reads += 1;
        }
        assert_eq!((reads, batch.is_empty()), (MAX_RECEIVES, true));
        batch.clear();
        assert!(batch.spare_capacity().is_some());
    }
}
