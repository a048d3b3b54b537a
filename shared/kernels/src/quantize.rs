//! Quantization of activations: each row, each 32 elements, symmetric 16-bit codes with an f32 scale. It knows
//! nothing of weights.
//!
//! For the 32 elements x of a group: `scale = max |x| / MAX_CODE`, `code = round_ties_even(x * (1 / scale))` clamped
//! to +-[`MAX_CODE`]. A group whose largest magnitude is below [`VANISHING`] is all zero. A NaN or infinity makes the
//! scale of its group NaN or infinite, so that it shows in every product.
//!
//! The multiply units take 8 bits, so a code is `256 * high + low` with two i8: a product is two exact int8 products,
//! and weights are still read once. Eight bits alone are too few: on a text of 2,000 tokens SmolLM2 then prefers
//! another token than in f32 at 3.7 % of the positions, with 16 bits at none.

use crate::Kernels;
use crate::formats::GROUP_LEN;
use crate::pool::ThreadPool;

/// Magnitude below which a group is taken for zero (2^-100): the reciprocal of its scale might not be finite.
pub const VANISHING: f32 = f32::from_bits((127 - 100) << 23);

/// Largest code: the high byte of `code + 128` is at most 127.
pub const MAX_CODE: i32 = 32_639;

/// The bytes of 32 codes as the multiply unit takes them: 4 consecutive i8 in each i32, the first in the lowest byte.
pub(crate) type Quads = [i32; GROUP_LEN / 4];

/// [`MAX_CODE`] among numbers.
const LIMIT: f32 = MAX_CODE as f32;

/// 32 quantized activations.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct QuantizedGroup {
    /// High bytes of the codes, -127..=127.
    pub(crate) high: Quads,
    /// Low bytes of the codes, -128..=127.
    pub(crate) low: Quads,
    /// What one unit of a code is worth.
    pub(crate) scale: f32,
    /// `scale * (sum of the codes as f32)`; multiplies the minimum of weights.
    pub(crate) scaled_sum: f32,
    /// Sums of the codes of both half groups.
    pub(crate) sums: [i32; 2],
}

impl QuantizedGroup {
    /// The codes in column order.
    pub fn codes(&self) -> [i16; GROUP_LEN] {
        let byte = |quads: &Quads, column: usize| i16::from((quads[column / 4] >> (column % 4 * 8)) as i8);
        std::array::from_fn(|column| 256 * byte(&self.high, column) + byte(&self.low, column))
    }

    /// What one unit of a code is worth.
    pub fn scale(&self) -> f32 {
        self.scale
    }
}

/// Rows of quantized activations. Kept between calls so that its memory is allocated once.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    n_rows: usize,
    n_cols: usize,
    groups: Vec<QuantizedGroup>,
}

impl QuantizedRows {
    /// No rows yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Elements of a row.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Groups of a row.
    pub fn n_groups(&self) -> usize {
        self.n_cols.div_ceil(GROUP_LEN)
    }

    /// All groups, `[n_rows, n_groups]`.
    pub fn groups(&self) -> &[QuantizedGroup] {
        &self.groups[..self.n_rows * self.n_groups()]
    }
}

/// Quantizes one row: kernel type of the dispatch table.
pub(crate) type QuantizeRow = unsafe fn(x: &[f32], out: &mut [QuantizedGroup]);

/// Quantizes `x` of shape `[n_rows, n_cols]` into `rows`. A short last group is filled up with zeros.
///
/// # Panics
/// When `x` is not a whole number of rows.
pub fn quantize_rows(
    kernels: &'static Kernels,
    pool: &ThreadPool,
    x: &[f32],
    n_cols: usize,
    rows: &mut QuantizedRows,
) {
    assert!(
        n_cols > 0 && x.len().is_multiple_of(n_cols),
        "invariant: {} elements are rows of {n_cols}",
        x.len()
    );
    rows.n_rows = x.len() / n_cols;
    rows.n_cols = n_cols;
    let n_groups = rows.n_groups();
    let n_used = rows.n_rows * n_groups;
    if rows.groups.len() < n_used {
        rows.groups.resize(n_used, QuantizedGroup::default());
    }
    pool.run_pieces(&mut rows.groups[..n_used], n_groups, &|row, groups| {
        // SAFETY: a table of kernels exists only on a CPU that has its instruction set.
        unsafe { (kernels.linear.quantize_row)(&x[row * n_cols..][..n_cols], groups) }
    });
}

/// `(scale, 1 / scale)` of a group from its largest magnitude; both 0 when that vanishes. NaN stays NaN.
#[inline]
fn scale_and_inverse(largest: f32) -> (f32, f32) {
    if largest < VANISHING {
        return (0.0, 0.0);
    }
    let scale = largest / MAX_CODE as f32;
    (scale, 1.0 / scale)
}

