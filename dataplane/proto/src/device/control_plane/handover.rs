//! Saving the state for another process, and restoring it there.
//!
//! Before it is saved, the caller stops all threads that send or receive, and handles all dirty peers. The receiver may
//! send nothing until the caller has promised never to send again: otherwise a nonce could be used twice.

use super::expiry::Pending;
use super::load::Load;
use super::{ControlPlane, Identity};
use crate::config::AllowedIp;
use crate::invariant::present;
use crate::keys::{PresharedKey, PrivateKey};
use crate::noise::cookie::CookieChecker;
use crate::noise::handshake::StaticIdentity;
use crate::path::data_path::DropCause;
use crate::saved::{self, ALLOWED_IPS_PER_RECORD, Record, Refused, Slot};
use crate::secret::{Secret, in_ordinary_memory};
use crate::session::index_table::Entry;
use crate::session::keypair::Keypair;
use crate::session::peer::{Endpoint, MAX_STAGED_PACKETS, Peer, PeerId, Source};
use crate::time::Instant;
use core::net::IpAddr;
use std::sync::Arc;

/// The longest packet that waits for a keypair, in bytes.
const MAX_PACKET_LEN: usize = u16::MAX as usize;

/// Restores a device from records.
pub struct Restore<'c> {
    control: &'c mut ControlPlane,
    /// The last peer.
    last: Option<PeerId>,
    records: u64,
    has_interface: bool,
    other_drops: Vec<(Vec<u8>, u64)>,
}

impl ControlPlane {
    /// Passes the whole state to `send`, record by record, with counters of the caller's own drops by their names.
    ///
    /// # Errors
    /// That of `send`, which then gets no more.
    pub fn save<E>(
        &self,
        other_drops: impl IntoIterator<Item = (&'static str, u64)>,
        mut send: impl FnMut(Record) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut records = 0;
        let mut count = |record| {
            records += 1;
            send(record)
        };
        let mut interface = self.save_interface();
        interface.drops.extend(other_drops.into_iter().map(|(name, count)| (name.into(), count)));
        count(Record::Interface(interface))?;
        for id in self.peers.keys() {
            self.save_peer(*id, &mut count)?;
        }
        send(Record::End { records })
    }

    /// Queues a peer whose staged packets could be sent and were not, so that they are sent where the state is restored.
    pub fn put_back_staged(&mut self, peer: &Peer) {
        if self.peers.contains_key(&peer.id()) {
            self.queue_pending(peer.id(), Pending::STAGED);
        }
    }

    fn save_interface(&self) -> saved::Interface {
        let secret = self.identity.as_ref().map(|identity| identity.cookie_checker.save());
        let (cookie_secret, cookie_secret_born) = secret.unwrap_or_default();
        let drops = DropCause::ALL
            .map(|cause| (cause.name().into(), self.data_path.drops.count(cause)))
            .into();
        let (load_since, refused) = self.load.save();
        saved::Interface {
            private_key: self
                .identity
                .as_ref()
                .map(|identity| Secret::new(*identity.private_key.as_bytes())),
            listen_port: self.listen_port,
            fwmark: self.fwmark,
            up: self.up,
            mtu: u32::try_from(self.data_path.mtu()).unwrap_or(0),
            no_private_key_logged: self.no_private_key_logged,
            cookie_secret,
            cookie_secret_born,
            load_since,
            refused,
            drops,
        }
    }

    fn save_peer<E>(
        &self,
        id: PeerId,
        send: &mut impl FnMut(Record) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(entry) = self.entry(id) else { return Ok(()) };
        let (cookie, cookie_born, last_mac1) = entry.cookie.save();
        let (state, handshakes) = (entry.peer.state(), *entry.peer.handshakes());
        let endpoint = state.endpoint;
        let source = endpoint.and_then(|endpoint| endpoint.source);
        send(Record::Peer(Box::new(saved::Peer {
            public_key: *entry.peer.public_key(),
            preshared_key: Secret::new(*entry.handshake.preshared_key().as_bytes()),
            destination: endpoint.map(|endpoint| endpoint.destination),
            source: source.map(|source| (source.address, source.interface)),
            rx_bytes: entry.peer.rx_bytes(),
            tx_bytes: entry.peer.tx_bytes(),
            rx_packets: state.rx_packets,
            tx_packets: entry.peer.tx_packets(),
            last_received: state.last_received.map(Instant::as_nanos),
            handshakes: handshakes.counters,
            round_trip: handshakes.round_trip,
            last_handshake: entry.last_handshake,
            unanswered: entry.unanswered,
            unconfirmed: entry.unconfirmed,
            pending: entry.pending.save(),
            cookie,
            cookie_born,
            last_mac1,
            handshake: entry.handshake.save(),
            timers: entry.peer.timers.save(),
        })))?;
        let allowed_ips: Vec<_> =
            entry.allowed_ips.values().map(|ip| (ip.address(), ip.cidr())).collect();
        for some in allowed_ips.chunks(ALLOWED_IPS_PER_RECORD) {
            send(Record::AllowedIps(some.to_vec()))?;
        }
        let keypairs = &state.keypairs;
        for (slot, keypair) in [
            (Slot::Previous, &keypairs.previous),
            (Slot::Current, &keypairs.current),
            (Slot::Next, &keypairs.next),
        ] {
            if let Some(keypair) = keypair {
                send(Record::Keypair(slot, Box::new(keypair.save())))?;
            }
        }
        state.staged.iter().try_for_each(|packet| send(Record::Staged(packet.to_vec())))
    }
}

impl<'c> Restore<'c> {
    /// Restores into a device that has no keys and no peers yet.
    #[must_use]
    pub const fn new(control: &'c mut ControlPlane) -> Self {
        Self { control, last: None, records: 0, has_interface: false, other_drops: Vec::new() }
    }

