//! Expiry of timers (kernel timers.c, the expired functions), and the peers that workers marked as dirty.

use super::{ControlPlane, Event, PEER_EXISTS};
use crate::invariant::present;
use crate::session::peer::{PeerId, dirty};
use crate::session::timers::Timer;
use crate::time::Now;
use std::sync::Arc;

impl ControlPlane {
    /// Expires the timers that are due at `now`. Call it at [`Self::next_timeout`]; an earlier call is
    /// harmless.
    pub fn handle_timeout(&mut self, now: Now) {
        while let Some((at, id)) =
            self.timer_queue.first().copied().filter(|(at, _)| *at <= now.instant)
        {
            self.timer_queue.remove(&(at, id));
            if let Some(entry) = self.entry_mut(id) {
                entry.queued_at = None;
            }
            self.expire_timers(id, now);
            self.reschedule(id);
        }
    }

    /// Handles what is due for the peers that workers marked as dirty. In a copy of the virtual machine in
    /// which the keys were made, it first drops all keys.
    pub fn handle_dirty_peers(&mut self, now: Now) {
        if self.data_path.vm_generation_changed() {
            self.vm_notification(now);
        }
        for id in self.data_path.take_dirty_peers() {
            let Some(entry) = self.entry(id) else { continue };
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
            timer_queue.insert((at, id));
        }
        entry.queued_at = at;
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
        let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return };
        let peer = Arc::clone(&entry.peer);
        if peer.timers.count_handshake_attempt().is_some() {
            peer.clear_source();
            self.send_initiation(id, now);
            return;
        }
        let given_up = peer.state().take_staged();
        self.count_expired(&given_up);
        let _rescheduled = peer.timers.handshake_given_up(now.instant);
        self.log(Event::HandshakeGivenUp(*peer.public_key()));
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
        self.clear_keypairs(id);
    }
}
