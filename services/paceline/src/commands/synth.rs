//! `paceline synth`: writes a model with random weights, for measurements and tests where no real one is at hand.
//! Nothing is loaded or run.

use std::{
    num::NonZeroUsize,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
    time::Instant,
};

use anyhow::{Context as _, bail};
use clap::Args;
use paceline_domain::WeightType;
use paceline_model::{
    ModelConfig,
    synthetic::{Synthetic, Writing, Written, built_in_shape, built_in_shapes, uniform},
};
use serde_json::json;

use crate::{
    answer::write_stdout,
    interrupt::{CancelFlag, Interrupts},
    options::read_json,
    progress::{Progress, megabytes},
};

/// Writes a model with random weights of any supported shape.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  paceline synth --shape qwen2.5-7b --type q4_k --out qwen2.5-7b-q4_k.gguf
  paceline synth --shape qwen2.5-1.5b --type bf16 --out qwen2.5-1.5b
  paceline synth --config config.json --type f16 --seed 7 --out model.gguf

Shapes: tiny, qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-7b.
Types: f32, bf16, f16 for both formats; q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k for GGUF files.

A seed gives the same weights on every machine, in both formats. Their text is noise: the tokenizer has one token for
each byte. A matrix has a deviation of 1 / sqrt(columns), so that logits have a sane size. Matrices whose rows are not whole
blocks of the type get q8_0 or f16 instead. What has the name already is replaced when the new one is whole.")]
pub struct SynthArgs {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Storage type of the matrices; norms and biases are f32
    #[arg(long = "type", value_name = "TYPE", default_value = "bf16", value_parser = weight_type)]
    weight_type: WeightType,
    /// The same seed gives the same weights
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// A name that ends in .gguf for a GGUF file, any other for a directory in the Hugging Face layout
    #[arg(long, value_name = "FILE.gguf|DIR")]
    out: PathBuf,
    /// Threads that make weights [default: one a core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Write one JSON object about what was written
    #[arg(long)]
    json: bool,
}

/// Where the shape comes from.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct ShapeArgs {
    /// A built-in shape
    #[arg(long, value_name = "NAME")]
    shape: Option<String>,
    /// config.json of a model in the Hugging Face layout
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// When the shape is not known or not supported, or the file cannot be written, or the user interrupts.
pub async fn synth(args: &SynthArgs) -> anyhow::Result<()> {
    let mut interrupts = Interrupts::listen()?;
    let (shape, config) = args.shape.named()?;
    let model = Synthetic { config, seed: args.seed, weight_type: uniform(args.weight_type) };
    let cancel = CancelFlag::default();
    let job = Job { model, out: Out::new(args)?, n_threads: n_threads(args), cancel: cancel.clone() };
    let started = Instant::now();
    let mut task = tokio::task::spawn_blocking(move || job.run());
    let written = tokio::select! {
        written = &mut task => written??,
        signal = interrupts.next() => {
            cancel.set();
            // It ends because of the flag and takes away what it began; what it says no longer matters.
            let _ = task.await;
            return Err(signal.into());
        }
    };
    let report = Report { args, shape, written, seconds: started.elapsed().as_secs_f64() };
    write_stdout(&if args.json { report.as_json() } else { report.as_text() })
}

impl ShapeArgs {
    /// The shape and what to call it.
    fn named(&self) -> anyhow::Result<(String, ModelConfig)> {
        match (&self.shape, &self.config) {
            (Some(name), _) => {
                let known =
                    || format!("--shape `{name}` is not known; known are {}", built_in_shapes().join(", "));
                Ok((name.clone(), built_in_shape(name).with_context(known)?))
            }
            (None, Some(path)) => {
                let config = ModelConfig::from_config_json(&read_json(path)?);
                Ok((path.display().to_string(), config.with_context(|| path.display().to_string())?))
            }
            (None, None) => bail!("either --shape or --config is needed"),
        }
    }
}

fn weight_type(name: &str) -> Result<WeightType, String> {
    let names = || WeightType::ALL.map(WeightType::name).join(", ");
    let found =
        WeightType::ALL.into_iter().find(|weight_type| weight_type.name() == name.to_ascii_lowercase());
    found.ok_or_else(|| format!("known are {}", names()))
}

fn n_threads(args: &SynthArgs) -> usize {
    args.threads.or_else(|| thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get)
}

/// Where the model goes.
enum Out {
    Gguf(PathBuf),
    Directory(PathBuf),
}

impl Out {
    fn new(args: &SynthArgs) -> anyhow::Result<Self> {
        let (path, weight_type) = (args.out.clone(), args.weight_type);
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            return Ok(Self::Gguf(path));
        }
        if weight_type.is_quantized() {
            let name = weight_type.name();
            bail!(
                "safetensors have no {name}: give --out a name that ends in .gguf, or --type f32, f16 or bf16"
            );
        }
        Ok(Self::Directory(path))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Gguf(path) | Self::Directory(path) => path,
        }
    }
}

/// The work, on a thread of its own.
struct Job {
    model: Synthetic,
    out: Out,
    n_threads: usize,
    cancel: CancelFlag,
}

impl Job {
    fn run(&self) -> anyhow::Result<Written> {
        let label = self.out.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (bars, bar) = (Progress::to_stderr(), OnceLock::new());
        let progress = |done: u64, total: u64| {
            bar.get_or_init(|| bars.bytes(&label, total)).set(done);
            if self.cancel.check().is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        let writing = Writing { n_threads: self.n_threads, progress: &progress };
        let written = match &self.out {
            Out::Gguf(path) => self.model.write_gguf(path, &writing),
            Out::Directory(path) => self.model.write_directory(path, &writing),
        };
        if let Some(bar) = bar.get() {
            bar.finish();
        }
        Ok(written?)
    }
}

/// What was done.
struct Report<'a> {
    args: &'a SynthArgs,
    shape: String,
    written: Written,
    seconds: f64,
}

impl Report<'_> {
    fn as_text(&self) -> String {
        let Written { n_bytes, n_parameters, replaced } = self.written;
        let wanted = self.args.weight_type.name();
        let mut text = format!(
            "{}: {}, {:.1} million parameters, {wanted}, seed {}, {} in {:.1} s ({:.2} GB/s)\n",
            self.args.out.display(),
            self.shape,
            n_parameters as f64 / 1e6,
            self.args.seed,
            megabytes(n_bytes),
            self.seconds,
            n_bytes as f64 / 1e9 / self.seconds,
        );
        if let Some((n_matrices, other)) = replaced {
            let other = other.name();
            text += &format!(
                "{n_matrices} matrices have rows that are not whole blocks of {wanted}: they are {other} instead\n"
            );
        }
        text
    }

    fn as_json(&self) -> String {
        let Written { n_bytes, n_parameters, replaced } = self.written;
        let object = json!({
            "out": self.args.out,
            "shape": self.shape,
            "type": self.args.weight_type.name(),
            "seed": self.args.seed,
            "parameters": n_parameters,
            "bytes": n_bytes,
            "seconds": self.seconds,
            "replaced_matrices": replaced.map_or(0, |(n_matrices, _)| n_matrices),
            "replaced_by": replaced.map(|(_, other)| other.name()),
        });
        format!("{object}\n")
    }
}
