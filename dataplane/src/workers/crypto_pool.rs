//! The handshakes' Diffie-Hellman operations, run by the control thread and by workers without packets.
//!
//! Neither a worker that carries packets nor the leader, which waits for them, runs crypto jobs; without
//! another worker, the control thread runs them all. At the end it waits for the jobs that workers have
//! begun, which may take longer than running them itself if the scheduler suspends such a worker.

use crate::workers::leader::Leader;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use wgsep_proto::device::control_plane::{CryptoJob, Inline, JobRunner as _};
use wgsep_proto::secret::check;

/// Jobs of one round for each thread: with fewer, waking one more thread costs more than it saves.
const JOBS_PER_THREAD: usize = 2;

/// Crypto jobs that are pending, and those that are done.
#[derive(Default)]
pub(crate) struct CryptoPool {
    jobs: Mutex<Jobs>,
    /// Notified when a job is done and none is pending.
    done: Condvar,
}

/// The jobs of one round, each with its index in the order in which they were submitted.
#[derive(Default)]
struct Jobs {
    pending: VecDeque<(usize, CryptoJob)>,
    done: Vec<(usize, CryptoJob)>,
}

impl CryptoPool {
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs all jobs, together with the followers that it wakes, and returns them in order. Only the
    /// control thread calls it.
    pub(crate) fn run(&self, leader: &Leader, mut jobs: Vec<CryptoJob>) -> Vec<CryptoJob> {
        let followers = (jobs.len() / JOBS_PER_THREAD).saturating_sub(1);
        if followers == 0 {
            return Inline.run(jobs);
        }
        let count = jobs.len();
        {
            let mut shared = self.lock();
            // Allocated here, so that the secrets are in memory of the control thread's heap.
            shared.done.reserve_exact(count);
            shared.pending.reserve_exact(count);
            shared.pending.extend(jobs.drain(..).enumerate());
        }
        let _woken = (0..followers).take_while(|_| leader.wake_follower()).count();
        while self.run_one() {}
        let mut done = {
            let mut shared = self.lock();
            while shared.done.len() < count {
                shared = self.done.wait(shared).unwrap_or_else(PoisonError::into_inner);
            }
            // Moving a job leaves a copy behind, which freeing the memory erases.
            shared.pending = VecDeque::new();
            core::mem::take(&mut shared.done)
        };
        done.sort_unstable_by_key(|(index, _)| *index);
        jobs.extend(done.into_iter().map(|(_, job)| job));
        jobs
    }

