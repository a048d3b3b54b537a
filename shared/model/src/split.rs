//! Which slice of every tensor each rank holds: a pure function of the model's shape and the number of ranks.
//! Shares may be uneven or empty; the summation trees over K are the same for any number of ranks.

use std::ops::Range;

use paceline_domain::ReduceTree;
use paceline_domain::reduce_tree::even_edges;

use crate::names::Cut;
use crate::{HeadTokens, ModelConfig, ModelError};

/// Most ranks of a group.
pub const MAX_RANKS: usize = 64;
/// Leaf edges along K lie on multiples of this, the length of a quantization block of activations.
pub const LEAF_ALIGN: usize = 32;
/// Leaves of the feed-forward network, when it is wide enough.
pub const FFN_LEAVES: usize = 8;
/// The vocabulary is cut on multiples of this, the rows of a packed tile.
pub const VOCAB_ALIGN: usize = 16;

/// What one rank holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Share {
    /// Query heads.
    pub heads: Range<usize>,
    /// The key and value heads that those query heads read.
    pub kv_heads: Range<usize>,
    /// Columns of the feed-forward network.
    pub ffn: Range<usize>,
    /// Rows of the output head whose logits it computes: tokens, but for a head that skips some.
    pub vocab: Range<usize>,
}

/// The columns of a row-parallel matrix: leaf edges and the tree that sums the leaves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RowParallel {
    /// Leaf i is the columns `leaf_edges[i]..leaf_edges[i + 1]`.
    pub leaf_edges: Vec<usize>,
    /// Who owns which leaves, and the order of additions.
    pub tree: ReduceTree,
}

/// Which slice of every tensor each rank holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SplitPlan {
    head_dim: usize,
    head: HeadTokens,
    shares: Vec<Share>,
    attention: RowParallel,
    ffn: RowParallel,
}

/// A rank's rectangle of a tensor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slice {
    /// Rows; for a vector its elements.
    pub rows: Range<usize>,
    /// Columns; `0..1` for a vector.
    pub columns: Range<usize>,
}

impl Slice {
    /// Elements in the slice.
    pub fn len(&self) -> usize {
        self.rows.len() * self.columns.len()
    }

    /// Whether the slice has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl RowParallel {
    fn new(leaf_edges: Vec<usize>, n_ranks: usize) -> Self {
        let tree = ReduceTree::new(even_edges(leaf_edges.len() - 1, n_ranks));
        Self { leaf_edges, tree }
    }

    /// The columns a rank owns.
    pub fn columns(&self, rank: usize) -> Range<usize> {
        let leaves = self.tree.leaves(rank);
        self.leaf_edges[leaves.start]..self.leaf_edges[leaves.end]
    }

    /// The leaf edges inside a rank's columns, both ends included.
    pub fn edges_of(&self, rank: usize) -> &[usize] {
        let leaves = self.tree.leaves(rank);
        &self.leaf_edges[leaves.start..=leaves.end]
    }
}

impl SplitPlan {
    /// Splits a model over `n_ranks`, from 1 to [`MAX_RANKS`].
    ///
    /// # Errors
    /// [`ModelError::Ranks`] for another number of ranks.
    pub fn new(config: &ModelConfig, n_ranks: usize) -> Result<Self, ModelError> {
        Self::with_head(config, n_ranks, &HeadTokens::all(config))
    }

    /// The same with an output head for some tokens alone, as far as the model has them. Every token may still be put in, but
    /// the others have no logits, and a column of logits is the token that [`SplitPlan::head`] says: for drafts.
    ///
    /// # Errors
    /// As [`SplitPlan::new`].
    pub fn with_head(config: &ModelConfig, n_ranks: usize, head: &HeadTokens) -> Result<Self, ModelError> {
        if n_ranks == 0 || n_ranks > MAX_RANKS {
            return Err(ModelError::Ranks { n_ranks, max: MAX_RANKS });
        }
        let attention = RowParallel::new(attention_leaf_edges(config), n_ranks);
        let ffn = RowParallel::new(ffn_leaf_edges(config.n_ff), n_ranks);
        let head = head.of(config);
        let n_tokens = head.len();
        let vocab_edges = even_edges(n_tokens.div_ceil(VOCAB_ALIGN), n_ranks);
        let vocab_edge = |i: usize| (vocab_edges[i] * VOCAB_ALIGN).min(n_tokens);
        let shares = (0..n_ranks)
            .map(|rank| {
                let columns = attention.columns(rank);
                let heads = columns.start / config.head_dim..columns.end / config.head_dim;
                Share {
                    kv_heads: kv_heads_of(&heads, config.n_heads_per_kv()),
                    heads,
                    ffn: ffn.columns(rank),
                    vocab: vocab_edge(rank)..vocab_edge(rank + 1),
                }
            })
            .collect();
        Ok(Self { head_dim: config.head_dim, head, shares, attention, ffn })
    }

