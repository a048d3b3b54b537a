//! Which tokens of which sequences run in the next step. Pure: events in, plans out; no clock, no randomness, no
//! IO. Continuous batching: sequences join and leave between any two steps, decode rows go first, prompts fill
//! what is left of the row budget.

use std::collections::{BTreeMap, VecDeque};

use paceline_domain::{
    BlockId, Epoch, SampledToken, SamplingParams, SequenceChunk, SequenceId, SequenceOpen, StepNumber,
    StepPlan, StepResult, TokenId, group::BLOCK_POSITIONS,
};

use crate::ledger::BlockLedger;

/// What bounds every plan, beside the KV pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Most token rows in one step.
    pub max_rows: u32,
    /// Most running sequences.
    pub max_sequences: usize,
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
}

/// A token that is now part of its sequence.
#[derive(Clone, PartialEq, Debug)]
pub struct Commit {
    /// Whose.
    pub sequence: SequenceId,
    /// The token.
    pub sampled: SampledToken,
}

/// A result that does not answer the plan in flight: the group is beyond use.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
#[error("rank 0 answered with {found}; the plan in flight wants {wanted}")]
pub struct ResultMismatch {
    /// What the plan asked for.
    pub wanted: String,
    /// What came.
    pub found: String,
}

#[derive(Debug)]
struct Sequence {
    /// Prompt and all committed tokens.
    tokens: Vec<TokenId>,
    n_prompt: usize,
    max_tokens: usize,
    sampling: SamplingParams,
    /// Tokens whose keys and values the shards have; 0 until the sequence was opened in this epoch.
    n_computed: usize,
    blocks: Vec<BlockId>,
}

impl Sequence {
    fn n_blocks_needed(&self) -> usize {
        blocks_for(self.n_prompt + self.max_tokens)
    }

    fn n_pending(&self) -> usize {
        self.tokens.len() - self.n_computed
    }
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
    epoch: Epoch,
    next_step: StepNumber,
    next_sequence: u64,
    waiting: VecDeque<SequenceId>,
    running: Vec<SequenceId>,
    sequences: BTreeMap<SequenceId, Sequence>,
    closes: Vec<SequenceId>,
    in_flight: Option<StepPlan>,
}

