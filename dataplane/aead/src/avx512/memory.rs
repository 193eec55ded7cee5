//! Loads and stores of vectors: the only unsafe code, each within a slice or an array that the type bounds.

use core::arch::x86_64::{
    __m128i, __m256i, __m512i, __mmask64, _mm_loadu_si128, _mm256_loadu_si256, _mm512_loadu_si512,
    _mm512_mask_storeu_epi8, _mm512_maskz_loadu_epi8, _mm512_storeu_si512,
};

/// Bytes in a vector, and in a block of ChaCha20.
pub(super) const LEN: usize = 64;

/// The first 64 bytes of `bytes`, or fewer followed by zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn load(bytes: &[u8]) -> __m512i {
    match bytes.first_chunk::<LEN>() {
        // SAFETY: the array is 64 bytes long; the load needs no alignment.
        Some(whole) => unsafe { _mm512_loadu_si512(whole.as_ptr().cast()) },
        // SAFETY: the mask selects the bytes of the slice; the load does not access the others.
        None => unsafe { _mm512_maskz_loadu_epi8(mask(bytes.len()), bytes.as_ptr().cast()) },
    }
}

/// Writes the first 64 bytes of `bytes`, or fewer if it is shorter.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn store(bytes: &mut [u8], vector: __m512i) {
    let mask = mask(bytes.len());
    match bytes.first_chunk_mut::<LEN>() {
        // SAFETY: the array is 64 bytes long; the store needs no alignment.
        Some(whole) => unsafe { _mm512_storeu_si512(whole.as_mut_ptr().cast(), vector) },
        // SAFETY: the mask selects the bytes of the slice; the store does not access the others.
        None => unsafe { _mm512_mask_storeu_epi8(bytes.as_mut_ptr().cast(), mask, vector) },
    }
}

/// A mask of as many bytes, 64 at most.
#[inline]
pub(super) const fn mask(len: usize) -> __mmask64 {
    if len >= LEN { __mmask64::MAX } else { (1 << len) - 1 }
}

/// The quarter vector of these bytes.
#[inline]
pub(super) fn quarter(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the array is 16 bytes long; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// The half vector with these lanes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn from_u32(lanes: &[u32; 8]) -> __m256i {
    // SAFETY: the array is 32 bytes long; the load needs no alignment.
    unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
}

/// The vector with these lanes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn from_u64(lanes: &[u64; 8]) -> __m512i {
    // SAFETY: the array is 64 bytes long; the load needs no alignment.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

/// The lanes of a vector.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn to_u64(vector: __m512i) -> [u64; 8] {
    let mut lanes = [0; 8];
    // SAFETY: the array is 64 bytes long; the store needs no alignment.
    unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), vector) };
    lanes
}
