//! Runs a model in any set-up over any schedule of batches and gathers whole rows of logits.

use std::sync::Arc;
use std::time::Duration;

use paceline_checkpoint::Checkpoint;
use paceline_collectives::{AbortFlag, Collective, Solo, Transport};
use paceline_domain::{BlockId, KvType, Quantization, TokenId};
use paceline_kernels::{Isa, Kernels};
use paceline_model::link::Group;
use paceline_model::{Batch, Capacity, Cpu, Decoder, Device, HeadTokens, LoadSpec, ModelConfig, SplitPlan};

use super::threads::Threads;
use super::transports;

/// How long devices may wait for each other.
const DEADLINE: Duration = Duration::from_secs(300);

/// A model and what it runs on.
#[derive(Clone)]
pub struct Rig {
    pub checkpoint: Arc<Checkpoint>,
    pub config: ModelConfig,
    pub setup: Setup,
}

#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub isa: Isa,
    pub n_threads: usize,
    pub n_ranks: usize,
    pub kv_type: KvType,
    pub quantize: Option<Quantization>,
    /// Tokens that have logits, if there are so many.
    pub n_tokens: usize,
    pub link: Link,
}

/// How ranks reach each other.
#[derive(Clone, Copy, Debug)]
pub enum Link {
    /// A table in memory: nothing that could go wrong.
    Table,
    /// A transport of the product.
    Real(Transport),
}

/// One token of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub sequence: usize,
    pub position: u32,
    pub token: u32,
}

/// Rows run together.
pub type Step = Vec<Row>;

/// Logits of every row of every step: `[n_steps][n_rows][n_vocab]`.
pub type AllLogits = Vec<Vec<Vec<f32>>>;

impl Rig {
    pub fn new(checkpoint: Checkpoint) -> Self {
        let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
        let setup = Setup {
            isa: Isa::detect(),
            n_threads: 2,
            n_ranks: 1,
            kv_type: KvType::F16,
            quantize: None,
            n_tokens: usize::MAX,
            link: Link::Table,
        };
        Self { checkpoint: Arc::new(checkpoint), config, setup }
    }

    pub fn with(&self, setup: Setup) -> Self {
        Self { setup, ..self.clone() }
    }

    /// Runs the steps on all ranks and joins their parts of the vocabulary.
    pub fn run(&self, steps: &[Step]) -> AllLogits {
        let kernels = Kernels::for_isa(self.setup.isa);
        self.run_on(&Cpu { kernels, n_threads: self.setup.n_threads }, steps)
    }

    /// The same with all ranks on another device.
    pub fn run_on(&self, device: &dyn Device, steps: &[Step]) -> AllLogits {
        self.run_on_each(&vec![device; self.setup.n_ranks], steps)
    }

    /// The same with a device for each rank.
    pub fn run_on_each(&self, devices: &[&dyn Device], steps: &[Step]) -> AllLogits {
        let Setup { n_ranks, n_tokens, .. } = self.setup;
        let plan = SplitPlan::with_head(&self.config, n_ranks, &HeadTokens::first(n_tokens)).expect("a plan");
        let collectives = self.group();
        let parts: Vec<AllLogits> = std::thread::scope(|scope| {
            let run = |mut collective: Box<dyn Collective>| {
                let plan = &plan;
                let device = devices[collective.rank()];
                scope.spawn(move || self.run_rank(plan, device, &mut *collective, steps))
            };
            let ranks: Vec<_> = collectives.into_iter().map(run).collect();
            ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
        });
        let mut joined = parts[0].clone();
        for part in &parts[1..] {
            for (joined, part) in joined.iter_mut().flatten().zip(part.iter().flatten()) {
                joined.extend(part);
            }
        }
        joined
    }

    fn group(&self) -> Vec<Box<dyn Collective>> {
        let boxed = |member: Threads| Box::new(member) as Box<dyn Collective>;
        match (self.setup.n_ranks, self.setup.link) {
            (1, _) => vec![Box::new(Solo::new())],
            (n_ranks, Link::Table) => Threads::group(n_ranks).into_iter().map(boxed).collect(),
            (n_ranks, Link::Real(transport)) => transports::group(transport, n_ranks),
        }
    }

