//! Packets between simulated devices: counters, cryptokey routing, roaming, replays, ECN, padding.

use std::net::SocketAddr;
use std::time::Duration;
use wgsep_proto::noise::tai64n::Tai64n;
use wgsep_proto::path::outbound::{OutboundBatch, Whole};
use wgsep_proto::session::timers::{KEEPALIVE_TIMEOUT, REKEY_TIMEOUT, ZERO_KEY_MATERIAL_TIME};
use wgsep_proto::{Configuration, DropCause, Ecn, Endpoint, Event, Source};
use wgsep_simulation::dice::Dice;
use wgsep_simulation::host::{HostId, allow, inner_v4};
use wgsep_simulation::link::Kind;
use wgsep_simulation::oracle::{Oracle, Session};
use wgsep_simulation::packet;
use wgsep_simulation::simulation::Simulation;

const SECOND: Duration = Duration::from_secs(1);

fn connected(seed: u64) -> (Simulation, HostId, HostId) {
    let (mut simulation, a, b) = Simulation::pair(seed);
    assert!(simulation.reaches(a, b));
    (simulation, a, b)
}

fn elsewhere() -> SocketAddr {
    "203.0.113.77:7777".parse().unwrap()
}

/// A device `host`, and an oracle that has shaken hands with it as its peer. The oracle can send
/// packets that no device would.
fn with_oracle(seed: u64) -> (Simulation, HostId, Session, SocketAddr) {
    let mut simulation = Simulation::new(seed);
    let (host, peer) = (simulation.add_host(), simulation.add_host());
    let public_key = *simulation.host(host).public_key.as_bytes();
    let oracle = Oracle::new(&mut Dice::new(!seed), public_key, [0; 32]);
    let address = simulation.host(peer).address;
    simulation.host_mut(peer).public_key = wgsep_proto::PublicKey::from_bytes(*oracle.public_key());
    simulation.introduce(host, peer);
    // The host of that address is only a place that swallows datagrams.
    simulation.set_filter(|_| false);
    let timestamp = Tai64n::from_wall(simulation.now().wall);
    let pending = oracle.initiate(*timestamp.as_bytes(), 77);
    let initiation = pending.datagram.clone();
    simulation.inject(address, host, &initiation);
    let response = simulation.last(host, Kind::Response);
    let session = oracle.finish(pending, &response.payload);
    (simulation, host, session, address)
}

// ---------------------------------------------------------------- counters

#[test]
fn ten_pings_count_exactly_as_the_kernel_counts_them() {
    let (mut simulation, a, b) = Simulation::pair(1);
    for _ in 0..10 {
        assert!(simulation.reaches(a, b));
    }
    // 148 + 10 * 128 and 92 + 10 * 128: a ping of 84 bytes is padded to 96, and 32 are added.
    let (of_b, of_a) = (simulation.peer(a, b), simulation.peer(b, a));
    assert_eq!((of_b.rx_bytes, of_b.tx_bytes), (1372, 1428));
    assert_eq!((of_a.rx_bytes, of_a.tx_bytes), (1428, 1372));
    // The owed keepalive is 32 bytes more.
    simulation.run_for(KEEPALIVE_TIMEOUT);
    let (of_b, of_a) = (simulation.peer(a, b), simulation.peer(b, a));
    assert_eq!((of_b.rx_bytes, of_b.tx_bytes), (1372, 1460));
    assert_eq!((of_a.rx_bytes, of_a.tx_bytes), (1460, 1372));
}

#[test]
fn what_was_refused_is_not_counted_as_received() {
    let (mut simulation, a, b) = connected(2);
    let before = simulation.peer(b, a).rx_bytes;
    let (data, initiation) = (simulation.last(a, Kind::Data), simulation.last(a, Kind::Initiation));
    let mut forged = data.payload.clone();
    *forged.last_mut().unwrap() ^= 1;
    for payload in [&data.payload, &initiation.payload, &forged] {
        simulation.inject(data.from, b, payload);
    }
    assert_eq!(simulation.peer(b, a).rx_bytes, before);
}

