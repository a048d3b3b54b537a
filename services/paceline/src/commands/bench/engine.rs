//! The engine under measurement: a decoder for each rank, as shards run it, the ranks as threads of this process.
//! There is no scheduler, no gRPC and no text; whole steps are run, forward pass and greedy choice.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use paceline_checkpoint::Checkpoint;
use paceline_collectives::{AbortFlag, BindSpec, Collective, Endpoint, GroupSpec, Transport, connect};
use paceline_domain::{
    BlockId, Epoch, KvType, Quantization, SamplingParams, TokenId, group::BLOCK_POSITIONS,
};
use paceline_model::{
    Batch, Capacity, Decoder, Device, HeadTokens, LoadSpec, ModelConfig, SplitPlan, link::Group,
    logits::Choice,
};
use paceline_sampling::{Candidate, TokenHistory, merge};

use super::shape::Shape;

/// Decode steps before the clock starts.
const WARM_UP_STEPS: usize = 2;
/// How long a rank waits for its peers; loading is not under this deadline.
const DEADLINE: Duration = Duration::from_secs(120);

/// What to measure.
pub struct Job {
    /// The open model file.
    pub checkpoint: Arc<Checkpoint>,
    /// Its architecture.
    pub config: ModelConfig,
    /// What its matrices become at load.
    pub quantize: Option<Quantization>,
    /// The first tokens of the vocabulary, which have logits.
    pub n_tokens: usize,
    /// What each rank computes with.
    pub devices: Vec<Arc<dyn Device>>,
    /// Shapes, in this order.
    pub shapes: Vec<Shape>,
    /// Storage type of the KV cache.
    pub kv_type: KvType,
    /// Measurements of each.
    pub n_repeats: usize,
    /// Rows of one pass over a prompt; longer prompts take several passes.
    pub pass_rows: usize,
}

/// What was measured.
pub struct Measured {
    /// Seconds, `[shape][repeat]`.
    pub seconds: Vec<Vec<f64>>,
    /// Bytes of packed weights of all ranks.
    pub weight_bytes: u64,
    /// Bytes that quantization at load and a smaller output head save them.
    pub saved_bytes: u64,
    /// Bytes of a cached position of all ranks.
    pub kv_bytes_per_position: u64,
}

/// Runs the job; returns when every rank has ended.
///
/// # Errors
/// When a shape does not fit the model, or a rank cannot load or run.
pub fn run(job: &Job) -> anyhow::Result<Measured> {
    for shape in &job.shapes {
        if shape.n_positions() > job.config.context_length {
            let (n, context) = (shape.n_positions(), job.config.context_length);
            bail!("{shape} takes {n} positions, the model was made for {context}");
        }
    }
    let n_ranks = job.devices.len();
    let plan = SplitPlan::with_head(&job.config, n_ranks, &HeadTokens::first(job.n_tokens))?;
    let endpoints = (0..n_ranks)
        .map(|_| Endpoint::bind(&BindSpec::default()))
        .collect::<Result<Vec<_>, _>>()
        .context("ranks cannot be joined")?;
    let peers: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address().clone()).collect();
    let (abort, chosen) = (AbortFlag::new(), Chosen::new(capacity(job).max_output_rows));
    let results: Vec<anyhow::Result<Measured>> = thread::scope(|scope| {
        let start = |(rank, endpoint): (usize, Endpoint)| {
            let spec = GroupSpec {
                rank,
                epoch: Epoch(1),
                peers: peers.clone(),
                // Nobody else is told the addresses, and nothing secret is computed.
                secret: [0; 32],
                transport: Transport::Auto,
                connect_deadline: DEADLINE,
                deadline: DEADLINE,
                abort: abort.clone(),
            };
            let (plan, chosen) = (&plan, &chosen);
            scope.spawn(move || {
                let result =
                    Rank::load(job, plan, endpoint, &spec, chosen).and_then(|mut rank| rank.measure(job));
                if result.is_err() {
                    spec.abort.abort();
                }
                result
            })
        };
        let ranks: Vec<_> = endpoints.into_iter().enumerate().map(start).collect();
        let join = |rank: thread::ScopedJoinHandle<'_, _>| {
            rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        ranks.into_iter().map(join).collect()
    });
    combine(results)
}

/// Times are those of rank 0, bytes are of all ranks. Of several errors the first rank's is told; the others follow
/// from it or are alike.
fn combine(results: Vec<anyhow::Result<Measured>>) -> anyhow::Result<Measured> {
    let ranks = results.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let weight_bytes = ranks.iter().map(|rank| rank.weight_bytes).sum();
    let saved_bytes = ranks.iter().map(|rank| rank.saved_bytes).sum();
    let kv_bytes_per_position = ranks.iter().map(|rank| rank.kv_bytes_per_position).sum();
    let first = ranks.into_iter().next().context("there is no rank")?;
    Ok(Measured { seconds: first.seconds, weight_bytes, saved_bytes, kv_bytes_per_position })
}

