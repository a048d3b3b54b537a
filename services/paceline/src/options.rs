//! Options that several commands share, and what they mean on the wire. No command is run here.

use std::{
    ffi::OsString,
    io::Read as _,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use clap::{Args, ValueEnum};
use paceline_domain::{KvType, Quantization};
use paceline_shard::device::{DeviceChoice, GpuMemory};
use paceline_wire::inference::{SamplingOptions, SpeculationMode, SpeculationOptions, StopOptions};

use crate::{
    answer::Format,
    cache::ModelCache,
    catalogue::{Catalogue, ModelChoice},
    cluster::{DraftSpec, share_threads},
    draft_weights::DraftWeights,
    error::PullError,
    interrupt::{CancelFlag, Interrupts},
    progress::Progress,
    pull::{Existing, pull},
    response_format::ResponseFormatArgs,
};

/// Where models come from and go to.
#[derive(Args, Clone, Debug)]
pub struct ModelPlaces {
    /// Catalogue file whose models replace or follow the built-in ones
    #[arg(long, global = true, value_name = "FILE", env = "PACELINE_CATALOGUE", help_heading = "Models")]
    pub catalogue: Option<PathBuf>,
    /// Directory of model files [default: $XDG_CACHE_HOME/paceline/models or ~/.cache/paceline/models]
    #[arg(long, global = true, value_name = "DIR", env = "PACELINE_MODELS_DIR", help_heading = "Models")]
    pub models_dir: Option<PathBuf>,
}

impl ModelPlaces {
    /// The catalogue in force.
    ///
    /// # Errors
    /// When the user's file is unusable.
    pub fn catalogue(&self) -> anyhow::Result<Catalogue> {
        Ok(Catalogue::load(self.catalogue.as_deref())?)
    }

    /// The cache in force.
    ///
    /// # Errors
    /// When there is no place for one.
    pub fn cache(&self) -> anyhow::Result<ModelCache> {
        Ok(ModelCache::locate(self.models_dir.as_deref(), |name| std::env::var_os(name))?)
    }

    /// The file of a model argument, fetched when it is not there, and its name.
    ///
    /// # Errors
    /// When the model is unknown or cannot be fetched, or the user interrupts.
    pub async fn obtain(
        &self,
        model: Option<&str>,
        progress: &Progress,
        interrupts: &mut Interrupts,
    ) -> anyhow::Result<(PathBuf, String)> {
        let choice = self.catalogue()?.resolve(model)?;
        let name = choice.name();
        let entry = match choice {
            ModelChoice::Path(path) => return Ok((path, name)),
            ModelChoice::Known(entry) => entry,
        };
        let (cache, progress, cancel) = (self.cache()?, progress.clone(), CancelFlag::default());
        let flag = cancel.clone();
        let mut task =
            tokio::task::spawn_blocking(move || pull(&entry, &cache, Existing::Trust, &progress, &flag));
        tokio::select! {
            pulled = &mut task => Ok((pulled??, name)),
            signal = interrupts.next() => {
                cancel.set();
                // It ends because of the flag; what it says no longer matters.
                let _ = task.await;
                eprintln!("{}", PullError::Interrupted);
                Err(signal.into())
            }
        }
    }
}

/// How to split and run a model on this machine.
#[derive(Args, Clone, Debug)]
pub struct ClusterOptions {
    /// Catalogue name, .gguf or .safetensors file, or model directory [default: first of the catalogue]
    #[arg(long, short, value_name = "NAME|PATH")]
    pub model: Option<String>,
    /// Draft model, as catalogue name or path: proposes tokens that the model verifies, which never changes the text
    #[arg(long, value_name = "NAME|PATH")]
    pub draft: Option<String>,
    /// Compute threads of the draft model, which computes while the model waits [default: as many as --threads]
    #[arg(long, value_name = "N", requires = "draft")]
    pub draft_threads: Option<NonZeroUsize>,
    /// What the draft model may lose.
    #[command(flatten)]
    pub draft_weights: DraftWeights,
    /// Groups of shards that each have the whole model; requests are shared out, by cached prefix and load
    #[arg(long, value_name = "N", default_value = "1")]
    pub groups: NonZeroUsize,
    /// Shards to split the model over, in each group [default: one for each device that --device names, else 1]
    #[arg(long, value_name = "N")]
    pub ranks: Option<NonZeroUsize>,
    /// Compute threads of all shards together [default: one a core]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// What shards compute with: auto, cpu or cuda:N, one for all or one for each rank of each group [default: auto]
    #[arg(long, value_name = "DEVICE,...", value_delimiter = ',')]
    pub device: Vec<DeviceChoice>,
    /// Share of the free memory of each GPU that weights and KV cache may take [default: 0.9]
    #[arg(long, value_name = "SHARE")]
    pub gpu_memory: Option<GpuMemory>,
    /// Instruction set: auto, scalar, avx2, avx512 or avx512vnni
    #[arg(long, value_name = "ISA")]
    pub isa: Option<String>,
    /// How shards talk to each other: auto, shared-memory or tcp
    #[arg(long, value_name = "TRANSPORT")]
    pub transport: Option<String>,
    /// Quantize matrices of plain numbers while they are loaded: q8_0 or q4_k (the output head gets q8_0, and so do rows
    /// that are no multiple of 256)
    #[arg(long, value_name = "TYPE")]
    pub quantize: Option<Quantization>,
    /// Storage type of the KV cache: f16, f32 or q8 (half of f16; on CPUs) [default: f16]
    #[arg(long, value_name = "TYPE")]
    pub kv_type: Option<KvType>,
    /// Blocks of 16 positions in the KV pool [default: chosen by the coordinator]
    #[arg(long, value_name = "N")]
    pub kv_blocks: Option<u32>,
    /// Most tokens of prompt and output together [default: what the model was trained for]
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<u32>,
    /// Most requests that run at once [default: chosen by the coordinator]
    #[arg(long, value_name = "N")]
    pub max_sequences: Option<u32>,
}

impl ClusterOptions {
    /// Compute threads of each rank, group by group.
    pub fn threads_per_rank(&self) -> Vec<usize> {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let n_groups = self.groups.get();
        // Threads of one shard share what ranks have to sum: on one machine nothing is faster.
        let n_ranks = self.ranks.map_or((self.device.len() / n_groups).max(1), NonZeroUsize::get);
        share_threads(self.threads.map_or(cores, NonZeroUsize::get), n_groups * n_ranks)
    }

    /// What each rank computes with, group by group; empty when the user does not say.
    ///
    /// # Errors
    /// When there are several devices, but not one for each rank of each group.
    pub fn devices(&self) -> anyhow::Result<Vec<DeviceChoice>> {
        devices_of_ranks(&self.device, self.threads_per_rank().len())
    }

    /// All services must be told the same.
    fn quantize(&self) -> Option<String> {
        self.quantize.map(|quantization| quantization.to_string())
    }

    /// The draft service to start, if there is a draft model; fetches the model when it is not there.
    ///
    /// # Errors
    /// As [`ModelPlaces::obtain`]; when a draft model is described and none is named.
    pub async fn draft_spec(
        &self,
        places: &ModelPlaces,
        progress: &Progress,
        interrupts: &mut Interrupts,
    ) -> anyhow::Result<Option<DraftSpec>> {
        let Some(draft) = self.draft.as_deref() else {
            ensure!(
                !self.draft_weights.is_given(),
                "--draft-quantize and --draft-vocabulary need --draft MODEL"
            );
            return Ok(None);
        };
        let (model, _) = places.obtain(Some(draft), progress, interrupts).await?;
        let n_threads =
            self.draft_threads.map_or_else(|| self.threads_per_rank().iter().sum(), NonZeroUsize::get);
        let mut args = flags(&[("--threads", Some(n_threads.to_string())), ("--isa", self.isa.clone())]);
        args.extend(self.draft_weights.args());
        if let Some(device) = self.device.first() {
            args.extend(["--device".into(), device.to_string().into()]);
        }
        Ok(Some(DraftSpec { model, args }))
    }

    /// Arguments for every shard.
    pub fn shard_args(&self) -> Vec<OsString> {
        flags(&[
            ("--quantize", self.quantize()),
            ("--isa", self.isa.clone()),
            ("--transport", self.transport.clone()),
            ("--gpu-memory", self.gpu_memory.map(|share| share.to_string())),
        ])
    }

    /// Arguments for the coordinator.
    pub fn coordinator_args(&self) -> Vec<OsString> {
        let text = |value: Option<u32>| value.map(|value| value.to_string());
        flags(&[
            ("--quantize", self.quantize()),
            ("--kv-type", self.kv_type.map(|kv_type| kv_type.to_string())),
            ("--kv-blocks", text(self.kv_blocks)),
            ("--context", text(self.context)),
            ("--max-sequences", text(self.max_sequences)),
        ])
    }
}

fn devices_of_ranks(devices: &[DeviceChoice], n_ranks: usize) -> anyhow::Result<Vec<DeviceChoice>> {
    match devices {
        [device] => Ok(vec![*device; n_ranks]),
        [] => Ok(Vec::new()),
        several => {
            let n_devices = several.len();
            ensure!(n_devices == n_ranks, "--device names {n_devices} devices, there are {n_ranks} ranks");
            Ok(several.to_vec())
        }
    }
}

fn flags(options: &[(&str, Option<String>)]) -> Vec<OsString> {
    let given = options.iter().filter_map(|(flag, value)| value.as_ref().map(|value| (flag, value)));
    given.flat_map(|(flag, value)| [OsString::from(flag), value.into()]).collect()
}

/// How tokens are chosen and when to stop.
#[derive(Args, Clone, Debug)]
pub struct SamplingArgs {
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 512, help_heading = "Sampling")]
    pub max_tokens: u32,
    /// 0 always takes the likeliest token; higher is more varied
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.7,
        allow_negative_numbers = true,
        help_heading = "Sampling"
    )]
    pub temperature: f32,
    /// Keep only the K likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    pub top_k: Option<u32>,
    /// Keep the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true, help_heading = "Sampling")]
    pub top_p: Option<f32>,
    /// Keep tokens at least this many times as likely as the likeliest
    #[arg(long, value_name = "P", allow_negative_numbers = true, help_heading = "Sampling")]
    pub min_p: Option<f32>,
    /// Factor that makes tokens of prompt and output less likely; 1 is off
    #[arg(long, value_name = "X", allow_negative_numbers = true, help_heading = "Sampling")]
    pub repetition_penalty: Option<f32>,
    /// Subtracted once from the logit of tokens in the output
    #[arg(long, value_name = "X", allow_negative_numbers = true, help_heading = "Sampling")]
    pub presence_penalty: Option<f32>,
    /// Subtracted from the logit of a token for each time it is in the output
    #[arg(long, value_name = "X", allow_negative_numbers = true, help_heading = "Sampling")]
    pub frequency_penalty: Option<f32>,
    /// The same seed gives the same text [default: a new one each time]
    #[arg(long, value_name = "S", help_heading = "Sampling")]
    pub seed: Option<u64>,
    /// With --json, log probabilities of each token and of its N likeliest alternatives (0 to 20)
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    pub logprobs: Option<u32>,
    /// Text that ends the output; may be given several times
    #[arg(long, value_name = "TEXT", help_heading = "Sampling")]
    pub stop: Vec<String>,
    /// Go on after the model's end token
    #[arg(long, help_heading = "Sampling")]
    pub ignore_eos: bool,
    /// Fewest tokens to generate: until then the model's end token cannot be chosen [default: 0]
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    pub min_tokens: Option<u32>,
    /// Who may propose tokens that are verified several at once; never changes the text [default: auto]
    #[arg(long, value_name = "WHO", value_enum, help_heading = "Sampling")]
    pub speculate: Option<Speculate>,
    #[command(flatten)]
    pub(crate) response_format: ResponseFormatArgs,
}

