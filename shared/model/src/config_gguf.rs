//! Reads a [`ModelConfig`] from GGUF metadata. The vocabulary size and the presence of an output head come from
//! the tensors themselves; all keys are those of the GGUF specification.

use paceline_checkpoint::{Checkpoint, Metadata};
use paceline_domain::WeightType;
use paceline_kernels::formats::dequantize_row;

use crate::ModelError;
use crate::config::{
    Architecture, ModelConfig, PairLayout, RopeConfig, RopeScaling, SUPPORTED, SlidingWindow,
};
use crate::names::{Part, ROPE_FACTORS, name};
use paceline_checkpoint::Format::Gguf;

/// Metadata of one architecture: keys are prefixed with its name.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'a str,
}

pub(crate) fn read(checkpoint: &Checkpoint) -> Result<ModelConfig, ModelError> {
    let metadata = checkpoint.metadata();
    let prefix = metadata.str("general.architecture")?;
    let (architecture, pair_layout) = match prefix {
        "llama" => (Architecture::Llama, PairLayout::Interleaved),
        "qwen2" => (Architecture::Qwen2, PairLayout::Half),
        other => {
            return Err(ModelError::Unfit(format!(
                "its architecture is {other:?}; supported are {SUPPORTED}"
            )));
        }
    };
    let keys = Keys { metadata, prefix };
    keys.refuse_unsupported()?;
    let n_embd = keys.count("embedding_length")?;
    let n_heads = keys.count("attention.head_count")?;
    let head_dim = keys.head_dim(n_embd, n_heads)?;
    let config = ModelConfig {
        architecture,
        n_layers: keys.count("block_count")?,
        n_embd,
        n_heads,
        n_kv_heads: keys.optional_count("attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        n_ff: keys.count("feed_forward_length")?,
        n_vocab: n_vocab(checkpoint)?,
        context_length: keys.count("context_length")?,
        rms_eps: metadata.f32(&keys.key("attention.layer_norm_rms_epsilon"))?,
        rope: RopeConfig {
            theta: f64::from(metadata.optional_f32(&keys.key("rope.freq_base"))?.unwrap_or(10_000.0)),
            pair_layout,
            scaling: keys.rope_scaling(freq_factors(checkpoint, head_dim)?)?,
        },
        sliding_window: keys
            .optional_count("attention.sliding_window")?
            .filter(|n_positions| *n_positions > 0)
            .map(|n_positions| SlidingWindow { n_positions, first_layer: 0 }),
        tied_embeddings: checkpoint.tensor(&name(Part::Head, Gguf, 0)).is_none(),
        qkv_bias: architecture == Architecture::Qwen2,
    };
    config.checked()
}

impl Keys<'_> {
    fn key(&self, rest: &str) -> String {
        format!("{}.{rest}", self.prefix)
    }

    fn count(&self, rest: &str) -> Result<usize, ModelError> {
        Ok(self.metadata.u32(&self.key(rest))? as usize)
    }

    fn optional_count(&self, rest: &str) -> Result<Option<usize>, ModelError> {
        Ok(self.metadata.optional_u32(&self.key(rest))?.map(|count| count as usize))
    }

    fn head_dim(&self, n_embd: usize, n_heads: usize) -> Result<usize, ModelError> {
        let head_dim = match self.optional_count("attention.key_length")? {
            Some(head_dim) => head_dim,
            None if n_heads > 0 && n_embd.is_multiple_of(n_heads) => n_embd / n_heads,
            None => {
                let problem = format!("{n_embd} is not {n_heads} whole heads");
                return Err(ModelError::config(self.key("embedding_length"), problem));
            }
        };
        for rest in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = self.optional_count(rest)?.filter(|other| *other != head_dim) {
                let key = self.key(rest);
                return Err(ModelError::Unfit(format!(
                    "{key} is {other}, its heads have {head_dim} elements"
                )));
            }
        }
        Ok(head_dim)
    }

    fn refuse_unsupported(&self) -> Result<(), ModelError> {
        if let Some(n_experts) = self.optional_count("expert_count")?.filter(|n_experts| *n_experts > 0) {
            return Err(ModelError::Unfit(format!(
                "it has {n_experts} experts; only dense models are supported"
            )));
        }
        Ok(())
    }

    fn rope_scaling(&self, factors: Option<Vec<f32>>) -> Result<RopeScaling, ModelError> {
        let kind = self.metadata.optional_str(&self.key("rope.scaling.type"))?;
        let factor = self.metadata.optional_f32(&self.key("rope.scaling.factor"))?;
        // Before scaling had a type there was only this key.
        let legacy = self.metadata.optional_f32(&self.key("rope.scale_linear"))?;
        match (kind, factor.or(legacy), factors) {
            (None | Some("none"), None, None) => Ok(RopeScaling::None),
            (None | Some("none"), None, Some(factors)) => Ok(RopeScaling::Factors(factors)),
            (Some("none"), Some(_), factors) => Ok(factors.map_or(RopeScaling::None, RopeScaling::Factors)),
            (None | Some("linear"), Some(factor), None) => Ok(RopeScaling::Linear(f64::from(factor))),
            (Some("linear"), None, _) => {
                Err(ModelError::config(self.key("rope.scaling.factor"), "is missing for linear scaling"))
            }
            (None | Some("linear"), Some(_), Some(_)) => Err(ModelError::Unfit(format!(
                "it has both a linear rope scaling and the tensor {ROPE_FACTORS}"
            ))),
            (Some(other), _, _) => Err(ModelError::Unfit(format!(
                "its rope scaling is {other:?}; supported are none, linear and llama3 ({ROPE_FACTORS})"
            ))),
        }
    }
}

