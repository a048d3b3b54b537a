//! How many rows of prompts a step takes, and whose. Pure.
//!
//! Nobody decodes: as many as a step holds. Somebody does: as many as keep the step below the bound on the time
//! between tokens, by the times that were measured.

use paceline_speculation::{Load, StepTimes};

/// Rows that proposals leave to prompts.
pub const ROWS_FOR_PROMPTS: usize = 16;
/// What a step with prompts may take compared with one of decode rows alone: twice, less what is around a step.
const RELATIVE_BOUND: f64 = 1.8;
/// What a step with prompts may always take compared with one of decode rows alone, however tight the bound is. With at
/// least one row, prompts never starve.
const LEAST_BOUND: f64 = 1.25;

/// How long decoding sequences may wait between two tokens while prompts are read.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum ItlBound {
    /// About twice as long as without prompts.
    Twice,
    /// So many milliseconds.
    Millis(f64),
}

/// Rows for prompts in a step that has `decoding` already and room for `n_rows_left` more. The first prompt goes on at
/// `start_pos`.
pub fn prefill_rows(
    times: &StepTimes,
    bound: ItlBound,
    decoding: Load,
    start_pos: usize,
    n_rows_left: usize,
) -> usize {
    if decoding.n_rows == 0 {
        return n_rows_left;
    }
    // Once for each class of row counts a step goes without prompts, or nobody would know what they add.
    let Some(alone_ms) = times.predict(decoding).filter(|_| times.knows(decoding.n_rows)) else { return 0 };
    let bound_ms = match bound {
        ItlBound::Twice => RELATIVE_BOUND * alone_ms,
        ItlBound::Millis(ms) => ms.max(LEAST_BOUND * alone_ms),
    };
    let fits = |n_rows: usize| {
        let load = decoding.and(Load::rows(start_pos, n_rows));
        times.predict(load).is_some_and(|ms| ms <= bound_ms)
    };
    let least = n_rows_left.min(1);
    let (mut fitting, mut too_many) = (least, n_rows_left + 1);
    while fitting + 1 < too_many {
        let middle = fitting.midpoint(too_many);
        *if fits(middle) { &mut fitting } else { &mut too_many } = middle;
    }
    fitting
}

/// Shares rows among prompts that want so many each, oldest first. The oldest has at least half, the others the rest,
/// short ones first: a long prompt makes nobody wait for its end, and short ones never stop it.
pub fn share(n_rows: usize, wanted: &[usize]) -> Vec<usize> {
    let Some(oldest) = wanted.first() else { return Vec::new() };
    let mut granted = vec![0; wanted.len()];
    granted[0] = n_rows.div_ceil(2).min(*oldest);
    let mut n_left = n_rows - granted[0];
    let mut others: Vec<usize> = (1..wanted.len()).collect();
    others.sort_by_key(|i| wanted[*i]);
    for i in others.into_iter().chain([0]) {
        let more = n_left.min(wanted[i] - granted[i]);
        granted[i] += more;
        n_left -= more;
    }
    granted
}

#[cfg(test)]
mod tests {
    use paceline_speculation::Drafting;
    use proptest::prelude::*;

    use super::*;

    /// 9.9 ms for two rows of decoding alone, half a millisecond for each row more.
    fn times() -> StepTimes {
        let mut times = StepTimes::default();
        for n_rows in [2, 16, 66, 258] {
            times.observe(Load { n_rows, n_keys: 0 }, 8.9 + 0.5 * n_rows as f64, Drafting::Quiet);
        }
        times
    }

    #[test]
    fn prompts_take_what_the_bound_leaves() {
        let decoding = Load { n_rows: 2, n_keys: 0 };
        let rows = |bound, decoding, left| prefill_rows(&times(), bound, decoding, 0, left);
        assert_eq!(rows(ItlBound::Millis(40.0), Load::default(), 256), 256, "nobody waits for tokens");
        assert_eq!(rows(ItlBound::Millis(40.1), decoding, 254), 60);
        assert_eq!(rows(ItlBound::Twice, decoding, 254), 15);
        assert_eq!(rows(ItlBound::Millis(40.0), decoding, 30), 30);
        assert_eq!(rows(ItlBound::Millis(1.0), decoding, 254), 4, "a quarter more");
        assert_eq!(rows(ItlBound::Millis(1.0), decoding, 3), 3);
        assert_eq!(rows(ItlBound::Millis(1.0), Load { n_rows: 2, n_keys: 0 }, 0), 0);
        assert_eq!(rows(ItlBound::Millis(9999.0), decoding, 254), 254);
        assert_eq!(rows(ItlBound::Twice, Load { n_rows: 4, n_keys: 0 }, 252), 0, "first without prompts");
    }

    #[test]
    fn the_oldest_has_half_and_short_ones_go_first() {
        assert!(share(64, &[]).is_empty());
        assert_eq!(share(64, &[6000]), [64]);
        assert_eq!(share(64, &[6000, 6000]), [32, 32]);
        assert_eq!(share(64, &[6000, 500, 10]), [32, 22, 10]);
        assert_eq!(share(64, &[6000, 5, 10]), [49, 5, 10]);
        assert_eq!(share(64, &[5, 100, 100]), [5, 59, 0]);
        assert_eq!(share(1, &[6000, 5]), [1, 0]);
    }

    proptest! {
        #[test]
        fn nothing_is_left_while_somebody_wants_it(n_rows in 0usize..300, wanted in prop::collection::vec(1usize..300, 0..9)) {
            let granted = share(n_rows, &wanted);
            prop_assert!(granted.iter().zip(&wanted).all(|(granted, wanted)| granted <= wanted));
            prop_assert_eq!(granted.iter().sum::<usize>(), n_rows.min(wanted.iter().sum()));
        }
    }
}
