//! The 16 rows of a tile in two AVX2 registers.

use super::lanes::{Lanes, for_tokens, sum_float, sum_quantized};
use super::{FloatLeaf, QuantizedLeaf, RowSums};
use crate::formats::{FloatFormat, QuantFormat};
use crate::packed::{Line, TILE_ROWS};
use crate::simd;
use std::arch::x86_64::*;

/// Tokens whose sums fit the registers beside the codes of a group.
const MOST_TOKENS: usize = 4;

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
struct Avx2(simd::Avx2);

/// Sums a leaf of quantized weights.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn sum_quantized_avx2<F: QuantFormat, const P: usize>(
    leaf: &QuantizedLeaf<'_>,
    sums: &mut [RowSums],
) {
    let v = Avx2(simd::Avx2::token());
    for_tokens!(sums.len(), MOST_TOKENS, T, first => {
        sum_quantized::<_, F, P, T>(v, &leaf.starting_at::<P>(first), &mut sums[first..first + T])
    });
}

/// Sums a leaf of plain numbers.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn sum_float_avx2<F: FloatFormat>(leaf: &FloatLeaf<'_>, sums: &mut [RowSums]) {
    let v = Avx2(simd::Avx2::token());
    for_tokens!(sums.len(), MOST_TOKENS, T, first => {
        sum_float::<_, F, T>(v, &leaf.starting_at(first), &mut sums[first..first + T])
    });
}

/// An intrinsic in a method of [`Avx2`].
macro_rules! op {
    ($intrinsic:expr) => {{
        // SAFETY: the receiver proves the CPU has the instruction; what is loaded or stored is inside an array.
        #[allow(unused_unsafe)]
        unsafe {
            $intrinsic
        }
    }};
}

/// The same for rows 0..8 and rows 8..16.
macro_rules! both {
    ($half:ident => $intrinsic:expr) => {{
        let first = {
            const $half: usize = 0;
            op!($intrinsic)
        };
        let second = {
            const $half: usize = 1;
            op!($intrinsic)
        };
        [first, second]
    }};
}

impl Lanes for Avx2 {
    type Simd = simd::Avx2;
    type Bytes = [__m256i; 2];
    type Ints = [__m256i; 2];
    const HOLDS_SUMS: bool = false;
    const DOTS_WAIT: bool = false;

