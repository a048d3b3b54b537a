//! Launches of the matrix products with K-quants, kernels/linear_*_super.cu. The numbers of rows, columns and stages are those
//! of the kernels.

use super::linear::{FEW_ROWS, LinearArgs, Matrix, Size, X_BYTES};
use crate::pack::{CORE_BYTES, Kind, Record, TILE_ROWS};
use crate::runtime::{TileMap, Tiles};
use crate::{CudaError, DevicePtr, Launch, Runtime};
use paceline_kernels::formats::{GROUP_LEN, GROUPS_PER_SUPER};

/// `SumXArgs` of kernels/linear_many_super.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SumXArgs {
    /// The matrix whose minimums the sums are for.
    pub matrix: Matrix,
    /// Rows of activations as operand B.
    pub x: DevicePtr,
    /// Operand B of the products of minimums.
    pub sums: DevicePtr,
    /// Bytes from 8 rows of `x` to the next 8.
    pub x_tile_bytes: i64,
    /// Rows of activations.
    pub n_rows: i32,
    /// 1 when sums are over half groups.
    pub per_half: i32,
}

/// `WideSuperArgs` of kernels/linear_wide_super.cu.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
struct WideSuperArgs {
    weights: TileMap,
    x: TileMap,
    sums_of_x: TileMap,
    linear: LinearArgs,
    /// 1 when blocks that are left over are several thread blocks' work.
    is_split: i32,
    /// Fills the struct up.
    unused: [i32; 3],
}

/// Kernels of a type for each size.
struct Names {
    few: &'static str,
    few_small: &'static str,
    some: &'static str,
    many: &'static str,
    /// As in [`WIDE`].
    wide: [&'static str; 3],
}

macro_rules! kernel_names {
    ($($kind:ident $name:literal),*) => {
        fn names(kind: Kind) -> Names {
            match kind {
                $(Kind::$kind => Names {
                    few: concat!("linear_few_", $name),
                    few_small: concat!("linear_few_small_", $name),
                    some: concat!("linear_some_", $name),
                    many: concat!("linear_many_", $name),
                    wide: [
                        concat!("linear_wide_32_", $name),
                        concat!("linear_wide_64_", $name),
                        concat!("linear_wide_128_", $name),
                    ],
                },)*
                _ => panic!("invariant: {kind:?} has no superblocks"),
            }
        }

        /// Kernels of this file and the bytes of their arguments.
        pub const SIGNATURES: &[(&str, usize)] = &[
            ("sum_x", size_of::<SumXArgs>()),
            $((concat!("linear_few_", $name), size_of::<LinearArgs>()),
            (concat!("linear_few_small_", $name), size_of::<LinearArgs>()),
            (concat!("linear_some_", $name), size_of::<LinearArgs>()),
            (concat!("linear_many_", $name), size_of::<LinearArgs>()),
            (concat!("linear_wide_32_", $name), size_of::<WideSuperArgs>()),
            (concat!("linear_wide_64_", $name), size_of::<WideSuperArgs>()),
            (concat!("linear_wide_128_", $name), size_of::<WideSuperArgs>()),)*
        ];
    };
}

kernel_names!(Q2_K "q2_k", Q3_K "q3_k", Q4_K "q4_k", Q5_K "q5_k", Q6_K "q6_k");

/// What a product may need of a workspace at most.
#[derive(Clone, Copy, Debug)]
pub struct WorkspaceNeed {
    /// Rows of activations.
    pub n_rows: usize,
    /// Columns of the widest matrix.
    pub n_columns: usize,
    /// Rows of the highest one; gate and up count as one.
    pub n_outputs: usize,
}

impl WorkspaceNeed {
    /// Bytes of the sums of activations, for any matrix.
    pub fn sums_bytes(&self) -> usize {
        // A matrix may begin and end inside a superblock.
        let n_supers = self.n_columns.div_ceil(GROUP_LEN * GROUPS_PER_SUPER) + 1;
        self.n_rows.div_ceil(8) * n_supers * 4 * CORE_BYTES
    }

