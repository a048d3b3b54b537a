//! How often proposals are accepted: measured by source, position and confidence, forgetting slowly, with priors where
//! little was seen. Estimates are of one token, given that all before it were accepted.

use paceline_domain::{SecondGuess, TokenId};

use crate::proposal::{MAX_POSITIONS, ProposedToken, Source};

/// Upper edges of the confidence buckets; fine near 1, where most tokens are.
const EDGES: [f32; 7] = [0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99];
const N_BUCKETS: usize = EDGES.len() + 1;
/// Weight of what is expected before anything was seen, in observations.
const PRIOR_WEIGHT: f64 = 8.0;
/// The same for one sequence beside all others.
const SEQUENCE_PRIOR_WEIGHT: f64 = 6.0;
/// What is left of old observations after a new one: a memory of about 200.
const DECAY: f64 = 0.995;
/// The same for one sequence, a memory of about 30.
const SEQUENCE_DECAY: f64 = 0.97;
/// Estimates never say never, nor always.
const BOUNDS: (f64, f64) = (0.01, 0.995);

/// Observations of one kind, old ones counted less.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
struct Cell {
    tried: f64,
    accepted: f64,
}

impl Cell {
    fn observe(&mut self, is_accepted: f64) {
        self.tried = self.tried * DECAY + 1.0;
        self.accepted = self.accepted * DECAY + is_accepted;
    }

    fn estimate(&self, prior: f64) -> f64 {
        (self.accepted + PRIOR_WEIGHT * prior) / (self.tried + PRIOR_WEIGHT)
    }
}

/// Observations of one source.
#[derive(Clone, Debug, Default)]
struct SourceTable {
    all: Cell,
    by_bucket: [Cell; N_BUCKETS],
    by_position: [[Cell; N_BUCKETS]; MAX_POSITIONS],
}

impl SourceTable {
    /// Of a token of this confidence, of which nothing but `thought` is known at first, where the mean of all is `mean`.
    fn estimate(&self, position: usize, confidence: f32, (thought, mean): (f64, f64)) -> f64 {
        let bucket = bucket(confidence);
        // A source that turns out better or worse than was thought moves what is thought of unseen buckets.
        let prior = odds_times(thought, odds(self.all.estimate(mean)) / odds(mean));
        let of_bucket = self.by_bucket[bucket].estimate(prior);
        let cell = &self.by_position[position.min(MAX_POSITIONS - 1)][bucket];
        cell.estimate(of_bucket).clamp(BOUNDS.0, BOUNDS.1)
    }

    fn observe(&mut self, position: usize, confidence: f32, is_accepted: bool) {
        let (bucket, is_accepted) = (bucket(confidence), f64::from(u8::from(is_accepted)));
        self.all.observe(is_accepted);
        self.by_bucket[bucket].observe(is_accepted);
        self.by_position[position.min(MAX_POSITIONS - 1)][bucket].observe(is_accepted);
    }
}

/// What was observed of all sequences.
#[derive(Clone, Debug, Default)]
pub struct AcceptanceTable {
    sources: [SourceTable; Source::ALL.len()],
    /// Of second guesses.
    seconds: SourceTable,
}

/// How one sequence differs from all: each source's acceptances and rejections beside the expected ones.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct SequenceAcceptance {
    sources: [Odds; Source::ALL.len()],
}

#[derive(Clone, Copy, PartialEq, Debug, Default)]
struct Odds {
    accepted: f64,
    rejected: f64,
    expected_accepted: f64,
    expected_rejected: f64,
}

impl AcceptanceTable {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Probability that a token at this position (from 0) is accepted when all before it were.
    pub fn estimate(&self, position: usize, proposed: &ProposedToken) -> f64 {
        let table = &self.sources[proposed.source.idx()];
        table.estimate(position, proposed.confidence, (prior(proposed), PRIOR_MEAN))
    }

    /// Probability that a second guess is what the target samples at this position when all tokens before were accepted.
    pub fn estimate_second(&self, position: usize, second: &SecondGuess) -> f64 {
        let thought = f64::from(known(second.confidence)) * SECOND_PRIOR.1;
        self.seconds.estimate(position, second.confidence, (thought, SECOND_PRIOR.0))
    }

