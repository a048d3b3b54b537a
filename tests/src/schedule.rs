//! Random schedules of requests: who arrives when, how long, what is shared, who goes away. They follow from a seed. Each
//! request knows the tokens it has when it runs alone; running a schedule tells what it got instead.

use std::fmt;

use futures_util::future::join_all;
use paceline_domain::{SamplingParams, ScoredToken, TokenId, TokenLogprob, group::BLOCK_POSITIONS};
use paceline_wire::inference::{
    GenerateRequest, ResponseFormat, SamplingOptions, SpeculationMode, SpeculationOptions, StopOptions,
    TokenIds, TokenLogprobs, generate_request::Input, generate_response::Event,
    inference_client::InferenceClient, response_format::Format,
};
use tokio::sync::watch;
use tonic::{Status, transport::Channel};

use crate::{
    constrained::REGEXES,
    hash_model::{Request, scores_alone, tokens_alone},
    random::Random,
};

/// Lengths of shared prefixes: at the borders of blocks.
const SHARED: [usize; 9] = [
    BLOCK_POSITIONS - 1,
    BLOCK_POSITIONS,
    BLOCK_POSITIONS + 1,
    2 * BLOCK_POSITIONS - 1,
    2 * BLOCK_POSITIONS,
    2 * BLOCK_POSITIONS + 1,
    3 * BLOCK_POSITIONS - 1,
    3 * BLOCK_POSITIONS,
    3 * BLOCK_POSITIONS + 1,
];
/// Texts that prefixes are taken from.
const N_FAMILIES: usize = 3;

/// Who may propose; without a draft service [`WITHOUT_DRAFT`].
pub const MODES: [SpeculationMode; 4] =
    [SpeculationMode::Off, SpeculationMode::Ngram, SpeculationMode::Draft, SpeculationMode::Auto];
/// Who may propose where there is no draft service.
pub const WITHOUT_DRAFT: [SpeculationMode; 3] =
    [SpeculationMode::Off, SpeculationMode::Auto, SpeculationMode::Ngram];

/// Bounds of a schedule.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Most requests.
    pub max_jobs: usize,
    /// Most tokens of prompt and output of one request: what context and pool hold.
    pub max_tokens: usize,
    /// Most tokens that one request generates.
    pub max_output: usize,
    /// Tokens that prompts are made of: 0 up to this.
    pub n_vocab: usize,
    /// Token that ends a text.
    pub end_token: TokenId,
    /// Who may propose: one of these, as often as each other one.
    pub modes: &'static [SpeculationMode],
    /// Share of requests whose prompt is scored.
    pub scored: f64,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Job {
    /// What is sent.
    pub prompt: Vec<TokenId>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Tokens that end it.
    pub end_tokens: Vec<TokenId>,
    /// It is sent when the one before it has received so many tokens, or has ended.
    pub after: usize,
    /// The client goes away after so many tokens; 0 is before the first.
    pub cancelled_after: Option<usize>,
    /// Fewest tokens to generate: until then nothing ends it but its going away.
    pub min_tokens: usize,
    /// What its text must match; then it ends with the text.
    pub regex: Option<&'static str>,
    /// Who may propose.
    pub speculation: SpeculationMode,
    /// Completions.
    pub n_choices: u32,
    /// Log probabilities of the prompt are wanted, and of so many alternatives to each token.
    pub prompt_logprobs: Option<u32>,
    /// What those are when it runs alone; nothing where none are wanted.
    pub scores_alone: Vec<ScoredToken>,
    /// The tokens each of its choices has when it runs alone.
    pub alone: Vec<Vec<TokenId>>,
}

/// What a request got.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Received {
    /// Tokens of each choice, in order.
    pub tokens: Vec<Vec<TokenId>>,
    /// Log probabilities of the prompt's tokens.
    pub scores: Vec<ScoredToken>,
    /// Choices that came to their end.
    pub n_finished: u32,
    /// Proposed tokens, and those that were accepted; known at its end.
    pub n_proposed: u64,
    /// See `n_proposed`.
    pub n_accepted: u64,
    /// Second guesses that were right.
    pub n_accepted_branches: u64,
    /// Tokens of its prompt that were found in the prefix cache; known at its end.
    pub n_cached: u32,
}

