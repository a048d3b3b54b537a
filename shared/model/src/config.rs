//! The shape of a decoder, checked. Where the values come from is in `config_gguf` and `config_json`; nothing
//! here reads a file.

use std::ops::RangeInclusive;

use paceline_checkpoint::{Checkpoint, Format};

use crate::{ModelError, config_gguf, config_json};

const LAYERS: RangeInclusive<usize> = 1..=1024;
const WIDTH: RangeInclusive<usize> = 1..=1 << 20;
const HEADS: RangeInclusive<usize> = 1..=1024;
const HEAD_DIM: RangeInclusive<usize> = 2..=1024;
const VOCAB: RangeInclusive<usize> = 1..=1 << 22;
const CONTEXT: RangeInclusive<usize> = 1..=1 << 24;

/// A family of decoders. They share one forward pass and differ in what [`ModelConfig`] says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2, Mistral.
    Llama,
    /// Qwen2 and Qwen2.5.
    Qwen2,
}

impl Architecture {
    /// The name GGUF files give it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }
}

/// Names of what can be run, for error messages.
pub const SUPPORTED: &str = "llama (Llama 2 and 3, SmolLM2, Mistral) and qwen2 (Qwen2, Qwen2.5)";

/// Which two elements of a head in the file's query and key rows are rotated together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PairLayout {
    /// Neighbours: (0, 1), (2, 3), … GGUF files of llama models.
    Interleaved,
    /// Element i of the first half with element i of the second half. Everything else.
    Half,
}

/// Frequency bands of Llama 3.1's rope scaling.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Llama3Scaling {
    /// Low frequencies are divided by this.
    pub factor: f64,
    /// Wavelengths above `original_context / low_freq_factor` are scaled whole.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_context / high_freq_factor` are left alone.
    pub high_freq_factor: f64,
    /// Context length before the scaling, in tokens.
    pub original_context: f64,
}

/// How rotation frequencies are changed for longer contexts.
#[derive(Clone, PartialEq, Debug)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies are divided by the factor.
    Linear(f64),
    /// By band.
    Llama3(Llama3Scaling),
    /// Each frequency is divided by its factor: `[head_dim / 2]`, the GGUF tensor `rope_freqs.weight`.
    Factors(Vec<f32>),
}

/// Rotary position embedding (Su et al. 2021).
#[derive(Clone, PartialEq, Debug)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Order of the rotated pairs in the file.
    pub pair_layout: PairLayout,
    /// Change of the frequencies.
    pub scaling: RopeScaling,
}

/// Layers from `first_layer` on attend to the last `n_positions` positions only, the own one included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlidingWindow {
    /// Positions seen.
    pub n_positions: usize,
    /// Layers before this one see everything.
    pub first_layer: usize,
}

/// The shape of a decoder. Every value is in range.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Decoder layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Width of the feed-forward network.
    pub n_ff: usize,
    /// Rows of the embedding.
    pub n_vocab: usize,
    /// Most positions of a sequence.
    pub context_length: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Limit on how far back attention looks.
    pub sliding_window: Option<SlidingWindow>,
    /// The output head is the embedding.
    pub tied_embeddings: bool,
    /// Query, key and value projections have biases.
    pub qkv_bias: bool,
}

