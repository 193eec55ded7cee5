//! Whatever arrives at the UDP port, the process lives, the tunnel keeps working, nothing is delivered
//! that no peer sent, and the log does not grow with it.
#![allow(clippy::unwrap_used)]

use std::net::UdpSocket;

use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::Family;
use wgsep_tests::nft::Counter;
use wgsep_tests::procfs::niceness;
use wgsep_tests::relay::Relay;
use wgsep_tests::require;
use wgsep_tests::traffic::{Pinging, ping, until_ping};
use wgsep_tests::tunnel::{End, PORT, Plan, Tunnel};

/// Log lines that thousands of bad datagrams may cause: a rate-limited notice, not one a packet.
const TOLERATED_LINES: usize = 20;

/// The type byte of a data message.
const DATA: u8 = 4;

/// Sends datagrams to an end from the other's namespace while it is pinged, and checks it
/// afterwards.
fn survives(tunnel: &Tunnel, datagrams: impl IntoIterator<Item = Vec<u8>> + Send) {
    let Tunnel { left, right } = tunnel;
    let dataplane = right.daemon.dataplane();
    let lines = right.daemon.process.log().lines().count();
    let delivered = Counter::new(&right.daemon.netns, "delivered", "input", &delivered_by(right));
    let handshake = left.daemon.peer().latest_handshake;
    let pinging = Pinging::start(&left.daemon.netns, right.side.inner(Family::V4));
    pinging.until_more(2);

    let socket = left.daemon.netns.inside(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    for datagram in datagrams {
        socket.send_to(&datagram, right.endpoint(Family::V4)).unwrap();
    }

    pinging.until_more(5);
    let pings = pinging.stop();
    assert!(delivered.packets() <= u64::from(pings.sent), "bad datagrams were delivered");
    assert_eq!(right.daemon.dataplane(), dataplane, "the dataplane was replaced");
    assert_eq!(left.daemon.peer().latest_handshake, handshake, "the session went on");
    let log = right.daemon.process.log();
    let new = log.lines().count() - lines;
    assert!(new <= TOLERATED_LINES, "{new} lines in the log:\n{log}");
}

/// Matches what the tunnel hands to the end's kernel.
fn delivered_by(end: &End) -> String {
    format!("iifname {}", end.daemon.interface)
}

fn tunnel() -> Tunnel {
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    until_ping(&tunnel.left.daemon.netns, tunnel.right.side.inner(Family::V4));
    tunnel
}

/// A simple generator (xorshift) for garbage that is the same in every run.
fn garbage(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

/// A message's type in front of garbage.
fn typed(kind: u8, seed: u64, length: usize) -> Vec<u8> {
    let mut datagram = garbage(seed, length);
    for (byte, value) in datagram.iter_mut().zip([kind, 0, 0, 0]) {
        *byte = value;
    }
    datagram
}

#[test]
fn garbage_of_every_size_is_dropped() {
    require!(Wgsep);
    let sizes = (0..300).chain((300..2000).step_by(37));
    survives(&tunnel(), sizes.zip(1..).map(|(length, seed)| garbage(seed, length)));
}

#[test]
fn every_message_type_at_every_length_is_dropped() {
    require!(Wgsep);
    let types = 0..=5;
    let all = types.flat_map(|kind| (0..200).map(move |length| typed(kind, 7, length)));
    survives(&tunnel(), all);
}

#[test]
fn oversized_datagrams_are_dropped() {
    require!(Wgsep);
    // The last is the largest payload of IPv4.
    let sizes = [2049, 9000, 16_384, 32_768, 65_000, 65_507];
    let all = sizes.into_iter().flat_map(|length| (1..=5).map(move |kind| typed(kind, 3, length)));
    survives(&tunnel(), all);
}

#[test]
fn a_flood_of_forged_handshakes_is_dropped() {
    require!(Wgsep);
    survives(&tunnel(), (0..5000).map(|seed| typed(1, seed, 148)));
}

/// A flood of handshake messages is the control thread's work, and takes little of the workers' time.
#[test]
fn who_carries_packets_goes_before_who_answers_handshakes() {
    require!(Wgsep);
    let tunnel = tunnel();
    let niceness = niceness(tunnel.right.daemon.dataplane());
    let of = |name: &str| -> Vec<i32> {
        niceness.iter().filter(|(thread, _)| thread == name).map(|(_, nice)| *nice).collect()
    };
    let ours = of("wgsep-dataplane");
    assert_eq!(ours.len(), 1, "{niceness:?}");
    let workers = of("worker");
    assert!(!workers.is_empty() && workers.iter().all(|nice| [*nice] == *ours), "{niceness:?}");
    assert_eq!(of("control"), [(ours[0] + 19).min(19)], "{niceness:?}");
}

/// A tunnel whose left end sends through a relay, so that a test has its real datagrams.
fn relayed() -> (Tunnel, Relay) {
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let (left, right) = (&tunnel.left, &tunnel.right);
    let mut listen = right.endpoint(Family::V4);
    listen.set_port(PORT + 1);
    let relay = Relay::start(&right.daemon.netns, listen, right.endpoint(Family::V4));
    left.set_peer(right, format!("endpoint {listen}"));
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    (tunnel, relay)
}

#[test]
fn a_replayed_data_packet_is_not_delivered_twice() {
    require!(Wgsep);
    let (tunnel, relay) = relayed();
    let Tunnel { left, right } = &tunnel;
    let delivered = Counter::new(&right.daemon.netns, "delivered", "input", &delivered_by(right));
    let pings = ping(&left.daemon.netns, right.side.inner(Family::V4), 10);
    assert!(pings.were_answered(), "{pings:?}");
    assert_eq!(delivered.packets(), 10);

    let data: Vec<_> =
        relay.recorded().into_iter().filter(|datagram| datagram[0] == DATA).collect();
    assert!(data.len() >= 10, "the relay kept {} data messages", data.len());
    for datagram in data.iter().cycle().take(1000) {
        relay.send(datagram).unwrap();
    }
    // A ping sent after them is answered after them: what was replayed has been dealt with.
    let pings = ping(&left.daemon.netns, right.side.inner(Family::V4), 1);
    assert_eq!(pings.received, 1);
    assert_eq!(delivered.packets(), 11, "a replayed packet was delivered");
}

#[test]
fn a_real_data_packet_truncated_or_altered_is_not_delivered() {
    require!(Wgsep);
    let (tunnel, relay) = relayed();
    let Tunnel { left, right } = &tunnel;
    let recorded = relay.recorded();
    let datagram = recorded.iter().rfind(|datagram| datagram[0] == DATA).unwrap();
    let delivered = Counter::new(&right.daemon.netns, "delivered", "input", &delivered_by(right));
    for length in 0..datagram.len() {
        relay.send(&datagram[..length]).unwrap();
    }
    for position in 0..datagram.len() {
        let mut altered = datagram.clone();
        altered[position] ^= 1;
        relay.send(&altered).unwrap();
    }
    let mut longer = datagram.clone();
    longer.resize(4096, 0);
    relay.send(&longer).unwrap();

    let pings = ping(&left.daemon.netns, right.side.inner(Family::V4), 1);
    assert_eq!(pings.received, 1);
    assert_eq!(delivered.packets(), 1, "an altered packet was delivered");
}

/// The initiator's timestamp protects the responder from its own past.
#[test]
fn a_replayed_handshake_does_not_disturb_the_session() {
    require!(Wgsep);
    let (tunnel, relay) = relayed();
    let Tunnel { left, right } = &tunnel;
    let initiations: Vec<_> =
        relay.recorded().into_iter().filter(|datagram| datagram[0] == 1).collect();
    assert!(!initiations.is_empty());
    let (before, sent) = (right.daemon.peer().latest_handshake, right.daemon.peer().sent);
    for datagram in initiations.iter().cycle().take(50) {
        relay.send(datagram).unwrap();
    }
    let pings = ping(&left.daemon.netns, right.side.inner(Family::V4), 1);
    assert_eq!(pings.received, 1);
    let after = right.daemon.peer();
    assert_eq!(after.latest_handshake, before);
    // One ping is answered with 128 bytes; a response to a replay would add 92.
    assert!(after.sent - sent <= 128, "{} bytes sent", after.sent - sent);
}