    /// Which tokens have logits.
    pub fn head(&self) -> &HeadTokens {
        &self.head
    }

    /// Number of ranks.
    pub fn n_ranks(&self) -> usize {
        self.shares.len()
    }

    /// What a rank holds.
    pub fn share(&self, rank: usize) -> &Share {
        &self.shares[rank]
    }

    /// Columns and tree of the attention output projection.
    pub fn attention(&self) -> &RowParallel {
        &self.attention
    }

    /// Columns and tree of the down projection.
    pub fn ffn(&self) -> &RowParallel {
        &self.ffn
    }

    /// A rank's slice of a tensor with this shape (outermost dimension first) and cut.
    pub fn slice(&self, rank: usize, cut: Cut, shape: &[usize]) -> Slice {
        let share = self.share(rank);
        let head_rows = |heads: &Range<usize>| heads.start * self.head_dim..heads.end * self.head_dim;
        let all_rows = 0..shape[0];
        let all_columns = 0..shape.get(1).copied().unwrap_or(1);
        let (rows, columns) = match cut {
            Cut::Whole => (all_rows, all_columns),
            Cut::Lookup => (0..0, all_columns),
            Cut::QueryRows => (head_rows(&share.heads), all_columns),
            Cut::KvRows => (head_rows(&share.kv_heads), all_columns),
            Cut::FfnRows => (share.ffn.clone(), all_columns),
            Cut::VocabRows => (share.vocab.clone(), all_columns),
            Cut::AttentionColumns => (all_rows, self.attention.columns(rank)),
            Cut::FfnColumns => (all_rows, self.ffn.columns(rank)),
        };
        Slice { rows, columns }
    }

    /// For each of a rank's query heads, the key and value head it reads, counted within the rank.
    pub fn kv_of_head(&self, rank: usize, n_heads_per_kv: usize) -> Vec<usize> {
        let share = self.share(rank);
        share.heads.clone().map(|head| head / n_heads_per_kv - share.kv_heads.start).collect()
    }
}

/// One leaf a query head, or as many heads as make the width a multiple of [`LEAF_ALIGN`].
fn attention_leaf_edges(config: &ModelConfig) -> Vec<usize> {
    let mut heads_per_leaf = 1;
    while !(heads_per_leaf * config.head_dim).is_multiple_of(LEAF_ALIGN) {
        heads_per_leaf *= 2;
    }
    let n_leaves = config.n_heads.div_ceil(heads_per_leaf);
    (0..=n_leaves).map(|leaf| (leaf * heads_per_leaf).min(config.n_heads) * config.head_dim).collect()
}

fn ffn_leaf_edges(n_ff: usize) -> Vec<usize> {
    let n_blocks = n_ff.div_ceil(LEAF_ALIGN);
    let n_leaves = n_blocks.min(FFN_LEAVES);
    (0..=n_leaves).map(|leaf| (leaf * n_blocks / n_leaves * LEAF_ALIGN).min(n_ff)).collect()
}

