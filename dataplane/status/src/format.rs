//! Answers and events as lines of `key=value`, each ended by a blank line.

use crate::event::Event;
use crate::report::{Counters, Item, Peer, Udp};
use std::fmt::{Result, Write};
use std::time::Duration;

/// Most bytes of an item or an event.
pub(crate) const LONGEST_ITEM: usize = 2048;

/// Writes the counters of a device: every `drop_CAUSE`, the state of the UDP sockets, with a line for each address that
/// they are bound to and no interface has, as 0 or 1 every `offload_NAME`,
/// with an underscore for each hyphen, and how many peers have a path that refuses `udp_gso`.
///
/// # Errors
/// As `text`.
pub fn write_counters(text: &mut impl Write, counters: &Counters) -> Result {
    for (name, count) in &counters.drops {
        writeln!(text, "drop_{name}={count}")?;
    }
    let Udp { port, ipv4, ipv6, errno, missing } = &counters.udp;
    let (ipv4, ipv6) = (u8::from(*ipv4), u8::from(*ipv6));
    writeln!(text, "udp_port={port}\nudp_ipv4={ipv4}\nudp_ipv6={ipv6}\nudp_errno={errno}")?;
    for address in missing {
        writeln!(text, "udp_missing={address}")?;
    }
    for (offload, in_use) in &counters.offloads {
        writeln!(text, "offload_{}={}", offload.replace('-', "_"), u8::from(*in_use))?;
    }
    writeln!(text, "peers_without_udp_gso={}", counters.peers_without_gso)
}

pub(crate) fn counters(counters: &Counters) -> String {
    let mut text = String::with_capacity(4096);
    // Writing to memory cannot fail.
    let _infallible = write_counters(&mut text, counters);
    text
}

pub(crate) fn item(text: &mut String, item: &Item) {
    // Writing to memory cannot fail.
    let _infallible = match item {
        Item::Peer(peer) => write_peer(text, peer),
        Item::AllowedIp(address, cidr) => writeln!(text, "allowed_ip={address}/{cidr}"),
    };
}

pub(crate) fn end(text: &mut String, errno: i32) {
    // Writing to memory cannot fail.
    let _infallible = write!(text, "errno={errno}\n\n");
}

/// An event with the time of day.
pub(crate) fn event(event: &Event, wall: Duration) -> String {
    let mut text = String::with_capacity(256);
    // Writing to memory cannot fail.
    let _infallible = write_event(&mut text, event, wall);
    text
}

fn write_peer(text: &mut String, peer: &Peer) -> Result {
    write_key(text, &peer.public_key)?;
    if let Some(endpoint) = peer.endpoint {
        writeln!(text, "endpoint={endpoint}")?;
    }
    writeln!(text, "state={}", peer.state)?;
    writeln!(text, "last_handshake_time_sec={}", peer.last_handshake.as_secs())?;
    writeln!(text, "last_handshake_time_nsec={}", peer.last_handshake.subsec_nanos())?;
    writeln!(text, "rx_bytes={}\ntx_bytes={}", peer.rx_bytes, peer.tx_bytes)?;
    writeln!(text, "rx_packets={}\ntx_packets={}", peer.rx_packets, peer.tx_packets)?;
    writeln!(text, "persistent_keepalive_interval={}", peer.persistent_keepalive_interval)?;
    writeln!(text, "handshake_initiations={}", peer.initiations)?;
    writeln!(text, "handshake_responses={}", peer.responses)?;
    writeln!(text, "handshake_completed={}", peer.completed)?;
    for (cause, count) in &peer.failures {
        writeln!(text, "handshake_failed_{cause}={count}")?;
    }
    if let Some(round_trip) = peer.round_trip {
        writeln!(text, "handshake_round_trip_usec={}", round_trip.as_micros())?;
    }
    Ok(())
}

fn write_key(text: &mut String, key: &[u8; 32]) -> Result {
    text.write_str("public_key=")?;
    key.iter().try_for_each(|byte| write!(text, "{byte:02x}"))?;
    text.write_char('\n')
}

