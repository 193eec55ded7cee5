//! A WireGuard interface on one thread, for a program that embeds it or a simulation: no sockets, no clock.
//!
//! `control_plane` is its part without packets, which a program with threads of its own drives by itself.

pub mod control_plane;
mod packets;
mod transmit;

pub use packets::{BatchError, EncapsulateError, MAX_OVERHEAD, ReceivedPacket, ReceivedPackets};
pub use transmit::{Transmit, Transmits};

use crate::config::{Configuration, DeviceStatus, PeerStatus};
use crate::device::control_plane::{
    ControlPlane, Event, HandshakeTransmit, PeerReport, StartHandshakeError,
};
use crate::keys::PublicKey;
#[cfg(feature = "internals")]
use crate::path::data_path::DataPath;
use crate::path::data_path::{AllowedIpTable, DropCounters, Reader};
use crate::path::inbound::InboundBatch;
use crate::path::outbound::{OutboundBatch, Whole};
use crate::random::Random;
use crate::session::peer::PeerId;
use crate::time::{Instant, Now};
use crate::timer_parameters::TimerParameters;
use core::fmt;
use core::ops::Range;
#[cfg(feature = "internals")]
use std::sync::Arc;
use transmit::{Queued, TransmitQueue};

/// Bytes of datagrams that are sealed at once: more than the longest one has.
const DATAGRAMS_LEN: usize = 65_536;
/// Datagrams that are sealed at once without a further allocation.
const DATAGRAMS: usize = 128;

/// A WireGuard interface with any number of peers.
///
/// [`Self::configure`] it and set it up with [`Self::set_up`] first: a device that is down stages packets for its peers without an
/// error, sends nothing, and ignores what comes in.
///
/// ```
/// use std::time::Duration;
/// use wgsep_proto::{AllowedIp, AllowedIpChange, Configuration, Device, Instant, Now};
/// use wgsep_proto::{PeerConfiguration, PrivateKey, Random};
///
/// # struct SystemRandom;
/// # impl Random for SystemRandom {
/// #     fn fill(&mut self, bytes: &mut [u8]) { bytes.fill(7); }
/// # }
/// # let ours = PrivateKey::from_bytes([1; 32]).ok_or("no key")?;
/// # let theirs = PrivateKey::from_bytes([2; 32]).ok_or("no key")?.public_key();
/// # let now = Now { instant: Instant::from_nanos(1), wall: Duration::from_secs(1_800_000_000) };
/// let mut peer = PeerConfiguration::new(theirs);
/// peer.endpoint = Some("192.0.2.1:51820".parse()?);
/// let allowed_ip: AllowedIp = "10.0.0.2/32".parse()?;
/// peer.allowed_ips.push(AllowedIpChange { allowed_ip, remove: false });
///
/// let mut device = Device::new(Box::new(SystemRandom));
/// let private_key = Some(Some(ours));
/// device.configure(Configuration { private_key, peers: vec![peer], ..Default::default() }, now);
/// device.set_up(true, now);
/// let id = device.peer_id(&theirs).ok_or("its key is our own")?;
///
/// let mut packet = [0; 20]; // IPv4, from 0.0.0.0 to 10.0.0.2
/// (packet[0], packet[3]) = (0x45, 20);
/// packet[16..].copy_from_slice(&[10, 0, 0, 2]);
/// device.encapsulate(&packet, now)?;
/// let initiation = device.poll_transmit().ok_or("nothing to send")?;
/// assert_eq!((initiation.peer, initiation.datagram.len()), (Some(id), 148));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Feed it packets with [`Self::encapsulate`] and datagrams with [`Self::decapsulate`], call
/// [`Self::handle_timeout`] when [`Self::next_timeout`] says so, and after each call send what
/// [`Self::poll_transmit`] gives. No other call expires a timer, so look at [`Self::next_timeout`] also while packets come
/// without a pause.
///
/// [`Self::encapsulate_into`] and [`Self::encapsulate_batch`] seal into the caller's memory instead of a queue.
pub struct Device {
    control: ControlPlane,
    allowed_ips: Reader<AllowedIpTable>,
    outbound: OutboundBatch<Whole>,
    inbound: InboundBatch,
    /// Where datagrams are sealed.
    datagrams: Box<[u8]>,
    transmits: TransmitQueue,
    /// The datagrams of the latest call that sealed into the caller's memory.
    sealed: Vec<Queued>,
    /// The packets of the latest batch that came in, and their peers.
    received: Vec<(PeerId, Range<usize>)>,
    backlog: usize,
}

