//! Poly1305 (RFC 8439, section 2.5) of a short message, in two words of 64 bits and what is above them.
//!
//! Sums wrap only where they are meant to.

use crate::TAG_LEN;

/// The bits that `r` may have.
pub(super) const CLAMP: [u64; 2] = [0x0fff_fffc_0fff_ffff, 0x0fff_fffc_0fff_fffc];

/// A one-time key.
pub(super) struct Key {
    r: [u64; 2],
    s: [u64; 2],
}

impl Key {
    /// Clamps `r`.
    pub(super) const fn new([r0, r1]: [u64; 2], s: [u64; 2]) -> Self {
        Self { r: [r0 & CLAMP[0], r1 & CLAMP[1]], s }
    }
}

/// The tag of a message, whose last block may be shorter, and of its length.
#[inline]
#[target_feature(enable = "bmi2")]
pub(super) fn tag(key: &Key, message: &[u8]) -> [u8; TAG_LEN] {
    let (blocks, rest) = message.as_chunks();
    let mut product = Product { words: [0; 3], above: 0 };
    for block in blocks {
        product = multiply(product.plus(u128::from_le_bytes(*block), 1), key.r);
    }
    if !rest.is_empty() {
        let mut block = [0; 16];
        block[..rest.len()].copy_from_slice(rest);
        product = multiply(product.plus(u128::from_le_bytes(block), 1), key.r);
    }
    // No associated data, and this many bytes of text.
    product = multiply(product.plus((message.len() as u128) << 64, 1), key.r);
    finish(product.plus(0, 0), key.s)
}

/// A product below 2^130 but for what is `above`, which counts as it stands.
struct Product {
    words: [u64; 3],
    above: u64,
}

impl Product {
    /// The sum with a block and what is above that, whose third word is below 8.
    #[inline]
    fn plus(self, block: u128, top: u64) -> [u64; 3] {
        let [h0, h1, h2] = self.words;
        // In this order: `above` is known last.
        let (sum, carry) = join(h0, h1).overflowing_add(block);
        let top = top.wrapping_add(h2).wrapping_add(u64::from(carry));
        let (sum, carry) = sum.overflowing_add(u128::from(self.above));
        [sum as u64, (sum >> 64) as u64, top.wrapping_add(u64::from(carry))]
    }
}

/// Multiplies a number whose third word is below 8. A clamped `r` has words below 2^60, and the upper is a multiple of
/// 4: its product with 2^128 is one of 2^130 = 5.
#[inline]
#[target_feature(enable = "bmi2")]
fn multiply([h0, h1, h2]: [u64; 3], [r0, r1]: [u64; 2]) -> Product {
    let times_5 = r1.wrapping_add(r1 >> 2);
    let product = |a: u64, b: u64| u128::from(a).wrapping_mul(u128::from(b));
    let d0 = product(h0, r0).wrapping_add(product(h1, times_5));
    let d1 = product(h0, r1).wrapping_add(product(h1, r0));
    let d1 = d1.wrapping_add(u128::from(h2.wrapping_mul(times_5))).wrapping_add(d0 >> 64);
    let d2 = h2.wrapping_mul(r0).wrapping_add((d1 >> 64) as u64);
    // What is above 2^130 counts 5 times: 4 times as it stands, and once.
    let above = (d2 & !3).wrapping_add(d2 >> 2);
    Product { words: [d0 as u64, d1 as u64, d2 & 3], above }
}

#[inline]
fn join(low: u64, high: u64) -> u128 {
    u128::from(low) | u128::from(high) << 64
}

/// Reduces completely a sum whose third word is below 8, and adds `s`.
#[inline]
pub(super) fn finish([h0, h1, h2]: [u64; 3], [s0, s1]: [u64; 2]) -> [u8; TAG_LEN] {
    let low = join(h0, h1);
    // 5 times what is above 2^130, and then once more if the sum with 5 is above it.
    let (low, carry) = low.overflowing_add(u128::from((h2 >> 2).wrapping_mul(5)));
    let top = (h2 & 3).wrapping_add(u64::from(carry));
    let (_, carry) = low.overflowing_add(5);
    let exceeds = top.wrapping_add(u64::from(carry)) >> 2;
    low.wrapping_add(u128::from(exceeds.wrapping_mul(5))).wrapping_add(join(s0, s1)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::finish;

    /// As [`finish`], by subtracting 2^130 - 5.
    fn expected(mut low: u128, mut top: u64, s: u128) -> [u8; 16] {
        const MODULUS: (u64, u128) = (3, u128::MAX - 4);
        while (top, low) >= MODULUS {
            let (difference, borrow) = low.overflowing_sub(MODULUS.1);
            (low, top) = (difference, top - MODULUS.0 - u64::from(borrow));
        }
        low.wrapping_add(s).to_le_bytes()
    }

    #[test]
    fn each_sum_is_reduced_completely() {
        for top in 0..8 {
            for edge in [0, 1 << 64, u128::MAX] {
                for distance in 0..64u128 {
                    for low in [edge.wrapping_add(distance), edge.wrapping_sub(distance)] {
                        let words = [low as u64, (low >> 64) as u64, top];
                        for s in [0, u128::MAX, 1 << 63] {
                            let tag = finish(words, [s as u64, (s >> 64) as u64]);
                            assert_eq!(tag, expected(low, top, s), "{top} {low:x} {s:x}");
                        }
                    }
                }
            }
        }
    }
}
