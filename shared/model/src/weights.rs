//! A rank's slices of all tensors, as rows of the file on their way in and as a backend's matrices afterwards. How a
//! matrix lies in memory is decided by the backend's packer.

use std::borrow::Cow;

use paceline_checkpoint::TensorView;
use paceline_kernels::PackSpec;
use paceline_kernels::formats::requantize_row;

use crate::config::PairLayout;
use crate::names::Part;
use crate::{HeadTokens, ModelError};

/// One decoder layer of one rank: `A` is what a backend makes of attention's matrices, `F` of the feed-forward network's.
/// They are absent where the rank's share is empty.
pub struct LayerWeights<A, F> {
    /// `[n_embd]`
    pub attention_norm: Vec<f32>,
    /// Absent when the rank has no head.
    pub attention: Option<A>,
    /// `[n_embd]`
    pub ffn_norm: Vec<f32>,
    /// Absent when the rank has no column of the feed-forward network.
    pub ffn: Option<F>,
}

/// All weights of one rank; `M` is what a backend makes of the output head.
pub struct Weights<A, F, M> {
    /// In order.
    pub layers: Vec<LayerWeights<A, F>>,
    /// `[n_embd]`
    pub output_norm: Vec<f32>,
    /// Absent when the rank has no token.
    pub head: Option<M>,
}

/// The weights that a packer makes.
pub type WeightsOf<P> = Weights<<P as Packer>::Attention, <P as Packer>::Ffn, <P as Packer>::Head>;

/// Makes a backend's matrices of rows of the file. It gets together what a backend may want to lay out together.
pub trait Packer {
    /// The projections around attention.
    type Attention;
    /// The gated feed-forward network.
    type Ffn;
    /// The output head.
    type Head;

    /// Packs the projections of one layer.
    ///
    /// # Errors
    /// A type or shape the backend cannot multiply, or no room for it.
    fn attention(&mut self, rows: &AttentionRows<'_>) -> Result<Self::Attention, ModelError>;

    /// Packs the feed-forward network of one layer.
    ///
    /// # Errors
    /// A type or shape the backend cannot multiply, or no room for it.
    fn ffn(&mut self, rows: &FfnRows<'_>) -> Result<Self::Ffn, ModelError>;

    /// Packs the output head.
    ///
    /// # Errors
    /// A type or shape the backend cannot multiply, or no room for it.
    fn head(&mut self, rows: &MatrixRows<'_>) -> Result<Self::Head, ModelError>;
}

/// The projections around attention, in the file.
pub struct AttentionRows<'a> {
    /// `[n_heads * head_dim, n_embd]`
    pub query: ProjectionRows<'a>,
    /// `[n_kv_heads * head_dim, n_embd]`
    pub key: ProjectionRows<'a>,
    /// `[n_kv_heads * head_dim, n_embd]`
    pub value: ProjectionRows<'a>,
    /// `[n_embd, n_heads * head_dim]`, columns cut.
    pub output: MatrixRows<'a>,
}

/// A matrix in the file, and its bias.
pub struct ProjectionRows<'a> {
    /// The matrix.
    pub matrix: MatrixRows<'a>,
    /// One value for each row.
    pub bias: Option<Vec<f32>>,
}

/// The gated feed-forward network, in the file.
pub struct FfnRows<'a> {
    /// `[n_ff, n_embd]`
    pub gate: MatrixRows<'a>,
    /// `[n_ff, n_embd]`
    pub up: MatrixRows<'a>,
    /// `[n_embd, n_ff]`, columns cut.
    pub down: MatrixRows<'a>,
}

/// A rank's slice of a matrix, as bytes of the memory-mapped file or made of them row by row.
#[derive(Clone, Debug)]
pub struct MatrixRows<'a> {
    pub(crate) view: TensorView<'a>,
    pub(crate) part: Part,
    pub(crate) spec: PackSpec,
    /// The slice's first row, of the whole matrix.
    pub(crate) first_row: usize,
    pub(crate) order: RowOrder,
    /// Of the output head: which tokens its rows are.
    pub(crate) head: Option<&'a HeadTokens>,
}

/// How the rows of rotated heads lie in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RowOrder {
    pub pair_layout: PairLayout,
    pub head_dim: usize,
}

impl<'a> MatrixRows<'a> {
    /// The tensor's name in the file.
    pub fn name(&self) -> &'a str {
        self.view.name()
    }

    /// Its place in the forward pass; a tied head is [`Part::Embedding`].
    pub fn part(&self) -> Part {
        self.part
    }

    /// Type as it is loaded, shape, owned columns and the leaves of their sums.
    pub fn spec(&self) -> &PackSpec {
        &self.spec
    }

    /// Whether rows are quantized on their way from the file.
    pub fn is_requantized(&self) -> bool {
        self.spec.weight_type != self.view.weight_type()
    }

    /// Bytes of a row of the slice, from 0: a whole row of the tensor in the type of `spec()`, `spec().n_cols` columns, of
    /// which `spec().k_range` belongs to the slice. They are the file's, or quantized here and now. Rows of rotated heads come in [`PairLayout::Half`] order.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(&self, row: usize) -> Cow<'a, [u8]> {
        assert!(row < self.spec.n_rows, "row {row} of a slice of {}", self.spec.n_rows);
        let row = self.first_row + row;
        let bytes = self.view.row(match self.head {
            Some(head) => head.token(row).idx(),
            None => self.order.file_row(self.part, row),
        });
        if self.is_requantized() {
            return requantize_row(self.view.weight_type(), bytes, self.spec.weight_type).into();
        }
        bytes.into()
    }
}

impl RowOrder {
    /// Where in the file a row is that belongs at `row` when the pairs of every head are in [`PairLayout::Half`] order.
    pub(crate) fn file_row(self, part: Part, row: usize) -> usize {
        let is_rotated = matches!(part, Part::Query | Part::Key | Part::QueryBias | Part::KeyBias);
        if self.pair_layout == PairLayout::Half || !is_rotated {
            return row;
        }
        let head_dim = self.head_dim;
        let (head, element) = (row / head_dim, row % head_dim);
        let (second, pair) = (element / (head_dim / 2), element % (head_dim / 2));
        head * head_dim + 2 * pair + second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_pairs_are_gathered_into_halves() {
        let order = |pair_layout| RowOrder { pair_layout, head_dim: 4 };
        let rows = |part: Part| -> Vec<usize> {
            (0..8).map(|row| order(PairLayout::Interleaved).file_row(part, row)).collect()
        };
        assert_eq!(rows(Part::Query), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(rows(Part::Value), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(order(PairLayout::Half).file_row(Part::Query, 1), 1);
    }
}