    fn run_rank(
        &self,
        plan: &SplitPlan,
        device: &dyn Device,
        collective: &mut dyn Collective,
        steps: &[Step],
    ) -> AllLogits {
        let n_sequences = 1 + steps.iter().flatten().map(|row| row.sequence).max().unwrap_or(0);
        let longest = 1 + steps.iter().flatten().map(|row| row.position as usize).max().unwrap_or(0);
        let max_rows = steps.iter().map(Vec::len).max().unwrap_or(1);
        let tables = block_tables(n_sequences, longest.div_ceil(16));
        let tables: Vec<&[BlockId]> = tables.iter().map(Vec::as_slice).collect();
        let capacity = Capacity {
            kv_type: self.setup.kv_type,
            n_kv_blocks: n_sequences * longest.div_ceil(16),
            max_rows,
            max_output_rows: max_rows,
        };
        let spec = LoadSpec {
            checkpoint: &self.checkpoint,
            config: &self.config,
            plan,
            rank: collective.rank(),
            quantize: self.setup.quantize,
            capacity,
            progress: &|_| (),
        };
        let mut decoder = Decoder::load(&spec, device).expect("loads");
        let (connect_deadline, deadline) = (DEADLINE, DEADLINE);
        let group =
            &mut Group { collective: &mut *collective, connect_deadline, deadline, abort: AbortFlag::new() };
        decoder.join(group).expect("joins");
        steps.iter().map(|step| run_step(&mut decoder, collective, &tables, step)).collect()
    }
}

fn run_step(
    decoder: &mut Decoder,
    collective: &mut dyn Collective,
    tables: &[&[BlockId]],
    step: &Step,
) -> Vec<Vec<f32>> {
    let tokens: Vec<TokenId> = step.iter().map(|row| TokenId(row.token)).collect();
    let positions: Vec<u32> = step.iter().map(|row| row.position).collect();
    let sequence_of_row: Vec<u32> = step.iter().map(|row| row.sequence as u32).collect();
    let output_rows: Vec<usize> = (0..step.len()).collect();
    let batch = Batch {
        tokens: &tokens,
        positions: &positions,
        sequence_of_row: &sequence_of_row,
        block_tables: tables,
        output_rows: &output_rows,
        copies: &[],
    };
    let mut logits = decoder.forward(&batch, collective).expect("a forward pass");
    (0..step.len()).map(|row| logits.row(row).expect("a row").to_vec()).collect()
}

/// Blocks of sequences in no order: neighbours in a table are far apart in memory.
fn block_tables(n_sequences: usize, n_blocks: usize) -> Vec<Vec<BlockId>> {
    let last = (n_sequences * n_blocks) as u32 - 1;
    (0..n_sequences)
        .map(|sequence| {
            (0..n_blocks).map(|block| BlockId(last - (block * n_sequences + sequence) as u32)).collect()
        })
        .collect()
}

/// Tokens of a sequence, made up.
pub fn tokens(seed: u32, n: usize, n_vocab: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(97);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % n_vocab as u32
    };
    (0..n).map(|_| next()).collect()
}

/// One sequence in pieces of these lengths; the last one is repeated.
pub fn in_pieces(tokens: &[u32], lengths: &[usize]) -> Vec<Step> {
    let (mut steps, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        let length = lengths[steps.len().min(lengths.len() - 1)].min(tokens.len() - at);
        let row = |i: usize| Row { sequence: 0, position: (at + i) as u32, token: tokens[at + i] };
        steps.push((0..length).map(row).collect());
        at += length;
    }
    steps
}

/// The sequence one token at a time as the last of `n_sequences`; the others are at other positions, take one to
/// three tokens a step, and some start late.
pub fn in_a_crowd(own: &[u32], n_sequences: usize, n_vocab: usize) -> Vec<Step> {
    let others: Vec<Vec<u32>> =
        (1..n_sequences).map(|other| tokens(100 + other as u32, 3 * own.len(), n_vocab)).collect();
    let mut done = vec![0; others.len()];
    let mut steps = Vec::new();
    for (position, token) in own.iter().enumerate() {
        let mut step = Vec::new();
        for (other, tokens) in others.iter().enumerate() {
            let n = if position < other % 5 { 0 } else { 1 + other % 3 };
            for _ in 0..n {
                let at: usize = done[other];
                step.push(Row { sequence: other + 1, position: at as u32, token: tokens[at] });
                done[other] += 1;
            }
        }
        step.push(Row { sequence: 0, position: position as u32, token: *token });
        steps.push(step);
    }
    steps
}

/// The logits of sequence 0 by position.
pub fn of_first_sequence(steps: &[Step], logits: AllLogits) -> Vec<Vec<f32>> {
    let rows = steps.iter().flatten().zip(logits.into_iter().flatten());
    let mut own: Vec<(u32, Vec<f32>)> =
        rows.filter(|(row, _)| row.sequence == 0).map(|(row, logits)| (row.position, logits)).collect();
    own.sort_by_key(|(position, _)| *position);
    own.into_iter().map(|(_, logits)| logits).collect()
}

pub fn assert_same_bits(expected: &[Vec<f32>], found: &[Vec<f32>], what: &str) {
    assert_eq!(expected.len(), found.len(), "{what}: positions");
    for (position, (expected, found)) in expected.iter().zip(found).enumerate() {
        assert_eq!(expected.len(), found.len(), "{what}: vocabulary");
        for (token, (expected, found)) in expected.iter().zip(found).enumerate() {
            assert_eq!(
                expected.to_bits(),
                found.to_bits(),
                "{what}: position {position}, token {token}: {expected} and {found}"
            );
        }
    }
}
