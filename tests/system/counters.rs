//! What wg(8) says of the first handshake and the first packets, to the byte.

use std::time::{SystemTime, UNIX_EPOCH};

use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::Family;
use wgsep_tests::require;
use wgsep_tests::traffic::flood;
use wgsep_tests::tunnel::{Tunnel, over_loopback};

/// Lengths on the wire, headers of UDP and below left out.
const INITIATION: u64 = 148;
const RESPONSE: u64 = 92;
const KEEPALIVE: u64 = 32;
/// An echo request of ping's own choosing: 84 bytes, padded to 96.
const PING: u64 = 96 + KEEPALIVE;
const COUNT: u32 = 10;

#[test]
fn ten_pings_are_counted_to_the_byte_over_v4() {
    require!(Wgsep);
    counts_to_the_byte(Wgsep, Family::V4);
}

#[test]
fn ten_pings_are_counted_to_the_byte_over_v6() {
    require!(Wgsep);
    counts_to_the_byte(Wgsep, Family::V6);
}

#[test]
fn control_wireguard_go_counts_to_the_byte() {
    require!(WireguardGo);
    counts_to_the_byte(WireguardGo, Family::V4);
}

fn counts_to_the_byte(implementation: Implementation, outer: Family) {
    let (_middle, tunnel) = over_loopback(implementation);
    tunnel.know_each_other(outer);
    let Tunnel { left, right } = &tunnel;
    assert_eq!([&left.daemon, &right.daemon].map(|end| end.peer().sent), [0, 0], "before any");
    let pings = flood(&right.daemon.netns, left.side.inner(Family::V4), COUNT);
    assert!(pings.were_answered(), "{pings:?}");

    let (one, other) = (left.daemon.peer(), right.daemon.peer());
    let pinged = u64::from(COUNT) * PING;
    assert_eq!(other.received, RESPONSE + pinged);
    // Whoever began may confirm the key with a keepalive, if the first packet came a moment late.
    let sent = INITIATION + pinged;
    assert!([sent, sent + KEEPALIVE].contains(&other.sent), "{other:?}");
    assert_eq!((one.received, one.sent), (other.sent, other.received));
    for peer in [one, other] {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let age = now.checked_sub(peer.latest_handshake);
        assert!(age.is_some_and(|age| age < 60), "{peer:?} at {now}");
    }
}
