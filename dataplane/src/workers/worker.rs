//! A worker thread: waits for packets while it leads, and carries a batch of them.
//!
//! A worker that fills a batch promotes a follower (see `leader`) before the parallel steps. A follower
//! that is woken and has no batch runs crypto jobs (see `crypto_pool`). `outbound` and `inbound` are
//! the stages of a packet, in order; [`packets`](crate::packets) lists their files.

use crate::clock;
use crate::packets::flow_queues::ReadyQueues;
use crate::packets::inbound::{Receives, UdpBatch};
use crate::packets::offload::{Coalesce, Coalescer, Segments};
use crate::packets::outbound::TunBatch;
use crate::packets::udp::UdpSockets;
use crate::secret;
use crate::workers::leader::{FIRST_QUEUE, FIRST_SOCKET, MAX_EVENTS, WAKE};
use crate::workers::shared::{QueuedHandshake, Shared};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use std::os::fd::AsFd;
use std::sync::Arc;
use wgsep_proto::Instant;
use wgsep_proto::invariant::part;
use wgsep_proto::path::data_path::{AllowedIpTable, Reader};
use wgsep_proto::path::outbound::OutboundBatch;

/// Most staged packets, plus peers that have some, taken under one source lock.
const MAX_STAGED_PER_LOCK: usize = 256;

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
        let mut is_woken = false;
        loop {
            shared.pause.wait();
            if !self.is_leader && shared.leader.try_lead(self.number) {
                self.is_leader = true;
                if is_woken {
                    shared.leader.was_promoted();
                }
                // What was published meanwhile woke the previous leader, not this worker.
                self.refresh();
            }
            match shared.leader.wait(self.number, self.is_leader, &mut events) {
                Ok(ready) => {
                    is_woken = !self.is_leader;
                    let remains = self.work(part(&events, 0..ready));
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
                socket @ FIRST_SOCKET..FIRST_QUEUE => {
                    self.inbound((socket - FIRST_SOCKET) as usize);
                }
                queue => self.queue_event(queue, event.events(), &mut ready),
            }
        }
        if !ready.is_empty() || woken && self.shared.can_send_staged() {
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

    /// Has another worker read on if there is a processor for it, as more packets may be waiting than this one has read.
    fn promote_follower(&mut self) {
        if self.is_leader {
            self.is_leader = !self.shared.leader.promote_follower_if_useful();
        }
    }

    /// Carries a batch of packets out: what the ready queues have, and the staged ones that can be sent now.
    fn outbound(&mut self, ready: ReadyQueues) {
        let shared = Arc::clone(&self.shared);
        let Some(tun) = shared.tun.get() else { return };
        let (data_path, sequencer, drops) =
            (&*shared.data_path, &shared.outbound_sequencer, shared.drops());
        let mut batch = sequencer.take_batch();
        let TunBatch { frames, packets, datagrams } = &mut batch;

        // In the order of packets, under the source lock.
        let mut source = sequencer.lock_source();
        let now = clock::instant();
        // 1. Read.
        if frames.read(tun, ready, &mut self.next_queue, drops).is_err() {
            shared.set_device_gone();
        }
        // 2. Route.
        let (memory, allowed_ips) = (frames.memory(), self.allowed_ips.value());
        let answer = |error: &[u8]| tun.answer(error, drops);
        packets.route(data_path, allowed_ips, memory, frames.packets(), now, answer);
        // 3. Reserve nonces.
        packets.reserve_nonces(data_path, memory, datagrams, now);
        self.reserve_staged(packets, now);
        let number = (!packets.is_empty()).then(|| source.assign());
        drop(source);

        if let Some(number) = number {
            if frames.is_full() {
                self.promote_follower();
            }
            // 4. Seal, in parallel.
            packets.seal(data_path, frames.memory(), datagrams);
            // 5. Send, in the order of sequence numbers.
            let sockets = self.sockets.value();
            sequencer.submit(number, batch, |batch| {
                let TunBatch { frames, packets, datagrams } = batch;
                loop {
                    for run in packets.sealed_runs() {
                        sockets.send_run(&run, datagrams, drops, now);
                    }
                    // Only a batch of packets of a few bytes each needs more than one round.
                    if !packets.seal(data_path, frames.memory(), datagrams) {
                        break;
                    }
                }
                batch.clear();
            });
        } else {
            batch.clear();
            sequencer.return_batch(batch);
        }
        if data_path.take_wake() {
            shared.wake_control();
        }
    }

    /// Takes staged packets that can be sent now. If one batch cannot hold them all, it wakes this worker
    /// for the rest.
    fn reserve_staged(&self, packets: &mut OutboundBatch<Segments>, now: Instant) {
        let mut work = 0;
        while work < MAX_STAGED_PER_LOCK {
            let Some(peer) = self.shared.take_staged() else { return };
            // A peer without staged packets counts too, because looking costs time.
            work += 1 + packets.reserve_staged(&self.shared.data_path, peer, now);
        }
        self.shared.leader.wake(self.number);
    }

    /// Carries in the datagrams that a socket has.
    fn inbound(&mut self, socket: usize) {
        let shared = Arc::clone(&self.shared);
        let (data_path, drops) = (&*shared.data_path, shared.drops());
        // It may have been replaced since the event.
        let Some(bound) = self.sockets.value().bound().get(socket) else { return };
        let [v4, v6] = &shared.inbound_sequencers;
        let sequencer = if bound.address.is_ipv4() { v4 } else { v6 };
        let mut batch = sequencer.take_batch();
        let UdpBatch { receives, messages } = &mut batch;

        // In the order of datagrams, under the source lock.
        let mut source = sequencer.lock_source();
        // 1. Read.
        if receives.read(bound.socket.as_fd(), drops).is_err() {
            shared.set_sockets_destroyed();
        }
        let number = (!receives.is_empty()).then(|| source.assign());
        drop(source);

        let Some(number) = number else {
            batch.clear();
            sequencer.return_batch(batch);
            return;
        };
        if receives.is_full() {
            self.promote_follower();
        }
        let now = clock::instant();
        // 2. Parse, in parallel.
        let mut wake = false;
        let Receives { memory, receives, .. } = receives;
        messages.parse(data_path, memory, receives, |endpoint, message| {
            let message = QueuedHandshake::new(endpoint, message);
            wake |= message.is_some_and(|message| shared.queue_handshake(message));
        });
        // 3. Open, in parallel.
        messages.open(data_path, memory, now);
        // 4. Accept, and 5. Write, in the order of sequence numbers.
        let Self { coalescer, allowed_ips, .. } = self;
        sequencer.submit(number, batch, |batch| {
            let UdpBatch { receives: Receives { memory, .. }, messages } = batch;
            if let Some(tun) = shared.tun.get() {
                messages.accept(data_path, allowed_ips.value(), memory, now);
                coalescer.set(tun.coalesce(now));
                coalescer.push_all(memory, messages.accepted(), |frame, packets| {
                    tun.write_packets(frame, packets, drops, now);
                });
            }
            batch.clear();
        });
        if wake | data_path.take_wake() {
            shared.wake_control();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::KernelRandom;
    use nix::sys::epoll::EpollEvent;
    use wgsep_proto::device::control_plane::ControlPlane;
    use wgsep_proto::{Configuration, DropCause, Now, PeerConfiguration, PublicKey};

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
        control.configure(Configuration { peers, ..Configuration::default() });
        let shared = Arc::new(Shared::new(Arc::clone(control.data_path()), 1).unwrap());
        shared.request_send_staged(control.shared_peers().map(Arc::clone));
        let worker = Worker::new(0, Arc::clone(&shared));
        let mut batch = TunBatch::new();
        let mut parts = 0;
        while shared.can_send_staged() {
            // Woken by the request, and after each part for the rest.
            let woken = shared.leader.wait(0, false, &mut [EpollEvent::empty()]);
            assert_eq!(woken, Ok(1));
            shared.leader.acknowledge(0);
            worker.reserve_staged(&mut batch.packets, now.instant);
            parts += 1;
        }
        assert_eq!(parts, (PEERS as usize).div_ceil(MAX_STAGED_PER_LOCK));
    }

    /// The control thread may remove a peer between the lookup for a packet and its reservation.
    #[test]
    fn packets_to_a_peer_that_was_removed_meanwhile_are_counted() {
        let now = Now { instant: Instant::from_nanos(1), wall: core::time::Duration::ZERO };
        let mut control = ControlPlane::new(Box::new(KernelRandom));
        let peer = PeerConfiguration::new(PublicKey::from_bytes([9; 32]));
        let removal = PeerConfiguration { remove: true, ..peer.clone() };
        control.configure(Configuration { peers: vec![peer], ..Configuration::default() });
        let looked_up = Arc::clone(control.shared_peers().next().unwrap());
        control.configure(Configuration { peers: vec![removal], ..Configuration::default() });
        let data_path = control.data_path();
        assert!(data_path.reserve_nonces(&looked_up, 3, now.instant, |_| 0).is_none());
        assert_eq!(data_path.drops.count(DropCause::NoPeer), 3);
    }
}
