//! The packet path on several threads while the control thread rekeys, configures and removes.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use wgsep_proto::path::data_path::{AllowedIpTable, DataPath};
use wgsep_proto::path::inbound::{InboundBatch, Receive};
use wgsep_proto::path::outbound::{OutboundBatch, Whole};
use wgsep_proto::wire::messages::Message;
use wgsep_proto::{DropCause, Ecn, Endpoint, Instant};
use wgsep_simulation::host::HostId;
use wgsep_simulation::link::Kind;
use wgsep_simulation::packet;
use wgsep_simulation::simulation::Simulation;

const WORKERS: usize = 4;
const ROUNDS: usize = 300;

/// Datagrams that the workers of one device send and those of the other take.
type Wire = Mutex<Vec<Vec<u8>>>;

/// A nonce of one device: the receiver index, which identifies the keypair, and the counter.
type Nonce = (u32, u64);

/// Packets that a worker sends at once.
const PACKETS: usize = 3;

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
    /// Sends packets and receives what is there, until `stop` is set; returns the nonces used.
    fn run(&self, stop: &AtomicBool) -> Vec<Nonce> {
        let mut nonces = Vec::new();
        let mut allowed_ips = self.data_path.allowed_ips.reader();
        let (mut outbound, mut inbound) =
            (OutboundBatch::with_capacity(PACKETS, 256), InboundBatch::with_capacity(1, 1024));
        while !stop.load(Ordering::Relaxed) {
            allowed_ips.refresh(&self.data_path.allowed_ips);
            self.send(allowed_ips.value(), &mut outbound, &mut nonces);
            self.receive(allowed_ips.value(), &mut inbound);
        }
        nonces
    }

    fn send(
        &self,
        allowed_ips: &AllowedIpTable,
        batch: &mut OutboundBatch<Whole>,
        nonces: &mut Vec<Nonce>,
    ) {
        let packets = self.packet.repeat(PACKETS);
        let mut memory = vec![0; 0x10000];
        let len = self.packet.len();
        let read = (0..PACKETS).map(|number| (number * len..(number + 1) * len, Whole::new));
        batch.route(&self.data_path, allowed_ips, &packets, read, self.now, |_no_peer| ());
        batch.reserve_nonces(&self.data_path, &packets, &mut memory, self.now);
        while batch.seal(&self.data_path, &packets, &mut memory) {
            for datagram in batch.sealed_runs().flat_map(|run| run.datagrams) {
                let bytes = memory[datagram.bytes.clone()].to_vec();
                let Some(Message::Transport(header)) = Message::parse(&bytes) else { panic!() };
                nonces.push((header.receiver_index, header.counter));
                self.outward.lock().unwrap().push(bytes);
            }
        }
        batch.clear();
    }

    fn receive(&self, allowed_ips: &AllowedIpTable, batch: &mut InboundBatch) {
        let arrived = std::mem::take(&mut *self.inward.lock().unwrap());
        let mut memory = arrived.concat();
        let mut end = 0;
        let receives = arrived.iter().map(|datagram| {
            let (start, segment_len) = (end, datagram.len());
            end += segment_len;
            Receive { bytes: start..end, segment_len, endpoint: self.from, ecn: Ecn::NOT_CAPABLE }
        });
        let receives: Vec<_> = receives.collect();
        batch.parse(&self.data_path, &memory, &receives, |_, _| panic!("a handshake message"));
        batch.open(&self.data_path, &mut memory, self.now);
        batch.accept(&self.data_path, allowed_ips, &mut memory, self.now);
        batch.clear();
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
    // Datagrams of the control thread arrive, but the workers' clock is stopped.
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
    let nonces: Vec<(usize, Nonce)> = thread::scope(|scope| {
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
        let of_device = |(number, worker): (usize, thread::ScopedJoinHandle<'_, Vec<Nonce>>)| {
            worker.join().unwrap().into_iter().map(move |nonce| (number % 2, nonce))
        };
        running.into_iter().enumerate().flat_map(of_device).collect()
    });
    let distinct: BTreeSet<_> = nonces.iter().collect();
    assert_eq!(distinct.len(), nonces.len(), "a nonce was used twice");
    assert!(nonces.len() > ROUNDS, "{} packets are no test", nonces.len());
    // What came by a live index is authentic, whatever happened to the peer meanwhile.
    for host in [a, b] {
        assert_eq!(simulation.host(host).drops(DropCause::Unauthentic), 0);
    }
    assert!(simulation.count(a, Kind::Initiation) + simulation.count(b, Kind::Initiation) > 10);

    simulation.change_peer(b, a, |peer| peer.remove = true);
    simulation.change_peer(a, b, |peer| peer.remove = true);
    for host in [a, b] {
        assert_eq!(simulation.host(host).indices(), 0);
        assert_eq!(simulation.host(host).device.next_timeout(), None);
    }
}
