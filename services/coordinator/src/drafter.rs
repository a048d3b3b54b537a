//! Proposals for the sequences of the next step, from the draft service and from their own tokens. It decides how many
//! are worth a row, never what is generated; without it, or when it fails in any way, decoding goes on as if it were not
//! there.
//!
//! The engine tells it what happens ([`Drafter::submit`], [`Drafter::committed`], [`Drafter::finish`]), asks before each
//! plan ([`Drafter::collect`], [`Drafter::propose`]), and tells what became of it ([`Drafter::planned`],
//! [`Drafter::step_done`]).

mod asking;
mod connection;
mod decide;
pub mod goodput;
pub mod interface;
pub mod link;
pub mod remote;
pub mod sequence;
pub mod turns;

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use paceline_domain::{DraftControl, SequenceId, StepNumber, StepPlan, TokenId};
use paceline_speculation::{
    AcceptanceTable, BranchOffer, Breaker, BreakerConfig, Choice, Drafting, Guess, Load, Newcomers,
    ProposedToken, Source, SourceCounters, StepLoad, StepTimes,
};
use tokio::time::Instant as TokioInstant;

pub use self::interface::{DrafterConfig, DrafterStats, Placement, StepEnd};
use self::{
    connection::{Connection, Silence, VainWaits},
    goodput::{Costs, Done, Goodput},
    link::Link,
    sequence::{NewSequence, Sequence},
    turns::TurnTaking,
};
use crate::scheduler::Verified;

/// Fewest tokens a request may generate for a draft session to be worth its prompt.
const WORTH_A_SESSION: usize = 8;
/// How fast it is learnt how often drafted tokens are there when they are needed.
const AVAILABILITY_RATE: f64 = 0.05;

/// Proposals that a step can use: whose, and how many.
pub type Open = (SequenceId, usize);

/// What could be proposed for a sequence, and the probability of each token, given that all before it are accepted.
type Offer = (SequenceId, Vec<ProposedToken>, Vec<f64>);

/// Proposals of a step.
#[derive(Debug)]
struct Proposed {
    /// `None` before it is known what steps take.
    choice: Option<Choice>,
    by_sequence: BTreeMap<SequenceId, Vec<ProposedToken>>,
    /// For whom was waited, and how long.
    members: Vec<SequenceId>,
    waited: Duration,
}

/// A step with its proposals.
#[derive(Debug)]
struct InFlight {
    step: StepNumber,
    load: Load,
    n_plain_tokens: usize,
    proposed: Option<Proposed>,
}

/// Proposes for all sequences of one group.
#[derive(Debug)]
pub struct Drafter {
    config: DrafterConfig,
    /// As configured, until steps show otherwise.
    placement: Placement,
    link: Option<Link>,
    connection: Option<Connection>,
    breaker: Breaker,
    silence: Silence,
    vain_waits: VainWaits,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Ends of sessions that the service was not told yet.
    farewells: DraftControl,
    table: AcceptanceTable,
    newcomers: Newcomers,
    goodput: Goodput,
    turns: TurnTaking,
    /// Whose tokens are to be read in the next turn; a step that was sent ahead may come before it.
    to_read: Vec<SequenceId>,
    /// Something has changed since the last decision.
    is_due: bool,
    /// The next step reads prompts, too.
    reads_prompts: bool,
    /// Whether the group verifies branches.
    has_branches: bool,
    /// How often a draft that runs ahead has something to propose when it is needed.
    availability: f64,
    /// Steps for which drafting ahead is still tried.
    n_tries: u32,
    next: Option<Proposed>,
    in_flight: VecDeque<InFlight>,
    waited: Duration,
    latency_ms: Option<f64>,
    counters: DrafterStats,
    /// What was logged last, so that a problem is logged once.
    problem: Option<String>,
}