    /// Counters of drops that are not the protocol's, by name.
    #[must_use]
    pub fn other_drops(&self) -> &[(Vec<u8>, u64)] {
        &self.other_drops
    }

    /// Adds the next record; true after the last one.
    ///
    /// # Errors
    /// If no device has such a state. The caller then drops all of it.
    pub fn add_record(&mut self, record: Record) -> Result<bool, Refused> {
        match record {
            Record::Interface(interface) => self.interface(interface)?,
            _ if !self.has_interface => return Err(Refused("a record precedes the interface's")),
            Record::Peer(peer) => self.peer(*peer)?,
            Record::AllowedIps(allowed_ips) => self.allowed_ips(&allowed_ips)?,
            Record::Keypair(slot, keypair) => self.keypair(slot, &keypair)?,
            Record::Staged(packet) => self.staged(&packet)?,
            Record::End { records } if records == self.records => {
                self.finish();
                return Ok(true);
            }
            Record::End { .. } => return Err(Refused("records are missing")),
        }
        self.records += 1;
        Ok(false)
    }

    fn interface(&mut self, saved: saved::Interface) -> Result<(), Refused> {
        if core::mem::replace(&mut self.has_interface, true) {
            return Err(Refused("there are two interfaces"));
        }
        let control = &mut *self.control;
        let private_key = saved.private_key.map(|bytes| {
            PrivateKey::from_bytes(*bytes).ok_or(Refused("the private key is all zeros"))
        });
        control.identity = private_key.transpose()?.map(|private_key| {
            let keys = Arc::new(StaticIdentity::new(&private_key));
            let mut cookie_checker = CookieChecker::new(keys.public_key());
            cookie_checker.restore(saved.cookie_secret, saved.cookie_secret_born);
            Identity { private_key, keys, cookie_checker }
        });
        control.data_path.set_has_identity(control.identity.is_some());
        control.listen_port = saved.listen_port;
        control.fwmark = saved.fwmark;
        control.up = saved.up;
        control.data_path.set_mtu(saved.mtu);
        control.no_private_key_logged = saved.no_private_key_logged;
        control.load = Load::restore(saved.load_since, saved.refused);
        for (name, count) in saved.drops {
            let cause = DropCause::ALL.into_iter().find(|cause| cause.name().as_bytes() == name);
            match (cause, usize::try_from(count)) {
                (Some(cause), Ok(count)) => control.data_path.drops.add(cause, count),
                _ => self.other_drops.push((name, count)),
            }
        }
        Ok(())
    }

