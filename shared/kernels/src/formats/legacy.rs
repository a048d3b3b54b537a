//! The simple GGUF blocks of 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. Nibble `j` is column `j`, its neighbour
//! in the high half of the byte column `j + 16`.

#![allow(non_camel_case_types)]

use super::{GROUP_LEN, Group, QuantFormat, RawScales, ScaleLayout, half_bits};
use paceline_domain::WeightType;

/// f16 scale, nibbles.
pub(crate) enum Q4_0 {}
/// f16 scale, f16 minimum, nibbles.
pub(crate) enum Q4_1 {}
/// f16 scale, 32 fifth bits, nibbles.
pub(crate) enum Q5_0 {}
/// f16 scale, f16 minimum, 32 fifth bits, nibbles.
pub(crate) enum Q5_1 {}
/// f16 scale, signed bytes.
pub(crate) enum Q8_0 {}

fn nibbles(packed: &[u8]) -> [u8; GROUP_LEN] {
    std::array::from_fn(|column| (packed[column % 16] >> (column / 16 * 4)) & 15)
}

/// Nibbles with bit `column` of `fifth_bits` on top.
fn five_bits(packed: &[u8], fifth_bits: &[u8]) -> [u8; GROUP_LEN] {
    let mut codes = nibbles(packed);
    for (column, code) in codes.iter_mut().enumerate() {
        *code |= (fifth_bits[column / 8] >> (column % 8) & 1) << 4;
    }
    codes
}

fn scale(block: &[u8]) -> RawScales {
    RawScales { d: half_bits(block, 0), ..RawScales::default() }
}

fn scale_and_min(block: &[u8]) -> RawScales {
    RawScales { d: half_bits(block, 0), m: half_bits(block, 2), ..RawScales::default() }
}

impl QuantFormat for Q4_0 {
    const TYPE: WeightType = WeightType::Q4_0;
    const BITS: usize = 4;
    const OFFSET: i32 = 8;
    const SCALES: ScaleLayout = ScaleLayout::Group;

    fn group(block: &[u8], _idx: usize) -> Group {
        Group { codes: nibbles(&block[2..18]), scales: scale(block) }
    }
}

impl QuantFormat for Q4_1 {
    const TYPE: WeightType = WeightType::Q4_1;
    const BITS: usize = 4;
    const OFFSET: i32 = 0;
    const SCALES: ScaleLayout = ScaleLayout::GroupMin;

    fn group(block: &[u8], _idx: usize) -> Group {
        Group { codes: nibbles(&block[4..20]), scales: scale_and_min(block) }
    }
}

impl QuantFormat for Q5_0 {
    const TYPE: WeightType = WeightType::Q5_0;
    const BITS: usize = 5;
    const OFFSET: i32 = 16;
    const SCALES: ScaleLayout = ScaleLayout::Group;

    fn group(block: &[u8], _idx: usize) -> Group {
        Group { codes: five_bits(&block[6..22], &block[2..6]), scales: scale(block) }
    }
}

impl QuantFormat for Q5_1 {
    const TYPE: WeightType = WeightType::Q5_1;
    const BITS: usize = 5;
    const OFFSET: i32 = 0;
    const SCALES: ScaleLayout = ScaleLayout::GroupMin;

    fn group(block: &[u8], _idx: usize) -> Group {
        Group { codes: five_bits(&block[8..24], &block[4..8]), scales: scale_and_min(block) }
    }
}

impl QuantFormat for Q8_0 {
    const TYPE: WeightType = WeightType::Q8_0;
    const BITS: usize = 8;
    const OFFSET: i32 = 128;
    const SCALES: ScaleLayout = ScaleLayout::Group;

    fn group(block: &[u8], _idx: usize) -> Group {
        let codes = std::array::from_fn(|column| block[2 + column] ^ 0x80);
        Group { codes, scales: scale(block) }
    }
}
