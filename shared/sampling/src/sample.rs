//! The token of a row: for a whole row, or for slices of the vocabulary whose best tokens are merged.

use crate::adjust::{adjust, has_penalty};
use crate::filter::{Cut, cut, row_max};
use crate::history::TokenHistory;
use crate::noise::{GROUP, MAX_NOISE, gumbel_group};
use crate::score::Logprobs;
use paceline_domain::{SampledToken, SamplingParams, TokenId};

/// The best token of a slice of the vocabulary.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Candidate {
    /// Its logit with noise.
    pub value: f32,
    /// The token.
    pub token: TokenId,
}

impl Candidate {
    /// Eight bytes, little-endian, to send to rank 0.
    pub fn to_bytes(self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&self.value.to_le_bytes());
        bytes[4..].copy_from_slice(&self.token.0.to_le_bytes());
        bytes
    }

    /// The inverse of [`Candidate::to_bytes`].
    pub fn from_bytes(bytes: [u8; 8]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self { value: f32::from_le_bytes([a, b, c, d]), token: TokenId(u32::from_le_bytes([e, f, g, h])) }
    }

    /// Larger value, or equal value and lower id.
    fn beats(&self, other: &Self) -> bool {
        self.value > other.value || (self.value == other.value && self.token < other.token)
    }
}

/// Whether the row must be whole before a token can be chosen: for filters and for log probabilities.
pub fn needs_full_row(params: &SamplingParams) -> bool {
    params.n_logprobs.is_some() || has_filter(params)
}

/// Whether some tokens may be kept from being chosen. Temperature 0 makes filters idle.
pub fn has_filter(params: &SamplingParams) -> bool {
    (params.top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0) && params.temperature != 0.0
}

/// The best of the tokens `vocab_start ..`, whose logits are `logits` (changed by penalties and bias). `position` is
/// that of the token being sampled: the number of tokens before it; of a longer history the rest does not count.
/// With filters `logits` must be the whole row.
///
/// # Panics
/// When there are filters and `vocab_start` is not 0.
pub fn local_best(
    params: &SamplingParams,
    history: &TokenHistory,
    position: u32,
    vocab_start: u32,
    logits: &mut [f32],
) -> Candidate {
    assert!(vocab_start == 0 || !has_filter(params), "invariant: filters were asked of a slice");
    adjust(params, history, position, vocab_start, logits);
    let noise = |group| gumbel_group(params.seed, position, group);
    best(params.temperature, cut(params, logits), vocab_start, logits, noise)
}

/// Whether a row's token depends on nothing but its logits and its noise: then [`plain_best`] finds it.
pub fn is_plain(params: &SamplingParams) -> bool {
    !needs_full_row(params) && !has_penalty(params) && params.logit_bias.is_empty()
}

/// [`local_best`] of a plain row: the best of the tokens `vocab_start ..`, larger value and then lower id; -inf and
/// `vocab_start` when no logit is a number above -inf.
pub fn plain_best(seed: u64, position: u32, temperature: f32, vocab_start: u32, logits: &[f32]) -> Candidate {
    best(temperature, Cut::ALL, vocab_start, logits, |group| gumbel_group(seed, position, group))
}

/// The token among the best of every slice: largest value, then lowest id.
///
/// # Panics
/// When there is no candidate.
pub fn merge(candidates: &[Candidate]) -> TokenId {
    let lowest = candidates.iter().map(|candidate| candidate.token).min();
    let lowest = lowest.expect("invariant: a vocabulary has a slice");
    let none = Candidate { value: f32::NEG_INFINITY, token: lowest };
    candidates.iter().fold(none, |best, next| if next.beats(&best) { *next } else { best }).token
}

/// The token of a whole row, with its log probability when asked for. `logits` is changed by penalties and bias;
/// `position` as in [`local_best`].
pub fn sample_row(
    params: &SamplingParams,
    history: &TokenHistory,
    position: u32,
    logits: &mut [f32],
) -> SampledToken {
    sample_row_with(params, history, position, logits, |group| gumbel_group(params.seed, position, group))
}

/// The token of a whole row with its log probability, and the two best tokens: what would be chosen without the best one
/// comes second, -inf where nothing would. `logits` and `position` as in [`sample_row`].
pub fn sample_two(
    params: &SamplingParams,
    history: &TokenHistory,
    position: u32,
    logits: &mut [f32],
) -> (SampledToken, [Candidate; 2]) {
    adjust(params, history, position, 0, logits);
    let (temperature, cut) = (params.temperature, cut(params, logits));
    let noise = |group| gumbel_group(params.seed, position, group);
    let first = best(temperature, cut, 0, logits, noise);
    let logprob = Logprobs::new(logits).of(first.token);
    let logit = std::mem::replace(&mut logits[first.token.idx()], f32::NEG_INFINITY);
    let second = best(temperature, cut, 0, logits, noise);
    logits[first.token.idx()] = logit;
    (SampledToken { token: first.token, logprob, top_logprobs: Vec::new() }, [first, second])
}

fn sample_row_with(
    params: &SamplingParams,
    history: &TokenHistory,
    position: u32,
    logits: &mut [f32],
    noise: impl Fn(u32) -> [f32; GROUP],
) -> SampledToken {
    adjust(params, history, position, 0, logits);
    let token = best(params.temperature, cut(params, logits), 0, logits, noise).token;
    let Some(n_logprobs) = params.n_logprobs else {
        return SampledToken { token, logprob: None, top_logprobs: Vec::new() };
    };
    let row = Logprobs::new(logits);
    SampledToken { token, logprob: row.of(token), top_logprobs: row.top(n_logprobs as usize) }
}

/// argmax of `logit + temperature * noise` over kept tokens; the lowest id when all are -inf. Noise is only made
/// where it can matter: groups whose best logit with the largest noise there is stays below the best so far are
/// passed over, which changes nothing.
fn best(
    temperature: f32,
    cut: Cut,
    vocab_start: u32,
    logits: &[f32],
    noise: impl Fn(u32) -> [f32; GROUP],
) -> Candidate {
    let mut best = Candidate { value: f32::NEG_INFINITY, token: TokenId(vocab_start) };
    let reach = temperature * MAX_NOISE;
    let mut visit = |token: u32, logits: &[f32]| {
        let max = row_max(logits);
        if max + reach < best.value || max < cut.logit {
            return;
        }
        let noise = if temperature == 0.0 { [0.0; GROUP] } else { noise(token / GROUP as u32) };
        let offset = token as usize % GROUP;
        for (i, logit) in logits.iter().enumerate() {
            let token = token + i as u32;
            let next = Candidate { value: logit + temperature * noise[offset + i], token: TokenId(token) };
            if next.beats(&best) && cut.keeps(*logit, token) {
                best = next;
            }
        }
    };
    // The first group of a slice may begin inside a group of the vocabulary.
    let n_head = (vocab_start.next_multiple_of(GROUP as u32) - vocab_start) as usize;
    let (head, body) = logits.split_at(n_head.min(logits.len()));
    visit(vocab_start, head);
    for (i, group) in body.chunks(GROUP).enumerate() {
        visit(vocab_start + (n_head + i * GROUP) as u32, group);
    }
    best
}

#[cfg(test)]
#[path = "sample_tests.rs"]
mod tests;
