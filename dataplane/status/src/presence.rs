//! Which peers are connected: those of which an authenticated message was received within 180 seconds.
//!
//! A peer is looked at when the last message that was known of would be too old. So a message costs nothing here.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long after the last authenticated message a peer counts as disconnected: no keypair lives longer.
pub const DISCONNECTED_AFTER: Duration = Duration::from_secs(180);

type Key = [u8; 32];

/// The peers that are connected. Points in time are durations on one clock.
#[derive(Debug, Default)]
pub struct Presence {
    connected: BTreeMap<Key, Duration>,
    /// When each is looked at next.
    due: BTreeSet<(Duration, Key)>,
}

impl Presence {
    /// No peer is connected.
    #[must_use]
    pub const fn new() -> Self {
        Self { connected: BTreeMap::new(), due: BTreeSet::new() }
    }

    /// Starts anew with all peers, each with the time of its last authenticated message.
    pub fn begin(&mut self, peers: impl Iterator<Item = (Key, Option<Duration>)>, now: Duration) {
        *self = Self::default();
        for (key, last) in peers {
            let end = last.map(|last| last.saturating_add(DISCONNECTED_AFTER));
            if let Some(end) = end.filter(|end| *end > now) {
                self.insert(key, end);
            }
        }
    }

    /// Peers that are connected.
    #[must_use]
    pub fn connected(&self) -> usize {
        self.connected.len()
    }

    /// A handshake with a peer completed; true if it was not connected before.
    pub fn handshake_complete(&mut self, key: Key, now: Duration) -> bool {
        let before = self.connected.get(&key).copied();
        if let Some(due) = before {
            self.due.remove(&(due, key));
        }
        self.insert(key, now.saturating_add(DISCONNECTED_AFTER));
        before.is_none()
    }

    fn insert(&mut self, key: Key, end: Duration) {
        self.connected.insert(key, end);
        self.due.insert((end, key));
    }

    /// When [`Self::handle_timeout`] is due.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Duration> {
        self.due.first().map(|(due, _)| *due)
    }

    /// The next peer that is disconnected now, if any. `last_received` says when an authenticated message of a peer was
    /// last received; the outer `None` of it that there is no such peer any more.
    pub fn handle_timeout(
        &mut self,
        now: Duration,
        last_received: impl Fn(&Key) -> Option<Option<Duration>>,
    ) -> Option<Key> {
        while let Some((due, key)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
            self.due.remove(&(due, key));
            self.connected.remove(&key);
            let Some(last) = last_received(&key) else { continue };
            let end = last.unwrap_or_default().saturating_add(DISCONNECTED_AFTER);
            if end <= now {
                return Some(key);
            }
            self.insert(key, end);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Key = [1; 32];
    const B: Key = [2; 32];

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(1000 + seconds)
    }

    /// What happens up to a time, if the last messages of A and B were received then.
    fn disconnected(presence: &mut Presence, now: u64, last: [Option<u64>; 2]) -> Vec<Key> {
        let last_received = |key: &Key| {
            let last = last[usize::from(*key == B)]?;
            Some(Some(at(last)))
        };
        std::iter::from_fn(|| presence.handle_timeout(at(now), last_received)).collect()
    }

    #[test]
    fn a_peer_connects_rekeys_and_disconnects_after_180_silent_seconds() {
        let mut presence = Presence::default();
        assert!(presence.handshake_complete(A, at(0)));
        assert!(!presence.handshake_complete(A, at(120)), "it is a re-key");
        assert_eq!(presence.next_timeout(), Some(at(300)));
        assert!(disconnected(&mut presence, 299, [Some(120), None]).is_empty());
        // A message came at 250, of which nothing was known.
        assert!(disconnected(&mut presence, 300, [Some(250), None]).is_empty());
        assert_eq!(presence.next_timeout(), Some(at(430)));
        assert_eq!(disconnected(&mut presence, 430, [Some(250), None]), [A]);
        assert_eq!((presence.connected(), presence.next_timeout()), (0, None));
        assert!(presence.handshake_complete(A, at(500)), "it connects again");
    }

    #[test]
    fn peers_that_are_connected_at_the_beginning_are_known() {
        let mut presence = Presence::default();
        let peers = [(A, Some(at(0))), (B, Some(at(100))), ([3; 32], None)];
        presence.begin(peers.into_iter(), at(180));
        assert_eq!(presence.connected(), 1);
        assert!(!presence.handshake_complete(B, at(181)), "it was connected");
        assert!(presence.handshake_complete(A, at(181)), "it was not");
        presence.begin([].into_iter(), at(200));
        assert_eq!((presence.connected(), presence.next_timeout()), (0, None));
    }

    #[test]
    fn a_peer_that_was_removed_is_forgotten_and_not_reported() {
        let mut presence = Presence::default();
        presence.handshake_complete(A, at(0));
        presence.handshake_complete(B, at(0));
        assert_eq!(disconnected(&mut presence, 500, [None, Some(0)]), [B]);
        assert_eq!(presence.connected(), 0);
    }

    #[test]
    fn all_that_are_due_are_reported_in_order() {
        let mut presence = Presence::default();
        presence.handshake_complete(B, at(1));
        presence.handshake_complete(A, at(2));
        assert_eq!(disconnected(&mut presence, 182, [Some(2), Some(1)]), [B, A]);
    }
}
