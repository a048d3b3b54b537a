//! Launches of the matrix products with K-quants, kernels/linear_*_super.cu. The numbers of rows, columns and stages are those
//! of the kernels.

use super::linear::{LinearArgs, Matrix, Size, X_BYTES};
use crate::pack::Record;
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

/// Kernels of this file, but the products, and the bytes of their arguments.
pub const SIGNATURES: &[(&str, usize)] = &[("sum_x", size_of::<SumXArgs>())];

/// Bytes of the sums of `n_rows` rows of activations of `n_columns` columns, for any matrix.
pub fn sums_bytes(n_rows: usize, n_columns: usize) -> usize {
    // A matrix may begin and end inside a superblock.
    let n_supers = n_columns.div_ceil(GROUP_LEN * GROUPS_PER_SUPER) + 1;
    n_rows.div_ceil(8) * n_supers * 4 * crate::pack::CORE_BYTES
}

/// How a matrix is held and multiplied.
#[derive(Clone, Copy, Debug)]
pub(super) struct SuperShape {
    pub record: Record,
    pub size: Size,
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

/// Tiles and warps of a block for few rows; bytes of a superblock of one row of activations, and of the sums of a tile.
const FEW_TILES: usize = 2;
const FEW_WARPS: usize = 8;
const ROW_BYTES: usize = 512;
const TILE_SUM_BYTES: usize = 128;

fn few_launch(matrix: &Matrix, n_rows: usize) -> Launch {
    let x_bytes = FEW_WARPS * 2 * n_rows * ROW_BYTES;
    let sums_bytes = matrix.n_supers as usize * FEW_TILES * TILE_SUM_BYTES * n_rows.div_ceil(2);
    Launch {
        grid: [(matrix.n_tiles as usize).div_ceil(FEW_TILES) as u32, 1, 1],
        threads: 32 * FEW_WARPS as u32,
        shared_bytes: (x_bytes + sums_bytes) as u32,
    }
}

/// Multiplies with the kernel `name`.
pub(super) fn linear(
    runtime: &mut dyn Runtime,
    name: &'static str,
    shape: SuperShape,
    args: &LinearArgs,
) -> Result<(), CudaError> {
    let SuperShape { record, size } = shape;
    let (n_tiles, n_rows) = (args.matrix.n_tiles as usize, args.n_rows as usize);
    if size != Size::Few && record.has_minimums() {
        sum_x(runtime, record, args)?;
    }
    let launch = match size {
        Size::Few => few_launch(&args.matrix, n_rows),
        Size::Some => SOME.launch(record, n_tiles, n_rows),
        Size::Many | Size::Wide => MANY.launch(record, n_tiles, n_rows),
    };
    runtime.launch(name, launch, bytemuck::bytes_of(args))
}

fn sum_x(runtime: &mut dyn Runtime, record: Record, args: &LinearArgs) -> Result<(), CudaError> {
    let n_items = (args.n_rows as usize).div_ceil(8) * args.matrix.n_supers as usize;
    let sums = SumXArgs {
        matrix: args.matrix,
        x: args.x,
        sums: args.sums_of_x,
        x_tile_bytes: args.x_tile_bytes,
        n_rows: args.n_rows,
        per_half: record.per_half().into(),
    };
    let launch = Launch { grid: [n_items.div_ceil(4) as u32, 1, 1], threads: 128, shared_bytes: 0 };
    runtime.launch("sum_x", launch, bytemuck::bytes_of(&sums))
}
