//! An answer of the status socket, or to `get=statistics` of the UAPI, as values. What is printed is not the daemon's
//! to choose, so each value is of its form.

use crate::json::string;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// An answer, in the daemon's order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Statistics {
    pub(super) drops: Vec<(String, u64)>,
    /// Not of a daemon of an older version.
    pub(super) udp: Option<Udp>,
    pub(super) offloads: Vec<(String, bool)>,
    /// Peers whose path refuses UDP segmentation offload, which the others have.
    pub(super) peers_without_udp_gso: u64,
    /// Sorted; none of a daemon without a status socket.
    pub(super) peers: Vec<Peer>,
}

/// A peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Peer {
    /// As wg(8) shows it.
    pub(super) public_key: String,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) allowed_ips: Vec<String>,
    pub(super) state: String,
    /// Since the epoch; zero if none.
    pub(super) last_handshake: Duration,
    pub(super) rx_bytes: u64,
    pub(super) tx_bytes: u64,
    pub(super) rx_packets: u64,
    pub(super) tx_packets: u64,
    pub(super) persistent_keepalive: u16,
    pub(super) initiations: u64,
    pub(super) responses: u64,
    pub(super) completed: u64,
    pub(super) failures: Vec<(String, u64)>,
    pub(super) round_trip: Option<Duration>,
}

/// The UDP sockets.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Udp {
    pub(super) port: u16,
    pub(super) ipv4: bool,
    pub(super) ipv6: bool,
    /// Why none is open though the interface is up, or 0; EAGAIN for a new port that is opened only later.
    pub(super) errno: i32,
    /// The addresses that it is open on and that no interface has.
    pub(super) missing: Vec<IpAddr>,
}

impl Udp {
    fn waits(&self) -> bool {
        self.errno == nix::libc::EAGAIN
    }

    pub(super) fn refusal(&self) -> Option<&'static str> {
        (self.errno != 0 && !self.waits()).then(|| nix::errno::Errno::from_raw(self.errno).desc())
    }

    /// For programs.
    pub(super) fn as_json(&self) -> String {
        let Self { port, ipv4, ipv6, .. } = self;
        let error = self.refusal().map_or("null".to_owned(), string);
        let missing = self.missing.iter().map(|address| format!("\"{address}\""));
        let missing = missing.collect::<Vec<_>>().join(",");
        format!(
            "{{\"port\":{port},\"ipv4\":{ipv4},\"ipv6\":{ipv6},\"missing\":[{missing}],\"error\":{error}}}"
        )
    }

    /// For people.
    pub(super) fn describe(&self) -> String {
        let Self { port, ipv4, ipv6, .. } = self;
        if let Some(why) = self.refusal() {
            return format!("port {port} cannot be opened: {why}, the log says what to do");
        }
        let missing = self.missing.iter().map(|address| format!(", no interface has {address}"));
        let missing = missing.collect::<String>();
        match (ipv4, ipv6) {
            _ if self.waits() => {
                format!("port {port} is opened later, as one new port is in ten seconds")
            }
            (true, true) => format!("port {port}{missing}"),
            (true, false) => format!("port {port}, IPv4 only{missing}"),
            (false, true) => format!("port {port}, IPv6 only{missing}"),
            (false, false) => "closed, the interface is down".to_owned(),
        }
    }
}

/// `None` for anything but an answer of wgsep.
pub(super) fn parse(answer: &str) -> Option<Statistics> {
    let lines = answer.strip_suffix("errno=0\n\n")?;
    let mut statistics = Statistics::default();
    for line in lines.lines() {
        let (key, value) = line.split_once('=')?;
        if key == "public_key" {
            statistics.peers.push(Peer { public_key: key_as_base64(value)?, ..Peer::default() });
        } else if let Some(peer) = statistics.peers.last_mut() {
            peer.add(key, value)?;
        } else {
            statistics.add(key, value)?;
        }
    }
    statistics.peers.sort_by(|one, other| {
        let rank = |peer: &Peer| (peer.state_rank(), std::cmp::Reverse(peer.last_handshake));
        rank(one).cmp(&rank(other)).then_with(|| one.public_key.cmp(&other.public_key))
    });
    (!statistics.drops.is_empty()).then_some(statistics)
}

impl Statistics {
    /// A line before the first peer; `None` if its value is none.
    fn add(&mut self, key: &str, value: &str) -> Option<()> {
        if let Some(cause) = key.strip_prefix("drop_").filter(|cause| is_name(cause)) {
            self.drops.push((cause.to_owned(), value.parse().ok()?));
        } else if let Some(offload) = key.strip_prefix("offload_").filter(|name| is_name(name)) {
            self.offloads.push((offload.to_owned(), value == "1"));
        } else if key.starts_with("udp_") {
            let udp = self.udp.get_or_insert_default();
            match key {
                "udp_port" => udp.port = value.parse().ok()?,
                "udp_ipv4" => udp.ipv4 = value == "1",
                "udp_ipv6" => udp.ipv6 = value == "1",
                "udp_errno" => udp.errno = value.parse().ok()?,
                "udp_missing" => udp.missing.push(value.parse().ok()?),
                _ => {}
            }
        } else if key == "peers_without_udp_gso" {
            self.peers_without_udp_gso = value.parse().ok()?;
        }
        Some(())
    }
}

