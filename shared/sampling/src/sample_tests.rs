//! Tests of sampling: splits of the vocabulary, distribution over seeds, odd rows. Not part of the library.

use super::*;
use proptest::prelude::*;
use std::convert::Infallible;

fn rows(n: std::ops::Range<usize>) -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![
        6 => -10f32..10.0,
        3 => (-4i32..4).prop_map(|step| step as f32),
        1 => Just(f32::NEG_INFINITY),
        1 => Just(f32::NAN),
        1 => -1e38f32..1e38,
    ];
    prop::collection::vec(logit, n)
}

fn params() -> impl Strategy<Value = SamplingParams> {
    let temperature = prop_oneof![Just(0.0f32), Just(1.0f32), 1e-6f32..3.0, Just(100.0f32)];
    let bias = prop::collection::btree_map(0u32..80, -5f32..5.0, 0..4);
    (temperature, 0.5f32..2.0, -1f32..1.0, -1f32..1.0, bias, any::<u64>()).prop_map(
        |(temperature, repetition_penalty, presence_penalty, frequency_penalty, bias, seed)| SamplingParams {
            temperature,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logit_bias: bias.into_iter().map(|(token, bias)| (TokenId(token), bias)).collect(),
            seed,
            ..SamplingParams::default()
        },
    )
}

fn history() -> impl Strategy<Value = TokenHistory> {
    (0usize..8, prop::collection::vec(0u32..80, 0..16)).prop_map(|(n_prompt, tokens)| {
        let mut history = TokenHistory::new(n_prompt);
        tokens.into_iter().for_each(|token| history.push(TokenId(token)));
        history
    })
}

/// argmax over every token with noise made one by one.
fn plain(params: &SamplingParams, history: &TokenHistory, position: u32, logits: &[f32]) -> TokenId {
    let mut row = logits.to_vec();
    adjust(params, history, position, 0, &mut row);
    let cut = cut(params, &row);
    let value = |token: u32| {
        row[token as usize] + params.temperature * crate::noise::gumbel(params.seed, position, token)
    };
    let kept = (0..row.len() as u32).filter(|token| cut.keeps(row[*token as usize], *token));
    let best =
        kept.fold(
            (f32::NEG_INFINITY, 0),
            |best, token| {
                if value(token) > best.0 { (value(token), token) } else { best }
            },
        );
    TokenId(best.1)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_split_of_the_vocabulary_gives_the_same_token(
        logits in rows(1..300),
        params in params(),
        history in history(),
        position in any::<u32>(),
        cuts in prop::collection::vec(0usize..300, 0..6),
    ) {
        let whole = sample_row(&params, &history, position, &mut logits.clone()).token;
        prop_assert_eq!(whole, plain(&params, &history, position, &logits));
        let mut edges: Vec<usize> = cuts.into_iter().map(|cut| cut.min(logits.len())).collect();
        edges.extend([0, logits.len()]);
        edges.sort_unstable();
        let candidates: Vec<Candidate> = edges
            .windows(2)
            .map(|edge| {
                let mut slice = logits[edge[0]..edge[1]].to_vec();
                let best = local_best(&params, &history, position, edge[0] as u32, &mut slice);
                Candidate::from_bytes(best.to_bytes())
            })
            .collect();
        prop_assert_eq!(merge(&candidates), whole);
    }

    #[test]
    fn filters_agree_with_the_plain_way_and_hide_what_they_cut(
        logits in rows(2..300),
        params in params(),
        history in history(),
        top_k in 0u32..20,
        top_p in 0.05f32..1.0,
        fall in 0.0f32..50.0,
    ) {
        let params = SamplingParams { top_k, top_p, ..params };
        let token = sample_row(&params, &history, 9, &mut logits.clone()).token;
        prop_assert_eq!(token, plain(&params, &history, 9, &logits));
        prop_assert_eq!(token, local_best(&params, &history, 9, 0, &mut logits.clone()).token);
        // With top-k alone, lowering the logits it removed changes nothing. Without penalties, so that the
        // lowered logits stay lowered.
        let params = SamplingParams { temperature: params.temperature, seed: params.seed, top_k: top_k + 1, ..SamplingParams::default() };
        let mut row = logits;
        let token = sample_row(&params, &history, 9, &mut row).token;
        let kept = cut(&SamplingParams { temperature: 1.0, ..params.clone() }, &row);
        for id in 0..row.len() {
            if !kept.keeps(row[id], id as u32) {
                row[id] -= fall;
            }
        }
        prop_assert_eq!(sample_row(&params, &history, 9, &mut row).token, token);
    }

    #[test]
    fn log_probabilities_are_those_of_the_row_before_temperature(
        logits in prop::collection::vec(-20f32..20.0, 1..300),
        params in params(),
        history in history(),
        n_logprobs in 0u32..=20,
    ) {
        let params = SamplingParams { n_logprobs: Some(n_logprobs), ..params };
        let mut row = logits;
        let sampled = sample_row(&params, &history, 3, &mut row);
        let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        let exact = |token: TokenId| f64::from(row[token.idx()]) - sum.ln();
        let close = |token: TokenId, logprob: f32| (f64::from(logprob) - exact(token)).abs() < 2e-5;
        prop_assert!(close(sampled.token, sampled.logprob.unwrap()));
        prop_assert_eq!(sampled.top_logprobs.len(), row.len().min(n_logprobs as usize));
        prop_assert!(sampled.top_logprobs.iter().all(|top| close(top.token, top.logprob)));
        prop_assert!(sampled.top_logprobs.is_sorted_by(|left, right| left.logprob >= right.logprob));
    }

    #[test]
    fn proposals_never_change_a_token(
        row in prop::collection::vec(-3f32..3.0, 8),
        seed in any::<u64>(),
        proposals in prop::collection::vec(0u32..8, 0..5),
    ) {
        // A toy model: the logits of a row depend on the token before it.
        let params = SamplingParams { seed, presence_penalty: 0.5, ..SamplingParams::default() };
        let logits = |history: &TokenHistory| -> Vec<f32> {
            let last = history.tokens().last().map_or(0, |token| token.idx());
            (0..8).map(|i| row[(i + last) % 8]).collect()
        };
        let sample = |history: &TokenHistory| {
            sample_row(&params, history, history.len() as u32, &mut logits(history))
        };
        let mut plain = TokenHistory::new(0);
        for _ in 0..6 {
            let token = sample(&plain).token;
            plain.push(token);
        }
        let mut history = TokenHistory::new(0);
        let proposals: Vec<TokenId> = proposals.into_iter().map(TokenId).collect();
        let sampled = crate::verify(&proposals, |row| {
            if row > 0 {
                history.push(proposals[row - 1]);
            }
            Ok::<_, Infallible>(sample(&history))
        });
        let tokens: Vec<TokenId> = sampled.unwrap().iter().map(|sampled| sampled.token).collect();
        prop_assert_eq!(&tokens[..], &plain.tokens()[..tokens.len()]);
    }
}

