//! Generic segmentation offload: splits a super-packet of the TUN device and completes checksums.

use super::checksum::{fold, sum, word};
use super::header::{self, Transport};
use super::segments::{Kind, Segments};
use wgsep_proto::path::outbound::Segmentation;

impl Segmentation for Segments {
    fn count(&self) -> usize {
        self.count
    }

    fn len_of(&self, number: usize) -> usize {
        let rest = self.len.saturating_sub(self.header_len);
        let before = self.payload_len.saturating_mul(number);
        self.header_len + rest.saturating_sub(before).min(self.payload_len)
    }

    /// `packet` is the one that was passed to [`Self::new`], and `segment` may be longer than [`Self::len_of`]. `None`
    /// also if there is no packet with this number.
    fn write(&self, packet: &[u8], number: usize, segment: &mut [u8]) -> Option<()> {
        let segment = segment.get_mut(..self.len_of(number)).filter(|_| number < self.count)?;
        match self.kind {
            Kind::Whole => segment.copy_from_slice(packet.get(..self.len)?),
            Kind::Checksum { start, field } => {
                segment.copy_from_slice(packet.get(..self.len)?);
                let completed = !fold(sum(segment.get(start..)?, 0));
                // Zero means no checksum in UDP; the other zero is equivalent in all protocols.
                let completed = if completed == 0 { !0 } else { completed };
                segment
                    .get_mut(field..)?
                    .first_chunk_mut()
                    .map(|to| *to = completed.to_ne_bytes())?;
            }
            Kind::Split { transport, start, base } => {
                let (headers, payload) = segment.split_at_mut_checked(self.header_len)?;
                headers.copy_from_slice(packet.get(..self.header_len)?);
                let from = self.header_len + number * self.payload_len;
                payload.copy_from_slice(packet.get(from..from + payload.len())?);
                self.complete(segment, number, transport, start, base)?;
            }
        }
        Some(())
    }
}

impl Segments {
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
