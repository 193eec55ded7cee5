//! ChaCha20 (RFC 8439, section 2.3) for consecutive blocks of one key, of one packet or of several: four in the parts of 128
//! bits of four vectors, which are the rows of the state, and up to six such sets side by side.

use super::chacha20::{CONSTANTS, DOUBLE_ROUNDS};
use super::{memory, poly1305};
use crate::KEY_LEN;
use core::arch::x86_64::{
    __m512i, _mm_set_epi64x, _mm512_add_epi32, _mm512_add_epi64, _mm512_broadcast_i32x4,
    _mm512_rol_epi32, _mm512_setr_epi32, _mm512_setr_epi64, _mm512_shuffle_epi32, _mm512_xor_si512,
};

/// Blocks of a set.
pub(super) const SET: usize = 4;
/// Most sets that are computed at once: the registers have no room for more.
pub(super) const SETS: usize = 6;
/// Most blocks that are computed at once.
pub(super) const MOST: usize = SET * SETS;

/// The initial state of block 0, in each part of 128 bits.
pub(super) struct Initial([__m512i; 4]);

impl Drop for Initial {
    #[inline]
    fn drop(&mut self) {
        memory::erase(&mut self.0);
    }
}

impl Initial {
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(key: &[u8; KEY_LEN], (first, counter): (u32, u64)) -> Self {
        let (halves, _) = key.as_chunks();
        let last = _mm_set_epi64x(counter.cast_signed(), (u64::from(first) << 32).cast_signed());
        let row = |bytes: &[u8; 16]| _mm512_broadcast_i32x4(memory::quarter(bytes));
        let [a, b, c, d] = CONSTANTS.map(u32::cast_signed);
        Self([
            _mm512_setr_epi32(a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d),
            row(&halves[0]),
            row(&halves[1]),
            _mm512_broadcast_i32x4(last),
        ])
    }

    /// Calls `with` with `count` blocks from `first` on, and some more that cost nothing; with [`MOST`] if it is more.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn blocks<T>(
        &self,
        first: u32,
        count: usize,
        with: impl FnOnce(&[__m512i]) -> T,
    ) -> T {
        match count.div_ceil(SET) {
            0 | 1 => with(self.consecutive::<1>(first).as_flattened()),
            2 => with(self.consecutive::<2>(first).as_flattened()),
            3 => with(self.consecutive::<3>(first).as_flattened()),
            4 => with(self.consecutive::<4>(first).as_flattened()),
            5 => with(self.consecutive::<5>(first).as_flattened()),
            _ => with(self.consecutive::<6>(first).as_flattened()),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn consecutive<const N: usize>(&self, first: u32) -> [[__m512i; SET]; N] {
        let offsets = |i: usize| consecutive(first.wrapping_add((SET * i) as u32));
        let mut sets = self.rounds(offsets);
        // Read again, so that the compiler keeps no copies on the stack, which would not be erased.
        let again = self.0.each_ref().map(memory::reread);
        for (i, set) in sets.iter_mut().enumerate() {
            *set = blocks(*set, at(again, offsets(i)));
        }
        sets
    }

    /// Writes the blocks that are so far from block 0, all or as many as `count`: of each set, for each block, what is added to the
    /// block counter and to the counter of the packet.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn write_blocks(
        &self,
        offsets: &[[u64; 2 * SET]; SETS],
        count: usize,
        written: &mut [[__m512i; SET]; SETS],
    ) {
        let offsets = |i: usize| memory::from_u64(&offsets[i]);
        match written {
            [written @ .., _] if count <= SET * (SETS - 1) => *written = self.rounds(offsets),
            _ => *written = self.rounds(offsets),
        }
        // From memory to memory: the compiler would store some of all sets on the stack, where nothing erases them.
        for (i, set) in written.iter_mut().take(count.div_ceil(SET)).enumerate() {
            let initial = at(self.0.each_ref().map(memory::reread), offsets(i));
            *set = blocks(set.each_ref().map(memory::reread), initial);
        }
    }

    /// The state of `N` sets after all rounds.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn rounds<const N: usize>(&self, offsets: impl Fn(usize) -> __m512i) -> [[__m512i; SET]; N] {
        let mut sets = core::array::from_fn(|i| at(self.0, offsets(i)));
        for _ in 0..DOUBLE_ROUNDS {
            quarter_rounds(&mut sets);
            for [a, _, c, d] in &mut sets {
                // The second row is what a round computes last: that it stays leaves the others time to be shuffled.
                *a = _mm512_shuffle_epi32::<0x93>(*a);
                *d = _mm512_shuffle_epi32::<0x4e>(*d);
                *c = _mm512_shuffle_epi32::<0x39>(*c);
            }
            quarter_rounds(&mut sets);
            for [a, _, c, d] in &mut sets {
                *a = _mm512_shuffle_epi32::<0x39>(*a);
                *d = _mm512_shuffle_epi32::<0x4e>(*d);
                *c = _mm512_shuffle_epi32::<0x93>(*c);
            }
        }
        sets
    }
}

/// The blocks of a set, from its state after all rounds and the initial one.
#[inline]
#[target_feature(enable = "avx512f")]
fn blocks(mut set: [__m512i; SET], initial: [__m512i; SET]) -> [__m512i; SET] {
    for (row, initial) in set.iter_mut().zip(initial) {
        *row = _mm512_add_epi32(*row, initial);
    }
    let mut blocks = poly1305::transpose_parts(set);
    for block in &mut blocks {
        memory::evaluate(block);
    }
    blocks
}

/// A round of columns in each set, step by step, so that the short dependencies of one fill those of another.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarter_rounds<const N: usize>(sets: &mut [[__m512i; 4]; N]) {
    step::<0, 1, 3, 16, N>(sets);
    step::<2, 3, 1, 12, N>(sets);
    step::<0, 1, 3, 8, N>(sets);
    step::<2, 3, 1, 7, N>(sets);
}

/// Adds row `B` to row `A`, and rotates the sum of row `D` and that without carries.
#[inline]
#[target_feature(enable = "avx512f")]
fn step<const A: usize, const B: usize, const D: usize, const BITS: i32, const N: usize>(
    sets: &mut [[__m512i; 4]; N],
) {
    for set in sets.iter_mut() {
        set[A] = _mm512_add_epi32(set[A], set[B]);
    }
    for set in sets.iter_mut() {
        set[D] = _mm512_xor_si512(set[D], set[A]);
    }
    for set in sets {
        set[D] = _mm512_rol_epi32::<BITS>(set[D]);
    }
}

/// The initial state of four blocks at these offsets.
#[inline]
#[target_feature(enable = "avx512f")]
fn at([a, b, c, d]: [__m512i; 4], offsets: __m512i) -> [__m512i; 4] {
    [a, b, c, _mm512_add_epi64(d, offsets)]
}

/// The offsets of four blocks of a packet, from `first` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn consecutive(first: u32) -> __m512i {
    let [a, b, c, d] = [0, 1, 2, 3].map(|i| i64::from(first.wrapping_add(i)));
    _mm512_setr_epi64(a, 0, b, 0, c, 0, d, 0)
}
