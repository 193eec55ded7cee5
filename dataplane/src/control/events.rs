//! The protocol's events as log lines.
//!
//! A handshake that fails does so every five seconds, and strangers can cause some events at will. So
//! each failure is told once for each peer or address it concerns, and again only after an hour or once
//! it was mended; and each kind has a limit, beyond which it is only counted. With `debug` the
//! repetitions are told, too.

use crate::line_limit::LineLimit;
use crate::udp;
use std::collections::HashMap;
use std::io;
use std::mem::{Discriminant, discriminant};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use wgsep_proto::data_path::DropCause;
use wgsep_proto::device::Event;
use wgsep_proto::keys::PublicKey;
use wgsep_proto::time::Instant;

/// A failure that goes on is told again after this long.
const AGAIN_AFTER: Duration = Duration::from_secs(3600);
/// Failures remembered at once. What does not fit is not told: by then the log has enough of them.
const MAX_TOLD: usize = 1024;

/// What kind of line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Event(Discriminant<Event>),
    /// The network did not take a handshake message.
    Unsent,
}

/// Whom a failure concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Subject {
    Peer(PublicKey),
    Address(IpAddr),
}

/// What is to become of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Tell,
    Repeated,
}

/// Writes events that an operator acts on.
#[derive(Default)]
pub(super) struct Reporter {
    limits: HashMap<Kind, LineLimit>,
    told: HashMap<(Kind, Subject), Instant>,
}

impl Reporter {
    /// Writes an event, unless it was told already or there were too many of its kind.
    pub(super) fn report(&mut self, event: Event, now: Instant) {
        let kind = Kind::Event(discriminant(&event));
        match (event, subject(&event)) {
            (Event::HandshakeComplete { peer, first }, _) => {
                let mended = self.forget(peer);
                if first || mended {
                    let line =
                        if first { "first handshake complete" } else { "handshake complete again" };
                    self.limit(kind).write(now, || tracing::info!("{peer}: {line}"));
                } else {
                    tracing::debug!("{peer}: handshake complete");
                }
            }
            (_, Some(subject)) => self.failure(kind, subject, &line(event), now),
            (_, None) => self.limit(kind).write(now, || tracing::info!("{}", line(event))),
        }
    }

    /// The network did not take a handshake message to a peer.
    pub(super) fn unsent(
        &mut self,
        peer: PublicKey,
        to: SocketAddr,
        error: &io::Error,
        now: Instant,
    ) {
        let line = match udp::cause_of(error) {
            DropCause::SendNoRoute => {
                format!("{peer}: no route to its endpoint {to}; see: ip route get {}", to.ip())
            }
            DropCause::SendForbidden => format!(
                "{peer}: a firewall of this machine refuses what goes to {to}; see: nft list ruleset"
            ),
            _ => format!("{peer}: cannot send to {to}: {error}; check its endpoint"),
        };
        self.failure(Kind::Unsent, Subject::Peer(peer), &line, now);
    }

    fn failure(&mut self, kind: Kind, subject: Subject, line: &str, now: Instant) {
        match self.judge(kind, subject, now) {
            Verdict::Tell => self.limit(kind).write(now, || tracing::info!("{line}")),
            Verdict::Repeated => tracing::debug!("{line}"),
        }
    }

    fn judge(&mut self, kind: Kind, subject: Subject, now: Instant) -> Verdict {
        let is_fresh = |told: &Instant| now.since(*told) < AGAIN_AFTER;
        if self.told.get(&(kind, subject)).is_some_and(is_fresh) {
            return Verdict::Repeated;
        }
        if self.told.len() >= MAX_TOLD {
            self.told.retain(|_, told| is_fresh(told));
        }
        if self.told.len() >= MAX_TOLD {
            return Verdict::Repeated;
        }
        self.told.insert((kind, subject), now);
        Verdict::Tell
    }

    /// A peer is well; true if something else was told of it before.
    fn forget(&mut self, peer: PublicKey) -> bool {
        let before = self.told.len();
        self.told.retain(|(_, subject), _| *subject != Subject::Peer(peer));
        self.told.len() < before
    }

    fn limit(&mut self, kind: Kind) -> &mut LineLimit {
        self.limits.entry(kind).or_default()
    }
}

