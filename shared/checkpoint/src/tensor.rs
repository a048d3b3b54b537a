//! A view of one tensor's bytes in the file. It hands out rows; it does not decode them.

use paceline_domain::WeightType;

/// One tensor. Rows run along the last dimension; a tensor of more than two dimensions is a stack of rows.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    pub(crate) name: &'a str,
    pub(crate) weight_type: WeightType,
    pub(crate) shape: &'a [usize],
    pub(crate) data: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// Its name.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// How its weights are stored.
    pub fn weight_type(&self) -> WeightType {
        self.weight_type
    }

    /// Dimensions, outermost first: a matrix is `[n_rows, n_cols]`. Empty for a scalar (safetensors only).
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Product of all dimensions but the last.
    pub fn n_rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// The last dimension.
    pub fn n_cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.data.len() / self.n_rows()
    }

    /// All its bytes, as in the file; the address need not be aligned.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Bytes of one row.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.n_rows(), "row {row} of a tensor with {} rows", self.n_rows());
        let row_bytes = self.row_bytes();
        &self.data[row * row_bytes..(row + 1) * row_bytes]
    }
}

impl std::fmt::Debug for TensorView<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:?} {} {:?}", self.name, self.weight_type.name(), self.shape)
    }
}
