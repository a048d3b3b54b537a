//! The owned leaves of the canonical sum as a program for a small stack machine. It does not add anything itself.

use super::PackSpec;
use paceline_domain::reduce_tree::{fold, maximal_subtrees};
use std::cell::RefCell;
use std::ops::Range;

/// Most leaves of a matrix over all ranks.
pub(super) const MAX_LEAVES: usize = 1 << (MAX_DEPTH - 1);
/// Most sums waiting for their right neighbour, the one being made included.
pub(crate) const MAX_DEPTH: usize = 12;

/// One leaf: sum its columns, push the sum, then `n_adds` times replace the two topmost sums by their sum.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Leaf {
    /// Columns, counted from the first owned one.
    pub columns: Range<usize>,
    /// Additions after it.
    pub n_adds: usize,
    /// Afterwards the only sum on the stack is that of a subtree, and is taken away.
    pub ends_subtree: bool,
}

/// The program, and how many subtrees it makes.
pub(super) fn leaves(spec: &PackSpec) -> (Vec<Leaf>, usize) {
    let program: RefCell<Vec<Leaf>> = RefCell::default();
    let owned = spec.first_leaf..spec.first_leaf + spec.n_leaves();
    let subtrees = maximal_subtrees(spec.n_total_leaves, owned);
    for subtree in &subtrees {
        let mut leaf = |idx: usize| {
            let edge = |idx: usize| spec.leaf_edges[idx - spec.first_leaf] - spec.k_range.start;
            let columns = edge(idx)..edge(idx + 1);
            program.borrow_mut().push(Leaf { columns, n_adds: 0, ends_subtree: false });
        };
        let mut add = |(), ()| with_last(&program, |leaf| leaf.n_adds += 1);
        fold(subtree.clone(), &mut leaf, &mut add);
        with_last(&program, |leaf| leaf.ends_subtree = true);
    }
    (program.into_inner(), subtrees.len())
}

fn with_last(program: &RefCell<Vec<Leaf>>, change: impl FnOnce(&mut Leaf)) {
    change(program.borrow_mut().last_mut().expect("invariant: a subtree has a leaf"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_domain::WeightType;
    use proptest::prelude::*;

    #[test]
    fn the_largest_program_fits_the_stack() {
        let edges: Vec<usize> = (0..=MAX_LEAVES).collect();
        let (program, n_subtrees) = leaves(&PackSpec::cut_rows(WeightType::F32, 1, &edges, 0..MAX_LEAVES));
        let mut depth = 0;
        for leaf in &program {
            depth += 1;
            assert!(depth <= MAX_DEPTH);
            depth -= leaf.n_adds;
        }
        assert_eq!((depth, n_subtrees), (1, 1));
    }

    proptest! {
        #[test]
        fn the_program_is_the_fold_of_each_subtree(n in 1usize..50, cuts in (0usize..50, 0usize..50)) {
            let owned = cuts.0.min(cuts.1).min(n)..cuts.0.max(cuts.1).min(n);
            let edges: Vec<usize> = (0..=n).collect();
            let (program, _) = leaves(&PackSpec::cut_rows(WeightType::F32, 1, &edges, owned.clone()));
            let (mut stack, mut found) = (Vec::new(), Vec::new());
            for leaf in program {
                stack.push((owned.start + leaf.columns.start).to_string());
                for _ in 0..leaf.n_adds {
                    let (right, left) = (stack.pop().unwrap(), stack.pop().unwrap());
                    stack.push(format!("({left}+{right})"));
                }
                if leaf.ends_subtree {
                    found.push(stack.pop().unwrap());
                    prop_assert!(stack.is_empty());
                }
            }
            let show = |left: String, right: String| format!("({left}+{right})");
            let expected: Vec<String> = maximal_subtrees(n, owned)
                .into_iter()
                .map(|node| fold(node, &mut |leaf| leaf.to_string(), &mut |left, right| show(left, right)))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
