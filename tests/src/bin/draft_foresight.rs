//! How many of a model's own tokens its draft foresees, by class of prompts, for a draft that is made smaller in several
//! ways. Nothing is timed, so that a busy machine says the same:
//! `cargo run --release -p paceline-tests --bin draft_foresight -- --help`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use paceline_checkpoint::Checkpoint;
use paceline_collectives::Solo;
use paceline_domain::{BlockId, KvType, Quantization, TokenId, group::BLOCK_POSITIONS};
use paceline_kernels::Kernels;
use paceline_model::{Batch, Capacity, Cpu, Decoder, HeadTokens, LoadSpec, ModelConfig, SplitPlan};
use paceline_text::{AddGenerationPrompt, ChatMessage, ChatTemplate, SpecialTokens, Tokenizer};
use serde::Deserialize;
use serde_json::json;

/// Rows of one pass.
const CHUNK: usize = 64;
/// Positions of the longest sequence.
const N_POSITIONS: usize = 2_048;

/// Answers each prompt greedily, then asks the draft at each token of the answer what comes next. One JSON object a line for
/// each variant and class: tokens, the share of them that the draft foresees, and that of its second guesses.
#[derive(Parser)]
struct Cli {
    /// Model file
    #[arg(long)]
    model: PathBuf,
    /// Draft model file
    #[arg(long)]
    draft: PathBuf,
    /// Prompts: one JSON object a line, with class and prompt
    #[arg(long, default_value = "tests/load/speculation.jsonl")]
    prompts: PathBuf,
    /// Take only so many prompts of each class
    #[arg(long, default_value_t = 4)]
    per_class: usize,
    /// Tokens of each answer
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// Tokens of the draft's vocabulary, 0 for all, each followed by :TYPE where weights are quantized
    #[arg(long, value_delimiter = ',', default_value = "0,32768,49152,0:q4_0,32768:q4_0")]
    variants: Vec<Variant>,
}

/// How a draft is made smaller.
#[derive(Clone, Copy)]
struct Variant {
    n_tokens: usize,
    quantize: Option<Quantization>,
}

impl std::str::FromStr for Variant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (n_tokens, quantize) = match text.split_once(':') {
            Some((n_tokens, name)) => (n_tokens, Some(Quantization::of_draft(name)?)),
            None => (text, None),
        };
        let n_tokens = n_tokens.parse().map_err(|_| format!("`{n_tokens}` is no number of tokens"))?;
        Ok(Self { n_tokens, quantize })
    }
}

#[derive(Deserialize)]
struct Prompt {
    class: String,
    prompt: String,
}

/// A prompt and what the model answers, as one sequence.
struct Answer {
    class: String,
    tokens: Vec<TokenId>,
    n_prompt: usize,
}

/// A model that has one sequence at a time.
struct Model {
    decoder: Decoder,
    head: HeadTokens,
    blocks: Vec<BlockId>,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let answers = answers(&cli)?;
    let checkpoint = open(&cli.draft)?;
    for variant in &cli.variants {
        let mut draft = Model::load(&checkpoint, *variant)?;
        let mut counts: BTreeMap<&str, (usize, usize, usize)> = BTreeMap::new();
        for answer in &answers {
            let expected = draft.expected_after_each(&answer.tokens)?;
            let own = answer.n_prompt - 1..answer.tokens.len() - 1;
            let guessed =
                |guess: usize| own.clone().filter(|i| expected[*i][guess] == answer.tokens[i + 1]).count();
            let [first, second] = [guessed(0), guessed(1)];
            for class in [answer.class.as_str(), "all"] {
                let (firsts, seconds, all) = counts.entry(class).or_default();
                *firsts += first;
                *seconds += second;
                *all += own.len();
            }
        }
        for (class, (n_firsts, n_seconds, n_tokens)) in counts {
            let share = |n: usize| (1e4 * n as f64 / n_tokens as f64).round() / 1e4;
            let quantize = variant.quantize.map(Quantization::name);
            let (vocabulary, weight_bytes) = (draft.head.len(), draft.decoder.memory_bytes().0);
            println!(
                "{}",
                json!({ "class": class, "vocabulary": vocabulary, "quantize": quantize,
                    "weight_bytes": weight_bytes, "tokens": n_tokens, "foreseen": share(n_firsts),
                    "second_guesses": share(n_seconds) })
            );
        }
    }
    Ok(())
}

