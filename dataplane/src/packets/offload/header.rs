//! The fields of IP, TCP and UDP headers that splitting and coalescing read and write (RFC 791, 8200,
//! 9293, 768).

use super::checksum::{fold, sum, word};

pub(super) const IPV4_LEN: usize = 20;
pub(super) const IPV6_LEN: usize = 40;
const TCP_LEN: usize = 20;
const UDP_LEN: usize = 8;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

pub(super) const FIN: u8 = 0x01;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;
pub(super) const ECE: u8 = 0x40;
pub(super) const CWR: u8 = 0x80;

/// The protocols of super-packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    /// The protocol of a number in the IP header.
    pub(super) const fn of_protocol(protocol: u8) -> Option<Self> {
        match protocol {
            PROTOCOL_TCP => Some(Self::Tcp),
            PROTOCOL_UDP => Some(Self::Udp),
            _ => None,
        }
    }

    const fn protocol(self) -> u8 {
        match self {
            Self::Tcp => PROTOCOL_TCP,
            Self::Udp => PROTOCOL_UDP,
        }
    }

    /// Offset of the checksum in its header.
    pub(super) const fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }

    /// Length of the header at the start of `l4`, if it is whole.
    pub(super) fn header_len(self, l4: &[u8]) -> Option<usize> {
        let len = match self {
            Self::Tcp => usize::from(*l4.get(12)? >> 4) * 4,
            Self::Udp => UDP_LEN,
        };
        let least = if self == Self::Tcp { TCP_LEN } else { UDP_LEN };
        (len >= least && len <= l4.len()).then_some(len)
    }

    /// Sum of the pseudo-header of a packet whose IP header has no options.
    pub(super) fn pseudo_header(self, ip: &[u8], l4_len: u16) -> Option<u64> {
        let addresses = match ip.len() {
            IPV4_LEN => ip.get(12..)?,
            IPV6_LEN => ip.get(8..)?,
            _ => return None,
        };
        Some(sum(addresses, word(u16::from(self.protocol())) + word(l4_len)))
    }
}

/// Sets the length of the packet that begins with this IP header.
pub(super) fn set_ip_len(ip: &mut [u8], len: u16) -> Option<()> {
    match ip.first()? >> 4 {
        4 => *ip.get_mut(2..)?.first_chunk_mut()? = len.to_be_bytes(),
        _ => {
            let payload = len.checked_sub(u16::try_from(IPV6_LEN).ok()?)?;
            *ip.get_mut(4..)?.first_chunk_mut()? = payload.to_be_bytes();
        }
    }
    Some(())
}

/// Length of the packet that begins with this IP header, from its length field.
pub(super) fn ip_len(ip: &[u8]) -> Option<usize> {
    let word = |at| ip.get(at..)?.first_chunk().copied().map(u16::from_be_bytes).map(usize::from);
    if ip.first()? >> 4 == 4 { word(2) } else { word(4)?.checked_add(IPV6_LEN) }
}

pub(super) fn ipv4_id(ip: &[u8]) -> Option<u16> {
    ip.get(4..)?.first_chunk().copied().map(u16::from_be_bytes)
}

/// Numbers an IPv4 segment as the kernel does: one after the other.
pub(super) fn advance_ipv4_id(ip: &mut [u8], by: usize) -> Option<()> {
    let by = u16::try_from(by).ok()?;
    let id = ipv4_id(ip)?.wrapping_add(by);
    *ip.get_mut(4..)?.first_chunk_mut()? = id.to_be_bytes();
    Some(())
}

/// Completes an IPv4 header, `ip`, options and all.
pub(super) fn set_ipv4_checksum(ip: &mut [u8]) -> Option<()> {
    ip.get_mut(10..)?.first_chunk_mut::<2>()?.fill(0);
    let checksum = !fold(sum(ip, 0));
    *ip.get_mut(10..)?.first_chunk_mut()? = checksum.to_ne_bytes();
    Some(())
}

pub(super) fn sequence(tcp: &[u8]) -> Option<u32> {
    tcp.get(4..)?.first_chunk().copied().map(u32::from_be_bytes)
}

/// Moves a TCP segment `by` bytes on in its stream.
pub(super) fn advance_sequence(tcp: &mut [u8], by: u32) -> Option<()> {
    let sequence = sequence(tcp)?.wrapping_add(by);
    *tcp.get_mut(4..)?.first_chunk_mut()? = sequence.to_be_bytes();
    Some(())
}

/// Keeps CWR in the first segment only, FIN and PSH in the last only (kernel tcp_offload.c, tcp_gso_segment).
pub(super) fn keep_flags(tcp: &mut [u8], first: bool, last: bool) -> Option<()> {
    let flags = tcp.get_mut(13)?;
    if !first {
        *flags &= !CWR;
    }
    if !last {
        *flags &= !(FIN | PSH);
    }
    Some(())
}
