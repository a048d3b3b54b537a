//! A whole block at once: what is computed for each row alone (scale, its inverse, sums of codes) has a lane for each of
//! the sixteen rows. Elements go through the same operations as row by row.

use super::*;

/// Quantizes the sixteen rows of a block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
pub(super) fn quantize<const P: usize>(
    x: &BlockInput<'_>,
    codes: &mut [[Quads; P]],
    scales: &mut [GroupScale],
) {
    let groups = codes.as_chunks_mut().0.iter_mut().zip(scales.as_chunks_mut().0);
    for (group, (codes, scales)) in groups.enumerate() {
        let start = group * GROUP_LEN;
        if start + GROUP_LEN <= x.n_cols {
            let row = |row: usize| x.x[row * x.stride + start..].first_chunk();
            quantize_group(
                std::array::from_fn(|r| row(r).expect("invariant: rows have n_cols columns")),
                codes,
                scales,
            );
        } else {
            let rows: [_; BLOCK_ROWS] = std::array::from_fn(|r| filled_up(&x.row(r)[start..]));
            quantize_group(rows.each_ref(), codes, scales);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn quantize_group<const P: usize>(
    rows: [&[f32; GROUP_LEN]; BLOCK_ROWS],
    planes: &mut [[Quads; P]; BLOCK_ROWS],
    scales: &mut [GroupScale; BLOCK_ROWS],
) {
    let largest = across(rows.map(|row| largest_of(halves(row))), |a, b| _mm512_max_epi32(a, b));
    let largest = _mm512_castsi512_ps(largest);
    // NaN is not below anything, and stays.
    let is_there = !_mm512_cmp_ps_mask::<_CMP_LT_OQ>(largest, _mm512_set1_ps(VANISHING));
    let scale = _mm512_maskz_div_ps(is_there, largest, _mm512_set1_ps(limit(P)));
    let inverse = floats(_mm512_maskz_div_ps(is_there, _mm512_set1_ps(1.0), scale));
    let mut codes = [[_mm512_setzero_si512(); 2]; BLOCK_ROWS];
    for (row, codes) in codes.iter_mut().enumerate() {
        *codes = codes_of::<P>(halves(rows[row]), inverse[row]);
        planes[row] = planes_of(*codes);
    }
    let sums = [0, 1].map(|half| across(codes.map(|codes| codes[half]), |a, b| _mm512_add_epi32(a, b)));
    let sum = _mm512_add_epi32(sums[0], sums[1]);
    let scaled_sum = floats(_mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum)));
    let negated = |ints| integers(_mm512_sub_epi32(_mm512_setzero_si512(), ints));
    let (scale, sum, sums) = (floats(scale), negated(sum), sums.map(negated));
    for (row, out) in scales.iter_mut().enumerate() {
        *out = GroupScale {
            scale: scale[row],
            scaled_sum: scaled_sum[row],
            negated_sum: sum[row],
            negated_half_sums: [sums[0][row], sums[1][row]],
        };
    }
}

/// What all lanes of each row give together, the first row's in the first lane. The operation is exact, so the order
/// does not matter.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn across(rows: [__m512i; BLOCK_ROWS], join: impl Fn(__m512i, __m512i) -> __m512i) -> __m512i {
    // In each 128 bits: two lanes of each of two rows, then one lane of each of four rows.
    let four: [__m512i; 4] = std::array::from_fn(|i| {
        let [a, b] = [0, 2].map(|first| {
            let (a, b) = (rows[4 * i + first], rows[4 * i + first + 1]);
            join(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
        });
        join(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
    });
    let [a, b] = [0, 2].map(|i| {
        join(
            _mm512_shuffle_i32x4::<0b01_00_01_00>(four[i], four[i + 1]),
            _mm512_shuffle_i32x4::<0b11_10_11_10>(four[i], four[i + 1]),
        )
    });
    join(_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn floats(x: __m512) -> [f32; BLOCK_ROWS] {
    let mut out = [0.0; BLOCK_ROWS];
    // SAFETY: the array has the 16 elements that are written.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) };
    out
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn integers(x: __m512i) -> [i32; BLOCK_ROWS] {
    let mut out = [0; BLOCK_ROWS];
    // SAFETY: the array has the 16 elements that are written.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), x) };
    out
}
