//! The first half of a gated feed-forward network in one pass over the weights: `silu(gate x) * up x`, quantized for
//! the matrix that follows. Its steps are those of the kernels it is made of, one after the other; no bit differs.

use super::matmul::{Input, TASK_TOKENS, TileTasks, check_input, task_tokens};
use super::tile::{Stack, TileProduct, with_stack};
use crate::Kernels;
use crate::error::KernelError;
use crate::formats::GROUP_LEN;
use crate::packed::{PackSpec, PackedMatrix, RowBytes, TILE_ROWS};
use crate::pool::{SharedSlice, ThreadPool};
use crate::quantize::{BLOCK_ROWS, BlockInput, CodeBits, QuantizedRows, SharedRows};
use std::cell::RefCell;
use std::ops::Range;

/// Tiles whose rows make one group of the next matrix's input.
const GROUP_TILES: usize = GROUP_LEN / TILE_ROWS;

/// Where `silu(gate x) * up x`, `[n_tokens, n_rows]`, goes.
pub enum GatedOutput<'a> {
    /// Quantized with codes of so many bits.
    Quantized(&'a mut QuantizedRows, CodeBits),
    /// As it is.
    Float(&'a mut [f32]),
}

/// The two matrices of a gated network.
pub enum GateUp {
    /// Groups of 32 rows of the gate and as many of the values take turns in one matrix: a thread reads one stream of memory.
    InTurns(PackedMatrix),
    /// They differ in type, or do not consist of whole groups.
    Apart([PackedMatrix; 2]),
}

impl GateUp {
    /// Packs the gate and the values, as [`PackedMatrix::pack`] does.
    ///
    /// # Errors
    /// As there.
    pub fn pack(
        [gate, up]: [&PackSpec; 2],
        rows: [RowBytes<'_, '_>; 2],
        pool: &ThreadPool,
    ) -> Result<Self, KernelError> {
        if gate != up || !gate.n_rows.is_multiple_of(GROUP_LEN) {
            let [gate_rows, up_rows] = rows;
            let gate = PackedMatrix::pack(gate, gate_rows, pool)?;
            return Ok(Self::Apart([gate, PackedMatrix::pack(up, up_rows, pool)?]));
        }
        let both = PackSpec { n_rows: 2 * gate.n_rows, ..gate.clone() };
        let row = |row: usize| {
            let turn = row / GROUP_LEN;
            rows[turn % 2](turn / 2 * GROUP_LEN + row % GROUP_LEN)
        };
        Ok(Self::InTurns(PackedMatrix::pack(&both, &row, pool)?))
    }

    /// What was packed.
    pub fn matrices(&self) -> &[PackedMatrix] {
        match self {
            Self::InTurns(both) => std::slice::from_ref(both),
            Self::Apart(matrices) => matrices,
        }
    }

    /// Gates, which are as many as values.
    fn n_rows(&self) -> usize {
        match self {
            Self::InTurns(both) => both.n_rows() / 2,
            Self::Apart([gate, _]) => gate.n_rows(),
        }
    }

    /// Bytes of a group of both.
    fn group_bytes(&self) -> usize {
        match self {
            Self::InTurns(both) => 2 * GROUP_TILES * both.tile_bytes(),
            Self::Apart([gate, up]) => GROUP_TILES * (gate.tile_bytes() + up.tile_bytes()),
        }
    }

    /// Where a group of the gate and one of the values are: a matrix and its first tile.
    fn group(&self, group: usize) -> [(&PackedMatrix, usize); 2] {
        let first = group * GROUP_TILES;
        match self {
            Self::InTurns(both) => [(both, 2 * first), (both, 2 * first + GROUP_TILES)],
            Self::Apart([gate, up]) => [(gate, first), (up, first)],
        }
    }
}

enum SharedOutput<'a> {
    Quantized(SharedRows<'a>),
    Float(SharedSlice<'a, f32>),
}

/// Rows of one group of all tokens of a task.
type GroupRows = [[f32; GROUP_LEN]; TASK_TOKENS];

thread_local! {
    static GATE_AND_UP: RefCell<Box<[GroupRows; 2]>> =
        RefCell::new(Box::new([[[0.0; GROUP_LEN]; TASK_TOKENS]; 2]));
}

/// `silu(gate x) * up x` for every input row x.
///
/// # Panics
/// When shapes do not fit, the input lacks what a matrix takes, or a matrix is cut along its columns.
pub fn gated_matmul(
    kernels: &'static Kernels,
    pool: &ThreadPool,
    input: Input<'_>,
    weights: &GateUp,
    out: GatedOutput<'_>,
) {
    for matrix in weights.matrices() {
        check_input(matrix, &input);
        assert!(matrix.n_subtrees() <= 1, "invariant: the matrix has all its columns");
    }
    if let GateUp::Apart([gate, up]) = weights {
        assert_eq!(gate.n_rows(), up.n_rows(), "invariant: each gate belongs to one value");
    }
    let (n_rows, n_tokens) = (weights.n_rows(), input.n_rows);
    let out = match out {
        GatedOutput::Quantized(rows, bits) => {
            rows.reshape(n_tokens, n_rows, bits);
            SharedOutput::Quantized(rows.shared())
        }
        GatedOutput::Float(out) => {
            assert_eq!(out.len(), n_tokens * n_rows, "invariant: the output holds each row of each token");
            SharedOutput::Float(SharedSlice::new(out))
        }
    };
    let n_groups = n_rows.div_ceil(GROUP_LEN);
    let group_bytes = weights.group_bytes();
    let tasks = TileTasks::new(pool, n_groups, group_bytes, n_tokens);
    if n_groups == 0 {
        return;
    }
    let ahead = pool.ahead().bytes(n_tokens);
    let gated = Gated { kernels, weights, input, ahead, n_rows, out };
    pool.run(tasks.len() * n_tokens.div_ceil(TASK_TOKENS), &|task| {
        let tokens = task_tokens(task / tasks.len(), n_tokens);
        let groups = tasks.tiles(task % tasks.len());
        pool.ahead().during(task, (groups.len() * group_bytes, n_tokens), || {
            with_stack(|stack| groups.for_each(|group| gated.run_group(group, &tokens, stack)));
        });
    });
}

struct Gated<'a> {
    kernels: &'static Kernels,
    weights: &'a GateUp,
    input: Input<'a>,
    ahead: usize,
    n_rows: usize,
    out: SharedOutput<'a>,
}

impl Gated<'_> {
    fn run_group(&self, group: usize, tokens: &Range<usize>, stack: &mut Stack) {
        let rows = group * GROUP_LEN..self.n_rows.min((group + 1) * GROUP_LEN);
        GATE_AND_UP.with_borrow_mut(|gate_and_up| {
            let Self { kernels, input, ahead, .. } = *self;
            for ((matrix, first), values) in self.weights.group(group).into_iter().zip(gate_and_up.iter_mut())
            {
                let product = TileProduct { kernels, matrix, input, ahead };
                let values = SharedSlice::new(values.as_flattened_mut());
                for half in 0..rows.len().div_ceil(TILE_ROWS) {
                    product.run(first + half, tokens, stack, &mut |_, first_token, sums| {
                        let start = (first_token - tokens.start) * GROUP_LEN + half * TILE_ROWS;
                        // SAFETY: nothing else uses the values of this thread.
                        let out =
                            unsafe { values.strided_mut(start..start + TILE_ROWS, GROUP_LEN, sums.len()) };
                        // SAFETY: a table of kernels exists only on a CPU that has its instruction set.
                        unsafe { (kernels.linear.write_rows)(sums, None, out) };
                    });
                }
            }
            let [gate, up] = &mut **gate_and_up;
            let (gate, up) = (&mut gate[..tokens.len()], &up[..tokens.len()]);
            // SAFETY: a table of kernels exists only on a CPU that has its instruction set.
            unsafe { (self.kernels.silu_mul)(gate.as_flattened_mut(), up.as_flattened()) };
            self.write(group, &rows, tokens, gate);
        });
    }

    fn write(&self, group: usize, rows: &Range<usize>, tokens: &Range<usize>, values: &[[f32; GROUP_LEN]]) {
        match &self.out {
            SharedOutput::Quantized(out) => {
                for (block, values) in (tokens.start / BLOCK_ROWS..).zip(values.chunks(BLOCK_ROWS)) {
                    let x = BlockInput { x: values.as_flattened(), stride: GROUP_LEN, n_cols: rows.len() };
                    // SAFETY: each group of each token block belongs to one task.
                    unsafe { out.quantize_block(self.kernels, block, group..group + 1, &x) };
                }
            }
            SharedOutput::Float(out) => {
                for (token, values) in tokens.clone().zip(values) {
                    let start = token * self.n_rows;
                    // SAFETY: each group of each token belongs to one task.
                    let out = unsafe { out.range_mut(start + rows.start..start + rows.end) };
                    out.copy_from_slice(&values[..rows.len()]);
                }
            }
        }
    }
}

const _: () = assert!(TASK_TOKENS.is_multiple_of(BLOCK_ROWS));
