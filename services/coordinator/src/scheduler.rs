//! Which tokens of which sequences run in the next step. Pure: events in, plans out; no clock, no randomness, no
//! IO. Continuous batching: sequences join and leave between any two steps, decode rows go first, then proposals to
//! verify, then prompts. The step after the one in flight is planned ahead when nothing forbids it.
//!
//! # Layout
//! * `sequence` – one sequence: its tokens, and what of them the shards have
//! * `waiting` – who is next: fair share among tenants, in classes
//! * `admit` – a place and the first blocks; cached prefixes
//! * `fairness` – what a tenant with most of the places leaves to others
//! * `family` – sequences of one prompt: who waits for whom, what is copied
//! * `blocks` – more blocks as sequences grow; who gives up its own
//! * [`moving`] – sequences that go on in another group
//! * [`plan`] – a step
//! * [`budget`] – how many rows of prompts a step takes, and whose
//! * [`apply`] – what a result changes

mod admit;
pub mod apply;
mod blocks;
pub mod budget;
mod fairness;
mod family;
pub mod moving;
pub mod plan;
mod sequence;
mod waiting;

use std::{collections::VecDeque, time::Duration};

use paceline_domain::{
    Digest, Epoch, HeldBack, SamplingParams, SequenceId, StepNumber, TokenId, group::BLOCK_POSITIONS,
};
use paceline_speculation::{Drafting, Guess, StepTimes};

use crate::{id_map::IdMap, ledger::BlockLedger, prefix::PrefixKey};

pub use apply::{Applied, Commit, ResultMismatch, Scores, Verified};
pub use budget::ItlBound;
pub use moving::Departed;
pub use waiting::Priority;

use plan::InFlight;
use sequence::Sequence;
use waiting::Waiting;

/// Steps that may be without an answer.
pub const MAX_STEPS_IN_FLIGHT: usize = 2;
/// How often a sequence may lose its blocks to an older one. From then on it gets all blocks it can ever need with
/// its place.
pub const MAX_PREEMPTIONS: u32 = 3;

/// What bounds every plan, beside the KV pool.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Limits {
    /// Most token rows in one step; not below `max_sequences`.
    pub max_rows: u32,
    /// Most rows with a sampled token in one step; not below `max_sequences`.
    pub max_sampled_rows: u32,
    /// Most running sequences.
    pub max_sequences: usize,
    /// How long decoding sequences may wait between two tokens while prompts are read.
    pub itl_bound: ItlBound,
    /// The step after one that takes longer is not planned ahead: there is little to hide, and new requests would
    /// wait for two steps.
    pub run_ahead_below: Duration,
    /// A priority class that others were placed before this often while it waited gets the next place.
    pub promote_after: u32,
    /// The model that computes keys and values.
    pub model: Digest,
}

/// A sequence to be run.
#[derive(Clone, PartialEq, Debug)]
pub struct NewSequence {
    /// Its prompt; not empty.
    pub prompt: Vec<TokenId>,
    /// Most tokens it may generate.
    pub max_tokens: u32,
    /// How its tokens are chosen.
    pub sampling: SamplingParams,
    /// What cannot be chosen yet.
    pub held_back: Option<HeldBack>,
    /// Its tokens must be known before the next step, which waits for masks.
    pub is_constrained: bool,
    /// Whose it is; prefixes are shared inside a tenant only.
    pub tenant: String,
    /// Its class.
    pub priority: Priority,
    /// `Some(n)`: log probabilities of its prompt's tokens are wanted, and of n alternatives to each.
    pub n_prompt_logprobs: Option<u32>,
    /// A sequence with the same prompt, if there is one: then this one waits until that has read the prompt.
    pub sibling: Option<SequenceId>,
}

/// Whether steps of a sequence may be planned before its last token is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Pace {
    /// They may.
    #[default]
    RunAhead,
    /// Each token is needed to plan the next step: for a grammar, or to propose what follows.
    StepByStep,
}

/// What happened since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Tokens of sequences that got a place, and those of them found in the prefix cache.
    pub n_opened_tokens: u64,
    /// See `n_opened_tokens`.
    pub n_cached_tokens: u64,
    /// Sequences that lost their place to an older one.
    pub n_preemptions: u64,
}

