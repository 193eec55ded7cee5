//! Configuration of simulated devices: what a `get` shows, and what a `set` moves.

use std::time::Duration;
use wgsep_proto::session::peer::{MAX_STAGED_PACKETS, StagedPackets};
use wgsep_proto::{
    AllowedIp, Configuration, Device, DropCause, Event, PeerConfiguration, PrivateKey, PublicKey,
};
use wgsep_simulation::host::{HostId, allow, inner_v4};
use wgsep_simulation::link::Kind;
use wgsep_simulation::packet::{PING_LEN, request};
use wgsep_simulation::simulation::Simulation;

const SECOND: Duration = Duration::from_secs(1);

fn key(number: u8) -> PublicKey {
    PublicKey::from_bytes([number; 32])
}

fn add(simulation: &mut Simulation, host: HostId, numbers: &[u8], replace_peers: bool) {
    let peers = numbers.iter().map(|number| PeerConfiguration::new(key(*number))).collect();
    let configuration = Configuration { replace_peers, peers, ..Configuration::default() };
    simulation.configure(host, configuration);
}

fn peers(simulation: &Simulation, host: HostId) -> Vec<u8> {
    let peers = simulation.host(host).device.peers();
    peers.map(|peer| peer.public_key.as_bytes()[0]).collect()
}

fn allowed_ips(simulation: &Simulation, host: HostId, peer: HostId) -> Vec<String> {
    let show = |ip: &AllowedIp| format!("{}/{}", ip.address(), ip.cidr());
    simulation.peer(host, peer).allowed_ips.iter().map(show).collect()
}

#[test]
fn peers_are_listed_in_the_order_of_creation() {
    let mut simulation = Simulation::new(1);
    let host = simulation.add_host();
    add(&mut simulation, host, &[9, 3, 7], false);
    assert_eq!(peers(&simulation, host), [9, 3, 7]);
    let mut removal = PeerConfiguration::new(key(9));
    removal.remove = true;
    simulation.configure_peer(host, removal);
    add(&mut simulation, host, &[1], false);
    assert_eq!(peers(&simulation, host), [3, 7, 1]);
    add(&mut simulation, host, &[3, 7, 1], true);
    assert_eq!(peers(&simulation, host), [3, 7, 1], "what setconf writes is what showconf read");
}

#[test]
fn allowed_ips_are_listed_in_the_order_given_and_move_to_whom_they_are_given() {
    let (mut simulation, a, b) = Simulation::pair(2);
    let c = simulation.add_host();
    simulation.introduce(a, c);
    simulation.change_peer(a, b, |peer| {
        peer.allowed_ips = ["10.9.0.0", "10.1.0.0", "10.5.0.0"]
            .map(|address| allow(address.parse().unwrap(), 24))
            .to_vec();
    });
    let of_b = ["10.0.0.1/32", "fd00::2/128", "10.9.0.0/24", "10.1.0.0/24", "10.5.0.0/24"];
    assert_eq!(allowed_ips(&simulation, a, b)[1..], of_b[1..]);
    simulation.change_peer(a, c, |peer| {
        peer.allowed_ips = vec![allow("10.1.0.0".parse().unwrap(), 24)];
    });
    assert_eq!(allowed_ips(&simulation, a, b)[1..], ["fd00::2/128", "10.9.0.0/24", "10.5.0.0/24"]);
    assert_eq!(allowed_ips(&simulation, a, c).last().unwrap(), "10.1.0.0/24");
}

#[test]
fn only_its_owner_can_give_an_allowed_ip_up() {
    let (mut simulation, a, b) = Simulation::pair(3);
    let c = simulation.add_host();
    simulation.introduce(a, c);
    let of_b = simulation.host(b).inner_v4();
    let give_up = |peer: &mut PeerConfiguration| {
        let mut change = allow(of_b, 32);
        change.remove = true;
        peer.allowed_ips = vec![change];
    };
    simulation.change_peer(a, c, give_up);
    assert!(simulation.reaches(a, b));
    simulation.change_peer(a, b, give_up);
    assert!(!simulation.reaches(a, b));
    assert_eq!(allowed_ips(&simulation, a, b), ["fd00::2/128"]);
}

