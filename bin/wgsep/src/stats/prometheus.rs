//! What Prometheus reads (its text format, version 0.0.4). The series of peers have the names and labels that dashboards
//! for WireGuard know.

use super::parse::{Peer, Statistics};
use super::peers::STATES;
use std::collections::BTreeMap;
use std::fmt::{Display, Write};

/// The series of one name.
struct Family<'t> {
    text: &'t mut String,
    name: &'static str,
}

impl<'t> Family<'t> {
    fn new(text: &'t mut String, name: &'static str, kind: &str, help: &str) -> Self {
        // Writing to memory cannot fail.
        let _infallible = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        Self { text, name }
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<_> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        // Writing to memory cannot fail.
        let _infallible = writeln!(self.text, "{}{{{}}} {value}", self.name, labels.join(","));
    }
}

/// The value of a label.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// All series of these interfaces, each once. One that did not answer has `wgsep_up` 0, and a line on standard error.
pub(super) fn exposition(answers: Vec<(&str, Result<Statistics, String>)>) -> String {
    let mut answered = BTreeMap::new();
    let mut up = BTreeMap::new();
    for (interface, answer) in answers {
        match answer {
            Ok(statistics) => {
                up.insert(interface, 1);
                answered.insert(interface, statistics);
            }
            Err(line) => {
                wgsep_launch::print_error(&line);
                up.entry(interface).or_insert(0);
            }
        }
    }
    let mut text = String::new();
    let mut family = Family::new(
        &mut text,
        "wgsep_up",
        "gauge",
        "Whether the daemon of the interface answered.",
    );
    up.iter().for_each(|(interface, up)| family.sample(&[("interface", interface)], up));
    device_families(&mut text, &answered);
    peer_families(&mut text, &answered);
    text
}

type Answered<'a> = BTreeMap<&'a str, Statistics>;

fn device_families(text: &mut String, answered: &Answered<'_>) {
    let mut family = Family::new(
        text,
        "wgsep_dropped_packets_total",
        "counter",
        "Packets that went nowhere, by cause.",
    );
    for (interface, statistics) in answered {
        for (cause, count) in &statistics.drops {
            family.sample(&[("interface", interface), ("cause", cause)], count);
        }
    }
    let mut family = Family::new(
        text,
        "wgsep_udp_port_refused",
        "gauge",
        "Whether the interface is up and its UDP port could not be opened.",
    );
    for (interface, statistics) in answered {
        let is_refused = statistics.udp.as_ref().is_some_and(|udp| udp.refusal().is_some());
        family.sample(&[("interface", interface)], u8::from(is_refused));
    }
    let mut family = Family::new(
        text,
        "wgsep_offload_in_use",
        "gauge",
        "Whether an offload of the kernel is in use.",
    );
    for (interface, statistics) in answered {
        for (offload, in_use) in &statistics.offloads {
            family.sample(&[("interface", interface), ("offload", offload)], u8::from(*in_use));
        }
    }
    let mut family = Family::new(
        text,
        "wgsep_peers_without_udp_gso",
        "gauge",
        "Peers whose network path refuses UDP segmentation offload now.",
    );
    for (interface, statistics) in answered {
        family.sample(&[("interface", interface)], statistics.peers_without_udp_gso);
    }
}