    /// Takes in what became of a proposal: its first `n_accepted` tokens were accepted, the next one, if there is one, was
    /// not, and `correction` came in its place. What follows says nothing.
    pub fn observe(&mut self, proposal: &[ProposedToken], n_accepted: usize, correction: Option<TokenId>) {
        for (position, proposed) in proposal.iter().take(n_accepted + 1).enumerate() {
            let is_accepted = position < n_accepted;
            self.sources[proposed.source.idx()].observe(position, proposed.confidence, is_accepted);
            if let Some(second) = proposed.second {
                let is_right = !is_accepted && correction == Some(second.token);
                self.seconds.observe(position, second.confidence, is_right);
            }
        }
    }
}

impl SequenceAcceptance {
    /// As [`AcceptanceTable::estimate`], for this sequence.
    pub fn estimate(&self, table: &AcceptanceTable, position: usize, proposed: &ProposedToken) -> f64 {
        let ratio = self.sources[proposed.source.idx()].ratio();
        odds_times(table.estimate(position, proposed), ratio).clamp(BOUNDS.0, BOUNDS.1)
    }

    /// Estimates for each token of a proposal, given that all before it were accepted.
    pub fn estimates(&self, table: &AcceptanceTable, proposal: &[ProposedToken]) -> Vec<f64> {
        let tokens = proposal.iter().enumerate();
        tokens.map(|(position, proposed)| self.estimate(table, position, proposed)).collect()
    }

    /// As [`AcceptanceTable::observe`]; `table` must not have seen it yet.
    pub fn observe(&mut self, table: &AcceptanceTable, proposal: &[ProposedToken], n_accepted: usize) {
        for (position, proposed) in proposal.iter().take(n_accepted + 1).enumerate() {
            let expected = table.estimate(position, proposed);
            self.sources[proposed.source.idx()].observe(expected, position < n_accepted);
        }
    }
}

impl Odds {
    fn observe(&mut self, expected: f64, is_accepted: bool) {
        let is_accepted = f64::from(u8::from(is_accepted));
        let add = |sum: &mut f64, value: f64| *sum = *sum * SEQUENCE_DECAY + value;
        add(&mut self.accepted, is_accepted);
        add(&mut self.rejected, 1.0 - is_accepted);
        add(&mut self.expected_accepted, expected);
        add(&mut self.expected_rejected, 1.0 - expected);
    }

    /// By how much this sequence's odds differ; 1 at first.
    fn ratio(&self) -> f64 {
        let weighted = |sum: f64| sum + SEQUENCE_PRIOR_WEIGHT / 2.0;
        weighted(self.accepted) / weighted(self.expected_accepted) * weighted(self.expected_rejected)
            / weighted(self.rejected)
    }
}

/// Acceptance of a source that nothing is known of.
const PRIOR_MEAN: f64 = 0.6;
/// The same of second guesses, and how much of its own probability a draft is believed of one.
const SECOND_PRIOR: (f64, f64) = (0.1, 0.6);

/// What is thought of a token before anything was seen: a confident source is somewhat believed.
fn prior(proposed: &ProposedToken) -> f64 {
    0.25 + 0.65 * f64::from(known(proposed.confidence))
}

fn known(confidence: f32) -> f32 {
    if confidence.is_nan() { 0.0 } else { confidence.clamp(0.0, 1.0) }
}

fn bucket(confidence: f32) -> usize {
    EDGES.iter().filter(|edge| confidence >= **edge).count()
}

pub(crate) fn odds(probability: f64) -> f64 {
    let probability = probability.clamp(BOUNDS.0, BOUNDS.1);
    probability / (1.0 - probability)
}

