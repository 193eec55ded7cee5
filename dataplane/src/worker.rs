//! A worker: whole batches from end to end, each while it is hot in the cache.
//!
//! Whoever fills a batch passes the lead on (see `lead`) before the parallel steps. Who has no batch
//! helps the control thread if it is woken for that (see `team`).
//!
//! Out of the tunnel, `outbound`:
//! 1. take the TUN device's turn; staged packets whose keypair has come go first (in turn)
//! 2. read packets, a share from each queue that has some, route each, tell the sender of one that has
//!    nowhere to go (in turn)
//! 3. lease a keypair and nonces for each run of packets to one peer, or stage it (in turn)
//! 4. split super-packets, seal each packet (parallel)
//! 5. send, in the order of the turns
//!
//! Into the tunnel, `inbound`:
//! 1. take the socket's turn; read datagrams (in turn)
//! 2. parse; hand handshake messages to the control thread; look up keypairs; open (parallel)
//! 3. accept, put together super-packets, write to the TUN device, in the order of the turns

use crate::buffers::{InboundBatch, Opened, OutboundBatch};
use crate::clock;
use crate::flow_queues::{ReadyQueues, Share};
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
use wgsep_proto::data_path::{DataPath, DropCause, Reader, Routes};
use wgsep_proto::icmp::MAX_ERROR_LEN;
use wgsep_proto::messages::{Message, TAG_LEN, TRANSPORT_HEADER_LEN};
use wgsep_proto::receive::Received;
use wgsep_proto::time::Instant;

/// Most packets that are read in one turn.
const MAX_READS: usize = 256;

/// Staged packets, and peers, after which no more are taken in one turn.
const MAX_STAGED: usize = 256;

/// A worker thread's own state.
pub(crate) struct Worker {
    number: usize,
    shared: Arc<Shared>,
    /// True while it is the one that waits for packets.
    is_leader: bool,
    routes: Reader<Routes>,
    sockets: Reader<Arc<UdpSockets>>,
    /// The TUN device's queue whose turn it is.
    next_queue: usize,
    /// Empty between batches.
    coalescer: Coalescer,
    /// Requests to wipe the stack that it has met.
    wipes: u64,
}

impl Worker {
    /// A worker that has yet to run.
    pub(crate) fn new(number: usize, shared: Arc<Shared>) -> Self {
        Self {
            number,
            is_leader: false,
            routes: shared.data_path.routes.reader(),
            sockets: shared.sockets.reader(),
            next_queue: 0,
            coalescer: Coalescer::new(Coalesce::default()),
            wipes: 0,
            shared,
        }
    }

    /// Works until the process ends.
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

    /// Does what the events are about; how deep the stack is to be wiped after that, if it is. Never inlined:
    /// what it leaves on the stack has to be below its caller.
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

