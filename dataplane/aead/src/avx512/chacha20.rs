//! ChaCha20 (RFC 8439, section 2.3): sixteen blocks at once, one in each lane of 32 bits. A block may be of any
//! key, nonce and counter.

use core::arch::x86_64::{
    __m512i, _mm512_add_epi32, _mm512_rol_epi32, _mm512_set1_epi32, _mm512_shuffle_i32x4,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    _mm512_xor_si512,
};

/// Blocks that are computed at once.
pub(super) const BLOCKS: usize = 16;
/// Double rounds of a block.
pub(super) const DOUBLE_ROUNDS: usize = 10;
/// Index of the row of block counters.
pub(super) const COUNTER: usize = 12;

/// "expand 32-byte k", the first four words of each block.
pub(super) const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

/// Sixteen blocks; row `i` has word `i` of each.
pub(super) type Rows = [__m512i; 16];

/// The four rows of constants.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn constants() -> [__m512i; 4] {
    let [a, b, c, d] = CONSTANTS.map(u32::cast_signed);
    [_mm512_set1_epi32(a), _mm512_set1_epi32(b), _mm512_set1_epi32(c), _mm512_set1_epi32(d)]
}

macro_rules! quarter_round {
    ($rows:ident, $a:literal, $b:literal, $c:literal, $d:literal) => {
        $rows[$a] = _mm512_add_epi32($rows[$a], $rows[$b]);
        $rows[$d] = _mm512_rol_epi32::<16>(_mm512_xor_si512($rows[$d], $rows[$a]));
        $rows[$c] = _mm512_add_epi32($rows[$c], $rows[$d]);
        $rows[$b] = _mm512_rol_epi32::<12>(_mm512_xor_si512($rows[$b], $rows[$c]));
        $rows[$a] = _mm512_add_epi32($rows[$a], $rows[$b]);
        $rows[$d] = _mm512_rol_epi32::<8>(_mm512_xor_si512($rows[$d], $rows[$a]));
        $rows[$c] = _mm512_add_epi32($rows[$c], $rows[$d]);
        $rows[$b] = _mm512_rol_epi32::<7>(_mm512_xor_si512($rows[$b], $rows[$c]));
    };
}

/// A round of columns and a round of diagonals.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn double_round(rows: Rows) -> Rows {
    finish_first_double_round(three_columns(rows))
}

/// The first double round but for the one column that differs between the blocks of a packet, that with the counter.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn three_columns(mut rows: Rows) -> Rows {
    quarter_round!(rows, 1, 5, 9, 13);
    quarter_round!(rows, 2, 6, 10, 14);
    quarter_round!(rows, 3, 7, 11, 15);
    rows
}

/// What [`three_columns`] has left of the first double round.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn finish_first_double_round(mut rows: Rows) -> Rows {
    quarter_round!(rows, 0, 4, 8, 12);
    quarter_round!(rows, 0, 5, 10, 15);
    quarter_round!(rows, 1, 6, 11, 12);
    quarter_round!(rows, 2, 7, 8, 13);
    quarter_round!(rows, 3, 4, 9, 14);
    rows
}

/// Adds the initial state to that after all rounds.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn add(mut rows: Rows, initial: &Rows) -> Rows {
    for (row, initial) in rows.iter_mut().zip(initial) {
        *row = _mm512_add_epi32(*row, *initial);
    }
    rows
}

/// Swaps rows and lanes: vector `i` of the result is block `i`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(rows: &Rows) -> [__m512i; BLOCKS] {
    let mut blocks = *rows;
    // Within each 128 bits, four rows of 32 bits: afterwards, vector 4 i + j has words 4 i to 4 i + 3 of blocks
    // j, j + 4, j + 8 and j + 12.
    for four in blocks.as_chunks_mut::<4>().0 {
        let [a, b, c, d] = *four;
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        *four = [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ];
    }
    // Between the parts of 128 bits.
    let mut transposed = blocks;
    macro_rules! column {
        ($j:literal) => {
            let (a, b, c, d) = (blocks[$j], blocks[$j + 4], blocks[$j + 8], blocks[$j + 12]);
            let (ab_low, ab_high) =
                (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let (cd_low, cd_high) =
                (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
            transposed[$j] = _mm512_shuffle_i32x4::<0x88>(ab_low, cd_low);
            transposed[$j + 4] = _mm512_shuffle_i32x4::<0x88>(ab_high, cd_high);
            transposed[$j + 8] = _mm512_shuffle_i32x4::<0xdd>(ab_low, cd_low);
            transposed[$j + 12] = _mm512_shuffle_i32x4::<0xdd>(ab_high, cd_high);
        };
    }
    column!(0);
    column!(1);
    column!(2);
    column!(3);
    transposed
}
