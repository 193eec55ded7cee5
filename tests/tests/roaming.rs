//! A client whose address or port changes keeps its session, because the server follows the
//! endpoint of what authenticates.

use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::{DEVICE, Family, Side};
use wgsep_tests::require;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{Knows, PORT, Plan, Tunnel};

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

#[test]
fn control_wireguard_go_follows_a_client() {
    require!(Wgsep, WireguardGo);
    follows_port(WireguardGo, Family::V4);
    follows_address(WireguardGo, Family::V6);
}

/// The client, on the left, is always wgsep: it must send from where it is told, too.
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
