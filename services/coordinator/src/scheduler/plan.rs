//! One step: decode rows first, then proposals to verify, then prompts, within one budget of rows.

use paceline_domain::{
    BlockId, Branch, Epoch, SequenceChunk, SequenceId, SequenceOpen, StepNumber, StepPlan, TokenId,
};
use paceline_speculation::{Drafting, Guess, Load};

use super::{
    MAX_STEPS_IN_FLIGHT, Scheduler,
    budget::{ROWS_FOR_PROMPTS, Sharers, Wanted, prefill_rows, turn},
    fairness::favour,
    sequence::Next,
};

/// While requests wait for a place a step is sent ahead only beside one that is as short as this.
const CROWDED_AHEAD_MS: f64 = 20.0;

/// A plan that was not answered yet, as far as its answer needs it.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) epoch: Epoch,
    pub(super) step: StepNumber,
    pub(super) asked: Vec<Asked>,
    pub(super) load: Load,
    pub(super) drafting: Drafting,
    pub(super) predicted_ms: Option<f64>,
}

/// What a chunk asks for.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) sequence: SequenceId,
    /// Position after its last row.
    pub(super) end: usize,
    pub(super) n_sampled: usize,
    /// Tokens whose log probabilities are wanted.
    pub(super) n_scored: usize,
    /// What it verifies.
    pub(super) proposals: Vec<TokenId>,
    pub(super) branches: Vec<Branch>,
}

/// A step while it is put together.
#[derive(Default)]
struct Draft {
    opens: Vec<SequenceOpen>,
    chunks: Vec<SequenceChunk>,
    load: Load,
    /// Rows whose logits are wanted.
    n_output_rows: usize,
    /// Blocks of branches, which are needed for this step only.
    lent: Vec<BlockId>,
}

impl Scheduler {
    /// The next step, or `None` while it needs an answer first or when there is nothing to do.
    pub fn plan(&mut self) -> Option<StepPlan> {
        if !self.may_plan() {
            return None;
        }
        self.admit();
        let mut draft = Draft::default();
        self.add_decodes(&mut draft);
        self.add_prompts(&mut draft);
        // Plans run in order, so whoever takes them next writes them later.
        self.ledger.give_back(&draft.lent);
        let only_closes = draft.chunks.is_empty();
        if only_closes && (self.closes.is_empty() || !self.in_flight.is_empty()) {
            return None;
        }
        let plan = StepPlan {
            epoch: self.epoch,
            step: self.next_step,
            // Last, because who lost its place in this plan is among them.
            closes: std::mem::take(&mut self.closes),
            opens: draft.opens,
            chunks: draft.chunks,
        };
        self.next_step = StepNumber(self.next_step.0 + 1);
        let (predicted_ms, drafting) = (self.times.predict(draft.load), self.drafting_during_next());
        self.in_flight.push_back(InFlight {
            epoch: plan.epoch,
            step: plan.step,
            asked: plan.chunks.iter().map(Asked::by).collect(),
            load: draft.load,
            drafting,
            predicted_ms,
        });
        Some(plan)
    }

    /// A pass of the draft model that is not over when the service is told to stop runs on into the next step.
    fn drafting_during_next(&mut self) -> Drafting {
        let may_draft_on = self.drafting == Drafting::Quiet && std::mem::take(&mut self.may_draft_on);
        if may_draft_on { Drafting::Busy } else { self.drafting }
    }

    fn may_plan(&self) -> bool {
        let Some(last) = self.in_flight.back() else { return true };
        // Whoever comes next waits for all that was sent, and where others wait somebody is likely to come.
        let most_ms = if self.waiting.is_empty() { f64::INFINITY } else { CROWDED_AHEAD_MS };
        let below_ms = (self.limits.run_ahead_below.as_secs_f64() * 1e3).min(most_ms);
        let is_short = last.predicted_ms.is_some_and(|ms| ms < below_ms);
        let is_known = |id: &SequenceId| !self.sequences[id].needs_its_token();
        self.in_flight.len() < MAX_STEPS_IN_FLIGHT && is_short && self.running.iter().all(is_known)
    }

