//! From which of its addresses a daemon sends: the one it was spoken to at, for as long as that is its
//! own and the way to the peer leads over the same interface.

use std::net::SocketAddr;
use std::time::{Duration, Instant};
use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::{self, DEVICE, Family};
use wgsep_tests::netns::Netns;
use wgsep_tests::traffic::{ping, until_ping};
use wgsep_tests::tunnel::{End, PORT, Plan, Tunnel, between};
use wgsep_tests::wg::with_input;
use wgsep_tests::{require, wait};

const LIMIT: Duration = Duration::from_secs(3);

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

/// With net.ipv6.ip_nonlocal_bind the kernel sends from an address that is not local, and the answer to it
/// is lost.
#[test]
fn a_removed_ipv6_source_is_not_used_though_the_kernel_sends_from_any_address() {
    require!(Wgsep);
    for (spoken_to, device, removal) in [
        ("fd07::10", DEVICE, format!("ip addr del fd07::10/64 dev {DEVICE}")),
        ("fd50::1", "elsewhere", "ip link set elsewhere down".to_owned()),
        ("fd50::1", "elsewhere", "ip link del elsewhere".to_owned()),
    ] {
        let tunnel = tunnel(Wgsep, Family::V6);
        let Tunnel { left, right } = &tunnel;
        let near = &left.daemon.netns;
        near.run("sysctl -qw net.ipv6.ip_nonlocal_bind=1");
        near.run("ip link add elsewhere type veth peer name beyond");
        for device in ["beyond", "elsewhere"] {
            near.run(format!("ip link set {device} up"));
        }
        add_address(near, device, Family::V6, spoken_to);
        right.daemon.netns.run("ip route add fd50::/64 via fd07::1");
        right.set_peer(left, format!("endpoint {}", endpoint(spoken_to)));
        answers_at_once(right, left);
        near.run(&*removal);
        wait::until(&format!("another source is used after {removal}"), LIMIT, || {
            near.output(format!("ping -n -c 1 -W 1 {}", right.side.inner(Family::V4)));
            right.daemon.peer().endpoint == endpoint("fd07::1")
        });
        answers_at_once(left, right);
    }
}

/// On Linux an address may be on several interfaces, and is a source as long as one of them has it.
#[test]
fn a_source_holds_until_the_last_interface_that_has_it_loses_it() {
    require!(Wgsep);
    for (outer, spoken_to, length) in [(Family::V4, "10.77.0.10", 24), (Family::V6, "fd07::10", 64)]
    {
        for removal in [
            format!("ip addr del {spoken_to}/{length} dev elsewhere"),
            "ip link set elsewhere down".to_owned(),
            "ip link del elsewhere".to_owned(),
        ] {
            if outer == Family::V4 && removal.ends_with("down") {
                // It keeps its IPv4 addresses.
                continue;
            }
            let tunnel = tunnel(Wgsep, outer);
            let Tunnel { left, right } = &tunnel;
            let near = &left.daemon.netns;
            near.run("ip link add elsewhere type veth peer name beyond");
            for device in ["beyond", "elsewhere"] {
                near.run(format!("ip link set {device} up"));
            }
            // No route prefers it.
            near.run(format!("ip addr add {spoken_to}/{length} dev elsewhere noprefixroute nodad"));
            add_address(near, DEVICE, outer, spoken_to);
            if outer == Family::V6 {
                near.run(format!("ip addr change fd07::10/64 dev {DEVICE} preferred_lft 0"));
            }
            right.set_peer(left, format!("endpoint {}", endpoint(spoken_to)));
            answers_at_once(right, left);
            near.run(&*removal);
            // Each change is looked at again a second later, or two.
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(2500) {
                answers_at_once(left, right);
                assert_eq!(right.daemon.peer().endpoint, endpoint(spoken_to), "after {removal}");
            }
            near.run(format!("ip addr del {spoken_to}/{length} dev {DEVICE}"));
            answers_at_once(left, right);
            let expected = left.endpoint(outer).to_string();
            assert_eq!(right.daemon.peer().endpoint, expected, "after {removal} and the last");
        }
    }
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
        wait::until(&format!("the better route is taken after {better}"), LIMIT, || {
            answers_at_once(left, right);
            right.daemon.peer().endpoint == endpoint("10.77.0.30")
        });
    }
}

/// A second pair of devices with addresses of its own, by which the right end speaks to the left one at
/// 10.78.0.30. By its main table the left end answers over the first; `rules` lead over the second,
/// from another address there.
fn spoken_to_by_the_second(rules: &[&str]) -> Tunnel {
    let tunnel = tunnel(Wgsep, Family::V4);
    let Tunnel { left, right } = &tunnel;
    let (near, far) = (&left.daemon.netns, &right.daemon.netns);
    join_again(near, far);
    for address in ["10.78.0.31/24", "10.78.0.30/24"] {
        near.run(format!("ip addr add {address} dev second"));
    }
    near.run("ip route add 10.77.0.2/32 dev second src 10.78.0.31 table 77");
    far.run("ip route add 10.78.0.0/24 dev second src 10.77.0.2");
    for rule in rules {
        near.run(format!("ip rule add {rule} table 77"));
    }
    right.set_peer(left, format!("endpoint {}", endpoint("10.78.0.30")));
    answers_at_once(right, left);
    tunnel
}

