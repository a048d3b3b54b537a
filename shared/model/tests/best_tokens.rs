//! The best tokens of rows, found by the backend, are those of the sampling definition over the row itself.

mod support;

use std::sync::Arc;

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Solo;
use paceline_domain::{BlockId, KvType, SamplingParams, TokenId};
use paceline_kernels::Kernels;
use paceline_model::logits::Choice;
use paceline_model::{Batch, Capacity, Cpu, Decoder, LoadSpec, Logits, ModelConfig, SplitPlan};
use paceline_sampling::{Candidate, TokenHistory, local_best, sample_row};
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
    let spec = LoadSpec { checkpoint, config, plan, rank: 0, quantize: None, capacity, progress: &|_| () };
    Decoder::load(&spec, &Cpu { kernels: Kernels::detect(), n_threads: 2 }).expect("loads")
}

/// Ways to sample: alone, together.
fn params() -> Vec<SamplingParams> {
    let plain = TEMPERATURES.into_iter().zip(0..).map(|(temperature, i)| SamplingParams {
        temperature,
        seed: 1 << (11 * i),
        ..SamplingParams::default()
    });
    let mut all = Vec::new();
    for base in plain {
        let penalized = SamplingParams { repetition_penalty: 1.4, frequency_penalty: 0.3, ..base.clone() };
        let bias = vec![(TokenId(2), 0.7), (TokenId(300), -9.0), (TokenId(330), 50.0)];
        all.push(SamplingParams { logit_bias: bias.clone(), ..base.clone() });
        all.push(SamplingParams { top_p: 0.8, min_p: 0.01, ..base.clone() });
        all.push(SamplingParams { top_k: 5, logit_bias: bias, ..penalized.clone() });
        all.extend([base, penalized]);
    }
    all
}

fn history() -> TokenHistory {
    let mut history = TokenHistory::new(4);
    history.extend(&[5, 330, 5, 0, 77, 330, 5, 6, 16, 2, 5, 299, 6].map(TokenId));
    history
}

fn batch() -> Batch<'static> {
    Batch {
        tokens: &[TokenId(5), TokenId(6), TokenId(330), TokenId(0), TokenId(77), TokenId(6)],
        positions: &[0, 1, 2, 3, 4, 5],
        sequence_of_row: &[0; N_ROWS],
        block_tables: &[&[BlockId(0)]],
        output_rows: &[0, 1, 2, 3, 4, 5],
        copies: &[],
    }
}

/// The history is cut before the token, as if nothing were proposed.
fn by_definition(logits: &mut Logits<'_>, n_usable: usize, choice: &Choice<'_>) -> Candidate {
    let Choice { position, sampling, .. } = *choice;
    let mut history = choice.history.clone();
    history.truncate(position as usize);
    let row = logits.row(choice.row).expect("a row")[..n_usable].to_vec();
    let best = local_best(sampling, &history, position, 0, &mut row.clone());
    assert_eq!(best.token, sample_row(sampling, &history, position, &mut row.clone()).token);
    best
}

#[test]
fn the_best_tokens_are_those_of_the_definition() {
    let (mut decoder, params, history) = (decoder(), params(), history());
    let mut logits = decoder.forward(&batch(), &mut Solo::new()).expect("runs");
    let choice = |(i, sampling)| Choice {
        row: i * 5 % N_ROWS,
        position: 7 + i as u32 % 9,
        sampling,
        history: &history,
    };
    let choices: Vec<Choice<'_>> = params.iter().enumerate().map(choice).collect();
    for n_usable in [331, 300, 17, 1] {
        let mut best = Vec::new();
        logits.best(n_usable, &choices, &mut best).expect("rows");
        let expected: Vec<Candidate> =
            choices.iter().map(|choice| by_definition(&mut logits, n_usable, choice)).collect();
        assert_eq!(best, expected, "{n_usable} tokens");
    }
}