    /// One row for each sequence that has read its prompt, and its proposals as far as there is room. All that are
    /// short of blocks get theirs before anything is added, oldest first: who loses its place is not in the step.
    fn add_decodes(&mut self, draft: &mut Draft) {
        let mut decoding = Vec::new();
        let mut has_prompts = false;
        for id in self.running.clone() {
            let sequence = &self.sequences[&id];
            let (decodes, n_next) = (sequence.decodes(), sequence.n_next());
            has_prompts |= sequence.reads_prompt();
            if decodes && sequence.has_place() && self.grow(id, n_next) {
                decoding.push(id);
            }
        }
        let n_reserved = decoding.len() + if has_prompts { ROWS_FOR_PROMPTS } else { 0 };
        let mut n_rows_left = (self.limits.max_rows as usize).saturating_sub(n_reserved);
        // Each running sequence may have one sampled row anyway; who reads log probabilities off its prompt needs more.
        let mut n_sampled_left = self.limits.max_sampled_rows as usize - self.running.len();
        if self.running.iter().any(|id| self.sequences[id].is_scoring()) {
            n_sampled_left /= 2;
        }
        for id in decoding {
            let open = self.open(id);
            let n_more = self.sequences[&id].n_unread() - 1;
            if n_more > n_rows_left {
                draft.add(open, self.sequence(id).chunk(id, 1));
                continue;
            }
            n_rows_left -= n_more;
            let n_left = n_rows_left.min(n_sampled_left);
            let chunk = self.verification(id, n_left, &mut draft.lent);
            let n_rows = chunk.n_rows() - 1 - n_more;
            (n_rows_left, n_sampled_left) = (n_rows_left - n_rows, n_sampled_left - n_rows);
            draft.add(open, chunk);
        }
    }

    /// A decoding sequence's chunk with its proposals and branches, as far as there is room.
    fn verification(&mut self, id: SequenceId, n_left: usize, lent: &mut Vec<BlockId>) -> SequenceChunk {
        let mut proposals = std::mem::take(&mut self.sequence(id).proposals);
        proposals.truncate(n_left);
        if !proposals.is_empty() {
            proposals.truncate(self.grow_if_free(id, proposals.len()));
        }
        if proposals.is_empty() {
            let n_unread = self.sequences[&id].n_unread();
            return self.sequence(id).chunk(id, n_unread);
        }
        let branches = self.branches(id, &proposals, n_left - proposals.len(), lent);
        self.sequence(id).verification(id, &proposals, branches)
    }

    /// Second guesses beside these proposals, as many as there is room for.
    fn branches(
        &mut self,
        id: SequenceId,
        proposals: &[Guess],
        n_left: usize,
        lent: &mut Vec<BlockId>,
    ) -> Vec<Branch> {
        if !self.copies_blocks || !self.sequences[&id].may_branch() {
            return Vec::new();
        }
        let seconds = proposals.iter().zip(0..).filter_map(|(guess, after)| Some((after, guess.second?)));
        let seconds: Vec<(u32, TokenId)> = seconds.take(n_left.min(self.ledger.n_free())).collect();
        let blocks = self.ledger.take(seconds.len()).unwrap_or_default();
        lent.extend_from_slice(&blocks);
        let branch = |((after, token), block)| Branch { after, token, block };
        seconds.into_iter().zip(blocks).map(branch).collect()
    }

