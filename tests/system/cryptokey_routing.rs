//! Cryptokey routing: an address belongs to the peer with the longest prefix for it, and what
//! another peer sends from it is dropped.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::{Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::tunnel::{Tunnel, over_loopback};
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{require, wait};

const LIMIT: Duration = Duration::from_secs(5);

/// One datagram's worth.
const WORD: &[u8] = b"X";

#[test]
fn a_more_specific_address_of_another_peer_shuts_this_one_out() {
    require!(Wgsep);
    more_specific_shuts_out(Wgsep);
}

#[test]
fn control_wireguard_go_shuts_it_out() {
    require!(WireguardGo);
    more_specific_shuts_out(WireguardGo);
}

fn more_specific_shuts_out(implementation: Implementation) {
    let (_middle, tunnel) = over_loopback(implementation);
    tunnel.know_each_other(Family::V6);
    let Tunnel { left, right } = &tunnel;
    left.set_peer(right, "allowed-ips 192.168.77.0/24");
    let (server, client) = sockets(&tunnel);
    assert!(passes(&client, &server), "allowed by the network");

    let other = KeyPair::generate().public;
    let source = right.side.inner(Family::V4);
    left.daemon.wg_set(format!("peer {other} allowed-ips {source}/32"));
    let mut moved = right.on_loopback(Family::V6);
    moved.set_port(moved.port() + 10);
    right.daemon.wg_set(format!("listen-port {}", moved.port()));
    let received = peer_of(&tunnel).received;
    send(&client);
    // It came, it was authentic, and it says where the peer is now; yet it is not delivered.
    let endpoint = || endpoint_of(&tunnel);
    wait::until("the endpoint follows", LIMIT, || endpoint() == moved.to_string());
    assert!(!has_word(&server, Duration::from_millis(200)), "the word came through");
    if implementation == Wgsep {
        // As in the kernel; wireguard-go counts what it refuses.
        assert_eq!(peer_of(&tunnel).received, received);
    }

    left.daemon.wg_set(format!("peer {other} remove"));
    assert!(passes(&client, &server), "once the other peer is gone");
    assert_eq!(endpoint_of(&tunnel), moved.to_string());
}

/// A socket that listens within the tunnel on the left, and one on the right that sends to it.
fn sockets(tunnel: &Tunnel) -> (UdpSocket, UdpSocket) {
    let Tunnel { left, right } = tunnel;
    let server = bind(&left.daemon.netns, left.side);
    let client = bind(&right.daemon.netns, right.side);
    let address = server.local_addr().and_then(|address| client.connect(address));
    assert!(address.is_ok(), "{address:?}");
    (server, client)
}

fn bind(netns: &Netns, side: Side) -> UdpSocket {
    let address = SocketAddr::new(side.inner(Family::V4), 0);
    match netns.inside(|| UdpSocket::bind(address)) {
        Ok(socket) => socket,
        Err(error) => panic!("cannot bind {address}: {error}"),
    }
}

#[track_caller]
fn send(client: &UdpSocket) {
    let sent = client.send(WORD);
    assert!(sent.is_ok(), "{sent:?}");
}

#[track_caller]
fn passes(client: &UdpSocket, server: &UdpSocket) -> bool {
    send(client);
    has_word(server, LIMIT)
}

/// Whether the word comes within a time.
#[track_caller]
fn has_word(server: &UdpSocket, limit: Duration) -> bool {
    let set = server.set_read_timeout(Some(limit));
    assert!(set.is_ok(), "{set:?}");
    let mut buffer = [0; 16];
    server.recv(&mut buffer).is_ok_and(|length| buffer[..length] == *WORD)
}

fn endpoint_of(tunnel: &Tunnel) -> String {
    peer_of(tunnel).endpoint
}

fn peer_of(tunnel: &Tunnel) -> wgsep_tests::wg::PeerState {
    let peers = tunnel.left.daemon.peers();
    let theirs = peers.into_iter().find(|peer| peer.public_key == tunnel.right.key.public);
    match theirs {
        Some(peer) => peer,
        None => panic!("the left end lost its peer"),
    }
}
