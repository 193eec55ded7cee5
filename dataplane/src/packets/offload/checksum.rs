//! The Internet checksum (RFC 1071).
//!
//! Sums are of native-endian words, which saves swapping bytes: one's complement sums do not depend on
//! the byte order, as long as the result is stored in the order in which the words were loaded.

use crate::sys;

/// Words summed at once: enough for the compiler to use vector registers.
const LANES: usize = 16;

/// Adds `bytes` to a sum that [`fold`] brings back to 16 bits. An odd last byte counts as if a zero
/// followed it.
///
/// A packet has fewer than 2^14 words of 32 bits, so that nothing here comes near 64. It wraps all the same,
/// because a check of each addition would keep the compiler from using vector registers.
pub(super) fn sum(bytes: &[u8], initial: u64) -> u64 {
    sys::sum_with_vectors(bytes, initial)
}

/// The same, with the instructions of the function that it is inlined into.
#[inline(always)]
pub(crate) fn sum_words(bytes: &[u8], initial: u64) -> u64 {
    let mut lanes = [0u64; LANES];
    let (blocks, rest) = bytes.as_chunks::<{ LANES * 4 }>();
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = lane.wrapping_add(u64::from(u32::from_ne_bytes(*word)));
        }
    }
    let (words, rest) = rest.as_chunks::<4>();
    let words = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word)));
    let mut last = [0; 4];
    for (to, byte) in last.iter_mut().zip(rest) {
        *to = *byte;
    }
    let sum = lanes.into_iter().chain(words).fold(initial, u64::wrapping_add);
    sum.wrapping_add(u64::from(u32::from_ne_bytes(last)))
}

/// A sum as 16 bits, in the byte order in which it is stored.
pub(super) const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    #[expect(clippy::cast_possible_truncation, reason = "three additions left 16 bits")]
    let folded = sum as u16;
    folded
}

/// One number of the pseudo-header, or of any other, as a part of a sum.
pub(super) const fn word(value: u16) -> u64 {
    value.to_be() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the RFC describes it: big-endian words, one after the other.
    fn plain(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap()
    }

    #[test]
    fn the_sum_is_that_of_the_rfc_at_every_length() {
        let bytes: Vec<u8> = (0..4096u32).map(|i| ((i * i) >> 3) as u8 | 0x80).collect();
        for len in (0..300).chain([1420, 4095, 4096]) {
            assert_eq!(u16::from_be(fold(sum(&bytes[..len], 0))), plain(&bytes[..len]), "{len}");
        }
        assert_eq!(fold(sum(&[0xff; 65_535], u64::from(u32::MAX))).count_zeros(), 8);
    }

    #[test]
    fn the_example_of_the_rfc() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(u16::from_be(fold(sum(&bytes, 0))), 0xddf2);
        assert_eq!(fold(word(0x1234)), 0x1234u16.to_be());
    }
}
