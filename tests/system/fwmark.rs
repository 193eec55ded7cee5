//! `wg set fwmark`, at run time, with the kernel's firewall as the witness: what the dataplane may
//! not do itself, the helper does for it.

use std::time::Duration;

use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::Family;
use wgsep_tests::nft::Counter;
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::tunnel::{PORT, Plan, Tunnel};
use wgsep_tests::{require, wait};

#[test]
fn attack_12_the_mark_follows_wg_set_while_traffic_flows_over_v4() {
    require!(Wgsep);
    the_mark_follows(Wgsep, Family::V4);
}

#[test]
fn attack_12_the_mark_follows_wg_set_while_traffic_flows_over_v6() {
    require!(Wgsep);
    the_mark_follows(Wgsep, Family::V6);
}

#[test]
fn control_wireguard_go_follows_wg_set() {
    require!(WireguardGo);
    the_mark_follows(WireguardGo, Family::V4);
}

/// wg-quick configures `fwmark=0` first of all and 51820 later, then brings the link up and down.
#[test]
fn the_mark_outlives_a_link_that_goes_down_and_up() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let marked = counter(left, 51820);
    left.daemon.wg_set("fwmark 51820");
    for state in ["down", "up"] {
        left.daemon.netns.run(format!("ip link set {} {state}", left.daemon.interface));
    }
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    assert!(marked.packets() > 0, "nothing sent after the link came up carries the mark");
}

fn the_mark_follows(implementation: Implementation, outer: Family) {
    let tunnel = Plan { outer, ..Plan::new(implementation, implementation) }.build();
    let Tunnel { left, right } = &tunnel;
    let unmarked = counter(left, 0);
    let wg_quick = counter(left, 51820);
    let large = counter(left, u32::MAX);

    left.daemon.wg_set("fwmark 0");
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    assert!(unmarked.packets() > 0, "nothing is sent unmarked");
    assert_eq!(wg_quick.packets() + large.packets(), 0, "marked before a mark was set");
    assert_eq!(left.daemon.wg("show", "fwmark").trim(), "off");

    let handshake = right.daemon.peer().latest_handshake;
    let pinging = Pinging::start(&left.daemon.netns, right.side.inner(Family::V6));
    pinging.until_more(3);
    for (mark, shown, witness, others) in [
        ("51820", "0xca6c", &wg_quick, [&unmarked, &large]),
        ("0xffffffff", "0xffffffff", &large, [&unmarked, &wg_quick]),
        ("0", "off", &unmarked, [&wg_quick, &large]),
    ] {
        left.daemon.wg_set(format!("fwmark {mark}"));
        assert_eq!(left.daemon.wg("show", "fwmark").trim(), shown);
        let sum_of_others = || others.iter().map(|counter| counter.packets()).sum::<u64>();
        let (before, elsewhere) = (witness.packets(), sum_of_others());
        pinging.until_more(3);
        // Of the replies, the first may be to requests from before the change.
        wait::until(&format!("mark {mark} is on the packets"), Duration::from_secs(10), || {
            witness.packets() >= before + 3
        });
        // wg(8) has returned: from then on no packet carries what was set before.
        assert_eq!(sum_of_others(), elsewhere, "packets still carry another mark than {mark}");
    }
    let pings = pinging.stop();
    assert!(pings.received + 2 >= pings.sent, "{pings:?} while the mark changed");
    assert_eq!(right.daemon.peer().latest_handshake, handshake, "the session went on");
}

/// Counts what leaves an end for the other's port with exactly this mark.
fn counter(end: &wgsep_tests::tunnel::End, mark: u32) -> Counter {
    let expression = format!("udp dport {PORT} meta mark {mark}");
    Counter::new(&end.daemon.netns, &format!("mark{mark}"), "output", &expression)
}
