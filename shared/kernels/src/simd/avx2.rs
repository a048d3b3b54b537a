//! Sixteen lanes as two AVX2 registers. Nothing here knows a kernel.

use std::arch::x86_64::*;

use super::{LANES, Simd};

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// Safe to call only where the compiler knows the features.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    pub(crate) fn token() -> Self {
        Self(())
    }
}

/// Applies an intrinsic to both halves.
macro_rules! halves {
    ($intrinsic:ident($($x:ident),+)) => {
        (
            // SAFETY: the token proves that the CPU has the features.
            unsafe { $intrinsic($($x.0),+) },
            // SAFETY: as above.
            unsafe { $intrinsic($($x.1),+) },
        )
    };
}

/// Both halves of sixteen elements.
#[inline(always)]
fn split<T>(x: &[T; LANES]) -> (&[T], &[T]) {
    x.split_at(LANES / 2)
}

impl Simd for Avx2 {
    type F32 = (__m256, __m256);

    #[inline(always)]
    fn prefetch<T>(self, place: Option<&T>) {
        let Some(place) = place else { return };
        // SAFETY: a prefetch reads nothing that a program can see, at any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(place).cast()) };
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        // SAFETY: the token proves that the CPU has the features.
        let half = unsafe { _mm256_set1_ps(x) };
        (half, half)
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F32 {
        let (low, high) = split(x);
        // SAFETY: the token proves the features; each half has eight elements.
        let low = unsafe { _mm256_loadu_ps(low.as_ptr()) };
        // SAFETY: as above.
        let high = unsafe { _mm256_loadu_ps(high.as_ptr()) };
        (low, high)
    }

    #[inline(always)]
    fn store(self, x: Self::F32, out: &mut [f32; LANES]) {
        let (low, high) = out.split_at_mut(LANES / 2);
        // SAFETY: the token proves the features; each half has eight elements.
        unsafe { _mm256_storeu_ps(low.as_mut_ptr(), x.0) };
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(high.as_mut_ptr(), x.1) };
    }

    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32 {
        let (low, high) = split(x);
        // SAFETY: the token proves the features; each half has eight elements of 16 bits.
        let low = unsafe { _mm_loadu_si128(low.as_ptr().cast()) };
        // SAFETY: as above.
        let high = unsafe { _mm_loadu_si128(high.as_ptr().cast()) };
        let halves = (low, high);
        halves!(_mm256_cvtph_ps(halves))
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::F32 {
        // SAFETY: the token proves the features; the array has sixteen bytes.
        let bytes = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
        // SAFETY: the token proves that the CPU has the features.
        let upper = unsafe { _mm_srli_si128::<8>(bytes) };
        let bytes = (bytes, upper);
        let integers = halves!(_mm256_cvtepi8_epi32(bytes));
        halves!(_mm256_cvtepi32_ps(integers))
    }

    #[inline(always)]
    fn store_f16(self, x: Self::F32, out: &mut [u16; LANES]) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
        let (low, high) = out.split_at_mut(LANES / 2);
        // SAFETY: the token proves the features.
        let narrow = unsafe { _mm256_cvtps_ph::<NEAREST>(x.0) };
        // SAFETY: the token proves the features; the half has eight elements of 16 bits.
        unsafe { _mm_storeu_si128(low.as_mut_ptr().cast(), narrow) };
        // SAFETY: as above.
        let narrow = unsafe { _mm256_cvtps_ph::<NEAREST>(x.1) };
        // SAFETY: as above.
        unsafe { _mm_storeu_si128(high.as_mut_ptr().cast(), narrow) };
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        halves!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        halves!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        halves!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        halves!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        halves!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn greater(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        halves!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn less(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        halves!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn nan_where_nan(self, x: Self::F32, y: Self::F32) -> Self::F32 {
        let nan = self.splat(f32::NAN);
        // SAFETY: the token proves the features.
        let low = unsafe { _mm256_cmp_ps::<_CMP_UNORD_Q>(x.0, x.0) };
        // SAFETY: as above.
        let high = unsafe { _mm256_cmp_ps::<_CMP_UNORD_Q>(x.1, x.1) };
        let is_nan = (low, high);
        halves!(_mm256_blendv_ps(y, nan, is_nan))
    }

    #[inline(always)]
    fn two_powers(self, shifted: Self::F32) -> (Self::F32, Self::F32) {
        let (low, high) = (two_powers(shifted.0), two_powers(shifted.1));
        ((low.0, high.0), (low.1, high.1))
    }
}

/// Only called with a token at hand.
#[inline(always)]
fn two_powers(shifted: __m256) -> (__m256, __m256) {
    // SAFETY: the caller's token proves the features, here and below.
    let bits = unsafe { _mm256_castps_si256(shifted) };
    // SAFETY: as above.
    let origin = unsafe { _mm256_set1_epi32(super::SHIFT_BITS) };
    // SAFETY: as above.
    let n = unsafe { _mm256_sub_epi32(bits, origin) };
    // SAFETY: as above.
    let half = unsafe { _mm256_srai_epi32::<1>(n) };
    // SAFETY: as above.
    let rest = unsafe { _mm256_sub_epi32(n, half) };
    (power(half), power(rest))
}

#[inline(always)]
fn power(n: __m256i) -> __m256 {
    // SAFETY: the caller's token proves the features, here and below.
    let bias = unsafe { _mm256_set1_epi32(127) };
    // SAFETY: as above.
    let biased = unsafe { _mm256_add_epi32(n, bias) };
    // SAFETY: as above.
    let bits = unsafe { _mm256_slli_epi32::<23>(biased) };
    // SAFETY: as above.
    unsafe { _mm256_castsi256_ps(bits) }
}
