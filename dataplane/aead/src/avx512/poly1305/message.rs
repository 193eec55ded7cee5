//! One message in eight lanes, a block in each: the accumulator of a lane is multiplied by r^8 for every eight blocks,
//! and at the end by the power that its block has in the sum.
//!
//! The multiplications of one message wait for each other. So these are in an order that takes little time, and not few
//! instructions, as those of eight messages.

use super::{Block, Multiplier, limbs, ones};
use crate::TAG_LEN;
use crate::avx512::multiply::{madd52hi, madd52lo};
use crate::avx512::{STEP, memory, scalar};
use core::arch::x86_64::{
    __m512i, _mm512_add_epi64, _mm512_and_si512, _mm512_cmpge_epi64_mask, _mm512_mask_mov_epi64,
    _mm512_reduce_add_epi64, _mm512_set1_epi64, _mm512_setr_epi64, _mm512_setzero_si512,
    _mm512_slli_epi64, _mm512_srli_epi64, _mm512_sub_epi64, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi64,
};

/// Bytes that are added at once.
pub(in crate::avx512) const GROUP: usize = 128;

type Limbs = [__m512i; 3];

/// A message whose blocks are added eight at a time.
pub(in crate::avx512) struct Message {
    len: usize,
    s: [u64; 2],
    /// The accumulators, without the power of the latest blocks.
    h: Limbs,
    is_empty: bool,
    /// r to r^8, in ascending order.
    powers: Limbs,
    /// r^8, and r^16 if there are messages of more than two groups.
    eighth: Multiplier,
    sixteenth: Multiplier,
}

impl Message {
    /// Begins a message of `len` bytes. The one-time key is the first half of a block of ChaCha20.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma,avx512vbmi2")]
    pub(in crate::avx512) fn new(one_time_key: __m512i, len: usize) -> Self {
        let zero = _mm512_setzero_si512();
        let word = |i| permute_lanes(_mm512_set1_epi64(i), one_time_key);
        let low = _mm512_and_si512(word(0), _mm512_set1_epi64(scalar::CLAMP[0].cast_signed()));
        let high = _mm512_and_si512(word(1), _mm512_set1_epi64(scalar::CLAMP[1].cast_signed()));
        let first = limbs(Block { low, high }, zero);
        let second = product(first, &multiplier(first));
        let two = select(0b1010_1010, second, first);
        let four = select(0b1100_1100, product(two, &multiplier(second)), two);
        let upper = product(four, &multiplier(permute(_mm512_set1_epi64(3), four)));
        let powers = select(0b1111_0000, upper, four);
        let eighth = multiplier(permute(_mm512_set1_epi64(7), upper));
        let sixteenth =
            if len <= 2 * GROUP { eighth } else { multiplier(product(eighth.limbs, &eighth)) };
        let [_, _, s0, s1, ..] = memory::to_u64(one_time_key);
        Self { len, s: [s0, s1], h: [zero; 3], is_empty: true, powers, eighth, sixteenth }
    }

    /// Adds a part of the message, in groups, of which the last may lack a part of its last block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
    pub(in crate::avx512) fn update(&mut self, text: &[u8]) {
        let mut rest = text;
        if self.is_empty && !rest.is_empty() {
            let first;
            (first, rest) = rest.split_at(rest.len().min(GROUP));
            (self.h, self.is_empty) = (lanes(first), false);
        }
        if rest.len().div_ceil(GROUP) % 2 == 1 {
            let first;
            (first, rest) = rest.split_at(rest.len().min(GROUP));
            self.h = sum(product(self.h, &self.eighth), lanes(first));
        }
        for pair in rest.chunks(2 * GROUP) {
            let (first, second) = pair.split_at(pair.len().min(GROUP));
            let mut products = Products::new(lanes(first), &self.eighth);
            products.add(self.h, &self.sixteenth);
            self.h = sum(products.reduce(), lanes(second));
        }
    }

