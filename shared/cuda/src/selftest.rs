//! What a GPU backend must show on the device it runs on: logits near the CPU's, and the same bits whatever the batch, the
//! chunks and the graphs. The same checks run on a GPU (`paceline selftest`) and on the emulator of the tests.

#[cfg(feature = "driver")]
pub mod nccl;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use paceline_checkpoint::Checkpoint;
use paceline_collectives::{AbortFlag, BindSpec, Collective, Endpoint, GroupSpec, Transport, connect};
use paceline_domain::{BlockId, Epoch, KvType, SamplingParams, TokenId, WeightType};
use paceline_kernels::Kernels;
use paceline_model::link::Group;
use paceline_model::logits::Choice;
use paceline_model::names::Part;
use paceline_model::synthetic::{Synthetic, tiny_config};
use paceline_model::{
    Batch, Capacity, Cpu, Decoder, Device, LoadSpec, Logits, ModelConfig, ModelError, SplitPlan,
};
use paceline_sampling::{TokenHistory, local_best};

use crate::pack::Kind;

/// Least cosine of a row of logits with the CPU's: activations have eight bits of mantissa here, there some are codes of
/// eight bits.
const LEAST_COSINE: f64 = 0.996;
/// How long ranks wait for each other.
const DEADLINE: Duration = Duration::from_secs(120);

/// How much is checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extent {
    /// Short prompts and a few types: for slow devices and sanitizers.
    Quick,
    /// Every type and size.
    Full,
}

/// Devices under test.
pub struct Devices<'a> {
    /// With captured passes.
    pub graphs: &'a dyn Device,
    /// The same device without.
    pub eager: &'a dyn Device,
}

/// One check.
pub struct Check {
    /// What was checked.
    pub name: String,
    /// What was found, or what is wrong.
    pub outcome: Outcome,
    /// How long it took.
    pub duration: Duration,
}

/// What came of a check.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// What was found.
    Passed(String),
    /// What is wrong.
    Failed(String),
    /// What is missing here for the check.
    Skipped(String),
}

impl From<Result<String, String>> for Outcome {
    fn from(result: Result<String, String>) -> Self {
        result.map_or_else(Self::Failed, Self::Passed)
    }
}

/// A random model.
struct Model {
    checkpoint: Arc<Checkpoint>,
    config: ModelConfig,
}

/// Tokens run together: sequence, position, token.
type Step = Vec<(usize, u32, u32)>;
/// Logits of every row of every step.
type Rows = Vec<Vec<f32>>;

/// Runs all checks; `report` is called after each.
pub fn run(devices: &Devices<'_>, extent: Extent, report: &mut dyn FnMut(&Check)) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut check = |name: String, body: &dyn Fn() -> Result<String, String>| {
        let started = Instant::now();
        let outcome = body().into();
        let check = Check { name, outcome, duration: started.elapsed() };
        report(&check);
        checks.push(check);
    };
    for kind in kinds(extent) {
        let weight_type = kind.weight_type();
        let model = || Model::new(&of_type(weight_type)).map_err(|error| error.to_string());
        let name = weight_type.name();
        check(format!("{name}: near the CPU"), &|| near_the_cpu(&model()?, devices, extent));
        check(format!("{name}: batches, chunks, graphs"), &|| same_bits(&model()?, devices, extent));
    }
    for (head_dim, heads, window) in heads(extent) {
        let model = || Model::new(&with_heads(head_dim, heads, window)).map_err(|error| error.to_string());
        let name = format!("heads {}/{} of {head_dim}, window {window:?}", heads.0, heads.1);
        check(format!("{name}: near the CPU"), &|| near_the_cpu(&model()?, devices, extent));
        check(format!("{name}: batches, chunks, graphs"), &|| same_bits(&model()?, devices, extent));
    }
    let model = || Model::new(&of_type(WeightType::Q4_K)).map_err(|error| error.to_string());
    for n_ranks in [2, 4] {
        check(format!("{n_ranks} ranks through the host"), &|| ranks(&model()?, devices, n_ranks));
    }
    check("choice of tokens".into(), &|| choices(&model()?, devices.graphs));
    checks
}

