//! Tunnels in tunnels, and routes that lead a tunnel's packets back into itself: the first work, the
//! second do no harm.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use wgsep_tests::daemon::{Daemon, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::{self, Family};
use wgsep_tests::netns::Netns;
use wgsep_tests::traffic::{Load, answers_at_once, flood, iperf, iperf_at_once};
use wgsep_tests::tunnel::{PORT, Tunnel, between, over_loopback};
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{require, wait};

/// The ends of the outer tunnel.
const OUTER: [&str; 2] = ["fd00::5:1", "fd00::5:2"];

/// The ends of an onion's inner layer.
const NEAR: Ipv4Addr = Ipv4Addr::new(192, 168, 78, 1);
const THIRD: Ipv4Addr = Ipv4Addr::new(192, 168, 78, 2);

/// An outer tunnel over loopback, its interfaces renamed, and an inner one whose sockets are in the
/// namespaces of those interfaces.
struct Nested {
    /// Where the sockets of the outer tunnel are.
    middle: Arc<Netns>,
    outer: Tunnel,
    inner: Tunnel,
}

impl Nested {
    fn new() -> Self {
        let (middle, mut outer) = over_loopback(Wgsep);
        outer.know_each_other(Family::V4);
        for ((end, other), (own, theirs)) in
            outer.directions().into_iter().zip([(OUTER[0], OUTER[1]), (OUTER[1], OUTER[0])])
        {
            let (netns, interface) = (&end.daemon.netns, &end.daemon.interface);
            netns.run(format!("ip addr flush dev {interface}"));
            netns.run(format!("ip addr add {own}/112 dev {interface} nodad"));
            end.set_peer(other, format!("allowed-ips {theirs}/128"));
        }
        rename(&mut outer.left.daemon);
        rename(&mut outer.right.daemon);
        let (left, right) = (&outer.left.daemon.netns, &outer.right.daemon.netns);
        let inner = between(left, right, Wgsep);
        for ((end, other), theirs) in inner.directions().into_iter().zip([OUTER[1], OUTER[0]]) {
            end.set_peer(other, format!("endpoint [{theirs}]:{}", other.port));
        }
        Self { middle, outer, inner }
    }
}

/// Gives an interface another name, and its socket, which wg(8) looks for by that name.
fn rename(daemon: &mut Daemon) {
    let new = unique_interface();
    daemon.netns.run(format!("ip link set {} name {new}", daemon.interface));
    let renamed = fs::rename(socket_path(&daemon.interface), socket_path(&new));
    assert!(renamed.is_ok(), "{renamed:?}");
    daemon.interface = new;
}

#[test]
fn a_tunnel_in_a_tunnel_carries_all_traffic() {
    require!(Wgsep);
    let nested = Nested::new();
    for (from, to) in nested.inner.directions() {
        let (client, server) = (&from.daemon.netns, &to.daemon.netns);
        for family in [Family::V4, Family::V6] {
            let address = to.side.inner(family);
            let pings = flood(client, address, 10);
            assert!(pings.were_answered(), "{family:?} from the {:?}: {pings:?}", from.side);
            assert!(iperf(client, server, address, Load::Tcp).bytes > 0);
        }
    }
    let Tunnel { left, right } = &nested.inner;
    let address = right.side.inner(Family::V4);
    for count in [5, 50] {
        let flows =
            iperf_at_once(&left.daemon.netns, &right.daemon.netns, address, Load::Tcp, count);
        assert!(flows.iter().all(|flow| flow.bytes > 0), "{count} flows: {flows:?}");
    }
}

/// What the inner tunnel sends enters the outer one, and what that sends enters the inner one. No one
/// daemon can see that, nor can the kernel's; but each still does as configured.
#[test]
fn a_loop_through_two_namespaces_ends_when_its_cause_does() {
    require!(Wgsep);
    let Nested { middle, outer, mut inner } = Nested::new();
    let entry = &mut inner.left;
    let (own, theirs) = (entry.side.inner(Family::V4), inner.right.side.inner(Family::V4));
    entry.daemon.move_interface(&middle);
    let interface = entry.daemon.interface.clone();
    middle.run(format!("ip addr add {own}/24 dev {interface}"));
    middle.run(format!("ip link set {interface} up"));
    assert!(answers_at_once(&middle, theirs), "before there is a loop");

    outer.left.set_peer(&outer.right, format!("endpoint {theirs}:7"));
    for end in [&outer.right, &inner.right] {
        end.daemon.netns.run(format!("ip link del {}", end.daemon.interface));
    }
    let pings = flood(&middle, theirs, 10);
    assert_eq!(pings.received, 0);
    outer.left.set_peer(&outer.right, "remove");
    until_quiet(&inner.left.daemon);
}

