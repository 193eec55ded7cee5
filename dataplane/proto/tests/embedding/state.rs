//! Errors, events, statistics and states.

use crate::network::{Dice, preshared_key};
use crate::network::{Pair, address, at, events, packet, private_key, sent, tunnel};
use std::time::Duration;
use wgsep_proto::{
    AllowedIp, AllowedIpChange, Configuration, Device, DropCause, Ecn, Endpoint, Event,
    HandshakeFailure, PeerConfiguration, SessionState, StartHandshakeError, Tunnel, TunnelError,
};

#[test]
fn a_complete_handshake_is_an_event_at_both_ends_and_in_their_reports() {
    let mut pair = Pair::new();
    let peers = [*pair.b.peer(), *pair.a.peer()].map(|key| key);
    assert_eq!(pair.a.report(pair.now().instant).state, SessionState::Idle);
    assert_eq!(SessionState::Idle.to_string(), "idle");
    pair.a.encapsulate(&packet(100), pair.now()).unwrap();
    assert_eq!(pair.a.report(pair.now().instant).state, SessionState::Handshaking);
    assert_eq!(pair.deliver(), [packet(100)]);
    let complete = |peer| Event::HandshakeComplete { peer, first: true };
    assert_eq!(events(&mut pair.a), [complete(peers[1])]);
    assert_eq!(events(&mut pair.b), [complete(peers[0])]);

    let now = pair.now();
    let [a, b] = [&pair.a, &pair.b].map(|end| end.report(now.instant));
    assert_eq!((a.state, b.state), (SessionState::Established, SessionState::Established));
    assert_eq!((a.last_handshake, b.last_handshake), (now.wall, now.wall));
    assert_eq!((a.endpoint, b.endpoint), (Some(address(2)), Some(address(1))));
    assert_eq!((a.handshakes.initiations, b.handshakes.responses), (1, 1));
    // An initiation and a packet with padding, or a response.
    assert_eq!((a.tx_packets, a.tx_bytes), (2, 148 + 32 + 112));
    assert_eq!((b.rx_packets, b.rx_bytes), (2, 148 + 32 + 112));
    assert_eq!((b.tx_packets, b.tx_bytes, a.rx_bytes), (1, 92, 92));
    assert_eq!(pair.a.drops().counts().map(|(_, count)| count).sum::<u64>(), 0);
}

#[test]
fn a_peer_that_does_not_answer_is_reported_and_then_given_up() {
    let mut pair = Pair::new();
    pair.a.encapsulate(&packet(40), pair.now()).unwrap();
    pair.wait_alone(120_000);
    let failures: Vec<_> = events(&mut pair.a).iter().map(Event::failure).collect();
    assert_eq!(failures, [HandshakeFailure::Unanswered, HandshakeFailure::GivenUp].map(Some));
    assert_eq!(pair.a.drops().count(DropCause::StagedExpired), 1);
    let report = pair.a.report(pair.now().instant);
    assert_eq!((report.handshakes.initiations, report.state), (20, SessionState::Idle));
}

#[test]
fn a_session_that_is_not_renewed_expires_after_180_s_and_its_keys_are_erased_after_540() {
    let mut pair = Pair::established();
    let peer = *pair.a.peer();
    let state = |pair: &Pair| pair.a.report(pair.now().instant).state;
    pair.wait_alone(179_000);
    assert_eq!(state(&pair), SessionState::Established);
    pair.wait_alone(1_000);
    assert_eq!(state(&pair), SessionState::Expired);
    pair.wait_alone(359_000);
    assert!(!events(&mut pair.a).contains(&Event::SessionExpired(peer)));
    pair.wait_alone(1_000);
    let expired: Vec<_> = events(&mut pair.a);
    assert_eq!(expired, [Event::SessionExpired(peer)]);
    assert_eq!(expired[0].peer(), Some(&peer));
}

#[test]
fn an_endpoint_that_moves_with_data_is_an_event_once() {
    let mut pair = Pair::established();
    let (now, peer) = (pair.now(), *pair.b.peer());
    for source in [address(1), address(9), address(9), address(1)] {
        pair.a.encapsulate(&packet(40), now).unwrap();
        let (_, mut datagram) = sent(&mut pair.a).pop_front().unwrap();
        pair.b.decapsulate(source, &mut datagram, now).unwrap().unwrap();
    }
    let moved = |number| Event::EndpointMoved(peer, address(number));
    assert_eq!(events(&mut pair.b), [moved(9), moved(1)]);
    assert_eq!(pair.b.report(now.instant).endpoint, Some(address(1)));
}

