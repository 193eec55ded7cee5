//! The segments of a packet from the TUN device: how many, how long, and what must be completed in each. `split` writes
//! them.

use super::checksum::word;
use super::vnet::{GsoType, VnetHeader};
use super::{header, header::Transport};

/// The segments of a packet or super-packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    pub(super) kind: Kind,
    /// Length of what was read.
    pub(super) len: usize,
    /// Length of all its headers, which each segment repeats.
    pub(super) header_len: usize,
    /// Bytes of payload of each segment but the last.
    pub(super) payload_len: usize,
    pub(super) count: usize,
}

/// How a packet is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It is sent unchanged.
    Whole,
    /// Its checksum must be completed: the offsets at which the sum starts and is stored.
    Checksum { start: usize, field: usize },
    /// It must be split. `base` is the sum of the pseudo-header without the length.
    Split { transport: Transport, start: usize, base: u64 },
}

impl Segments {
    /// Parses a packet with its `header`. `None` if they contradict each other.
    #[must_use]
    pub fn new(header: &VnetHeader, packet: &[u8]) -> Option<Self> {
        let len = packet.len();
        let whole = Self { kind: Kind::Whole, len, header_len: 0, payload_len: len, count: 1 };
        let Some((start, offset)) = header.checksum else {
            // Without a checksum offset it is invalid: the kernel leaves the checksums to the segmentation.
            return header.gso.is_none().then_some(whole);
        };
        let start = usize::from(start);
        let field = start.checked_add(usize::from(offset))?;
        packet.get(field..field.checked_add(2)?)?;
        match header.gso {
            None => Some(Self { kind: Kind::Checksum { start, field }, ..whole }),
            Some((gso, payload_len)) => Self::split(packet, gso, usize::from(payload_len), start),
        }
    }

    fn split(packet: &[u8], gso: GsoType, payload_len: usize, start: usize) -> Option<Self> {
        let (transport, version) = match gso {
            GsoType::TcpV4 => (Transport::Tcp, Some(4)),
            GsoType::TcpV6 => (Transport::Tcp, Some(6)),
            GsoType::Udp => (Transport::Udp, None),
        };
        let found = packet.first()? >> 4;
        let ip_len = match found {
            4 => header::IPV4_LEN,
            6 => header::IPV6_LEN,
            _ => return None,
        };
        if version.is_some_and(|version| version != found) || start < ip_len || payload_len == 0 {
            return None;
        }
        let header_len = start.checked_add(transport.header_len(packet.get(start..)?)?)?;
        let payload = packet.len().checked_sub(header_len).filter(|payload| *payload > 0)?;
        // What the kernel stored is the pseudo-header's sum with the length of the whole.
        let field = start.checked_add(transport.checksum_offset())?;
        let stored = packet.get(field..)?.first_chunk()?;
        let l4_len = u16::try_from(packet.len().checked_sub(start)?).ok()?;
        let base = u64::from(u16::from_ne_bytes(*stored)) + word(!l4_len);
        Some(Self {
            kind: Kind::Split { transport, start, base },
            len: packet.len(),
            header_len,
            payload_len,
            count: payload.div_ceil(payload_len),
        })
    }
}
