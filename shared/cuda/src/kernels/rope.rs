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
    /// A multiple of 32.
    pub head_dim: u32,
    /// Fills the struct up.
    pub unused: u32,
}

/// Kernels of this file and the bytes of their arguments.
pub const SIGNATURES: &[(&str, usize)] = &[("rotate_store", size_of::<RotateStoreArgs>())];

/// Turns queries and keys of `n_rows` rows at most and stores keys and values; rows that the batch does not have are left
/// alone.
///
/// # Errors
/// What the device reports.
pub fn rotate_store(
    runtime: &mut dyn Runtime,
    n_rows: usize,
    args: &RotateStoreArgs,
) -> Result<(), CudaError> {
    let launch = Launch { grid: [n_rows as u32, 1, 1], threads: 256, shared_bytes: 0 };
    runtime.launch("rotate_store", launch, bytemuck::bytes_of(args))
}
