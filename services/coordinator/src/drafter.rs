//! Proposals for the sequences of the next step, from the draft service and from their own tokens. It decides how many
//! are worth a row, never what is generated; without it, or when it fails in any way, decoding goes on as if it were not
//! there.
//!
//! The engine tells it what happens ([`Drafter::submit`], [`Drafter::committed`], [`Drafter::finish`]), asks before each
//! plan ([`Drafter::collect`], [`Drafter::propose`]), and tells what became of it ([`Drafter::planned`],
//! [`Drafter::step_done`]).

pub mod goodput;
pub mod link;
pub mod remote;
pub mod sequence;

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use paceline_domain::{DraftAnswer, DraftControl, SequenceId, StepNumber, StepPlan, TokenId};
use paceline_speculation::{
    AcceptanceTable, Breaker, BreakerConfig, Choice, Fault, ProposedToken, Source, SourceCounters,
    StepCost as _, StepLoad, controller::Forecast,
};
use paceline_wire::draft::ControlFrame;
use tokio::{
    sync::mpsc,
    time::{Instant as TokioInstant, timeout_at},
};
use tonic::transport::Uri;

use self::{
    goodput::{Done, Drafting, Goodput},
    link::{About, Link, LinkEvent, Target},
    sequence::{NewSequence, Sequence},
};

/// Fewest tokens a request may generate for a draft session to be worth its prompt.
const WORTH_A_SESSION: usize = 8;
/// How long nothing is waited for after a wait was in vain; twice as long after each further one.
const WAITS: BreakerConfig = BreakerConfig {
    max_late: 1,
    first_pause: Duration::from_millis(250),
    longest_pause: Duration::from_secs(8),
};
/// Silence beyond this many usual latencies is a fault, and beyond this time at least.
const PATIENCE: (f64, Duration) = (8.0, Duration::from_millis(500));
/// Further silence for each token that the service must read first.
const PATIENCE_A_TOKEN: Duration = Duration::from_millis(10);

/// How to propose.
#[derive(Clone, Debug)]
pub struct DrafterConfig {
    /// Where the draft service is, if there is one.
    pub service: Option<Uri>,
    /// What it must fit.
    pub target: Target,
    /// Most tokens it may draft ahead.
    pub max_ahead: u32,
    /// The longest that a step waits for a proposal.
    pub max_wait: Duration,
}

/// A connection to the draft service.
#[derive(Debug)]
struct Connection {
    about: About,
    outbox: mpsc::Sender<ControlFrame>,
}

/// Proposals of a step.
#[derive(Debug)]
struct Proposed {
    choice: Choice,
    by_sequence: BTreeMap<SequenceId, Vec<ProposedToken>>,
    waited: Duration,
}

/// A step with its proposals.
#[derive(Debug)]
struct InFlight {
    step: StepNumber,
    n_rows: usize,
    n_plain_tokens: usize,
    proposed: Option<Proposed>,
    drafting: Drafting,
}

/// What became of a sequence's proposals in a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// Whose.
    pub sequence: SequenceId,
    /// Proposals that were verified.
    pub n_proposed: usize,
    /// Those of them, from the first on, that were accepted.
    pub n_accepted: usize,
}

/// Numbers for metrics.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct DrafterStats {
    /// What became of proposals, by source.
    pub sources: [SourceCounters; Source::ALL.len()],
    /// What was predicted of steps and what came.
    pub forecast: Forecast,
    /// How often the draft service was left out.
    pub n_breaker_opened: u64,
    /// Milliseconds from a commit to the first token drafted after it.
    pub latency_ms: f64,
}

/// Proposes for all sequences of one group.
#[derive(Debug)]
pub struct Drafter {
    config: DrafterConfig,
    link: Option<Link>,
    connection: Option<Connection>,
    breaker: Breaker,
    /// Whether waiting for a first token has been in vain lately.
    waits: Breaker,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Ends of sessions that the service was not told yet.
    farewells: DraftControl,
    table: AcceptanceTable,
    goodput: Goodput,
    next: Option<Proposed>,
    in_flight: VecDeque<InFlight>,
    waited: Duration,
    latency_ms: Option<f64>,
    counters: [SourceCounters; Source::ALL.len()],
    /// What was logged last, so that a problem is logged once.
    problem: Option<String>,
}

