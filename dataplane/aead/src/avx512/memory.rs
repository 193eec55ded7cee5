//! Loads and stores of vectors, each within a slice or an array that the type bounds, and what keeps keys from being left in
//! registers and on the stack: the only unsafe code but for the calls in `mod.rs`.

use core::arch::x86_64::{
    __m128i, __m256i, __m512i, __mmask64, _mm_loadu_si128, _mm256_loadu_si256, _mm512_loadu_si512,
    _mm512_mask_storeu_epi8, _mm512_maskz_loadu_epi8, _mm512_storeu_si512,
};

/// Bytes in a vector, and in a block of ChaCha20.
pub(super) const LEN: usize = 64;

/// A vector of zeros.
// SAFETY: any bytes are a vector, which is as long as the array.
pub(super) const ZERO: __m512i = unsafe { core::mem::transmute::<[u64; 8], __m512i>([0; 8]) };

/// Zeroes the vector registers. What a function leaves in them, the next one may store wherever the language leaves bytes
/// undefined, as in an `Option` that is `None`.
#[cfg(not(miri))]
#[target_feature(enable = "avx512f")]
pub(super) fn clear_registers() {
    // SAFETY: the instructions zero registers that are declared as overwritten, and do nothing else.
    unsafe {
        core::arch::asm!(
            "vzeroall",
            "vpxord zmm16, zmm16, zmm16",
            "vpxord zmm17, zmm17, zmm17",
            "vpxord zmm18, zmm18, zmm18",
            "vpxord zmm19, zmm19, zmm19",
            "vpxord zmm20, zmm20, zmm20",
            "vpxord zmm21, zmm21, zmm21",
            "vpxord zmm22, zmm22, zmm22",
            "vpxord zmm23, zmm23, zmm23",
            "vpxord zmm24, zmm24, zmm24",
            "vpxord zmm25, zmm25, zmm25",
            "vpxord zmm26, zmm26, zmm26",
            "vpxord zmm27, zmm27, zmm27",
            "vpxord zmm28, zmm28, zmm28",
            "vpxord zmm29, zmm29, zmm29",
            "vpxord zmm30, zmm30, zmm30",
            "vpxord zmm31, zmm31, zmm31",
            out("zmm0") _,
            out("zmm1") _,
            out("zmm2") _,
            out("zmm3") _,
            out("zmm4") _,
            out("zmm5") _,
            out("zmm6") _,
            out("zmm7") _,
            out("zmm8") _,
            out("zmm9") _,
            out("zmm10") _,
            out("zmm11") _,
            out("zmm12") _,
            out("zmm13") _,
            out("zmm14") _,
            out("zmm15") _,
            out("zmm16") _,
            out("zmm17") _,
            out("zmm18") _,
            out("zmm19") _,
            out("zmm20") _,
            out("zmm21") _,
            out("zmm22") _,
            out("zmm23") _,
            out("zmm24") _,
            out("zmm25") _,
            out("zmm26") _,
            out("zmm27") _,
            out("zmm28") _,
            out("zmm29") _,
            out("zmm30") _,
            out("zmm31") _,
            options(nomem, nostack, preserves_flags)
        );
    }
}

#[cfg(miri)]
pub(super) const fn clear_registers() {}

/// Erases rows that have a key. The write is volatile, so that the compiler keeps it.
#[inline]
pub(super) fn erase(rows: &mut [__m512i]) {
    for row in rows {
        // SAFETY: a vector is as long as the array, and is aligned for it.
        unsafe { core::ptr::from_mut(row).cast::<[u64; 8]>().write_volatile([0; 8]) };
    }
}

/// Reads a row from memory even if the compiler has its value already: the read is volatile.
#[inline]
pub(super) fn reread(row: &__m512i) -> __m512i {
    // SAFETY: a reference can be read.
    unsafe { core::ptr::from_ref(row).read_volatile() }
}

/// Computes a row here. If the compiler computed it later, it would store what it is computed from until then.
#[cfg(not(miri))]
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn evaluate(row: &mut __m512i) {
    let value = *row;
    // SAFETY: there is no instruction, only a comment.
    unsafe {
        core::arch::asm!(
            "/* {0} */",
            inout(zmm_reg) value => *row,
            options(nomem, nostack, preserves_flags)
        );
    }
}

#[cfg(miri)]
pub(super) const fn evaluate(_: &mut __m512i) {}

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

#[cfg(all(test, not(miri)))]
#[allow(clippy::print_stdout)]
mod tests {
    use crate::avx512::{Keystream, Vectors};
    use crate::{Key, KeystreamCache, Lane, Packet};

