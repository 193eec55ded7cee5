//! From the TUN device to the network, by the stages of [`packets`](crate::packets).

use crate::drops::Drops;
use crate::packets::flow_queues::{Quantum, ReadyQueues};
use crate::packets::memory;
use crate::packets::offload::{Segments, VNET_HDR_LEN, VnetHeader};
use crate::packets::tun::{self, MAX_FRAME_LEN, Read, Tun};
use crate::packets::udp::{Datagrams, MAX_SEGMENTS, MAX_SEND, UdpSockets};
use std::sync::Arc;
use wgsep_proto::invariant::{part, present};
use wgsep_proto::path::data_path::{AllowedIpTable, DataPath};
use wgsep_proto::path::outbound::{self, SealedDatagram, Segmentation};
use wgsep_proto::session::peer::Peer;
use wgsep_proto::wire::icmp::MAX_ERROR_LEN;
use wgsep_proto::{DropCause, Instant};

/// Most packets that are read under one source lock.
const MAX_READS: usize = 256;
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

impl Segmentation for Segments {
    fn count(&self) -> usize {
        self.count()
    }

    fn len_of(&self, number: usize) -> usize {
        self.len_of(number)
    }

    fn write(&self, packet: &[u8], number: usize, segment: &mut [u8]) -> Option<()> {
        self.write(packet, number, segment)
    }
}

/// Packets from the TUN device, and the datagrams that they become, in memory that is allocated once.
pub(crate) struct TunBatch {
    packets: outbound::OutboundBatch<Segments>,
    /// Frames of the TUN device, end to end.
    frames: Box<[u8]>,
    used: usize,
    /// Datagrams, end to end.
    datagrams: Box<[u8]>,
}

/// What stage 2 looks a packet's peer up in.
pub(crate) struct Routing<'a> {
    pub(crate) data_path: &'a DataPath,
    pub(crate) drops: Drops<'a>,
    pub(crate) allowed_ips: &'a AllowedIpTable,
    pub(crate) now: Instant,
}

/// The TUN device was deleted.
#[derive(Debug)]
pub(crate) struct DeviceGone;

impl TunBatch {
    /// An empty batch.
    pub(crate) fn new() -> Self {
        Self {
            packets: outbound::OutboundBatch::with_capacity(MAX_PACKETS, MAX_DATAGRAMS),
            frames: memory(PACKETS_LEN),
            used: 0,
            datagrams: memory(DATAGRAMS_LEN),
        }
    }

    /// True if nothing is to be sent.
    pub(crate) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// True if no other packet fits.
    pub(crate) fn is_full(&mut self) -> bool {
        self.spare_capacity().is_none()
    }

    /// Stage 3 for a peer whose staged packets can be sent, before any packet is read. Returns how many
    /// they are.
    pub(crate) fn reserve_staged(
        &mut self,
        data_path: &DataPath,
        peer: Arc<Peer>,
        now: Instant,
    ) -> usize {
        self.packets.reserve_staged(data_path, peer, now)
    }

    /// Stages 1 and 2: reads until no queue has a packet left or the batch is full, from `next_queue` on.
    ///
    /// # Errors
    /// If the device was deleted.
    pub(crate) fn read(
        &mut self,
        tun: &Tun,
        mut ready: ReadyQueues,
        next_queue: &mut usize,
        routing: &Routing<'_>,
    ) -> Result<(), DeviceGone> {
        // Bounded even where no packet is kept: a flood of packets without a route must not delay
        // the others.
        let mut reads = 0;
        while let Some(queue) = ready.next_from(*next_queue) {
            *next_queue = queue + 1;
            let mut quantum = Quantum::new();
            while !quantum.is_spent() {
                let Some(buffer) = self.spare_capacity().filter(|_| reads < MAX_READS) else {
                    return Ok(());
                };
                reads += 1;
                match tun.read(queue, buffer) {
                    Read::Packet(header, len) => {
                        quantum.consume(len);
                        self.route(tun, &header, len, routing);
                    }
                    Read::Malformed => {
                        routing.drops.add(DropCause::OutboundMalformed, 1);
                    }
                    Read::Empty => {
                        ready.remove(queue);
                        break;
                    }
                    Read::Gone => return Err(DeviceGone),
                }
            }
        }
        Ok(())
    }

