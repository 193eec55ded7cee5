//! `wgsep stats IF`: how many packets a running daemon dropped, and why.
//!
//! It asks with `get=statistics`, which wgsep answers without any key, so that whatever watches a
//! daemon has nothing to lose; and it gives up every privilege but that of connecting, and then that.

use crate::json::string;
use crate::uapi;
use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use wgsep_policy::Capability;

/// How long the daemon may take for all of it, from accepting a client to the end of its answer. It does so between two
/// packets.
const PATIENCE: Duration = Duration::from_secs(5);
/// More than an answer has, in bytes.
const MAX_ANSWER: usize = 64 * 1024;

/// What each cause means, and what to look at. The names are those of `DropCause` in wgsep-proto and of `LocalCause`
/// in the dataplane, of which this program must not have a line.
const CAUSES: &[(&str, &str)] = &[
    ("out_malformed", "out: not an IP packet; see what writes to the interface"),
    (
        "solicitation_or_redirect",
        "out: a router solicitation or ICMP redirect of this machine, which a tunnel does not carry",
    ),
    ("no_peer", "out: no peer has the destination; see `wg show IF allowed-ips`"),
    ("no_endpoint", "out: its peer has no endpoint yet; set one, or let the peer begin"),
    (
        "loop",
        "out: the endpoint is routed into its own tunnel; add a route to it beside the tunnel",
    ),
    ("staged_overflow", "out: more than 128 waited for a handshake; see why it takes long"),
    (
        "staged_expired",
        "out: it waited for a handshake that was given up, or until link down; see the log",
    ),
    (
        "send_no_route",
        "out: no route to the peer's endpoint, or it is no host's address or port; see `ip route get ADDRESS mark MARK` (0 if none is set; Invalid argument: a blackhole, or port 0)",
    ),
    (
        "send_forbidden",
        "out: a firewall of this machine or an IPsec policy refused it; see `nft list ruleset`, `ip xfrm policy`",
    ),
    (
        "send_too_long",
        "out: longer than the path or any datagram takes; lower the MTU of the interface",
    ),
    (
        "send_no_buffer",
        "out: the link's queue or the send buffer, which all peers share, was full; it is sent faster than it leaves",
    ),
    ("send_failed", "out: the network refused it for another reason"),
    ("malformed", "in: not WireGuard; another program uses or probes the port"),
    ("unknown_index", "in: of a session that is over, as after a restart"),
    (
        "no_private_key",
        "in: a handshake, out: it waited for one, but no private key is set; `wg set IF private-key FILE`",
    ),
    ("bad_mac1", "in: the sender has another public key for this end; see `wg show IF public-key`"),
    ("under_load", "in: a handshake answered with a cookie, too many came at once"),
    ("rate_limited", "in: more than 20 handshakes a second from one address"),
    ("handshake_queue_full", "in: more than 4096 handshakes waited; the port is flooded"),
    ("bad_initiation", "in: a forged or damaged initiation"),
    ("unknown_peer", "in: a handshake by a key that is no peer's; the log has it"),
    ("old_timestamp", "in: a repeated initiation, or the peer's clock went back"),
    ("initiation_flood", "in: more than 50 initiations a second of one peer"),
    ("bad_response", "in: a response that does not fit; mostly preshared keys that differ"),
    ("bad_cookie", "in: a forged cookie, or one that was not requested"),
    ("unauthentic", "in: forged or damaged data"),
    ("keypair_expired", "in: data of a session older than three minutes"),
    ("replay", "in: data that came twice, or more than 8000 packets late"),
    ("inner_malformed", "in: a peer sent something that is not an IP packet"),
    ("wrong_source", "in: the peer may not have that source; see `wg show IF allowed-ips`"),
    (
        "router_advertisement",
        "in: the peer sent a router advertisement, which is never taken from a tunnel",
    ),
    ("interface_down", "in: came while the interface went down"),
    ("tun_refused", "in: the kernel refused it for another reason"),
];