#[test]
fn cookie_replies_count_for_no_peer() {
    let (mut simulation, a, b) = Simulation::pair(3);
    simulation.host_mut(b).waiting = wgsep_proto::device::control_plane::UNDER_LOAD_THRESHOLD;
    assert!(!simulation.reaches(a, b));
    assert_eq!(simulation.count(b, Kind::CookieReply), 1);
    assert_eq!((simulation.peer(a, b).rx_bytes, simulation.peer(a, b).tx_bytes), (0, 148));
    assert_eq!((simulation.peer(b, a).rx_bytes, simulation.peer(b, a).tx_bytes), (0, 0));
}

// ---------------------------------------------------------------- replays and garbage

#[test]
fn replayed_data_is_dropped_and_moves_nothing() {
    let (mut simulation, a, b) = connected(4);
    let data = simulation.last(a, Kind::Data);
    let (received, timeout) =
        (simulation.host(b).received.len(), simulation.host(b).device.next_timeout());
    simulation.run_for(SECOND);
    simulation.inject(elsewhere(), b, &data.payload);
    assert_eq!(simulation.host(b).drops(DropCause::Replayed), 1);
    assert_eq!(simulation.host(b).received.len(), received);
    assert_eq!(simulation.host(b).device.next_timeout(), timeout);
    assert_eq!(simulation.peer(b, a).endpoint, Some(simulation.host(a).address));
}

#[test]
fn datagrams_of_every_length_and_type_are_dropped_without_effect() {
    let (mut simulation, a, b) = connected(5);
    let before = (simulation.sent.len(), simulation.host(b).indices());
    for message_type in 0..=5 {
        for len in (0..200).chain([1_499, 65_507, 65_535, 70_000]) {
            let mut garbage = vec![0xa5; len];
            for (byte, value) in garbage.iter_mut().zip([message_type, 0, 0, 0]) {
                *byte = value;
            }
            simulation.inject(elsewhere(), b, &garbage);
        }
    }
    assert_eq!((simulation.sent.len(), simulation.host(b).indices()), before);
    assert_eq!(simulation.peer(b, a).endpoint, Some(simulation.host(a).address));
    assert!(simulation.reaches(a, b));
}

#[test]
fn every_bit_of_a_datagram_counts() {
    let (mut simulation, a, b) = connected(6);
    simulation.lose(&[Kind::Data]);
    simulation.ping(a, b);
    let data = simulation.last(a, Kind::Data);
    let received = simulation.host(b).received.len();
    for bit in 0..data.payload.len() * 8 {
        let mut forged = data.payload.clone();
        forged[bit / 8] ^= 1 << (bit % 8);
        simulation.inject(elsewhere(), b, &forged);
    }
    assert_eq!(simulation.host(b).received.len(), received);
    assert_eq!(simulation.peer(b, a).endpoint, Some(simulation.host(a).address));
    simulation.inject(data.from, b, &data.payload);
    assert_eq!(simulation.host(b).received.len(), received + 1, "and it itself is fresh");
}

#[test]
fn datagrams_arrive_in_any_order_within_the_window() {
    let (mut simulation, a, b) = connected(7);
    simulation.host_mut(b).answers = false;
    simulation.link.jitter = 2 * SECOND;
    simulation.link.duplication = 500;
    let mut sent: Vec<_> = (0..2000).map(|_| simulation.ping(a, b)).collect();
    simulation.run_for(3 * SECOND);
    let mut received = simulation.host(b).requests().split_off(1);
    assert_ne!(received, sent, "some order was lost on the way");
    received.sort_unstable();
    sent.sort_unstable();
    assert_eq!(received, sent);
    assert!(simulation.host(b).drops(DropCause::Replayed) > 500);
}

// ---------------------------------------------------------------- roaming

