//! A worker thread, which processes a whole batch from the read to the write while it is in the cache.
//!
//! A worker that fills a batch promotes a follower (see `leader`) before the parallel steps. A follower
//! that is woken and has no batch runs crypto jobs (see `crypto_pool`).
//!
//! From the TUN device to the network, `outbound`:
//! 1. take the source lock; add staged packets that can be sent (sequential)
//! 2. read packets, a quantum from each ready queue; route each, and answer one without a route with an
//!    ICMP error (sequential)
//! 3. reserve nonces for each run of packets to one peer, or stage the run (sequential)
//! 4. split super-packets, seal each packet (parallel)
//! 5. send, in the order of sequence numbers
//!
//! From the network to the TUN device, `inbound`:
//! 1. take the source lock; read datagrams (sequential)
//! 2. parse; queue handshake messages for the control thread; look up keypairs; open (parallel)
//! 3. accept, coalesce super-packets, write to the TUN device, in the order of sequence numbers

use crate::buffers::{InboundBatch, Opened, OutboundBatch};
use crate::clock;
use crate::flow_queues::{Quantum, ReadyQueues};
use crate::leader::{FIRST_QUEUE, MAX_EVENTS, UDP, WAKE};
use crate::offload::{Coalesce, Coalescer, VNET_HDR_LEN, VnetHeader};
use crate::secret;
use crate::shared::{QueuedHandshake, Shared};
use crate::sys;
use crate::tun::{self, Lost, Read, Tun};
use crate::udp::UdpSockets;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use std::io;
use std::sync::Arc;
use wgsep_proto::data_path::{AllowedIpTable, DataPath, DropCause, Reader};
use wgsep_proto::icmp::MAX_ERROR_LEN;
use wgsep_proto::messages::{Message, TAG_LEN, TRANSPORT_HEADER_LEN};
use wgsep_proto::receive::Received;
use wgsep_proto::time::Instant;

/// Most packets that are read under one source lock.
const MAX_READS: usize = 256;

/// Staged packets, and peers, after which no more are taken under one source lock.
const MAX_STAGED: usize = 256;

/// A worker thread's own state.
pub(crate) struct Worker {
    number: usize,
    shared: Arc<Shared>,
    /// True while it is the one that waits for packets.
    is_leader: bool,
    allowed_ips: Reader<AllowedIpTable>,
    sockets: Reader<Arc<UdpSockets>>,
    /// The TUN device's queue that is read next.
    next_queue: usize,
    /// Empty between batches.
    coalescer: Coalescer,
    /// Number of requests to wipe the stack that it has served.
    wipes: u64,
}

impl Worker {
    /// Creates a worker; [`Self::run`] starts it.
    pub(crate) fn new(number: usize, shared: Arc<Shared>) -> Self {
        Self {
            number,
            is_leader: false,
            allowed_ips: shared.data_path.allowed_ips.reader(),
            sockets: shared.sockets.reader(),
            next_queue: 0,
            coalescer: Coalescer::new(Coalesce::default()),
            wipes: 0,
            shared,
        }
    }

