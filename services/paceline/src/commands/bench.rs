//! `paceline bench`: how fast the engine runs a model, and how near that is to what the machine can do, without any
//! service; or, with prompts, what speculation brings on a whole cluster.

mod engine;
mod machine;
mod proposals;
mod shape;
mod speculation;
mod spread;
mod tally;

use std::{num::NonZeroUsize, sync::Arc, thread};

use anyhow::{Context as _, ensure};
use clap::Args;
use paceline_checkpoint::Checkpoint;
use paceline_domain::{KvType, Quantization};
use paceline_kernels::{Isa, Kernels};
use paceline_model::{Cpu, ModelConfig, WeightTypes, names, quantization::types_in};
use paceline_shard::device::{self, DeviceOptions};
use serde_json::json;

use self::{
    engine::{Job, Measured},
    machine::Limits,
    shape::{Shape, Work},
    speculation::SpeculationArgs,
    spread::Spread,
};
use crate::{
    answer::write_stdout,
    cluster::{quantized, share_threads},
    interrupt::Interrupts,
    options::{ClusterOptions, ModelPlaces},
    progress::Progress,
};

/// Measurements of a shape unless `--repeat` says otherwise.
const SHAPE_REPEATS: usize = 5;

/// Measures the engine on a model, or the limits of this machine.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  paceline bench --model qwen2.5-coder-1.5b-instruct --shapes pp512,tg128,tg64x8 --threads 2
  paceline bench --ranks 2 --json
  paceline bench --machine
  paceline bench --model qwen2.5-coder-1.5b-instruct --draft qwen2.5-coder-0.5b-instruct --prompts tests/load/speculation.jsonl

Shapes: ppN runs a prompt of N tokens (--pass-rows of them a pass); tgN decodes N tokens after a prompt of 16, which is not timed;
tgNxB decodes B sequences together, tokens/s of all of them. dN after a shape is the number of positions each sequence
has cached before the clock starts (tg32d8000 decodes at 8,000 positions of context). A step is the forward pass and the greedy choice of the
next token, in this process, without services. Ranks are threads of this process joined through shared memory, with
--threads shared among them.

tokens/s    median of the repeats (and least and largest)
GB/s        10^9 bytes read a second: each pass reads all packed weights once and the KV cache of each sequence once
bandwidth   that, as a share of what --machine finds for as many threads, reading a buffer of 1 GiB or more
peak        multiply-adds a second of the quantized matrices, as a share of the int8 multiply-adds that --machine
            finds: one for each weight and row (the output head only in rows that are sampled), also where activations
            have 16 bits and the multiply units therefore do two. Attention, norms and matrices of plain numbers are
            not counted. The machine's peak are multiply-adds of bytes with the best instruction set and no memory
            access (1 multiply-add = 2 operations in GOP/s).
ms/pass     median time of one pass: --pass-rows rows or the rest of a prompt, or one row of each sequence
Repeats go over all shapes in turn, so that what disturbs the machine disturbs them alike.
The machine is measured before and after the model, and the better of the two counts; the median of all readings of
memory stands beside it, because on a machine that is shared the best is seldom to be had.

--draft-quantize and --draft-vocabulary measure a model as it is when it is somebody's draft.

With --prompts a cluster of services is started instead, and each prompt is answered in each mode of speculation in turn,
greedily: tokens_per_s is after the first token, speedup that beside mode off, total with the time of the prompt,
acceptance of proposed tokens, tokens_per_pass of a sequence, identical whether all tokens are those of mode off. With --repeat
each prompt goes through all modes so often, and the median of each mode counts. Speedup_min is the prompt that gains least: the
median of its ratios to mode off of the same round. What equal work differs by is seen with `--speculate off,off`: the second
off is compared with the first as every mode is.")]
pub struct BenchArgs {
    /// Catalogue name, .gguf or .safetensors file, or model directory [default: first of the catalogue]
    #[arg(long, short, value_name = "NAME|PATH")]
    model: Option<String>,
    /// What to run: ppN, tgN, tgNxB, ppNdD, tgNdD, tgNxBdD
    #[arg(long, value_name = "SHAPES", value_delimiter = ',', default_value = "pp512,tg128,tg64x8,tg64x32")]
    shapes: Vec<Shape>,
    /// Quantize matrices of plain numbers while they are loaded: q8_0 or q4_k
    #[arg(long, value_name = "TYPE")]
    quantize: Option<Quantization>,
    /// Storage type of the KV cache: f16, f32 or q8
    #[arg(long, value_name = "TYPE", default_value_t = KvType::F16)]
    kv_type: KvType,
    /// What to compute with.
    #[command(flatten)]
    device: DeviceOptions,
    /// Compute threads of all ranks together [default: one a core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Ranks to split the model over
    #[arg(long, value_name = "N", default_value = "1")]
    ranks: NonZeroUsize,
    /// Measurements of each shape, or of each prompt in each mode [default: 5 of a shape, 1 of a prompt]
    #[arg(long, value_name = "N")]
    repeat: Option<NonZeroUsize>,
    /// Rows of one pass over a prompt; longer prompts take several passes
    #[arg(long, value_name = "N", default_value = "512")]
    pass_rows: NonZeroUsize,
    /// Measure the machine alone, with 1 thread up to --threads
    #[arg(long, conflicts_with_all = ["model", "quantize", "kv_type", "shapes", "ranks", "repeat", "pass_rows"])]
    machine: bool,
    /// Do not measure the machine (as with GPUs); shares are then unknown
    #[arg(long, conflicts_with = "machine")]
    no_machine: bool,
    /// Instruction set: auto, scalar, avx2, avx512 or avx512vnni
    #[arg(long, value_name = "ISA", default_value = "auto")]
    isa: String,
    /// Write JSON, one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    speculation: SpeculationArgs,
}