impl fmt::Debug for Device {
    /// Whether it is up, and what it dropped: nothing secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut device = f.debug_struct("Device");
        device.field("up", &self.is_up()).field("drops", self.drops()).finish_non_exhaustive()
    }
}

impl Device {
    /// An interface with no key and no peers, down.
    #[must_use]
    pub fn new(random: Box<dyn Random>) -> Self {
        Self::of(ControlPlane::new(random))
    }

    /// An interface that goes on from a control plane, such as one that was restored.
    #[cfg(feature = "internals")]
    #[must_use]
    pub fn with_control_plane(control: ControlPlane) -> Self {
        Self::of(control)
    }

    fn of(control: ControlPlane) -> Self {
        Self {
            allowed_ips: control.data_path().allowed_ips.reader(),
            control,
            outbound: OutboundBatch::with_capacity(1, DATAGRAMS)
                .without_limit()
                .with_keystream_cache(),
            inbound: InboundBatch::with_capacity(1, 1).with_keystream_cache(),
            datagrams: vec![0; DATAGRAMS_LEN].into_boxed_slice(),
            transmits: TransmitQueue::default(),
            sealed: Vec::new(),
            received: Vec::new(),
            backlog: 0,
        }
    }

    /// Its part without packets.
    #[cfg(feature = "internals")]
    #[must_use]
    pub const fn control_plane(&self) -> &ControlPlane {
        &self.control
    }

    /// Applies a configuration, all of it. It cannot fail, and three changes are left out without a word, as by the kernel's
    /// WireGuard: a peer whose public key is that of the device's own private key is not created, or removed when the
    /// private key is set; a change with `update_only` to a peer that is unknown is ignored; and so is the removal of one.
    /// [`Self::peer_id`] tells whether a peer is there.
    pub fn configure(&mut self, configuration: Configuration, now: Now) {
        self.control.configure(configuration);
        self.send_pending(now);
    }

    /// Sets whether the link is up. Link up sends staged packets and persistent keepalives; link down drops all
    /// keypairs, handshakes, staged packets and datagrams, and stops the timers.
    pub fn set_up(&mut self, up: bool, now: Now) {
        self.control.set_up(up);
        if !up {
            self.transmits.clear();
        }
        self.send_pending(now);
    }

    /// Handles that this virtual machine was cloned or restored from a snapshot, so that another copy may use the
    /// same keys with the same nonces. Drops every keypair, handshake and cookie, and initiates new handshakes.
    pub fn vm_notification(&mut self, now: Now) {
        self.transmits.clear();
        self.control.vm_notification(now);
        self.send_pending(now);
    }

    /// Sets how many handshake messages the caller has received and not yet handed over. Many of them mean that
    /// the interface is under load, and requires cookies.
    pub const fn set_backlog(&mut self, messages: usize) {
        self.backlog = messages;
    }

