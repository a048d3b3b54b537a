//! What the drafter knows of one sequence, and what it would propose for it. Pure.

use std::time::Instant;

use paceline_domain::{
    DraftControl, DraftProposal, SamplingParams, SequenceId, Speculation, SpeculationOptions, TokenId,
};
use paceline_speculation::{
    AcceptanceTable, Newcomers, NgramConfig, NgramProposer, ProposedToken, SequenceAcceptance, Source,
    SourceCounters, Tried, turns::MOST_IN_TURN,
};

use super::remote::{Known, Nonsense, Remote};

/// Tokens of a prompt that are indexed in one step, so that a long one does not hold up the others.
const INDEXED_A_STEP: usize = 2_048;
/// Tokens drafted ahead at least, so that good times are noticed.
const LEAST_AHEAD: f64 = 2.0;

/// How sure of its tokens a draft model is thought to be at first, and how fast that is corrected.
const CONFIDENCE: (f32, f32) = (0.8, 0.1);
/// Tokens after which it is asked again whether the draft is to read its tokens.
const RECONSIDERED_AFTER: usize = 16;

/// Of a proposal so many tokens are looked at, and those that are all right up to there with at least this probability: a row
/// for less never pays.
const ALWAYS_ASKED: usize = 2;
const NEGLIGIBLE: f64 = 0.01;

/// The next step that can be told what to verify.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NextStep {
    /// It follows the tokens that are known.
    AfterKnown,
    /// A step in flight gives one more token before.
    AfterOneSent,
}

/// A sequence to propose for.
#[derive(Clone, Debug)]
pub struct NewSequence<'a> {
    /// Its id.
    pub id: SequenceId,
    /// Its prompt.
    pub prompt: &'a [TokenId],
    /// How its tokens are chosen.
    pub sampling: &'a SamplingParams,
    /// Most tokens it may generate.
    pub max_tokens: usize,
    /// What it wants.
    pub options: SpeculationOptions,
    /// W3C `traceparent` and `tracestate` of its request; empty when it is not traced.
    pub trace: (String, String),
}

/// One sequence.
#[derive(Debug)]
pub struct Sequence {
    options: SpeculationOptions,
    n_prompt: usize,
    n_limit: usize,
    sampling: SamplingParams,
    trace: (String, String),
    /// Keeps the tokens, too.
    ngram: NgramProposer,
    is_indexed: bool,
    acceptance: SequenceAcceptance,
    /// Accepted draft tokens of recent proposals.
    accepted_length: f64,
    /// How sure the draft was of its recent tokens.
    confidence: f32,
    /// Generated tokens from which on it is asked again whether a draft session is worth its prompt.
    reconsidered_at: usize,
    /// Milliseconds that turns have cost beyond what they brought, but for the first.
    lost_ms: f64,
    has_had_turn: bool,
    tried: Tried,
    /// Its next step must not be planned before its last token is known.
    pub needs_each_token: bool,
    /// The draft service is to draft for it.
    pub is_drafted_for: bool,
    /// The draft service's side.
    pub remote: Remote,
    counters: [SourceCounters; Source::ALL.len()],
}

impl Sequence {
    /// A sequence that begins.
    pub fn new(new: &NewSequence<'_>) -> Self {
        let mut ngram = NgramProposer::new(NgramConfig::default());
        ngram.extend(new.prompt);
        Self {
            options: new.options,
            n_prompt: new.prompt.len(),
            n_limit: new.prompt.len() + new.max_tokens,
            sampling: new.sampling.clone(),
            trace: new.trace.clone(),
            ngram,
            is_indexed: false,
            acceptance: SequenceAcceptance::default(),
            accepted_length: LEAST_AHEAD,
            confidence: CONFIDENCE.0,
            reconsidered_at: 1,
            lost_ms: 0.0,
            has_had_turn: false,
            tried: Tried::default(),
            needs_each_token: false,
            is_drafted_for: true,
            remote: Remote::new(new.id.0),
            counters: [SourceCounters::default(); Source::ALL.len()],
        }
    }

    /// Prompt and committed output.
    pub fn tokens(&self) -> &[TokenId] {
        self.ngram.tokens()
    }