/// Pearson's statistic of sampled tokens against exact probabilities, with its degrees of freedom.
fn chi_square(
    params: &SamplingParams,
    logits: &[f32],
    noise: impl Fn(u64, u32) -> [f32; GROUP],
) -> (f64, usize) {
    const N_SAMPLES: u64 = 40_000;
    let cut = cut(params, logits);
    let max = f64::from(row_max(logits));
    let weight = |token: usize| {
        let is_kept = cut.keeps(logits[token], token as u32);
        if is_kept { ((f64::from(logits[token]) - max) / f64::from(params.temperature)).exp() } else { 0.0 }
    };
    let mass: f64 = (0..logits.len()).map(weight).sum();
    let mut counts = vec![0u64; logits.len()];
    for seed in 0..N_SAMPLES {
        let history = TokenHistory::new(0);
        let sampled = sample_row_with(params, &history, 11, &mut logits.to_vec(), |group| noise(seed, group));
        counts[sampled.token.idx()] += 1;
    }
    let mut statistic = 0.0;
    let mut n_kept = 0;
    for token in 0..logits.len() {
        let expected = N_SAMPLES as f64 * weight(token) / mass;
        if expected == 0.0 {
            assert_eq!(counts[token], 0, "a token outside the filters");
            continue;
        }
        n_kept += 1;
        statistic += (counts[token] as f64 - expected).powi(2) / expected;
    }
    (statistic, n_kept - 1)
}

/// A little above the 99.99 % point of the distribution (Wilson and Hilferty 1931).
fn limit(freedom: usize) -> f64 {
    let k = freedom as f64;
    k * (1.0 - 2.0 / (9.0 * k) + 3.8 * (2.0 / (9.0 * k)).sqrt()).powi(3)
}

