//! How much memory a model needs and how many bytes its ranks exchange, from shapes alone. Nothing is measured
//! and nothing allocated.

use paceline_domain::{KvType, Quantization, WeightType, group::BLOCK_POSITIONS};

use crate::cpu::kv_store::layer_shape;
use crate::names::{Cut, Expected, Part, expected_tensors, shape};
use crate::quantization::{WeightTypes, loaded_type};
use crate::split::Slice;
use crate::{ModelConfig, SplitPlan};
use paceline_checkpoint::Format;

/// Bytes of 1 GiB. "GB" in the Transformers guide and its calculator means this.
pub const GIB: f64 = (1u64 << 30) as f64;

/// A storage type of weights as named on the command line of `estimate`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    /// A whole number of bits a weight, with no scales beside them.
    Bits(u32),
    /// A type of Paceline's, scales included.
    Weight(WeightType),
}

impl Dtype {
    /// The type with this name: `float32`, `float16`, `bfloat16`, `int8`, `int4`, or the name of a [`WeightType`].
    pub fn from_name(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "float32" | "fp32" => Some(Self::Bits(32)),
            "float16" | "fp16" | "bfloat16" => Some(Self::Bits(16)),
            "int8" | "8bit" => Some(Self::Bits(8)),
            "int4" | "4bit" => Some(Self::Bits(4)),
            other => {
                WeightType::ALL.into_iter().find(|weight_type| weight_type.name() == other).map(Self::Weight)
            }
        }
    }

    /// Every accepted name.
    pub fn names() -> Vec<&'static str> {
        let plain = ["float32", "float16", "bfloat16", "int8", "int4"];
        plain.into_iter().chain(WeightType::ALL.map(WeightType::name)).collect()
    }

    /// Bytes of `n` weights.
    pub fn bytes(self, n: u64) -> u64 {
        let (bits, per) = match self {
            Self::Bits(bits) => (u64::from(bits), 1),
            Self::Weight(kind) => (8 * kind.block_bytes() as u64, kind.block_len() as u64),
        };
        (n * bits).div_ceil(8 * per)
    }

    /// The type of a matrix of plain numbers in a file; none where weights are quantized already.
    pub fn float_type(self) -> Option<WeightType> {
        match self {
            Self::Bits(32) => Some(WeightType::F32),
            Self::Bits(16) => Some(WeightType::BF16),
            Self::Weight(kind) if !kind.is_quantized() => Some(kind),
            Self::Bits(_) | Self::Weight(_) => None,
        }
    }
}

/// Memory a model needs, from its configuration alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConfigEstimate {
    /// Parameters, tied ones counted once.
    pub n_parameters: u64,
    /// Bytes of all parameters in the asked type, or as they are after quantization at load. Then a tied head is counted
    /// beside the embedding, which stays as it is.
    pub weight_bytes: u64,
    /// What the Model Memory Calculator of the Transformers guide ("Optimizing inference", section
    /// quantization) counts, in the asked type: the decoder without its output head, plus the rotary tables
    /// (cosine and sine of every position, and the frequencies) that each layer of its implementation holds.
    /// The guide prints it in GiB under the name GB.
    pub guide_bytes: u64,
    /// Bytes of KV cache for 1,000 tokens.
    pub kv_bytes_per_1000_tokens: u64,
}

impl ConfigEstimate {
    /// Estimates for weights of one type in the file, float matrices quantized at load.
    pub fn new(config: &ModelConfig, dtype: Dtype, quantize: Option<Quantization>, kv_type: KvType) -> Self {
        let tensors = expected_tensors(config, Format::Safetensors);
        let n_parameters = tensors.iter().map(Expected::n_elements).sum();
        let head: u64 =
            tensors.iter().filter(|tensor| tensor.part == Part::Head).map(Expected::n_elements).sum();
        let rotary_layer = config.head_dim / 2 + 2 * config.context_length * config.head_dim;
        let rotary = (config.n_layers * rotary_layer) as u64;
        Self {
            n_parameters,
            weight_bytes: loaded_bytes(config, dtype, quantize),
            guide_bytes: dtype.bytes(n_parameters - head + rotary),
            kv_bytes_per_1000_tokens: 1000 * kv_bytes_per_position(config, kv_type),
        }
    }
}

