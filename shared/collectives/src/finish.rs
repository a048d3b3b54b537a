//! The order of additions that finishes a tree, compiled once and run over blocks of elements. It knows nothing
//! of ranks that are elsewhere: whoever calls it shows it their sums.

use paceline_domain::ReduceTree;

/// Elements worked on at a time, so that intermediate sums stay in the first-level cache.
const BLOCK: usize = 1024;
/// Trees remembered. A model has two shapes (attention heads, FFN ranges), one more per odd layer.
const MAX_REMEMBERED: usize = 8;

/// A value in the expression: somebody's subtree sum or an intermediate one.
#[derive(Clone, Copy, Debug)]
enum Operand {
    Part { rank: usize, subtree: usize },
    Register(usize),
}

/// `registers[dst] = left + right`.
#[derive(Clone, Copy, Debug)]
struct Addition {
    dst: usize,
    left: Operand,
    right: Operand,
}

/// A compiled tree.
#[derive(Debug)]
pub struct FinishPlan {
    additions: Vec<Addition>,
    root: Operand,
    n_registers: usize,
}

impl FinishPlan {
    /// The additions of `tree` in an order that needs few intermediate sums.
    pub fn new(tree: &ReduceTree) -> Self {
        let mut additions = Vec::new();
        // Intermediate sums live as on a stack: 0..n_live are in use.
        let (mut n_live, mut n_registers) = (0, 0);
        let root = tree.finish(
            |rank, subtree| Operand::Part { rank, subtree },
            |left, right| {
                let dst = match (left, right) {
                    (Operand::Register(left), Operand::Register(_)) => {
                        n_live -= 1;
                        left
                    }
                    (Operand::Register(register), _) | (_, Operand::Register(register)) => register,
                    _ => {
                        n_live += 1;
                        n_live - 1
                    }
                };
                n_registers = n_registers.max(n_live);
                additions.push(Addition { dst, left, right });
                Operand::Register(dst)
            },
        );
        Self { additions, root, n_registers }
    }

    /// Fills `out` with the root. `part(rank, subtree)` is that subtree's sum for the same elements as `out`.
    /// `scratch` is kept by the caller between calls.
    pub fn run<'a>(&self, part: impl Fn(usize, usize) -> &'a [f32], out: &mut [f32], scratch: &mut Vec<f32>) {
        scratch.resize(self.n_registers * BLOCK, 0.0);
        for (block_idx, out) in out.chunks_mut(BLOCK).enumerate() {
            let start = block_idx * BLOCK;
            let block = |rank, subtree| &part(rank, subtree)[start..start + out.len()];
            for addition in &self.additions {
                addition.run(&block, out.len(), scratch);
            }
            match self.root {
                Operand::Part { rank, subtree } => out.copy_from_slice(block(rank, subtree)),
                Operand::Register(register) => out.copy_from_slice(&scratch[register * BLOCK..][..out.len()]),
            }
        }
    }
}

impl Addition {
    fn run<'a>(&self, part: &impl Fn(usize, usize) -> &'a [f32], n: usize, scratch: &mut [f32]) {
        let (head, tail) = scratch.split_at_mut((self.dst + 1) * BLOCK);
        let dst = &mut head[self.dst * BLOCK..][..n];
        match (self.left, self.right) {
            (Operand::Part { rank: a, subtree: i }, Operand::Part { rank: b, subtree: j }) => {
                for ((dst, left), right) in dst.iter_mut().zip(part(a, i)).zip(part(b, j)) {
                    *dst = left + right;
                }
            }
            // An f32 sum has the same bits either way round.
            (Operand::Register(_), Operand::Part { rank, subtree })
            | (Operand::Part { rank, subtree }, Operand::Register(_)) => {
                dst.iter_mut().zip(part(rank, subtree)).for_each(|(sum, next)| *sum += next);
            }
            (Operand::Register(_), Operand::Register(_)) => {
                // By the stack order the right one is the register after `dst`.
                dst.iter_mut().zip(&tail[..n]).for_each(|(left, right)| *left += right);
            }
        }
    }
}

/// Compiled trees, by tree.
#[derive(Debug, Default)]
pub struct FinishPlans {
    plans: Vec<(ReduceTree, FinishPlan)>,
    scratch: Vec<f32>,
}

impl FinishPlans {
    /// As [`FinishPlan::run`], compiling `tree` when it is new.
    pub fn run<'a>(&mut self, tree: &ReduceTree, part: impl Fn(usize, usize) -> &'a [f32], out: &mut [f32]) {
        let idx = self.plans.iter().position(|(known, _)| known == tree).unwrap_or_else(|| {
            if self.plans.len() == MAX_REMEMBERED {
                self.plans.remove(0);
            }
            self.plans.push((tree.clone(), FinishPlan::new(tree)));
            self.plans.len() - 1
        });
        self.plans[idx].1.run(part, out, &mut self.scratch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn blocks_give_the_bits_of_one_element_at_a_time(
            n_leaves in 1usize..20,
            cuts in prop::collection::vec(0usize..20, 0..5),
            n in prop_oneof![0usize..40, Just(BLOCK), Just(2 * BLOCK + 3)],
            seed in any::<u32>(),
        ) {
            let mut edges: Vec<usize> = cuts.into_iter().map(|cut| cut.min(n_leaves)).collect();
            edges.extend([0, n_leaves]);
            edges.sort_unstable();
            let tree = ReduceTree::new(edges);
            let mut state = seed;
            let mut noise = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 * 1e-3 - 7e3
            };
            let parts: Vec<Vec<Vec<f32>>> = (0..tree.n_ranks())
                .map(|rank| tree.subtrees(rank).iter().map(|_| (0..n).map(|_| noise()).collect()).collect())
                .collect();
            let mut out = vec![f32::NAN; n];
            FinishPlans::default().run(&tree, |rank, i| &parts[rank][i], &mut out);
            for element in 0..n {
                let plain = tree.finish(|rank, i| parts[rank][i][element], |left, right| left + right);
                prop_assert_eq!(plain.to_bits(), out[element].to_bits());
            }
        }
    }
}
