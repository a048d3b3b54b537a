//! Launches of the matrix products of kernels/linear_*.cu and of the embedding's look-up. The numbers of rows, columns and
//! stages are those of the kernels.

use super::linear_super::{self, SuperShape};
use crate::pack::{CORE_BYTES, Kind, Planes, TILE_ROWS, UNIT_COLUMNS};
use crate::runtime::{TileMap, Tiles};
use crate::{CudaError, DevicePtr, Launch, Runtime};

/// Rows up to which the kernel of one warp a tile is used.
pub const FEW_ROWS: usize = 8;
/// Rows up to which the kernel of few tiles a block is used.
pub const SOME_ROWS: usize = 64;
/// Rows that a buffer of activations is padded to, so that every kernel may read whole blocks of it.
pub const ROW_PADDING: usize = 256;
/// Bytes of 8 rows of activations in one unit.
pub(super) const X_BYTES: usize = 8 * UNIT_COLUMNS * 2;

/// `Matrix` of kernels/matrix.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Matrix {
    /// Its tiles.
    pub tiles: DevicePtr,
    /// Bytes of a tile.
    pub tile_bytes: i64,
    /// Tiles of 16 rows.
    pub n_tiles: i32,
    /// Units of 64 columns.
    pub n_units: i32,
    /// Superblocks of a row.
    pub n_supers: i32,
    /// Place of the first group in its superblock.
    pub first_group: i32,
}

/// `Workspace` of kernels/linear.cuh; [`linear_super::WorkspaceNeed`] tells how much of each.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Workspace {
    /// Sums of activations.
    pub sums_of_x: DevicePtr,
    /// Sums of blocks that several thread blocks work on.
    pub stretches: DevicePtr,
    /// Counters of these blocks; zeros at first, and after each kernel.
    pub arrivals: DevicePtr,
}

/// `LinearArgs` of kernels/linear.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct LinearArgs {
    /// The weights.
    pub matrix: Matrix,
    /// Rows of activations as operand B.
    pub x: DevicePtr,
    /// `[n_outputs]` f32, or 0.
    pub bias: DevicePtr,
    /// `[n_rows][out_stride]` f32; 0 for gated products.
    pub out: DevicePtr,
    /// `silu(gate) * up` as operand B; 0 for plain products.
    pub gated: DevicePtr,
    /// Memory for the kernels' own use.
    pub workspace: Workspace,
    /// Bytes from 8 rows of `x` to the next 8.
    pub x_tile_bytes: i64,
    /// Rows of activations.
    pub n_rows: i32,
    /// Rows of the matrix; for gated products features, half of them.
    pub n_outputs: i32,
    /// Distance of rows of `out`.
    pub out_stride: i32,
    /// Padded columns of `gated`.
    pub gated_k_padded: i32,
}

/// `EmbedArgs` of kernels/embed.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct EmbedArgs {
    /// The embedding.
    pub matrix: Matrix,
    /// Counts of the batch.
    pub header: DevicePtr,
    /// `[n_rows]` u32
    pub tokens: DevicePtr,
    /// `[n_rows][n_embd]` f32
    pub hidden: DevicePtr,
    /// [`Kind::number`]
    pub kind: i32,
    /// Columns.
    pub n_embd: i32,
}

/// `SiluArgs` of kernels/linear_many.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SiluArgs {
    /// `[n_rows][n_features]` f32
    pub gate: DevicePtr,
    /// `[n_rows][n_features]` f32
    pub up: DevicePtr,
    /// Operand B.
    pub gated: DevicePtr,
    /// Rows.
    pub n_rows: i32,
    /// Columns.
    pub n_features: i32,
    /// Padded columns of `gated`.
    pub gated_k_padded: i32,
    /// Fills the struct up.
    pub unused: i32,
}

/// Which kernel multiplies a batch of rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    /// Up to [`FEW_ROWS`].
    Few,
    /// Up to [`SOME_ROWS`] with sense, any number in fact.
    Some,
    /// Any number.
    Many,
    /// Any number of rows with plain numbers or K-quants, on Hopper.
    Wide,
}

