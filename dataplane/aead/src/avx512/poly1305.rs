//! Poly1305 (RFC 8439, section 2.5): eight messages at once, one in each lane of 64 bits, in limbs of 44, 44 and 42
//! bits, whose products `vpmadd52luq` and `vpmadd52huq` add up in halves of 52 bits.

pub(super) mod message;

use crate::avx512::multiply::{madd52hi, madd52lo};
use core::arch::x86_64::{
    __m512i, __mmask8, _mm512_add_epi64, _mm512_and_si512, _mm512_cmpge_epu64_mask,
    _mm512_cmplt_epu64_mask, _mm512_mask_add_epi64, _mm512_mask_mov_epi64, _mm512_mask_sub_epi64,
    _mm512_or_si512, _mm512_set1_epi64, _mm512_setzero_si512, _mm512_shrdi_epi64,
    _mm512_shuffle_i64x2, _mm512_slli_epi64, _mm512_srli_epi64, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi64,
};

/// Messages that are authenticated at once.
pub(super) const LANES: usize = crate::PACKETS;

/// Sixteen bytes of each message: the low and the high halves.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) low: __m512i,
    pub(super) high: __m512i,
}

/// A multiplier: three limbs, and the upper two times 20. A product at 2^132 or above is reduced by 2^130 = 5, and
/// 2^132 is 2^2 of that.
#[derive(Clone, Copy)]
struct Multiplier {
    limbs: [__m512i; 3],
    times_20: [__m512i; 2],
}

/// Keys and accumulators of eight messages.
pub(super) struct Poly1305 {
    /// The accumulators. Between blocks, the limbs are less than 2^44, 2^44 + 2^8 and 2^42.
    h: [__m512i; 3],
    /// r^4, r^3, r^2 and r.
    powers: [Multiplier; 4],
    /// What is added at the end.
    s: Block,
}

/// Sums of products, in halves of 52 bits: the high half of a limb is 2^52 times its low half.
#[derive(Clone, Copy)]
pub(super) struct Products {
    low: [__m512i; 3],
    high: [__m512i; 3],
}

#[inline]
#[target_feature(enable = "avx512f")]
fn ones(bits: u32) -> __m512i {
    _mm512_set1_epi64((1 << bits) - 1)
}

/// The limbs of 128 bits; the third is of 40 bits, above which it has the low bits of `above`.
#[inline]
#[target_feature(enable = "avx512f,avx512vbmi2")]
fn limbs(Block { low, high }: Block, above: __m512i) -> [__m512i; 3] {
    [
        _mm512_and_si512(low, ones(44)),
        _mm512_and_si512(_mm512_shrdi_epi64::<44>(low, high), ones(44)),
        _mm512_shrdi_epi64::<24>(high, above),
    ]
}

impl Multiplier {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(limbs: [__m512i; 3]) -> Self {
        let times_20 = |limb| {
            let four = _mm512_slli_epi64::<2>(limb);
            _mm512_add_epi64(four, _mm512_slli_epi64::<2>(four))
        };
        Self { limbs, times_20: [times_20(limbs[1]), times_20(limbs[2])] }
    }
}

impl Products {
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn new() -> Self {
        let zero = _mm512_setzero_si512();
        Self { low: [zero; 3], high: [zero; 3] }
    }

    /// Adds a product. The limbs of `factor` are below 2^45, 2^45 + 2^8 and 2^43, those of the multiplier below 2^45 and
    /// times 20 below 2^50: each is below 2^52, and the sum of four products below 2^56.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn add(&mut self, [h0, h1, h2]: [__m512i; 3], multiplier: &Multiplier) {
        let Multiplier { limbs: [r0, r1, r2], times_20: [s1, s2] } = *multiplier;
        let factors = [
            [(h0, r0), (h1, s2), (h2, s1)],
            [(h0, r1), (h1, r0), (h2, s2)],
            [(h0, r2), (h1, r1), (h2, r0)],
        ];
        for ((low, high), factors) in self.low.iter_mut().zip(&mut self.high).zip(factors) {
            for (a, b) in factors {
                *low = madd52lo(*low, a, b);
                *high = madd52hi(*high, a, b);
            }
        }
    }

    /// Reduced in part: the limbs are below 2^44, 2^44 + 2^8 and 2^42.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn reduce(self) -> [__m512i; 3] {
        let ([low0, low1, low2], [high0, high1, high2]) = (self.low, self.high);
        // A high half is 2^8 above the next limb.
        let limb1 = _mm512_add_epi64(low1, carry::<44, 8>(low0, high0));
        let limb2 = _mm512_add_epi64(low2, carry::<44, 8>(limb1, high1));
        // Above 2^130: times 5. The carry is below 2^50.
        let above = carry::<42, 10>(limb2, high2);
        let limb0 = madd52lo(_mm512_and_si512(low0, ones(44)), above, _mm512_set1_epi64(5));
        [
            _mm512_and_si512(limb0, ones(44)),
            _mm512_add_epi64(_mm512_and_si512(limb1, ones(44)), _mm512_srli_epi64::<44>(limb0)),
            _mm512_and_si512(limb2, ones(42)),
        ]
    }
}

