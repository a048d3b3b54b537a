//! Launch of the norm of kernels/norm.cu.

use crate::{CudaError, DevicePtr, Launch, Runtime};

const THREADS: u32 = 512;
/// Most columns of a row, for each of the kernels: a thread has two, or eight, pieces of four in registers.
const COLUMNS: u32 = 2 * 4 * THREADS;
const WIDE_COLUMNS: u32 = 8 * 4 * THREADS;

/// `AddNormArgs` of kernels/norm.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct AddNormArgs {
    /// The residual stream, `[n_rows][n_embd]` f32
    pub hidden: DevicePtr,
    /// `[n_rows][n_embd]` f32, added to `hidden`; or 0.
    pub delta: DevicePtr,
    /// `[n_embd]` f32
    pub weight: DevicePtr,
    /// The normalized rows as operand B.
    pub normed: DevicePtr,
    /// Counts of the batch.
    pub header: DevicePtr,
    /// `[n_output_rows]` u32: rows to norm, `hidden` stays as it is; or 0 for all rows.
    pub output_rows: DevicePtr,
    /// Columns, a multiple of 4.
    pub n_embd: u32,
    /// Padded columns of `normed`.
    pub k_padded: u32,
    /// Added to the mean of squares.
    pub epsilon: f32,
    /// Fills the struct up.
    pub unused: u32,
}

/// Kernels of this file and the bytes of their arguments.
pub const SIGNATURES: &[(&str, usize)] =
    &[("add_norm", size_of::<AddNormArgs>()), ("add_norm_wide", size_of::<AddNormArgs>())];

/// Adds to the residual stream and norms `n_rows` rows (or output rows) at most; rows that the batch does not have are left
/// alone.
///
/// # Errors
/// A width that is no multiple of 4 or too large, or what the device reports.
pub fn add_norm(runtime: &mut dyn Runtime, n_rows: usize, args: &AddNormArgs) -> Result<(), CudaError> {
    if !args.n_embd.is_multiple_of(4) {
        return Err(CudaError::Unfit(format!("rows of {} columns, not a multiple of 4", args.n_embd)));
    }
    if args.n_embd > WIDE_COLUMNS {
        let problem = format!("rows of {} columns, more than {WIDE_COLUMNS}", args.n_embd);
        return Err(CudaError::Unfit(problem));
    }
    let name = if args.n_embd > COLUMNS { "add_norm_wide" } else { "add_norm" };
    let grid = [n_rows as u32, 1, 1];
    let launch = Launch { grid, threads: THREADS, shared_bytes: THREADS / 32 * 4 };
    runtime.launch(name, launch, bytemuck::bytes_of(args))
}
