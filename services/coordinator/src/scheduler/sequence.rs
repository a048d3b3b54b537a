//! One sequence: its tokens, which of them the shards have, and what plans in flight will add. It knows no other one.

use std::sync::Arc;

use paceline_domain::{
    BlockCopy, BlockId, Branch, HeldBack, SamplingParams, Scoring, SequenceChunk, SequenceId, SequenceOpen,
    StepNumber, TokenId, UNKNOWN_TOKEN,
};
use paceline_speculation::Guess;

use super::{BLOCK_POSITIONS, MAX_PREEMPTIONS, NewSequence, Pace, Priority, blocks_for};
use crate::prefix::{PrefixKey, extend_keys};

#[derive(Debug)]
pub(super) struct Sequence {
    /// Prompt and all committed tokens.
    pub(super) tokens: Vec<TokenId>,
    pub(super) n_prompt: usize,
    /// Most tokens it can have.
    pub(super) n_limit: usize,
    pub(super) sampling: SamplingParams,
    held_back: Option<HeldBack>,
    is_constrained: bool,
    /// Alternatives to report for each prompt token, if their log probabilities are wanted.
    n_prompt_logprobs: Option<u32>,
    /// Prompt tokens after the first that plans have scored, and those of them whose scores came.
    n_scored: usize,
    n_told: usize,
    pub(super) pace: Pace,
    /// Whose it is.
    pub(super) tenant: Arc<str>,
    pub(super) priority: Priority,
    /// The first of the sequences with its prompt; itself where it is alone.
    pub(super) family: SequenceId,
    /// Those of them that wait until it has read the prompt.
    pub(super) siblings: Vec<SequenceId>,
    /// Nothing more is planned for it: what it has cannot be delivered now.
    pub(super) is_held: bool,
    /// Order of first places; kept when the place is lost.
    pub(super) age: Option<u64>,
    /// When its prompt's turn comes; kept likewise.
    pub(super) turn: Option<u64>,
    pub(super) n_preempted: u32,
    /// Committed tokens whose keys and values the shards have.
    pub(super) n_computed: usize,
    /// Those and the ones that plans in flight run; proposals do not count.
    pub(super) n_planned: usize,
    /// Plans in flight that sample for it.
    pub(super) n_unknown: usize,
    /// The plan in flight verifies proposals: where it goes on is not known.
    pub(super) is_verifying: bool,
    /// The step since which the shards have it.
    pub(super) opened_at: Option<StepNumber>,
    pub(super) blocks: Vec<BlockId>,
    /// First blocks that came from the prefix cache.
    pub(super) n_cached_blocks: usize,
    /// First blocks that the shards know.
    pub(super) n_sent_blocks: usize,
    /// First blocks that are full and were offered to the prefix cache.
    pub(super) n_published: usize,
    /// Names of the prefixes of whole blocks, as far as they were needed.
    pub(super) keys: Vec<PrefixKey>,
    root: PrefixKey,
    /// For the next plan.
    pub(super) proposals: Vec<Guess>,
}

/// What a sequence can run in the next step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Next {
    /// Nothing before a step in flight is back, or nothing ever.
    Nothing,
    /// So many known tokens.
    Known(usize),
    /// The one token that the step in flight samples.
    Ahead,
}

impl Sequence {
    pub(super) fn new(id: SequenceId, new: NewSequence, root: PrefixKey) -> Self {
        Self {
            n_prompt: new.prompt.len(),
            n_limit: new.prompt.len() + new.max_tokens as usize,
            tokens: new.prompt,
            sampling: new.sampling,
            held_back: new.held_back,
            is_constrained: new.is_constrained,
            n_prompt_logprobs: new.n_prompt_logprobs,
            n_scored: 0,
            n_told: 0,
            pace: Pace::default(),
            tenant: new.tenant.into(),
            priority: new.priority,
            family: new.sibling.unwrap_or(id),
            siblings: Vec::new(),
            is_held: false,
            age: None,
            turn: None,
            n_preempted: 0,
            n_computed: 0,
            n_planned: 0,
            n_unknown: 0,
            is_verifying: false,
            opened_at: None,
            blocks: Vec::new(),
            n_cached_blocks: 0,
            n_sent_blocks: 0,
            n_published: 0,
            keys: Vec::new(),
            root,
            proposals: Vec::new(),
        }
    }

