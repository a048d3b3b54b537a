//! A group of one: nothing to send, nobody to wait for. The plain reference of the other transports.

use crate::collective::{Collective, CollectiveStats};
use crate::error::CollectiveError;
use crate::finish::FinishPlans;
use paceline_domain::ReduceTree;
use std::time::Duration;

/// The only rank of its group.
#[derive(Debug, Default)]
pub struct Solo {
    plans: FinishPlans,
}

impl Solo {
    /// A group of one.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn n_ranks(&self) -> usize {
        1
    }

    fn all_reduce_tree(
        &mut self,
        tree: &ReduceTree,
        partials: &[f32],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        check_shapes(tree, 0, 1, partials, out);
        let n = out.len();
        self.plans.run(tree, |_, subtree| &partials[subtree * n..][..n], out);
        Ok(())
    }

    fn gather(&mut self, own: &[u8], parts: &mut Vec<Vec<u8>>) -> Result<(), CollectiveError> {
        parts.resize_with(1, Vec::new);
        parts[0].clear();
        parts[0].extend_from_slice(own);
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn set_deadline(&mut self, _deadline: Duration) {}

    fn take_stats(&mut self) -> CollectiveStats {
        CollectiveStats::default()
    }
}

/// The arguments of an all-reduce fit together.
///
/// # Panics
/// When they do not.
pub(crate) fn check_shapes(tree: &ReduceTree, rank: usize, n_ranks: usize, partials: &[f32], out: &[f32]) {
    assert_eq!(tree.n_ranks(), n_ranks, "the tree is for another number of ranks");
    let n_own = tree.subtrees(rank).len();
    assert_eq!(partials.len(), n_own * out.len(), "{n_own} subtree sums of {} elements", out.len());
}
