//! Captured passes: which shapes of batch are worth one, and what is known of each. A graph is captured the second time
//! its shape comes, when every kernel has been loaded by the first.

use std::collections::HashMap;

use super::batch::Staged;
use crate::GraphId;

/// Rows up to which passes are captured: beyond, the launches hide behind the work.
const MAX_ROWS: usize = 64;
/// Graphs that are kept; more shapes than that run without.
const MAX_GRAPHS: usize = 96;
/// Numbers of rows that graphs exist for; a smaller batch leaves rows idle.
const ROW_BUCKETS: [usize; 9] = [1, 2, 4, 8, 16, 24, 32, 48, MAX_ROWS];

/// Rows that a captured pass of `n_rows` rows computes; none is captured for more than there are buckets for.
pub(crate) fn bucket_rows(n_rows: usize) -> Option<usize> {
    ROW_BUCKETS.into_iter().find(|bucket| *bucket >= n_rows)
}

/// What the launches of a captured pass depend on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Shape {
    /// Rows in every launch.
    pub n_rows: usize,
    /// Splits in the launches of attention.
    pub n_splits: usize,
    /// Rows in the launches of the output head; none or as many as there are rows.
    pub n_output_rows: usize,
}

impl Shape {
    /// What a batch is launched with when nothing is captured.
    pub(crate) fn exact(staged: &Staged) -> Self {
        let Staged { n_rows, n_splits, n_output_rows, .. } = *staged;
        Self { n_rows, n_splits, n_output_rows }
    }

    /// The bucket of a batch, if such batches are captured.
    pub(crate) fn bucket(staged: &Staged, splits_fit: impl Fn(usize, usize) -> bool) -> Option<Self> {
        if staged.n_row_tiles > 0 || staged.is_scattered {
            return None;
        }
        let n_rows = bucket_rows(staged.n_rows)?;
        let n_splits = staged.n_splits.next_power_of_two();
        let n_output_rows = if staged.n_output_rows == 0 { 0 } else { n_rows };
        splits_fit(n_rows, n_splits).then_some(Self { n_rows, n_splits, n_output_rows })
    }
}

/// What to do with a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Course {
    /// Launch one by one.
    Eager,
    /// Launch one by one into a recording, then run that.
    Capture,
    /// Run the recording.
    Replay(GraphId),
}

/// The graphs of a backend.
#[derive(Default, Debug)]
pub(crate) struct Graphs {
    by_shape: HashMap<Shape, Option<GraphId>>,
}

impl Graphs {
    /// What to do with a batch of this shape.
    pub(crate) fn course(&mut self, shape: Shape) -> Course {
        match self.by_shape.get(&shape) {
            Some(Some(graph)) => Course::Replay(*graph),
            Some(None) => Course::Capture,
            None if self.by_shape.len() < MAX_GRAPHS => {
                self.by_shape.insert(shape, None);
                Course::Eager
            }
            None => Course::Eager,
        }
    }

    /// A shape was captured.
    pub(crate) fn keep(&mut self, shape: Shape, graph: GraphId) {
        self.by_shape.insert(shape, Some(graph));
    }
}