/// Whom a failure concerns; `None` for what is no failure of somebody's.
const fn subject(event: &Event) -> Option<Subject> {
    match event {
        Event::HandshakeUnanswered(peer, _)
        | Event::HandshakeGivenUp(peer)
        | Event::NeverConfirmed(peer)
        | Event::InitiationReplayed(peer)
        | Event::ResponseRefused(peer) => Some(Subject::Peer(*peer)),
        // The key may be made up, each time another.
        Event::UnknownPeer(from, _) | Event::InvalidMac(from) => Some(Subject::Address(from.ip())),
        Event::HandshakeComplete { .. } | Event::EndpointMoved(..) | Event::UnderLoad => None,
    }
}

/// What happened, and what to check.
fn line(event: Event) -> String {
    match event {
        Event::HandshakeComplete { peer, .. } => format!("{peer}: handshake complete"),
        Event::HandshakeUnanswered(peer, to) => format!(
            "{peer}: no answer to 3 initiations; check that it runs, that {to} is its address, that no firewall on the way drops UDP, and that each side has the other's public key"
        ),
        Event::HandshakeGivenUp(peer) => format!(
            "{peer}: handshake given up, no answer to 20 initiations in 90 s; the next packet to it tries again"
        ),
        Event::NeverConfirmed(peer) => format!(
            "{peer}: 3 of our responses and no data since; check that both sides have the same preshared key, and that what we send reaches it (which of the two cannot be told from here)"
        ),
        Event::InitiationReplayed(peer) => format!(
            "{peer}: its initiation is not newer than one before; check its clock (a replayed initiation looks the same, and for 27 s also a peer that was boringtun)"
        ),
        Event::UnknownPeer(from, key) => format!(
            "{from}: handshake by {key}, a key that no peer here has; add it with wg set, or correct the public key of the peer it should be"
        ),
        Event::InvalidMac(from) => format!(
            "{from}: handshake for another key than ours, mac1 is wrong; check the public key that it has for this end against wg show"
        ),
        Event::ResponseRefused(peer) => format!(
            "{peer}: its response does not open; check that both sides have the same preshared key (a forged response looks the same)"
        ),
        Event::EndpointMoved(peer, to) => format!("{peer}: endpoint is now {to}"),
        Event::UnderLoad => "under load: handshakes need a cookie from now on".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind::Unsent;

    fn peer(number: u32) -> Subject {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        Subject::Peer(PublicKey::from_bytes(key))
    }

    #[test]
    fn a_failure_is_told_once_an_hour_for_each_peer_and_kind() {
        let mut reporter = Reporter::default();
        let start = Instant::from_nanos(1);
        assert_eq!(reporter.judge(KIND, peer(1), start), Verdict::Tell);
        assert_eq!(reporter.judge(KIND, peer(2), start), Verdict::Tell);
        let other = Kind::Event(discriminant(&Event::UnderLoad));
        assert_eq!(reporter.judge(other, peer(1), start), Verdict::Tell);
        let later = start.after(AGAIN_AFTER - Duration::from_nanos(1));
        assert_eq!(reporter.judge(KIND, peer(1), later), Verdict::Repeated);
        assert_eq!(reporter.judge(KIND, peer(1), start.after(AGAIN_AFTER)), Verdict::Tell);
    }

    #[test]
    fn a_handshake_that_completes_mends_its_peer_alone() {
        let mut reporter = Reporter::default();
        let now = Instant::from_nanos(1);
        let key = |number| match peer(number) {
            Subject::Peer(key) => key,
            Subject::Address(_) => panic!(),
        };
        for number in [1, 2] {
            reporter.judge(KIND, peer(number), now);
        }
        assert!(reporter.forget(key(1)) && !reporter.forget(key(1)));
        assert_eq!(reporter.judge(KIND, peer(1), now), Verdict::Tell);
        assert_eq!(reporter.judge(KIND, peer(2), now), Verdict::Repeated);
    }

    #[test]
    fn strangers_cannot_make_it_remember_without_bound() {
        let mut reporter = Reporter::default();
        let now = Instant::from_nanos(1);
        let told = (0..5000).filter(|n| reporter.judge(KIND, peer(*n), now) == Verdict::Tell);
        assert_eq!(told.count(), MAX_TOLD);
        assert_eq!(reporter.told.len(), MAX_TOLD);
        assert_eq!(reporter.judge(KIND, peer(9999), now.after(AGAIN_AFTER)), Verdict::Tell);
        assert_eq!(reporter.told.len(), 1);
    }
}
