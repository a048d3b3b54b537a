//! A random small model as target and as draft, and a drafting thread that is spoken to without a network.

use std::sync::Arc;

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Solo;
use paceline_domain::{
    BlockId, DraftCommit, DraftControl, DraftOpen, KvType, SamplingParams, TokenId, WeightType,
};
use paceline_draft::{
    drafting::{self, Command, MAX_ANSWERS, MAX_COMMANDS},
    model::OneRank,
    planner::PassLimits,
    sessions::{Limits, Sessions, StreamId},
};
use paceline_kernels::Kernels;
use paceline_model::{
    Batch, Capacity, Cpu, Decoder, HeadTokens, LoadSpec, ModelConfig, SplitPlan,
    synthetic::{Synthetic, tiny_config},
};
use paceline_sampling::{TokenHistory, sample_row};
use paceline_wire::draft::ProposalFrame;
use tokio::sync::mpsc;
use tonic::Status;

/// Tokens that mean something.
pub const N_VOCAB: u32 = 257;

/// What the tests' service is limited to.
pub fn limits() -> Limits {
    Limits { max_sessions: 8, context: 200, n_vocab: N_VOCAB, max_ahead: 8, n_kv_blocks: 64 }
}

/// A random model's decoder.
pub fn decoder(seed: u64) -> Decoder {
    decoder_for(seed, &HeadTokens::all(&tiny_config()))
}

/// The same with an output head for some tokens.
pub fn decoder_for(seed: u64, head: &HeadTokens) -> Decoder {
    let synthetic = Synthetic { config: tiny_config(), seed, weight_type: |_, _| WeightType::F32 };
    let checkpoint =
        Arc::new(Checkpoint::from_gguf_bytes(synthetic.to_gguf().expect("bytes")).expect("a checkpoint"));
    let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
    let spec = LoadSpec {
        checkpoint: &checkpoint,
        config: &config,
        plan: &SplitPlan::with_head(&config, 1, head).expect("a plan"),
        rank: 0,
        quantize: None,
        capacity: Capacity {
            kv_type: KvType::F16,
            n_kv_blocks: limits().n_kv_blocks as usize,
            max_rows: 32,
            max_output_rows: 8,
        },
        progress: &|_| (),
    };
    Decoder::load(&spec, &Cpu { kernels: Kernels::detect(), n_threads: 1 }).expect("loads")
}

/// Plain decoding: what the target says after a prompt and some output, one token at a time.
pub fn target_tokens(
    decoder: &mut Decoder,
    (prompt, output): (&[TokenId], &[TokenId]),
    sampling: &SamplingParams,
    n: usize,
) -> Vec<TokenId> {
    tokens_of(&HeadTokens::first(N_VOCAB as usize), decoder, (prompt, output), sampling, n)
}

/// The same if other tokens were impossible.
pub fn tokens_of(
    head: &HeadTokens,
    decoder: &mut Decoder,
    (prompt, output): (&[TokenId], &[TokenId]),
    sampling: &SamplingParams,
    n: usize,
) -> Vec<TokenId> {
    let blocks: Vec<BlockId> = (0..32).map(BlockId).collect();
    let mut history = TokenHistory::new(prompt.len());
    history.extend(prompt);
    history.extend(output);
    let mut start = 0;
    for _ in 0..n {
        while start < history.len() {
            let tokens = &history.tokens()[start..history.len().min(start + 32)];
            let positions: Vec<u32> = (start as u32..).take(tokens.len()).collect();
            let output_rows = [tokens.len() - 1];
            let batch = Batch {
                tokens,
                positions: &positions,
                sequence_of_row: &vec![0; tokens.len()],
                block_tables: &[&blocks],
                output_rows: &output_rows,
                copies: &[],
            };
            let mut logits = decoder.forward(&batch, &mut Solo::new()).expect("runs");
            start += tokens.len();
            if start == history.len() {
                let all = logits.row(0).expect("a row");
                let mut row = vec![f32::NEG_INFINITY; N_VOCAB as usize];
                for token in (0..head.len()).map(|row| head.token(row).idx()) {
                    row[token] = all[token];
                }
                let sampled = sample_row(sampling, &history, start as u32, &mut row);
                history.push(sampled.token);
                break;
            }
        }
    }
    history.tokens()[prompt.len() + output.len()..].to_vec()
}

