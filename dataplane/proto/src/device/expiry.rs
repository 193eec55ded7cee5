//! Expiry of timers, and the notes that workers leave (kernel timers.c, the expired functions).

use super::{Device, Event};
use crate::peer::{PeerId, event};
use crate::time::Now;
use crate::timers::Timer;
use std::sync::Arc;

impl Device {
    /// Does what is due at `now`. Call it at [`Self::next_timeout`]; earlier is harmless.
    pub fn handle_timeout(&mut self, now: Now) {
        while let Some((at, id)) = self.agenda.first().copied().filter(|(at, _)| *at <= now.instant)
        {
            self.agenda.remove(&(at, id));
            if let Some(entry) = self.entry_mut(id) {
                entry.agenda = None;
            }
            self.expire_timers(id, now);
            self.reschedule(id);
        }
    }

    /// Looks at the peers that workers left a note about; and drops all keys first, if a worker found
    /// that this is a copy of the virtual machine that they were made in.
    pub fn handle_attention(&mut self, now: Now) {
        if self.data_path.is_in_a_copy() {
            self.vm_notification(now);
        }
        for id in self.data_path.take_attention() {
            let Some(entry) = self.entry(id) else { continue };
            let events = entry.peer.take_events();
            if events & event::CONFIRMED != 0 {
                self.record_handshake(id, now);
                self.send_staged_packets(id, now);
            }
            if events & event::HANDSHAKE != 0 {
                self.request_initiation(id, now);
            }
            self.reschedule(id);
        }
    }

    /// Puts a peer on the agenda at its earliest deadline.
    pub(super) fn reschedule(&mut self, id: PeerId) {
        let Self { agenda, peers, random, .. } = self;
        let Some(entry) = peers.get_mut(&id) else { return };
        let mut jitter = [0; 4];
        random.fill(&mut jitter);
        entry.peer.timers.set_jitter(u32::from_ne_bytes(jitter));
        let at = entry.peer.timers.schedule();
        if at == entry.agenda {
            return;
        }
        if let Some(before) = entry.agenda.take() {
            agenda.remove(&(before, id));
        }
        if let Some(at) = at {
            agenda.insert((at, id));
        }
        entry.agenda = at;
    }

    fn expire_timers(&mut self, id: PeerId, now: Now) {
        for timer in Timer::ALL {
            let Some(entry) = self.entry(id) else { return };
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

    /// Nobody answered: try again, from whatever source address the route gives now, or give up.
    fn expired_retransmit_handshake(&mut self, id: PeerId, now: Now) {
        let Some(entry) = self.entry(id) else { return };
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

    /// We sent data and heard nothing: the session may be dead on the other side.
    fn expired_new_handshake(&mut self, id: PeerId, now: Now) {
        let Some(entry) = self.entry(id) else { return };
        entry.peer.clear_source();
        self.request_initiation(id, now);
    }

    fn expired_zero_key_material(&mut self, id: PeerId) {
        self.clear_handshake(id);
        self.clear_keypairs(id);
    }
}