fn kinds(extent: Extent) -> Vec<Kind> {
    match extent {
        Extent::Quick => vec![Kind::BF16, Kind::Q4_K],
        Extent::Full => Kind::ALL.to_vec(),
    }
}

/// Head dimension, query and key heads, window.
fn heads(extent: Extent) -> Vec<(usize, (usize, usize), Option<usize>)> {
    match extent {
        Extent::Quick => vec![(128, (7, 1), None)],
        Extent::Full => vec![
            (32, (9, 3), None),
            (64, (14, 2), None),
            (96, (4, 4), Some(150)),
            (128, (28, 4), None),
            (128, (20, 1), Some(70)),
        ],
    }
}

/// A model with all matrices of one type.
fn of_type(weight_type: WeightType) -> Synthetic {
    let config = ModelConfig {
        n_layers: 2,
        n_embd: 512,
        n_heads: 8,
        n_kv_heads: 4,
        head_dim: 64,
        n_ff: 768,
        n_vocab: 1_000,
        context_length: 4_096,
        ..tiny_config()
    };
    let weight_type: fn(Part, usize) -> WeightType = match weight_type {
        WeightType::F32 => |_, _| WeightType::F32,
        WeightType::F16 => |_, _| WeightType::F16,
        WeightType::BF16 => |_, _| WeightType::BF16,
        WeightType::Q4_0 => |_, _| WeightType::Q4_0,
        WeightType::Q4_1 => |_, _| WeightType::Q4_1,
        WeightType::Q5_0 => |_, _| WeightType::Q5_0,
        WeightType::Q5_1 => |_, _| WeightType::Q5_1,
        WeightType::Q8_0 => |_, _| WeightType::Q8_0,
        WeightType::Q2_K => |_, _| WeightType::Q2_K,
        WeightType::Q3_K => |_, _| WeightType::Q3_K,
        WeightType::Q4_K => |_, _| WeightType::Q4_K,
        WeightType::Q5_K => |_, _| WeightType::Q5_K,
        WeightType::Q6_K => |_, _| WeightType::Q6_K,
    };
    Synthetic { config, seed: 40, weight_type }
}

fn with_heads(head_dim: usize, (n_heads, n_kv_heads): (usize, usize), window: Option<usize>) -> Synthetic {
    let base = of_type(WeightType::BF16);
    let window =
        window.map(|n_positions| paceline_model::config::SlidingWindow { n_positions, first_layer: 1 });
    let config = ModelConfig { head_dim, n_heads, n_kv_heads, sliding_window: window, ..base.config };
    Synthetic { config, seed: 41, ..base }
}

impl Model {
    fn new(synthetic: &Synthetic) -> Result<Self, ModelError> {
        let checkpoint = Checkpoint::from_gguf_bytes(synthetic.to_gguf()?)?;
        let config = ModelConfig::from_checkpoint(&checkpoint)?;
        Ok(Self { checkpoint: Arc::new(checkpoint), config })
    }