    /// Processes events until the process exits.
    pub(crate) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut events = [EpollEvent::empty(); MAX_EVENTS];
        loop {
            if !self.is_leader && shared.leader.try_lead(self.number) {
                self.is_leader = true;
                // What was published meanwhile woke the previous leader, not this worker.
                self.refresh();
            }
            match shared.leader.wait(self.number, self.is_leader, &mut events) {
                Ok(ready) => {
                    let remains = self.work(events.get(..ready).unwrap_or_default());
                    if let Some(depth) = remains {
                        secret::wipe_stack(depth);
                    }
                }
                Err(nix::Error::EINTR) => {}
                Err(error) => {
                    tracing::error!(
                        "worker {}: epoll_wait: {error}; {}",
                        self.number,
                        wgsep_policy::remedy(error)
                    );
                    std::process::abort();
                }
            }
        }
    }

    /// Handles the events. Returns how deep the stack must be wiped afterwards, if at all. It is never
    /// inlined, so that what it leaves on the stack is below its caller.
    #[inline(never)]
    fn work(&mut self, events: &[EpollEvent]) -> Option<usize> {
        let woken = events.iter().any(|event| event.data() == WAKE);
        if woken {
            // Before looking, so that a later wake-up causes another look.
            self.shared.leader.acknowledge(self.number);
        }
        self.refresh();
        let mut ready = ReadyQueues::default();
        for event in events {
            match event.data() {
                WAKE => {}
                socket if socket == UDP[0] => self.inbound(0),
                socket if socket == UDP[1] => self.inbound(1),
                queue => self.queue_event(queue, event.events(), &mut ready),
            }
        }
        if !ready.is_empty() || woken && self.shared.has_flushes() {
            self.outbound(ready);
        }
        if !woken {
            return None;
        }
        let mut ran_jobs = false;
        if !self.is_leader {
            // Packets come first: while there is no leader, one may be waiting.
            while !self.shared.leader.is_vacant() && self.shared.crypto.run_one() {
                ran_jobs = true;
            }
        }
        let wipes = self.shared.wipes();
        if core::mem::replace(&mut self.wipes, wipes) != wipes {
            return Some(secret::WHOLE_STACK);
        }
        ran_jobs.then_some(secret::USUAL_DEPTH)
    }

    /// Takes over what the control thread has published.
    fn refresh(&mut self) {
        let Self { shared, allowed_ips, sockets, .. } = self;
        allowed_ips.refresh(&shared.data_path.allowed_ips);
        if sockets.refresh(&shared.sockets) {
            // It may be waiting for the old sockets to close, which frees their port.
            shared.wake_control();
        }
    }

    fn queue_event(&self, token: u64, flags: EpollFlags, ready: &mut ReadyQueues) {
        let number = usize::try_from(token - FIRST_QUEUE).unwrap_or(usize::MAX);
        if !flags.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
            ready.insert(number);
        } else if let Some(queue) = self.shared.tun.get().and_then(|tun| tun.queues().get(number)) {
            // Deleted: stop watching, or the error would be reported for ever.
            self.shared.leader.unwatch(queue);
            self.shared.set_device_gone();
        }
    }

    /// Has another worker read on, as more packets may be waiting than this one has read.
    fn promote_follower(&mut self) {
        if self.is_leader {
            self.is_leader = false;
            self.shared.leader.promote_follower();
        }
    }

    // ------------------------------------------------------------ out of the tunnel

    fn outbound(&mut self, ready: ReadyQueues) {
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
            (!batch.is_empty()).then(|| source.assign())
        };
        if batch.spare_capacity().is_none() {
            self.promote_follower();
        }
        match number {
            Some(number) => {
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
            }
            None => {
                batch.clear();
                outbound.return_batch(batch);
            }
        }
        if data_path.take_wake() {
            shared.wake_control();
        }
    }

    /// Takes staged packets that can be sent now. If one batch cannot hold them all, it wakes this worker
    /// for the rest.
    fn reserve_staged(&self, batch: &mut OutboundBatch, now: Instant) {
        let mut work = 0;
        while work < MAX_STAGED {
            let Some(peer) = self.shared.take_flush() else { return };
            // A peer without staged packets counts too, because looking costs time.
            work += 1;
            if let Some(reservation) = self.shared.data_path.reserve_nonces(&peer, 0, now, |_| 0) {
                work += reservation.staged.len();
                batch.add_staged(peer, reservation);
            }
        }
        self.shared.leader.wake(self.number);
    }

    /// Reads until no queue has a packet left or the batch is full.
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
                        self.keep_packet(tun, batch, &header, len, now);
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

    /// Keeps the packet that was read last, unless it has no route.
    fn keep_packet(
        &self,
        tun: &Tun,
        batch: &mut OutboundBatch,
        header: &VnetHeader,
        len: usize,
        now: Instant,
    ) {
        let data_path = &self.shared.data_path;
        let packet = batch.latest(len);
        match data_path.route(self.allowed_ips.value(), packet) {
            Ok((peer, inner)) => {
                if !batch.keep(peer, header, &inner, data_path) {
                    data_path.drops.add(DropCause::OutboundMalformed, 1);
                }
            }
            Err(cause) => self.refuse(tun, cause, packet, now),
        }
    }

    /// Sends an ICMP error for a packet whose destination is unreachable, if `cause` says so.
    fn refuse(&self, tun: &Tun, cause: DropCause, packet: &[u8], now: Instant) {
        let data_path = &self.shared.data_path;
        let mut frame = [0; VNET_HDR_LEN + MAX_ERROR_LEN];
        let Some(buffer) = frame.get_mut(VNET_HDR_LEN..) else { return };
        let Some(len) = data_path.unreachable(cause, packet, now, buffer) else { return };
        let Some(frame) = frame.get(..VNET_HDR_LEN + len) else { return };
        if let Err(error) = tun.write(frame) {
            data_path.drops.add(tun::cause_of(&error), 1);
        }
    }

    // ------------------------------------------------------------ into the tunnel

    fn inbound(&mut self, family: usize) {
        let shared = Arc::clone(&self.shared);
        let Some(inbound) = shared.inbound.get(family) else { return };
        let mut batch = inbound.take_batch();
        let number = {
            let mut source = inbound.lock_source();
            self.read_datagrams(family, &mut batch);
            (!batch.is_empty()).then(|| source.assign())
        };
        let Some(number) = number else {
            batch.clear();
            inbound.return_batch(batch);
            return;
        };
        if batch.spare_capacity().is_none() {
            self.promote_follower();
        }
        let now = clock::instant();
        let queued = open_all(&shared, &mut batch, now);
        if let Some(tun) = shared.tun.get() {
            let Self { coalescer, allowed_ips, .. } = self;
            coalescer.set(tun.coalesce(now));
            inbound.complete(number, batch, |batch| {
                deliver(&shared.data_path, allowed_ips.value(), coalescer, tun, batch, now);
            });
        } else {
            inbound.complete(number, batch, InboundBatch::clear);
        }
        if queued | shared.data_path.take_wake() {
            shared.wake_control();
        }
    }

    fn read_datagrams(&self, family: usize, batch: &mut InboundBatch) {
        let Some(socket) = self.sockets.value().families().get(family).copied().flatten() else {
            return;
        };
        while let Some(buffer) = batch.spare_capacity() {
            match sys::receive(socket, buffer) {
                Ok(datagram) => batch.keep(&datagram),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    self.shared.data_path.drops.add(DropCause::InboundMalformed, 1);
                    batch.discard();
                }
                Err(error) => {
                    // The queue is empty, or the socket reported a pending error, once.
                    if error.kind() == io::ErrorKind::ConnectionAborted {
                        self.shared.set_sockets_destroyed();
                    }
                    return;
                }
            }
        }
    }
}

