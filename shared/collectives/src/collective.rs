//! The trait all transports share. It says what an operation means, not how ranks reach each other.

use crate::CollectiveError;
use paceline_domain::ReduceTree;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// One rank's membership in a group. All ranks call the same operations in the same order with the same shapes;
/// a rank that does something else is found out by its peers ([`CollectiveError::Mismatch`]).
///
/// Arguments that do not fit together on this rank alone are a bug of the caller and panic.
pub trait Collective: Send {
    /// Place of this rank, from 0.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn n_ranks(&self) -> usize;

    /// Finishes `tree` element by element: `partials` holds this rank's subtree sums,
    /// `[tree.subtrees(rank).len(), n]`, and `out` (`[n]`) receives the root, the same bits on every rank.
    ///
    /// # Errors
    /// A peer that is late, gone or disagrees, or the abort flag.
    fn all_reduce_tree(
        &mut self,
        tree: &ReduceTree,
        partials: &[f32],
        out: &mut [f32],
    ) -> Result<(), CollectiveError>;

    /// Brings `own` of every rank (any length each) to rank 0, where `parts[r]` becomes that of rank r. On other
    /// ranks `parts` becomes empty.
    ///
    /// # Errors
    /// A peer that is late, gone or disagrees, or the abort flag.
    fn gather(&mut self, own: &[u8], parts: &mut Vec<Vec<u8>>) -> Result<(), CollectiveError>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// A peer that is late, gone or disagrees, or the abort flag.
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// Gives every rank the bytes of rank 0; all ranks bring as many. For small things.
    ///
    /// # Errors
    /// A peer that is late, gone or disagrees, or the abort flag.
    fn broadcast_from_first(&mut self, bytes: &mut [u8]) -> Result<(), CollectiveError> {
        // One leaf a rank, of which all but the first are zero: the sum is the first, and a byte is exact in f32.
        let tree = ReduceTree::new((0..=self.n_ranks()).collect());
        let is_first = self.rank() == 0;
        let own: Vec<f32> = bytes.iter().map(|byte| if is_first { f32::from(*byte) } else { 0.0 }).collect();
        let mut sum = vec![0.0; bytes.len()];
        self.all_reduce_tree(&tree, &own, &mut sum)?;
        bytes.iter_mut().zip(sum).for_each(|(byte, sum)| *byte = sum as u8);
        Ok(())
    }

    /// How long each following operation may take before it is an error that names a late rank.
    fn set_deadline(&mut self, deadline: Duration);

    /// Statistics since the last call.
    fn take_stats(&mut self) -> CollectiveStats;
}

/// Where time and bytes went.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CollectiveStats {
    /// Time spent waiting for peers.
    pub wait: Duration,
    /// Bytes handed to the transport: once in shared memory, once per receiving peer (with frame headers) by TCP.
    pub bytes_sent: u64,
}

/// Most bytes a rank may bring to a gather.
pub(crate) const MAX_GATHER_BYTES: usize = 1 << 30;

/// Tells operations apart in headers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum OpKind {
    Reduce = 1,
    Gather = 2,
    Barrier = 3,
}

impl OpKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Reduce => "all-reduce",
            Self::Gather => "gather",
            Self::Barrier => "barrier",
        }
    }

    pub(crate) fn name_of(number: u32) -> &'static str {
        let known =
            [Self::Reduce, Self::Gather, Self::Barrier].into_iter().find(|kind| *kind as u32 == number);
        known.map_or("nothing known", Self::name)
    }
}

/// Frees a rank that waits in a collective, from another thread. Clones share one flag.
#[derive(Clone, Debug, Default)]
pub struct AbortFlag(Arc<AtomicBool>);

impl AbortFlag {
    /// A flag that is not set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the flag for good: every wait that watches it ends within about ten milliseconds.
    pub fn abort(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether the flag is set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