#[test]
fn the_endpoint_follows_authenticated_data() {
    let (mut simulation, a, b) = connected(8);
    simulation.rebind(a, elsewhere());
    assert!(simulation.reaches(a, b));
    assert_eq!(simulation.peer(b, a).endpoint, Some(elsewhere()));
    simulation.rebind(a, "[2001:db8::7]:7".parse().unwrap());
    assert!(simulation.reaches(a, b));
    assert!(simulation.reaches(b, a));
}

#[test]
fn the_endpoint_follows_handshakes() {
    let (mut simulation, a, b) = connected(9);
    simulation.run_for(600 * SECOND);
    simulation.rebind(a, elsewhere());
    simulation.set_filter(|datagram| datagram.kind() == Kind::Initiation);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    assert_eq!(simulation.peer(b, a).endpoint, Some(elsewhere()));
    let moved = |event: &Event| matches!(event, Event::EndpointMoved(_, to) if *to == elsewhere());
    assert_eq!(simulation.host(b).count_events(moved), 1);
}

#[test]
fn keepalives_carry_the_endpoint_too() {
    let (mut simulation, a, b) = connected(10);
    simulation.rebind(a, elsewhere());
    simulation.change_peer(a, b, |peer| peer.persistent_keepalive_interval = Some(25));
    simulation.run_for(SECOND);
    assert_eq!(simulation.peer(b, a).endpoint, Some(elsewhere()));
}

#[test]
fn an_ipv4_mapped_endpoint_is_ipv4() {
    let (mut simulation, a, b) = connected(11);
    simulation.ping(a, b);
    let data = simulation.last(a, Kind::Data);
    simulation.inject("[::ffff:203.0.113.77]:7777".parse().unwrap(), b, &data.payload);
    assert_eq!(simulation.peer(b, a).endpoint, Some(elsewhere()));
}

/// An address of `a`'s to which `b` has just spoken, and with it `a`'s source for `b`.
fn spoken_to(simulation: &mut Simulation, a: HostId, b: HostId) -> Source {
    let source = Source { address: "192.0.2.200".parse().unwrap(), interface: 3 };
    simulation.lose(&[Kind::Data]);
    simulation.ping(b, a);
    let mut data = simulation.last(b, Kind::Data);
    let now = simulation.now();
    let endpoint = Endpoint { source: Some(source), ..Endpoint::new(data.from) };
    let device = &mut simulation.host_mut(a).device;
    device.decapsulate(endpoint, Ecn::NOT_CAPABLE, &mut data.payload, now).unwrap().unwrap();
    simulation.set_filter(|_| false);
    assert_eq!(source_for(simulation, a, b), Some(source));
    source
}

fn source_for(simulation: &Simulation, host: HostId, peer: HostId) -> Option<Source> {
    let allowed_ips = simulation.host(host).device.data_path().allowed_ips.reader();
    let route = allowed_ips.value().lookup(simulation.host(peer).inner_v4()).unwrap();
    route.peer.endpoint().unwrap().source
}

#[test]
fn the_cached_source_is_forgotten_when_data_goes_unanswered() {
    let (mut simulation, a, b) = connected(12);
    let source = spoken_to(&mut simulation, a, b);
    simulation.ping(a, b);
    simulation.run_for(15 * SECOND);
    assert_eq!(source_for(&simulation, a, b), Some(source));
    simulation.run_for(SECOND);
    assert_eq!(source_for(&simulation, a, b), None);
}

#[test]
fn the_cached_source_is_forgotten_when_an_initiation_is_repeated() {
    let (mut simulation, a, b) = connected(25);
    let source = spoken_to(&mut simulation, a, b);
    simulation.run_for(ZERO_KEY_MATERIAL_TIME);
    simulation.ping(a, b);
    simulation.run_for(REKEY_TIMEOUT - SECOND);
    assert_eq!(simulation.count(a, Kind::Initiation), 2);
    assert_eq!(source_for(&simulation, a, b), Some(source));
    simulation.run_for(2 * SECOND);
    assert_eq!(simulation.count(a, Kind::Initiation), 3);
    assert_eq!(source_for(&simulation, a, b), None);
}

