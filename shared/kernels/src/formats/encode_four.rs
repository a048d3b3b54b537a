//! Groups of 32 plain numbers into blocks of Q4_0 and Q4_1: 4-bit codes with one scale, or a scale and a minimum, of
//! about the least squared error. A block is a function of its own weights alone, by the same operations on every CPU.
//!
//! The plainest coding is that the range of the group is cut into 15 equal steps. It is tried, and beside it the best
//! scale in closed form for each of several ways to round; what errs least is taken, so nothing errs more than the
//! plainest.

use half::f16;

use super::GROUP_LEN;
use super::encode_lanes::{Coding, Groups, Lanes, MAX_CODE, half_of, lanes, take_better};
use crate::simd::LANES;

/// Code of weight zero in Q4_0.
const ZERO_CODE: f32 = 8.0;
/// Where the largest weight may come to lie, counted from [`ZERO_CODE`]: beyond the ends it is cut off, in favour of all others.
const ENDS: [f32; 14] = [-9.0, -8.7, -8.4, -8.2, -8.0, -7.9, -7.7, -7.5, -7.2, -6.8, 6.6, 7.0, 7.3, 7.7];

/// Up to sixteen blocks, one after the other: f16 scale, nibbles with column `j` below column `j + 16`.
pub(super) fn encode_q4_0(groups: &Groups<'_>, blocks: &mut [u8]) {
    let mut largest = [0.0_f32; LANES];
    for column in &groups.columns {
        largest = lanes(|l| if column[l].abs() > largest[l].abs() { column[l] } else { largest[l] });
    }
    let plain = around_zero(&largest.map(|largest| -largest / ZERO_CODE).map(nearest));
    let best = better(groups, plain, around_zero(&best_scale(groups, &largest).map(nearest)));
    write(groups, &best, [&best.scale], blocks);
}

/// Up to sixteen blocks: f16 scale, f16 minimum, nibbles as in Q4_0.
pub(super) fn encode_q4_1(groups: &Groups<'_>, blocks: &mut [u8]) {
    let halves = |scale: Lanes, min: Lanes| Coding::new(scale.map(nearest), min.map(nearest));
    let (lowest, highest) = groups.range(f32::INFINITY, f32::NEG_INFINITY);
    let plain = halves(lanes(|l| (highest[l] - lowest[l]) / MAX_CODE), lowest);
    let fit = groups.search();
    let best = better(groups, plain, halves(fit.scale, fit.min));
    write(groups, &best, [&best.scale, &best.min], blocks);
}

fn around_zero(scale: &Lanes) -> Coding {
    Coding::new(*scale, scale.map(|scale| -ZERO_CODE * scale))
}

/// Of the scales that put the largest weight at one of the ends, each replaced by the best one for the codes it rounds to, the
/// one that explains most of the squares of all weights; zero where all weights are.
fn best_scale(groups: &Groups<'_>, largest: &Lanes) -> Lanes {
    let (mut best, mut most) = ([0.0; LANES], [0.0; LANES]);
    for end in ENDS {
        let sums = groups.sums(&around_zero(&largest.map(|largest| largest / end)));
        // The same sums for codes that are counted from zero's.
        let squares =
            lanes(|l| sums.squares[l] - ZERO_CODE * (2.0 * sums.codes[l] - ZERO_CODE * GROUP_LEN as f32));
        let mixed = lanes(|l| sums.mixed[l] - ZERO_CODE * groups.sums[l]);
        let scale = lanes(|l| mixed[l] / squares[l]);
        let explained = lanes(|l| mixed[l] * scale[l]);
        // No number explains more, where all codes are zero's.
        let is_better = std::array::from_fn(|l| explained[l] > most[l]);
        take_better([&mut best, &mut most], [&scale, &explained], is_better);
    }
    best
}

/// What errs less; the plain one where both err the same.
fn better(groups: &Groups<'_>, plain: Coding, other: Coding) -> Coding {
    let (mut scale, mut min) = (plain.scale, plain.min);
    let (errors, other_errors) = (groups.sums(&plain).errors, groups.sums(&other).errors);
    let is_better = std::array::from_fn(|l| other_errors[l] < errors[l]);
    take_better([&mut scale, &mut min], [&other.scale, &other.min], is_better);
    Coding::new(scale, min)
}

/// Blocks of the codes behind `factors` as halves. Where a weight is not finite they are NaN, and codes zero.
fn write<const N: usize>(groups: &Groups<'_>, coding: &Coding, factors: [&Lanes; N], blocks: &mut [u8]) {
    for (l, block) in blocks.chunks_exact_mut(2 * N + GROUP_LEN / 2).enumerate() {
        let is_finite = groups.is_finite(l);
        let (header, nibbles) = block.split_at_mut(2 * N);
        for (factor, half) in factors.iter().zip(header.as_chunks_mut().0) {
            *half = if is_finite { f16::from_f32(factor[l]) } else { f16::NAN }.to_le_bytes();
        }
        let code = |column: &Lanes| if is_finite { coding.code(l, column[l]) as u8 } else { 0 };
        let (low, high) = groups.columns.split_at(GROUP_LEN / 2);
        for ((low, high), byte) in low.iter().zip(high).zip(nibbles) {
            *byte = code(low) | code(high) << 4;
        }
    }
}