    pub(super) fn next(&self) -> Next {
        if self.is_held || self.is_verifying || self.tokens.len() + self.n_unknown >= self.n_limit {
            return Next::Nothing;
        }
        match self.tokens.len().saturating_sub(self.n_planned) {
            0 if self.n_unknown == 1 && self.pace == Pace::RunAhead => Next::Ahead,
            0 => Next::Nothing,
            n => Next::Known(n),
        }
    }

    /// Whether its next step gives a token and reads no prompt. After a branch was right its token comes again before the
    /// one that followed it.
    pub(super) fn decodes(&self) -> bool {
        match self.next() {
            Next::Known(1) | Next::Ahead => true,
            Next::Known(2) => self.opened_at.is_some() && !self.is_scoring(),
            _ => false,
        }
    }

    /// Whether tokens that are known are still to be read, but for the last ones.
    pub(super) fn reads_prompt(&self) -> bool {
        matches!(self.next(), Next::Known(2..)) && !self.decodes()
    }

    /// Positions that its blocks must hold for its next token, when it decodes.
    pub(super) fn n_next(&self) -> usize {
        self.tokens.len().max(self.n_planned + 1)
    }

    /// Tokens up to its next one that no plan has run, when it decodes.
    pub(super) fn n_unread(&self) -> usize {
        self.n_next() - self.n_planned
    }

    /// Whether proposals for it may have branches: what a grammar allows after them is not asked for.
    pub(super) fn may_branch(&self) -> bool {
        !self.is_constrained
    }

    /// Whether no step can be planned for it before its next token is known.
    pub(super) fn needs_its_token(&self) -> bool {
        let goes_on = self.tokens.len() + self.n_unknown < self.n_limit;
        self.n_unknown > 0 && goes_on && (self.is_verifying || self.pace == Pace::StepByStep)
    }

    /// Whether it is running: whoever has a place has at least one block.
    pub(super) fn has_place(&self) -> bool {
        !self.blocks.is_empty()
    }

    /// Proposals that its next step can verify: with all of them accepted and the free token it is at its limit.
    pub(super) fn n_proposals(&self) -> usize {
        let is_open = self.decodes() && self.next() != Next::Ahead && self.n_unknown == 0;
        if is_open { self.n_limit - self.tokens.len() - 1 } else { 0 }
    }

    /// Whether it lost its place so often that it keeps the next one.
    pub(super) fn is_protected(&self) -> bool {
        self.n_preempted >= MAX_PREEMPTIONS
    }

    /// Blocks it can ever need.
    pub(super) fn n_most_blocks(&self) -> usize {
        blocks_for(self.n_limit)
    }

    /// Keys of the blocks that a cached prefix may cover: at least one token is left to run, and so are all whose rows
    /// are still to be scored.
    pub(super) fn cacheable_keys(&mut self) -> &[PrefixKey] {
        let n_blocks = (self.tokens.len() - 1) / BLOCK_POSITIONS;
        extend_keys(&mut self.keys, self.root, &self.tokens, n_blocks);
        let n_most = if self.is_scoring() { self.n_scored / BLOCK_POSITIONS } else { n_blocks };
        &self.keys[..n_blocks.min(n_most)]
    }

    /// Whether some of its prompt's tokens are still to be scored.
    pub(super) fn is_scoring(&self) -> bool {
        self.n_prompt_logprobs.is_some() && self.n_scored + 1 < self.n_prompt
    }

    /// As many of its next `n` tokens as can run with so many output rows; they sample or are scored, but for those that
    /// run again.
    pub(super) fn n_scorable(&self, n: usize, n_output_rows: usize) -> usize {
        if !self.is_scoring() {
            return n;
        }
        n.min(self.n_scored.saturating_sub(self.n_planned) + n_output_rows)
    }

    /// The scores of its rows from `start` to `end` that no plan has asked for; a row scores the token after it.
    fn score(&mut self, start: usize, end: usize) -> Scoring {
        let Some(n_top) = self.n_prompt_logprobs.filter(|_| self.is_scoring()) else {
            return Scoring::default();
        };
        assert!(start <= self.n_scored, "invariant: no row is passed over before it is scored");
        let end = end.min(self.n_prompt - 1).max(self.n_scored);
        let tokens = self.tokens[self.n_scored + 1..end + 1].to_vec();
        self.n_scored = end;
        Scoring { tokens, n_top }
    }