    fn prompt(&self, seed: u32, n_tokens: usize) -> Vec<u32> {
        let n_vocab = self.config.n_vocab as u32;
        let token =
            |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) >> 7) % n_vocab;
        (0..n_tokens as u32).map(token).collect()
    }

    /// Runs the steps on `n_ranks` ranks of a device; rows in order, each over the whole vocabulary.
    fn run(&self, device: &dyn Device, n_ranks: usize, steps: &[Step]) -> Result<Rows, String> {
        let plan = SplitPlan::new(&self.config, n_ranks).map_err(|error| error.to_string())?;
        let endpoints = (0..n_ranks)
            .map(|_| Endpoint::bind(&BindSpec::default()).map_err(|error| error.to_string()))
            .collect::<Result<Vec<_>, _>>()?;
        let peers: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address().clone()).collect();
        let abort = AbortFlag::new();
        let parts: Vec<Result<Rows, String>> = thread::scope(|scope| {
            let start = |(rank, endpoint): (usize, Endpoint)| {
                let spec = GroupSpec {
                    rank,
                    epoch: Epoch(1),
                    peers: peers.clone(),
                    secret: [0; 32],
                    transport: Transport::Auto,
                    connect_deadline: DEADLINE,
                    deadline: DEADLINE,
                    abort: abort.clone(),
                };
                let plan = &plan;
                scope.spawn(move || {
                    let result = self.run_rank(device, plan, endpoint, &spec, steps);
                    if result.is_err() {
                        spec.abort.abort();
                    }
                    result
                })
            };
            let ranks: Vec<_> = endpoints.into_iter().enumerate().map(start).collect();
            ranks.into_iter().map(|rank| rank.join().map_err(|_| "a rank panicked".to_owned())?).collect()
        });
        let mut joined: Option<Rows> = None;
        for part in parts {
            let part = part?;
            match &mut joined {
                None => joined = Some(part),
                Some(joined) => joined.iter_mut().zip(part).for_each(|(row, part)| row.extend(part)),
            }
        }
        joined.ok_or_else(|| "there is no rank".into())
    }

    fn run_rank(
        &self,
        device: &dyn Device,
        plan: &SplitPlan,
        endpoint: Endpoint,
        spec: &GroupSpec,
        steps: &[Step],
    ) -> Result<Rows, String> {
        let mut collective = connect(endpoint, spec).map_err(|error| error.to_string())?;
        let mut decoder = self.decoder(device, plan, spec.rank, steps).map_err(|error| error.to_string())?;
        let together = collective.as_mut();
        let abort = spec.abort.clone();
        let mut group = Group { collective: together, connect_deadline: DEADLINE, deadline: DEADLINE, abort };
        decoder.join(&mut group).map_err(|error| error.to_string())?;
        let tables = Tables::of(steps);
        let mut rows = Vec::new();
        for step in steps {
            let more =
                tables.run(&mut decoder, collective.as_mut(), step).map_err(|error| error.to_string())?;
            rows.extend(more);
        }
        Ok(rows)
    }

    fn decoder(
        &self,
        device: &dyn Device,
        plan: &SplitPlan,
        rank: usize,
        steps: &[Step],
    ) -> Result<Decoder, ModelError> {
        let max_rows = steps.iter().map(Vec::len).max().unwrap_or(1);
        let capacity = Capacity {
            kv_type: KvType::F16,
            n_kv_blocks: Tables::of(steps).0.iter().map(Vec::len).sum(),
            max_rows,
            max_output_rows: max_rows,
        };
        let (checkpoint, config) = (&self.checkpoint, &self.config);
        let spec = LoadSpec { checkpoint, config, plan, rank, quantize: None, capacity, progress: &|_| () };
        Decoder::load(&spec, device)
    }
}

/// Block tables of all sequences; neighbours in a table are apart in memory.
struct Tables(Vec<Vec<BlockId>>);

impl Tables {
    fn of(steps: &[Step]) -> Self {
        let rows = || steps.iter().flatten();
        let n_sequences = rows().map(|row| row.0 + 1).max().unwrap_or(1);
        let n_blocks = rows().map(|row| row.1 as usize / 16 + 1).max().unwrap_or(1);
        let table = |sequence: usize| {
            (0..n_blocks).rev().map(|block| BlockId((block * n_sequences + sequence) as u32)).collect()
        };
        Self((0..n_sequences).map(table).collect())
    }

    fn run(
        &self,
        decoder: &mut Decoder,
        collective: &mut dyn Collective,
        step: &Step,
    ) -> Result<Rows, ModelError> {
        let mut logits = self.forward(decoder, collective, step)?;
        (0..step.len()).map(|row| Ok(logits.row(row)?.to_vec())).collect()
    }

    fn forward<'d>(
        &self,
        decoder: &'d mut Decoder,
        collective: &mut dyn Collective,
        step: &Step,
    ) -> Result<Logits<'d>, ModelError> {
        let tokens: Vec<TokenId> = step.iter().map(|row| TokenId(row.2)).collect();
        let positions: Vec<u32> = step.iter().map(|row| row.1).collect();
        let sequence_of_row: Vec<u32> = step.iter().map(|row| row.0 as u32).collect();
        let output_rows: Vec<usize> = (0..step.len()).collect();
        let tables: Vec<&[BlockId]> = self.0.iter().map(Vec::as_slice).collect();
        let batch = Batch {
            tokens: &tokens,
            positions: &positions,
            sequence_of_row: &sequence_of_row,
            block_tables: &tables,
            output_rows: &output_rows,
            copies: &[],
        };
        decoder.forward(&batch, collective)
    }
}

