//! Batches of packets on their way, and the memory they live in: allocated once, reused for ever.

use crate::udp::{MAX_SEGMENTS, MAX_SEND, UdpSockets};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use wgsep_proto::data_path::DataPath;
use wgsep_proto::ip::{Ecn, InnerPacket};
use wgsep_proto::keypair::Keypair;
use wgsep_proto::messages::TRANSPORT_HEADER_LEN;
use wgsep_proto::peer::{Endpoint, Peer};
use wgsep_proto::send::{Lease, datagram_len, seal};

/// Bytes of one batch: several of the longest packets, or [`MAX_PACKETS`] of the usual.
const STORAGE_LEN: usize = 4 * 65_536;
/// Most packets that a worker takes out of the TUN device at once.
pub(crate) const MAX_PACKETS: usize = 128;
/// Room that the longest packet may need: with padding, header and tag.
const ROOM: usize = 65_536 + 64;
/// Most times that a worker reads a socket at once.
pub(crate) const MAX_RECEIVES: usize = 64;
/// Room for the longest datagram, or as many as the kernel joins.
const RECEIVE_ROOM: usize = 65_536;

fn storage() -> Box<[u8]> {
    vec![0; STORAGE_LEN].into_boxed_slice()
}

/// Packets on their way out, laid end to end as the datagrams they become.
pub(crate) struct OutboundBatch {
    storage: Box<[u8]>,
    used: usize,
    packets: Vec<Outgoing>,
    runs: Vec<Run>,
}

/// A packet that lies in the storage.
struct Outgoing {
    datagram: Range<usize>,
    packet_len: usize,
    ecn: Ecn,
    counter: u64,
}

/// Consecutive packets to one peer.
struct Run {
    peer: Arc<Peer>,
    packets: Range<usize>,
    /// `None` until leased, and for packets that were staged or dropped instead.
    lease: Option<Lease>,
    /// Packets staged before, sealed, each with its traffic class. They go first.
    staged: Vec<(Vec<u8>, u8)>,
}

impl Run {
    fn new(peer: Arc<Peer>, packets: Range<usize>, lease: Option<Lease>) -> Self {
        Self { peer, packets, lease, staged: Vec::new() }
    }
}

impl OutboundBatch {
    /// An empty batch.
    pub(crate) fn new() -> Self {
        Self {
            storage: storage(),
            used: 0,
            packets: Vec::with_capacity(MAX_PACKETS),
            runs: Vec::with_capacity(MAX_PACKETS),
        }
    }

    /// Where the next packet goes, [`TRANSPORT_HEADER_LEN`] bytes in; `None` when the batch is full.
    pub(crate) fn room(&mut self) -> Option<&mut [u8]> {
        if self.packets.len() >= MAX_PACKETS {
            return None;
        }
        self.storage.get_mut(self.used..).filter(|room| room.len() >= ROOM)
    }

    /// The packet of `len` bytes that was put into [`Self::room`].
    pub(crate) fn latest(&self, len: usize) -> &[u8] {
        let start = self.used + TRANSPORT_HEADER_LEN;
        self.storage.get(start..start + len).unwrap_or_default()
    }

    /// Keeps the latest packet, for `peer`.
    pub(crate) fn keep(&mut self, peer: &Arc<Peer>, inner: &InnerPacket, mtu: usize) {
        let end = self.used + datagram_len(inner.len, mtu);
        let at = self.packets.len();
        self.packets.push(Outgoing {
            datagram: self.used..end,
            packet_len: inner.len,
            ecn: inner.ecn,
            counter: 0,
        });
        self.used = end;
        match self.runs.last_mut() {
            Some(run) if Arc::ptr_eq(&run.peer, peer) && run.lease.is_none() => {
                run.packets.end += 1;
            }
            _ => self.runs.push(Run::new(Arc::clone(peer), at..at + 1, None)),
        }
    }

    /// Adds staged packets that can go now.
    pub(crate) fn add_staged(&mut self, peer: Arc<Peer>, lease: Lease) {
        let at = self.packets.len();
        self.runs.push(Run::new(peer, at..at, Some(lease)));
    }

    /// Takes a lease for each run, or stages it.
    pub(crate) fn lease(&mut self, data_path: &DataPath, now: wgsep_proto::time::Instant) {
        let Self { storage, packets, runs, .. } = self;
        for run in runs.iter_mut().filter(|run| run.lease.is_none()) {
            let Some(packets) = packets.get_mut(run.packets.clone()) else { continue };
            run.lease = data_path.lease(&run.peer, packets.len(), now, |staged| {
                let plain = packets.iter().filter_map(|packet| {
                    let start = packet.datagram.start + TRANSPORT_HEADER_LEN;
                    storage.get(start..start + packet.packet_len)
                });
                plain.map(|packet| staged.stage_packet(packet)).sum()
            });
            if let Some(lease) = &run.lease {
                let first = lease.first_counter + lease.staged.len() as u64;
                for (packet, counter) in packets.iter_mut().zip(first..) {
                    packet.counter = counter;
                }
            }
        }
        runs.retain(|run| run.lease.is_some());
    }