impl Size {
    /// The kernel for this number of rows on a device.
    pub fn of(kind: Kind, n_rows: usize, device: &dyn Runtime) -> Self {
        let shared_bytes = match kind.record() {
            Some(record) => linear_super::MANY.shared_bytes(record),
            None => Blocking::many(kind).shared_bytes(kind.planes()),
        };
        let fits = shared_bytes <= device.max_shared_bytes();
        let has_wide = |from: usize| device.is_hopper() && n_rows > from;
        match n_rows {
            0..=FEW_ROWS => Self::Few,
            _ if kind == Kind::BF16 && has_wide(SOME_ROWS) => Self::Wide,
            _ if kind.record().is_some() && has_wide(FEW_ROWS) => Self::Wide,
            _ if n_rows <= SOME_ROWS || !fits => Self::Some,
            _ => Self::Many,
        }
    }
}

/// Warps of a block for few rows of quantized weights, and stages of each.
const FEW_WARPS: usize = 8;
const FEW_STAGES: usize = 4;
/// Units of a chunk, and bytes of its sums over a tile and 8 rows.
const CHUNK_UNITS: usize = 4;
const CHUNK_SUM_BYTES: usize = 4 * TILE_ROWS * 8;

/// Blocking of the kernels for more rows: tiles of 16 outputs, tiles of 8 rows, threads, stages.
struct Blocking {
    block_m: usize,
    block_n: usize,
    threads: u32,
    stages: usize,
}

const SOME: Blocking = Blocking { block_m: 2, block_n: 4, threads: 64, stages: 8 };
const MANY: Blocking = Blocking { block_m: 8, block_n: 16, threads: 256, stages: 4 };
/// The same for plain numbers, which need fewer registers.
const MANY_PLAIN: Blocking = Blocking { block_n: 32, ..MANY };

impl Blocking {
    fn many(kind: Kind) -> &'static Self {
        if kind == Kind::BF16 { &MANY_PLAIN } else { &MANY }
    }

    fn shared_bytes(&self, planes: Planes) -> u32 {
        (self.stages * (self.block_m * planes.unit_bytes() + self.block_n * X_BYTES)) as u32
    }

    fn launch(&self, planes: Planes, n_tiles: usize, n_rows: usize) -> Launch {
        let blocks_m = n_tiles.div_ceil(self.block_m) as u32;
        let blocks_n = n_rows.div_ceil(8 * self.block_n) as u32;
        let shared_bytes = self.shared_bytes(planes);
        Launch { grid: [blocks_n, blocks_m, 1], threads: self.threads, shared_bytes }
    }
}

/// Blocking of one of the wide kernels: 128 outputs by `block_rows` rows of activations.
struct Wide {
    name: &'static str,
    block_rows: usize,
}

/// `WideArgs` of kernels/linear_wide.cu.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
struct WideArgs {
    weights: TileMap,
    x: TileMap,
    linear: LinearArgs,
    /// Fills the struct up.
    unused: [u64; 2],
}

const WIDE: [Wide; 3] = [
    Wide { name: "linear_wide_128_bf16", block_rows: 128 },
    Wide { name: "linear_wide_192_bf16", block_rows: 192 },
    Wide { name: "linear_wide_256_bf16", block_rows: 256 },
];
/// Tiles of a block, its threads, and bytes of shared memory that its stages may have.
const WIDE_TILES: usize = 8;
const WIDE_THREADS: u32 = 384;
const WIDE_STAGES_BYTES: usize = 200 << 10;
/// What a block costs beside its products, in rows.
const WIDE_BLOCK_COST: usize = 32;

impl Wide {
    fn n_blocks(&self, n_tiles: usize, n_rows: usize) -> usize {
        n_tiles.div_ceil(WIDE_TILES) * n_rows.div_ceil(self.block_rows)
    }

