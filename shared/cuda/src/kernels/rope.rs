//! Launch of the rotary embedding of kernels/rope.cu.

use crate::{CudaError, DevicePtr, Launch, Runtime};

/// `RotateStoreArgs` of kernels/rope.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RotateStoreArgs {
    /// `[n_rows][(n_heads + 2 * n_kv_heads) * head_dim]` f32
    pub qkv: DevicePtr,
    /// `[n_rows][n_heads][head_dim]` f16
    pub q: DevicePtr,
    /// Keys of one layer: `[block][n_kv_heads][16 * head_dim]` f16, ordered as `key_index` says.
    pub keys: DevicePtr,
    /// Values of one layer, ordered as `value_index` says.
    pub values: DevicePtr,
    /// `[position][head_dim / 2]` pairs of cosine and sine, f32.
    pub rotations: DevicePtr,
    /// Counts of the batch.
    pub header: DevicePtr,
    /// `[n_rows]` u32
    pub positions: DevicePtr,
    /// `[n_rows]` u32: where a row's block table begins in `tables`.
    pub table_of_row: DevicePtr,
    /// Block ids, u32.
    pub tables: DevicePtr,
    /// Query heads.
    pub n_heads: u32,
    /// KV heads.
    pub n_kv_heads: u32,
    /// A multiple of 32, at most 128.
    pub head_dim: u32,
    /// Fills the struct up.
    pub unused: u32,
}

/// Heads of a block, a warp each.
const HEADS: u32 = 4;
const MAX_HEAD_DIM: u32 = 128;

/// Kernels of this file and the bytes of their arguments.
pub const SIGNATURES: &[(&str, usize)] = &[("rotate_store", size_of::<RotateStoreArgs>())];

/// Turns queries and keys of `n_rows` rows at most and stores keys and values; rows that the batch does not have are left
/// alone.
///
/// # Errors
/// A head too large, or what the device reports.
pub fn rotate_store(
    runtime: &mut dyn Runtime,
    n_rows: usize,
    args: &RotateStoreArgs,
) -> Result<(), CudaError> {
    if args.head_dim > MAX_HEAD_DIM {
        return Err(CudaError::Unfit(format!(
            "heads of {} elements, more than {MAX_HEAD_DIM}",
            args.head_dim
        )));
    }
    let blocks_of_row = (args.n_heads + 2 * args.n_kv_heads).div_ceil(HEADS);
    let grid = [n_rows as u32, blocks_of_row, 1];
    let launch = Launch { grid, threads: 32 * HEADS, shared_bytes: 0 };
    runtime.launch("rotate_store", launch, bytemuck::bytes_of(args))
}
