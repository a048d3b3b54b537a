//! The buffers of a forward pass, for the largest batch: allocated at load, or by the first batches where a kernel
//! keeps its own. It computes nothing.

use paceline_kernels::rope::RopeTable;
use paceline_kernels::{CodeBits, QuantizedRows};

use super::activation_bits::ActivationBits;
use crate::estimate::Capacity;
use crate::{ModelConfig, SplitPlan};

/// Widths of the buffers of one rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ScratchShape {
    n_embd: usize,
    query_width: usize,
    kv_width: usize,
    ffn_width: usize,
    n_vocab: usize,
    head_dim: usize,
    /// Most subtree sums of an all-reduce.
    n_partials: usize,
    ffn_hidden_bits: CodeBits,
}

/// The buffers. Each comment is the shape for a batch of `n_rows`.
pub(crate) struct Scratch {
    /// The residual stream, `[n_rows, n_embd]`.
    pub hidden: Vec<f32>,
    /// `[n_rows, n_embd]`; also receives the sums of all-reduces, before they are added and normalized.
    pub normed: Vec<f32>,
    /// `[n_rows, n_heads, head_dim]`
    pub query: Vec<f32>,
    /// `[n_rows, n_kv_heads, head_dim]`
    pub key: Vec<f32>,
    /// `[n_rows, n_kv_heads, head_dim]`
    pub value: Vec<f32>,
    /// `[n_rows, n_heads, head_dim]`
    pub attended: Vec<f32>,
    /// SiLU of the gate times up, `[n_rows, n_ff]`; used where the next matrix is of plain numbers.
    pub ffn_hidden: Vec<f32>,
    /// The same, quantized; used where the next matrix is quantized.
    pub ffn_hidden_quantized: QuantizedRows,
    /// `[n_subtrees, n_rows, n_embd]`
    pub partials: Vec<f32>,
    /// Rows whose logits are asked for, `[n_output_rows, n_embd]`.
    pub chosen: Vec<f32>,
    /// The same, normalized.
    pub chosen_normed: Vec<f32>,
    /// `[n_output_rows, n_vocab]`
    pub logits: Vec<f32>,
    /// Quantized input of the matrix product at hand, if no other buffer is named for it.
    pub quantized: QuantizedRows,
    /// Angles of the batch's positions.
    pub angles: RopeTable,
}

impl ScratchShape {
    pub(crate) fn new(config: &ModelConfig, plan: &SplitPlan, rank: usize) -> Self {
        let share = plan.share(rank);
        let n_subtrees = |tree: &paceline_domain::ReduceTree| tree.subtrees(rank).len();
        Self {
            n_embd: config.n_embd,
            query_width: share.heads.len() * config.head_dim,
            kv_width: share.kv_heads.len() * config.head_dim,
            ffn_width: share.ffn.len(),
            n_vocab: share.vocab.len(),
            head_dim: config.head_dim,
            n_partials: n_subtrees(&plan.attention().tree).max(n_subtrees(&plan.ffn().tree)),
            ffn_hidden_bits: ActivationBits::new(config).ffn_hidden,
        }
    }

    /// Bytes of all buffers.
    pub(crate) fn bytes(&self, capacity: &Capacity) -> u64 {
        let floats = 2 * self.n_embd
            + 2 * self.query_width
            + 2 * self.kv_width
            + self.ffn_width
            + self.n_partials * self.n_embd
            + self.head_dim;
        let n_rows = capacity.max_rows;
        let quantized = QuantizedRows::bytes(n_rows, self.widest_input(), CodeBits::Sixteen)
            + QuantizedRows::bytes(n_rows, self.ffn_width, self.ffn_hidden_bits);
        let outputs = capacity.max_output_rows * (self.n_vocab + 2 * self.n_embd);
        (4 * (n_rows * floats + outputs) + quantized) as u64
    }

    fn widest_input(&self) -> usize {
        self.n_embd.max(self.query_width)
    }

    pub(crate) fn allocate(&self, capacity: &Capacity) -> Scratch {
        let n_rows = capacity.max_rows;
        let rows = |width: usize| vec![0.0; n_rows * width];
        Scratch {
            hidden: rows(self.n_embd),
            normed: rows(self.n_embd),
            query: rows(self.query_width),
            key: rows(self.kv_width),
            value: rows(self.kv_width),
            attended: rows(self.query_width),
            ffn_hidden: rows(self.ffn_width),
            ffn_hidden_quantized: QuantizedRows::with_capacity(n_rows, self.ffn_width, self.ffn_hidden_bits),
            partials: rows(self.n_partials * self.n_embd),
            chosen: vec![0.0; capacity.max_output_rows * self.n_embd],
            chosen_normed: vec![0.0; capacity.max_output_rows * self.n_embd],
            logits: vec![0.0; capacity.max_output_rows * self.n_vocab],
            quantized: QuantizedRows::with_capacity(n_rows, self.widest_input(), CodeBits::Sixteen),
            angles: RopeTable::default(),
        }
    }
}
