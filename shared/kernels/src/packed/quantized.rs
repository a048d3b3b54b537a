//! Tiles of quantized weights: bit planes of codes, then scales. Every quantized type uses this one layout.
//!
//! The 32 columns of a group are 8 quads of 4 columns. The codes of a quad in all 16 rows are 64 bytes: row `r` has
//! bytes `4r..4r + 4`. A code of `BITS` bits is cut into planes that are the binary digits of `BITS`, lowest bits
//! of the code in the widest plane, and each plane packs the 8 quads into lines of 64 bytes:
//!
//! | plane | lines | where the bits of quad q are |
//! |---|---|---|
//! | 8 bits | 8 | line q |
//! | 4 bits | 4 | line q mod 4, shifted left by 4 * (q / 4) |
//! | 2 bits | 2 | line q mod 2, shifted left by 2 * (q / 2) |
//! | 1 bit | 1 | shifted left by q |
//!
//! So a group takes `BITS` lines, and nothing is lost or padded. A tile is: the planes of all groups; the scales of
//! all groups; those of all superblocks; the last two are filled up to whole lines. Scales of a group are 16 f16
//! (`d`) or twice 16 f16 (`d`, `m`), or twice 16 small integers; scales of a superblock are 16 or twice 16 f16.

use super::{Line, TILE_ROWS};
use crate::formats::{GROUP_LEN, GROUPS_PER_SUPER, QuantFormat, RawScales};
use std::ops::Range;

/// Quads of 4 columns in a group.
pub(crate) const QUADS: usize = GROUP_LEN / 4;

/// Where things are in a tile.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QuantizedLayout {
    /// Lines of the planes.
    plane_lines: usize,
    /// Lines of the scales of groups.
    group_lines: usize,
    /// Lines of the scales of superblocks.
    super_lines: usize,
    /// Place of the first group in its superblock.
    first_group: usize,
    /// Lines of a group's planes.
    bits: usize,
    /// Bytes of a group's scales.
    group_bytes: usize,
    /// Bytes of a superblock's scales.
    super_bytes: usize,
}

/// Consecutive groups of a tile.
#[derive(Clone, Copy)]
pub(crate) struct TilePart<'a> {
    /// Planes of the groups.
    pub planes: &'a [Line],
    /// Scales of the groups.
    pub group_scales: &'a [u8],
    /// Scales from the superblock of the first group on.
    pub super_scales: &'a [u8],
    /// Place of the first group in its superblock.
    pub first_group: usize,
}

/// Bytes of the scales of one group in a tile.
pub(crate) const fn group_scale_bytes<F: QuantFormat>() -> usize {
    2 * TILE_ROWS * if F::SCALES.has_super() { 1 } else { F::SCALES.n_halfs() }
}

/// Bytes of the scales of one superblock in a tile.
pub(crate) const fn super_scale_bytes<F: QuantFormat>() -> usize {
    if F::SCALES.has_super() { 2 * TILE_ROWS * F::SCALES.n_halfs() } else { 0 }
}

/// For each plane its bits, its first line in a group and the lowest code bit it holds.
pub(crate) const fn planes(bits: usize) -> [(usize, usize, usize); 4] {
    [(bits & 8, 0, 0), (bits & 4, 0, 0), (bits & 2, bits & 4, bits & 4), (bits & 1, bits & 6, bits & 6)]
}

impl QuantizedLayout {
    /// The layout of tiles that hold these columns of the file, edges on multiples of 32.
    pub(super) fn new<F: QuantFormat>(columns: &Range<usize>) -> Self {
        let n_groups = columns.len() / GROUP_LEN;
        let first_group = columns.start / GROUP_LEN % GROUPS_PER_SUPER;
        let n_supers = (first_group + n_groups).div_ceil(GROUPS_PER_SUPER);
        Self {
            plane_lines: n_groups * F::BITS,
            group_lines: (n_groups * group_scale_bytes::<F>()).div_ceil(size_of::<Line>()),
            super_lines: (n_supers * super_scale_bytes::<F>()).div_ceil(size_of::<Line>()),
            first_group,
            bits: F::BITS,
            group_bytes: group_scale_bytes::<F>(),
            super_bytes: super_scale_bytes::<F>(),
        }
    }

