//! What a coordinator can be told. Nothing else in this crate reads flags or the environment.

use std::{collections::HashSet, fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::Args;
use paceline_domain::{
    KvType, Quantization,
    group::{BLOCK_POSITIONS, max_sampled_rows},
};
use paceline_serving::ProcessOptions;
use tonic::transport::Uri;

use crate::{
    admission::Budget,
    drafter::Placement,
    pool::{MAX_BLOCKS, PoolBounds, PoolWish},
    scheduler::ItlBound,
};

/// Longest context served unless `--context` says otherwise, in tokens.
const DEFAULT_CONTEXT: usize = 32_768;
/// Smallest KV pool unless `--kv-blocks` says otherwise, in tokens.
const DEFAULT_POOL: usize = 16_384;

/// Most groups of a coordinator, and most shards of a group.
const MAX_GROUPS: usize = 64;
const MAX_RANKS: usize = 64;

/// Flags of a coordinator.
#[derive(Args, Clone, Debug)]
pub struct Config {
    /// Address to serve clients on; port 0 takes a free one
    #[arg(long, env = "PACELINE_LISTEN", default_value = "127.0.0.1:50051")]
    pub listen: SocketAddr,
    /// Address of the HTTP port with /metrics (Prometheus), /health/live and /health/ready; port 0 takes a free one
    /// [default: no HTTP port]
    #[arg(long, env = "PACELINE_HTTP_LISTEN")]
    pub http_listen: Option<SocketAddr>,
    /// GGUF file, or directory with config.json and safetensors; the same as the shards'
    #[arg(long, env = "PACELINE_MODEL")]
    pub model: PathBuf,
    /// Name clients use for the model [default: the file's name without its ending]
    #[arg(long, env = "PACELINE_MODEL_NAME")]
    pub model_name: Option<String>,
    /// Addresses of the shards in rank order, as http://host:port, separated by commas; given several times (or with lists
    /// separated by semicolons) each list is a group that serves the whole model, and requests are shared out
    #[arg(long, env = "PACELINE_SHARDS", value_delimiter = ';', required = true, value_name = "URL,...")]
    pub shards: Vec<ShardList>,
    /// Blocks of 16 positions in each rank's KV pool [default: what GPUs have free; on CPUs the context, at least 1024]
    #[arg(long, env = "PACELINE_KV_BLOCKS")]
    pub kv_blocks: Option<u32>,
    /// Matrices of plain numbers are quantized while they are loaded, to q8_0 or q4_k; as the shards are told
    #[arg(long, env = "PACELINE_QUANTIZE", value_name = "TYPE")]
    pub quantize: Option<Quantization>,
    /// Storage type of the KV cache: f16, f32 or q8 (half of f16; on CPUs)
    #[arg(long, env = "PACELINE_KV_TYPE", value_name = "TYPE", default_value_t = KvType::F16)]
    pub kv_type: KvType,
    /// Most tokens of prompt and output together [default: the model's, at most 32768]
    #[arg(long, env = "PACELINE_CONTEXT")]
    pub context: Option<usize>,
    /// Most token rows in one step, prompts and decoding together
    #[arg(long, env = "PACELINE_MAX_ROWS", default_value_t = 256)]
    pub max_rows: u32,
    /// Most sequences that run at the same time
    #[arg(long, env = "PACELINE_MAX_SEQUENCES", default_value_t = 64)]
    pub max_sequences: usize,
    /// Milliseconds that decoding sequences may wait between two tokens while prompts are read; prompts always get a
    /// fifth of the time [default: about twice the time without prompts while one is read, more while there are several]
    #[arg(long, env = "PACELINE_ITL_BOUND_MS")]
    pub itl_bound_ms: Option<u32>,
    /// Milliseconds a step may be expected to take for the next one to be sent before it is done; 0 always waits
    #[arg(long, env = "PACELINE_RUN_AHEAD_BELOW_MS", default_value_t = 30)]
    pub run_ahead_below_ms: u32,
    /// Most tokens (prompt and output) that wait for a place before requests are refused
    #[arg(long, env = "PACELINE_MAX_QUEUED_TOKENS", default_value_t = 1_000_000)]
    pub max_queued_tokens: u64,
    /// Percent of those tokens that one tenant (metadata x-tenant) may have, so that there is room for others
    #[arg(long, env = "PACELINE_MAX_TENANT_PERCENT", default_value_t = 75)]
    pub max_tenant_percent: u32,
    /// Requests of other priorities that get a place before a waiting priority, however low, gets the next
    #[arg(long, env = "PACELINE_PROMOTE_AFTER", default_value_t = 16)]
    pub promote_after: u32,
    /// Chunks that may wait for a client to read them before its request pauses
    #[arg(long, env = "PACELINE_READER_BUFFER", default_value_t = 256)]
    pub reader_buffer: usize,
    /// Milliseconds that a client may read nothing while its buffer is full before its request is cancelled
    #[arg(long, env = "PACELINE_READER_LIMIT_MS", default_value_t = 10_000)]
    pub reader_limit_ms: u32,
    /// Address of a draft service, as http://host:port; its proposals are verified and change no token
    #[arg(long, env = "PACELINE_DRAFT")]
    pub draft: Option<Uri>,
    /// Most tokens the draft service may run ahead of a sequence
    #[arg(long, env = "PACELINE_DRAFT_AHEAD", default_value_t = 12)]
    pub draft_ahead: u32,
    /// Milliseconds a step may wait for the draft service when that seems worth it; 0 never waits
    #[arg(long, env = "PACELINE_DRAFT_WAIT_MS", default_value_t = 400)]
    pub draft_wait_ms: u32,
    /// Where the draft service computes
    #[arg(long, env = "PACELINE_DRAFT_PLACEMENT", value_enum, default_value_t = Placement::Apart)]
    pub draft_placement: Placement,
    /// Milliseconds one collective may wait before the group counts as broken
    #[arg(long, env = "PACELINE_COLLECTIVE_DEADLINE_MS", default_value_t = 10_000)]
    pub collective_deadline_ms: u64,
    /// About the process.
    #[command(flatten)]
    pub process: ProcessOptions,
}

/// The shards of one group, in rank order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardList(pub Vec<Uri>);

impl FromStr for ShardList {
    type Err = <Uri as FromStr>::Err;

    fn from_str(list: &str) -> Result<Self, Self::Err> {
        list.split(',').map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for ShardList {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shards: Vec<String> = self.0.iter().map(Uri::to_string).collect();
        write!(formatter, "{}", shards.join(", "))
    }
}

/// Sizes that follow from flags and model together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Most tokens of one sequence.
    pub context: usize,
    /// What the KV pool should be.
    pub pool: PoolWish,
    /// Most token rows in one step.
    pub max_rows: u32,
    /// Most token rows in one step that are followed by a sampled token.
    pub max_sampled_rows: u32,
    /// Most running sequences.
    pub max_sequences: usize,
}

impl Config {
    /// The name clients use.
    pub fn model_name(&self) -> String {
        let from_path =
            || self.model.file_stem().map_or("model".into(), |stem| stem.to_string_lossy().into_owned());
        self.model_name.clone().unwrap_or_else(from_path)
    }

    /// How long decoding sequences may wait between two tokens while prompts are read.
    pub fn itl_bound(&self) -> ItlBound {
        self.itl_bound_ms.map_or(ItlBound::Twice, |ms| ItlBound::Millis(f64::from(ms)))
    }

    /// Steps above this are not followed by one that was sent before they were done: little would be hidden.
    pub fn run_ahead_below(&self) -> Duration {
        Duration::from_millis(self.run_ahead_below_ms.into())
    }

    /// How much is let in.
    pub fn budget(&self) -> Budget {
        Budget { n_tokens: self.max_queued_tokens, tenant_percent: self.max_tenant_percent }
    }

    /// How long a client may read nothing.
    pub fn reader_limit(&self) -> Duration {
        Duration::from_millis(self.reader_limit_ms.into())
    }

    /// How long one collective may wait.
    pub fn collective_deadline(&self) -> Duration {
        Duration::from_millis(self.collective_deadline_ms)
    }

    /// Checks the flags against the model's own context length. All problems are reported together.
    ///
    /// # Errors
    /// When a flag is out of its range.
    pub fn sizes(&self, model_context: usize) -> anyhow::Result<Sizes> {
        let context = self.context.unwrap_or(model_context.min(DEFAULT_CONTEXT));
        let blocks = |n_tokens: usize| u32::try_from(n_tokens.div_ceil(BLOCK_POSITIONS)).unwrap_or(u32::MAX);
        let bounds = PoolBounds {
            context,
            least: blocks(context),
            most: blocks(context).saturating_mul(u32::try_from(self.max_sequences).unwrap_or(u32::MAX)),
            in_host_memory: blocks(context.max(DEFAULT_POOL)),
        };
        let pool = self.kv_blocks.map_or(PoolWish::Fit(bounds), PoolWish::Exactly);
        let n_kv_blocks = self.kv_blocks.unwrap_or(bounds.in_host_memory);
        let mut problems = Vec::new();
        if context < 2 || context > model_context {
            problems.push(format!("--context is {context}; this model takes from 2 to {model_context}"));
        }
        if n_kv_blocks == 0 || n_kv_blocks > MAX_BLOCKS {
            problems.push(format!("--kv-blocks is {n_kv_blocks}; it must be from 1 to {MAX_BLOCKS}"));
        }
        if self.itl_bound_ms == Some(0) {
            problems.push("--itl-bound-ms is 0; it must be at least 1".into());
        }
        if !(1..=16_384).contains(&self.max_rows) {
            problems.push(format!("--max-rows is {}; it must be from 1 to 16384", self.max_rows));
        }
        if self.max_sequences == 0 || self.max_sequences > self.max_rows as usize {
            problems.push(format!(
                "--max-sequences is {}; it must be from 1 to --max-rows ({}), so that each can decode in every step",
                self.max_sequences, self.max_rows
            ));
        }
        problems.extend(self.queue_problems());
        problems.extend(self.shard_problems());
        if !(1..=64).contains(&self.draft_ahead) {
            problems.push(format!("--draft-ahead is {}; it must be from 1 to 64", self.draft_ahead));
        }
        if self.draft_wait_ms > 10_000 {
            problems.push(format!("--draft-wait-ms is {}; it must be from 0 to 10000", self.draft_wait_ms));
        }
        if !(10..=600_000).contains(&self.collective_deadline_ms) {
            let given = self.collective_deadline_ms;
            problems.push(format!("--collective-deadline-ms is {given}; it must be from 10 to 600000"));
        }
        anyhow::ensure!(problems.is_empty(), "{}", problems.join("\n"));
        let max_sampled_rows = max_sampled_rows(self.max_rows as usize, self.max_sequences) as u32;
        Ok(Sizes {
            context,
            pool,
            max_rows: self.max_rows,
            max_sampled_rows,
            max_sequences: self.max_sequences,
        })
    }

    fn shard_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.shards.len() > MAX_GROUPS {
            problems.push(format!("--shards has {} groups; at most {MAX_GROUPS}", self.shards.len()));
        }
        for list in self.shards.iter().filter(|list| list.0.len() > MAX_RANKS) {
            problems.push(format!("--shards names {} shards; a group has at most {MAX_RANKS}", list.0.len()));
        }
        let mut seen = HashSet::new();
        for shard in self.shards.iter().flat_map(|list| &list.0).filter(|shard| !seen.insert(*shard)) {
            problems.push(format!("--shards names {shard} twice; a shard is one rank of one group"));
        }
        problems
    }

    fn queue_problems(&self) -> impl Iterator<Item = String> {
        let bounds = [
            ("--max-tenant-percent", self.max_tenant_percent as usize, 100),
            ("--promote-after", self.promote_after as usize, 1_000_000),
            ("--reader-buffer", self.reader_buffer, 65_536),
            ("--reader-limit-ms", self.reader_limit_ms as usize, 3_600_000),
        ];
        let wrong = bounds.into_iter().filter(|(_, given, most)| !(1..=*most).contains(given));
        wrong.map(|(flag, given, most)| format!("{flag} is {given}; it must be from 1 to {most}"))
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
        let base = ["test", "--model", "m/tiny.gguf", "--shards", "http://a:1,http://b:2"];
        Cli::parse_from(base.iter().chain(flags)).config
    }

    #[test]
    fn defaults_follow_the_model() {
        let sizes = config(&[]).sizes(131_072).unwrap();
        let bounds = |context, least, in_host_memory| {
            PoolWish::Fit(PoolBounds { context, least, most: 64 * least, in_host_memory })
        };
        assert_eq!((sizes.context, sizes.pool), (32_768, bounds(32_768, 2_048, 2_048)));
        assert_eq!(config(&[]).sizes(2_048).unwrap().pool, bounds(2_048, 128, 1_024));
        assert_eq!(config(&["--kv-blocks", "9"]).sizes(2_048).unwrap().pool, PoolWish::Exactly(9));
        assert_eq!(config(&[]).model_name(), "tiny");
        assert_eq!(config(&[]).shards.len(), 1);
        assert_eq!(config(&[]).shards[0].0.len(), 2);
    }

    #[test]
    fn each_list_of_shards_is_a_group() {
        let lists = |flags: &[&str]| -> Vec<String> {
            config(flags).shards.iter().map(ToString::to_string).collect()
        };
        let expected = ["http://a:1/, http://b:2/", "http://c:3/", "http://d:4/, http://e:5/"];
        assert_eq!(lists(&["--shards", "http://c:3", "--shards", "http://d:4,http://e:5"]), expected);
        assert_eq!(lists(&["--shards", "http://c:3;http://d:4,http://e:5"]), expected);
        let twice = config(&["--shards", "http://c:3,http://a:1"]).sizes(512).unwrap_err().to_string();
        assert!(twice.contains("http://a:1/ twice"), "{twice}");
        let empty = ["test", "--model", "m", "--shards", "http://a:1,,http://b:1"];
        assert!(Cli::try_parse_from(empty).is_err());
    }

    #[test]
    fn all_problems_are_reported_together() {
        let flags = [
            ["--context", "9999"],
            ["--kv-blocks", "0"],
            ["--max-rows", "0"],
            ["--itl-bound-ms", "0"],
            ["--draft-ahead", "99"],
            ["--draft-wait-ms", "10001"],
            ["--collective-deadline-ms", "1"],
            ["--max-tenant-percent", "101"],
            ["--promote-after", "0"],
            ["--reader-buffer", "0"],
            ["--reader-limit-ms", "0"],
        ]
        .concat();
        let message = config(&flags).sizes(512).unwrap_err().to_string();
        for flag in [
            "--context",
            "--kv-blocks",
            "--max-rows",
            "--max-sequences",
            "--itl-bound-ms",
            "--draft-ahead",
            "--draft-wait-ms",
            "--collective-deadline-ms",
            "--max-tenant-percent",
            "--promote-after",
            "--reader-buffer",
            "--reader-limit-ms",
        ] {
            assert!(message.contains(flag), "{flag} in {message}");
        }
    }
}
