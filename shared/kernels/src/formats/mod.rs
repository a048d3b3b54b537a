//! What the blocks of every weight type mean: codes, scales, minimums, and the scalar dequantization; `encode` makes
//! blocks of other types for weights that are quantized at load.
//! It does not know how weights are repacked or multiplied.
//!
//! Every quantized type is seen the same way. A group of 32 columns holds unsigned codes `u` of `BITS` bits; a
//! weight is `scale * (u - OFFSET) + min`, with one scale and one minimum for each 16 or 32 columns. Scales of
//! K-quants are products of an f16 and a small integer, which f32 holds exactly.

mod encode;
mod encode_four;
mod encode_lanes;
#[cfg(test)]
mod encode_testing;
mod float;
mod k_quants;
mod legacy;

pub(crate) use encode::encode_group;
pub use encode::requantize_row;
pub(crate) use encode_lanes::{CodingKernel, coding_sums_scalar};
#[cfg(target_arch = "x86_64")]
pub(crate) use encode_lanes::{coding_sums_avx2, coding_sums_avx512};
pub(crate) use float::{BF16, F16, F32, FloatFormat};
pub(crate) use k_quants::{Q2_K, Q3_K, Q4_K, Q5_K, Q6_K};
pub(crate) use legacy::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};

use half::f16;
use paceline_domain::WeightType;

/// Columns that share one group of codes in every quantized type.
pub const GROUP_LEN: usize = 32;
/// Groups in one superblock of a K-quant.
pub const GROUPS_PER_SUPER: usize = 8;

/// Where the scales of a group come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScaleLayout {
    /// `scale = d`, one f16 a group.
    Group,
    /// `scale = d`, `min = m`, two f16 a group.
    GroupMin,
    /// `scale = d * sub[0]`, `min = -(m * sub[1])` with two f16 a superblock and two u8 a group.
    Super32Min,
    /// For each half group `scale = d * low nibble`, `min = -(m * high nibble)` with two f16 a superblock.
    Super16Min,
    /// For each half group `scale = d * sub` with one f16 a superblock and an i8 each half group.
    Super16,
}

impl ScaleLayout {
    /// Whether each half group of 16 columns has its own scale.
    pub const fn per_half(self) -> bool {
        matches!(self, Self::Super16Min | Self::Super16)
    }

    /// Whether weights have a minimum.
    pub const fn has_min(self) -> bool {
        matches!(self, Self::GroupMin | Self::Super32Min | Self::Super16Min)
    }

    /// Whether `d` and `m` belong to a superblock instead of a group.
    pub const fn has_super(self) -> bool {
        !matches!(self, Self::Group | Self::GroupMin)
    }

    /// f16 numbers beside each other: `d` alone or `d` and `m`.
    pub const fn n_halfs(self) -> usize {
        if self.has_min() { 2 } else { 1 }
    }
}

/// Scales of a group as the file has them, integers unpacked to bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RawScales {
    /// Bits of the f16 scale of the group or superblock.
    pub d: u16,
    /// Bits of its f16 minimum, 0 where the type has none.
    pub m: u16,
    /// Small integers of the group, meaning as in [`ScaleLayout`]; 0 where the type has none.
    pub sub: [u8; 2],
}

/// Scales as numbers, one for each half group.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Scales {
    /// Multiplies `code - OFFSET`.
    pub scale: [f32; 2],
    /// Added; 0 where the type has no minimum.
    pub min: [f32; 2],
}

impl RawScales {
    /// The numbers meant. All products are exact in f32.
    pub(crate) fn resolve(self, layout: ScaleLayout) -> Scales {
        let d = f16::from_bits(self.d).to_f32();
        let m = f16::from_bits(self.m).to_f32();
        let each = |value: fn(f32, u8) -> f32, factor: f32| self.sub.map(|sub| value(factor, sub));
        match layout {
            ScaleLayout::Group => Scales { scale: [d; 2], min: [0.0; 2] },
            ScaleLayout::GroupMin => Scales { scale: [d; 2], min: [m; 2] },
            ScaleLayout::Super32Min => {
                Scales { scale: [d * f32::from(self.sub[0]); 2], min: [-m * f32::from(self.sub[1]); 2] }
            }
            ScaleLayout::Super16Min => Scales {
                scale: each(|d, sub| d * f32::from(sub & 15), d),
                min: each(|m, sub| -m * f32::from(sub >> 4), m),
            },
            ScaleLayout::Super16 => {
                Scales { scale: each(|d, sub| d * f32::from(sub as i8), d), min: [0.0; 2] }
            }
        }
    }
}

