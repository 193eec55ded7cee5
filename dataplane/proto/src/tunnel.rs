//! One peer, for programs that embed WireGuard: no sockets, no threads, no clock.

use crate::config::{AllowedIp, AllowedIpChange, Configuration, PeerConfiguration};
use crate::device::{Device, Random, Transmit};
use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::session::peer::Endpoint;
use crate::time::{Instant, Now};
use crate::wire::ip::Ecn;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// A tunnel to one peer, through which every address goes.
///
/// Feed it packets with [`Self::encapsulate`] and datagrams with [`Self::decapsulate`], call
/// [`Self::handle_timeout`] when [`Self::next_timeout`] says so, and after each of the three send
/// what [`Self::poll_transmit`] gives.
pub struct Tunnel {
    device: Device,
    peer: PublicKey,
}

impl Tunnel {
    /// Creates a tunnel between our private key and a peer's public key. Without an `endpoint` it waits for the
    /// peer's initiation.
    #[must_use]
    pub fn new(
        private_key: PrivateKey,
        peer: PublicKey,
        preshared_key: Option<PresharedKey>,
        endpoint: Option<SocketAddr>,
        random: Box<dyn Random>,
    ) -> Self {
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
        Self { device, peer: public_key }
    }

    /// Sets the seconds between persistent keepalives; 0 for none.
    pub fn set_persistent_keepalive(&mut self, seconds: u16, now: Now) {
        let mut change = PeerConfiguration::new(self.peer);
        change.update_only = true;
        change.persistent_keepalive_interval = Some(seconds);
        self.device
            .configure(Configuration { peers: vec![change], ..Configuration::default() }, now);
    }

    /// Sends an IP packet; without a keypair it is staged and a handshake started.
    pub fn encapsulate(&mut self, packet: &[u8], now: Now) {
        self.device.encapsulate(packet, now);
    }

    /// Takes a datagram that came from `source`; returns the IP packet inside, if any.
    pub fn decapsulate<'d>(
        &mut self,
        source: SocketAddr,
        datagram: &'d mut [u8],
        now: Now,
    ) -> Option<&'d [u8]> {
        self.device.decapsulate(Endpoint::new(source), Ecn::NOT_CAPABLE, datagram, now)
    }

    /// When [`Self::handle_timeout`] is due; `None` if no timer is pending.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        self.device.next_timeout()
    }

    /// Expires the timers that are due.
    pub fn handle_timeout(&mut self, now: Now) {
        self.device.handle_timeout(now);
    }

    /// A datagram to send, if any.
    pub fn poll_transmit(&mut self) -> Option<Transmit<'_>> {
        self.device.poll_transmit()
    }
}
