//! Shapes of published models, so that a random one can be made without their configuration files. There are no
//! weights here.

use super::tiny_config;
use crate::ModelConfig;
use crate::config::{Architecture, PairLayout, RopeConfig, RopeScaling};

/// What sets a Qwen2.5 model apart from the others, from config.json of huggingface.co/Qwen/Qwen2.5-*-Instruct.
struct Qwen25 {
    name: &'static str,
    n_layers: usize,
    n_embd: usize,
    n_heads: usize,
    n_kv_heads: usize,
    n_ff: usize,
    n_vocab: usize,
    tied_embeddings: bool,
}

#[rustfmt::skip]
const QWEN25: [Qwen25; 3] = [
    Qwen25 { name: "qwen2.5-0.5b", n_layers: 24, n_embd: 896, n_heads: 14, n_kv_heads: 2, n_ff: 4864, n_vocab: 151_936, tied_embeddings: true },
    Qwen25 { name: "qwen2.5-1.5b", n_layers: 28, n_embd: 1536, n_heads: 12, n_kv_heads: 2, n_ff: 8960, n_vocab: 151_936, tied_embeddings: true },
    Qwen25 { name: "qwen2.5-7b", n_layers: 28, n_embd: 3584, n_heads: 28, n_kv_heads: 4, n_ff: 18_944, n_vocab: 152_064, tied_embeddings: false },
];

/// The name of [`tiny_config`].
const TINY: &str = "tiny";

/// The shape with this name.
pub fn built_in_shape(name: &str) -> Option<ModelConfig> {
    if name == TINY {
        return Some(tiny_config());
    }
    QWEN25.iter().find(|shape| shape.name == name).map(Qwen25::config)
}

/// Names of all shapes, smallest first.
pub fn built_in_shapes() -> Vec<&'static str> {
    [TINY].into_iter().chain(QWEN25.iter().map(|shape| shape.name)).collect()
}

impl Qwen25 {
    fn config(&self) -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Qwen2,
            n_layers: self.n_layers,
            n_embd: self.n_embd,
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.n_embd / self.n_heads,
            n_ff: self.n_ff,
            n_vocab: self.n_vocab,
            context_length: 32_768,
            rms_eps: 1e-6,
            rope: RopeConfig { theta: 1e6, pair_layout: PairLayout::Half, scaling: RopeScaling::None },
            sliding_window: None,
            tied_embeddings: self.tied_embeddings,
            qkv_bias: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ConfigEstimate, Dtype};
    use paceline_domain::KvType;

    #[test]
    fn shapes_have_the_published_numbers_of_parameters() {
        let parameters = |name: &str| {
            let config = built_in_shape(name).expect("is known").checked().expect("is in range");
            ConfigEstimate::new(&config, Dtype::Bits(16), None, KvType::F16).n_parameters
        };
        assert_eq!(parameters("qwen2.5-0.5b"), 494_032_768);
        assert_eq!(parameters("qwen2.5-1.5b"), 1_543_714_304);
        assert_eq!(parameters("qwen2.5-7b"), 7_615_616_512);
        assert!(built_in_shapes().into_iter().all(|name| built_in_shape(name).is_some()));
        assert_eq!(built_in_shape("qwen2.5-9b"), None);
    }
}