/// Room for the largest shape.
fn capacity(job: &Job) -> Capacity {
    Capacity { kv_type: job.kv_type, ..capacity_in_f16(&job.shapes, job.pass_rows) }
}

fn capacity_in_f16(shapes: &[Shape], pass_rows: usize) -> Capacity {
    let blocks = |shape: &Shape| shape.n_sequences() * shape.n_positions().div_ceil(BLOCK_POSITIONS);
    let most = |of: &dyn Fn(&Shape) -> usize| shapes.iter().map(of).max().unwrap_or(1);
    Capacity {
        kv_type: KvType::F16,
        n_kv_blocks: most(&blocks),
        max_rows: most(&|shape| shape.max_rows(pass_rows)),
        max_output_rows: most(&|shape| shape.n_sequences()),
    }
}

/// Blocks of each sequence of a shape.
fn block_tables(shape: Shape) -> Vec<Vec<BlockId>> {
    let n_blocks = shape.n_positions().div_ceil(BLOCK_POSITIONS);
    let table = |sequence: usize| {
        (sequence * n_blocks..(sequence + 1) * n_blocks).map(|it| BlockId(it as u32)).collect()
    };
    (0..shape.n_sequences()).map(table).collect()
}

/// The tokens of a pass, as rank 0 chose them: what a coordinator would send with the next plan.
struct Chosen(Vec<AtomicU32>);

impl Chosen {
    fn new(max_output_rows: usize) -> Self {
        Self((0..max_output_rows).map(|_| AtomicU32::new(0)).collect())
    }
}

/// One rank at work.
struct Rank<'a> {
    decoder: Decoder,
    collective: Box<dyn Collective>,
    chosen: &'a Chosen,
    kv_positions: u64,
    saved_bytes: u64,
    pass_rows: usize,
    n_vocab: usize,
    /// What comes next in each sequence.
    next: Vec<TokenId>,
    best: Vec<Candidate>,
    own: Vec<u8>,
    parts: Vec<Vec<u8>>,
}

impl<'a> Rank<'a> {
    fn load(
        job: &Job,
        plan: &SplitPlan,
        endpoint: Endpoint,
        spec: &GroupSpec,
        chosen: &'a Chosen,
    ) -> anyhow::Result<Self> {
        let capacity = capacity(job);
        let load_spec = LoadSpec {
            checkpoint: &job.checkpoint,
            config: &job.config,
            plan,
            rank: spec.rank,
            quantize: job.quantize,
            capacity,
            progress: &|_| (),
        };
        let mut decoder = Decoder::load(&load_spec, job.devices[spec.rank].as_ref())?;
        let mut collective = connect(endpoint, spec)?;
        let GroupSpec { connect_deadline, deadline, ref abort, .. } = *spec;
        let (abort, together) = (abort.clone(), collective.as_mut());
        let route = decoder.join(&mut Group { collective: together, connect_deadline, deadline, abort })?;
        tracing::debug!(rank = spec.rank, %route, "sums over ranks");
        Ok(Self {
            decoder,
            collective,
            chosen,
            saved_bytes: load_spec.saved_bytes(),
            kv_positions: (capacity.n_kv_blocks * BLOCK_POSITIONS) as u64,
            pass_rows: job.pass_rows,
            n_vocab: job.config.n_vocab,
            next: Vec::new(),
            best: Vec::new(),
            own: Vec::new(),
            parts: Vec::new(),
        })
    }

    fn measure(&mut self, job: &Job) -> anyhow::Result<Measured> {
        let mut seconds = vec![Vec::new(); job.shapes.len()];
        for repeat in 0..job.n_repeats {
            for (shape, seconds) in job.shapes.iter().zip(&mut seconds) {
                if repeat == 0 {
                    self.warm_up(*shape)?;
                }
                seconds.push(self.time(*shape)?);
            }
        }
        let (weight_bytes, kv_bytes) = self.decoder.memory_bytes();
        let kv_bytes_per_position = kv_bytes as u64 / self.kv_positions;
        let (weight_bytes, saved_bytes) = (weight_bytes as u64, self.saved_bytes);
        Ok(Measured { seconds, weight_bytes, saved_bytes, kv_bytes_per_position })
    }

    /// Touches every page that the shape will touch.
    fn warm_up(&mut self, shape: Shape) -> anyhow::Result<()> {
        let tables = block_tables(shape);
        self.prefill(&tables, 0, shape.depth())?;
        match shape {
            Shape::Prefill { n_tokens, depth } => self.prefill(&tables, depth, depth + n_tokens),
            Shape::Decode { n_tokens, depth, .. } => self.decode(&tables, depth, n_tokens.min(WARM_UP_STEPS)),
        }
    }

