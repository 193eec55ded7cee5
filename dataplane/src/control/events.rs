//! The protocol's events as log lines.
//!
//! A handshake that fails does so every five seconds, and an unknown sender can cause some events at will. So
//! each failure is logged once for each peer or address it concerns, and again only after an hour or
//! once a handshake completed; and each kind has a limit, beyond which lines are left out. Peers and
//! unknown senders have tables and limits of their own, so that no flood from unknown senders hides a peer's failure.
//! With `debug` the repetitions are logged, too.

use crate::drops::{Cause, LocalCause};
use crate::line_limit::LineLimit;
use crate::packets::udp;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem::{Discriminant, discriminant};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use wgsep_proto::{DropCause, Event, Instant, PublicKey};

/// A failure that persists is logged again after this long.
const AGAIN_AFTER: Duration = Duration::from_secs(3600);
/// Failures of unknown senders remembered at once; the oldest is evicted.
const MAX_UNKNOWN_SOURCES: usize = 1024;

/// What kind of line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Event(Discriminant<Event>),
    /// The network did not take a handshake message.
    Unsent,
}

/// The peer or the address that a failure concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    Peer(PublicKey),
    UnknownSource(IpAddr),
}

/// What became of a failure's line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Logged,
    /// It was logged less than [`AGAIN_AFTER`] ago.
    Repeated,
    /// Too many lines of its kind; the next such failure is logged if there are fewer then.
    LeftOut,
}

/// The limit on lines of each kind.
#[derive(Default)]
struct Limits(HashMap<Kind, LineLimit>);

impl Limits {
    fn of(&mut self, kind: Kind) -> &mut LineLimit {
        self.0.entry(kind).or_default()
    }
}

/// When which failures of peers were logged: at most one entry for each peer of the device.
#[derive(Default)]
struct PeerFailures {
    limits: Limits,
    logged: HashMap<PublicKey, Vec<(Kind, Instant)>>,
}

impl PeerFailures {
    fn failure(
        &mut self,
        kind: Kind,
        peer: PublicKey,
        now: Instant,
        write: impl FnOnce(),
    ) -> Outcome {
        let logged = self.logged.get(&peer).into_iter().flatten();
        if logged.into_iter().any(|(of, at)| *of == kind && is_fresh(*at, now)) {
            return Outcome::Repeated;
        }
        if !self.limits.of(kind).write(now, write) {
            return Outcome::LeftOut;
        }
        let logged = self.logged.entry(peer).or_default();
        logged.retain(|(of, _)| *of != kind);
        logged.push((kind, now));
        Outcome::Logged
    }

    /// Forgets the failures of a peer; true if there were any.
    fn forget(&mut self, peer: &PublicKey) -> bool {
        self.logged.remove(peer).is_some()
    }
}

/// When which failures of unknown senders were logged, in the order of logging.
#[derive(Default)]
struct UnknownSourceFailures {
    limits: Limits,
    logged: HashMap<(Kind, IpAddr), Instant>,
    order: VecDeque<(Kind, IpAddr)>,
}

impl UnknownSourceFailures {
    fn failure(&mut self, kind: Kind, from: IpAddr, now: Instant, write: impl FnOnce()) -> Outcome {
        self.expire(now);
        if self.logged.contains_key(&(kind, from)) {
            return Outcome::Repeated;
        }
        if !self.limits.of(kind).write(now, write) {
            return Outcome::LeftOut;
        }
        if self.order.len() >= MAX_UNKNOWN_SOURCES {
            self.evict_oldest();
        }
        self.logged.insert((kind, from), now);
        self.order.push_back((kind, from));
        Outcome::Logged
    }

    fn expire(&mut self, now: Instant) {
        let is_stale = |oldest: &(Kind, IpAddr), logged: &HashMap<(Kind, IpAddr), Instant>| {
            logged.get(oldest).is_none_or(|at| !is_fresh(*at, now))
        };
        while self.order.front().is_some_and(|oldest| is_stale(oldest, &self.logged)) {
            self.evict_oldest();
        }
    }

    fn evict_oldest(&mut self) {
        if let Some(oldest) = self.order.pop_front() {
            self.logged.remove(&oldest);
        }
    }
}

fn is_fresh(logged: Instant, now: Instant) -> bool {
    now.since(logged) < AGAIN_AFTER
}