/// A series of each peer: name, kind, help, and its value, if it has one.
type PeerFamily = (&'static str, &'static str, &'static str, fn(&Peer) -> Option<String>);

/// Those by the names that dashboards for WireGuard know, and others.
const PEER_FAMILIES: [PeerFamily; 9] = [
    ("wireguard_sent_bytes_total", "counter", "Bytes sent to the peer, as UDP payload.", |peer| {
        Some(peer.tx_bytes.to_string())
    }),
    (
        "wireguard_received_bytes_total",
        "counter",
        "Bytes received from the peer, as UDP payload.",
        |peer| Some(peer.rx_bytes.to_string()),
    ),
    (
        "wireguard_latest_handshake_seconds",
        "gauge",
        "Seconds from the epoch to the latest handshake, 0 if there was none.",
        |peer| Some(peer.last_handshake.as_secs().to_string()),
    ),
    ("wgsep_peer_sent_packets_total", "counter", "Datagrams sent to the peer.", |peer| {
        Some(peer.tx_packets.to_string())
    }),
    ("wgsep_peer_received_packets_total", "counter", "Datagrams received from the peer.", |peer| {
        Some(peer.rx_packets.to_string())
    }),
    (
        "wgsep_peer_handshake_initiations_total",
        "counter",
        "Handshake initiations sent to the peer.",
        |peer| Some(peer.initiations.to_string()),
    ),
    (
        "wgsep_peer_handshake_responses_total",
        "counter",
        "Handshake responses sent to the peer.",
        |peer| Some(peer.responses.to_string()),
    ),
    ("wgsep_peer_handshakes_completed_total", "counter", "Handshakes completed.", |peer| {
        Some(peer.completed.to_string())
    }),
    (
        "wgsep_peer_handshake_round_trip_seconds",
        "gauge",
        "From our handshake message to the answer, of the latest handshake.",
        |peer| peer.round_trip.map(|round_trip| round_trip.as_secs_f64().to_string()),
    ),
];

fn peer_families(text: &mut String, answered: &Answered<'_>) {
    let peers = || {
        answered.iter().flat_map(|(interface, statistics)| {
            statistics.peers.iter().map(move |peer| (*interface, peer))
        })
    };
    for (name, kind, help, value) in PEER_FAMILIES {
        let mut family = Family::new(text, name, kind, help);
        for (interface, peer) in peers() {
            if let Some(value) = value(peer) {
                let allowed_ips = peer.allowed_ips.join(",");
                let labels = [
                    ("interface", interface),
                    ("public_key", &peer.public_key),
                    ("allowed_ips", &allowed_ips),
                ];
                family.sample(&labels, value);
            }
        }
    }
    let mut family = Family::new(
        text,
        "wgsep_peer_handshake_failures_total",
        "counter",
        "Handshakes that failed, by cause.",
    );
    for (interface, peer) in peers() {
        for (cause, count) in &peer.failures {
            let labels =
                [("interface", interface), ("public_key", &*peer.public_key), ("cause", cause)];
            family.sample(&labels, count);
        }
    }
    let mut family =
        Family::new(text, "wgsep_peer_state", "gauge", "Whether the peer is in a state.");
    for (interface, peer) in peers() {
        for state in STATES {
            let labels =
                [("interface", interface), ("public_key", &*peer.public_key), ("state", state)];
            family.sample(&labels, u8::from(peer.state == state));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn peers_have_the_names_and_labels_that_dashboards_know() {
        let peer = Peer {
            public_key: "AQ==".into(),
            state: "expired".into(),
            allowed_ips: vec!["10.0.0.0/24".into(), "fd00::/8".into()],
            tx_bytes: 5,
            rx_bytes: 6,
            last_handshake: Duration::from_secs(7),
            failures: vec![("unsent".into(), 8)],
            round_trip: Some(Duration::from_micros(1500)),
            ..Peer::default()
        };
        let statistics = Statistics { peers: vec![peer], ..Statistics::default() };
        let text = exposition(vec![("w\"g", Ok(statistics)), ("wg1", Err("no daemon".into()))]);
        for line in [
            "wgsep_up{interface=\"w\\\"g\"} 1",
            "wgsep_up{interface=\"wg1\"} 0",
            "wireguard_sent_bytes_total{interface=\"w\\\"g\",public_key=\"AQ==\",allowed_ips=\"10.0.0.0/24,fd00::/8\"} 5",
            "wireguard_received_bytes_total{interface=\"w\\\"g\",public_key=\"AQ==\",allowed_ips=\"10.0.0.0/24,fd00::/8\"} 6",
            "wireguard_latest_handshake_seconds{interface=\"w\\\"g\",public_key=\"AQ==\",allowed_ips=\"10.0.0.0/24,fd00::/8\"} 7",
            "wgsep_peer_handshake_failures_total{interface=\"w\\\"g\",public_key=\"AQ==\",cause=\"unsent\"} 8",
            "wgsep_peer_handshake_round_trip_seconds{interface=\"w\\\"g\",public_key=\"AQ==\",allowed_ips=\"10.0.0.0/24,fd00::/8\"} 0.0015",
            "wgsep_peer_state{interface=\"w\\\"g\",public_key=\"AQ==\",state=\"expired\"} 1",
            "wgsep_peer_state{interface=\"w\\\"g\",public_key=\"AQ==\",state=\"idle\"} 0",
        ] {
            assert!(text.lines().any(|one| one == line), "no {line} in {text}");
        }
        let types: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE ")).collect();
        let mut distinct = types.clone();
        distinct.dedup();
        assert_eq!(types, distinct);
    }
}
