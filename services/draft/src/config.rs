//! What the draft service can be told. Nothing else in this crate reads flags or the environment.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use paceline_device::{CpuOptions, DeviceOptions};
use paceline_domain::{DraftQuantization, KvType, group::BLOCK_POSITIONS};
use paceline_serving::ProcessOptions;

/// Longest sequence drafted for unless `--context` says otherwise, in tokens.
const DEFAULT_CONTEXT: usize = 32_768;
/// Most blocks a pool can have.
const MAX_BLOCKS: u32 = 1 << 24;

/// Flags of the draft service.
#[derive(Args, Clone, Debug)]
pub struct Config {
    /// Address to serve coordinators on; port 0 takes a free one
    #[arg(long, env = "PACELINE_DRAFT_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Draft model: GGUF file, or directory with config.json and safetensors; its tokenizer must be the target's
    #[arg(long, env = "PACELINE_DRAFT_MODEL")]
    pub model: PathBuf,
    /// What to compute with.
    #[command(flatten)]
    pub device: DeviceOptions,
    /// How the CPU is used.
    #[command(flatten)]
    pub cpu: CpuOptions,
    /// Blocks of 16 positions in the KV pool
    #[arg(long, env = "PACELINE_DRAFT_KV_BLOCKS", default_value_t = 1024)]
    pub kv_blocks: u32,
    /// Quantize matrices while they are loaded, to q4_0, q4_k, q4_1 or q8_0, also those that the file has quantized, where that
    /// makes them smaller; none leaves them as in the file [default: q4_0 on a CPU, else none]
    #[arg(long, env = "PACELINE_DRAFT_QUANTIZE", value_name = "TYPE")]
    pub quantize: Option<DraftQuantization>,
    /// Propose only the first N tokens of the vocabulary, the frequent ones, which makes the output head smaller; 0 is for all
    /// [default: 65536 where there are at least 98304, else all]
    #[arg(long, env = "PACELINE_DRAFT_VOCABULARY", value_name = "N")]
    pub vocabulary: Option<usize>,
    /// Storage type of the KV cache: f16, f32 or q8 (half of f16; on CPUs)
    #[arg(long, env = "PACELINE_DRAFT_KV_TYPE", value_name = "TYPE", default_value_t = KvType::F16)]
    pub kv_type: KvType,
    /// Most tokens of one sequence [default: the model's, at most 32768]
    #[arg(long, env = "PACELINE_DRAFT_CONTEXT")]
    pub context: Option<usize>,
    /// Most token rows in one pass
    #[arg(long, env = "PACELINE_DRAFT_MAX_ROWS", default_value_t = 256)]
    pub max_rows: usize,
    /// Most rows of prompts in a pass that other sequences wait for
    #[arg(long, env = "PACELINE_DRAFT_PROMPT_ROWS", default_value_t = 32)]
    pub prompt_rows: usize,
    /// Most sequences at once
    #[arg(long, env = "PACELINE_DRAFT_MAX_SESSIONS", default_value_t = 64)]
    pub max_sessions: usize,
    /// Most tokens to draft ahead of what is committed, whatever a coordinator asks for
    #[arg(long, env = "PACELINE_DRAFT_MAX_AHEAD", default_value_t = 16)]
    pub max_ahead: u32,
    /// Most coordinators at once
    #[arg(long, env = "PACELINE_DRAFT_MAX_COORDINATORS", default_value_t = 16)]
    pub max_coordinators: u32,
    /// About the process.
    #[command(flatten)]
    pub process: ProcessOptions,
}

impl Config {
    /// The name in messages.
    pub fn model_name(&self) -> String {
        self.model.file_stem().map_or("draft".into(), |stem| stem.to_string_lossy().into_owned())
    }

    /// The longest sequence, after all flags are checked. All problems are reported together.
    ///
    /// # Errors
    /// When a flag is out of its range.
    pub fn checked_context(&self, model_context: usize) -> anyhow::Result<usize> {
        let context = self.context.unwrap_or(model_context.min(DEFAULT_CONTEXT));
        let mut problems = Vec::new();
        let mut check = |name: &str, value: u64, low: u64, high: u64| {
            if !(low..=high).contains(&value) {
                problems.push(format!("{name} is {value}; it must be from {low} to {high}"));
            }
        };
        check("--context", context as u64, 2, model_context as u64);
        check("--kv-blocks", self.kv_blocks.into(), 1, MAX_BLOCKS.into());
        check("--max-rows", self.max_rows as u64, 1, 16_384);
        check("--prompt-rows", self.prompt_rows as u64, 1, self.max_rows as u64);
        check("--max-sessions", self.max_sessions as u64, 1, self.max_rows as u64);
        check("--max-ahead", self.max_ahead.into(), 1, 64);
        check("--max-coordinators", self.max_coordinators.into(), 1, 1024);
        anyhow::ensure!(problems.is_empty(), "{}", problems.join("\n"));
        let in_pool = self.kv_blocks as usize * BLOCK_POSITIONS;
        Ok(context.min(in_pool))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        config: Config,
    }

    fn config(flags: &[&str]) -> Config {
        Cli::parse_from(["test", "--model", "m/small.gguf"].iter().chain(flags)).config
    }

    #[test]
    fn the_context_is_what_model_and_pool_have() {
        assert_eq!(config(&[]).model_name(), "small");
        assert_eq!(config(&[]).checked_context(2_048).expect("fits"), 2_048);
        assert_eq!(config(&[]).checked_context(131_072).expect("fits"), 16_384);
        assert_eq!(config(&["--kv-blocks", "4"]).checked_context(2_048).expect("fits"), 64);
    }

    #[test]
    fn all_problems_are_reported_together() {
        let flags = ["--context", "9999", "--kv-blocks", "0", "--max-rows", "0", "--max-ahead", "99"];
        let message = config(&flags).checked_context(512).expect_err("refused").to_string();
        for flag in
            ["--context", "--kv-blocks", "--max-rows", "--prompt-rows", "--max-sessions", "--max-ahead"]
        {
            assert!(message.contains(flag), "{flag} in {message}");
        }
    }
}
