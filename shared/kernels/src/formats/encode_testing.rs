//! What the tests of encoders share: rows there and back, how far that is from what was put in, and how far the oracle is.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use paceline_domain::WeightType;

use super::{dequantize_row, requantize_row};
use crate::testing::Numbers;

/// A row of f32.
pub(super) fn bytes_of(weights: &[f32]) -> Vec<u8> {
    weights.iter().flat_map(|weight| weight.to_le_bytes()).collect()
}

/// What a row means.
pub(super) fn numbers_of(weight_type: WeightType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / weight_type.block_bytes() * weight_type.block_len()];
    dequantize_row(weight_type, bytes, &mut out);
    out
}

/// What the weights have become.
pub(super) fn round_trip(weights: &[f32], to: WeightType) -> Vec<f32> {
    numbers_of(to, &requantize_row(WeightType::F32, &bytes_of(weights), to))
}

pub(super) fn squared_error(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

/// About normal, as weights are.
pub(super) fn normal(seed: u64, n: usize) -> Vec<f32> {
    let mut numbers = Numbers::new(seed);
    (0..n).map(|_| 0.02 * (numbers.value() + numbers.value() + numbers.value())).collect()
}

/// Squared errors of our coding of the weights, and of candle's.
pub(super) fn errors_beside_the_oracle(weights: &[f32], to: WeightType, oracle: GgmlDType) -> (f64, f64) {
    let theirs = Tensor::from_slice(weights, weights.len(), &Device::Cpu)
        .and_then(|tensor| QTensor::quantize(&tensor, oracle))
        .and_then(|tensor| tensor.dequantize(&Device::Cpu)?.to_vec1::<f32>())
        .expect("the oracle quantizes whole blocks");
    let (ours, theirs) = (squared_error(&round_trip(weights, to), weights), squared_error(&theirs, weights));
    println!("{}: squared error {ours:.3e}, the oracle's {theirs:.3e}", to.name());
    (ours, theirs)
}
