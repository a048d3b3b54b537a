//! Two loops that show what a machine can do: read memory, and multiply bytes. They compute nothing that is needed
//! elsewhere and know no clock; whoever calls them takes the time.

use crate::aligned::AlignedVec;
use crate::packed::Line;
use crate::{Isa, Kernels};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::hint::black_box;

/// Products of an unsigned and a signed byte, each added to a sum, in a round of [`dot_rounds`].
pub const PRODUCTS_PER_ROUND: usize = LEFT_LINES * RIGHT_LINES * 64;

const LEFT_LINES: usize = 8;
const RIGHT_LINES: usize = 2;
/// How far ahead of the reads lines are asked for: the CPU's own prefetchers stop at the end of each page.
#[cfg(target_arch = "x86_64")]
const PREFETCH_BYTES: usize = 4096;

/// What [`dot_rounds`] multiplies: small enough for the nearest cache, bytes of at most six bits on the left, so
/// that instruction sets without a four-fold dot product need no extra steps.
pub struct DotOperands {
    lines: AlignedVec<Line>,
}

impl DotOperands {
    /// Bytes `left(i)`, of which the low six bits are taken, and `right(i)`.
    pub fn new(left: impl Fn(usize) -> u8, right: impl Fn(usize) -> i8) -> Self {
        let mut lines = AlignedVec::<Line>::zeroed(LEFT_LINES + RIGHT_LINES);
        for (line_idx, line) in lines.iter_mut().enumerate() {
            for (i, byte) in line.0.iter_mut().enumerate() {
                let place = line_idx * 64 + i;
                *byte = if line_idx < LEFT_LINES { left(place) & 63 } else { right(place) as u8 };
            }
        }
        Self { lines }
    }

    #[inline(always)]
    fn split(&self) -> (&[Line], &[Line]) {
        self.lines.split_at(LEFT_LINES)
    }
}

/// The sum of all words, modulo 2^64: each byte is read once, in order.
pub fn sum_words(kernels: &Kernels, words: &[u64]) -> u64 {
    match kernels.isa() {
        Isa::Scalar => sum_words_scalar(words),
        // SAFETY: a table is only handed out when the CPU has its features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { sum_words_avx2(words) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Vnni => unsafe { sum_words_avx512(words) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("invariant: only the scalar table exists here"),
    }
}

/// `n_rounds` times the sum, modulo 2^32, of the products of each left line with each right line.
pub fn dot_rounds(kernels: &Kernels, operands: &DotOperands, n_rounds: usize) -> i32 {
    match kernels.isa() {
        Isa::Scalar => dot_rounds_scalar(operands, n_rounds),
        // SAFETY: a table is only handed out when the CPU has its features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { dot_rounds_avx2(operands, n_rounds) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { dot_rounds_avx512(operands, n_rounds) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => unsafe { dot_rounds_vnni(operands, n_rounds) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("invariant: only the scalar table exists here"),
    }
}

fn sum_words_scalar(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, word| sum.wrapping_add(*word))
}

