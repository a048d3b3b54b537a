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
//! | SmolLM2 135M, width 576 | 3.65 % | 2.65 % | 3.45 % |
//!
//! Sixteen bits double the integer products of a matrix, so they are spent where they help most for their time. With SmolLM2,
//! sixteen bits in the matrices of the first column, eight in the others:
//!
//! | | differs | cosine of logits, mean and least | tokens/s, prompt | tokens/s, 8 sequences |
//! |---|---|---|---|---|
//! | none | 3.65 % | | 1,617 | 1,062 |
//! | head | 2.65 % | 0.99950, 0.9855 | 1,580 | 985 |
//! | head, attention input | 2.6 % | 0.99975, 0.9958 | 1,426 | 930 |
//! | head, attention input, FFN hidden | 1.6 % | 0.99977, 0.9962 | 1,413 | 865 |
//! | head, attention input, FFN input | 1.4 % | 0.99992, 0.9988 | 1,269 | 846 |
//! | llama.cpp | 3.45 % | 0.99944, 0.9853 | | |

use paceline_kernels::CodeBits;

use crate::ModelConfig;

/// Width of the residual stream below which it is the head that sixteen bits help most, and from which on attention's input.
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
        let sixteen_if = |needed| if needed { CodeBits::Sixteen } else { CodeBits::Eight };
        Self {
            attention_input: sixteen_if((NARROW..WIDE).contains(&config.n_embd)),
            attention_output: CodeBits::Eight,
            ffn_input: CodeBits::Eight,
            ffn_hidden: CodeBits::Eight,
            head: sixteen_if(config.n_embd < NARROW),
        }
    }
}