/// An answer to `get=statistics`: names and numbers, in the daemon's order.
#[derive(Debug, Default, PartialEq, Eq)]
struct Statistics {
    drops: Vec<(String, u64)>,
    /// Not of a daemon of an older version.
    udp: Option<Udp>,
    offloads: Vec<(String, bool)>,
    /// Peers whose path refuses UDP segmentation offload, which the others have.
    peers_without_udp_gso: u64,
}

/// The UDP sockets.
#[derive(Debug, Default, PartialEq, Eq)]
struct Udp {
    port: u16,
    ipv4: bool,
    ipv6: bool,
    /// Why none is open though the interface is up, or 0; EAGAIN for a new port that is opened only later.
    errno: i32,
}

impl Udp {
    fn waits(&self) -> bool {
        self.errno == nix::libc::EAGAIN
    }

    fn refusal(&self) -> Option<&'static str> {
        (self.errno != 0 && !self.waits()).then(|| nix::errno::Errno::from_raw(self.errno).desc())
    }

    /// For programs.
    fn as_json(&self) -> String {
        let Self { port, ipv4, ipv6, .. } = self;
        let error = self.refusal().map_or("null".to_owned(), string);
        format!("{{\"port\":{port},\"ipv4\":{ipv4},\"ipv6\":{ipv6},\"error\":{error}}}")
    }

    /// For people.
    fn describe(&self) -> String {
        let Self { port, ipv4, ipv6, .. } = self;
        if let Some(why) = self.refusal() {
            return format!("port {port} cannot be opened: {why}, the log says what to do");
        }
        match (ipv4, ipv6) {
            _ if self.waits() => {
                format!("port {port} is opened later, as one new port is in ten seconds")
            }
            (true, true) => format!("port {port}"),
            (true, false) => format!("port {port}, IPv4 only"),
            (false, true) => format!("port {port}, IPv6 only"),
            (false, false) => "closed, the interface is down".to_owned(),
        }
    }
}

/// Asks the daemon of an interface; returns what to print.
///
/// # Errors
/// One line, if no wgsep serves the interface or it may not be asked.
pub fn stats(interface: &str, json: bool) -> Result<String, String> {
    let keep_only = |capabilities: &[Capability]| {
        wgsep_policy::capabilities::keep_only(capabilities).map_err(|errno| {
            format!(
                "give up privileges: {}; {}",
                wgsep_policy::described(errno),
                wgsep_policy::remedy(errno)
            )
        })
    };
    // The socket is root's, or that of the user who started the daemon.
    keep_only(&[Capability::CAP_DAC_OVERRIDE])?;
    let deadline = Instant::now() + PATIENCE;
    let daemon = uapi::connect_until(&uapi::path(interface), deadline)
        .map_err(|errno| uapi::refusal(interface, errno))?;
    keep_only(&[])?;
    let answer = ask(daemon, deadline).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => format!(
            "the daemon of {interface} does not answer within {} s; see its log, and if it is stopped or hangs, restart it",
            PATIENCE.as_secs()
        ),
        _ => format!("the daemon of {interface} does not answer: {error}; see its log"),
    })?;
    let statistics = parse(&answer).ok_or_else(|| {
        format!(
            "{interface} is served by another program, or by another version of wgsep; use `wg show`, or restart wgsep"
        )
    })?;
    Ok(if json { as_json(interface, &statistics) } else { as_table(interface, &statistics) })
}