#[test]
fn the_cached_source_is_forgotten_with_a_new_endpoint_port_or_mark() {
    let changes: [fn(&mut Simulation, HostId, HostId); 3] = [
        |simulation, a, b| {
            let endpoint = Some(simulation.host(b).address);
            simulation.change_peer(a, b, |peer| peer.endpoint = endpoint);
        },
        |simulation, a, _| {
            let listen_port = Some(1234);
            simulation.configure(a, Configuration { listen_port, ..Configuration::default() });
        },
        |simulation, a, _| {
            simulation.configure(a, Configuration { fwmark: Some(7), ..Configuration::default() });
        },
    ];
    for change in changes {
        let (mut simulation, a, b) = connected(26);
        spoken_to(&mut simulation, a, b);
        change(&mut simulation, a, b);
        assert_eq!(source_for(&simulation, a, b), None);
    }
}

// ---------------------------------------------------------------- cryptokey routing

#[test]
fn a_packet_from_a_foreign_source_is_dropped_yet_moves_endpoint_and_timers() {
    let (mut simulation, a, b) = connected(13);
    simulation.host_mut(b).answers = false;
    let c = simulation.add_host();
    simulation.introduce(b, c);
    // a owns 10.0.0.0/16 at b, but for c's address: a more specific entry of another peer.
    simulation.change_peer(b, a, |peer| {
        peer.allowed_ips = vec![allow("10.0.0.0".parse().unwrap(), 16)];
    });
    simulation.run_for(60 * SECOND);
    let (received, rx) = (simulation.host(b).received.len(), simulation.peer(b, a).rx_bytes);
    let keepalives = simulation.count(b, Kind::Keepalive);
    simulation.rebind(a, elsewhere());
    let (of_b, of_c) = (simulation.host(b).inner_v4(), simulation.host(c).inner_v4());
    simulation.send(a, &packet::request(of_c, of_b, 84, 0, 1));
    simulation.run_for(KEEPALIVE_TIMEOUT + SECOND);
    assert_eq!(simulation.host(b).received.len(), received);
    assert_eq!(simulation.host(b).drops(DropCause::WrongSource), 1);
    assert_eq!(simulation.peer(b, a).rx_bytes, rx, "not counted, as in the kernel");
    assert_eq!(simulation.peer(b, a).endpoint, Some(elsewhere()));
    assert_eq!(simulation.count(b, Kind::Keepalive), keepalives + 1);
    simulation.send(a, &packet::request("10.0.200.1".parse().unwrap(), of_b, 84, 0, 2));
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(b).received.len(), received + 1);
}

#[test]
fn the_most_specific_allowed_ip_gets_the_packet() {
    let (mut simulation, a, b) = connected(14);
    let c = simulation.add_host();
    simulation.introduce(a, c);
    simulation.introduce(c, a);
    simulation.change_peer(a, c, |peer| {
        peer.allowed_ips = vec![allow("0.0.0.0".parse().unwrap(), 0)];
    });
    assert!(simulation.reaches(a, b));
    let source = simulation.host(a).inner_v4();
    simulation.send(a, &packet::request(source, "198.51.100.1".parse().unwrap(), 84, 0, 9));
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(c).requests(), [9]);
}

#[test]
fn an_allowed_ip_that_moves_takes_both_directions_along() {
    let (mut simulation, a, b) = connected(15);
    let c = simulation.add_host();
    simulation.introduce(a, c);
    simulation.introduce(c, a);
    let of_b = simulation.host(b).inner_v4();
    simulation.change_peer(a, c, |peer| peer.allowed_ips = vec![allow(of_b, 32)]);
    let before = simulation.host(a).received.len();
    simulation.ping(b, a);
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(a).received.len(), before, "b may not use it any more");
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(c).requests().len(), 1);
}