    /// The kernel whose blocks are done first when each multiprocessor has one at a time.
    fn of(n_tiles: usize, n_rows: usize, n_multiprocessors: usize) -> &'static Self {
        let cost = |wide: &&Self| {
            let rounds = wide.n_blocks(n_tiles, n_rows).div_ceil(n_multiprocessors);
            rounds * (wide.block_rows + WIDE_BLOCK_COST)
        };
        WIDE.iter().min_by_key(cost).expect("invariant: there is one")
    }

    fn launch(&self, n_tiles: usize, n_rows: usize, n_multiprocessors: usize) -> Launch {
        let stage_bytes = WIDE_TILES * Kind::BF16.planes().codes + self.block_rows / 8 * X_BYTES;
        let stages = WIDE_STAGES_BYTES / stage_bytes;
        // Behind each stage's bytes come two barriers.
        let shared_bytes = (stages * (stage_bytes + 2 * size_of::<u64>())) as u32;
        let n_blocks = self.n_blocks(n_tiles, n_rows).min(n_multiprocessors) as u32;
        Launch { grid: [n_blocks, 1, 1], threads: WIDE_THREADS, shared_bytes }
    }
}

/// Units of a stage of the kernel for few rows of plain numbers.
const PLAIN_UNITS: usize = 4;
/// Fewest stages of a block, and most bytes of all of them: what else would lie idle is left to the kernels that follow.
const PLAIN_STAGES: usize = 4;
const PLAIN_BYTES: usize = 100 << 10;
/// A block's memory that is not its own to use.
const RESERVED_BYTES: usize = 1 << 10;

/// Two warps a tile. Blocks take so much memory that as many fit on a multiprocessor as there are for each: blocks that begin
/// while others end would else gather where there is room first.
fn plain_launch(matrix: &Matrix, n_rows: usize, device: &dyn Runtime) -> Launch {
    let (n_tiles, n_units) = (matrix.n_tiles as usize, matrix.n_units as usize);
    // Weights, rows of activations, two barriers.
    let x_bytes = n_rows.next_power_of_two() * UNIT_COLUMNS * 2;
    let stage_bytes = PLAIN_UNITS * (Kind::BF16.planes().codes + x_bytes) + 2 * size_of::<u64>();
    let blocks = n_tiles.div_ceil(device.n_multiprocessors() as usize);
    let share = (device.max_shared_bytes() as usize + RESERVED_BYTES) / blocks;
    let even = share.saturating_sub(RESERVED_BYTES).min(PLAIN_BYTES) / stage_bytes;
    let n_stages = even.max(PLAIN_STAGES).min(n_units.div_ceil(PLAIN_UNITS));
    Launch { grid: [n_tiles as u32, 1, 1], threads: 64, shared_bytes: (n_stages * stage_bytes) as u32 }
}

fn few_launch(kind: Kind, matrix: &Matrix) -> Launch {
    let staged = kind.planes().unit_bytes();
    let sums = (matrix.n_units as usize).div_ceil(CHUNK_UNITS) * CHUNK_SUM_BYTES;
    // Units of a stage: about as many bytes for every kind.
    let units = if kind == Kind::Q8_0 { 1 } else { 2 };
    let shared_bytes = FEW_WARPS * FEW_STAGES * units * staged + sums;
    let grid = [matrix.n_tiles as u32, 1, 1];
    Launch { grid, threads: 32 * FEW_WARPS as u32, shared_bytes: shared_bytes as u32 }
}

macro_rules! kernel_names {
    ($($kind:ident $name:literal),*) => {
        const fn kernel_name(kind: Kind, size: Size) -> &'static str {
            match (kind, size) {
                $((Kind::$kind, Size::Few) => concat!("linear_few_", $name),
                (Kind::$kind, Size::Some) => concat!("linear_some_", $name),
                (Kind::$kind, Size::Many | Size::Wide) => concat!("linear_many_", $name),)*
                _ => panic!("invariant: K-quants have names of their own"),
            }
        }

        /// Kernels of this file and the bytes of their arguments.
        pub const SIGNATURES: &[(&str, usize)] = &[
            ("embed", size_of::<EmbedArgs>()),
            ("silu_times_up", size_of::<SiluArgs>()),
            (WIDE[0].name, size_of::<WideArgs>()),
            (WIDE[1].name, size_of::<WideArgs>()),
            (WIDE[2].name, size_of::<WideArgs>()),
            $((concat!("linear_few_", $name), size_of::<LinearArgs>()),
            (concat!("linear_some_", $name), size_of::<LinearArgs>()),
            (concat!("linear_many_", $name), size_of::<LinearArgs>()),)*
        ];
    };
}

