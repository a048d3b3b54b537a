//! The one event loop of a group. It alone changes the scheduler and the requests; everything reaches it as an [`Event`].
//! When a rank fails it forms the group anew and every live request goes on from its tokens.

mod ends;
mod forming;
mod moving;
mod observe;
mod tell;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use paceline_domain::{Epoch, GenerateRequest, RequestId, SequenceId, StepNumber, StepPlan, StepResult};
use paceline_grammar::{GrammarError, Matcher};
use paceline_speculation::StepLoad;
use paceline_telemetry::context;
use tokio::sync::mpsc;
use tracing::Span;

use crate::{
    caller::Caller,
    client::Client,
    constraint::{Constraint, send_masks},
    deadlines::Deadlines,
    drafter::{Drafter, DrafterConfig, StepEnd, sequence},
    groups::Member,
    id_map::IdMap,
    metrics::GroupMetrics,
    output::Output,
    reader::Progress,
    scheduler::{Limits, NewSequence, Pace, Priority, Scheduler},
    shard_group::{FormError, GroupSpec, RankEvent, ShardGroup},
};

pub use moving::Moved;
use tell::Said;

/// Bits of a sequence's id below the number of the group that it was first sent to.
const GROUP_SHIFT: u32 = 48;
/// Events that may wait for the loop.
pub const MAX_EVENTS: usize = 1024;

/// Everything that can happen.
pub enum Event {
    /// A request with its place.
    Submit(Box<Submission>),
    /// A rank answered or failed.
    Rank(RankEvent),
    /// A group was formed, or could not be.
    Formed(Result<ShardGroup, FormError>),
    /// A request of a group that is lost goes on here.
    Adopt(Box<Moved>),
    /// A reader that had stalled read something, or nothing for too long.
    Reader(RequestId, Progress),
    /// The grammar of a sequence cannot go on.
    Stuck(SequenceId, GrammarError),
    /// A deadline passed.
    Due,
    /// End all requests and the loop.
    Stop,
}

/// A request on its way into the loop.
pub struct Submission {
    /// What to generate.
    pub request: GenerateRequest,
    /// The output side of each of its choices.
    pub outputs: Vec<Output>,
    /// The beginning of their grammar, if they have one.
    pub matcher: Option<Matcher>,
    /// Where chunks go; the first was sent.
    pub client: Client,
    /// Whose it is, and until when it is wanted.
    pub caller: Caller,
    /// Its class in the queue.
    pub priority: Priority,
}

/// What a loop works with.
pub struct Parts {
    /// How groups are formed.
    pub group: GroupSpec,
    /// What bounds each plan.
    pub limits: Limits,
    /// How to propose.
    pub drafter: DrafterConfig,
    /// How long a reader may stall.
    pub reader_limit: Duration,
    /// Who is told numbers.
    pub metrics: GroupMetrics,
    /// Which group it is.
    pub member: Member,
}

/// One choice of a request.
struct Active {
    request: RequestId,
    choice: u32,
    output: Output,
    constraint: Option<Constraint>,
}

/// A step whose ranks have not all answered.
struct InFlight {
    step: StepNumber,
    n_missing: usize,
    n_rows: usize,
    from_rank_0: Option<StepResult>,
    started: Instant,
    _span: Span,
}

/// The loop's state.
pub struct Engine {
    spec: GroupSpec,
    scheduler: Scheduler,
    drafter: Drafter,
    choices: IdMap<SequenceId, Active>,
    clients: IdMap<RequestId, Client>,
    /// What clients are still to hear of the last steps, and of how many.
    said: Vec<Said>,
    n_steps_said: usize,
    deadlines: Deadlines,
    /// How long a reader may stall.
    reader_limit: Duration,
    group: Option<ShardGroup>,
    /// Oldest first.
    in_flight: VecDeque<InFlight>,
    /// When the last step ended, until there is nothing more to do at once: what follows it waits from then on.
    last_done: Option<Instant>,
    /// How many were logged.
    n_preemptions: u64,
    metrics: GroupMetrics,
    member: Member,
    last_epoch: Epoch,
    /// What the bits of the last group depended on beside the model, by rank.
    device_numerics: Option<Vec<u32>>,
    form_delay: Duration,
    events: mpsc::Sender<Event>,
}

impl Engine {
    /// A loop without a group.
    pub fn new(parts: Parts) -> Self {
        let mut scheduler = Scheduler::new(parts.limits);
        scheduler.number_from(SequenceId(((parts.member.group() as u64) << GROUP_SHIFT) + 1));
        Self {
            spec: parts.group,
            scheduler,
            drafter: Drafter::new(parts.drafter),
            choices: IdMap::default(),
            clients: IdMap::default(),
            said: Vec::new(),
            n_steps_said: 0,
            deadlines: Deadlines::default(),
            reader_limit: parts.reader_limit,
            metrics: parts.metrics,
            events: parts.member.events().clone(),
            member: parts.member,
            group: None,
            in_flight: VecDeque::new(),
            last_done: None,
            n_preemptions: 0,
            last_epoch: forming::first_epoch(),
            device_numerics: None,
            form_delay: Duration::ZERO,
        }
    }