/// Accepts what opened, writes it to the TUN device, and empties the batch.
fn deliver(
    data_path: &DataPath,
    allowed_ips: &AllowedIpTable,
    coalescer: &mut Coalescer,
    tun: &Tun,
    batch: &mut InboundBatch,
    now: Instant,
) {
    let write = |frame: &mut [u8], packets: u16| {
        if let Err(Lost { cause, packets }) = tun.write_packets(frame, packets, now) {
            data_path.drops.add(cause, packets);
        }
    };
    let (storage, receipts, opened, sessions) = batch.parts();
    for Opened { plaintext, session, counter, receipt } in opened {
        let (Some((_, peer, keypair)), Some(from)) =
            (sessions.get(*session), receipts.get(*receipt))
        else {
            continue;
        };
        let (endpoint, ecn) = (from.endpoint, from.ecn);
        let received = Received { peer, keypair, counter: *counter, endpoint, ecn };
        let Some(bytes) = storage.get_mut(plaintext.clone()) else { continue };
        let accepted = data_path.accept(&received, allowed_ips, bytes, now);
        let Some(len) = accepted.map(|packet| packet.len()) else { continue };
        // The TUN device's header overwrites the transport header, which is longer.
        let start = plaintext.start.saturating_sub(VNET_HDR_LEN);
        let Some(frame) = storage.get_mut(start..plaintext.start + len) else { continue };
        coalescer.push(frame, write);
    }
    coalescer.flush(write);
    batch.clear();
}

