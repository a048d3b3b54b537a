//! Drafter and scheduler as they are, on a machine that is simulated: steps of the target and passes of the draft take
//! what they are said to take, on a clock that is not real, so that speeds are the same on every machine and in every run.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use paceline_domain::{
    Digest, Epoch, SampledToken, SamplingParams, SequenceId, SequenceSamples, Speculation,
    SpeculationOptions, StepPlan, StepResult, StepTimings, TokenId,
};
use paceline_draft::{
    choice::Drafted,
    planner::{Chunk, PassLimits, plan},
    sessions::{Limits as SessionLimits, Sessions, StreamId},
};
use paceline_speculation::{Source, StepLoad};
use paceline_wire::{draft::ControlFrame, draft_frames};
use tokio::{sync::mpsc, time::sleep};
use tracing::Span;

use super::{
    Drafter, DrafterConfig, DrafterStats, NewSequence, Placement, StepEnd, clock,
    link::{About, Link, LinkEvent, Outbox, Target},
};
use crate::scheduler::{self, ItlBound, Limits, Pace, Priority, Scheduler};

const N_VOCAB: u32 = 50_000;
const STREAM: StreamId = StreamId(1);
/// What is around a step that was not sent before the one before was done.
const GAP_MS: u64 = 1;

/// Cores that one or two models compute on; two together take longer than one after the other.
#[derive(Debug, Default)]
struct Machine {
    n_busy: AtomicU32,
}