    fn peer(&mut self, saved: saved::Peer) -> Result<(), Refused> {
        let control = &mut *self.control;
        let public_key = saved.public_key;
        if control.has_peer(&public_key) {
            return Err(Refused("two peers have one key"));
        }
        if control.is_our_key(&public_key) {
            return Err(Refused("a peer has our key"));
        }
        let id = control.create_peer(public_key);
        self.last = Some(id);
        let Some(entry) = present(control.peers.get_mut(&id), "it was just created") else {
            return Ok(());
        };
        entry.last_handshake = saved.last_handshake;
        entry.unanswered = saved.unanswered;
        entry.unconfirmed = saved.unconfirmed;
        entry.cookie.restore(saved.cookie, saved.cookie_born, saved.last_mac1);
        entry.handshake.set_preshared_key(PresharedKey::from_bytes(*saved.preshared_key));
        let index = saved.handshake.initiation.as_ref().map(|initiation| initiation.sender_index);
        entry.handshake.restore(saved.handshake);
        if let Some(destination) = saved.destination {
            let source = saved.source.map(|(address, interface)| Source { address, interface });
            entry.peer.set_endpoint(Endpoint { source, ..Endpoint::new(destination) });
        }
        entry.peer.add_rx_bytes(saved.rx_bytes);
        entry.peer.add_tx(saved.tx_bytes, saved.tx_packets);
        {
            let mut handshakes = entry.peer.handshakes();
            handshakes.counters = saved.handshakes;
            handshakes.round_trip = saved.round_trip;
            let mut state = entry.peer.state();
            state.rx_packets = saved.rx_packets;
            state.last_received = saved.last_received.map(Instant::from_nanos);
        }
        entry.queued_at = entry.peer.timers.restore(&saved.timers);
        if let Some(at) = entry.queued_at {
            in_ordinary_memory(|| control.timer_queue.insert((at, id)));
        }
        if let Some(index) = index
            && !control.data_path.index_table.restore(index, Entry::Handshake(id))
        {
            return Err(TWICE);
        }
        entry.pending = Pending::restore(saved.pending);
        if entry.pending != Pending::default() {
            control.pending.push_back(id);
        }
        Ok(())
    }

    /// The last peer, of which the record is a part.
    fn last(&self) -> Result<PeerId, Refused> {
        self.last.ok_or(Refused("a record precedes its peer's"))
    }

    fn allowed_ips(&mut self, allowed_ips: &[(IpAddr, u8)]) -> Result<(), Refused> {
        let id = self.last()?;
        for (address, cidr) in allowed_ips {
            let allowed_ip = AllowedIp::new(*address, *cidr)
                .filter(|masked| masked.address() == *address)
                .ok_or(Refused("an allowed IP is no prefix"))?;
            in_ordinary_memory(|| self.control.insert_allowed_ip(id, allowed_ip));
        }
        Ok(())
    }

    fn keypair(&mut self, slot: Slot, saved: &saved::Keypair) -> Result<(), Refused> {
        let id = self.last()?;
        let Some(entry) = self.control.entry(id) else { return Ok(()) };
        let keypair = Keypair::restore(saved).ok_or(Refused("a replay window is none"))?;
        let (peer, keypair) = (Arc::clone(&entry.peer), Arc::new(keypair));
        let index = keypair.sender_index();
        let owner = Entry::Keypair(Arc::clone(&peer), Arc::clone(&keypair));
        if !self.control.data_path.index_table.restore(index, owner) {
            return Err(TWICE);
        }
        let keypairs = &mut peer.state().keypairs;
        let place = match slot {
            Slot::Previous => &mut keypairs.previous,
            Slot::Current => &mut keypairs.current,
            Slot::Next => &mut keypairs.next,
        };
        match place.replace(keypair) {
            None => Ok(()),
            Some(_) => Err(Refused("a peer has two keypairs of a kind")),
        }
    }

    fn staged(&self, packet: &[u8]) -> Result<(), Refused> {
        let id = self.last()?;
        let Some(entry) = self.control.entry(id) else { return Ok(()) };
        let staged = &mut entry.peer.state().staged;
        if packet.len() > MAX_PACKET_LEN || staged.len() == MAX_STAGED_PACKETS {
            return Err(Refused("more waits than may"));
        }
        staged.stage_packet(packet);
        Ok(())
    }

    fn finish(&self) {
        let Self { control, .. } = self;
        in_ordinary_memory(|| control.data_path.allowed_ips.replace(control.allowed_ips.clone()));
    }
}

const TWICE: Refused = Refused("an index is used twice");
