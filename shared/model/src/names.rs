//! The one table of tensors: what each is called in GGUF and in Hugging Face files, its shape and which of its
//! dimensions is cut between ranks. It does not know where the cuts lie; that is the split plan.

use std::collections::BTreeSet;

use paceline_checkpoint::{Checkpoint, Format};

use crate::{ModelConfig, ModelError};

/// A tensor's place in the forward pass.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Part {
    /// `[n_vocab, n_embd]`, one row a token.
    Embedding,
    /// `[n_embd]`, before the output head.
    OutputNorm,
    /// `[n_vocab, n_embd]`; absent when tied to the embedding.
    Head,
    /// `[n_embd]`, before attention.
    AttentionNorm,
    /// `[n_heads * head_dim, n_embd]`.
    Query,
    /// `[n_kv_heads * head_dim, n_embd]`.
    Key,
    /// `[n_kv_heads * head_dim, n_embd]`.
    Value,
    /// `[n_heads * head_dim]`.
    QueryBias,
    /// `[n_kv_heads * head_dim]`.
    KeyBias,
    /// `[n_kv_heads * head_dim]`.
    ValueBias,
    /// `[n_embd, n_heads * head_dim]`.
    AttentionOutput,
    /// `[n_embd]`, before the feed-forward network.
    FfnNorm,
    /// `[n_ff, n_embd]`.
    Gate,
    /// `[n_ff, n_embd]`.
    Up,
    /// `[n_embd, n_ff]`.
    Down,
}

/// Which dimension of a tensor is cut between ranks, and along what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// Every rank holds all of it.
    Whole,
    /// Rows are only looked up, from the file itself; no rank holds it in memory.
    Lookup,
    /// Rows, by query head.
    QueryRows,
    /// Rows, by key and value head; shared heads are held by each rank that needs them.
    KvRows,
    /// Rows, by leaf of the feed-forward network.
    FfnRows,
    /// Rows, by token.
    VocabRows,
    /// Columns, by leaf of the attention output.
    AttentionColumns,
    /// Columns, by leaf of the feed-forward network.
    FfnColumns,
}

/// When a tensor belongs to a model.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Presence {
    Always,
    Untied,
    QkvBias,
}

/// One line of the table. `{}` in a name is the layer.
struct Rule {
    part: Part,
    cut: Cut,
    presence: Presence,
    gguf: &'static str,
    hugging_face: &'static str,
}

const fn rule(
    part: Part,
    cut: Cut,
    presence: Presence,
    gguf: &'static str,
    hugging_face: &'static str,
) -> Rule {
    Rule { part, cut, presence, gguf, hugging_face }
}

use Presence::{Always, QkvBias, Untied};

#[rustfmt::skip]
const RULES: [Rule; 15] = [
    rule(Part::Embedding, Cut::Lookup, Always, "token_embd.weight", "model.embed_tokens.weight"),
    rule(Part::AttentionNorm, Cut::Whole, Always, "blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
    rule(Part::Query, Cut::QueryRows, Always, "blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight"),
    rule(Part::QueryBias, Cut::QueryRows, QkvBias, "blk.{}.attn_q.bias", "model.layers.{}.self_attn.q_proj.bias"),
    rule(Part::Key, Cut::KvRows, Always, "blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight"),
    rule(Part::KeyBias, Cut::KvRows, QkvBias, "blk.{}.attn_k.bias", "model.layers.{}.self_attn.k_proj.bias"),
    rule(Part::Value, Cut::KvRows, Always, "blk.{}.attn_v.weight", "model.layers.{}.self_attn.v_proj.weight"),
    rule(Part::ValueBias, Cut::KvRows, QkvBias, "blk.{}.attn_v.bias", "model.layers.{}.self_attn.v_proj.bias"),
    rule(Part::AttentionOutput, Cut::AttentionColumns, Always, "blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight"),
    rule(Part::FfnNorm, Cut::Whole, Always, "blk.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    rule(Part::Gate, Cut::FfnRows, Always, "blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight"),
    rule(Part::Up, Cut::FfnRows, Always, "blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight"),
    rule(Part::Down, Cut::FfnColumns, Always, "blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"),
    rule(Part::OutputNorm, Cut::Whole, Always, "output_norm.weight", "model.norm.weight"),
    rule(Part::Head, Cut::VocabRows, Untied, "output.weight", "lm_head.weight"),
];

/// GGUF tensor with the frequency factors of rope scaling; read with the configuration.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Ends of names of tensors that older writers left in files and that nothing needs.
const HARMLESS: [&str; 3] = ["rotary_emb.inv_freq", "attn_rot_embd.weight", "attn_rot_embd"];

/// A tensor a model must have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Expected {
    /// Its place in the forward pass.
    pub part: Part,
    /// Its layer, for tensors that each layer has.
    pub layer: Option<usize>,
    /// Its name in the file.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// How it is cut.
    pub cut: Cut,
}

impl Rule {
    fn of(part: Part) -> &'static Self {
        RULES.iter().find(|rule| rule.part == part).expect("invariant: every part has a rule")
    }

    fn name(&self, format: Format, layer: usize) -> String {
        let pattern = match format {
            Format::Gguf => self.gguf,
            Format::Safetensors => self.hugging_face,
        };
        pattern.replace("{}", &layer.to_string())
    }

    fn is_per_layer(&self) -> bool {
        self.gguf.contains("{}")
    }

    fn belongs_to(&self, config: &ModelConfig) -> bool {
        match self.presence {
            Always => true,
            Untied => !config.tied_embeddings,
            QkvBias => config.qkv_bias,
        }
    }

    fn expected(&self, config: &ModelConfig, format: Format, layer: Option<usize>) -> Expected {
        Expected {
            part: self.part,
            layer,
            name: self.name(format, layer.unwrap_or(0)),
            shape: shape(config, self.part),
            cut: self.cut,
        }
    }
}

