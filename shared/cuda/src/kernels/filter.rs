//! Launch of the search for cuts of kernels/filter.cu. The results are those of `paceline_sampling::cut`.

use paceline_domain::SamplingParams;

use crate::{CudaError, DevicePtr, Launch, Runtime};

/// Most tokens that are ranked; a row that keeps more is left undecided.
pub const MAX_RANKED: usize = 1024;
/// `sizeof(Workspace)` of kernels/filter.cu.
const WORKSPACE_BYTES: u32 = 73_864;

/// `FilterRow` of kernels/filter.cu.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct FilterRow {
    /// 0 needs no filter.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 0 keeps all.
    pub top_k: u32,
}

impl FilterRow {
    /// The filters of a request.
    pub fn new(params: &SamplingParams) -> Self {
        let SamplingParams { temperature, top_p, min_p, top_k, .. } = *params;
        Self { temperature, top_p, min_p, top_k }
    }

    /// All tokens are kept.
    pub const OPEN: Self = Self { temperature: 0.0, top_p: 1.0, min_p: 0.0, top_k: 0 };
}

/// `Cut` of kernels/sampling.cuh: the last kept token in the order (logit falling, id rising).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct LastKept {
    /// Its logit.
    pub logit: f32,
    /// Its id.
    pub token: u32,
}

/// `CutArgs` of kernels/filter.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct CutArgs {
    /// `[n_output_rows][row_stride]` f32, a whole vocabulary each.
    pub logits: DevicePtr,
    /// `[n_output_rows]` [`FilterRow`]
    pub rows: DevicePtr,
    /// Counts of the batch.
    pub header: DevicePtr,
    /// `[n_output_rows]` [`LastKept`]
    pub cuts: DevicePtr,
    /// `[n_output_rows]` u32: 1 where the row must be filtered on the host.
    pub is_undecided: DevicePtr,
    /// Logits from a row to the next.
    pub row_stride: u32,
    /// Logits of a row that are tokens.
    pub n_tokens: u32,
}

/// Kernels of this file and the bytes of their arguments.
pub const SIGNATURES: &[(&str, usize)] = &[("find_cuts", size_of::<CutArgs>())];

/// Finds the cut of `n_rows` output rows at most.
///
/// # Errors
/// What the device reports.
pub fn find_cuts(runtime: &mut dyn Runtime, n_rows: usize, args: &CutArgs) -> Result<(), CudaError> {
    let launch = Launch { grid: [n_rows as u32, 1, 1], threads: 1024, shared_bytes: WORKSPACE_BYTES };
    runtime.launch("find_cuts", launch, bytemuck::bytes_of(args))
}
