//! Weight matrices repacked once at load into tiles of 16 interleaved rows. Nothing is multiplied here.
//!
//! A tile keeps its 16 rows side by side so that a SIMD lane owns one output row and walks along K in order. The
//! last tile is filled up with rows of zeros.

mod float;
mod leaves;
mod quantized;
mod spec;

pub(crate) use leaves::{Leaf, MAX_DEPTH};
pub(crate) use quantized::{
    PackedGroup, QUADS, QuantizedLayout, TilePart, codes_of_row, planes, scales_of_row,
};
pub use spec::PackSpec;

use crate::aligned::AlignedVec;
use crate::error::KernelError;
use crate::formats::with_format;
use crate::pool::ThreadPool;
use paceline_domain::WeightType;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Output rows of a tile.
pub const TILE_ROWS: usize = 16;

/// 64 bytes on a cache-line boundary: the unit tiles are made of.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
pub(crate) struct Line(pub(crate) [u8; 64]);

/// Which kind of activations a matrix is multiplied with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InputKind {
    /// Quantized rows.
    Quantized,
    /// f32 rows.
    Float,
}

/// A matrix, or the part of one that a rank owns, ready to be multiplied.
pub struct PackedMatrix {
    weight_type: WeightType,
    n_rows: usize,
    n_cols: usize,
    leaves: Vec<Leaf>,
    n_subtrees: usize,
    layout: QuantizedLayout,
    tile_lines: usize,
    lines: AlignedVec<Line>,
}

/// Bytes of a row: those of the file, or others made of them. It is called once for each row, on any thread.
pub type RowBytes<'a, 'w> = &'a (dyn Fn(usize) -> Cow<'w, [u8]> + Sync);

impl PackedMatrix {
    /// Packs the rows `row(0) .. row(n_rows - 1)`, each the bytes of a whole row of the tensor in the specified type.
    ///
    /// # Errors
    /// When the specification cannot be met or a row has the wrong length.
    pub fn pack(spec: &PackSpec, row: RowBytes<'_, '_>, pool: &ThreadPool) -> Result<Self, KernelError> {
        let row_bytes = spec.check()?;
        let n_cols = spec.k_range.len();
        let (layout, tile_lines) = with_format!(spec.weight_type, Format => {
            quantized: {
                let layout = QuantizedLayout::new::<Format>(&spec.k_range);
                (layout, layout.tile_lines())
            },
            float: (QuantizedLayout::default(), float::tile_lines::<Format>(n_cols)),
        });
        let n_lines = spec
            .n_rows
            .div_ceil(TILE_ROWS)
            .checked_mul(tile_lines)
            .filter(|n_lines| *n_lines < isize::MAX as usize / size_of::<Line>())
            .ok_or(KernelError::TooLarge { n_rows: spec.n_rows, n_cols })?;
        let mut lines = AlignedVec::zeroed(n_lines);
        let packer = Packer { spec, row, row_bytes, layout, bad_row: AtomicUsize::new(usize::MAX) };
        if tile_lines > 0 {
            pool.run_pieces(&mut lines, tile_lines, &|tile, lines| packer.pack_tile(tile, lines));
        }
        packer.finish()?;
        let (leaves, n_subtrees) = leaves::leaves(spec);
        let (weight_type, n_rows) = (spec.weight_type, spec.n_rows);
        Ok(Self { weight_type, n_rows, n_cols, leaves, n_subtrees, layout, tile_lines, lines })
    }

    /// Storage type of the weights.
    pub fn weight_type(&self) -> WeightType {
        self.weight_type
    }

    /// Output rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns: the length of an input row.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Partial sums of each output: the maximal subtrees of the canonical tree inside the owned leaves.
    pub fn n_subtrees(&self) -> usize {
        self.n_subtrees
    }

    /// Memory of the packed weights.
    pub fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    /// Which input [`crate::linear::matmul`] wants.
    pub fn input_kind(&self) -> InputKind {
        if self.weight_type.is_quantized() { InputKind::Quantized } else { InputKind::Float }
    }

    pub(crate) fn n_tiles(&self) -> usize {
        self.n_rows.div_ceil(TILE_ROWS)
    }

    pub(crate) fn tile_bytes(&self) -> usize {
        self.tile_lines * size_of::<Line>()
    }

    pub(crate) fn tile(&self, tile: usize) -> &[Line] {
        &self.lines[tile * self.tile_lines..][..self.tile_lines]
    }

    pub(crate) fn leaves(&self) -> &[Leaf] {
        &self.leaves
    }

    pub(crate) fn layout(&self) -> &QuantizedLayout {
        &self.layout
    }
}

/// What the packing threads share.
struct Packer<'a, 'w> {
    spec: &'a PackSpec,
    row: RowBytes<'a, 'w>,
    row_bytes: usize,
    layout: QuantizedLayout,
    bad_row: AtomicUsize,
}

impl Packer<'_, '_> {
    fn pack_tile(&self, tile: usize, lines: &mut [Line]) {
        let first = tile * TILE_ROWS;
        for row in first..self.spec.n_rows.min(first + TILE_ROWS) {
            let bytes = (self.row)(row);
            if bytes.len() != self.row_bytes {
                self.bad_row.fetch_min(row, Ordering::Relaxed);
                return;
            }
            let columns: &Range<usize> = &self.spec.k_range;
            with_format!(self.spec.weight_type, Format => {
                quantized: self.layout.pack_row::<Format>(&bytes, columns, row - first, lines),
                float: float::pack_row::<Format>(&bytes, columns, row - first, lines),
            });
        }
    }

    fn finish(self) -> Result<(), KernelError> {
        match self.bad_row.into_inner() {
            usize::MAX => Ok(()),
            row => {
                Err(KernelError::RowLength { row, found: (self.row)(row).len(), expected: self.row_bytes })
            }
        }
    }
}
