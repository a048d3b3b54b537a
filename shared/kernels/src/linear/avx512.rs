//! The 16 rows of a tile in one AVX-512 register, with and without VNNI.

use super::lanes::{Lanes, for_tokens, sum_float, sum_quantized};
use super::{FloatLeaf, QuantizedLeaf, RowSums};
use crate::formats::{FloatFormat, QuantFormat};
use crate::packed::{Line, TILE_ROWS};
use crate::simd;
use std::arch::x86_64::*;

/// Tokens whose sums fit the registers beside the codes of a group, by planes of their codes, less one. With two planes
/// sixteen fit as well, and are a third slower than twice eight for most types of weights.
const MOST_TOKENS: [usize; 2] = [16, 8];
/// Tokens of plain numbers that are summed at once: each has a row of its own to read, and an address for it.
const MOST_FLOAT_TOKENS: usize = 8;

/// Proof that the CPU has AVX-512 F, BW, VL and DQ, and VNNI if so marked.
#[derive(Clone, Copy)]
struct Avx512<const VNNI: bool>(simd::Avx512);

impl Avx512<false> {
    /// Safe to call only where the compiler knows the features.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    #[inline]
    fn token() -> Self {
        Self(simd::Avx512::token())
    }
}

impl Avx512<true> {
    /// Safe to call only where the compiler knows the features.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    #[inline]
    fn token() -> Self {
        Self(simd::Avx512::token())
    }
}

/// Sums a leaf of quantized weights.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(crate) fn sum_quantized_vnni<F: QuantFormat, const P: usize>(
    leaf: &QuantizedLeaf<'_>,
    sums: &mut [RowSums],
) {
    sum_quantized_of::<_, F, P>(Avx512::<true>::token(), leaf, sums);
}

/// Sums a leaf of quantized weights.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn sum_quantized_avx512<F: QuantFormat, const P: usize>(
    leaf: &QuantizedLeaf<'_>,
    sums: &mut [RowSums],
) {
    sum_quantized_of::<_, F, P>(Avx512::<false>::token(), leaf, sums);
}

#[inline(always)]
fn sum_quantized_of<const VNNI: bool, F: QuantFormat, const P: usize>(
    v: Avx512<VNNI>,
    leaf: &QuantizedLeaf<'_>,
    sums: &mut [RowSums],
) {
    for_tokens!(sums.len(), MOST_TOKENS[P - 1], T, first => {
        sum_quantized::<_, F, P, T>(v, &leaf.starting_at::<P>(first), &mut sums[first..first + T])
    });
}

/// Sums a leaf of plain numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn sum_float_avx512<F: FloatFormat>(leaf: &FloatLeaf<'_>, sums: &mut [RowSums]) {
    let v = Avx512::<false>::token();
    for_tokens!(sums.len(), MOST_FLOAT_TOKENS, T, first => {
        sum_float::<_, F, T>(v, &leaf.starting_at(first), &mut sums[first..first + T])
    });
}

/// An intrinsic in a method of [`Avx512`].
macro_rules! op {
    ($intrinsic:expr) => {{
        // SAFETY: the receiver proves the CPU has the instruction; what is loaded or stored is a whole array.
        #[allow(unused_unsafe)]
        unsafe {
            $intrinsic
        }
    }};
}

impl<const VNNI: bool> Lanes for Avx512<VNNI> {
    type Simd = simd::Avx512;
    type Bytes = __m512i;
    type Ints = __m512i;
    const HOLDS_SUMS: bool = true;
    const DOTS_WAIT: bool = VNNI;

    #[inline(always)]
    fn simd(self) -> simd::Avx512 {
        self.0
    }

    #[inline(always)]
    fn prefetch<const NEAREST: bool, T>(self, first: &T, ahead: usize) {
        let address = std::ptr::from_ref(first).cast::<i8>().wrapping_add(ahead);
        if NEAREST {
            op!(_mm_prefetch::<_MM_HINT_NTA>(address));
        } else {
            op!(_mm_prefetch::<_MM_HINT_T1>(address));
        }
    }

    #[inline(always)]
    fn load_bytes(self, line: &Line) -> __m512i {
        op!(_mm512_load_si512(line.0.as_ptr().cast()))
    }

