//! Every implementation with every other: handshake, ping and bulk traffic, both ways, IPv4 and
//! IPv6, inside and outside. The pairs without wgsep are the control: a test that fails there too
//! blames the test or the machine.

use wgsep_tests::implementation::Implementation::{
    self, Boringtun, Gotatun, NewestWireguardGo, Wgsep, WireguardGo,
};
use wgsep_tests::link::{Family, Side};
use wgsep_tests::require;
use wgsep_tests::traffic::{Load, Received, iperf, ping, until_ping};
use wgsep_tests::tunnel::{End, Knows, Plan, Tunnel};
use wgsep_tests::wg::preshared_key;

/// UDP at 5 Mbit/s is far below what any implementation carries, so more than this many percent are
/// lost by a fault, or by a machine that was busy elsewhere: which is not so three times in a row.
const TOLERATED_LOSS: f64 = 2.0;
const ATTEMPTS: usize = 3;

macro_rules! pairs {
    ($($name:ident: $left:expr, $right:expr;)+) => {$(
        mod $name {
            use super::*;

            #[test]
            fn carries_traffic_both_ways_over_v4() {
                require!($left, $right);
                carries_traffic_both_ways($left, $right, Family::V4);
            }

            #[test]
            fn carries_traffic_both_ways_over_v6() {
                require!($left, $right);
                carries_traffic_both_ways($left, $right, Family::V6);
            }

            #[test]
            fn left_begins_and_right_learns_its_endpoint() {
                require!($left, $right);
                one_side_begins($left, $right, Side::Left);
            }

            #[test]
            fn right_begins_and_left_learns_its_endpoint() {
                require!($left, $right);
                one_side_begins($left, $right, Side::Right);
            }

            #[test]
            fn a_preshared_key_must_match() {
                require!($left, $right);
                preshared_key_must_match($left, $right);
            }
        }
    )+};
}

pairs! {
    wgsep_with_wgsep: Wgsep, Wgsep;
    wgsep_with_wireguard_go: Wgsep, WireguardGo;
    wgsep_with_the_newest_wireguard_go: Wgsep, NewestWireguardGo;
    wgsep_with_boringtun: Wgsep, Boringtun;
    wgsep_with_gotatun: Wgsep, Gotatun;
    control_wireguard_go_with_wireguard_go: WireguardGo, WireguardGo;
    control_wireguard_go_with_boringtun: WireguardGo, Boringtun;
    control_wireguard_go_with_gotatun: WireguardGo, Gotatun;
    control_wireguard_go_with_the_newest: WireguardGo, NewestWireguardGo;
    control_boringtun_with_gotatun: Boringtun, Gotatun;
}

fn carries_traffic_both_ways(left: Implementation, right: Implementation, outer: Family) {
    let tunnel = Plan { outer, ..Plan::new(left, right) }.build();
    for (from, to) in tunnel.directions() {
        for inner in [Family::V4, Family::V6] {
            let (client, server) = (&from.daemon.netns, &to.daemon.netns);
            let address = to.side.inner(inner);
            until_ping(client, address);
            let pings = ping(client, address, 10);
            assert!(pings.were_answered(), "{inner:?} from the {:?}: {pings:?}", from.side);

            let tcp = iperf(client, server, address, Load::Tcp);
            assert!(tcp.bytes > 0, "TCP {inner:?} from the {:?}: {tcp:?}", from.side);

            let runs = (0..ATTEMPTS).map(|_| iperf(client, server, address, Load::Udp));
            let arrived = |udp: &Received| udp.bytes > 0 && udp.lost_percent <= TOLERATED_LOSS;
            let arrived = { runs }.any(|udp| arrived(&udp));
            assert!(arrived, "UDP {inner:?} from the {:?} is lost, thrice", from.side);
        }
    }
}

fn one_side_begins(left: Implementation, right: Implementation, first: Side) {
    let tunnel = Plan { knows_endpoint: Knows::Only(first), ..Plan::new(left, right) }.build();
    let Tunnel { left, right } = &tunnel;
    let (from, to) = if first == Side::Left { (left, right) } else { (right, left) };
    assert_eq!(to.daemon.peer().endpoint, "(none)");
    until_ping(&from.daemon.netns, to.side.inner(Family::V4));
    until_ping(&to.daemon.netns, from.side.inner(Family::V6));
    assert_eq!(to.daemon.peer().endpoint, from.endpoint(Family::V4).to_string());
    assert_ne!(from.daemon.peer().received, 0);
    assert_ne!(to.daemon.peer().received, 0);
}

fn preshared_key_must_match(left: Implementation, right: Implementation) {
    let tunnel = Plan { preshared: true, ..Plan::new(left, right) }.build();
    let Tunnel { left, right } = &tunnel;
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    let shared = left.daemon.peer().preshared_key;

    replace_peer(left, right, &preshared_key());
    let pings = ping(&left.daemon.netns, right.side.inner(Family::V4), 3);
    assert_eq!(pings.received, 0, "{pings:?} with two different preshared keys");

    replace_peer(left, right, &shared);
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
}

/// Removes the peer and adds it again, so that no session of before is left to fall back on, and
/// because boringtun panics when a peer that it has is modified.
fn replace_peer(end: &End, peer: &End, psk: &str) {
    let key = &peer.key.public;
    end.daemon.wg_set(format!("peer {key} remove"));
    let text = format!(
        "[Peer]\nPublicKey = {key}\nPresharedKey = {psk}\nAllowedIPs = {}/32\nEndpoint = {}\n",
        peer.side.inner(Family::V4),
        peer.endpoint(Family::V4),
    );
    end.daemon.wg_conf("addconf", &text);
}