impl BenchArgs {
    /// The cluster that speculation is measured on.
    fn cluster(&self) -> ClusterOptions {
        ClusterOptions {
            model: self.model.clone(),
            draft: self.speculation.draft.clone(),
            draft_threads: self.speculation.draft_threads,
            draft_weights: self.speculation.draft_weights,
            groups: NonZeroUsize::MIN,
            ranks: Some(self.ranks),
            threads: self.threads,
            device: vec![self.device.device],
            gpu_memory: Some(self.device.gpu_memory),
            isa: Some(self.isa.clone()),
            transport: None,
            quantize: self.quantize,
            kv_type: Some(self.kv_type),
            kv_blocks: None,
            context: None,
            max_sequences: None,
        }
    }

    /// What matrices become when a model is measured by itself: as a target or as a draft.
    fn quantize_alone(&self) -> anyhow::Result<Option<Quantization>> {
        let as_draft = self.speculation.draft_weights.draft_quantize;
        let is_both = self.quantize.is_some() && as_draft.is_some();
        ensure!(!is_both, "without --prompts there is one model: give --quantize or --draft-quantize");
        Ok(self.quantize.or(as_draft.and_then(|draft| draft.0)))
    }
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be had, read or run, or the user interrupts.
pub async fn bench(args: &BenchArgs, places: &ModelPlaces) -> anyhow::Result<()> {
    if args.speculation.prompts.is_some() {
        let format = if args.json { speculation::Format::Json } else { speculation::Format::Table };
        let n_repeats = args.repeat.map_or(1, NonZeroUsize::get);
        let wanted = speculation::Wanted { args: &args.speculation, n_repeats, format };
        return speculation::compare(&wanted, &args.cluster(), places).await;
    }
    let (mut interrupts, progress) = (Interrupts::listen()?, Progress::to_stderr());
    let kernels = kernels(&args.isa)?;
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let n_threads = args.threads.map_or(cores, NonZeroUsize::get);
    let format = if args.json { Format::Json } else { Format::Table };
    if args.machine {
        let work = move || Ok(show_machine(kernels, n_threads, format));
        return write_stdout(&interruptible(work, &mut interrupts).await?);
    }
    let (path, model) = places.obtain(args.model.as_deref(), &progress, &mut interrupts).await?;
    let (ranks, shapes, n_repeats) =
        (args.ranks.get(), args.shapes.clone(), args.repeat.map_or(SHAPE_REPEATS, NonZeroUsize::get));
    let (device, pass_rows) = (args.device.clone(), args.pass_rows.get());
    let (quantize, kv_type) = (args.quantize_alone()?, args.kv_type);
    let n_tokens = args.speculation.draft_weights.draft_vocabulary;
    let machine = if args.no_machine { Machine::Unknown } else { Machine::Measured };
    let work = move || {
        let checkpoint = Arc::new(Checkpoint::open(&path)?);
        let config = ModelConfig::from_checkpoint(&checkpoint)?;
        let n_tokens = n_tokens.filter(|n_tokens| *n_tokens > 0).unwrap_or(config.n_vocab);
        ensure!(n_tokens <= config.n_vocab, "--draft-vocabulary: the model has {} tokens", config.n_vocab);
        let threads_of_rank = share_threads(n_threads, ranks);
        let n_threads = threads_of_rank.iter().sum();
        let devices = threads_of_rank.iter().map(|n| device::choose(&device, Cpu { kernels, n_threads: *n }));
        let devices = devices.collect::<anyhow::Result<Vec<_>>>()?;
        // What CPUs can do says nothing of a GPU.
        let machine = if devices.iter().all(|device| device.is_cpu()) { machine } else { Machine::Unknown };
        let job =
            Job { checkpoint, config, quantize, n_tokens, devices, shapes, kv_type, n_repeats, pass_rows };
        let (measured, limits) = measure(&job, machine, n_threads)?;
        Ok(Report { model, job, n_threads, measured, limits }.show(format))
    };
    write_stdout(&interruptible(work, &mut interrupts).await?)
}

#[derive(Clone, Copy)]
enum Format {
    Table,
    Json,
}

#[derive(Clone, Copy)]
enum Machine {
    Measured,
    Unknown,
}

/// Runs blocking work on a thread of its own; a signal ends the program without waiting for it.
async fn interruptible<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    interrupts: &mut Interrupts,
) -> anyhow::Result<T> {
    tokio::select! {
        result = tokio::task::spawn_blocking(work) => result?,
        signal = interrupts.next() => Err(signal.into()),
    }
}

