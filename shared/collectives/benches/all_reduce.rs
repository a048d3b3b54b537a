//! Time per all-reduce between two processes of this host, by shared memory and by TCP. Prints microseconds; judges
//! nothing.
#![allow(clippy::unwrap_used, reason = "the whole file is a benchmark")]

#[path = "../tests/support/mod.rs"]
mod support;

use paceline_collectives::{Collective, Transport};
use paceline_domain::ReduceTree;
use std::time::{Duration, Instant};

/// Rows, columns, repetitions.
const SHAPES: [(usize, usize, u32); 5] =
    [(1, 576, 20_000), (1, 1_536, 20_000), (8, 1_536, 10_000), (512, 576, 500), (512, 1_536, 200)];

fn main() {
    if let Some((_, mut collective)) = support::join(Duration::from_secs(60)) {
        return measure(collective.as_mut());
    }
    for (name, transport) in [("shared memory", Transport::SharedMemory), ("TCP", Transport::Tcp)] {
        let mut ranks = support::start(2, transport, "measure");
        for _ in SHAPES {
            println!("{name:>13}: {}", ranks[0].line());
        }
        ranks.iter_mut().for_each(|rank| {
            rank.child.wait().unwrap();
        });
    }
}

fn measure(collective: &mut dyn Collective) {
    let tree = ReduceTree::new(vec![0, 4, 8]);
    for (n_rows, n_cols, n_rounds) in SHAPES {
        let n = n_rows * n_cols;
        let partials = vec![1.5; n];
        let mut out = vec![0.0; n];
        for _ in 0..n_rounds / 10 {
            collective.all_reduce_tree(&tree, &partials, &mut out).unwrap();
        }
        collective.take_stats();
        let start = Instant::now();
        for _ in 0..n_rounds {
            collective.all_reduce_tree(&tree, &partials, &mut out).unwrap();
        }
        let us = start.elapsed().as_secs_f64() * 1e6 / f64::from(n_rounds);
        let wait = collective.take_stats().wait.as_secs_f64() * 1e6 / f64::from(n_rounds);
        if collective.rank() == 0 {
            println!("{n_rows:4} x {n_cols}: {us:8.1} us, of which {wait:.1} us waiting");
        }
    }
}