    /// Blocks of one of the wide kernels in the largest batch it is for. A gate and what it is multiplied with may have a half
    /// tile each to spare.
    fn n_blocks(&self, wide: &Wide) -> usize {
        let is_last = wide.block_rows == WIDE[WIDE.len() - 1].block_rows;
        let n_rows = if is_last { self.n_rows } else { self.n_rows.min(wide.block_rows) };
        wide.n_blocks(self.n_outputs.div_ceil(TILE_ROWS) + 1, n_rows)
    }

    /// Bytes of the sums of stretches: any of the kernels may have all its blocks split.
    pub fn stretches_bytes(&self) -> usize {
        let most = WIDE.iter().map(|wide| self.n_blocks(wide) * wide.stretches_bytes()).max();
        most.unwrap_or(0).min(MOST_STRETCHES_BYTES)
    }

    /// Bytes of the counters, which must be zeros at first.
    pub fn arrivals_bytes(&self) -> usize {
        WIDE.iter().map(|wide| self.n_blocks(wide)).max().unwrap_or(0) * size_of::<u32>()
    }
}

/// How a matrix is held and multiplied.
#[derive(Clone, Copy, Debug)]
pub(super) struct SuperShape {
    pub kind: Kind,
    pub record: Record,
    pub size: Size,
}

/// Blocking of the kernels for few rows: tiles of 16 outputs, warps.
struct Few {
    tiles: usize,
    warps: usize,
}

const FEW: Few = Few { tiles: 2, warps: 4 };
const FEW_SMALL: Few = Few { tiles: 1, warps: 8 };
/// Pairs of tiles for each multiprocessor from which on it is worth while to have pairs.
const PAIRS_FROM: usize = 4;
/// Bytes of a superblock of x, and of the sums of a tile for two rows.
const SUPER_X_BYTES: usize = 4 * X_BYTES;
const TILE_SUM_BYTES: usize = 128;

impl Few {
    fn launch(&self, matrix: &Matrix, n_rows: usize) -> Launch {
        let x_bytes = self.warps * 2 * SUPER_X_BYTES;
        let sums_bytes = matrix.n_supers as usize * self.tiles * TILE_SUM_BYTES * n_rows.div_ceil(2);
        Launch {
            grid: [(matrix.n_tiles as usize).div_ceil(self.tiles) as u32, 1, 1],
            threads: 32 * self.warps as u32,
            shared_bytes: (x_bytes + sums_bytes) as u32,
        }
    }
}

/// Blocking of the kernels for more rows: tiles of 16 outputs, tiles of 8 rows, threads.
pub(super) struct Blocking {
    block_m: usize,
    block_n: usize,
    threads: u32,
}

const SOME: Blocking = Blocking { block_m: 4, block_n: 4, threads: 128 };
pub(super) const MANY: Blocking = Blocking { block_m: 8, block_n: 8, threads: 256 };
/// Superblocks of weights and units of activations in shared memory.
const SUPERS: usize = 2;
const X_RING: usize = 4;

impl Blocking {
    pub(super) fn shared_bytes(&self, record: Record) -> u32 {
        let of_super = self.block_m * record.n_bytes() + self.block_n * record.sums_bytes();
        (SUPERS * of_super + X_RING * self.block_n * X_BYTES) as u32
    }

    fn launch(&self, record: Record, n_tiles: usize, n_rows: usize) -> Launch {
        let blocks_m = n_tiles.div_ceil(self.block_m) as u32;
        let blocks_n = n_rows.div_ceil(8 * self.block_n) as u32;
        Launch {
            grid: [blocks_n, blocks_m, 1],
            threads: self.threads,
            shared_bytes: self.shared_bytes(record),
        }
    }
}

/// Tiles of a block of the wide kernels, and its threads.
const WIDE_TILES: usize = 8;
const WIDE_THREADS: u32 = 384;
/// Bytes that sums of stretches may take; where they would need more, blocks are not split.
const MOST_STRETCHES_BYTES: usize = 36 << 20;
/// Stretches of the columns.
const STRETCHES: usize = 8;

/// Blocking of the wide kernels: rows of activations, units of x in shared memory, blocks that share a multiprocessor, bytes of
/// shared memory for a block.
struct Wide {
    block_rows: usize,
    x_stages: usize,
    n_resident: usize,
    room: usize,
}

/// In the order of [`Names::wide`].
const WIDE: [Wide; 3] = [
    Wide { block_rows: 32, x_stages: 6, n_resident: 2, room: 111 << 10 },
    Wide { block_rows: 64, x_stages: 8, n_resident: 1, room: 225 << 10 },
    Wide { block_rows: 128, x_stages: 6, n_resident: 1, room: 225 << 10 },
];
/// Superblocks in shared memory at most.
const MOST_SUPER_STAGES: usize = 6;

impl Wide {
    /// The number of the kernel for so many rows.
    fn number(n_rows: usize) -> usize {
        WIDE.iter().position(|wide| n_rows <= wide.block_rows).unwrap_or(WIDE.len() - 1)
    }

