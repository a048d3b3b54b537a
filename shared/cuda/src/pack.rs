//! Weights in the order the matrix kernels read them: the twin of kernels/matrix.cuh. Bits of codes and scales are moved,
//! never changed; plain numbers become bfloat16. Nothing is multiplied here.

use half::bf16;
use paceline_domain::WeightType;
use paceline_kernels::formats::{
    CodeLayout, GROUP_LEN, GROUPS_PER_SUPER, Group, ScaleLayout, code_layout, group_of_row,
};
use paceline_kernels::{ThreadPool, dequantize_row};
use std::borrow::Cow;
use std::ops::Range;

mod superblock;

pub use superblock::Record;

/// Output rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Columns of a unit.
pub const UNIT_COLUMNS: usize = 64;
/// Bytes of 8 rows by 8 columns of plain numbers.
pub const CORE_BYTES: usize = 128;
const GROUPS_PER_UNIT: usize = UNIT_COLUMNS / GROUP_LEN;

/// A packed matrix's type, as the kernels' names and numbers have it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(non_camel_case_types, missing_docs)]
pub enum Kind {
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl Kind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// How weights of this type are held: plain numbers all become bfloat16.
    pub fn of(weight_type: WeightType) -> Self {
        Self::ALL.into_iter().find(|kind| kind.weight_type() == weight_type).unwrap_or(Self::BF16)
    }

    /// The type in a file that is held without any change.
    pub const fn weight_type(self) -> WeightType {
        match self {
            Self::BF16 => WeightType::BF16,
            Self::Q4_0 => WeightType::Q4_0,
            Self::Q4_1 => WeightType::Q4_1,
            Self::Q5_0 => WeightType::Q5_0,
            Self::Q5_1 => WeightType::Q5_1,
            Self::Q8_0 => WeightType::Q8_0,
            Self::Q2_K => WeightType::Q2_K,
            Self::Q3_K => WeightType::Q3_K,
            Self::Q4_K => WeightType::Q4_K,
            Self::Q5_K => WeightType::Q5_K,
            Self::Q6_K => WeightType::Q6_K,
        }
    }

    /// The number in kernel arguments.
    pub const fn number(self) -> i32 {
        self as i32
    }

    /// Bytes of one unit of one tile, plane by plane, of types without superblocks.
    ///
    /// # Panics
    /// For K-quants, which have a [`Self::record`].
    pub fn planes(self) -> Planes {
        assert!(self.record().is_none(), "invariant: {self:?} is held in records");
        let weights = TILE_ROWS * UNIT_COLUMNS;
        let Some(CodeLayout { bits, scales, .. }) = code_layout(self.weight_type()) else {
            return Planes { codes: 2 * weights, high: 0, scales: 0 };
        };
        let low = if bits == 5 { 4 } else { bits };
        Planes {
            codes: weights * low / 8,
            high: weights * (bits - low) / 8,
            scales: if scales == ScaleLayout::GroupMin { 8 * TILE_ROWS } else { 4 * TILE_ROWS },
        }
    }

    /// How K-quants are held.
    pub fn record(self) -> Option<Record> {
        code_layout(self.weight_type()).and_then(|layout| Record::new(&layout))
    }
}

/// Bytes of one unit of one tile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Planes {
    /// Codes, or their lower bits.
    pub codes: usize,
    /// Upper bits of codes.
    pub high: usize,
    /// Scales.
    pub scales: usize,
}

impl Planes {
    /// Bytes of a unit.
    pub fn unit_bytes(self) -> usize {
        self.codes + self.high + self.scales
    }
}

/// Rows of one tensor, as bytes of the file or made of them.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Storage type.
    pub weight_type: WeightType,
    /// Rows.
    pub n_rows: usize,
    /// Bytes of a whole row.
    pub row: &'a (dyn Fn(usize) -> Cow<'a, [u8]> + Sync),
}

