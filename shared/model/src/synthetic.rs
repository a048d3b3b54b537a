//! Random models of any supported shape, for tests and measurements: the same weights as a GGUF file or as a
//! Hugging Face directory. Their text is noise; only their arithmetic is meant.
//!
//! # Layout
//! * `shapes` – shapes of published models
//! * `tensors` – which tensors there are, and how a part of one is made
//! * `rows` – random numbers, and rows of every storage type
//! * `tokenizer` – one token a byte
//! * `file` – streams a model to disk

mod file;
mod rows;
mod shapes;
mod tensors;
mod tokenizer;

use std::path::Path;

use paceline_checkpoint::{Format, GgufWriter, MetadataValue};
use paceline_domain::WeightType;

use crate::config::{Architecture, PairLayout, RopeConfig, RopeScaling};
use crate::names::Part;
use crate::{ModelConfig, ModelError};

pub use file::{Writing, Written};
pub use shapes::{built_in_shape, built_in_shapes};

/// A small llama whose every dimension is awkward: three heads, one leaf of 32 columns a head, an odd vocabulary.
pub fn tiny_config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        n_layers: 2,
        n_embd: 96,
        n_heads: 3,
        n_kv_heads: 1,
        head_dim: 32,
        n_ff: 160,
        n_vocab: 331,
        context_length: 512,
        rms_eps: 1e-5,
        rope: RopeConfig { theta: 10_000.0, pair_layout: PairLayout::Half, scaling: RopeScaling::None },
        sliding_window: None,
        tied_embeddings: false,
        qkv_bias: false,
    }
}

/// A random model.
#[derive(Clone)]
pub struct Synthetic {
    /// Its shape. The pair layout is that of the file that is written, whatever is said here.
    pub config: ModelConfig,
    /// Same seed, same weights, in every format.
    pub seed: u64,
    /// The type of each matrix by part and layer; one that rows do not fit is replaced by Q8_0 or F16.
    pub weight_type: fn(Part, usize) -> WeightType,
}

/// The same type for every matrix.
pub fn uniform(weight_type: WeightType) -> fn(Part, usize) -> WeightType {
    macro_rules! constant {
        ($($name:ident),*) => { match weight_type { $(WeightType::$name => |_, _| WeightType::$name),* } };
    }
    constant!(F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
}

impl Synthetic {
    /// The model as a GGUF file, with a tokenizer of one token a byte.
    ///
    /// # Errors
    /// A shape or name that GGUF cannot hold.
    pub fn to_gguf(&self) -> Result<Vec<u8>, ModelError> {
        Ok(self.gguf_writer().to_bytes()?)
    }

    /// [`Self::to_gguf`] before it is bytes, so that something can be added.
    pub fn gguf_writer(&self) -> GgufWriter {
        tensors::tensors(self, Format::Gguf).iter().fold(self.gguf_header(), |writer, tensor| {
            writer.tensor(&tensor.name, tensor.weight_type, &tensor.shape, tensor.bytes())
        })
    }

    /// Writes the model into a directory, on this thread: [`Self::write_directory`].
    ///
    /// # Errors
    /// A type that safetensors do not have, or the file system's error.
    pub fn write_hugging_face(&self, directory: &Path) -> Result<(), ModelError> {
        self.write_directory(directory, &Writing::plain()).map(|_| ())
    }

    /// The Hugging Face configuration.
    pub fn config_json(&self) -> serde_json::Value {
        let config = &self.config;
        let (class, model_type) = match (config.architecture, config.sliding_window) {
            (Architecture::Qwen2, _) => ("Qwen2ForCausalLM", "qwen2"),
            (Architecture::Llama, Some(_)) => ("MistralForCausalLM", "mistral"),
            (Architecture::Llama, None) => ("LlamaForCausalLM", "llama"),
        };
        let scaling = match &config.rope.scaling {
            RopeScaling::None | RopeScaling::Factors(_) => serde_json::Value::Null,
            RopeScaling::Linear(factor) => serde_json::json!({ "rope_type": "linear", "factor": factor }),
            RopeScaling::Llama3(scaling) => serde_json::json!({
                "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }),
        };
        let end_token = tokenizer::end(config.n_vocab);
        let mut json = serde_json::json!({
            "architectures": [class], "model_type": model_type, "hidden_act": "silu", "hidden_size": config.n_embd,
            "intermediate_size": config.n_ff, "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
            "head_dim": config.head_dim, "vocab_size": config.n_vocab,
            "max_position_embeddings": config.context_length, "rms_norm_eps": config.rms_eps,
            "rope_theta": config.rope.theta, "rope_scaling": scaling,
            "sliding_window": config.sliding_window.map(|window| window.n_positions),
            "use_sliding_window": config.sliding_window.is_some(),
            "max_window_layers": config.sliding_window.map(|window| window.first_layer),
            "tie_word_embeddings": config.tied_embeddings,
            "bos_token_id": end_token, "eos_token_id": end_token,
        });
        json.as_object_mut().expect("invariant: an object").retain(|_, value| !value.is_null());
        json
    }

    /// The GGUF file without tensors.
    fn gguf_header(&self) -> GgufWriter {
        let metadata = self.metadata().into_iter().chain(tokenizer::gguf_metadata(self.config.n_vocab));
        metadata.fold(GgufWriter::new(), |writer, (key, value)| writer.metadata(key, value))
    }

    fn metadata(&self) -> Vec<(String, MetadataValue)> {
        let config = &self.config;
        let architecture = match config.architecture {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
        };
        let count = |n: usize| MetadataValue::from(n as u32);
        let mut values = vec![
            ("block_count", count(config.n_layers)),
            ("context_length", count(config.context_length)),
            ("embedding_length", count(config.n_embd)),
            ("feed_forward_length", count(config.n_ff)),
            ("attention.head_count", count(config.n_heads)),
            ("attention.head_count_kv", count(config.n_kv_heads)),
            ("attention.key_length", count(config.head_dim)),
            ("attention.value_length", count(config.head_dim)),
            ("rope.dimension_count", count(config.head_dim)),
            ("attention.layer_norm_rms_epsilon", config.rms_eps.into()),
            ("rope.freq_base", (config.rope.theta as f32).into()),
        ];
        if let RopeScaling::Linear(factor) = config.rope.scaling {
            values.push(("rope.scaling.type", "linear".into()));
            values.push(("rope.scaling.factor", (factor as f32).into()));
        }
        if let Some(window) = config.sliding_window {
            values.push(("attention.sliding_window", count(window.n_positions)));
        }
        let named = values.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value));
        [("general.architecture".to_string(), architecture.into())].into_iter().chain(named).collect()
    }
}
