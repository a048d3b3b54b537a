//! The canonical summation tree over K. It knows only shapes; whoever holds the numbers does the adding.
//!
//! A row-parallel matrix has fixed leaves along K. Leaf sums are combined by the binary tree that bisects the
//! list of leaves, so the order of additions is the same however many ranks own parts of the list. A rank sums
//! the largest subtrees inside its range; the all-reduce exchanges those and finishes the tree.

use std::ops::Range;

/// Where a node `lo..hi` with more than one leaf splits.
fn middle(node: &Range<usize>) -> usize {
    node.start + (node.end - node.start) / 2
}

/// The tree and which rank owns which leaves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReduceTree {
    n_leaves: usize,
    edges: Vec<usize>,
    subtrees: Vec<Vec<Range<usize>>>,
}

impl ReduceTree {
    /// `edges[r]..edges[r + 1]` are the leaves of rank r (possibly none); the first edge is 0.
    ///
    /// # Panics
    /// When there is no leaf, or the edges fall or do not start at 0.
    pub fn new(edges: Vec<usize>) -> Self {
        assert!(edges.len() >= 2 && edges[0] == 0 && edges.is_sorted(), "invariant: edges rise from 0");
        let n_leaves = *edges.last().expect("invariant: there are edges");
        assert!(n_leaves > 0, "invariant: a tree has a leaf");
        let subtrees = edges.windows(2).map(|edge| maximal_subtrees(n_leaves, edge[0]..edge[1])).collect();
        Self { n_leaves, edges, subtrees }
    }

    /// Leaves of all ranks.
    pub fn n_leaves(&self) -> usize {
        self.n_leaves
    }

    /// Number of ranks.
    pub fn n_ranks(&self) -> usize {
        self.subtrees.len()
    }

    /// Leaves of one rank.
    pub fn leaves(&self, rank: usize) -> Range<usize> {
        self.edges[rank]..self.edges[rank + 1]
    }

    /// The largest nodes of the tree inside one rank's leaves, in leaf order.
    pub fn subtrees(&self, rank: usize) -> &[Range<usize>] {
        &self.subtrees[rank]
    }

    /// Combines the subtree sums of all ranks into the root: `part(rank, i)` is the sum of `subtrees(rank)[i]`,
    /// `add(left, right)` adds two sums.
    pub fn finish<T>(&self, mut part: impl FnMut(usize, usize) -> T, mut add: impl FnMut(T, T) -> T) -> T {
        self.finish_node(0..self.n_leaves, &mut part, &mut add)
    }

    fn finish_node<T>(
        &self,
        node: Range<usize>,
        part: &mut impl FnMut(usize, usize) -> T,
        add: &mut impl FnMut(T, T) -> T,
    ) -> T {
        for (rank, subtrees) in self.subtrees.iter().enumerate() {
            if let Some(i) = subtrees.iter().position(|subtree| *subtree == node) {
                return part(rank, i);
            }
        }
        assert!(node.len() > 1, "invariant: a single leaf is always somebody's subtree");
        let mid = middle(&node);
        let left = self.finish_node(node.start..mid, part, add);
        let right = self.finish_node(mid..node.end, part, add);
        add(left, right)
    }
}

/// Combines the leaves of `node` in canonical order: the inside of a subtree. Depends only on `node.len()`.
pub fn fold<T>(node: Range<usize>, leaf: &mut impl FnMut(usize) -> T, add: &mut impl FnMut(T, T) -> T) -> T {
    assert!(!node.is_empty(), "invariant: a node has a leaf");
    if node.len() == 1 {
        return leaf(node.start);
    }
    let mid = middle(&node);
    let left = fold(node.start..mid, leaf, add);
    let right = fold(mid..node.end, leaf, add);
    add(left, right)
}

/// The largest nodes of the tree over `n_leaves` that lie inside `range`, in order.
pub fn maximal_subtrees(n_leaves: usize, range: Range<usize>) -> Vec<Range<usize>> {
    fn walk(node: Range<usize>, range: &Range<usize>, found: &mut Vec<Range<usize>>) {
        if node.start >= range.end || node.end <= range.start {
            return;
        }
        if range.start <= node.start && node.end <= range.end {
            found.push(node);
            return;
        }
        let mid = middle(&node);
        walk(node.start..mid, range, found);
        walk(mid..node.end, range, found);
    }
    let mut found = Vec::new();
    if !range.is_empty() {
        walk(0..n_leaves, &range, &mut found);
    }
    found
}

/// Edges of `n_parts` nearly equal shares of `n` items: share i is `edges[i]..edges[i + 1]`. As long as the number
/// of parts is even the items are bisected as the tree does, so for a power of two each share is one subtree.
pub fn even_edges(n: usize, n_parts: usize) -> Vec<usize> {
    fn cut(items: Range<usize>, n_parts: usize, edges: &mut Vec<usize>) {
        if n_parts > 1 && n_parts.is_multiple_of(2) {
            let mid = middle(&items);
            cut(items.start..mid, n_parts / 2, edges);
            cut(mid..items.end, n_parts / 2, edges);
        } else {
            edges.extend((1..=n_parts).map(|part| items.start + part * items.len() / n_parts));
        }
    }
    let mut edges = vec![0];
    cut(0..n, n_parts, &mut edges);
    edges
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn even_shares_of_a_power_of_two_are_one_subtree() {
        for n in 1..70 {
            for n_ranks in [1, 2, 4, 8] {
                let tree = ReduceTree::new(even_edges(n, n_ranks));
                for rank in 0..n_ranks {
                    assert!(tree.subtrees(rank).len() <= 1, "{n} leaves, {n_ranks} ranks, rank {rank}");
                }
            }
        }
    }

    #[test]
    fn nine_heads_on_three_ranks() {
        let tree = ReduceTree::new(even_edges(9, 3));
        assert_eq!(tree.subtrees(0), [0..2, 2..3]);
        assert_eq!(tree.subtrees(1), [3..4, 4..6]);
        assert_eq!(tree.subtrees(2), std::slice::from_ref(&(6..9)));
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_expression(
            n in 1usize..40,
            cuts in prop::collection::vec(0usize..40, 0..6),
        ) {
            let mut edges: Vec<usize> = cuts.into_iter().map(|cut| cut.min(n)).collect();
            edges.extend([0, n]);
            edges.sort_unstable();
            let tree = ReduceTree::new(edges);
            let show = |left: String, right: String| format!("({left}+{right})");
            let whole = fold(0..n, &mut |leaf| leaf.to_string(), &mut |left, right| show(left, right));
            let cut = tree.finish(
                |rank, i| {
                    let node = tree.subtrees(rank)[i].clone();
                    fold(node, &mut |leaf| leaf.to_string(), &mut |left, right| show(left, right))
                },
                show,
            );
            prop_assert_eq!(whole, cut);
        }
    }
}
