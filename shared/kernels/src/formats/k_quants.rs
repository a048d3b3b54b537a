//! The GGUF superblocks of 256 weights: Q2_K to Q6_K. Small integer scales per 16 or 32 columns times one f16
//! per superblock.

#![allow(non_camel_case_types)]

use super::{GROUP_LEN, Group, QuantFormat, RawScales, ScaleLayout, half_bits};
use paceline_domain::WeightType;

/// 16 bytes of scale and minimum nibbles, 64 bytes of 2-bit codes, f16 `d`, f16 `m`.
pub(crate) enum Q2_K {}
/// 32 bytes of third bits, 64 bytes of 2-bit codes, 12 bytes of 6-bit scales, f16 `d`.
pub(crate) enum Q3_K {}
/// f16 `d`, f16 `m`, 12 bytes of 6-bit scales and minimums, 128 bytes of nibbles.
pub(crate) enum Q4_K {}
/// f16 `d`, f16 `m`, 12 bytes of 6-bit scales and minimums, 32 bytes of fifth bits, 128 bytes of nibbles.
pub(crate) enum Q5_K {}
/// 128 bytes of nibbles, 64 bytes of upper 2 bits, 16 signed scales, f16 `d`.
pub(crate) enum Q6_K {}

/// 2-bit codes of group `idx`: four groups share 32 bytes, each its own bit pair.
fn two_bits(packed: &[u8], idx: usize) -> [u8; GROUP_LEN] {
    let (quarter, shift) = (idx / 4 * 32, idx % 4 * 2);
    std::array::from_fn(|column| (packed[quarter + column] >> shift) & 3)
}

/// Nibbles of group `idx`: two groups share 32 bytes.
fn nibbles(packed: &[u8], idx: usize) -> [u8; GROUP_LEN] {
    let (pair, shift) = (idx / 2 * 32, idx % 2 * 4);
    std::array::from_fn(|column| (packed[pair + column] >> shift) & 15)
}

/// Puts bit `idx` of byte `column` on top of the code of each column.
fn add_bit(codes: &mut [u8; GROUP_LEN], packed: &[u8], idx: usize, position: usize) {
    for (code, byte) in codes.iter_mut().zip(packed) {
        *code |= (byte >> idx & 1) << position;
    }
}

/// 6-bit scale and minimum of group `idx` of Q4_K and Q5_K. The first four groups have theirs in the low bits of
/// bytes 0..4 and 4..8; the last four share bytes 8..12 as nibbles, their upper 2 bits on top of the first ones.
fn scale_and_min(packed: &[u8], idx: usize) -> [u8; 2] {
    if idx < 4 {
        return [packed[idx] & 63, packed[idx + 4] & 63];
    }
    let shared = packed[idx + 4];
    [(shared & 15) | (packed[idx - 4] >> 6 << 4), (shared >> 4) | (packed[idx] >> 6 << 4)]
}

/// Signed 6-bit scale of half group `half` of Q3_K: low nibbles in bytes 0..8, upper 2 bits in bytes 8..12.
fn signed_scale(packed: &[u8], half: usize) -> u8 {
    let low = (packed[half % 8] >> (half / 8 * 4)) & 15;
    let high = (packed[8 + half % 4] >> (half / 4 * 2)) & 3;
    ((low | high << 4) as i8 - 32) as u8
}

impl QuantFormat for Q2_K {
    const TYPE: WeightType = WeightType::Q2_K;
    const BITS: usize = 2;
    const OFFSET: i32 = 0;
    const SCALES: ScaleLayout = ScaleLayout::Super16Min;

    fn group(block: &[u8], idx: usize) -> Group {
        let sub = [block[2 * idx], block[2 * idx + 1]];
        let scales = RawScales { d: half_bits(block, 80), m: half_bits(block, 82), sub };
        Group { codes: two_bits(&block[16..80], idx), scales }
    }
}

impl QuantFormat for Q3_K {
    const TYPE: WeightType = WeightType::Q3_K;
    const BITS: usize = 3;
    const OFFSET: i32 = 4;
    const SCALES: ScaleLayout = ScaleLayout::Super16;

    fn group(block: &[u8], idx: usize) -> Group {
        let mut codes = two_bits(&block[32..96], idx);
        add_bit(&mut codes, &block[..32], idx, 2);
        let sub = [2 * idx, 2 * idx + 1].map(|half| signed_scale(&block[96..108], half));
        Group { codes, scales: RawScales { d: half_bits(block, 108), m: 0, sub } }
    }
}

impl QuantFormat for Q4_K {
    const TYPE: WeightType = WeightType::Q4_K;
    const BITS: usize = 4;
    const OFFSET: i32 = 0;
    const SCALES: ScaleLayout = ScaleLayout::Super32Min;

    fn group(block: &[u8], idx: usize) -> Group {
        let sub = scale_and_min(&block[4..16], idx);
        let scales = RawScales { d: half_bits(block, 0), m: half_bits(block, 2), sub };
        Group { codes: nibbles(&block[16..144], idx), scales }
    }
}

impl QuantFormat for Q5_K {
    const TYPE: WeightType = WeightType::Q5_K;
    const BITS: usize = 5;
    const OFFSET: i32 = 0;
    const SCALES: ScaleLayout = ScaleLayout::Super32Min;

    fn group(block: &[u8], idx: usize) -> Group {
        let mut codes = nibbles(&block[48..176], idx);
        add_bit(&mut codes, &block[16..48], idx, 4);
        let sub = scale_and_min(&block[4..16], idx);
        Group { codes, scales: RawScales { d: half_bits(block, 0), m: half_bits(block, 2), sub } }
    }
}

impl QuantFormat for Q6_K {
    const TYPE: WeightType = WeightType::Q6_K;
    const BITS: usize = 6;
    const OFFSET: i32 = 32;
    const SCALES: ScaleLayout = ScaleLayout::Super16;

    /// Four groups share 64 bytes of nibbles (low halves first) and 32 bytes of upper bits.
    fn group(block: &[u8], idx: usize) -> Group {
        let low = &block[idx / 4 * 64 + idx % 2 * 32..][..GROUP_LEN];
        let shift = idx / 2 % 2 * 4;
        let high = two_bits(&block[128..192], idx);
        let codes = std::array::from_fn(|column| ((low[column] >> shift) & 15) | high[column] << 4);
        let sub = [block[192 + 2 * idx], block[193 + 2 * idx]];
        Group { codes, scales: RawScales { d: half_bits(block, 208), m: 0, sub } }
    }
}