/// The nearest number that a half can be.
fn nearest(x: f32) -> f32 {
    half_of(x).to_f32()
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;
    use paceline_domain::WeightType::{self, Q4_0, Q4_1, Q4_K, Q5_0, Q6_K, Q8_0};
    use proptest::prelude::*;

    use super::*;
    use crate::formats::encode_testing::{
        bytes_of, errors_beside_the_oracle, normal, numbers_of, round_trip, squared_error,
    };
    use crate::formats::requantize_row;
    use crate::testing::Numbers;

    /// The plainest coding of one group: the range in 15 steps, each weight to the nearest.
    fn by_definition(group: &[f32], to: WeightType) -> Vec<f32> {
        let largest = group.iter().fold(0.0_f32, |most, w| if w.abs() > most.abs() { *w } else { most });
        let lowest = group.iter().copied().fold(f32::INFINITY, f32::min);
        let highest = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let half = |x: f32| f16::from_f32(x).to_f32();
        let (scale, min) = match to {
            Q4_0 => (half(-largest / 8.0), -8.0 * half(-largest / 8.0)),
            _ => (half((highest - lowest) / 15.0), half(lowest)),
        };
        let code = |weight: f32| if scale == 0.0 { 0.0 } else { ((weight - min) / scale).round() };
        group.iter().map(|weight| scale * code(*weight).clamp(0.0, 15.0) + min).collect()
    }

    #[test]
    fn errors_are_below_those_of_the_oracle() {
        let weights = normal(1, 512 * 32);
        for (to, oracle) in [(Q4_0, GgmlDType::Q4_0), (Q4_1, GgmlDType::Q4_1)] {
            let (ours, theirs) = errors_beside_the_oracle(&weights, to, oracle);
            assert!(ours < 0.9 * theirs, "{}: {ours} is not below {theirs}", to.name());
        }
    }

    #[test]
    fn what_can_be_stored_exactly_is() {
        let steps: Vec<f32> = (0..32).map(|i| 0.25 * ((i % 16) as f32 - 8.0)).collect();
        assert_eq!(round_trip(&steps, Q4_0), steps);
        assert_eq!(round_trip(&steps, Q4_1), steps);
        let above: Vec<f32> = steps.iter().map(|weight| weight + 40.0).collect();
        assert_eq!(round_trip(&above, Q4_1), above, "a minimum above zero");
        for to in [Q4_0, Q4_1] {
            assert_eq!(round_trip(&[0.0; 32], to), [0.0; 32]);
            for constant in [1.0, -1.0, 3.0e-4, -700.0] {
                for back in round_trip(&[constant; 32], to) {
                    assert!((back - constant).abs() <= 1e-3 * constant.abs(), "{constant} became {back}");
                }
            }
        }
    }

    #[test]
    fn a_block_with_a_number_that_is_none_says_so() {
        for to in [Q4_0, Q4_1] {
            for wild in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut weights = normal(3, 64);
                weights[33] = wild;
                let back = round_trip(&weights, to);
                assert!(back[..32].iter().all(|weight| weight.is_finite()), "its neighbour is whole");
                assert!(back[32..].iter().all(|weight| weight.is_nan()));
            }
        }
    }

    /// Blocks of 32 from blocks of 32 and of 256, and the other way.
    #[test]
    fn quantized_rows_are_quantized_again_as_the_numbers_they_mean() {
        let weights = normal(5, 512);
        for from in [Q8_0, Q4_K] {
            let bytes = requantize_row(WeightType::F32, &bytes_of(&weights), from);
            let numbers = numbers_of(from, &bytes);
            for to in [Q4_0, Q4_1, Q4_K, Q8_0] {
                let expected = requantize_row(WeightType::F32, &bytes_of(&numbers), to);
                assert_eq!(requantize_row(from, &bytes, to), expected, "{from:?} to {to:?}");
            }
        }
        for from in [Q5_0, Q6_K] {
            let bytes: Vec<u8> =
                (0..from.row_bytes(256).expect("whole blocks")).map(|i| (i * 7 % 59) as u8).collect();
            let expected = requantize_row(WeightType::F32, &bytes_of(&numbers_of(from, &bytes)), Q4_0);
            assert_eq!(requantize_row(from, &bytes, Q4_0), expected, "{from:?}");
        }
    }

    proptest! {
        #[test]
        fn no_group_errs_more_than_the_plainest_coding(
            seed in any::<u64>(),
            exponent in -12..12_i32,
            offset in -2.0..2.0_f32,
        ) {
            let mut numbers = Numbers::new(seed);
            let size = 2.0_f32.powi(exponent);
            let weights: Vec<f32> = (0..32)
                .map(|_| size * (numbers.value() * if numbers.below(9) == 0 { 8.0 } else { 1.0 } + offset))
                .collect();
            for to in [Q4_0, Q4_1] {
                let back = round_trip(&weights, to);
                prop_assert!(back.iter().all(|weight| weight.is_finite()));
                let error = squared_error(&back, &weights);
                let plain = squared_error(&by_definition(&weights, to), &weights);
                prop_assert!(error <= 1.0001 * plain + 1e-30, "{} errs {error}, plainly {plain}", to.name());
                // Half a step of the whole range, or a whole one where Q4_0 cuts the other end off.
                let largest = weights.iter().fold(0.0_f32, |most, weight| most.max(weight.abs()));
                let bound = 32.0 * f64::from(largest / 7.9).powi(2);
                prop_assert!(error <= bound, "{} errs {error} of at most {bound}", to.name());
            }
        }

        /// Any finite weights, also those that no half is near.
        #[test]
        fn any_finite_weights_are_stored(seed in any::<u64>(), exponent in -60..100_i32) {
            let mut numbers = Numbers::new(seed);
            let weights: Vec<f32> = (0..32).map(|_| numbers.value() * 2.0_f32.powi(exponent)).collect();
            for to in [Q4_0, Q4_1] {
                prop_assert!(round_trip(&weights, to).iter().all(|weight| weight.is_finite()), "{}", to.name());
            }
        }
    }
}