/// One sequence in pieces of these lengths; the last length is repeated.
fn in_pieces(tokens: &[u32], lengths: &[usize]) -> Vec<Step> {
    let (mut steps, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        let length = lengths[steps.len().min(lengths.len() - 1)].min(tokens.len() - at);
        steps.push((at..at + length).map(|i| (0, i as u32, tokens[i])).collect());
        at += length;
    }
    steps
}

/// Sequence 0 token by token after a prompt, among others that bring one to three tokens a step.
fn in_a_crowd(model: &Model, own: &[u32], n_prompt: usize, n_others: usize) -> Vec<Step> {
    let others: Vec<Vec<u32>> =
        (0..n_others).map(|other| model.prompt(50 + other as u32, 3 * own.len())).collect();
    let mut steps = vec![(0..n_prompt).map(|i| (0, i as u32, own[i])).collect::<Step>()];
    let mut done = vec![0; n_others];
    for (position, token) in own.iter().enumerate().skip(n_prompt) {
        let mut step = Step::new();
        for (other, tokens) in others.iter().enumerate() {
            for _ in 0..1 + other % 3 {
                step.push((other + 1, done[other] as u32, tokens[done[other]]));
                done[other] += 1;
            }
        }
        step.push((0, position as u32, *token));
        steps.push(step);
    }
    steps
}