impl Peer {
    /// A line of a peer; `None` if its value is none. What a later version may add is left out.
    fn add(&mut self, key: &str, value: &str) -> Option<()> {
        let number = || value.parse::<u64>().ok();
        match key {
            "endpoint" => self.endpoint = Some(value.parse().ok()?),
            "allowed_ip" => {
                let (address, cidr) = value.split_once('/')?;
                let (address, cidr): (IpAddr, u8) = (address.parse().ok()?, cidr.parse().ok()?);
                self.allowed_ips.push(format!("{address}/{cidr}"));
            }
            "state" if is_name(value) => value.clone_into(&mut self.state),
            "last_handshake_time_sec" => self.last_handshake = Duration::from_secs(number()?),
            "rx_bytes" => self.rx_bytes = number()?,
            "tx_bytes" => self.tx_bytes = number()?,
            "rx_packets" => self.rx_packets = number()?,
            "tx_packets" => self.tx_packets = number()?,
            "persistent_keepalive_interval" => self.persistent_keepalive = value.parse().ok()?,
            "handshake_initiations" => self.initiations = number()?,
            "handshake_responses" => self.responses = number()?,
            "handshake_completed" => self.completed = number()?,
            "handshake_round_trip_usec" => {
                self.round_trip = Some(Duration::from_micros(number()?));
            }
            _ => {
                let cause = key.strip_prefix("handshake_failed_").filter(|cause| is_name(cause));
                if let Some(cause) = cause {
                    self.failures.push((cause.to_owned(), number()?));
                }
            }
        }
        Some(())
    }

    fn state_rank(&self) -> usize {
        let known = super::peers::STATES.iter().position(|state| *state == self.state);
        known.unwrap_or(super::peers::STATES.len())
    }
}

/// What is printed is not the daemon's to choose.
fn is_name(name: &str) -> bool {
    name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
}

/// A key of 64 hexadecimal digits as wg(8) shows it; `None` for anything else.
pub fn key_as_base64(hex: &str) -> Option<String> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes = hex.as_bytes();
    if bytes.len() != 64 {
        return None;
    }
    let digits = bytes.iter().map(|byte| char::from(*byte).to_digit(16));
    let digits = digits.collect::<Option<Vec<u32>>>()?;
    // Three hexadecimal digits are two of the other kind; the last one stands for four bits alone.
    let mut text = String::with_capacity(44);
    for some in digits.chunks(3) {
        let value = some.iter().fold(0, |value, digit| value << 4 | digit);
        let value = value << (4 * (3 - some.len()));
        for sextet in [value >> 6, value & 63].into_iter().take(some.len().min(2)) {
            text.push(DIGITS.get(sextet as usize).map_or('?', |digit| char::from(*digit)));
        }
    }
    text.push('=');
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_shown_as_by_wg() {
        // echo AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA= | base64 -d | xxd -p -c 32
        let hex = "0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20";
        let key = key_as_base64(hex);
        assert_eq!(key.as_deref(), Some("AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="));
        assert_eq!(key_as_base64(&"f".repeat(64)).unwrap(), format!("{}8=", "/".repeat(42)));
        for none in ["", "00", &"0".repeat(63), &"g".repeat(64), &"0".repeat(66)] {
            assert_eq!(key_as_base64(none), None, "{none}");
        }
    }

    #[test]
    fn what_is_printed_is_not_the_daemons_to_choose() {
        let key = "ab".repeat(32);
        for line in [
            "endpoint=\x1b[2J",
            "endpoint=192.0.2.1",
            "allowed_ip=10.0.0.0",
            "allowed_ip=10.0.0.0/x",
            "rx_bytes=-1",
            "public_key=00",
        ] {
            let answer = format!("drop_loop=0\npublic_key={key}\n{line}\nerrno=0\n\n");
            assert_eq!(parse(&answer), None, "{line:?}");
        }
        let answer = format!(
            "drop_loop=0\npublic_key={key}\nstate=\x1b\nhandshake_failed_\x1b=1\nlater=\x1b\nerrno=0\n\n"
        );
        let peer = parse(&answer).unwrap().peers.remove(0);
        assert_eq!((peer.state.as_str(), peer.failures.len()), ("", 0));
    }

    #[test]
    fn peers_are_sorted_by_state_and_latest_handshake() {
        let peer = |number: u8, state: &str, handshake: u64| {
            format!(
                "public_key={}\nstate={state}\nlast_handshake_time_sec={handshake}\n",
                format!("{number:02x}").repeat(32)
            )
        };
        let peers = [
            peer(1, "idle", 0),
            peer(2, "expired", 50),
            peer(3, "established", 100),
            peer(4, "established", 200),
            peer(5, "handshaking", 10),
        ];
        let answer = format!("drop_loop=0\n{}errno=0\n\n", peers.concat());
        let order: Vec<_> = parse(&answer)
            .unwrap()
            .peers
            .into_iter()
            .map(|peer| peer.last_handshake.as_secs())
            .collect();
        assert_eq!(order, [200, 100, 10, 50, 0]);
    }
}
