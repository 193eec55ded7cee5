//! Peers, for people and as JSON.

use super::parse::Peer;
use crate::json::string;
use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The states of a peer, in the order in which peers are shown.
pub(super) const STATES: [&str; 4] = ["established", "handshaking", "expired", "idle"];

/// The time of day.
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Some lines for each peer.
pub(super) fn as_text(peers: &[Peer], now: Duration) -> String {
    let mut text = String::new();
    for peer in peers {
        // Writing to memory cannot fail.
        let _infallible = write_peer(&mut text, peer, now);
    }
    text
}

fn write_peer(text: &mut String, peer: &Peer, now: Duration) -> std::fmt::Result {
    writeln!(text, "\npeer {}: {}", peer.public_key, peer.state)?;
    let endpoint = peer.endpoint.map_or("no endpoint".to_owned(), |at| format!("endpoint {at}"));
    let allowed_ips = match &peer.allowed_ips[..] {
        [] => "none".to_owned(),
        some => some.join(", "),
    };
    let keepalive = match peer.persistent_keepalive {
        0 => String::new(),
        seconds => format!(", keepalive every {seconds} s"),
    };
    writeln!(text, "  {endpoint}, allowed IPs {allowed_ips}{keepalive}")?;
    let handshake = if peer.last_handshake.is_zero() {
        "no handshake".to_owned()
    } else {
        format!("handshake {} ago", duration(now.saturating_sub(peer.last_handshake)))
    };
    let round_trip = peer.round_trip.map_or(String::new(), |round_trip| {
        format!(", round trip {:.1} ms", round_trip.as_secs_f64() * 1000.0)
    });
    let failures = peer.failures.iter().filter(|(_, count)| *count > 0);
    let failures: Vec<_> = failures.map(|(cause, count)| format!("{cause} {count}")).collect();
    let failures = match &failures[..] {
        [] => String::new(),
        some => format!("; failed: {}", some.join(", ")),
    };
    writeln!(
        text,
        "  {handshake}{round_trip}; initiations sent {}, responses sent {}, completed {}{failures}",
        peer.initiations, peer.responses, peer.completed
    )?;
    writeln!(
        text,
        "  received {} in {} packets, sent {} in {}",
        bytes(peer.rx_bytes),
        peer.rx_packets,
        bytes(peer.tx_bytes),
        peer.tx_packets
    )
}

/// An amount, as wg(8) shows it.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let (mut scaled, mut units) = (count as f64 / 1024.0, UNITS.iter());
    let mut unit = units.next().unwrap_or(&"");
    for next in units {
        if scaled < 1024.0 {
            break;
        }
        (scaled, unit) = (scaled / 1024.0, next);
    }
    format!("{scaled:.2} {unit}")
}

/// A time span, in its two largest units.
fn duration(span: Duration) -> String {
    let seconds = span.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// One object.
pub(super) fn as_json(peer: &Peer) -> String {
    let endpoint = peer.endpoint.map_or("null".to_owned(), |at| string(&at.to_string()));
    let allowed_ips: Vec<_> = peer.allowed_ips.iter().map(|ip| string(ip)).collect();
    let failures = peer.failures.iter();
    let failures: Vec<_> =
        failures.map(|(cause, count)| format!("{}:{count}", string(cause))).collect();
    let round_trip = peer
        .round_trip
        .map_or("null".to_owned(), |round_trip| format!("{:.6}", round_trip.as_secs_f64()));
    format!(
        "{{\"public_key\":{},\"state\":{},\"endpoint\":{endpoint},\"allowed_ips\":[{}],\
         \"latest_handshake\":{},\"persistent_keepalive\":{},\
         \"rx_bytes\":{},\"tx_bytes\":{},\"rx_packets\":{},\"tx_packets\":{},\
         \"handshakes\":{{\"initiations\":{},\"responses\":{},\"completed\":{},\"failures\":{{{}}}}},\
         \"round_trip_seconds\":{round_trip}}}",
        string(&peer.public_key),
        string(&peer.state),
        allowed_ips.join(","),
        peer.last_handshake.as_secs(),
        peer.persistent_keepalive,
        peer.rx_bytes,
        peer.tx_bytes,
        peer.rx_packets,
        peer.tx_packets,
        peer.initiations,
        peer.responses,
        peer.completed,
        failures.join(",")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> Peer {
        Peer {
            public_key: "AQ==".to_owned(),
            endpoint: Some("[fe80::1%7]:51820".parse().unwrap()),
            allowed_ips: vec!["10.0.0.0/24".to_owned(), "fd00::/8".to_owned()],
            state: "established".to_owned(),
            last_handshake: Duration::from_secs(1000),
            rx_bytes: 1372,
            tx_bytes: 5 << 30,
            rx_packets: 7,
            tx_packets: 8,
            persistent_keepalive: 25,
            initiations: 4,
            responses: 1,
            completed: 2,
            failures: vec![("unanswered".to_owned(), 3), ("unsent".to_owned(), 0)],
            round_trip: Some(Duration::from_micros(12_345)),
        }
    }

    #[test]
    fn a_peer_is_shown_with_units_that_people_read() {
        assert_eq!(
            as_text(&[peer()], Duration::from_secs(1065)),
            "\npeer AQ==: established\n  \
               endpoint [fe80::1%7]:51820, allowed IPs 10.0.0.0/24, fd00::/8, keepalive every 25 s\n  \
               handshake 1 min 5 s ago, round trip 12.3 ms; initiations sent 4, responses sent 1, completed 2; failed: unanswered 3\n  \
               received 1.34 KiB in 7 packets, sent 5.00 GiB in 8\n"
        );
        let idle = Peer { public_key: "AQ==".into(), state: "idle".into(), ..Peer::default() };
        let text = as_text(&[idle], Duration::ZERO);
        assert!(
            text.contains("no endpoint, allowed IPs none\n  no handshake; initiations sent 0"),
            "{text}"
        );
    }

    #[test]
    fn amounts_and_spans_have_units() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1 << 20, "1.00 MiB"),
            (u64::MAX, "16384.00 PiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        for (seconds, text) in
            [(59, "59 s"), (60, "1 min 0 s"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")]
        {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn json_has_every_value() {
        assert_eq!(
            as_json(&peer()),
            "{\"public_key\":\"AQ==\",\"state\":\"established\",\"endpoint\":\"[fe80::1%7]:51820\",\
             \"allowed_ips\":[\"10.0.0.0/24\",\"fd00::/8\"],\"latest_handshake\":1000,\"persistent_keepalive\":25,\
             \"rx_bytes\":1372,\"tx_bytes\":5368709120,\"rx_packets\":7,\"tx_packets\":8,\
             \"handshakes\":{\"initiations\":4,\"responses\":1,\"completed\":2,\"failures\":{\"unanswered\":3,\"unsent\":0}},\
             \"round_trip_seconds\":0.012345}"
        );
    }
}
