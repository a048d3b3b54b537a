//! Tests of the drafter: against a real draft service, and against one that is late, dead or talks nonsense. The target is
//! a list of tokens: sample-and-match against it is what a group of shards does.

use std::sync::Arc;

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Solo;
use paceline_domain::{
    BlockId, Digest, Epoch, KvType, SamplingParams, Scoring, SequenceChunk, Speculation, SpeculationOptions,
    WeightType,
};
use paceline_draft::{
    drafting::{self, MAX_COMMANDS},
    model::OneRank,
    planner::PassLimits,
    service::{About as Served, DraftService},
    sessions::{Limits, Sessions},
};
use paceline_kernels::Kernels;
use paceline_model::{
    Batch, Capacity, Cpu, Decoder, LoadSpec, ModelConfig, SplitPlan,
    synthetic::{Synthetic, tiny_config},
};
use paceline_sampling::{TokenHistory, sample_row};
use paceline_speculation::{Fault, controller::Forecast};
use paceline_wire::draft::{
    ControlFrame, InfoRequest, InfoResponse, Open, Proposal, ProposalFrame,
    draft_server::{Draft, DraftServer},
};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, Uri, server::TcpIncoming},
};
use tracing::Span;

use super::{
    link::{LinkEvent, Target},
    *,
};

const N_VOCAB: u32 = 257;
const ID: SequenceId = SequenceId(1);

fn target() -> Target {
    Target { model: "target".into(), tokenizer: Digest([3; 32]), n_vocab: N_VOCAB }
}

fn decoder() -> Decoder {
    let synthetic = Synthetic { config: tiny_config(), seed: 9, weight_type: |_, _| WeightType::F32 };
    let checkpoint =
        Arc::new(Checkpoint::from_gguf_bytes(synthetic.to_gguf().expect("bytes")).expect("a checkpoint"));
    let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
    let capacity = Capacity { kv_type: KvType::F16, n_kv_blocks: 64, max_rows: 256, max_output_rows: 8 };
    let plan = SplitPlan::new(&config, 1).expect("a plan");
    let spec = LoadSpec {
        checkpoint: &checkpoint,
        config: &config,
        plan: &plan,
        rank: 0,
        quantize: None,
        capacity,
        progress: &|_| (),
    };
    Decoder::load(&spec, &Cpu { kernels: Kernels::detect(), n_threads: 1 }).expect("loads")
}

/// What the model says after a prompt.
fn truth(prompt: &[TokenId], sampling: &SamplingParams, n: usize) -> Vec<TokenId> {
    let (mut decoder, blocks) = (decoder(), (0..32).map(BlockId).collect::<Vec<_>>());
    let mut history = TokenHistory::new(prompt.len());
    history.extend(prompt);
    let mut start = 0;
    while history.len() < prompt.len() + n {
        let tokens = history.tokens()[start..].to_vec();
        let positions: Vec<u32> = (start as u32..).take(tokens.len()).collect();
        let batch = Batch {
            tokens: &tokens,
            positions: &positions,
            sequence_of_row: &vec![0; tokens.len()],
            block_tables: &[&blocks],
            output_rows: &[tokens.len() - 1],
            copies: &[],
        };
        let mut logits = decoder.forward(&batch, &mut Solo::new()).expect("runs");
        start += tokens.len();
        let mut row = logits.row(0).expect("a row")[..N_VOCAB as usize].to_vec();
        history.push(sample_row(sampling, &history, start as u32, &mut row).token);
    }
    history.tokens()[prompt.len()..].to_vec()
}

/// Serves gRPC; where.
async fn serve<D: Draft>(service: D) -> Uri {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(
        Server::builder()
            .add_service(DraftServer::new(service))
            .serve_with_incoming(TcpIncoming::from(listener)),
    );
    format!("http://{address}").parse().expect("an address")
}