    /// Lines of a tile.
    pub(super) fn tile_lines(&self) -> usize {
        self.plane_lines + self.group_lines + self.super_lines
    }

    /// The given groups of a tile.
    pub(crate) fn part<'a>(&self, tile: &'a [Line], groups: &Range<usize>) -> TilePart<'a> {
        let (planes, scales) = tile.split_at(self.plane_lines);
        let (group_scales, super_scales) = scales.split_at(self.group_lines);
        let group_scales: &[u8] = bytemuck::cast_slice(group_scales);
        let super_scales: &[u8] = bytemuck::cast_slice(super_scales);
        let place = self.first_group + groups.start;
        TilePart {
            planes: &planes[groups.start * self.bits..groups.end * self.bits],
            group_scales: &group_scales[groups.start * self.group_bytes..groups.end * self.group_bytes],
            super_scales: &super_scales[place / GROUPS_PER_SUPER * self.super_bytes..],
            first_group: place % GROUPS_PER_SUPER,
        }
    }

    /// Writes the given columns of a file row as row `lane` of the tile.
    pub(super) fn pack_row<F: QuantFormat>(
        &self,
        bytes: &[u8],
        columns: &Range<usize>,
        lane: usize,
        tile: &mut [Line],
    ) {
        let (planes, scales) = tile.split_at_mut(self.plane_lines);
        let (group_scales, super_scales) = scales.split_at_mut(self.group_lines);
        let group_scales: &mut [u8] = bytemuck::cast_slice_mut(group_scales);
        let super_scales: &mut [u8] = bytemuck::cast_slice_mut(super_scales);
        let groups_per_block = F::TYPE.block_len() / GROUP_LEN;
        for idx in 0..columns.len() / GROUP_LEN {
            let file_group = columns.start / GROUP_LEN + idx;
            let block =
                &bytes[file_group / groups_per_block * F::TYPE.block_bytes()..][..F::TYPE.block_bytes()];
            let group = F::group(block, file_group % groups_per_block);
            put_codes(&group.codes, F::BITS, lane, &mut planes[idx * F::BITS..][..F::BITS]);
            let halfs = [group.scales.d, group.scales.m];
            let own = &mut group_scales[idx * group_scale_bytes::<F>()..][..group_scale_bytes::<F>()];
            if F::SCALES.has_super() {
                own[lane] = group.scales.sub[0];
                own[TILE_ROWS + lane] = group.scales.sub[1];
                let idx = (self.first_group + idx) / GROUPS_PER_SUPER;
                let shared = &mut super_scales[idx * super_scale_bytes::<F>()..][..super_scale_bytes::<F>()];
                put_halfs(halfs, lane, shared);
            } else {
                put_halfs(halfs, lane, own);
            }
        }
    }
}

/// Writes as many of the halfs as there is room for.
fn put_halfs(halfs: [u16; 2], lane: usize, scales: &mut [u8]) {
    for (half, row) in halfs.into_iter().zip(scales.chunks_exact_mut(2 * TILE_ROWS)) {
        row[2 * lane..2 * lane + 2].copy_from_slice(&half.to_le_bytes());
    }
}

fn halfs_of_row(scales: &[u8], lane: usize) -> [u16; 2] {
    let mut halfs = [0; 2];
    for (half, row) in halfs.iter_mut().zip(scales.chunks_exact(2 * TILE_ROWS)) {
        *half = u16::from_le_bytes([row[2 * lane], row[2 * lane + 1]]);
    }
    halfs
}

/// Adds the codes of one row to the planes of a group, which start as zeros.
#[inline]
fn put_codes(codes: &[u8; GROUP_LEN], bits: usize, lane: usize, lines: &mut [Line]) {
    for (width, first_line, lowest) in planes(bits).into_iter().filter(|(width, ..)| *width > 0) {
        let mask = (0xff >> (8 - width)) as u8;
        for (quad, codes) in codes.as_chunks::<4>().0.iter().enumerate() {
            let (line, shift) = (first_line + quad % width, quad / width * width);
            for (byte, code) in lines[line].0[4 * lane..4 * lane + 4].iter_mut().zip(codes) {
                *byte |= (code >> lowest & mask) << shift;
            }
        }
    }
}