#[test]
fn what_was_not_authentic_moves_no_endpoint_and_says_why_it_was_dropped() {
    let mut pair = Pair::established();
    let now = pair.now();
    pair.a.encapsulate(&packet(40), now).unwrap();
    let (_, genuine) = sent(&mut pair.a).pop_front().unwrap();
    let mut drops = |datagram: &[u8]| {
        let mut datagram = datagram.to_vec();
        let received = pair.b.decapsulate(address(9), &mut datagram, now);
        received.map(|packet| packet.map(|packet| packet.len()))
    };
    let changed = |at: usize| {
        let mut datagram = genuine.clone();
        datagram[at] ^= 1;
        datagram
    };
    assert_eq!(drops(&[]), Err(DropCause::InboundMalformed));
    assert_eq!(drops(b"no WireGuard message"), Err(DropCause::InboundMalformed));
    assert_eq!(drops(&changed(4)), Err(DropCause::UnknownIndex));
    assert_eq!(drops(&changed(20)), Err(DropCause::Unauthentic));
    let mut initiation = vec![0; 148];
    initiation[0] = 1;
    assert_eq!(drops(&initiation), Err(DropCause::InvalidMac));
    assert_eq!(pair.b.report(now.instant).endpoint, Some(address(1)));

    let mut drops = |datagram: &[u8], now| {
        pair.b.decapsulate(address(1), &mut datagram.to_vec(), now).map(|_| ())
    };
    assert_eq!(drops(&genuine, now), Ok(()));
    assert_eq!(drops(&genuine, now), Err(DropCause::Replayed));
    assert_eq!(drops(&genuine, at(180_000)), Err(DropCause::KeypairExpired));
    let counted = |cause| pair.b.drops().count(cause);
    assert_eq!(counted(DropCause::InboundMalformed), 2);
    assert_eq!(counted(DropCause::KeypairExpired), 1);
    assert_eq!(DropCause::Replayed.to_string(), "received: its counter was seen or is too old");
}

#[test]
fn a_responder_has_a_session_only_once_a_message_of_it_is_authentic() {
    let mut pair = Pair::new();
    pair.a.start_handshake(pair.now()).unwrap();
    let (_, mut initiation) = sent(&mut pair.a).pop_front().unwrap();
    let now = pair.now();
    pair.b.decapsulate(address(1), &mut initiation, now).unwrap();
    let (_, mut response) = sent(&mut pair.b).pop_front().unwrap();
    pair.a.decapsulate(address(2), &mut response, now).unwrap();
    let (_, keepalive) = sent(&mut pair.a).pop_front().unwrap();
    for changed in 16..keepalive.len() {
        let mut forged = keepalive.clone();
        forged[changed] ^= 1;
        let received = pair.b.decapsulate(address(1), &mut forged, now);
        assert_eq!(received, Err(DropCause::Unauthentic));
    }
    assert_eq!(events(&mut pair.b), []);
    assert_eq!(pair.b.report(now.instant).state, SessionState::Handshaking);
    assert_eq!(pair.b.decapsulate(address(1), &mut keepalive.clone(), now), Ok(None));
    assert_eq!(events(&mut pair.b).len(), 1);
    assert_eq!(pair.b.report(now.instant).state, SessionState::Established);
}

#[test]
fn a_packet_that_cannot_be_sent_says_why() {
    let mut pair = Pair::new();
    let now = pair.now();
    assert_eq!(pair.a.encapsulate(b"no packet", now), Err(DropCause::OutboundMalformed));
    assert_eq!(pair.b.encapsulate(&packet(40), now), Err(DropCause::NoEndpoint));
    let mut pair = Pair::established();
    assert_eq!(pair.a.encapsulate(&packet(65_535), now), Err(DropCause::TooLong));
    assert_eq!(pair.a.drops().count(DropCause::TooLong), 1);
}

#[test]
fn a_tunnel_to_oneself_is_refused() {
    let ours = private_key(1).public_key();
    let tunnel = Tunnel::new(private_key(1), ours, None, None, Box::new(Dice(1)));
    assert_eq!(tunnel.unwrap_err(), TunnelError::OwnKey);
}