/// A handshake message that the network did not take.
pub(super) struct Unsent {
    /// To whom, and where.
    pub(super) peer: PublicKey,
    pub(super) to: SocketAddr,
    /// SO_MARK, 0 for none.
    pub(super) mark: u32,
    /// An address of the family that is listened on and that no interface has.
    pub(super) missing: Option<IpAddr>,
}

/// Writes events that an operator acts on.
#[derive(Default)]
pub(super) struct Reporter {
    /// For events that are not failures.
    limits: Limits,
    peers: PeerFailures,
    unknown_senders: UnknownSourceFailures,
}

impl Reporter {
    /// Writes an event, unless it was logged already or there were too many of its kind.
    pub(super) fn report(&mut self, event: Event, now: Instant) {
        let kind = Kind::Event(discriminant(&event));
        match (event, subject(&event)) {
            (Event::HandshakeComplete { peer, first }, _) => {
                let had_failed = self.peers.forget(&peer);
                if first || had_failed {
                    let line =
                        if first { "first handshake complete" } else { "handshake complete again" };
                    self.limits.of(kind).write(now, || tracing::info!("{peer}: {line}"));
                } else {
                    tracing::debug!("{peer}: handshake complete");
                }
            }
            // Nothing is wrong: it was not used for so long.
            (Event::SessionExpired(_), _) => tracing::debug!("{}", line(event)),
            (_, Some(subject)) => {
                self.failure(kind, subject, &line(event), now);
            }
            (_, None) => {
                self.limits.of(kind).write(now, || tracing::info!("{}", line(event)));
            }
        }
    }

    /// The network did not take a handshake message to a peer.
    pub(super) fn unsent(&mut self, unsent: &Unsent, error: &io::Error, now: Instant) {
        let line = unsent_line(unsent, error);
        self.failure(Kind::Unsent, Subject::Peer(unsent.peer), &line, now);
    }

    /// Forgets the peers that the device does not have any more: if one is added again, its failures
    /// are logged again.
    pub(super) fn retain_peers(&mut self, is_peer: impl Fn(&PublicKey) -> bool) {
        self.peers.logged.retain(|peer, _| is_peer(peer));
    }

    fn failure(&mut self, kind: Kind, subject: Subject, line: &str, now: Instant) -> Outcome {
        let write = || tracing::info!("{line}");
        let outcome = match subject {
            Subject::Peer(peer) => self.peers.failure(kind, peer, now, write),
            Subject::UnknownSource(from) => self.unknown_senders.failure(kind, from, now, write),
        };
        if outcome == Outcome::Repeated {
            tracing::debug!("{line}");
        }
        outcome
    }
}

/// Whether an address is one of an interface's link.
fn has_scope(to: SocketAddr) -> bool {
    matches!(to, SocketAddr::V6(to) if to.scope_id() != 0)
}

/// Whether an address is one of many hosts, whatever the networks of this machine.
fn is_of_many(to: IpAddr) -> bool {
    to.is_multicast() || matches!(to, IpAddr::V4(to) if to.is_broadcast())
}

