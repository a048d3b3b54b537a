//! Rows into blocks of Q8_0 and Q4_K, for weights that are quantized at load; `encode_four` makes Q4_0 and Q4_1. A block is
//! a function of its own weights alone, by the same operations on every CPU; nothing is packed here.
//!
//! Q4_K follows the public descriptions of K-quants. First each group of 32 looks for the scale and minimum of least
//! squared error: codes by several steps around the range / 15, scale and minimum for these codes in closed form. Then
//! the superblock's two f16 are fixed by the largest of them, and each group takes the small integers near its own that
//! err least; last the two f16 are fitted to all codes, once more in closed form, and kept if that errs less.

use half::f16;
use paceline_domain::WeightType;

use super::encode_four::{encode_q4_0, encode_q4_1};
use super::{GROUP_LEN, GROUPS_PER_SUPER, dequantize_row};
use crate::simd::{SHIFT, SHIFT_BITS};

/// Weights of a superblock.
const SUPER_LEN: usize = GROUP_LEN * GROUPS_PER_SUPER;
/// Largest code of four bits.
pub(super) const MAX_CODE: f32 = 15.0;
/// Largest small integer beside a code of Q4_K.
const MAX_SUB: f32 = 63.0;
/// Codes that the range of a group is cut into, one after the other.
const STEPS: [f32; 12] = [13.9, 14.2, 14.4, 14.6, 14.7, 14.8, 14.9, 15.0, 15.1, 15.3, 15.6, 15.9];

pub(super) type Weights = [f32; GROUP_LEN];

/// A row of any type as a row of `to`, one of the types of [`paceline_domain::Quantization`]. A block with a number that is not
/// finite becomes NaN as a whole, so that nothing is hidden.
///
/// # Panics
/// When `to` is another type, or the row is not whole blocks of it.
pub fn requantize_row(from: WeightType, bytes: &[u8], to: WeightType) -> Vec<u8> {
    let n_weights = bytes.len() / from.block_bytes() * from.block_len();
    let row_bytes = to.row_bytes(n_weights).expect("invariant: a row is whole blocks of what it becomes");
    let (mut out, mut weights) = (vec![0; row_bytes], [0.0; SUPER_LEN]);
    let blocks_at_once = (from.block_len() / to.block_len()).max(1);
    let weights = &mut weights[..blocks_at_once * to.block_len()];
    let bytes_at_once = weights.len() / from.block_len() * from.block_bytes();
    let pieces = out.chunks_exact_mut(blocks_at_once * to.block_bytes());
    for (bytes, piece) in bytes.chunks_exact(bytes_at_once).zip(pieces) {
        dequantize_row(from, bytes, weights);
        let blocks = piece.chunks_exact_mut(to.block_bytes());
        weights
            .chunks_exact(to.block_len())
            .zip(blocks)
            .for_each(|(weights, block)| encode(to, weights, block));
    }
    out
}

/// One block.
fn encode(to: WeightType, weights: &[f32], block: &mut [u8]) {
    let groups: &[Weights] = weights.as_chunks().0;
    match to {
        WeightType::Q8_0 => encode_q8_0(groups, block),
        WeightType::Q4_0 => encode_q4_0(&groups[0], block),
        WeightType::Q4_1 => encode_q4_1(&groups[0], block),
        WeightType::Q4_K => encode_q4_k(groups, block),
        other => panic!("invariant: nothing is quantized to {}", other.name()),
    }
}

/// f16 scale, signed bytes.
fn encode_q8_0(weights: &[Weights], block: &mut [u8]) {
    let (scale, codes) = block.split_at_mut(2);
    scale.copy_from_slice(&encode_group(&weights[0], bytemuck::cast_slice_mut(codes)).to_le_bytes());
}