impl Machine {
    async fn work(&self, ms: f64) {
        self.n_busy.fetch_add(1, Ordering::Relaxed);
        let mut left = ms;
        while left > 0.0 {
            // The clock's finest step.
            sleep(Duration::from_millis(1)).await;
            left -= if self.n_busy.load(Ordering::Relaxed) > 1 { 0.42 } else { 1.0 };
        }
        self.n_busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What models take, and where they compute.
#[derive(Clone, Debug)]
pub struct Hardware {
    /// Milliseconds of a step by its rows.
    pub step_ms: fn(usize) -> f64,
    /// Milliseconds of a pass of the draft by its rows.
    pub pass_ms: fn(usize) -> f64,
    /// Where the draft really computes.
    pub draft_is: Placement,
    /// What the coordinator was told of that.
    pub placement: Placement,
}

/// A request: its text, and how often the draft is right.
#[derive(Clone, Debug)]
pub struct Request {
    /// Tokens of its prompt.
    pub n_prompt: usize,
    /// Tokens after which it repeats itself; 0 is never.
    pub period: usize,
    /// Tokens it generates.
    pub n_tokens: usize,
    /// Share of tokens that the draft foresees.
    pub alpha: f64,
    /// Who may propose.
    pub mode: Speculation,
}

/// Texts by sequence, and how often the draft is right.
type Truth = Arc<Mutex<BTreeMap<u64, (Vec<TokenId>, f64)>>>;

/// A cluster of one target and one draft.
pub struct World {
    hardware: Hardware,
    machine: Arc<Machine>,
    truth: Truth,
    scheduler: Scheduler,
    drafter: Drafter,
    /// Plans with the time they were sent.
    in_flight: VecDeque<(StepPlan, Instant)>,
    last_done: Option<Instant>,
    n_left: BTreeMap<SequenceId, usize>,
    n_texts: u64,
    /// The draft stops for so long at its next pass.
    hang: Arc<Mutex<Option<Duration>>>,
    death: Arc<Mutex<Death>>,
    /// Verified tokens of the draft after each step.
    drafted: Vec<(Instant, u64)>,
    /// What passes of few rows take beside what they are said to.
    slowness: Slowness,
}

/// Memory is faster or slower for a while: what passes of few rows take beside what they are said to.
#[derive(Clone, Debug)]
struct Slowness(Arc<Mutex<f64>>);

impl Slowness {
    fn of(&self, n_rows: usize, ms: f64) -> f64 {
        if n_rows <= 8 { ms * *self.0.lock().expect("no task panicked") } else { ms }
    }
}

/// The draft service ends at its next pass, and another one takes its place.
#[derive(Clone, Copy, Debug, Default)]
struct Death {
    pause: Option<Duration>,
    /// When the other one was there.
    replaced: Option<Instant>,
}

/// A number in 0 .. 1 that follows from others.
fn chance(seed: u64, position: u64) -> f64 {
    let mixed = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ position).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((mixed ^ (mixed >> 32)) >> 11) as f64 / (1u64 << 53) as f64
}

/// What the draft says after a history: the truth, as often as it foresees it.
fn drafted(truth: &Truth, session: u64, history: &[TokenId]) -> (TokenId, f32) {
    let truth = truth.lock().expect("no task panicked");
    let Some((text, alpha)) = truth.get(&session) else { return (TokenId(1), 0.1) };
    let position = history.len();
    let seed = session.wrapping_mul(77) + 5;
    let is_right =
        position < text.len() && history == &text[..position] && chance(seed, position as u64) < *alpha;
    // The draft is surer of what is right, but not always.
    let noise = chance(seed + 1, position as u64) as f32;
    let confidence = if is_right { 0.55 + 0.45 * noise } else { 0.15 + 0.7 * noise };
    (if is_right { text[position] } else { TokenId(N_VOCAB - 1) }, confidence)
}

/// A connection to the draft service, and where its frames come out.
fn connection() -> (LinkEvent, mpsc::Receiver<ControlFrame>) {
    // A real connection has buffers, too.
    let (outbox, frames) = mpsc::channel(64);
    let about = About { model: "draft".into(), context: 4_000, max_sessions: 16 };
    (LinkEvent::Up(about, Outbox::new(outbox).0), frames)
}

/// The draft service: its real sessions and planner, a pass that takes what it is said to.
async fn draft_service(
    mut frames: mpsc::Receiver<ControlFrame>,
    events: mpsc::Sender<LinkEvent>,
    (machine, hardware, truth, slowness): (Arc<Machine>, Hardware, Truth, Slowness),
    hang: Arc<Mutex<Option<Duration>>>,
    death: Arc<Mutex<Death>>,
) {
    let limits =
        SessionLimits { max_sessions: 16, context: 4_000, n_vocab: N_VOCAB, max_ahead: 16, n_kv_blocks: 999 };
    let mut sessions = Sessions::new(limits);
    loop {
        if sessions.waiting().is_empty() {
            match frames.recv().await {
                Some(frame) => sessions.control(STREAM, draft_frames::control(frame).0),
                // The connection was given up: here is another one.
                None => {
                    let (up, queue) = connection();
                    (frames, sessions) = (queue, Sessions::new(limits));
                    if events.send(up).await.is_err() {
                        return;
                    }
                }
            }
        }
        while let Ok(frame) = frames.try_recv() {
            sessions.control(STREAM, draft_frames::control(frame).0);
        }
        let chunks: Vec<Chunk> = plan(&mut sessions, PassLimits { max_rows: 256, prompt_rows: 32 });
        let dies = death.lock().expect("no task panicked").pause.take_if(|_| !chunks.is_empty());
        if let Some(pause) = dies {
            let down = events.send(LinkEvent::Down("a test has killed it".into())).await;
            sleep(pause).await;
            let (up, queue) = connection();
            (frames, sessions) = (queue, Sessions::new(limits));
            if down.is_err() || events.send(up).await.is_err() {
                return;
            }
            death.lock().expect("no task panicked").replaced = Some(clock());
            continue;
        }
        if !chunks.is_empty() {
            let pause = hang.lock().expect("no task panicked").take();
            sleep(pause.unwrap_or_default()).await;
            let n_rows = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
            machine.work(slowness.of(n_rows, (hardware.pass_ms)(n_rows))).await;
        }
        for chunk in &chunks {
            sessions.computed(chunk.key, chunk.end());
            if chunk.is_last {
                let history = sessions.get(chunk.key).expect("it is live").history().tokens();
                let (token, confidence) = drafted(&truth, chunk.key.1, history);
                sessions.drafted(chunk.key, Drafted { token, confidence, second: None });
            }
        }
        for (_, answer) in sessions.take_answers() {
            if events.send(LinkEvent::Said(answer, 0)).await.is_err() {
                return;
            }
        }
    }
}

impl World {
    /// With a draft service that is connected.
    pub fn new(hardware: Hardware) -> Self {
        let (machine, truth) = (Arc::new(Machine::default()), Truth::default());
        let (events, inbox) = mpsc::channel(64);
        let (up, frames) = connection();
        events.try_send(up).expect("there is room");
        let of_draft = match hardware.draft_is {
            Placement::Apart => Arc::new(Machine::default()),
            Placement::Together => machine.clone(),
        };
        let hang = Arc::new(Mutex::new(None));
        let slowness = Slowness(Arc::new(Mutex::new(1.0)));
        let parts = (of_draft, hardware.clone(), truth.clone(), slowness.clone());
        let death = Arc::new(Mutex::new(Death::default()));
        tokio::spawn(draft_service(frames, events, parts, hang.clone(), death.clone()));
        let mut drafter = Drafter::new(DrafterConfig {
            service: None,
            target: Target { model: "target".into(), tokenizer: Digest([3; 32]), n_vocab: N_VOCAB },
            max_ahead: 12,
            max_wait: Duration::from_millis(400),
            placement: hardware.placement,
        });
        drafter.link = Some(Link::of(inbox));
        let mut scheduler = Scheduler::new(Limits {
            max_rows: 256,
            max_sampled_rows: 128,
            max_sequences: 16,
            itl_bound: ItlBound::Twice,
            run_ahead_below: Duration::from_millis(100),
            promote_after: 16,
            model: Digest([7; 32]),
        });
        scheduler.begin_epoch(Epoch(1), 4_000);
        Self {
            hardware,
            machine,
            truth,
            scheduler,
            drafter,
            in_flight: VecDeque::new(),
            last_done: None,
            n_left: BTreeMap::new(),
            n_texts: 0,
            hang,
            death,
            drafted: Vec::new(),
            slowness,
        }
    }