/// What the model itself says to the prompts.
fn answers(cli: &Cli) -> anyhow::Result<Vec<Answer>> {
    let checkpoint = open(&cli.model)?;
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint)?;
    let template = ChatTemplate::from_checkpoint(&checkpoint)?.context("the model has no chat template")?;
    let mut model = Model::load(&checkpoint, Variant { n_tokens: 0, quantize: None })?;
    let text = std::fs::read_to_string(&cli.prompts).context("cannot read the prompts")?;
    let (mut answers, mut taken) = (Vec::new(), BTreeMap::<String, usize>::new());
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let Prompt { class, prompt } = serde_json::from_str(line)?;
        let taken = taken.entry(class.clone()).or_default();
        *taken += 1;
        if *taken > cli.per_class {
            continue;
        }
        let message = ChatMessage { role: "user".into(), content: prompt };
        let prompt = template.render(&[message], AddGenerationPrompt::Yes)?;
        let mut tokens = tokenizer.encode_prompt(&prompt, SpecialTokens::Parse)?;
        let n_prompt = tokens.len();
        let mut next = model.run(&tokens, 0)?.pop().map(|[first, _]| first);
        while let Some(token) = next {
            tokens.push(token);
            let is_last =
                tokenizer.eos_tokens().contains(&token) || tokens.len() == n_prompt + cli.max_tokens;
            next = if is_last {
                None
            } else {
                model.run(&[token], tokens.len() - 1)?.pop().map(|[first, _]| first)
            };
        }
        answers.push(Answer { class, tokens, n_prompt });
    }
    Ok(answers)
}

fn open(path: &Path) -> anyhow::Result<Arc<Checkpoint>> {
    Ok(Arc::new(Checkpoint::open(path).with_context(|| path.display().to_string())?))
}

impl Model {
    fn load(checkpoint: &Arc<Checkpoint>, variant: Variant) -> anyhow::Result<Self> {
        let config = ModelConfig::from_checkpoint(checkpoint)?;
        let tokenizer = Tokenizer::from_checkpoint(checkpoint)?;
        let n_usable = tokenizer.n_vocab().min(config.n_vocab);
        let head = match variant.n_tokens {
            0 => HeadTokens::first(n_usable),
            n_tokens => HeadTokens::with(n_tokens.min(n_usable), tokenizer.eos_tokens()),
        };
        let n_kv_blocks = N_POSITIONS / BLOCK_POSITIONS;
        let spec = LoadSpec {
            checkpoint,
            config: &config,
            plan: &SplitPlan::with_head(&config, 1, &head)?,
            rank: 0,
            quantize: variant.quantize,
            capacity: Capacity { kv_type: KvType::F16, n_kv_blocks, max_rows: CHUNK, max_output_rows: CHUNK },
            progress: &|_| (),
        };
        let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
        let decoder = Decoder::load(&spec, &Cpu { kernels: Kernels::detect(), n_threads })?;
        Ok(Self { decoder, head, blocks: (0..n_kv_blocks as u32).map(BlockId).collect() })
    }

    /// The two likeliest tokens after each of a whole sequence.
    fn expected_after_each(&mut self, tokens: &[TokenId]) -> anyhow::Result<Vec<[TokenId; 2]>> {
        self.run(tokens, 0)
    }

    /// Goes on with the sequence from a position; the two likeliest tokens after each of these.
    fn run(&mut self, tokens: &[TokenId], start: usize) -> anyhow::Result<Vec<[TokenId; 2]>> {
        ensure!(start + tokens.len() <= N_POSITIONS, "a sequence is longer than {N_POSITIONS} tokens");
        let mut expected = Vec::new();
        for (chunk, tokens) in tokens.chunks(CHUNK).enumerate() {
            let start = (start + chunk * CHUNK) as u32;
            let positions: Vec<u32> = (start..).take(tokens.len()).collect();
            let output_rows: Vec<usize> = (0..tokens.len()).collect();
            let batch = Batch {
                tokens,
                positions: &positions,
                sequence_of_row: &vec![0; tokens.len()],
                block_tables: &[&self.blocks],
                output_rows: &output_rows,
                copies: &[],
            };
            let mut logits = self.decoder.forward(&batch, &mut Solo::new())?;
            for row in 0..tokens.len() {
                let row = logits.row(row)?;
                let best = |but: Option<usize>| {
                    let others = (0..row.len()).filter(|column| Some(*column) != but);
                    others.reduce(|best, next| if row[next] > row[best] { next } else { best })
                };
                let first = best(None).context("a head without tokens")?;
                let second = best(Some(first)).context("a head of one token")?;
                expected.push([first, second].map(|column| self.head.token(column)));
            }
        }
        Ok(expected)
    }
}
