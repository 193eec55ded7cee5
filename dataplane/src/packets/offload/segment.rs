//! Generic segmentation offload: splits a super-packet of the TUN device and completes checksums.

use super::checksum::{fold, sum, word};
use super::vnet::{GsoType, VnetHeader};
use super::{header, header::Transport};

/// The segments of a packet or super-packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    kind: Kind,
    /// Length of what was read.
    len: usize,
    /// Length of all its headers, which each segment repeats.
    header_len: usize,
    /// Bytes of payload of each segment but the last.
    payload_len: usize,
    count: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
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

    /// Number of packets that go through the tunnel.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.count
    }

    /// Length of the packet with this number.
    #[must_use]
    pub fn len_of(&self, number: usize) -> usize {
        let rest = self.len.saturating_sub(self.header_len);
        let before = self.payload_len.saturating_mul(number);
        self.header_len + rest.saturating_sub(before).min(self.payload_len)
    }

    /// Writes the packet with this number to the start of `destination`, which is at least
    /// [`Self::len_of`] long; `packet` is the one that was passed to [`Self::new`]. `None` if it is not, or
    /// if there is no packet with this number.
    #[must_use]
    pub fn write(&self, packet: &[u8], number: usize, destination: &mut [u8]) -> Option<()> {
        let destination =
            destination.get_mut(..self.len_of(number)).filter(|_| number < self.count)?;
        match self.kind {
            Kind::Whole => destination.copy_from_slice(packet.get(..self.len)?),
            Kind::Checksum { start, field } => {
                destination.copy_from_slice(packet.get(..self.len)?);
                let completed = !fold(sum(destination.get(start..)?, 0));
                // Zero means no checksum in UDP; the other zero is equivalent in all protocols.
                let completed = if completed == 0 { !0 } else { completed };
                destination
                    .get_mut(field..)?
                    .first_chunk_mut()
                    .map(|to| *to = completed.to_ne_bytes())?;
            }
            Kind::Split { transport, start, base } => {
                let (headers, payload) = destination.split_at_mut_checked(self.header_len)?;
                headers.copy_from_slice(packet.get(..self.header_len)?);
                let from = self.header_len + number * self.payload_len;
                payload.copy_from_slice(packet.get(from..from + payload.len())?);
                self.complete(destination, number, transport, start, base)?;
            }
        }
        Some(())
    }

    /// Writes the fields that differ between the segments of a super-packet.
    fn complete(
        &self,
        segment: &mut [u8],
        number: usize,
        transport: Transport,
        start: usize,
        base: u64,
    ) -> Option<()> {
        let len = u16::try_from(segment.len()).ok()?;
        let l4_len = len.checked_sub(u16::try_from(start).ok()?)?;
        let (ip, l4) = segment.split_at_mut_checked(start)?;
        header::set_ip_len(ip, len)?;
        if ip.first()? >> 4 == 4 {
            header::advance_ipv4_id(ip, number)?;
            header::set_ipv4_checksum(ip)?;
        }
        match transport {
            Transport::Tcp => {
                let before = u32::try_from(number * self.payload_len).ok()?;
                header::advance_sequence(l4, before)?;
                header::keep_flags(l4, number == 0, number + 1 == self.count)?;
            }
            Transport::Udp => {
                *l4.get_mut(4..)?.first_chunk_mut()? = l4_len.to_be_bytes();
            }
        }
        let offset = transport.checksum_offset();
        l4.get_mut(offset..)?.first_chunk_mut::<2>()?.fill(0);
        let checksum = !fold(sum(l4, base + word(l4_len)));
        let checksum = if checksum == 0 && transport == Transport::Udp { !0 } else { checksum };
        *l4.get_mut(offset..)?.first_chunk_mut()? = checksum.to_ne_bytes();
        Some(())
    }
}