fn kernels(isa: &str) -> anyhow::Result<&'static Kernels> {
    let isa = match isa {
        "auto" => Isa::detect(),
        name => Isa::from_name(name).with_context(|| format!("--isa `{name}` is not known"))?,
    };
    ensure!(isa.is_available(), "this CPU has no {isa}");
    Ok(Kernels::for_isa(isa))
}

/// The limits are those of the machine's best instruction set, whatever the engine is told to use.
fn measure(job: &Job, machine: Machine, n_threads: usize) -> anyhow::Result<(Measured, Option<Limits>)> {
    let limits = || match machine {
        Machine::Measured => machine::measure(Kernels::detect(), &[n_threads]).pop(),
        Machine::Unknown => None,
    };
    let before = limits();
    let measured = engine::run(job)?;
    let limits = before.zip(limits()).map(|(before, after)| before.join(after));
    Ok((measured, limits))
}

fn show_machine(kernels: &'static Kernels, n_threads: usize, format: Format) -> String {
    let thread_counts: Vec<usize> = (1..=n_threads).collect();
    let limits = machine::measure(kernels, &thread_counts);
    let isa = kernels.isa().name();
    let mut text = match format {
        Format::Table => format!("{isa}\nthreads   read GB/s   median   int8 GOP/s\n"),
        Format::Json => String::new(),
    };
    for (n_threads, limits) in thread_counts.iter().zip(limits) {
        let (read, products) = (limits.read_gb_per_s(), limits.int8_gop_per_s());
        let median = limits.median_read_gb_per_s();
        text += &match format {
            Format::Table => format!("{n_threads:>7} {read:>11.1} {median:>8.1} {products:>12.0}\n"),
            Format::Json => {
                let line = json!({
                    "threads": n_threads,
                    "isa": isa,
                    "read_gb_per_s": rounded(read, 2),
                    "median_read_gb_per_s": rounded(median, 2),
                    "int8_gop_per_s": rounded(products, 1),
                });
                format!("{line}\n")
            }
        };
    }
    text
}

/// Everything that is known at the end.
struct Report {
    model: String,
    job: Job,
    n_threads: usize,
    measured: Measured,
    limits: Option<Limits>,
}

/// One line of the report.
struct Line {
    tokens_per_s: Spread,
    bytes_per_s: f64,
    share_of_bandwidth: Option<f64>,
    share_of_peak: Option<f64>,
    ms_per_pass: f64,
}

impl Report {
    fn show(&self, format: Format) -> String {
        let products = Products::of(&self.job);
        let lines = self.job.shapes.iter().zip(&self.measured.seconds);
        let lines = lines.map(|(shape, seconds)| (*shape, self.line(*shape, seconds, &products)));
        match format {
            Format::Json => lines.map(|(shape, line)| self.json(shape, &line)).collect(),
            Format::Table => self.heading() + &lines.map(|(shape, line)| line.row(shape)).collect::<String>(),
        }
    }

    fn line(&self, shape: Shape, seconds: &[f64], products: &Products) -> Line {
        let work = shape.work(self.job.pass_rows);
        let per_second: Vec<f64> = seconds.iter().map(|seconds| shape.n_tokens() as f64 / seconds).collect();
        let tokens_per_s = Spread::of(&per_second);
        let median_s = shape.n_tokens() as f64 / tokens_per_s.median;
        let kv_bytes = work.n_kv_positions * self.measured.kv_bytes_per_position;
        let bytes_per_s = (work.n_passes * self.measured.weight_bytes + kv_bytes) as f64 / median_s;
        let products_per_s = products.during(&work) as f64 / median_s;
        Line {
            tokens_per_s,
            bytes_per_s,
            share_of_bandwidth: self.limits.map(|limits| bytes_per_s / limits.read_bytes_per_s),
            share_of_peak: self.limits.map(|limits| products_per_s / limits.products_per_s),
            ms_per_pass: median_s * 1e3 / work.n_passes as f64,
        }
    }

