//! How far ahead of the sums weights are fetched. What is fetched too late keeps a core waiting; what is fetched too early
//! is thrown out of the nearest cache before it is used, and read again. Memory answers after about the same time whether it
//! is fast or slow, so the right distance is what a thread reads in that time, which is measured: memory that others share
//! changes its pace for minutes. No bit depends on it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::cache::is_nearest_roomy;

/// Weights are asked for this long before they are needed.
const LEAD: Duration = Duration::from_nanos(240);
/// Bounds of the distance in bytes. Where many tokens share a weight, it is the longest: between two weights is much to do,
/// now more, now less; and where it is the second-level cache that is filled, which has room.
const NEAREST: usize = 4 * 1024;
const FARTHEST: usize = 10 * 1024;
/// Most tokens with which memory alone bounds a sum.
const FEW_TOKENS: usize = 4;
/// One in so many tasks is timed.
const SAMPLED: usize = 16;
/// How much one observation counts: an observation in so many.
const MEMORY: usize = 16;

/// The distance for the threads of a pool.
#[derive(Debug)]
pub(crate) struct Ahead(AtomicUsize);

impl Default for Ahead {
    fn default() -> Self {
        Self(AtomicUsize::new(FARTHEST))
    }
}

impl Ahead {
    /// Bytes, for sums of so many tokens.
    pub(crate) fn bytes(&self, n_tokens: usize) -> usize {
        let is_measured = n_tokens <= FEW_TOKENS && is_nearest_roomy();
        if is_measured { self.0.load(Ordering::Relaxed) } else { FARTHEST }
    }

    /// Does a task's work, which reads so many bytes of weights for so many tokens. Of some tasks the time is taken.
    pub(crate) fn during(&self, task: usize, (n_bytes, n_tokens): (usize, usize), work: impl FnOnce()) {
        if n_tokens > FEW_TOKENS || task % SAMPLED != SAMPLED / 2 {
            return work();
        }
        let start = Instant::now();
        work();
        self.observe(n_bytes, start.elapsed());
    }

    /// Threads may overwrite what another one has learnt in the same moment: there is more to come.
    fn observe(&self, n_bytes: usize, elapsed: Duration) {
        let in_lead = n_bytes as u128 * LEAD.as_nanos() / elapsed.as_nanos().max(1);
        // So a task that was interrupted counts little.
        let in_lead = in_lead.clamp(NEAREST as u128, FARTHEST as u128) as usize;
        let bytes = self.0.load(Ordering::Relaxed);
        self.0.store((bytes * (MEMORY - 1) + in_lead).div_ceil(MEMORY), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(ahead: &Ahead) -> usize {
        ahead.0.load(Ordering::Relaxed)
    }

    #[test]
    fn the_distance_is_what_is_read_while_memory_answers() {
        let ahead = Ahead::default();
        assert_eq!(known(&ahead), FARTHEST);
        // 25 bytes a nanosecond, 240 of them.
        let steady = |ahead: &Ahead| (0..200).for_each(|_| ahead.observe(25_000, Duration::from_micros(1)));
        steady(&ahead);
        let few = known(&ahead);
        assert!((6_000..6_020).contains(&few), "{few}");
        let of_few = if is_nearest_roomy() { few } else { FARTHEST };
        assert_eq!((ahead.bytes(FEW_TOKENS), ahead.bytes(FEW_TOKENS + 1)), (of_few, FARTHEST));
        ahead.observe(25_000, Duration::from_millis(4));
        assert!(known(&ahead) > few - 130, "one interrupted task is no reason");
        for (elapsed, bound) in [(Duration::ZERO, FARTHEST), (Duration::from_secs(1), NEAREST)] {
            (0..200).for_each(|_| ahead.observe(25_000, elapsed));
            assert!(known(&ahead).abs_diff(bound) < MEMORY, "{}", known(&ahead));
        }
        steady(&ahead);
        assert!(known(&ahead).abs_diff(few) < 2 * MEMORY);
    }

    #[test]
    fn work_is_done_whether_it_is_timed_or_not() {
        let (ahead, mut n) = (Ahead::default(), 0);
        (0..64).for_each(|task| ahead.during(task, (1, 1 + task % 8), || n += 1));
        assert_eq!(n, 64);
        assert!(known(&ahead) < FARTHEST, "a byte a task is slow");
    }
}