impl Drafter {
    /// Begins to connect, if there is a service. Must be called inside a Tokio runtime.
    pub fn new(config: DrafterConfig) -> Self {
        let link = config.service.clone().map(|service| Link::start(service, config.target.clone()));
        Self {
            placement: config.placement,
            config,
            link,
            connection: None,
            breaker: Breaker::new(BreakerConfig::default()),
            silence: Silence::default(),
            vain_waits: VainWaits::default(),
            sequences: BTreeMap::new(),
            farewells: DraftControl::default(),
            table: AcceptanceTable::new(),
            newcomers: Newcomers::default(),
            goodput: Goodput::default(),
            turns: TurnTaking::default(),
            to_read: Vec::new(),
            is_due: true,
            reads_prompts: false,
            has_branches: false,
            availability: 1.0,
            n_tries: 0,
            next: None,
            in_flight: VecDeque::new(),
            waited: Duration::ZERO,
            latency_ms: None,
            counters: DrafterStats::default(),
            problem: None,
        }
    }

    /// A sequence begins. The service learns of it with the next [`Self::flush`], so that it reads the prompt while the
    /// target does.
    pub fn submit(&mut self, new: &NewSequence<'_>) {
        self.sequences.insert(new.id, Sequence::new(new));
    }

    /// Tokens of a sequence were committed.
    pub fn committed(&mut self, id: SequenceId, tokens: &[TokenId]) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.committed(tokens);
        }
    }

    /// A sequence ended; what became of its proposals, by source.
    pub fn finish(&mut self, id: SequenceId) -> Option<[SourceCounters; Source::ALL.len()]> {
        let sequence = self.sequences.remove(&id)?;
        self.close(&sequence);
        self.goodput.ended(sequence.n_generated());
        if sequence.allows(Source::Draft) && self.connection.is_some() {
            self.newcomers.ended(sequence.tried());
        }
        if self.sequences.is_empty() {
            self.goodput.idle();
        }
        Some(sequence.counters())
    }

    /// A sequence goes on elsewhere, with what is known of it; its session ends.
    pub fn take(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        self.close(&sequence);
        sequence.remote.forget();
        Some(sequence)
    }

    fn close(&mut self, sequence: &Sequence) {
        if let Some(waiting) = sequence.remote.waiting() {
            self.silence.outlived(waiting.since, clock());
        }
        sequence.remote.close(&mut self.farewells);
    }

    /// A sequence that another drafter proposed for.
    pub fn adopt(&mut self, id: SequenceId, sequence: Sequence) {
        self.sequences.insert(id, sequence);
    }

    /// Whether the next steps read prompts beside decoding.
    pub fn set_reading(&mut self, reads_prompts: bool) {
        self.reads_prompts = reads_prompts;
    }

    /// Whether the group verifies second guesses beside proposals.
    pub fn set_branches(&mut self, has_branches: bool) {
        self.has_branches = has_branches;
    }

    /// Decides on the next step, if the one before is done; `times` are those of the group. Whether it did: until then
    /// nothing has changed.
    pub fn prepare(&mut self, times: &StepTimes, now: Instant) -> bool {
        let is_due = std::mem::take(&mut self.is_due);
        if is_due {
            self.decide(times, now);
        }
        is_due
    }

    /// Whether a sequence's next step must not be planned before its last token is known, because something may be
    /// proposed after it.
    pub fn needs_each_token(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| sequence.needs_each_token)
    }

    /// Numbers for metrics.
    pub fn stats(&self) -> DrafterStats {
        DrafterStats {
            forecast: self.goodput.controller().forecast(),
            n_breaker_opened: self.breaker.n_opened(),
            is_in_use: self.connection.is_some() && self.breaker.is_closed(),
            latency_ms: self.latency_ms.unwrap_or(0.0),
            ..self.counters
        }
    }

    /// The draft model in use.
    pub fn draft_model(&self) -> Option<&str> {
        self.connection.as_ref().map(|connection| connection.about.model.as_str())
    }

    fn costs<'a>(&self, open: &[Open], times: &'a StepTimes) -> Option<Costs<'a>> {
        let lengths = open.iter().filter_map(|(id, _)| Some(self.sequences.get(id)?.tokens().len()));
        self.costs_of(lengths, times)
    }

    fn costs_of<'a>(&self, lengths: impl Iterator<Item = usize>, times: &'a StepTimes) -> Option<Costs<'a>> {
        let costs = Costs::of(times, lengths, self.drafting())?;
        Some(if self.reads_prompts { costs.beside_prompts(times) } else { costs })
    }

    /// What enters the next step of each sequence that can use proposals; `open` has how many each can use.
    pub fn propose(
        &mut self,
        open: &[Open],
        load: StepLoad,
        times: &StepTimes,
    ) -> Vec<(SequenceId, Vec<Guess>)> {
        let mut offers: Vec<Offer> = Vec::new();
        for (id, room) in open {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            if let Some(is_available) = sequence.remote.is_available() {
                self.availability +=
                    AVAILABILITY_RATE * (f64::from(u8::from(is_available)) - self.availability);
            }
            let (proposal, estimates) = sequence.proposal(*room, &self.table);
            offers.push((*id, proposal, estimates));
        }
        let acceptance: Vec<Vec<f64>> = offers.iter().map(|(_, _, estimates)| estimates.clone()).collect();
        let costs = self.costs(open, times);
        let mut choice = costs.map(|costs| self.goodput.choose(&acceptance, load, &costs));
        for (i, (_, proposal, _)) in offers.iter_mut().enumerate() {
            proposal.truncate(choice.as_ref().map_or(0, |choice| choice.n_proposed[i]));
        }
        let waited_ms = self.waited.as_secs_f64() * 1e3;
        let branches = match (&mut choice, &costs) {
            (Some(choice), Some(costs)) if self.has_branches => self.goodput.add_branches(
                choice,
                self.branch_offers(&offers, times),
                load,
                (waited_ms, costs),
            ),
            _ => Vec::new(),
        };
        let (mut by_sequence, mut proposals) = (BTreeMap::new(), Vec::new());
        for (i, (id, proposal, _)) in offers.into_iter().enumerate().filter(|(_, offer)| !offer.1.is_empty())
        {
            let guess = |(place, proposed): (usize, &ProposedToken)| {
                let is_taken = branches.iter().any(|branch| (branch.sequence, branch.place) == (i, place));
                let second = proposed.second.filter(|_| is_taken).map(|second| second.token);
                Guess { token: proposed.token, second }
            };
            proposals.push((id, proposal.iter().enumerate().map(guess).collect()));
            by_sequence.insert(id, proposal);
        }
        let members = std::mem::take(&mut self.turns.members).into_iter().map(|(id, _)| id).collect();
        let waited = std::mem::take(&mut self.waited);
        self.next = Some(Proposed { choice, by_sequence, members, waited });
        proposals
    }

    /// Second guesses beside proposals that enter the step.
    fn branch_offers(&self, offers: &[Offer], times: &StepTimes) -> Vec<BranchOffer> {
        let mut found = Vec::new();
        for (sequence, (id, proposal, estimates)) in offers.iter().enumerate() {
            let (mut reached, n_tokens) = (1.0, self.sequences[id].tokens().len());
            for (place, (proposed, estimate)) in proposal.iter().zip(estimates).enumerate() {
                if let Some(second) = &proposed.second {
                    // Never more than what is left by the first guess.
                    let share = self.table.estimate_second(place, second).min(1.0 - estimate);
                    let read_ms = times.read_ms(n_tokens);
                    found.push(BranchOffer { sequence, place, probability: reached * share, read_ms });
                }
                reached *= estimate;
            }
        }
        found
    }

    /// A step was sent, with what was proposed last.
    pub fn planned(&mut self, plan: &StepPlan) {
        self.in_flight.push_back(InFlight {
            step: plan.step,
            load: Load::of(plan),
            n_plain_tokens: plan.chunks.iter().filter(|chunk| chunk.n_sampled > 0).count(),
            proposed: self.next.take(),
        });
    }

    /// Whether the draft service is at work beside steps, on what is said to be a machine of its own.
    pub fn drafts_ahead(&self) -> bool {
        self.placement == Placement::Apart && self.drafting() == Drafting::Busy
    }

    /// Whether the draft service is at work now.
    pub fn drafting(&self) -> Drafting {
        let is_busy = self.sequences.values().any(|sequence| match self.placement {
            Placement::Apart => sequence.remote.is_drafting(),
            Placement::Together => sequence.remote.waiting().is_some(),
        });
        if is_busy { Drafting::Busy } else { Drafting::Quiet }
    }

    /// The group is formed anew: steps in flight are never answered.
    pub fn group_lost(&mut self) {
        self.in_flight.clear();
        self.next = None;
    }

    /// A step was answered: what became of its proposals, what it took.
    pub fn step_done(&mut self, step: StepNumber, outcomes: &[Verified], end: &StepEnd, times: &StepTimes) {
        let Some(at) = self.in_flight.iter().position(|in_flight| in_flight.step == step) else { return };
        let in_flight = self.in_flight.drain(..=at).next_back().expect("invariant: it is there");
        let InFlight { load, n_plain_tokens, proposed, .. } = in_flight;
        let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
        let waited = proposed.as_ref().map_or(Duration::ZERO, |proposed| proposed.waited);
        let proposals = |outcome: &Verified| {
            let proposal = proposed.as_ref()?.by_sequence.get(&outcome.sequence)?;
            Some(&proposal[..outcome.n_proposed.min(proposal.len())])
        };
        let verified = outcomes.iter().filter_map(proposals).flatten();
        let done = Done {
            load,
            n_verified: outcomes.iter().map(|outcome| outcome.n_proposed + outcome.n_branches).sum(),
            n_plain_tokens,
            n_tokens: end.n_tokens,
            elapsed_ms: millis(end.elapsed.saturating_sub(waited)),
            compute_ms: millis(end.compute),
            waited_ms: millis(waited),
            ran_ahead: end.ran_ahead,
            drafting: end.drafting,
            has_drafted: verified.into_iter().any(|proposed| proposed.source == Source::Draft),
        };
        let choice = proposed.as_ref().and_then(|proposed| proposed.choice.as_ref());
        self.goodput.step_done(choice, &done, times);
        self.is_due = true;
        if let Some(proposed) = &proposed {
            self.charge(proposed, outcomes, &done, times);
        }
        for outcome in outcomes {
            let Some(proposal) = proposals(outcome) else { continue };
            if let Some(sequence) = self.sequences.get_mut(&outcome.sequence) {
                sequence.verified(&self.table, proposal, outcome.n_accepted);
                sequence.branched(outcome.n_branches, outcome.took_branch);
            }
            self.table.observe(proposal, outcome.n_accepted, outcome.correction);
            let of_draft = &mut self.counters.sources[Source::Draft.idx()];
            of_draft.add_branches(outcome.n_branches, outcome.took_branch);
            for source in Source::ALL {
                self.counters.sources[source.idx()].add(source, proposal, outcome.n_accepted);
            }
        }
    }
}

impl Drafter {
    /// What a turn has cost and brought each of its sequences.
    fn charge(&mut self, proposed: &Proposed, outcomes: &[Verified], done: &Done, times: &StepTimes) {
        let n_members = proposed.members.len().max(1) as f64;
        let row_ms = times.predict(Load::plain(done.n_plain_tokens)).unwrap_or(0.0);
        for id in &proposed.members {
            let outcome = outcomes.iter().find(|outcome| outcome.sequence == *id);
            let n_won =
                outcome.map_or(0, |outcome| outcome.n_accepted + usize::from(outcome.took_branch)) as f64;
            if let Some(sequence) = self.sequences.get_mut(id) {
                let saved_ms = n_won * row_ms / done.n_plain_tokens.max(1) as f64;
                sequence.drafting_cost(done.waited_ms / n_members - saved_ms);
            }
        }
    }
}

/// The time, which tests can set.
fn clock() -> Instant {
    TokioInstant::now().into_std()
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod speed_tests;
#[cfg(test)]
#[path = "drafter_tests.rs"]
mod tests;
