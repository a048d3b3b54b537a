//! The choice of tokens by the GPU backend after a whole pass on the emulated device: what the crate `paceline-sampling`
//! chooses from the same logits on the host, to the last bit, alone and in a group.

#[path = "../../model/tests/support/mod.rs"]
mod model;
mod support;

use std::sync::Arc;

use model::threads::Threads;
use paceline_checkpoint::Checkpoint;
use paceline_collectives::Collective;
use paceline_cuda::backend::{GpuBackend, GraphMode};
use paceline_domain::{BlockId, KvType, SamplingParams, TokenId, WeightType};
use paceline_kernels::{Pinning, ThreadPool};
use paceline_model::logits::Choice;
use paceline_model::synthetic::{Synthetic, tiny_config};
use paceline_model::{Batch, Capacity, Decoder, LoadSpec, Logits, ModelConfig, SplitPlan};
use paceline_sampling::{Candidate, TokenHistory, has_filter, local_best, merge, sample_row};
use support::{arrays::Random, emulated::Emulated};

const N_ROWS: usize = 5;
/// So many that a history can have more tokens than a launch adjusts, and flat rows keep more than the kernel ranks.
const N_VOCAB: usize = 12_000;
/// Tokens from here on are padding.
const N_USABLE: usize = N_VOCAB - 70;

/// Runs a pass of [`N_ROWS`] rows on every rank, and there what `each` does with its logits.
fn on_ranks<T: Send>(n_ranks: usize, each: impl Fn(&mut Logits<'_>) -> T + Sync) -> Vec<T> {
    let config = ModelConfig {
        n_layers: 1,
        n_embd: 64,
        n_heads: 2,
        n_kv_heads: 2,
        head_dim: 32,
        n_ff: 128,
        n_vocab: N_VOCAB,
        ..tiny_config()
    };
    let synthetic = Synthetic { config, seed: 9, weight_type: |_, _| WeightType::BF16 };
    let checkpoint = Checkpoint::from_gguf_bytes(synthetic.to_gguf().expect("bytes")).expect("a checkpoint");
    let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
    let checkpoint = Arc::new(checkpoint);
    let plan = SplitPlan::new(&config, n_ranks).expect("a plan");
    let run = |mut collective: Threads| {
        let spec = LoadSpec {
            checkpoint: &checkpoint,
            config: &config,
            plan: &plan,
            rank: collective.rank(),
            quantize: None,
            capacity: Capacity {
                kv_type: KvType::F16,
                n_kv_blocks: 1,
                max_rows: N_ROWS,
                max_output_rows: N_ROWS,
            },
            progress: &|_| (),
        };
        let pool = ThreadPool::new(1, Pinning::None);
        let backend = GpuBackend::load(Box::new(Emulated::new()), &spec, &pool, GraphMode::Auto);
        let mut decoder = Decoder::new(Box::new(backend.expect("loads")), &spec);
        let batch = Batch {
            tokens: &[7, 1_900, 11, 11_000, 3].map(TokenId),
            positions: &[0, 1, 2, 3, 4],
            sequence_of_row: &[0; N_ROWS],
            block_tables: &[&[BlockId(0)]],
            output_rows: &[0, 1, 2, 3, 4],
            copies: &[],
        };
        each(&mut decoder.forward(&batch, &mut collective).expect("runs"))
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Threads::group(n_ranks)
            .into_iter()
            .map(|collective| {
                let run = &run;
                scope.spawn(move || run(collective))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
    })
}

/// Parameters without a pattern; every second has no filter, every third no penalty.
fn random_params(random: &mut Random, with_filters: bool) -> SamplingParams {
    let mut params = SamplingParams {
        temperature: [0.0, 0.4, 1.0, 6.0][random.below(4)],
        seed: random.word(),
        ..SamplingParams::default()
    };
    if with_filters && random.below(2) == 0 {
        params.top_k = [0, 0, 1, 30, 900, 5_000][random.below(6)];
        params.top_p = [1.0, 0.9, 0.3, 0.999][random.below(4)];
        params.min_p = [0.0, 0.0, 0.02, 0.5][random.below(4)];
    }
    if random.below(3) > 0 {
        params.repetition_penalty = [1.0, 1.2, 0.7][random.below(3)];
        params.presence_penalty = [0.0, 0.8, -0.8][random.below(3)];
        params.frequency_penalty = [0.0, 0.11, -0.3][random.below(3)];
    }
    let n_biases = [0, 0, 3, 40][random.below(4)];
    let mut biased: Vec<usize> = (0..n_biases).map(|_| random.below(N_VOCAB)).collect();
    biased.sort_unstable();
    biased.dedup();
    params.logit_bias =
        biased.into_iter().map(|token| (TokenId(token as u32), 4.0 * random.number())).collect();
    params
}

/// A history with this many different tokens, some of them twice, then once more as proposals.
fn history(n_tokens: usize) -> TokenHistory {
    let mut history = TokenHistory::new(n_tokens / 2);
    let token = |i: usize| TokenId((i * 7_919 % N_VOCAB) as u32);
    (0..n_tokens).chain(n_tokens / 3..n_tokens / 2).for_each(|i| history.push(token(i)));
    history
}

/// What is chosen on the host, from a copy of the row and a history without what follows.
fn on_host(logits: &mut Logits<'_>, choice: &Choice<'_>) -> Candidate {
    let columns = logits.columns(N_USABLE);
    let mut row = logits.row(choice.row).expect("a row")[..columns.n_usable].to_vec();
    let mut history = choice.history.clone();
    history.truncate(choice.position as usize);
    local_best(choice.sampling, &history, choice.position, columns.first_token.0, &mut row)
}

fn bits(candidate: &Candidate) -> (u32, TokenId) {
    (candidate.value.to_bits(), candidate.token)
}

/// The device's candidates, which must be the host's; the logits must be as they were.
fn check(logits: &mut Logits<'_>, choices: &[Choice<'_>]) -> Vec<Candidate> {
    let rows = |logits: &mut Logits<'_>| -> Vec<Vec<u32>> {
        let row = |row| logits.row(row).expect("a row").iter().map(|logit| logit.to_bits()).collect();
        (0..N_ROWS).map(row).collect()
    };
    let before = rows(logits);
    let mut best = Vec::new();
    logits.best(N_USABLE, choices, &mut best).expect("rows");
    assert_eq!(best.len(), choices.len());
    for (choice, found) in choices.iter().zip(&best) {
        let expected = on_host(logits, choice);
        assert_eq!(bits(found), bits(&expected), "row {} of {:?}", choice.row, choice.sampling);
    }
    assert!(before == rows(logits), "the logits are not as before");
    best
}