/// Codes -127 to 127 of up to 32 numbers, and their scale: the largest magnitude / 127 as the nearest half. NaN and
/// zeros where a number is not finite.
pub(crate) fn encode_group(values: &[f32], codes: &mut [i8]) -> f16 {
    // Magnitudes compare as integers do, what is not finite above all.
    let largest = values.iter().map(|value| value.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    let largest = f32::from_bits(largest);
    let scale = half_of(if largest.is_finite() { largest / 127.0 } else { f32::NAN });
    let inverse = inverse_of(scale.to_f32());
    for (value, code) in values.iter().zip(codes) {
        let scaled = value * inverse;
        let scaled = if scaled > -127.0 { scaled } else { -127.0 };
        let scaled = if scaled < 127.0 { scaled } else { 127.0 };
        *code = if inverse > 0.0 { rounded(scaled) as i8 } else { 0 };
    }
    scale
}

/// f16 `d`, f16 `m`, 12 bytes of 6-bit scales and minimums, 128 bytes of nibbles.
fn encode_q4_k(weights: &[Weights], block: &mut [u8]) {
    let best = if all_finite(weights) { Super::search(weights) } else { Super::not_a_number() };
    block[..2].copy_from_slice(&best.d.to_le_bytes());
    block[2..4].copy_from_slice(&best.m.to_le_bytes());
    block[4..16].copy_from_slice(&packed_subs(&best.groups));
    let pairs = best.groups.as_chunks::<2>().0;
    for (pair, bytes) in pairs.iter().zip(block[16..].chunks_exact_mut(GROUP_LEN)) {
        for (column, byte) in bytes.iter_mut().enumerate() {
            let [low, high] = pair.map(|group| group.codes[column] as u8);
            *byte = low | high << 4;
        }
    }
}

/// The inverse of how Q4_K's reader takes scales and minimums apart.
fn packed_subs(groups: &[SubGroup; GROUPS_PER_SUPER]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (idx, group) in groups.iter().enumerate() {
        let (scale, min) = (group.scale as u8, group.min as u8);
        if idx < 4 {
            packed[idx] |= scale;
            packed[idx + 4] |= min;
        } else {
            packed[idx + 4] = (scale & 15) | (min & 15) << 4;
            packed[idx - 4] |= scale >> 4 << 6;
            packed[idx] |= min >> 4 << 6;
        }
    }
    packed
}

/// A group by itself: weights are about `scale * code - min`.
#[derive(Clone, Copy, Default)]
pub(super) struct Fit {
    pub scale: f32,
    pub min: f32,
}

/// A group in its superblock: scale and minimum are whole numbers, 0 to 63, codes 0 to 15.
#[derive(Clone, Copy)]
struct SubGroup {
    scale: f32,
    min: f32,
    codes: Weights,
    /// Sum of squares.
    error: f32,
}

/// A whole superblock.
struct Super {
    d: f16,
    m: f16,
    groups: [SubGroup; GROUPS_PER_SUPER],
}

impl Fit {
    pub(super) fn search(weights: &Weights) -> Self {
        let lowest = weights.iter().fold(0.0, |lowest: f32, weight| lowest.min(*weight));
        let highest = weights.iter().fold(lowest, |highest: f32, weight| highest.max(*weight));
        let range = highest - lowest;
        if range <= 0.0 {
            return Self { scale: 0.0, min: -lowest };
        }
        let (mut best, mut least) = (Self { scale: range / MAX_CODE, min: -lowest }, f32::INFINITY);
        for n_steps in STEPS {
            let codes = codes(weights, -lowest, n_steps / range);
            let (fit, error) = Self::least_squares(weights, &codes);
            if error < least {
                (best, least) = (fit, error);
            }
        }
        best
    }

    /// The best scale and minimum for these codes, and the sum of squared errors less that of the weights themselves.
    fn least_squares(weights: &Weights, codes: &Weights) -> (Self, f32) {
        const N: f32 = GROUP_LEN as f32;
        let (code_sum, weight_sum) = (sum(codes), sum(weights));
        let squares = sum(&products(codes, codes));
        let mixed = sum(&products(codes, weights));
        let determinant = N * squares - code_sum * code_sum;
        let (mut scale, mut min) = (mixed / squares, 0.0);
        if determinant > 0.0 {
            let free = (N * mixed - code_sum * weight_sum) / determinant;
            let free_min = (free * code_sum - weight_sum) / N;
            // A minimum above zero cannot be stored.
            if free > 0.0 && free_min > 0.0 {
                (scale, min) = (free, free_min);
            }
        }
        let error = scale * (scale * squares - 2.0 * mixed)
            + min * (N * min + 2.0 * weight_sum - 2.0 * scale * code_sum);
        // Codes that are all zero, or that only a negative scale would fit, are no candidates.
        if scale > 0.0 { (Self { scale, min }, error) } else { (Self::default(), f32::INFINITY) }
    }
}

impl SubGroup {
    /// With these scale and minimum.
    fn new(weights: &Weights, (d, m): (f32, f32), scale: f32, min: f32) -> Self {
        let (step, offset) = (d * scale, m * min);
        let codes = codes(weights, offset, inverse_of(step));
        let mut errors = [0.0; GROUP_LEN];
        for (i, error) in errors.iter_mut().enumerate() {
            *error = step * codes[i] - offset - weights[i];
        }
        Self { scale, min, codes, error: sum(&products(&errors, &errors)) }
    }

    /// The best of scales and minimums around the wanted ones.
    fn around(weights: &Weights, factors: (f32, f32), scale: f32, min: f32) -> Self {
        let mut best = Self::new(weights, factors, scale, min);
        // Where f16 runs out of small numbers, nothing may be the best there is.
        let nothing = Self::new(weights, factors, 0.0, 0.0);
        if nothing.error < best.error {
            best = nothing;
        }
        for (scale_step, min_step) in [
            (-1.0, -1.0),
            (-1.0, 0.0),
            (-1.0, 1.0),
            (0.0, -1.0),
            (0.0, 1.0),
            (1.0, -1.0),
            (1.0, 0.0),
            (1.0, 1.0),
        ] {
            let near = |value: f32, step: f32| (value + step).clamp(0.0, MAX_SUB);
            let other = Self::new(weights, factors, near(scale, scale_step), near(min, min_step));
            if other.error < best.error {
                best = other;
            }
        }
        best
    }
}

impl Super {
    fn search(weights: &[Weights]) -> Self {
        let fits: [Fit; GROUPS_PER_SUPER] = std::array::from_fn(|idx| Fit::search(&weights[idx]));
        let largest = |of: fn(&Fit) -> f32| fits.iter().map(of).fold(0.0, f32::max);
        let (d, m) = (half_of(largest(|fit| fit.scale) / MAX_SUB), half_of(largest(|fit| fit.min) / MAX_SUB));
        let sub = |value: f32, unit: f16| (value * inverse_of(unit.to_f32())).min(MAX_SUB).round();
        let wanted = |idx: usize| (sub(fits[idx].scale, d), sub(fits[idx].min, m));
        let first = Self::with(weights, (d, m), wanted);
        let Some((d, m)) = first.refit(weights) else { return first };
        let second = Self::with(weights, (d, m), |idx| (first.groups[idx].scale, first.groups[idx].min));
        if second.error() < first.error() { second } else { first }
    }

    fn with(weights: &[Weights], (d, m): (f16, f16), wanted: impl Fn(usize) -> (f32, f32)) -> Self {
        let groups = std::array::from_fn(|idx| {
            let (scale, min) = wanted(idx);
            SubGroup::around(&weights[idx], (d.to_f32(), m.to_f32()), scale, min)
        });
        Self { d, m, groups }
    }

    /// The two factors that fit best to codes and small integers as they are; none where nothing determines them.
    fn refit(&self, weights: &[Weights]) -> Option<(f16, f16)> {
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64);
        for (group, weights) in self.groups.iter().zip(weights) {
            let (scale, min) = (f64::from(group.scale), f64::from(group.min));
            let codes = f64::from(sum(&group.codes));
            aa += scale * scale * f64::from(sum(&products(&group.codes, &group.codes)));
            ab += scale * min * codes;
            bb += min * min * GROUP_LEN as f64;
            ax += scale * f64::from(sum(&products(&group.codes, weights)));
            bx += min * f64::from(sum(weights));
        }
        let determinant = aa * bb - ab * ab;
        let (d, m) = if determinant > 1e-9 * aa * bb {
            ((ax * bb - ab * bx) / determinant, (ab * ax - aa * bx) / determinant)
        } else {
            (ax / aa, 0.0)
        };
        let is_usable = d > 0.0 && m >= 0.0 && (m > 0.0 || bb == 0.0);
        is_usable.then(|| (half_of(d as f32), half_of(m as f32)))
    }

    fn error(&self) -> f32 {
        self.groups.iter().map(|group| group.error).sum()
    }

    fn not_a_number() -> Self {
        let group = SubGroup { scale: 1.0, min: 0.0, codes: [0.0; GROUP_LEN], error: 0.0 };
        Self { d: f16::NAN, m: f16::ZERO, groups: [group; GROUPS_PER_SUPER] }
    }
}