#[test]
fn the_debug_of_a_tunnel_has_its_peer_and_what_it_dropped_and_no_key() {
    let mut pair = Pair::established();
    assert!(pair.b.encapsulate(b"no packet", pair.now()).is_err());
    let peer = *pair.b.peer();
    assert_eq!(
        format!("{:?}", pair.b),
        format!(
            "Tunnel {{ peer: {peer}, device: Device {{ up: true, drops: {{OutboundMalformed: 1}}, .. }} }}"
        )
    );
}

#[test]
fn an_event_is_a_line_that_names_the_peer() {
    let mut pair = Pair::new();
    pair.a.encapsulate(&packet(40), pair.now()).unwrap();
    pair.wait_alone(200_000);
    let (peer, to) = (*pair.a.peer(), address(2));
    let events = events(&mut pair.a);
    assert_eq!(events, [Event::HandshakeUnanswered(peer, to), Event::HandshakeGivenUp(peer)]);
    for event in events {
        assert!(event.to_string().starts_with(&format!("{peer}: ")), "{event}");
    }
}

#[test]
fn a_device_has_no_peer_with_its_own_key_and_creates_none_for_an_update() {
    let mut device = server(&[1, 99]);
    let [peer, own] = [1, 99].map(|number| private_key(number).public_key());
    assert!(device.peer_id(&peer).is_some() && device.peer_id(&own).is_none());
    let mut unknown = PeerConfiguration::new(private_key(2).public_key());
    unknown.update_only = true;
    let private_key = Some(Some(private_key(1)));
    let peers = vec![unknown];
    device.configure(Configuration { private_key, peers, ..Configuration::default() }, at(0));
    assert_eq!(device.peers().count(), 0, "the only peer has the new key");
}

#[test]
fn a_device_that_is_down_stages_packets_until_it_is_up() {
    let mut device = Device::new(Box::new(Dice(1)));
    let mut peer = PeerConfiguration::new(private_key(1).public_key());
    peer.endpoint = Some(address(1));
    let allowed_ip = "0.0.0.0/0".parse().unwrap();
    peer.allowed_ips = vec![AllowedIpChange { allowed_ip, remove: false }];
    let (private_key, peers) = (Some(Some(private_key(2))), vec![peer]);
    device.configure(Configuration { private_key, peers, ..Configuration::default() }, at(0));
    assert_eq!(device.encapsulate(&packet(40), at(0)), Ok(()));
    assert_eq!(device.next_timeout(), None);
    assert_eq!(device.poll_transmit(), None);
    device.set_up(true, at(0));
    assert!(device.poll_transmit().is_some());
}

#[test]
fn preshared_keys_that_differ_are_an_error_and_an_event_of_the_initiator() {
    let mut pair = Pair::new();
    pair.b.set_preshared_key(preshared_key(7), pair.now());
    pair.a.encapsulate(&packet(40), pair.now()).unwrap();
    assert_eq!(pair.deliver_all().1, [DropCause::InvalidResponse]);
    let event = Event::ResponseRefused(*pair.a.peer());
    assert_eq!(events(&mut pair.a), [event]);
    assert_eq!(event.failure(), Some(HandshakeFailure::BadResponse));
    for line in [event.to_string(), HandshakeFailure::BadResponse.to_string()] {
        assert!(line.contains("check") && line.contains("preshared key"), "{line}");
    }
    pair.a.set_preshared_key(preshared_key(7), pair.now());
    let repeated = pair.a.next_timeout().unwrap().since(at(0).instant);
    pair.time = repeated.as_millis() as u64 + 1;
    pair.a.handle_timeout(pair.now());
    assert_eq!(pair.deliver(), [packet(40)]);
}

#[test]
fn a_handshake_can_be_started_without_a_packet_but_not_too_often_nor_to_nowhere() {
    let mut pair = Pair::new();
    assert_eq!(pair.b.start_handshake(pair.now()), Err(StartHandshakeError::NoEndpoint));
    assert_eq!(pair.a.start_handshake(pair.now()), Ok(()));
    assert_eq!(pair.a.start_handshake(pair.now()), Err(StartHandshakeError::TooSoon));
    assert_eq!(pair.deliver(), [[0; 0]; 0]);
    assert_eq!(pair.b.report(pair.now().instant).state, SessionState::Established);
    pair.time += 5_000;
    assert_eq!(pair.a.start_handshake(pair.now()), Ok(()));
    pair.deliver();
    assert_eq!(pair.a.report(pair.now().instant).handshakes.completed, 2);
    let mut device = Device::new(Box::new(Dice(1)));
    let unknown = private_key(9).public_key();
    let started = device.start_handshake(&unknown, pair.now());
    assert_eq!(started, Err(StartHandshakeError::UnknownPeer));
}

