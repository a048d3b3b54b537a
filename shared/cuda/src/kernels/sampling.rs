//! Launches of sampling of kernels/sampling.cu, and its inputs from the parameters of requests. The results are those of
//! the crate `paceline-sampling`, bit for bit.

use paceline_model::logits::{Choice, Columns};
use paceline_sampling::has_penalty;

use crate::{CudaError, DevicePtr, Launch, Runtime};

const THREADS: u32 = 256;
/// Most blocks that share a row, and the logits that are worth one.
const MAX_PARTS: u32 = 32;
const TOKENS_OF_PART: u32 = 4096;

/// `SampleRow` of kernels/sampling.cu: how a row is sampled.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampleRow {
    /// Of the request.
    pub seed: u64,
    /// Of the token to be sampled.
    pub position: u32,
    /// 0 takes the best logit.
    pub temperature: f32,
}

/// `Candidate` of kernels/sampling.cu: the best token.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BestToken {
    /// Its logit with noise.
    pub value: f32,
    /// Its id.
    pub token: u32,
}

/// `BestArgs` of kernels/sampling.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BestArgs {
    /// `[n_output_rows][row_stride]` f32
    pub logits: DevicePtr,
    /// `[n_output_rows]` [`SampleRow`]
    pub rows: DevicePtr,
    /// `[n_output_rows]` last kept logit (f32) and token (u32); or 0.
    pub cuts: DevicePtr,
    /// Counts of the batch.
    pub header: DevicePtr,
    /// `[n_output_rows][n_parts]` [`BestToken`]
    pub of_part: DevicePtr,
    /// `[n_output_rows]` [`BestToken`]
    pub best: DevicePtr,
    /// Logits from a row to the next.
    pub row_stride: u32,
    /// Token of the first logit.
    pub vocab_start: u32,
    /// Logits of a row that are tokens.
    pub n_tokens: u32,
    /// [`n_parts`]
    pub n_parts: u32,
}

/// `Adjustment` of kernels/sampling.cu.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Adjustment {
    /// Row of logits.
    pub row: u32,
    /// Token less `vocab_start`.
    pub column: u32,
    /// How often it is in the output.
    pub n_output: u32,
    /// [`Adjustment::PENALTIES`], [`Adjustment::BIAS`] or both.
    pub kinds: u32,
    /// Repetition penalty.
    pub repetition: f32,
    /// Presence penalty.
    pub presence: f32,
    /// Frequency penalty.
    pub frequency: f32,
    /// Added at last.
    pub bias: f32,
}

impl Adjustment {
    /// Penalties are applied.
    pub const PENALTIES: u32 = 1;
    /// The bias is added.
    pub const BIAS: u32 = 2;
}

/// `AdjustArgs` of kernels/sampling.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct AdjustArgs {
    /// `[n_output_rows][row_stride]` f32
    pub logits: DevicePtr,
    /// [`Adjustment`]s, no two of the same token of a row.
    pub adjustments: DevicePtr,
    /// `[n_adjustments]` f32, filled with the logits as they were.
    pub before: DevicePtr,
    /// Logits from a row to the next.
    pub row_stride: u32,
    /// Their number.
    pub n_adjustments: u32,
}

/// Kernels of this file and the bytes of their arguments.
pub const SIGNATURES: &[(&str, usize)] = &[
    ("adjust_logits", size_of::<AdjustArgs>()),
    ("best_of_parts", size_of::<BestArgs>()),
    ("best_of_rows", size_of::<BestArgs>()),
    ("restore_logits", size_of::<AdjustArgs>()),
];

/// Appends what penalties and bias change in the row of a choice; one entry for each token.
pub fn adjustments(choice: &Choice<'_>, columns: Columns, out: &mut Vec<Adjustment>) {
    let Choice { row, position, sampling, history } = *choice;
    let Columns { first_token, n_usable } = columns;
    let of = |column: u32| Adjustment {
        row: row as u32,
        column,
        n_output: 0,
        kinds: 0,
        repetition: sampling.repetition_penalty,
        presence: sampling.presence_penalty,
        frequency: sampling.frequency_penalty,
        bias: 0.0,
    };
    let start = out.len();
    if has_penalty(sampling) {
        let counts = history.counts_before(position, first_token.0, n_usable);
        out.extend(counts.map(|(column, count)| Adjustment {
            n_output: count.n_output,
            kinds: Adjustment::PENALTIES,
            ..of(column as u32)
        }));
    }
    // So far they are in order of columns.
    let end = out.len();
    let columns = first_token.0..first_token.0 + n_usable as u32;
    for (token, bias) in sampling.logit_bias.iter().filter(|(token, _)| columns.contains(&token.0)) {
        let column = token.0 - first_token.0;
        match out[start..end].binary_search_by_key(&column, |counted| counted.column) {
            Ok(i) => {
                let counted = &mut out[start + i];
                (counted.kinds, counted.bias) = (Adjustment::PENALTIES | Adjustment::BIAS, *bias);
            }
            Err(_) => out.push(Adjustment { kinds: Adjustment::BIAS, bias: *bias, ..of(column) }),
        }
    }
}

/// Blocks that share a row of `n_tokens` logits. Changes no result.
pub fn n_parts(n_tokens: u32) -> u32 {
    n_tokens.div_ceil(TOKENS_OF_PART).clamp(1, MAX_PARTS)
}

/// Finds the best token of `n_rows` output rows at most.
///
/// # Errors
/// What the device reports.
pub fn best_tokens(runtime: &mut dyn Runtime, n_rows: usize, args: &BestArgs) -> Result<(), CudaError> {
    let grid = [n_rows as u32, args.n_parts, 1];
    let launch =
        Launch { grid, threads: THREADS, shared_bytes: THREADS / 32 * size_of::<BestToken>() as u32 };
    runtime.launch("best_of_parts", launch, bytemuck::bytes_of(args))?;
    let launch = Launch { grid: [n_rows as u32, 1, 1], threads: 32, shared_bytes: 0 };
    runtime.launch("best_of_rows", launch, bytemuck::bytes_of(args))
}

/// Applies penalties and biases.
///
/// # Errors
/// What the device reports.
pub fn adjust_logits(runtime: &mut dyn Runtime, args: &AdjustArgs) -> Result<(), CudaError> {
    runtime.launch("adjust_logits", adjustment_launch(args), bytemuck::bytes_of(args))
}

/// Puts the logits back as they were before [`adjust_logits`].
///
/// # Errors
/// What the device reports.
pub fn restore_logits(runtime: &mut dyn Runtime, args: &AdjustArgs) -> Result<(), CudaError> {
    runtime.launch("restore_logits", adjustment_launch(args), bytemuck::bytes_of(args))
}

fn adjustment_launch(args: &AdjustArgs) -> Launch {
    let blocks = args.n_adjustments.div_ceil(THREADS).max(1);
    Launch { grid: [blocks, 1, 1], threads: THREADS, shared_bytes: 0 }
}
