//! The definition of matrix products: plain loops over rows, tokens and columns.

use super::{FloatLeaf, MAX_TOKENS, QuantizedLeaf, RowSums};
use crate::formats::{FloatFormat, GROUP_LEN, QuantFormat, Scales};
use crate::packed::{TILE_ROWS, codes_of_row, scales_of_row};
use crate::quantize::{GroupScale, SCALE_WORDS, group_codes};

/// Sums a leaf of quantized weights.
pub(crate) fn sum_quantized_scalar<F: QuantFormat, const P: usize>(
    leaf: &QuantizedLeaf<'_>,
    sums: &mut [RowSums],
) {
    let mut of_leaf = [[0.0; TILE_ROWS]; MAX_TOKENS];
    let of_leaf = &mut of_leaf[..sums.len()];
    for group in 0..leaf.n_groups {
        let packed = leaf.weights.group::<F>(group);
        let words = &leaf.scales[group * SCALE_WORDS * leaf.step..];
        for row in 0..TILE_ROWS {
            let weights = codes_of_row(packed.planes, F::BITS, row).map(|code| i32::from(code) - F::OFFSET);
            let scales = scales_of_row::<F>(packed.own, packed.shared, row).resolve(F::SCALES);
            for (token, sums) in of_leaf.iter_mut().enumerate() {
                let place = group * leaf.step + token;
                let x =
                    (group_codes(&leaf.codes[place * P..][..P]), GroupScale::read(words, leaf.step, token));
                sums[row] = add_group::<F>(&weights, &scales, &x, sums[row]);
            }
        }
    }
    put(of_leaf, leaf.adds, sums);
}

/// Writes the sums of a leaf, or adds them to its left neighbour's.
fn put(of_leaf: &[RowSums], adds: bool, sums: &mut [RowSums]) {
    if adds {
        sums.as_flattened_mut().iter_mut().zip(of_leaf.as_flattened()).for_each(|(sum, leaf)| *sum += leaf);
    } else {
        sums.copy_from_slice(of_leaf);
    }
}

/// Adds the product of one group of a row with one group of activations.
fn add_group<F: QuantFormat>(
    weights: &[i32; GROUP_LEN],
    scales: &Scales,
    (codes, x): &([i32; GROUP_LEN], GroupScale),
    acc: f32,
) -> f32 {
    let dot = |half: usize| -> i32 {
        let columns = half * 16..half * 16 + 16;
        weights[columns.clone()].iter().zip(&codes[columns]).map(|(weight, code)| weight * code).sum()
    };
    let mut acc = acc;
    if F::SCALES.per_half() {
        for half in 0..2 {
            acc = (dot(half) as f32).mul_add(scales.scale[half] * x.scale, acc);
            if F::SCALES.has_min() {
                acc = scales.min[half].mul_add(x.scale * -x.negated_half_sums[half] as f32, acc);
            }
        }
    } else {
        acc = ((dot(0) + dot(1)) as f32).mul_add(scales.scale[0] * x.scale, acc);
        if F::SCALES.has_min() {
            acc = scales.min[0].mul_add(x.scaled_sum, acc);
        }
    }
    acc
}

/// Sums a leaf of plain numbers.
pub(crate) fn sum_float_scalar<F: FloatFormat>(leaf: &FloatLeaf<'_>, sums: &mut [RowSums]) {
    let mut of_leaf = [[0.0; TILE_ROWS]; MAX_TOKENS];
    let of_leaf = &mut of_leaf[..sums.len()];
    for (column, weights) in leaf.weights.chunks_exact(TILE_ROWS * F::BYTES).enumerate() {
        for (row, weight) in weights.chunks_exact(F::BYTES).map(F::value).enumerate() {
            for (token, sums) in of_leaf.iter_mut().enumerate() {
                sums[row] = weight.mul_add(leaf.token(token)[column], sums[row]);
            }
        }
    }
    put(of_leaf, leaf.adds, sums);
}
