//! Groups of 32 plain numbers into blocks of Q4_0 and Q4_1: 4-bit codes with one scale, or a scale and a minimum, of
//! about the least squared error. A block is a function of its own weights alone, by the same operations on every CPU.
//!
//! The plainest coding is that the range of the group is cut into 15 equal steps. It is tried, and beside it the best
//! scale in closed form for each of several ways to round; what errs least is taken, so nothing errs more than the
//! plainest.

use half::f16;

use super::encode::{Fit, MAX_CODE, Weights, all_finite, codes, half_of, products, sum};

/// Code of weight zero in Q4_0.
const ZERO_CODE: f32 = 8.0;
/// Where the largest weight may come to lie, counted from [`ZERO_CODE`]: beyond the ends it is cut off, in favour of all others.
const ENDS: [f32; 14] = [-9.0, -8.7, -8.4, -8.2, -8.0, -7.9, -7.7, -7.5, -7.2, -6.8, 6.6, 7.0, 7.3, 7.7];

/// Weights as `scale * code + min`.
struct Coded {
    scale: f16,
    min: f32,
    codes: Weights,
    /// Sum of squares.
    error: f32,
}

/// f16 scale, nibbles: column `j` below column `j + 16`.
pub(super) fn encode_q4_0(weights: &Weights, block: &mut [u8]) {
    let largest = weights.iter().fold(
        0.0_f32,
        |largest, weight| {
            if weight.abs() > largest.abs() { *weight } else { largest }
        },
    );
    let coded = |scale: f32| {
        let scale = signed_half_of(scale);
        Coded::new(weights, scale, -ZERO_CODE * scale.to_f32())
    };
    let best = if all_finite(&[*weights]) {
        let fitted = ENDS.into_iter().filter_map(|end| fit(weights, largest / end));
        let fitted = fitted.max_by(|one, other| one.1.total_cmp(&other.1)).map(|(scale, _)| coded(scale));
        Coded::better(coded(-largest / ZERO_CODE), fitted)
    } else {
        Coded::not_a_number()
    };
    let (scale, nibbles) = block.split_at_mut(2);
    scale.copy_from_slice(&best.scale.to_le_bytes());
    write_nibbles(&best.codes, nibbles);
}

/// f16 scale, f16 minimum, nibbles as in Q4_0.
pub(super) fn encode_q4_1(weights: &Weights, block: &mut [u8]) {
    let lowest = weights.iter().copied().fold(f32::INFINITY, f32::min);
    let highest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let coded = |scale: f32, min: f32| Coded::new(weights, half_of(scale), signed_half_of(min).to_f32());
    let best = if all_finite(&[*weights]) {
        let fit = Fit::search(weights);
        Coded::better(coded((highest - lowest) / MAX_CODE, lowest), Some(coded(fit.scale, -fit.min)))
    } else {
        Coded::not_a_number()
    };
    let (scale, rest) = block.split_at_mut(2);
    let (min, nibbles) = rest.split_at_mut(2);
    scale.copy_from_slice(&best.scale.to_le_bytes());
    min.copy_from_slice(&f16::from_f32(best.min).to_le_bytes());
    write_nibbles(&best.codes, nibbles);
}

/// The best scale for the codes that this scale rounds to, and how much of the squares of all weights it explains; none where
/// all codes are zero.
fn fit(weights: &Weights, scale: f32) -> Option<(f32, f32)> {
    let steps = codes(weights, ZERO_CODE * scale, inverse_of(scale)).map(|code| code - ZERO_CODE);
    let (squares, mixed) = (sum(&products(&steps, &steps)), sum(&products(&steps, weights)));
    (squares > 0.0).then(|| (mixed / squares, mixed * mixed / squares))
}

impl Coded {
    fn new(weights: &Weights, scale: f16, min: f32) -> Self {
        let step = scale.to_f32();
        let codes = codes(weights, -min, inverse_of(step));
        let errors: Weights = std::array::from_fn(|i| step * codes[i] + min - weights[i]);
        Self { scale, min, codes, error: sum(&products(&errors, &errors)) }
    }

    fn better(plain: Self, other: Option<Self>) -> Self {
        match other {
            Some(other) if other.error < plain.error => other,
            _ => plain,
        }
    }

    fn not_a_number() -> Self {
        Self { scale: f16::NAN, min: 0.0, codes: [0.0; 32], error: 0.0 }
    }
}

fn write_nibbles(codes: &Weights, nibbles: &mut [u8]) {
    let (low, high) = codes.split_at(nibbles.len());
    for ((low, high), byte) in low.iter().zip(high).zip(nibbles) {
        *byte = *low as u8 | (*high as u8) << 4;
    }
}

/// The nearest half; the largest one of its sign where there is none near.
fn signed_half_of(x: f32) -> f16 {
    f16::from_f32(half_of(x.abs()).to_f32().copysign(x))
}

/// 0 of 0.
fn inverse_of(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
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
