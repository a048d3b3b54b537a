//! How fine the activations are quantized that meet quantized weights: a property of the model's shape alone, so that
//! every rank, machine and batch agrees.
//!
//! Eight bits are exact enough where the sums behind them are long. On a text of 2,000 tokens Qwen2.5-Coder then
//! prefers another token than in f32 at 1.7 % (0.5B) and 1.2 % (1.5B) of the positions. The inputs of attention and of
//! a narrow model's output head are the most sensitive and cost little; with sixteen bits there it is 1.0 % and 0.9 %.
//! In the narrowest models every input is sensitive: SmolLM2 135M would differ at 3.7 % with eight bits, and differs
//! at none with sixteen.

use paceline_kernels::CodeBits;

use crate::ModelConfig;

/// Width of the residual stream below which a model is narrow.
const NARROW: usize = 768;
/// Width from which on the output head is content with eight bits.
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
        let many = if config.n_embd < NARROW { CodeBits::Sixteen } else { CodeBits::Eight };
        Self {
            attention_input: CodeBits::Sixteen,
            attention_output: many,
            ffn_input: many,
            ffn_hidden: many,
            head: if config.n_embd < WIDE { CodeBits::Sixteen } else { CodeBits::Eight },
        }
    }
}