/// Some ways to sample.
pub fn samplings() -> Vec<SamplingParams> {
    let noisy = SamplingParams { temperature: 0.9, seed: 77, ..SamplingParams::default() };
    vec![
        SamplingParams::greedy(),
        noisy.clone(),
        SamplingParams { top_k: 20, top_p: 0.9, seed: 5, ..noisy.clone() },
        SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.4, presence_penalty: 0.2, ..noisy },
        SamplingParams {
            repetition_penalty: 1.5,
            logit_bias: vec![(TokenId(7), 2.0)],
            n_logprobs: Some(3),
            ..SamplingParams::greedy()
        },
    ]
}

/// Some prompts of different lengths.
pub fn prompt(i: u32) -> Vec<TokenId> {
    (0..5 + 13 * i).map(|position| TokenId((position * 31 + i * 7) % 256)).collect()
}

/// A drafting thread and one stream to it.
pub struct Service {
    commands: Option<mpsc::Sender<Command>>,
    answers: mpsc::Receiver<Result<ProposalFrame, Status>>,
    thread: Option<std::thread::JoinHandle<Result<(), paceline_model::ModelError>>>,
}

impl Service {
    /// With the random model of a seed.
    pub fn new(seed: u64, limits: Limits) -> Self {
        Self::of(OneRank::new(decoder(seed), N_VOCAB as usize), limits)
    }

    /// With a model.
    pub fn of(model: OneRank, limits: Limits) -> Self {
        let (commands, queue) = mpsc::channel(MAX_COMMANDS);
        let (outbox, answers) = mpsc::channel(MAX_ANSWERS);
        let pass = PassLimits { max_rows: 32, prompt_rows: 8 };
        let thread = drafting::start(Box::new(model), Sessions::new(limits), pass, queue).expect("a thread");
        commands.blocking_send(Command::Join(StreamId(0), outbox)).expect("it runs");
        Self { commands: Some(commands), answers, thread: Some(thread) }
    }

    /// Says something.
    pub fn tell(&self, control: DraftControl) {
        let command = Command::Control(StreamId(0), control, Vec::new());
        self.commands.as_ref().expect("open").blocking_send(command).expect("it runs");
    }

    /// Begins a session.
    pub fn open(&self, session: u64, tokens: &[TokenId], sampling: &SamplingParams, budget: u32) {
        self.tell(DraftControl {
            opens: vec![open(session, tokens, sampling, budget)],
            ..Default::default()
        });
    }

    /// Goes on with one.
    pub fn commit(&self, session: u64, epoch: u32, base_len: usize, tokens: &[TokenId], budget: u32) {
        let commit = DraftCommit {
            session,
            generation: 1,
            epoch,
            base_len: base_len as u32,
            tokens: tokens.to_vec(),
            budget,
        };
        self.tell(DraftControl { commits: vec![commit], ..Default::default() });
    }

    /// The next frame.
    pub fn frame(&mut self) -> Result<ProposalFrame, Status> {
        self.answers.blocking_recv().expect("the stream is open")
    }

    /// Everything proposed for a session from a position on, until there are `n` tokens; what is said of others is dropped.
    pub fn proposed(&mut self, session: u64, epoch: u32, start: usize, n: usize) -> Vec<TokenId> {
        let mut tokens = Vec::new();
        while tokens.len() < n {
            for proposal in self.frame().expect("proposals").proposals {
                if proposal.session == session && proposal.epoch == epoch {
                    assert_eq!(proposal.start_pos as usize, start + tokens.len(), "without gaps");
                    tokens.extend(proposal.tokens.into_iter().map(TokenId));
                }
            }
        }
        assert_eq!(tokens.len(), n, "never more than the budget");
        tokens
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.commands = None;
        let ended = self.thread.take().expect("once").join();
        if !std::thread::panicking() {
            ended.expect("no panic").expect("no failure");
        }
    }
}

/// A session's beginning.
pub fn open(session: u64, tokens: &[TokenId], sampling: &SamplingParams, budget: u32) -> DraftOpen {
    DraftOpen {
        session,
        generation: 1,
        tokens: tokens.to_vec(),
        n_prompt: tokens.len() as u32,
        sampling: sampling.clone(),
        budget,
        trace: Default::default(),
    }
}