impl Drafter {
    /// Begins to connect, if there is a service. Must be called inside a Tokio runtime.
    pub fn new(config: DrafterConfig) -> Self {
        let link = config.service.clone().map(|service| Link::start(service, config.target.clone()));
        Self {
            config,
            link,
            connection: None,
            breaker: Breaker::new(BreakerConfig::default()),
            waits: Breaker::new(WAITS),
            sequences: BTreeMap::new(),
            farewells: DraftControl::default(),
            table: AcceptanceTable::new(),
            goodput: Goodput::default(),
            next: None,
            in_flight: VecDeque::new(),
            waited: Duration::ZERO,
            latency_ms: None,
            counters: [SourceCounters::default(); Source::ALL.len()],
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
        sequence.remote.close(&mut self.farewells);
        if self.sequences.is_empty() {
            self.goodput.idle();
        }
        Some(sequence.counters())
    }

    /// Whether a sequence's next step must not be planned before its last token is known, because something may be
    /// proposed after it.
    pub fn needs_each_token(&mut self, id: SequenceId) -> bool {
        let is_drafting = self.connection.is_some() && self.breaker.is_closed();
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        if is_drafting && sequence.remote.is_drafting() {
            return true;
        }
        !sequence.proposal(1, &self.table).0.is_empty()
    }

    /// Numbers for metrics.
    pub fn stats(&self) -> DrafterStats {
        DrafterStats {
            sources: self.counters,
            forecast: self.goodput.controller().forecast(),
            n_breaker_opened: self.breaker.n_opened(),
            latency_ms: self.latency_ms.unwrap_or(0.0),
        }
    }

    /// The draft model in use.
    pub fn draft_model(&self) -> Option<&str> {
        self.connection.as_ref().map(|connection| connection.about.model.as_str())
    }

    /// Takes in what has come, without waiting, and tells the service what changed: one frame for everything.
    pub fn flush(&mut self, now: Instant) {
        while let Some(event) = self.link.as_mut().and_then(Link::try_next) {
            self.happened(event, now);
        }
        self.check_silence(now);
        // Where there is nothing to ask for, a question would be wasted.
        let has_questions =
            self.breaker.is_closed() || self.sequences.values().any(|one| one.allows(Source::Draft));
        if self.connection.is_none() || !has_questions || !self.breaker.allows(now) {
            return;
        }
        let mut frame = std::mem::take(&mut self.farewells);
        self.fill(&mut frame, now);
        self.send(&frame, now);
    }

    fn fill(&mut self, frame: &mut DraftControl, now: Instant) {
        let Some(Connection { about, .. }) = &self.connection else { return };
        let may_draft = self.goodput.may_draft();
        let mut n_open = self.sequences.values().filter(|sequence| sequence.remote.is_open()).count();
        for sequence in self.sequences.values_mut() {
            let ahead = sequence.worth_ahead(self.config.max_ahead);
            let is_open = sequence.remote.is_open();
            let is_worth = is_open || (n_open < about.max_sessions && sequence.n_left() >= WORTH_A_SESSION);
            let fits = sequence.tokens().len() + ahead as usize <= about.context;
            let may_draft = may_draft && fits && is_worth && sequence.allows(Source::Draft);
            sequence.tell(if may_draft { ahead } else { 0 }, now, frame);
            n_open += usize::from(sequence.remote.is_open() && !is_open);
        }
    }

    fn send(&mut self, frame: &DraftControl, now: Instant) {
        let Some(connection) = self.connection.as_ref().filter(|_| !frame.is_empty()) else { return };
        match connection.outbox.try_send(frame.into()) {
            Ok(()) => {}
            // What it missed it cannot be told later: it has to be told everything, on a new connection.
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.fault(Fault::Dead, "it does not read", now);
                self.lose();
            }
            // The link will say why.
            Err(mpsc::error::TrySendError::Closed(_)) => self.lose(),
        }
    }

    /// The service has budget and says nothing.
    fn check_silence(&mut self, now: Instant) {
        let usual = Duration::from_secs_f64(PATIENCE.0 * self.latency_ms.unwrap_or(0.0) / 1e3);
        let least = usual.max(PATIENCE.1);
        let waiting: Vec<_> =
            self.sequences.values().filter_map(|sequence| sequence.remote.waiting()).collect();
        let is_silent = |one: &&remote::Waiting| {
            now.saturating_duration_since(one.since) > least + PATIENCE_A_TOKEN * one.n_unread as u32
        };
        let n_silent = waiting.iter().filter(is_silent).count();
        // One session may starve behind others; when all are silent the service is.
        if n_silent > 0 && n_silent == waiting.len() {
            self.fault(Fault::Dead, "it says nothing", now);
        }
    }

