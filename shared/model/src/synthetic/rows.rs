//! Random weights of every storage type, one row at a time, each a function of a key alone. It quantizes nothing:
//! blocks of quantized types are random codes with fitting scales.

use half::{bf16, f16};
use paceline_domain::WeightType;

/// Deterministic random numbers: SplitMix64 (Steele, Lea, Flood 2014).
pub(super) struct Random(u64);

impl Random {
    /// A stream for a key; different keys give unrelated streams.
    pub(super) fn new(key: &[u64]) -> Self {
        let mut random = Self(0x5851_f42d_4c95_7f2d);
        for word in key {
            random.0 ^= *word;
            random.0 = random.next();
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// From -1 to 1, uniform.
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// About normal with mean 0 and variance 1: the sum of three uniform numbers of variance 1/3.
    fn normal(&mut self) -> f32 {
        self.uniform() + self.uniform() + self.uniform()
    }
}

/// Numbers around `mean` as little-endian f32, as many as there is room for.
pub(super) fn fill_floats(random: &mut Random, mean: f32, deviation: f32, out: &mut [u8]) {
    fill_elements(out, || (mean + deviation * random.normal()).to_le_bytes());
}

/// A row of weights with about this standard deviation, in file form.
///
/// # Panics
/// When `out` is not whole blocks.
pub(super) fn fill_row(random: &mut Random, weight_type: WeightType, deviation: f32, out: &mut [u8]) {
    match weight_type {
        WeightType::F32 => fill_elements(out, || (deviation * random.normal()).to_le_bytes()),
        WeightType::F16 => fill_elements(out, || f16::from_f32(deviation * random.normal()).to_le_bytes()),
        WeightType::BF16 => fill_elements(out, || bf16::from_f32(deviation * random.normal()).to_le_bytes()),
        quantized => {
            let blocks = out.chunks_exact_mut(quantized.block_bytes());
            blocks.for_each(|block| fill_block(random, quantized, deviation, block));
        }
    }
}

fn fill_elements<const N: usize>(out: &mut [u8], mut element: impl FnMut() -> [u8; N]) {
    let (elements, rest) = out.as_chunks_mut();
    assert!(rest.is_empty(), "room for whole elements of {N} bytes");
    elements.iter_mut().for_each(|place| *place = element());
}

/// Random codes, then the scales over them. Offsets and meanings are those of the GGUF block layouts; the scale
/// is chosen so that uniform codes have about the wanted deviation, the minimum so that their mean is about 0.
fn fill_block(random: &mut Random, weight_type: WeightType, deviation: f32, bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|byte| *byte = random.next() as u8);
    // Deviation of uniform codes 0..n is about 0.29 n; integer sub-scales of K-quants average half their range.
    let (scale_at, scale, min_at, min) = match weight_type {
        WeightType::Q4_0 => (0, 0.217, None, 0.0),
        WeightType::Q4_1 => (0, 0.217, Some(2), -7.5 * 0.217),
        WeightType::Q5_0 => (0, 0.108, None, 0.0),
        WeightType::Q5_1 => (0, 0.108, Some(2), -15.5 * 0.108),
        WeightType::Q8_0 => (0, 0.0135, None, 0.0),
        WeightType::Q2_K => (80, 0.08, Some(82), 1.5 * 0.08),
        WeightType::Q3_K => (108, 0.023, None, 0.0),
        WeightType::Q4_K => (0, 0.006, Some(2), 7.5 * 0.006),
        WeightType::Q5_K => (0, 0.003, Some(2), 15.5 * 0.003),
        WeightType::Q6_K => (208, 0.0007, None, 0.0),
        WeightType::F32 | WeightType::F16 | WeightType::BF16 => unreachable!("invariant: a quantized type"),
    };
    let wobble = deviation * (1.0 + 0.2 * random.uniform());
    bytes[scale_at..scale_at + 2].copy_from_slice(&f16::from_f32(scale * wobble).to_le_bytes());
    if let Some(at) = min_at {
        bytes[at..at + 2].copy_from_slice(&f16::from_f32(min * wobble).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_kernels::formats::dequantize_row;

    fn row(random: &mut Random, weight_type: WeightType, n_cols: usize, deviation: f32) -> Vec<u8> {
        let mut bytes = vec![0; weight_type.row_bytes(n_cols).expect("whole blocks")];
        fill_row(random, weight_type, deviation, &mut bytes);
        bytes
    }

    #[test]
    fn rows_of_every_type_are_centred_and_about_as_wide_as_asked() {
        for weight_type in WeightType::ALL {
            let (mut sum, mut squares) = (0.0, 0.0);
            for key in 0..32 {
                let bytes = row(&mut Random::new(&[key]), weight_type, 1024, 0.1);
                let mut weights = [0.0; 1024];
                dequantize_row(weight_type, &bytes, &mut weights);
                sum += weights.iter().sum::<f32>();
                squares += weights.iter().map(|x| x * x).sum::<f32>();
            }
            let (mean, deviation) = (sum / 32768.0, (squares / 32768.0).sqrt());
            assert!(mean.abs() < 0.03, "{} has mean {mean}", weight_type.name());
            assert!((0.05..0.2).contains(&deviation), "{} has deviation {deviation}", weight_type.name());
        }
    }

    #[test]
    fn a_key_is_a_stream() {
        let of = |key: &[u64]| row(&mut Random::new(key), WeightType::F32, 8, 1.0);
        assert_eq!(of(&[1, 2]), of(&[1, 2]));
        assert_ne!(of(&[1, 2]), of(&[2, 1]));
    }
}
