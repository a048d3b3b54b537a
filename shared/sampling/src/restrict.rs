//! Tokens that must not be chosen, whatever their logits: those lose all probability, also in what is reported. Penalties
//! and bias do not bring them back.

use paceline_domain::{TokenId, TokenMask};

/// Takes these tokens out of a slice of a row; `logits[i]` is token `vocab_start + i`.
pub fn forbid(tokens: &[TokenId], vocab_start: u32, logits: &mut [f32]) {
    for token in tokens {
        let logit = token.0.checked_sub(vocab_start).and_then(|i| logits.get_mut(i as usize));
        if let Some(logit) = logit {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Takes all tokens but those of the mask out of a slice of a row; `logits[i]` is token `vocab_start + i`.
pub fn allow_only(mask: &TokenMask, vocab_start: u32, logits: &mut [f32]) {
    if mask.is_open() {
        return;
    }
    for (token, logit) in (vocab_start..).zip(logits) {
        if !mask.allows(TokenId(token)) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

#[cfg(test)]
mod tests {
    use paceline_domain::SamplingParams;

    use super::*;
    use crate::{TokenHistory, sample_row};

    #[test]
    fn what_is_forbidden_in_a_slice_is_forbidden_in_its_part_of_the_row() {
        let tokens = [0, 3, 7, 9].map(TokenId);
        let row: Vec<f32> = (0..8).map(|i| i as f32).collect();
        let mut whole = row.clone();
        forbid(&tokens, 0, &mut whole);
        let open: Vec<usize> = (0..8).filter(|i| whole[*i].is_finite()).collect();
        assert_eq!(open, [1, 2, 4, 5, 6]);
        for (start, end) in [(0, 4), (4, 8), (3, 3), (7, 8)] {
            let mut slice = row[start..end].to_vec();
            forbid(&tokens, start as u32, &mut slice);
            assert_eq!(slice, whole[start..end]);
        }
    }

    #[test]
    fn only_what_a_mask_allows_is_left_of_a_slice() {
        let mask = TokenMask::of_words(vec![0b1010_0110]);
        let mut slice = [1.0; 6];
        allow_only(&mask, 2, &mut slice);
        assert_eq!(slice.map(f32::is_finite), [true, false, false, true, false, true]);
        let mut beyond = [1.0; 2];
        allow_only(&mask, 31, &mut beyond);
        assert_eq!(beyond.map(f32::is_finite), [false; 2]);
        allow_only(&TokenMask::default(), 0, &mut slice[..1]);
        assert_eq!(slice[0], 1.0);
    }

    #[test]
    fn neither_bias_nor_penalty_brings_a_token_back() {
        let params = SamplingParams {
            logit_bias: vec![(TokenId(1), 100.0)],
            repetition_penalty: 0.01,
            presence_penalty: -100.0,
            n_logprobs: Some(2),
            ..SamplingParams::default()
        };
        let mut history = TokenHistory::new(0);
        history.push(TokenId(1));
        let mut row = vec![0.0, 5.0, 1.0];
        forbid(&[TokenId(1)], 0, &mut row);
        let sampled = sample_row(&params, &history, 1, &mut row);
        assert!(
            sampled.token != TokenId(1) && sampled.top_logprobs.iter().all(|top| top.token != TokenId(1))
        );
    }
}