/// What is asked after a change must be the datagram's own flow, or the rules choose another way for the
/// question than for the datagram.
#[test]
fn a_way_chosen_by_ports_protocol_or_mark_keeps_its_source_when_routes_change() {
    require!(Wgsep);
    for rule in [
        &format!("sport {PORT}"),
        &format!("dport {PORT}"),
        "ipproto udp",
        &format!("ipproto udp sport {PORT} dport {PORT} from 10.78.0.30"),
        "fwmark 7",
    ] {
        let tunnel = spoken_to_by_the_second(&[rule]);
        let Tunnel { left, right } = &tunnel;
        if rule.starts_with("fwmark") {
            left.daemon.wg_set("fwmark 7");
            // Setting the mark forgets the source.
            answers_at_once(right, left);
        }
        for change in ["10.77.0.0/16", "10.99.0.0/16", "default"] {
            left.daemon.netns.run(format!("ip route add {change} dev {DEVICE}"));
            answers_at_once(left, right);
            assert_eq!(right.daemon.peer().endpoint, endpoint("10.78.0.30"), "{rule}, {change}");
        }
    }
}

/// The user whose datagrams they are cannot be part of the question. The source is then left to the
/// route, so that datagrams go by the right way, if not from the address spoken to.
#[test]
fn a_way_chosen_by_the_user_is_taken_when_routes_change() {
    require!(Wgsep);
    let tunnel = spoken_to_by_the_second(&["uidrange 0-0"]);
    let Tunnel { left, right } = &tunnel;
    left.daemon.netns.run(format!("ip route add 10.77.0.0/16 dev {DEVICE}"));
    wait::until("the route's source is used", LIMIT, || {
        answers_at_once(left, right);
        right.daemon.peer().endpoint == endpoint("10.78.0.31")
    });
}

/// Two ways to the peer, of which the better one is that by which it was spoken to.
fn two_ways(outer: Family) -> Tunnel {
    let (left, right) = link::joined();
    join_again(&left, &right);
    // Both are at the peer's end of the second pair, too.
    right.run("ip addr add 10.77.0.2/32 dev second");
    right.run("ip addr add fd07::2/128 dev second nodad");
    let (second, to) = match outer {
        Family::V4 => ("10.77.0.30", "10.77.0.2/32"),
        Family::V6 => {
            left.run("ip addr add fd07::30/128 dev second nodad");
            ("fd07::30", "fd07::2/128")
        }
    };
    left.run(format!("ip route add {to} dev {DEVICE} metric 5"));
    left.run(format!("ip route add {to} dev second src {second} metric 9"));
    let tunnel = between(&left, &right, Wgsep);
    let Tunnel { left, right } = &tunnel;
    left.set_peer(right, format!("endpoint {}", right.endpoint(outer)));
    right.set_peer(left, format!("endpoint {}", left.endpoint(outer)));
    if outer == Family::V4 {
        left.daemon.netns.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1");
    }
    tunnel
}

/// With IPv6 disabled, the kernel reports nothing but the link.
#[test]
fn a_source_goes_with_the_interface_that_it_was_spoken_to_by() {
    require!(Wgsep);
    for outer in [Family::V4, Family::V6] {
        for loss in [
            &format!("ip link set {DEVICE} down"),
            &format!("ip link del {DEVICE}"),
            "ip nexthop del id 1",
        ] {
            let tunnel = two_ways(outer);
            let Tunnel { left, right } = &tunnel;
            let (near, far) = (&left.daemon.netns, &right.daemon.netns);
            if loss.contains("nexthop") {
                if outer == Family::V6 {
                    // The address stays, and with it the source.
                    continue;
                }
                near.run(format!("ip route del 10.77.0.0/24 dev {DEVICE}"));
                near.run(format!("ip nexthop add id 1 dev {DEVICE}"));
                near.run("ip route add 10.77.0.2/32 nhid 1 metric 4");
                near.run(format!("ip route del 10.77.0.2/32 dev {DEVICE} metric 5"));
            }
            until_ping(far, left.side.inner(Family::V4));
            assert_eq!(right.daemon.peer().endpoint, left.endpoint(outer).to_string());
            near.run(loss);
            let expected = endpoint(if outer == Family::V4 { "10.77.0.30" } else { "fd07::30" });
            wait::until(
                &format!("the other way is taken over {outer:?} after {loss}"),
                LIMIT,
                || {
                    near.output(format!("ping -n -c 1 -W 1 {}", right.side.inner(Family::V4)));
                    right.daemon.peer().endpoint == expected
                },
            );
        }
    }
}

/// Routes that do not lead to a peer may come and go as they like.
#[test]
fn a_source_is_followed_while_many_routes_change() {
    require!(Wgsep);
    let tunnel = tunnel(Wgsep, Family::V4);
    let Tunnel { left, right } = &tunnel;
    let near = &left.daemon.netns;
    join_again(near, &right.daemon.netns);
    answers_at_once(left, right);
    let routes: String = (0..3000)
        .map(|n| format!("route add 100.0.{}.{}/32 dev lo\n", n >> 8, n & 255))
        .chain(["route add 10.77.0.2/32 dev second src 10.77.0.30\n".to_owned()])
        .collect();
    with_input(&format!("ip -n {} -batch -", near.name()), &routes);
    wait::until("the better route is taken", LIMIT, || {
        near.output(format!("ping -n -c 1 -W 1 {}", right.side.inner(Family::V4)));
        right.daemon.peer().endpoint == endpoint("10.77.0.30")
    });
}