    /// Runs one pending job. False if there is none.
    pub(crate) fn run_one(&self) -> bool {
        let Some((index, mut job)) = self.lock().pending.pop_front() else { return false };
        job.run();
        let mut jobs = self.lock();
        jobs.done.push((index, job));
        check(jobs.done.as_ptr());
        let may_be_last = jobs.pending.is_empty();
        drop(jobs);
        if may_be_last {
            self.done.notify_one();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::KernelRandom;
    use crate::secret::Allocates;
    use crate::secret::tests::start;
    use core::time::Duration;
    use nix::sys::epoll::EpollEvent;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use wgsep_proto::device::control_plane::{self, ControlPlane, HandshakeDatagram};
    use wgsep_proto::noise::cookie::CookieGenerator;
    use wgsep_proto::noise::handshake::{Handshake, StaticIdentity};
    use wgsep_proto::noise::tai64n::Tai64n;
    use wgsep_proto::wire::messages::{INITIATION_LEN, Message};
    use wgsep_proto::{Configuration, Endpoint, Instant, Now, PeerConfiguration, PrivateKey};

    const CLIENTS: u8 = 40;

    struct Runner<'a>(&'a CryptoPool, &'a Leader);

    impl control_plane::JobRunner for Runner<'_> {
        fn run(&self, jobs: Vec<CryptoJob>) -> Vec<CryptoJob> {
            self.0.run(self.1, jobs)
        }
    }

    /// A device, and clients with an initiation each.
    fn device_and_clients() -> (ControlPlane, Vec<(StaticIdentity, Handshake, [u8; INITIATION_LEN])>)
    {
        let private_key = PrivateKey::from_bytes([200; 32]).unwrap();
        let public_key = private_key.public_key();
        let (mut clients, mut peers) = (Vec::new(), Vec::new());
        for number in 1..=CLIENTS {
            let identity = StaticIdentity::new(&PrivateKey::from_bytes([number; 32]).unwrap());
            peers.push(PeerConfiguration::new(*identity.public_key()));
            let mut handshake = Handshake::new(public_key);
            let stamp = Tai64n::from_wall(Duration::from_secs(1));
            let index = number.into();
            let initiation =
                handshake.create_initiation(&identity, &[number; 32], stamp, index).unwrap();
            let mut datagram = initiation.to_bytes();
            CookieGenerator::new(&public_key).add_macs(&mut datagram, NOW.instant);
            clients.push((identity, handshake, datagram));
        }
        let mut device = ControlPlane::new(Box::new(KernelRandom));
        let private_key = Some(Some(private_key));
        device.configure(Configuration { private_key, peers, ..Configuration::default() });
        device.set_up(true);
        (device, clients)
    }

    const NOW: Now = Now { instant: Instant::from_nanos(1), wall: Duration::from_secs(1) };

    /// Checks that each client gets its own response, whichever thread wrote it, and on all threads that key material
    /// is in secret memory; returns how many jobs the followers ran.
    fn answers_all_with(followers: usize) -> usize {
        let outcome = start(Allocates::Secrets, move || answer_all_with(followers));
        // Where a follower panics, its job is never done.
        outcome.recv_timeout(Duration::from_secs(60)).unwrap().unwrap()
    }

    fn answer_all_with(followers: usize) -> usize {
        let pool = Arc::new(CryptoPool::default());
        let leader = Arc::new(Leader::new(1 + followers).unwrap());
        let (run, ends) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (mut device, mut clients) = device_and_clients();
        // The leader, which carries packets.
        assert!(leader.try_lead(0));
        let follow = |follower| {
            let (pool, leader) = (Arc::clone(&pool), Arc::clone(&leader));
            let (run, ends) = (Arc::clone(&run), Arc::clone(&ends));
            start(Allocates::Packets, move || {
                while !ends.load(Ordering::SeqCst) {
                    assert!(!leader.try_lead(follower));
                    leader.wait(follower, false, &mut [EpollEvent::empty()]).unwrap();
                    leader.acknowledge(follower);
                    while pool.run_one() {
                        run.fetch_add(1, Ordering::SeqCst);
                    }
                }
            })
        };
        let threads: Vec<_> = (1..=followers).map(follow).collect();
        let endpoint = Endpoint::new(([192, 0, 2, 1], 7).into());
        let datagrams = clients.iter().map(|(.., datagram)| HandshakeDatagram {
            endpoint,
            datagram,
            waiting: 0,
        });
        device.receive_handshakes(datagrams, &Runner(&pool, &leader), NOW);
        ends.store(true, Ordering::SeqCst);
        leader.wake_all();
        for thread in threads {
            thread.recv().unwrap().unwrap();
        }
        let mut answered = 0;
        while let Some(transmit) = device.poll_transmit() {
            let Some(Message::Response(response)) = Message::parse(&transmit.datagram) else {
                panic!("no response");
            };
            let (identity, handshake, _) = &mut clients[response.receiver_index as usize - 1];
            handshake.consume_response(identity, &response).unwrap();
            answered += 1;
        }
        assert_eq!(answered, CLIENTS);
        let jobs = pool.lock();
        let kept = jobs.pending.capacity() + jobs.done.capacity();
        assert_eq!(kept, 0, "no copy of a secret is kept");
        run.load(Ordering::SeqCst)
    }

    #[test]
    fn all_initiations_are_answered_with_any_number_of_followers() {
        assert_eq!(answers_all_with(0), 0);
        for followers in [1, 3] {
            let run = (0..10).map(|_| answers_all_with(followers)).sum::<usize>();
            assert!(run > 0, "{followers} followers run some jobs");
        }
    }
}
