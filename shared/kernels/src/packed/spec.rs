//! What to pack: a type, a shape, the owned columns and where the leaves of the canonical sum lie. No weights.

use super::leaves::MAX_LEAVES;
use crate::error::KernelError;
use crate::formats::GROUP_LEN;
use paceline_domain::WeightType;
use std::ops::Range;

/// Which part of a matrix is packed, and how its sums are cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackSpec {
    /// Storage type of the rows that are packed.
    pub weight_type: WeightType,
    /// Output rows to pack.
    pub n_rows: usize,
    /// Columns of a whole row.
    pub n_cols: usize,
    /// Columns to pack.
    pub k_range: Range<usize>,
    /// Column edges of the owned leaves, from `k_range.start` to `k_range.end`; one more than there are leaves.
    pub leaf_edges: Vec<usize>,
    /// Index of the first owned leaf among all leaves of the matrix.
    pub first_leaf: usize,
    /// Leaves of the whole matrix over all ranks.
    pub n_total_leaves: usize,
}

impl PackSpec {
    /// A matrix whose columns are not cut: one leaf.
    pub fn whole_rows(weight_type: WeightType, n_rows: usize, n_cols: usize) -> Self {
        Self::cut_rows(weight_type, n_rows, &[0, n_cols], 0..1)
    }

    /// A matrix whose columns are cut into leaves at `edges` (0 first, the row's length last), of which a rank
    /// owns `leaves`.
    ///
    /// # Panics
    /// When there are no such leaves.
    pub fn cut_rows(weight_type: WeightType, n_rows: usize, edges: &[usize], leaves: Range<usize>) -> Self {
        let leaf_edges = edges[leaves.start..=leaves.end].to_vec();
        Self {
            weight_type,
            n_rows,
            n_cols: edges[edges.len() - 1],
            k_range: edges[leaves.start]..edges[leaves.end],
            leaf_edges,
            first_leaf: leaves.start,
            n_total_leaves: edges.len() - 1,
        }
    }

    /// Number of owned leaves.
    pub fn n_leaves(&self) -> usize {
        self.leaf_edges.len().saturating_sub(1)
    }

    /// Checks everything and returns the bytes of a row in the file.
    ///
    /// # Errors
    /// What is wrong with the specification.
    pub fn check(&self) -> Result<usize, KernelError> {
        let (start, end) = (self.k_range.start, self.k_range.end);
        let row_bytes = self
            .weight_type
            .row_bytes(self.n_cols)
            .ok_or(KernelError::RowShape { weight_type: self.weight_type, n_cols: self.n_cols })?;
        if start > end || end > self.n_cols {
            return Err(KernelError::ColumnRange { start, end, n_cols: self.n_cols });
        }
        let edges = &self.leaf_edges;
        if edges.first() != Some(&start) || edges.last() != Some(&end) || !edges.is_sorted() {
            return Err(KernelError::LeafEdges { start, end });
        }
        let unaligned = edges.iter().find(|edge| !edge.is_multiple_of(GROUP_LEN));
        if let (true, Some(&column)) = (self.weight_type.is_quantized(), unaligned) {
            return Err(KernelError::CutInsideGroup { weight_type: self.weight_type, column });
        }
        let end_leaf = self.first_leaf.checked_add(self.n_leaves());
        if end_leaf.is_none_or(|end| end > self.n_total_leaves) || self.n_total_leaves > MAX_LEAVES {
            return Err(KernelError::LeafCount {
                first: self.first_leaf,
                n_owned: self.n_leaves(),
                n_total: self.n_total_leaves,
            });
        }
        Ok(row_bytes)
    }
}
