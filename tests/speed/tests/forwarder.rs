//! The forwarder forwards: what it is compared with must do the whole work.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddrV4};
use std::sync::Arc;
use std::thread;

use wgsep_speed::forwarder::Forwarder;
use wgsep_tests::daemon::unique_interface;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::require_root;
use wgsep_tests::traffic::{Load, iperf, ping};

/// An end that forwards until the test program ends: its thread waits in the kernel.
fn start(netns: &Arc<Netns>, side: Side, other: Side) -> IpAddr {
    let interface = unique_interface();
    let [local, peer] = [side, other].map(|side| match side.outer(Family::V4) {
        IpAddr::V4(address) => SocketAddrV4::new(address, 51820),
        IpAddr::V6(_) => panic!("asked for IPv4"),
    });
    let forwarder = netns.inside(|| Forwarder::open(&interface, local, peer)).unwrap();
    thread::spawn(move || forwarder.run());
    let inner = side.inner(Family::V4);
    netns.run(format!("ip addr add {inner}/24 dev {interface}"));
    netns.run(format!("ip link set {interface} mtu 1420 up"));
    inner
}

#[test]
fn pings_a_stream_and_datagrams_go_through_a_forwarder_in_both_directions() {
    require_root!();
    let (left, right) = link::joined();
    let left_inner = start(&left, Side::Left, Side::Right);
    let right_inner = start(&right, Side::Right, Side::Left);
    for (from, to, address) in [(&left, &right, right_inner), (&right, &left, left_inner)] {
        assert_eq!(ping(from, address, 3).received, 3);
        assert!(iperf(from, to, address, Load::Tcp).bytes > 1 << 20);
        let datagrams = iperf(from, to, address, Load::Udp);
        assert!(datagrams.bytes > 100_000 && datagrams.lost_percent < 5.0, "{datagrams:?}");
    }
}
