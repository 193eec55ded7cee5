//! What the workers wait for, and which of them does.
//!
//! One worker leads: it waits for packets. The others wait to be called. The leader calls one of them
//! to lead in its place when it has read all that a batch holds, so that more may be waiting, and
//! seals or opens its batch while the other reads on. So little traffic wakes one thread, which has all
//! in its cache, and much has every core at work.

use crate::flow_queues::ReadyQueues;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What an event is about: a call; the IPv4 or the IPv6 socket; a queue of the TUN device, the first or
/// one of those behind it.
pub(crate) const CALL: u64 = 0;
pub(crate) const UDP: [u64; 2] = [1, 2];
pub(crate) const FIRST_QUEUE: u64 = 3;
/// Most events at once: one of each.
pub(crate) const MAX_EVENTS: usize = 64 + 2 + ReadyQueues::CAPACITY;

/// The lead, and the means to pass it on.
pub(crate) struct Lead {
    packets: Epoll,
    is_taken: AtomicBool,
    /// One bit for each worker that waits to be called.
    waiting: AtomicU64,
    workers: Vec<Waiting>,
}

/// How a worker waits and is called.
struct Waiting {
    call: EventFd,
    calls: Epoll,
}

impl Waiting {
    fn new() -> nix::Result<Self> {
        let call = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let calls = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        calls.add(&call, EpollEvent::new(EpollFlags::EPOLLIN, CALL))?;
        Ok(Self { call, calls })
    }
}

impl Lead {
    /// A lead that nobody has taken yet, for at most 64 workers.
    ///
    /// # Errors
    /// If the kernel gives no eventfd or no epoll instance.
    pub(crate) fn new(workers: usize) -> nix::Result<Self> {
        let packets = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let workers: Vec<_> = (0..workers).map(|_| Waiting::new()).collect::<nix::Result<_>>()?;
        for worker in &workers {
            // By the edge: one that is meant for a worker that does not lead is not for the leader.
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            packets.add(&worker.call, EpollEvent::new(flags, CALL))?;
        }
        let (is_taken, waiting) = (AtomicBool::new(false), AtomicU64::new(0));
        Ok(Self { packets, is_taken, waiting, workers })
    }

    /// Has the leader look at a descriptor whenever it can be read.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(crate) fn watch(&self, descriptor: impl AsFd, token: u64) -> nix::Result<()> {
        self.packets.add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, token))
    }

    /// Has nobody look at it any more. It must be said: the helper may hold a duplicate, so that
    /// closing ours does not end the watch.
    pub(crate) fn forget(&self, descriptor: impl AsFd) {
        let _not_watched = self.packets.delete(descriptor);
    }

    /// Calls every worker: there is something new to look at.
    pub(crate) fn call_all(&self) {
        for worker in 0..self.workers.len() {
            self.call(worker);
        }
    }

    /// Calls one worker.
    pub(crate) fn call(&self, worker: usize) {
        if let Some(worker) = self.workers.get(worker) {
            // It can only fail if the counter is full, and then it was called.
            let _full = worker.call.write(1);
        }
    }

    /// Waits as the leader for packets or a call, or as any other for a call. Returns how many events
    /// there are.
    ///
    /// # Errors
    /// As epoll_wait(2).
    pub(crate) fn wait(
        &self,
        worker: usize,
        leads: bool,
        events: &mut [EpollEvent],
    ) -> nix::Result<usize> {
        if leads {
            return self.packets.wait(events, EpollTimeout::NONE);
        }
        let Some(Waiting { calls, .. }) = self.workers.get(worker) else { return Ok(0) };
        let called = calls.wait(events, EpollTimeout::NONE);
        self.waiting.fetch_and(!bit(worker), Ordering::SeqCst);
        called
    }

    /// Answers a call, so that the next is heard.
    pub(crate) fn answer(&self, worker: usize) {
        if let Some(worker) = self.workers.get(worker) {
            let _none = worker.call.read();
        }
    }

    /// Takes the lead if it is free; or else says that `worker` can be called. Whoever passes the
    /// lead on frees it before looking for somebody to call, and whoever waits says so before looking
    /// once more whether it is free: one of them sees the other.
    pub(crate) fn take(&self, worker: usize) -> bool {
        if !self.is_taken.swap(true, Ordering::SeqCst) {
            return true;
        }
        self.waiting.fetch_or(bit(worker), Ordering::SeqCst);
        let is_free = !self.is_taken.swap(true, Ordering::SeqCst);
        if is_free {
            self.waiting.fetch_and(!bit(worker), Ordering::SeqCst);
        }
        is_free
    }

    /// Whether nobody has the lead.
    pub(crate) fn is_free(&self) -> bool {
        !self.is_taken.load(Ordering::SeqCst)
    }

    /// Gives up the lead, and calls a worker that waits to take it. If all have work, the first to be
    /// done takes it.
    pub(crate) fn pass_on(&self) {
        self.is_taken.store(false, Ordering::SeqCst);
        self.call_waiting();
    }

    /// Calls a worker that waits, and no other thread has called. False if there is none.
    pub(crate) fn call_waiting(&self) -> bool {
        let mut waiting = self.waiting.load(Ordering::SeqCst);
        while waiting != 0 {
            let worker = waiting.trailing_zeros() as usize;
            let before = self.waiting.fetch_and(!bit(worker), Ordering::SeqCst);
            if before & bit(worker) != 0 {
                self.call(worker);
                return true;
            }
            waiting = before;
        }
        false
    }
}

