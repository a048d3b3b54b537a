//! A whole block at once: what is computed for each row alone (scale, its inverse, sums of codes) has a lane for each of
//! the sixteen rows. Elements go through the same operations as row by row.

use super::*;

/// Quantizes the sixteen rows of a block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
pub(super) fn quantize<const P: usize>(x: &BlockInput<'_>, codes: &mut [[Quads; P]], scales: &mut [u32]) {
    let words = scales.as_chunks_mut().0.as_chunks_mut().0;
    let mut groups = codes.as_chunks_mut().0.iter_mut().zip(words);
    let whole = x.n_cols / GROUP_LEN * GROUP_LEN;
    for (start, (codes, words)) in (0..whole).step_by(GROUP_LEN).zip(&mut groups) {
        let mut rows = [&[0.0; GROUP_LEN]; BLOCK_ROWS];
        for (row, columns) in rows.iter_mut().enumerate() {
            *columns = x.row(row)[start..].first_chunk().expect("invariant: the group is whole");
        }
        quantize_group(rows, codes, words);
    }
    if let Some((codes, words)) = groups.next() {
        let mut last = [[0.0; GROUP_LEN]; BLOCK_ROWS];
        for (row, last) in last.iter_mut().enumerate() {
            *last = filled_up(&x.row(row)[whole..]);
        }
        quantize_group(last.each_ref(), codes, words);
    }
}

/// What all lanes of each of sixteen rows give together, the first row's in the first lane. The operation is exact, so the
/// order does not matter. A macro, as a closure with vectors in it would be called for each of them.
macro_rules! across {
    ($rows:expr, $join:ident) => {{
        let rows: &[__m512i; BLOCK_ROWS] = $rows;
        // In each 128 bits: two lanes of each of two rows, then one lane of each of four rows.
        let mut fours = [_mm512_setzero_si512(); 4];
        for (four, rows) in fours.iter_mut().zip(rows.as_chunks::<4>().0) {
            let a = $join(_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[0], rows[1]));
            let b = $join(_mm512_unpacklo_epi32(rows[2], rows[3]), _mm512_unpackhi_epi32(rows[2], rows[3]));
            *four = $join(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        }
        let mut eights = [_mm512_setzero_si512(); 2];
        for (eight, fours) in eights.iter_mut().zip(fours.as_chunks::<2>().0) {
            *eight = $join(
                _mm512_shuffle_i32x4::<0b01_00_01_00>(fours[0], fours[1]),
                _mm512_shuffle_i32x4::<0b11_10_11_10>(fours[0], fours[1]),
            );
        }
        let [a, b] = eights;
        $join(_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b))
    }};
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn quantize_group<const P: usize>(
    rows: [&[f32; GROUP_LEN]; BLOCK_ROWS],
    planes: &mut [[Quads; P]; BLOCK_ROWS],
    words: &mut [[u32; BLOCK_ROWS]; SCALE_WORDS],
) {
    let mut largest = [_mm512_setzero_si512(); BLOCK_ROWS];
    for (largest, row) in largest.iter_mut().zip(rows) {
        *largest = largest_of(halves(row));
    }
    let largest = _mm512_castsi512_ps(across!(&largest, _mm512_max_epi32));
    // NaN is not below anything, and stays.
    let is_there = !_mm512_cmp_ps_mask::<_CMP_LT_OQ>(largest, _mm512_set1_ps(VANISHING));
    let scale = _mm512_maskz_div_ps(is_there, largest, _mm512_set1_ps(limit(P)));
    let inverse = floats(_mm512_maskz_div_ps(is_there, _mm512_set1_ps(1.0), scale));
    let mut codes = [[_mm512_setzero_si512(); BLOCK_ROWS]; 2];
    for (pair, planes) in planes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let [first, second] = [2 * pair, 2 * pair + 1];
        let of_first = codes_of::<P>(halves(rows[first]), inverse[first]);
        let of_second = codes_of::<P>(halves(rows[second]), inverse[second]);
        if P == 1 {
            put_pair(planes.as_flattened_mut(), of_first, of_second);
        } else {
            *planes = [planes_of(of_first), planes_of(of_second)];
        }
        [codes[0][first], codes[1][first]] = of_first;
        [codes[0][second], codes[1][second]] = of_second;
    }
    let sums = [across!(&codes[0], _mm512_add_epi32), across!(&codes[1], _mm512_add_epi32)];
    let sum = _mm512_add_epi32(sums[0], sums[1]);
    let scaled_sum = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum));
    let negated = [sum, sums[0], sums[1]];
    put(&mut words[ScaleWord::Scale as usize], _mm512_castps_si512(scale));
    put(&mut words[ScaleWord::ScaledSum as usize], _mm512_castps_si512(scaled_sum));
    for (words, sum) in words[ScaleWord::NegatedSum as usize..].iter_mut().zip(negated) {
        put(words, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    }
}

/// Codes of 8 bits of two rows, as bytes, to where theirs lie side by side.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn put_pair(out: &mut [Quads], first: [__m512i; 2], second: [__m512i; 2]) {
    let words = [_mm512_packs_epi32(first[0], first[1]), _mm512_packs_epi32(second[0], second[1])];
    let bytes = _mm512_packs_epi16(words[0], words[1]);
    // Packing works within 128 bits: each has a quad of the first half and one of the second, of both rows.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let quads = _mm512_permutexvar_epi32(order, bytes);
    let out: &mut [Quads; 2] = out.first_chunk_mut().expect("invariant: there are two rows");
    // SAFETY: two rows have the 64 bytes that are written.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), quads) };
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn floats(x: __m512) -> [f32; BLOCK_ROWS] {
    let mut out = [0; BLOCK_ROWS];
    put(&mut out, _mm512_castps_si512(x));
    out.map(f32::from_bits)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn put(out: &mut [u32; BLOCK_ROWS], x: __m512i) {
    // SAFETY: the array has the 16 elements that are written.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), x) };
}