impl Poly1305 {
    /// Begins with the one-time keys, 32 bytes for each message.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma,avx512vbmi2")]
    pub(super) fn new(r: Block, s: Block) -> Self {
        let clamped = Block {
            low: _mm512_and_si512(r.low, _mm512_set1_epi64(0x0fff_fffc_0fff_ffff)),
            high: _mm512_and_si512(r.high, _mm512_set1_epi64(0x0fff_fffc_0fff_fffc)),
        };
        let zero = _mm512_setzero_si512();
        let r = Multiplier::new(limbs(clamped, zero));
        let multiply = |a: &Multiplier, b: &Multiplier| {
            let mut products = Products::new();
            products.add(a.limbs, b);
            Multiplier::new(products.reduce())
        };
        let squared = multiply(&r, &r);
        let powers = [multiply(&squared, &squared), multiply(&squared, &r), squared, r];
        Self { h: [zero; 3], powers, s }
    }

    /// Multiplies block `i` of four, of every message, by its power of `r`; the accumulator goes with the first.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma,avx512vbmi2")]
    pub(super) fn multiply(&self, products: &mut Products, i: usize, block: Block) {
        let mut limbs = limbs(block, _mm512_set1_epi64(1));
        if i == 0 {
            for (limb, h) in limbs.iter_mut().zip(self.h) {
                *limb = _mm512_add_epi64(*limb, h);
            }
        }
        products.add(limbs, &self.powers[i]);
    }

    /// Makes the sum of products the accumulators of `lanes`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub(super) fn set(&mut self, products: Products, lanes: __mmask8) {
        let new = products.reduce();
        if lanes == __mmask8::MAX {
            self.h = new;
        } else {
            for (h, new) in self.h.iter_mut().zip(new) {
                *h = _mm512_mask_mov_epi64(*h, lanes, new);
            }
        }
    }

    /// Adds four blocks to each message of `lanes`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma,avx512vbmi2")]
    pub(super) fn update_four(&mut self, blocks: &[Block; 4], lanes: __mmask8) {
        let mut products = Products::new();
        for (i, block) in blocks.iter().enumerate() {
            self.multiply(&mut products, i, *block);
        }
        self.set(products, lanes);
    }

    /// Adds a block to each message of `lanes`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma,avx512vbmi2")]
    pub(super) fn update(&mut self, block: Block, lanes: __mmask8) {
        let mut limbs = limbs(block, _mm512_set1_epi64(1));
        for (limb, h) in limbs.iter_mut().zip(self.h) {
            *limb = _mm512_add_epi64(*limb, h);
        }
        let mut products = Products::new();
        products.add(limbs, &self.powers[3]);
        self.set(products, lanes);
    }

    /// The tags, as halves of 64 bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vbmi2")]
    pub(super) fn finish(self) -> Block {
        let [h0, h1, h2] = self.h;
        // Limbs below 2^44, 2^44 and 2^42, but for a carry of at most 5 into the first, twice.
        let (h1, h2) = propagate::<44>(h1, h2);
        let (h2, h0) = reduce(h2, h0);
        let (h0, h1) = propagate::<44>(h0, h1);
        let (h1, h2) = propagate::<44>(h1, h2);
        let (h2, h0) = reduce(h2, h0);
        let (h0, h1) = propagate::<44>(h0, h1);
        // h + 5 - 2^130 where that is not negative, which is h - (2^130 - 5).
        let g0 = _mm512_add_epi64(h0, _mm512_set1_epi64(5));
        let (g0, g1) = propagate::<44>(g0, h1);
        let (g1, g2) = propagate::<44>(g1, h2);
        let modulus = _mm512_set1_epi64(1 << 42);
        let exceeds = _mm512_cmpge_epu64_mask(g2, modulus);
        let h0 = _mm512_mask_mov_epi64(h0, exceeds, g0);
        let h1 = _mm512_mask_mov_epi64(h1, exceeds, g1);
        let h2 = _mm512_mask_sub_epi64(h2, exceeds, g2, modulus);
        // Modulo 2^128, plus s.
        let low = _mm512_or_si512(h0, _mm512_slli_epi64::<44>(h1));
        let high = _mm512_or_si512(_mm512_srli_epi64::<20>(h1), _mm512_slli_epi64::<24>(h2));
        let low = _mm512_add_epi64(low, self.s.low);
        let high = _mm512_add_epi64(high, self.s.high);
        let carry = _mm512_cmplt_epu64_mask(low, self.s.low);
        Block { low, high: _mm512_mask_add_epi64(high, carry, high, _mm512_set1_epi64(1)) }
    }
}

