//! The protocol's events as log lines. Strangers can cause some of them at will, so each kind has a
//! limit, and what goes beyond it is only counted.

use std::mem::discriminant;
use std::time::Duration;
use wgsep_proto::device::Event;
use wgsep_proto::time::Instant;

/// Lines of one kind in one [`PERIOD`].
const MOST_LINES: u32 = 10;
const PERIOD: Duration = Duration::from_secs(60);

/// Writes events that an operator acts on.
#[derive(Default)]
pub(super) struct Reporter {
    limits: Vec<Limit>,
}

struct Limit {
    kind: std::mem::Discriminant<Event>,
    since: Instant,
    lines: u32,
}

impl Reporter {
    /// Writes an event, unless there were too many of its kind.
    pub(super) fn report(&mut self, event: Event, now: Instant) {
        match self.admit(&event, now) {
            Verdict::Write => write(event),
            Verdict::WriteLast => {
                write(event);
                tracing::info!("more lines of this kind are left out for a minute");
            }
            Verdict::LeaveOut => {}
        }
    }

    fn admit(&mut self, event: &Event, now: Instant) -> Verdict {
        let kind = discriminant(event);
        let place = self.limits.iter().position(|limit| limit.kind == kind);
        let place = place.unwrap_or_else(|| {
            self.limits.push(Limit { kind, since: now, lines: 0 });
            self.limits.len() - 1
        });
        let Some(limit) = self.limits.get_mut(place) else { return Verdict::LeaveOut };
        if now.since(limit.since) >= PERIOD {
            *limit = Limit { kind, since: now, lines: 0 };
        }
        limit.lines = limit.lines.saturating_add(1);
        match limit.lines.cmp(&MOST_LINES) {
            std::cmp::Ordering::Less => Verdict::Write,
            std::cmp::Ordering::Equal => Verdict::WriteLast,
            std::cmp::Ordering::Greater => Verdict::LeaveOut,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Write,
    WriteLast,
    LeaveOut,
}

fn write(event: Event) {
    match event {
        Event::HandshakeComplete { peer, first: true } => {
            tracing::info!("{peer}: first handshake complete");
        }
        Event::HandshakeComplete { peer, first: false } => {
            tracing::debug!("{peer}: handshake complete");
        }
        Event::HandshakeGivenUp(peer) => tracing::info!(
            "{peer}: no answer to 20 initiations in 90 s; check its endpoint, the route there and both public keys"
        ),
        Event::InitiationReplayed(peer) => tracing::info!(
            "{peer}: initiation with an old timestamp ignored: a replay, or its clock went back"
        ),
        Event::UnknownPeer(from) => {
            tracing::debug!("initiation from {from} by a key that is no peer's");
        }
        Event::ResponseRefused(peer) => tracing::info!(
            "{peer}: response does not fit; check that both sides have the same preshared key"
        ),
        Event::EndpointMoved(peer, to) => tracing::info!("{peer}: endpoint is now {to}"),
        Event::UnderLoad => tracing::info!("under load: handshakes need a cookie from now on"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgsep_proto::keys::PublicKey;

    #[test]
    fn ten_lines_of_a_kind_a_minute() {
        let mut reporter = Reporter::default();
        let peer = PublicKey::from_bytes([1; 32]);
        let start = Instant::from_nanos(0);
        for number in 1..=20 {
            let expected = match number {
                1..=9 => Verdict::Write,
                10 => Verdict::WriteLast,
                _ => Verdict::LeaveOut,
            };
            assert_eq!(reporter.admit(&Event::InitiationReplayed(peer), start), expected);
        }
        assert_eq!(reporter.admit(&Event::ResponseRefused(peer), start), Verdict::Write);
        let later = start.after(PERIOD);
        assert_eq!(reporter.admit(&Event::InitiationReplayed(peer), later), Verdict::Write);
    }
}