kernel_names!(BF16 "bf16", Q4_0 "q4_0", Q4_1 "q4_1", Q5_0 "q5_0", Q5_1 "q5_1", Q8_0 "q8_0");

/// Multiplies `args.n_rows` rows, with the kernel of this size; all sizes give the same bits.
///
/// # Errors
/// What the device reports.
pub fn linear(runtime: &mut dyn Runtime, kind: Kind, size: Size, args: &LinearArgs) -> Result<(), CudaError> {
    let (n_tiles, n_rows) = (args.matrix.n_tiles as usize, args.n_rows as usize);
    if let Some(record) = kind.record() {
        return linear_super::linear(runtime, SuperShape { kind, record, size }, args);
    }
    let launch = match size {
        Size::Few if kind == Kind::BF16 => plain_launch(&args.matrix, n_rows, runtime),
        Size::Few => few_launch(kind, &args.matrix),
        Size::Some => SOME.launch(kind.planes(), n_tiles, n_rows),
        Size::Many => Blocking::many(kind).launch(kind.planes(), n_tiles, n_rows),
        Size::Wide => return wide(runtime, args),
    };
    runtime.launch(kernel_name(kind, size), launch, bytemuck::bytes_of(args))
}

/// Multiplies with plain numbers, on Hopper.
fn wide(runtime: &mut dyn Runtime, args: &LinearArgs) -> Result<(), CudaError> {
    let Matrix { tiles, tile_bytes, n_tiles, n_units, .. } = args.matrix;
    let n_multiprocessors = runtime.n_multiprocessors() as usize;
    let wide = Wide::of(n_tiles as usize, args.n_rows as usize, n_multiprocessors);
    let unit_bytes = Kind::BF16.planes().codes;
    let weights = Tiles {
        first: tiles,
        tile_bytes: tile_bytes as u64,
        n_tiles: n_tiles as u32,
        n_pieces: n_units as u32 * (unit_bytes / CORE_BYTES) as u32,
        piece_bytes: CORE_BYTES as u32,
        box_tiles: WIDE_TILES as u32,
        box_pieces: (unit_bytes / CORE_BYTES) as u32,
    };
    let x = Tiles {
        first: args.x,
        tile_bytes: args.x_tile_bytes as u64,
        n_tiles: (args.n_rows as u32).div_ceil(8),
        n_pieces: n_units as u32 * (X_BYTES / CORE_BYTES) as u32,
        piece_bytes: CORE_BYTES as u32,
        box_tiles: wide.block_rows as u32 / 8,
        box_pieces: (X_BYTES / CORE_BYTES) as u32,
    };
    let [weights, x] = [runtime.tile_map(&weights)?, runtime.tile_map(&x)?];
    let launch = wide.launch(n_tiles as usize, args.n_rows as usize, n_multiprocessors);
    let args = WideArgs { weights, x, linear: *args, unused: [0; 2] };
    runtime.launch(wide.name, launch, bytemuck::bytes_of(&args))
}

/// Looks `n_rows` tokens up; rows that the batch does not have are left alone.
///
/// # Errors
/// What the device reports.
pub fn embed(runtime: &mut dyn Runtime, n_rows: usize, args: &EmbedArgs) -> Result<(), CudaError> {
    let launch = Launch { grid: [n_rows as u32, 1, 1], threads: 256, shared_bytes: 0 };
    runtime.launch("embed", launch, bytemuck::bytes_of(args))
}

/// `gated = silu(gate) * up`.
///
/// # Errors
/// What the device reports.
pub fn silu_times_up(runtime: &mut dyn Runtime, args: &SiluArgs) -> Result<(), CudaError> {
    let launch = Launch { grid: [args.n_rows as u32, 1, 1], threads: 256, shared_bytes: 0 };
    runtime.launch("silu_times_up", launch, bytemuck::bytes_of(args))
}
