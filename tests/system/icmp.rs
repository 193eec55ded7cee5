//! Packets that cannot be delivered to any peer: the sender is notified, as by a router.

use std::net::IpAddr;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::{Wgsep, WireguardGo};
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::require;
use wgsep_tests::tunnel::End;
use wgsep_tests::wg::KeyPair;

const BOTH: [(Family, &str); 2] =
    [(Family::V4, "Destination Host Unreachable"), (Family::V6, "Address unreachable")];

/// What one ping says, which must not be answered.
fn unanswered_ping(from: &Netns, to: IpAddr) -> String {
    let output = from.output(format!("ping -n -c 1 -W 1 {to}"));
    assert!(!output.status.success(), "{to} answered");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An interface that is up, with the addresses of the left end, and no peer.
fn alone(netns: &std::sync::Arc<Netns>) -> End {
    let end = End::new(Side::Left, Daemon::start(Wgsep, netns));
    end.daemon.wg_conf("setconf", &format!("[Interface]\nPrivateKey = {}\n", end.key.private));
    end.take_up();
    end
}

#[test]
fn the_sender_is_notified_that_no_peer_has_the_destination() {
    require!(Wgsep);
    let netns = Netns::new();
    let _end = alone(&netns);
    for (family, said) in BOTH {
        let received = unanswered_ping(&netns, Side::Right.inner(family));
        assert!(received.contains(said), "{received}");
    }
}

#[test]
fn the_sender_is_notified_that_the_peer_has_no_endpoint() {
    require!(Wgsep);
    let netns = Netns::new();
    let end = alone(&netns);
    let peer = KeyPair::generate().public;
    end.daemon.wg_set(format!("peer {peer} allowed-ips 0.0.0.0/0,::/0"));
    for (family, said) in BOTH {
        let received = unanswered_ping(&netns, Side::Right.inner(family));
        assert!(received.contains(said), "{received}");
    }
    // Once there is an endpoint, silence is all that comes from a peer that does not answer.
    end.daemon.wg_set(format!("peer {peer} endpoint 127.0.0.1:9"));
    for (family, said) in BOTH {
        let received = unanswered_ping(&netns, Side::Right.inner(family));
        assert!(!received.contains(said), "{received}");
    }
}

#[test]
fn the_error_passes_a_strict_reverse_path_filter() {
    require!(Wgsep);
    let netns = Netns::new();
    netns.run("sysctl -qw net.ipv4.conf.all.rp_filter=1");
    let _end = alone(&netns);
    let received = unanswered_ping(&netns, Side::Right.inner(Family::V4));
    assert!(received.contains("Destination Host Unreachable"), "{received}");
}

#[test]
fn a_forwarded_sender_is_notified_with_and_without_nat() {
    require!(Wgsep);
    let (router, client) = link::joined();
    let end = alone(&router);
    router.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    for (family, said) in BOTH {
        let (gateway, inner) = (Side::Left.outer(family), Side::Right.inner(family));
        client.run(format!("ip route add {inner} via {gateway}"));
        let received = unanswered_ping(&client, inner);
        assert!(received.contains(said), "without NAT: {received}");
    }
    router.run("nft add table inet nat");
    router.run("nft add chain inet nat post { type nat hook postrouting priority 100 ; }");
    router.run(format!("nft add rule inet nat post oifname {} masquerade", end.daemon.interface));
    for (family, said) in BOTH {
        let received = unanswered_ping(&client, Side::Right.inner(family));
        assert!(received.contains(said), "through NAT: {received}");
    }
}

#[test]
fn control_wireguard_go_says_nothing() {
    require!(WireguardGo);
    let netns = Netns::new();
    let end = End::new(Side::Left, Daemon::start(WireguardGo, &netns));
    end.take_up();
    let received = unanswered_ping(&netns, Side::Right.inner(Family::V4));
    assert!(!received.contains("Unreachable"), "{received}");
}
