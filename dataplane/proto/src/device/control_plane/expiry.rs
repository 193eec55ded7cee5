//! Expiry of timers (kernel timers.c, the expired functions), the peers that workers marked as dirty, and those to which
//! something is sent after a change that concerns many.
//!
//! All of that is done in rounds. A peer of each kind may need an initiation, and there may be many thousand peers, so
//! each kind has a queue of its own, of which a round takes some: a caller does other things in between, and a peer
//! that traffic has marked does not wait for all those that a change has.

use super::{ControlPlane, Event, PEER_EXISTS};
use crate::invariant::present;
use crate::secret::in_ordinary_memory;
use crate::session::handshakes::HandshakeFailure;
use crate::session::peer::{PeerId, dirty};
use crate::session::timers::Timer;
use crate::time::Now;
use std::sync::Arc;

/// Peers of each kind that are handled in a round, which then takes a few milliseconds.
pub const PEERS_PER_ROUND: usize = 16;

/// What is sent to a peer after a change that concerns many peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pending {
    /// The staged packets, if there are any.
    staged: bool,
    /// A keepalive, if it is configured.
    persistent_keepalive: bool,
    /// An initiation.
    initiation: bool,
}

impl Pending {
    pub(super) const STAGED: Self =
        Self { staged: true, persistent_keepalive: false, initiation: false };
    pub(super) const STAGED_AND_KEEPALIVE: Self =
        Self { persistent_keepalive: true, ..Self::STAGED };
    pub(super) const INITIATION: Self =
        Self { staged: false, persistent_keepalive: false, initiation: true };

    #[cfg(feature = "internals")]
    pub(super) const fn save(self) -> [bool; 3] {
        [self.staged, self.persistent_keepalive, self.initiation]
    }

    #[cfg(feature = "internals")]
    pub(super) const fn restore([staged, persistent_keepalive, initiation]: [bool; 3]) -> Self {
        Self { staged, persistent_keepalive, initiation }
    }

    const fn is_any(self) -> bool {
        self.staged || self.persistent_keepalive || self.initiation
    }

    const fn merge(self, other: Self) -> Self {
        Self {
            staged: self.staged || other.staged,
            persistent_keepalive: self.persistent_keepalive || other.persistent_keepalive,
            initiation: self.initiation || other.initiation,
        }
    }
}

impl ControlPlane {
    /// Expires timers that are due at `now`, the earliest first, of at most [`PEERS_PER_ROUND`] peers. Call it at
    /// [`Self::next_timeout`], which is in the past if more are due; an earlier call is harmless.
    pub fn handle_timeout(&mut self, now: Now) {
        for _ in 0..PEERS_PER_ROUND {
            let first = self.timer_queue.first().copied();
            let Some((at, id)) = first.filter(|(at, _)| *at <= now.instant) else { return };
            self.timer_queue.remove(&(at, id));
            if let Some(entry) = self.entry_mut(id) {
                entry.queued_at = None;
            }
            self.expire_timers(id, now);
            self.reschedule(id);
        }
    }

    /// Handles what is due for the peers that workers marked as dirty, and for those that a change of the
    /// configuration, of the link or of the virtual machine concerns: at most `most` of each kind, in the order in which
    /// they were queued. It subtracts how many that were; if more are left, [`Self::next_timeout`] is `now`. In a copy
    /// of the virtual machine in which the keys were made, it first drops all keys.
    pub fn handle_dirty_peers(&mut self, most: &mut usize, now: Now) {
        if self.data_path.vm_generation_changed() {
            self.vm_notification(now);
        }
        let quantum = *most;
        let (dirty_peers, more) = self.data_path.take_dirty_peers(quantum, |id| self.has_id(id));
        let (marked, mut sent) = (dirty_peers.len(), 0);
        for id in dirty_peers {
            self.handle_dirty_peer(id, now);
        }
        while sent < quantum
            && let Some(id) = self.pending.pop_front()
        {
            // Those that were removed since do not count, so that they do not accumulate.
            sent += usize::from(self.send_pending(id, now));
        }
        *most -= marked.max(sent);
        self.left_since = (more || !self.pending.is_empty()).then_some(now.instant);
    }

    /// True if [`Self::handle_dirty_peers`] has nothing to handle, and there is nothing to be sent.
    pub(in crate::device) fn is_settled(&self) -> bool {
        !self.data_path.has_dirty_peers()
            && self.pending.is_empty()
            && self.left_since.is_none()
            && self.transmits.is_empty()
            && self.can_send_staged.is_empty()
            && !self.data_path.vm_generation_changed()
    }

    fn has_id(&self, id: PeerId) -> bool {
        self.peers.contains_key(&id)
    }