    fn time(&mut self, shape: Shape) -> anyhow::Result<f64> {
        let tables = block_tables(shape);
        self.prefill(&tables, 0, shape.depth())?;
        self.collective.barrier()?;
        let started = Instant::now();
        match shape {
            Shape::Prefill { n_tokens, depth } => self.prefill(&tables, depth, depth + n_tokens)?,
            Shape::Decode { n_tokens, depth, .. } => self.decode(&tables, depth, n_tokens)?,
        }
        Ok(started.elapsed().as_secs_f64())
    }

    /// Runs the positions `from .. to` of the sequences' prompts, one sequence after the other, and chooses the tokens
    /// that follow.
    fn prefill(&mut self, tables: &[Vec<BlockId>], from: usize, to: usize) -> anyhow::Result<()> {
        self.next.clear();
        for (sequence, table) in tables.iter().enumerate() {
            let n_vocab = self.n_vocab;
            let token = |position: usize| TokenId(((7 * position + 13 * sequence + 1_000) % n_vocab) as u32);
            let mut start = from;
            for end in Shape::pass_ends(from, to, self.pass_rows) {
                let tokens: Vec<TokenId> = (start..end).map(token).collect();
                let positions: Vec<u32> = (start as u32..end as u32).collect();
                let output_rows: &[usize] = if end == to { &[end - start - 1] } else { &[] };
                let batch = Batch {
                    tokens: &tokens,
                    positions: &positions,
                    sequence_of_row: &vec![0; end - start],
                    block_tables: &[table],
                    output_rows,
                    copies: &[],
                };
                let chosen = self.step(&batch)?;
                self.next.extend(chosen);
                start = end;
            }
        }
        Ok(())
    }

    /// Goes on with all sequences, from this position.
    fn decode(&mut self, tables: &[Vec<BlockId>], from: usize, n_tokens: usize) -> anyhow::Result<()> {
        let n_sequences = tables.len();
        let tables: Vec<&[BlockId]> = tables.iter().map(Vec::as_slice).collect();
        let sequence_of_row: Vec<u32> = (0..n_sequences as u32).collect();
        let output_rows: Vec<usize> = (0..n_sequences).collect();
        for position in from..from + n_tokens {
            let tokens = std::mem::take(&mut self.next);
            let batch = Batch {
                tokens: &tokens,
                positions: &vec![position as u32; n_sequences],
                sequence_of_row: &sequence_of_row,
                block_tables: &tables,
                output_rows: &output_rows,
                copies: &[],
            };
            self.next = self.step(&batch)?;
        }
        Ok(())
    }

    /// One pass and the best token of each output row, the same on every rank.
    fn step(&mut self, batch: &Batch<'_>) -> anyhow::Result<Vec<TokenId>> {
        let (sampling, history) = (SamplingParams::greedy(), TokenHistory::default());
        let greedy = |row| Choice { row, position: 0, sampling: &sampling, history: &history };
        let choices: Vec<Choice<'_>> = (0..batch.output_rows.len()).map(greedy).collect();
        let mut logits = self.decoder.forward(batch, self.collective.as_mut())?;
        logits.best(self.n_vocab, &choices, &mut self.best)?;
        self.own.clear();
        self.own.extend(self.best.iter().flat_map(|best| best.to_bytes()));
        self.collective.gather(&self.own, &mut self.parts)?;
        let n_rows = batch.output_rows.len();
        if self.collective.rank() == 0 {
            for row in 0..n_rows {
                let best = self.parts.iter().filter_map(|part| part.as_chunks().0.get(row));
                let best: Vec<Candidate> = best.map(|bytes| Candidate::from_bytes(*bytes)).collect();
                self.chosen.0[row].store(merge(&best).0, Ordering::Relaxed);
            }
        }
        // The barrier orders the stores before the loads; the next gather orders the loads before the next stores.
        self.collective.barrier()?;
        Ok(self.chosen.0[..n_rows].iter().map(|token| TokenId(token.load(Ordering::Relaxed))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_share_no_block_and_fill_the_pool() {
        let shapes = ["pp40", "tg20x3"].map(|text| text.parse::<Shape>().expect("a shape"));
        let tables = block_tables(shapes[1]);
        let blocks: Vec<u32> = tables.concat().into_iter().map(|block| block.0).collect();
        assert_eq!(blocks, (0..9).collect::<Vec<_>>());
        let capacity = capacity_in_f16(&shapes, 512);
        assert_eq!((capacity.n_kv_blocks, capacity.max_rows, capacity.max_output_rows), (9, 40, 3));
    }
}
