//! From which of its addresses a daemon sends: the one it was spoken to at, for as long as that is its
//! own and the way to the peer leads over the same interface.

use std::net::SocketAddr;
use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::{DEVICE, Family};
use wgsep_tests::netns::Netns;
use wgsep_tests::require;
use wgsep_tests::traffic::{ping, until_ping};
use wgsep_tests::tunnel::{End, PORT, Plan, Tunnel};

fn tunnel(implementation: Implementation, outer: Family) -> Tunnel {
    let tunnel = Plan { outer, ..Plan::new(implementation, Wgsep) }.build();
    until_ping(&tunnel.left.daemon.netns, tunnel.right.side.inner(Family::V4));
    tunnel
}

/// Another address in the network of the veth.
fn another(family: Family, number: u16) -> String {
    match family {
        Family::V4 => format!("10.77.0.{number}"),
        Family::V6 => format!("fd07::{number}"),
    }
}

fn endpoint(address: &str) -> String {
    let address = SocketAddr::new(address.parse().expect("an address"), PORT);
    address.to_string()
}

fn add_address(netns: &Netns, device: &str, family: Family, address: &str) {
    match family {
        Family::V4 => netns.run(format!("ip addr add {address}/24 dev {device}")),
        Family::V6 => netns.run(format!("ip addr add {address}/64 dev {device} nodad")),
    };
}

/// One packet each way, at once: nothing may wait for a timer.
#[track_caller]
fn answers_at_once(from: &End, to: &End) {
    let pings = ping(&from.daemon.netns, to.side.inner(Family::V4), 1);
    assert_eq!(pings.received, 1, "{:?} has no answer", from.side);
}

#[test]
fn a_session_outlives_the_address_it_was_spoken_to_at() {
    require!(Wgsep);
    for outer in [Family::V4, Family::V6] {
        let tunnel = tunnel(Wgsep, outer);
        let Tunnel { left, right } = &tunnel;
        let handshake = right.daemon.peer().latest_handshake;
        let new = another(outer, 10);
        add_address(&left.daemon.netns, DEVICE, outer, &new);
        // Or the second address would go with the first.
        left.daemon.netns.run(format!("sysctl -qw net.ipv4.conf.{DEVICE}.promote_secondaries=1"));
        let length = if outer == Family::V4 { 24 } else { 64 };
        let old = left.side.outer(outer);
        left.daemon.netns.run(format!("ip addr del {old}/{length} dev {DEVICE}"));
        answers_at_once(left, right);
        assert_eq!(right.daemon.peer().endpoint, endpoint(&new), "over {outer:?}");
        assert_eq!(right.daemon.peer().latest_handshake, handshake, "the session went on");
    }
}

#[test]
fn the_answer_comes_from_whichever_address_was_spoken_to() {
    require!(Wgsep);
    answer_from_each_address(Wgsep);
}

#[test]
fn control_wireguard_go_answers_from_the_address_spoken_to() {
    require!(Wgsep, WireguardGo);
    answer_from_each_address(WireguardGo);
}

fn answer_from_each_address(implementation: Implementation) {
    let tunnel = tunnel(implementation, Family::V4);
    let Tunnel { left, right } = &tunnel;
    for family in [Family::V4, Family::V6] {
        add_address(&left.daemon.netns, DEVICE, family, &another(family, 10));
    }
    for spoken_to in [
        left.side.outer(Family::V4).to_string(),
        another(Family::V6, 10),
        another(Family::V4, 10),
        left.side.outer(Family::V6).to_string(),
    ] {
        right.set_peer(left, format!("endpoint {}", endpoint(&spoken_to)));
        answers_at_once(right, left);
        assert_eq!(right.daemon.peer().endpoint, endpoint(&spoken_to));
    }
}

/// The address is on a device that leads nowhere; what counts is the one the datagrams come by.
#[test]
fn the_answer_comes_from_an_address_of_another_interface() {
    require!(Wgsep);
    let tunnel = tunnel(Wgsep, Family::V4);
    let Tunnel { left, right } = &tunnel;
    let spoken_to = "10.50.0.1";
    left.daemon.netns.run("ip link add elsewhere type bridge");
    add_address(&left.daemon.netns, "elsewhere", Family::V4, spoken_to);
    left.daemon.netns.run("ip link set elsewhere up");
    right.daemon.netns.run(format!("ip route add 10.50.0.0/24 dev {DEVICE}"));
    right.set_peer(left, format!("endpoint {}", endpoint(spoken_to)));
    answers_at_once(right, left);
    assert_eq!(right.daemon.peer().endpoint, endpoint(spoken_to));
}

#[test]
fn routes_that_do_not_lead_to_the_peer_change_nothing() {
    require!(Wgsep);
    let tunnel = tunnel(Wgsep, Family::V4);
    let Tunnel { left, right } = &tunnel;
    let spoken_to = another(Family::V4, 10);
    add_address(&left.daemon.netns, DEVICE, Family::V4, &spoken_to);
    right.set_peer(left, format!("endpoint {}", endpoint(&spoken_to)));
    answers_at_once(right, left);
    left.daemon.netns.run(format!("ip route add 10.99.0.0/16 dev {DEVICE}"));
    left.daemon.netns.run("ip rule add to 10.98.0.0/16 table 98");
    answers_at_once(left, right);
    assert_eq!(right.daemon.peer().endpoint, endpoint(&spoken_to));
}

/// Joins both ends by a second pair of devices, on which only the left one has an address.
fn join_again(left: &Netns, right: &Netns) {
    left.run(format!("ip link add second type veth peer name second netns {}", right.name()));
    for netns in [left, right] {
        netns.run("ip link set second addrgenmode none");
        netns.run("ip link set second up");
        netns.run("sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.second.rp_filter=0");
        netns.run(format!("sysctl -qw net.ipv4.conf.{DEVICE}.rp_filter=0"));
    }
    // No route of its own: it may send only by the first.
    left.run("ip addr add 10.77.0.30/32 dev second");
}

#[test]
fn a_better_route_by_another_interface_takes_over() {
    require!(Wgsep);
    for better in [
        "ip route add 10.77.0.2/32 dev second src 10.77.0.30",
        "ip rule add to 10.77.0.2/32 table 77",
    ] {
        let tunnel = tunnel(Wgsep, Family::V4);
        let Tunnel { left, right } = &tunnel;
        join_again(&left.daemon.netns, &right.daemon.netns);
        left.daemon.netns.run("ip route add 10.77.0.2/32 dev second src 10.77.0.30 table 77");
        answers_at_once(left, right);
        assert_eq!(right.daemon.peer().endpoint, left.endpoint(Family::V4).to_string());
        left.daemon.netns.run(better);
        answers_at_once(left, right);
        assert_eq!(right.daemon.peer().endpoint, endpoint("10.77.0.30"), "after {better}");
    }
}