#[test]
fn packets_for_no_peer_and_for_peers_without_endpoint_are_counted_apart() {
    let (mut simulation, a, b) = Simulation::pair(16);
    let mut lost = simulation.host(b).as_peer();
    lost.public_key = wgsep_proto::PublicKey::from_bytes([8; 32]);
    lost.endpoint = None;
    lost.allowed_ips = vec![allow("10.8.0.0".parse().unwrap(), 16)];
    simulation.configure_peer(a, lost);
    let source = simulation.host(a).inner_v4();
    for destination in ["10.7.0.1", "10.8.0.1"] {
        simulation.send(a, &packet::request(source, destination.parse().unwrap(), 84, 0, 0));
    }
    assert_eq!(simulation.host(a).drops(DropCause::NoPeer), 1);
    assert_eq!(simulation.host(a).drops(DropCause::NoEndpoint), 1);
    assert!(simulation.sent.is_empty());
}

#[test]
fn ipv6_inside_works_like_ipv4() {
    let (mut simulation, a, b) = connected(17);
    let (source, destination) = (simulation.host(a).inner_v6(), simulation.host(b).inner_v6());
    simulation.send(a, &packet::request(source, destination, 1280, 0, 66));
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(a).replies().last(), Some(&66));
}

#[test]
fn a_removed_peer_s_allowed_ips_uncover_the_less_specific_of_another() {
    let (mut simulation, a, b) = connected(27);
    let c = simulation.add_host();
    simulation.introduce(a, c);
    simulation.introduce(c, a);
    simulation.change_peer(a, c, |peer| {
        peer.allowed_ips = vec![allow("0.0.0.0".parse().unwrap(), 0)];
    });
    simulation.change_peer(a, b, |peer| peer.remove = true);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(c).requests().len(), 1);
}

// ---------------------------------------------------------------- inner packets

#[test]
fn an_inner_packet_is_trimmed_to_its_own_length() {
    let (mut simulation, host, mut session, from) = with_oracle(18);
    let (ours, theirs) = (simulation.host(host).inner_v4(), inner_v4(1));
    let genuine = packet::request(theirs, ours, 84, 0, 5);
    let mut padded = genuine.clone();
    padded.extend_from_slice(&[0xff; 700]);
    let datagram = session.seal(&padded);
    simulation.inject(from, host, &datagram);
    assert_eq!(simulation.host(host).received.last().unwrap().1, genuine);
}

#[test]
fn inner_packets_that_lie_about_themselves_are_dropped() {
    let (mut simulation, host, mut session, from) = with_oracle(19);
    let (ours, theirs) = (simulation.host(host).inner_v4(), inner_v4(1));
    let genuine = packet::request(theirs, ours, 96, 0, 5);
    let with = |at: usize, value: u8| {
        let mut packet = genuine.clone();
        packet[at] = value;
        packet
    };
    let mut v6 = genuine.clone();
    v6[0] = 0x60;
    v6[5] = 96 - 40 + 1;
    let lies = [with(3, 19), with(3, 97), with(2, 1), with(0, 0x55), v6, vec![0x45; 16]];
    for lie in &lies {
        let datagram = session.seal(lie);
        simulation.inject(from, host, &datagram);
    }
    assert!(simulation.host(host).received.is_empty());
    assert_eq!(simulation.host(host).drops(DropCause::InnerMalformed), 6);
    let datagram = session.seal(&genuine);
    simulation.inject(from, host, &datagram);
    assert_eq!(simulation.host(host).received.len(), 1);
}

#[test]
fn padding_is_to_16_bytes_and_never_past_the_mtu() {
    let (mut simulation, a, b) = connected(20);
    let (source, destination) = (simulation.host(a).inner_v4(), simulation.host(b).inner_v4());
    for (mtu, len, padded) in [
        (1420, 84, 96),
        (1420, 1408, 1408),
        (1420, 1409, 1420),
        (1420, 1420, 1420),
        (1420, 1421, 1436),
        (1280, 1279, 1280),
        (0, 1419, 1424),
        (65_503, 65_503, 65_503),
    ] {
        simulation.host(a).device.data_path().set_mtu(mtu);
        simulation.send(a, &packet::request(source, destination, len, 0, 1));
        assert_eq!(simulation.last(a, Kind::Data).payload.len(), padded + 32, "{len} in {mtu}");
        simulation.run_for(SECOND);
        assert_eq!(simulation.host(b).received.last().unwrap().1.len(), len);
    }
}