    /// When [`Self::handle_timeout`] is due; `None` if no timer is pending. It is in the past while more is due than
    /// one call handles.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        self.control.next_timeout()
    }

    /// Expires timers that are due, and sends what they cause. The work of one call is bounded, to
    /// 16 peers: [`Self::next_timeout`] is in the past until nothing is left.
    pub fn handle_timeout(&mut self, now: Now) {
        self.control.handle_timeout(now);
        self.send_pending(now);
    }

    /// Handles what other threads that use the data path requested. The other methods do so themselves.
    #[cfg(feature = "internals")]
    pub fn flush(&mut self, now: Now) {
        self.send_pending(now);
    }

    fn send_pending(&mut self, now: Now) {
        self.send_due(now);
        // Nothing of a keypair is left once it was released.
        let index_table = &self.control.data_path().index_table;
        self.inbound.forget_released(index_table);
        self.outbound.forget_released(index_table);
    }

    fn send_due(&mut self, now: Now) {
        // As after almost every packet.
        if self.control.is_settled() {
            return;
        }
        let mut most = control_plane::PEERS_PER_ROUND;
        loop {
            if self.control.data_path().vm_generation_changed() {
                // Sealed with keys that are about to be dropped.
                self.transmits.clear();
            }
            self.control.handle_dirty_peers(&mut most, now);
            while let Some(transmit) = self.control.poll_transmit() {
                let HandshakeTransmit { endpoint, traffic_class, datagram, peer } = transmit;
                self.transmits.push(endpoint, traffic_class, peer, &datagram);
            }
            let Some(peer) = self.control.poll_staged() else { return };
            self.outbound.reserve_staged(self.control.data_path(), peer, now.instant);
            self.send(&[]);
        }
    }

    /// A datagram to send, if any.
    pub fn poll_transmit(&mut self) -> Option<Transmit<'_>> {
        self.transmits.pop()
    }

    /// Sends an initiation to a peer without a packet that needs one. It is not required: the first packet starts a
    /// handshake, too.
    ///
    /// # Errors
    /// Why none is sent.
    pub fn start_handshake(
        &mut self,
        peer: &PublicKey,
        now: Now,
    ) -> Result<(), StartHandshakeError> {
        let id = self.control.peer_id(peer).ok_or(StartHandshakeError::UnknownPeer)?;
        self.control.start_handshake(id, now)?;
        self.send_pending(now);
        Ok(())
    }

    /// Sets the times of the timers of all peers, from the next time that each is armed.
    pub fn set_timers(&mut self, parameters: TimerParameters) {
        self.control.set_timer_parameters(parameters);
    }

    /// Uncounts a datagram that the network refused, by the peer and the length of its [`Transmit`].
    pub fn transmit_failed(&mut self, peer: Option<PeerId>, len: usize) {
        self.control.transmit_failed(peer, len);
    }

    /// The next event, if any: a line for a log by its `Display`. At most 256 are kept, of which the oldest are dropped
    /// first.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.control.poll_event()
    }

    /// True between link up and link down.
    #[must_use]
    pub const fn is_up(&self) -> bool {
        self.control.is_up()
    }

    /// The interface's own configuration.
    #[must_use]
    pub fn status(&self) -> DeviceStatus {
        self.control.status()
    }

    /// The configuration and the state of each peer.
    pub fn peers(&self) -> impl Iterator<Item = PeerStatus> {
        self.control.peers()
    }

    /// The statistics and the state of a peer; `None` if there is none with this key.
    #[must_use]
    pub fn report(&self, peer: &PublicKey, now: Instant) -> Option<PeerReport> {
        self.control.report(self.control.peer_id(peer)?, now)
    }

    /// The statistics and the state of each peer, in the order of creation.
    pub fn reports(&self, now: Instant) -> impl Iterator<Item = PeerReport> {
        self.control.reports(now)
    }

    /// The public key of a peer, which is `None` after its removal.
    #[must_use]
    pub fn public_key(&self, peer: PeerId) -> Option<PublicKey> {
        self.control.public_key(peer)
    }

    /// The number of the peer with a public key.
    #[must_use]
    pub fn peer_id(&self, public_key: &PublicKey) -> Option<PeerId> {
        self.control.peer_id(public_key)
    }

    /// Sets the MTU of the interface, which bounds the padding of packets; 0 for none. It is the MTU of the path less 60 over
    /// IPv4 and less 80 over IPv6, so usually 1420.
    pub fn set_mtu(&self, mtu: u32) {
        self.control.data_path().set_mtu(mtu);
    }

    /// The counters of dropped packets.
    #[must_use]
    pub fn drops(&self) -> &DropCounters {
        &self.control.data_path().drops
    }

    /// The state that the packet path shares, for threads that send and receive beside this one.
    #[must_use]
    #[cfg(feature = "internals")]
    pub const fn data_path(&self) -> &Arc<DataPath> {
        self.control.data_path()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::PrivateKey;
    use crate::session::keypair::Keypair;
    use crate::session::timers::ZERO_KEY_MATERIAL_TIME;
    use crate::tunnel::Tunnel;
    use core::time::Duration;
    use std::sync::{Arc, Weak};

    struct Counting(u8);

    impl Random for Counting {
        fn fill(&mut self, bytes: &mut [u8]) {
            for byte in bytes {
                self.0 = self.0.wrapping_add(1);
                *byte = self.0;
            }
        }
    }

    fn at(seconds: u64) -> Now {
        let wall = Duration::from_secs(1_800_000_000 + seconds);
        Now { instant: Instant::from_nanos(0).after(Duration::from_secs(seconds)), wall }
    }

    /// Carries datagrams between two ends until none is left.
    fn exchange(ends: &mut [Tunnel; 2], now: Now) {
        let mut idle = 0;
        for from in [0, 1].into_iter().cycle() {
            let source = ([192, 0, 2, from as u8], 7).into();
            let sent = ends[from].poll_transmit().map(|transmit| transmit.datagram.to_vec());
            match sent {
                Some(mut datagram) => {
                    ends[1 - from].decapsulate(source, &mut datagram, now).unwrap();
                    idle = 0;
                }
                None if idle == 2 => return,
                None => idle += 1,
            }
        }
    }

    /// Sends packets from one end to the other; returns the keypairs with which they were sealed and opened.
    fn carry(ends: &mut [Tunnel; 2], now: Now) -> [Weak<Keypair>; 2] {
        let mut packet = [0; 20];
        (packet[0], packet[3]) = (0x45, 20);
        let [a, b] = ends;
        let mut datagram = [0; 20 + MAX_OVERHEAD];
        let mut index = 0;
        for _ in 0..3 {
            let transmit = a.encapsulate_into(&packet, &mut datagram, now).unwrap().unwrap();
            index = u32::from_le_bytes(*transmit.datagram[4..].first_chunk().unwrap());
            b.decapsulate(([192, 0, 2, 0], 7).into(), transmit.datagram, now).unwrap().unwrap();
        }
        let (_, opening) =
            b.device().control.data_path().index_table.lookup_keypair(index).unwrap();
        let own = opening.receiver_index();
        let (_, sealing) = a.device().control.data_path().index_table.lookup_keypair(own).unwrap();
        [sealing, opening].map(|keypair| Arc::downgrade(&keypair))
    }

    /// Two ends that completed a handshake after a second.
    fn established() -> [Tunnel; 2] {
        let keys = [1, 2].map(|key| PrivateKey::from_bytes([key; 32]).unwrap());
        let publics = [keys[1].public_key(), keys[0].public_key()];
        let mut number = 0;
        let mut ends = keys.map(|key| {
            let endpoint = Some(([192, 0, 2, 1 - number as u8], 7).into());
            let random = Box::new(Counting(100 * number as u8));
            number += 1;
            Tunnel::new(key, publics[number - 1], None, endpoint, random).unwrap()
        });
        ends[0].start_handshake(at(1)).unwrap();
        exchange(&mut ends, at(1));
        ends
    }

    /// Whether there is keystream to seal at one end, and to open at the other.
    fn has_keystream(ends: &[Tunnel; 2]) -> [bool; 2] {
        let [a, b] = ends.each_ref().map(Tunnel::device);
        [a.outbound.has_keystream(), b.inbound.has_keystream()]
    }

    /// A device keeps the keypairs of its latest packets, and keystream of the next, but not longer than they are in use.
    #[test]
    fn no_keypair_of_the_latest_packets_outlives_its_release() {
        let is_erased =
            |keypairs: [Weak<Keypair>; 2]| keypairs.map(|keypair| keypair.upgrade().is_none());
        let mut ends = established();
        let displaced = carry(&mut ends, at(2));
        assert_eq!(is_erased(displaced.clone()), [false; 2]);
        assert_eq!(has_keystream(&ends), [wgsep_aead::uses_vectors(); 2]);
        for seconds in [100, 200] {
            ends[0].start_handshake(at(seconds)).unwrap();
            exchange(&mut ends, at(seconds));
        }
        assert_eq!(is_erased(displaced), [true; 2]);
        let expired = carry(&mut ends, at(201));
        let late = at(201 + ZERO_KEY_MATERIAL_TIME.as_secs());
        ends.iter_mut().for_each(|end| end.handle_timeout(late));
        assert_eq!((is_erased(expired), has_keystream(&ends)), ([true; 2], [false; 2]));
        let mut ends = established();
        let cloned = carry(&mut ends, at(2));
        ends.iter_mut().for_each(|end| end.vm_notification(at(3)));
        assert_eq!((is_erased(cloned), has_keystream(&ends)), ([true; 2], [false; 2]));
    }
}
