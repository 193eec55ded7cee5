//! Configuration: applying a `set`, answering a `get`.

use super::expiry::Pending;
use super::{ControlPlane, Identity, PEER_EXISTS, PeerEntry};
use crate::config::{
    AllowedIp, AllowedIpChange, Configuration, DeviceStatus, PeerConfiguration, PeerStatus,
};
use crate::invariant::present;
use crate::keys::{PrivateKey, PublicKey};
use crate::noise::cookie::{CookieChecker, CookieGenerator};
use crate::noise::handshake::{Handshake, StaticIdentity};
use crate::path::data_path::AllowedIpOwner;
use crate::secret::in_ordinary_memory;
use crate::session::peer::{Endpoint, Peer, PeerId};
use core::ops::Bound;
use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How far the peers' part of the answer to a `get` was read; by default, not at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct StatusCursor {
    peer: PeerId,
    /// The order of the peer's next allowed IP, or `None` if the peer itself is next.
    allowed_ip: Option<u64>,
}

/// An item of the peers' part of the answer to a `get`.
#[derive(Clone)]
pub enum StatusItem {
    /// A peer, whose allowed IPs follow as items of their own.
    Peer(PeerStatus),
    /// An allowed IP of the last peer.
    AllowedIp(AllowedIp),
}

/// What a cursor is at.
pub(super) enum Step<'a> {
    Peer(&'a PeerEntry),
    AllowedIp(AllowedIp),
}

impl ControlPlane {
    /// Applies a checked `set` in the kernel's order: mark, port, replace_peers, key, peers. It
    /// cannot fail, so it is never half-applied; the caller has opened the port beforehand.
    pub fn configure(&mut self, configuration: Configuration) {
        let changes_allowed_ips = configuration.replace_peers
            || configuration.private_key.is_some()
            || configuration.peers.iter().any(|peer| {
                peer.remove || peer.replace_allowed_ips || !peer.allowed_ips.is_empty()
            });
        if let Some(fwmark) = configuration.fwmark {
            self.fwmark = fwmark;
            self.clear_sources();
        }
        if let Some(listen_port) = configuration.listen_port {
            self.set_listen_port(listen_port);
        }
        if configuration.replace_peers {
            for id in self.ids() {
                self.remove_peer(id);
            }
        }
        if let Some(private_key) = configuration.private_key {
            self.set_private_key(private_key);
        }
        for peer in configuration.peers {
            self.configure_peer(peer);
        }
        if changes_allowed_ips {
            in_ordinary_memory(|| self.data_path.allowed_ips.replace(self.allowed_ips.clone()));
        }
    }

    /// The port in use, as the caller bound it; cached sources went with the old socket.
    pub fn set_listen_port(&mut self, listen_port: u16) {
        if self.listen_port != listen_port {
            self.listen_port = listen_port;
            self.clear_sources();
        }
    }

    /// Clears the cached source address of every peer, so that the kernel's routing chooses one.
    pub fn clear_sources(&mut self) {
        for entry in self.peers.values() {
            entry.peer.clear_source();
        }
    }