impl ModelConfig {
    /// Reads the configuration of a checkpoint: GGUF metadata or config.json.
    ///
    /// # Errors
    /// [`ModelError::Unfit`] for an architecture or feature that cannot be run, [`ModelError::Config`] for a
    /// value that is missing or out of range.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        match checkpoint.format() {
            Format::Gguf => config_gguf::read(checkpoint),
            Format::Safetensors => {
                let json = checkpoint.config_json().ok_or_else(|| {
                    ModelError::config("config.json", "is missing beside the safetensors file")
                })?;
                Self::from_config_json(json)
            }
        }
    }

    /// Reads a Hugging Face config.json.
    ///
    /// # Errors
    /// As [`Self::from_checkpoint`].
    pub fn from_config_json(json: &serde_json::Value) -> Result<Self, ModelError> {
        config_json::read(json)
    }

    /// Query heads that share one key and value head.
    pub fn n_heads_per_kv(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Width of all query heads.
    pub fn attention_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key heads, and of all value heads.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// How many positions a layer sees back, the own one included; `None` is all.
    pub fn window_of_layer(&self, layer: usize) -> Option<usize> {
        self.sliding_window.filter(|window| layer >= window.first_layer).map(|window| window.n_positions)
    }

    /// Checks every range.
    pub(crate) fn checked(self) -> Result<Self, ModelError> {
        in_range("number of layers", self.n_layers, LAYERS)?;
        in_range("embedding width", self.n_embd, WIDTH)?;
        in_range("number of heads", self.n_heads, HEADS)?;
        in_range("number of key and value heads", self.n_kv_heads, 1..=self.n_heads)?;
        in_range("head dimension", self.head_dim, HEAD_DIM)?;
        in_range("number of heads x head dimension", self.n_heads * self.head_dim, WIDTH)?;
        in_range("feed-forward width", self.n_ff, WIDTH)?;
        in_range("vocabulary size", self.n_vocab, VOCAB)?;
        in_range("context length", self.context_length, CONTEXT)?;
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let problem = format!("{} do not divide {} heads", self.n_kv_heads, self.n_heads);
            return Err(ModelError::config("number of key and value heads", problem));
        }
        if !self.head_dim.is_multiple_of(2) {
            let problem = format!("is {}; rotary embedding needs an even one", self.head_dim);
            return Err(ModelError::config("head dimension", problem));
        }
        if !(self.rms_eps > 0.0 && self.rms_eps < 1.0) {
            let problem = format!("is {}; it must be between 0 and 1", self.rms_eps);
            return Err(ModelError::config("RMSNorm epsilon", problem));
        }
        if let Some(window) = self.sliding_window {
            in_range("sliding window", window.n_positions, CONTEXT)?;
        }
        self.rope.check(self.head_dim)?;
        Ok(self)
    }
}

impl RopeConfig {
    fn check(&self, head_dim: usize) -> Result<(), ModelError> {
        positive("rope theta", self.theta)?;
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear(factor) => positive("rope scaling factor", *factor),
            RopeScaling::Llama3(scaling) => {
                positive("rope scaling factor", scaling.factor)?;
                positive("rope low_freq_factor", scaling.low_freq_factor)?;
                positive("rope high_freq_factor", scaling.high_freq_factor)?;
                positive("rope original_max_position_embeddings", scaling.original_context)?;
                if scaling.low_freq_factor >= scaling.high_freq_factor {
                    let problem =
                        format!("is {}, not below {}", scaling.low_freq_factor, scaling.high_freq_factor);
                    return Err(ModelError::config("rope low_freq_factor", problem));
                }
                Ok(())
            }
            RopeScaling::Factors(factors) => {
                if factors.len() != head_dim / 2 {
                    let problem = format!("has {} values, not {}", factors.len(), head_dim / 2);
                    return Err(ModelError::tensor("rope_freqs.weight", problem));
                }
                factors.iter().try_for_each(|factor| positive("rope_freqs.weight", f64::from(*factor)))
            }
        }
    }
}

fn in_range(what: &str, value: usize, range: RangeInclusive<usize>) -> Result<(), ModelError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(ModelError::config(what, format!("is {value}; it must be from {} to {}", range.start(), range.end())))
}

fn positive(what: &str, value: f64) -> Result<(), ModelError> {
    const LIMIT: f64 = 1e15;
    if value > 1e-6 && value <= LIMIT {
        return Ok(());
    }
    Err(ModelError::config(what, format!("is {value}; it must be positive and at most {LIMIT:e}")))
}