/// A peer whose endpoint is reached through another peer of the same interface.
#[test]
fn an_onion_works_and_one_that_contains_itself_sends_each_packet_once() {
    require!(Wgsep);
    let (left, right) = link::joined();
    let Tunnel { left, right } = between(&left, &right, Wgsep);
    left.set_peer(&right, format!("endpoint {}", right.endpoint(Family::V4)));
    let (near, third) = (&left.daemon, Daemon::start(Wgsep, &right.daemon.netns));
    let key = KeyPair::generate();
    third.set_private_key(&key.private);
    let public = &left.key.public;
    third.wg_set(format!("listen-port {} peer {public} allowed-ips {NEAR}/32", PORT + 5));
    let endpoint = SocketAddr::new(right.side.inner(Family::V4), PORT + 5);
    near.wg_set(format!("peer {} allowed-ips {THIRD}/32 endpoint {endpoint}", key.public));
    for (daemon, address) in [(near, NEAR), (&third, THIRD)] {
        daemon.netns.run(format!("ip addr add {address}/24 dev {}", daemon.interface));
    }
    third.netns.run(format!("ip link set {} up", third.interface));
    // Its port is open when it answers.
    third.wg("show", "listen-port");
    assert!(answers_at_once(&near.netns, THIRD.into()), "through two layers");

    third.netns.run(format!("ip link del {}", third.interface));
    near.wg_set(format!("peer {} endpoint {THIRD}:{}", key.public, PORT + 5));
    let sent = || {
        let peers = near.peers();
        peers.iter().find(|peer| peer.public_key == key.public).map_or(0, |peer| peer.sent)
    };
    let before = sent();
    let pings = flood(&near.netns, THIRD.into(), 10);
    assert_eq!((pings.sent, pings.received), (10, 0));
    // 128 bytes each, and the initiations that the silence may have caused.
    let looped = sent() - before;
    assert!((1280..=1280 + 2 * 148).contains(&looped), "{looped} bytes went into the loop");
    near.wg_set(format!("peer {} remove", key.public));
    assert!(answers_at_once(&near.netns, right.side.inner(Family::V4)), "as if nothing had been");
}

/// As of AllowedIPs 0.0.0.0/1 and 128.0.0.0/1 without a route to the endpoint beside the tunnel. No session
/// begins, so the datagrams that come back are initiations.
#[test]
fn initiations_that_are_routed_into_their_own_tunnel_are_dropped_as_a_loop() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let (key, interface) = (KeyPair::generate(), &daemon.interface);
    daemon.set_private_key(&key.private);
    let peer = KeyPair::generate().public;
    for (endpoint, allowed_ips, address) in [
        ("192.0.2.2:7", "192.0.0.0/8", "192.168.9.1/16"),
        ("[2001:db8::2]:7", "2001:db8::/32", "fd00::9/64"),
    ] {
        daemon.wg_set(format!("peer {peer} endpoint {endpoint} allowed-ips {allowed_ips}"));
        daemon.netns.run(format!("ip addr add {address} dev {interface} nodad"));
        daemon.netns.run(format!("ip link set {interface} up"));
        daemon.netns.run(format!("ip route replace {allowed_ips} dev {interface}"));
        let before = daemon.drops("loop");
        let destination = endpoint.parse::<SocketAddr>().unwrap().ip();
        assert_eq!(flood(&daemon.netns, destination, 3).received, 0);
        wait::until(endpoint, Duration::from_secs(10), || daemon.drops("loop") > before);
        assert_eq!(daemon.drops("staged_overflow"), 0);
        daemon.wg_set(format!("peer {peer} remove"));
    }
}

/// Waits until a daemon sends nothing any more.
#[track_caller]
fn until_quiet(daemon: &Daemon) {
    let sent = || daemon.peers().iter().map(|peer| peer.sent).sum::<u64>();
    let mut before = sent();
    wait::until("the loop has ended", Duration::from_secs(10), || {
        let now = sent();
        std::mem::replace(&mut before, now) == now
    });
}