    /// True if nothing is to be sent.
    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Encrypts everything in place.
    pub(crate) fn seal(&mut self, data_path: &DataPath) {
        let Self { storage, packets, runs, .. } = self;
        for run in runs {
            let Some(lease) = &mut run.lease else { continue };
            run.staged = seal_staged(lease, data_path);
            for packet in packets.get(run.packets.clone()).unwrap_or_default() {
                let Some(datagram) = storage.get_mut(packet.datagram.clone()) else { continue };
                if !seal(&lease.keypair, packet.counter, datagram, packet.packet_len) {
                    // Cannot happen with the lengths laid out here; should it, no plaintext leaves.
                    datagram.fill(0);
                }
            }
        }
    }

    /// Sends everything in order and empties the batch.
    pub(crate) fn send(&mut self, sockets: &UdpSockets, data_path: &DataPath) {
        for run in &mut self.runs {
            let Some(lease) = &run.lease else { continue };
            let mut sent = 0;
            for (datagram, class) in &run.staged {
                sent += sockets.send(
                    &run.peer,
                    &lease.endpoint,
                    *class,
                    datagram,
                    datagram.len(),
                    data_path,
                );
            }
            let mut rest = self.packets.get(run.packets.clone()).unwrap_or_default();
            while let [first, ..] = rest {
                let count = segments(rest);
                let (group, others) = rest.split_at(count);
                rest = others;
                let end = group.last().map_or(first.datagram.end, |last| last.datagram.end);
                let Some(payload) = self.storage.get(first.datagram.start..end) else { continue };
                let class = first.ecn.encapsulated().bits();
                let segment_len = first.datagram.len();
                sent += sockets.send(
                    &run.peer,
                    &lease.endpoint,
                    class,
                    payload,
                    segment_len,
                    data_path,
                );
            }
            run.peer.add_tx_bytes(sent as u64);
        }
        self.clear();
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
        self.packets.clear();
        self.runs.clear();
    }
}

/// How many of the packets at the front can go as segments of one send: equal in length and class,
/// the last may be shorter.
fn segments(packets: &[Outgoing]) -> usize {
    let Some(first) = packets.first() else { return 0 };
    let (mut count, mut total, mut previous) = (0, 0, first.datagram.len());
    for packet in packets.iter().take(MAX_SEGMENTS) {
        let len = packet.datagram.len();
        let fits = previous == first.datagram.len()
            && len <= previous
            && packet.ecn == first.ecn
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
fn seal_staged(lease: &mut Lease, data_path: &DataPath) -> Vec<(Vec<u8>, u8)> {
    let staged: VecDeque<Vec<u8>> = core::mem::take(&mut lease.staged);
    let seal_one = |(packet, counter): (Vec<u8>, u64)| {
        let class = InnerPacket::parse(&packet).map_or(0, |inner| inner.ecn.encapsulated().bits());
        let mut datagram = vec![0; data_path.datagram_len(&packet)];
        let place = datagram.get_mut(TRANSPORT_HEADER_LEN..TRANSPORT_HEADER_LEN + packet.len())?;
        place.copy_from_slice(&packet);
        seal(&lease.keypair, counter, &mut datagram, packet.len()).then_some((datagram, class))
    };
    staged.into_iter().zip(lease.first_counter..).filter_map(seal_one).collect()
}

/// Datagrams on their way in.
pub(crate) struct InboundBatch {
    storage: Box<[u8]>,
    used: usize,
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
            storage: storage(),
            used: 0,
            received: Vec::with_capacity(MAX_RECEIVES),
            opened: Vec::with_capacity(MAX_RECEIVES * MAX_SEGMENTS),
            sessions: Vec::with_capacity(MAX_RECEIVES),
        }
    }

    /// Where the next read goes; `None` when the batch is full.
    pub(crate) fn room(&mut self) -> Option<&mut [u8]> {
        if self.received.len() >= MAX_RECEIVES {
            return None;
        }
        self.storage.get_mut(self.used..).filter(|room| room.len() >= RECEIVE_ROOM)
    }

    /// Keeps what a read put into [`Self::room`].
    pub(crate) fn keep(&mut self, datagram: &crate::sys::Datagram) {
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
        self.used = 0;
        self.received.clear();
        self.opened.clear();
        self.sessions.clear();
    }
}

/// Receiver index, peer and keypair of the senders in a batch.
pub(crate) type Sessions = [(u32, Arc<Peer>, Arc<Keypair>)];
