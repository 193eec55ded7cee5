//! A WireGuard interface on one thread, for a program that embeds it or a simulation: no sockets, no clock.
//!
//! [`control_plane`] is its part without packets, which a program with threads of its own drives by itself.

pub mod control_plane;

use crate::config::{Configuration, DeviceStatus, PeerStatus};
use crate::device::control_plane::{ControlPlane, Event, HandshakeTransmit};
use crate::invariant::part;
#[cfg(feature = "internals")]
use crate::path::data_path::DataPath;
use crate::path::data_path::{AllowedIpTable, DropCounters, Reader};
use crate::path::inbound::{InboundBatch, Receive};
use crate::path::outbound::{OutboundBatch, SealedRun, Whole};
use crate::session::peer::{Endpoint, PeerId};
use crate::time::{Instant, Now};
use crate::wire::ip::Ecn;
use core::ops::Range;
use std::collections::VecDeque;
use std::sync::Arc;

pub use control_plane::Random;

/// Bytes of datagrams that are sealed at once: more than the longest one has.
const DATAGRAMS_LEN: usize = 65_536;
/// Datagrams that are sealed at once.
const MAX_DATAGRAMS: usize = 128;

/// A datagram to send.
#[derive(Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub struct Transmit<'d> {
    /// Where to, and from where.
    pub endpoint: Endpoint,
    /// Traffic class of the outer header.
    pub traffic_class: u8,
    /// UDP payload.
    pub datagram: &'d mut [u8],
    /// The peer that it is counted for; `None` for a cookie reply, whose receiver need not be a peer.
    pub peer: Option<PeerId>,
}

/// Datagrams to send, in memory that is reused.
#[derive(Default)]
struct TransmitQueue {
    bytes: Vec<u8>,
    queued: VecDeque<QueuedDatagram>,
}

struct QueuedDatagram {
    endpoint: Endpoint,
    traffic_class: u8,
    bytes: Range<usize>,
    peer: Option<PeerId>,
}

impl TransmitQueue {
    fn push(
        &mut self,
        endpoint: Endpoint,
        traffic_class: u8,
        peer: Option<PeerId>,
        datagram: &[u8],
    ) {
        if self.queued.is_empty() {
            self.bytes.clear();
        }
        let start = self.bytes.len();
        self.bytes.extend_from_slice(datagram);
        let bytes = start..self.bytes.len();
        self.queued.push_back(QueuedDatagram { endpoint, traffic_class, bytes, peer });
    }

    fn pop(&mut self) -> Option<Transmit<'_>> {
        let QueuedDatagram { endpoint, traffic_class, bytes, peer } = self.queued.pop_front()?;
        let datagram = self.bytes.get_mut(bytes)?;
        Some(Transmit { endpoint, traffic_class, datagram, peer })
    }

    fn clear(&mut self) {
        self.queued.clear();
    }
}

