//! A batch on its way to the device: one block of bytes at fixed offsets, so that it is one copy. It decides which rows go
//! to which attention kernel; that changes speed, never bits.

use std::mem::offset_of;

use paceline_domain::BlockId;
use paceline_model::{Batch, Capacity};

use crate::DevicePtr;
use crate::kernels::attention::TILE_ROWS;
use crate::kernels::batch::BatchHeader;
use crate::kernels::tiles::{AttentionTile, Tiles, cut, is_scattered, runs, tiles, tokens_of_tile};

/// Where the parts of a batch are in its block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchLayout {
    tokens: usize,
    positions: usize,
    table_of_row: usize,
    output_rows: usize,
    split_tiles: usize,
    row_tiles: usize,
    tables: usize,
    n_bytes: usize,
}

/// Device addresses of the parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchAddresses {
    pub header: DevicePtr,
    pub n_split_tiles: DevicePtr,
    pub n_row_tiles: DevicePtr,
    pub tokens: DevicePtr,
    pub positions: DevicePtr,
    pub table_of_row: DevicePtr,
    pub output_rows: DevicePtr,
    /// Tiles for the kernel of splits.
    pub split_tiles: DevicePtr,
    /// Tiles for the kernel of many rows.
    pub row_tiles: DevicePtr,
    pub tables: DevicePtr,
}

impl BatchLayout {
    /// Room for every batch of this capacity: a sequence has at most the whole pool in its table, and a block is in the
    /// tables of several sequences only where they share it.
    pub(crate) fn new(capacity: &Capacity) -> Self {
        let rows = 4 * capacity.max_rows;
        let tiles = size_of::<AttentionTile>() * capacity.max_rows;
        let mut end = size_of::<BatchHeader>();
        let mut part = |n_bytes: usize| {
            let start = end.next_multiple_of(16);
            end = start + n_bytes;
            start
        };
        let (tokens, positions, table_of_row) = (part(rows), part(rows), part(rows));
        let output_rows = part(4 * capacity.max_output_rows);
        let (split_tiles, row_tiles) = (part(tiles), part(tiles));
        let tables = part(TABLE_BYTES_PER_BLOCK * capacity.n_kv_blocks);
        Self { tokens, positions, table_of_row, output_rows, split_tiles, row_tiles, tables, n_bytes: end }
    }

    pub(crate) fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    pub(crate) fn addresses(&self, block: DevicePtr) -> BatchAddresses {
        let at = |offset: usize| block + offset as u64;
        BatchAddresses {
            header: at(0),
            n_split_tiles: at(offset_of!(BatchHeader, n_split_tiles)),
            n_row_tiles: at(offset_of!(BatchHeader, n_row_tiles)),
            tokens: at(self.tokens),
            positions: at(self.positions),
            table_of_row: at(self.table_of_row),
            output_rows: at(self.output_rows),
            split_tiles: at(self.split_tiles),
            row_tiles: at(self.row_tiles),
            tables: at(self.tables),
        }
    }
}

/// How often a block may be named by the tables of one batch, on average: sequences share blocks of a common beginning.
const TABLE_ENTRIES_PER_BLOCK: usize = 8;
/// Bytes that a batch has for each block of the pool.
pub(crate) const TABLE_BYTES_PER_BLOCK: usize = 4 * TABLE_ENTRIES_PER_BLOCK;

/// What the host knows of the batch at hand.
#[derive(Default, Debug)]
pub(crate) struct Staged {
    bytes: Vec<u8>,
    pub n_rows: usize,
    pub n_output_rows: usize,
    pub n_split_tiles: usize,
    pub n_row_tiles: usize,
    /// Most splits that a row of the split tiles has.
    pub n_splits: usize,
    /// Rows of some sequence are not side by side.
    pub is_scattered: bool,
}

impl Staged {
    /// Lays a batch out; the bytes to copy. `n_heads_per_kv` query heads share a key head; `splits_fit(rows, splits)` says
    /// whether partial results have room.
    ///
    /// # Errors
    /// When the tables name more blocks than have room.
    pub(crate) fn stage(
        &mut self,
        layout: &BatchLayout,
        batch: &Batch<'_>,
        n_heads_per_kv: usize,
        splits_fit: impl Fn(usize, usize) -> bool,
    ) -> Result<&[u8], String> {
        let n_entries: usize = batch.block_tables.iter().map(|table| table.len()).sum();
        let end = layout.tables + 4 * n_entries;
        if end > layout.n_bytes {
            return Err(format!(
                "the block tables of the batch name {n_entries} blocks, which is more than fit"
            ));
        }
        let starts = table_starts(batch.block_tables);
        let table_of_row: Vec<u32> = batch.sequence_of_row.iter().map(|it| starts[*it as usize]).collect();
        let Tiles { few, many } = self.choose_tiles(batch, &table_of_row, n_heads_per_kv, splits_fit);
        (self.n_rows, self.n_output_rows) = (batch.n_rows(), batch.output_rows.len());
        (self.n_split_tiles, self.n_row_tiles) = (few.len(), many.len());
        let header = BatchHeader {
            n_rows: self.n_rows as u32,
            n_output_rows: self.n_output_rows as u32,
            n_split_tiles: few.len() as u32,
            n_row_tiles: many.len() as u32,
        };
        self.bytes.clear();
        self.bytes.resize(end, 0);
        let mut put =
            |offset: usize, part: &[u8]| self.bytes[offset..offset + part.len()].copy_from_slice(part);
        put(0, bytemuck::bytes_of(&header));
        let tokens: Vec<u32> = batch.tokens.iter().map(|token| token.0).collect();
        let output_rows: Vec<u32> = batch.output_rows.iter().map(|row| *row as u32).collect();
        put(layout.tokens, bytemuck::cast_slice(&tokens));
        put(layout.positions, bytemuck::cast_slice(batch.positions));
        put(layout.table_of_row, bytemuck::cast_slice(&table_of_row));
        put(layout.output_rows, bytemuck::cast_slice(&output_rows));
        put(layout.split_tiles, bytemuck::cast_slice(&few));
        put(layout.row_tiles, bytemuck::cast_slice(&many));
        let blocks: Vec<u32> =
            batch.block_tables.iter().flat_map(|table| table.iter().map(|block| block.0)).collect();
        put(layout.tables, bytemuck::cast_slice(&blocks));
        Ok(&self.bytes)
    }

    /// The kernels' own choice, unless the partial results of few rows have no room.
    fn choose_tiles(
        &mut self,
        batch: &Batch<'_>,
        table_of_row: &[u32],
        n_heads_per_kv: usize,
        splits_fit: impl Fn(usize, usize) -> bool,
    ) -> Tiles {
        let runs = runs(batch.positions, table_of_row);
        self.is_scattered = is_scattered(&runs);
        let chosen = tiles(batch.positions, table_of_row, n_heads_per_kv);
        self.n_splits = chosen.few.iter().map(AttentionTile::n_splits).max().unwrap_or(0);
        if splits_fit(batch.n_rows(), self.n_splits) {
            return chosen;
        }
        self.n_splits = 0;
        let mut all = Tiles::default();
        let max_tokens = tokens_of_tile(TILE_ROWS, n_heads_per_kv) as u32;
        runs.into_iter().for_each(|run| cut(run, max_tokens, &mut all.many));
        all
    }
}

/// Where each sequence's table begins among all.
fn table_starts(tables: &[&[BlockId]]) -> Vec<u32> {
    let mut start = 0;
    let next = |table: &&[BlockId]| {
        let here = start;
        start += table.len() as u32;
        here
    };
    tables.iter().map(next).collect()
}