impl Expected {
    fn n_elements(&self) -> u64 {
        self.shape.iter().map(|dim| *dim as u64).product()
    }
}

/// What a decoder is set up for; memory follows from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    /// Storage type of the KV cache.
    pub kv_type: KvType,
    /// KV blocks in the pool.
    pub n_kv_blocks: usize,
    /// Most token rows in a forward pass.
    pub max_rows: usize,
    /// Most rows of a forward pass whose logits are asked for.
    pub max_output_rows: usize,
}

/// Memory of one rank, and what it sends for each token of a pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryEstimate {
    /// Bytes of weights as they are loaded, norms and biases in f32.
    pub weight_bytes: u64,
    /// Bytes of the embedding, which a device holds too; on CPUs its rows are looked up in the file.
    pub embedding_bytes: u64,
    /// Bytes of KV cache for one position.
    pub kv_bytes_per_position: u64,
    /// Bytes of the whole KV pool.
    pub kv_bytes: u64,
    /// Bytes of activations, allocated once.
    pub activation_bytes: u64,
    /// Bytes of partial sums that this rank shows its peers for one token of a pass, all layers: once through
    /// shared memory, once for each peer by TCP.
    pub all_reduce_bytes_per_token: u64,
    /// Bytes of logits this rank sends to rank 0 for one sampled token, when a filter needs the whole row.
    pub gather_bytes_per_token: u64,
}

impl MemoryEstimate {
    /// Estimates one rank.
    pub fn new(
        config: &ModelConfig,
        plan: &SplitPlan,
        rank: usize,
        capacity: Capacity,
        types: &WeightTypes<'_>,
    ) -> Self {
        let share = plan.share(rank);
        let kv_layer = layer_shape(config, share, capacity.kv_type, capacity.n_kv_blocks);
        let kv_block_bytes = (config.n_layers * kv_layer.block_bytes()) as u64;
        let subtrees = plan.attention().tree.subtrees(rank).len() + plan.ffn().tree.subtrees(rank).len();
        let alone = plan.n_ranks() == 1;
        Self {
            weight_bytes: weight_bytes(config, plan, rank, types),
            embedding_bytes: embedding_bytes(config, types.in_file),
            kv_bytes_per_position: kv_block_bytes / BLOCK_POSITIONS as u64,
            kv_bytes: capacity.n_kv_blocks as u64 * kv_block_bytes,
            activation_bytes: crate::cpu::scratch::ScratchShape::new(config, plan, rank).bytes(&capacity),
            all_reduce_bytes_per_token: if alone {
                0
            } else {
                (config.n_layers * subtrees * config.n_embd * 4) as u64
            },
            gather_bytes_per_token: if rank == 0 { 0 } else { 4 * share.vocab.len() as u64 },
        }
    }

    /// All memory of the rank.
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes + self.kv_bytes + self.activation_bytes
    }

    /// How the rank fits on a device of which it may use this many bytes. The KV pool is then as large as what is
    /// left, whatever [`Capacity`] says.
    pub fn on_device(&self, usable_bytes: u64) -> DeviceFit {
        let fixed_bytes = self.weight_bytes + self.embedding_bytes + self.activation_bytes;
        DeviceFit::new(usable_bytes, fixed_bytes, self.kv_bytes_per_position * BLOCK_POSITIONS as u64)
    }
}

/// What a device that was asked has room for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceRoom {
    /// Which memory it is: the same text for ranks that share one.
    pub memory: String,
    /// Bytes that may be used.
    pub usable_bytes: u64,
    /// Bytes that a rank takes for everything but the KV cache.
    pub fixed_bytes: u64,
    /// Bytes that a rank takes for one block of the KV cache, all layers.
    pub kv_block_bytes: u64,
}

