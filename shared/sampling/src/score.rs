//! Log probabilities of a row: of one token and of the likeliest ones. It chooses nothing.

use paceline_domain::{ScoredToken, TokenId, TokenLogprob};

use crate::filter::{below, row_max, top};
use crate::math;

/// A row with what its log probabilities are made of.
pub(crate) struct Logprobs<'a> {
    logits: &'a [f32],
    max: f32,
    log_sum: f32,
}

impl<'a> Logprobs<'a> {
    pub(crate) fn new(logits: &'a [f32]) -> Self {
        let max = row_max(logits);
        let log_sum = math::ln(math::sum_lanes(logits.len(), |i| math::exp(below(logits[i], max))) as f32);
        Self { logits, max, log_sum }
    }

    fn of_logit(&self, logit: f32) -> f32 {
        if logit == f32::NEG_INFINITY { f32::NEG_INFINITY } else { below(logit, self.max) - self.log_sum }
    }

    /// Nothing for a token beyond the row.
    pub(crate) fn of(&self, token: TokenId) -> Option<f32> {
        self.logits.get(token.idx()).map(|logit| self.of_logit(*logit))
    }

    /// The likeliest tokens, likeliest first.
    pub(crate) fn top(&self, n: usize) -> Vec<TokenLogprob> {
        let of = |(logit, token)| TokenLogprob { token: TokenId(token), logprob: self.of_logit(logit) };
        top(self.logits, n).into_iter().map(of).collect()
    }
}

/// What a whole row says of a token that is there already, and the `n_top` likeliest in its place: the model's own
/// probabilities, without penalties or temperature. A token beyond the row is impossible.
pub fn score_row(logits: &[f32], token: TokenId, n_top: u32) -> ScoredToken {
    let row = Logprobs::new(logits);
    ScoredToken { logprob: row.of(token).unwrap_or(f32::NEG_INFINITY), top_logprobs: row.top(n_top as usize) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{history::TokenHistory, sample::sample_row};
    use paceline_domain::SamplingParams;

    #[test]
    fn scores_are_logarithms_of_the_softmax() {
        let logits = [1.0f32, -2.0, 0.5, 3.0, 3.0];
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        for (token, logit) in (0..).zip(logits) {
            let scored = score_row(&logits, TokenId(token), 2);
            let expected = f64::from(logit) - sum.ln();
            assert!((f64::from(scored.logprob) - expected).abs() < 1e-6, "{token}: {scored:?}");
            assert_eq!(scored.top_logprobs.iter().map(|top| top.token.0).collect::<Vec<_>>(), [3, 4]);
        }
        let impossible = score_row(&logits, TokenId(5), 0);
        assert_eq!(impossible, ScoredToken { logprob: f32::NEG_INFINITY, top_logprobs: Vec::new() });
    }

    /// A token that is chosen without penalties has the log probability it is scored with.
    #[test]
    fn what_is_sampled_and_what_is_scored_have_the_same_bits() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1013) as f32 * 0.01 - 3.0).collect();
        let params = SamplingParams { n_logprobs: Some(5), seed: 4, ..SamplingParams::default() };
        for position in 0..20 {
            let sampled = sample_row(&params, &TokenHistory::new(0), position, &mut logits.clone());
            let scored = score_row(&logits, sampled.token, 5);
            assert_eq!((sampled.logprob, sampled.top_logprobs), (Some(scored.logprob), scored.top_logprobs));
        }
    }
}