/// A real draft service with the target's model.
async fn real_service(tokenizer: Digest) -> Uri {
    let limits = Limits { max_sessions: 8, context: 400, n_vocab: N_VOCAB, max_ahead: 16, n_kv_blocks: 64 };
    let (commands, queue) = mpsc::channel(MAX_COMMANDS);
    let pass = PassLimits { max_rows: 32, prompt_rows: 8 };
    let model = OneRank::new(decoder(), N_VOCAB as usize);
    drafting::start(Box::new(model), Sessions::new(limits), pass, queue).expect("a thread");
    let about = Served { model: "draft".into(), tokenizer, n_vocab: N_VOCAB, context: 400, max_sessions: 8 };
    serve(DraftService::new(about, commands)).await
}

fn drafter(service: Option<Uri>) -> Drafter {
    let max_wait = Duration::from_secs(5);
    let placement = Placement::Apart;
    Drafter::new(DrafterConfig { service, target: target(), max_ahead: 8, max_wait, placement })
}

/// A group with one sequence: what a step does is looked up.
struct Group {
    drafter: Drafter,
    times: StepTimes,
    truth: Vec<TokenId>,
    n_done: usize,
    step: u64,
    /// How long a step gives the service for a first token; a real one always has it.
    patience: Duration,
}

impl Group {
    fn new(
        drafter: Drafter,
        prompt: &[TokenId],
        sampling: &SamplingParams,
        truth: Vec<TokenId>,
        mode: Speculation,
    ) -> Self {
        let (times, patience) = (StepTimes::default(), Duration::from_secs(60));
        let mut group = Self { drafter, times, truth, n_done: 0, step: 0, patience };
        group.submit(prompt, sampling, mode);
        group
    }

    fn submit(&mut self, prompt: &[TokenId], sampling: &SamplingParams, mode: Speculation) {
        self.drafter.submit(&NewSequence {
            id: ID,
            prompt,
            sampling,
            max_tokens: self.truth.len(),
            options: SpeculationOptions { mode, max_tokens: 4 },
            trace: Default::default(),
        });
    }

    /// The sequence ends, and begins anew.
    fn again(&mut self, prompt: &[TokenId], sampling: &SamplingParams) {
        self.drafter.finish(ID);
        self.n_done = 0;
        self.submit(prompt, sampling, Speculation::Draft);
    }

    /// One step: proposals, verification, commit. How many proposals were accepted, of how many.
    async fn step(&mut self) -> (usize, usize) {
        let open = [(ID, self.truth.len() - self.n_done - 1)];
        self.drafter.prepare(&self.times, Instant::now());
        self.drafter.collect(&open, &self.times, Span::none).await;
        let load = StepLoad { n_rows: 1, n_tokens: 1, n_spare_rows: 16 };
        let proposed = self.drafter.propose(&open, load, &self.times);
        let proposed = proposed.into_iter().next().map_or(Vec::new(), |(_, guesses)| guesses);
        let proposed: Vec<TokenId> = proposed.iter().map(|guess| guess.token).collect();
        let expected = &self.truth[self.n_done..];
        let n_accepted = proposed.iter().zip(expected).take_while(|(one, other)| one == other).count();
        let (n_proposed, n_tokens) = (proposed.len(), n_accepted + 1);
        self.step += 1;
        let chunk = SequenceChunk {
            sequence: ID,
            start_pos: 0,
            tokens: vec![TokenId(0); n_proposed + 1],
            new_blocks: Vec::new(),
            n_kept_blocks: 0,
            n_sampled: n_proposed as u32 + 1,
            runs_ahead: false,
            scoring: Scoring::default(),
            branches: Vec::new(),
        };
        let plan = StepPlan {
            epoch: Epoch(1),
            step: StepNumber(self.step),
            closes: Vec::new(),
            opens: Vec::new(),
            chunks: vec![chunk],
        };
        self.drafter.planned(&plan);
        let drafting = self.drafter.drafting();
        self.drafter.flush(Instant::now());
        let correction = (n_accepted < n_proposed).then(|| expected[n_accepted]);
        let outcome =
            Verified { sequence: ID, n_proposed, n_accepted, correction, n_branches: 0, took_branch: false };
        let outcomes = if n_proposed > 0 { vec![outcome] } else { Vec::new() };
        // A row more costs a twentieth: what is measured is made up, so that nothing depends on this machine.
        let elapsed = Duration::from_millis(100 + 5 * n_proposed as u64);
        self.times.observe(Load::of(&plan), elapsed.as_secs_f64() * 1e3, drafting);
        let drafting = self.drafter.drafting();
        let end = StepEnd { n_tokens, elapsed, compute: elapsed, ran_ahead: false, drafting };
        self.drafter.step_done(plan.step, &outcomes, &end, &self.times);
        self.drafter.committed(ID, &expected[..n_tokens]);
        self.n_done += n_tokens;
        // The model's own pass would take its time, too.
        let end = Instant::now() + self.patience;
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.drafter.flush(Instant::now());
        while self.drafter.is_awaited(ID) && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.drafter.flush(Instant::now());
        }
        (n_accepted, n_proposed)
    }

    /// Steps until two tokens are left; accepted and proposed tokens.
    async fn run(&mut self) -> (usize, usize) {
        let (mut n_accepted, mut n_proposed) = (0, 0);
        while self.n_done + 2 < self.truth.len() {
            let (accepted, proposed) = self.step().await;
            n_accepted += accepted;
            n_proposed += proposed;
        }
        (n_accepted, n_proposed)
    }
}