fn cases() -> Vec<SamplingParams> {
    let base = SamplingParams::default();
    vec![
        base.clone(),
        SamplingParams { temperature: 0.6, ..base.clone() },
        SamplingParams { temperature: 1.7, ..base.clone() },
        SamplingParams { top_k: 5, ..base.clone() },
        SamplingParams { top_p: 0.8, ..base.clone() },
        SamplingParams { min_p: 0.2, ..base.clone() },
        SamplingParams { temperature: 1.3, top_k: 9, top_p: 0.9, min_p: 0.05, ..base },
    ]
}

fn small_row() -> Vec<f32> {
    (0..20).map(|token| ((token * 7) % 20) as f32 * 0.2 - 2.0).collect()
}

#[test]
fn frequencies_are_the_probabilities() {
    for params in cases() {
        // Seeds at one position, and positions under one seed: both must be random.
        for noise in [
            (|seed, group| gumbel_group(seed, 11, group)) as fn(u64, u32) -> [f32; GROUP],
            |position, group| gumbel_group(5, position as u32, group),
        ] {
            let (statistic, freedom) = chi_square(&params, &small_row(), noise);
            assert!(statistic < limit(freedom), "{statistic} at {freedom} degrees of freedom: {params:?}");
        }
    }
}

#[test]
fn the_frequency_test_sees_a_bias_of_a_few_percent() {
    let biased: [fn(u64, u32) -> [f32; GROUP]; 2] = [
        |seed, group| gumbel_group(seed, 11, group).map(|noise| noise * 1.05),
        |seed, group| {
            let mut noise = gumbel_group(seed, 11, group);
            noise[3] += 0.15;
            noise
        },
    ];
    for noise in biased {
        let (statistic, freedom) = chi_square(&SamplingParams::default(), &small_row(), noise);
        assert!(statistic > limit(freedom), "{statistic} at {freedom} degrees of freedom");
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_the_largest() {
    let params = SamplingParams { top_k: 3, top_p: 0.1, ..SamplingParams::greedy() };
    assert!(!needs_full_row(&params));
    let history = TokenHistory::new(0);
    for (logits, expected) in [
        (vec![0.0, 3.0, 3.0, 1.0], 1),
        (vec![-0.0, 0.0], 0),
        (vec![f32::NAN, -5.0], 1),
        (vec![f32::NAN, f32::NEG_INFINITY], 0),
        (vec![1.0, f32::INFINITY, f32::INFINITY], 1),
        (vec![f32::NEG_INFINITY; 40], 0),
    ] {
        assert_eq!(sample_row(&params, &history, 0, &mut logits.clone()).token.0, expected, "{logits:?}");
        let random = SamplingParams { n_logprobs: Some(3), top_p: 0.5, ..SamplingParams::default() };
        let sampled = sample_row(&random, &history, 0, &mut logits.clone());
        assert!(sampled.logprob.is_some_and(|logprob| !logprob.is_nan()), "{sampled:?}");
    }
}

#[test]
fn an_empty_row_and_an_empty_slice_are_harmless() {
    let history = TokenHistory::new(0);
    let params = SamplingParams { top_k: 2, n_logprobs: Some(2), ..SamplingParams::default() };
    let sampled = sample_row(&params, &history, 0, &mut []);
    assert_eq!(sampled, SampledToken { token: TokenId(0), logprob: None, top_logprobs: Vec::new() });
    let params = SamplingParams::default();
    let empty = local_best(&params, &history, 0, 7, &mut []);
    let other = local_best(&params, &history, 0, 7, &mut [-1.0]);
    assert_eq!(merge(&[empty, other]), TokenId(7));
}

#[test]
fn the_whole_row_is_needed_for_filters_and_log_probabilities() {
    let base = SamplingParams::default();
    assert!(!needs_full_row(&base));
    for params in [
        SamplingParams { top_k: 1, ..base.clone() },
        SamplingParams { top_p: 0.9, ..base.clone() },
        SamplingParams { min_p: 0.1, ..base.clone() },
        SamplingParams { n_logprobs: Some(0), ..base },
    ] {
        assert!(needs_full_row(&params), "{params:?}");
    }
}

#[test]
fn merging_ignores_what_is_not_a_number() {
    let of = |value, token| Candidate { value, token: TokenId(token) };
    assert_eq!(merge(&[of(f32::NAN, 1), of(-3.0, 5), of(-3.0, 4)]), TokenId(4));
    assert_eq!(merge(&[of(f32::NEG_INFINITY, 2), of(f32::NEG_INFINITY, 1)]), TokenId(1));
}