/// Names of speculation modes.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Speculate {
    /// Whoever promises most
    Auto,
    /// Nobody
    Off,
    /// The request's own tokens
    Ngram,
    /// The draft model
    Draft,
}

impl From<Speculate> for SpeculationMode {
    fn from(speculate: Speculate) -> Self {
        match speculate {
            Speculate::Auto => Self::Auto,
            Speculate::Off => Self::Off,
            Speculate::Ngram => Self::Ngram,
            Speculate::Draft => Self::Draft,
        }
    }
}

impl SamplingArgs {
    /// For the wire. Limits are the coordinator's matter.
    pub fn sampling(&self) -> SamplingOptions {
        SamplingOptions {
            temperature: Some(self.temperature),
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            logprobs: self.logprobs,
            ..SamplingOptions::default()
        }
    }

    /// For the wire.
    pub fn stop(&self) -> StopOptions {
        StopOptions {
            max_tokens: Some(self.max_tokens),
            strings: self.stop.clone(),
            ignore_eos: Some(self.ignore_eos),
            min_tokens: self.min_tokens,
            ..StopOptions::default()
        }
    }

    /// For the wire.
    pub fn speculation(&self) -> Option<SpeculationOptions> {
        let mode = SpeculationMode::from(self.speculate?);
        Some(SpeculationOptions { mode: Some(mode.into()), max_tokens: None })
    }
}

