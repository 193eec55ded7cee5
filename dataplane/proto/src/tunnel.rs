//! One peer, for programs that embed WireGuard: no sockets, no threads, no clock.

use crate::config::{AllowedIp, AllowedIpChange, Configuration, PeerConfiguration};
use crate::device::control_plane::{Event, PeerReport, StartHandshakeError};
use crate::device::{
    BatchError, Device, EncapsulateError, ReceivedPacket, ReceivedPackets, Transmit, Transmits,
};
use crate::invariant::present;
use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::path::data_path::{DropCause, DropCounters};
use crate::path::inbound::Receive;
use crate::random::Random;
use crate::session::peer::Endpoint;
use crate::time::{Instant, Now};
use crate::timer_parameters::TimerParameters;
use crate::wire::ip::Ecn;
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use core::ops::Range;

/// A tunnel to one peer, through which every address goes.
///
/// Feed it packets with [`Self::encapsulate`] and datagrams with [`Self::decapsulate`], call
/// [`Self::handle_timeout`] when [`Self::next_timeout`] says so, and after each of the three send
/// what [`Self::poll_transmit`] gives. The first two expire no timer, so look at [`Self::next_timeout`] also while packets or
/// datagrams come without a pause.
///
/// Where each copy counts, [`Self::encapsulate_into`] seals into a buffer of the caller's, and
/// [`Self::encapsulate_batch`] and [`Self::decapsulate_batch`] take many packets at once, which are then sealed and opened
/// several at a time on processors with AVX-512. Once the buffers have grown to what is used, no packet costs an allocation.
pub struct Tunnel {
    device: Device,
    peer: PublicKey,
}

/// Why there is no tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TunnelError {
    /// The peer's public key is our own.
    OwnKey,
}

impl fmt::Display for TunnelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OwnKey => "the peer has our own public key",
        })
    }
}

impl core::error::Error for TunnelError {}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, peer } = self;
        f.debug_struct("Tunnel").field("peer", peer).field("device", device).finish()
    }
}

impl Tunnel {
    /// Creates a tunnel between our private key and a peer's public key. Without an `endpoint` it waits for the
    /// peer's initiation.
    ///
    /// # Errors
    /// [`TunnelError::OwnKey`] if both keys are of one pair.
    pub fn new(
        private_key: PrivateKey,
        peer: PublicKey,
        preshared_key: Option<PresharedKey>,
        endpoint: Option<SocketAddr>,
        random: Box<dyn Random>,
    ) -> Result<Self, TunnelError> {
        let everything = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
        let public_key = peer;
        let mut peer = PeerConfiguration::new(public_key);
        peer.preshared_key = preshared_key;
        peer.endpoint = endpoint;
        peer.allowed_ips = everything
            .into_iter()
            .filter_map(|address| AllowedIp::new(address, 0))
            .map(|allowed_ip| AllowedIpChange { allowed_ip, remove: false })
            .collect();
        let mut device = Device::new(random);
        let start = Now { instant: Instant::from_nanos(0), wall: core::time::Duration::ZERO };
        let configuration = Configuration {
            private_key: Some(Some(private_key)),
            peers: vec![peer],
            ..Configuration::default()
        };
        device.configure(configuration, start);
        device.set_up(true, start);
        // A device has no peer with its own key.
        device.peer_id(&public_key).ok_or(TunnelError::OwnKey)?;
        Ok(Self { device, peer: public_key })
    }

    #[cfg(test)]
    pub(crate) const fn device(&self) -> &Device {
        &self.device
    }

    // ------------------------------------------------------------ settings

    /// Applies a change to the peer.
    fn change(&mut self, now: Now, change: impl FnOnce(&mut PeerConfiguration)) {
        let mut peer = PeerConfiguration::new(self.peer);
        peer.update_only = true;
        change(&mut peer);
        self.device.configure(Configuration { peers: vec![peer], ..Configuration::default() }, now);
    }

    /// Sets the seconds between persistent keepalives; 0 for none.
    pub fn set_persistent_keepalive(&mut self, seconds: u16, now: Now) {
        self.change(now, |peer| peer.persistent_keepalive_interval = Some(seconds));
    }

    /// Sets where the peer is, until an authentic datagram of it comes from elsewhere. A handshake that waits for an answer
    /// from another address goes on, and its next initiation goes to this one.
    pub fn set_endpoint(&mut self, endpoint: SocketAddr, now: Now) {
        self.change(now, |peer| peer.endpoint = Some(endpoint));
    }

    /// Sets the preshared key of the handshakes from now on; the default, all zeros, is none. A keypair that is in use stays
    /// in use.
    pub fn set_preshared_key(&mut self, preshared_key: PresharedKey, now: Now) {
        self.change(now, |peer| peer.preshared_key = Some(preshared_key));
    }

    /// Sets the times of the timers, from the next time that each is armed.
    pub fn set_timers(&mut self, parameters: TimerParameters) {
        self.device.set_timers(parameters);
    }

    /// Sets the MTU of the packets inside, which bounds their padding; 0, the default, for no bound. It is the MTU of the
    /// path less 60 over IPv4 and less 80 over IPv6, so usually 1420.
    pub fn set_mtu(&mut self, mtu: u32) {
        self.device.set_mtu(mtu);
    }

    // ------------------------------------------------------------ packets

