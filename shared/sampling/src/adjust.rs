//! Penalties and bias, applied to the logits of any range of the vocabulary. Each token's new logit depends on its
//! own logit and counts only.

use crate::history::TokenHistory;
use paceline_domain::SamplingParams;

/// Applies, in this order: repetition penalty over prompt and output (Keskar et al. 2019, as in the Transformers
/// library: positive logits are divided, negative ones multiplied), presence and frequency penalties over the
/// output (as the OpenAI API defines them), bias. NaN becomes -inf. `logits[i]` is token `vocab_start + i`; what the
/// history has from `position` on does not count.
pub(crate) fn adjust(
    params: &SamplingParams,
    history: &TokenHistory,
    position: u32,
    vocab_start: u32,
    logits: &mut [f32],
) {
    if has_penalty(params) {
        for (i, count) in history.counts_before(position, vocab_start, logits.len()) {
            let logit = logits[i];
            let repeated = if logit < 0.0 {
                logit * params.repetition_penalty
            } else {
                logit / params.repetition_penalty
            };
            let presence = if count.n_output > 0 { params.presence_penalty } else { 0.0 };
            logits[i] = repeated - presence - params.frequency_penalty * count.n_output as f32;
        }
    }
    let first = params.logit_bias.partition_point(|(token, _)| token.0 < vocab_start);
    for (token, bias) in &params.logit_bias[first..] {
        match logits.get_mut((token.0 - vocab_start) as usize) {
            Some(logit) => *logit += bias,
            None => break,
        }
    }
    logits.iter_mut().filter(|logit| logit.is_nan()).for_each(|logit| *logit = f32::NEG_INFINITY);
}

/// Whether the tokens before a row change its logits.
pub fn has_penalty(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_domain::TokenId;

    fn history(n_prompt: usize, tokens: &[u32]) -> TokenHistory {
        let mut history = TokenHistory::new(n_prompt);
        tokens.iter().for_each(|token| history.push(TokenId(*token)));
        history
    }

    #[test]
    fn each_penalty_as_it_is_defined() {
        let history = history(2, &[0, 1, 2, 2, 1]);
        let with = |change: &dyn Fn(&mut SamplingParams)| {
            let mut params = SamplingParams::default();
            change(&mut params);
            let mut logits = [2.0, -2.0, 4.0, 1.0];
            adjust(&params, &history, 5, 0, &mut logits);
            logits
        };
        assert_eq!(with(&|params| params.repetition_penalty = 2.0), [1.0, -4.0, 2.0, 1.0]);
        assert_eq!(with(&|params| params.presence_penalty = 0.5), [2.0, -2.5, 3.5, 1.0]);
        assert_eq!(with(&|params| params.frequency_penalty = 0.5), [2.0, -2.5, 3.0, 1.0]);
        assert_eq!(with(&|params| params.logit_bias = vec![(TokenId(1), 9.0)]), [2.0, 7.0, 4.0, 1.0]);
    }

    #[test]
    fn a_slice_is_adjusted_as_its_part_of_the_row() {
        let params = SamplingParams {
            repetition_penalty: 1.3,
            frequency_penalty: 0.2,
            logit_bias: vec![(TokenId(0), 1.0), (TokenId(5), -3.0), (TokenId(9), 2.0)],
            ..SamplingParams::default()
        };
        let history = history(1, &[9, 5, 0, 5, 3]);
        let row: Vec<f32> = (0..10).map(|i| i as f32 - 4.5).collect();
        let mut whole = row.clone();
        adjust(&params, &history, 5, 0, &mut whole);
        for (start, end) in [(0, 4), (4, 10), (5, 6), (7, 7), (9, 10)] {
            let mut slice = row[start..end].to_vec();
            adjust(&params, &history, 5, start as u32, &mut slice);
            assert_eq!(slice, whole[start..end]);
        }
    }

    #[test]
    fn not_a_number_is_never_chosen() {
        let mut logits = [f32::NAN, 0.0, f32::INFINITY, f32::NEG_INFINITY];
        adjust(&SamplingParams::default(), &TokenHistory::new(0), 0, 0, &mut logits);
        assert_eq!(logits, [f32::NEG_INFINITY, 0.0, f32::INFINITY, f32::NEG_INFINITY]);
    }
}