fn prompt() -> Vec<TokenId> {
    (0..20).map(|i| TokenId(i * 11 % 256)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draft_equal_to_the_target_is_always_accepted() {
    let noisy = SamplingParams { temperature: 0.9, seed: 5, ..SamplingParams::default() };
    let penalized = SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.3, ..noisy.clone() };
    for sampling in [SamplingParams::greedy(), noisy, penalized] {
        let drafter = drafter(Some(real_service(Digest([3; 32])).await));
        let truth = truth(&prompt(), &sampling, 150);
        let mut group = Group::new(drafter, &prompt(), &sampling, truth, Speculation::Draft);
        let (n_accepted, n_proposed) = group.run().await;
        assert_eq!(n_accepted, n_proposed, "{sampling:?}");
        assert!(n_accepted > 50, "only {n_accepted} were proposed");
        let stats = group.drafter.stats();
        assert_eq!(stats.sources[Source::Draft.idx()].accepted_tokens as usize, n_accepted);
        let counted = group.drafter.finish(ID).expect("it is there");
        assert_eq!(counted, stats.sources);
        assert_eq!(group.drafter.draft_model(), Some("draft"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_disagrees_is_followed() {
    let drafter = drafter(Some(real_service(Digest([3; 32])).await));
    // Runs of what the model says, with other tokens in between.
    let sampling = SamplingParams::greedy();
    let mut tokens = prompt();
    while tokens.len() < prompt().len() + 160 {
        tokens.extend(truth(&tokens, &sampling, 12));
        tokens.push(TokenId(tokens.len() as u32 % 256));
    }
    let truth = tokens.split_off(prompt().len());
    let mut group = Group::new(drafter, &prompt(), &sampling, truth, Speculation::Draft);
    let (n_accepted, n_proposed) = group.run().await;
    assert!(n_accepted > 40 && n_proposed > n_accepted, "{n_accepted} of {n_proposed}");
    assert_eq!(group.drafter.stats().n_breaker_opened, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn own_tokens_need_no_service() {
    let truth: Vec<TokenId> = (0..120).map(|i| TokenId(i % 10)).collect();
    for (mode, expects) in [(Speculation::Auto, true), (Speculation::Ngram, true), (Speculation::Off, false)]
    {
        let mut group = Group::new(drafter(None), &prompt(), &SamplingParams::greedy(), truth.clone(), mode);
        let (n_accepted, _) = group.run().await;
        assert_eq!(n_accepted > 50, expects, "{mode:?}: {n_accepted}");
        assert_eq!(group.drafter.needs_each_token(ID), expects);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draft_with_another_tokenizer_is_refused() {
    let mut drafter = drafter(Some(real_service(Digest([4; 32])).await));
    let link = drafter.link.as_mut().expect("there is one");
    let Some(LinkEvent::Refused(problem)) = link.next().await else { panic!("must be refused") };
    assert!(problem.contains("draft") && problem.contains("target") && problem.contains("0303"), "{problem}");
}

/// A double of the draft service.
#[derive(Clone, Copy)]
enum Double {
    /// Takes everything and says nothing.
    Silent,
    /// Ends the stream at the first frame.
    Dying,
    /// Proposes ids that do not exist.
    Nonsense,
    /// Proposes the same wrong token for every position.
    Wrong,
}

#[tonic::async_trait]
impl Draft for Double {
    type SessionStream = ReceiverStream<Result<ProposalFrame, Status>>;

    async fn info(&self, _request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse {
            protocol: paceline_domain::group::PROTOCOL_VERSION,
            model: "double".into(),
            tokenizer_digest: vec![3; 32],
            vocabulary_tokens: N_VOCAB,
            context_tokens: 4_096,
            max_sessions: 4,
        }))
    }

    async fn session(
        &self,
        request: Request<Streaming<ControlFrame>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (double, mut frames) = (*self, request.into_inner());
        let (outbox, answers) = mpsc::channel(4);
        tokio::spawn(async move {
            while let Ok(Some(frame)) = frames.message().await {
                if matches!(double, Double::Dying) {
                    return;
                }
                let token = match double {
                    Double::Nonsense => 60_000,
                    _ => 256,
                };
                let opened = frame
                    .opens
                    .iter()
                    .map(|Open { session, generation, tokens, .. }| (*session, *generation, 0, tokens.len()));
                let committed = frame.commits.iter().map(|commit| {
                    let len = commit.base_len as usize + commit.tokens.len();
                    (commit.session, commit.generation, commit.epoch, len)
                });
                let proposal = |(session, generation, epoch, len): (u64, u32, u32, usize)| Proposal {
                    session,
                    generation,
                    epoch,
                    start_pos: len as u32,
                    tokens: vec![token; 4],
                    confidence: vec![0.99; 4],
                    compute_us: 0,
                    second_tokens: vec![7; 4],
                    second_confidence: vec![0.01; 4],
                };
                let proposals = opened.chain(committed).map(proposal).collect();
                if !matches!(double, Double::Silent) {
                    let _ = outbox.send(Ok(ProposalFrame { proposals, nacks: Vec::new() })).await;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

/// A run of 400 tokens that never repeat.
async fn run_with(double: Double, mode: Speculation) -> (Group, (usize, usize)) {
    let truth: Vec<TokenId> = (0..400).map(|i| TokenId((i * i + i / 16) % 255)).collect();
    let answers = matches!(double, Double::Wrong);
    let service = serve(double).await;
    let mut group = Group::new(drafter(Some(service)), &prompt(), &SamplingParams::greedy(), truth, mode);
    // Who never answers is not waited for; who does has answered before the next step, on any machine.
    if !answers {
        group.patience = Duration::ZERO;
    }
    let came = group.run().await;
    (group, came)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_says_nothing_or_dies_costs_nothing_and_is_left_out() {
    for double in [Double::Silent, Double::Dying] {
        let (group, came) = run_with(double, Speculation::Draft).await;
        assert_eq!(came, (0, 0), "nothing can be proposed");
        assert_eq!(group.n_done, 398);
    }
    let group = asked_and_silent().await;
    assert!(group.drafter.stats().n_breaker_opened >= 1, "silence is noticed");
}

/// In so many hours.
fn later(hours: u64) -> Instant {
    Instant::now() + Duration::from_secs(3_600 * hours)
}

/// With a service that was asked an hour ago.
async fn asked_and_silent() -> Group {
    let (sampling, truth) = (SamplingParams::greedy(), (0..400).map(|i| TokenId(i % 255)).collect());
    let drafter = drafter(Some(serve(Double::Silent).await));
    let mut group = Group::new(drafter, &prompt(), &sampling, truth, Speculation::Draft);
    group.patience = Duration::ZERO;
    connected(&mut group).await;
    for _ in 0..20 {
        group.step().await;
    }
    group.drafter.flush(later(1));
    group
}

async fn connected(group: &mut Group) {
    while group.drafter.draft_model().is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
        group.drafter.flush(Instant::now());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_on_which_one_question_after_the_other_comes_to_nothing_is_made_anew() {
    let mut group = asked_and_silent().await;
    assert!(group.drafter.draft_model().is_some(), "once may be chance");
    group.drafter.flush(later(2));
    assert!(group.drafter.is_awaited(ID), "it is asked again");
    group.drafter.flush(later(3));
    assert!(group.drafter.draft_model().is_none());
    connected(&mut group).await;
    let stats = group.drafter.stats();
    assert_eq!((stats.n_connected, stats.n_breaker_opened, stats.is_in_use), (2, 2, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_noticed_when_every_request_ends_before_the_patience_with_it() {
    let (sampling, truth) = (SamplingParams::greedy(), (0..20).map(|i| TokenId(i % 255)).collect());
    let drafter = drafter(Some(serve(Double::Silent).await));
    let mut group = Group::new(drafter, &prompt(), &sampling, truth, Speculation::Draft);
    group.patience = Duration::ZERO;
    connected(&mut group).await;
    let mut n_requests = 0;
    while group.drafter.stats().n_breaker_opened == 0 {
        assert!(n_requests < 1_000, "nobody misses the service");
        group.run().await;
        group.again(&prompt(), &sampling);
        n_requests += 1;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_opens_the_breaker_and_is_never_proposed() {
    let (group, came) = run_with(Double::Nonsense, Speculation::Draft).await;
    assert_eq!(came, (0, 0));
    assert!(group.drafter.stats().n_breaker_opened >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_always_wrong_soon_gets_no_rows() {
    let (group, (n_accepted, n_proposed)) = run_with(Double::Wrong, Speculation::Draft).await;
    assert_eq!(n_accepted, 0);
    assert!((1..60).contains(&n_proposed), "{n_proposed} rows for nothing in 400 steps");
    // The account: half a step and a hundredth of each, as rows cost here, and what calibration adds.
    let Forecast { ms, plain_ms, .. } = group.drafter.stats().forecast;
    assert!(plain_ms / ms >= 0.98, "{:.3}", plain_ms / ms);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_comes_back_is_used_again() {
    let sampling = SamplingParams::greedy();
    let (truth, service) = (truth(&prompt(), &sampling, 300), real_service(Digest([3; 32])).await);
    let mut group = Group::new(drafter(Some(service)), &prompt(), &sampling, truth, Speculation::Draft);
    let accepted = |group: &Group| group.drafter.stats().sources[Source::Draft.idx()].accepted_tokens;
    while accepted(&group) == 0 {
        group.step().await;
    }
    // As if its silence had been noticed.
    group.drafter.fault(Fault::Dead, "a test", Instant::now());
    assert_eq!(group.step().await, (0, 0), "it is left out");
    let before = accepted(&group);
    while accepted(&group) == before {
        assert!(group.n_done + 3 < group.truth.len(), "it never came back");
        // Steps are slow compared to the pause.
        tokio::time::sleep(Duration::from_millis(20)).await;
        group.step().await;
    }
    assert_eq!(group.drafter.stats().n_breaker_opened, 1);
}
