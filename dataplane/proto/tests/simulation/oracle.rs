//! Devices against `snow`: handshakes and data in both roles, with and without a preshared key, over
//! random keys.

use std::net::SocketAddr;
use std::time::Duration;
use wgsep_proto::{PresharedKey, PublicKey};
use wgsep_simulation::dice::Dice;
use wgsep_simulation::host::{HostId, inner_v4};
use wgsep_simulation::link::Kind;
use wgsep_simulation::oracle::{Oracle, Session};
use wgsep_simulation::packet;
use wgsep_simulation::simulation::Simulation;

/// Sets of keys for each of the two roles.
const KEY_SETS: u64 = 300;

/// A device with the oracle as its only peer.
struct Encounter {
    simulation: Simulation,
    host: HostId,
    oracle: Oracle,
    address: SocketAddr,
    dice: Dice,
}

impl Encounter {
    /// Every third has no preshared key.
    fn new(seed: u64) -> Self {
        let mut dice = Dice::new(!seed);
        let mut simulation = Simulation::new(seed);
        let (host, place) = (simulation.add_host(), simulation.add_host());
        let preshared_key = if seed.is_multiple_of(3) { [0; 32] } else { dice.bytes() };
        let public_key = *simulation.host(host).public_key.as_bytes();
        let oracle = Oracle::new(&mut dice, public_key, preshared_key);
        let mut peer = simulation.host(place).as_peer();
        peer.public_key = PublicKey::from_bytes(*oracle.public_key());
        peer.preshared_key = Some(PresharedKey::from_bytes(preshared_key));
        simulation.configure_peer(host, peer);
        simulation.set_filter(|_| false);
        let address = simulation.host(place).address;
        Self { simulation, host, oracle, address, dice }
    }

    fn ours(&self) -> std::net::IpAddr {
        self.simulation.host(self.host).inner_v4()
    }

    fn inject(&mut self, datagram: &[u8]) {
        self.simulation.inject(self.address, self.host, datagram);
    }

    /// A random packet to the device, and its answer back.
    fn exchange(&mut self, session: &mut Session) {
        let len = packet::MIN_LEN + usize::try_from(self.dice.below(1300)).unwrap();
        let (tag, class) = (self.dice.roll(), 0);
        let request = packet::request(inner_v4(1), self.ours(), len, class, tag);
        let datagram = session.seal(&request);
        self.inject(&datagram);
        let host = self.simulation.host(self.host);
        assert_eq!(host.received.last().unwrap().1, request);
        let (_, answer) = session.open(&self.simulation.last(self.host, Kind::Data).payload);
        assert_eq!(answer.len(), len.next_multiple_of(16).min(1420.max(len)));
        assert_eq!(answer[..len], packet::reply(&request).unwrap());
        assert!(answer[len..].iter().all(|padding| *padding == 0));
    }
}

/// The label of a timestamp at this time of day (whitepaper, section 5.1): 2^62 and 10 s more, the
/// nanoseconds without their low 24 bits.
fn timestamp(wall: Duration) -> [u8; 12] {
    let seconds = (1u64 << 62) + 10 + wall.as_secs();
    let nanoseconds = wall.subsec_nanos() >> 24 << 24;
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&seconds.to_be_bytes());
    bytes[8..].copy_from_slice(&nanoseconds.to_be_bytes());
    bytes
}

#[test]
fn a_device_answers_what_snow_initiates() {
    for seed in 0..KEY_SETS {
        let mut encounter = Encounter::new(seed);
        let index = u32::try_from(encounter.dice.below(1 << 32)).unwrap();
        let stamp = timestamp(encounter.simulation.now().wall);
        let pending = encounter.oracle.initiate(stamp, index);
        let initiation = pending.datagram.clone();
        encounter.inject(&initiation);
        let response = encounter.simulation.last(encounter.host, Kind::Response).payload;
        let mut session = encounter.oracle.finish(pending, &response);
        for _ in 0..3 {
            encounter.exchange(&mut session);
        }
    }
}

#[test]
fn snow_answers_what_a_device_initiates() {
    for seed in 0..KEY_SETS {
        let mut encounter = Encounter::new(seed);
        let offset = Duration::from_nanos(encounter.dice.below(1 << 50));
        encounter.simulation.run_for(offset);
        let tag = encounter.dice.roll();
        let request = packet::request(encounter.ours(), inner_v4(1), 84, 0, tag);
        encounter.simulation.send(encounter.host, &request);
        let initiation = encounter.simulation.last(encounter.host, Kind::Initiation).payload;
        let index = u32::try_from(encounter.dice.below(1 << 32)).unwrap();
        let (response, mut session, stamp) = encounter.oracle.respond(&initiation, index);
        assert_eq!(stamp, timestamp(encounter.simulation.now().wall));
        encounter.inject(&response);
        let first = encounter.simulation.last(encounter.host, Kind::Data);
        let (counter, packet) = session.open(&first.payload);
        assert_eq!((counter, &packet[..84]), (0, &request[..]));
        for _ in 0..3 {
            encounter.exchange(&mut session);
        }
    }
}

#[test]
fn a_different_preshared_key_is_found_out() {
    for seed in 0..20 {
        let mut encounter = Encounter::new(seed);
        let mut change = wgsep_proto::PeerConfiguration::new(PublicKey::from_bytes(
            *encounter.oracle.public_key(),
        ));
        change.preshared_key = Some(PresharedKey::from_bytes(encounter.dice.bytes()));
        encounter.simulation.configure_peer(encounter.host, change);
        let request = packet::request(encounter.ours(), inner_v4(1), 84, 0, 0);
        encounter.simulation.send(encounter.host, &request);
        let initiation = encounter.simulation.last(encounter.host, Kind::Initiation).payload;
        let (response, ..) = encounter.oracle.respond(&initiation, 1);
        encounter.inject(&response);
        assert_eq!(encounter.simulation.count(encounter.host, Kind::Data), 0);
    }
}
