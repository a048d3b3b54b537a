//! `paceline plan`: how a model would be split, what each rank would hold and what ranks would exchange. Nothing is
//! loaded beyond the checkpoint's header.

use std::{num::NonZeroUsize, ops::Range, sync::Arc};

use clap::Args;
use paceline_checkpoint::Checkpoint;
use paceline_domain::{
    KvType, Quantization,
    group::{BLOCK_POSITIONS, max_sampled_rows},
};
use paceline_kernels::Kernels;
use paceline_model::{
    Cpu, Device, DeviceFit, LoadSpec, ModelConfig, SplitPlan, WeightTypes,
    estimate::{Capacity, MemoryEstimate},
    names,
    quantization::types_in,
};
use paceline_shard::device::{DeviceChoice, DeviceOptions, choose};
use serde_json::{Value, json};

use crate::{
    answer::write_stdout,
    device_memory::{DeviceMemory, fit_json, fit_text},
    interrupt::Interrupts,
    options::ModelPlaces,
    progress::{Progress, megabytes},
};

/// Tokens in the KV pool when the user does not say; the coordinator's default for short contexts.
const DEFAULT_POOL_TOKENS: usize = 16_384;

/// Shows how a model is split over ranks: memory of each, bytes exchanged for each token.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  paceline plan --model smollm2-135m-instruct --ranks 3
  paceline plan --model qwen2.5-coder-1.5b-instruct --ranks 4 --kv-tokens 65536 --json
  paceline plan --model model.gguf --ranks 1 --device-bytes 80GiB --gpu-memory 0.9

MB is 10^6 bytes, GB is 10^9 bytes. A GPU holds the weights, the embedding and the activations of --max-rows rows; what is
left is its KV cache. The pool of a group is as large as that of its smallest rank. Where this machine has a GPU and
--device-bytes is not given, it is asked what is free, and each rank is taken to have one like it for itself.")]
pub struct PlanArgs {
    /// Catalogue name, .gguf or .safetensors file, or model directory [default: first of the catalogue]
    #[arg(long, short, value_name = "NAME|PATH")]
    model: Option<String>,
    /// Shards to split the model over
    #[arg(long, value_name = "N", default_value = "2")]
    ranks: NonZeroUsize,
    /// Matrices of plain numbers are quantized while they are loaded: q8_0 or q4_k
    #[arg(long, value_name = "TYPE")]
    quantize: Option<Quantization>,
    /// Storage type of the KV cache: f16, f32 or q8
    #[arg(long, value_name = "TYPE", default_value_t = KvType::F16)]
    kv_type: KvType,
    /// Tokens that the KV pool holds
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT_POOL_TOKENS)]
    kv_tokens: usize,
    /// Most token rows in one step
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_rows: usize,
    /// Most requests that run at once
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_sequences: usize,
    /// GPU to ask, unless --device-bytes is given: auto, cpu (none) or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Auto, help_heading = "GPU")]
    device: DeviceChoice,
    #[command(flatten)]
    memory: DeviceMemory,
    /// Write one JSON object, in bytes
    #[arg(long)]
    json: bool,
}

/// One rank's line.
struct RankPlan {
    heads: Range<usize>,
    kv_heads: Range<usize>,
    ffn: Range<usize>,
    vocab: Range<usize>,
    memory: MemoryEstimate,
    /// Bytes that quantization at load saves.
    saved_bytes: u64,
    gpu: Option<GpuPlan>,
}

/// What a rank's GPU has room for.
enum GpuPlan {
    Fit { device: Option<String>, usable_bytes: u64, fit: DeviceFit },
    Unfit(String),
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be had or read, or cannot be split that way.
pub async fn plan(args: &PlanArgs, places: &ModelPlaces) -> anyhow::Result<()> {
    let (mut interrupts, progress) = (Interrupts::listen()?, Progress::to_stderr());
    let (path, name) = places.obtain(args.model.as_deref(), &progress, &mut interrupts).await?;
    let checkpoint = Arc::new(Checkpoint::open(&path)?);
    let capacity = Capacity {
        kv_type: args.kv_type,
        n_kv_blocks: args.kv_tokens.div_ceil(BLOCK_POSITIONS),
        max_rows: args.max_rows,
        max_output_rows: max_sampled_rows(args.max_rows, args.max_sequences),
    };
    let ranks = tokio::task::block_in_place(|| ranks(&checkpoint, args, capacity))?;
    write_stdout(&if args.json { as_json(&name, &ranks) } else { as_text(&name, args, &ranks) })
}

fn ranks(checkpoint: &Arc<Checkpoint>, args: &PlanArgs, capacity: Capacity) -> anyhow::Result<Vec<RankPlan>> {
    let n_ranks = args.ranks.get();
    let config = ModelConfig::from_checkpoint(checkpoint)?;
    names::check_tensors(&config, checkpoint)?;
    let plan = SplitPlan::new(&config, n_ranks)?;
    let (in_file, quantize) = (&types_in(checkpoint), args.quantize);
    let device = args.device()?;
    let rank_plan = |rank: usize| {
        let share = plan.share(rank).clone();
        let memory = MemoryEstimate::new(&config, &plan, rank, capacity, &WeightTypes { in_file, quantize });
        let progress = &|_| ();
        let spec = LoadSpec { checkpoint, config: &config, plan: &plan, rank, quantize, capacity, progress };
        let gpu = match (&device, args.memory.usable_bytes()) {
            (Some(device), _) => GpuPlan::of(device.as_ref(), &spec),
            (None, usable_bytes) => usable_bytes.map(|usable_bytes| {
                let fit = memory.on_device(usable_bytes);
                GpuPlan::Fit { device: None, usable_bytes, fit }
            }),
        };
        RankPlan {
            heads: share.heads,
            kv_heads: share.kv_heads,
            ffn: share.ffn,
            vocab: share.vocab,
            memory,
            saved_bytes: spec.saved_bytes(),
            gpu,
        }
    };
    Ok((0..n_ranks).map(rank_plan).collect())
}

impl PlanArgs {
    /// What is to be asked about its memory, unless the user has said how much there is.
    fn device(&self) -> anyhow::Result<Option<Arc<dyn Device>>> {
        if self.memory.usable_bytes().is_some() {
            return Ok(None);
        }
        let options = DeviceOptions { device: self.device, gpu_memory: self.memory.share(), nccl_lib: None };
        choose(&options, Cpu { kernels: Kernels::detect(), n_threads: 1 }).map(Some)
    }
}

impl GpuPlan {
    /// Asks the device, if it has memory of its own.
    fn of(device: &dyn Device, spec: &LoadSpec<'_>) -> Option<Self> {
        match device.room(spec) {
            Ok(room) => room.map(|room| Self::Fit {
                device: Some(device.name()),
                usable_bytes: room.usable_bytes,
                fit: room.fit(),
            }),
            Err(error) => Some(Self::Unfit(error.to_string())),
        }
    }

