//! Launches of attention of kernels/attention.cu. The kernels give the same bits; which rows are whose is the caller's
//! choice, see `tiles`.

use crate::{CudaError, DevicePtr, Launch, Runtime};

/// Positions of a split: partial results are of one each.
pub const SPLIT: usize = 256;
/// Rows (a token and a head each) that a block of `attend_split` works for.
pub const SPLIT_ROWS: usize = 16;
/// Rows that a block of `attend_tiles` works for.
pub const TILE_ROWS: usize = 64;

/// Bytes of keys and values in a chunk, for each dimension of a head.
const CHUNK_BYTES: usize = 2 * 64 * 2;
const TILE_STAGES: usize = 2;
/// Keys of the batch that a split has beside the cache.
const STAGED_KEYS: usize = 16;

/// `AttendArgs` of kernels/attention.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct AttendArgs {
    /// `[n_rows][n_heads][head_dim]` f16, rotated; not used by `attend_split`.
    pub q: DevicePtr,
    /// Keys of one layer: `[block][n_kv_heads][16 * head_dim]` f16, ordered as `key_index` says.
    pub keys: DevicePtr,
    /// Values of one layer, ordered as `value_index` says.
    pub values: DevicePtr,
    /// `[n_rows][(n_heads + 2 * n_kv_heads) * head_dim]` f32; not used by `attend_tiles`.
    pub qkv: DevicePtr,
    /// `[position][head_dim / 2]` pairs of cosine and sine, f32; not used by `attend_tiles`.
    pub rotations: DevicePtr,
    /// The tiles of this launch.
    pub tiles: DevicePtr,
    /// Their number, u32.
    pub n_tiles: DevicePtr,
    /// Block ids, u32.
    pub tables: DevicePtr,
    /// `[n_kv_heads]` u32: first of the query heads that share a KV head.
    pub first_head: DevicePtr,
    /// `[n_kv_heads]` u32: how many share it.
    pub n_heads_of: DevicePtr,
    /// `[n_rows][n_heads][n_splits][head_dim]` f32; not used by `attend_tiles`.
    pub partial: DevicePtr,
    /// `[n_rows][n_heads][n_splits][2]` f32; not used by `attend_tiles`.
    pub partial_sums: DevicePtr,
    /// Zeros, u32, [`n_counts`] of them; not used by `attend_tiles`.
    pub n_done: DevicePtr,
    /// The result as operand B.
    pub out: DevicePtr,
    /// Query heads.
    pub n_heads: u32,
    /// KV heads.
    pub n_kv_heads: u32,
    /// Splits of every row in `partial`.
    pub n_splits: u32,
    /// Blocks that share the rows of a tile, see [`parts`].
    pub parts: u32,
    /// Positions a row sees, its own included; 0 for all.
    pub window: u32,
    /// Padded columns of `out`.
    pub k_padded: u32,
    /// Scores are multiplied by it: `log2(e) / sqrt(head_dim)`.
    pub factor: f32,
    /// Fills the struct up.
    pub unused: u32,
}

/// How large a launch of attention is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AttendGrid {
    /// Elements of a head.
    pub head_dim: usize,
    /// Tiles at most.
    pub n_tiles: usize,
    /// Tokens of a tile at most.
    pub n_tokens: usize,
    /// Splits at most: one for each 256 positions.
    pub n_splits: usize,
}

/// Blocks that share a tile of `n_tokens` tokens when a block has `rows` rows and a KV head at most `group` heads.
pub fn parts(n_tokens: usize, group: usize, rows: usize) -> u32 {
    (n_tokens * group).div_ceil(rows) as u32
}

/// Counts that [`AttendArgs::n_done`] has for `n_rows` rows: one for each block of a split.
pub fn n_counts(n_rows: usize, n_kv_heads: usize, group: usize) -> usize {
    n_rows * n_kv_heads * group.div_ceil(SPLIT_ROWS)
}

/// The factor of scores that are to be scaled by `scale` before an exponential.
pub fn score_factor(scale: f32) -> f32 {
    (f64::from(scale) * std::f64::consts::LOG2_E) as f32
}

macro_rules! head_dims {
    ($($head_dim:literal),*) => {
        /// Head dimensions with kernels.
        pub const HEAD_DIMS: &[usize] = &[$($head_dim),*];

        /// Kernels of this file and the bytes of their arguments.
        pub const SIGNATURES: &[(&str, usize)] = &[
            $((concat!("attend_split_", $head_dim), size_of::<AttendArgs>()),
            (concat!("attend_tiles_", $head_dim), size_of::<AttendArgs>()),)*
        ];

        /// Splits, tiles.
        fn names(head_dim: usize) -> Result<[&'static str; 2], CudaError> {
            match head_dim {
                $($head_dim => Ok([
                    concat!("attend_split_", $head_dim),
                    concat!("attend_tiles_", $head_dim),
                ]),)*
                _ => Err(CudaError::Unfit(format!("heads of {head_dim} elements, not of {HEAD_DIMS:?}"))),
            }
        }
    };
}

head_dims!(32, 64, 96, 128);

/// Bytes of shared memory of a split for each dimension of a head: values, queries, new keys. And beside them: weights, sums,
/// largest scores, a count.
const SPLIT_BYTES: usize = 2 * (SPLIT + SPLIT_ROWS + STAGED_KEYS);
const SPLIT_OTHER_BYTES: usize = SPLIT * SPLIT_ROWS * 2 + 4 * 32 * 8 + 4 * SPLIT_ROWS * 4 + 16;

/// Attention of few rows, with their rotation and the store of their keys and values: every split, of which the last one that
/// ends merges them. A sequence whose rows are in several runs must have been through `rotate_store`.
///
/// # Errors
/// A head dimension without a kernel, or what the device reports.
pub fn attend_split(runtime: &mut dyn Runtime, grid: AttendGrid, args: &AttendArgs) -> Result<(), CudaError> {
    let [split, _] = names(grid.head_dim)?;
    let blocks = grid.n_tiles as u32 * args.parts;
    let launch = Launch {
        grid: [blocks, args.n_kv_heads, grid.n_splits as u32],
        threads: 128,
        shared_bytes: (grid.head_dim * SPLIT_BYTES + SPLIT_OTHER_BYTES) as u32,
    };
    runtime.launch(split, launch, bytemuck::bytes_of(args))
}

/// Attention of many rows of a sequence: no partial results.
///
/// # Errors
/// A head dimension without a kernel, or what the device reports.
pub fn attend_tiles(runtime: &mut dyn Runtime, grid: AttendGrid, args: &AttendArgs) -> Result<(), CudaError> {
    let [_, tiles] = names(grid.head_dim)?;
    let launch = Launch {
        grid: [grid.n_tiles as u32 * args.parts, args.n_kv_heads, 1],
        threads: 128,
        shared_bytes: (grid.head_dim * (2 * TILE_ROWS + TILE_STAGES * CHUNK_BYTES)) as u32,
    };
    runtime.launch(tiles, launch, bytemuck::bytes_of(args))
}