/// The shape of a part, outermost dimension first.
pub fn shape(config: &ModelConfig, part: Part) -> Vec<usize> {
    let (n_embd, n_ff) = (config.n_embd, config.n_ff);
    match part {
        Part::Embedding | Part::Head => vec![config.n_vocab, n_embd],
        Part::OutputNorm | Part::AttentionNorm | Part::FfnNorm => vec![n_embd],
        Part::Query => vec![config.attention_width(), n_embd],
        Part::Key | Part::Value => vec![config.kv_width(), n_embd],
        Part::QueryBias => vec![config.attention_width()],
        Part::KeyBias | Part::ValueBias => vec![config.kv_width()],
        Part::AttentionOutput => vec![n_embd, config.attention_width()],
        Part::Gate | Part::Up => vec![n_ff, n_embd],
        Part::Down => vec![n_embd, n_ff],
    }
}

/// How a part is cut.
pub fn cut(part: Part) -> Cut {
    Rule::of(part).cut
}

/// The name of a part in a file; `layer` counts for parts that each layer has.
pub fn name(part: Part, format: Format, layer: usize) -> String {
    Rule::of(part).name(format, layer)
}

/// Every tensor the model must have, in file order: embedding, layers, output.
pub fn expected_tensors(config: &ModelConfig, format: Format) -> Vec<Expected> {
    let rules = || RULES.iter().filter(|rule| rule.belongs_to(config));
    let once = |part: Part| rules().filter(move |rule| rule.part == part);
    let mut expected: Vec<Expected> =
        once(Part::Embedding).map(|rule| rule.expected(config, format, None)).collect();
    for layer in 0..config.n_layers {
        expected.extend(
            rules().filter(|rule| rule.is_per_layer()).map(|rule| rule.expected(config, format, Some(layer))),
        );
    }
    expected.extend(
        once(Part::OutputNorm).chain(once(Part::Head)).map(|rule| rule.expected(config, format, None)),
    );
    expected
}

/// Checks that the checkpoint has every expected tensor with its shape and no other.
///
/// # Errors
/// [`ModelError::Tensor`] that names the first tensor that is missing, misshapen or left over.
pub fn check_tensors(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<(), ModelError> {
    let format = checkpoint.format();
    let expected = expected_tensors(config, format);
    for tensor in &expected {
        let view = checkpoint
            .tensor(&tensor.name)
            .ok_or_else(|| ModelError::tensor(&tensor.name, "is missing from the checkpoint"))?;
        if view.shape() != tensor.shape {
            let problem = format!("has shape {:?}, not {:?}", view.shape(), tensor.shape);
            return Err(ModelError::tensor(&tensor.name, problem));
        }
    }
    let known: BTreeSet<&str> = expected.iter().map(|tensor| tensor.name.as_str()).collect();
    let tied_copy = name(Part::Head, format, 0);
    for found in checkpoint.tensor_names() {
        let harmless = HARMLESS.iter().any(|end| found.ends_with(end));
        let copy = config.tied_embeddings && *found == tied_copy;
        let factors = format == Format::Gguf && *found == *ROPE_FACTORS;
        if !known.contains(found) && !harmless && !copy && !factors {
            let problem = format!("is not part of a {:?} model", config.architecture);
            return Err(ModelError::tensor(found.to_string(), problem));
        }
    }
    Ok(())
}
