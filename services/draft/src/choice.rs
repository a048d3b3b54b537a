//! The token that a draft expects after a row of logits: chosen as the target does, with the same function, parameters,
//! history and noise, from the tokens that the draft's head is for. Those it is not for count as impossible.

use paceline_domain::{SamplingParams, SecondGuess, TokenId};
use paceline_model::HeadTokens;
use paceline_sampling::{Candidate, TokenHistory, has_filter, local_best, sample::sample_two};

/// A token the model expects.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Drafted {
    /// The token.
    pub token: TokenId,
    /// The model's probability of it, before temperature and filters.
    pub confidence: f32,
    /// What it would expect without that one, if anything.
    pub second: Option<SecondGuess>,
}

/// Chooses; its only state is a buffer.
pub struct Chooser {
    head: HeadTokens,
    row: Vec<f32>,
}

/// A token that may be chosen.
#[derive(Clone, Copy)]
struct Ranked {
    candidate: Candidate,
    /// How much likelier it is than the best of the first tokens.
    times: f32,
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
        let is_whole = has_filter(sampling);
        if is_whole {
            // Filters look at the whole row: a long one, for the sake of a few tokens at its end.
            for (token, logit) in self.head.others().iter().zip(others) {
                self.row.resize(token.idx(), f32::NEG_INFINITY);
                self.row.push(*logit);
            }
        }
        let (sampled, best) = sample_two(sampling, history, position, &mut self.row);
        let probability = sampled.logprob.map_or(0.0, f32::exp);
        let best_logit = self.row[best[0].token.idx()];
        let times = |candidate: Candidate| (self.row[candidate.token.idx()] - best_logit).exp();
        let mut best = best.map(|candidate| Ranked { candidate, times: times(candidate) });
        best[0].times = 1.0;
        let mut sum = 1.0;
        if !is_whole {
            for (token, other) in self.head.others().iter().zip(others) {
                let mut other = [*other];
                let candidate = local_best(sampling, history, position, token.0, &mut other);
                let other = Ranked { candidate, times: (other[0] - best_logit).exp() };
                sum += probability * other.times;
                take(&mut best, other);
            }
        }
        let confidence = |ranked: Ranked| {
            let confidence = probability * ranked.times / sum;
            if confidence.is_finite() { confidence.clamp(0.0, 1.0) } else { 0.0 }
        };
        let [first, second] = best;
        let is_possible = second.candidate.value > f32::NEG_INFINITY;
        let guess = SecondGuess { token: second.candidate.token, confidence: confidence(second) };
        Drafted {
            token: first.candidate.token,
            confidence: confidence(first),
            second: is_possible.then_some(guess),
        }
    }
}

/// Puts a candidate in its place among the two best.
fn take(best: &mut [Ranked; 2], other: Ranked) {
    let value = other.candidate.value;
    if value > best[0].candidate.value {
        *best = [other, best[0]];
    } else if value > best[1].candidate.value {
        best[1] = other;
    }
}

#[cfg(test)]
mod tests {
    use paceline_sampling::sample_row;

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
                check_second(&found, (&sampling, &history), possible.clone());
            }
        }
        assert!(n_others > 20, "only {n_others} of the others were chosen");
    }

    /// The second guess is what would be chosen if the first were impossible. (Filters look at what is likely with it.)
    fn check_second(
        found: &Drafted,
        (sampling, history): (&SamplingParams, &TokenHistory),
        mut row: Vec<f32>,
    ) {
        let before = sample_row(sampling, history, 6, &mut row.clone()).logprob.map_or(0.0, f32::exp);
        row[found.token.idx()] = f32::NEG_INFINITY;
        if has_filter(sampling) {
            assert_ne!(found.second.map(|second| second.token), Some(found.token));
            return;
        }
        let expected = sample_row(sampling, history, 6, &mut row);
        let is_possible = row[expected.token.idx()] > f32::NEG_INFINITY;
        assert_eq!(
            found.second.map(|second| second.token),
            is_possible.then_some(expected.token),
            "{sampling:?}"
        );
        let probability = expected.logprob.map_or(0.0, f32::exp) * (1.0 - before);
        let confidence = found.second.map_or(0.0, |second| second.confidence);
        assert!(!is_possible || (confidence - probability).abs() < 1e-4, "{found:?}, {probability}");
    }

    #[test]
    fn a_row_of_nothing_has_no_confidence() {
        let mut chooser = Chooser::new(HeadTokens::with(2, &[TokenId(5)]));
        let [.., greedy, _] = samplings(1);
        let nothing = [f32::NEG_INFINITY; 3];
        let Drafted { token, confidence, second } =
            chooser.choose(&greedy, &TokenHistory::new(0), 1, &nothing);
        assert!(token.idx() < 6 && (0.0..=1.0).contains(&confidence) && second.is_none());
    }
}