    /// What the service must know of it.
    pub fn tell(&mut self, budget: u32, now: Instant, frame: &mut DraftControl) {
        let (tokens, n_prompt) = (self.ngram.tokens(), self.n_prompt);
        let known = Known { tokens, n_prompt, sampling: &self.sampling, trace: &self.trace };
        self.remote.tell(&known, budget, now, frame);
    }

    /// Takes in what the service proposes.
    ///
    /// # Errors
    /// As [`Remote::proposed`].
    pub fn proposed(&mut self, proposal: &DraftProposal, n_vocab: u32) -> Result<(), Nonsense> {
        self.remote.proposed(proposal, self.ngram.tokens(), n_vocab)
    }

    /// Tokens it has generated.
    pub fn n_generated(&self) -> usize {
        self.tokens().len() - self.n_prompt
    }

    /// Whether it is time to ask if a draft session is worth its prompt; then it is not for a while.
    pub fn is_considered(&mut self) -> bool {
        let is_due = self.n_generated() >= self.reconsidered_at;
        if is_due {
            self.reconsidered_at = self.n_generated() + RECONSIDERED_AFTER;
        }
        is_due
    }

    /// The service has lost the session, or may have; as soon as it can be asked, it is asked at once whether another one is
    /// worth its tokens. That it was waited for in vain says nothing of its drafts.
    pub fn forget_session(&mut self) {
        self.remote.forget();
        self.reconsidered_at = 1;
        (self.lost_ms, self.has_had_turn) = (0.0, false);
    }

    /// A turn has cost something, or saved it.
    pub fn drafting_cost(&mut self, ms: f64) {
        // The first one has read the prompt, which further ones do not.
        if self.has_had_turn {
            self.lost_ms = (self.lost_ms + ms).max(0.0);
        }
        self.has_had_turn = true;
    }

    /// Milliseconds that turns have cost beyond what they brought, but for the first.
    pub fn lost_ms(&self) -> f64 {
        self.lost_ms
    }

    /// What became of its drafted tokens.
    pub fn tried(&self) -> Tried {
        self.tried
    }

    /// Tokens it may still generate.
    pub fn n_left(&self) -> usize {
        self.n_limit.saturating_sub(self.tokens().len())
    }

    /// Whether a source may propose.
    pub fn allows(&self, source: Source) -> bool {
        match self.options.mode {
            Speculation::Off => false,
            Speculation::Auto => true,
            Speculation::Ngram => source == Source::Ngram,
            Speculation::Draft => source == Source::Draft,
        }
    }

    /// What became of its proposals, by source.
    pub fn counters(&self) -> [SourceCounters; Source::ALL.len()] {
        self.counters
    }

    /// Takes in committed tokens.
    pub fn committed(&mut self, tokens: &[TokenId]) {
        self.ngram.extend(tokens);
        self.is_indexed = false;
        self.remote.committed(tokens);
    }

    /// A proposal was verified with so many branches beside it; whether one of them was right.
    pub fn branched(&mut self, n_branches: usize, took_branch: bool) {
        self.counters[Source::Draft.idx()].add_branches(n_branches, took_branch);
    }

    /// Takes in what became of a proposal.
    pub fn verified(&mut self, table: &AcceptanceTable, proposal: &[ProposedToken], n_accepted: usize) {
        self.acceptance.observe(table, proposal, n_accepted);
        for source in Source::ALL {
            self.counters[source.idx()].add(source, proposal, n_accepted);
        }
        if proposal.first().is_some_and(|first| first.source == Source::Draft) {
            self.accepted_length += 0.2 * (n_accepted as f64 - self.accepted_length);
        }
        for proposed in proposal.iter().take(n_accepted + 1).filter(|one| one.source == Source::Draft) {
            self.confidence += CONFIDENCE.1 * (proposed.confidence - self.confidence);
        }
        let is_drafted = |(_, proposed): &(usize, &ProposedToken)| proposed.source == Source::Draft;
        for (position, _) in proposal.iter().take(n_accepted + 1).enumerate().filter(is_drafted) {
            self.tried.n_tokens += 1;
            self.tried.n_accepted += u64::from(position < n_accepted);
        }
    }