    /// So many scores came; the position of the first.
    pub(super) fn tell(&mut self, n: usize) -> u32 {
        self.n_told += n;
        (self.n_told - n + 1) as u32
    }

    /// Blocks that are full of computed tokens and were not offered to the cache yet, with their keys.
    pub(super) fn publish(&mut self) -> Vec<(BlockId, PrefixKey)> {
        let n_full = self.n_computed / BLOCK_POSITIONS;
        extend_keys(&mut self.keys, self.root, &self.tokens, n_full);
        let new = self.n_published.min(n_full)..n_full;
        self.n_published = n_full;
        new.map(|i| (self.blocks[i], self.keys[i])).collect()
    }

    /// It has a place; its first blocks hold a cached prefix.
    pub(super) fn start(&mut self, blocks: Vec<BlockId>, n_cached_blocks: usize) {
        self.blocks = blocks;
        self.n_cached_blocks = n_cached_blocks;
        self.n_published = n_cached_blocks;
        self.n_computed = n_cached_blocks * BLOCK_POSITIONS;
        self.n_planned = self.n_computed;
    }

    /// Whether the shards have to be told that it is closed.
    pub(super) fn close(&mut self) -> bool {
        self.opened_at.take().is_some()
    }

    /// Back to its tokens; its blocks are the caller's. What plans in flight sample still counts.
    pub(super) fn lose_place(&mut self) -> Vec<BlockId> {
        self.opened_at = None;
        self.is_verifying = false;
        self.n_sent_blocks = 0;
        self.proposals.clear();
        let blocks = std::mem::take(&mut self.blocks);
        self.start(Vec::new(), 0);
        blocks
    }

    /// Back to its tokens; nothing is in flight any more, and all blocks are gone.
    pub(super) fn forget_epoch(&mut self) {
        self.lose_place();
        self.n_unknown = 0;
        self.n_scored = self.n_told;
    }

    /// What the shards must know before its first chunk. With a copy all but the last token of its prompt are there.
    pub(super) fn open(
        &mut self,
        id: SequenceId,
        step: StepNumber,
        copied: Option<BlockCopy>,
    ) -> SequenceOpen {
        self.opened_at = Some(step);
        self.n_sent_blocks = self.n_cached_blocks;
        if copied.is_some() {
            self.n_sent_blocks += 1;
            self.n_computed = self.n_prompt - 1;
            self.n_planned = self.n_computed;
        }
        SequenceOpen {
            sequence: id,
            sampling: self.sampling.clone(),
            n_prompt: self.n_prompt as u32,
            cached_tokens: self.tokens[..self.n_computed].to_vec(),
            cached_blocks: self.blocks[..self.n_cached_blocks].to_vec(),
            copied,
            held_back: self.held_back.clone(),
            is_constrained: self.is_constrained,
        }
    }

    /// Its chunk of the next step: `n` known tokens, or the one the step in flight samples.
    pub(super) fn chunk(&mut self, id: SequenceId, n: usize) -> SequenceChunk {
        let start = self.n_planned;
        let runs_ahead = start == self.tokens.len();
        let tokens = if runs_ahead { vec![UNKNOWN_TOKEN] } else { self.tokens[start..start + n].to_vec() };
        let n_sampled = u32::from(runs_ahead || start + n == self.tokens.len());
        let scoring = self.score(start, start + tokens.len() - n_sampled as usize);
        self.n_planned += tokens.len();
        self.n_unknown += n_sampled as usize;
        let new_blocks = self.blocks[self.n_sent_blocks..].to_vec();
        let n_kept_blocks = std::mem::replace(&mut self.n_sent_blocks, self.blocks.len()) as u32;
        SequenceChunk {
            sequence: id,
            start_pos: start as u32,
            tokens,
            new_blocks,
            n_kept_blocks,
            n_sampled,
            runs_ahead,
            scoring,
            branches: Vec::new(),
        }
    }

    /// Its chunk of the next step: its last token, these proposals and branches.
    pub(super) fn verification(
        &mut self,
        id: SequenceId,
        proposals: &[Guess],
        branches: Vec<Branch>,
    ) -> SequenceChunk {
        let mut chunk = self.chunk(id, self.n_unread());
        chunk.tokens.extend(proposals.iter().map(|guess| guess.token));
        chunk.n_sampled += proposals.len() as u32;
        chunk.branches = branches;
        self.is_verifying = true;
        chunk
    }
}
