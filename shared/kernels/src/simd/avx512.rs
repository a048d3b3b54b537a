//! Sixteen lanes as one AVX-512 register. Nothing here knows a kernel.

use std::arch::x86_64::*;

use super::{LANES, Simd};

/// Proof that the CPU has AVX-512 F, BW, VL and DQ.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// Safe to call only where the compiler knows the features.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    #[inline]
    pub(crate) fn token() -> Self {
        Self(())
    }
}

impl Simd for Avx512 {
    type F32 = __m512;

    #[inline(always)]
    fn prefetch<T>(self, place: Option<&T>) {
        let Some(place) = place else { return };
        // SAFETY: a prefetch reads nothing that a program can see, at any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(place).cast()) };
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: the token proves that the CPU has the features; the same in every method below.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: the token; the array has sixteen elements.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, x: __m512, out: &mut [f32; LANES]) {
        // SAFETY: the token; the array has sixteen elements.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn load_part(self, x: &[f32]) -> __m512 {
        // SAFETY: the token; lanes that are masked off are not read.
        unsafe { _mm512_maskz_loadu_ps(first_lanes(x.len()), x.as_ptr()) }
    }

    #[inline(always)]
    fn store_part(self, x: __m512, out: &mut [f32]) {
        // SAFETY: the token; lanes that are masked off are not written.
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), first_lanes(out.len()), x) }
    }

    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> __m512 {
        // SAFETY: the token; the array has sixteen elements of 16 bits.
        let halves = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
        // SAFETY: the token.
        unsafe { _mm512_cvtph_ps(halves) }
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> __m512 {
        // SAFETY: the token; the array has sixteen bytes.
        let bytes = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
        // SAFETY: the token.
        let integers = unsafe { _mm512_cvtepi8_epi32(bytes) };
        // SAFETY: the token.
        unsafe { _mm512_cvtepi32_ps(integers) }
    }

    #[inline(always)]
    fn store_f16(self, x: __m512, out: &mut [u16; LANES]) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: the token.
        let halves = unsafe { _mm512_cvtps_ph::<NEAREST>(x) };
        // SAFETY: the token; the array has sixteen elements of 16 bits.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), halves) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the token.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn greater(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn less(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn nan_where_nan(self, x: __m512, y: __m512) -> __m512 {
        // SAFETY: the token.
        let is_nan = unsafe { _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x) };
        let nan = self.splat(f32::NAN);
        // SAFETY: the token.
        unsafe { _mm512_mask_blend_ps(is_nan, y, nan) }
    }

    #[inline(always)]
    fn two_powers(self, shifted: __m512) -> (__m512, __m512) {
        // SAFETY: the token, here and below.
        let bits = unsafe { _mm512_castps_si512(shifted) };
        // SAFETY: the token.
        let origin = unsafe { _mm512_set1_epi32(super::SHIFT_BITS) };
        // SAFETY: the token.
        let n = unsafe { _mm512_sub_epi32(bits, origin) };
        // SAFETY: the token.
        let half = unsafe { _mm512_srai_epi32::<1>(n) };
        // SAFETY: the token.
        let rest = unsafe { _mm512_sub_epi32(n, half) };
        (power(half), power(rest))
    }
}

/// The mask of the first `n` lanes; a slice longer than the lanes would be a wrong call.
#[inline(always)]
fn first_lanes(n: usize) -> __mmask16 {
    assert!(n <= LANES, "invariant: a part has at most {LANES} elements");
    ((1_u32 << n) - 1) as __mmask16
}

/// Only called with a token at hand.
#[inline(always)]
fn power(n: __m512i) -> __m512 {
    // SAFETY: the caller's token proves the features, here and below.
    let bias = unsafe { _mm512_set1_epi32(127) };
    // SAFETY: as above.
    let biased = unsafe { _mm512_add_epi32(n, bias) };
    // SAFETY: as above.
    let bits = unsafe { _mm512_slli_epi32::<23>(biased) };
    // SAFETY: as above.
    unsafe { _mm512_castsi512_ps(bits) }
}