/// What a limb of `BITS` bits carries into the next, with the high half of its products.
#[inline]
#[target_feature(enable = "avx512f")]
fn carry<const BITS: u32, const SHIFT: u32>(low: __m512i, high: __m512i) -> __m512i {
    _mm512_add_epi64(_mm512_srli_epi64::<BITS>(low), _mm512_slli_epi64::<SHIFT>(high))
}

/// A limb without what is above its bits, and the next with that.
#[inline]
#[target_feature(enable = "avx512f")]
fn propagate<const BITS: u32>(limb: __m512i, next: __m512i) -> (__m512i, __m512i) {
    let carried = _mm512_add_epi64(next, _mm512_srli_epi64::<BITS>(limb));
    (_mm512_and_si512(limb, ones(BITS)), carried)
}

/// The third limb without what is above 2^130, and the first with five times that.
#[inline]
#[target_feature(enable = "avx512f")]
fn reduce(h2: __m512i, h0: __m512i) -> (__m512i, __m512i) {
    let above = _mm512_srli_epi64::<42>(h2);
    let times_5 = _mm512_add_epi64(above, _mm512_slli_epi64::<2>(above));
    (_mm512_and_si512(h2, ones(42)), _mm512_add_epi64(h0, times_5))
}

/// The four blocks of 64 bytes of each message.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(rows: &[__m512i; LANES]) -> [Block; 4] {
    let [a, b, c, d, e, f, g, h] = *rows;
    // Pairs of rows: the even words, and the odd ones, of two messages.
    let evens = [
        _mm512_unpacklo_epi64(a, b),
        _mm512_unpacklo_epi64(c, d),
        _mm512_unpacklo_epi64(e, f),
        _mm512_unpacklo_epi64(g, h),
    ];
    let odds = [
        _mm512_unpackhi_epi64(a, b),
        _mm512_unpackhi_epi64(c, d),
        _mm512_unpackhi_epi64(e, f),
        _mm512_unpackhi_epi64(g, h),
    ];
    let (evens, odds) = (transpose_parts(evens), transpose_parts(odds));
    core::array::from_fn(|i| Block { low: evens[i], high: odds[i] })
}

/// Swaps rows and parts of 128 bits.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose_parts([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (ab_low, ab_high) =
        (_mm512_shuffle_i64x2::<0x44>(a, b), _mm512_shuffle_i64x2::<0xee>(a, b));
    let (cd_low, cd_high) =
        (_mm512_shuffle_i64x2::<0x44>(c, d), _mm512_shuffle_i64x2::<0xee>(c, d));
    [
        _mm512_shuffle_i64x2::<0x88>(ab_low, cd_low),
        _mm512_shuffle_i64x2::<0xdd>(ab_low, cd_low),
        _mm512_shuffle_i64x2::<0x88>(ab_high, cd_high),
        _mm512_shuffle_i64x2::<0xdd>(ab_high, cd_high),
    ]
}

