//! The weight types that are plain numbers: F32, F16, BF16, all little-endian.

use half::{bf16, f16};
use paceline_domain::WeightType;

/// IEEE single precision.
pub(crate) enum F32 {}
/// IEEE half precision.
pub(crate) enum F16 {}
/// The upper half of a single.
pub(crate) enum BF16 {}

/// A weight type of plain numbers.
pub(crate) trait FloatFormat: 'static {
    /// Its name.
    const TYPE: WeightType;
    /// Bytes of one number.
    const BYTES: usize;

    /// The number in these bytes, exactly.
    fn value(bytes: &[u8]) -> f32;
}

impl FloatFormat for F32 {
    const TYPE: WeightType = WeightType::F32;
    const BYTES: usize = 4;

    fn value(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}

impl FloatFormat for F16 {
    const TYPE: WeightType = WeightType::F16;
    const BYTES: usize = 2;

    fn value(bytes: &[u8]) -> f32 {
        f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
}

impl FloatFormat for BF16 {
    const TYPE: WeightType = WeightType::BF16;
    const BYTES: usize = 2;

    fn value(bytes: &[u8]) -> f32 {
        bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
}
