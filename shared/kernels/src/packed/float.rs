//! Tiles of plain numbers: for each column the 16 rows' elements beside each other, as the file has them.

use super::{Line, TILE_ROWS};
use crate::formats::FloatFormat;
use std::ops::Range;

/// Lines of a tile of `n_cols` columns.
pub(super) fn tile_lines<F: FloatFormat>(n_cols: usize) -> usize {
    (n_cols * TILE_ROWS * F::BYTES).div_ceil(size_of::<Line>())
}

/// Writes the given columns of a file row as row `lane` of the tile.
pub(super) fn pack_row<F: FloatFormat>(bytes: &[u8], columns: &Range<usize>, lane: usize, tile: &mut [Line]) {
    let bytes = &bytes[columns.start * F::BYTES..columns.end * F::BYTES];
    let tile: &mut [u8] = bytemuck::cast_slice_mut(tile);
    for (element, column) in bytes.chunks_exact(F::BYTES).zip(tile.chunks_exact_mut(TILE_ROWS * F::BYTES)) {
        column[lane * F::BYTES..][..F::BYTES].copy_from_slice(element);
    }
}
