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
use super::encode_lanes::{Coding, CodingSums, Groups, Lanes, half_of, inverse_of, lanes, take_better};
use super::{GROUP_LEN, GROUPS_PER_SUPER, dequantize_row};
use crate::Kernels;
use crate::simd::{LANES, SHIFT, SHIFT_BITS};

/// Weights that are coded together.
const PIECE_LEN: usize = GROUP_LEN * LANES;
/// Weights of a superblock, and how many are coded together.
const SUPER_LEN: usize = GROUP_LEN * GROUPS_PER_SUPER;
const SUPERS: usize = PIECE_LEN / SUPER_LEN;
/// Largest small integer beside a code of Q4_K.
const MAX_SUB: f32 = 63.0;

/// A row of any type as a row of `to`, one of the types of [`paceline_domain::Quantization`]. A block with a number that is not
/// finite becomes NaN as a whole, so that nothing is hidden.
///
/// # Panics
/// When `to` is another type, or the row is not whole blocks of it.
pub fn requantize_row(from: WeightType, bytes: &[u8], to: WeightType) -> Vec<u8> {
    let kernels = Kernels::detect();
    let n_weights = |bytes: &[u8]| bytes.len() / from.block_bytes() * from.block_len();
    let piece_bytes = |of: WeightType| PIECE_LEN / of.block_len() * of.block_bytes();
    let row_bytes =
        to.row_bytes(n_weights(bytes)).expect("invariant: a row is whole blocks of what it becomes");
    let mut out = vec![0; row_bytes];
    for (bytes, piece) in bytes.chunks(piece_bytes(from)).zip(out.chunks_mut(piece_bytes(to))) {
        // Zeros after the end of the row.
        let mut weights = [0.0; PIECE_LEN];
        dequantize_row(from, bytes, &mut weights[..n_weights(bytes)]);
        encode(kernels, to, &weights, piece);
    }
    out
}

/// As many blocks as there is room for.
fn encode(kernels: &Kernels, to: WeightType, weights: &[f32; PIECE_LEN], blocks: &mut [u8]) {
    match to {
        WeightType::Q8_0 => encode_q8_0(weights, blocks),
        WeightType::Q4_0 => encode_q4_0(&Groups::new(kernels, weights), blocks),
        WeightType::Q4_1 => encode_q4_1(&Groups::new(kernels, weights), blocks),
        WeightType::Q4_K => encode_q4_k(&Groups::new(kernels, weights), blocks),
        other => panic!("invariant: nothing is quantized to {}", other.name()),
    }
}