    /// The peers that were created after one, or all, each with its endpoint, in the order of creation.
    pub fn endpoints(
        &self,
        after: Option<PeerId>,
    ) -> impl Iterator<Item = (PeerId, Option<Endpoint>)> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let peers = self.peers.range((start, Bound::Unbounded));
        peers.map(|(id, entry)| (*id, entry.peer.endpoint()))
    }

    /// Clears the cached source of a peer, unless its endpoint has changed.
    pub fn clear_source(&self, id: PeerId, endpoint: &Endpoint) {
        if let Some(entry) = self.entry(id) {
            entry.peer.clear_source_of(endpoint);
        }
    }

    /// The port in use, 0 if none.
    #[must_use]
    pub const fn listen_port(&self) -> u16 {
        self.listen_port
    }

    /// The mark on outgoing packets, 0 if none.
    #[must_use]
    pub const fn fwmark(&self) -> u32 {
        self.fwmark
    }

    /// The device's part of the answer to a `get`.
    #[must_use]
    pub fn status(&self) -> DeviceStatus {
        DeviceStatus {
            private_key: self.identity.as_ref().map(|identity| identity.private_key.clone()),
            listen_port: self.listen_port,
            fwmark: self.fwmark,
        }
    }

    /// The peers' part of the answer to a `get`, in the order of creation.
    pub fn peers(&self) -> impl Iterator<Item = PeerStatus> {
        self.peers.values().map(|entry| PeerStatus {
            allowed_ips: entry.allowed_ips.values().copied().collect(),
            ..entry.status()
        })
    }

    /// The item at a cursor, which moves to the next one. If the configuration has changed since the first item, items
    /// may be left out or repeated.
    pub fn next_status(&self, cursor: &mut StatusCursor) -> Option<StatusItem> {
        Some(match self.step(cursor)? {
            Step::Peer(entry) => StatusItem::Peer(entry.status()),
            Step::AllowedIp(allowed_ip) => StatusItem::AllowedIp(allowed_ip),
        })
    }

    /// What is at a cursor, which moves on.
    pub(super) fn step(&self, cursor: &mut StatusCursor) -> Option<Step<'_>> {
        if let Some(order) = cursor.allowed_ip {
            let entry = self.entry(cursor.peer);
            let next = entry.and_then(|entry| entry.allowed_ips.range(order..).next());
            if let Some((order, allowed_ip)) = next {
                cursor.allowed_ip = Some(order + 1);
                return Some(Step::AllowedIp(*allowed_ip));
            }
            *cursor = StatusCursor { peer: PeerId(cursor.peer.0 + 1), allowed_ip: None };
        }
        let (id, entry) = self.peers.range(cursor.peer..).next()?;
        *cursor = StatusCursor { peer: *id, allowed_ip: Some(0) };
        Some(Step::Peer(entry))
    }

    /// Sets the private key (kernel netlink.c, wg_set_device). Keypairs are only used for receiving from
    /// now on; the next packet to each peer starts a handshake at once. A peer that has our public key is
    /// removed. Packets that waited for the first key are sent, and persistent keepalives.
    fn set_private_key(&mut self, private_key: Option<PrivateKey>) {
        if self.identity.as_ref().map(|identity| &identity.private_key) == private_key.as_ref() {
            return;
        }
        let first = self.identity.is_none();
        self.identity = private_key.map(|private_key| {
            let keys = Arc::new(StaticIdentity::new(&private_key));
            let cookie_checker = CookieChecker::new(keys.public_key());
            Identity { private_key, keys, cookie_checker }
        });
        self.data_path.set_has_identity(self.identity.is_some());
        self.no_private_key_logged = false;
        if let Some(ourselves) = self.our_peer_id() {
            self.remove_peer(ourselves);
        }
        for id in self.ids() {
            self.clear_handshake(id);
            let Some(entry) = present(self.peers.get_mut(&id), PEER_EXISTS) else { continue };
            entry.handshake.forget_prepared();
            entry.peer.timers.reset_last_sent_handshake();
            let state = entry.peer.state();
            for keypair in [&state.keypairs.current, &state.keypairs.next].into_iter().flatten() {
                keypair.invalidate_sending();
            }
            drop(state);
            if first {
                self.queue_pending(id, Pending::STAGED_AND_KEEPALIVE);
            }
        }
    }

    /// The peer that has our own public key.
    fn our_peer_id(&self) -> Option<PeerId> {
        self.by_key.get(self.identity.as_ref()?.keys.public_key()).copied()
    }

    fn configure_peer(&mut self, change: PeerConfiguration) {
        let known = self.by_key.get(&change.public_key).copied();
        if change.remove {
            if let Some(id) = known {
                self.remove_peer(id);
            }
            return;
        }
        let id = match known {
            Some(id) => id,
            None if change.update_only || self.is_our_key(&change.public_key) => return,
            None => self.create_peer(change.public_key),
        };
        let Some(entry) = present(self.entry_mut(id), PEER_EXISTS) else { return };
        let peer = Arc::clone(&entry.peer);
        if let Some(preshared_key) = change.preshared_key {
            entry.handshake.set_preshared_key(preshared_key);
        }
        if let Some(destination) = change.endpoint {
            peer.set_endpoint(Endpoint::new(destination));
        }
        if change.replace_allowed_ips {
            self.remove_allowed_ips(id);
        }
        in_ordinary_memory(|| {
            for AllowedIpChange { allowed_ip, remove } in change.allowed_ips {
                if remove {
                    self.remove_allowed_ip(id, allowed_ip);
                } else {
                    self.insert_allowed_ip(id, allowed_ip);
                }
            }
        });
        let switched_on = match change.persistent_keepalive_interval {
            Some(seconds) => {
                let before = peer.timers.persistent_keepalive_interval();
                peer.timers.set_persistent_keepalive_interval(seconds);
                before == 0 && seconds != 0
            }
            None => false,
        };
        let wanted = if switched_on { Pending::STAGED_AND_KEEPALIVE } else { Pending::STAGED };
        self.queue_pending(id, wanted);
        self.reschedule(id);
    }

    pub(super) fn is_our_key(&self, public_key: &PublicKey) -> bool {
        self.identity.as_ref().is_some_and(|identity| identity.keys.public_key() == public_key)
    }

    pub(super) fn create_peer(&mut self, public_key: PublicKey) -> PeerId {
        let id = self.next_id;
        self.next_id = PeerId(id.0 + 1);
        let entry = Box::new(PeerEntry {
            peer: in_ordinary_memory(|| Arc::new(Peer::new(id, public_key))),
            handshake: Handshake::new(public_key),
            cookie: CookieGenerator::new(&public_key),
            allowed_ips: BTreeMap::new(),
            last_handshake: Duration::ZERO,
            unanswered: 0,
            unconfirmed: 0,
            pending: Pending::default(),
            queued_at: None,
        });
        entry.peer.timers.set_parameters(&self.timer_parameters);
        in_ordinary_memory(|| {
            self.peers.insert(id, entry);
            self.by_key.insert(public_key, id);
        });
        id
    }

    /// Removes a peer with its indices, keypairs, staged packets and allowed IPs.
    fn remove_peer(&mut self, id: PeerId) {
        self.remove_allowed_ips(id);
        if let Some(entry) = self.entry(id) {
            // Before the keypairs are cleared, so that no worker stores anything afterwards.
            entry.peer.retire();
        }
        self.quiesce(id);
        let Some(entry) = present(self.peers.remove(&id), PEER_EXISTS) else { return };
        if let Some(at) = entry.queued_at {
            self.timer_queue.remove(&(at, id));
        }
        self.by_key.remove(entry.peer.public_key());
    }

    /// Adds an allowed IP to a peer, and removes it from the peer that had it.
    pub(super) fn insert_allowed_ip(&mut self, id: PeerId, allowed_ip: AllowedIp) {
        let order = self.next_order;
        let Some(entry) = present(self.entry_mut(id), PEER_EXISTS) else { return };
        entry.allowed_ips.insert(order, allowed_ip);
        let owner = AllowedIpOwner { peer: Arc::clone(&entry.peer), order };
        self.next_order += 1;
        if let Some(before) = self.allowed_ips.insert(allowed_ip, owner)
            && let Some(entry) = self.entry_mut(before.peer.id())
        {
            entry.allowed_ips.remove(&before.order);
        }
    }

    fn remove_allowed_ip(&mut self, id: PeerId, allowed_ip: AllowedIp) {
        let removed = self.allowed_ips.remove(allowed_ip, |owner| owner.peer.id() == id);
        if let (Some(owner), Some(entry)) = (removed, self.entry_mut(id)) {
            entry.allowed_ips.remove(&owner.order);
        }
    }

    fn remove_allowed_ips(&mut self, id: PeerId) {
        let Some(entry) = present(self.entry_mut(id), PEER_EXISTS) else { return };
        for (_, allowed_ip) in core::mem::take(&mut entry.allowed_ips) {
            self.allowed_ips.remove(allowed_ip, |owner| owner.peer.id() == id);
        }
    }
}

impl PeerEntry {
    /// Its part of the answer to a `get`, without its allowed IPs.
    fn status(&self) -> PeerStatus {
        PeerStatus {
            public_key: *self.peer.public_key(),
            preshared_key: self.handshake.preshared_key().clone(),
            endpoint: self.peer.endpoint().map(|endpoint| endpoint.destination),
            last_handshake: self.last_handshake,
            rx_bytes: self.peer.rx_bytes(),
            tx_bytes: self.peer.tx_bytes(),
            persistent_keepalive_interval: self.peer.timers.persistent_keepalive_interval(),
            allowed_ips: Vec::new(),
        }
    }
}
