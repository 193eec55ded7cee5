//! The state that the threads of the dataplane share.

use crate::drops::{Drops, LocalCause, LocalDrops};
use crate::packets::flow_queues::ReadyQueues;
use crate::packets::inbound::UdpBatch;
use crate::packets::outbound::TunBatch;
use crate::packets::tun::Tun;
use crate::packets::udp::UdpSockets;
use crate::workers::crypto_pool::CryptoPool;
use crate::workers::leader::{FIRST_QUEUE, FIRST_SOCKET, Leader};
use crate::workers::pause::Pause;
use crate::workers::sequencer::Sequencer;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use wgsep_ipc::Offload;
use wgsep_proto::device::control_plane::MAX_QUEUED_HANDSHAKES;
use wgsep_proto::invariant::part;
use wgsep_proto::path::data_path::{DataPath, Versioned};
use wgsep_proto::session::peer::Peer;
use wgsep_proto::wire::messages::INITIATION_LEN;
use wgsep_proto::{Endpoint, Instant};

/// Batches for each worker and source: one in use, one parked.
const BATCHES_PER_WORKER: usize = 2;

/// A handshake message or cookie reply on its way to the control thread.
pub(crate) struct QueuedHandshake {
    pub(crate) endpoint: Endpoint,
    bytes: [u8; INITIATION_LEN],
    len: usize,
}

impl QueuedHandshake {
    /// A copy of a datagram no longer than the longest handshake message.
    pub(crate) fn new(endpoint: Endpoint, datagram: &[u8]) -> Option<Self> {
        let mut bytes = [0; INITIATION_LEN];
        bytes.get_mut(..datagram.len())?.copy_from_slice(datagram);
        Some(Self { endpoint, bytes, len: datagram.len() })
    }

    pub(crate) fn datagram(&self) -> &[u8] {
        part(&self.bytes, 0..self.len)
    }
}

/// Handshake messages for the control thread.
struct HandshakeQueue {
    messages: VecDeque<QueuedHandshake>,
    /// Number of earlier messages that the control thread had taken and not consumed when it last
    /// updated this.
    taken: usize,
    /// The control thread polls the queue, so that it need not be woken.
    polled: bool,
}

/// The state that the control thread and the workers share.
pub(crate) struct Shared {
    pub(crate) data_path: Arc<DataPath>,
    /// Counters of the packets that the daemon dropped, beside those of the data path.
    pub(crate) local_drops: LocalDrops,
    /// The TUN device, once the helper has handed it over.
    pub(crate) tun: OnceLock<Tun>,
    /// The order of the batches read from it.
    pub(crate) outbound_sequencer: Sequencer<TunBatch>,
    /// The current UDP sockets.
    pub(crate) sockets: Versioned<Arc<UdpSockets>>,
    /// The order of the batches read from IPv4 and from IPv6 sockets.
    pub(crate) inbound_sequencers: [Sequencer<UdpBatch>; 2],
    handshakes: Mutex<HandshakeQueue>,
    staged: Mutex<VecDeque<Arc<Peer>>>,
    /// Crypto jobs of the control thread, which followers can run.
    pub(crate) crypto: CryptoPool,
    /// Wakes the control thread.
    pub(crate) control: EventFd,
    /// Which worker waits for packets, and how the others are woken.
    pub(crate) leader: Leader,
    /// Stops the workers for a while.
    pub(crate) pause: Pause,
    /// Number of requests to wipe the stacks.
    wipes: AtomicU64,
    device_gone: AtomicBool,
    sockets_destroyed: AtomicBool,
}

impl Shared {
    /// Creates the state without the descriptors that the helper sends later.
    ///
    /// # Errors
    /// If the kernel refuses an eventfd or an epoll instance.
    pub(crate) fn new(data_path: Arc<DataPath>, workers: usize) -> nix::Result<Self> {
        let batches = workers * BATCHES_PER_WORKER;
        let outbound = (0..batches).map(|_| TunBatch::new()).collect();
        let inbound = || Sequencer::new((0..batches).map(|_| UdpBatch::new()).collect());
        Ok(Self {
            data_path,
            local_drops: LocalDrops::default(),
            tun: OnceLock::new(),
            outbound_sequencer: Sequencer::new(outbound),
            sockets: Versioned::default(),
            inbound_sequencers: [inbound(), inbound()],
            handshakes: Mutex::new(HandshakeQueue {
                messages: VecDeque::with_capacity(MAX_QUEUED_HANDSHAKES),
                taken: 0,
                polled: false,
            }),
            staged: Mutex::default(),
            crypto: CryptoPool::default(),
            control: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            leader: Leader::new(workers)?,
            pause: Pause::default(),
            wipes: AtomicU64::new(0),
            device_gone: AtomicBool::new(false),
            sockets_destroyed: AtomicBool::new(false),
        })
    }

