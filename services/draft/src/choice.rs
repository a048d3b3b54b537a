//! The token that a draft expects after a row of logits: chosen as the target does, with the same function, parameters,
//! history and noise, from the tokens that the draft's head is for. Those it is not for count as impossible.

use paceline_domain::{SampledToken, SamplingParams, TokenId};
use paceline_model::HeadTokens;
use paceline_sampling::{TokenHistory, has_filter, local_best, plain_best, sample_row};

/// A token the model expects.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Drafted {
    /// The token.
    pub token: TokenId,
    /// The model's probability of it, before temperature and filters.
    pub confidence: f32,
}

/// Chooses; its only state is a buffer.
pub struct Chooser {
    head: HeadTokens,
    row: Vec<f32>,
}

impl Chooser {
    /// From the tokens of a head.
    pub fn new(head: HeadTokens) -> Self {
        Self { head, row: Vec::new() }
    }

    /// The token after a row, of which columns beyond those of the head are padding; `position` is that of the token.
    pub fn choose(
        &mut self,
        sampling: &SamplingParams,
        history: &TokenHistory,
        position: u32,
        logits: &[f32],
    ) -> Drafted {
        let (first, others) = logits[..self.head.len()].split_at(self.head.n_first());
        self.row.clear();
        self.row.extend_from_slice(first);
        if has_filter(sampling) {
            // Filters look at the whole row: a long one, for the sake of a few tokens at its end.
            for (token, logit) in self.head.others().iter().zip(others) {
                self.row.resize(token.idx(), f32::NEG_INFINITY);
                self.row.push(*logit);
            }
            return drafted(&sample_row(sampling, history, position, &mut self.row));
        }
        let best = drafted(&sample_row(sampling, history, position, &mut self.row));
        self.with_others(best, (sampling, history, position), others)
    }

    /// The best of the first tokens, or of the others if one beats it.
    fn with_others(
        &self,
        of_first: Drafted,
        (sampling, history, position): (&SamplingParams, &TokenHistory, u32),
        others: &[f32],
    ) -> Drafted {
        let Some(logit) = self.row.get(of_first.token.idx()) else { return of_first };
        let SamplingParams { seed, temperature, .. } = *sampling;
        let first = of_first.token.0;
        let mut best = (plain_best(seed, position, temperature, first, &[*logit]), 1.0);
        let mut sum = 1.0;
        for (token, other) in self.head.others().iter().zip(others) {
            let mut other = [*other];
            let candidate = local_best(sampling, history, position, token.0, &mut other);
            // How much likelier than the best of the first tokens.
            let times = (other[0] - logit).exp();
            sum += of_first.confidence * times;
            if candidate.value > best.0.value {
                best = (candidate, times);
            }
        }
        let confidence = of_first.confidence * best.1 / sum;
        let confidence = if confidence.is_finite() { confidence.clamp(0.0, 1.0) } else { 0.0 };
        Drafted { token: best.0.token, confidence }
    }
}

fn drafted(sampled: &SampledToken) -> Drafted {
    let probability = sampled.logprob.map_or(0.0, f32::exp);
    Drafted { token: sampled.token, confidence: probability.clamp(0.0, 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N_VOCAB: usize = 200;

    /// Some numbers from -4 to 4.
    fn logits(seed: u32) -> Vec<f32> {
        let number = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 40_503) >> 9) % 8_000;
        (0..N_VOCAB as u32).map(|i| number(i) as f32 / 1_000.0 - 4.0).collect()
    }

    fn samplings(seed: u64) -> [SamplingParams; 5] {
        let plain = SamplingParams { n_logprobs: Some(0), seed, ..SamplingParams::greedy() };
        let noisy = SamplingParams { temperature: 1.5, ..plain.clone() };
        [
            SamplingParams { top_k: 7, top_p: 0.8, ..noisy.clone() },
            SamplingParams { repetition_penalty: 1.6, frequency_penalty: 0.4, ..noisy.clone() },
            SamplingParams {
                logit_bias: vec![(TokenId(3), 3.0), (TokenId(170), -2.0), (TokenId(180), 4.0)],
                ..plain.clone()
            },
            plain,
            noisy,
        ]
    }

    #[test]
    fn tokens_that_the_head_is_not_for_are_impossible_and_nothing_else_changes() {
        let mut history = TokenHistory::new(3);
        history.extend(&[5, 180, 60, 170, 61, 180].map(TokenId));
        let heads = [
            HeadTokens::first(N_VOCAB),
            HeadTokens::first(100),
            HeadTokens::with(60, &[170, 180, 199].map(TokenId)),
            HeadTokens::with(1, &[61, 180].map(TokenId)),
        ];
        let mut n_others = 0;
        for (head, seed) in heads.iter().flat_map(|head| (0..60).map(move |seed| (head, seed))) {
            let row = logits(seed);
            let columns: Vec<f32> = (0..head.len()).map(|column| row[head.token(column).idx()]).collect();
            let mut possible = vec![f32::NEG_INFINITY; N_VOCAB];
            (0..head.len()).for_each(|column| possible[head.token(column).idx()] = columns[column]);
            let mut chooser = Chooser::new(head.clone());
            for sampling in samplings(seed.into()) {
                let expected = sample_row(&sampling, &history, 6, &mut possible.clone());
                let found = chooser.choose(&sampling, &history, 6, &columns);
                assert_eq!(found.token, expected.token, "{head:?} {sampling:?}");
                let probability = expected.logprob.map_or(0.0, f32::exp);
                assert!((found.confidence - probability).abs() < 1e-4, "{found:?}, {probability}");
                n_others += usize::from(found.token.idx() >= head.n_first());
            }
        }
        assert!(n_others > 20, "only {n_others} of the others were chosen");
    }

    #[test]
    fn a_row_of_nothing_has_no_confidence() {
        let mut chooser = Chooser::new(HeadTokens::with(2, &[TokenId(5)]));
        let [.., greedy, _] = samplings(1);
        let nothing = [f32::NEG_INFINITY; 3];
        let Drafted { token, confidence } = chooser.choose(&greedy, &TokenHistory::new(0), 1, &nothing);
        assert!(token.idx() < 6 && (0.0..=1.0).contains(&confidence));
    }
}
