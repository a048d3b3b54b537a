//! The thread that owns model, KV memory and collective. Plans come in, results go out, in order; it ends at the
//! first failure, because ranks must never disagree about what was done.

use std::{
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use paceline_checkpoint::Checkpoint;
use paceline_collectives::{
    AbortFlag, Collective, CollectiveError, Endpoint, GroupSpec, PeerAddress, Transport,
};
use paceline_domain::{
    BlockCopy, BlockId, Branch, ErrorKind, KvType, Quantization, SequenceChunk, SequenceSamples,
    SequenceScores, StepMasks, StepNumber, StepPlan, StepResult, StepTimings, group::BLOCK_POSITIONS,
};
use paceline_model::link::{Group, Route};
use paceline_model::{
    Batch, Capacity, Decoder, Device, DeviceRoom, LoadProgress, LoadSpec, ModelConfig, ModelError, SplitPlan,
};
use paceline_wire::shard as proto;
use tokio::sync::mpsc::Sender;
use tonic::Status;
use tracing::{Span, field, info_span};

use crate::{
    ahead::LastSamples,
    masks::MaskInbox,
    sampler::Sampler,
    scorer::Scorer,
    sequences::{PlanError, Sequences},
};

/// Plans that may wait for the executor; the coordinator never runs further ahead.
pub const MAX_PLANS_AHEAD: usize = 4;
/// How long ranks may take to find each other; all were told at the same moment.
const CONNECT_DEADLINE: Duration = Duration::from_secs(30);
/// How long ranks that have loaded wait for the others; a peer that leaves, or the abort flag, ends it at once.
const LOAD_DEADLINE: Duration = Duration::from_secs(3600);

/// What a process computes with, whatever group it joins.
#[derive(Clone)]
pub struct Machine {
    /// The open model file.
    pub checkpoint: Arc<Checkpoint>,
    /// Its architecture.
    pub config: Arc<ModelConfig>,
    /// What its float matrices become at load.
    pub quantize: Option<Quantization>,
    /// What computes.
    pub device: Arc<dyn Device>,
    /// Compute threads of the CPU.
    pub n_threads: usize,
    /// How ranks exchange partial sums.
    pub transport: Transport,
}

impl Machine {
    /// What the device has room for in a place, where it has memory of its own. Nothing is loaded.
    ///
    /// # Errors
    /// When the model cannot run there.
    pub fn room(&self, seat: &proto::Seat) -> Result<Option<DeviceRoom>, ExecutorError> {
        let plan = SplitPlan::new(&self.config, seat.n_ranks as usize)?;
        let capacity = Capacity {
            kv_type: kv_type(&seat.kv_type)?,
            n_kv_blocks: 1,
            max_rows: seat.max_rows as usize,
            max_output_rows: seat.max_sampled_rows as usize,
        };
        let spec = LoadSpec {
            checkpoint: &self.checkpoint,
            config: &self.config,
            plan: &plan,
            rank: seat.rank as usize,
            quantize: self.quantize,
            capacity,
            progress: &|_| (),
        };
        Ok(self.device.room(&spec)?)
    }
}

/// A rank's place in a group.
pub struct Place {
    /// The message that assigned it.
    pub form: proto::Form,
    /// Where the peers expect this rank.
    pub endpoint: Endpoint,
    /// Set to leave every wait at once.
    pub abort: AbortFlag,
}

/// A plan with the trace it belongs to.
pub struct TracedPlan {
    /// The plan.
    pub plan: StepPlan,
    /// W3C `traceparent` and `tracestate`; empty when not traced.
    pub trace: (String, String),
}

/// Why an executor ended.
#[derive(thiserror::Error, Debug)]
pub enum ExecutorError {
    /// The group cannot be formed as asked.
    #[error("cannot form the group: {0}")]
    Form(String),
    /// A plan contradicts what is here.
    #[error("plan refused: {0}")]
    Plan(#[from] PlanError),
    /// The epoch or the step number is not the expected one.
    #[error("stale or missing plan: {0}")]
    Order(String),
    /// Loading or the forward pass failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A peer is gone or too late.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

impl ExecutorError {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Form(_) => ErrorKind::Unfit,
            Self::Plan(_) | Self::Order(_) => ErrorKind::Bug,
            Self::Model(error) => error.kind(),
            Self::Collective(error) => error.kind(),
        }
    }
}

/// What comes from the coordinator.
pub struct Feed {
    /// Plans, in order.
    pub plans: mpsc::Receiver<TracedPlan>,
    /// What constrained rows of them may choose.
    pub masks: mpsc::Receiver<StepMasks>,
}

/// What goes back to the coordinator.
pub type Outbox = Sender<Result<proto::ShardMessage, Status>>;

/// Starts the thread. It ends when the feed is closed, after the first failure, or when the abort flag is set.
///
/// # Errors
/// When the system gives no thread.
pub fn start(
    machine: Machine,
    place: Place,
    feed: Feed,
    outbox: Outbox,
) -> std::io::Result<thread::JoinHandle<()>> {
    let rank = place.form.rank;
    thread::Builder::new().name(format!("executor-{rank}")).spawn(move || {
        let abort = place.abort.clone();
        if let Err(error) = serve(machine, place, feed, &outbox) {
            // Peers that wait for this rank find out by themselves; the coordinator is told why.
            if abort.is_set() {
                tracing::debug!(rank, %error, "executor left its group");
            } else {
                tracing::error!(rank, %error, "executor ended");
            }
            let _ = outbox.blocking_send(Err(paceline_wire::status::status(error.kind(), error.to_string())));
        }
    })
}

fn serve(machine: Machine, place: Place, feed: Feed, outbox: &Outbox) -> Result<(), ExecutorError> {
    let masks = MaskInbox::new(feed.masks, Duration::from_millis(place.form.collective_deadline_ms));
    let mut executor = Executor::form(machine, place, outbox)?;
    while let Ok(traced) = feed.plans.recv() {
        let result = executor.step(traced, &masks)?;
        let message = proto::shard_message::Message::Result((&result).into());
        if outbox.blocking_send(Ok(proto::ShardMessage { message: Some(message) })).is_err() {
            break;
        }
    }
    Ok(())
}

struct Executor {
    epoch: u64,
    rank: usize,
    last_step: StepNumber,
    decoder: Decoder,
    collective: Box<dyn Collective>,
    sequences: Sequences,
    scorer: Scorer,
    sampler: Sampler,
    last_samples: LastSamples,
}

impl Executor {
    fn form(machine: Machine, place: Place, outbox: &Outbox) -> Result<Self, ExecutorError> {
        let form = place.form;
        let (rank, n_ranks) = (form.rank as usize, form.peer_addresses.len());
        let group = group_spec(&form, machine.transport, place.abort)?;
        let mut collective = paceline_collectives::connect(place.endpoint, &group)?;
        let plan = SplitPlan::new(&machine.config, n_ranks)?;
        let progress = |progress: LoadProgress| {
            let LoadProgress { done_bytes, total_bytes } = progress;
            let loading = proto::Loading { done_bytes, total_bytes };
            let message = Some(proto::shard_message::Message::Loading(loading));
            // A full outbox only loses a progress report.
            let _ = outbox.try_send(Ok(proto::ShardMessage { message }));
        };
        let capacity = Capacity {
            kv_type: kv_type(&form.kv_type)?,
            n_kv_blocks: form.n_kv_blocks as usize,
            max_rows: form.max_rows as usize,
            max_output_rows: form.max_sampled_rows as usize,
        };
        let spec = LoadSpec {
            checkpoint: &machine.checkpoint,
            config: &machine.config,
            plan: &plan,
            rank,
            quantize: machine.quantize,
            capacity,
            progress: &progress,
        };
        let mut decoder = Decoder::load(&spec, machine.device.as_ref())?;
        join(&mut decoder, collective.as_mut(), &group)?;
        let (weight_bytes, kv_bytes) = decoder.memory_bytes();
        let saved_bytes = spec.saved_bytes();
        if let Some(quantization) = machine.quantize {
            tracing::info!(rank, %quantization, weight_bytes, saved_bytes, "weights quantized at load");
        }
        let ready = proto::Ready {
            epoch: form.epoch,
            numerics: decoder.fingerprint().numerics,
            device_numerics: decoder.fingerprint().device_numerics,
            isa: decoder.device_name(),
            threads: machine.n_threads as u32,
            weight_bytes: weight_bytes as u64,
            kv_bytes: kv_bytes as u64,
            saved_bytes,
            copies_blocks: decoder.copies_blocks(),
        };
        let message = Some(proto::shard_message::Message::Ready(ready));
        let _ = outbox.blocking_send(Ok(proto::ShardMessage { message }));
        Ok(Self {
            epoch: form.epoch,
            rank,
            last_step: StepNumber(0),
            decoder,
            collective,
            sequences: Sequences::new(form.n_kv_blocks),
            scorer: Scorer::new(form.vocabulary_tokens as usize),
            sampler: Sampler::new(form.vocabulary_tokens as usize),
            last_samples: LastSamples::default(),
        })
    }

    fn step(&mut self, mut traced: TracedPlan, masks: &MaskInbox) -> Result<StepResult, ExecutorError> {
        let plan = &traced.plan;
        if plan.epoch.0 != self.epoch || plan.step.0 != self.last_step.0 + 1 {
            return Err(ExecutorError::Order(format!(
                "epoch {} step {} after epoch {} step {}",
                plan.epoch, plan.step, self.epoch, self.last_step
            )));
        }
        let started = Instant::now();
        let span = self.span(&traced);
        let _entered = span.enter();
        self.last_samples.fill(&mut traced.plan, self.collective.as_mut())?;
        let plan = &traced.plan;
        self.sequences.begin(plan)?;
        for copy in plan.opens.iter().filter_map(|open| open.copied) {
            self.decoder.copy_block(copy.from, copy.to)?;
        }
        let (scores, samples) = self.forward_and_sample(plan, masks)?;
        self.last_samples.replace(plan, &samples);
        self.last_step = plan.step;
        let stats = self.collective.take_stats();
        let timings = StepTimings {
            total_us: started.elapsed().as_micros() as u64,
            collective_wait_us: stats.wait.as_micros() as u64,
            collective_bytes: stats.bytes_sent,
        };
        span.record("collective_wait_us", timings.collective_wait_us as i64);
        span.record("compute_us", timings.total_us.saturating_sub(timings.collective_wait_us) as i64);
        span.record("collective_bytes", timings.collective_bytes as i64);
        Ok(StepResult { epoch: plan.epoch, step: plan.step, samples, scores, timings })
    }

    /// Numbers are signed because OTLP has no unsigned ones: they would go out as text.
    fn span(&self, traced: &TracedPlan) -> Span {
        let span = info_span!(
            "forward",
            rank = self.rank as i64,
            epoch = self.epoch as i64,
            step = traced.plan.step.0 as i64,
            n_rows = traced.plan.n_rows() as i64,
            compute_us = field::Empty,
            collective_wait_us = field::Empty,
            collective_bytes = field::Empty,
        );
        paceline_telemetry::context::adopt_headers(&span, &traced.trace.0, &traced.trace.1);
        span
    }

    fn forward_and_sample(
        &mut self,
        plan: &StepPlan,
        masks: &MaskInbox,
    ) -> Result<(Vec<SequenceScores>, Vec<SequenceSamples>), ExecutorError> {
        if plan.chunks.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        let rows = Rows::of(plan, &self.sequences);
        let of_chunk = |chunk: &SequenceChunk| self.sequences.get(chunk.sequence).blocks.as_slice();
        let of_branches = rows.tables_of_branches.iter().map(Vec::as_slice);
        let block_tables: Vec<_> = plan.chunks.iter().map(of_chunk).chain(of_branches).collect();
        let batch = Batch {
            tokens: &rows.tokens,
            positions: &rows.positions,
            sequence_of_row: &rows.sequence_of_row,
            block_tables: &block_tables,
            output_rows: &rows.output_rows,
            copies: &rows.copies,
        };
        let mut logits = self.decoder.forward(&batch, self.collective.as_mut())?;
        let scores = self.scorer.score(plan, &mut logits, self.collective.as_mut())?;
        masks.collect(plan, &mut self.sequences)?;
        let collective = self.collective.as_mut();
        Ok((scores, self.sampler.sample(plan, &mut self.sequences, &mut logits, collective)?))
    }
}

/// A plan as flat rows: those of chunks, then those of branches, which have block tables of their own.
#[derive(Default)]
struct Rows {
    tokens: Vec<paceline_domain::TokenId>,
    positions: Vec<u32>,
    sequence_of_row: Vec<u32>,
    output_rows: Vec<usize>,
    copies: Vec<BlockCopy>,
    tables_of_branches: Vec<Vec<BlockId>>,
}

impl Rows {
    fn of(plan: &StepPlan, sequences: &Sequences) -> Self {
        let mut rows = Self::default();
        for (chunk_idx, chunk) in plan.chunks.iter().enumerate() {
            let n_tokens = chunk.tokens.len();
            rows.tokens.extend_from_slice(&chunk.tokens);
            rows.positions.extend(chunk.start_pos..chunk.start_pos + n_tokens as u32);
            rows.sequence_of_row.extend(std::iter::repeat_n(chunk_idx as u32, n_tokens));
            let end = rows.tokens.len();
            rows.output_rows.extend(end - chunk.n_output_rows()..end);
        }
        for chunk in &plan.chunks {
            let blocks = &sequences.get(chunk.sequence).blocks;
            chunk.branches.iter().for_each(|branch| rows.add_branch(plan, chunk, branch, blocks));
        }
        rows
    }

    fn add_branch(&mut self, plan: &StepPlan, chunk: &SequenceChunk, branch: &Branch, blocks: &[BlockId]) {
        let position = chunk.position_of(branch);
        let place = position as usize / BLOCK_POSITIONS;
        self.output_rows.push(self.tokens.len());
        self.tokens.push(branch.token);
        self.positions.push(position);
        self.sequence_of_row.push((plan.chunks.len() + self.copies.len()) as u32);
        self.copies.push(BlockCopy { from: blocks[place], to: branch.block });
        self.tables_of_branches.push(blocks[..place].iter().copied().chain([branch.block]).collect());
    }
}

fn kv_type(name: &str) -> Result<KvType, ExecutorError> {
    name.parse().map_err(ExecutorError::Form)
}

/// Ranks are done loading at different times; from then on they are together.
fn join(
    decoder: &mut Decoder,
    collective: &mut dyn Collective,
    spec: &GroupSpec,
) -> Result<(), ExecutorError> {
    collective.set_deadline(LOAD_DEADLINE);
    let GroupSpec { connect_deadline, deadline, .. } = *spec;
    let mut group = Group { collective, connect_deadline, deadline, abort: spec.abort.clone() };
    let route = decoder.join(&mut group)?;
    collective.set_deadline(deadline);
    // Steps do not count this wait.
    collective.take_stats();
    if route != Route::Alone {
        tracing::info!(rank = spec.rank, epoch = spec.epoch.0, %route, "sums over ranks");
    }
    Ok(())
}

fn group_spec(
    form: &proto::Form,
    transport: Transport,
    abort: AbortFlag,
) -> Result<GroupSpec, ExecutorError> {
    let peers =
        form.peer_addresses.iter().map(|address| address.parse()).collect::<Result<Vec<PeerAddress>, _>>()?;
    let secret = form.secret.as_slice().try_into().map_err(|_| {
        ExecutorError::Form(format!("the secret has {} bytes instead of 32", form.secret.len()))
    })?;
    Ok(GroupSpec {
        rank: form.rank as usize,
        epoch: paceline_domain::Epoch(form.epoch),
        peers,
        secret,
        transport,
        connect_deadline: CONNECT_DEADLINE,
        deadline: Duration::from_millis(form.collective_deadline_ms),
        abort,
    })
}