impl Scheduler {
    /// No sequences, no group and no blocks yet: call [`Self::begin_epoch`] before planning.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            ledger: BlockLedger::new(0),
            epoch: Epoch(0),
            next_step: StepNumber(1),
            next_sequence: 1,
            waiting: VecDeque::new(),
            running: Vec::new(),
            sequences: BTreeMap::new(),
            closes: Vec::new(),
            in_flight: None,
        }
    }

    /// Whether a sequence of this many tokens fits a pool of `n_kv_blocks` when it is alone.
    pub fn could_fit(n_kv_blocks: u32, n_tokens: usize) -> bool {
        blocks_for(n_tokens) <= n_kv_blocks as usize
    }

    /// A new group: its KV memory is empty, so every sequence starts again from its tokens.
    ///
    /// # Panics
    /// When its pool is of another size than that of the first group: sequences were admitted by that one.
    pub fn begin_epoch(&mut self, epoch: Epoch, n_kv_blocks: u32) {
        if self.ledger.n_blocks() == 0 {
            self.ledger = BlockLedger::new(n_kv_blocks);
        }
        assert_eq!(self.ledger.n_blocks(), n_kv_blocks as usize, "invariant: the pool keeps its size");
        self.epoch = epoch;
        self.next_step = StepNumber(1);
        self.in_flight = None;
        self.closes.clear();
        for id in std::mem::take(&mut self.running).into_iter().rev() {
            let sequence = self.sequences.get_mut(&id).expect("invariant: running sequences exist");
            self.ledger.give_back(&std::mem::take(&mut sequence.blocks));
            sequence.n_computed = 0;
            self.waiting.push_front(id);
        }
    }

    /// Puts a sequence at the end of the queue.
    ///
    /// # Panics
    /// When its prompt is empty or it could never fit: admission has checked that.
    pub fn submit(&mut self, new: NewSequence) -> SequenceId {
        let n_tokens = new.prompt.len() + new.max_tokens as usize;
        let fits = Self::could_fit(self.ledger.n_blocks() as u32, n_tokens);
        assert!(!new.prompt.is_empty() && fits, "invariant: admitted");
        let id = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let sequence = Sequence {
            n_prompt: new.prompt.len(),
            tokens: new.prompt,
            max_tokens: new.max_tokens as usize,
            sampling: new.sampling,
            n_computed: 0,
            blocks: Vec::new(),
        };
        self.sequences.insert(id, sequence);
        self.waiting.push_back(id);
        id
    }

    /// Ends a sequence, finished or not; its blocks are free for the next plan. Unknown ids are ignored.
    pub fn finish(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        self.ledger.give_back(&sequence.blocks);
        if sequence.n_computed > 0 {
            self.closes.push(id);
        }
        self.waiting.retain(|waiting| *waiting != id);
        self.running.retain(|running| *running != id);
    }

    /// Tokens (prompt and output still allowed) of sequences that have no place yet.
    pub fn n_waiting_tokens(&self) -> u64 {
        let tokens =
            |id| self.sequences.get(id).map_or(0, |one: &Sequence| (one.n_prompt + one.max_tokens) as u64);
        self.waiting.iter().map(tokens).sum()
    }

    /// Sequences that are running and waiting.
    pub fn n_sequences(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// Blocks nobody holds.
    pub fn n_free_blocks(&self) -> usize {
        self.ledger.n_free()
    }

    /// The next step, or `None` while one is in flight or when there is nothing to do.
    pub fn plan(&mut self) -> Option<StepPlan> {
        if self.in_flight.is_some() {
            return None;
        }
        self.admit();
        if self.running.is_empty() && self.closes.is_empty() {
            return None;
        }
        let mut plan = StepPlan {
            epoch: self.epoch,
            step: self.next_step,
            closes: std::mem::take(&mut self.closes),
            opens: Vec::new(),
            chunks: Vec::new(),
        };
        let mut rows_left = self.limits.max_rows as usize;
        let is_decode = |id: &SequenceId| self.sequences[id].n_pending() == 1;
        let (decodes, prefills): (Vec<_>, Vec<_>) = self.running.iter().copied().partition(is_decode);
        for id in decodes.into_iter().chain(prefills) {
            if rows_left == 0 {
                break;
            }
            let chunk = self.chunk(id, rows_left, &mut plan.opens);
            rows_left -= chunk.tokens.len();
            plan.chunks.push(chunk);
        }
        self.next_step = StepNumber(self.next_step.0 + 1);
        self.in_flight = Some(plan.clone());
        Some(plan)
    }

    /// Gives waiting sequences their place, oldest first, while there are places and blocks.
    fn admit(&mut self) {
        while self.running.len() < self.limits.max_sequences {
            let Some(id) = self.waiting.front().copied() else { break };
            let sequence = self.sequences.get_mut(&id).expect("invariant: waiting sequences exist");
            let Some(blocks) = self.ledger.take(sequence.n_blocks_needed()) else { break };
            sequence.blocks = blocks;
            self.waiting.pop_front();
            self.running.push(id);
        }
    }

    fn chunk(&self, id: SequenceId, rows_left: usize, opens: &mut Vec<SequenceOpen>) -> SequenceChunk {
        let sequence = &self.sequences[&id];
        let is_new = sequence.n_computed == 0;
        if is_new {
            opens.push(SequenceOpen {
                sequence: id,
                sampling: sequence.sampling.clone(),
                n_prompt: sequence.n_prompt as u32,
                cached_tokens: Vec::new(),
                cached_blocks: Vec::new(),
            });
        }
        let start = sequence.n_computed;
        let end = sequence.tokens.len().min(start + rows_left);
        SequenceChunk {
            sequence: id,
            start_pos: start as u32,
            tokens: sequence.tokens[start..end].to_vec(),
            n_kept_blocks: if is_new { 0 } else { sequence.blocks.len() as u32 },
            new_blocks: if is_new { sequence.blocks.clone() } else { Vec::new() },
            n_sampled: u32::from(end == sequence.tokens.len()),
            runs_ahead: false,
        }
    }

    /// Takes rank 0's answer to the plan in flight. Tokens of sequences that were finished meanwhile are dropped.
    ///
    /// # Errors
    /// When it is not the answer to that plan.
    pub fn apply(&mut self, result: StepResult) -> Result<Vec<Commit>, ResultMismatch> {
        let Some(plan) = self.in_flight.take() else {
            return Err(ResultMismatch { wanted: "nothing".into(), found: format!("step {}", result.step) });
        };
        let wanted: Vec<_> =
            plan.chunks.iter().filter(|chunk| chunk.n_sampled > 0).map(|chunk| chunk.sequence).collect();
        let found: Vec<_> = result.samples.iter().map(|samples| samples.sequence).collect();
        if (plan.epoch, plan.step) != (result.epoch, result.step) || wanted != found {
            return Err(ResultMismatch {
                wanted: format!("epoch {} step {} samples of {wanted:?}", plan.epoch, plan.step),
                found: format!("epoch {} step {} samples of {found:?}", result.epoch, result.step),
            });
        }
        for chunk in &plan.chunks {
            match self.sequences.get_mut(&chunk.sequence) {
                Some(sequence) => sequence.n_computed = chunk.start_pos as usize + chunk.tokens.len(),
                // Finished while its first chunk was in flight: the shards have it open by now.
                None if plan.opens.iter().any(|open| open.sequence == chunk.sequence) => {
                    self.closes.push(chunk.sequence);
                }
                None => {}
            }
        }
        let mut commits = Vec::new();
        for samples in result.samples {
            let Some(sequence) = self.sequences.get_mut(&samples.sequence) else { continue };
            for sampled in samples.tokens {
                sequence.tokens.push(sampled.token);
                commits.push(Commit { sequence: samples.sequence, sampled });
            }
        }
        Ok(commits)
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
