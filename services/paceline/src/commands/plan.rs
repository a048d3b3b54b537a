//! `paceline plan`: how a model would be split, what each rank would hold and what ranks would exchange. Nothing is
//! loaded beyond the checkpoint's header.

use std::{num::NonZeroUsize, ops::Range};

use anyhow::Context as _;
use clap::Args;
use paceline_checkpoint::Checkpoint;
use paceline_domain::{KvType, WeightType, group::BLOCK_POSITIONS};
use paceline_model::{
    ModelConfig, SplitPlan,
    estimate::{Capacity, MemoryEstimate},
    names,
};
use serde_json::json;

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
left is its KV cache. The pool of a group is as large as that of its smallest rank.")]
pub struct PlanArgs {
    /// Catalogue name, .gguf or .safetensors file, or model directory [default: first of the catalogue]
    #[arg(long, short, value_name = "NAME|PATH")]
    model: Option<String>,
    /// Shards to split the model over
    #[arg(long, value_name = "N", default_value = "2")]
    ranks: NonZeroUsize,
    /// Storage type of the KV cache: f16 or f32
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    kv_type: String,
    /// Tokens that the KV pool holds
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT_POOL_TOKENS)]
    kv_tokens: usize,
    /// Most token rows in one step
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_rows: usize,
    /// Most requests that run at once
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_sequences: usize,
    #[command(flatten)]
    device: DeviceMemory,
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
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be had or read, or cannot be split that way.
pub async fn plan(args: &PlanArgs, places: &ModelPlaces) -> anyhow::Result<()> {
    let kv_type = KvType::from_name(&args.kv_type)
        .with_context(|| format!("--kv-type `{}` is not known; known are f16, f32", args.kv_type))?;
    let (mut interrupts, progress) = (Interrupts::listen()?, Progress::to_stderr());
    let (path, name) = places.obtain(args.model.as_deref(), &progress, &mut interrupts).await?;
    let checkpoint = Checkpoint::open(&path)?;
    let capacity = Capacity {
        kv_type,
        n_kv_blocks: args.kv_tokens.div_ceil(BLOCK_POSITIONS),
        max_rows: args.max_rows,
        max_output_rows: args.max_sequences,
    };
    let ranks = ranks(&checkpoint, args.ranks.get(), capacity)?;
    write_stdout(&if args.json { as_json(&name, args, &ranks) } else { as_text(&name, args, &ranks) })
}

fn ranks(checkpoint: &Checkpoint, n_ranks: usize, capacity: Capacity) -> anyhow::Result<Vec<RankPlan>> {
    let config = ModelConfig::from_checkpoint(checkpoint)?;
    names::check_tensors(&config, checkpoint)?;
    let plan = SplitPlan::new(&config, n_ranks)?;
    let weight_type = |expected: &names::Expected| {
        let name = names::name(expected.part, checkpoint.format(), expected.layer.unwrap_or_default());
        checkpoint.tensor(&name).map_or(WeightType::F32, |tensor| tensor.weight_type())
    };
    let rank_plan = |rank: usize| {
        let share = plan.share(rank).clone();
        let memory = MemoryEstimate::new(&config, &plan, rank, capacity, &weight_type);
        RankPlan { heads: share.heads, kv_heads: share.kv_heads, ffn: share.ffn, vocab: share.vocab, memory }
    };
    Ok((0..n_ranks).map(rank_plan).collect())
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
    text += "sent per token: partial sums shown to the other ranks for each token of a pass, all layers\n";
    text += &format!(
        "top-k, top-p, min-p and log probabilities send {gather} B more to rank 0 for each sampled token\n"
    );
    if let Some(usable_bytes) = args.device.usable_bytes() {
        for (rank, plan) in ranks.iter().enumerate() {
            let fit = plan.memory.on_device(usable_bytes);
            text += &format!("GPU of rank {rank}: {}\n", fit_text(&fit, usable_bytes));
        }
    }
    text
}

fn as_json(name: &str, args: &PlanArgs, ranks: &[RankPlan]) -> String {
    let rank_json = |(rank, plan): (usize, &RankPlan)| {
        let range = |range: &Range<usize>| [range.start, range.end];
        let fit = args.device.usable_bytes().map(|usable| fit_json(&plan.memory.on_device(usable), usable));
        json!({
            "rank": rank,
            "heads": range(&plan.heads),
            "kv_heads": range(&plan.kv_heads),
            "ffn": range(&plan.ffn),
            "vocab": range(&plan.vocab),
            "weight_bytes": plan.memory.weight_bytes,
            "embedding_bytes": plan.memory.embedding_bytes,
            "kv_bytes_per_token": plan.memory.kv_bytes_per_position,
            "kv_bytes": plan.memory.kv_bytes,
            "activation_bytes": plan.memory.activation_bytes,
            "total_bytes": plan.memory.total_bytes(),
            "all_reduce_bytes_per_token": plan.memory.all_reduce_bytes_per_token,
            "gather_bytes_per_token": plan.memory.gather_bytes_per_token,
            "gpu": fit,
        })
    };
    let ranks: Vec<_> = ranks.iter().enumerate().map(rank_json).collect();
    format!("{}\n", json!({ "model": name, "ranks": ranks }))
}