    fn fault(&mut self, fault: Fault, problem: &str, now: Instant) {
        self.breaker.fault(fault, now);
        self.note(format!("the draft service is left out for a while: {problem}"));
        // It may be in any state: after the pause every session is opened anew.
        self.sequences.values_mut().for_each(|sequence| {
            sequence.remote.close(&mut self.farewells);
            sequence.remote.forget();
        });
    }

    fn lose(&mut self) {
        self.connection = None;
        self.farewells = DraftControl::default();
        self.sequences.values_mut().for_each(|sequence| sequence.remote.forget());
    }

    fn note(&mut self, problem: String) {
        if self.problem.as_ref() != Some(&problem) {
            tracing::warn!(problem, "drafting");
            self.problem = Some(problem);
        }
    }

    fn happened(&mut self, event: LinkEvent, now: Instant) {
        match event {
            LinkEvent::Up(about, outbox) => {
                tracing::info!(
                    model = about.model,
                    max_sessions = about.max_sessions,
                    "draft service connected"
                );
                self.lose();
                self.problem = None;
                self.breaker.answered();
                self.connection = Some(Connection { about, outbox });
            }
            LinkEvent::Said(answer, n_malformed) => self.said(&answer, n_malformed, now),
            LinkEvent::Down(problem) | LinkEvent::Refused(problem) => {
                self.lose();
                self.note(problem);
            }
        }
    }

    fn said(&mut self, answer: &DraftAnswer, n_malformed: usize, now: Instant) {
        let mut nonsense = (n_malformed > 0).then(|| format!("{n_malformed} malformed messages"));
        let mut n_useful = 0;
        for proposal in &answer.proposals {
            let Some(sequence) = self.sequences.get_mut(&SequenceId(proposal.session)) else { continue };
            let waiting = sequence.remote.waiting();
            match sequence.proposed(proposal, self.config.target.n_vocab) {
                Ok(()) => n_useful += usize::from(sequence.remote.buffer().next().is_some()),
                Err(remote::Nonsense(problem)) => nonsense = Some(problem),
            }
            if let Some(waiting) = waiting.filter(|_| sequence.remote.waiting().is_none()) {
                let ms = now.saturating_duration_since(waiting.since).as_secs_f64() * 1e3;
                self.latency_ms = Some(self.latency_ms.map_or(ms, |usual| usual + 0.1 * (ms - usual)));
            }
        }
        for nack in &answer.nacks {
            let Some(sequence) = self.sequences.get_mut(&SequenceId(nack.session)) else { continue };
            match nack.have_len {
                0 => sequence.remote.given_up(nack.generation, now),
                have_len => sequence.remote.lacks(nack.generation, have_len as usize),
            }
        }
        match nonsense {
            Some(problem) => self.fault(Fault::Nonsense, &problem, now),
            None if n_useful > 0 => self.breaker.answered(),
            None => {}
        }
    }

    /// Tells the service what changed, and waits for its first token where that is worth it, never beyond the configured
    /// time. `open` are the sequences that proposals can be used for.
    pub async fn collect(&mut self, open: &[(SequenceId, usize)], now: Instant) {
        self.flush(now);
        self.waited = Duration::ZERO;
        let Some(wait) = self.worth_waiting(open).filter(|_| self.waits.allows(now)) else { return };
        let deadline = now + wait;
        let lacks = |drafter: &Self| open.iter().any(|(id, _)| drafter.is_awaited(*id));
        while lacks(self) {
            let Some(link) = self.link.as_mut() else { break };
            match timeout_at(TokioInstant::from_std(deadline), link.next()).await {
                Ok(Some(event)) => self.happened(event, Instant::now()),
                Ok(None) | Err(_) => break,
            }
        }
        if lacks(self) {
            self.waits.fault(Fault::Late, now);
        } else {
            self.waits.answered();
        }
        self.waited = now.elapsed();
    }