/// f16 scale, signed bytes.
fn encode_q8_0(weights: &[f32], blocks: &mut [u8]) {
    for (group, block) in weights.chunks_exact(GROUP_LEN).zip(blocks.chunks_exact_mut(2 + GROUP_LEN)) {
        let (scale, codes) = block.split_at_mut(2);
        scale.copy_from_slice(&encode_group(group, bytemuck::cast_slice_mut(codes)).to_le_bytes());
    }
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

/// Up to two superblocks: f16 `d`, f16 `m`, 12 bytes of 6-bit scales and minimums, 128 bytes of nibbles.
fn encode_q4_k(groups: &Groups<'_>, blocks: &mut [u8]) {
    let best = Supers::search(groups);
    let coding = best.coding();
    for (idx, block) in blocks.chunks_exact_mut(WeightType::Q4_K.block_bytes()).enumerate() {
        let first = idx * GROUPS_PER_SUPER;
        let (scales, mins) = (&best.scales[first..], &best.mins[first..]);
        if !(first..first + GROUPS_PER_SUPER).all(|l| groups.is_finite(l)) {
            block.fill(0);
            block[..2].copy_from_slice(&f16::NAN.to_le_bytes());
            continue;
        }
        let Factors { d, m } = best.factors[idx];
        block[..2].copy_from_slice(&d.to_le_bytes());
        block[2..4].copy_from_slice(&m.to_le_bytes());
        block[4..16].copy_from_slice(&packed_subs(scales, mins));
        for (at, byte) in block[16..].iter_mut().enumerate() {
            let (l, column) = (first + at / GROUP_LEN * 2, &groups.columns[at % GROUP_LEN]);
            *byte = coding.code(l, column[l]) as u8 | (coding.code(l + 1, column[l + 1]) as u8) << 4;
        }
    }
}

/// The inverse of how Q4_K's reader takes scales and minimums apart, of the first eight.
fn packed_subs(scales: &[f32], mins: &[f32]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (idx, (scale, min)) in scales.iter().zip(mins).take(GROUPS_PER_SUPER).enumerate() {
        let (scale, min) = (*scale as u8, *min as u8);
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

/// What is common to a superblock.
#[derive(Clone, Copy)]
struct Factors {
    d: f16,
    m: f16,
}

/// Superblocks: weights are about `d * scale * code - m * min`.
struct Supers {
    factors: [Factors; SUPERS],
    /// Whole numbers, 0 to 63.
    scales: Lanes,
    mins: Lanes,
    /// Sums of squares.
    errors: Lanes,
}

impl Supers {
    fn search(groups: &Groups<'_>) -> Self {
        let fit = groups.search();
        let largest = |of: &[f32]| of.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
        let factors = std::array::from_fn(|idx| {
            let of = |values: &Lanes| half_at_least(largest(groups_of(values, idx)) / MAX_SUB);
            Factors { d: of(&fit.scale), m: of(&fit.min) }
        });
        let whole = |value: f32, unit: f16| (value.abs() * inverse_of(unit.to_f32())).min(MAX_SUB).round();
        let scales = lanes(|l| whole(fit.scale[l], factors[l / GROUPS_PER_SUPER].d));
        let mins = lanes(|l| whole(fit.min[l], factors[l / GROUPS_PER_SUPER].m));
        let mut best = Self::around(groups, factors, &scales, &mins);
        let sums = groups.sums(&best.coding());
        let refitted = std::array::from_fn(|idx| best.refitted(groups, &sums, idx));
        let second = Self::around(groups, refitted, &best.scales, &best.mins);
        for idx in 0..SUPERS {
            best.take_super(&second, idx);
        }
        best
    }

    /// The best of small integers around the wanted ones.
    fn around(groups: &Groups<'_>, factors: [Factors; SUPERS], scales: &Lanes, mins: &Lanes) -> Self {
        let mut best = Self::new(groups, factors, *scales, *mins);
        // Where f16 runs out of small numbers, nothing may be the best there is.
        best.take_better(&Self::new(groups, factors, [0.0; LANES], [0.0; LANES]));
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
            let near = |values: &Lanes, step: f32| values.map(|value| (value + step).clamp(0.0, MAX_SUB));
            best.take_better(&Self::new(groups, factors, near(scales, scale_step), near(mins, min_step)));
        }
        best
    }

    fn new(groups: &Groups<'_>, factors: [Factors; SUPERS], scales: Lanes, mins: Lanes) -> Self {
        let mut coded = Self { factors, scales, mins, errors: [0.0; LANES] };
        coded.errors = groups.sums(&coded.coding()).errors;
        coded
    }

    /// The groups that err less.
    fn take_better(&mut self, other: &Self) {
        self.take(other, std::array::from_fn(|l| other.errors[l] < self.errors[l]));
    }

    /// All of a superblock, where it errs less.
    fn take_super(&mut self, other: &Self, idx: usize) {
        let error = |of: &Self| groups_of(&of.errors, idx).iter().sum::<f32>();
        if error(other) < error(self) {
            self.factors[idx] = other.factors[idx];
            self.take(other, std::array::from_fn(|l| l / GROUPS_PER_SUPER == idx));
        }
    }

    fn take(&mut self, other: &Self, is_better: [bool; LANES]) {
        take_better(
            [&mut self.scales, &mut self.mins, &mut self.errors],
            [&other.scales, &other.mins, &other.errors],
            is_better,
        );
    }

    fn coding(&self) -> Coding {
        let factors = |l: usize| self.factors[l / GROUPS_PER_SUPER];
        let scale = lanes(|l| factors(l).d.to_f32() * self.scales[l]);
        Coding::new(scale, lanes(|l| -(factors(l).m.to_f32() * self.mins[l])))
    }

    /// The two factors that fit best to codes and small integers as they are; the same ones where nothing determines them.
    fn refitted(&self, groups: &Groups<'_>, sums: &CodingSums, idx: usize) -> Factors {
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64);
        for l in idx * GROUPS_PER_SUPER..(idx + 1) * GROUPS_PER_SUPER {
            let (scale, min) = (f64::from(self.scales[l]), f64::from(self.mins[l]));
            aa += scale * scale * f64::from(sums.squares[l]);
            ab += scale * min * f64::from(sums.codes[l]);
            bb += min * min * GROUP_LEN as f64;
            ax += scale * f64::from(sums.mixed[l]);
            bx += min * f64::from(groups.sums[l]);
        }
        let determinant = aa * bb - ab * ab;
        let (d, m) = if determinant > 1e-9 * aa * bb {
            ((ax * bb - ab * bx) / determinant, (ab * ax - aa * bx) / determinant)
        } else {
            (ax / aa, 0.0)
        };
        let is_usable = d > 0.0 && m >= 0.0 && (m > 0.0 || bb == 0.0);
        if is_usable { Factors { d: half_of(d as f32), m: half_of(m as f32) } } else { self.factors[idx] }
    }
}

/// The lanes of a superblock.
fn groups_of(values: &Lanes, idx: usize) -> &[f32] {
    &values[idx * GROUPS_PER_SUPER..][..GROUPS_PER_SUPER]
}

/// So that the largest small integer reaches what it was made for, also where halves are far apart.
fn half_at_least(x: f32) -> f16 {
    let nearest = half_of(x);
    if nearest.to_f32() < x && nearest < f16::MAX { f16::from_bits(nearest.to_bits() + 1) } else { nearest }
}

/// To the nearest integer, ties to even; for small numbers.
fn rounded(x: f32) -> i32 {
    (x + SHIFT).to_bits() as i32 - SHIFT_BITS
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