#[cfg(test)]
#[allow(clippy::print_stdout, clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::avx512::{Vectors, memory};
    use poly1305::universal_hash::{KeyInit, UniversalHash};

    type Message = Vec<[u8; 16]>;

    /// The tags of eight messages, in groups of four blocks and the rest singly, as packets are authenticated.
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
    fn tags(keys: &[[u8; 32]; LANES], messages: &[Message; LANES]) -> [[u8; 16]; LANES] {
        let halves = |blocks: [[u8; 16]; LANES]| {
            let [low, high] = [0, 8].map(|at| {
                blocks.map(|block| u64::from_le_bytes(*block[at..].first_chunk().unwrap()))
            });
            Block { low: memory::from_u64(&low), high: memory::from_u64(&high) }
        };
        let part = |at: usize| halves(keys.map(|key| *key[at..].first_chunk().unwrap()));
        let block_of = |number: usize| {
            halves(messages.each_ref().map(|m| m.get(number).copied().unwrap_or_default()))
        };
        let lanes = |enough: &dyn Fn(usize) -> bool| -> __mmask8 {
            (0..LANES).filter(|lane| enough(messages[*lane].len())).map(|lane| 1 << lane).sum()
        };
        let mut poly1305 = Poly1305::new(part(0), part(16));
        let longest = messages.iter().map(Vec::len).max().unwrap();
        for first in (0..longest).step_by(4) {
            let whole = lanes(&|len| len >= first + 4);
            poly1305.update_four(&core::array::from_fn(|i| block_of(first + i)), whole);
            for number in first..first + 4 {
                poly1305.update(block_of(number), lanes(&|len| number < len && len < first + 4));
            }
        }
        let tags = poly1305.finish();
        let (low, high) = (memory::to_u64(tags.low), memory::to_u64(tags.high));
        core::array::from_fn(|i| (u128::from(low[i]) | u128::from(high[i]) << 64).to_le_bytes())
    }

    fn expected(key: &[u8; 32], message: &[[u8; 16]]) -> [u8; 16] {
        let mut poly1305 = poly1305::Poly1305::new(key.into());
        let blocks: Vec<_> = message.iter().map(|block| (*block).into()).collect();
        poly1305.update(&blocks);
        poly1305.finalize().into()
    }

    /// Of how many cases one is tried: Miri is some thousand times as slow as the processor.
    const STEP: usize = if cfg!(miri) { 23 } else { 1 };

    fn assert_as_expected(keys: &[[u8; 32]; LANES], messages: &[Message; LANES]) {
        assert!(Vectors::detect().is_some());
        // SAFETY: the processor has the extensions.
        let tags = unsafe { tags(keys, messages) };
        for ((key, message), tag) in keys.iter().zip(messages).zip(tags) {
            assert_eq!(tag, expected(key, message), "key {key:02x?}, message {message:02x?}");
        }
    }

    fn number(low: u128) -> [u8; 16] {
        low.to_le_bytes()
    }

    /// Multipliers and blocks whose sums and products end in long carries: single bits and all-ones at the edges of
    /// limbs, and what makes the accumulator 2^130 - 5 and its neighbours (RFC 8439, appendix A.3, vectors 7 to 11,
    /// are of this kind).
    #[test]
    fn carries_at_the_edges_of_limbs() {
        if Vectors::detect().is_none() {
            println!("skipped: this processor has no AVX-512 IFMA");
            return;
        }
        let edges = [0, 1, 2, 4, 43, 44, 45, 63, 64, 87, 88, 89, 103, 104, 124, 127];
        let mut multipliers: Vec<u128> = edges.iter().map(|bit| 1 << bit).collect();
        multipliers.extend(edges.iter().map(|bit| (1 << bit) - 1));
        multipliers.extend([u128::MAX, 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff, 5, 0]);
        let mut blocks: Vec<u128> =
            edges.iter().flat_map(|bit| [1 << bit, (1 << bit) - 1]).collect();
        blocks.extend((0..12).map(|below| u128::MAX - below));
        let mut pick = 0;
        for (i, multiplier) in multipliers.iter().enumerate().step_by(STEP) {
            for s in [0, u128::MAX, 1 << 63] {
                let mut key = [0; 32];
                key[..16].copy_from_slice(&number(*multiplier));
                key[16..].copy_from_slice(&number(s));
                let keys = [key; LANES];
                for len in (1..blocks.len()).step_by(STEP) {
                    let messages = core::array::from_fn(|lane| {
                        (0..(len + lane) % 10)
                            .map(|_| {
                                pick = (pick + 7 + i) % blocks.len();
                                number(blocks[pick])
                            })
                            .collect()
                    });
                    assert_as_expected(&keys, &messages);
                }
            }
        }
    }

    /// The accumulator takes each value around 2^130 - 5 before the last reduction: with r = 1 it is the sum.
    #[test]
    fn the_last_reduction_is_complete() {
        if Vectors::detect().is_none() {
            println!("skipped: this processor has no AVX-512 IFMA");
            return;
        }
        let mut key = [0; 32];
        key[0] = 1;
        // Each block counts 2^128 more than its bytes: three make 3 * 2^128 and their sum.
        for below in (0..24).step_by(STEP) {
            for above in 0..8 {
                let last = [u128::MAX - below, u128::MAX, above, 0];
                let messages = core::array::from_fn(|lane| {
                    let mut message = vec![number(0); lane % 3];
                    message.extend(last.map(number));
                    let by = lane % message.len();
                    message.rotate_left(by);
                    message
                });
                assert_as_expected(&[key; LANES], &messages);
            }
        }
    }

    #[test]
    fn a_message_of_ones_under_the_largest_multiplier() {
        if Vectors::detect().is_none() {
            println!("skipped: this processor has no AVX-512 IFMA");
            return;
        }
        let keys = [[0xff; 32]; LANES];
        let messages = core::array::from_fn(|lane| vec![[0xff; 16]; 100 + lane]);
        assert_as_expected(&keys, &messages);
    }
}