/// What to ask, and how to show the answer.
#[derive(Args, Clone, Debug)]
pub struct PromptArgs {
    /// The prompt; `-` reads it from standard input
    #[arg(value_name = "PROMPT", allow_hyphen_values = true)]
    pub prompt: String,
    /// Send the prompt as it is, without the model's chat template
    #[arg(long)]
    pub raw: bool,
    /// Completions of the prompt (1 to 16), each with a seed of its own: as text one after the other under a line with its
    /// number, with --json one object a line [default: 1]
    #[arg(long, value_name = "N")]
    pub n: Option<u32>,
    /// With --json, log probabilities of each token of the prompt but the first and of the N likeliest in its place (0 to 20)
    #[arg(long, value_name = "N", requires = "json")]
    pub prompt_logprobs: Option<u32>,
    /// Write one JSON object with text, tokens, finish_reason, usage and timings instead of the text
    #[arg(long)]
    pub json: bool,
}

impl PromptArgs {
    /// How to write the answer.
    pub fn format(&self) -> Format {
        if self.json { Format::Json } else { Format::Text }
    }

    /// The prompt's text.
    ///
    /// # Errors
    /// When standard input is asked for and is not UTF-8 text.
    pub fn text(&self) -> anyhow::Result<String> {
        if self.prompt != "-" {
            return Ok(self.prompt.clone());
        }
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("the prompt on standard input is not readable text")?;
        Ok(text)
    }
}