/// Why nothing is sent to a peer, and what to check.
fn unsent_line(&Unsent { peer, to, mark, missing }: &Unsent, error: &io::Error) -> String {
    let cause = udp::cause_of(error);
    if let (Cause::Local(LocalCause::SendNoRoute), Some(missing)) = (cause, missing) {
        return format!(
            "{peer}: cannot send to {to}: {error}; no interface has {missing} of --listen-address: add it (ip address), or a route by which another of them is the source"
        );
    }
    match cause {
        _ if to.port() == 0 => {
            format!("{peer}: cannot send to {to}: {error}; check the port of its endpoint")
        }
        // Linux sends to a group without a route of its own like to any address, and to a broadcast address only with
        // an option that no socket here has.
        _ if is_of_many(to.ip()) => {
            format!(
                "{peer}: cannot send to {to}: {error}; it is a multicast or broadcast address: set that of one host as its endpoint"
            )
        }
        // `ip route get` repeats EINVAL and names no route.
        Cause::Local(LocalCause::SendNoRoute)
            if error.raw_os_error() == Some(nix::libc::EINVAL) =>
        {
            let ip = if to.is_ipv6() { "ip -6" } else { "ip" };
            format!(
                "{peer}: no route to its endpoint {to}: {error}; a route or rule of type blackhole has this effect, see: {ip} route show table all type blackhole, {ip} rule"
            )
        }
        Cause::Local(LocalCause::SendNoRoute)
            if error.raw_os_error() == Some(nix::libc::EADDRNOTAVAIL) =>
        {
            format!(
                "{peer}: no address of this machine to send to its endpoint {to} from: {error}; see: ip -6 addr, sysctl net.ipv6.conf.all.disable_ipv6"
            )
        }
        Cause::Local(LocalCause::SendNoRoute)
            if !has_scope(to) && error.raw_os_error() == Some(nix::libc::ENODEV) =>
        {
            format!(
                "{peer}: cannot send to {to}: {error}; the interface of --bind-device is gone: create it (ip link)"
            )
        }
        Cause::Local(LocalCause::SendNoRoute) if has_scope(to) => format!(
            "{peer}: no route to its endpoint {to}: {error}; the interface of its scope may be gone: set the endpoint again, with the interface's name behind %"
        ),
        Cause::Local(LocalCause::SendNoRoute) => {
            // Routes may depend on the mark.
            let mark = if mark == 0 { String::new() } else { format!(" mark {mark:#x}") };
            let ip = to.ip();
            let broadcast = match error.raw_os_error() {
                Some(nix::libc::EACCES) => {
                    ", where broadcast means that the endpoint is no host's address"
                }
                _ => "",
            };
            format!(
                "{peer}: no route to its endpoint {to}: {error}; see: ip route get {ip}{mark}{broadcast}"
            )
        }
        Cause::Local(LocalCause::SendForbidden) => format!(
            "{peer}: a firewall of this machine, a setting of the unit or an IPsec policy refuses what goes to {to}; see: nft list ruleset, IPAddressDeny= and RestrictNetworkInterfaces=, ip xfrm policy"
        ),
        Cause::Local(LocalCause::SendNoBuffer) => format!(
            "{peer}: cannot send to {to}: {error}; the socket or the queue of the link is full, see: tc -s qdisc"
        ),
        Cause::Protocol(DropCause::TooLong) => format!(
            "{peer}: the way to {to} takes no handshake message, which is of up to 148 bytes: {error}; see the MTU in: ip route get {}",
            to.ip()
        ),
        _ => format!("{peer}: cannot send to {to}: {error}; check its endpoint"),
    }
}

/// The subject of a failure; `None` for an event that is not one.
const fn subject(event: &Event) -> Option<Subject> {
    match event {
        Event::HandshakeUnanswered(peer, _)
        | Event::HandshakeGivenUp(peer)
        | Event::NeverConfirmed(peer)
        | Event::InitiationReplayed(peer)
        | Event::ResponseRefused(peer) => Some(Subject::Peer(*peer)),
        // The key may be made up, each time another.
        Event::UnknownPeer(from, _) | Event::InvalidMac(from) => {
            Some(Subject::UnknownSource(from.ip()))
        }
        Event::HandshakeComplete { .. }
        | Event::EndpointMoved(..)
        | Event::SessionExpired(_)
        | Event::NoPrivateKey
        | Event::UnderLoad
        | Event::NewGeneration => None,
    }
}