    /// Runs until [`Event::Stop`].
    pub async fn run(mut self, mut inbox: mpsc::Receiver<Event>) {
        self.form_group();
        loop {
            self.drop_abandoned();
            self.end_expired(Instant::now());
            self.start_steps().await;
            self.deliver_after_plans(&inbox).await;
            self.tell_levels();
            let event = self.next_event(&mut inbox).await;
            if !matches!(event, Some(Event::Rank(_))) {
                self.deliver();
            }
            match event {
                Some(Event::Submit(submission)) => self.submit(*submission),
                Some(Event::Adopt(moved)) => self.adopt(*moved),
                Some(Event::Rank(event)) => self.rank_event(event),
                Some(Event::Formed(outcome)) => self.formed(outcome),
                Some(Event::Reader(request, progress)) => self.reader_event(request, progress),
                Some(Event::Stuck(id, error)) => self.grammar_stuck(id, &error),
                Some(Event::Due) => {}
                Some(Event::Stop) | None => break,
            }
        }
        self.cancel_all(Instant::now());
        self.deliver();
    }

    /// What happens next, the nearest deadline included.
    async fn next_event(&self, inbox: &mut mpsc::Receiver<Event>) -> Option<Event> {
        match self.deadlines.next() {
            Some(at) => tokio::time::timeout_at(at.into(), inbox.recv()).await.unwrap_or(Some(Event::Due)),
            None => inbox.recv().await,
        }
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { request, outputs, matcher, mut client, caller, priority } = submission;
        self.metrics.accepted(request.prompt.tokens().len());
        let mut first = None;
        for (output, choice) in outputs.into_iter().zip(0..) {
            let sampling = request.sampling.of_choice(choice);
            let id = self.scheduler.submit(NewSequence {
                prompt: request.prompt.tokens().to_vec(),
                max_tokens: request.stop.max_tokens,
                sampling: sampling.clone(),
                held_back: output.held_back(),
                is_constrained: matcher.is_some(),
                tenant: caller.tenant.clone(),
                priority,
                n_prompt_logprobs: request.n_prompt_logprobs.filter(|_| choice == 0),
                sibling: first,
            });
            self.drafter.submit(&sequence::NewSequence {
                id,
                prompt: request.prompt.tokens(),
                sampling: &sampling,
                max_tokens: request.stop.max_tokens as usize,
                options: request.speculation,
                trace: context::sampled_headers(client.span()),
            });
            first.get_or_insert(id);
            client.opens(id);
            let constraint = matcher.as_ref().map(|matcher| Constraint::new(matcher.fork()));
            self.choices.insert(id, Active { request: request.id, choice, output, constraint });
            self.set_pace(id);
        }
        if let Some(deadline) = caller.deadline {
            self.deadlines.set(request.id, deadline);
        }
        self.clients.insert(request.id, client);
    }

    /// Sends steps until the next one needs an answer first.
    async fn start_steps(&mut self) {
        while self.group.is_some() {
            self.propose().await;
            self.scheduler.set_drafting(self.drafter.drafting());
            if self.drafter.drafts_ahead() {
                self.scheduler.drafts_ahead();
            }
            let Some(plan) = self.scheduler.plan() else { break };
            self.drafter.planned(&plan);
            self.send(&plan);
        }
        if self.in_flight.is_empty() {
            self.last_done = None;
        }
    }

    /// Asks for what may follow the sequences whose next step is due.
    async fn propose(&mut self) {
        self.drafter.set_reading(self.scheduler.reads_prompts());
        if self.drafter.prepare(self.scheduler.step_times(), Instant::now()) {
            for (id, choice) in &self.choices {
                self.scheduler.set_pace(*id, pace(*id, choice, &self.drafter));
            }
        }
        let open: Vec<_> = self.scheduler.open_to_proposals().collect();
        let (choices, clients, times) = (&self.choices, &self.clients, self.scheduler.step_times());
        self.drafter.collect(&open, times, || observe::draft_span(choices, clients, &open)).await;
        let n = open.len();
        let n_spare_rows = (self.spec.max_sampled_rows as usize).saturating_sub(self.choices.len());
        let load = StepLoad { n_rows: n.max(1), n_tokens: n, n_spare_rows };
        for (id, guesses) in self.drafter.propose(&open, load, times) {
            self.scheduler.propose(id, guesses);
        }
    }