/// A WireGuard interface with any number of peers.
///
/// Feed it packets with [`Self::encapsulate`] and datagrams with [`Self::decapsulate`], call
/// [`Self::handle_timeout`] when [`Self::next_timeout`] says so, and after each call send what
/// [`Self::poll_transmit`] gives.
pub struct Device {
    control: ControlPlane,
    allowed_ips: Reader<AllowedIpTable>,
    outbound: OutboundBatch<Whole>,
    inbound: InboundBatch,
    /// Where datagrams are sealed.
    datagrams: Box<[u8]>,
    transmits: TransmitQueue,
    backlog: usize,
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
            outbound: OutboundBatch::with_capacity(1, MAX_DATAGRAMS),
            inbound: InboundBatch::with_capacity(1, 1),
            datagrams: vec![0; DATAGRAMS_LEN].into_boxed_slice(),
            transmits: TransmitQueue::default(),
            backlog: 0,
        }
    }

    /// Its part without packets.
    #[cfg(feature = "internals")]
    #[must_use]
    pub const fn control_plane(&self) -> &ControlPlane {
        &self.control
    }

    /// Applies a configuration, all of it.
    pub fn configure(&mut self, configuration: Configuration, now: Now) {
        self.control.configure(configuration);
        self.flush(now);
    }

    /// Sets whether the link is up. Link up sends staged packets and persistent keepalives; link down drops all
    /// keypairs, handshakes, staged packets and datagrams, and stops the timers.
    pub fn set_up(&mut self, up: bool, now: Now) {
        self.control.set_up(up);
        if !up {
            self.transmits.clear();
        }
        self.flush(now);
    }

    /// Handles that this virtual machine was cloned or restored from a snapshot, so that another copy may use the
    /// same keys with the same nonces. Drops every keypair, handshake and cookie, and initiates new handshakes.
    pub fn vm_notification(&mut self, now: Now) {
        self.transmits.clear();
        self.control.vm_notification(now);
        self.flush(now);
    }

    /// Sets how many handshake messages the caller has received and not yet handed over. Many of them mean that
    /// the interface is under load, and requires cookies.
    pub const fn set_backlog(&mut self, messages: usize) {
        self.backlog = messages;
    }

    /// Sends a packet from the TUN side: datagrams come out of [`Self::poll_transmit`], now or when a
    /// handshake has completed. A packet that cannot be sent is counted as dropped.
    pub fn encapsulate(&mut self, packet: &[u8], now: Now) {
        let Self { control, allowed_ips, outbound, datagrams, .. } = self;
        let data_path = control.data_path();
        allowed_ips.refresh(&data_path.allowed_ips);
        let packets = [(0..packet.len(), Whole::new)];
        // No caller has a use for the ICMP errors.
        let answer = |_: &[u8]| ();
        outbound.route(data_path, allowed_ips.value(), packet, packets, now.instant, answer);
        outbound.reserve_nonces(data_path, packet, datagrams, now.instant);
        self.send(packet);
        self.flush(now);
    }

    /// Takes a datagram from the network, decrypting in place; returns the packet for the TUN side.
    pub fn decapsulate<'d>(
        &mut self,
        source: Endpoint,
        ecn: Ecn,
        datagram: &'d mut [u8],
        now: Now,
    ) -> Option<&'d [u8]> {
        let Self { control, allowed_ips, inbound, backlog, .. } = self;
        let data_path = Arc::clone(control.data_path());
        allowed_ips.refresh(&data_path.allowed_ips);
        inbound.clear();
        let (bytes, segment_len) = (0..datagram.len(), datagram.len());
        let receive = Receive { bytes, segment_len, endpoint: source, ecn };
        inbound.parse(&data_path, datagram, &[receive], |source, message| {
            control.receive_handshake(source, message, *backlog, now);
        });
        inbound.open(&data_path, datagram, now.instant);
        inbound.accept(&data_path, allowed_ips.value(), datagram, now.instant);
        let packet = inbound.accepted().next();
        inbound.clear();
        self.flush(now);
        packet.and_then(|packet| datagram.get(packet))
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
        self.flush(now);
    }

    /// Handles what other threads that use the data path requested. The other methods do so themselves.
    pub fn flush(&mut self, now: Now) {
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

    /// Seals what nonces are reserved for, and queues it.
    fn send(&mut self, memory: &[u8]) {
        let Self { control, outbound, datagrams, transmits, .. } = self;
        while outbound.seal(control.data_path(), memory, datagrams) {
            for SealedRun { peer, endpoint, datagrams: sealed } in outbound.sealed_runs() {
                for datagram in sealed {
                    let traffic_class = datagram.ecn.encapsulated().bits();
                    let bytes = part(datagrams, datagram.bytes.clone());
                    transmits.push(*endpoint, traffic_class, Some(peer.id()), bytes);
                    peer.add_tx(bytes.len() as u64, 1);
                }
            }
        }
        outbound.clear();
    }

    /// A datagram to send, if any.
    pub fn poll_transmit(&mut self) -> Option<Transmit<'_>> {
        self.transmits.pop()
    }

    /// Uncounts a datagram that the network refused, by the peer and the length of its [`Transmit`].
    pub fn transmit_failed(&mut self, peer: Option<PeerId>, len: usize) {
        self.control.transmit_failed(peer, len);
    }

    /// The next event for the log, if any.
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

    /// Sets the MTU of the interface, which bounds the padding of packets; 0 for none.
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
