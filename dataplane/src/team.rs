//! The control thread's Diffie-Hellmans, shared among it and the workers that have nothing to do.
//!
//! Neither a worker with packets to carry nor the one that waits for them helps: with no other, the
//! control thread does all. It waits for what a helper has begun, which the scheduler may make longer
//! than doing it.

use crate::leader::Leader;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use wgsep_proto::device::{Alone, Task, Team as _};

/// Tasks of one round for each thread: fewer are not worth waking one more.
const TASKS_PER_THREAD: usize = 2;

/// Tasks that wait, and those that are done.
#[derive(Default)]
pub(crate) struct Team {
    tasks: Mutex<Tasks>,
    /// None waits any more, and one more is done.
    done: Condvar,
}

/// Each with its place among those that came with it.
#[derive(Default)]
struct Tasks {
    waiting: VecDeque<(usize, Task)>,
    done: Vec<(usize, Task)>,
}

impl Team {
    fn lock(&self) -> MutexGuard<'_, Tasks> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs all tasks, with the help of workers that wait to be called. Gives them back in order. Only
    /// the control thread calls it.
    pub(crate) fn run(&self, leader: &Leader, mut tasks: Vec<Task>) -> Vec<Task> {
        let helpers = (tasks.len() / TASKS_PER_THREAD).saturating_sub(1);
        if helpers == 0 {
            return Alone.run(tasks);
        }
        let count = tasks.len();
        {
            let mut shared = self.lock();
            // Here, so that it is the control thread's memory that holds secrets.
            shared.done.reserve_exact(count);
            shared.waiting.reserve_exact(count);
            shared.waiting.extend(tasks.drain(..).enumerate());
        }
        let _called = (0..helpers).take_while(|_| leader.wake_follower()).count();
        while self.help() {}
        let mut done = {
            let mut shared = self.lock();
            while shared.done.len() < count {
                shared = self.done.wait(shared).unwrap_or_else(PoisonError::into_inner);
            }
            // A task leaves a copy where it was; freeing erases that.
            shared.waiting = VecDeque::new();
            core::mem::take(&mut shared.done)
        };
        done.sort_unstable_by_key(|(place, _)| *place);
        tasks.extend(done.into_iter().map(|(_, task)| task));
        tasks
    }

    /// Runs one of the tasks that wait, if there is any.
    pub(crate) fn help(&self) -> bool {
        let Some((place, mut task)) = self.lock().waiting.pop_front() else { return false };
        task.run();
        let mut tasks = self.lock();
        tasks.done.push((place, task));
        let may_be_last = tasks.waiting.is_empty();
        drop(tasks);
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
    use core::time::Duration;
    use nix::sys::epoll::EpollEvent;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread;
    use wgsep_proto::config::{Configuration, PeerConfiguration};
    use wgsep_proto::cookie::CookieGenerator;
    use wgsep_proto::device::{self, Device, HandshakeDatagram};
    use wgsep_proto::handshake::{Handshake, StaticIdentity};
    use wgsep_proto::keys::PrivateKey;
    use wgsep_proto::messages::{INITIATION_LEN, Message};
    use wgsep_proto::peer::Endpoint;
    use wgsep_proto::tai64n::Tai64n;
    use wgsep_proto::time::{Instant, Now};

    const CLIENTS: u8 = 40;

    struct Helped<'a>(&'a Team, &'a Leader);

    impl device::Team for Helped<'_> {
        fn run(&self, tasks: Vec<Task>) -> Vec<Task> {
            self.0.run(self.1, tasks)
        }
    }

    /// A device, and clients with an initiation each.
    fn device_and_clients() -> (Device, Vec<(StaticIdentity, Handshake, [u8; INITIATION_LEN])>) {
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
        let mut device = Device::new(Box::new(KernelRandom));
        let private_key = Some(Some(private_key));
        device.configure(Configuration { private_key, peers, ..Configuration::default() }, NOW);
        device.set_up(true, NOW);
        (device, clients)
    }

    const NOW: Now = Now { instant: Instant::from_nanos(1), wall: Duration::from_secs(1) };

    /// Each client's response is its own, whoever wrote it; how many tasks the helpers did.
    fn answers_all_with(helpers: usize) -> usize {
        let (team, leader) = (Team::default(), Leader::new(1 + helpers).unwrap());
        let (helped, ends) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (mut device, mut clients) = device_and_clients();
        // The leader, who has packets to carry.
        assert!(leader.try_lead(0));
        thread::scope(|scope| {
            for helper in 1..=helpers {
                let (team, leader, helped, ends) = (&team, &leader, &helped, &ends);
                scope.spawn(move || {
                    while !ends.load(Ordering::SeqCst) {
                        assert!(!leader.try_lead(helper));
                        leader.wait(helper, false, &mut [EpollEvent::empty()]).unwrap();
                        leader.acknowledge(helper);
                        while team.help() {
                            helped.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                });
            }
            let source = Endpoint::new(([192, 0, 2, 1], 7).into());
            let datagrams = clients.iter().map(|(.., datagram)| HandshakeDatagram {
                source,
                datagram,
                waiting: 0,
            });
            device.receive_handshakes(datagrams, &Helped(&team, &leader), NOW);
            ends.store(true, Ordering::SeqCst);
            leader.wake_all();
        });
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
        let tasks = team.lock();
        let kept = tasks.waiting.capacity() + tasks.done.capacity();
        assert_eq!(kept, 0, "no copy of a secret is kept");
        drop(tasks);
        helped.into_inner()
    }

    #[test]
    fn all_initiations_are_answered_with_any_number_of_helpers() {
        assert_eq!(answers_all_with(0), 0);
        for helpers in [1, 3] {
            let helped = (0..10).map(|_| answers_all_with(helpers)).sum::<usize>();
            assert!(helped > 0, "{helpers} helpers do something");
        }
    }
}