    /// Adds the last part of the message and its length; returns the tag.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
    pub(in crate::avx512) fn finish(&mut self, text: &[u8]) -> [u8; TAG_LEN] {
        // Eight blocks are a group, also if the last is shorter: the length is the first of the next group then.
        let rest = text.len() % GROUP;
        let rest = if rest.div_ceil(STEP) == 8 { 0 } else { rest };
        let (groups, rest) = text.split_at(text.len() - rest);
        self.update(groups);
        let blocks = rest.len().div_ceil(STEP);
        let mut last = load(rest);
        // The lane of the block behind them: see `load`.
        let lane = 1 << (2 * (blocks % 4) + blocks / 4);
        let len = _mm512_set1_epi64((self.len as u64).cast_signed());
        last.high = _mm512_mask_mov_epi64(last.high, lane, len);
        let last = limbs(last, _mm512_set1_epi64(1));

        // Block i of the last has r^(number - i), that of the groups before it r^(8 - i) times r^number.
        let number = (blocks as u64 + 1).cast_signed();
        let of_block = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        let index = |number| _mm512_sub_epi64(_mm512_set1_epi64(number - 1), of_block);
        let (before, after) = (index(8), index(number));
        let has_block = _mm512_cmpge_epi64_mask(after, _mm512_setzero_si512());
        let power = permute(_mm512_set1_epi64(number - 1), self.powers);
        let before = product(permute(before, self.powers), &multiplier(power));
        let after = select(has_block, permute(after, self.powers), [_mm512_setzero_si512(); 3]);
        let mut products = Products::new(last, &multiplier(after));
        products.add(self.h, &multiplier(before));
        let [h0, h1, h2] =
            products.reduce().map(|limb| _mm512_reduce_add_epi64(limb).cast_unsigned());
        // Sums of eight limbs, below 2^48.
        let low = u128::from(h0) + (u128::from(h1) << 44);
        let (low, carry) = low.overflowing_add(u128::from(h2) << 88);
        let top = (h2 >> 40) + u64::from(carry);
        let (low, carry) = low.overflowing_add(u128::from((top >> 2) * 5));
        let top = (top & 3) + u64::from(carry);
        scalar::finish([low as u64, (low >> 64) as u64, top], self.s)
    }
}

/// Sums of products, in halves of 52 bits: the high half of a limb is 2^52 times its low half.
struct Products {
    low: Limbs,
    high: Limbs,
}

impl Products {
    /// The limbs of `factor` are below 2^45 + 2^9, 2^45 + 2^8 and 2^43, those of the multiplier below
    /// 2^45, 2^45 and 2^43.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn new(factor: Limbs, multiplier: &Multiplier) -> Self {
        let zero = _mm512_setzero_si512();
        let mut products = Self { low: [zero; 3], high: [zero; 3] };
        products.add(factor, multiplier);
        products
    }

    /// Adds a product, at most one to another.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn add(&mut self, [h0, h1, h2]: Limbs, multiplier: &Multiplier) {
        let Multiplier { limbs: [r0, r1, r2], times_20: [s1, s2] } = *multiplier;
        let factors = [
            [(h0, r0), (h1, s2), (h2, s1)],
            [(h0, r1), (h1, r0), (h2, s2)],
            [(h0, r2), (h1, r1), (h2, r0)],
        ];
        for (i, factors) in factors.into_iter().enumerate() {
            for (a, b) in factors {
                self.low[i] = madd52lo(self.low[i], a, b);
                self.high[i] = madd52hi(self.high[i], a, b);
            }
        }
    }

    /// Reduced in part: the limbs are below 2^44 + 2^9, 2^44 + 2^8 and 2^42 + 2^6. All three carry at once, and then again.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn reduce(self) -> Limbs {
        let ([low0, low1, low2], [high0, high1, high2]) = (self.low, self.high);
        let five = _mm512_set1_epi64(5);
        // A high half is 2^8 above the next limb, and 2^10 above 2^130. Five times the last carry is below 2^52, the others
        // are below 2^50.
        let carries = [
            super::carry::<44, 8>(low0, high0),
            super::carry::<44, 8>(low1, high1),
            super::carry::<42, 10>(low2, high2),
        ];
        let limb0 = madd52lo(_mm512_and_si512(low0, ones(44)), carries[2], five);
        let limb1 = _mm512_add_epi64(_mm512_and_si512(low1, ones(44)), carries[0]);
        let limb2 = _mm512_add_epi64(_mm512_and_si512(low2, ones(42)), carries[1]);
        let above = _mm512_srli_epi64::<42>(limb2);
        [
            madd52lo(_mm512_and_si512(limb0, ones(44)), above, five),
            _mm512_add_epi64(_mm512_and_si512(limb1, ones(44)), _mm512_srli_epi64::<44>(limb0)),
            _mm512_add_epi64(_mm512_and_si512(limb2, ones(42)), _mm512_srli_epi64::<44>(limb1)),
        ]
    }
}

