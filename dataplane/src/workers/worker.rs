//! A worker thread: waits for packets while it leads, and carries a batch of them.
//!
//! A worker that fills a batch promotes a follower (see `leader`) before the parallel steps. A follower
//! that is woken and has no batch runs crypto jobs (see `crypto_pool`). The stages of a packet are in
//! [`packets`](crate::packets).

use crate::packets::offload::{Coalesce, Coalescer};
use crate::packets::udp::UdpSockets;
use crate::secret;
use crate::workers::flow_queues::ReadyQueues;
use crate::workers::leader::{FIRST_QUEUE, MAX_EVENTS, UDP, WAKE};
use crate::workers::shared::Shared;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use std::sync::Arc;
use wgsep_proto::data_path::{AllowedIpTable, Reader};

/// A worker thread's own state.
pub(crate) struct Worker {
    pub(crate) number: usize,
    pub(crate) shared: Arc<Shared>,
    /// True while it is the one that waits for packets.
    is_leader: bool,
    pub(crate) allowed_ips: Reader<AllowedIpTable>,
    pub(crate) sockets: Reader<Arc<UdpSockets>>,
    /// The TUN device's queue that is read next.
    pub(crate) next_queue: usize,
    /// Empty between batches.
    pub(crate) coalescer: Coalescer,
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
    pub(crate) fn promote_follower(&mut self) {
        if self.is_leader {
            self.is_leader = false;
            self.shared.leader.promote_follower();
        }
    }

    /// Wakes the control thread if the packet path asked for it.
    pub(crate) fn wake_control_if_asked(&self) {
        if self.shared.data_path.take_wake() {
            self.shared.wake_control();
        }
    }
}
