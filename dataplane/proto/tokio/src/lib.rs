//! A WireGuard interface on a UDP socket of tokio.
//!
//! [`UdpDevice`] is a [`wgsep_proto::Device`] with what that leaves to its caller: a socket, a clock, random numbers, and
//! the calls when timers are due. It has no TUN device: the packets that [`UdpDevice::recv`] returns and that
//! [`UdpDevice::send`] takes are the caller's. The examples take them from a TUN device, from other peers, and from a TCP
//! stack in the program.
//!
//! ```
//! use wgsep_tokio::proto::{
//!     AllowedIpChange, Configuration, PeerConfiguration, PrivateKey, SystemRandom,
//! };
//! use wgsep_tokio::{MAX_DATAGRAM, UdpDevice};
//!
//! /// Prints the lengths of the packets that a peer sends, with this key and that of the peer.
//! async fn run(private_key: &str, public_key: &str) -> Result<(), Box<dyn std::error::Error>> {
//!     let mut peer = PeerConfiguration::new(public_key.parse()?);
//!     peer.endpoint = Some("192.0.2.1:51820".parse()?);
//!     let allowed_ip = "198.51.100.1/32".parse()?;
//!     peer.allowed_ips.push(AllowedIpChange { allowed_ip, remove: false });
//!     let configuration = Configuration {
//!         private_key: Some(Some(private_key.parse()?)),
//!         peers: vec![peer],
//!         ..Configuration::default()
//!     };
//!     let mut udp = UdpDevice::bind(configuration, "0.0.0.0:0".parse()?).await?;
//!     let mut buffer = vec![0; MAX_DATAGRAM];
//!     loop {
//!         println!("{} bytes", udp.recv(&mut buffer).await?.packet.len());
//!     }
//! }
//! # let _ = (run, PrivateKey::generate(&mut SystemRandom));
//! ```
#![forbid(unsafe_code)]

mod clock;

/// The program of the README is code that compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

pub use clock::Clock;
pub use wgsep_proto as proto;

use std::io;
use std::net::{IpAddr, SocketAddr};
use tokio::net::UdpSocket;
use tokio::time::sleep;
use wgsep_proto::{
    Configuration, Device, DropCause, Ecn, Endpoint, Event, PeerId, PeerReport, PublicKey,
    StartHandshakeError, SystemRandom,
};

/// Bytes that hold any datagram, and so any packet that was in one.
pub const MAX_DATAGRAM: usize = 65_535;

/// An IP packet of a peer.
#[derive(Debug, PartialEq, Eq)]
pub struct Received<'b> {
    /// Who sent it, and is entitled to its source address. [`Device::public_key`] has the key.
    pub peer: PeerId,
    /// The packet.
    pub packet: &'b mut [u8],
}

/// A WireGuard interface, and the UDP socket of its datagrams.
///
/// Timers, handshakes, keepalives and roaming run while [`Self::recv`] is awaited, so that a program awaits it all the
/// time, beside whatever gives it packets to send. The ECN bits and the DSCP of outer headers are not set.
pub struct UdpDevice {
    device: Device,
    socket: UdpSocket,
    clock: Clock,
    /// A datagram that the socket had no space for, and where it goes.
    unsent: Option<(SocketAddr, Vec<u8>)>,
    is_v6: bool,
}

