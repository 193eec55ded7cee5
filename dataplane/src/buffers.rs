//! Batches of packets on their way, and the memory they live in: allocated once, reused for ever.

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

/// Bytes of packets after which a worker takes no more out of the TUN device: short of the longest
/// super-packet, so that one of those goes by itself and small packets wait for one at most.
const ENOUGH_LEN: usize = 49_152;
/// Bytes of the packets that a worker takes out of the TUN device at once.
const PACKETS_LEN: usize = ENOUGH_LEN + MAX_FRAME_LEN;
/// Most packets and super-packets that it takes at once.
const MAX_PACKETS: usize = 128;
/// Bytes that one batch sends at once: two of the longest sends.
const DATAGRAMS_LEN: usize = 2 * 65_536;
/// Most datagrams that one batch sends at once; more would have to be shorter than a handshake.
const MAX_DATAGRAMS: usize = 1024;
/// Most times that a worker reads a socket at once.
const MAX_RECEIVES: usize = 64;
/// Room for the longest datagram, or as many as the kernel joins.
const RECEIVE_ROOM: usize = 65_536;
/// Bytes that a worker reads from a socket at once: twice what the kernel joins, and some small ones
/// between. Four times is no faster, and makes a small packet among large ones wait longer.
const RECEIVED_LEN: usize = 2 * RECEIVE_ROOM + 4096;

fn storage(len: usize) -> Box<[u8]> {
    vec![0; len].into_boxed_slice()
}

/// Packets on their way out: as they were read, and as the datagrams they become.
pub(crate) struct OutboundBatch {
    /// Frames of the TUN device, end to end.
    frames: Box<[u8]>,
    used: usize,
    packets: Vec<Outgoing>,
    runs: Vec<Run>,
    /// Datagrams, end to end.
    datagrams: Box<[u8]>,
    sealed: Vec<Sealed>,
    next: Next,
}

/// A packet or super-packet that lies among the frames.
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
struct Run {
    peer: Arc<Peer>,
    packets: Range<usize>,
    /// `None` until nonces are reserved, and for packets that were staged or dropped instead.
    reservation: Option<NonceReservation>,
    /// Packets staged before, sealed, each with its traffic class. They go first.
    staged: Vec<(Vec<u8>, u8)>,
    /// Bytes that went.
    sent: usize,
}

/// A datagram that can go.
struct Sealed {
    bytes: Range<usize>,
    ecn: Ecn,
    run: usize,
}

/// What is sealed next.
#[derive(Default)]
struct Next {
    run: usize,
    packet: usize,
    segment: usize,
}