#[test]
fn replacing_allowed_ips_leaves_those_given_in_the_same_breath() {
    let (mut simulation, a, b) = Simulation::pair(4);
    simulation.change_peer(a, b, |peer| {
        peer.replace_allowed_ips = true;
        peer.allowed_ips = vec![allow("10.7.0.0".parse().unwrap(), 16)];
    });
    assert_eq!(allowed_ips(&simulation, a, b), ["10.7.0.0/16"]);
}

#[test]
fn update_only_creates_no_peer_and_changes_an_existing_one() {
    let (mut simulation, a, b) = Simulation::pair(5);
    let mut stranger = PeerConfiguration::new(key(5));
    stranger.update_only = true;
    simulation.configure_peer(a, stranger);
    assert_eq!(simulation.host(a).device.peers().count(), 1);
    simulation.change_peer(a, b, |peer| {
        peer.update_only = true;
        peer.persistent_keepalive_interval = Some(25);
    });
    assert_eq!(simulation.peer(a, b).persistent_keepalive_interval, 25);
}

#[test]
fn changing_a_live_peer_keeps_its_session_and_its_counters() {
    let (mut simulation, a, b) = Simulation::pair(6);
    assert!(simulation.reaches(a, b));
    let before = simulation.peer(a, b);
    simulation.introduce(a, b);
    let after = simulation.peer(a, b);
    assert_eq!((after.rx_bytes, after.tx_bytes), (before.rx_bytes, before.tx_bytes));
    assert_eq!(after.last_handshake, before.last_handshake);
    assert!(simulation.reaches(a, b));
    assert_eq!(simulation.count(a, Kind::Initiation), 1);
}

#[test]
fn an_endpoint_set_later_lets_the_staged_packets_go() {
    let mut simulation = Simulation::new(7);
    let (a, b) = (simulation.add_host(), simulation.add_host());
    let mut of_b = simulation.host(b).as_peer();
    let endpoint = of_b.endpoint.take();
    of_b.persistent_keepalive_interval = Some(25);
    simulation.configure_peer(a, of_b);
    simulation.introduce(b, a);
    simulation.run_for(SECOND);
    assert_eq!(simulation.sent_by(a).count(), 0);
    simulation.change_peer(a, b, |peer| peer.endpoint = endpoint);
    simulation.run_for(SECOND);
    assert_eq!(simulation.count(a, Kind::Keepalive), 1);
}

#[test]
fn a_removed_and_forgotten_device_leaves_nothing_behind() {
    let (mut simulation, a, b) = Simulation::pair(8);
    assert!(simulation.reaches(a, b));
    let mut configuration = Configuration { replace_peers: true, ..Configuration::default() };
    configuration.private_key = Some(None);
    simulation.configure(a, configuration);
    let host = simulation.host(a);
    assert_eq!((host.indices(), host.device.peers().count()), (0, 0));
    assert_eq!(host.device.next_timeout(), None);
    assert!(host.device.status().private_key.is_none());
}

#[test]
fn what_waits_for_the_first_private_key_goes_when_it_is_set() {
    let (mut simulation, a, b) = Simulation::pair(11);
    let key = simulation.host(a).device.status().private_key;
    let set = |key| Configuration { private_key: Some(key), ..Configuration::default() };
    simulation.configure(a, set(None));
    simulation.change_peer(a, b, |peer| peer.persistent_keepalive_interval = Some(1));
    simulation.ping(a, b);
    assert_eq!(simulation.peer(a, b).tx_bytes, 0);
    simulation.configure(a, set(key));
    assert_eq!(simulation.peer(a, b).tx_bytes, 148, "the initiation goes with the key");
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(a).replies().len(), 1, "and then what was staged");
}

#[test]
fn without_a_private_key_only_the_first_packet_wakes_the_control_thread() {
    let (mut simulation, a, _) = Simulation::pair(12);
    simulation.configure(a, private_key(None));
    let packet = request(inner_v4(0), inner_v4(1), PING_LEN, 0, 1);
    let now = simulation.now();
    let device = &mut simulation.host_mut(a).device;
    let stage = |device: &Device| {
        let data_path = device.data_path();
        let allowed_ips = data_path.allowed_ips.reader();
        let (peer, _) = data_path.route(allowed_ips.value(), &packet).unwrap();
        let stage = |staged: &mut StagedPackets| staged.stage_packet(&packet);
        assert!(data_path.reserve_nonces(peer, 1, now.instant, stage).is_none());
        data_path.take_wake()
    };
    let _before = device.data_path().take_wake();
    assert!(stage(device), "its time begins");
    device.flush(now);
    for _ in 0..3 {
        assert!(!stage(device));
    }
}