/// As [`Multiplier::new`], in fewer steps.
#[inline]
#[target_feature(enable = "avx512f")]
fn multiplier(limbs: Limbs) -> Multiplier {
    let times_20 =
        |limb| _mm512_add_epi64(_mm512_slli_epi64::<4>(limb), _mm512_slli_epi64::<2>(limb));
    Multiplier { limbs, times_20: [times_20(limbs[1]), times_20(limbs[2])] }
}

#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn product(a: Limbs, b: &Multiplier) -> Limbs {
    Products::new(a, b).reduce()
}

#[inline]
#[target_feature(enable = "avx512f")]
fn sum(a: Limbs, b: Limbs) -> Limbs {
    core::array::from_fn(|i| _mm512_add_epi64(a[i], b[i]))
}

/// The lanes of `lanes` from `a`, the others from `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn select(lanes: u8, a: Limbs, b: Limbs) -> Limbs {
    core::array::from_fn(|i| _mm512_mask_mov_epi64(b[i], lanes, a[i]))
}

/// The lanes of an index, which is public, in each limb.
#[inline]
#[target_feature(enable = "avx512f")]
fn permute(index: __m512i, limbs: Limbs) -> Limbs {
    limbs.map(|limb| permute_lanes(index, limb))
}

#[cfg(not(miri))]
use core::arch::x86_64::_mm512_permutexvar_epi64 as permute_lanes;

/// The same for Miri, which does not know this instruction.
#[cfg(miri)]
#[target_feature(enable = "avx512f")]
fn permute_lanes(index: __m512i, limb: __m512i) -> __m512i {
    let limb = memory::to_u64(limb);
    memory::from_u64(&memory::to_u64(index).map(|lane| limb[lane as usize % 8]))
}

/// Eight blocks, or fewer followed by zeros, as limbs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
fn lanes(text: &[u8]) -> Limbs {
    limbs(load(text), _mm512_set1_epi64(1))
}

/// Up to eight blocks, in this order: 0, 4, 1, 5, 2, 6, 3, 7.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load(text: &[u8]) -> Block {
    // An access without a byte would take the processor some hundred cycles.
    let load = |text: &[u8]| {
        if text.is_empty() { _mm512_setzero_si512() } else { memory::load(text) }
    };
    let (first, second) = text.split_at(text.len().min(memory::LEN));
    let (first, second) = (load(first), load(second));
    Block { low: _mm512_unpacklo_epi64(first, second), high: _mm512_unpackhi_epi64(first, second) }
}

