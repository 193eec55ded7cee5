//! What an operator can set on a device and read back, in the types of the cross-platform UAPI.

use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use core::net::{IpAddr, SocketAddr};
use core::time::Duration;

/// An IP prefix, its host bits cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AllowedIp {
    address: IpAddr,
    cidr: u8,
}

impl AllowedIp {
    /// `address/cidr` with the host bits cleared; `None` if `cidr` is past 32 (IPv4) or 128 (IPv6).
    #[must_use]
    pub fn new(address: IpAddr, cidr: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(v4) => {
                let host_bits = 32u32.checked_sub(u32::from(cidr))?;
                IpAddr::V4((v4.to_bits() & u32::MAX.checked_shl(host_bits).unwrap_or(0)).into())
            }
            IpAddr::V6(v6) => {
                let host_bits = 128u32.checked_sub(u32::from(cidr))?;
                IpAddr::V6((v6.to_bits() & u128::MAX.checked_shl(host_bits).unwrap_or(0)).into())
            }
        };
        Some(Self { address, cidr })
    }

    /// The network address.
    #[must_use]
    pub const fn address(&self) -> IpAddr {
        self.address
    }

    /// The prefix length in bits.
    #[must_use]
    pub const fn cidr(&self) -> u8 {
        self.cidr
    }
}

/// One allowed IP of a `set`: added, or removed where the UAPI wrote a leading `-`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllowedIpChange {
    /// The prefix.
    pub allowed_ip: AllowedIp,
    /// True to take the prefix from this peer, false to give it.
    pub remove: bool,
}

/// A whole `set` transaction, parsed and checked; `ControlPlane::configure` applies it in one go.
#[derive(Clone, Default)]
pub struct Configuration {
    /// `private_key`: `Some(None)` clears it.
    pub private_key: Option<Option<PrivateKey>>,
    /// `listen_port`: 0 picks one.
    pub listen_port: Option<u16>,
    /// `fwmark`: 0 clears it.
    pub fwmark: Option<u32>,
    /// `replace_peers=true`: every peer goes first.
    pub replace_peers: bool,
    /// The peers' changes, in the order written. The same key may come more than once.
    pub peers: Vec<PeerConfiguration>,
}

/// The changes to one peer.
#[derive(Clone)]
pub struct PeerConfiguration {
    /// Which peer.
    pub public_key: PublicKey,
    /// `remove=true`.
    pub remove: bool,
    /// `update_only=true`: skip the peer if it does not exist.
    pub update_only: bool,
    /// `preshared_key`: all zeros clears it.
    pub preshared_key: Option<PresharedKey>,
    /// `endpoint`.
    pub endpoint: Option<SocketAddr>,
    /// `persistent_keepalive_interval` in seconds: 0 is off.
    pub persistent_keepalive_interval: Option<u16>,
    /// `replace_allowed_ips=true`: every allowed IP of the peer goes first.
    pub replace_allowed_ips: bool,
    /// `allowed_ip` lines in the order written.
    pub allowed_ips: Vec<AllowedIpChange>,
}

impl PeerConfiguration {
    /// A section that names a peer and changes nothing (creating the peer if it is new).
    #[must_use]
    pub const fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive_interval: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// A peer's state as `get` reports it.
#[derive(Clone)]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub struct PeerStatus {
    /// The peer's key.
    pub public_key: PublicKey,
    /// All zeros where none is set.
    pub preshared_key: PresharedKey,
    /// Where packets to the peer go.
    pub endpoint: Option<SocketAddr>,
    /// Since the epoch, of the last completed handshake; zero if none.
    pub last_handshake: Duration,
    /// UDP payload bytes received from the peer and authenticated.
    pub rx_bytes: u64,
    /// UDP payload bytes sent to the peer.
    pub tx_bytes: u64,
    /// Seconds; 0 is off.
    pub persistent_keepalive_interval: u16,
    /// In the order they were given.
    pub allowed_ips: Vec<AllowedIp>,
}

/// A device's state as `get` reports it, but for the peers.
#[derive(Clone)]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub struct DeviceStatus {
    /// Our key.
    pub private_key: Option<PrivateKey>,
    /// The UDP port in use, 0 if none.
    pub listen_port: u16,
    /// The mark on outgoing packets, 0 if none.
    pub fwmark: u32,
}