/// A difference, with all that is needed to see it again.
#[derive(Debug)]
pub struct Mismatch {
    /// Of the schedule.
    pub seed: u64,
    /// Index of the request.
    pub job: usize,
    /// What came.
    pub received: Result<Received, Status>,
    /// What was sent, and what should have come.
    pub sent: Job,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, job, received, sent } = self;
        let n_prompt = sent.prompt.len();
        let n_alone: Vec<usize> = sent.alone.iter().map(Vec::len).collect();
        write!(
            formatter,
            "seed {seed}, request {job} with {n_prompt} prompt tokens, {n_alone:?} tokens alone: "
        )?;
        match received {
            Err(status) => write!(formatter, "{:?}: {}", status.code(), status.message())?,
            Ok(received) => {
                write!(formatter, "{} choices were finished, ", received.n_finished)?;
                for (tokens, alone) in received.tokens.iter().zip(&sent.alone) {
                    let n_same = tokens.iter().zip(alone).take_while(|(one, other)| one == other).count();
                    write!(formatter, "{} tokens came, the first {n_same} are equal, ", tokens.len())?;
                }
            }
        }
        if let Ok(Received { scores, .. }) = received {
            let n_same =
                scores.iter().zip(&sent.scores_alone).take_while(|(one, other)| one == other).count();
            write!(formatter, "{n_same} of {} scores are equal", sent.scores_alone.len())?;
        }
        write!(formatter, "; {:?}, {:?}", sent.regex, sent.speculation)?;
        write!(formatter, "; {:?}, cancelled after {:?}", sent.sampling, sent.cancelled_after)
    }
}

/// Requests that belong together.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// What it follows from.
    pub seed: u64,
    /// The requests, in the order in which they are sent.
    pub jobs: Vec<Job>,
}

/// Makes schedules for one cluster: its texts are shared by all of them.
pub struct Schedules<'a> {
    shape: Shape,
    families: Vec<Vec<TokenId>>,
    alone: &'a dyn Fn(&Job) -> Alone,
}

/// What a request of one choice gets when it runs alone.
#[derive(Clone, Debug)]
pub struct Alone {
    /// Its tokens.
    pub tokens: Vec<TokenId>,
    /// Log probabilities of its prompt, where they are wanted.
    pub scores: Vec<ScoredToken>,
}

impl Alone {
    /// On the model that hashes its KV memory, by its definition.
    pub fn on_hash_model(n_vocab: usize, job: &Job) -> Self {
        let tokens = tokens_alone(n_vocab, &job.alone_request());
        let scores = job.prompt_logprobs.map(|n_top| scores_alone(n_vocab, &job.prompt, n_top));
        Self { tokens, scores: scores.unwrap_or_default() }
    }
}

impl<'a> Schedules<'a> {
    /// Texts follow from the seed. `alone` is asked about each choice once, as a request of its own; its `alone` is not set then.
    pub fn new(seed: u64, shape: Shape, alone: &'a dyn Fn(&Job) -> Alone) -> Self {
        let mut random = Random::new(seed);
        let longest = SHARED[SHARED.len() - 1];
        let families = (0..N_FAMILIES).map(|_| text(&mut random, longest, &shape)).collect();
        Self { shape, families, alone }
    }

    /// The schedule of a seed.
    pub fn schedule(&self, seed: u64) -> Schedule {
        let mut random = Random::new(seed);
        let n_jobs = random.within(2..self.shape.max_jobs + 1);
        let mut jobs: Vec<Job> = Vec::with_capacity(n_jobs);
        for _ in 0..n_jobs {
            let mut job = self.job(&mut random, &jobs);
            let alone = (0..job.n_choices).map(|choice| (self.alone)(&job.of_choice(choice)));
            let (tokens, scores): (_, Vec<_>) = alone.map(|alone| (alone.tokens, alone.scores)).unzip();
            (job.alone, job.scores_alone) = (tokens, scores.concat());
            jobs.push(job);
        }
        Schedule { seed, jobs }
    }

    fn job(&self, random: &mut Random, before: &[Job]) -> Job {
        let room = self.shape.max_tokens;
        let mut prompt = self.prompt(random, before);
        prompt.truncate(room - 1);
        let most = (room - prompt.len()).min(self.shape.max_output);
        let max_tokens = random.within(1..most + 1);
        let cancelled_after = random.happens(0.2).then(|| random.within(0..max_tokens + 1));
        let regex = random.happens(0.2).then(|| *random.pick(&REGEXES));
        let ends = random.happens(0.5) || regex.is_some();
        let holds_back = random.happens(0.3) && regex.is_none();
        Job {
            prompt,
            sampling: sampling(random),
            max_tokens,
            end_tokens: if ends { vec![self.shape.end_token] } else { Vec::new() },
            regex,
            speculation: *random.pick(self.shape.modes),
            after: if random.happens(0.4) { 0 } else { random.within(0..12) },
            cancelled_after,
            min_tokens: if holds_back { random.within(0..max_tokens + 1) } else { 0 },
            n_choices: if random.happens(0.25) { random.within(2..5) as u32 } else { 1 },
            prompt_logprobs: random.happens(self.shape.scored).then(|| random.within(0..4) as u32),
            scores_alone: Vec::new(),
            alone: Vec::new(),
        }
    }