    /// Until it is decided again.
    fn set_pace(&mut self, id: SequenceId) {
        if let Some(choice) = self.choices.get(&id) {
            self.scheduler.set_pace(id, pace(id, choice, &self.drafter));
        }
    }

    fn send(&mut self, plan: &StepPlan) {
        let Some(group) = &self.group else { return };
        let span = self.step_span(plan);
        group.send(plan, context::to_headers(&span));
        let constrained =
            self.choices.iter_mut().filter_map(|(id, choice)| Some((id, choice.constraint.as_mut()?)));
        let jobs = constrained.filter_map(|(id, constraint)| constraint.job(*id, plan)).collect();
        send_masks(jobs, plan, group.outboxes(), &self.events);
        let (n_missing, started) = (group.n_ranks(), Instant::now());
        self.note_scheduled(plan, started);
        self.note_preemptions();
        self.in_flight.push_back(InFlight {
            step: plan.step,
            n_missing,
            n_rows: plan.n_rows(),
            from_rank_0: None,
            started,
            _span: span,
        });
    }

    fn note_scheduled(&mut self, plan: &StepPlan, now: Instant) {
        for chunk in &plan.chunks {
            if let Some(choice) = self.choices.get_mut(&chunk.sequence) {
                choice.output.clock.scheduled.get_or_insert(now);
            }
        }
        for open in &plan.opens {
            if let Some(choice) = self.choices.get_mut(&open.sequence) {
                choice.output.note_cached(open.cached_tokens.len() as u32);
            }
        }
    }

    fn rank_event(&mut self, event: RankEvent) {
        let Some(group) = self.group.as_ref().filter(|group| group.epoch() == event.epoch) else { return };
        let n_ranks = group.n_ranks();
        let failure = match event.outcome {
            Err(status) => Some(status.message().to_owned()),
            Ok(result) => self.answer(event.rank, result).err(),
        };
        if let Some(problem) = failure {
            tracing::warn!(
                group = self.member.group(),
                rank = event.rank,
                n_ranks,
                problem,
                "group lost; forming it anew"
            );
            self.lose_group(problem);
        }
    }

    fn answer(&mut self, rank: usize, result: StepResult) -> Result<(), String> {
        // Each rank answers in order, but one may be ahead of another.
        let in_flight = self
            .in_flight
            .iter_mut()
            .find(|in_flight| in_flight.step == result.step)
            .ok_or_else(|| format!("an answer to step {} nobody asked for", result.step))?;
        tracing::trace!(rank, step = result.step.0, timings = ?result.timings, "rank answered");
        in_flight.n_missing = in_flight.n_missing.checked_sub(1).ok_or("one rank answered twice")?;
        if rank == 0 {
            in_flight.from_rank_0 = Some(result);
        }
        while let Some(done) = self.in_flight.pop_front_if(|oldest| oldest.n_missing == 0) {
            self.step_done(done)?;
        }
        Ok(())
    }

    fn step_done(&mut self, done: InFlight) -> Result<(), String> {
        let result = done.from_rank_0.ok_or("rank 0 gave no answer")?;
        let (step, now) = (result.step, Instant::now());
        let ran_ahead = self.last_done.is_some_and(|last| done.started < last);
        let elapsed = now.saturating_duration_since(self.last_done.unwrap_or(done.started));
        let compute = Duration::from_micros(result.timings.total_us);
        self.last_done = Some(now);
        tracing::debug!(step = step.0, elapsed_us = elapsed.as_micros() as u64, "step done");
        self.metrics.step(done.n_rows, elapsed);
        let applied = self.scheduler.apply(result).map_err(|error| error.to_string())?;
        let (n_tokens, drafting) = (applied.commits.len(), applied.drafting);
        let end = StepEnd { n_tokens, elapsed, compute, ran_ahead, drafting };
        self.drafter.step_done(step, &applied.verified, &end, self.scheduler.step_times());
        for commit in &applied.commits {
            self.drafter.committed(commit.sequence, &[commit.sampled.token]);
        }
        applied.scores.into_iter().for_each(|scores| self.tell_scores(&scores));
        applied.commits.into_iter().for_each(|commit| self.commit(commit, now));
        self.n_steps_said += 1;
        self.tell_totals();
        // So that drafting goes on while the next step is made.
        self.drafter.flush(now);
        Ok(())
    }
}

/// Whether steps of a choice may be planned before its last token is known.
fn pace(id: SequenceId, choice: &Active, drafter: &Drafter) -> Pace {
    let needs_each = drafter.needs_each_token(id) || choice.constraint.is_some();
    if needs_each { Pace::StepByStep } else { Pace::RunAhead }
}