    /// Sends an IP packet: its datagram comes out of [`Self::poll_transmit`]. Without a keypair the packet is staged and a
    /// handshake started. At most 128 packets are staged; the oldest are dropped first.
    ///
    /// # Errors
    /// Why the packet is dropped, which is counted.
    pub fn encapsulate(&mut self, packet: &[u8], now: Now) -> Result<(), DropCause> {
        self.device.encapsulate(packet, now)
    }

    /// Sends an IP packet, sealed into `datagram`, which has [`MAX_OVERHEAD`](crate::MAX_OVERHEAD) more bytes than the
    /// packet. The result is `None` while the packet waits for a handshake; its datagram comes out of
    /// [`Self::poll_transmit`] then, as does everything else that is to be sent.
    ///
    /// # Errors
    /// [`EncapsulateError::Dropped`] if the packet is dropped, which is counted;
    /// [`EncapsulateError::BufferTooShort`] if `datagram` is too short, and nothing was done.
    pub fn encapsulate_into<'d>(
        &mut self,
        packet: &[u8],
        datagram: &'d mut [u8],
        now: Now,
    ) -> Result<Option<Transmit<'d>>, EncapsulateError> {
        self.device.encapsulate_into(packet, datagram, now)
    }

    /// Sends the IP packets that lie in `memory` at the ranges `packets`, in ascending order. They are sealed into
    /// `datagrams`, which has [`MAX_OVERHEAD`](crate::MAX_OVERHEAD) more bytes for each packet, one directly behind the
    /// other. What waits for a handshake comes out of [`Self::poll_transmit`] then; what is dropped is counted.
    ///
    /// # Errors
    /// [`BatchError`] if a range or the memory for datagrams does not fit, and nothing was done.
    pub fn encapsulate_batch<'d>(
        &mut self,
        memory: &[u8],
        packets: &[Range<usize>],
        datagrams: &'d mut [u8],
        now: Now,
    ) -> Result<Transmits<'_, 'd>, BatchError> {
        self.device.encapsulate_batch(memory, packets, datagrams, now)
    }

    /// Takes a datagram that came from `source`, decrypting in place; returns the IP packet inside. The result is `None` for
    /// a keepalive and for a handshake message, whose answer comes out of [`Self::poll_transmit`]. A datagram that was cut off by
    /// a receive buffer that is too short is [`DropCause::Unauthentic`] or [`DropCause::InboundMalformed`]; 65,535 bytes
    /// are always enough.
    ///
    /// # Errors
    /// Why the datagram is dropped, which is counted.
    pub fn decapsulate<'d>(
        &mut self,
        source: SocketAddr,
        datagram: &'d mut [u8],
        now: Now,
    ) -> Result<Option<&'d mut [u8]>, DropCause> {
        let source = Endpoint::new(source);
        let received = self.device.decapsulate(source, Ecn::NOT_CAPABLE, datagram, now)?;
        Ok(received.map(|ReceivedPacket { packet, .. }| packet))
    }

    /// Takes the datagrams that lie in `memory` at ascending ranges, decrypting in place; returns the IP packets inside. Answers
    /// to handshake messages come out of [`Self::poll_transmit`]; what is dropped is counted.
    ///
    /// # Errors
    /// [`BatchError::InvalidRange`] if a range does not fit, and nothing was done.
    pub fn decapsulate_batch<'m>(
        &mut self,
        memory: &'m mut [u8],
        datagrams: &[Receive],
        now: Now,
    ) -> Result<ReceivedPackets<'_, 'm>, BatchError> {
        self.device.decapsulate_batch(memory, datagrams, now)
    }

    /// A datagram to send, if any.
    pub fn poll_transmit(&mut self) -> Option<Transmit<'_>> {
        self.device.poll_transmit()
    }

    // ------------------------------------------------------------ time

    /// When [`Self::handle_timeout`] is due; `None` if no timer is pending. Each of the other calls may change it.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        self.device.next_timeout()
    }

    /// Expires the timers that are due.
    pub fn handle_timeout(&mut self, now: Now) {
        self.device.handle_timeout(now);
    }

    /// Sends an initiation without a packet that needs one, as to find out whether the peer answers: see
    /// [`Self::poll_event`]. It is not required: the first packet starts a handshake, too.
    ///
    /// # Errors
    /// Why none is sent.
    pub fn start_handshake(&mut self, now: Now) -> Result<(), StartHandshakeError> {
        self.device.start_handshake(&self.peer, now)
    }

    /// Drops every keypair and handshake, and starts anew. It is to be called when this virtual machine was cloned or
    /// restored from a snapshot, so that another copy may use the same keys with the same nonces.
    pub fn vm_notification(&mut self, now: Now) {
        self.device.vm_notification(now);
    }

    // ------------------------------------------------------------ state

    /// The next event, if any: that a handshake completed or failed, the session expired or the endpoint changed. At most
    /// 256 are kept, of which the oldest are dropped first.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.device.poll_event()
    }

    /// The statistics and the state of the tunnel.
    #[must_use]
    pub fn report(&self, now: Instant) -> PeerReport {
        let report = present(self.device.report(&self.peer, now), "the peer is never removed");
        report.unwrap_or_else(|| PeerReport::unknown(self.peer))
    }

    /// The counters of dropped packets and datagrams, by cause.
    #[must_use]
    pub fn drops(&self) -> &DropCounters {
        self.device.drops()
    }

    /// The peer's public key.
    #[must_use]
    pub const fn peer(&self) -> &PublicKey {
        &self.peer
    }
}