#[cfg(test)]
#[allow(clippy::print_stdout, clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::avx512::Vectors;
    use poly1305::universal_hash::{KeyInit, UniversalHash};

    /// The tags of a text and its length, in lanes and in scalar registers.
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2,bmi2")]
    fn tags(key: &[u8; 32], text: &[u8]) -> [[u8; TAG_LEN]; 2] {
        let [r0, r1, s0, s1] =
            [0, 8, 16, 24].map(|at| u64::from_le_bytes(*key[at..].first_chunk().unwrap()));
        let block = memory::from_u64(&[r0, r1, s0, s1, u64::MAX, 0, 1, 2]);
        let key = scalar::Key::new([r0, r1], [s0, s1]);
        [Message::new(block, text.len()).finish(text), scalar::tag(&key, text)]
    }

    /// By the crate poly1305, of the padded text and its length.
    fn expected(key: &[u8; 32], text: &[u8]) -> [u8; TAG_LEN] {
        let mut poly1305 = poly1305::Poly1305::new(key.into());
        poly1305.update_padded(text);
        poly1305.update(&[((text.len() as u128) << 64).to_le_bytes().into()]);
        poly1305.finalize().into()
    }

    fn assert_as_expected(key: &[u8; 32], text: &[u8]) {
        assert!(Vectors::detect().is_some());
        // SAFETY: the processor has the extensions.
        let tags = unsafe { tags(key, text) };
        assert_eq!(tags, [expected(key, text); 2], "key {key:02x?}, text {text:02x?}");
    }

    fn key(r: u128, s: u128) -> [u8; 32] {
        let mut key = [0; 32];
        key[..16].copy_from_slice(&r.to_le_bytes());
        key[16..].copy_from_slice(&s.to_le_bytes());
        key
    }

    /// Of how many cases one is tried: Miri is some thousand times as slow as the processor.
    const STEP: usize = if cfg!(miri) { 23 } else { 1 };
    /// The largest multiplier, whose bits are all that a clamped one may have.
    const LARGEST: u128 = 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff;

    fn can_run() -> bool {
        if Vectors::detect().is_none() {
            println!("skipped: this processor has no AVX-512 IFMA");
        }
        Vectors::detect().is_some()
    }

    /// Multipliers and blocks whose sums and products end in long carries, in texts of each number of blocks and groups.
    #[test]
    fn carries_of_one_message() {
        if !can_run() {
            return;
        }
        let edges = [0, 1, 2, 4, 43, 44, 45, 63, 64, 87, 88, 89, 103, 104, 124, 127];
        let bits = |bit: &u32| [1u128 << bit, (1 << bit) - 1];
        let mut blocks: Vec<u128> = edges.iter().flat_map(bits).collect();
        let multipliers: Vec<_> = blocks.iter().copied().chain([LARGEST, u128::MAX, 5]).collect();
        blocks.extend((0..12).map(|below| u128::MAX - below));
        let mut pick = 0;
        for (i, multiplier) in multipliers.into_iter().enumerate().step_by(STEP) {
            for len in (0..1600).step_by(7 * STEP) {
                let mut text = Vec::new();
                while text.len() < len {
                    pick = (pick + 7 + i) % blocks.len();
                    text.extend(blocks[pick].to_le_bytes());
                }
                text.truncate(len);
                for s in [0, u128::MAX, 1 << 63] {
                    assert_as_expected(&key(multiplier, s), &text);
                }
            }
        }
    }

    /// The sum takes each value around a multiple of 2^130 - 5 before the last reduction: with r = 1 it is the sum of the
    /// blocks, each of which counts 2^128 more than its bytes.
    #[test]
    fn the_last_reduction_of_one_message() {
        if !can_run() {
            return;
        }
        for multiple in (1..30u128).step_by(STEP) {
            // With that of the length, so many blocks count `multiple` times 2^130, less 2^128.
            let blocks = 4 * multiple as usize - 2;
            let len = (16 * blocks as u128) << 64;
            for above in 0..24 {
                let sum = (u128::MAX - len).wrapping_add(1 + above).wrapping_sub(5 * multiple + 12);
                for at in [0, blocks / 2, blocks - 1] {
                    let mut text = vec![0; 16 * blocks];
                    text[16 * at..][..16].copy_from_slice(&sum.to_le_bytes());
                    assert_as_expected(&key(1, u128::MAX), &text);
                }
            }
        }
    }

    #[test]
    fn one_message_of_ones_under_the_largest_multiplier() {
        if !can_run() {
            return;
        }
        for len in (0..3000).step_by(STEP) {
            assert_as_expected(&[0xff; 32], &vec![0xff; len]);
        }
    }
}