/// The codes of one row of a group: what [`put_codes`] wrote. Four codes are read at once, as bytes of a u32.
#[inline]
pub(crate) fn codes_of_row(lines: &[Line], bits: usize, lane: usize) -> [u8; GROUP_LEN] {
    let mut quads = [0; QUADS];
    for (width, first_line, lowest) in planes(bits).into_iter().filter(|(width, ..)| *width > 0) {
        let mask = (0xff >> (8 - width)) * 0x0101_0101;
        for (quad, codes) in quads.iter_mut().enumerate() {
            let (line, shift) = (first_line + quad % width, quad / width * width);
            let bytes = lines[line].0[4 * lane..].first_chunk().expect("invariant: a line has 4 bytes a row");
            *codes |= (u32::from_le_bytes(*bytes) >> shift & mask) << lowest;
        }
    }
    bytemuck::cast(quads.map(u32::to_le_bytes))
}

/// The scales of one row of a group, from those of all rows of the group and of its superblock.
pub(crate) fn scales_of_row<F: QuantFormat>(own: &[u8], shared: &[u8], lane: usize) -> RawScales {
    if F::SCALES.has_super() {
        let [d, m] = halfs_of_row(shared, lane);
        RawScales { d, m, sub: [own[lane], own[TILE_ROWS + lane]] }
    } else {
        let [d, m] = halfs_of_row(own, lane);
        RawScales { d, m, sub: [0; 2] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::with_format;
    use paceline_domain::WeightType;
    use proptest::prelude::*;

    /// What is packed comes out again, for any columns on group edges.
    fn round_trip<F: QuantFormat>(bytes: &[u8], columns: &Range<usize>) {
        let layout = QuantizedLayout::new::<F>(columns);
        let mut tile = vec![Line([0; 64]); layout.tile_lines()];
        let row = |lane: usize| &bytes[lane * bytes.len() / 20..][..bytes.len() / 5];
        for lane in 0..TILE_ROWS {
            layout.pack_row::<F>(row(lane), columns, lane, &mut tile);
        }
        let part = layout.part(&tile, &(0..columns.len() / GROUP_LEN));
        let groups_per_block = F::TYPE.block_len() / GROUP_LEN;
        for (idx, lines) in part.planes.chunks_exact(F::BITS).enumerate() {
            let file_group = columns.start / GROUP_LEN + idx;
            let own = &part.group_scales[idx * group_scale_bytes::<F>()..];
            let super_idx = (part.first_group + idx) / GROUPS_PER_SUPER;
            let shared =
                &part.super_scales[super_idx * super_scale_bytes::<F>()..][..super_scale_bytes::<F>()];
            let own = &own[..group_scale_bytes::<F>()];
            for lane in 0..TILE_ROWS {
                let block = &row(lane)[file_group / groups_per_block * F::TYPE.block_bytes()..];
                let group = F::group(block, file_group % groups_per_block);
                assert_eq!(codes_of_row(lines, F::BITS, lane), group.codes);
                assert_eq!(scales_of_row::<F>(own, shared, lane), group.scales);
            }
        }
    }

    proptest! {
        #[test]
        fn packed_rows_come_out_again(
            seed in prop::collection::vec(any::<u8>(), 5 * 3 * 272),
            cut in (0usize..=24, 0usize..=24),
        ) {
            let columns = cut.0.min(cut.1) * GROUP_LEN..cut.0.max(cut.1) * GROUP_LEN;
            for weight_type in WeightType::ALL {
                let row_bytes = weight_type.row_bytes(768).unwrap();
                with_format!(weight_type, Format => {
                    quantized: round_trip::<Format>(&seed[..5 * row_bytes], &columns),
                    float: (),
                });
            }
        }
    }
}
