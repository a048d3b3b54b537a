//! SIMD twins of the quantization of a block: row by row, and of a whole block in `sixteen`.

use super::*;
use std::arch::x86_64::*;

mod sixteen;

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
fn group_avx2<const P: usize>(x: &[f32; GROUP_LEN]) -> ([Quads; P], GroupScale) {
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    let mut parts = [_mm256_setzero_ps(); 4];
    let mut largest = _mm256_setzero_si256();
    for (part, x) in parts.iter_mut().zip(x.as_chunks::<8>().0) {
        // SAFETY: the chunk has the 8 elements that are read.
        *part = unsafe { _mm256_loadu_ps(x.as_ptr()) };
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(*part), magnitude));
    }
    let (scale, inverse) = scale_and_inverse(f32::from_bits(largest_int_avx2(largest) as u32), limit(P));
    let inverse = _mm256_set1_ps(inverse);
    let codes = parts.map(|part| {
        let scaled = _mm256_max_ps(_mm256_mul_ps(part, inverse), _mm256_set1_ps(-limit(P)));
        _mm256_cvtps_epi32(_mm256_min_ps(scaled, _mm256_set1_ps(limit(P))))
    });
    let [a, b, c, d] = codes;
    let sums = [sum_avx2(_mm256_add_epi32(a, b)), sum_avx2(_mm256_add_epi32(c, d))];
    let mut planes = [Quads::default(); P];
    let mut left = codes;
    for plane in planes.iter_mut().rev() {
        let bytes = left.map(|code| _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(code)));
        *plane = pack_avx2(bytes);
        for (left, byte) in left.iter_mut().zip(bytes) {
            *left = _mm256_srai_epi32::<8>(_mm256_sub_epi32(*left, byte));
        }
    }
    (planes, group_scale(sums, scale))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn quantize_block_avx2<const P: usize>(x: &BlockInput<'_>, out: GroupsMut<'_>) {
    for_each_group::<P>(x, out, |x| group_avx2(x));
}

/// The lowest bytes of 32 integers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn pack_avx512([first, second]: [__m512i; 2]) -> Quads {
    let first = _mm256_castsi128_si256(_mm512_cvtepi32_epi8(first));
    let both = _mm256_inserti128_si256::<1>(first, _mm512_cvtepi32_epi8(second));
    let mut quads = Quads::default();
    // SAFETY: the array has the 32 bytes that are written.
    unsafe { _mm256_storeu_si256(quads.as_mut_ptr().cast(), both) };
    quads
}

/// Both halves of a group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn halves(x: &[f32; GROUP_LEN]) -> [__m512; 2] {
    // SAFETY: the array has the first 16 elements.
    let low = unsafe { _mm512_loadu_ps(x.as_ptr()) };
    // SAFETY: the array has 16 more.
    let high = unsafe { _mm512_loadu_ps(x[16..].as_ptr()) };
    [low, high]
}

/// The larger magnitudes of both halves, as integers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn largest_of([low, high]: [__m512; 2]) -> __m512i {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    _mm512_max_epi32(
        _mm512_and_si512(_mm512_castps_si512(low), magnitude),
        _mm512_and_si512(_mm512_castps_si512(high), magnitude),
    )
}

/// The codes of both halves for the inverse of a scale.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn codes_of<const P: usize>(halves: [__m512; 2], inverse: f32) -> [__m512i; 2] {
    let inverse = _mm512_set1_ps(inverse);
    let mut codes = [_mm512_setzero_si512(); 2];
    for (codes, part) in codes.iter_mut().zip(halves) {
        let scaled = _mm512_max_ps(_mm512_mul_ps(part, inverse), _mm512_set1_ps(-limit(P)));
        *codes = _mm512_cvtps_epi32(_mm512_min_ps(scaled, _mm512_set1_ps(limit(P))));
    }
    codes
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn planes_of<const P: usize>(codes: [__m512i; 2]) -> [Quads; P] {
    let mut planes = [Quads::default(); P];
    let mut left = codes;
    for plane in planes.iter_mut().rev() {
        // Narrowing keeps the lowest 8 bits; rounding the others is subtracting these as a signed number.
        *plane = pack_avx512(left);
        for code in &mut left {
            *code = _mm512_srai_epi32::<8>(_mm512_add_epi32(*code, _mm512_set1_epi32(128)));
        }
    }
    planes
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn group_avx512<const P: usize>(x: &[f32; GROUP_LEN]) -> ([Quads; P], GroupScale) {
    let halves = halves(x);
    let largest = f32::from_bits(_mm512_reduce_max_epi32(largest_of(halves)) as u32);
    let (scale, inverse) = scale_and_inverse(largest, limit(P));
    let codes = codes_of::<P>(halves, inverse);
    let sums = codes.map(|codes| _mm512_reduce_add_epi32(codes));
    (planes_of(codes), group_scale(sums, scale))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn quantize_block_avx512<const P: usize>(x: &BlockInput<'_>, out: GroupsMut<'_>) {
    if out.n_rows == BLOCK_ROWS {
        sixteen::quantize(x, out.codes.as_chunks_mut::<P>().0, out.scales);
    } else {
        for_each_group::<P>(x, out, |x| group_avx512(x));
    }
}