    /// A text of its own, one that begins like others, the same as another's, or the next turn of a conversation.
    fn prompt(&self, random: &mut Random, before: &[Job]) -> Vec<TokenId> {
        let mut prompt = match random.within(0..10) {
            0..5 => {
                let length = *random.pick(&SHARED);
                random.pick(&self.families)[..length].to_vec()
            }
            5 | 6 if !before.is_empty() => {
                let earlier = random.pick(before);
                [earlier.prompt.as_slice(), &earlier.alone[0]].concat()
            }
            7 if !before.is_empty() => return random.pick(before).prompt.clone(),
            _ => text(random, 1, &self.shape),
        };
        let n_own = random.within(0..20);
        prompt.extend(text(random, n_own, &self.shape));
        prompt
    }
}

fn text(random: &mut Random, length: usize, shape: &Shape) -> Vec<TokenId> {
    (0..length).map(|_| TokenId(random.within(0..shape.n_vocab) as u32)).collect()
}

fn sampling(random: &mut Random) -> SamplingParams {
    let seeded = SamplingParams { seed: random.bits(), ..SamplingParams::default() };
    match random.within(0..6) {
        0..3 => SamplingParams { seed: seeded.seed, ..SamplingParams::greedy() },
        3 => seeded,
        4 => SamplingParams { temperature: 0.7, frequency_penalty: 0.5, repetition_penalty: 1.3, ..seeded },
        _ => SamplingParams { temperature: 2.0, top_k: 9, presence_penalty: -0.5, ..seeded },
    }
}

impl Job {
    /// A greedy request of one choice to the model that hashes its KV memory, with the tokens it has alone. Nobody proposes.
    pub fn greedy_on_hash_model(n_vocab: usize, prompt: Vec<TokenId>, max_tokens: usize) -> Self {
        let mut job = Self {
            prompt,
            sampling: SamplingParams::greedy(),
            max_tokens,
            end_tokens: Vec::new(),
            after: 0,
            cancelled_after: None,
            min_tokens: 0,
            regex: None,
            speculation: SpeculationMode::Off,
            n_choices: 1,
            prompt_logprobs: None,
            scores_alone: Vec::new(),
            alone: Vec::new(),
        };
        job.alone = vec![tokens_alone(n_vocab, &job.alone_request())];
        job
    }

    /// The request that one of its choices is the same as.
    pub fn of_choice(&self, choice: u32) -> Self {
        let prompt_logprobs = self.prompt_logprobs.filter(|_| choice == 0);
        Self { sampling: self.sampling.of_choice(choice), n_choices: 1, prompt_logprobs, ..self.clone() }
    }

