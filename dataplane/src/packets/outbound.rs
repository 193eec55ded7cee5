//! From the TUN device to the network, by the stages of [`packets`](crate::packets).

use crate::clock;
use crate::packets::memory;
use crate::packets::offload::{Segments, VNET_HDR_LEN, VnetHeader};
use crate::packets::tun::{self, MAX_FRAME_LEN, Read, Tun};
use crate::packets::udp::{Datagrams, MAX_SEGMENTS, MAX_SEND, UdpSockets};
use crate::workers::flow_queues::{Quantum, ReadyQueues};
use crate::workers::shared::Shared;
use crate::workers::worker::Worker;
use std::sync::Arc;
use wgsep_proto::data_path::{DataPath, DropCause};
use wgsep_proto::icmp::MAX_ERROR_LEN;
use wgsep_proto::path::outbound::{self, SealedDatagram, Segmentation};
use wgsep_proto::time::Instant;

/// Most packets that are read under one source lock.
const MAX_READS: usize = 256;
/// Staged packets, and peers, after which no more are taken under one source lock.
pub(crate) const MAX_STAGED: usize = 256;
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
pub(crate) struct OutboundBatch {
    packets: outbound::OutboundBatch<Segments>,
    /// Frames of the TUN device, end to end.
    frames: Box<[u8]>,
    used: usize,
    /// Datagrams, end to end.
    datagrams: Box<[u8]>,
}

impl Worker {
    /// Carries a batch of packets out: the staged ones that can be sent now, and what the ready queues have.
    pub(crate) fn outbound(&mut self, ready: ReadyQueues) {
        let shared = Arc::clone(&self.shared);
        let Some(tun) = shared.tun.get() else { return };
        let Shared { data_path, outbound, .. } = &*shared;
        let mut batch = outbound.take_batch();
        let now;
        let number = {
            let mut source = outbound.lock_source();
            now = clock::instant();
            self.reserve_staged(&mut batch, now);
            self.read_packets(tun, ready, &mut batch, now);
            batch.reserve_nonces(data_path, now);
            (!batch.packets.is_empty()).then(|| source.assign())
        };
        let Some(number) = number else {
            batch.clear();
            outbound.return_batch(batch);
            self.wake_control_if_asked();
            return;
        };
        if batch.spare_capacity().is_none() {
            self.promote_follower();
        }
        batch.seal(data_path);
        let sockets = self.sockets.value();
        outbound.complete(number, batch, |batch| {
            batch.send(sockets, data_path, now);
            // Only a batch of packets of a few bytes each needs more than one round.
            while batch.seal(data_path) {
                batch.send(sockets, data_path, now);
            }
            batch.clear();
        });
        self.wake_control_if_asked();
    }

    /// Takes staged packets that can be sent now. If one batch cannot hold them all, it wakes this worker
    /// for the rest.
    pub(crate) fn reserve_staged(&self, batch: &mut OutboundBatch, now: Instant) {
        let mut work = 0;
        while work < MAX_STAGED {
            let Some(peer) = self.shared.take_flush() else { return };
            // A peer without staged packets counts too, because looking costs time.
            work += 1 + batch.packets.reserve_staged(&self.shared.data_path, peer, now);
        }
        self.shared.leader.wake(self.number);
    }

    /// Stages 1 and 2: reads until no queue has a packet left or the batch is full.
    fn read_packets(
        &mut self,
        tun: &Tun,
        mut ready: ReadyQueues,
        batch: &mut OutboundBatch,
        now: Instant,
    ) {
        // Bounded even where no packet is kept: a flood of packets without a route must not delay
        // the others.
        let mut reads = 0;
        while let Some(queue) = ready.next_from(self.next_queue) {
            self.next_queue = queue + 1;
            let mut quantum = Quantum::new();
            while !quantum.is_spent() {
                let Some(buffer) = batch.spare_capacity().filter(|_| reads < MAX_READS) else {
                    return;
                };
                reads += 1;
                match tun.read(queue, buffer) {
                    Read::Packet(header, len) => {
                        quantum.consume(len);
                        self.route(tun, batch, &header, len, now);
                    }
                    Read::Malformed => {
                        self.shared.data_path.drops.add(DropCause::OutboundMalformed, 1);
                    }
                    Read::Empty => {
                        ready.remove(queue);
                        break;
                    }
                    Read::Gone => {
                        self.shared.set_device_gone();
                        return;
                    }
                }
            }
        }
    }

    /// Stage 2: keeps the packet of `len` bytes that was read last, or answers that it has no peer.
    fn route(
        &self,
        tun: &Tun,
        batch: &mut OutboundBatch,
        header: &VnetHeader,
        len: usize,
        now: Instant,
    ) {
        let data_path = &self.shared.data_path;
        let OutboundBatch { packets, frames, used, .. } = batch;
        let bytes = *used + VNET_HDR_LEN..*used + VNET_HDR_LEN + len;
        let segments = |packet: &[u8]| Segments::new(header, packet);
        let allowed_ips = self.allowed_ips.value();
        match packets.route(data_path, allowed_ips, frames, bytes.clone(), segments) {
            Ok(end) => *used = end,
            Err(cause) => {
                let packet = frames.get(bytes).unwrap_or_default();
                answer_unreachable(data_path, tun, cause, packet, now);
            }
        }
    }
}

