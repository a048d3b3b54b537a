//! Tokens that were sampled with proposals have the model's distribution, whoever proposes: positions and everything
//! between them, on a model whose probabilities are enumerated. A verifier that is biased is noticed.

use std::{collections::BTreeMap, convert::Infallible};

use paceline_domain::{SampledToken, SamplingParams, TokenId};
use paceline_sampling::{TokenHistory, sample_row, verify};

const N_VOCAB: usize = 5;
/// Tokens of a text, and proposals before each pass.
const LENGTH: usize = 4;
const N_PROPOSED: usize = 3;
const N_SEEDS: u64 = 60_000;
const TEMPERATURE: f32 = 0.9;

/// Logits after a text.
fn logits(tokens: &[TokenId]) -> Vec<f32> {
    let recent = tokens.iter().rev().take(2).fold(7u64, |mixed, token| mixed * 31 + u64::from(token.0) + 1);
    let logit = |token: u64| {
        let mixed = (recent * 1_000 + token).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1u64 << 24) as f32 * 3.0
    };
    (0..N_VOCAB as u64).map(logit).collect()
}

fn probabilities(tokens: &[TokenId]) -> Vec<f64> {
    let weights = logits(tokens).into_iter().map(|logit| f64::from(logit / TEMPERATURE).exp());
    let weights: Vec<f64> = weights.collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

fn sampling(seed: u64) -> SamplingParams {
    SamplingParams { temperature: TEMPERATURE, seed, ..SamplingParams::default() }
}

/// What the target samples after these tokens.
fn sampled(seed: u64, tokens: &[TokenId]) -> TokenId {
    let mut history = TokenHistory::new(0);
    history.extend(tokens);
    sample_row(&sampling(seed), &history, tokens.len() as u32, &mut logits(tokens)).token
}

/// Proposes what may follow.
type Draft = fn(u64, &[TokenId]) -> TokenId;

/// Another model with the target's noise, as the draft service does.
fn coupled(seed: u64, tokens: &[TokenId]) -> TokenId {
    let mut history = TokenHistory::new(0);
    history.extend(tokens);
    let mut other = logits(tokens);
    other.iter_mut().enumerate().for_each(|(i, logit)| *logit += (i % 3) as f32 * 0.4);
    sample_row(&sampling(seed), &history, tokens.len() as u32, &mut other).token
}

/// The likeliest token.
fn likeliest(_seed: u64, tokens: &[TokenId]) -> TokenId {
    let logits = logits(tokens);
    let best = (0..N_VOCAB).max_by(|one, other| logits[*one].total_cmp(&logits[*other]));
    TokenId(best.expect("there are tokens") as u32)
}

/// Always the same.
fn constant(_seed: u64, _tokens: &[TokenId]) -> TokenId {
    TokenId(2)
}

/// Tokens of one pass after a text, given its proposals.
type Verifier = fn(u64, &[TokenId], &[TokenId]) -> Vec<TokenId>;

fn sample_and_match(seed: u64, tokens: &[TokenId], proposals: &[TokenId]) -> Vec<TokenId> {
    let verified = verify(proposals, |row| {
        let token = sampled(seed, &[tokens, &proposals[..row]].concat());
        Ok::<_, Infallible>(SampledToken { token, logprob: None, top_logprobs: Vec::new() })
    });
    let Ok(verified) = verified;
    verified.into_iter().map(|sampled| sampled.token).collect()
}

/// Biased: believes what the target thinks likely.
fn accepts_the_likely(seed: u64, tokens: &[TokenId], proposals: &[TokenId]) -> Vec<TokenId> {
    let mut passed = tokens.to_vec();
    for proposal in proposals {
        if probabilities(&passed)[proposal.idx()] < 0.4 {
            break;
        }
        passed.push(*proposal);
    }
    passed.push(sampled(seed, &passed));
    passed.split_off(tokens.len())
}

/// Biased: the correction comes from the row after the one that differs.
fn corrects_from_the_wrong_row(seed: u64, tokens: &[TokenId], proposals: &[TokenId]) -> Vec<TokenId> {
    let mut right = sample_and_match(seed, tokens, proposals);
    let n_accepted = right.len() - 1;
    if n_accepted < proposals.len() {
        right[n_accepted] = sampled(seed, &[tokens, &proposals[..=n_accepted]].concat());
    }
    right
}

fn text(seed: u64, draft: Draft, verifier: Verifier) -> Vec<TokenId> {
    let mut tokens = Vec::new();
    while tokens.len() < LENGTH {
        let mut ahead = tokens.clone();
        (0..N_PROPOSED).for_each(|_| ahead.push(draft(seed, &ahead)));
        tokens.extend(verifier(seed, &tokens, &ahead[tokens.len()..]));
    }
    tokens.truncate(LENGTH);
    tokens
}

/// All texts with their probabilities.
fn enumerated() -> BTreeMap<Vec<TokenId>, f64> {
    let mut texts = BTreeMap::from([(Vec::new(), 1.0)]);
    for _ in 0..LENGTH {
        let longer = texts.iter().flat_map(|(tokens, before): (&Vec<TokenId>, &f64)| {
            let next = probabilities(tokens).into_iter().enumerate();
            next.map(move |(i, p)| ([tokens.as_slice(), &[TokenId(i as u32)]].concat(), before * p))
        });
        texts = longer.collect();
    }
    texts
}

/// Pearson's statistic of what `of` sees in texts, beside the most it may be: a little above its 99.99 % point (Wilson
/// and Hilferty 1931). Cells that are seldom met count together.
fn chi_square(texts: &[Vec<TokenId>], of: impl Fn(&[TokenId]) -> Vec<TokenId>) -> (f64, f64) {
    let (mut expected, mut counts) = (BTreeMap::new(), BTreeMap::new());
    for (text, probability) in enumerated() {
        *expected.entry(of(&text)).or_insert(0.0) += probability * texts.len() as f64;
    }
    texts.iter().for_each(|text| *counts.entry(of(text)).or_insert(0.0) += 1.0);
    let mut cells: BTreeMap<Option<Vec<TokenId>>, (f64, f64)> = BTreeMap::new();
    for (cell, expected) in expected {
        let count = counts.get(&cell).copied().unwrap_or(0.0);
        let sums = cells.entry((expected >= 8.0).then_some(cell)).or_default();
        *sums = (sums.0 + expected, sums.1 + count);
    }
    let statistic = cells.values().map(|(expected, count)| (count - expected).powi(2) / expected).sum();
    let freedom = (cells.len() - 1) as f64;
    (statistic, freedom * (1.0 - 2.0 / (9.0 * freedom) + 3.8 * (2.0 / (9.0 * freedom)).sqrt()).powi(3))
}

/// By how much the worst of all positions, pairs and whole texts exceeds what is allowed.
fn worst(draft: Draft, verifier: Verifier) -> f64 {
    let texts: Vec<_> = (0..N_SEEDS).map(|seed| text(seed, draft, verifier)).collect();
    let mut worst = 0.0f64;
    let mut look = |(statistic, limit): (f64, f64)| worst = worst.max(statistic / limit);
    for first in 0..LENGTH {
        look(chi_square(&texts, |text| vec![text[first]]));
        for second in first + 1..LENGTH {
            look(chi_square(&texts, |text| vec![text[first], text[second]]));
        }
    }
    look(chi_square(&texts, <[TokenId]>::to_vec));
    worst
}

#[test]
fn whoever_proposes_the_distribution_is_the_models() {
    let drafts: [(&str, Draft); 3] = [("coupled", coupled), ("likeliest", likeliest), ("constant", constant)];
    for (name, draft) in drafts {
        let worst = worst(draft, sample_and_match);
        assert!(worst < 1.0, "{name}: {worst} times what is allowed");
    }
}

#[test]
fn a_biased_verifier_is_noticed() {
    let biased: [(&str, Verifier); 2] =
        [("likely", accepts_the_likely), ("wrong row", corrects_from_the_wrong_row)];
    for (name, verifier) in biased {
        let worst = worst(likeliest, verifier);
        assert!(worst > 3.0, "{name}: only {worst} times what is allowed");
    }
}

#[test]
fn a_seed_gives_the_same_text_whoever_proposes() {
    for seed in 0..2_000 {
        let plain = text(seed, constant, |seed, tokens, _| vec![sampled(seed, tokens)]);
        for draft in [coupled as Draft, likeliest, constant] {
            assert_eq!(text(seed, draft, sample_and_match), plain, "seed {seed}");
        }
    }
}