/// Choices of rows in no order, several of a row.
fn choices<'a>(params: &'a [SamplingParams], histories: &'a [TokenHistory]) -> Vec<Choice<'a>> {
    let choice = |(i, sampling): (usize, &'a SamplingParams)| {
        let history = &histories[i % histories.len()];
        // Up to two tokens are proposals that this row does not see.
        Choice { row: i * 3 % 7 % N_ROWS, position: (history.len() - i % 3) as u32, sampling, history }
    };
    params.iter().enumerate().map(choice).collect()
}

fn params_of(seed: u64, n: usize, with_filters: bool) -> Vec<SamplingParams> {
    let mut random = Random(seed);
    (0..n).map(|_| random_params(&mut random, with_filters)).collect()
}

#[test]
fn one_rank_chooses_as_the_host_whatever_the_parameters() {
    let (params, histories) = (params_of(1, 60, true), [20, 400].map(history));
    assert!(params.iter().filter(|params| has_filter(params)).count() > 10);
    let choices = choices(&params, &histories);
    on_ranks(1, |logits| {
        for (choice, best) in choices.iter().zip(check(logits, &choices)) {
            let mut row = logits.row(choice.row).expect("a row")[..N_USABLE].to_vec();
            let sampled = sample_row(choice.sampling, choice.history, choice.position, &mut row);
            assert_eq!(sampled.token, merge(&[best]));
        }
    });
}

#[test]
fn what_has_no_room_or_cannot_be_ranked_is_chosen_all_the_same() {
    // A launch has room for nine thousand adjustments: rows of four thousand go one or two at a time, the last one
    // is beyond it alone.
    let histories = [4_000, 4_001, 11_500].map(history);
    let penalized = SamplingParams { repetition_penalty: 1.3, temperature: 0.6, ..SamplingParams::default() };
    let flat = SamplingParams { temperature: 100.0, top_p: 0.99, ..penalized.clone() };
    let many = SamplingParams { top_k: 3_000, ..penalized.clone() };
    let params = [&penalized, &flat, &many, &penalized, &many, &flat, &flat].map(SamplingParams::clone);
    on_ranks(1, |logits| check(logits, &choices(&params, &histories)));
}

#[test]
fn ranks_choose_from_their_parts_what_the_host_chooses_from_the_row() {
    let (params, histories) = (params_of(2, 40, false), [50, 300].map(history));
    let choices = choices(&params, &histories);
    let of_ranks = on_ranks(2, |logits| {
        let best = check(logits, &choices);
        let rows: Vec<Vec<f32>> = (0..N_ROWS).map(|row| logits.row(row).expect("a row").to_vec()).collect();
        (rows, best)
    });
    assert!(of_ranks.iter().all(|(rows, _)| rows[0].len() > N_VOCAB / 3), "both have a part");
    for (i, choice) in choices.iter().enumerate() {
        let mut row: Vec<f32> =
            of_ranks.iter().flat_map(|(rows, _)| &rows[choice.row]).copied().take(N_USABLE).collect();
        let sampled = sample_row(choice.sampling, choice.history, choice.position, &mut row);
        let candidates: Vec<Candidate> = of_ranks.iter().map(|(_, best)| best[i]).collect();
        assert_eq!(merge(&candidates), sampled.token, "{:?}", choice.sampling);
    }
}
