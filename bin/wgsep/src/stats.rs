//! `wgsep stats IF`: what a running daemon dropped and why, and the state of each peer.
//!
//! It asks the status socket, over which no key passes, so that it needs no privilege but to connect, and whatever watches
//! a daemon has nothing to lose. A daemon that has none, as one whose socket was renamed, is asked for its counters by its
//! UAPI socket.

mod parse;
mod peers;
mod prometheus;

use crate::command_line::StatsQuestion;
use crate::json::string;
use crate::status::{self, Daemon};
pub use parse::key_as_base64;
use parse::{Statistics, Udp, parse};
use std::fmt::Write as _;
use std::io::{ErrorKind, IsTerminal};
use std::thread::sleep;
use std::time::Instant;
use wgsep_policy::Capability;

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
        "out: it waited for a handshake that was given up, or until link down or the removal of its peer; see the log",
    ),
    (
        "send_no_route",
        "out: the UDP port was closed, or no route to the peer's endpoint, or it is no host's address or port; see `ip route get ADDRESS mark MARK` (0 if none is set; Invalid argument: a blackhole, or port 0)",
    ),
    (
        "send_forbidden",
        "out: a firewall of this machine, a setting of the unit or an IPsec policy refused it; see `nft list ruleset`, IPAddressDeny= and RestrictNetworkInterfaces=, `ip xfrm policy`",
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
    (
        "initiation_flood",
        "in: initiations of a peer within 20 ms, as in a flood or after a stop of this daemon",
    ),
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

/// What a question is answered with, and to whom it is put again.
struct Asked<'a> {
    interface: &'a str,
    daemon: Result<Daemon, String>,
}

/// Answers a question as often as it says; `write` returns whether more is wanted.
///
/// # Errors
/// One line, if no wgsep serves an interface or it may not be asked. For Prometheus that is a sample.
pub fn stats(question: &StatsQuestion, mut write: impl FnMut(&str) -> bool) -> Result<(), String> {
    // The sockets are root's, or those of the user who started the daemon.
    keep_only(&[Capability::CAP_DAC_OVERRIDE])?;
    let deadline = Instant::now() + status::PATIENCE;
    let mut asked: Vec<_> = question
        .interfaces
        .iter()
        .map(|interface| Asked { interface, daemon: Daemon::connect(interface, deadline) })
        .collect();
    keep_only(&[])?;
    if question.prometheus {
        let answers = asked.iter_mut().map(|one| (one.interface, one.ask()));
        write(&prometheus::exposition(answers.collect()));
        return Ok(());
    }
    let is_terminal = std::io::stdout().is_terminal();
    loop {
        let mut text = String::new();
        for one in &mut asked {
            let statistics = one.ask()?;
            if question.json {
                text += &as_json(one.interface, &statistics);
            } else {
                text += &as_table(one.interface, &statistics);
            }
        }
        let Some(interval) = question.watch else {
            write(&text);
            return Ok(());
        };
        let text = match (question.json, is_terminal) {
            (true, _) => text,
            // To the top of an empty screen.
            (false, true) => format!("\x1b[H\x1b[2J{text}"),
            (false, false) => format!("{text}\n"),
        };
        if !write(&text) {
            return Ok(());
        }
        sleep(interval);
    }
}

/// Gives up all capabilities but these.
pub fn keep_only(capabilities: &[Capability]) -> Result<(), String> {
    wgsep_policy::capabilities::keep_only(capabilities).map_err(|errno| {
        format!(
            "give up privileges: {}; {}",
            wgsep_policy::described(errno),
            wgsep_policy::remedy(errno)
        )
    })
}

/// How a connection ends that the daemon has closed.
const CLOSED: [ErrorKind; 2] = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset];
/// How often a client connects again whose connection was closed before it had an answer.
const MOST_TRIES: u32 = 10;

impl Asked<'_> {
    /// # Errors
    /// One line, if there is no answer, or it is none of wgsep's.
    fn ask(&mut self) -> Result<Statistics, String> {
        let Self { interface, daemon } = self;
        let deadline = Instant::now() + status::PATIENCE;
        let mut tries = 0..MOST_TRIES;
        let answer = loop {
            let answer = daemon.as_mut().map_err(|line| line.clone())?.ask(deadline);
            // Another client may have taken its place.
            let is_closed = match &answer {
                Ok(answer) => answer.is_empty(),
                Err(error) => CLOSED.contains(&error.kind()),
            };
            if !is_closed || tries.next().is_none() {
                break answer;
            }
            *daemon = Daemon::connect(interface, deadline);
        };
        let answer = answer.map_err(|error| status::no_answer(interface, &error))?;
        parse(&answer).ok_or_else(|| status::other_program(interface))
    }
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
    let peers = peers::as_text(&statistics.peers, peers::now());
    format!("{interface}: UDP {udp}; {total} packets dropped; offloads: {offloads}\n{text}{peers}")
}

/// One object, with every counter.
fn as_json(interface: &str, statistics: &Statistics) -> String {
    let object = |members: Vec<String>| format!("{{{}}}", members.join(","));
    let member = |(name, value): (&String, String)| format!("{}:{value}", string(name));
    let drops = statistics.drops.iter().map(|(name, count)| member((name, count.to_string())));
    let offloads = statistics.offloads.iter().map(|(name, on)| member((name, on.to_string())));
    let udp = statistics.udp.as_ref().map_or("null".to_owned(), Udp::as_json);
    let peers: Vec<_> = statistics.peers.iter().map(peers::as_json).collect();
    format!(
        "{{\"interface\":{},\"udp\":{udp},\"drops\":{},\"offloads\":{},\"peers_without_udp_gso\":{},\"peers\":[{}]}}\n",
        string(interface),
        object(drops.collect()),
        object(offloads.collect()),
        statistics.peers_without_udp_gso,
        peers.join(",")
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
            "{\"interface\":\"wg0\",\"udp\":{\"port\":51820,\"ipv4\":true,\"ipv6\":false,\"missing\":[],\"error\":null},\"drops\":{\"no_peer\":3,\"replay\":0},\
             \"offloads\":{\"tso\":true,\"uso\":false},\"peers_without_udp_gso\":0,\"peers\":[]}\n"
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
        let lacks = ANSWER.replace("errno=0\noff", "errno=0\nudp_missing=192.0.2.1\noff");
        let lacks = parse(&lacks).unwrap();
        let line = "wg0: UDP port 51820, IPv4 only, no interface has 192.0.2.1; ";
        assert!(as_table("wg0", &lacks).starts_with(line), "{}", as_table("wg0", &lacks));
        assert!(as_json("wg0", &lacks).contains("\"missing\":[\"192.0.2.1\"],"));
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