fn write_event(text: &mut String, event: &Event, wall: Duration) -> Result {
    writeln!(text, "event={}", event.name())?;
    writeln!(text, "time_sec={}\ntime_nsec={}", wall.as_secs(), wall.subsec_nanos())?;
    match event {
        Event::Watching { connected: peers } | Event::Configured { peers } => {
            writeln!(text, "peers={peers}")?;
        }
        Event::Connected { public_key, endpoint } => {
            write_key(text, public_key)?;
            if let Some(endpoint) = endpoint {
                writeln!(text, "endpoint={endpoint}")?;
            }
        }
        Event::Rekeyed { public_key } | Event::Disconnected { public_key } => {
            write_key(text, public_key)?;
        }
        Event::EndpointMoved { public_key, endpoint } => {
            write_key(text, public_key)?;
            writeln!(text, "endpoint={endpoint}")?;
        }
        Event::HandshakeFailed { public_key, endpoint, cause } => {
            if let Some(public_key) = public_key {
                write_key(text, public_key)?;
            }
            if let Some(endpoint) = endpoint {
                writeln!(text, "endpoint={endpoint}")?;
            }
            writeln!(text, "cause={cause}")?;
        }
        Event::OffloadLost { offload } | Event::OffloadRegained { offload } => {
            writeln!(text, "offload={}", offload.replace('-', "_"))?;
        }
        Event::Lost { count } => writeln!(text, "count={count}")?,
    }
    text.write_char('\n')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv6Addr, SocketAddrV6};

    const CAUSES: [&str; 8] = ["a_cause_with_a_rather_long_name"; 8];

    /// The part of an answer in which an item begins has room for it.
    #[test]
    fn no_item_and_no_event_is_longer_than_the_longest() {
        let endpoint =
            Some(SocketAddrV6::new(Ipv6Addr::from(u128::MAX), u16::MAX, 0, u32::MAX).into());
        let longest = Peer {
            public_key: [0xff; 32],
            endpoint,
            state: "handshaking",
            last_handshake: Duration::new(u64::MAX, 999_999_999),
            rx_bytes: u64::MAX,
            tx_bytes: u64::MAX,
            rx_packets: u64::MAX,
            tx_packets: u64::MAX,
            persistent_keepalive_interval: u16::MAX,
            initiations: u64::MAX,
            responses: u64::MAX,
            completed: u64::MAX,
            failures: CAUSES.map(|cause| (cause, u64::MAX)).into(),
            round_trip: Some(Duration::MAX),
        };
        let mut text = String::new();
        item(&mut text, &Item::Peer(Box::new(longest)));
        assert!((800..LONGEST_ITEM).contains(&text.len()), "{} bytes", text.len());
        let failed =
            Event::HandshakeFailed { public_key: Some([0xff; 32]), endpoint, cause: CAUSES[0] };
        assert!(event(&failed, Duration::MAX).len() < LONGEST_ITEM);
    }

    #[test]
    fn a_peer_has_a_line_for_each_value() {
        let peer = Peer {
            public_key: [0xab; 32],
            endpoint: Some("[fe80::1%7]:51820".parse().unwrap()),
            state: "established",
            last_handshake: Duration::new(1_795_000_000, 5),
            rx_bytes: 1372,
            tx_bytes: 1428,
            rx_packets: 7,
            tx_packets: 8,
            persistent_keepalive_interval: 25,
            initiations: 1,
            responses: 2,
            completed: 3,
            failures: vec![("unanswered", 4)],
            round_trip: Some(Duration::from_micros(1500)),
        };
        let mut text = String::new();
        item(&mut text, &Item::Peer(Box::new(peer)));
        item(&mut text, &Item::AllowedIp([10, 0, 0, 0].into(), 24));
        let expected = format!(
            "public_key={}\nendpoint=[fe80::1%7]:51820\nstate=established\n\
             last_handshake_time_sec=1795000000\nlast_handshake_time_nsec=5\n\
             rx_bytes=1372\ntx_bytes=1428\nrx_packets=7\ntx_packets=8\n\
             persistent_keepalive_interval=25\nhandshake_initiations=1\nhandshake_responses=2\n\
             handshake_completed=3\nhandshake_failed_unanswered=4\n\
             handshake_round_trip_usec=1500\nallowed_ip=10.0.0.0/24\n",
            "ab".repeat(32)
        );
        assert_eq!(text, expected);
        let mut text = String::new();
        item(&mut text, &Item::Peer(Box::default()));
        assert!(!text.contains("endpoint") && !text.contains("round_trip"), "{text}");
    }

    #[test]
    fn an_event_has_a_name_a_time_and_a_blank_line() {
        let key = [1; 32];
        for (given, expected) in [
            (Event::Watching { connected: 3 }, "event=watching\nT\npeers=3\n\n".to_owned()),
            (
                Event::Rekeyed { public_key: key },
                format!("event=rekey\nT\npublic_key={}\n\n", "01".repeat(32)),
            ),
            (
                Event::OffloadLost { offload: "udp-gso" },
                "event=offload_lost\nT\noffload=udp_gso\n\n".to_owned(),
            ),
            (Event::Lost { count: 7 }, "event=lost\nT\ncount=7\n\n".to_owned()),
        ] {
            let expected = expected.replace('T', "time_sec=5\ntime_nsec=6");
            assert_eq!(event(&given, Duration::new(5, 6)), expected);
        }
    }
}