    fn handle_dirty_peer(&mut self, id: PeerId, now: Now) {
        let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return };
        let reasons = entry.peer.take_dirty();
        if reasons & dirty::CONFIRMED != 0 {
            self.record_handshake(id, now);
            self.send_staged_packets(id, now);
        }
        if reasons & dirty::HANDSHAKE != 0 {
            self.request_initiation(id, now);
        }
        self.reschedule(id);
    }

    /// Puts a peer into the timer queue at its earliest deadline.
    pub(super) fn reschedule(&mut self, id: PeerId) {
        let Self { timer_queue, peers, random, .. } = self;
        let Some(entry) = present(peers.get_mut(&id), PEER_EXISTS) else { return };
        let mut jitter = [0; 4];
        random.fill(&mut jitter);
        entry.peer.timers.set_jitter(u32::from_ne_bytes(jitter));
        let at = entry.peer.timers.schedule();
        if at == entry.queued_at {
            return;
        }
        if let Some(before) = entry.queued_at.take() {
            timer_queue.remove(&(before, id));
        }
        if let Some(at) = at {
            in_ordinary_memory(|| timer_queue.insert((at, id)));
        }
        entry.queued_at = at;
    }

    /// Queues what is to be sent to a peer while the link is up, unless it is nothing.
    pub(super) fn queue_pending(&mut self, id: PeerId, wanted: Pending) {
        let Self { peers, pending, up, .. } = self;
        let Some(entry) = present(peers.get_mut(&id), PEER_EXISTS) else { return };
        let wanted = Pending {
            staged: wanted.staged && !entry.peer.state().staged.is_empty(),
            persistent_keepalive: wanted.persistent_keepalive
                && entry.peer.timers.persistent_keepalive_interval() > 0,
            ..wanted
        };
        if !*up || !wanted.is_any() {
            return;
        }
        if !entry.pending.is_any() {
            pending.push_back(id);
        }
        entry.pending = entry.pending.merge(wanted);
    }

    /// Forgets what was to be sent.
    pub(super) fn clear_pending(&mut self) {
        for id in core::mem::take(&mut self.pending) {
            if let Some(entry) = self.entry_mut(id) {
                entry.pending = Pending::default();
            }
        }
    }

    /// Sends what is pending for a peer; false if it was removed.
    fn send_pending(&mut self, id: PeerId, now: Now) -> bool {
        let Some(entry) = self.entry_mut(id) else { return false };
        let pending = core::mem::take(&mut entry.pending);
        if pending.initiation {
            self.request_initiation(id, now);
        }
        if pending.persistent_keepalive {
            self.send_persistent_keepalive(id, now);
        }
        if pending.staged {
            self.send_staged_packets(id, now);
        }
        self.reschedule(id);
        true
    }

    fn expire_timers(&mut self, id: PeerId, now: Now) {
        for timer in Timer::ALL {
            let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return };
            if !entry.peer.timers.take_expired(timer, now.instant) {
                continue;
            }
            match timer {
                Timer::RetransmitHandshake => self.expired_retransmit_handshake(id, now),
                Timer::SendKeepalive => self.expired_send_keepalive(id, now),
                Timer::NewHandshake => self.expired_new_handshake(id, now),
                Timer::ZeroKeyMaterial => self.expired_zero_key_material(id),
                Timer::PersistentKeepalive => self.send_persistent_keepalive(id, now),
            }
        }
    }

    /// No response arrived: sends another initiation, from the source address that the route gives now, or
    /// gives up.
    fn expired_retransmit_handshake(&mut self, id: PeerId, now: Now) {
        let has_key = self.identity.is_some();
        let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return };
        let peer = Arc::clone(&entry.peer);
        // An initiation that was put off was not sent.
        let was_sent = peer.handshakes().take_unanswered();
        if !has_key {
            peer.handshakes().fail(HandshakeFailure::NoPrivateKey);
        } else if was_sent {
            peer.handshakes().fail(HandshakeFailure::Unanswered);
        }
        if peer.timers.count_handshake_attempt().is_some() {
            peer.clear_source();
            self.send_initiation(id, now);
            return;
        }
        let given_up = peer.state().take_staged();
        self.count_expired(&given_up);
        let _rescheduled = peer.timers.handshake_given_up(now.instant);
        if has_key {
            peer.handshakes().fail(HandshakeFailure::GivenUp);
            self.log(Event::HandshakeGivenUp(*peer.public_key()));
        }
    }

    fn expired_send_keepalive(&mut self, id: PeerId, now: Now) {
        self.send_keepalive(id, now);
        if let Some(entry) = self.entry(id) {
            let _rescheduled = entry.peer.timers.keepalive_expired(now.instant);
        }
    }

    /// No packet arrived after data was sent: the peer may have lost its keypair.
    fn expired_new_handshake(&mut self, id: PeerId, now: Now) {
        let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return };
        entry.peer.clear_source();
        self.request_initiation(id, now);
    }

    fn expired_zero_key_material(&mut self, id: PeerId) {
        self.clear_handshake(id);
        if self.clear_keypairs(id)
            && let Some(peer) = self.public_key(id)
        {
            self.log(Event::SessionExpired(peer));
        }
    }
}
