//! Why weights cannot be packed. Kernels themselves do not fail: wrong shapes there are bugs and panic.

use paceline_domain::{ErrorKind, WeightType};

/// Why weights cannot be packed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum KernelError {
    #[error("a row of {n_cols} columns is not a whole number of {} blocks of {}", .weight_type.name(), .weight_type.block_len())]
    RowShape { weight_type: WeightType, n_cols: usize },
    #[error("row {row} has {found} bytes; {expected} are expected")]
    RowLength { row: usize, found: usize, expected: usize },
    #[error("columns {start}..{end} are not inside a row of {n_cols}")]
    ColumnRange { start: usize, end: usize, n_cols: usize },
    #[error("the edges of the leaves do not rise from column {start} to column {end}")]
    LeafEdges { start: usize, end: usize },
    #[error("a cut at column {column} is inside a group of 32 {} weights", .weight_type.name())]
    CutInsideGroup { weight_type: WeightType, column: usize },
    #[error("leaves {first}..{first}+{n_owned} of {n_total} are too many or do not exist")]
    LeafCount { first: usize, n_owned: usize, n_total: usize },
    #[error("a packed matrix of {n_rows} rows and {n_cols} columns does not fit the memory")]
    TooLarge { n_rows: usize, n_cols: usize },
}

impl KernelError {
    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::RowShape { .. } | Self::RowLength { .. } => ErrorKind::Invalid,
            Self::CutInsideGroup { .. } | Self::TooLarge { .. } => ErrorKind::Unfit,
            Self::ColumnRange { .. } | Self::LeafEdges { .. } | Self::LeafCount { .. } => ErrorKind::Bug,
        }
    }
}