    /// Looks at what the control thread has published.
    fn refresh(&mut self) {
        let Self { shared, routes, sockets, .. } = self;
        routes.refresh(&shared.data_path.routes);
        if sockets.refresh(&shared.sockets) {
            // It may wait for the port to be free.
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

    /// More may be waiting than was read: another worker shall read on meanwhile.
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
        let ticket = {
            let mut turn = outbound.turn();
            now = clock::instant();
            self.lease_staged(&mut batch, now);
            self.read_packets(tun, ready, &mut batch, now);
            batch.lease(data_path, now);
            (!batch.is_empty()).then(|| turn.take_ticket())
        };
        if batch.room().is_none() {
            self.promote_follower();
        }
        match ticket {
            Some(ticket) => {
                batch.seal(data_path);
                let sockets = self.sockets.value();
                outbound.complete(ticket, batch, |batch| {
                    batch.send(sockets, data_path, now);
                    // Only packets of a few bytes each leave anything.
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

    /// Takes staged packets that can go now; if there are too many for one batch, the rest with the next.
    fn lease_staged(&self, batch: &mut OutboundBatch, now: Instant) {
        let mut work = 0;
        while work < MAX_STAGED {
            let Some(peer) = self.shared.take_flush() else { return };
            // A peer that has none left has been looked at, too.
            work += 1;
            if let Some(lease) = self.shared.data_path.lease(&peer, 0, now, |_| 0) {
                work += lease.staged.len();
                batch.add_staged(peer, lease);
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
        // Bounded also where nothing is kept: a flood of packets that have nowhere to go must not
        // hold up those that have.
        let mut reads = 0;
        while let Some(queue) = ready.next_from(self.next_queue) {
            self.next_queue = queue + 1;
            let mut share = Share::new();
            while !share.is_used_up() {
                let Some(room) = batch.room().filter(|_| reads < MAX_READS) else { return };
                reads += 1;
                match tun.read(queue, room) {
                    Read::Packet(header, len) => {
                        share.take(len);
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

    /// Keeps the packet that was read last, unless it has nowhere to go.
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
        match data_path.route(self.routes.value(), packet) {
            Ok((peer, inner)) => {
                if !batch.keep(peer, header, &inner, data_path) {
                    data_path.drops.add(DropCause::OutboundMalformed, 1);
                }
            }
            Err(cause) => self.refuse(tun, cause, packet, now),
        }
    }

    /// Tells the sender of a packet that its destination cannot be reached, where that is so.
    fn refuse(&self, tun: &Tun, cause: DropCause, packet: &[u8], now: Instant) {
        let data_path = &self.shared.data_path;
        let mut frame = [0; VNET_HDR_LEN + MAX_ERROR_LEN];
        let Some(room) = frame.get_mut(VNET_HDR_LEN..) else { return };
        let Some(len) = data_path.unreachable(cause, packet, now, room) else { return };
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
        let ticket = {
            let mut turn = inbound.turn();
            self.read_datagrams(family, &mut batch);
            (!batch.is_empty()).then(|| turn.take_ticket())
        };
        let Some(ticket) = ticket else {
            batch.clear();
            inbound.return_batch(batch);
            return;
        };
        if batch.room().is_none() {
            self.promote_follower();
        }
        let now = clock::instant();
        let queued = open_all(&shared, &mut batch, now);
        if let Some(tun) = shared.tun.get() {
            let Self { coalescer, routes, .. } = self;
            coalescer.set(tun.coalesce(now));
            inbound.complete(ticket, batch, |batch| {
                deliver(&shared.data_path, routes.value(), coalescer, tun, batch, now);
            });
        } else {
            inbound.complete(ticket, batch, InboundBatch::clear);
        }
        if queued | shared.data_path.take_wake() {
            shared.wake_control();
        }
    }

    fn read_datagrams(&self, family: usize, batch: &mut InboundBatch) {
        let Some(socket) = self.sockets.value().families().get(family).copied().flatten() else {
            return;
        };
        while let Some(room) = batch.room() {
            match sys::receive(socket, room) {
                Ok(datagram) => batch.keep(&datagram),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    self.shared.data_path.drops.add(DropCause::InboundMalformed, 1);
                    batch.discard();
                }
                Err(error) => {
                    // Nothing waits; or an error that the socket had pending, which is now gone.
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
    routes: &Routes,
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
    let (storage, arrived, opened, sessions) = batch.parts();
    for Opened { plaintext, session, counter, arrived: from } in opened {
        let (Some((_, peer, keypair)), Some(from)) = (sessions.get(*session), arrived.get(*from))
        else {
            continue;
        };
        let (endpoint, ecn) = (from.endpoint, from.ecn);
        let received = Received { peer, keypair, counter: *counter, endpoint, ecn };
        let Some(bytes) = storage.get_mut(plaintext.clone()) else { continue };
        let accepted = data_path.accept(&received, routes, bytes, now);
        let Some(len) = accepted.map(|packet| packet.len()) else { continue };
        // The packet's transport header has room for the one that the TUN device wants.
        let start = plaintext.start.saturating_sub(VNET_HDR_LEN);
        let Some(frame) = storage.get_mut(start..plaintext.start + len) else { continue };
        coalescer.push(frame, write);
    }
    coalescer.flush(write);
    batch.clear();
}

/// Opens every transport message of a batch and queues every handshake message. True if the control
/// thread has to be woken.
fn open_all(shared: &Shared, batch: &mut InboundBatch, now: Instant) -> bool {
    let mut wake = false;
    for arrived in 0..batch.received.len() {
        let Some((bytes, segment_len)) =
            batch.received.get(arrived).map(|arrived| (arrived.bytes.clone(), arrived.segment_len))
        else {
            break;
        };
        let mut start = bytes.start;
        while start < bytes.end {
            let end = bytes.end.min(start + segment_len);
            wake |= open_one(shared, batch, arrived, start, end, now);
            start = end;
        }
    }
    wake
}

fn open_one(
    shared: &Shared,
    batch: &mut InboundBatch,
    arrived: usize,
    start: usize,
    end: usize,
    now: Instant,
) -> bool {
    let drops = &shared.data_path.drops;
    let header = match Message::parse(batch.bytes_mut(start..end)) {
        Some(Message::Transport(header)) => header,
        Some(_) => {
            let Some(endpoint) = batch.received.get(arrived).map(|arrived| arrived.endpoint) else {
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
            arrived,
        }),
        Err(error) => drops.add(error.into(), 1),
    }
    false
}

/// The place among the batch's sessions of the one with this index, most likely the last.
fn find_session(shared: &Shared, batch: &mut InboundBatch, index: u32) -> Option<usize> {
    const LOOK_BACK: usize = 8;
    let known = batch.sessions.iter().enumerate().rev().take(LOOK_BACK);
    if let Some((place, _)) = known.into_iter().find(|(_, (known, ..))| *known == index) {
        return Some(place);
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
            worker.lease_staged(&mut batch, now.instant);
            parts += 1;
        }
        assert_eq!(parts, (PEERS as usize).div_ceil(MAX_STAGED));
    }
    /// Between the look-up of a packet's peer and its lease the control thread may remove the peer.
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
        assert!(data_path.lease(&looked_up, 3, now.instant, |_| 0).is_none());
        assert_eq!(data_path.drops.count(DropCause::NoPeer), 3);
    }
}
