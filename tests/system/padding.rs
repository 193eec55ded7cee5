//! The length of datagrams on the network: padded to 16, but never past what the route takes, and up
//! to what IP carries at all.

use wgsep_tests::implementation::Implementation::{Wgsep, WireguardGo};
use wgsep_tests::link::{DEVICE, Family};
use wgsep_tests::nft::Counter;
use wgsep_tests::require;
use wgsep_tests::traffic::{Load, iperf, until_ping};
use wgsep_tests::tunnel::{End, Plan, Tunnel};

/// Headers around the packet inside, over IPv4: IP, UDP, WireGuard's own and its tag.
const OVERHEAD: u32 = 20 + 8 + 16 + 16;
/// Headers around the payload of a ping inside.
const PING_HEADERS: u32 = 20 + 8;
/// The same with IPv6.
const IPV6_PING_HEADERS: u32 = 40 + 8;

fn tunnel() -> Tunnel {
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    until_ping(&tunnel.left.daemon.netns, tunnel.right.side.inner(Family::V4));
    tunnel
}

/// Pings with `len` bytes of inner packet; the request leaves as a datagram of `expected` bytes.
#[track_caller]
fn assert_leaves_as(from: &End, to: &End, len: u32, expected: u32) {
    let label = format!("len{len}as{expected}x{}", wgsep_tests::daemon::unique_interface());
    let expression = format!("ip protocol udp meta length {expected}");
    let counter = Counter::new(&from.daemon.netns, &label, "output", &expression);
    let destination = to.side.inner(Family::V4);
    let size = len - PING_HEADERS;
    from.daemon.netns.run(format!("ping -n -c 1 -W 2 -s {size} {destination}"));
    assert_eq!(counter.packets(), 1, "no datagram of {expected} bytes for {len}");
}

#[test]
fn packets_are_padded_to_16_but_not_past_the_interfaces_mtu() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    assert_leaves_as(left, right, 85, 96 + OVERHEAD);
    assert_leaves_as(left, right, 1409, 1420 + OVERHEAD);
    left.daemon.netns.run(format!("ip link set {} mtu 1300", left.daemon.interface));
    assert_leaves_as(left, right, 1297, 1300 + OVERHEAD);
}

#[test]
fn the_mtu_of_an_ipv6_route_is_followed_when_it_is_replaced_and_removed() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let (netns, interface) = (&left.daemon.netns, &left.daemon.interface);
    let to = right.side.inner(Family::V6);
    for (change, expected) in [
        ("add", 1312),
        ("replace mtu 1299", 1299),
        ("replace", 1312),
        ("replace mtu 1300", 1300),
        ("del", 1312),
        ("add mtu 1299", 1299),
    ] {
        let (verb, mtu) = change.split_once(' ').unwrap_or((change, ""));
        netns.run(format!("ip -6 route {verb} {to} dev {interface} metric 9 {mtu}"));
        let label = format!("v6as{expected}x{}", wgsep_tests::daemon::unique_interface());
        let expression = format!("ip protocol udp meta length {}", expected + OVERHEAD);
        let counter = Counter::new(netns, &label, "output", &expression);
        netns.run(format!("ping -n -c 1 -W 2 -s {} {to}", 1297 - IPV6_PING_HEADERS));
        assert_eq!(counter.packets(), 1, "after {change}");
    }
}

#[test]
fn packets_are_not_padded_past_the_mtu_of_their_route() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let (netns, interface) = (&left.daemon.netns, &left.daemon.interface);
    let route = format!("{} dev {interface}", right.side.inner(Family::V4));
    netns.run(format!("ip route add {route} mtu 1299"));
    assert_leaves_as(left, right, 1297, 1299 + OVERHEAD);
    netns.run(format!("ip route del {route} mtu 1299"));
    assert_leaves_as(left, right, 1297, 1312 + OVERHEAD);
    // Routes that go with the link are forgotten with it, although the kernel says nothing of them.
    netns.run(format!("ip route add {route} mtu 1299"));
    netns.run(format!("ip link set {interface} down"));
    netns.run(format!("ip link set {interface} up"));
    until_ping(netns, right.side.inner(Family::V4));
    assert_leaves_as(left, right, 1297, 1312 + OVERHEAD);
}

#[test]
fn control_wireguard_go_pads_past_the_mtu_of_the_route() {
    require!(Wgsep, WireguardGo);
    let tunnel = Plan::new(WireguardGo, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    let route = format!("{} dev {}", right.side.inner(Family::V4), left.daemon.interface);
    left.daemon.netns.run(format!("ip route add {route} mtu 1299"));
    assert_leaves_as(left, right, 1297, 1312 + OVERHEAD);
}

/// The longest ping that fits into one datagram, and TCP: over a network that has to fragment, and
/// in both families outside.
#[test]
fn an_mtu_up_to_the_longest_datagram_works() {
    require!(Wgsep);
    for (outer, longest) in [(Family::V4, 65_535 - OVERHEAD), (Family::V6, 65_535 - OVERHEAD)] {
        let tunnel = Plan { outer, ..Plan::new(Wgsep, Wgsep) }.build();
        let Tunnel { left, right } = &tunnel;
        for end in [left, right] {
            let (netns, interface) = (&end.daemon.netns, &end.daemon.interface);
            netns.run(format!("ip link set {DEVICE} mtu 9000"));
            netns.run(format!("ip link set {interface} mtu {longest}"));
        }
        let destination = right.side.inner(Family::V4);
        until_ping(&left.daemon.netns, destination);
        for len in [34_736, longest - 1, longest] {
            let size = len - PING_HEADERS;
            left.daemon.netns.run(format!("ping -n -c 1 -W 2 -s {size} {destination}"));
        }
        let got = iperf(&left.daemon.netns, &right.daemon.netns, destination, Load::Tcp);
        assert!(got.bytes > 1 << 20, "{got:?} over {outer:?}");
    }
}

#[test]
fn congestion_marks_pass_from_outside_to_inside() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let (netns, interface) = (&right.daemon.netns, &right.daemon.interface);
    // On the way, all that is capable of it is marked for congestion; TOS 2 is ECT(0).
    left.daemon.netns.run("nft add table inet road");
    left.daemon.netns.run("nft add chain inet road out { type route hook output priority 100 ; }");
    let outside =
        Counter::new(&left.daemon.netns, "capable", "output", "ip protocol udp ip ecn ect0");
    left.daemon.netns.run("nft add rule inet road out ip protocol udp ip ecn ect0 ip ecn set ce");
    let inside = Counter::new(
        netns,
        "congested",
        "input",
        &format!("iifname {interface} ip protocol icmp ip ecn ce"),
    );
    let to = right.side.inner(Family::V4);
    left.daemon.netns.run(format!("ping -n -c 1 -W 2 {to}"));
    assert_eq!((outside.packets(), inside.packets()), (0, 0), "not capable, not marked");
    left.daemon.netns.run(format!("ping -n -c 1 -W 2 -Q 2 {to}"));
    assert_eq!((outside.packets(), inside.packets()), (1, 1), "capable, and marked");
}
