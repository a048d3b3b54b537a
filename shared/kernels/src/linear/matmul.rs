//! Cuts matrix products that share their input into tasks for the thread pool.

use super::tile::{TileProduct, with_stack};
use super::{MAX_TOKENS, RowSums};
use crate::Kernels;
use crate::packed::{InputKind, PackedMatrix, TILE_ROWS};
use crate::pool::{SharedSlice, ThreadPool};
use crate::quantize::QuantizedRows;
use std::ops::Range;

/// Weights of one task in bytes, while tokens are few: large against the cost of claiming a task.
const TASK_BYTES: usize = 32 * 1024;
/// Tokens of one task: while it lasts, its tiles stay in the nearest caches.
pub(super) const TASK_TOKENS: usize = 64;
/// Tasks wanted for each thread, so that a slow one does not delay the end.
const TASKS_PER_THREAD: usize = 4;

/// Rows of activations. Matrices of plain numbers take them as such, quantized ones take quantized rows; what no
/// matrix takes may be absent.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// Number of rows, which are tokens here.
    pub n_rows: usize,
    /// The rows quantized.
    pub quantized: Option<&'a QuantizedRows>,
    /// The rows as they are, `[n_rows, n_cols]`.
    pub float: &'a [f32],
}

/// A matrix and where its product goes.
pub struct Product<'a> {
    /// The matrix.
    pub matrix: &'a PackedMatrix,
    /// Added to each row of the product.
    pub bias: Option<&'a [f32]>,
    /// `[n_subtrees, n_tokens, n_rows]`: partial sums of the canonical tree, whose order is the rank's leaf order.
    pub out: &'a mut [f32],
}

/// Multiplies every input row with each of the matrices.
///
/// # Panics
/// When shapes do not fit, the input lacks what a matrix takes, or there is a bias and not exactly one subtree.
pub fn matmul<const N: usize>(
    kernels: &'static Kernels,
    pool: &ThreadPool,
    input: Input<'_>,
    products: [Product<'_>; N],
) {
    let parts = products.map(|Product { matrix, bias, out }| {
        check_input(matrix, &input);
        let n_expected = matrix.n_subtrees() * input.n_rows * matrix.n_rows();
        assert_eq!(
            out.len(),
            n_expected,
            "invariant: the output holds each row of each token of each subtree"
        );
        let bias_fits = bias.is_none_or(|bias| bias.len() == matrix.n_rows() && matrix.n_subtrees() == 1);
        assert!(bias_fits, "invariant: a bias has an element for each output row of a whole product");
        let product = TileProduct { kernels, matrix, input, ahead: pool.ahead().bytes(input.n_rows) };
        let tasks = TileTasks::new(pool, matrix.n_tiles(), matrix.tile_bytes(), input.n_rows);
        Part { product, bias, out: SharedSlice::new(out), tasks }
    });
    let n_tile_tasks: usize = parts.iter().map(|part| part.tasks.len()).sum();
    if n_tile_tasks == 0 {
        return;
    }
    pool.run(n_tile_tasks * input.n_rows.div_ceil(TASK_TOKENS), &|task| {
        let tokens = task_tokens(task / n_tile_tasks, input.n_rows);
        let mut of_part = task % n_tile_tasks;
        for part in &parts {
            if of_part < part.tasks.len() {
                let tiles = part.tasks.tiles(of_part);
                let read = (tiles.len() * part.product.matrix.tile_bytes(), input.n_rows);
                return pool.ahead().during(task, read, || part.run_task(tiles, &tokens));
            }
            of_part -= part.tasks.len();
        }
    });
}

pub(super) fn task_tokens(block: usize, n_tokens: usize) -> Range<usize> {
    block * TASK_TOKENS..n_tokens.min((block + 1) * TASK_TOKENS)
}

pub(super) fn check_input(matrix: &PackedMatrix, input: &Input<'_>) {
    match matrix.input_kind() {
        InputKind::Quantized => {
            let rows = input.quantized.expect("invariant: the input of a quantized matrix is quantized");
            assert_eq!(rows.n_rows(), input.n_rows, "invariant: all rows are quantized");
            // A rank without columns has nothing to quantize.
            let n_cols = if matrix.n_cols() == 0 { 0 } else { rows.n_cols() };
            assert_eq!(n_cols, matrix.n_cols(), "invariant: input rows are as long as the matrix is wide");
        }
        InputKind::Float => {
            let n_expected = input.n_rows * matrix.n_cols();
            assert_eq!(
                input.float.len(),
                n_expected,
                "invariant: input rows are as long as the matrix is wide"
            );
        }
    }
}

/// The tiles of a matrix (or pairs of them) in tasks of neighbours.
pub(super) struct TileTasks {
    n_tiles: usize,
    tiles_per_task: usize,
}

impl TileTasks {
    pub(super) fn new(pool: &ThreadPool, n_tiles: usize, tile_bytes: usize, n_tokens: usize) -> Self {
        let fair_tiles = n_tiles.div_ceil(TASKS_PER_THREAD * pool.n_threads());
        let task_bytes = tile_bytes.max(1) * n_tokens.min(TASK_TOKENS).div_ceil(MAX_TOKENS).max(1);
        let tiles_per_task = (TASK_BYTES / task_bytes).clamp(1, fair_tiles.max(1));
        Self { n_tiles, tiles_per_task }
    }

    pub(super) fn len(&self) -> usize {
        self.n_tiles.div_ceil(self.tiles_per_task)
    }

    pub(super) fn tiles(&self, task: usize) -> Range<usize> {
        task * self.tiles_per_task..self.n_tiles.min((task + 1) * self.tiles_per_task)
    }
}

/// One product among those of a call.
struct Part<'a> {
    product: TileProduct<'a>,
    bias: Option<&'a [f32]>,
    out: SharedSlice<'a, f32>,
    tasks: TileTasks,
}

impl Part<'_> {
    fn run_task(&self, tiles: Range<usize>, tokens: &Range<usize>) {
        with_stack(|stack| {
            for tile in tiles {
                self.product.run(tile, tokens, stack, &mut |subtree, first_token, sums| {
                    self.write(tile, subtree, first_token, sums);
                });
            }
        });
    }

    fn write(&self, tile: usize, subtree: usize, first_token: usize, sums: &[RowSums]) {
        let (n_rows, n_tokens) = (self.product.matrix.n_rows(), self.product.input.n_rows);
        let rows = tile * TILE_ROWS..n_rows.min((tile + 1) * TILE_ROWS);
        let start = (subtree * n_tokens + first_token) * n_rows;
        // SAFETY: each task has its own tiles and tokens, and each (subtree, token, tile) its own range.
        let out = unsafe { self.out.strided_mut(start + rows.start..start + rows.end, n_rows, sums.len()) };
        // SAFETY: a table of kernels exists only on a CPU that has its instruction set.
        unsafe { (self.product.kernels.linear.write_rows)(sums, self.bias.map(|bias| &bias[rows]), out) };
    }
}