    fn text(&self, rank: usize) -> String {
        match self {
            Self::Fit { device, usable_bytes, fit } => {
                let name = device.as_ref().map_or(String::new(), |name| format!(" ({name})"));
                format!("GPU of rank {rank}{name}: {}\n", fit_text(fit, *usable_bytes))
            }
            Self::Unfit(problem) => format!("GPU of rank {rank}: {problem}\n"),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Fit { device, usable_bytes, fit } => {
                let mut value = fit_json(fit, *usable_bytes);
                value["device"] = json!(device);
                value
            }
            Self::Unfit(problem) => json!({ "problem": problem }),
        }
    }
}

fn as_text(name: &str, args: &PlanArgs, ranks: &[RankPlan]) -> String {
    let mut text = format!("{name} on {} ranks\n\n", ranks.len());
    text += "rank   heads  KV heads   FFN columns      vocabulary     weights    KV cache activations       total  \
             sent per token\n";
    let show = |range: &Range<usize>| format!("{}..{}", range.start, range.end);
    for (rank, plan) in ranks.iter().enumerate() {
        let memory = &plan.memory;
        text += &format!(
            "{rank:>4} {:>7} {:>9} {:>13} {:>15} {:>11} {:>11} {:>11} {:>11} {:>13} B\n",
            show(&plan.heads),
            show(&plan.kv_heads),
            show(&plan.ffn),
            show(&plan.vocab),
            megabytes(memory.weight_bytes),
            megabytes(memory.kv_bytes),
            megabytes(memory.activation_bytes),
            megabytes(memory.total_bytes()),
            memory.all_reduce_bytes_per_token,
        );
    }
    let total =
        |bytes: fn(&MemoryEstimate) -> u64| megabytes(ranks.iter().map(|rank| bytes(&rank.memory)).sum());
    let kv_token: u64 = ranks.iter().map(|rank| rank.memory.kv_bytes_per_position).sum();
    let gather: u64 = ranks.iter().map(|rank| rank.memory.gather_bytes_per_token).sum();
    text += &format!(
        "\nall ranks: weights {}, KV cache {} for {} tokens in {} ({kv_token} B a token), {} in all\n",
        total(|memory| memory.weight_bytes),
        total(|memory| memory.kv_bytes),
        args.kv_tokens,
        args.kv_type,
        total(MemoryEstimate::total_bytes),
    );
    if let Some(quantization) = args.quantize {
        let saved = ranks.iter().map(|rank| rank.saved_bytes).sum();
        text += &format!("quantized to {quantization} at load, which saves {}\n", megabytes(saved));
    }
    text += "sent per token: partial sums shown to the other ranks for each token of a pass, all layers\n";
    text += &format!(
        "top-k, top-p, min-p and log probabilities send {gather} B more to rank 0 for each sampled token\n"
    );
    text.extend(ranks.iter().enumerate().filter_map(|(rank, plan)| Some(plan.gpu.as_ref()?.text(rank))));
    text
}

fn as_json(name: &str, ranks: &[RankPlan]) -> String {
    let rank_json = |(rank, plan): (usize, &RankPlan)| {
        let range = |range: &Range<usize>| [range.start, range.end];
        json!({
            "rank": rank,
            "heads": range(&plan.heads),
            "kv_heads": range(&plan.kv_heads),
            "ffn": range(&plan.ffn),
            "vocab": range(&plan.vocab),
            "weight_bytes": plan.memory.weight_bytes,
            "saved_bytes": plan.saved_bytes,
            "embedding_bytes": plan.memory.embedding_bytes,
            "kv_bytes_per_token": plan.memory.kv_bytes_per_position,
            "kv_bytes": plan.memory.kv_bytes,
            "activation_bytes": plan.memory.activation_bytes,
            "total_bytes": plan.memory.total_bytes(),
            "all_reduce_bytes_per_token": plan.memory.all_reduce_bytes_per_token,
            "gather_bytes_per_token": plan.memory.gather_bytes_per_token,
            "gpu": plan.gpu.as_ref().map(GpuPlan::json),
        })
    };
    let ranks: Vec<_> = ranks.iter().enumerate().map(rank_json).collect();
    format!("{}\n", json!({ "model": name, "ranks": ranks }))
}