/// `(weight + offset) * inverse`, rounded to the nearest code.
#[inline(always)]
pub(super) fn codes(weights: &Weights, offset: f32, inverse: f32) -> Weights {
    weights.map(|weight| {
        let scaled = (weight + offset) * inverse;
        let scaled = if scaled > 0.0 { scaled } else { 0.0 };
        let scaled = if scaled < MAX_CODE { scaled } else { MAX_CODE };
        (scaled + SHIFT) - SHIFT
    })
}

/// To the nearest integer, ties to even; for small numbers.
fn rounded(x: f32) -> i32 {
    (x + SHIFT).to_bits() as i32 - SHIFT_BITS
}

#[inline(always)]
pub(super) fn products(a: &Weights, b: &Weights) -> Weights {
    std::array::from_fn(|i| a[i] * b[i])
}

/// In a fixed order that any number of lanes can follow.
#[inline(always)]
pub(super) fn sum(values: &Weights) -> f32 {
    let mut lanes = *values;
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

pub(super) fn all_finite(weights: &[Weights]) -> bool {
    weights.as_flattened().iter().all(|weight| weight.is_finite())
}

/// The nearest half; the largest one where there is none near.
pub(super) fn half_of(x: f32) -> f16 {
    if x > f16::MAX.to_f32() { f16::MAX } else { f16::from_f32(x) }
}

fn inverse_of(x: f32) -> f32 {
    if x > 0.0 { 1.0 / x } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::encode_testing::{
        bytes_of, errors_beside_the_oracle, normal, round_trip, squared_error,
    };
    use crate::testing::Numbers;
    use candle_core::quantized::GgmlDType;
    use proptest::prelude::*;

    #[test]
    fn errors_are_not_above_those_of_the_oracle() {
        let weights = normal(1, 64 * SUPER_LEN);
        for (to, oracle) in [(WeightType::Q8_0, GgmlDType::Q8_0), (WeightType::Q4_K, GgmlDType::Q4K)] {
            let (ours, theirs) = errors_beside_the_oracle(&weights, to, oracle);
            assert!(ours <= 1.001 * theirs, "{}: {ours} is above {theirs}", to.name());
        }
    }

    /// What the types can at least do: half a step of 1/127 of the largest weight, a step of 1/15 of the group's range
    /// with scale and minimum themselves in steps of 1/63 of the largest.
    #[test]
    fn errors_are_within_the_steps() {
        for seed in 0..40 {
            let weights = normal(seed, SUPER_LEN);
            for (group, back) in weights.chunks(32).zip(round_trip(&weights, WeightType::Q8_0).chunks(32)) {
                let largest = group.iter().fold(0.0_f32, |largest, weight| largest.max(weight.abs()));
                for (weight, back) in group.iter().zip(back) {
                    assert!((weight - back).abs() <= 0.501 * largest / 127.0, "{weight} became {back}");
                }
            }
            let range = weights.iter().fold(0.0_f32, |largest, weight| largest.max(weight.abs())) * 2.0;
            for (weight, back) in weights.iter().zip(round_trip(&weights, WeightType::Q4_K)) {
                assert!((weight - back).abs() <= range / 15.0, "{weight} became {back}");
            }
        }
    }

    #[test]
    fn what_can_be_stored_exactly_is() {
        // Codes 0..=15 with scale 0.5 and minimum 2, all small integers powers of two.
        let exact: Vec<f32> = (0..SUPER_LEN).map(|i| 0.5 * (i % 16) as f32 - 2.0).collect();
        let error = squared_error(&round_trip(&exact, WeightType::Q4_K), &exact);
        assert!(error < 1e-4 * SUPER_LEN as f64, "{error}");
        for to in [WeightType::Q8_0, WeightType::Q4_K] {
            assert_eq!(round_trip(&[0.0; SUPER_LEN], to), [0.0; SUPER_LEN]);
            for constant in [1.0, -1.0, 3.0e-4, -700.0] {
                for back in round_trip(&[constant; SUPER_LEN], to) {
                    assert!((back - constant).abs() <= 5e-3 * constant.abs(), "{constant} became {back}");
                }
            }
        }
    }

    #[test]
    fn a_block_with_a_number_that_is_none_says_so() {
        for to in [WeightType::Q8_0, WeightType::Q4_K] {
            for wild in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut weights = normal(3, 2 * SUPER_LEN);
                weights[SUPER_LEN + 1] = wild;
                let back = round_trip(&weights, to);
                assert!(back[..SUPER_LEN].iter().all(|weight| weight.is_finite()), "its neighbour is whole");
                assert!(back[SUPER_LEN..SUPER_LEN + 32].iter().all(|weight| weight.is_nan()));
            }
        }
    }

    #[test]
    fn halves_are_quantized_as_the_numbers_they_are() {
        let halves: Vec<f16> = normal(4, SUPER_LEN).into_iter().map(f16::from_f32).collect();
        let bytes: Vec<u8> = halves.iter().flat_map(|half| half.to_le_bytes()).collect();
        let singles: Vec<f32> = halves.iter().map(|half| half.to_f32()).collect();
        for to in [WeightType::Q8_0, WeightType::Q4_K] {
            let from_singles = requantize_row(WeightType::F32, &bytes_of(&singles), to);
            assert_eq!(requantize_row(WeightType::F16, &bytes, to), from_singles);
        }
    }

    proptest! {
        /// Any finite weights: no panic, finite again, and never worse than all zeros.
        #[test]
        fn any_finite_weights_are_stored(seed in any::<u64>(), exponent in -30..20_i32, offset in -2.0..2.0_f32) {
            let mut numbers = Numbers::new(seed);
            let size = 2.0_f32.powi(exponent);
            let weights: Vec<f32> = (0..SUPER_LEN)
                .map(|_| size * (numbers.value() * if numbers.below(9) == 0 { 8.0 } else { 1.0 } + offset))
                .collect();
            for to in [WeightType::Q8_0, WeightType::Q4_K] {
                let back = round_trip(&weights, to);
                prop_assert!(back.iter().all(|weight| weight.is_finite()));
                let (error, zeros) = (squared_error(&back, &weights), squared_error(&weights, &[0.0; SUPER_LEN]));
                prop_assert!(error <= zeros, "{} errs {error}, zeros {zeros}", to.name());
                let lost = if to == WeightType::Q8_0 { 1e-3 } else { 0.05 };
                prop_assert!(exponent < -16 || error <= lost * zeros, "{} errs {error} of {zeros}", to.name());
            }
        }
    }
}