impl Run {
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
            next: Next::default(),
        }
    }

    /// Where the next frame goes; `None` when the batch is full.
    pub(crate) fn room(&mut self) -> Option<&mut [u8]> {
        if self.packets.len() >= MAX_PACKETS {
            return None;
        }
        self.frames.get_mut(self.used..).filter(|room| room.len() >= MAX_FRAME_LEN)
    }

    /// The packet of `len` bytes in the frame that was put into [`Self::room`].
    pub(crate) fn latest(&self, len: usize) -> &[u8] {
        let start = self.used + VNET_HDR_LEN;
        self.frames.get(start..start + len).unwrap_or_default()
    }

    /// Keeps the latest packet, for `peer`. False, and it is not kept, if it is not what its
    /// `header` says.
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
            _ => self.runs.push(Run::new(Arc::clone(peer), at..at + 1, None)),
        }
        true
    }

    /// Adds staged packets that can go now.
    pub(crate) fn add_staged(&mut self, peer: Arc<Peer>, reservation: NonceReservation) {
        let at = self.packets.len();
        self.runs.push(Run::new(peer, at..at, Some(reservation)));
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

    /// Splits and encrypts what is left, or as much of it as there is room for. False if nothing was
    /// left.
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
                    let place = used..used + len;
                    let Some(datagram) = datagrams.get_mut(place.clone()) else { return true };
                    if sealed.len() >= MAX_DATAGRAMS {
                        return true;
                    }
                    match packet.seal(frames, next.segment, &reservation.keypair, datagram) {
                        Ok(()) => {
                            sealed.push(Sealed { bytes: place, ecn: packet.ecn, run: next.run });
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

    /// Sends what is sealed, in order.
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

    /// Counts what went, and forgets everything.
    pub(crate) fn clear(&mut self) {
        for run in self.runs.drain(..) {
            if run.sent > 0 {
                run.peer.add_tx_bytes(run.sent as u64);
            }
        }
        self.used = 0;
        self.packets.clear();
        self.sealed.clear();
        self.next = Next::default();
    }
}

impl Outgoing {
    /// Puts each segment into the queue of packets that wait for a keypair, by way of `scratch`.
    /// Returns how many packets fell out of the queue.
    fn stage(
        &self,
        frames: &[u8],
        scratch: &mut [u8],
        staged: &mut StagedPackets,
        data_path: &DataPath,
    ) -> usize {
        let Some(packet) = frames.get(self.packet.clone()) else { return 0 };
        let mut stage_one = |number| {
            let place = scratch.get_mut(..self.segments.len_of(number))?;
            self.segments.write(packet, number, place)?;
            Some(staged.stage_packet(place))
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
    /// The cause, and nothing is left of the segment: its headers are not what the TUN device said, or no datagram
    /// is as long.
    fn seal(
        &self,
        frames: &[u8],
        number: usize,
        keypair: &Keypair,
        datagram: &mut [u8],
    ) -> Result<(), DropCause> {
        let len = self.segments.len_of(number);
        let written = frames.get(self.packet.clone()).and_then(|packet| {
            let place = datagram.get_mut(TRANSPORT_HEADER_LEN..TRANSPORT_HEADER_LEN + len)?;
            self.segments.write(packet, number, place)
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

/// How many of the datagrams at the front can go as segments of one send: to one peer, equal in
/// length and class, the last may be shorter.
fn segments(datagrams: &[Sealed]) -> usize {
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
        let place = datagram.get_mut(TRANSPORT_HEADER_LEN..TRANSPORT_HEADER_LEN + packet.len())?;
        place.copy_from_slice(&packet);
        let sealed = seal(&reservation.keypair, counter, &mut datagram, packet.len());
        if !sealed {
            data_path.drops.add(DropCause::SendTooLong, 1);
        }
        sealed.then_some((datagram, class))
    };
    staged.into_iter().zip(reservation.first_counter..).filter_map(seal_one).collect()
}

/// Datagrams on their way in.
pub(crate) struct InboundBatch {
    storage: Box<[u8]>,
    used: usize,
    /// Reads so far, those whose datagram was not kept included: what a flood sends must not hold the
    /// source, whatever becomes of it.
    reads: usize,
    /// As received, each maybe of several segments.
    pub(crate) received: Vec<Arrived>,
    /// What opened, in order.
    pub(crate) opened: Vec<Opened>,
    /// Who sent what opened; `opened` points here.
    pub(crate) sessions: Vec<(u32, Arc<Peer>, Arc<Keypair>)>,
}

/// What one read of a socket gave.
pub(crate) struct Arrived {
    pub(crate) bytes: Range<usize>,
    pub(crate) segment_len: usize,
    pub(crate) endpoint: Endpoint,
    pub(crate) ecn: Ecn,
}

/// A transport message that opened.
pub(crate) struct Opened {
    /// The plaintext.
    pub(crate) plaintext: Range<usize>,
    /// Which of the sessions.
    pub(crate) session: usize,
    /// Its counter.
    pub(crate) counter: u64,
    /// Which of `received` it came in.
    pub(crate) arrived: usize,
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

    /// Where the next read goes; `None` when the batch is full.
    pub(crate) fn room(&mut self) -> Option<&mut [u8]> {
        if self.reads >= MAX_RECEIVES {
            return None;
        }
        self.storage.get_mut(self.used..).filter(|room| room.len() >= RECEIVE_ROOM)
    }

    /// Counts a read whose datagram is not kept.
    pub(crate) const fn discard(&mut self) {
        self.reads += 1;
    }

    /// Keeps what a read put into [`Self::room`].
    pub(crate) fn keep(&mut self, datagram: &crate::sys::Datagram) {
        self.reads += 1;
        let end = self.used + datagram.len;
        self.received.push(Arrived {
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

    /// All the bytes, with what points into them.
    pub(crate) fn parts(&mut self) -> (&mut [u8], &[Arrived], &[Opened], &Sessions) {
        (&mut self.storage, &self.received, &self.opened, &self.sessions)
    }

    /// True if nothing came.
    pub(crate) fn is_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// Forgets everything.
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
            let fits = batch.room().is_some();
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
        while batch.room().is_some() && reads < 10_000 {
            batch.discard();
            reads += 1;
        }
        assert_eq!((reads, batch.is_empty()), (MAX_RECEIVES, true));
        batch.clear();
        assert!(batch.room().is_some());
    }
}