pub(crate) fn odds_times(probability: f64, factor: f64) -> f64 {
    let odds = odds(probability) * factor;
    odds / (1.0 + odds)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn proposal(source: Source, confidences: &[f32]) -> Vec<ProposedToken> {
        let token = |confidence: &f32| ProposedToken {
            token: TokenId(1),
            source,
            confidence: *confidence,
            second: None,
        };
        confidences.iter().map(token).collect()
    }

    #[test]
    fn estimates_come_to_what_is_measured_by_position_and_confidence() {
        let mut table = AcceptanceTable::new();
        // Sure tokens are accepted first and second, unsure ones never.
        for _ in 0..200 {
            table.observe(&proposal(Source::Draft, &[0.97, 0.97, 0.2]), 2, None);
            table.observe(&proposal(Source::Draft, &[0.2]), 0, None);
        }
        let estimate =
            |position, confidence| table.estimate(position, &proposal(Source::Draft, &[confidence])[0]);
        assert!(estimate(0, 0.97) > 0.9 && estimate(1, 0.97) > 0.9);
        assert!(estimate(0, 0.2) < 0.1 && estimate(2, 0.2) < 0.1);
        // The other source has not been seen.
        let ngram = table.estimate(0, &proposal(Source::Ngram, &[0.5])[0]);
        assert!((0.4..0.7).contains(&ngram), "{ngram}");
    }

    #[test]
    fn one_bad_start_does_not_end_it_and_many_do() {
        let (mut table, bad) = (AcceptanceTable::new(), proposal(Source::Draft, &[0.9, 0.9, 0.9]));
        let mut sequence = SequenceAcceptance::default();
        let first = sequence.estimates(&table, &bad)[0];
        let mut reject = |n: usize| {
            for _ in 0..n {
                sequence.observe(&table, &bad, 0);
                table.observe(&bad, 0, None);
            }
            sequence.estimates(&table, &bad)[0]
        };
        let (second, last) = (reject(1), reject(60));
        assert!(second > 0.5 * first, "{first} then {second}");
        assert!(last < 0.1, "{last}");
    }

    #[test]
    fn a_sequence_that_differs_is_told_apart() {
        let (mut table, some) = (AcceptanceTable::new(), proposal(Source::Ngram, &[0.6]));
        let (mut good, mut poor) = (SequenceAcceptance::default(), SequenceAcceptance::default());
        for _ in 0..40 {
            good.observe(&table, &some, 1);
            table.observe(&some, 1, None);
            poor.observe(&table, &some, 0);
            table.observe(&some, 0, None);
        }
        let (general, good, poor) =
            (table.estimate(0, &some[0]), good.estimates(&table, &some)[0], poor.estimates(&table, &some)[0]);
        assert!((0.4..0.6).contains(&general), "{general}");
        assert!(good > 0.75 && poor < 0.25, "{good} {poor}");
    }

    #[test]
    fn what_changes_is_noticed() {
        let (mut table, some) = (AcceptanceTable::new(), proposal(Source::Draft, &[0.5]));
        (0..500).for_each(|_| table.observe(&some, 0, None));
        (0..300).for_each(|_| table.observe(&some, 1, None));
        assert!(table.estimate(0, &some[0]) > 0.6);
    }

    #[test]
    fn second_guesses_are_learnt_from_corrections() {
        let mut table = AcceptanceTable::new();
        let second = SecondGuess { token: TokenId(2), confidence: 0.2 };
        let mut proposal = proposal(Source::Draft, &[0.6, 0.6]);
        let first = table.estimate_second(0, &second);
        assert!((0.05..0.2).contains(&first), "{first}");
        proposal.iter_mut().for_each(|proposed| proposed.second = Some(second));
        // At the first place it is what came instead, at the second one never.
        for _ in 0..100 {
            table.observe(&proposal, 0, Some(TokenId(2)));
            table.observe(&proposal, 1, Some(TokenId(3)));
        }
        let (first, later) = (table.estimate_second(0, &second), table.estimate_second(1, &second));
        assert!((0.4..0.55).contains(&first) && later < 0.1, "{first} {later}");
    }

    proptest! {
        #[test]
        fn estimates_are_probabilities_whatever_is_seen(
            seen in prop::collection::vec((0usize..2, prop::collection::vec(any::<f32>(), 0..20), 0usize..25), 0..40),
            confidence in any::<f32>(),
        ) {
            let (mut table, mut sequence) = (AcceptanceTable::new(), SequenceAcceptance::default());
            for (source, confidences, n_accepted) in seen {
                let proposal = proposal(Source::ALL[source], &confidences);
                sequence.observe(&table, &proposal, n_accepted);
                table.observe(&proposal, n_accepted, None);
            }
            for source in Source::ALL {
                let estimates = sequence.estimates(&table, &proposal(source, &[confidence; 20]));
                prop_assert!(estimates.iter().all(|estimate| (BOUNDS.0..=BOUNDS.1).contains(estimate)));
            }
        }
    }
}
