//! Cuts a matrix product into tasks for the thread pool and adds the leaves up. The sums of a leaf are made by the
//! kernels of the dispatch table.

use super::{FloatLeaf, MAX_TOKENS, QuantizedLeaf, RowSums};
use crate::Kernels;
use crate::formats::GROUP_LEN;
use crate::packed::{InputKind, Leaf, MAX_DEPTH, PackedMatrix, TILE_ROWS};
use crate::pool::{SharedSlice, ThreadPool};
use crate::quantize::QuantizedRows;
use std::ops::Range;

/// Weights of one task in bytes, while tokens are few: large against the cost of claiming a task.
const TASK_BYTES: usize = 32 * 1024;
/// Tokens of one task: while it lasts, its tiles stay in the nearest caches.
const TASK_TOKENS: usize = 64;
/// Tasks wanted for each thread, so that a slow one does not delay the end.
const TASKS_PER_THREAD: usize = 4;

/// Rows of activations.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// For quantized weights.
    Quantized(&'a QuantizedRows),
    /// For plain numbers: `[n_rows, n_cols]`.
    Float {
        /// The elements.
        x: &'a [f32],
        /// Number of rows.
        n_rows: usize,
    },
}

impl Input<'_> {
    /// Number of rows, which are tokens here.
    pub fn n_rows(&self) -> usize {
        match self {
            Input::Quantized(rows) => rows.n_rows(),
            Input::Float { n_rows, .. } => *n_rows,
        }
    }
}

/// Multiplies every input row with the matrix. `out` has the shape `[n_subtrees, n_tokens, n_rows]`: partial sums
/// of the canonical tree, whose order is the rank's leaf order.
///
/// # Panics
/// When shapes or the kind of input do not fit.
pub fn matmul(
    kernels: &'static Kernels,
    pool: &ThreadPool,
    matrix: &PackedMatrix,
    input: Input<'_>,
    out: &mut [f32],
) {
    let n_tokens = input.n_rows();
    check_shapes(matrix, input, out.len());
    let product = Product { kernels, matrix, input, n_tokens, out: SharedSlice::new(out) };
    let n_tiles = matrix.n_tiles();
    let tokens_per_task = n_tokens.min(TASK_TOKENS);
    let fair_tiles = n_tiles.div_ceil(TASKS_PER_THREAD * pool.n_threads());
    let task_bytes = matrix.tile_bytes().max(1) * tokens_per_task.div_ceil(MAX_TOKENS).max(1);
    let tiles_per_task = (TASK_BYTES / task_bytes).clamp(1, fair_tiles.max(1));
    let n_tile_tasks = n_tiles.div_ceil(tiles_per_task);
    pool.run(n_tile_tasks * n_tokens.div_ceil(TASK_TOKENS), &|task| {
        let first_tile = task % n_tile_tasks * tiles_per_task;
        let first_token = task / n_tile_tasks * TASK_TOKENS;
        let tiles = first_tile..n_tiles.min(first_tile + tiles_per_task);
        product.run_task(tiles, first_token..n_tokens.min(first_token + TASK_TOKENS));
    });
}

fn check_shapes(matrix: &PackedMatrix, input: Input<'_>, n_out: usize) {
    let n_tokens = input.n_rows();
    match input {
        Input::Quantized(rows) => {
            assert_eq!(
                matrix.input_kind(),
                InputKind::Quantized,
                "invariant: the matrix takes quantized rows"
            );
            // A rank without columns has nothing to quantize.
            let n_cols = if matrix.n_cols() == 0 { 0 } else { rows.n_cols() };
            assert_eq!(n_cols, matrix.n_cols(), "invariant: input rows are as long as the matrix is wide");
        }
        Input::Float { x, .. } => {
            assert_eq!(matrix.input_kind(), InputKind::Float, "invariant: the matrix takes f32 rows");
            assert_eq!(
                x.len(),
                n_tokens * matrix.n_cols(),
                "invariant: input rows are as long as the matrix is wide"
            );
        }
    }
    let n_expected = matrix.n_subtrees() * n_tokens * matrix.n_rows();
    assert_eq!(n_out, n_expected, "invariant: the output holds each row of each token of each subtree");
}