    /// Stage 2: keeps the packet of `len` bytes that was read last, or answers that it has no peer.
    fn route(&mut self, tun: &Tun, header: &VnetHeader, len: usize, routing: &Routing<'_>) {
        let &Routing { data_path, drops, allowed_ips, now } = routing;
        let Self { packets, frames, used, .. } = self;
        let bytes = *used + VNET_HDR_LEN..*used + VNET_HDR_LEN + len;
        let segments = |packet: &[u8]| Segments::new(header, packet);
        match packets.route(data_path, allowed_ips, frames, bytes.clone(), segments) {
            Ok(end) => *used = end,
            Err(cause) => {
                let packet = part(frames, bytes);
                answer_unreachable(data_path, drops, tun, cause, packet, now);
            }
        }
    }

    /// The buffer for the next frame; `None` when the batch is full.
    fn spare_capacity(&mut self) -> Option<&mut [u8]> {
        if self.packets.len() >= MAX_PACKETS {
            return None;
        }
        self.frames.get_mut(self.used..).filter(|spare| spare.len() >= MAX_FRAME_LEN)
    }

    /// Stage 3.
    pub(crate) fn reserve_nonces(&mut self, data_path: &DataPath, now: Instant) {
        self.packets.reserve_nonces(data_path, &self.frames, &mut self.datagrams, now);
    }

    /// Stage 4: seals the packets that are left, as far as the datagrams fit. False if none is left.
    pub(crate) fn seal(&mut self, data_path: &DataPath) -> bool {
        self.packets.seal(data_path, &self.frames, &mut self.datagrams)
    }

    /// Stage 5: sends the sealed datagrams, those that can be segments of one send together.
    pub(crate) fn send(&mut self, sockets: &UdpSockets, drops: Drops<'_>, now: Instant) {
        let Self { packets, datagrams, .. } = self;
        packets.send(|peer, endpoint, mut rest| {
            let mut sent = 0;
            while let [first, ..] = rest {
                let (group, others) = rest.split_at(segments(rest));
                rest = others;
                let end = group.last().map_or(first.bytes.end, |last| last.bytes.end);
                let datagrams = Datagrams {
                    payload: part(datagrams, first.bytes.start..end),
                    segment_len: first.bytes.len(),
                    traffic_class: first.ecn.encapsulated().bits(),
                };
                sent += sockets.send(peer, endpoint, &datagrams, drops, now);
            }
            sent
        });
    }

    /// Counts the bytes sent, and empties the batch.
    pub(crate) fn clear(&mut self) {
        self.packets.clear();
        self.used = 0;
    }
}

/// Sends an ICMP error for a packet whose destination is unreachable, if `cause` says so.
fn answer_unreachable(
    data_path: &DataPath,
    drops: Drops<'_>,
    tun: &Tun,
    cause: DropCause,
    packet: &[u8],
    now: Instant,
) {
    let mut frame = [0; VNET_HDR_LEN + MAX_ERROR_LEN];
    let split = frame.split_at_mut_checked(VNET_HDR_LEN);
    let Some((_, error)) = present(split, "the frame is longer than its header") else { return };
    let Some(len) = data_path.unreachable(cause, packet, now, error) else { return };
    if let Err(error) = tun.write(part(&frame, 0..VNET_HDR_LEN + len)) {
        drops.add(tun::cause_of(&error), 1);
    }
}

/// Number of datagrams at the front that can be segments of one send: equal in length and class, the last
/// may be shorter.
fn segments(datagrams: &[SealedDatagram]) -> usize {
    let Some(first) = datagrams.first() else { return 0 };
    let (mut count, mut total, mut previous) = (0, 0, first.bytes.len());
    for datagram in datagrams.iter().take(MAX_SEGMENTS) {
        let len = datagram.bytes.len();
        let fits = previous == first.bytes.len()
            && len <= previous
            && datagram.ecn == first.ecn
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
