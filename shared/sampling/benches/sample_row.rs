//! Time per sampled row for vocabularies of real size. Prints microseconds; judges nothing.

use paceline_domain::SamplingParams;
use paceline_sampling::{TokenHistory, noise::gumbel, sample_row};
use std::hint::black_box;
use std::time::Instant;

const N_ROWS: u32 = 50;

fn main() {
    let base = SamplingParams::default();
    let cases = [
        ("greedy", SamplingParams::greedy()),
        ("temperature 1", base.clone()),
        ("top-k 40", SamplingParams { top_k: 40, ..base.clone() }),
        ("top-p 0.95", SamplingParams { top_p: 0.95, ..base.clone() }),
        ("min-p 0.05", SamplingParams { min_p: 0.05, ..base.clone() }),
        ("logprobs 5", SamplingParams { n_logprobs: Some(5), ..base }),
    ];
    let history = TokenHistory::new(0);
    for n_vocab in [49_152u32, 151_936] {
        for (spread, shape) in [(2.0, "peaked"), (0.1, "flat")] {
            let row: Vec<f32> = (0..n_vocab).map(|token| spread * gumbel(1, 0, token)).collect();
            for (name, params) in &cases {
                let mut logits = row.clone();
                let start = Instant::now();
                for position in 0..N_ROWS {
                    black_box(sample_row(params, &history, position, &mut logits));
                }
                let us = start.elapsed().as_secs_f64() * 1e6 / f64::from(N_ROWS);
                println!("{n_vocab} {shape:>6} {name:>13}: {us:8.0} us");
            }
        }
    }
}
