//! How many tokens a draft model that shares the target's machine drafts before a step. The two take turns: while one
//! computes the other waits, because together they would be slower than one after the other. It drafts nothing.

use crate::controller::{Promise, StepCost, StepLoad, promise};

/// Most tokens that are drafted in one turn.
pub const MOST_IN_TURN: usize = 8;

/// What a turn is decided by.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    /// For each sequence that is drafted for, the probability of each token, given that all before it are accepted.
    pub drafted: &'a [Vec<f64>],
    /// The same of what there is to propose for the other sequences.
    pub others: &'a [Vec<f64>],
    /// The step without proposals.
    pub load: StepLoad,
    /// Milliseconds that pass before the first token.
    pub before_ms: f64,
    /// Milliseconds in which the draft model gives a token to every sequence.
    pub token_ms: f64,
}

impl Turn<'_> {
    /// The number of tokens that promises the highest rate, drafting them included, and what it promises.
    pub fn best(&self, cost: &dyn StepCost) -> Option<(usize, Promise)> {
        let longest = self.drafted.iter().map(Vec::len).max().unwrap_or(0).min(MOST_IN_TURN);
        let turns = (1..=longest).filter_map(|n| {
            let drafted = self.drafted.iter().map(|tokens| tokens[..n.min(tokens.len())].to_vec());
            let offers: Vec<_> = drafted.chain(self.others.iter().cloned()).collect();
            let before_ms = self.before_ms + self.token_ms * n as f64;
            Some((n, promise(&offers, self.load, (before_ms, f64::INFINITY), cost)?))
        });
        turns.max_by(|one, other| one.1.rate().total_cmp(&other.1.rate()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Up to four rows cost as much as one.
    fn cost(n_rows: usize) -> f64 {
        if n_rows <= 4 { 30.0 } else { 48.0 }
    }

    fn best(drafted: &[Vec<f64>], others: &[Vec<f64>], token_ms: f64) -> (usize, f64) {
        let n = drafted.len() + others.len();
        let load = StepLoad { n_rows: n, n_tokens: n, n_spare_rows: 99 };
        let turn = Turn { drafted, others, load, before_ms: 0.0, token_ms };
        turn.best(&cost)
            .map_or((0, 0.0), |(n_tokens, promise)| (n_tokens, promise.rate() * cost(n) / n as f64))
    }

    #[test]
    fn as_many_are_drafted_as_pay() {
        let (n, gain) = best(&[vec![0.9; 6]], &[], 10.0);
        assert!(n == 3 && gain > 1.6, "{n} tokens, {gain}");
        let (n, gain) = best(&[vec![0.97; 9]], &[], 2.0);
        assert!(n == MOST_IN_TURN && gain > 3.0, "over the cliff: {n} tokens, {gain}");
        let (_, gain) = best(&[vec![0.3; 6]], &[], 10.0);
        assert!(gain < 1.0, "{gain}");
        let (_, gain) = best(&vec![vec![0.9; 6]; 4], &[], 40.0);
        assert!(gain < 1.0, "four sequences fill the cheap rows alone: {gain}");
        assert_eq!(best(&[], &[vec![0.9]], 1.0).0, 0, "nobody to draft for");
    }

    #[test]
    fn what_others_propose_shares_the_rows() {
        let alone = best(&[vec![0.9; 6], vec![]], &[], 10.0);
        let with_other = best(&[vec![0.9; 6]], &[vec![0.95; 2]], 10.0);
        assert!(with_other.1 > alone.1 && with_other.0 <= alone.0, "{with_other:?} {alone:?}");
    }
}
