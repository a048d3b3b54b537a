//! What is expected of a sequence that nothing was drafted for yet: what came of those before it. It counts sequences, not
//! tokens, because good ones have many more drafted tokens than poor ones. Pure.

use crate::acceptance::{odds, odds_times};

/// Share of drafted tokens that is thought to be accepted before anything was drafted, and in the long run.
const PRIOR: f64 = 0.75;
/// What the last sequence weighs beside all before it.
const RATE: f64 = 0.4;
/// Tokens that are as good as what is expected of a sequence, while it goes on and when it has ended: who was given up soon
/// was given up because its tokens were poor.
const WEIGHT: f64 = 6.0;
const WEIGHT_AT_END: f64 = 2.0;
/// How fast the prior comes back each time that a sequence is passed over: one is tried again later.
const FORGETTING: f64 = 0.004;

/// Sequences that were drafted for, as they will be met again.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Newcomers {
    acceptance: f64,
}

/// Drafted tokens whose turn came, because all before them were accepted, and those that were accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tried {
    /// Tokens whose turn came.
    pub n_tokens: u64,
    /// Of them.
    pub n_accepted: u64,
}

impl Default for Newcomers {
    fn default() -> Self {
        Self { acceptance: PRIOR }
    }
}

impl Newcomers {
    /// Probability that a drafted token is accepted when all before it were.
    pub fn acceptance(&self) -> f64 {
        self.acceptance
    }

    /// Nothing is drafted for a sequence, for a while, because that seems not worth it.
    pub fn passed_over(&mut self) {
        self.acceptance += FORGETTING * (PRIOR - self.acceptance);
    }

    /// A sequence ended.
    pub fn ended(&mut self, tried: Tried) {
        if tried.n_tokens == 0 {
            return;
        }
        let (n_tokens, n_accepted) = (tried.n_tokens as f64, tried.n_accepted as f64);
        // A few tokens say little.
        let seen = (n_accepted + WEIGHT_AT_END * self.acceptance) / (n_tokens + WEIGHT_AT_END);
        self.acceptance += RATE * (seen - self.acceptance);
    }

    /// Estimates for one sequence, which are of all tokens of all sequences at first (`general`, of a typical token), with
    /// what is expected of it as far as it has not shown otherwise.
    pub fn applied(&self, estimates: Vec<f64>, general: f64, tried: Tried) -> Vec<f64> {
        let weight = WEIGHT / (WEIGHT + tried.n_tokens as f64);
        let factor = (odds(self.acceptance) / odds(general)).powf(weight);
        estimates.into_iter().map(|estimate| odds_times(estimate, factor)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(n_tokens: u64, n_accepted: u64) -> Tried {
        Tried { n_tokens, n_accepted }
    }

    #[test]
    fn sequences_count_however_many_tokens_they_had() {
        let mut newcomers = Newcomers::default();
        // Every other text is poor, and given up after ten tokens.
        for _ in 0..10 {
            newcomers.ended(tried(200, 170));
            newcomers.ended(tried(10, 3));
        }
        let expected = newcomers.acceptance();
        assert!((0.5..0.7).contains(&expected), "{expected}");
        (0..3).for_each(|_| newcomers.ended(tried(200, 180)));
        assert!(newcomers.acceptance() > 0.8, "the last ones say most: {}", newcomers.acceptance());
    }

    #[test]
    fn who_is_not_tried_is_tried_again_later() {
        let mut newcomers = Newcomers::default();
        (0..9).for_each(|_| newcomers.ended(tried(20, 2)));
        let low = newcomers.acceptance();
        (0..20).for_each(|_| newcomers.passed_over());
        assert!(low < 0.3 && newcomers.acceptance() < low + 0.1, "not soon");
        newcomers.ended(Tried::default());
        (0..1_000).for_each(|_| newcomers.passed_over());
        assert!(newcomers.acceptance() > 0.7);
    }

    #[test]
    fn what_a_sequence_shows_soon_counts_more_than_the_others() {
        let newcomers = Newcomers { acceptance: 0.5 };
        let applied = |n| newcomers.applied(vec![0.9], 0.9, tried(n, n))[0];
        assert!((applied(0) - 0.5).abs() < 1e-9 && applied(6) > 0.7 && applied(100) > 0.88);
    }
}