fn ask(mut daemon: UnixStream, deadline: Instant) -> std::io::Result<String> {
    daemon.set_nonblocking(false)?;
    daemon.set_write_timeout(Some(remaining(deadline)?))?;
    daemon.write_all(b"get=statistics\n\n")?;
    // After its end the daemon closes the connection, too.
    daemon.shutdown(std::net::Shutdown::Write)?;
    let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
    while answer.len() < MAX_ANSWER {
        daemon.set_read_timeout(Some(remaining(deadline)?))?;
        match daemon.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => {
                debug_assert!(len <= buffer.len(), "read(2) fills no more than the buffer");
                answer.extend_from_slice(buffer.get(..len).unwrap_or_default());
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    String::from_utf8(answer).map_err(|_| ErrorKind::InvalidData.into())
}

/// How long there is until a deadline.
///
/// # Errors
/// If it has passed.
fn remaining(deadline: Instant) -> std::io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// `None` for anything but an answer of wgsep.
fn parse(answer: &str) -> Option<Statistics> {
    let lines = answer.strip_suffix("errno=0\n\n")?;
    let mut statistics = Statistics::default();
    for line in lines.lines() {
        let (key, value) = line.split_once('=')?;
        if let Some(cause) = key.strip_prefix("drop_").filter(|cause| is_name(cause)) {
            statistics.drops.push((cause.to_owned(), value.parse().ok()?));
        } else if let Some(offload) = key.strip_prefix("offload_").filter(|name| is_name(name)) {
            statistics.offloads.push((offload.to_owned(), value == "1"));
        } else if key.starts_with("udp_") {
            let udp = statistics.udp.get_or_insert_default();
            match key {
                "udp_port" => udp.port = value.parse().ok()?,
                "udp_ipv4" => udp.ipv4 = value == "1",
                "udp_ipv6" => udp.ipv6 = value == "1",
                "udp_errno" => udp.errno = value.parse().ok()?,
                _ => {}
            }
        } else if key == "peers_without_udp_gso" {
            statistics.peers_without_udp_gso = value.parse().ok()?;
        }
    }
    (!statistics.drops.is_empty()).then_some(statistics)
}

/// What is printed is not the daemon's to choose.
fn is_name(name: &str) -> bool {
    name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
}

/// A line for each cause that anything was dropped for, and what the kernel does not do for us.
fn as_table(interface: &str, statistics: &Statistics) -> String {
    let mut text = String::new();
    for (cause, count) in statistics.drops.iter().filter(|(_, count)| *count > 0) {
        let meaning = CAUSES.iter().find(|(known, _)| known == cause).map_or("", |(_, text)| *text);
        let meaning = meaning.replace("IF", interface);
        // Writing to memory cannot fail.
        let _infallible = writeln!(text, "{count:>12}  {cause:<20}  {meaning}");
    }
    let total = statistics.drops.iter().fold(0_u64, |sum, (_, count)| sum.saturating_add(*count));
    let off = statistics.offloads.iter().filter(|(_, in_use)| !in_use).map(|(name, _)| &**name);
    let off: Vec<_> = off.collect();
    let narrow = match statistics.peers_without_udp_gso {
        // To none at all is among those that are off.
        _ if off.contains(&"udp_gso") => None,
        0 => None,
        1 => Some("udp_gso for all but 1 peer".to_owned()),
        peers => Some(format!("udp_gso for all but {peers} peers")),
    };
    let off = (!off.is_empty()).then(|| format!("without {}", off.join(", ")));
    let reduced: Vec<_> = off.into_iter().chain(narrow).collect();
    let offloads = match &reduced[..] {
        [] => "all in use".to_owned(),
        reduced => format!("{}; the log says why", reduced.join(", ")),
    };
    let udp = statistics.udp.as_ref().map_or("unknown".to_owned(), Udp::describe);
    format!("{interface}: UDP {udp}; {total} packets dropped; offloads: {offloads}\n{text}")
}

/// One object, with every counter.
fn as_json(interface: &str, statistics: &Statistics) -> String {
    let object = |members: Vec<String>| format!("{{{}}}", members.join(","));
    let member = |(name, value): (&String, String)| format!("{}:{value}", string(name));
    let drops = statistics.drops.iter().map(|(name, count)| member((name, count.to_string())));
    let offloads = statistics.offloads.iter().map(|(name, on)| member((name, on.to_string())));
    let udp = statistics.udp.as_ref().map_or("null".to_owned(), Udp::as_json);
    format!(
        "{{\"interface\":{},\"udp\":{udp},\"drops\":{},\"offloads\":{},\"peers_without_udp_gso\":{}}}\n",
        string(interface),
        object(drops.collect()),
        object(offloads.collect()),
        statistics.peers_without_udp_gso
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = "drop_no_peer=3\ndrop_replay=0\nudp_port=51820\nudp_ipv4=1\nudp_ipv6=0\nudp_errno=0\noffload_tso=1\noffload_uso=0\nerrno=0\n\n";

    #[test]
    fn the_table_has_what_happened_and_json_has_all() {
        let statistics = parse(ANSWER).unwrap();
        assert_eq!(
            as_table("wg0", &statistics),
            "wg0: UDP port 51820, IPv4 only; 3 packets dropped; offloads: without uso; the log says why\n           \
             3  no_peer               out: no peer has the destination; see `wg show wg0 allowed-ips`\n"
        );
        assert_eq!(
            as_json("wg0", &statistics),
            "{\"interface\":\"wg0\",\"udp\":{\"port\":51820,\"ipv4\":true,\"ipv6\":false,\"error\":null},\"drops\":{\"no_peer\":3,\"replay\":0},\
             \"offloads\":{\"tso\":true,\"uso\":false},\"peers_without_udp_gso\":0}\n"
        );
    }

    #[test]
    fn a_port_that_is_not_open_is_in_both() {
        let refused = parse(&ANSWER.replace("errno=0\noff", "errno=98\noff")).unwrap();
        let table = as_table("wg0", &refused);
        let line = "wg0: UDP port 51820 cannot be opened: Address already in use, the log says what to do; ";
        assert!(table.starts_with(line), "{table}");
        let json = as_json("wg0", &refused);
        assert!(json.contains("\"error\":\"Address already in use\"}"), "{json}");
        let waits = parse(&ANSWER.replace("errno=0\noff", "errno=11\noff")).unwrap();
        let line = "wg0: UDP port 51820 is opened later, as one new port is in ten seconds; ";
        assert!(as_table("wg0", &waits).starts_with(line), "{}", as_table("wg0", &waits));
        assert!(as_json("wg0", &waits).contains("\"error\":null}"), "it is not refused");
        let down = parse(&ANSWER.replace("ipv4=1", "ipv4=0")).unwrap();
        assert!(as_table("wg0", &down).starts_with("wg0: UDP closed, the interface is down; "));
    }

    #[test]
    fn a_path_that_refuses_an_offload_is_distinguished_from_an_offload_that_is_not_in_use() {
        let first_line = |offload: u8, peers: u8| {
            let answer = format!(
                "drop_no_peer=0\noffload_udp_gso={offload}\npeers_without_udp_gso={peers}\nerrno=0\n\n"
            );
            as_table("wg0", &parse(&answer).unwrap())
                .replace("wg0: UDP unknown; 0 packets dropped; ", "")
        };
        assert_eq!(first_line(1, 0), "offloads: all in use\n");
        assert_eq!(first_line(1, 1), "offloads: udp_gso for all but 1 peer; the log says why\n");
        assert_eq!(first_line(1, 2), "offloads: udp_gso for all but 2 peers; the log says why\n");
        assert_eq!(first_line(0, 2), "offloads: without udp_gso; the log says why\n");
    }

    #[test]
    fn what_another_implementation_answers_is_not_taken_for_statistics() {
        for answer in [
            "",
            "errno=71\n\n",
            "errno=0\n\n",
            "private_key=ff\nerrno=0\n\n",
            "drop_no_peer=3\n",
            "drop_no_peer=x\nerrno=0\n\n",
            "drop_\u{1b}[2J=1\nerrno=0\n\n",
        ] {
            assert_eq!(parse(answer), None, "{answer:?}");
        }
    }
}
