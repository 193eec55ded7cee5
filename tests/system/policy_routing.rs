//! Routing by rules and marks around the tunnel: sockets bound to the interface, packets rerouted by a
//! mark, and the default route through the tunnel as wg-quick(8) makes it.

use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::{self, DEVICE, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::require;
use wgsep_tests::traffic::{answers_at_once, flood};
use wgsep_tests::tunnel::{Plan, Tunnel, between};

/// Addresses of the right end that only a default route leads to.
const FAR: [&str; 2] = ["198.51.100.7", "2001:db8::1111"];

/// A mark, and the table and the rules that it stands for.
const MARK: u32 = 51820;

#[track_caller]
fn assert_bound_ping(netns: &Netns, interface: &str, when: &str) {
    let address = Side::Right.inner(Family::V4);
    let bound = netns.output(format!("ping -n -q -c 1 -W 2 -I {interface} {address}"));
    assert!(bound.status.success(), "bound to the interface, {when}: {bound:?}");
    assert!(answers_at_once(netns, address), "unbound, {when}");
}

#[test]
fn a_socket_bound_to_the_interface_works_also_when_marks_reroute() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let end = &tunnel.left.daemon;
    assert_bound_ping(&end.netns, &end.interface, "without marks");
    end.netns.run("nft add table inet marks");
    // A chain of type route looks for the route again when the mark has changed.
    end.netns.run("nft add chain inet marks out { type route hook output priority -150 ; }");
    end.netns.run("nft add rule inet marks out meta mark set 1");
    assert_bound_ping(&end.netns, &end.interface, "with a mark on every packet");
}

#[test]
fn the_default_route_leads_through_the_tunnel_and_its_own_packets_around_it() {
    require!(Wgsep);
    default_route_by_mark(Wgsep);
}

#[test]
fn control_wireguard_go_routes_by_mark() {
    require!(WireguardGo);
    default_route_by_mark(WireguardGo);
}

fn default_route_by_mark(implementation: Implementation) {
    let (left, right) = link::joined();
    let tunnel = between(&left, &right, implementation);
    let Tunnel { left, right } = &tunnel;
    let (near, far) = (&left.daemon, &right.daemon);
    for (address, length) in FAR.into_iter().zip([32, 128]) {
        far.netns.run(format!("ip addr add {address}/{length} dev {}", far.interface));
    }
    near.netns
        .run(format!("ip -4 route add default via {} dev {DEVICE}", Side::Right.outer(Family::V4)));
    near.netns
        .run(format!("ip -6 route add default via {} dev {DEVICE}", Side::Right.outer(Family::V6)));
    left.set_peer(right, format!("endpoint {}", right.endpoint(Family::V4)));
    near.wg_set(format!("fwmark {MARK} peer {} allowed-ips {}", right.key.public, FAR.join(",")));
    for family in ["-4", "-6"] {
        for line in [
            format!("route add default dev {} table {MARK}", near.interface),
            format!("rule add not fwmark {MARK} table {MARK}"),
            "rule add table main suppress_prefixlength 0".to_owned(),
        ] {
            near.netns.run(format!("ip {family} {line}"));
        }
    }
    near.netns.run(format!("sysctl -qw net.ipv4.conf.{DEVICE}.rp_filter=0"));
    // Replies to what is marked come in unmarked, and the route back is looked up without it.
    near.netns.run("sysctl -qw net.ipv4.conf.all.rp_filter=0");
    far.netns.run(format!("ip route add {}/32 dev {}", left.side.inner(Family::V4), far.interface));
    for address in FAR {
        // Many, and each at once: what routes have cached must not run out or go stale.
        let Ok(address) = address.parse() else { panic!("{address} is no address") };
        let pings = flood(&near.netns, address, 100);
        assert!(pings.were_answered(), "{address}: {pings:?}");
    }
    let route =
        near.netns.run(format!("ip route get {} mark {MARK}", Side::Right.outer(Family::V4)));
    assert!(route.contains(DEVICE), "{route}");
}