    /// All counters of dropped packets.
    pub(crate) fn drops(&self) -> Drops<'_> {
        Drops { protocol: &self.data_path.drops, local: &self.local_drops }
    }

    /// Wakes the control thread.
    pub(crate) fn wake_control(&self) {
        // The write fails only if the counter is full, and then the thread is awake.
        let _full = self.control.write(1);
    }

    /// Stores the TUN device, once, so that it can be written.
    pub(crate) fn set_tun(&self, tun: Tun) -> &Tun {
        self.tun.get_or_init(|| tun)
    }

    /// Starts reading the TUN device.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(crate) fn read_tun(&self, tun: &Tun) -> nix::Result<()> {
        for (queue, token) in tun.queues().iter().take(ReadyQueues::CAPACITY).zip(FIRST_QUEUE..) {
            self.leader.watch(queue, token)?;
        }
        Ok(())
    }

    /// Replaces the sockets and starts reading the new ones. The workers release the old ones when they
    /// are woken.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(crate) fn replace_sockets(&self, sockets: UdpSockets) -> nix::Result<()> {
        for old in self.sockets.reader().value().bound() {
            self.leader.unwatch(&old.socket);
        }
        let sockets = Arc::new(sockets);
        self.sockets.replace(Arc::clone(&sockets));
        self.leader.wake_all();
        for (new, token) in sockets.bound().iter().zip(FIRST_SOCKET..FIRST_QUEUE) {
            self.leader.watch(&new.socket, token)?;
        }
        Ok(())
    }

    fn handshakes(&self) -> MutexGuard<'_, HandshakeQueue> {
        self.handshakes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a message for the control thread, or drops and counts it. True if the control thread must
    /// be woken, because the queue was empty and is not polled.
    pub(crate) fn queue_handshake(&self, message: QueuedHandshake) -> bool {
        let mut queue = self.handshakes();
        if queue.taken + queue.messages.len() >= MAX_QUEUED_HANDSHAKES {
            drop(queue);
            self.drops().add(LocalCause::HandshakeQueueFull, 1);
            return false;
        }
        queue.messages.push_back(message);
        queue.messages.len() == 1 && !queue.polled
    }

    /// Sets whether the control thread polls the queue. True if polling ends and messages are queued,
    /// for which the thread has not been woken.
    pub(crate) fn poll_handshakes(&self, polled: bool) -> bool {
        let mut queue = self.handshakes();
        let unpolled = queue.polled && !polled && !queue.messages.is_empty();
        queue.polled = polled;
        unpolled
    }

    /// Takes all queued messages if none are left of those `taken` before. Returns how many are queued
    /// now. It holds the lock only to exchange two pointers, because the control thread runs at a lower
    /// priority than the workers, which must not wait for it.
    pub(crate) fn take_handshakes(&self, taken: &mut VecDeque<QueuedHandshake>) -> usize {
        let mut queue = self.handshakes();
        if taken.is_empty() {
            core::mem::swap(&mut queue.messages, taken);
        }
        queue.taken = taken.len();
        queue.messages.len()
    }

    /// Discards the queued messages when the sockets close.
    pub(crate) fn clear_handshakes(&self) {
        let mut queue = self.handshakes();
        queue.messages.clear();
        queue.taken = 0;
    }

    /// Requests that the worker that reads the TUN device next sends the staged packets of peers, so
    /// that they stay ahead of the packets read after them.
    pub(crate) fn request_send_staged(&self, peers: impl Iterator<Item = Arc<Peer>>) {
        let peers: Vec<_> = peers.collect();
        if !peers.is_empty() {
            self.staged.lock().unwrap_or_else(PoisonError::into_inner).extend(peers);
            self.leader.wake(0);
        }
    }

    /// True if staged packets can be sent.
    pub(crate) fn can_send_staged(&self) -> bool {
        !self.staged.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Takes the peer for which that was requested first.
    pub(crate) fn take_staged(&self) -> Option<Arc<Peer>> {
        self.staged.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Which offloads are in use.
    pub(crate) fn offloads(&self, udp_gso: bool, now: Instant) -> [(Offload, bool); 5] {
        let tun = self.tun.get();
        let coalesce = tun.map(|tun| tun.coalesce(now)).unwrap_or_default();
        [
            (Offload::VnetHdr, tun.is_some_and(Tun::has_header)),
            (Offload::Tso, coalesce.tcp_v4 && coalesce.tcp_v6),
            (Offload::Uso, coalesce.udp),
            (Offload::FlowQueues, tun.is_some_and(|tun| tun.queues().len() > 1)),
            (Offload::UdpGso, udp_gso),
        ]
    }

    /// Requests that each worker wipes its stack after its current batches.
    pub(crate) fn request_wipes(&self) {
        self.wipes.fetch_add(1, Ordering::SeqCst);
        self.leader.wake_all();
    }

    /// Number of calls of [`Self::request_wipes`]. A woken worker that has counted fewer wipes its stack.
    pub(crate) fn wipes(&self) -> u64 {
        self.wipes.load(Ordering::SeqCst)
    }

    /// Records that the TUN device was deleted.
    pub(crate) fn set_device_gone(&self) {
        self.device_gone.store(true, Ordering::Release);
        self.wake_control();
    }

    /// Records that another program has had the kernel destroy our sockets (SOCK_DESTROY, as `ss -K` does).
    pub(crate) fn set_sockets_destroyed(&self) {
        self.sockets_destroyed.store(true, Ordering::Release);
        self.wake_control();
    }

    /// True, once, after [`Self::set_sockets_destroyed`].
    pub(crate) fn take_sockets_destroyed(&self) -> bool {
        self.sockets_destroyed.swap(false, Ordering::AcqRel)
    }

    /// True once the TUN device was deleted.
    pub(crate) fn is_device_gone(&self) -> bool {
        self.device_gone.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handshakes_wait_up_to_4096_and_the_next_are_counted_as_dropped() {
        let shared = Shared::new(Arc::default(), 1).unwrap();
        let endpoint = Endpoint::new(([192, 0, 2, 1], 7).into());
        let queue = || shared.queue_handshake(QueuedHandshake::new(endpoint, &[1; 148]).unwrap());
        assert!(queue(), "the first wakes the control thread");
        for _ in 1..MAX_QUEUED_HANDSHAKES {
            assert!(!queue());
        }
        assert_eq!(shared.local_drops.count(LocalCause::HandshakeQueueFull), 0);
        assert!(!queue());
        assert_eq!(shared.local_drops.count(LocalCause::HandshakeQueueFull), 1);
        let mut taken = VecDeque::new();
        assert_eq!(shared.take_handshakes(&mut taken), 0);
        assert_eq!(taken.len(), MAX_QUEUED_HANDSHAKES);
        // They count as queued until they are consumed, and no others are taken before.
        assert!(!queue());
        assert_eq!(shared.local_drops.count(LocalCause::HandshakeQueueFull), 2);
        taken.drain(..16);
        assert_eq!(shared.take_handshakes(&mut taken), 0);
        assert!(queue());
        assert_eq!(shared.take_handshakes(&mut taken), 1);
        taken.clear();
        assert_eq!((shared.take_handshakes(&mut taken), taken.len()), (0, 1));
    }

    #[test]
    fn a_control_thread_that_polls_is_not_woken_and_misses_nothing_when_it_stops() {
        let shared = Shared::new(Arc::default(), 1).unwrap();
        let endpoint = Endpoint::new(([192, 0, 2, 1], 7).into());
        let queue = || shared.queue_handshake(QueuedHandshake::new(endpoint, &[1; 148]).unwrap());
        assert!(!shared.poll_handshakes(true));
        assert!(!queue() && !queue());
        assert!(!shared.poll_handshakes(true), "it polls");
        assert!(shared.poll_handshakes(false), "and once more as it stops");
        let mut taken = VecDeque::new();
        assert_eq!((shared.take_handshakes(&mut taken), taken.len()), (0, 2));
        assert!(!shared.poll_handshakes(false));
        assert!(queue());
        assert!(!shared.poll_handshakes(false), "it was woken for that");
    }
}
