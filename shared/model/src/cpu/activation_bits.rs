//! How fine the activations are quantized that meet quantized weights: a property of the model's shape alone, so that
//! every rank, machine and batch agrees.
//!
//! Eight bits are exact enough where the sums behind them are long. Share of the positions of a text of 2,000 tokens where
//! the likeliest token is another one than in f32 (llama.cpp, which has eight bits everywhere, measured on the same text):
//!
//! | | all 8 bits | as here | llama.cpp |
//! |---|---|---|---|
//! | Qwen2.5-Coder 1.5B, width 1,536 | 0.75 % | 0.75 % | 2.6 % |
//! | Qwen2.5-Coder 0.5B, width 896 | 1.75 % | 1.25 % | 1.7 % |
//! | SmolLM2 135M, width 576 | 3.65 % | 1.4 % | |
//!
//! Sixteen bits double the integer products of a matrix, so they are spent where they help most: on the input of attention,
//! and in the narrowest models on the input of the feed-forward network and of the output head. (SmolLM2 differs at 0.4 % with
//! eight bits in the attention output alone, 1.3 % in the FFN's hidden layer alone, 1.55 % in the FFN's input, 1.8 % in the head or
//! the input of attention, nowhere with sixteen everywhere.)

use paceline_kernels::CodeBits;

use crate::ModelConfig;

/// Width of the residual stream below which a model is narrow.
const NARROW: usize = 768;
/// Width from which on eight bits are enough everywhere.
const WIDE: usize = 1024;

/// Bits of the codes of each matrix input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ActivationBits {
    /// Query, key and value projections.
    pub attention_input: CodeBits,
    /// Output projection of attention.
    pub attention_output: CodeBits,
    /// Gate and up projections.
    pub ffn_input: CodeBits,
    /// Down projection.
    pub ffn_hidden: CodeBits,
    /// Output head.
    pub head: CodeBits,
}

impl ActivationBits {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let sixteen_below = |width| if config.n_embd < width { CodeBits::Sixteen } else { CodeBits::Eight };
        Self {
            attention_input: sixteen_below(WIDE),
            attention_output: CodeBits::Eight,
            ffn_input: sixteen_below(NARROW),
            ffn_hidden: CodeBits::Eight,
            head: sixteen_below(NARROW),
        }
    }
}