    /// The vector registers, before anything else changes them.
    #[inline(always)]
    fn read_registers(bytes: &mut [u8; 2048]) {
        // SAFETY: the instructions write 32 registers of 64 bytes, which is the length of the array. The processor has them:
        // there is a value of `Vectors`.
        unsafe {
            core::arch::asm!(
                "vmovdqu64 [{0} + 0], zmm0",
                "vmovdqu64 [{0} + 64], zmm1",
                "vmovdqu64 [{0} + 128], zmm2",
                "vmovdqu64 [{0} + 192], zmm3",
                "vmovdqu64 [{0} + 256], zmm4",
                "vmovdqu64 [{0} + 320], zmm5",
                "vmovdqu64 [{0} + 384], zmm6",
                "vmovdqu64 [{0} + 448], zmm7",
                "vmovdqu64 [{0} + 512], zmm8",
                "vmovdqu64 [{0} + 576], zmm9",
                "vmovdqu64 [{0} + 640], zmm10",
                "vmovdqu64 [{0} + 704], zmm11",
                "vmovdqu64 [{0} + 768], zmm12",
                "vmovdqu64 [{0} + 832], zmm13",
                "vmovdqu64 [{0} + 896], zmm14",
                "vmovdqu64 [{0} + 960], zmm15",
                "vmovdqu64 [{0} + 1024], zmm16",
                "vmovdqu64 [{0} + 1088], zmm17",
                "vmovdqu64 [{0} + 1152], zmm18",
                "vmovdqu64 [{0} + 1216], zmm19",
                "vmovdqu64 [{0} + 1280], zmm20",
                "vmovdqu64 [{0} + 1344], zmm21",
                "vmovdqu64 [{0} + 1408], zmm22",
                "vmovdqu64 [{0} + 1472], zmm23",
                "vmovdqu64 [{0} + 1536], zmm24",
                "vmovdqu64 [{0} + 1600], zmm25",
                "vmovdqu64 [{0} + 1664], zmm26",
                "vmovdqu64 [{0} + 1728], zmm27",
                "vmovdqu64 [{0} + 1792], zmm28",
                "vmovdqu64 [{0} + 1856], zmm29",
                "vmovdqu64 [{0} + 1920], zmm30",
                "vmovdqu64 [{0} + 1984], zmm31",
                in(reg) bytes.as_mut_ptr(),
                options(nostack, preserves_flags)
            );
        }
    }

    /// Not only of a key: what is computed from it is a secret too.
    #[test]
    fn nothing_is_left_in_the_vector_registers() {
        let Some(vectors) = Vectors::detect() else {
            println!("skipped: this processor has no AVX-512 IFMA");
            return;
        };
        let key = Key::new(&core::array::from_fn(|i| 0xa5 ^ (37 * i) as u8));
        let key = key.as_bytes();
        let mut texts = [[7; 1600]; crate::PACKETS];
        let mut registers = [1; 2048];
        for len in [20, 200, 700, 1400, 1600] {
            for call in 0..6 {
                let mut keystream = Keystream::default();
                let mut seal_ahead = |counter, text: &mut [u8]| {
                    vectors.crypt_one::<true>(Some(&mut keystream), key, (0, counter), text)
                };
                {
                    let mut texts = texts.iter_mut();
                    let mut lanes = core::array::from_fn(|_| match texts.next() {
                        Some(text) => Lane { key, nonce: [0; 12], text: &mut text[..len] },
                        None => Lane::unused(key),
                    });
                    match call {
                        0 => drop(vectors.seal(&mut lanes)),
                        1 => drop(vectors.open(&mut lanes)),
                        2 => drop(vectors.crypt_one::<true>(None, key, (0, 1), lanes[0].text)),
                        3 => drop(vectors.crypt_one::<false>(None, key, (0, 1), lanes[0].text)),
                        // Computes keystream ahead with the second packet, and uses it with the third.
                        _ => {
                            for counter in 1..call - 1 {
                                let _tag = seal_ahead(counter, lanes[0].text);
                            }
                        }
                    }
                    read_registers(&mut registers);
                }
                let left = registers.iter().position(|byte| *byte != 0).map(|at| at / 64);
                assert_eq!(left, None, "a register after call {call}, length {len}");
            }
        }
    }

    /// The cache copies the key once the group has cleared them.
    #[test]
    fn no_key_is_left_in_the_vector_registers_after_a_group_through_a_cache() {
        let key = Key::new(&core::array::from_fn(|i| 0xa5 ^ (37 * i) as u8));
        for len in [20, 64, 700, 1400] {
            let (mut texts, mut tags, mut done) = ([[7; 1600]; 8], [[0; 16]; 8], [false; 8]);
            let mut cache = Box::<KeystreamCache>::default();
            let mut registers = [1; 2048];
            if Vectors::detect().is_none() {
                println!("skipped: this processor has no AVX-512 IFMA");
                return;
            }
            let parts = texts.iter_mut().zip(&mut tags).zip(&mut done);
            cache.seal_batch(parts.map(|((text, tag), done)| Packet {
                key: &key,
                nonce: [0; 12],
                text: &mut text[..len],
                tag,
                done,
            }));
            read_registers(&mut registers);
            let is_left = |word: &[u8]| registers.windows(8).any(|bytes| bytes == word);
            assert!(!key.as_bytes().chunks(8).any(is_left), "length {len}");
        }
    }
}