/// Reads a JSON file.
///
/// # Errors
/// When it cannot be read or is no JSON.
pub fn read_json(path: &Path) -> anyhow::Result<serde_json::Value> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))
}

/// A server address as a URL: `host:port` gets `http://`.
///
/// # Errors
/// When it has another scheme.
pub fn server_url(server: &str) -> anyhow::Result<String> {
    match server.split_once("://") {
        None => Ok(format!("http://{server}")),
        Some(("http", _)) => Ok(server.to_owned()),
        Some((scheme, _)) => bail!("`{server}`: the scheme {scheme} is not known; use http://host:port"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_urls() {
        assert_eq!(server_url("localhost:1").expect("plain"), "http://localhost:1");
        assert_eq!(server_url("http://localhost:1").expect("URL"), "http://localhost:1");
        assert!(server_url("ftp://x").expect_err("scheme").to_string().contains("ftp"));
    }

    #[test]
    fn a_device_is_for_all_ranks_or_for_one() {
        use DeviceChoice::{Cpu, Cuda};
        let of = |devices: &[DeviceChoice]| devices_of_ranks(devices, 2);
        assert_eq!(of(&[]).expect("none"), []);
        assert_eq!(of(&[Cuda(1)]).expect("one for all"), [Cuda(1), Cuda(1)]);
        assert_eq!(of(&[Cuda(0), Cpu]).expect("one each"), [Cuda(0), Cpu]);
        let error = of(&[Cpu, Cpu, Cpu]).expect_err("one too many").to_string();
        assert!(error.contains("3 devices") && error.contains("2 ranks"), "{error}");
    }

    #[test]
    fn a_group_has_one_rank_or_one_for_each_device() {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            cluster: ClusterOptions,
        }
        let threads = |args: &[&str]| {
            let args = [&["test", "--threads", "4"], args].concat();
            let cli = <Cli as clap::Parser>::try_parse_from(args).expect("valid");
            cli.cluster.threads_per_rank()
        };
        assert_eq!(threads(&[]), [4]);
        assert_eq!(threads(&["--ranks", "2"]), [2, 2]);
        assert_eq!(threads(&["--groups", "2"]), [2, 2]);
        assert_eq!(threads(&["--device", "cpu"]), [4]);
        assert_eq!(threads(&["--device", "cuda:0,cuda:1"]), [2, 2]);
        assert_eq!(threads(&["--device", "cuda:0,cuda:1", "--groups", "2"]), [2, 2]);
    }

    #[test]
    fn only_given_flags_are_passed_on() {
        let passed = flags(&[("--isa", Some("scalar".into())), ("--transport", None)]);
        assert_eq!(passed, ["--isa", "scalar"]);
    }
}