/// The 32 columns of one group.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Group {
    /// Unsigned codes, in column order.
    pub codes: [u8; GROUP_LEN],
    /// Their scales.
    pub scales: RawScales,
}

/// A quantized weight type.
pub(crate) trait QuantFormat: 'static {
    /// Its name.
    const TYPE: WeightType;
    /// Bits of a code. Its binary digits name the bit planes a tile keeps codes in.
    const BITS: usize;
    /// Code of weight zero, for types without a minimum.
    const OFFSET: i32;
    /// Where scales come from.
    const SCALES: ScaleLayout;

    /// Group `idx` of a file block of `TYPE.block_bytes()` bytes.
    fn group(block: &[u8], idx: usize) -> Group;
}

/// Calls generic code for a weight type known at run time: `quantized` with `$format` naming a [`QuantFormat`],
/// `float` with it naming a [`FloatFormat`].
macro_rules! with_format {
    ($weight_type:expr, $format:ident => { quantized: $quantized:expr, float: $float:expr $(,)? }) => {
        with_format!(@match $weight_type, $format, $quantized, $float,
            [Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K], [F32 F16 BF16])
    };
    (@match $weight_type:expr, $format:ident, $quantized:expr, $float:expr, [$($q:ident)*], [$($f:ident)*]) => {
        match $weight_type {
            $(paceline_domain::WeightType::$q => with_format!(@arm $format, $q, $quantized),)*
            $(paceline_domain::WeightType::$f => with_format!(@arm $format, $f, $float),)*
        }
    };
    (@arm $format:ident, $name:ident, $body:expr) => {{
        #[allow(unused_imports)]
        use $crate::formats::$name as $format;
        $body
    }};
}
pub(crate) use with_format;

/// What the codes of a quantized type are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CodeLayout {
    /// Bits of a code.
    pub bits: usize,
    /// Code of weight zero.
    pub offset: i32,
    /// Where scales come from.
    pub scales: ScaleLayout,
}

/// The codes of a weight type; `None` when it is of plain numbers.
pub fn code_layout(weight_type: WeightType) -> Option<CodeLayout> {
    with_format!(weight_type, Format => {
        quantized: Some(CodeLayout {
            bits: Format::BITS,
            offset: <Format as QuantFormat>::OFFSET,
            scales: <Format as QuantFormat>::SCALES,
        }),
        float: None,
    })
}

/// Codes and scales of group `idx` of a row of a quantized type: columns `32 idx .. 32 idx + 32`.
///
/// # Panics
/// When the type is not quantized or the row is too short.
pub fn group_of_row(weight_type: WeightType, row: &[u8], idx: usize) -> Group {
    let groups_of_block = weight_type.block_len() / GROUP_LEN;
    let block_bytes = weight_type.block_bytes();
    with_format!(weight_type, Format => {
        quantized: {
            let block = &row[idx / groups_of_block * block_bytes..][..block_bytes];
            <Format as QuantFormat>::group(block, idx % groups_of_block)
        },
        float: panic!("invariant: {} has no codes", weight_type.name()),
    })
}

/// Turns a row, or any whole number of file blocks, into f32: the definition of every weight type.
///
/// # Panics
/// When `bytes` is not as long as `out.len()` weights of this type are.
pub fn dequantize_row(weight_type: WeightType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        Some(bytes.len()),
        weight_type.row_bytes(out.len()),
        "invariant: a row of {} {} weights fits its bytes",
        out.len(),
        weight_type.name()
    );
    with_format!(weight_type, Format => {
        quantized: dequantize_quantized::<Format>(bytes, out),
        float: dequantize_float::<Format>(bytes, out),
    });
}

