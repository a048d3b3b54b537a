//! One tile for some tokens: its leaves are summed by the kernels of the dispatch table and added up as the canonical
//! tree says. How tiles become tasks is not known here.

use super::{Fetch, FloatLeaf, Input, MAX_TOKENS, QuantizedLeaf, RowSums};
use crate::Kernels;
use crate::cache::is_nearest_roomy;
use crate::formats::GROUP_LEN;
use crate::packed::{InputKind, Leaf, MAX_DEPTH, PackedMatrix, TILE_ROWS};
use crate::quantize::{Place, QuantizedRows, SCALE_WORDS};
use std::cell::RefCell;
use std::ops::Range;

/// Sums waiting for their right neighbours.
pub(super) type Stack = [[RowSums; MAX_TOKENS]; MAX_DEPTH];

thread_local! {
    static STACK: RefCell<Box<Stack>> = RefCell::new(Box::new([[[0.0; TILE_ROWS]; MAX_TOKENS]; MAX_DEPTH]));
}

/// Lends the thread's stack.
pub(super) fn with_stack<R>(work: impl FnOnce(&mut Stack) -> R) -> R {
    STACK.with_borrow_mut(|stack| work(stack))
}

/// A matrix and what it is multiplied with.
#[derive(Clone, Copy)]
pub(super) struct TileProduct<'a> {
    pub kernels: &'static Kernels,
    pub matrix: &'a PackedMatrix,
    pub input: Input<'a>,
    /// How far ahead weights are fetched, in bytes.
    pub ahead: usize,
}

impl TileProduct<'_> {
    /// Calls `finish(subtree, first_token, sums)` for each subtree and at most [`MAX_TOKENS`] of the tokens at a
    /// time.
    pub(super) fn run(
        &self,
        tile: usize,
        tokens: &Range<usize>,
        stack: &mut Stack,
        finish: &mut dyn FnMut(usize, usize, &[RowSums]),
    ) {
        let mut first = tokens.start;
        let mut fetch =
            if is_nearest_roomy() { Fetch::Nearest(self.ahead) } else { Fetch::Second(self.ahead) };
        while first < tokens.end {
            // Tokens that lie side by side; see `QuantizedRows`.
            let end = tokens.end.min((first / MAX_TOKENS + 1) * MAX_TOKENS);
            self.run_block(tile, first..end, fetch, stack, finish);
            // Later tokens find the tile in the caches.
            (first, fetch) = (end, Fetch::Nowhere);
        }
    }

    fn run_block(
        &self,
        tile: usize,
        tokens: Range<usize>,
        fetch: Fetch,
        stack: &mut Stack,
        finish: &mut dyn FnMut(usize, usize, &[RowSums]),
    ) {
        let n = tokens.len();
        let (mut depth, mut subtree) = (0, 0);
        for leaf in self.matrix.leaves() {
            // The first addition is the kernel's.
            let adds = leaf.n_adds > 0;
            depth -= usize::from(adds);
            self.sum_leaf(tile, leaf, (tokens.start, fetch, adds), &mut stack[depth][..n]);
            for _ in 1..leaf.n_adds {
                let (left, right) = stack.split_at_mut(depth);
                let (left, right) = (left[depth - 1][..n].as_flattened_mut(), right[0][..n].as_flattened());
                // SAFETY: a table of kernels exists only on a CPU that has its instruction set.
                unsafe { (self.kernels.add_into)(left, right) };
                depth -= 1;
            }
            depth += 1;
            if leaf.ends_subtree {
                finish(subtree, tokens.start, &stack[0][..n]);
                subtree += 1;
                depth = 0;
            }
        }
    }

    /// Sums a leaf for the tokens from one on; `adds` says whether to its left neighbour.
    fn sum_leaf(
        &self,
        tile: usize,
        leaf: &Leaf,
        (first_token, fetch, adds): (usize, Fetch, bool),
        sums: &mut [RowSums],
    ) {
        let weight_type = self.matrix.weight_type();
        match (self.matrix.input_kind(), self.input.quantized) {
            (InputKind::Quantized, Some(rows)) => {
                let leaf =
                    QuantizedLeaf { fetch, adds, ..self.quantized_leaf(tile, leaf, rows, first_token) };
                // SAFETY: a table of kernels exists only on a CPU that has its instruction set.
                unsafe { (self.kernels.linear.quantized(weight_type, rows.bits()))(&leaf, sums) }
            }
            (InputKind::Quantized, None) => unreachable!("invariant: inputs are checked before tasks start"),
            (InputKind::Float, _) => {
                let n_cols = self.matrix.n_cols();
                let column_bytes = TILE_ROWS * weight_type.block_bytes();
                let weights: &[u8] = bytemuck::cast_slice(self.matrix.tile(tile));
                let leaf = FloatLeaf {
                    weights: &weights[leaf.columns.start * column_bytes..leaf.columns.end * column_bytes],
                    n_cols: leaf.columns.len(),
                    tokens: &self.input.float[first_token * n_cols + leaf.columns.start..],
                    stride: n_cols,
                    fetch,
                    adds,
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
        let Place { step, first_group, row } = rows.place(first_token);
        let first = first_group + groups.start * step;
        QuantizedLeaf {
            weights: self.matrix.layout().part(self.matrix.tile(tile), groups.start),
            n_groups: groups.len(),
            codes: &rows.codes()[(first + row) * rows.bits().n_planes()..],
            scales: &rows.scales()[first * SCALE_WORDS + row..],
            step,
            fetch: Fetch::Nowhere,
            adds: false,
        }
    }
}