/// Rows of sequence 0.
fn own_rows(steps: &[Step], rows: Rows) -> Rows {
    let of = steps.iter().flatten().zip(rows).filter(|(row, _)| row.0 == 0);
    of.map(|(_, logits)| logits).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The least cosine of two lists of rows, if it is enough.
fn near(expected: &Rows, found: &Rows) -> Result<String, String> {
    let least = expected.iter().zip(found).map(|(a, b)| cosine(a, b)).fold(1.0, f64::min);
    // A NaN is not enough either.
    if least >= LEAST_COSINE && expected.len() == found.len() {
        return Ok(format!("least cosine {least:.6} over {} rows", found.len()));
    }
    Err(format!("least cosine {least} over {} rows, below {LEAST_COSINE}", found.len()))
}

fn lengths(extent: Extent) -> (usize, usize) {
    match extent {
        Extent::Quick => (20, 12),
        // Beyond a thousand positions attention has several splits.
        Extent::Full => (1_100, 1_090),
    }
}

fn near_the_cpu(model: &Model, devices: &Devices<'_>, extent: Extent) -> Result<String, String> {
    let n_tokens = lengths(extent).0.min(300);
    let steps = in_pieces(&model.prompt(1, n_tokens), &[n_tokens - 3, 1]);
    let cpu =
        Cpu { kernels: Kernels::detect(), n_threads: thread::available_parallelism().map_or(1, |n| n.get()) };
    near(&model.run(&cpu, 1, &steps)?, &model.run(devices.graphs, 1, &steps)?)
}

fn same_bits(model: &Model, devices: &Devices<'_>, extent: Extent) -> Result<String, String> {
    let (n_tokens, n_prompt) = lengths(extent);
    let own = model.prompt(2, n_tokens);
    let whole = in_pieces(&own, &[n_tokens]);
    let expected = own_rows(&whole, model.run(devices.eager, 1, &whole)?);
    if expected.iter().flatten().any(|logit| !logit.is_finite()) {
        return Err("a logit is not finite".into());
    }
    let mut schedules = vec![
        ("token by token after a prompt, graphs", devices.graphs, in_pieces(&own, &[n_prompt, 1])),
        ("token by token after a prompt", devices.eager, in_pieces(&own, &[n_prompt, 1])),
        ("pieces", devices.graphs, in_pieces(&own, &[7, 3, n_prompt.saturating_sub(10), 2])),
    ];
    for n_others in [3, 9, 40] {
        if extent == Extent::Full || n_others == 3 {
            schedules.push(("in a crowd", devices.graphs, in_a_crowd(model, &own, n_prompt, n_others)));
        }
    }
    for (name, device, steps) in &schedules {
        let rows = own_rows(steps, model.run(*device, 1, steps)?);
        if let Some(row) = first_difference(&expected, &rows) {
            return Err(format!("{name}: row {row} has other bits"));
        }
    }
    Ok(format!("{} schedules of {n_tokens} tokens, the same bits", schedules.len()))
}

fn first_difference(expected: &Rows, found: &Rows) -> Option<usize> {
    if expected.len() != found.len() {
        return Some(expected.len().min(found.len()));
    }
    let is_same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
    expected.iter().zip(found).position(|(a, b)| !a.iter().zip(b).all(is_same))
}

fn ranks(model: &Model, devices: &Devices<'_>, n_ranks: usize) -> Result<String, String> {
    let steps = in_pieces(&model.prompt(3, 24), &[17, 1]);
    near(&model.run(devices.graphs, 1, &steps)?, &model.run(devices.graphs, n_ranks, &steps)?)
}

/// The device's choice of tokens is the host's, bit for bit.
fn choices(model: &Model, device: &dyn Device) -> Result<String, String> {
    let steps = in_pieces(&model.prompt(4, 12), &[12]);
    let plan = SplitPlan::new(&model.config, 1).map_err(|error| error.to_string())?;
    let mut decoder = model.decoder(device, &plan, 0, &steps).map_err(|error| error.to_string())?;
    let tables = Tables::of(&steps);
    let mut solo = paceline_collectives::Solo::new();
    let rows = tables.run(&mut decoder, &mut solo, &steps[0]).map_err(|error| error.to_string())?;
    let mut history = TokenHistory::new(40);
    history.extend(&model.prompt(5, 160).into_iter().map(TokenId).collect::<Vec<_>>());
    let params: Vec<SamplingParams> = (0..96).map(|i| sampling(i, model.config.n_vocab as u32)).collect();
    let choice =
        |(i, sampling)| Choice { row: i % rows.len(), position: 100 + i as u32, sampling, history: &history };
    let choices: Vec<Choice<'_>> = params.iter().enumerate().map(choice).collect();
    let mut best = Vec::new();
    let mut logits = tables.forward(&mut decoder, &mut solo, &steps[0]).map_err(|error| error.to_string())?;
    logits.best(model.config.n_vocab, &choices, &mut best).map_err(|error| error.to_string())?;
    for (choice, found) in choices.iter().zip(&best) {
        let mut row = rows[choice.row].clone();
        let expected = local_best(choice.sampling, &history, choice.position, 0, &mut row);
        if (expected.token, expected.value.to_bits()) != (found.token, found.value.to_bits()) {
            return Err(format!("{:?}: {found:?} instead of {expected:?}", choice.sampling));
        }
    }
    for (i, row) in rows.iter().enumerate() {
        let left = logits.row(i).map_err(|error| error.to_string())?;
        if !left.iter().zip(row).all(|(a, b)| a.to_bits() == b.to_bits()) {
            return Err(format!("row {i} was changed by choices"));
        }
    }
    Ok(format!("{} choices are the host's", choices.len()))
}

/// Ways to sample: every temperature with every set of filters, of penalties, and with and without bias.
fn sampling(i: usize, n_vocab: u32) -> SamplingParams {
    let temperature = [0.0, 0.7, 1.0, 30.0][i % 4];
    let (top_k, top_p, min_p) =
        [(0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (7, 0.6, 0.01), (900, 0.99, 0.0)]
            [i / 4 % 6];
    let (repetition_penalty, presence_penalty, frequency_penalty) =
        [(1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (1.1, 0.4, -0.2)][i / 24 % 4];
    let bias = |token: u32| (TokenId(token * 131 % n_vocab), token as f32 - 2.0);
    let mut logit_bias: Vec<_> = (0..if i % 3 == 2 { 5 } else { 0 }).map(bias).collect();
    logit_bias.sort_by_key(|(token, _)| *token);
    SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        seed: 7 * i as u64,
        n_logprobs: None,
    }
}
