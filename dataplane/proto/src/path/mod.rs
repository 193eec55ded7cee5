//! The path of a packet: [`outbound`] from the TUN device to the network, [`inbound`] the other way. Each opens with its
//! numbered stages, and has a file for each stage in which protocol is involved:
//!
//! - out: `outbound/route.rs`, `outbound/reserve.rs`, `outbound/seal.rs`;
//! - in: `inbound/parse.rs`, `inbound/open.rs`, `inbound/accept.rs`.
//!
//! The caller reads a batch, calls the stages one after the other, each for the whole batch, and writes the result.
//! `Device::encapsulate` and `Device::decapsulate` do so with one packet.
//!
//! The daemon's workers, [`Device`](crate::device::Device), [`Tunnel`](crate::tunnel::Tunnel), the simulator and
//! the fuzzers all call these functions; a single packet is a batch of one. The packets lie in memory of the
//! caller. A batch has descriptors of them, which name ranges of that memory and are reused, so that nothing is
//! allocated for a packet unless it is staged until a handshake has completed.

pub mod allowed_ips;
pub mod data_path;
pub mod inbound;
pub mod outbound;

use core::ops::Range;

/// Hands out disjoint parts of a buffer, in ascending order.
pub(crate) struct Parts<'m> {
    rest: &'m mut [u8],
    /// Where `rest` starts in the buffer.
    start: usize,
}

impl<'m> Parts<'m> {
    pub(crate) const fn new(buffer: &'m mut [u8]) -> Self {
        Self { rest: buffer, start: 0 }
    }

    /// The bytes of a range; `None` if it overlaps the one before, or the buffer is too short.
    pub(crate) fn take(&mut self, range: Range<usize>) -> Option<&'m mut [u8]> {
        let skipped = range.start.checked_sub(self.start)?;
        let len = range.end.checked_sub(range.start)?;
        let whole = core::mem::take(&mut self.rest);
        let (_, from) = whole.split_at_mut_checked(skipped)?;
        let (part, rest) = from.split_at_mut_checked(len)?;
        self.rest = rest;
        self.start = range.end;
        Some(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_disjoint_and_within_the_buffer() {
        let mut buffer = [0, 1, 2, 3, 4, 5];
        let mut parts = Parts::new(&mut buffer);
        assert_eq!(parts.take(1..3), Some(&mut [1, 2][..]));
        assert_eq!(parts.take(3..4), Some(&mut [3][..]));
        assert_eq!(parts.take(5..6), Some(&mut [5][..]));
        assert_eq!(parts.take(5..6), None, "taken before");
        let mut buffer = [0; 4];
        assert_eq!(Parts::new(&mut buffer).take(3..5), None, "past the end");
        let reversed = Range { start: 2, end: 1 };
        assert_eq!(Parts::new(&mut buffer).take(reversed), None);
    }
}