#[test]
fn padding_is_zeros_whatever_the_buffer_held() {
    let (mut simulation, host, mut session, from) = with_oracle(28);
    let (ours, theirs) = (simulation.host(host).inner_v4(), inner_v4(1));
    let request = packet::request(theirs, ours, 84, 0, 5);
    let confirmation = session.seal(&request);
    simulation.inject(from, host, &confirmation);
    let data_path = simulation.host(host).device.data_path();
    let allowed_ips = data_path.allowed_ips.reader();
    let mut batch = OutboundBatch::with_capacity(1, 1);
    let answer = packet::reply(&request).unwrap();
    let (packets, now) = ([(0..answer.len(), Whole::new)], simulation.now().instant);
    batch.route(data_path, allowed_ips.value(), &answer, packets, now, |_| panic!("it has a peer"));
    let mut datagrams = vec![0xff; 2048];
    batch.reserve_nonces(data_path, &answer, &mut datagrams, now);
    assert!(batch.seal(data_path, &answer, &mut datagrams));
    let sealed = batch.sealed_runs().next().unwrap().datagrams;
    let (_, padded) = session.open(&datagrams[sealed[0].bytes.clone()]);
    assert_eq!((&padded[..84], &padded[84..]), (&answer[..], &[0; 12][..]));
}

// ---------------------------------------------------------------- congestion

#[test]
fn the_outer_header_carries_the_inner_ecn_and_nothing_else() {
    let (mut simulation, a, b) = connected(21);
    let (source, destination) = (simulation.host(a).inner_v4(), simulation.host(b).inner_v4());
    // Congestion met before the tunnel stays inside.
    for (inner, outer) in [(0xb8, 0), (0xb9, 1), (0xba, 2), (0xbb, 2)] {
        simulation.send(a, &packet::request(source, destination, 84, inner, 1));
        assert_eq!(simulation.last(a, Kind::Data).traffic_class, outer);
    }
}

#[test]
fn staged_packets_keep_their_ecn() {
    let (mut simulation, a, b) = Simulation::pair(22);
    let (source, destination) = (simulation.host(a).inner_v6(), simulation.host(b).inner_v6());
    simulation.send(a, &packet::request(source, destination, 84, 0x89, 1));
    simulation.run_for(SECOND);
    assert_eq!(simulation.last(a, Kind::Data).traffic_class, 1);
}

#[test]
fn congestion_met_in_the_tunnel_reaches_capable_packets() {
    let (mut simulation, a, b) = connected(23);
    simulation.host_mut(b).answers = false;
    for v6 in [false, true] {
        let addresses = |host| {
            let host = simulation.host(host);
            if v6 { host.inner_v6() } else { host.inner_v4() }
        };
        let (source, destination) = (addresses(a), addresses(b));
        for (inner, outer, expected) in
            [(0, 3, 0), (1, 3, 3), (2, 3, 3), (3, 0, 3), (2, 1, 1), (1, 2, 1), (0x48, 3, 0x48)]
        {
            simulation.lose(&[Kind::Data]);
            simulation.send(a, &packet::request(source, destination, 84, inner, 1));
            let data = simulation.last(a, Kind::Data);
            let (now, mut payload) = (simulation.now(), data.payload.clone());
            let (endpoint, ecn) = (Endpoint::new(data.from), Ecn::of_traffic_class(outer));
            let device = &mut simulation.host_mut(b).device;
            let received = device.decapsulate(endpoint, ecn, &mut payload, now).unwrap();
            let packet = received.unwrap().packet;
            assert_eq!(packet::traffic_class(packet), expected, "{inner} in {outer}");
            assert!(v6 || packet::header_checksum(packet) == 0);
        }
    }
}
