//! Which worker waits for packets: the Leader/Followers pattern.
//!
//! One worker, the leader, waits for packets; the others, its followers, sleep until they are woken. A
//! leader whose batch is full promotes a follower before it seals or opens the batch, because more
//! packets may be waiting. Light traffic is thus served by one thread with a warm cache, and heavy
//! traffic by every core.
//!
//! If all processors are busy, the kernel runs a follower that is woken on the processor of the worker that woke it: it
//! interrupts that worker, and no time is gained. After such a promotion the next ones are skipped ([`Promotions`]).

use crate::packets::flow_queues::ReadyQueues;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use wgsep_ipc::startup::MAX_LISTEN_ADDRESSES;

/// Token of a wake-up.
pub(crate) const WAKE: u64 = 0;
/// Token of the first UDP socket; the others have the numbers after it.
pub(crate) const FIRST_SOCKET: u64 = 1;
/// Token of the TUN device's first queue; the other queues have the numbers after it.
pub(crate) const FIRST_QUEUE: u64 = FIRST_SOCKET + MAX_LISTEN_ADDRESSES as u64;
/// Most events that one wait returns: one for each token.
pub(crate) const MAX_EVENTS: usize = 64 + MAX_LISTEN_ADDRESSES + ReadyQueues::CAPACITY;

/// The leader's role, which one worker holds at most, and the means to hand it over.
pub(crate) struct Leader {
    packets: Epoll,
    is_taken: AtomicBool,
    /// The followers that sleep, one bit for each worker.
    sleeping: AtomicU64,
    workers: Vec<Wakeup>,
    promotions: Promotions,
}

/// The means to wake one worker.
struct Wakeup {
    event: EventFd,
    epoll: Epoll,
}

impl Wakeup {
    fn new() -> nix::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        Ok(Self { event, epoll })
    }
}

impl Leader {
    /// Creates the role, which no worker holds yet, for at most 64 workers.
    ///
    /// # Errors
    /// If the kernel refuses an eventfd or an epoll instance.
    pub(crate) fn new(workers: usize) -> nix::Result<Self> {
        let packets = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let workers: Vec<_> = (0..workers).map(|_| Wakeup::new()).collect::<nix::Result<_>>()?;
        for worker in &workers {
            // Edge-triggered: a follower's wake-up must not keep the leader awake.
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            packets.add(&worker.event, EpollEvent::new(flags, WAKE))?;
        }
        let (is_taken, sleeping) = (AtomicBool::new(false), AtomicU64::new(0));
        Ok(Self { packets, is_taken, sleeping, workers, promotions: Promotions::default() })
    }

    /// Adds a descriptor to those whose readability wakes the leader.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(crate) fn watch(&self, descriptor: impl AsFd, token: u64) -> nix::Result<()> {
        self.packets.add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, token))
    }

    /// Removes a descriptor from those watched. Closing it is not enough: the helper may hold a
    /// duplicate, which keeps the watch alive.
    pub(crate) fn unwatch(&self, descriptor: impl AsFd) {
        let _not_watched = self.packets.delete(descriptor);
    }

    /// Wakes every worker: the sockets were replaced, or stacks must be wiped.
    pub(crate) fn wake_all(&self) {
        for worker in 0..self.workers.len() {
            self.wake(worker);
        }
    }

    /// Wakes one worker.
    pub(crate) fn wake(&self, worker: usize) {
        if let Some(worker) = self.workers.get(worker) {
            // The write fails only if the counter is full, and then a wake-up is pending.
            let _full = worker.event.write(1);
        }
    }

    /// Waits for packets or a wake-up as the leader, or for a wake-up as a follower. Returns the
    /// number of events.
    ///
    /// # Errors
    /// As epoll_wait(2).
    pub(crate) fn wait(
        &self,
        worker: usize,
        is_leader: bool,
        events: &mut [EpollEvent],
    ) -> nix::Result<usize> {
        if is_leader {
            return self.packets.wait(events, EpollTimeout::NONE);
        }
        let Some(Wakeup { epoll, .. }) = self.workers.get(worker) else { return Ok(0) };
        let woken = epoll.wait(events, EpollTimeout::NONE);
        self.sleeping.fetch_and(!bit(worker), Ordering::SeqCst);
        woken
    }

    /// Consumes a pending wake-up, so that the next one is a new event.
    pub(crate) fn acknowledge(&self, worker: usize) {
        if let Some(worker) = self.workers.get(worker) {
            let _none = worker.event.read();
        }
    }

    /// Makes `worker` the leader if there is none; otherwise marks it as a sleeping follower.
    /// [`Self::promote_follower`] gives up the role before it looks for a sleeper, and a follower is
    /// marked as sleeping before the role is tried once more, so that at least one of the two notices
    /// the other.
    pub(crate) fn try_lead(&self, worker: usize) -> bool {
        if !self.is_taken.swap(true, Ordering::SeqCst) {
            return true;
        }
        self.sleeping.fetch_or(bit(worker), Ordering::SeqCst);
        let is_vacant = !self.is_taken.swap(true, Ordering::SeqCst);
        if is_vacant {
            self.sleeping.fetch_and(!bit(worker), Ordering::SeqCst);
        }
        is_vacant
    }

    /// True if no worker is the leader.
    pub(crate) fn is_vacant(&self) -> bool {
        !self.is_taken.load(Ordering::SeqCst)
    }

    /// Called by a leader that was promoted, which it is if it was woken before.
    pub(crate) fn was_promoted(&self) {
        self.promotions.promoted(processor());
    }

    /// Promotes a follower as [`Self::promote_follower`], unless that would probably gain nothing. False if it was skipped.
    pub(crate) fn promote_follower_if_useful(&self) -> bool {
        let is_useful = self.promotions.is_useful();
        if is_useful {
            self.promotions.promoting(processor());
            self.promote_follower();
        }
        is_useful
    }

    /// Gives up the role and wakes a follower to take it. If none sleeps, the first worker to finish
    /// its batch takes it.
    fn promote_follower(&self) {
        self.is_taken.store(false, Ordering::SeqCst);
        self.wake_follower();
    }

    /// Wakes a sleeping follower that no other thread has woken. False if there is none.
    pub(crate) fn wake_follower(&self) -> bool {
        let mut sleeping = self.sleeping.load(Ordering::SeqCst);
        while sleeping != 0 {
            let worker = sleeping.trailing_zeros() as usize;
            let before = self.sleeping.fetch_and(!bit(worker), Ordering::SeqCst);
            if before & bit(worker) != 0 {
                self.wake(worker);
                return true;
            }
            sleeping = before;
        }
        false
    }
}