    fn is_awaited(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| sequence.remote.waiting().is_some())
    }

    /// How long to wait for a first drafted token, if one that comes as quickly as usual would raise the rate.
    fn worth_waiting(&self, open: &[(SequenceId, usize)]) -> Option<Duration> {
        let latency_ms = self.latency_ms?;
        let n_awaited = open.iter().filter(|(id, _)| self.is_awaited(*id)).count();
        let is_paying = self.breaker.is_closed() && self.goodput.may_draft();
        let times = self.goodput.times(Drafting::Busy);
        if n_awaited == 0 || !is_paying || !times.is_measured() {
            return None;
        }
        let typical = ProposedToken { token: TokenId(0), source: Source::Draft, confidence: 0.8 };
        let gain = n_awaited as f64 * self.table.estimate(0, &typical);
        let n = open.len();
        let plain_rate = n as f64 / times.step_ms(n);
        let rate = (n as f64 + gain) / (times.step_ms(n + n_awaited) + latency_ms);
        let wait = Duration::from_secs_f64(1.5 * latency_ms / 1e3).min(self.config.max_wait);
        (rate > 1.05 * plain_rate && !wait.is_zero()).then_some(wait)
    }

    /// What enters the next step of each sequence that can use proposals; `open` has how many each can use.
    pub fn propose(
        &mut self,
        open: &[(SequenceId, usize)],
        load: StepLoad,
    ) -> Vec<(SequenceId, Vec<TokenId>)> {
        let mut offers = Vec::new();
        for (id, room) in open {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            let (proposal, estimates) = sequence.proposal(*room, &self.table);
            offers.push((*id, proposal, estimates));
        }
        let acceptance: Vec<Vec<f64>> = offers.iter().map(|(_, _, estimates)| estimates.clone()).collect();
        let wait_ms = self.waited.as_secs_f64() * 1e3;
        let choice = self.goodput.choose(&acceptance, load, wait_ms, self.drafting());
        let mut by_sequence = BTreeMap::new();
        for ((id, mut proposal, _), n) in offers.into_iter().zip(&choice.n_proposed) {
            proposal.truncate(*n);
            if !proposal.is_empty() {
                by_sequence.insert(id, proposal);
            }
        }
        let tokens = |proposal: &Vec<ProposedToken>| proposal.iter().map(|one| one.token).collect();
        let proposals = by_sequence.iter().map(|(id, proposal)| (*id, tokens(proposal))).collect();
        self.next = Some(Proposed { choice, by_sequence, waited: std::mem::take(&mut self.waited) });
        proposals
    }

    /// A step was sent, with what was proposed last.
    pub fn planned(&mut self, plan: &StepPlan) {
        self.in_flight.push_back(InFlight {
            step: plan.step,
            n_rows: plan.n_rows(),
            n_plain_tokens: plan.chunks.iter().filter(|chunk| chunk.n_sampled > 0).count(),
            proposed: self.next.take(),
            drafting: self.drafting(),
        });
    }

    fn drafting(&self) -> Drafting {
        let is_busy = self.sequences.values().any(|sequence| sequence.remote.is_drafting());
        if is_busy { Drafting::Busy } else { Drafting::Quiet }
    }

    /// The group is formed anew: steps in flight are never answered.
    pub fn group_lost(&mut self) {
        self.in_flight.clear();
        self.next = None;
    }

    /// A step was answered: what became of its proposals, how many tokens it gave, how long it took.
    pub fn step_done(&mut self, step: StepNumber, outcomes: &[Outcome], n_tokens: usize, elapsed: Duration) {
        let Some(at) = self.in_flight.iter().position(|in_flight| in_flight.step == step) else { return };
        let in_flight = self.in_flight.drain(..=at).next_back().expect("invariant: it is there");
        let InFlight { n_rows, n_plain_tokens, proposed, drafting, .. } = in_flight;
        let done = Done {
            n_rows,
            n_verified: outcomes.iter().map(|outcome| outcome.n_proposed).sum(),
            n_plain_tokens,
            n_tokens,
            ms: elapsed.as_secs_f64() * 1e3,
            waited_ms: proposed.as_ref().map_or(0.0, |proposed| proposed.waited.as_secs_f64() * 1e3),
            drafting,
        };
        if let Some(Proposed { choice, .. }) = &proposed {
            self.goodput.account(choice, &done);
        }
        self.goodput.measure(&done);
        let Some(proposed) = proposed else { return };
        for outcome in outcomes {
            let Some(proposal) = proposed.by_sequence.get(&outcome.sequence) else { continue };
            let proposal = &proposal[..outcome.n_proposed.min(proposal.len())];
            if let Some(sequence) = self.sequences.get_mut(&outcome.sequence) {
                sequence.verified(&self.table, proposal, outcome.n_accepted);
            }
            self.table.observe(proposal, outcome.n_accepted);
            for source in Source::ALL {
                self.counters[source.idx()].add(source, proposal, outcome.n_accepted);
            }
        }
    }
}

#[cfg(test)]
#[path = "drafter_tests.rs"]
mod tests;