    /// From now on passes of few rows take so many times what they are said to.
    pub fn slow_down(&self, factor: f64) {
        *self.slowness.0.lock().expect("no task panicked") = factor;
    }

    /// Lets the draft end at its next pass; another one is there after a pause.
    pub fn kill(&self, pause: Duration) {
        *self.death.lock().expect("no task panicked") = Death { pause: Some(pause), replaced: None };
    }

    /// From when another draft was there until its tokens were verified; none when they were not.
    pub fn used_after(&self) -> Option<Duration> {
        let replaced = self.death.lock().expect("no task panicked").replaced?;
        let n_before = self.drafted.iter().rfind(|(at, _)| *at <= replaced).map_or(0, |(_, n)| *n);
        let (at, _) = self.drafted.iter().find(|(_, n)| *n > n_before)?;
        Some(at.saturating_duration_since(replaced))
    }

    /// Lets the draft stop for so long at its next pass.
    pub fn hang(&self, pause: Duration) {
        *self.hang.lock().expect("no task panicked") = Some(pause);
    }

    /// Counters so far.
    pub fn stats(&self) -> DrafterStats {
        self.drafter.stats()
    }

    /// Runs requests at the same time; milliseconds until all are done.
    pub async fn run(&mut self, requests: &[Request]) -> f64 {
        let start = clock();
        requests.iter().for_each(|request| self.submit(request));
        while !self.n_left.is_empty() {
            self.send_steps().await;
            self.finish_step().await;
        }
        self.last_done = None;
        clock().saturating_duration_since(start).as_secs_f64() * 1e3
    }

    fn submit(&mut self, request: &Request) {
        self.n_texts += 1;
        let own = |i: usize| if request.period == 0 { i } else { i % request.period };
        let token = |i: usize| TokenId((chance(self.n_texts, own(i) as u64) * 49_000.0) as u32);
        let text: Vec<TokenId> = (0..request.n_prompt + request.n_tokens).map(token).collect();
        let prompt = text[..request.n_prompt].to_vec();
        let sampling = SamplingParams::greedy();
        let id = self.scheduler.submit(scheduler::NewSequence {
            prompt: prompt.clone(),
            max_tokens: request.n_tokens as u32,
            sampling: sampling.clone(),
            held_back: None,
            is_constrained: false,
            n_prompt_logprobs: None,
            tenant: self.n_texts.to_string(),
            priority: Priority::Normal,
            sibling: None,
        });
        let options = SpeculationOptions { mode: request.mode, ..SpeculationOptions::default() };
        let new = NewSequence {
            id,
            prompt: &prompt,
            sampling: &sampling,
            max_tokens: request.n_tokens,
            options,
            trace: Default::default(),
        };
        self.drafter.submit(&new);
        self.truth.lock().expect("no task panicked").insert(id.0, (text, request.alpha));
        self.n_left.insert(id, request.n_tokens);
    }

