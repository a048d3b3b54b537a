//! What a step has to do, as far as its time depends on it.

use paceline_domain::{SequenceChunk, StepPlan};

/// What a step has to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Load {
    /// Token rows.
    pub n_rows: usize,
    /// Keys that all rows look at together.
    pub n_keys: usize,
    /// Keys that are read: once for all rows of a chunk.
    pub n_reads: usize,
}

impl Load {
    /// Rows that look at no keys to speak of.
    pub fn plain(n_rows: usize) -> Self {
        Self { n_rows, ..Self::default() }
    }

    /// Rows of one sequence from a position on.
    pub fn rows(start_pos: usize, n_rows: usize) -> Self {
        let n_reads = if n_rows == 0 { 0 } else { start_pos + n_rows };
        Self { n_rows, n_keys: n_rows * start_pos + n_rows * (n_rows + 1) / 2, n_reads }
    }

    /// Rows of a chunk. Each branch reads the keys before it for itself.
    pub fn of_chunk(chunk: &SequenceChunk) -> Self {
        let rows = Self::rows(chunk.start_pos as usize, chunk.tokens.len());
        let branches = chunk.branches.iter().map(|branch| Self::rows(chunk.position_of(branch) as usize, 1));
        branches.fold(rows, Self::and)
    }

    /// What a plan has to do.
    pub fn of(plan: &StepPlan) -> Self {
        plan.chunks.iter().map(Self::of_chunk).fold(Self::default(), Self::and)
    }

    /// With so many rows in the same chunks, that look at as many keys as these do.
    pub fn with_rows(self, n_rows: usize) -> Self {
        Self { n_rows, n_keys: self.n_keys * n_rows / self.n_rows.max(1), ..self }
    }

    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            n_rows: self.n_rows + other.n_rows,
            n_keys: self.n_keys + other.n_keys,
            n_reads: self.n_reads + other.n_reads,
        }
    }
}
