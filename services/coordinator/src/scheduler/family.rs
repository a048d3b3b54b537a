//! Sequences that continue one prompt. One of them reads it; the others get their place when that is done, share its full
//! blocks by the prefix cache, and begin with a copy of the last one, so that each writes into a block of its own.
//! Where blocks cannot be copied, or nobody has the last one any more, it is computed again: the tokens are the same.

use paceline_domain::{BlockCopy, SequenceId};

use super::{BLOCK_POSITIONS, Scheduler, sequence::Sequence};

impl Scheduler {
    /// Whether a new sequence waits beside the sibling that reads their prompt, instead of in the queue.
    pub(super) fn joins(&mut self, id: SequenceId, sibling: Option<SequenceId>) -> bool {
        let Some(sibling) = sibling.and_then(|sibling| self.sequences.get_mut(&sibling)) else {
            return false;
        };
        let is_reading = sibling.tokens.len() == sibling.n_prompt;
        if is_reading {
            sibling.siblings.push(id);
        }
        is_reading
    }

    /// The prompt is read, or its reader is gone: those who waited beside it are next.
    pub(super) fn release_siblings(&mut self, siblings: Vec<SequenceId>) {
        for id in siblings.into_iter().filter(|id| self.sequences.contains_key(id)) {
            self.waiting.push_next(id);
        }
    }

    /// The copy a sequence can begin with: nothing is left to compute but its prompt's last token, whose logits choose
    /// the first of its own. Its cached blocks must be up to date.
    pub(super) fn copy_for(&self, id: SequenceId) -> Option<BlockCopy> {
        let (n_full, n_needed) = self.partial_block(id)?;
        let sequence = &self.sequences[&id];
        if sequence.n_cached_blocks != n_full {
            return None;
        }
        let source = self.siblings_running(id).find(|sibling| sibling.n_computed >= n_needed)?;
        Some(BlockCopy { from: source.blocks[n_full], to: sequence.blocks[n_full] })
    }

    /// Whether an older sibling is about to have what can be copied.
    pub(super) fn awaits_copy(&self, id: SequenceId) -> bool {
        let Some((_, n_needed)) = self.partial_block(id) else { return false };
        let age = self.sequences[&id].age;
        !self.siblings_running(id).any(|sibling| sibling.n_computed >= n_needed)
            && self.siblings_running(id).any(|sibling| sibling.age < age && !sibling.is_held)
    }

    /// Full blocks of a sequence's prompt but for its last token, and the tokens in them and in the block after them;
    /// nothing where there is no such block or the sequence has left its prompt behind.
    fn partial_block(&self, id: SequenceId) -> Option<(usize, usize)> {
        let sequence = &self.sequences[&id];
        let n_needed = sequence.n_prompt - 1;
        let is_fresh = sequence.opened_at.is_none()
            && sequence.tokens.len() == sequence.n_prompt
            && !sequence.is_scoring();
        let has_part = !n_needed.is_multiple_of(BLOCK_POSITIONS);
        (self.copies_blocks && is_fresh && has_part).then_some((n_needed / BLOCK_POSITIONS, n_needed))
    }

    /// Oldest first.
    fn siblings_running(&self, id: SequenceId) -> impl Iterator<Item = &Sequence> {
        let family = self.sequences[&id].family;
        let others = self.running.iter().filter(move |other| **other != id);
        others.map(|other| &self.sequences[other]).filter(move |other| other.family == family)
    }
}