/// A device whose peers have the keys of these numbers, each with an address in 10.0.0.0/24.
pub fn server(peers: &[u8]) -> Device {
    let mut device = Device::new(Box::new(Dice(99)));
    let of = |number: &u8| {
        let mut peer = PeerConfiguration::new(private_key(*number).public_key());
        let allowed_ip = AllowedIp::new([10, 0, 0, *number].into(), 32).unwrap();
        peer.allowed_ips = vec![AllowedIpChange { allowed_ip, remove: false }];
        peer
    };
    let peers = peers.iter().map(of).collect();
    let private_key = Some(Some(private_key(99)));
    device.configure(Configuration { private_key, peers, ..Configuration::default() }, at(0));
    device.set_up(true, at(0));
    device
}

/// A packet from the peer with this number.
pub fn packet_of(number: u8, len: usize) -> Vec<u8> {
    let mut packet = packet(len);
    packet[12..16].copy_from_slice(&[10, 0, 0, number]);
    packet
}

/// Completes the handshake of a client, and returns what `device` then received.
pub fn connect(device: &mut Device, client: &mut Tunnel, number: u8) {
    client.start_handshake(at(0)).unwrap();
    for _ in 0..2 {
        for (_, mut datagram) in sent(client) {
            let source = Endpoint::new(address(number));
            let received = device.decapsulate(source, Ecn::NOT_CAPABLE, &mut datagram, at(0));
            assert_eq!(received, Ok(None));
            while let Some(transmit) = device.poll_transmit() {
                client.decapsulate(address(99), transmit.datagram, at(0)).unwrap();
            }
        }
    }
}

#[test]
fn a_device_says_which_peer_a_packet_came_from() {
    let mut device = server(&[1, 2, 3]);
    for number in [3, 1] {
        let mut client = tunnel(number, 99, Some(address(99)));
        connect(&mut device, &mut client, number);
        client.encapsulate(&packet_of(number, 60), at(0)).unwrap();
        let (_, mut datagram) = sent(&mut client).pop_front().unwrap();
        let source = Endpoint::new(address(number));
        let received = device.decapsulate(source, Ecn::NOT_CAPABLE, &mut datagram, at(0));
        let received = received.unwrap().unwrap();
        assert_eq!(received.packet, &packet_of(number, 60));
        let (peer, key) = (received.peer, private_key(number).public_key());
        assert_eq!(device.public_key(peer), Some(key));
        assert_eq!(device.peer_id(&key), Some(peer));

        // With another client's address it is no packet of this one.
        client.encapsulate(&packet_of(2, 60), at(0)).unwrap();
        let (_, mut datagram) = sent(&mut client).pop_front().unwrap();
        let received = device.decapsulate(source, Ecn::NOT_CAPABLE, &mut datagram, at(0));
        assert_eq!(received, Err(DropCause::WrongSource));
    }
    let states: Vec<_> = device.reports(at(0).instant).map(|report| report.state).collect();
    use SessionState::{Established, Idle};
    assert_eq!(states, [Established, Idle, Established]);
    assert_eq!(device.report(&private_key(2).public_key(), at(0).instant).unwrap().rx_bytes, 0);
    assert!(device.report(&private_key(9).public_key(), at(0).instant).is_none());
}

#[test]
fn the_round_trip_of_a_handshake_is_in_the_report() {
    let mut pair = Pair::new();
    pair.a.start_handshake(pair.now()).unwrap();
    let (_, mut initiation) = sent(&mut pair.a).pop_front().unwrap();
    pair.time += 40;
    pair.b.decapsulate(address(1), &mut initiation, pair.now()).unwrap();
    pair.deliver();
    let round_trip = pair.a.report(pair.now().instant).round_trip;
    assert_eq!(round_trip, Some(Duration::from_millis(40)));
}