fn dequantize_quantized<F: QuantFormat>(bytes: &[u8], out: &mut [f32]) {
    let blocks = bytes.chunks_exact(F::TYPE.block_bytes());
    for (block, out) in blocks.zip(out.chunks_exact_mut(F::TYPE.block_len())) {
        for (idx, out) in out.chunks_exact_mut(GROUP_LEN).enumerate() {
            let group = F::group(block, idx);
            let scales = group.scales.resolve(F::SCALES);
            for (column, weight) in out.iter_mut().enumerate() {
                let half = column / 16;
                let product = scales.scale[half] * (i32::from(group.codes[column]) - F::OFFSET) as f32;
                *weight = if F::SCALES.has_min() { product + scales.min[half] } else { product };
            }
        }
    }
}

fn dequantize_float<F: FloatFormat>(bytes: &[u8], out: &mut [f32]) {
    for (element, weight) in bytes.chunks_exact(F::BYTES).zip(out) {
        *weight = F::value(element);
    }
}

/// Bits of the f16 at byte `at`.
fn half_bits(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use candle_core::quantized::{GgmlDType, QStorage, QTensor};
    use proptest::prelude::*;

    fn ggml_type(weight_type: WeightType) -> GgmlDType {
        match weight_type {
            WeightType::F32 => GgmlDType::F32,
            WeightType::F16 => GgmlDType::F16,
            WeightType::BF16 => GgmlDType::BF16,
            WeightType::Q4_0 => GgmlDType::Q4_0,
            WeightType::Q4_1 => GgmlDType::Q4_1,
            WeightType::Q5_0 => GgmlDType::Q5_0,
            WeightType::Q5_1 => GgmlDType::Q5_1,
            WeightType::Q8_0 => GgmlDType::Q8_0,
            WeightType::Q2_K => GgmlDType::Q2K,
            WeightType::Q3_K => GgmlDType::Q3K,
            WeightType::Q4_K => GgmlDType::Q4K,
            WeightType::Q5_K => GgmlDType::Q5K,
            WeightType::Q6_K => GgmlDType::Q6K,
        }
    }

    fn oracle(weight_type: WeightType, bytes: &[u8], n_weights: usize) -> Vec<f32> {
        let storage = QStorage::from_data(bytes.into(), &Device::Cpu, ggml_type(weight_type)).unwrap();
        let tensor = QTensor::new(storage, n_weights).unwrap();
        tensor.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap()
    }

    /// Equal as numbers; any NaN is as good as another.
    fn same(left: f32, right: f32) -> bool {
        left == right || left.is_nan() && right.is_nan()
    }

    fn check(weight_type: WeightType, bytes: &[u8]) {
        let n_weights = bytes.len() / weight_type.block_bytes() * weight_type.block_len();
        let mut ours = vec![0.0; n_weights];
        dequantize_row(weight_type, bytes, &mut ours);
        let theirs = oracle(weight_type, bytes, n_weights);
        for (column, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            assert!(same(*ours, *theirs), "{} column {column}: {ours} is not {theirs}", weight_type.name());
        }
    }

    proptest! {
        /// Any bits are a block: scales come out tiny, huge, infinite and NaN as well.
        #[test]
        fn every_type_means_what_the_oracle_says(
            seed in prop::collection::vec(any::<u8>(), 3 * 1024),
            n_blocks in 1usize..4,
        ) {
            for weight_type in WeightType::ALL {
                check(weight_type, &seed[..n_blocks * weight_type.block_bytes()]);
            }
        }
    }

    #[test]
    fn extreme_scales_and_codes() {
        for weight_type in WeightType::ALL {
            for byte in [0x00, 0x7b, 0x80, 0xfb, 0xff] {
                check(weight_type, &vec![byte; 2 * weight_type.block_bytes()]);
            }
        }
    }

    #[test]
    #[should_panic(expected = "a row of 64 q4_0 weights")]
    fn a_short_row_is_refused() {
        dequantize_row(WeightType::Q4_0, &[0; 18], &mut [0.0; 64]);
    }
}