    /// As the engine does.
    async fn send_steps(&mut self) {
        loop {
            self.drafter.set_reading(self.scheduler.reads_prompts());
            if self.drafter.prepare(self.scheduler.step_times(), clock()) {
                for id in self.n_left.keys() {
                    let needs_each = self.drafter.needs_each_token(*id);
                    self.scheduler.set_pace(*id, if needs_each { Pace::StepByStep } else { Pace::RunAhead });
                }
            }
            let open: Vec<_> = self.scheduler.open_to_proposals().collect();
            let times = self.scheduler.step_times();
            self.drafter.collect(&open, times, Span::none).await;
            let load = StepLoad { n_rows: open.len().max(1), n_tokens: open.len(), n_spare_rows: 100 };
            for (id, tokens) in self.drafter.propose(&open, load, times) {
                self.scheduler.propose(id, tokens);
            }
            self.scheduler.set_drafting(self.drafter.drafting());
            if self.drafter.drafts_ahead() {
                self.scheduler.drafts_ahead();
            }
            let Some(plan) = self.scheduler.plan() else { return };
            self.drafter.planned(&plan);
            self.in_flight.push_back((plan, clock()));
        }
    }

    async fn finish_step(&mut self) {
        let (plan, sent) = self.in_flight.pop_front().expect("a step is in flight while requests are");
        let ran_ahead = self.last_done.is_some_and(|last| sent < last);
        if !ran_ahead {
            sleep(Duration::from_millis(GAP_MS)).await;
        }
        let began = clock();
        // Messages of the draft are taken in while the step runs, as far as the link's queue holds them.
        let ms = (self.hardware.step_ms)(plan.n_rows());
        self.machine.work(self.slowness.of(plan.n_rows(), ms)).await;
        let now = clock();
        let compute = now.saturating_duration_since(began);
        let elapsed = now.saturating_duration_since(self.last_done.unwrap_or(sent));
        self.last_done = Some(now);
        let result = self.result(&plan, compute);
        let step = result.step;
        let applied = self.scheduler.apply(result).expect("it answers the plan");
        let (n_tokens, drafting) = (applied.commits.len(), applied.drafting);
        let end = StepEnd { n_tokens, elapsed, compute, ran_ahead, drafting };
        self.drafter.step_done(step, &applied.verified, &end, self.scheduler.step_times());
        for commit in &applied.commits {
            self.drafter.committed(commit.sequence, &[commit.sampled.token]);
            let n_left = self.n_left.get_mut(&commit.sequence).expect("it runs");
            *n_left -= 1;
            if *n_left == 0 {
                self.n_left.remove(&commit.sequence);
                self.drafter.finish(commit.sequence);
                self.scheduler.finish(commit.sequence);
            }
        }
        self.drafter.flush(now);
        self.drafted.push((clock(), self.stats().sources[Source::Draft.idx()].draft_tokens));
    }

    /// What the target says: the truth.
    fn result(&self, plan: &StepPlan, compute: Duration) -> StepResult {
        let truth = self.truth.lock().expect("no task panicked");
        let sampling = plan.chunks.iter().filter(|chunk| chunk.n_sampled > 0);
        let samples = sampling.map(|chunk| {
            let (text, _) = &truth[&chunk.sequence.0];
            let n_proposed = chunk.n_sampled as usize - 1;
            let first = chunk.start_pos as usize + chunk.tokens.len() - n_proposed;
            let proposals = &chunk.tokens[chunk.tokens.len() - n_proposed..];
            let same = proposals.iter().zip(&text[first..]).take_while(|(one, other)| one == other);
            // A step that ran ahead may be beyond the end of a text; nobody hears what it says.
            let n = same.count() + 1;
            let tokens = (first..first + n).map(|at| text.get(at).copied().unwrap_or(TokenId(0)));
            let tokens =
                tokens.map(|token| SampledToken { token, logprob: None, top_logprobs: Vec::new() }).collect();
            SequenceSamples { sequence: chunk.sequence, tokens }
        });
        let timings = StepTimings { total_us: compute.as_micros() as u64, ..StepTimings::default() };
        let (samples, scores) = (samples.collect(), Vec::new());
        StepResult { epoch: plan.epoch, step: plan.step, samples, scores, timings }
    }
}