fn n_vocab(checkpoint: &Checkpoint) -> Result<usize, ModelError> {
    let embedding = name(Part::Embedding, Gguf, 0);
    match checkpoint.tensor(&embedding).map(|view| view.shape()) {
        Some([n_vocab, _]) => Ok(*n_vocab),
        Some(shape) => Err(ModelError::tensor(embedding, format!("has shape {shape:?}, not two dimensions"))),
        None => Err(ModelError::tensor(embedding, "is missing from the checkpoint")),
    }
}

fn freq_factors(checkpoint: &Checkpoint, head_dim: usize) -> Result<Option<Vec<f32>>, ModelError> {
    let Some(view) = checkpoint.tensor(ROPE_FACTORS) else { return Ok(None) };
    if view.weight_type() != WeightType::F32 || view.shape() != [head_dim / 2] {
        let problem = format!(
            "is {} of shape {:?}, not f32 of shape [{}]",
            view.weight_type().name(),
            view.shape(),
            head_dim / 2
        );
        return Err(ModelError::tensor(ROPE_FACTORS, problem));
    }
    let mut factors = vec![0.0; head_dim / 2];
    dequantize_row(WeightType::F32, view.data(), &mut factors);
    Ok(Some(factors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{Synthetic, tiny_config};
    use paceline_checkpoint::{GgufWriter, MetadataValue};

    fn open(bytes: Vec<u8>) -> Checkpoint {
        Checkpoint::from_gguf_bytes(bytes).expect("a checkpoint")
    }

    /// A file with an embedding alone and these changes to a good llama's metadata.
    fn with(changes: &[(&str, Option<MetadataValue>)]) -> Result<ModelConfig, ModelError> {
        let mut writer = GgufWriter::new();
        let good = [
            ("general.architecture", MetadataValue::from("llama")),
            ("llama.block_count", 2u32.into()),
            ("llama.context_length", 64u32.into()),
            ("llama.embedding_length", 32u32.into()),
            ("llama.feed_forward_length", 64u32.into()),
            ("llama.attention.head_count", 2u32.into()),
            ("llama.attention.layer_norm_rms_epsilon", 1e-5f32.into()),
        ];
        for (key, value) in &good {
            if !changes.iter().any(|(changed, _)| changed == key) {
                writer = writer.metadata(*key, value.clone());
            }
        }
        for (key, value) in changes {
            if let Some(value) = value {
                writer = writer.metadata(*key, value.clone());
            }
        }
        let writer = writer.tensor("token_embd.weight", WeightType::F32, &[8, 32], vec![0; 1024]);
        read(&open(writer.to_bytes().expect("bytes")))
    }

    fn problem(key: &str, value: impl Into<MetadataValue>) -> String {
        with(&[(key, Some(value.into()))]).expect_err("must be refused").to_string()
    }

    #[test]
    fn what_is_written_is_read() {
        let config = ModelConfig {
            sliding_window: Some(SlidingWindow { n_positions: 24, first_layer: 0 }),
            ..tiny_config()
        };
        let synthetic = Synthetic { config: config.clone(), seed: 1, weight_type: |_, _| WeightType::F16 };
        let read = read(&open(synthetic.to_gguf().expect("bytes"))).expect("reads");
        let rope = RopeConfig { pair_layout: PairLayout::Interleaved, ..config.rope.clone() };
        assert_eq!(read, ModelConfig { rope, ..config });
    }

    #[test]
    fn defaults() {
        let config = with(&[]).expect("reads");
        assert_eq!((config.n_kv_heads, config.head_dim, config.n_vocab), (2, 16, 8));
        assert!(config.tied_embeddings && config.sliding_window.is_none());
    }

    #[test]
    fn what_cannot_be_run_is_named() {
        let unknown = problem("general.architecture", "falcon");
        assert!(unknown.contains("falcon") && unknown.contains("qwen2"), "{unknown}");
        assert!(problem("llama.expert_count", 8u32).contains("8 experts"));
        assert!(problem("llama.rope.scaling.type", "yarn").contains("yarn"));
        assert!(problem("llama.rope.dimension_count", 8u32).contains("rope.dimension_count"));
        assert!(problem("llama.attention.head_count", 3u32).contains("whole heads"));
    }

    #[test]
    fn hostile_values_are_typed_errors() {
        let counts = [
            "llama.block_count",
            "llama.context_length",
            "llama.embedding_length",
            "llama.feed_forward_length",
            "llama.attention.head_count",
            "llama.attention.head_count_kv",
            "llama.attention.key_length",
        ];
        for key in counts {
            for value in [0u64, u64::from(u32::MAX), u64::MAX] {
                with(&[(key, Some(value.into()))]).expect_err("must be refused");
            }
            problem(key, "seven");
        }
        for value in [0.0f32, -1.0, f32::NAN, f32::INFINITY] {
            problem("llama.attention.layer_norm_rms_epsilon", value);
            problem("llama.rope.freq_base", value);
            problem("llama.rope.scale_linear", value);
        }
        assert!(
            with(&[("llama.block_count", None)]).expect_err("refused").to_string().contains("block_count")
        );
    }
}