/// Blocks that hold this many positions. The last token of a sequence is never run through the model, but a
/// block for it costs nothing to reason about.
pub fn blocks_for(n_positions: usize) -> usize {
    n_positions.div_ceil(BLOCK_POSITIONS)
}

/// The state of all sequences of one group.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    ledger: BlockLedger,
    times: StepTimes,
    /// Whether the draft service is at work during the next step.
    drafting: Drafting,
    /// It was told to stop, and may be in the middle of a pass.
    may_draft_on: bool,
    epoch: Epoch,
    next_step: StepNumber,
    next_sequence: u64,
    next_age: u64,
    /// Tokens of prompts in all plans.
    n_read: u64,
    waiting: Waiting,
    /// Oldest place first.
    running: Vec<SequenceId>,
    sequences: IdMap<SequenceId, Sequence>,
    /// Sequences that shards have open and the next plan closes.
    closes: Vec<SequenceId>,
    /// Whether every rank copies blocks.
    copies_blocks: bool,
    in_flight: VecDeque<InFlight>,
    counters: Counters,
}

impl Scheduler {
    /// No sequences, no group and no blocks yet: call [`Self::begin_epoch`] before planning.
    ///
    /// # Panics
    /// When a step has fewer rows than running sequences need.
    pub fn new(limits: Limits) -> Self {
        let least = limits.max_rows.min(limits.max_sampled_rows) as usize;
        assert!(limits.max_sequences <= least, "invariant: each sequence can decode in every step");
        Self {
            limits,
            ledger: BlockLedger::new(0),
            times: StepTimes::default(),
            drafting: Drafting::Quiet,
            may_draft_on: false,
            epoch: Epoch(0),
            next_step: StepNumber(1),
            next_sequence: 1,
            next_age: 1,
            n_read: 0,
            waiting: Waiting::new(limits.promote_after),
            running: Vec::new(),
            sequences: IdMap::default(),
            closes: Vec::new(),
            copies_blocks: false,
            in_flight: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// From now on sequences get ids from this one on: those of groups must differ, because sequences can move.
    pub fn number_from(&mut self, first: SequenceId) {
        self.next_sequence = first.0;
    }

    /// Whether a sequence of this many tokens fits a pool of `n_kv_blocks` when it is alone.
    pub fn could_fit(n_kv_blocks: u32, n_tokens: usize) -> bool {
        blocks_for(n_tokens) <= n_kv_blocks as usize
    }

    /// A new group: its KV memory is empty, so every sequence starts again from its tokens, and what steps in flight
    /// sampled was never heard of.
    ///
    /// # Panics
    /// When its pool is of another size than that of the first group: sequences were admitted by that one.
    pub fn begin_epoch(&mut self, epoch: Epoch, n_kv_blocks: u32) {
        let n_before = self.ledger.n_blocks();
        assert!(n_before == 0 || n_before == n_kv_blocks as usize, "invariant: the pool keeps its size");
        self.ledger = BlockLedger::new(n_kv_blocks);
        self.copies_blocks = false;
        self.epoch = epoch;
        self.next_step = StepNumber(1);
        self.in_flight.clear();
        self.closes.clear();
        self.sequences.values_mut().for_each(Sequence::forget_epoch);
        for id in std::mem::take(&mut self.running).into_iter().rev() {
            self.waiting.push_front(id);
        }
    }

    /// From now on blocks may be copied: every rank of the group can.
    pub fn copy_blocks(&mut self) {
        self.copies_blocks = true;
    }

    /// Puts a sequence at the end of its tenant's queue, or beside a sibling that still reads their prompt.
    ///
    /// # Panics
    /// When its prompt is empty, it may generate nothing or it could never fit: all this was checked before.
    pub fn submit(&mut self, new: NewSequence) -> SequenceId {
        let n_tokens = new.prompt.len() + new.max_tokens as usize;
        let fits = Self::could_fit(self.ledger.n_blocks() as u32, n_tokens);
        assert!(!new.prompt.is_empty() && new.max_tokens > 0 && fits, "invariant: admitted");
        let id = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let root = PrefixKey::root(&new.tenant, &self.limits.model);
        let (priority, sibling) = (new.priority, new.sibling);
        let sequence = Sequence::new(id, new, root);
        if !self.joins(id, sibling) {
            self.waiting.push(id, &sequence.tenant, priority);
        }
        self.sequences.insert(id, sequence);
        id
    }

    /// Ends a sequence, finished or not; its blocks are free for the next plan. Unknown ids are ignored.
    pub fn finish(&mut self, id: SequenceId) {
        let Some(mut sequence) = self.sequences.remove(&id) else { return };
        self.ledger.give_back(&sequence.blocks);
        if sequence.close() {
            self.closes.push(id);
        }
        self.waiting.remove(id);
        self.running.retain(|running| *running != id);
        self.release_siblings(sequence.siblings);
    }

    /// Whether steps of this sequence may be planned ahead; from the start they may. Unknown ids are ignored.
    pub fn set_pace(&mut self, id: SequenceId, pace: Pace) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.pace = pace;
        }
    }