/// Most promotions in a row that are skipped: some milliseconds under load.
const MAX_SKIPPED: u32 = 63;

/// The number of this thread's processor; `None` if the kernel does not say.
fn processor() -> Option<usize> {
    nix::sched::sched_getcpu().ok()
}

/// Which promotions are skipped: after each that ended on the processor where it began, twice as many and one more. Only
/// the leader uses it.
#[derive(Default)]
struct Promotions {
    /// The processor of the worker that last promoted another, plus 1; 0 if that is unknown.
    begun_on: AtomicUsize,
    skipped_at_once: AtomicU32,
    skipped_now: AtomicU32,
}

impl Promotions {
    fn is_useful(&self) -> bool {
        let left = self.skipped_now.load(Ordering::Relaxed);
        self.skipped_now.store(left.saturating_sub(1), Ordering::Relaxed);
        left == 0
    }

    fn promoting(&self, processor: Option<usize>) {
        self.begun_on.store(processor.map_or(0, |number| number + 1), Ordering::Relaxed);
    }

    fn promoted(&self, processor: Option<usize>) {
        let begun_on = self.begun_on.load(Ordering::Relaxed);
        let is_useless = processor.is_some_and(|number| number + 1 == begun_on);
        let skipped = self.skipped_at_once.load(Ordering::Relaxed);
        let skipped = if is_useless { (2 * skipped + 1).min(MAX_SKIPPED) } else { 0 };
        self.skipped_at_once.store(skipped, Ordering::Relaxed);
        self.skipped_now.store(skipped, Ordering::Relaxed);
    }
}

const fn bit(worker: usize) -> u64 {
    if worker < u64::BITS as usize { 1 << worker } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn is_woken(leader: &Leader, worker: usize) -> bool {
        let mut events = [EpollEvent::empty()];
        let ready = leader.workers[worker].epoll.wait(&mut events, EpollTimeout::ZERO);
        ready == Ok(1)
    }

    #[test]
    fn one_worker_is_the_leader_and_promotes_a_follower_that_sleeps() {
        let leader = Leader::new(3).unwrap();
        assert!(leader.try_lead(1));
        assert!(!leader.try_lead(0) && !leader.try_lead(2));
        leader.promote_follower();
        assert_eq!([0, 1, 2].map(|worker| is_woken(&leader, worker)), [true, false, false]);
        leader.acknowledge(0);
        assert!(leader.try_lead(0));
        leader.promote_follower();
        assert_eq!([0, 1, 2].map(|worker| is_woken(&leader, worker)), [false, false, true]);
        leader.acknowledge(2);
        // No follower sleeps, so none is woken.
        assert!(leader.try_lead(2));
        leader.promote_follower();
        assert_eq!([0, 1, 2].map(|worker| is_woken(&leader, worker)), [false; 3]);
        assert!(leader.try_lead(1));
    }

    #[test]
    fn no_packet_is_left_behind_however_often_a_follower_is_promoted() {
        const PACKETS: usize = 20_000;
        for workers in [1, 2, 4] {
            let leader = Leader::new(workers).unwrap();
            let (ours, packets) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
            leader.watch(&ours, 7).unwrap();
            let taken = AtomicUsize::new(0);
            let work = |worker: usize, ours: &OwnedFd| {
                let mut is_leader = false;
                while taken.load(Ordering::SeqCst) < PACKETS {
                    let mut events = [EpollEvent::empty(); 8];
                    is_leader = is_leader || leader.try_lead(worker);
                    let ready = leader.wait(worker, is_leader, &mut events).unwrap();
                    leader.acknowledge(worker);
                    if is_leader && events[..ready].iter().any(|event| event.data() == 7) {
                        let mut batch = [0; 3];
                        let count = nix::unistd::read(ours, &mut batch).unwrap_or(0);
                        if count == batch.len() {
                            leader.promote_follower();
                            is_leader = false;
                        }
                        taken.fetch_add(count, Ordering::SeqCst);
                    }
                }
                leader.wake_all();
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

    #[test]
    fn promotions_that_end_where_they_begin_are_skipped_more_and_more() {
        let promotions = Promotions::default();
        let promote = |from, to| {
            promotions.promoting(from);
            promotions.promoted(to);
            (0..100).take_while(|_| !promotions.is_useful()).count()
        };
        let same = [(); 8].map(|()| promote(Some(3), Some(3)));
        assert_eq!(same, [1, 3, 7, 15, 31, 63, 63, 63]);
        assert_eq!(promote(Some(3), Some(4)), 0);
        assert_eq!(promote(Some(0), Some(0)), 1, "it begins anew");
        assert_eq!(promote(None, None), 0, "unknown");
    }
}
