//! Which second guesses enter a step beside its proposals: those whose row is worth its time. A branch is the cheapest tree of
//! proposals: one row where the draft was nearly of another mind, and nothing behind it.

use crate::controller::{Choice, StepCost, StepLoad};

/// A second guess at the place of a proposal that enters the step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BranchOffer {
    /// Whose proposal.
    pub sequence: usize,
    /// Proposals before it.
    pub place: usize,
    /// Probability that the target samples it, and all proposals before it.
    pub probability: f64,
    /// Milliseconds of reading the sequence's keys and values once more.
    pub read_ms: f64,
}

/// Adds branches to a choice, the likeliest first, while they raise expected tokens per time: `before_ms` were spent before
/// the step, which may take at most `most_ms` longer than without proposals. The offers that were taken.
pub fn add_branches(
    choice: &mut Choice,
    mut offers: Vec<BranchOffer>,
    load: StepLoad,
    (before_ms, most_ms): (f64, f64),
    cost: &dyn StepCost,
) -> Vec<BranchOffer> {
    offers.sort_by(|one, other| other.probability.total_cmp(&one.probability));
    let mut taken = Vec::new();
    for offer in offers {
        let n_rows = choice.n_rows();
        if n_rows >= load.n_spare_rows {
            break;
        }
        let row_ms = cost.step_ms(load.n_rows + n_rows + 1) - cost.step_ms(load.n_rows + n_rows);
        let (tokens, ms) =
            (choice.expected_tokens + offer.probability, choice.predicted_ms + row_ms + offer.read_ms);
        let is_affordable = ms - choice.plain_ms <= most_ms;
        if !is_affordable
            || tokens / (ms + before_ms) <= choice.expected_tokens / (choice.predicted_ms + before_ms)
        {
            break;
        }
        (choice.expected_tokens, choice.predicted_ms) = (tokens, ms);
        choice.n_branches += 1;
        taken.push(offer);
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOAD: StepLoad = StepLoad { n_rows: 1, n_tokens: 1, n_spare_rows: 9 };

    fn taken(
        probabilities: &[f64],
        load: StepLoad,
        times: (f64, f64),
        read_ms: f64,
        row_ms: f64,
    ) -> (usize, Choice) {
        let cost = |n_rows: usize| 20.0 + row_ms * n_rows as f64;
        let mut choice = Choice {
            n_proposed: vec![2],
            n_branches: 0,
            expected_tokens: 2.0,
            predicted_ms: cost(3),
            plain_ms: cost(1),
        };
        let offers = probabilities.iter().enumerate();
        let offers = offers.map(|(place, probability)| BranchOffer {
            sequence: 0,
            place,
            probability: *probability,
            read_ms,
        });
        let taken = add_branches(&mut choice, offers.collect(), load, times, &cost);
        assert_eq!((taken.len(), choice.n_rows()), (choice.n_branches, 2 + choice.n_branches));
        assert!(taken.is_sorted_by(|one, other| one.probability >= other.probability));
        (taken.len(), choice)
    }

    #[test]
    fn rows_that_cost_nothing_are_taken_and_dear_ones_are_not() {
        let free = (0.0, f64::INFINITY);
        let (n, choice) = taken(&[0.05, 0.2], LOAD, free, 0.0, 0.0);
        assert!(n == 2 && (choice.expected_tokens - 2.25).abs() < 1e-9 && choice.predicted_ms == 20.0);
        // A tenth of the step for a tenth of its tokens.
        assert_eq!(taken(&[0.25, 0.15], LOAD, free, 0.0, 2.0).0, 1);
        assert_eq!(taken(&[0.2], LOAD, free, 3.0, 0.0).0, 0, "its keys are read once more");
        assert_eq!(
            taken(&[0.2], LOAD, (20.0, f64::INFINITY), 3.0, 0.0).0,
            1,
            "what was waited for is worth more tokens"
        );
    }

    #[test]
    fn room_and_account_bound_them() {
        let few = StepLoad { n_spare_rows: 3, ..LOAD };
        assert_eq!(taken(&[0.2, 0.2], few, (0.0, f64::INFINITY), 0.0, 0.0).0, 1);
        assert_eq!(taken(&[0.5, 0.5], LOAD, (0.0, 3.5), 0.0, 1.0).0, 1);
        assert_eq!(taken(&[], LOAD, (0.0, 9.0), 0.0, 0.0).0, 0);
    }
}