/// Sends an ICMP error for a packet whose destination is unreachable, if `cause` says so.
fn answer_unreachable(
    data_path: &DataPath,
    tun: &Tun,
    cause: DropCause,
    packet: &[u8],
    now: Instant,
) {
    let mut frame = [0; VNET_HDR_LEN + MAX_ERROR_LEN];
    let Some((_, error)) = frame.split_at_mut_checked(VNET_HDR_LEN) else { return };
    let Some(len) = data_path.unreachable(cause, packet, now, error) else { return };
    let Some(frame) = frame.get(..VNET_HDR_LEN + len) else { return };
    if let Err(error) = tun.write(frame) {
        data_path.drops.add(tun::cause_of(&error), 1);
    }
}

impl OutboundBatch {
    /// An empty batch.
    pub(crate) fn new() -> Self {
        Self {
            packets: outbound::OutboundBatch::with_capacity(MAX_PACKETS, MAX_DATAGRAMS),
            frames: memory(PACKETS_LEN),
            used: 0,
            datagrams: memory(DATAGRAMS_LEN),
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
    fn reserve_nonces(&mut self, data_path: &DataPath, now: Instant) {
        self.packets.reserve_nonces(data_path, &self.frames, &mut self.datagrams, now);
    }

    /// Stage 4: seals the packets that are left, as far as the datagrams fit. False if none is left.
    fn seal(&mut self, data_path: &DataPath) -> bool {
        self.packets.seal(data_path, &self.frames, &mut self.datagrams)
    }

    /// Stage 5: sends the sealed datagrams, those that can be segments of one send together.
    fn send(&mut self, sockets: &UdpSockets, data_path: &DataPath, now: Instant) {
        let Self { packets, datagrams, .. } = self;
        packets.send(|peer, endpoint, mut rest| {
            let mut sent = 0;
            while let [first, ..] = rest {
                let (group, others) = rest.split_at(segments(rest));
                rest = others;
                let end = group.last().map_or(first.bytes.end, |last| last.bytes.end);
                let datagrams = Datagrams {
                    payload: datagrams.get(first.bytes.start..end).unwrap_or_default(),
                    segment_len: first.bytes.len(),
                    traffic_class: first.ecn.encapsulated().bits(),
                };
                sent += sockets.send(peer, endpoint, &datagrams, data_path, now);
            }
            sent
        });
    }

    /// Counts the bytes sent, and empties the batch.
    fn clear(&mut self) {
        self.packets.clear();
        self.used = 0;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::KernelRandom;
    use nix::sys::epoll::EpollEvent;
    use wgsep_proto::config::{Configuration, PeerConfiguration};
    use wgsep_proto::control_plane::ControlPlane;
    use wgsep_proto::keys::PublicKey;
    use wgsep_proto::time::Now;

    #[test]
    fn staged_packets_of_many_peers_go_in_bounded_parts() {
        const PEERS: u32 = 1000;
        let now = Now { instant: Instant::from_nanos(1), wall: core::time::Duration::ZERO };
        let mut control = ControlPlane::new(Box::new(KernelRandom));
        let peer = |number: u32| {
            let mut key = [9; 32];
            key[..4].copy_from_slice(&number.to_le_bytes());
            PeerConfiguration::new(PublicKey::from_bytes(key))
        };
        let peers = (0..PEERS).map(peer).collect();
        control.configure(Configuration { peers, ..Configuration::default() }, now);
        let shared = Arc::new(Shared::new(Arc::clone(control.data_path()), 1).unwrap());
        shared.request_flushes(control.shared_peers().map(Arc::clone));
        let worker = Worker::new(0, Arc::clone(&shared));
        let mut batch = OutboundBatch::new();
        let mut parts = 0;
        while shared.has_flushes() {
            // Woken by the request, and after each part for the rest.
            let woken = shared.leader.wait(0, false, &mut [EpollEvent::empty()]);
            assert_eq!(woken, Ok(1));
            shared.leader.acknowledge(0);
            worker.reserve_staged(&mut batch, now.instant);
            parts += 1;
        }
        assert_eq!(parts, (PEERS as usize).div_ceil(MAX_STAGED));
    }

    /// The control thread may remove a peer between the lookup for a packet and its reservation.
    #[test]
    fn packets_to_a_peer_that_was_removed_meanwhile_are_counted() {
        let now = Now { instant: Instant::from_nanos(1), wall: core::time::Duration::ZERO };
        let mut control = ControlPlane::new(Box::new(KernelRandom));
        let peer = PeerConfiguration::new(PublicKey::from_bytes([9; 32]));
        let removal = PeerConfiguration { remove: true, ..peer.clone() };
        control.configure(Configuration { peers: vec![peer], ..Configuration::default() }, now);
        let looked_up = Arc::clone(control.shared_peers().next().unwrap());
        control.configure(Configuration { peers: vec![removal], ..Configuration::default() }, now);
        let data_path = control.data_path();
        assert!(data_path.reserve_nonces(&looked_up, 3, now.instant, |_| 0).is_none());
        assert_eq!(data_path.drops.count(DropCause::NoPeer), 3);
    }
}
