//! The best tokens of plain rows, found by the backend, are those of the sampling definition over the row itself.

mod support;

use std::sync::Arc;

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Solo;
use paceline_domain::{BlockId, KvType, SamplingParams, TokenId};
use paceline_kernels::Kernels;
use paceline_model::logits::Choice;
use paceline_model::{Batch, Capacity, Cpu, Decoder, LoadSpec, Logits, ModelConfig, SplitPlan};
use paceline_sampling::{Candidate, TokenHistory, local_best};
use support::models;

const TEMPERATURES: [f32; 6] = [0.0, 0.7, 0.0, 1.0, 2.5, 0.01];
const N_ROWS: usize = TEMPERATURES.len();

fn decoder() -> Decoder {
    let bytes = models::qwen2().to_gguf().expect("bytes");
    let checkpoint = Arc::new(Checkpoint::from_gguf_bytes(bytes).expect("a checkpoint"));
    let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
    let plan = SplitPlan::new(&config, 1).expect("a plan");
    let capacity =
        Capacity { kv_type: KvType::F16, n_kv_blocks: 1, max_rows: N_ROWS, max_output_rows: N_ROWS };
    let (checkpoint, config, plan) = (&checkpoint, &config, &plan);
    let spec = LoadSpec { checkpoint, config, plan, rank: 0, capacity, progress: &|_| () };
    Decoder::load(&spec, &Cpu { kernels: Kernels::detect(), n_threads: 2 }).expect("loads")
}

fn by_definition(logits: &mut Logits<'_>, n_usable: usize, choice: &Choice) -> Candidate {
    let Choice { temperature, seed, position, .. } = *choice;
    let params = SamplingParams { temperature, seed, ..SamplingParams::default() };
    let mut row = logits.row(choice.row).expect("a row")[..n_usable].to_vec();
    local_best(&params, &TokenHistory::new(0), position, 0, &mut row)
}

#[test]
fn the_best_tokens_are_those_of_the_definition() {
    let mut decoder = decoder();
    let batch = Batch {
        tokens: &[5, 6, 330, 0, 77, 6].map(TokenId),
        positions: &[0, 1, 2, 3, 4, 5],
        sequence_of_row: &[0; N_ROWS],
        block_tables: &[&[BlockId(0)]],
        output_rows: &[0, 1, 2, 3, 4, 5],
    };
    let mut logits = decoder.forward(&batch, &mut Solo::new()).expect("runs");
    let choices: Vec<Choice> = (0..N_ROWS)
        .map(|i| Choice {
            row: N_ROWS - 1 - i,
            position: 9 + i as u32,
            seed: 1 << (11 * i),
            temperature: TEMPERATURES[i],
        })
        .collect();
    for n_usable in [331, 300, 17, 1] {
        let mut best = Vec::new();
        logits.best(n_usable, &choices, &mut best).expect("rows");
        let expected: Vec<Candidate> =
            choices.iter().map(|choice| by_definition(&mut logits, n_usable, choice)).collect();
        assert_eq!(best, expected, "{n_usable} tokens");
    }
}
