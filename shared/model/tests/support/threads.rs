//! Ranks as threads of one process, reduced by the plainest possible code: every rank shows its sums, waits, and
//! finishes the tree element by element.

use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use paceline_collectives::{Collective, CollectiveError, CollectiveStats};
use paceline_domain::ReduceTree;

struct Table {
    barrier: Barrier,
    shown: Mutex<Vec<Vec<f32>>>,
    sent: Mutex<Vec<Vec<u8>>>,
}

pub struct Threads {
    rank: usize,
    n_ranks: usize,
    table: Arc<Table>,
}

impl Threads {
    /// One for each rank.
    pub fn group(n_ranks: usize) -> Vec<Self> {
        let table = Arc::new(Table {
            barrier: Barrier::new(n_ranks),
            shown: Mutex::new(vec![Vec::new(); n_ranks]),
            sent: Mutex::new(vec![Vec::new(); n_ranks]),
        });
        (0..n_ranks).map(|rank| Self { rank, n_ranks, table: Arc::clone(&table) }).collect()
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_ranks(&self) -> usize {
        self.n_ranks
    }

    fn all_reduce_tree(
        &mut self,
        tree: &ReduceTree,
        partials: &[f32],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        assert_eq!(partials.len(), tree.subtrees(self.rank).len() * out.len());
        self.table.shown.lock().expect("lock")[self.rank] = partials.to_vec();
        self.table.barrier.wait();
        let shown = self.table.shown.lock().expect("lock").clone();
        let n = out.len();
        for (element, out) in out.iter_mut().enumerate() {
            *out =
                tree.finish(|rank, subtree| shown[rank][subtree * n + element], |left, right| left + right);
        }
        self.table.barrier.wait();
        Ok(())
    }

    fn gather(&mut self, own: &[u8], parts: &mut Vec<Vec<u8>>) -> Result<(), CollectiveError> {
        self.table.sent.lock().expect("lock")[self.rank] = own.to_vec();
        self.table.barrier.wait();
        *parts = if self.rank == 0 { self.table.sent.lock().expect("lock").clone() } else { Vec::new() };
        self.table.barrier.wait();
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.table.barrier.wait();
        Ok(())
    }

    fn set_deadline(&mut self, _deadline: Duration) {}

    fn take_stats(&mut self) -> CollectiveStats {
        CollectiveStats::default()
    }
}