    /// Plans nothing more for a sequence until it is released; it keeps its place. Unknown ids are ignored.
    pub fn hold(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.is_held = true;
        }
    }

    /// A sequence that was held goes on. Unknown ids are ignored.
    pub fn release(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.is_held = false;
        }
    }

    /// Tokens that may follow the last one of a sequence: its next step verifies as many of them as it has room for,
    /// from the first on. They never change what is generated. Ignored for a sequence that does not
    /// wait for exactly its next token; see [`Self::open_to_proposals`].
    pub fn propose<G: Into<Guess>>(&mut self, id: SequenceId, guesses: impl IntoIterator<Item = G>) {
        if let Some(sequence) = self.sequences.get_mut(&id).filter(|sequence| sequence.n_proposals() > 0) {
            let n_most = sequence.n_proposals();
            sequence.proposals = guesses.into_iter().map(Into::into).take(n_most).collect();
        }
    }

    /// Running sequences that would decode in the next plan and whose tokens are all known, and how many proposals
    /// each can use.
    pub fn open_to_proposals(&self) -> impl Iterator<Item = (SequenceId, usize)> {
        let room = |id: &SequenceId| (*id, self.sequences[id].n_proposals());
        self.running.iter().map(room).filter(|(_, n)| *n > 0)
    }

    /// Whether the next plan reads prompts.
    pub fn reads_prompts(&self) -> bool {
        self.running.iter().any(|id| self.sequences[id].reads_prompt())
    }

    /// Prompt and committed tokens of a sequence.
    pub fn tokens(&self, id: SequenceId) -> Option<&[TokenId]> {
        self.sequences.get(&id).map(|sequence| sequence.tokens.as_slice())
    }

    /// Tokens (prompt and output still allowed) of sequences that have no place yet.
    pub fn n_waiting_tokens(&self) -> u64 {
        self.waiting.iter().map(|id| self.sequences[&id].n_limit as u64).sum()
    }

    /// Sequences that are running and waiting.
    pub fn n_sequences(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// Blocks of the pool; none before there was a group.
    pub fn n_blocks(&self) -> usize {
        self.ledger.n_blocks()
    }

    /// Blocks nobody holds, cached ones included.
    pub fn n_free_blocks(&self) -> usize {
        self.ledger.n_free()
    }

    /// How long steps take, as far as they were measured.
    pub fn step_times(&self) -> &StepTimes {
        &self.times
    }

    /// Tells whether the draft service is at work during the next steps: they may take longer then.
    pub fn set_drafting(&mut self, drafting: Drafting) {
        self.drafting = drafting;
    }

    /// It drafts ahead, so that steps in flight may take longer too.
    pub fn drafts_ahead(&mut self) {
        self.in_flight.iter_mut().for_each(|in_flight| in_flight.drafting = Drafting::Busy);
        self.may_draft_on = true;
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn sequence(&mut self, id: SequenceId) -> &mut Sequence {
        self.sequences.get_mut(&id).expect("invariant: waiting and running sequences exist")
    }
}

#[cfg(test)]
mod branches_tests;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod scoring_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod toy_group;
