//! Endpoints with link-local addresses, whose interface goes by another number and another name, or none,
//! in the network namespace that wg(8) runs in.
#![allow(clippy::unwrap_used)]

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::{self, DEVICE, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::require;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{End, PORT};
use wgsep_tests::uapi::Uapi;
use wgsep_tests::wg::{KeyPair, with_input};

/// The number of the veth device in a namespace.
fn number(netns: &Netns) -> u32 {
    let line = netns.run(format!("ip -o link show {DEVICE}"));
    line.split(':').next().unwrap().parse().unwrap()
}

#[test]
fn a_scope_is_taken_by_name_and_by_number_and_shown_wherever_wg_runs() {
    require!(Wgsep);
    let (netns, _other_end) = link::joined();
    let elsewhere = Netns::new();
    let daemon = Daemon::start(Wgsep, &netns);
    let key = KeyPair::generate().public;
    let number = number(&netns);
    let named = format!("[fe80::1%{DEVICE}]:{PORT}");
    let numbered = format!("[fe80::1%{number}]:{PORT}");
    for given in [&named, &numbered] {
        daemon.wg_set(format!("peer {key} endpoint {given}"));
        // wg(8) has the name where it is known, and the number elsewhere.
        assert_eq!(daemon.peer().endpoint, named);
        let shown = elsewhere.run(format!("wg show {} endpoints", daemon.interface));
        assert_eq!(shown.trim(), format!("{key}\t{numbered}"));
        let answer = Uapi::connect(&daemon.interface).unwrap().transact("get=1\n\n").unwrap();
        assert!(answer.contains(&format!("endpoint={numbered}\n")), "{answer}");
    }
    for netns in [&netns, &elsewhere] {
        let shown = netns.run(format!("wg showconf {}", daemon.interface));
        with_input(&format!("wg set {} peer {key} remove", daemon.interface), "");
        let again = format!("wg setconf {} /dev/stdin", daemon.interface);
        let line = format!("ip netns exec {} {again}", netns.name());
        with_input(&line, &shown);
        assert_eq!(daemon.peer().endpoint, named, "after {shown}");
        assert_eq!(netns.run(format!("wg showconf {}", daemon.interface)), shown);
    }
}

/// A peer causes such an endpoint by sending from one.
#[test]
fn a_peer_that_roams_to_a_link_local_address_breaks_no_wg_show() {
    require!(Wgsep);
    let (left, right) = link::joined();
    for (netns, address) in [(&left, "fe80::1"), (&right, "fe80::2")] {
        netns.run(format!("ip addr add {address}/64 dev {DEVICE} nodad"));
    }
    let left = End::new(Side::Left, Daemon::start(Wgsep, &left));
    let right = End::new(Side::Right, Daemon::start(Wgsep, &right));
    left.configure(&right.key.public, None, None);
    right.configure(&left.key.public, Some(left.endpoint(Family::V4)), None);
    until_ping(&right.daemon.netns, left.side.inner(Family::V4));
    right.set_peer(&left, format!("endpoint [fe80::1%{DEVICE}]:{PORT}"));
    until_ping(&right.daemon.netns, left.side.inner(Family::V4));
    assert_eq!(left.daemon.peer().endpoint, format!("[fe80::2%{DEVICE}]:{PORT}"));

    let shown = Netns::new().run(format!("wg show {} endpoints", left.daemon.interface));
    let number = number(&left.daemon.netns);
    assert_eq!(shown.trim(), format!("{}\t[fe80::2%{number}]:{PORT}", right.key.public));
    // What wg(8) shows of a moved interface is no worse.
    let elsewhere = Netns::new();
    let mut left = left;
    left.daemon.move_interface(&elsewhere);
    assert_eq!(left.daemon.peer().endpoint, format!("[fe80::2%{number}]:{PORT}"));
}
