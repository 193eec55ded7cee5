//! The multiplications of AVX-512 IFMA.

/// Adds the low, or the high, 52 bits of the product of two lanes of 52 bits.
#[cfg(not(miri))]
pub(super) use core::arch::x86_64::{
    _mm512_madd52hi_epu64 as madd52hi, _mm512_madd52lo_epu64 as madd52lo,
};

/// The same for Miri, which does not know these two instructions.
#[cfg(miri)]
pub(super) use interpreted::{madd52hi, madd52lo};

#[cfg(miri)]
mod interpreted {
    use crate::avx512::memory::{from_u64, to_u64};
    use core::arch::x86_64::__m512i;

    fn product(a: u64, b: u64) -> u128 {
        let factor = |lane: u64| u128::from(lane & ((1 << 52) - 1));
        factor(a) * factor(b)
    }

    #[target_feature(enable = "avx512f")]
    fn add_products(sums: __m512i, a: __m512i, b: __m512i, half: fn(u128) -> u64) -> __m512i {
        let (mut sums, a, b) = (to_u64(sums), to_u64(a), to_u64(b));
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = sum.wrapping_add(half(product(a, b)));
        }
        from_u64(&sums)
    }

    #[target_feature(enable = "avx512f")]
    pub(in crate::avx512) fn madd52lo(sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
        add_products(sums, a, b, |product| product as u64 & ((1 << 52) - 1))
    }

    #[target_feature(enable = "avx512f")]
    pub(in crate::avx512) fn madd52hi(sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
        add_products(sums, a, b, |product| (product >> 52) as u64)
    }
}
