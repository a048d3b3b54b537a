//! The largest value of a row and where it is first. NaN never wins.

use crate::Kernels;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{LANES, Simd, greater, max_lanes};

/// Values looked through again once it is known that the largest is among them.
const BLOCK: usize = 1024;

/// The lowest index of the largest value; `None` when there is no value that is a number.
pub fn argmax(kernels: &Kernels, values: &[f32]) -> Option<usize> {
    let mut best = f32::NEG_INFINITY;
    let mut best_block = None;
    for (block_idx, block) in values.chunks(BLOCK).enumerate() {
        // SAFETY: a table is only handed out when the CPU has its features.
        let largest = unsafe { (kernels.max)(block) };
        if largest > best {
            (best, best_block) = (largest, Some(block_idx));
        }
    }
    let start = best_block.map_or(0, |block_idx| block_idx * BLOCK);
    let found = values[start..].iter().position(|value| *value == best)?;
    Some(start + found)
}

/// Scalar definition: the largest value that is a number, -inf when there is none.
pub(crate) fn max_scalar(values: &[f32]) -> f32 {
    values.iter().fold(f32::NEG_INFINITY, |best, value| greater(*value, best))
}

#[inline(always)]
fn max<S: Simd>(s: S, values: &[f32]) -> f32 {
    let lowest = s.splat(f32::NEG_INFINITY);
    let mut best = [lowest; 4];
    let (blocks, tail) = values.as_chunks::<LANES>();
    let (quads, rest) = blocks.as_chunks::<4>();
    for quad in quads {
        for (best, block) in best.iter_mut().zip(quad) {
            *best = s.greater(s.load(block), *best);
        }
    }
    for block in rest {
        best[0] = s.greater(s.load(block), best[0]);
    }
    let best = s.greater(s.greater(best[0], best[1]), s.greater(best[2], best[3]));
    greater(max_scalar(tail), max_lanes(s.to_array(best)))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn max_avx2(values: &[f32]) -> f32 {
    max(Avx2::token(), values)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn max_avx512(values: &[f32]) -> f32 {
    max(Avx512::token(), values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::testing::{Numbers, twins};

    /// The plainest loop.
    fn naive(values: &[f32]) -> Option<usize> {
        let mut best: Option<usize> = None;
        for (i, value) in values.iter().enumerate() {
            if !value.is_nan() && best.is_none_or(|best| *value > values[best]) {
                best = Some(i);
            }
        }
        best
    }

    #[test]
    fn every_isa_finds_what_the_plain_loop_finds() {
        let mut numbers = Numbers::new(3);
        for n in (0..200).chain([1_023, 1_024, 1_025, 5_000]) {
            for round in 0..8 {
                let mut values = if round < 4 { numbers.wild_values(n) } else { numbers.values(n) };
                if round % 2 == 0 {
                    // Few distinct values: many ties.
                    values.iter_mut().for_each(|value| *value = (*value * 3.0).round());
                }
                for isa in Isa::available() {
                    assert_eq!(argmax(Kernels::for_isa(isa), &values), naive(&values), "{isa}, {n} values");
                }
            }
        }
    }

    #[test]
    fn twins_find_the_same_value() {
        let mut numbers = Numbers::new(4);
        for (name, twin) in twins!(max_avx2, max_avx512; unsafe fn(&[f32]) -> f32) {
            for n in 0..200 {
                let values = numbers.wild_values(n);
                // SAFETY: `twins` leaves out what the CPU lacks.
                let got = unsafe { twin(&values) };
                // Zeros of both signs are equal here, as they are for argmax.
                assert_eq!(got, max_scalar(&values), "{name}, {n} values");
            }
        }
    }

    #[test]
    fn nan_never_wins_and_ties_go_to_the_lowest_index() {
        let kernels = Kernels::detect();
        assert_eq!(argmax(kernels, &[f32::NAN, 1.0, 3.0, 3.0, f32::NAN]), Some(2));
        assert_eq!(argmax(kernels, &[f32::NAN, f32::NEG_INFINITY]), Some(1));
        assert_eq!(argmax(kernels, &[f32::NAN]), None);
        assert_eq!(argmax(kernels, &[]), None);
    }
}