fn dot_rounds_scalar(operands: &DotOperands, n_rounds: usize) -> i32 {
    let mut sum = 0_i32;
    for _ in 0..n_rounds {
        // Each round reads its operands again, so that none is left out.
        let (left, right) = black_box(operands).split();
        for left in left {
            for right in right {
                let products = left.0.iter().zip(right.0).map(|(l, r)| i32::from(*l) * i32::from(r as i8));
                sum = sum.wrapping_add(products.sum::<i32>());
            }
        }
    }
    sum
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_words_avx2(words: &[u64]) -> u64 {
    let mut sums = [_mm256_setzero_si256(); 4];
    let (blocks, tail) = words.as_chunks::<16>();
    for block in blocks {
        prefetch(block);
        for (sum, words) in sums.iter_mut().zip(block.as_chunks::<4>().0) {
            // SAFETY: four words are what is loaded.
            let words = unsafe { _mm256_loadu_si256(words.as_ptr().cast()) };
            *sum = _mm256_add_epi64(*sum, words);
        }
    }
    let lanes = sums.map(bytemuck::cast::<__m256i, [u64; 4]>);
    sum_words_scalar(lanes.as_flattened()).wrapping_add(sum_words_scalar(tail))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn sum_words_avx512(words: &[u64]) -> u64 {
    let mut sums = [_mm512_setzero_si512(); 4];
    let (blocks, tail) = words.as_chunks::<32>();
    for block in blocks {
        let (near, far) = block.split_at(16);
        prefetch(near);
        prefetch(far);
        for (sum, words) in sums.iter_mut().zip(block.as_chunks::<8>().0) {
            // SAFETY: eight words are what is loaded.
            let words = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
            *sum = _mm512_add_epi64(*sum, words);
        }
    }
    let sum =
        sums.into_iter().fold(0_u64, |sum, lanes| sum.wrapping_add(_mm512_reduce_add_epi64(lanes) as u64));
    sum.wrapping_add(sum_words_scalar(tail))
}

/// Asks for the two lines that lie [`PREFETCH_BYTES`] behind the start of `block`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(block: &[u64]) {
    let ahead = block.as_ptr().wrapping_byte_add(PREFETCH_BYTES).cast::<i8>();
    // SAFETY: a prefetch reads nothing that a program can see, at any address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead) };
    // SAFETY: as above.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64)) };
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_rounds_avx2(operands: &DotOperands, n_rounds: usize) -> i32 {
    let mut sums = [[_mm256_setzero_si256(); RIGHT_LINES]; 4];
    let ones = _mm256_set1_epi16(1);
    for _ in 0..n_rounds {
        let (left, right) = black_box(operands).split();
        for half in 0..2 {
            // SAFETY: half a line is what is loaded.
            let load = |line: &Line| unsafe { _mm256_load_si256(line.0[32 * half..][..32].as_ptr().cast()) };
            let right = [load(&right[0]), load(&right[1])];
            for (i, left) in left.iter().enumerate() {
                let left = load(left);
                for (sum, right) in sums[i % 4].iter_mut().zip(right) {
                    let pairs = _mm256_maddubs_epi16(left, right);
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                }
            }
        }
    }
    let lanes = sums.as_flattened().iter().flat_map(|sum| bytemuck::cast::<__m256i, [i32; 8]>(*sum));
    lanes.fold(0, i32::wrapping_add)
}

/// A round of AVX-512 with the given step from (sum, left, right) to the next sum.
#[cfg(target_arch = "x86_64")]
macro_rules! avx512_rounds {
    ($operands:ident, $n_rounds:ident, $step:expr) => {{
        let mut sums = [[_mm512_setzero_si512(); RIGHT_LINES]; LEFT_LINES];
        for _ in 0..$n_rounds {
            let (left, right) = black_box($operands).split();
            // SAFETY: a line is what is loaded, and aligned.
            let load = |line: &Line| unsafe { _mm512_load_si512(line.0.as_ptr().cast()) };
            let right = [load(&right[0]), load(&right[1])];
            for (sums, left) in sums.iter_mut().zip(left) {
                let left = load(left);
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = $step(*sum, left, right);
                }
            }
        }
        let sums = sums.as_flattened().iter();
        sums.fold(0_i32, |sum, lanes| sum.wrapping_add(_mm512_reduce_add_epi32(*lanes)))
    }};
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn dot_rounds_avx512(operands: &DotOperands, n_rounds: usize) -> i32 {
    let ones = _mm512_set1_epi16(1);
    avx512_rounds!(operands, n_rounds, |sum, left, right| {
        let pairs = _mm512_maddubs_epi16(left, right);
        _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, ones))
    })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn dot_rounds_vnni(operands: &DotOperands, n_rounds: usize) -> i32 {
    avx512_rounds!(operands, n_rounds, |sum, left, right| _mm512_dpbusd_epi32(sum, left, right))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Numbers, twins};

    #[test]
    fn every_word_is_read_once() {
        let mut numbers = Numbers::new(5);
        let words: Vec<u64> = (0..200).map(|_| numbers.bits()).collect();
        let twins = twins!(sum_words_avx2, sum_words_avx512; unsafe fn(&[u64]) -> u64);
        for n in 0..=words.len() {
            let expected = sum_words_scalar(&words[..n]);
            for (name, twin) in &twins {
                // SAFETY: `twins` leaves out what the CPU lacks.
                assert_eq!(unsafe { twin(&words[..n]) }, expected, "{name}, {n} words");
            }
            for isa in Isa::available() {
                assert_eq!(sum_words(Kernels::for_isa(isa), &words[..n]), expected, "{isa}, {n} words");
            }
        }
        assert_eq!(sum_words_scalar(&[u64::MAX, 3]), 2);
    }

    #[test]
    fn every_product_is_in_the_sum_as_often_as_there_are_rounds() {
        let bytes: Vec<u64> = {
            let mut numbers = Numbers::new(6);
            (0..1_000).map(|_| numbers.bits()).collect()
        };
        let operands = DotOperands::new(|i| bytes[i] as u8, |i| bytes[i] as i8);
        let once = dot_rounds_scalar(&operands, 1);
        assert_ne!(once, 0);
        let twins = twins!(dot_rounds_avx2, dot_rounds_avx512; unsafe fn(&DotOperands, usize) -> i32);
        for n_rounds in [0, 1, 2, 7, 10_000] {
            let expected = once.wrapping_mul(n_rounds as i32);
            assert_eq!(dot_rounds_scalar(&operands, n_rounds), expected);
            for (name, twin) in &twins {
                // SAFETY: `twins` leaves out what the CPU lacks.
                assert_eq!(unsafe { twin(&operands, n_rounds) }, expected, "{name}, {n_rounds} rounds");
            }
            // The table of AVX-512 with VNNI runs `dot_rounds_vnni`.
            for isa in Isa::available() {
                let got = dot_rounds(Kernels::for_isa(isa), &operands, n_rounds);
                assert_eq!(got, expected, "{isa}, {n_rounds} rounds");
            }
        }
    }

    #[test]
    fn a_round_has_the_stated_number_of_products() {
        let ones = DotOperands::new(|_| 1, |_| 1);
        for isa in Isa::available() {
            assert_eq!(dot_rounds(Kernels::for_isa(isa), &ones, 3), 3 * PRODUCTS_PER_ROUND as i32, "{isa}");
        }
    }
}