    /// What can be expected of the tokens that the draft would propose next.
    pub fn expected_of_draft(&self, table: &AcceptanceTable, newcomers: &Newcomers) -> Vec<f64> {
        if !self.allows(Source::Draft) {
            return Vec::new();
        }
        let n = MOST_IN_TURN.min(self.options.max_tokens).min(self.n_left().saturating_sub(1));
        let typical = ProposedToken {
            token: TokenId(0),
            source: Source::Draft,
            confidence: self.confidence,
            second: None,
        };
        let estimates = self.acceptance.estimates(table, &vec![typical; n]);
        newcomers.applied(estimates, table.estimate(0, &typical), self.tried)
    }

    /// What can be expected of what its own tokens say for the next step that can be told.
    pub fn expected_of_own(&mut self, table: &AcceptanceTable, next: NextStep) -> Vec<f64> {
        self.index();
        let room = self.options.max_tokens.min(self.n_left().saturating_sub(1));
        let (_, mut estimates) = self.rated(table, self.own_tokens_say(&[]).take(room));
        if next == NextStep::AfterOneSent && !estimates.is_empty() {
            // The first token comes from the step that was sent; the rest is of use if it is that token.
            let first = estimates.remove(0);
            estimates.iter_mut().take(1).for_each(|next| *next *= first);
        }
        estimates
    }

    fn index(&mut self) {
        if self.allows(Source::Ngram) && !self.is_indexed {
            self.is_indexed = self.ngram.index(INDEXED_A_STEP);
        }
    }

    /// Tokens worth drafting ahead: what is in the next step, and as much again for the one after it.
    pub fn worth_ahead(&self, most: u32) -> u32 {
        let n_left = self.n_left().saturating_sub(1) as u32;
        let wished = (2.0 * self.accepted_length + LEAST_AHEAD).ceil() as u32;
        wished.min(2 * self.options.max_tokens as u32).min(most).min(n_left)
    }

    /// The most promising proposal of at most `room` tokens, and the probability that each is accepted when all before it
    /// are: the draft's, with what the request's own tokens say about its end, or theirs alone.
    pub fn proposal(&mut self, room: usize, table: &AcceptanceTable) -> (Vec<ProposedToken>, Vec<f64>) {
        let room = room.min(self.options.max_tokens);
        self.index();
        let drafted: Vec<ProposedToken> = match self.allows(Source::Draft) {
            true => self.remote.buffer().take(room).collect(),
            false => Vec::new(),
        };
        let tail: Vec<TokenId> = drafted.iter().map(|proposed| proposed.token).collect();
        let own = self.rated(table, self.own_tokens_say(&[]).take(room));
        if drafted.is_empty() {
            return own;
        }
        let and_own = self.own_tokens_say(&tail).take(room - tail.len());
        let drafted = self.rated(table, drafted.into_iter().chain(and_own));
        if expected_length(&own.1) >= expected_length(&drafted.1) { own } else { drafted }
    }

    /// A proposal as far as it is likely enough, and the probability that each of its tokens is accepted when all before it
    /// are.
    fn rated(
        &self,
        table: &AcceptanceTable,
        proposed: impl Iterator<Item = ProposedToken>,
    ) -> (Vec<ProposedToken>, Vec<f64>) {
        let (mut proposal, mut estimates, mut likelihood) = (Vec::new(), Vec::new(), 1.0);
        for (position, proposed) in proposed.enumerate() {
            let estimate = self.acceptance.estimate(table, position, &proposed);
            likelihood *= estimate;
            if likelihood < NEGLIGIBLE && position >= ALWAYS_ASKED {
                break;
            }
            proposal.push(proposed);
            estimates.push(estimate);
        }
        (proposal, estimates)
    }

    fn own_tokens_say<'a>(&'a self, tail: &'a [TokenId]) -> impl Iterator<Item = ProposedToken> + 'a {
        let may_say = self.allows(Source::Ngram);
        may_say.then(|| self.ngram.following(tail)).into_iter().flatten()
    }
}

/// Tokens expected to be accepted.
pub fn expected_length(estimates: &[f64]) -> f64 {
    let mut product = 1.0;
    let products = estimates.iter().map(|estimate| {
        product *= estimate;
        product
    });
    products.sum()
}
