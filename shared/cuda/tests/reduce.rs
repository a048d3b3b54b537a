//! The sum over gathered parts on the emulated device: the bits of the plan's tree, whoever owns which leaves.

mod support;

use paceline_cuda::CudaError;
use paceline_cuda::kernels::reduce::{SumTreeArgs, TreeSteps, sum_tree};
use paceline_domain::ReduceTree;
use proptest::prelude::*;
use support::{
    arrays::{Random, get, only, put},
    emulated::Emulated,
};

const STALE: f32 = -7.25;

/// Parts of all ranks; a batch has fewer rows than are launched for.
struct Sum {
    tree: ReduceTree,
    n_rows: usize,
    n_more: usize,
    n_embd: usize,
}

impl Sum {
    fn check(&self, mut device: Emulated) -> Result<(), String> {
        let (device, tree) = (&mut device, TreeSteps::new(&self.tree));
        let (n, n_launched) = (self.n_rows * self.n_embd, (self.n_rows + self.n_more) * self.n_embd);
        let n_parts = tree.n_parts * self.tree.n_ranks();
        let mut random = Random(n as u64);
        // Parts that a rank does not have are never looked at.
        let mut parts = vec![f32::NAN; n_parts * n_launched];
        for rank in 0..self.tree.n_ranks() {
            for i in 0..self.tree.subtrees(rank).len() {
                let numbers: Vec<f32> =
                    (0..n).map(|_| random.number() * 10f32.powi(random.below(9) as i32 - 4)).collect();
                parts[(rank * tree.n_parts + i) * n_launched..][..n].copy_from_slice(&numbers);
            }
        }
        let out = put(device, &vec![STALE; n_launched]);
        let args = SumTreeArgs {
            parts: put(device, &parts),
            steps: put(device, &tree.steps),
            out,
            header: put(device, &[self.n_rows as u32, 0, 0, 0]),
            part_elements: n_launched as u64,
            n_embd: self.n_embd as u32,
            n_steps: tree.steps.len() as u32,
        };
        sum_tree(device, self.n_rows + self.n_more, tree.n_held, &args).map_err(|error| error.to_string())?;
        let found: Vec<f32> = get(device, out, n_launched);
        for (i, found) in found.iter().enumerate() {
            let part = |rank: usize, at: usize| parts[(rank * tree.n_parts + at) * n_launched + i];
            let expected = if i < n { self.tree.finish(part, |left, right| left + right) } else { STALE };
            if found.to_bits() != expected.to_bits() {
                return Err(format!("element {i} of {n}: {found}, not {expected}"));
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_sum_is_the_trees(
        shares in prop::collection::vec(0usize..9, 1..7),
        n_rows in 1usize..6,
        n_more in 0usize..3,
        n_embd in prop::sample::select(vec![4usize, 12, 128, 516, 1_028]),
        seed in any::<u64>(),
    ) {
        let mut edges = vec![0];
        edges.extend(shares.iter().scan(0, |edge, share| { *edge += share; Some(*edge) }));
        if edges.last() == Some(&0) {
            edges.push(1);
        }
        let sum = Sum { tree: ReduceTree::new(edges), n_rows, n_more, n_embd };
        prop_assert_eq!(sum.check(Emulated::new().with_seed(seed)), Ok(()));
    }
}

#[test]
fn an_even_split_brings_one_part_a_rank() {
    for n_ranks in [1, 2, 4, 8] {
        let edges = (0..=n_ranks).map(|rank| rank * 24 / n_ranks).collect();
        let tree = TreeSteps::new(&ReduceTree::new(edges));
        assert_eq!((tree.n_parts, tree.steps.len()), (1, 2 * n_ranks - 1));
    }
}

#[test]
fn odd_widths_are_refused() {
    let args = SumTreeArgs { n_embd: 6, ..bytemuck::Zeroable::zeroed() };
    assert!(matches!(sum_tree(&mut Emulated::new(), 1, 1, &args), Err(CudaError::Unfit(_))));
}

#[test]
fn mistakes_of_the_sum_are_found() {
    let sum = Sum { tree: ReduceTree::new(vec![0, 3, 4, 9]), n_rows: 3, n_more: 2, n_embd: 132 };
    assert_eq!(sum.check(Emulated::of(&only(&["reduce.cu"]))), Ok(()));
    for (from, to) in [
        ("args.header->n_rows * args.n_embd) return", "args.part_elements) return"),
        ("(size_t)part * args.part_elements", "(size_t)step * args.part_elements"),
        ("= tree::add(next[-tree::THREADS], *next)", "= tree::add(next[0], *next)"),
        ("float4 *next = held + threadIdx.x", "float4 *next = held"),
    ] {
        let device = Emulated::of(&only(&["reduce.cu"]).mutated("reduce.cu", from, to));
        assert!(sum.check(device).is_err(), "{to}");
    }
}
