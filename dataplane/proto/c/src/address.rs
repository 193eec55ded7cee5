//! Addresses of UDP.

use crate::status::wgsep_status;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// An address of UDP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct wgsep_address {
    /// 4 or 6.
    pub version: u8,
    /// The IP address, in network byte order; of IPv4, the first four bytes.
    pub ip: [u8; 16],
    /// The port, in the byte order of the machine.
    pub port: u16,
    /// The interface of a link-local address of IPv6, as in `sin6_scope_id`; otherwise 0.
    pub scope_id: u32,
}

impl From<SocketAddr> for wgsep_address {
    fn from(address: SocketAddr) -> Self {
        let mut ip = [0; 16];
        match address {
            SocketAddr::V4(v4) => {
                for (to, from) in ip.iter_mut().zip(v4.ip().octets()) {
                    *to = from;
                }
                Self { version: 4, ip, port: v4.port(), scope_id: 0 }
            }
            SocketAddr::V6(v6) => {
                let scope_id = v6.scope_id();
                Self { version: 6, ip: v6.ip().octets(), port: v6.port(), scope_id }
            }
        }
    }
}

impl TryFrom<&wgsep_address> for SocketAddr {
    type Error = wgsep_status;

    fn try_from(address: &wgsep_address) -> Result<Self, wgsep_status> {
        let [a, b, c, d, ..] = address.ip;
        match address.version {
            4 => Ok(Self::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), address.port)),
            6 => {
                let ip = Ipv6Addr::from(address.ip);
                Ok(Self::V6(SocketAddrV6::new(ip, address.port, 0, address.scope_id)))
            }
            _ => Err(wgsep_status::WGSEP_ERROR_ADDRESS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_both_ways_and_others_are_refused() {
        for text in ["192.0.2.1:51820", "[2001:db8::1]:51820", "[fe80::1%7]:1"] {
            let address: SocketAddr = text.parse().expect(text);
            assert_eq!(SocketAddr::try_from(&wgsep_address::from(address)), Ok(address));
        }
        for version in [0, 2, 5, 10, 255] {
            let address = wgsep_address { version, ..wgsep_address::default() };
            assert_eq!(SocketAddr::try_from(&address), Err(wgsep_status::WGSEP_ERROR_ADDRESS));
        }
    }
}