impl DeviceRoom {
    /// How a rank fits that has the device for itself.
    pub fn fit(&self) -> DeviceFit {
        DeviceFit::new(self.usable_bytes, self.fixed_bytes, self.kv_block_bytes)
    }
}

/// What a device has left for the KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceFit {
    /// Bytes of everything but the KV cache.
    pub fixed_bytes: u64,
    /// Bytes that are lacking for one block of KV cache; 0 when it fits.
    pub missing_bytes: u64,
    /// Blocks of the KV cache that fit.
    pub n_kv_blocks: u64,
}

impl DeviceFit {
    /// Fits `fixed_bytes` and as many KV blocks as there is room for into `usable_bytes`.
    pub fn new(usable_bytes: u64, fixed_bytes: u64, kv_block_bytes: u64) -> Self {
        let left = usable_bytes.saturating_sub(fixed_bytes);
        // A rank without heads has no KV cache.
        let n_kv_blocks = left.checked_div(kv_block_bytes).unwrap_or(u64::MAX);
        let missing_bytes = fixed_bytes.saturating_add(kv_block_bytes).saturating_sub(usable_bytes);
        Self { fixed_bytes, missing_bytes, n_kv_blocks }
    }

    /// Tokens that the KV cache holds.
    pub fn n_kv_tokens(&self) -> u64 {
        self.n_kv_blocks.saturating_mul(BLOCK_POSITIONS as u64)
    }
}

fn embedding_bytes(config: &ModelConfig, weight_type: &dyn Fn(&Expected) -> WeightType) -> u64 {
    let expected = expected_tensors(config, Format::Gguf);
    let embedding = expected.iter().filter(|tensor| tensor.part == Part::Embedding);
    embedding.map(|tensor| Dtype::Weight(weight_type(tensor)).bytes(tensor.n_elements())).sum()
}

fn kv_bytes_per_position(config: &ModelConfig, kv_type: KvType) -> u64 {
    (2 * config.n_layers * config.n_kv_heads * kv_type.row_bytes(config.head_dim)) as u64
}

/// Bytes of a rank's slices as they are loaded.
pub(crate) fn weight_bytes(
    config: &ModelConfig,
    plan: &SplitPlan,
    rank: usize,
    types: &WeightTypes<'_>,
) -> u64 {
    let mut bytes = 0;
    for tensor in expected_tensors(config, Format::Gguf) {
        let slice = plan.slice(rank, tensor.cut, &tensor.shape);
        bytes += slice_bytes(&slice, types.loaded(&tensor));
        if config.tied_embeddings && tensor.part == Part::Embedding {
            let head = plan.slice(rank, Cut::VocabRows, &shape(config, Part::Head));
            bytes += slice_bytes(&head, types.loaded(&tensor));
        }
    }
    bytes
}

fn loaded_bytes(config: &ModelConfig, dtype: Dtype, quantize: Option<Quantization>) -> u64 {
    let bytes = |tensor: &Expected| {
        let n = tensor.n_elements();
        let (in_file, Some(n_cols)) = (dtype.bytes(n), tensor.shape.get(1)) else { return dtype.bytes(n) };
        let Some(float) = dtype.float_type().filter(|_| quantize.is_some()) else { return in_file };
        let loaded = Dtype::Weight(loaded_type(quantize, tensor.part, float, *n_cols)).bytes(n);
        match (tensor.part, config.tied_embeddings) {
            (Part::Embedding, true) => in_file + loaded,
            (Part::Embedding, false) => in_file,
            _ => loaded,
        }
    };
    expected_tensors(config, Format::Safetensors).iter().map(bytes).sum()
}