/// Opens every transport message of a batch and queues every handshake message. True if the control
/// thread must be woken.
fn open_all(shared: &Shared, batch: &mut InboundBatch, now: Instant) -> bool {
    let mut wake = false;
    for receipt in 0..batch.received.len() {
        let Some((bytes, segment_len)) =
            batch.received.get(receipt).map(|receipt| (receipt.bytes.clone(), receipt.segment_len))
        else {
            break;
        };
        let mut start = bytes.start;
        while start < bytes.end {
            let end = bytes.end.min(start + segment_len);
            wake |= open_one(shared, batch, receipt, start, end, now);
            start = end;
        }
    }
    wake
}

fn open_one(
    shared: &Shared,
    batch: &mut InboundBatch,
    receipt: usize,
    start: usize,
    end: usize,
    now: Instant,
) -> bool {
    let drops = &shared.data_path.drops;
    let header = match Message::parse(batch.bytes_mut(start..end)) {
        Some(Message::Transport(header)) => header,
        Some(_) => {
            let Some(endpoint) = batch.received.get(receipt).map(|receipt| receipt.endpoint) else {
                return false;
            };
            let message = QueuedHandshake::new(endpoint, batch.bytes_mut(start..end));
            return message.is_some_and(|message| shared.queue_handshake(message));
        }
        None => {
            drops.add(DropCause::InboundMalformed, 1);
            return false;
        }
    };
    let Some(session) = find_session(shared, batch, header.receiver_index) else {
        drops.add(DropCause::UnknownIndex, 1);
        return false;
    };
    let Some(keypair) = batch.sessions.get(session).map(|(_, _, keypair)| Arc::clone(keypair))
    else {
        return false;
    };
    let start = start + TRANSPORT_HEADER_LEN;
    match keypair.open(header.counter, batch.bytes_mut(start..end), now) {
        Ok(()) => batch.opened.push(Opened {
            plaintext: start..end.saturating_sub(TAG_LEN),
            session,
            counter: header.counter,
            receipt,
        }),
        Err(error) => drops.add(error.into(), 1),
    }
    false
}

/// The position of a receiver index among the sessions of a batch, to which it is added if necessary.
///
/// Only the latest sessions are searched, because consecutive packets mostly belong to one.
fn find_session(shared: &Shared, batch: &mut InboundBatch, index: u32) -> Option<usize> {
    const LOOK_BACK: usize = 8;
    let known = batch.sessions.iter().enumerate().rev().take(LOOK_BACK);
    if let Some((position, _)) = known.into_iter().find(|(_, (known, ..))| *known == index) {
        return Some(position);
    }
    let (peer, keypair) = shared.data_path.index_table.lookup_keypair(index)?;
    batch.sessions.push((index, peer, keypair));
    Some(batch.sessions.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::KernelRandom;
    use wgsep_proto::config::{Configuration, PeerConfiguration};
    use wgsep_proto::device::Device;
    use wgsep_proto::keys::PublicKey;
    use wgsep_proto::time::Now;

    #[test]
    fn staged_packets_of_many_peers_go_in_bounded_parts() {
        const PEERS: u32 = 1000;
        let now = Now { instant: Instant::from_nanos(1), wall: core::time::Duration::ZERO };
        let mut device = Device::new(Box::new(KernelRandom));
        let peer = |number: u32| {
            let mut key = [9; 32];
            key[..4].copy_from_slice(&number.to_le_bytes());
            PeerConfiguration::new(PublicKey::from_bytes(key))
        };
        let peers = (0..PEERS).map(peer).collect();
        device.configure(Configuration { peers, ..Configuration::default() }, now);
        let shared = Arc::new(Shared::new(Arc::clone(device.data_path()), 1).unwrap());
        shared.request_flushes(device.shared_peers().map(Arc::clone));
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
        let mut device = Device::new(Box::new(KernelRandom));
        let peer = PeerConfiguration::new(PublicKey::from_bytes([9; 32]));
        let removal = PeerConfiguration { remove: true, ..peer.clone() };
        device.configure(Configuration { peers: vec![peer], ..Configuration::default() }, now);
        let looked_up = Arc::clone(device.shared_peers().next().unwrap());
        device.configure(Configuration { peers: vec![removal], ..Configuration::default() }, now);
        let data_path = device.data_path();
        assert!(data_path.reserve_nonces(&looked_up, 3, now.instant, |_| 0).is_none());
        assert_eq!(data_path.drops.count(DropCause::NoPeer), 3);
    }
}
