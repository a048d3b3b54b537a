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
//! So a group takes `BITS` lines, and nothing is lost or padded. Scales of a group are 16 f16 (`d`) or twice 16 f16 (`d`,
//! `m`), or twice 16 small integers; scales of a superblock are 16 or twice 16 f16.
//!
//! A tile is one stretch of memory that is read once, in order, so that the CPU's own prefetchers see a single stream:
//! scales kept in a region of their own cost a core a quarter of its bandwidth. It is cut into spans (one or two
//! superblocks of the file, 8 or 16 groups; the tile's first and last may have fewer), a span into units of as many groups as
//! have their scales in one line:
//!
//! ```text
//! span = [scales of its superblocks: 1 line, where the type has such] [unit] [unit] ...
//! unit = [scales of its groups: 1 line] [planes of its first group] [planes of its second group, if it has two]
//! ```

use super::{Line, TILE_ROWS};
use crate::formats::{GROUP_LEN, GROUPS_PER_SUPER, QuantFormat, RawScales};
use std::ops::Range;

/// Quads of 4 columns in a group.
pub(crate) const QUADS: usize = GROUP_LEN / 4;

/// Where things are in a tile.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QuantizedLayout {
    /// Groups of the tile.
    n_groups: usize,
    /// Place of the first one in its span.
    first_place: usize,
    /// Lines of the tile.
    n_lines: usize,
}

/// Consecutive groups of a tile.
#[derive(Clone, Copy)]
pub(crate) struct TilePart<'a> {
    lines: &'a [Line],
    layout: QuantizedLayout,
    first_group: usize,
}

/// What a tile has of one group.
#[derive(Clone, Copy)]
pub(crate) struct PackedGroup<'a> {
    /// Its planes.
    pub planes: &'a [Line],
    /// Its scales.
    pub own: &'a [u8],
    /// Scales of its superblock.
    pub shared: &'a [u8],
}

/// Where a group is: lines from the start of the tile.
#[derive(Clone, Copy)]
struct Place {
    /// The line with the scales of its superblock.
    span: usize,
    /// Which of the superblocks of the span.
    super_idx: usize,
    /// The line with its scales.
    unit: usize,
    /// Which of the groups of the unit.
    idx: usize,
}

/// Bytes of the scales of one group in a tile.
pub(crate) const fn group_scale_bytes<F: QuantFormat>() -> usize {
    2 * TILE_ROWS * if F::SCALES.has_super() { 1 } else { F::SCALES.n_halfs() }
}

/// Bytes of the scales of one superblock in a tile.
pub(crate) const fn super_scale_bytes<F: QuantFormat>() -> usize {
    if F::SCALES.has_super() { 2 * TILE_ROWS * F::SCALES.n_halfs() } else { 0 }
}

/// Groups whose scales share a line.
const fn groups_per_unit<F: QuantFormat>() -> usize {
    size_of::<Line>() / group_scale_bytes::<F>()
}

/// Groups of a whole span: those of as many superblocks as have their scales in one line.
const fn groups_per_span<F: QuantFormat>() -> usize {
    match super_scale_bytes::<F>() {
        0 => 2 * GROUPS_PER_SUPER,
        bytes => size_of::<Line>() / bytes * GROUPS_PER_SUPER,
    }
}

/// Lines before the first unit of a span.
const fn span_head<F: QuantFormat>() -> usize {
    if F::SCALES.has_super() { 1 } else { 0 }
}

/// Lines of the first `n_groups` groups of a span.
const fn span_lines<F: QuantFormat>(n_groups: usize) -> usize {
    if n_groups == 0 {
        return 0;
    }
    span_head::<F>() + n_groups.div_ceil(groups_per_unit::<F>()) + n_groups * F::BITS
}

/// For each plane its bits, its first line in a group and the lowest code bit it holds.
pub(crate) const fn planes(bits: usize) -> [(usize, usize, usize); 4] {
    [(bits & 8, 0, 0), (bits & 4, 0, 0), (bits & 2, bits & 4, bits & 4), (bits & 1, bits & 6, bits & 6)]
}

impl QuantizedLayout {
    /// The layout of tiles that hold these columns of the file, edges on multiples of 32.
    pub(super) fn new<F: QuantFormat>(columns: &Range<usize>) -> Self {
        let n_groups = columns.len() / GROUP_LEN;
        let first_place = columns.start / GROUP_LEN % groups_per_span::<F>();
        let in_first = n_groups.min(groups_per_span::<F>() - first_place);
        let later = n_groups - in_first;
        let (whole, rest) = (later / groups_per_span::<F>(), later % groups_per_span::<F>());
        let n_lines = span_lines::<F>(in_first)
            + whole * span_lines::<F>(groups_per_span::<F>())
            + span_lines::<F>(rest);
        Self { n_groups, first_place, n_lines }
    }

    /// Lines of a tile.
    pub(super) fn tile_lines(&self) -> usize {
        self.n_lines
    }