#[test]
fn without_a_private_key_packets_wait_90_seconds_and_are_counted() {
    let (mut simulation, a, b) = Simulation::pair(14);
    let key = simulation.host(a).device.status().private_key;
    simulation.configure(a, private_key(None));
    for round in 1..3 {
        for _ in 0..90 {
            simulation.ping(a, b);
            simulation.run_for(SECOND);
        }
        let host = simulation.host(a);
        let events = host.count_events(|event| *event == Event::NoPrivateKey);
        assert_eq!((events, host.drops(DropCause::NoPrivateKey)), (1, 90 * (round - 1)));
        simulation.run_for(20 * SECOND);
        let host = simulation.host(a);
        assert_eq!(host.drops(DropCause::NoPrivateKey), 90 * round);
        assert_eq!(host.drops(DropCause::StagedExpired), 0);
        assert_eq!(host.count_events(|event| matches!(event, Event::HandshakeGivenUp(_))), 0);
    }
    for _ in 0..MAX_STAGED_PACKETS + 5 {
        simulation.ping(a, b);
    }
    let host = simulation.host(a);
    assert_eq!(host.drops(DropCause::NoPrivateKey), 180 + 5, "more than can wait");
    assert_eq!(host.drops(DropCause::StagedOverflow), 0);
    simulation.configure(a, private_key(key));
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(a).replies().len(), MAX_STAGED_PACKETS, "those that wait are sent");
    simulation.configure(a, private_key(None));
    simulation.ping(a, b);
    let is_told = |event: &Event| *event == Event::NoPrivateKey;
    assert_eq!(simulation.host(a).count_events(is_told), 2, "each time the key was removed");
}

#[test]
fn a_persistent_keepalive_that_expired_without_a_private_key_is_sent_with_it() {
    let (mut simulation, a, b) = Simulation::pair(15);
    let key = simulation.host(a).device.status().private_key;
    simulation.configure(a, private_key(None));
    simulation.change_peer(a, b, |peer| peer.persistent_keepalive_interval = Some(25));
    simulation.run_for(200 * SECOND);
    assert_eq!(simulation.host(a).drops(DropCause::NoPrivateKey), 0, "no packet");
    simulation.configure(a, private_key(key));
    simulation.run_for(SECOND);
    assert_eq!(simulation.count(a, Kind::Keepalive), 1);
}

fn private_key(key: Option<PrivateKey>) -> Configuration {
    Configuration { private_key: Some(key), ..Configuration::default() }
}

#[test]
fn what_the_network_refused_is_not_counted_as_sent() {
    let (mut simulation, a, b) = Simulation::pair(13);
    let now = simulation.now();
    let device = &mut simulation.host_mut(a).device;
    device.encapsulate(&request(inner_v4(0), inner_v4(1), PING_LEN, 0, 1), now).unwrap();
    let initiation = device.poll_transmit().unwrap();
    let (peer, len) = (initiation.peer, initiation.datagram.len());
    assert_eq!(device.peers().next().unwrap().tx_bytes, 148);
    device.transmit_failed(peer, len);
    assert_eq!(device.peers().next().unwrap().tx_bytes, 0);
    simulation.run_for(10 * SECOND);
    assert!(simulation.peer(a, b).tx_bytes > 0, "the next attempt is counted again");
}

/// As many as the kernel allows.
#[test]
fn a_device_has_2_to_the_20_peers() {
    const PEERS: u32 = 1 << 20;
    let mut simulation = Simulation::new(6);
    let host = simulation.add_host();
    let key = |number: u32| {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&number.to_le_bytes());
        PublicKey::from_bytes(bytes)
    };
    for first in (1..=PEERS).step_by(1 << 16) {
        let peers = (first..first + (1 << 16)).map(|number| PeerConfiguration::new(key(number)));
        let configuration = Configuration { peers: peers.collect(), ..Configuration::default() };
        simulation.configure(host, configuration);
    }
    let device = &simulation.host(host).device;
    assert_eq!(u32::try_from(device.peers().count()).unwrap(), PEERS);
    assert_eq!(device.peers().last().unwrap().public_key, key(PEERS));
}
