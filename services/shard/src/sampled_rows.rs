//! The rows of a chunk that sample, and what their tokens depend on beside the logits. It chooses nothing.

use std::borrow::Cow;

use paceline_domain::{Branch, HeldBack, SequenceChunk, TokenMask};
use paceline_model::logits::Columns;
use paceline_sampling::{TokenHistory, allow_only, forbid, has_penalty};

use crate::sequences::Sequence;

/// A row that samples.
pub struct SampledRow<'a> {
    /// Whose.
    pub sequence: &'a Sequence,
    /// Of the token that is chosen: the number of tokens before it.
    pub position: u32,
    /// The tokens before it; what it has beyond them does not count.
    pub history: Cow<'a, TokenHistory>,
    /// What must not be chosen.
    pub restriction: Restriction<'a>,
}

/// How many rows of a chunk sample.
pub fn n_sampled_rows(chunk: &SequenceChunk) -> usize {
    chunk.n_sampled as usize + chunk.branches.len()
}

/// The proposals of a chunk.
pub fn proposals(chunk: &SequenceChunk) -> &[paceline_domain::TokenId] {
    &chunk.tokens[(first_sampled(chunk) + 1).min(chunk.tokens.len())..]
}

/// The i-th row of a chunk that samples: first come those of its tokens, then those of its branches. The history has all
/// tokens of the chunk.
pub fn sampled_row<'a>(chunk: &SequenceChunk, sequence: &'a Sequence, i: usize) -> SampledRow<'a> {
    let branch = i.checked_sub(chunk.n_sampled as usize).map(|branch| &chunk.branches[branch]);
    let (position, history) = match branch {
        None => (chunk.start_pos + (first_sampled(chunk) + i + 1) as u32, Cow::Borrowed(&sequence.history)),
        Some(branch) => (chunk.position_of(branch) + 1, history_of(branch, chunk, sequence)),
    };
    let mask = sequence.masks.get(i).filter(|mask| branch.is_none() && !mask.is_open());
    let held_back = sequence.held_back.as_ref().filter(|held| position < held.until);
    SampledRow { sequence, position, history, restriction: Restriction { held_back, mask } }
}

/// The tokens before a branch, and its own, where it matters which they are.
fn history_of<'a>(branch: &Branch, chunk: &SequenceChunk, sequence: &'a Sequence) -> Cow<'a, TokenHistory> {
    let mut history = Cow::Borrowed(&sequence.history);
    if has_penalty(&sequence.sampling) {
        let history = history.to_mut();
        history.truncate(chunk.position_of(branch) as usize);
        history.push(branch.token);
    }
    history
}

fn first_sampled(chunk: &SequenceChunk) -> usize {
    chunk.tokens.len() - chunk.n_sampled as usize
}

/// What a row must not choose.
pub struct Restriction<'a> {
    held_back: Option<&'a HeldBack>,
    mask: Option<&'a TokenMask>,
}

impl Restriction<'_> {
    /// Whether it may choose everything.
    pub fn is_nothing(&self) -> bool {
        self.held_back.is_none() && self.mask.is_none()
    }

    /// Makes what must not be chosen impossible.
    pub fn apply(&self, columns: Columns, logits: &mut [f32]) {
        if let Some(held) = self.held_back {
            forbid(&held.tokens, columns.first_token.0, logits);
        }
        if let Some(mask) = self.mask {
            allow_only(mask, columns.first_token.0, logits);
        }
    }
}
