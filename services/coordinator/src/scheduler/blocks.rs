//! More blocks for sequences as they grow. When none is free, the youngest sequence gives up its own and is computed
//! again later, from its tokens: at most [`MAX_PREEMPTIONS`](super::MAX_PREEMPTIONS) times, after that it gets all
//! blocks it can ever need with its place.
//!
//! # Why the oldest always goes on
//! A protected sequence never needs a block. `admit` keeps room for all that protected ones hold and for the largest
//! of the others, so the oldest of those finds a free block, or a younger one without protection that holds some.

use paceline_domain::SequenceId;

use super::{BLOCK_POSITIONS, Scheduler, blocks_for};

impl Scheduler {
    /// Whether a sequence has blocks for so many positions now. Younger ones may have lost their place for it.
    pub(super) fn grow(&mut self, id: SequenceId, n_positions: usize) -> bool {
        let n_missing = blocks_for(n_positions).saturating_sub(self.sequences[&id].blocks.len());
        loop {
            if let Some(more) = self.ledger.take(n_missing) {
                self.sequence(id).blocks.extend(more);
                return true;
            }
            let Some(victim) = self.youngest_after(id) else { return false };
            self.preempt(victim);
        }
    }

    /// As many of `n` positions after the next one as a sequence can have blocks for without taking anybody's.
    pub(super) fn grow_if_free(&mut self, id: SequenceId, n: usize) -> usize {
        let n_next = self.sequences[&id].n_next();
        let n_missing = blocks_for(n_next + n).saturating_sub(self.sequences[&id].blocks.len());
        let more = self.ledger.take(n_missing.min(self.ledger.n_free())).unwrap_or_default();
        let blocks = &mut self.sequence(id).blocks;
        blocks.extend(more);
        n.min(blocks.len() * BLOCK_POSITIONS - n_next)
    }

    fn youngest_after(&self, id: SequenceId) -> Option<SequenceId> {
        let younger = self.running.iter().rev().take_while(|other| **other != id);
        younger.copied().find(|other| !self.sequences[other].is_protected())
    }

    fn preempt(&mut self, id: SequenceId) {
        let sequence = self.sequence(id);
        sequence.n_preempted += 1;
        let is_open = sequence.close();
        let blocks = sequence.lose_place();
        self.ledger.give_back(&blocks);
        if is_open {
            self.closes.push(id);
        }
        self.running.retain(|running| *running != id);
        self.waiting.push_front(id);
        self.counters.n_preemptions += 1;
    }
}
