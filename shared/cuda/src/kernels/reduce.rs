//! Launch of the sum of kernels/reduce.cu, and the tree as it reads it.

use paceline_domain::ReduceTree;

use crate::{CudaError, DevicePtr, Launch, Runtime};

const THREADS: u32 = 128;
/// The step that adds.
const ADD: i32 = -1;

/// `SumTreeArgs` of kernels/reduce.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SumTreeArgs {
    /// `[n_parts][part_elements]` f32
    pub parts: DevicePtr,
    /// `[n_steps]` i32, from [`TreeSteps`].
    pub steps: DevicePtr,
    /// `[n_rows][n_embd]` f32
    pub out: DevicePtr,
    /// Counts of the batch.
    pub header: DevicePtr,
    /// From one part to the next.
    pub part_elements: u64,
    /// Columns, a multiple of 4.
    pub n_embd: u32,
    /// Steps of the tree.
    pub n_steps: u32,
}

/// Kernels of this file and the bytes of their arguments.
pub const SIGNATURES: &[(&str, usize)] = &[("sum_tree", size_of::<SumTreeArgs>())];

/// A tree as a list of steps: a part to hold, or an addition of the two held last.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TreeSteps {
    /// What the kernel reads.
    pub steps: Vec<i32>,
    /// Most sums that are held at a time.
    pub n_held: usize,
    /// Parts that each rank brings, whether it has so many sums or not.
    pub n_parts: usize,
}

impl TreeSteps {
    /// Sum `i` of rank `r` is part `r * n_parts + i`.
    pub fn new(tree: &ReduceTree) -> Self {
        let n_parts = (0..tree.n_ranks()).map(|rank| tree.subtrees(rank).len()).max().unwrap_or(1);
        let add = |left: Vec<i32>, right: Vec<i32>| [left, right, vec![ADD]].concat();
        let steps = tree.finish(|rank, i| vec![(rank * n_parts + i) as i32], add);
        let mut held = 0;
        let mut holds = |step: &i32| {
            held = if *step == ADD { held - 1 } else { held + 1 };
            held
        };
        let n_held = steps.iter().map(&mut holds).max().unwrap_or(0);
        Self { steps, n_held, n_parts }
    }
}

/// Adds the parts of `n_rows` rows at most, of which `n_held` sums are held at a time; rows that the batch does not have
/// are left alone.
///
/// # Errors
/// A width that is no multiple of 4, or what the device reports.
pub fn sum_tree(
    runtime: &mut dyn Runtime,
    n_rows: usize,
    n_held: usize,
    args: &SumTreeArgs,
) -> Result<(), CudaError> {
    if !args.n_embd.is_multiple_of(4) {
        return Err(CudaError::Unfit(format!("rows of {} columns, not a multiple of 4", args.n_embd)));
    }
    let n_blocks = (n_rows as u32 * (args.n_embd / 4)).div_ceil(THREADS);
    let shared_bytes = n_held as u32 * THREADS * 16;
    let launch = Launch { grid: [n_blocks, 1, 1], threads: THREADS, shared_bytes };
    runtime.launch("sum_tree", launch, bytemuck::bytes_of(args))
}