fn kv_heads_of(heads: &Range<usize>, n_heads_per_kv: usize) -> Range<usize> {
    if heads.is_empty() {
        return 0..0;
    }
    heads.start / n_heads_per_kv..heads.end.div_ceil(n_heads_per_kv)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::tiny_config;
    use paceline_domain::TokenId;
    use proptest::prelude::*;

    fn config(n_kv_heads: usize, n_heads_per_kv: usize, head_dim: usize, n_ff: usize) -> ModelConfig {
        let n_heads = n_kv_heads * n_heads_per_kv;
        ModelConfig { n_heads, n_kv_heads, head_dim, n_ff, ..tiny_config() }
    }

    fn joins(ranges: impl Iterator<Item = Range<usize>>, end: usize) {
        let mut at = 0;
        for range in ranges {
            assert_eq!(range.start, at);
            at = range.end;
        }
        assert_eq!(at, end);
    }

    #[test]
    fn smollm2_on_two_ranks() {
        let smollm2 = ModelConfig { n_vocab: 49_152, ..config(3, 3, 64, 1536) };
        let plan = SplitPlan::new(&smollm2, 2).expect("plan");
        let left = Share { heads: 0..4, kv_heads: 0..2, ffn: 0..768, vocab: 0..24_576 };
        let right = Share { heads: 4..9, kv_heads: 1..3, ffn: 768..1536, vocab: 24_576..49_152 };
        assert_eq!((plan.share(0), plan.share(1)), (&left, &right));
        assert_eq!(plan.kv_of_head(1, 3), [0, 0, 1, 1, 1]);
        assert_eq!(plan.attention().tree.n_leaves(), 9);
    }

    #[test]
    fn narrow_and_odd_shapes() {
        let grouped = SplitPlan::new(&config(3, 3, 100, 1), 2).expect("plan");
        assert_eq!(grouped.attention().leaf_edges, [0, 800, 900]);
        assert_eq!(grouped.ffn().leaf_edges, [0, 1]);
        assert_eq!(grouped.share(1).heads, 8..9);
        let many = SplitPlan::new(&config(1, 2, 64, 96), 64).expect("plan");
        assert_eq!((0..64).filter(|rank| !many.share(*rank).heads.is_empty()).count(), 2);
        assert_eq!(many.ffn().leaf_edges, [0, 32, 64, 96]);
    }

    #[test]
    fn too_many_or_no_ranks() {
        for n_ranks in [0, MAX_RANKS + 1] {
            assert!(matches!(SplitPlan::new(&tiny_config(), n_ranks), Err(ModelError::Ranks { .. })));
        }
    }

    proptest! {
        #[test]
        fn shares_cover_everything_once(
            (n_kv_heads, n_heads_per_kv, half_dim) in (1usize..12, 1usize..9, 1usize..80),
            (n_ff, n_vocab, n_ranks) in (1usize..5000, 1usize..5000, 1usize..=MAX_RANKS),
            n_tokens in 1usize..6000,
        ) {
            let config = ModelConfig { n_vocab, ..config(n_kv_heads, n_heads_per_kv, 2 * half_dim, n_ff) };
            let plan = SplitPlan::new(&config, n_ranks).expect("plan");
            let shares = || (0..n_ranks).map(|rank| plan.share(rank));
            joins(shares().map(|share| share.heads.clone()), config.n_heads);
            joins(shares().map(|share| share.ffn.clone()), n_ff);
            joins(shares().map(|share| share.vocab.clone()), n_vocab);
            let head = HeadTokens::with(n_tokens, &[TokenId(n_vocab as u32 - 1)]);
            let few = SplitPlan::with_head(&config, n_ranks, &head).expect("plan");
            joins((0..n_ranks).map(|rank| few.share(rank).vocab.clone()), (n_tokens + 1).min(n_vocab));
            prop_assert_eq!((few.head().len(), plan.head().len()), ((n_tokens + 1).min(n_vocab), n_vocab));
            prop_assert!(shares().enumerate().all(|(rank, share)| few.share(rank).heads == share.heads));
            for (rank, share) in shares().enumerate() {
                // Exactly the key and value heads that are read, and each head finds its own.
                let mut read: Vec<usize> = share.heads.clone().map(|head| head / n_heads_per_kv).collect();
                let kv_of_head = plan.kv_of_head(rank, n_heads_per_kv);
                for (kv, local) in read.iter().zip(&kv_of_head) {
                    prop_assert_eq!(share.kv_heads.start + local, *kv);
                }
                read.dedup();
                prop_assert_eq!(share.kv_heads.clone().collect::<Vec<_>>(), read);
                prop_assert!(share.vocab.start % VOCAB_ALIGN == 0 || share.vocab.is_empty());
                let columns = plan.slice(rank, Cut::AttentionColumns, &[1, config.attention_width()]).columns;
                let rows = plan.slice(rank, Cut::QueryRows, &[config.attention_width(), 1]).rows;
                prop_assert_eq!(columns, rows);
            }
        }

        #[test]
        fn leaves_are_aligned_and_do_not_depend_on_ranks(
            (n_heads, half_dim, n_ff, n_ranks) in (1usize..40, 1usize..80, 1usize..5000, 1usize..=MAX_RANKS),
        ) {
            let config = config(n_heads, 1, 2 * half_dim, n_ff);
            let (one, many) = (SplitPlan::new(&config, 1).expect("plan"), SplitPlan::new(&config, n_ranks).expect("plan"));
            for (one, many, width) in
                [(one.attention(), many.attention(), config.attention_width()), (one.ffn(), many.ffn(), n_ff)]
            {
                prop_assert_eq!(&one.leaf_edges, &many.leaf_edges);
                let (last, inner) = many.leaf_edges.split_last().expect("edges");
                prop_assert!(inner.iter().all(|edge| edge % LEAF_ALIGN == 0) && *last == width);
                prop_assert!(many.leaf_edges.windows(2).all(|edge| edge[0] < edge[1]));
                prop_assert_eq!(many.tree.n_leaves(), many.leaf_edges.len() - 1);
                prop_assert_eq!(many.tree.n_ranks(), n_ranks);
                for rank in 0..n_ranks {
                    let edges = many.edges_of(rank);
                    prop_assert_eq!(edges[0]..edges[edges.len() - 1], many.columns(rank));
                }
            }
        }
    }
}
