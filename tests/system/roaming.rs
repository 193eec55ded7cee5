//! A client whose address or port changes keeps its session, because the server follows the
//! endpoint of what authenticates.

use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::{DEVICE, Family, Side};
use wgsep_tests::require;
use wgsep_tests::traffic::{answers_at_once, until_ping};
use wgsep_tests::tunnel::{Knows, PORT, Plan, Tunnel, over_loopback};

/// The client's second addresses.
const MOVED_V4: &str = "10.77.0.99";
const MOVED_V6: &str = "fd07::99";

#[test]
fn the_server_follows_a_client_to_another_port() {
    require!(Wgsep);
    for outer in [Family::V4, Family::V6] {
        follows_port(Wgsep, outer);
    }
}

#[test]
fn the_server_follows_a_client_to_another_v4_address() {
    require!(Wgsep);
    follows_address(Wgsep, Family::V4);
}

#[test]
fn the_server_follows_a_client_to_another_v6_address() {
    require!(Wgsep);
    follows_address(Wgsep, Family::V6);
}

/// Over one loopback, where every address of 127.0.0.0/8 remains local: the client's address
/// changes while the server's stays, and then the family of both; the first packet gets through.
#[test]
fn a_client_on_loopback_changes_address_port_and_family_and_loses_no_packet() {
    require!(Wgsep);
    let (middle, tunnel) = over_loopback(Wgsep);
    tunnel.know_each_other(Family::V4);
    let Tunnel { left, right } = &tunnel;
    let to_right = |family| answers_at_once(&left.daemon.netns, right.side.inner(family));
    assert!(to_right(Family::V4));

    middle.run("ip -4 addr del 127.0.0.1/8 dev lo");
    middle.run("ip -4 addr add 127.212.121.99/8 dev lo");
    left.daemon.wg_set("listen-port 9999");
    left.set_peer(right, format!("endpoint 127.0.0.1:{}", right.port));
    assert!(to_right(Family::V6));
    assert_eq!(right.daemon.peer().endpoint, "127.212.121.99:9999");

    left.daemon.wg_set("listen-port 9998");
    left.set_peer(right, format!("endpoint [::1]:{}", right.port));
    assert!(to_right(Family::V4));
    assert_eq!(right.daemon.peer().endpoint, "[::1]:9998");
}

#[test]
fn control_wireguard_go_follows_a_client() {
    require!(Wgsep, WireguardGo);
    follows_port(WireguardGo, Family::V4);
    follows_address(WireguardGo, Family::V6);
}

/// The client, on the left, is always wgsep: it must send from where it is sent to, too.
fn roaming(server: Implementation, outer: Family) -> Tunnel {
    let plan = Plan { outer, knows_endpoint: Knows::Only(Side::Left), ..Plan::new(Wgsep, server) };
    let tunnel = plan.build();
    until_ping(&tunnel.left.daemon.netns, tunnel.right.side.inner(Family::V4));
    tunnel
}

fn follows_port(server: Implementation, outer: Family) {
    let tunnel = roaming(server, outer);
    let Tunnel { left, right } = &tunnel;
    let handshake = right.daemon.peer().latest_handshake;
    assert_eq!(right.daemon.peer().endpoint, left.endpoint(outer).to_string());

    left.daemon.wg_set(format!("listen-port {}", PORT + 7));
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    let mut moved = left.endpoint(outer);
    moved.set_port(PORT + 7);
    assert_eq!(right.daemon.peer().endpoint, moved.to_string());
    assert_eq!(right.daemon.peer().latest_handshake, handshake, "the session went on");
    until_ping(&right.daemon.netns, left.side.inner(Family::V6));
}

fn follows_address(server: Implementation, outer: Family) {
    let tunnel = roaming(server, outer);
    let Tunnel { left, right } = &tunnel;
    let handshake = right.daemon.peer().latest_handshake;

    let (old, new) = match outer {
        Family::V4 => (format!("{}/24", left.side.outer(outer)), format!("{MOVED_V4}/24")),
        Family::V6 => (format!("{}/64", left.side.outer(outer)), format!("{MOVED_V6}/64 nodad")),
    };
    let netns = &left.daemon.netns;
    netns.run(format!("ip addr del {old} dev {DEVICE}"));
    let (address, nodad) = new.split_once(' ').unwrap_or((&new, ""));
    netns.run(format!("ip addr add {address} dev {DEVICE} {nodad}"));
    until_ping(netns, right.side.inner(Family::V4));

    let expected = match outer {
        Family::V4 => format!("{MOVED_V4}:{PORT}"),
        Family::V6 => format!("[{MOVED_V6}]:{PORT}"),
    };
    assert_eq!(right.daemon.peer().endpoint, expected);
    assert_eq!(right.daemon.peer().latest_handshake, handshake, "the session went on");
    until_ping(&right.daemon.netns, left.side.inner(Family::V6));
}