/// How the rows of one or several tensors are put into tiles.
#[derive(Clone, Copy)]
pub enum Arrangement<'a> {
    /// One tensor after the other.
    Stacked(&'a [Rows<'a>]),
    /// Each tile has 8 rows of the first tensor and the same 8 of the second.
    Gated([Rows<'a>; 2]),
}

impl<'a> Arrangement<'a> {
    fn n_tiles(&self) -> usize {
        match self {
            Self::Stacked(parts) => parts.iter().map(|rows| rows.n_rows).sum::<usize>().div_ceil(TILE_ROWS),
            Self::Gated([gate, _]) => gate.n_rows.div_ceil(TILE_ROWS / 2),
        }
    }

    fn weight_type(&self) -> WeightType {
        match self {
            Self::Stacked(parts) => parts[0].weight_type,
            Self::Gated([gate, _]) => gate.weight_type,
        }
    }

    /// Whether all parts are held in the same way, so that they can be one matrix.
    pub fn is_uniform(&self) -> bool {
        let kind = Kind::of(self.weight_type());
        match self {
            Self::Stacked(parts) => parts.iter().all(|rows| Kind::of(rows.weight_type) == kind),
            Self::Gated([_, up]) => Kind::of(up.weight_type) == kind,
        }
    }

    /// The file's row that belongs into row `row` of tile `tile`, with its type.
    fn row(&self, tile: usize, row: usize) -> Option<(WeightType, Cow<'a, [u8]>)> {
        let (rows, at) = match self {
            Self::Gated(pair) => (&pair[row / 8], tile * 8 + row % 8),
            Self::Stacked(parts) => {
                let mut at = tile * TILE_ROWS + row;
                let rows = parts.iter().find(|rows| {
                    let is_here = at < rows.n_rows;
                    at -= if is_here { 0 } else { rows.n_rows };
                    is_here
                })?;
                (rows, at)
            }
        };
        (at < rows.n_rows).then(|| (rows.weight_type, (rows.row)(at)))
    }
}

/// A matrix in kernel order, still in host memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Packed {
    /// How it is held.
    pub kind: Kind,
    /// Tiles of 16 rows.
    pub n_tiles: usize,
    /// Units of 64 columns.
    pub n_units: usize,
    /// Superblocks of a row.
    pub n_supers: usize,
    /// Place of the first group in its superblock.
    pub first_group: usize,
    /// Bytes of a tile.
    pub tile_bytes: usize,
    /// `[n_tiles][tile_bytes]`; empty in an [`outline`].
    pub bytes: Vec<u8>,
}

impl Packed {
    /// Bytes of all tiles.
    pub fn n_bytes(&self) -> usize {
        self.n_tiles * self.tile_bytes
    }
}

/// Packs the columns `columns` of the arranged rows.
///
/// # Panics
/// When the parts are held differently, or columns of a quantized type are cut inside a group of 32.
pub fn pack(arrangement: &Arrangement<'_>, columns: Range<usize>, pool: &ThreadPool) -> Packed {
    let outline = outline(arrangement, columns.clone());
    let Packed { kind, n_units, first_group, tile_bytes, .. } = outline;
    let mut bytes = vec![0; outline.n_bytes()];
    let packer = match kind.record() {
        Some(record) => Packer::Records(RecordPacker { record, first_group, columns }),
        None => Packer::Units(UnitPacker { planes: kind.planes(), n_units, columns }),
    };
    pool.run_pieces(&mut bytes, tile_bytes, &|tile, bytes| {
        for row in 0..TILE_ROWS {
            if let Some((weight_type, file_row)) = arrangement.row(tile, row) {
                packer.row(weight_type, &file_row, row, bytes);
            }
        }
    });
    Packed { bytes, ..outline }
}

/// What [`pack`] would make, without the bytes.
///
/// # Panics
/// As [`pack`].
pub fn outline(arrangement: &Arrangement<'_>, columns: Range<usize>) -> Packed {
    assert!(arrangement.is_uniform(), "invariant: parts of one matrix are held alike");
    let kind = Kind::of(arrangement.weight_type());
    let is_cut_inside = [columns.start, columns.end].iter().any(|edge| !edge.is_multiple_of(GROUP_LEN));
    assert!(kind == Kind::BF16 || !is_cut_inside, "invariant: groups of 32 columns are whole");
    let n_units = columns.len().div_ceil(UNIT_COLUMNS);
    let (n_supers, first_group, tile_bytes) = match kind.record() {
        Some(record) => {
            let first_group = columns.start / GROUP_LEN % GROUPS_PER_SUPER;
            let n_supers = (first_group + columns.len() / GROUP_LEN).div_ceil(GROUPS_PER_SUPER);
            (n_supers, first_group, n_supers * record.n_bytes())
        }
        None => (0, 0, n_units * kind.planes().unit_bytes()),
    };
    let n_tiles = arrangement.n_tiles();
    Packed { kind, n_tiles, n_units, n_supers, first_group, tile_bytes, bytes: Vec::new() }
}

enum Packer {
    Units(UnitPacker),
    Records(RecordPacker),
}

struct UnitPacker {
    planes: Planes,
    n_units: usize,
    columns: Range<usize>,
}

struct RecordPacker {
    record: Record,
    first_group: usize,
    columns: Range<usize>,
}

/// Where a column of a row has its code: lane and pair of operand A, lower or upper half of the pair.
struct Place {
    lane: usize,
    pair: usize,
    upper: usize,
}

impl Place {
    fn new(row: usize, column: usize) -> Self {
        let in_step = column % 16;
        let lane = row % 8 * 4 + in_step % 8 / 2;
        Self { lane, pair: in_step / 8 * 2 + row / 8, upper: in_step % 2 }
    }
}

