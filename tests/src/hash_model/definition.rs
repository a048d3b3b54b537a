//! What the hash model says by its definition: no blocks, no batches, no services.

use paceline_domain::{SamplingParams, ScoredToken, TokenId};
use paceline_sampling::{TokenHistory, allow_only, forbid, sample_row, score_row};

use crate::{constrained::matcher, random::scramble};

/// Layers of the double: what an entry of the second one holds depends on all entries of the first one before it.
pub(super) const N_LAYERS: usize = 2;
/// Span of its logits: wide enough for seeds and penalties to matter, and for greedy choices to be clear.
const LOGIT_SPAN: f32 = 8.0;

/// A request, as far as its tokens depend on it.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// What it continues.
    pub prompt: &'a [TokenId],
    /// How tokens are chosen.
    pub sampling: &'a SamplingParams,
    /// The first of these ends it; it is included.
    pub end_tokens: &'a [TokenId],
    /// Before so many tokens none of them can be chosen.
    pub min_tokens: usize,
    /// Most tokens.
    pub max_tokens: usize,
    /// What its text must match.
    pub regex: Option<&'a str>,
}

/// The tokens of a request that runs alone, by the definition of the double: no blocks, no batches, no services.
/// `n_usable` is the vocabulary's size.
pub fn tokens_alone(n_usable: usize, request: &Request<'_>) -> Vec<TokenId> {
    let Request { prompt, sampling, end_tokens, min_tokens, max_tokens, regex } = *request;
    let mut matcher = regex.map(matcher);
    let mut chain = Chain::default();
    let mut history = TokenHistory::new(prompt.len());
    history.extend(prompt);
    let mut state = 0;
    prompt.iter().for_each(|token| state = chain.push(*token));
    let mut tokens = Vec::new();
    while tokens.len() < max_tokens {
        let mut row: Vec<f32> = (0..n_usable).map(|token| logit(state, token)).collect();
        if tokens.len() < min_tokens {
            forbid(end_tokens, 0, &mut row);
        }
        if let Some(matcher) = &mut matcher {
            allow_only(&matcher.masks(&[]).expect("something is allowed")[0], 0, &mut row);
        }
        let token = sample_row(sampling, &history, history.len() as u32, &mut row).token;
        tokens.push(token);
        if let Some(matcher) = &mut matcher {
            matcher.commit(token).expect("an allowed token");
        }
        if end_tokens.contains(&token) {
            break;
        }
        history.push(token);
        state = chain.push(token);
    }
    tokens
}

/// What the double thinks of each token of a prompt but the first, and of the `n_top` likeliest in its place.
pub fn scores_alone(n_usable: usize, prompt: &[TokenId], n_top: u32) -> Vec<ScoredToken> {
    let mut chain = Chain::default();
    let mut score = |pair: &[TokenId]| {
        let state = chain.push(pair[0]);
        let row: Vec<f32> = (0..n_usable).map(|token| logit(state, token)).collect();
        score_row(&row, pair[1], n_top)
    };
    prompt.windows(2).map(&mut score).collect()
}

/// The next `n` tokens of a request without constraints, of which `history` has the prompt and what came after it.
pub fn tokens_after(
    n_usable: usize,
    history: &TokenHistory,
    sampling: &SamplingParams,
    n: usize,
) -> Vec<TokenId> {
    let (mut chain, mut history, mut state) = (Chain::default(), history.clone(), 0);
    history.tokens().iter().for_each(|token| state = chain.push(*token));
    let mut next = || {
        let mut row: Vec<f32> = (0..n_usable).map(|token| logit(state, token)).collect();
        let token = sample_row(sampling, &history, history.len() as u32, &mut row).token;
        history.push(token);
        state = chain.push(token);
        token
    };
    (0..n).map(|_| next()).collect()
}

/// A sequence as folds over its entries, one for each layer.
#[derive(Default)]
struct Chain {
    position: u32,
    folds: [u64; N_LAYERS],
}

impl Chain {
    fn push(&mut self, token: TokenId) -> u64 {
        let mut state = embed(token);
        for (layer, fold) in self.folds.iter_mut().enumerate() {
            *fold = absorb(*fold, entry(layer, self.position, state));
            state = attended(state, *fold);
        }
        self.position += 1;
        state
    }
}

pub(super) fn embed(token: TokenId) -> u64 {
    scramble(u64::from(token.0) + 1)
}

/// What the KV memory holds of a position.
pub(super) fn entry(layer: usize, position: u32, state: u64) -> u64 {
    scramble(state ^ scramble((layer as u64) << 32 | u64::from(position)))
}

/// One more entry of a sequence, in order.
pub(super) fn absorb(fold: u64, entry: u64) -> u64 {
    (fold ^ entry).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31)
}

pub(super) fn attended(state: u64, fold: u64) -> u64 {
    scramble(state.rotate_left(17) ^ fold)
}

pub(super) fn logit(state: u64, token: usize) -> f32 {
    let bits = scramble(state ^ scramble(!(token as u64)));
    (bits >> 40) as f32 / (1u64 << 24) as f32 * LOGIT_SPAN
}
