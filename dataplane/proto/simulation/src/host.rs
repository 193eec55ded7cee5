//! One device of a simulation, with the address it sends from and all that became of it.

use crate::dice::{Dice, SharedDice};
use crate::packet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use wgsep_proto::{
    AllowedIp, AllowedIpChange, Configuration, Device, DropCause, Event, Instant, Now,
    PeerConfiguration, PeerStatus, PrivateKey, PublicKey,
};

/// Which host of a simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostId(pub(super) usize);

/// The inner IPv4 address of the host with this number.
#[must_use]
pub fn inner_v4(number: usize) -> IpAddr {
    let [.., high, low] = (number + 1).to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(10, 0, high, low))
}

/// The inner IPv6 address of the host with this number.
#[must_use]
pub fn inner_v6(number: usize) -> IpAddr {
    let low = u16::try_from(number + 1).unwrap_or(u16::MAX);
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, low))
}

/// An allowed IP to give to a peer.
///
/// # Panics
/// If the length is not one of the address's family.
#[must_use]
pub fn allow(address: IpAddr, cidr: u8) -> AllowedIpChange {
    let Some(allowed_ip) = AllowedIp::new(address, cidr) else { panic!("{address}/{cidr}") };
    AllowedIpChange { allowed_ip, remove: false }
}

/// A host.
pub struct Host {
    /// The device under test.
    pub device: Device,
    /// Where its datagrams come from, and where it can be reached. A NAT may change it.
    pub address: SocketAddr,
    /// Its name.
    pub public_key: PublicKey,
    /// Where the device gets its random numbers.
    pub dice: SharedDice,
    /// Whether it answers echo requests.
    pub answers: bool,
    /// How many handshake messages it believes to be queued; see `Device::set_backlog`.
    pub waiting: usize,
    /// Packets that came out of the tunnel, and when.
    pub received: Vec<(Instant, Vec<u8>)>,
    /// The events of the device, with their times.
    pub events: Vec<(Instant, Event)>,
    number: usize,
}

impl Host {
    /// A host with a key of its own, up, with no peers.
    ///
    /// # Panics
    /// If the dice give the all-zero key.
    #[must_use]
    pub fn new(number: usize, address: SocketAddr, dice: &mut Dice, now: Now) -> Self {
        let Some(private_key) = PrivateKey::from_bytes(dice.bytes()) else { panic!("zero key") };
        let public_key = private_key.public_key();
        let shared = SharedDice::new(dice.roll());
        let mut device = Device::new(Box::new(shared.clone()));
        device.data_path().set_mtu(1420);
        let configuration =
            Configuration { private_key: Some(Some(private_key)), ..Configuration::default() };
        device.configure(configuration, now);
        device.set_up(true, now);
        Self {
            device,
            address,
            public_key,
            dice: shared,
            answers: true,
            waiting: 0,
            received: Vec::new(),
            events: Vec::new(),
            number,
        }
    }

    /// Its address inside the tunnel.
    #[must_use]
    pub fn inner_v4(&self) -> IpAddr {
        inner_v4(self.number)
    }

    /// Its address inside the tunnel.
    #[must_use]
    pub fn inner_v6(&self) -> IpAddr {
        inner_v6(self.number)
    }

    /// How another host configures this one as a peer: its inner addresses, its outer one.
    #[must_use]
    pub fn as_peer(&self) -> PeerConfiguration {
        let mut peer = PeerConfiguration::new(self.public_key);
        peer.endpoint = Some(self.address);
        peer.allowed_ips = vec![allow(self.inner_v4(), 32), allow(self.inner_v6(), 128)];
        peer
    }

    /// The state of a peer.
    ///
    /// # Panics
    /// If there is none of this key.
    #[must_use]
    pub fn peer(&self, public_key: &PublicKey) -> PeerStatus {
        let mut peers = self.device.peers();
        let Some(peer) = peers.find(|peer| peer.public_key == *public_key) else {
            panic!("no {public_key}")
        };
        peer
    }

    /// Tags of the echo replies that came out of the tunnel, in the order of arrival.
    #[must_use]
    pub fn replies(&self) -> Vec<u64> {
        self.tags(packet::is_reply)
    }

    /// Tags of the echo requests that came out of the tunnel, in the order of arrival.
    #[must_use]
    pub fn requests(&self) -> Vec<u64> {
        self.tags(|packet| !packet::is_reply(packet))
    }

    fn tags(&self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u64> {
        let packets = self.received.iter().map(|(_, packet)| packet);
        packets.filter(|packet| wanted(packet)).filter_map(|packet| packet::tag(packet)).collect()
    }

    /// Number of events that match `wanted`.
    #[must_use]
    pub fn count_events(&self, wanted: impl Fn(&Event) -> bool) -> usize {
        self.events.iter().filter(|(_, event)| wanted(event)).count()
    }

    /// Indices in use: one for each handshake under way and each keypair.
    #[must_use]
    pub fn indices(&self) -> usize {
        self.device.data_path().index_table.len()
    }

    /// Packets lost to a cause.
    #[must_use]
    pub fn drops(&self, cause: DropCause) -> u64 {
        self.device.data_path().drops.count(cause)
    }

    /// How long from `now` until a timer of the device is due.
    #[must_use]
    pub fn next_timeout(&self, now: Now) -> Option<Duration> {
        self.device.next_timeout().map(|at| at.since(now.instant))
    }
}