    /// As the double's definition wants it, of one choice.
    pub fn alone_request(&self) -> Request<'_> {
        let Self { prompt, sampling, end_tokens, min_tokens, max_tokens, regex, .. } = self;
        let (min_tokens, max_tokens) = (*min_tokens, *max_tokens);
        Request { prompt, sampling, end_tokens, min_tokens, max_tokens, regex: *regex }
    }

    /// As it is sent.
    pub fn request(&self) -> GenerateRequest {
        let sampling = &self.sampling;
        GenerateRequest {
            n: Some(self.n_choices),
            prompt_logprobs: self.prompt_logprobs,
            response_format: self
                .regex
                .map(|regex| ResponseFormat { format: Some(Format::Regex(regex.into())) }),
            speculation: Some(SpeculationOptions { mode: Some(self.speculation.into()), max_tokens: None }),
            input: Some(Input::TokenIds(TokenIds { ids: self.prompt.iter().map(|token| token.0).collect() })),
            sampling: Some(SamplingOptions {
                temperature: Some(sampling.temperature),
                top_k: Some(sampling.top_k),
                repetition_penalty: Some(sampling.repetition_penalty),
                presence_penalty: Some(sampling.presence_penalty),
                frequency_penalty: Some(sampling.frequency_penalty),
                seed: Some(sampling.seed),
                ..SamplingOptions::default()
            }),
            stop: Some(StopOptions {
                max_tokens: Some(self.max_tokens as u32),
                token_ids: self.end_tokens.iter().map(|token| token.0).collect(),
                ignore_eos: Some(self.regex.is_none()),
                min_tokens: Some(self.min_tokens as u32),
                ..StopOptions::default()
            }),
            ..GenerateRequest::default()
        }
    }

    /// Whether this is what it gets when it runs alone: all of it, or the beginning when the client went away.
    fn is_as_alone(&self, received: &Received) -> bool {
        if self.cancelled_after.is_some() {
            return self.alone.iter().zip(&received.tokens).all(|(alone, tokens)| alone.starts_with(tokens))
                && self.scores_alone.starts_with(&received.scores);
        }
        received.n_finished == self.n_choices
            && received.tokens == self.alone
            && received.scores == self.scores_alone
    }

    async fn run(
        &self,
        mut client: InferenceClient<Channel>,
        progress: &watch::Sender<usize>,
    ) -> Result<Received, Status> {
        let tokens = vec![Vec::new(); self.n_choices as usize];
        let (mut received, mut n_tokens) = (Received { tokens, ..Received::default() }, 0);
        let enough = |n_tokens: usize| self.cancelled_after.is_some_and(|most| n_tokens >= most);
        let mut stream = client.generate(self.request()).await?.into_inner();
        while !enough(n_tokens) {
            let Some(chunk) = stream.message().await? else { break };
            let choice = chunk.choice as usize;
            match chunk.event {
                Some(Event::Delta(delta)) => {
                    n_tokens += delta.token_ids.len();
                    received.tokens[choice].extend(delta.token_ids.into_iter().map(TokenId));
                    progress.send_replace(n_tokens);
                }
                Some(Event::PromptLogprobs(part)) => {
                    // A part that is not where the last one ended, or comes after a token, is as good as a wrong one.
                    if part.start_pos as usize != received.scores.len() + 1 || n_tokens > 0 {
                        return Err(Status::internal(format!("scores from {} on", part.start_pos)));
                    }
                    received.scores.extend(part.logprobs.iter().map(scored));
                }
                Some(Event::Finished(finished)) => {
                    received.n_finished += 1;
                    for counts in &finished.proposals {
                        received.n_proposed += counts.draft_tokens;
                        received.n_accepted += counts.accepted_tokens;
                        received.n_accepted_branches += counts.accepted_branches;
                    }
                    received.n_cached += finished.usage.map_or(0, |usage| usage.cached_tokens);
                }
                _ => {}
            }
        }
        Ok(received)
    }
}

/// As the domain has it.
pub fn scored(logprobs: &TokenLogprobs) -> ScoredToken {
    let top =
        logprobs.top.iter().map(|top| TokenLogprob { token: TokenId(top.token_id), logprob: top.logprob });
    ScoredToken { logprob: logprobs.logprob, top_logprobs: top.collect() }
}

impl Schedule {
    /// Sends everything and waits for its end. What each request got, in order.
    pub async fn run(&self, client: &InferenceClient<Channel>) -> Vec<Result<Received, Status>> {
        let senders: Vec<watch::Sender<usize>> = self.jobs.iter().map(|_| watch::Sender::new(0)).collect();
        let jobs = self.jobs.iter().enumerate().map(|(i, job)| {
            let (client, progress) = (client.clone(), &senders[i]);
            let before = i.checked_sub(1).map(|before| senders[before].subscribe());
            async move {
                if let Some(mut before) = before.filter(|_| job.after > 0) {
                    let _ = before.wait_for(|n_received| *n_received >= job.after).await;
                }
                let received = job.run(client, progress).await;
                progress.send_replace(usize::MAX);
                received
            }
        });
        join_all(jobs).await
    }

    /// The requests that did not get what they get alone.
    pub fn mismatches(&self, received: Vec<Result<Received, Status>>) -> Vec<Mismatch> {
        let mismatch = |(job, (received, sent)): (usize, (Result<Received, Status>, &Job))| {
            let is_right = received.as_ref().is_ok_and(|received| sent.is_as_alone(received));
            (!is_right).then(|| Mismatch { seed: self.seed, job, received, sent: sent.clone() })
        };
        received.into_iter().zip(&self.jobs).enumerate().filter_map(mismatch).collect()
    }
}