    /// The groups of a tile from one on.
    pub(crate) fn part<'a>(&self, tile: &'a [Line], first_group: usize) -> TilePart<'a> {
        TilePart { lines: tile, layout: *self, first_group }
    }

    #[inline(always)]
    fn place<F: QuantFormat>(&self, group: usize) -> Place {
        let per_span = groups_per_span::<F>();
        let place = self.first_place + group;
        let (span, in_span) = match place / per_span {
            0 => (0, group),
            spans => {
                let before = span_lines::<F>(per_span - self.first_place);
                (before + (spans - 1) * span_lines::<F>(per_span), place % per_span)
            }
        };
        let per_unit = groups_per_unit::<F>();
        let unit = span + span_head::<F>() + in_span / per_unit * (1 + per_unit * F::BITS);
        Place { span, super_idx: place % per_span / GROUPS_PER_SUPER, unit, idx: in_span % per_unit }
    }

    /// Writes the given columns of a file row as row `lane` of the tile.
    pub(super) fn pack_row<F: QuantFormat>(
        &self,
        bytes: &[u8],
        columns: &Range<usize>,
        lane: usize,
        tile: &mut [Line],
    ) {
        let groups_per_block = F::TYPE.block_len() / GROUP_LEN;
        for idx in 0..self.n_groups {
            let file_group = columns.start / GROUP_LEN + idx;
            let block =
                &bytes[file_group / groups_per_block * F::TYPE.block_bytes()..][..F::TYPE.block_bytes()];
            let group = F::group(block, file_group % groups_per_block);
            let place = self.place::<F>(idx);
            put_codes(&group.codes, F::BITS, lane, &mut tile[place.planes::<F>()]);
            let halfs = [group.scales.d, group.scales.m];
            let own = &mut tile[place.unit].0[place.own::<F>()];
            if F::SCALES.has_super() {
                own[lane] = group.scales.sub[0];
                own[TILE_ROWS + lane] = group.scales.sub[1];
                put_halfs(halfs, lane, &mut tile[place.span].0[place.shared::<F>()]);
            } else {
                put_halfs(halfs, lane, own);
            }
        }
    }
}

impl Place {
    #[inline(always)]
    fn planes<F: QuantFormat>(&self) -> Range<usize> {
        let first = self.unit + 1 + self.idx * F::BITS;
        first..first + F::BITS
    }

    #[inline(always)]
    fn own<F: QuantFormat>(&self) -> Range<usize> {
        self.idx * group_scale_bytes::<F>()..(self.idx + 1) * group_scale_bytes::<F>()
    }

    #[inline(always)]
    fn shared<F: QuantFormat>(&self) -> Range<usize> {
        self.super_idx * super_scale_bytes::<F>()..(self.super_idx + 1) * super_scale_bytes::<F>()
    }
}

impl<'a> TilePart<'a> {
    /// A group, counted from the first of the part.
    #[inline(always)]
    pub(crate) fn group<F: QuantFormat>(&self, group: usize) -> PackedGroup<'a> {
        let place = self.layout.place::<F>(self.first_group + group);
        PackedGroup {
            planes: &self.lines[place.planes::<F>()],
            own: &self.lines[place.unit].0[place.own::<F>()],
            shared: &self.lines[place.span].0[place.shared::<F>()],
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

/// Adds the codes of one row to the planes of a group, which start as zeros; four at once, as bytes of a u32.
#[inline(always)]
fn put_codes(codes: &[u8; GROUP_LEN], bits: usize, lane: usize, lines: &mut [Line]) {
    let quads: [[u8; 4]; QUADS] = bytemuck::cast(*codes);
    for (width, first_line, lowest) in planes(bits).into_iter().filter(|(width, ..)| *width > 0) {
        let mask = (0xff >> (8 - width)) * 0x0101_0101;
        for (quad, codes) in quads.iter().enumerate() {
            let (line, shift) = (first_line + quad % width, quad / width * width);
            let bytes =
                lines[line].0[4 * lane..].first_chunk_mut().expect("invariant: a line has 4 bytes a row");
            let added = (u32::from_le_bytes(*codes) >> lowest & mask) << shift;
            *bytes = (u32::from_le_bytes(*bytes) | added).to_le_bytes();
        }
    }
}

/// The codes of one row of a group: what [`put_codes`] wrote.
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
        let part = layout.part(&tile, 0);
        let groups_per_block = F::TYPE.block_len() / GROUP_LEN;
        for idx in 0..columns.len() / GROUP_LEN {
            let file_group = columns.start / GROUP_LEN + idx;
            let packed = part.group::<F>(idx);
            for lane in 0..TILE_ROWS {
                let block = &row(lane)[file_group / groups_per_block * F::TYPE.block_bytes()..];
                let group = F::group(block, file_group % groups_per_block);
                assert_eq!(codes_of_row(packed.planes, F::BITS, lane), group.codes);
                assert_eq!(scales_of_row::<F>(packed.own, packed.shared, lane), group.scales);
            }
        }
    }

    /// Whole rows take at most 5 % more than in the file.
    fn check_size<F: QuantFormat>(n_cols: usize) {
        let layout = QuantizedLayout::new::<F>(&(0..n_cols));
        let in_file = TILE_ROWS * F::TYPE.row_bytes(n_cols).expect("whole blocks");
        let packed = layout.tile_lines() * size_of::<Line>();
        assert!(100 * packed <= 105 * in_file, "{}: {packed} bytes for {in_file}", F::TYPE.name());
    }

    #[test]
    fn packed_rows_are_hardly_larger_than_in_the_file() {
        for weight_type in WeightType::ALL {
            for n_cols in [768, 1536, 8960] {
                with_format!(weight_type, Format => { quantized: check_size::<Format>(n_cols), float: (), });
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