/// What happened, and what to check: where it differs from the line of the library, because it names a command or
/// figures that are those of the daemon.
fn line(event: Event) -> String {
    match event {
        Event::HandshakeGivenUp(peer) => format!(
            "{peer}: handshake given up, no answer to 20 initiations in 90 s; the next packet to it tries again"
        ),
        Event::UnknownPeer(from, key) => format!(
            "{from}: handshake by {key}, a key that no peer here has; add it with wg set, or correct the public key of the peer it should be"
        ),
        Event::InvalidMac(from) => format!(
            "{from}: handshake for another key than ours, mac1 is wrong; check the public key that it has for this end against wg show"
        ),
        Event::NoPrivateKey => "no private key is set, so no handshake begins: packets to peers wait for up to 90 s and are dropped; wg set IF private-key FILE".to_owned(),
        _ => event.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind::Unsent;
    const UNKNOWN_SOURCE_KIND: Kind = Kind::Event(discriminant(&Event::InvalidMac(
        SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0),
    )));
    const MINUTE: Duration = Duration::from_secs(60);

    fn key(number: u32) -> PublicKey {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        PublicKey::from_bytes(key)
    }

    fn peer(number: u32) -> Subject {
        Subject::Peer(key(number))
    }

    fn unknown_source(number: u32) -> Subject {
        Subject::UnknownSource(IpAddr::V4(number.into()))
    }

    impl Reporter {
        fn try_log(&mut self, kind: Kind, subject: Subject, now: Instant) -> Outcome {
            self.failure(kind, subject, "", now)
        }
    }

    #[test]
    fn a_send_that_failed_is_logged_with_the_peer_its_endpoint_and_what_to_check() {
        let (v4, v6) = ("192.0.2.1:51820", "[2001:db8::1]:51820");
        for (errno, mark, to, advice) in [
            (nix::libc::ENETUNREACH, 0, v4, "ip route get 192.0.2.1"),
            (
                nix::libc::EACCES,
                7,
                v4,
                "ip route get 192.0.2.1 mark 0x7, where broadcast means that the endpoint is no host's address",
            ),
            (nix::libc::EACCES, 0, "255.255.255.255:1", "set that of one host as its endpoint"),
            (nix::libc::ENETUNREACH, 0, "224.0.0.1:1", "set that of one host as its endpoint"),
            (nix::libc::EINVAL, 0, "[ff02::1]:1", "set that of one host as its endpoint"),
            (nix::libc::EINVAL, 7, v4, "see: ip route show table all type blackhole, ip rule"),
            (
                nix::libc::EINVAL,
                0,
                v6,
                "see: ip -6 route show table all type blackhole, ip -6 rule",
            ),
            (nix::libc::EINVAL, 0, "192.0.2.1:0", "check the port of its endpoint"),
            (nix::libc::EADDRNOTAVAIL, 0, v6, "sysctl net.ipv6.conf.all.disable_ipv6"),
            (nix::libc::ENETUNREACH, 0, "[fe80::1%2]:51820", "the interface's name behind %"),
            (
                nix::libc::EPERM,
                7,
                v4,
                "see: nft list ruleset, IPAddressDeny= and RestrictNetworkInterfaces=, ip xfrm policy",
            ),
            (nix::libc::ENOBUFS, 7, v4, "tc -s qdisc"),
            (nix::libc::EAGAIN, 7, v4, "tc -s qdisc"),
            (nix::libc::EMSGSIZE, 7, v4, "see the MTU in: ip route get 192.0.2.1"),
            (nix::libc::EIO, 7, v4, "check its endpoint"),
        ] {
            let peer = key(1);
            let error = io::Error::from_raw_os_error(errno);
            let line =
                unsent_line(&Unsent { peer, to: to.parse().unwrap(), mark, missing: None }, &error);
            assert!(line.starts_with(&format!("{peer}: ")) && line.contains(to), "{line}");
            assert!(line.ends_with(advice), "{line}");
        }
    }

    #[test]
    fn a_failure_is_logged_once_an_hour_for_each_peer_and_kind() {
        let mut reporter = Reporter::default();
        let start = Instant::from_nanos(1);
        assert_eq!(reporter.try_log(KIND, peer(1), start), Outcome::Logged);
        assert_eq!(reporter.try_log(KIND, peer(2), start), Outcome::Logged);
        let other = Kind::Event(discriminant(&Event::UnderLoad));
        assert_eq!(reporter.try_log(other, peer(1), start), Outcome::Logged);
        let later = start.after(AGAIN_AFTER - Duration::from_nanos(1));
        assert_eq!(reporter.try_log(KIND, peer(1), later), Outcome::Repeated);
        assert_eq!(reporter.try_log(KIND, peer(1), start.after(AGAIN_AFTER)), Outcome::Logged);
    }

    #[test]
    fn a_completed_handshake_forgets_the_failures_of_its_peer_alone() {
        let mut reporter = Reporter::default();
        let now = Instant::from_nanos(1);
        for number in [1, 2] {
            reporter.try_log(KIND, peer(number), now);
        }
        assert!(reporter.peers.forget(&key(1)) && !reporter.peers.forget(&key(1)));
        assert_eq!(reporter.try_log(KIND, peer(1), now), Outcome::Logged);
        assert_eq!(reporter.try_log(KIND, peer(2), now), Outcome::Repeated);
    }

    /// More addresses than the table of unknown senders holds, each with a wrong mac1.
    #[test]
    fn a_send_that_failed_names_the_listed_address_or_the_bound_device_that_is_gone() {
        let to = "203.0.113.5:51820".parse().unwrap();
        let of = |missing| Unsent { peer: key(1), to, mark: 0, missing };
        let unreachable = io::Error::from_raw_os_error(nix::libc::ENETUNREACH);
        let line = unsent_line(&of("192.0.2.1".parse().ok()), &unreachable);
        assert!(line.contains("no interface has 192.0.2.1 of --listen-address: add it"), "{line}");
        let line = unsent_line(&of(None), &io::Error::from_raw_os_error(nix::libc::ENODEV));
        assert!(line.contains("the interface of --bind-device is gone: create it"), "{line}");
    }

    #[test]
    fn a_flood_of_unknown_senders_hides_no_failure_of_a_peer() {
        let mut reporter = Reporter::default();
        let now = Instant::from_nanos(1);
        for number in 0..5000 {
            reporter.try_log(UNKNOWN_SOURCE_KIND, unknown_source(number), now);
        }
        for kind in [KIND, UNKNOWN_SOURCE_KIND] {
            assert_eq!(reporter.try_log(kind, peer(1), now), Outcome::Logged);
        }
    }

    #[test]
    fn a_flood_of_unknown_senders_hides_another_of_them_for_a_minute_at_most() {
        let mut reporter = Reporter::default();
        let now = Instant::from_nanos(1);
        for number in 0..5000 {
            reporter.try_log(UNKNOWN_SOURCE_KIND, unknown_source(number), now);
        }
        assert_eq!(
            reporter.try_log(UNKNOWN_SOURCE_KIND, unknown_source(9999), now),
            Outcome::LeftOut
        );
        let later = now.after(MINUTE);
        assert_eq!(
            reporter.try_log(UNKNOWN_SOURCE_KIND, unknown_source(9999), later),
            Outcome::Logged
        );
        assert_eq!(
            reporter.try_log(UNKNOWN_SOURCE_KIND, unknown_source(9999), later),
            Outcome::Repeated
        );
    }

    /// What the limit left out was not logged, so the next such failure is.
    #[test]
    fn a_line_that_was_left_out_does_not_count_as_logged() {
        let mut reporter = Reporter::default();
        let now = Instant::from_nanos(1);
        for number in 0..20 {
            let expected = if number < 10 { Outcome::Logged } else { Outcome::LeftOut };
            assert_eq!(reporter.try_log(KIND, peer(number), now), expected, "peer {number}");
        }
        assert_eq!(reporter.try_log(KIND, peer(15), now.after(MINUTE)), Outcome::Logged);
        assert_eq!(reporter.try_log(KIND, peer(5), now.after(MINUTE)), Outcome::Repeated);
    }

    #[test]
    fn unknown_senders_are_bounded_and_the_oldest_is_evicted() {
        let mut reporter = Reporter::default();
        let mut now = Instant::from_nanos(1);
        let most = u32::try_from(MAX_UNKNOWN_SOURCES).unwrap();
        // Two kinds, ten lines a minute of each: the table is full before the first is an hour old.
        let kinds = [UNKNOWN_SOURCE_KIND, Kind::Event(discriminant(&Event::UnderLoad))];
        for number in 0..most + 10 {
            let kind = kinds[number as usize % 2];
            assert_eq!(reporter.try_log(kind, unknown_source(number), now), Outcome::Logged);
            now = now.after(Duration::from_secs(3));
        }
        let sources = &reporter.unknown_senders;
        assert_eq!(
            (sources.logged.len(), sources.order.len()),
            (MAX_UNKNOWN_SOURCES, MAX_UNKNOWN_SOURCES)
        );
        assert_eq!(reporter.try_log(kinds[0], unknown_source(10), now), Outcome::Repeated);
        assert_eq!(reporter.try_log(kinds[0], unknown_source(8), now), Outcome::Logged);
        let later = now.after(AGAIN_AFTER);
        assert_eq!(reporter.try_log(kinds[0], unknown_source(1), later), Outcome::Logged);
        assert_eq!(reporter.unknown_senders.logged.len(), 1);
        assert_eq!(reporter.unknown_senders.order.len(), 1);
    }

    #[test]
    fn a_peer_that_was_removed_is_forgotten() {
        let mut reporter = Reporter::default();
        let now = Instant::from_nanos(1);
        for number in [1, 2] {
            reporter.try_log(KIND, peer(number), now);
        }
        reporter.retain_peers(|peer| *peer == key(2));
        assert_eq!(reporter.peers.logged.len(), 1);
        assert_eq!(reporter.try_log(KIND, peer(1), now), Outcome::Logged);
        assert_eq!(reporter.try_log(KIND, peer(2), now), Outcome::Repeated);
    }
}
