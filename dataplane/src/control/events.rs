//! The protocol's events as log lines. Strangers can cause some of them at will, so each kind has a
//! limit, and what goes beyond it is only counted.

use crate::line_limit::LineLimit;
use std::mem::{Discriminant, discriminant};
use wgsep_proto::device::Event;
use wgsep_proto::time::Instant;

/// Writes events that an operator acts on.
#[derive(Default)]
pub(super) struct Reporter {
    limits: Vec<(Discriminant<Event>, LineLimit)>,
}

impl Reporter {
    /// Writes an event, unless there were too many of its kind.
    pub(super) fn report(&mut self, event: Event, now: Instant) {
        self.limit(&event).write(now, || write(event));
    }

    fn limit(&mut self, event: &Event) -> &mut LineLimit {
        let kind = discriminant(event);
        let known = self.limits.iter().position(|(limited, _)| *limited == kind);
        let place = known.unwrap_or(self.limits.len());
        if known.is_none() {
            self.limits.push((kind, LineLimit::default()));
        }
        &mut self.limits[place].1
    }
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
    fn each_kind_of_event_has_a_limit_of_its_own() {
        let mut reporter = Reporter::default();
        let peer = PublicKey::from_bytes([1; 32]);
        for _ in 0..2 {
            reporter.limit(&Event::InitiationReplayed(peer));
            reporter.limit(&Event::ResponseRefused(peer));
        }
        assert_eq!(reporter.limits.len(), 2);
    }
}