    #[inline(always)]
    fn field(self, bytes: __m512i, right: i32, mask: u8) -> __m512i {
        let count = op!(_mm_cvtsi32_si128(right.abs()));
        let shifted =
            if right < 0 { op!(_mm512_sll_epi32(bytes, count)) } else { op!(_mm512_srl_epi32(bytes, count)) };
        let mask = op!(_mm512_set1_epi8(mask as i8));
        op!(_mm512_and_si512(shifted, mask))
    }

    #[inline(always)]
    fn or(self, left: __m512i, right: __m512i) -> __m512i {
        op!(_mm512_or_si512(left, right))
    }

    #[inline(always)]
    fn no_bits(self) -> __m512i {
        op!(_mm512_setzero_si512())
    }

    #[inline(always)]
    fn dot<const BITS: usize>(self, acc: __m512i, codes: __m512i, quad: i32) -> __m512i {
        let quads = op!(_mm512_set1_epi32(quad));
        if VNNI {
            // SAFETY: this type proves VNNI.
            return unsafe { _mm512_dpbusd_epi32(acc, codes, quads) };
        }
        // Pairs of codes up to 6 bits fit i16: 2 * 63 * 128 < 2^15. Larger codes go as two nibbles.
        if BITS <= 6 {
            let pairs = op!(_mm512_maddubs_epi16(codes, quads));
            let ones = op!(_mm512_set1_epi16(1));
            let sums = op!(_mm512_madd_epi16(pairs, ones));
            return op!(_mm512_add_epi32(acc, sums));
        }
        let low = self.dot::<4>(acc, self.field(codes, 0, 15), quad);
        let pairs = op!(_mm512_maddubs_epi16(self.field(codes, 4, 15), quads));
        let sixteens = op!(_mm512_set1_epi16(16));
        let sums = op!(_mm512_madd_epi16(pairs, sixteens));
        op!(_mm512_add_epi32(low, sums))
    }

    #[inline(always)]
    fn splat_int(self, value: i32) -> __m512i {
        op!(_mm512_set1_epi32(value))
    }

    #[inline(always)]
    fn times(self, ints: __m512i, factor: i32) -> __m512i {
        op!(_mm512_mullo_epi32(ints, _mm512_set1_epi32(factor)))
    }

    #[inline(always)]
    fn plus(self, left: __m512i, right: __m512i) -> __m512i {
        op!(_mm512_add_epi32(left, right))
    }

    #[inline(always)]
    fn join(self, high: __m512i, low: __m512i) -> __m512i {
        let high = op!(_mm512_slli_epi32::<8>(high));
        op!(_mm512_add_epi32(high, low))
    }

    #[inline(always)]
    fn to_floats(self, ints: __m512i) -> __m512 {
        op!(_mm512_cvtepi32_ps(ints))
    }

    #[inline(always)]
    fn load_u8(self, bytes: &[u8; TILE_ROWS]) -> __m512i {
        let bytes = op!(_mm_loadu_si128(bytes.as_ptr().cast()));
        op!(_mm512_cvtepu8_epi32(bytes))
    }

    #[inline(always)]
    fn load_i8(self, bytes: &[u8; TILE_ROWS]) -> __m512i {
        let bytes = op!(_mm_loadu_si128(bytes.as_ptr().cast()));
        op!(_mm512_cvtepi8_epi32(bytes))
    }

    #[inline(always)]
    fn load_nibbles(self, bytes: &[u8; TILE_ROWS]) -> [__m512i; 2] {
        let bytes = self.load_u8(bytes);
        let low = op!(_mm512_and_si512(bytes, _mm512_set1_epi32(15)));
        [low, op!(_mm512_srli_epi32::<4>(bytes))]
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 4 * TILE_ROWS]) -> __m512 {
        op!(_mm512_loadu_ps(bytes.as_ptr().cast()))
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * TILE_ROWS]) -> __m512 {
        let halfs = op!(_mm256_loadu_si256(bytes.as_ptr().cast()));
        op!(_mm512_cvtph_ps(halfs))
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * TILE_ROWS]) -> __m512 {
        let halfs = op!(_mm256_loadu_si256(bytes.as_ptr().cast()));
        let wide = op!(_mm512_cvtepu16_epi32(halfs));
        let shifted = op!(_mm512_slli_epi32::<16>(wide));
        op!(_mm512_castsi512_ps(shifted))
    }
}