impl Packer {
    fn row(&self, weight_type: WeightType, file_row: &[u8], row: usize, tile: &mut [u8]) {
        match self {
            Self::Records(packer) => packer.row(weight_type, file_row, row, tile),
            Self::Units(packer) if weight_type.is_quantized() => {
                packer.quantized_row(weight_type, file_row, row, tile);
            }
            Self::Units(packer) => packer.float_row(weight_type, file_row, row, tile),
        }
    }
}

impl RecordPacker {
    fn row(&self, weight_type: WeightType, file_row: &[u8], row: usize, tile: &mut [u8]) {
        let n_bytes = self.record.n_bytes();
        for idx in 0..self.columns.len() / GROUP_LEN {
            let group = group_of_row(weight_type, file_row, self.columns.start / GROUP_LEN + idx);
            let at = self.first_group + idx;
            let bytes = &mut tile[at / GROUPS_PER_SUPER * n_bytes..][..n_bytes];
            self.record.put(bytes, row, at % GROUPS_PER_SUPER, &group);
        }
    }
}

impl UnitPacker {
    fn float_row(&self, weight_type: WeightType, file_row: &[u8], row: usize, tile: &mut [u8]) {
        let size = weight_type.block_bytes();
        let file = &file_row[self.columns.start * size..self.columns.end * size];
        for (column, bytes) in file.chunks_exact(size).enumerate() {
            let bits = if weight_type == WeightType::BF16 {
                [bytes[0], bytes[1]]
            } else {
                let mut value = [0.0];
                dequantize_row(weight_type, bytes, &mut value);
                bf16::from_f32(value[0]).to_le_bytes()
            };
            let (unit, in_unit) = (column / UNIT_COLUMNS, column % UNIT_COLUMNS);
            let core = unit * 16 + row / 8 * 8 + in_unit / 8;
            let at = core * CORE_BYTES + row % 8 * 16 + in_unit % 8 * 2;
            tile[at..at + 2].copy_from_slice(&bits);
        }
    }

    fn quantized_row(&self, weight_type: WeightType, file_row: &[u8], row: usize, tile: &mut [u8]) {
        let layout = code_layout(weight_type).expect("invariant: the type is quantized");
        let Planes { codes, high, scales, .. } = self.planes;
        let (codes_plane, rest) = tile.split_at_mut(self.n_units * codes);
        let (high_plane, rest) = rest.split_at_mut(self.n_units * high);
        let scales_plane = &mut rest[..self.n_units * scales];
        for idx in 0..self.columns.len() / GROUP_LEN {
            let group = group_of_row(weight_type, file_row, self.columns.start / GROUP_LEN + idx);
            let (unit, in_unit) = (idx / GROUPS_PER_UNIT, idx % GROUPS_PER_UNIT);
            let unit_codes = &mut codes_plane[unit * codes..][..codes];
            let unit_high = &mut high_plane[unit * high..][..high];
            put_codes(layout.bits, &group, (row, in_unit), unit_codes, unit_high);
            let row_scales =
                &mut scales_plane[unit * scales + row * (scales / TILE_ROWS)..][..scales / TILE_ROWS];
            put_scales(layout.scales, &group, in_unit, row_scales);
        }
    }
}

/// Puts the codes of one group of one row into the planes of its unit.
fn put_codes(bits: usize, group: &Group, (row, in_unit): (usize, usize), codes: &mut [u8], high: &mut [u8]) {
    for (column, code) in group.codes.iter().enumerate() {
        let Place { lane, pair, upper } = Place::new(row, column);
        let step = in_unit * 2 + column / 16;
        match bits {
            8 => codes[step * 256 + lane * 8 + pair / 2 * 4 + pair % 2 + 2 * upper] = *code,
            _ => set_bits(codes, step * 128 + lane * 4, 4 * pair + 16 * upper, code & 15),
        }
        if bits == 5 {
            set_bits(high, lane * 4, step * 4 + pair + 16 * upper, code >> 4);
        }
    }
}

/// Sets bits of the little-endian word at `word`; they were zero and lie within one byte.
fn set_bits(plane: &mut [u8], word: usize, bit: usize, bits: u8) {
    plane[word + bit / 8] |= bits << (bit % 8);
}

/// Puts the scales of one group of one row into its unit's.
fn put_scales(layout: ScaleLayout, group: &Group, in_unit: usize, scales: &mut [u8]) {
    let raw = group.scales;
    match layout {
        ScaleLayout::Group => scales[2 * in_unit..][..2].copy_from_slice(&raw.d.to_le_bytes()),
        ScaleLayout::GroupMin => {
            scales[4 * in_unit..][..2].copy_from_slice(&raw.d.to_le_bytes());
            scales[4 * in_unit + 2..][..2].copy_from_slice(&raw.m.to_le_bytes());
        }
        _ => unreachable!("invariant: K-quants are held in records"),
    }
}