const fn bit(worker: usize) -> u64 {
    if worker < u64::BITS as usize { 1 << worker } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::sync::atomic::AtomicUsize;

    fn is_called(lead: &Lead, worker: usize) -> bool {
        let mut events = [EpollEvent::empty()];
        let ready = lead.workers[worker].calls.wait(&mut events, EpollTimeout::ZERO);
        ready == Ok(1)
    }

    #[test]
    fn the_lead_is_one_workers_and_passes_to_one_that_waits() {
        let lead = Lead::new(3).unwrap();
        assert!(lead.take(1));
        assert!(!lead.take(0) && !lead.take(2));
        lead.pass_on();
        assert_eq!([0, 1, 2].map(|worker| is_called(&lead, worker)), [true, false, false]);
        lead.answer(0);
        assert!(lead.take(0));
        lead.pass_on();
        assert_eq!([0, 1, 2].map(|worker| is_called(&lead, worker)), [false, false, true]);
        lead.answer(2);
        // Nobody takes it, and nobody is called: all have work.
        assert!(lead.take(2));
        lead.pass_on();
        assert_eq!([0, 1, 2].map(|worker| is_called(&lead, worker)), [false; 3]);
        assert!(lead.take(1));
    }

    #[test]
    fn no_packet_is_left_behind_however_often_the_lead_is_passed_on() {
        const PACKETS: usize = 20_000;
        for workers in [1, 2, 4] {
            let lead = Lead::new(workers).unwrap();
            let (ours, packets) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
            lead.watch(&ours, 7).unwrap();
            let taken = AtomicUsize::new(0);
            let work = |worker: usize, ours: &OwnedFd| {
                let mut leads = false;
                while taken.load(Ordering::SeqCst) < PACKETS {
                    let mut events = [EpollEvent::empty(); 8];
                    leads = leads || lead.take(worker);
                    let ready = lead.wait(worker, leads, &mut events).unwrap();
                    lead.answer(worker);
                    if leads && events[..ready].iter().any(|event| event.data() == 7) {
                        let mut batch = [0; 3];
                        let count = nix::unistd::read(ours, &mut batch).unwrap_or(0);
                        if count == batch.len() {
                            lead.pass_on();
                            leads = false;
                        }
                        taken.fetch_add(count, Ordering::SeqCst);
                    }
                }
                lead.call_all();
            };
            std::thread::scope(|scope| {
                for worker in 0..workers {
                    let (work, ours) = (&work, &ours);
                    scope.spawn(move || work(worker, ours));
                }
                for _ in 0..PACKETS {
                    while nix::unistd::write(&packets, &[0]).is_err() {
                        std::thread::yield_now();
                    }
                }
            });
            assert_eq!(taken.into_inner(), PACKETS);
        }
    }
}