impl UdpDevice {
    /// Binds a socket for an interface with this configuration, and takes the interface up. Bound to `[::]` it has
    /// peers over IPv6 and IPv4, and to an address of IPv4 only over that.
    ///
    /// # Errors
    ///
    /// If the address cannot be bound.
    pub async fn bind(configuration: Configuration, address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address).await?;
        let (mut device, clock) = (Device::new(Box::new(SystemRandom)), Clock::start());
        device.configure(configuration, clock.now());
        device.set_up(true, clock.now());
        Ok(Self { device, socket, clock, unsent: None, is_v6: address.is_ipv6() })
    }

    /// The address that the socket is bound to.
    ///
    /// # Errors
    ///
    /// If the system does not give it.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The interface, to read its configuration and counters.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// What is known of a peer at this moment: its state, handshakes, bytes and packets.
    #[must_use]
    pub fn report(&self, peer: &PublicKey) -> Option<PeerReport> {
        self.device.report(peer, self.clock.now().instant)
    }

    /// Changes the interface, and sends what that causes.
    pub async fn configure(&mut self, configuration: Configuration) {
        self.device.configure(configuration, self.clock.now());
        self.transmit().await;
    }

    /// Sets the MTU of the packets inside, in bytes, which bounds their padding; 0, as at first, is no bound. It is the MTU
    /// of the path less 60 over IPv4 and less 80 over IPv6, so usually 1420.
    pub fn set_mtu(&self, mtu: u32) {
        self.device.set_mtu(mtu);
    }

    /// Starts a handshake with a peer, before there is a packet for it.
    ///
    /// # Errors
    ///
    /// Why none is sent.
    pub async fn start_handshake(&mut self, peer: &PublicKey) -> Result<(), StartHandshakeError> {
        let started = self.device.start_handshake(peer, self.clock.now());
        self.transmit().await;
        started
    }

    /// Drops every keypair and handshake, and starts anew. It is to be called when this virtual machine was cloned or
    /// restored from a snapshot, so that another copy may use the same keys with the same nonces.
    pub async fn vm_notification(&mut self) {
        self.device.vm_notification(self.clock.now());
        self.transmit().await;
    }

    /// Sends an IP packet to the peer that has its destination among its allowed IPs, once there is a keypair.
    ///
    /// # Errors
    ///
    /// Why the packet is dropped, which is counted. A program that forwards packets need not look at it.
    pub async fn send(&mut self, packet: &[u8]) -> Result<(), DropCause> {
        let sent = self.device.encapsulate(packet, self.clock.now());
        self.transmit().await;
        sent
    }

    /// The next event, if any: that a handshake completed or failed, or an endpoint changed.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.device.poll_event()
    }

    /// Receives the next IP packet of a peer, into `buffer`, which is to be of [`MAX_DATAGRAM`] bytes.
    ///
    /// Cancel safe: no packet is lost if another branch of a `select!` completes first.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub async fn recv<'b>(&mut self, buffer: &'b mut [u8]) -> io::Result<Received<'b>> {
        let (peer, packet) = loop {
            self.transmit().await;
            let now = self.clock.now();
            let due = self.device.next_timeout().map(|at| at.since(now.instant));
            if due.is_some_and(|due| due.is_zero()) {
                self.device.handle_timeout(now);
                continue;
            }
            let timer = async {
                match due {
                    Some(due) => sleep(due).await,
                    None => std::future::pending().await,
                }
            };
            let received = tokio::select! {
                received = self.socket.recv_from(buffer) => received,
                () = timer => continue,
            };
            let (len, source) = match received {
                Ok(received) => received,
                // Windows says so of an earlier datagram that was sent.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => continue,
                Err(error) => return Err(error),
            };
            let start = buffer.as_ptr().addr();
            let Some(datagram) = buffer.get_mut(..len) else { continue };
            let source = Endpoint::new(source);
            let now = self.clock.now();
            let received = self.device.decapsulate(source, Ecn::NOT_CAPABLE, datagram, now);
            // What was dropped is counted.
            if let Ok(Some(received)) = received {
                let offset = received.packet.as_ptr().addr() - start;
                break (received.peer, offset..offset + received.packet.len());
            }
        };
        // Not awaited, or the packet would be lost if this were cancelled. The next call sends what is left.
        self.try_transmit();
        Ok(Received { peer, packet: &mut buffer[packet] })
    }

    /// Sends all datagrams that are ready. If it is cancelled, the rest is sent by the next call.
    async fn transmit(&mut self) {
        while !self.try_transmit() {
            // An error comes again with the datagram.
            let _ = self.socket.writable().await;
        }
    }

    /// Sends the datagrams that are ready, and returns false if the socket has no space for the next one.
    fn try_transmit(&mut self) -> bool {
        let is_full = |sent: io::Result<usize>| {
            sent.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        };
        if let Some((destination, datagram)) = &self.unsent {
            if is_full(self.socket.try_send_to(datagram, *destination)) {
                return false;
            }
            self.unsent = None;
        }
        while let Some(transmit) = self.device.poll_transmit() {
            let destination = transmit.endpoint.destination;
            let destination = if self.is_v6 { mapped(destination) } else { destination };
            match self.socket.try_send_to(transmit.datagram, destination) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.unsent = Some((destination, transmit.datagram.to_vec()));
                    return false;
                }
                // As if the network had lost it: there is no route at the moment, or the address is of another family.
                Err(_) => {
                    let (peer, len) = (transmit.peer, transmit.datagram.len());
                    self.device.transmit_failed(peer, len);
                }
            }
        }
        true
    }
}

/// An address as a socket of IPv6 takes it.
fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => (v4.to_ipv6_mapped(), address.port()).into(),
        IpAddr::V6(_) => address,
    }
}