    fn heading(&self) -> String {
        let (n_ranks, device, n_threads) = (self.job.devices.len(), self.device(), self.n_threads);
        let (weights, kv_type) = (self.measured.weight_bytes as f64 / 1e9, self.job.kv_type);
        let mut text = format!(
            "{}, {weights:.2} GB of weights, {kv_type} KV, {n_threads} threads, {n_ranks} ranks, {device}\n",
            self.model
        );
        if let Some(quantization) = self.job.quantize {
            let (weights, saved) = (self.measured.weight_bytes, self.measured.saved_bytes);
            text += &format!("{}\n", quantized(quantization.name(), weights, saved));
        }
        if self.job.n_tokens < self.job.config.n_vocab {
            text += &format!("output head for the first {} tokens\n", self.job.n_tokens);
        }
        if let Some(limits) = &self.limits {
            let (read, products) = (limits.read_gb_per_s(), limits.int8_gop_per_s());
            let median = limits.median_read_gb_per_s();
            text += &format!(
                "this machine now: reads {read:.1} GB/s at best ({median:.1} in the median), {products:.0} int8 GOP/s\n"
            );
        }
        text + "\nshape           tokens/s      min      max     GB/s  bandwidth    peak   ms/pass\n"
    }

    fn json(&self, shape: Shape, line: &Line) -> String {
        let share = |share: Option<f64>| share.map(|share| rounded(share, 4));
        let object = json!({
            "model": self.model,
            "shape": shape.to_string(),
            "threads": self.n_threads,
            "ranks": self.job.devices.len(),
            "tokens_per_s": rounded(line.tokens_per_s.median, 2),
            "gb_per_s": rounded(line.bytes_per_s / 1e9, 3),
            "share_of_bandwidth": share(line.share_of_bandwidth),
            "share_of_peak": share(line.share_of_peak),
            "ms_per_pass": rounded(line.ms_per_pass, 3),
            "tokens_per_s_min": rounded(line.tokens_per_s.min, 2),
            "tokens_per_s_max": rounded(line.tokens_per_s.max, 2),
            "read_gb_per_s": self.limits.map(|limits| rounded(limits.read_gb_per_s(), 2)),
            "median_read_gb_per_s": self.limits.map(|limits| rounded(limits.median_read_gb_per_s(), 2)),
            "int8_gop_per_s": self.limits.map(|limits| rounded(limits.int8_gop_per_s(), 1)),
            "weight_bytes": self.measured.weight_bytes,
            "quantize": self.job.quantize.map(Quantization::name),
            "vocabulary": self.job.n_tokens,
            "saved_bytes": self.measured.saved_bytes,
            "kv_type": self.job.kv_type.name(),
            "isa": self.device(),
        });
        format!("{object}\n")
    }

    /// What rank 0 computes with.
    fn device(&self) -> String {
        self.job.devices.first().map(|device| device.name()).unwrap_or_default()
    }
}

impl Line {
    fn row(&self, shape: Shape) -> String {
        let Spread { median, min, max } = self.tokens_per_s;
        let percent =
            |share: Option<f64>| share.map_or("-".into(), |share| format!("{:.1} %", 100.0 * share));
        format!(
            "{:<14} {median:>9.1} {min:>8.1} {max:>8.1} {:>8.1} {:>10} {:>7} {:>9.2}\n",
            shape.to_string(),
            self.bytes_per_s / 1e9,
            percent(self.share_of_bandwidth),
            percent(self.share_of_peak),
            self.ms_per_pass,
        )
    }
}

/// Int8 products that the quantized matrices of a model cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Products {
    of_row: u64,
    of_output_row: u64,
}

impl Products {
    fn of(job: &Job) -> Self {
        let (config, checkpoint) = (&job.config, &job.checkpoint);
        let mut products = Self::default();
        let types = WeightTypes { in_file: &types_in(checkpoint), quantize: job.quantize };
        for tensor in names::expected_tensors(config, checkpoint.format()) {
            if types.loaded(&tensor).is_quantized() {
                let n: u64 = tensor.shape.iter().map(|length| *length as u64).product();
                products.add(tensor.part, n, job);
            }
        }
        products
    }

    fn add(&mut self, part: names::Part, n: u64, job: &Job) {
        let of_head = n / job.config.n_vocab as u64 * job.n_tokens as u64;
        match part {
            names::Part::Head => self.of_output_row += of_head,
            // Looked up for each row, multiplied only when it is the head too.
            names::Part::Embedding if job.config.tied_embeddings => self.of_output_row += of_head,
            names::Part::Embedding => {}
            _ => self.of_row += n,
        }
    }

    fn during(&self, work: &Work) -> u64 {
        self.of_row * work.n_rows + self.of_output_row * work.n_output_rows
    }
}

fn rounded(value: f64, n_decimals: i32) -> f64 {
    let scale = 10_f64.powi(n_decimals);
    (value * scale).round() / scale
}