/// Calls `group` for each 32 elements of a row, the last filled up with zeros.
#[inline(always)]
fn for_each_group(
    x: &[f32],
    out: &mut [QuantizedGroup],
    mut group: impl FnMut(&[f32; GROUP_LEN]) -> QuantizedGroup,
) {
    let (whole, rest) = x.as_chunks::<GROUP_LEN>();
    for (x, out) in whole.iter().zip(out.iter_mut()) {
        *out = group(x);
    }
    if let Some(out) = out.get_mut(whole.len()) {
        let mut last = [0.0; GROUP_LEN];
        last[..rest.len()].copy_from_slice(rest);
        *out = group(&last);
    }
}

/// Joins codes and scale to a group.
#[inline(always)]
fn finish_group(high: Quads, low: Quads, sums: [i32; 2], scale: f32) -> QuantizedGroup {
    QuantizedGroup { high, low, scale, scaled_sum: scale * (sums[0] + sums[1]) as f32, sums }
}

/// The definition.
pub(crate) fn quantize_row_scalar(x: &[f32], out: &mut [QuantizedGroup]) {
    for_each_group(x, out, |x| {
        // Magnitudes compare as integers do, NaN above all.
        let largest = x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        let (scale, inverse) = scale_and_inverse(f32::from_bits(largest));
        let (mut high_bytes, mut low_bytes, mut sums) = (Quads::default(), Quads::default(), [0; 2]);
        for (column, x) in x.iter().enumerate() {
            let scaled = x * inverse;
            // NaN becomes the smallest code, as it does in the twins.
            let scaled = if scaled > -LIMIT { scaled } else { -LIMIT };
            let scaled = if scaled < LIMIT { scaled } else { LIMIT };
            let code = scaled.round_ties_even() as i32;
            let high = (code + 128) >> 8;
            let low = code - (high << 8);
            high_bytes[column / 4] |= (high & 0xff) << (column % 4 * 8);
            low_bytes[column / 4] |= (low & 0xff) << (column % 4 * 8);
            sums[column / 16] += code;
        }
        finish_group(high_bytes, low_bytes, sums, scale)
    });
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma,f16c")]
    fn largest_int_avx2(v: __m256i) -> i32 {
        let v = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        let v = _mm_max_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
        let v = _mm_max_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v));
        _mm_cvtsi128_si32(v)
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn sum_avx2(v: __m256i) -> i32 {
        let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
        let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v));
        _mm_cvtsi128_si32(v)
    }

    /// 32 integers of 8 bits as bytes.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn pack_avx2([a, b, c, d]: [__m256i; 4]) -> Quads {
        // Packing works within 128-bit halves, so quads come out as 0 2 4 6 1 3 5 7.
        let packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        let packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        let mut quads = Quads::default();
        // SAFETY: the array has the 32 bytes that are written.
        unsafe { _mm256_storeu_si256(quads.as_mut_ptr().cast(), packed) };
        quads
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn group_avx2(x: &[f32; GROUP_LEN]) -> QuantizedGroup {
        let magnitude = _mm256_set1_epi32(0x7fff_ffff);
        let mut parts = [_mm256_setzero_ps(); 4];
        let mut largest = _mm256_setzero_si256();
        for (part, x) in parts.iter_mut().zip(x.as_chunks::<8>().0) {
            // SAFETY: the chunk has the 8 elements that are read.
            *part = unsafe { _mm256_loadu_ps(x.as_ptr()) };
            largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(*part), magnitude));
        }
        let (scale, inverse) = scale_and_inverse(f32::from_bits(largest_int_avx2(largest) as u32));
        let inverse = _mm256_set1_ps(inverse);
        let codes = parts.map(|part| {
            let scaled = _mm256_max_ps(_mm256_mul_ps(part, inverse), _mm256_set1_ps(-LIMIT));
            _mm256_cvtps_epi32(_mm256_min_ps(scaled, _mm256_set1_ps(LIMIT)))
        });
        let [a, b, c, d] = codes;
        let sums = [sum_avx2(_mm256_add_epi32(a, b)), sum_avx2(_mm256_add_epi32(c, d))];
        let high = codes.map(|code| _mm256_srai_epi32::<8>(_mm256_add_epi32(code, _mm256_set1_epi32(128))));
        let mut low = codes;
        for (low, high) in low.iter_mut().zip(high) {
            *low = _mm256_sub_epi32(*low, _mm256_slli_epi32::<8>(high));
        }
        finish_group(pack_avx2(high), pack_avx2(low), sums, scale)
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn quantize_row_avx2(x: &[f32], out: &mut [QuantizedGroup]) {
        for_each_group(x, out, |x| group_avx2(x));
    }

    /// The lowest bytes of 32 integers.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn pack_avx512([first, second]: [__m512i; 2]) -> Quads {
        let [first, second] = [_mm512_cvtepi32_epi8(first), _mm512_cvtepi32_epi8(second)];
        let mut quads = Quads::default();
        let (low, high) = quads.split_at_mut(4);
        // SAFETY: the half array has the 16 bytes that are written.
        unsafe { _mm_storeu_si128(low.as_mut_ptr().cast(), first) };
        // SAFETY: as above.
        unsafe { _mm_storeu_si128(high.as_mut_ptr().cast(), second) };
        quads
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn group_avx512(x: &[f32; GROUP_LEN]) -> QuantizedGroup {
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        // SAFETY: the array has the first 16 elements.
        let low = unsafe { _mm512_loadu_ps(x.as_ptr()) };
        // SAFETY: the array has 16 more.
        let high = unsafe { _mm512_loadu_ps(x[16..].as_ptr()) };
        let largest = _mm512_max_epi32(
            _mm512_and_si512(_mm512_castps_si512(low), magnitude),
            _mm512_and_si512(_mm512_castps_si512(high), magnitude),
        );
        let (scale, inverse) = scale_and_inverse(f32::from_bits(_mm512_reduce_max_epi32(largest) as u32));
        let inverse = _mm512_set1_ps(inverse);
        let codes = [low, high].map(|part| {
            let scaled = _mm512_max_ps(_mm512_mul_ps(part, inverse), _mm512_set1_ps(-LIMIT));
            _mm512_cvtps_epi32(_mm512_min_ps(scaled, _mm512_set1_ps(LIMIT)))
        });
        let sums = codes.map(|codes| _mm512_reduce_add_epi32(codes));
        let high = codes.map(|code| _mm512_srai_epi32::<8>(_mm512_add_epi32(code, _mm512_set1_epi32(128))));
        // Narrowing keeps the lowest 8 bits, which are the low byte.
        finish_group(pack_avx512(high), pack_avx512(codes), sums, scale)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(crate) fn quantize_row_avx512(x: &[f32], out: &mut [QuantizedGroup]) {
        for_each_group(x, out, |x| group_avx512(x));
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{quantize_row_avx2, quantize_row_avx512};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Isa, Pinning};
    use proptest::prelude::*;

    fn quantized(isa: Isa, x: &[f32], n_cols: usize) -> QuantizedRows {
        let mut rows = QuantizedRows::new();
        quantize_rows(Kernels::for_isa(isa), &ThreadPool::new(1, Pinning::None), x, n_cols, &mut rows);
        rows
    }

    fn bits(group: &QuantizedGroup) -> (Vec<i16>, u32, u32, [i32; 2]) {
        (group.codes().to_vec(), group.scale.to_bits(), group.scaled_sum.to_bits(), group.sums)
    }

    /// Floats of all magnitudes, zero, infinite and NaN ones included, and plain ones.
    fn element() -> impl Strategy<Value = f32> {
        prop_oneof![4 => -8.0f32..8.0, 2 => any::<u32>().prop_map(f32::from_bits), 1 => Just(0.0)]
    }

    proptest! {
        /// `quantize_row_avx2` and `quantize_row_avx512` against `quantize_row_scalar`.
        #[test]
        fn twins_give_the_bits_of_the_definition(
            x in prop::collection::vec(element(), 1..200),
            n_rows in 1usize..4,
        ) {
            let n_cols = x.len().div_ceil(n_rows);
            let x = &x[..x.len() / n_cols * n_cols];
            let expected = quantized(Isa::Scalar, x, n_cols);
            for isa in Isa::available() {
                let found = quantized(isa, x, n_cols);
                prop_assert_eq!(found.n_rows(), x.len() / n_cols);
                for (found, expected) in found.groups().iter().zip(expected.groups()) {
                    prop_assert_eq!(bits(found), bits(expected), "{}", isa);
                }
            }
        }

        #[test]
        fn codes_are_within_half_a_unit(x in prop::collection::vec(-100.0f32..100.0, 1..100)) {
            let rows = quantized(Isa::Scalar, &x, x.len());
            for (x, group) in x.chunks(GROUP_LEN).zip(rows.groups()) {
                for (x, code) in x.iter().zip(group.codes()) {
                    prop_assert!((x - f32::from(code) * group.scale).abs() <= 0.51 * group.scale);
                }
            }
        }
    }

    #[test]
    fn special_groups() {
        for isa in Isa::available() {
            let mut x = [[0.0f32; 32]; 4];
            x[1][5] = f32::MIN_POSITIVE / 4.0;
            x[2][7] = f32::INFINITY;
            x[3][9] = f32::NAN;
            let rows = quantized(isa, x.as_flattened(), 128);
            let scales: Vec<f32> = rows.groups().iter().map(|group| group.scale).collect();
            assert_eq!(scales[..3], [0.0, 0.0, f32::INFINITY]);
            assert!(scales[3].is_nan());
            assert_eq!(rows.groups()[1].codes(), [0; 32]);
        }
    }

    #[test]
    fn rows_can_shrink_and_grow() {
        let pool = ThreadPool::new(2, Pinning::None);
        let kernels = Kernels::detect();
        let mut rows = QuantizedRows::new();
        for n_rows in [5, 1, 7] {
            let x: Vec<f32> = (0..n_rows * 40).map(|i| i as f32).collect();
            quantize_rows(kernels, &pool, &x, 40, &mut rows);
            assert_eq!((rows.n_rows(), rows.groups().len()), (n_rows, 2 * n_rows));
            assert_eq!(rows.groups()[2 * n_rows - 1].codes()[8..], [0; 24]);
        }
    }
}
