//! Two interfaces on the loopback device.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::time::timeout;
use wgsep_tokio::proto::{
    AllowedIp, AllowedIpChange, Configuration, DropCause, Event, PeerConfiguration, PrivateKey,
    PublicKey, SessionState, StartHandshakeError, SystemRandom,
};
use wgsep_tokio::{MAX_DATAGRAM, UdpDevice};

/// Longer than anything here takes, on a slow machine.
const LIMIT: Duration = Duration::from_secs(60);

fn inner(number: u8) -> IpAddr {
    [192, 0, 2, number].into()
}

/// An IPv4 packet between the two ends, without a checksum, which nothing here looks at.
fn packet(from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    let len = u8::try_from(20 + payload.len()).unwrap();
    let header = [0x45, 0, 0, len, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, from, 192, 0, 2, to];
    [&header[..], payload].concat()
}

async fn bind(
    key: PrivateKey,
    peer: (PublicKey, u8),
    address: &str,
    endpoint: Option<SocketAddr>,
) -> UdpDevice {
    let mut configuration = PeerConfiguration::new(peer.0);
    configuration.endpoint = endpoint;
    let allowed_ip = AllowedIp::new(inner(peer.1), 32).unwrap();
    configuration.allowed_ips.push(AllowedIpChange { allowed_ip, remove: false });
    let configuration = Configuration {
        private_key: Some(Some(key)),
        peers: vec![configuration],
        ..Configuration::default()
    };
    UdpDevice::bind(configuration, address.parse().unwrap()).await.unwrap()
}

/// The two ends; the first knows where the other is, at a port of `to`.
async fn pair(from: &str, to: &str, reached_at: &str) -> (UdpDevice, UdpDevice) {
    let [one, two] = [(); 2].map(|()| PrivateKey::generate(&mut SystemRandom));
    let (public_one, public_two) = (one.public_key(), two.public_key());
    let two = bind(two, (public_one, 1), to, None).await;
    let at = SocketAddr::new(reached_at.parse().unwrap(), two.local_addr().unwrap().port());
    (bind(one, (public_two, 2), from, Some(at)).await, two)
}

async fn exchange(from: &str, to: &str, reached_at: &str) {
    let (mut one, mut two) = pair(from, to, reached_at).await;
    let (mut buffer, mut other_buffer) = (vec![0; MAX_DATAGRAM], vec![0; MAX_DATAGRAM]);
    let there = packet(1, 2, b"there");
    one.send(&there).await.unwrap();
    // The handshake runs while both are awaited.
    let received = timeout(LIMIT, async {
        tokio::select! {
            received = two.recv(&mut buffer) => received.unwrap(),
            received = one.recv(&mut other_buffer) => panic!("{received:?}"),
        }
    });
    let received = received.await.unwrap();
    assert_eq!(received.packet, there);
    let peer = received.peer;
    let back = packet(2, 1, b"back");
    two.send(&back).await.unwrap();
    assert_eq!(timeout(LIMIT, one.recv(&mut other_buffer)).await.unwrap().unwrap().packet, back);
    let name = two.device().public_key(peer);
    let complete = Event::HandshakeComplete { peer: name.unwrap(), first: true };
    assert!(std::iter::from_fn(|| two.poll_event()).any(|event| event == complete));
}

#[tokio::test]
async fn packets_go_both_ways_over_v4() {
    exchange("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1").await;
}

#[tokio::test]
async fn packets_go_both_ways_over_v6() {
    exchange("[::1]:0", "[::1]:0", "::1").await;
}

#[tokio::test]
async fn a_socket_of_both_families_has_peers_over_v4() {
    exchange("[::]:0", "[::]:0", "127.0.0.1").await;
}

#[tokio::test]
async fn a_recv_that_is_cancelled_at_any_time_loses_no_packet() {
    const PACKETS: u16 = 500;
    let (mut one, mut two) = pair("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1").await;
    let (mut buffer, mut other_buffer) = (vec![0; MAX_DATAGRAM], vec![0; MAX_DATAGRAM]);
    let mut received = Vec::new();
    for number in 0..PACKETS {
        one.send(&packet(1, 2, &number.to_be_bytes())).await.unwrap();
        let waited = timeout(LIMIT, async {
            while received.len() <= usize::from(number) {
                tokio::select! {
                    biased;
                    packet = two.recv(&mut buffer) => received.push(packet.unwrap().packet.to_vec()),
                    packet = one.recv(&mut other_buffer) => panic!("{packet:?}"),
                    () = tokio::task::yield_now() => {}
                }
            }
        });
        waited.await.unwrap();
    }
    let expected: Vec<_> = (0..PACKETS).map(|number| packet(1, 2, &number.to_be_bytes())).collect();
    assert_eq!(received, expected);
}

#[tokio::test]
async fn a_packet_that_no_peer_takes_is_an_error() {
    let (mut one, _two) = pair("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1").await;
    assert_eq!(one.send(&packet(1, 3, b"whom")).await, Err(DropCause::NoPeer));
    assert_eq!(one.send(b"no packet").await, Err(DropCause::OutboundMalformed));
}

/// Awaits both ends, neither of which has a packet to send, until a condition holds of the first.
async fn until(
    one: &mut UdpDevice,
    two: &mut UdpDevice,
    mut condition: impl FnMut(&mut UdpDevice) -> bool,
) {
    let (mut buffer, mut other_buffer) = (vec![0; MAX_DATAGRAM], vec![0; MAX_DATAGRAM]);
    let waited = timeout(LIMIT, async {
        while !condition(one) {
            tokio::select! {
                received = one.recv(&mut buffer) => panic!("{received:?}"),
                received = two.recv(&mut other_buffer) => panic!("{received:?}"),
                () = tokio::task::yield_now() => {}
            }
        }
    });
    waited.await.unwrap();
}

fn state(udp: &UdpDevice, peer: &PublicKey) -> SessionState {
    udp.report(peer).unwrap().state
}

#[tokio::test]
async fn a_handshake_needs_no_packet_and_a_copied_machine_has_another() {
    let (mut one, mut two) = pair("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1").await;
    let peer = one.device().peers().next().unwrap().public_key;
    one.start_handshake(&peer).await.unwrap();
    assert_eq!(one.start_handshake(&peer).await, Err(StartHandshakeError::TooSoon));
    let complete = Event::HandshakeComplete { peer, first: true };
    until(&mut one, &mut two, |one| one.poll_event() == Some(complete)).await;
    assert_eq!(state(&one, &peer), SessionState::Established);
    one.vm_notification().await;
    assert_ne!(state(&one, &peer), SessionState::Established);
}

#[tokio::test]
async fn no_packet_is_padded_beyond_the_mtu() {
    let (mut one, mut two) = pair("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1").await;
    let peer = one.device().peers().next().unwrap().public_key;
    one.start_handshake(&peer).await.unwrap();
    until(&mut one, &mut two, |one| state(one, &peer) == SessionState::Established).await;
    let sent = |one: &UdpDevice| one.report(&peer).unwrap().tx_bytes;
    for (mtu, padded) in [(1420, 48), (33, 33), (0, 48)] {
        let before = sent(&one);
        one.set_mtu(mtu);
        one.send(&packet(1, 2, &[0; 13])).await.unwrap();
        assert_eq!(sent(&one) - before, padded + 32, "{mtu}");
    }
}
