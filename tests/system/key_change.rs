//! A private key that is replaced or comes late: the handshake that follows does not wait.

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::{Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::require;
use wgsep_tests::traffic::answers_at_once;
use wgsep_tests::tunnel::{Tunnel, over_loopback};
use wgsep_tests::wg::{KeyPair, preshared_key};

#[test]
fn a_new_private_key_makes_a_handshake_at_once() {
    require!(Wgsep);
    new_key_makes_a_handshake(Wgsep);
}

#[test]
fn control_wireguard_go_makes_a_handshake_at_once() {
    require!(WireguardGo);
    new_key_makes_a_handshake(WireguardGo);
}

fn new_key_makes_a_handshake(implementation: Implementation) {
    let (_middle, mut tunnel) = over_loopback(implementation);
    tunnel.know_each_other(Family::V4);
    let psk = preshared_key();
    for (end, other) in tunnel.directions() {
        end.set_peer_key(&other.key.public, &psk, &addresses(other.side));
    }
    let Tunnel { left, right } = &mut tunnel;
    let address = right.side.inner(Family::V4);
    assert!(answers_at_once(&left.daemon.netns, address), "with the first key");

    let old = std::mem::replace(&mut left.key, KeyPair::generate());
    left.daemon.set_private_key(&left.key.private);
    right.set_peer_key(&left.key.public, &psk, &addresses(left.side));
    right.daemon.wg_set(format!("peer {} remove", old.public));
    assert!(answers_at_once(&left.daemon.netns, address), "with the second key");
    assert_eq!(right.daemon.peer().public_key, left.key.public);
    assert_ne!(right.daemon.peer().latest_handshake, 0);
}

fn addresses(side: Side) -> String {
    format!("{}/32,{}/128", side.inner(Family::V4), side.inner(Family::V6))
}

/// As with the kernel: what the link could not do when it came up is done once it can.
#[test]
fn a_key_set_later_begins_the_keepalives_of_a_link_that_is_up() {
    require!(Wgsep);
    for _ in 0..10 {
        let daemon = Daemon::start(Wgsep, &Netns::new());
        let peer = KeyPair::generate().public;
        daemon.wg_set(format!("peer {peer} endpoint 127.0.0.1:9 persistent-keepalive 1"));
        daemon.netns.run(format!("ip link set {} up", daemon.interface));
        assert_eq!(daemon.peer().sent, 0, "without a key");
        daemon.set_private_key(&KeyPair::generate().private);
        assert_eq!(daemon.peer().sent, 148, "an initiation");
    }
}