    /// Parts of prompts, as many rows as the time between tokens allows.
    fn add_prompts(&mut self, draft: &mut Draft) {
        let mut prompts = Vec::new();
        for id in self.running.clone() {
            let sequence = &self.sequences[&id];
            let is_new = sequence.opened_at.is_none();
            if !matches!(sequence.next(), Next::Known(_) if is_new || !sequence.decodes())
                || (is_new && (self.awaits_prefix(id) || self.awaits_copy(id)))
            {
                continue;
            }
            if is_new {
                self.use_cached(id);
            }
            prompts.push(id);
        }
        let Some(first) = prompts.first() else { return };
        let sharers = Sharers {
            n_decoding: draft.chunks.len(),
            n_prompts: prompts.len(),
            start_pos: self.sequences[first].n_planned,
            is_crowded: !self.waiting.is_empty(),
        };
        let pending = |id: &SequenceId| match self.copy_for(*id) {
            Some(_) => 1,
            None => self.sequences[id].tokens.len() - self.sequences[id].n_planned,
        };
        // One is kept for each, because it may sample.
        let mut n_spare = self.limits.max_sampled_rows as usize - draft.n_output_rows - prompts.len();
        let mut wanted: Vec<usize> = prompts.iter().map(pending).collect();
        for (id, wanted) in prompts.iter().zip(&mut wanted).filter(|(id, _)| self.sequences[id].is_scoring())
        {
            *wanted = self.sequences[id].n_scorable(*wanted, n_spare + 1);
            n_spare -= n_spare.min(*wanted);
        }
        let n_rows_left = self.limits.max_rows as usize - draft.load.n_rows;
        let n_rows = prefill_rows(&self.times, self.limits.itl_bound, draft.load, sharers, n_rows_left);
        let granted =
            favour(&self.by_turns(&prompts, &wanted), &self.are_light(&prompts), (n_rows, n_rows_left));
        self.n_read += granted.iter().sum::<usize>() as u64;
        for (id, n) in prompts.into_iter().zip(granted).filter(|(_, n)| *n > 0) {
            let open = self.open(id);
            let chunk = self.sequence(id).chunk(id, n);
            draft.add(open, chunk);
        }
    }

    /// What prompts want, with the turns that they got when they wanted something first.
    fn by_turns(&mut self, prompts: &[SequenceId], n_tokens: &[usize]) -> Vec<Wanted> {
        let n_read = self.n_read;
        let wanted = |(id, n_tokens): (&SequenceId, &usize)| Wanted {
            n_tokens: *n_tokens,
            turn: *self.sequence(*id).turn.get_or_insert(turn(n_read, *n_tokens)),
        };
        prompts.iter().zip(n_tokens).map(wanted).collect()
    }

    /// What the shards must know of a sequence they do not know yet.
    fn open(&mut self, id: SequenceId) -> Option<SequenceOpen> {
        if self.sequences[&id].opened_at.is_some() {
            return None;
        }
        let (step, copied) = (self.next_step, self.copy_for(id));
        let sequence = self.sequence(id);
        let n_tokens = sequence.tokens.len() as u64;
        let open = sequence.open(id, step, copied);
        self.counters.n_opened_tokens += n_tokens;
        self.counters.n_cached_tokens += open.cached_tokens.len() as u64;
        Some(open)
    }
}

impl Asked {
    fn by(chunk: &SequenceChunk) -> Self {
        let (n_rows, n_sampled) = (chunk.tokens.len(), chunk.n_sampled as usize);
        Self {
            sequence: chunk.sequence,
            end: chunk.start_pos as usize + n_rows,
            n_sampled,
            n_scored: chunk.scoring.tokens.len(),
            proposals: chunk.tokens[n_rows - n_sampled.saturating_sub(1)..].to_vec(),
            branches: chunk.branches.clone(),
        }
    }
}

impl Draft {
    fn add(&mut self, open: Option<SequenceOpen>, chunk: SequenceChunk) {
        self.load = self.load.and(Load::of_chunk(&chunk));
        self.n_output_rows += chunk.n_output_rows() + chunk.branches.len();
        self.opens.extend(open);
        self.chunks.push(chunk);
    }
}
