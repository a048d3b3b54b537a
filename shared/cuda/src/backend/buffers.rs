//! The buffers of a pass on the device, allocated once; their addresses are fixed, so that captured graphs find them again.

use paceline_domain::KvType;
use paceline_domain::group::BLOCK_POSITIONS;
use paceline_model::{Capacity, ModelConfig, SplitPlan};

use super::graphs::bucket_rows;
use super::weights::padded;
use crate::kernels::attention::n_counts;
use crate::kernels::linear::{ROW_PADDING, Workspace};
use crate::kernels::linear_super::WorkspaceNeed;
use crate::{CudaError, DevicePtr, Runtime};

/// Bytes that partial results of attention may take; what would need more is left to the kernel without partial results.
const PARTIAL_BYTES: usize = 64 << 20;

/// Widths of a rank's rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Widths {
    pub n_embd: usize,
    /// Columns of all query heads.
    pub query: usize,
    /// Those of the rank that has most.
    pub widest_query: usize,
    /// Columns of all key heads, and of all value heads.
    pub kv: usize,
    /// Columns of the feed-forward network.
    pub ffn: usize,
    /// Tokens of the rank's vocabulary.
    pub vocab: usize,
    /// Most partial sums that any rank brings to an all-reduce.
    pub n_partials: usize,
}

impl Widths {
    pub(crate) fn new(config: &ModelConfig, plan: &SplitPlan, rank: usize) -> Self {
        let share = plan.share(rank);
        let ranks = || 0..plan.n_ranks();
        let n_partials = |rank: usize| {
            [plan.attention(), plan.ffn()].map(|half| half.tree.subtrees(rank).len()).into_iter().max()
        };
        let most_heads = ranks().map(|rank| plan.share(rank).heads.len()).max().unwrap_or(0);
        Self {
            n_embd: config.n_embd,
            query: share.heads.len() * config.head_dim,
            widest_query: most_heads * config.head_dim,
            kv: share.kv_heads.len() * config.head_dim,
            ffn: share.ffn.len(),
            vocab: share.vocab.len(),
            n_partials: ranks().filter_map(n_partials).max().unwrap_or(0).max(1),
        }
    }

    /// A row of queries, keys and values.
    pub(crate) fn qkv(&self) -> usize {
        self.query + 2 * self.kv
    }
}

/// Device memory of a pass. Rows are padded so that kernels may read whole blocks of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffers {
    /// Counts, tokens, positions, tables: see `batch`.
    pub batch: DevicePtr,
    /// The residual stream, `[n_rows][n_embd]` f32.
    pub hidden: DevicePtr,
    /// Sums of a half layer, `[n_partials][n_rows][n_embd]` f32; what will be added next is the first of them.
    pub delta: DevicePtr,
    /// Normalized rows as operand B.
    pub normed: DevicePtr,
    /// `[n_rows][query + 2 kv]` f32
    pub qkv: DevicePtr,
    /// Rotated queries, `[n_rows][n_heads][head_dim]` f16.
    pub query: DevicePtr,
    /// Output of attention as operand B.
    pub attended: DevicePtr,
    /// Partial outputs of attention, f32, and their maximums and sums.
    pub partial_outputs: DevicePtr,
    pub partial_sums: DevicePtr,
    /// How many splits of attention are done, u32.
    pub n_done: DevicePtr,
    /// Hidden features as operand B.
    pub gated: DevicePtr,
    /// Gate and up, `[2][n_rows][n_ff]` f32, where they are two matrices.
    pub gate_up: DevicePtr,
    /// What products use on their way.
    pub workspace: Workspace,
    /// `[n_output_rows][n_vocab]` f32
    pub logits: DevicePtr,
    /// Cosine and sine of every position, `[n_positions][head_dim / 2][2]` f32.
    pub angles: DevicePtr,
}

/// How much is allocated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub widths: Widths,
    pub capacity: Capacity,
    /// Bytes of [`Buffers::batch`].
    pub batch_bytes: usize,
    /// Gate and up are two matrices in some layer.
    pub gate_apart: bool,
    pub n_kv_heads: usize,
    /// Query heads that share a KV head at most.
    pub most_per_kv: usize,
}

impl Sizes {
    pub(crate) fn n_rows_padded(&self) -> usize {
        self.capacity.max_rows.next_multiple_of(ROW_PADDING)
    }

    /// What any product may need.
    fn workspace_need(&self) -> WorkspaceNeed {
        let Widths { n_embd, query, ffn, vocab, .. } = self.widths;
        WorkspaceNeed {
            n_rows: self.n_rows_padded().max(self.capacity.max_output_rows.next_multiple_of(ROW_PADDING)),
            n_columns: n_embd.max(query).max(ffn),
            n_outputs: n_embd.max(self.widths.qkv()).max(2 * ffn).max(vocab),
        }
    }

    pub(crate) fn allocate(&self, runtime: &mut dyn Runtime, angles: &[f32]) -> Result<Buffers, CudaError> {
        let Self { widths, capacity, .. } = *self;
        let n_rows = self.n_rows_padded();
        // Captured passes compute rows of their bucket that the batch does not have.
        let n_outputs = bucket_rows(capacity.max_output_rows).unwrap_or(capacity.max_output_rows);
        let operand = |width: usize| 2 * n_rows.max(n_outputs.next_multiple_of(ROW_PADDING)) * padded(width);
        let angles_bytes: &[u8] = bytemuck::cast_slice(angles);
        let need = self.workspace_need();
        let mut alloc = |n_bytes: usize| runtime.alloc(n_bytes.max(1));
        let buffers = Buffers {
            batch: alloc(self.batch_bytes)?,
            hidden: alloc(4 * n_rows * widths.n_embd)?,
            delta: alloc(4 * widths.n_partials * n_rows * widths.n_embd)?,
            normed: alloc(operand(widths.n_embd))?,
            qkv: alloc(4 * n_rows * widths.qkv())?,
            query: alloc(2 * n_rows * widths.query)?,
            attended: alloc(operand(widths.query))?,
            partial_outputs: alloc(PARTIAL_BYTES)?,
            partial_sums: alloc(PARTIAL_BYTES / 8)?,
            n_done: alloc(4 * n_counts(n_rows, self.n_kv_heads, self.most_per_kv))?,
            gated: alloc(operand(widths.ffn))?,
            gate_up: alloc(if self.gate_apart { 8 * n_rows * widths.ffn } else { 0 })?,
            workspace: Workspace {
                sums_of_x: alloc(need.sums_bytes())?,
                stretches: alloc(need.stretches_bytes())?,
                arrivals: alloc(need.arrivals_bytes())?,
            },
            logits: alloc(4 * n_outputs * widths.vocab)?,
            angles: alloc(angles_bytes.len())?,
        };
        runtime.upload(buffers.angles, angles_bytes)?;
        runtime.upload(buffers.workspace.arrivals, &vec![0; need.arrivals_bytes()])?;
        Ok(buffers)
    }
}

/// Whether the partial results of this many rows over this many splits have room.
pub(crate) fn partials_fit(n_rows: usize, n_splits: usize, query_width: usize) -> bool {
    4 * n_rows * n_splits * query_width <= PARTIAL_BYTES
}

/// Elements of the keys, and of the values, of one layer.
pub(crate) fn kv_elements(capacity: &Capacity, widths: &Widths) -> usize {
    capacity.n_kv_blocks * BLOCK_POSITIONS * widths.kv
}

/// What kernels store the KV cache as.
pub(crate) const KV_TYPE: KvType = KvType::F16;