fn slice_bytes(slice: &Slice, weight_type: WeightType) -> u64 {
    Dtype::Weight(weight_type).bytes(slice.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mistral_7b() -> ModelConfig {
        ModelConfig::from_config_json(&json!({
            "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
        }))
        .expect("reads")
    }

    #[test]
    fn what_a_device_has_left_is_kv_cache() {
        let fit = |usable_bytes| DeviceFit::new(usable_bytes, 1000, 160);
        assert_eq!(fit(1000 + 480), DeviceFit { fixed_bytes: 1000, missing_bytes: 0, n_kv_blocks: 3 });
        assert_eq!(fit(1000 + 160).n_kv_tokens(), 16);
        assert_eq!(fit(1000 + 159), DeviceFit { fixed_bytes: 1000, missing_bytes: 1, n_kv_blocks: 0 });
        assert_eq!(fit(0).missing_bytes, 1160);
        assert_eq!(DeviceFit::new(1, 1, 0).n_kv_tokens(), u64::MAX);
    }

    fn two_digits_of_gib(bytes: u64) -> String {
        format!("{:.2}", bytes as f64 / GIB)
    }

    #[test]
    fn mistral_7b_is_what_the_transformers_guide_states() {
        let of = |name: &str| {
            ConfigEstimate::new(&mistral_7b(), Dtype::from_name(name).expect("a type"), None, KvType::F16)
        };
        assert_eq!(of("bfloat16").n_parameters, 7_241_732_096);
        assert_eq!(of("bfloat16").weight_bytes, 14_483_464_192);
        assert_eq!(two_digits_of_gib(of("bfloat16").guide_bytes), "13.74");
        assert_eq!(two_digits_of_gib(of("int8").guide_bytes), "6.87");
        assert_eq!(of("bfloat16").guide_bytes, 2 * of("int8").guide_bytes);
        assert_eq!(of("f16").kv_bytes_per_1000_tokens, 131_072_000);
    }

    #[test]
    fn dtypes_have_names_and_sizes() {
        assert_eq!(Dtype::from_name("Q4_1").map(|dtype| dtype.bytes(64)), Some(40));
        assert_eq!(Dtype::from_name("int4").map(|dtype| dtype.bytes(7)), Some(4));
        assert!(Dtype::names().into_iter().all(|name| Dtype::from_name(name).is_some()));
        assert_eq!(Dtype::from_name("float8"), None);
    }

    #[test]
    fn ranks_share_weights_and_repeat_only_norms() {
        let config = mistral_7b();
        let capacity = Capacity { kv_type: KvType::F16, n_kv_blocks: 64, max_rows: 8, max_output_rows: 8 };
        let of = |n_ranks: usize, rank: usize| {
            let plan = SplitPlan::new(&config, n_ranks).expect("plan");
            let types = WeightTypes { in_file: &|_| WeightType::BF16, quantize: None };
            MemoryEstimate::new(&config, &plan, rank, capacity, &types)
        };
        let (one, norms) = (of(1, 0), (2 * 32 + 1) * 4096 * 4);
        // The embedding is looked up in the file, not held.
        assert_eq!(one.weight_bytes, 2 * (7_241_732_096 - 65 * 4096 - 32_000 * 4096) + norms);
        let four: u64 = (0..4).map(|rank| of(4, rank).weight_bytes).sum();
        assert_eq!(four, one.weight_bytes + 3 * norms);
        assert_eq!(of(4, 1).kv_bytes_per_position * 4, one.kv_bytes_per_position);
        assert_eq!(one.kv_bytes, 64 * 16 * one.kv_bytes_per_position);
        assert_eq!(one.embedding_bytes, 2 * 32_000 * 4096);
        let fit = one.on_device(one.weight_bytes + one.embedding_bytes + one.activation_bytes + one.kv_bytes);
        assert_eq!((fit.n_kv_blocks, fit.missing_bytes), (64, 0));
        assert_eq!((one.all_reduce_bytes_per_token, one.gather_bytes_per_token), (0, 0));
        assert_eq!(of(4, 3).all_reduce_bytes_per_token, 32 * 2 * 4096 * 4);
        assert_eq!(of(4, 3).gather_bytes_per_token, 32_000);
    }
}
