//! The packet path on several threads while the control thread rekeys, configures and removes.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use wgsep_proto::data_path::DataPath;
use wgsep_proto::ip::Ecn;
use wgsep_proto::keypair::Keypair;
use wgsep_proto::messages::{Message, TRANSPORT_HEADER_LEN};
use wgsep_proto::peer::Endpoint;
use wgsep_proto::receive::Received;
use wgsep_proto::send::{datagram_len, seal};
use wgsep_proto::time::Instant;
use wgsep_tests::sim::host::HostId;
use wgsep_tests::sim::link::Kind;
use wgsep_tests::sim::packet;
use wgsep_tests::sim::simulation::Simulation;

const WORKERS: usize = 4;
const ROUNDS: usize = 300;

/// Datagrams that the workers of one device send and those of the other take.
type Wire = Mutex<Vec<Vec<u8>>>;

/// A nonce: the keypair, by its address, and the counter. The keypair is kept so that no other can
/// have the same address.
type Nonce = (Arc<Keypair>, u64);

/// What one worker of a device does.
struct Worker {
    data_path: Arc<DataPath>,
    packet: Vec<u8>,
    outward: Arc<Wire>,
    inward: Arc<Wire>,
    from: Endpoint,
    now: Instant,
}

impl Worker {
    /// Sends three packets and receives what is there, until `stop` is set; returns the nonces used.
    fn run(&self, stop: &AtomicBool) -> Vec<Nonce> {
        let mut nonces = Vec::new();
        let mut allowed_ips = self.data_path.allowed_ips.reader();
        while !stop.load(Ordering::Relaxed) {
            allowed_ips.refresh(&self.data_path.allowed_ips);
            if let Ok((peer, _)) = self.data_path.route(allowed_ips.value(), &self.packet) {
                let reservation = self.data_path.reserve_nonces(peer, 3, self.now, |staged| {
                    (0..3).map(|_| staged.stage_packet(&self.packet)).sum()
                });
                if let Some(reservation) = reservation {
                    let count = reservation.staged.len() as u64 + 3;
                    for counter in reservation.first_counter..reservation.first_counter + count {
                        nonces.push((Arc::clone(&reservation.keypair), counter));
                        self.send(&reservation.keypair, counter);
                    }
                }
            }
            let arrived = std::mem::take(&mut *self.inward.lock().unwrap());
            for datagram in arrived {
                self.receive(allowed_ips.value(), datagram);
            }
        }
        nonces
    }

    fn send(&self, keypair: &Keypair, counter: u64) {
        let mut datagram = vec![0; datagram_len(self.packet.len(), 1420)];
        datagram[TRANSPORT_HEADER_LEN..][..self.packet.len()].copy_from_slice(&self.packet);
        assert!(seal(keypair, counter, &mut datagram, self.packet.len()));
        self.outward.lock().unwrap().push(datagram);
    }

    fn receive(&self, allowed_ips: &wgsep_proto::data_path::AllowedIpTable, mut datagram: Vec<u8>) {
        let Some(Message::Transport(header)) = Message::parse(&datagram) else { panic!() };
        let Some((peer, keypair)) =
            self.data_path.index_table.lookup_keypair(header.receiver_index)
        else {
            return;
        };
        let sealed = &mut datagram[TRANSPORT_HEADER_LEN..];
        // What came by a live index is authentic, whatever happened to the peer meanwhile.
        assert_eq!(keypair.open(header.counter, sealed, self.now), Ok(()));
        let end = sealed.len() - 16;
        let received = Received {
            peer: &peer,
            keypair: &keypair,
            counter: header.counter,
            endpoint: self.from,
            ecn: Ecn::NOT_CAPABLE,
        };
        self.data_path.accept(&received, allowed_ips, &mut sealed[..end], self.now);
    }
}

fn workers(simulation: &Simulation, ids: [HostId; 2]) -> Vec<Worker> {
    let wires: [Arc<Wire>; 2] = [Arc::default(), Arc::default()];
    let mut workers = Vec::new();
    for number in 0..WORKERS {
        let (us, them) = (number % 2, 1 - number % 2);
        let (ours, theirs) = (simulation.host(ids[us]), simulation.host(ids[them]));
        workers.push(Worker {
            data_path: Arc::clone(ours.device.data_path()),
            packet: packet::request(ours.inner_v4(), theirs.inner_v4(), 100, 0, 0),
            outward: Arc::clone(&wires[them]),
            inward: Arc::clone(&wires[us]),
            from: Endpoint::new(theirs.address),
            now: simulation.now().instant,
        });
    }
    workers
}

/// Rekeys by link changes, removes and returns peers, and answers what workers ask for.
fn disturb(simulation: &mut Simulation, [a, b]: [HostId; 2], round: usize) {
    match round % 5 {
        0 => {
            simulation.set_up(a, false);
            simulation.set_up(a, true);
        }
        1 => simulation.change_peer(a, b, |peer| peer.remove = true),
        2 => simulation.introduce(a, b),
        3 => simulation.change_peer(b, a, |peer| peer.persistent_keepalive_interval = Some(9)),
        _ => simulation.change_peer(b, a, |peer| peer.persistent_keepalive_interval = Some(0)),
    }
    // Datagrams of the control thread arrive, but the workers' clock stands still.
    simulation.run_for(Duration::from_millis(25));
}

#[test]
fn no_nonce_is_used_twice_and_no_index_leaks_whatever_happens_meanwhile() {
    let (mut simulation, a, b) = Simulation::pair(1);
    simulation.link.latency = Duration::from_millis(1);
    for host in [a, b] {
        simulation.host_mut(host).answers = false;
    }
    let stop = AtomicBool::new(false);
    let workers = workers(&simulation, [a, b]);
    let nonces: Vec<Nonce> = thread::scope(|scope| {
        let running: Vec<_> =
            workers.iter().map(|worker| scope.spawn(|| worker.run(&stop))).collect();
        for round in 0..ROUNDS {
            disturb(&mut simulation, [a, b], round);
            for host in [a, b] {
                simulation.flush(host);
                assert!(simulation.host(host).indices() <= 4);
            }
            thread::sleep(Duration::from_micros(200));
        }
        stop.store(true, Ordering::Relaxed);
        running.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    let distinct: BTreeSet<_> =
        nonces.iter().map(|(keypair, counter)| (Arc::as_ptr(keypair), *counter)).collect();
    assert_eq!(distinct.len(), nonces.len(), "a nonce was used twice");
    assert!(nonces.len() > ROUNDS, "{} packets are no test", nonces.len());
    assert!(simulation.count(a, Kind::Initiation) + simulation.count(b, Kind::Initiation) > 10);

    simulation.change_peer(b, a, |peer| peer.remove = true);
    simulation.change_peer(a, b, |peer| peer.remove = true);
    for host in [a, b] {
        assert_eq!(simulation.host(host).indices(), 0);
        assert_eq!(simulation.host(host).device.next_timeout(), None);
    }
}