/// What the tasks of one product share.
struct Product<'a> {
    kernels: &'static Kernels,
    matrix: &'a PackedMatrix,
    input: Input<'a>,
    n_tokens: usize,
    /// `[n_subtrees, n_tokens, n_rows]`
    out: SharedSlice<'a, f32>,
}

/// Sums waiting for their right neighbours.
type Stack = [[RowSums; MAX_TOKENS]; MAX_DEPTH];

impl Product<'_> {
    fn run_task(&self, tiles: Range<usize>, tokens: Range<usize>) {
        let mut stack: Stack = [[[0.0; TILE_ROWS]; MAX_TOKENS]; MAX_DEPTH];
        for tile in tiles {
            let mut first = tokens.start;
            while first < tokens.end {
                // The largest power of two, so that kernels exist for few token counts only.
                let n = 1 << (tokens.end - first).min(MAX_TOKENS).ilog2();
                self.run_tile(tile, first..first + n, &mut stack);
                first += n;
            }
        }
    }

    /// All leaves of one tile for at most [`MAX_TOKENS`] tokens.
    fn run_tile(&self, tile: usize, tokens: Range<usize>, stack: &mut Stack) {
        let n = tokens.len();
        let (mut depth, mut subtree) = (0, 0);
        for leaf in self.matrix.leaves() {
            self.sum_leaf(tile, leaf, tokens.start, &mut stack[depth][..n]);
            for _ in 0..leaf.n_adds {
                let (left, right) = stack.split_at_mut(depth);
                add(&mut left[depth - 1][..n], &right[0][..n]);
                depth -= 1;
            }
            depth += 1;
            if leaf.ends_subtree {
                self.write(tile, subtree, tokens.start, &stack[0][..n]);
                subtree += 1;
                depth = 0;
            }
        }
    }

    fn sum_leaf(&self, tile: usize, leaf: &Leaf, first_token: usize, sums: &mut [RowSums]) {
        let weight_type = self.matrix.weight_type();
        match self.input {
            Input::Quantized(rows) => {
                let leaf = self.quantized_leaf(tile, leaf, rows, first_token);
                // SAFETY: a table of kernels exists only on a CPU that has its instruction set.
                unsafe { (self.kernels.linear.quantized(weight_type))(&leaf, sums) }
            }
            Input::Float { x, .. } => {
                let n_cols = self.matrix.n_cols();
                let column_bytes = TILE_ROWS * weight_type.block_bytes();
                let weights: &[u8] = bytemuck::cast_slice(self.matrix.tile(tile));
                let leaf = FloatLeaf {
                    weights: &weights[leaf.columns.start * column_bytes..leaf.columns.end * column_bytes],
                    n_cols: leaf.columns.len(),
                    tokens: &x[first_token * n_cols + leaf.columns.start..],
                    stride: n_cols,
                };
                // SAFETY: a table of kernels exists only on a CPU that has its instruction set.
                unsafe { (self.kernels.linear.float(weight_type))(&leaf, sums) }
            }
        }
    }

    fn quantized_leaf<'b>(
        &'b self,
        tile: usize,
        leaf: &Leaf,
        rows: &'b QuantizedRows,
        first_token: usize,
    ) -> QuantizedLeaf<'b> {
        let groups = leaf.columns.start / GROUP_LEN..leaf.columns.end / GROUP_LEN;
        QuantizedLeaf {
            weights: self.matrix.layout().part(self.matrix.tile(tile), &groups),
            n_groups: groups.len(),
            tokens: &rows.groups()[first_token * rows.n_groups() + groups.start..],
            stride: rows.n_groups(),
        }
    }

    fn write(&self, tile: usize, subtree: usize, first_token: usize, sums: &[RowSums]) {
        let n_rows = self.matrix.n_rows();
        let first_row = tile * TILE_ROWS;
        let n = TILE_ROWS.min(n_rows - first_row);
        for (idx, sums) in sums.iter().enumerate() {
            let start = (subtree * self.n_tokens + first_token + idx) * n_rows + first_row;
            // SAFETY: each task has its own tiles and tokens, and each (subtree, token, tile) its own range.
            let out = unsafe { self.out.range_mut(start..start + n) };
            out.copy_from_slice(&sums[..n]);
        }
    }
}

/// `left += right`.
fn add(left: &mut [RowSums], right: &[RowSums]) {
    for (left, right) in left.as_flattened_mut().iter_mut().zip(right.as_flattened()) {
        *left += right;
    }
}
