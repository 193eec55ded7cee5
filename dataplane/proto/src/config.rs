//! What an operator can set on a device and read back: what wg(8) knows, as types. There is no text to parse.

use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use core::fmt;
use core::net::{IpAddr, SocketAddr};
use core::str::FromStr;
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

/// Why a text is no prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AllowedIpError {
    /// What is before the `/` is no IP address.
    Address,
    /// What is behind the `/` is no number of bits, or more than the address has.
    Cidr,
}

impl fmt::Display for AllowedIpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Address => "not an IP address, as in 10.0.0.0/24 or 2001:db8::/32",
            Self::Cidr => "a prefix length is 0 to 32 bits for IPv4 and 0 to 128 for IPv6",
        })
    }
}

impl core::error::Error for AllowedIpError {}

impl FromStr for AllowedIp {
    type Err = AllowedIpError;

    /// Reads `10.0.0.0/24`, and clears the host bits. An address alone is of one host.
    fn from_str(text: &str) -> Result<Self, AllowedIpError> {
        let (address, cidr) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
        let address: IpAddr = address.parse().map_err(|_| AllowedIpError::Address)?;
        let cidr = match cidr {
            // A sign is no digit.
            Some(cidr) if cidr.bytes().all(|byte| byte.is_ascii_digit()) => {
                cidr.parse().map_err(|_| AllowedIpError::Cidr)?
            }
            Some(_) => return Err(AllowedIpError::Cidr),
            None if address.is_ipv4() => 32,
            None => 128,
        };
        Self::new(address, cidr).ok_or(AllowedIpError::Cidr)
    }
}

impl fmt::Display for AllowedIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.cidr)
    }
}

/// One allowed IP of a peer that is added or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllowedIpChange {
    /// The prefix.
    pub allowed_ip: AllowedIp,
    /// True to take the prefix from this peer, false to give it.
    pub remove: bool,
}

/// Changes to a device, which [`Device::configure`](crate::Device::configure) applies in one go. What is `None` stays as it is. The
/// code names are the keys of the cross-platform UAPI that mean the same.
#[derive(Clone, Default)]
pub struct Configuration {
    /// `private_key`: `Some(None)` clears it.
    pub private_key: Option<Option<PrivateKey>>,
    /// `listen_port`: kept and reported, no more; the socket is the program's.
    pub listen_port: Option<u16>,
    /// `fwmark`, 0 for none: kept and reported, no more; the program sets it on its socket.
    pub fwmark: Option<u32>,
    /// `replace_peers=true`: every peer goes first.
    pub replace_peers: bool,
    /// The peers' changes, which are applied in this order. The same key may come more than once.
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
    /// `allowed_ip`, applied in this order. A prefix moves to the peer that it was given last.
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

/// A peer's configuration and state.
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

/// A device's own configuration.
#[derive(Clone)]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub struct DeviceStatus {
    /// Our key.
    pub private_key: Option<PrivateKey>,
    /// The UDP port that was configured, 0 if none.
    pub listen_port: u16,
    /// The mark that was configured, 0 if none.
    pub fwmark: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_read_as_it_is_written_and_its_host_bits_are_cleared() {
        let read = |text: &str| text.parse::<AllowedIp>().map(|prefix| prefix.to_string());
        for (text, expected) in [
            ("10.0.0.0/24", "10.0.0.0/24"),
            ("10.0.0.7/24", "10.0.0.0/24"),
            ("10.0.0.7", "10.0.0.7/32"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:db8::1/32", "2001:db8::/32"),
            ("::1", "::1/128"),
        ] {
            assert_eq!(read(text), Ok(expected.to_owned()));
        }
        for text in ["", "/24", "10.0.0/24", "host/24", " 10.0.0.0/24"] {
            assert_eq!(read(text), Err(AllowedIpError::Address), "{text}");
        }
        for text in ["10.0.0.0/33", "::/129", "::/", "::/+8", "::/-1", "::/8/8", "::/256"] {
            assert_eq!(read(text), Err(AllowedIpError::Cidr), "{text}");
        }
    }
}
