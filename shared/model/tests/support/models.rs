//! Small random models of every architecture, each awkward in its own way.

use paceline_domain::WeightType;
use paceline_model::ModelConfig;
use paceline_model::config::{Architecture, Llama3Scaling, RopeScaling, SlidingWindow};
use paceline_model::names::Part;
use paceline_model::synthetic::{Synthetic, tiny_config};

/// Nine heads on three KV heads, tied, all float.
pub fn llama_tied_f32() -> Synthetic {
    Synthetic {
        config: ModelConfig {
            tied_embeddings: true,
            n_heads: 9,
            n_kv_heads: 3,
            n_embd: 288,
            ..tiny_config()
        },
        seed: 1,
        weight_type: |_, _| WeightType::F32,
    }
}

/// Q4_1 as SmolLM2's file is, FFN of ten blocks on eight leaves.
pub fn llama_tied_q4_1() -> Synthetic {
    let n_ff = 320;
    let base = llama_tied_f32();
    Synthetic {
        config: ModelConfig { n_ff, ..base.config },
        seed: 2,
        weight_type: |part, _| if part == Part::Embedding { WeightType::Q8_0 } else { WeightType::Q4_1 },
    }
}

/// A mixture of K-quants as in Q4_K_M files, different in each layer; queries, keys and values of unlike types.
pub fn llama_untied_k_quants() -> Synthetic {
    Synthetic {
        config: ModelConfig {
            n_embd: 256,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 64,
            n_ff: 768,
            n_layers: 3,
            ..tiny_config()
        },
        seed: 3,
        weight_type: |part, layer| match (part, layer) {
            (Part::Embedding, _) => WeightType::Q5_0,
            (Part::Head, _) => WeightType::Q6_K,
            (Part::Value | Part::Down, 0) => WeightType::Q6_K,
            (Part::Query, 1) => WeightType::Q2_K,
            (Part::Key, 1) => WeightType::Q3_K,
            (Part::Gate, 1) => WeightType::F16,
            (Part::Down, 2) => WeightType::Q5_1,
            (Part::AttentionOutput, 2) => WeightType::Q5_K,
            (Part::Up, 2) => WeightType::Q4_0,
            _ => WeightType::Q4_K,
        },
    }
}

/// Sees 24 positions back only; bfloat16.
pub fn mistral() -> Synthetic {
    let sliding_window = Some(SlidingWindow { n_positions: 24, first_layer: 0 });
    Synthetic {
        config: ModelConfig { sliding_window, n_heads: 4, n_kv_heads: 2, n_embd: 128, ..tiny_config() },
        seed: 4,
        weight_type: |_, _| WeightType::BF16,
    }
}

/// Biases, tied; Q8_0 and float16 side by side.
pub fn qwen2() -> Synthetic {
    Synthetic {
        config: ModelConfig {
            architecture: Architecture::Qwen2,
            qkv_bias: true,
            tied_embeddings: true,
            n_embd: 128,
            n_heads: 6,
            n_kv_heads: 2,
            ..tiny_config()
        },
        seed: 5,
        weight_type: |part, _| if part == Part::Key { WeightType::F16 } else { WeightType::Q8_0 },
    }
}

/// [`qwen2`] in float16.
pub fn qwen2_f16() -> Synthetic {
    Synthetic { seed: 6, weight_type: |_, _| WeightType::F16, ..qwen2() }
}

/// Llama 3.1's rope scaling, and heads of 16, two to a leaf.
pub fn llama3_scaled() -> Synthetic {
    let mut config = ModelConfig { n_heads: 6, n_kv_heads: 2, head_dim: 16, ..tiny_config() };
    config.rope.theta = 500_000.0;
    config.rope.scaling = RopeScaling::Llama3(Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 128.0,
    });
    Synthetic { config, seed: 7, weight_type: |_, _| WeightType::F16 }
}

/// Linear rope scaling; Q4_0.
pub fn llama_linear() -> Synthetic {
    let mut config = ModelConfig { n_embd: 128, ..tiny_config() };
    config.rope.scaling = RopeScaling::Linear(4.0);
    Synthetic { config, seed: 8, weight_type: |_, _| WeightType::Q4_0 }
}

/// So wide that activations have eight bits where they may; K-quants.
pub fn llama_wide() -> Synthetic {
    Synthetic {
        config: ModelConfig { n_embd: 1024, n_layers: 1, n_ff: 512, ..tiny_config() },
        seed: 9,
        weight_type: |part, _| match part {
            Part::Embedding | Part::AttentionOutput => WeightType::Q8_0,
            Part::Head | Part::Down => WeightType::Q6_K,
            Part::Up => WeightType::Q5_0,
            _ => WeightType::Q4_K,
        },
    }
}

/// [`llama_wide`] in float16; its rows are whole superblocks, its feed-forward leaves (64 columns) are not.
pub fn llama_wide_f16() -> Synthetic {
    Synthetic { seed: 10, weight_type: |_, _| WeightType::F16, ..llama_wide() }
}

pub fn all() -> Vec<(&'static str, Synthetic)> {
    vec![
        ("llama tied f32", llama_tied_f32()),
        ("llama tied q4_1", llama_tied_q4_1()),
        ("llama untied K-quants", llama_untied_k_quants()),
        ("mistral bf16", mistral()),
        ("qwen2 q8_0 + f16", qwen2()),
        ("qwen2 f16", qwen2_f16()),
        ("llama3 scaled f16", llama3_scaled()),
        ("llama linear q4_0", llama_linear()),
        ("llama wide K-quants", llama_wide()),
    ]
}