    #[inline(always)]
    fn simd(self) -> simd::Avx2 {
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
    fn load_bytes(self, line: &Line) -> [__m256i; 2] {
        let halves = line.0.as_chunks::<32>().0;
        both!(H => _mm256_load_si256(halves[H].as_ptr().cast()))
    }

    #[inline(always)]
    fn field(self, bytes: [__m256i; 2], right: i32, mask: u8) -> [__m256i; 2] {
        let count = op!(_mm_cvtsi32_si128(right.abs()));
        let mask = op!(_mm256_set1_epi8(mask as i8));
        let shifted = if right < 0 {
            both!(H => _mm256_sll_epi32(bytes[H], count))
        } else {
            both!(H => _mm256_srl_epi32(bytes[H], count))
        };
        both!(H => _mm256_and_si256(shifted[H], mask))
    }

    #[inline(always)]
    fn or(self, left: [__m256i; 2], right: [__m256i; 2]) -> [__m256i; 2] {
        both!(H => _mm256_or_si256(left[H], right[H]))
    }

    #[inline(always)]
    fn no_bits(self) -> [__m256i; 2] {
        [op!(_mm256_setzero_si256()); 2]
    }

    #[inline(always)]
    fn dot<const BITS: usize>(self, acc: [__m256i; 2], codes: [__m256i; 2], quad: i32) -> [__m256i; 2] {
        let quads = op!(_mm256_set1_epi32(quad));
        // Pairs of codes up to 6 bits fit i16: 2 * 63 * 128 < 2^15. Larger codes go as two nibbles.
        if BITS <= 6 {
            let pairs = both!(H => _mm256_maddubs_epi16(codes[H], quads));
            let ones = op!(_mm256_set1_epi16(1));
            let sums = both!(H => _mm256_madd_epi16(pairs[H], ones));
            return both!(H => _mm256_add_epi32(acc[H], sums[H]));
        }
        let low = self.dot::<4>(acc, self.field(codes, 0, 15), quad);
        let high = self.field(codes, 4, 15);
        let pairs = both!(H => _mm256_maddubs_epi16(high[H], quads));
        let sixteens = op!(_mm256_set1_epi16(16));
        let sums = both!(H => _mm256_madd_epi16(pairs[H], sixteens));
        both!(H => _mm256_add_epi32(low[H], sums[H]))
    }

    #[inline(always)]
    fn splat_int(self, value: i32) -> [__m256i; 2] {
        [op!(_mm256_set1_epi32(value)); 2]
    }

    #[inline(always)]
    fn times(self, ints: [__m256i; 2], factor: i32) -> [__m256i; 2] {
        let factor = op!(_mm256_set1_epi32(factor));
        both!(H => _mm256_mullo_epi32(ints[H], factor))
    }

    #[inline(always)]
    fn plus(self, left: [__m256i; 2], right: [__m256i; 2]) -> [__m256i; 2] {
        both!(H => _mm256_add_epi32(left[H], right[H]))
    }

    #[inline(always)]
    fn join(self, high: [__m256i; 2], low: [__m256i; 2]) -> [__m256i; 2] {
        let high = both!(H => _mm256_slli_epi32::<8>(high[H]));
        both!(H => _mm256_add_epi32(high[H], low[H]))
    }

    #[inline(always)]
    fn to_floats(self, ints: [__m256i; 2]) -> (__m256, __m256) {
        let [low, high] = both!(H => _mm256_cvtepi32_ps(ints[H]));
        (low, high)
    }

    #[inline(always)]
    fn load_u8(self, bytes: &[u8; TILE_ROWS]) -> [__m256i; 2] {
        let halves = bytes.as_chunks::<8>().0;
        let halves = both!(H => _mm_loadl_epi64(halves[H].as_ptr().cast()));
        both!(H => _mm256_cvtepu8_epi32(halves[H]))
    }

    #[inline(always)]
    fn load_i8(self, bytes: &[u8; TILE_ROWS]) -> [__m256i; 2] {
        let halves = bytes.as_chunks::<8>().0;
        let halves = both!(H => _mm_loadl_epi64(halves[H].as_ptr().cast()));
        both!(H => _mm256_cvtepi8_epi32(halves[H]))
    }

    #[inline(always)]
    fn load_nibbles(self, bytes: &[u8; TILE_ROWS]) -> [[__m256i; 2]; 2] {
        let bytes = self.load_u8(bytes);
        let mask = op!(_mm256_set1_epi32(15));
        [both!(H => _mm256_and_si256(bytes[H], mask)), both!(H => _mm256_srli_epi32::<4>(bytes[H]))]
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 4 * TILE_ROWS]) -> (__m256, __m256) {
        let halves = bytes.as_chunks::<32>().0;
        let [low, high] = both!(H => _mm256_loadu_ps(halves[H].as_ptr().cast()));
        (low, high)
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * TILE_ROWS]) -> (__m256, __m256) {
        let halves = bytes.as_chunks::<16>().0;
        let halves = both!(H => _mm_loadu_si128(halves[H].as_ptr().cast()));
        let [low, high] = both!(H => _mm256_cvtph_ps(halves[H]));
        (low, high)
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * TILE_ROWS]) -> (__m256, __m256) {
        let halves = bytes.as_chunks::<16>().0;
        let halves = both!(H => _mm_loadu_si128(halves[H].as_ptr().cast()));
        let wide = both!(H => _mm256_cvtepu16_epi32(halves[H]));
        let shifted = both!(H => _mm256_slli_epi32::<16>(wide[H]));
        let [low, high] = both!(H => _mm256_castsi256_ps(shifted[H]));
        (low, high)
    }
}
