//! `paceline estimate`: memory for a model that is known by its config.json alone. No weights are needed.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::Args;
use paceline_domain::{KvType, Quantization, group::BLOCK_POSITIONS};
use paceline_model::{
    DeviceFit, ModelConfig,
    estimate::{ConfigEstimate, Dtype, GIB},
};

use crate::{
    answer::write_stdout,
    device_memory::{DeviceMemory, fit_json, fit_text},
    options::read_json,
};

/// Estimates the memory a model needs from its config.json alone.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  paceline estimate --config Mistral-7B-v0.1/config.json --dtype bfloat16
  paceline estimate --config config.json --dtype q4_k --json
  paceline estimate --config config.json --dtype bfloat16 --device-bytes 24GiB
  paceline estimate --config config.json --dtype bfloat16 --quantize q4_k

With --quantize, the output head gets 8 bits, rows that are no multiple of 256 get 8 bits instead of 4, and the embedding
stays as it is in the file. The line `Transformers guide` is for --dtype.
GB is 10^9 bytes, GiB is 2^30 bytes. The Transformers guide and its memory calculator print GiB under the name GB,
and count rotary tables but not the output head; the line `Transformers guide` follows them.")]
pub struct EstimateArgs {
    /// config.json of a model in the Hugging Face layout
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Storage type of the weights: float32, bfloat16, float16, int8, int4, or a GGUF type such as q4_k
    #[arg(long, value_name = "TYPE", default_value = "bfloat16")]
    dtype: String,
    /// Matrices of plain numbers are quantized while they are loaded: q8_0 or q4_k
    #[arg(long, value_name = "TYPE")]
    quantize: Option<Quantization>,
    /// Storage type of the KV cache: f16, f32 or q8
    #[arg(long, value_name = "TYPE", default_value_t = KvType::F16)]
    kv_type: KvType,
    #[command(flatten)]
    device: DeviceMemory,
    /// Write one JSON object, in bytes
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When the file or the type is not understood.
pub fn estimate(args: &EstimateArgs) -> anyhow::Result<()> {
    let dtype = Dtype::from_name(&args.dtype).with_context(|| {
        format!("--dtype `{}` is not known; known are {}", args.dtype, Dtype::names().join(", "))
    })?;
    let json = read_json(&args.config)?;
    let config = ModelConfig::from_config_json(&json).with_context(|| args.config.display().to_string())?;
    ensure!(
        args.quantize.is_none() || dtype.float_type().is_some(),
        "--quantize is for weights of plain numbers, --dtype {} has none",
        args.dtype
    );
    let estimate = ConfigEstimate::new(&config, dtype, args.quantize, args.kv_type);
    let fit = |usable_bytes| {
        let kv_block_bytes = estimate.kv_bytes_per_1000_tokens * BLOCK_POSITIONS as u64 / 1000;
        (DeviceFit::new(usable_bytes, estimate.weight_bytes, kv_block_bytes), usable_bytes)
    };
    let fit = args.device.usable_bytes().map(fit);
    let dtype = &args.quantize.map_or(args.dtype.clone(), |quantization| quantization.to_string());
    write_stdout(&if args.json {
        as_json(&estimate, dtype, fit)
    } else {
        as_text(&estimate, (dtype, args.kv_type), fit)
    })
}

fn as_text(
    estimate: &ConfigEstimate,
    (dtype, kv_type): (&str, KvType),
    fit: Option<(DeviceFit, u64)>,
) -> String {
    let size = |bytes: u64| {
        format!("{:>9.2} GB (10^9 bytes) {:>9.2} GiB (2^30 bytes)", bytes as f64 / 1e9, bytes as f64 / GIB)
    };
    let guide = estimate.guide_bytes as f64 / GIB;
    let kv = estimate.kv_bytes_per_1000_tokens;
    [
        format!("parameters          {:>9.3} billion\n", estimate.n_parameters as f64 / 1e9),
        format!("weights, {dtype:<10} {}\n", size(estimate.weight_bytes)),
        format!("KV cache, {kv_type:<9} {} per 1000 tokens\n", size(kv)),
        format!("Transformers guide  {guide:>9.2} GiB, printed there as {guide:.2} GB\n"),
        fit.map_or(String::new(), |(fit, usable)| {
            format!("on one GPU          {}\n", fit_text(&fit, usable))
        }),
    ]
    .concat()
}

fn as_json(estimate: &ConfigEstimate, dtype: &str, fit: Option<(DeviceFit, u64)>) -> String {
    let object = serde_json::json!({
        "dtype": dtype,
        "parameters": estimate.n_parameters,
        "weight_bytes": estimate.weight_bytes,
        "kv_bytes_per_1000_tokens": estimate.kv_bytes_per_1000_tokens,
        "transformers_guide_bytes": estimate.guide_bytes,
        "gpu": fit.map(|(fit, usable)| fit_json(&fit, usable)),
    });
    format!("{object}\n")
}