    /// Bytes of the sums of the stretches of a block.
    const fn stretches_bytes(&self) -> usize {
        4 * STRETCHES * WIDE_TILES * TILE_ROWS * self.block_rows
    }

    fn shared_bytes(&self, record: Record) -> u32 {
        let n_tiles = self.block_rows / 8;
        let of_super = WIDE_TILES * record.n_bytes() + n_tiles * record.sums_bytes();
        // With 64 rows there are registers for the sums of stretches.
        let stretches = if self.block_rows == 64 { 0 } else { self.stretches_bytes() / STRETCHES };
        let before = stretches + self.x_stages * n_tiles * X_BYTES;
        let super_stages = ((self.room - before) / of_super).min(MOST_SUPER_STAGES);
        let barriers = 2 * size_of::<u64>() * (super_stages + self.x_stages);
        // Behind the barriers lies a counter.
        (before + super_stages * of_super + barriers + 8) as u32
    }

    fn n_blocks(&self, n_tiles: usize, n_rows: usize) -> usize {
        n_tiles.div_ceil(WIDE_TILES) * n_rows.div_ceil(self.block_rows)
    }

    /// Thread blocks for so many blocks of outputs, and whether these are split where some are left over.
    fn grid(&self, n_blocks: usize, n_supers: usize, n_multiprocessors: usize) -> (usize, bool) {
        let n_stretches = n_supers.div_ceil(n_supers.div_ceil(STRETCHES));
        let most = self.n_resident * n_multiprocessors;
        let grid = most.min(n_blocks * n_stretches);
        let is_split = n_blocks % grid * self.stretches_bytes() <= MOST_STRETCHES_BYTES;
        (if is_split { grid } else { most.min(n_blocks) }, is_split)
    }
}

/// Multiplies with a kernel of this shape.
pub(super) fn linear(
    runtime: &mut dyn Runtime,
    shape: SuperShape,
    args: &LinearArgs,
) -> Result<(), CudaError> {
    let SuperShape { kind, record, size } = shape;
    let (n_tiles, n_rows) = (args.matrix.n_tiles as usize, args.n_rows as usize);
    assert!(size != Size::Few || n_rows <= FEW_ROWS, "invariant: few rows are few");
    if size != Size::Few && record.has_minimums() {
        sum_x(runtime, record, args)?;
    }
    let names = names(kind);
    let (name, launch) = match size {
        Size::Few if n_tiles >= 2 * PAIRS_FROM * runtime.n_multiprocessors() as usize => {
            (names.few, FEW.launch(&args.matrix, n_rows))
        }
        Size::Few => (names.few_small, FEW_SMALL.launch(&args.matrix, n_rows)),
        Size::Some => (names.some, SOME.launch(record, n_tiles, n_rows)),
        Size::Many => (names.many, MANY.launch(record, n_tiles, n_rows)),
        Size::Wide => return wide(runtime, &names, record, args),
    };
    runtime.launch(name, launch, bytemuck::bytes_of(args))
}

fn sum_x(runtime: &mut dyn Runtime, record: Record, args: &LinearArgs) -> Result<(), CudaError> {
    let n_items = (args.n_rows as usize).div_ceil(8) * args.matrix.n_supers as usize;
    let sums = SumXArgs {
        matrix: args.matrix,
        x: args.x,
        sums: args.workspace.sums_of_x,
        x_tile_bytes: args.x_tile_bytes,
        n_rows: args.n_rows,
        per_half: record.per_half().into(),
    };
    let launch = Launch { grid: [n_items.div_ceil(4) as u32, 1, 1], threads: 128, shared_bytes: 0 };
    runtime.launch("sum_x", launch, bytemuck::bytes_of(&sums))
}

fn wide(
    runtime: &mut dyn Runtime,
    names: &Names,
    record: Record,
    args: &LinearArgs,
) -> Result<(), CudaError> {
    let Matrix { n_tiles, n_supers, n_units, tiles, tile_bytes, .. } = args.matrix;
    let (n_row_tiles, n_multiprocessors) =
        ((args.n_rows as u32).div_ceil(8), runtime.n_multiprocessors() as usize);
    let number = Wide::number(args.n_rows as usize);
    let wide = &WIDE[number];
    let box_rows = (wide.block_rows / 8) as u32;
    let cores = |bytes: usize| (bytes / CORE_BYTES) as u32;
    // A record is two pieces: one would be too long for a box.
    let weights = Tiles {
        first: tiles,
        tile_bytes: tile_bytes as u64,
        n_tiles: n_tiles as u32,
        n_pieces: 2 * n_supers as u32,
        piece_bytes: record.n_bytes() as u32 / 2,
        box_tiles: WIDE_TILES as u32,
        box_pieces: 2,
    };
    let x = Tiles {
        first: args.x,
        tile_bytes: args.x_tile_bytes as u64,
        n_tiles: n_row_tiles,
        n_pieces: n_units as u32 * cores(X_BYTES),
        piece_bytes: CORE_BYTES as u32,
        box_tiles: box_rows,
        box_pieces: cores(X_BYTES),
    };
    let sums_cores = cores(record.sums_bytes()).max(1);
    let sums_of_x = Tiles {
        first: args.workspace.sums_of_x,
        tile_bytes: u64::from(n_supers as u32 * sums_cores) * CORE_BYTES as u64,
        n_pieces: n_supers as u32 * sums_cores,
        box_pieces: sums_cores,
        ..x
    };
    let [weights, x, sums_of_x] =
        [runtime.tile_map(&weights)?, runtime.tile_map(&x)?, runtime.tile_map(&sums_of_x)?];
    let n_blocks = wide.n_blocks(n_tiles as usize, args.n_rows as usize);
    let (grid, is_split) = wide.grid(n_blocks, n_supers as usize, n_multiprocessors);
    let launch =
        Launch { grid: [grid as u32, 1, 1], threads: WIDE_THREADS, shared_bytes: wide.shared_bytes(record) };
    let args =
        WideSuperArgs { weights, x, sums_of_x, linear: *args, is_split: is_split.into(), unused: [0; 3] };
    runtime.launch(names.wide[number], launch, bytemuck::bytes_of(&args))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_holds_what_split_blocks_leave_there() {
        for (n_outputs, n_supers) in
            [(16, 1), (1_000, 2), (1_536, 2), (3_584, 74), (37_888, 14), (152_064, 14)]
        {
            for n_rows in [9, 32, 33, 64, 65, 128, 129, 297, 700, 2_048] {
                let need = WorkspaceNeed { n_rows, n_columns: 256 * n_supers, n_outputs };
                for n_multiprocessors in [1, 4, 78, 132] {
                    let wide = &WIDE[Wide::number(n_rows)];
                    let n_blocks = wide.n_blocks(n_outputs.div_ceil(TILE_ROWS), n_rows);
                    let (grid, is_split) = wide.grid(n_blocks, n_supers, n_multiprocessors);
                    let n_left = if is_split { n_blocks % grid } else { 0 };
                    let shape =
                        format!("{n_outputs} outputs, {n_rows} rows, {n_multiprocessors} multiprocessors");
                    assert!(n_left * wide.stretches_bytes() <= need.stretches_bytes(), "{shape}");
                    assert!(n_left * size_of::<u32>() <= need.arrivals_bytes(), "{shape}");
                }
            }
        }
    }
}
