//! How many rows of prompts a step takes, and whose. Pure.
//!
//! Nobody decodes: as many as a step holds. Somebody does: as many as keep the step below the bound on the time
//! between tokens, by the times that were measured.

use paceline_speculation::{Load, StepTimes};

/// Rows that proposals leave to prompts.
pub const ROWS_FOR_PROMPTS: usize = 16;
/// What a step with prompts may take compared with one of decode rows alone: twice, less what is around a step; and at most,
/// when there are more prompts than sequences that decode.
const RELATIVE_BOUND: (f64, f64) = (1.8, 8.0);
/// How long a step becomes at most while several prompts are read, each of which makes it longer: so long that whoever reads
/// its tokens, 11 a second, hardly waits, and all prompts of a burst are read soon. While requests wait for a place, others are
/// likely to come, and wait for the step under way, whoever sent it: 25 a second.
const BURST_MS: f64 = 90.0;
const CROWDED_MS: f64 = 40.0;
/// What a step with prompts may always take compared with one of decode rows alone, however tight the bound is. With at
/// least one row, prompts never starve.
const LEAST_BOUND: f64 = 1.25;
/// What the rows of a prompt after its first may add to a step that is beyond the bound with that one alone: the first row of a
/// deep prompt reads all keys, the next ones read none.
const MORE_BY_NEXT: f64 = 1.1;

/// How long decoding sequences may wait between two tokens while prompts are read.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum ItlBound {
    /// About twice as long as without prompts while one is read; longer while there are several, up to 90 ms, 40 while others
    /// wait for a place, or as long as gives each prompt the time of a sequence that decodes.
    Twice,
    /// So many milliseconds.
    Millis(f64),
}

/// Who shares a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sharers {
    /// Sequences that decode; each may have rows of proposals.
    pub n_decoding: usize,
    /// Prompts that are not read to their ends.
    pub n_prompts: usize,
    /// Where the first of them goes on.
    pub start_pos: usize,
    /// Whether others wait for a place.
    pub is_crowded: bool,
}

/// Rows for prompts in a step that has `decoding` already and room for `n_rows_left` more.
pub fn prefill_rows(
    times: &StepTimes,
    bound: ItlBound,
    decoding: Load,
    sharers: Sharers,
    n_rows_left: usize,
) -> usize {
    if decoding.n_rows == 0 {
        return n_rows_left;
    }
    // Once for each class of row counts a step goes without prompts, or nobody would know what they add.
    let Some(alone_ms) = times.predict(decoding).filter(|_| times.knows(decoding.n_rows)) else { return 0 };
    let bound_ms = match bound {
        ItlBound::Twice => {
            let n_prompts = sharers.n_prompts as f64;
            let n_each = n_prompts / sharers.n_decoding.max(1) as f64;
            let shares = if n_each > 1.0 { 1.0 + n_each } else { 0.0 };
            let fair_ms = shares.clamp(RELATIVE_BOUND.0, RELATIVE_BOUND.1) * alone_ms;
            let most_ms = if sharers.is_crowded { CROWDED_MS } else { BURST_MS };
            fair_ms.max((RELATIVE_BOUND.0 * n_prompts * alone_ms).min(most_ms))
        }
        ItlBound::Millis(ms) => ms.max(LEAST_BOUND * alone_ms),
    };
    let with_rows = |n_rows| times.predict(decoding.and(Load::rows(sharers.start_pos, n_rows)));
    let least = n_rows_left.min(1);
    let bound_ms = with_rows(least).map_or(bound_ms, |ms| bound_ms.max(MORE_BY_NEXT * ms));
    let fits = |n_rows| with_rows(n_rows).is_some_and(|ms| ms <= bound_ms);
    let (mut fitting, mut too_many) = (least, n_rows_left + 1);
    while fitting + 1 < too_many {
        let middle = fitting.midpoint(too_many);
        *if fits(middle) { &mut fitting } else { &mut too_many } = middle;
    }
    fitting
}

/// A prompt in want of rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// Tokens it has to read.
    pub n_tokens: usize,
    /// See [`turn`].
    pub turn: u64,
}

/// When a prompt's turn comes, counted in tokens of all prompts: half its own length after it came. So short ones pass long
/// ones, and a long one lets pass what came before it and half its own length more (start-time fair queueing
/// knows such tags: Goyal, Vin and Cheng 1996).
pub fn turn(n_read: u64, n_tokens: usize) -> u64 {
    n_read + n_tokens as u64 / 2
}

/// Shares rows among prompts, oldest first. The oldest has at least half, the others the rest, by their turns: a long
/// prompt makes nobody wait for its end, and short ones never stop it.
pub fn share(n_rows: usize, wanted: &[Wanted]) -> Vec<usize> {
    let Some(oldest) = wanted.first() else { return Vec::new() };
    let mut granted = vec![0; wanted.len()];
    granted[0] = n_rows.div_ceil(2).min(oldest.n_tokens);
    let mut n_left = n_rows - granted[0];
    let mut others: Vec<usize> = (1..wanted.len()).collect();
    others.sort_by_key(|i| wanted[*i].turn);
    for i in others.into_iter().chain([0]) {
        let more = n_left.min(wanted[i].n_tokens - granted[i]);
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
            times.observe(Load::plain(n_rows), 8.9 + 0.5 * n_rows as f64, Drafting::Quiet);
        }
        times
    }

    #[test]
    fn prompts_take_what_the_bound_leaves() {
        let decoding = Load::plain(2);
        let one = Sharers { n_decoding: 2, n_prompts: 1, start_pos: 0, is_crowded: false };
        let rows = |bound, decoding, left| prefill_rows(&times(), bound, decoding, one, left);
        assert_eq!(rows(ItlBound::Millis(40.0), Load::default(), 256), 256, "nobody waits for tokens");
        assert_eq!(rows(ItlBound::Millis(40.1), decoding, 254), 60);
        assert_eq!(rows(ItlBound::Twice, decoding, 254), 15);
        assert_eq!(rows(ItlBound::Millis(40.0), decoding, 30), 30);
        assert_eq!(rows(ItlBound::Millis(1.0), decoding, 254), 4, "a quarter more");
        assert_eq!(rows(ItlBound::Millis(1.0), decoding, 3), 3);
        assert_eq!(rows(ItlBound::Millis(1.0), Load::plain(2), 0), 0);
        assert_eq!(rows(ItlBound::Millis(9999.0), decoding, 254), 254);
        assert_eq!(rows(ItlBound::Twice, Load::plain(4), 252), 0, "first without prompts");
    }

    #[test]
    fn rows_that_read_no_keys_of_their_own_come_along() {
        let mut times = times();
        for start_pos in [0, 2_000, 4_000].repeat(9) {
            for n_rows in [1, 2, 4, 8] {
                let load = Load::plain(2).and(Load::rows(start_pos, n_rows));
                times.observe(load, 9.9 + 0.1 * n_rows as f64 + 0.01 * load.n_reads as f64, Drafting::Quiet);
            }
        }
        let rows = |start_pos| {
            let one = Sharers { n_decoding: 2, n_prompts: 1, start_pos, is_crowded: false };
            prefill_rows(&times, ItlBound::Twice, Load::plain(2), one, 254)
        };
        assert!(rows(4_000) >= 8, "50 ms for one row and for eight: {}", rows(4_000));
    }

    #[test]
    fn many_prompts_beside_few_that_decode_have_their_part_of_a_step() {
        let decoding = Load::plain(2);
        let shared = |bound, n_decoding, n_prompts, is_crowded| {
            let sharers = Sharers { n_decoding, n_prompts, start_pos: 0, is_crowded };
            prefill_rows(&times(), bound, decoding, sharers, 254)
        };
        let found =
            |is_crowded| [1, 2, 6, 14, 60].map(|n_prompts| shared(ItlBound::Twice, 2, n_prompts, is_crowded));
        assert_eq!(found(false), [15, 51, 160, 160, 160], "a step of 9.9 ms by 1.8, 3.6, 90 ms and no more");
        assert_eq!(found(true), [15, 51, 60, 138, 138], "by 1.8, 3.6, 40 ms, by 8 and no more");
        assert_eq!(shared(ItlBound::Twice, 1, 1, false), 15, "one prompt is not more than one sequence");
        let one = shared(ItlBound::Twice, 1, 6, true);
        assert_eq!(one, 118, "one of the rows is a proposal: seven share the step");
        let asked = shared(ItlBound::Millis(40.1), 2, 60, false);
        assert_eq!(asked, 60, "what was asked for holds for any number");
    }

    /// Prompts that came one after the other when so many tokens of others had been read.
    fn wanted(prompts: &[(u64, usize)]) -> Vec<Wanted> {
        let wanted = |(n_read, n_tokens): &(u64, usize)| Wanted {
            n_tokens: *n_tokens,
            turn: turn(*n_read, *n_tokens),
        };
        prompts.iter().map(wanted).collect()
    }

    #[test]
    fn the_oldest_has_half_and_short_ones_go_first() {
        let share = |n_tokens: &[usize]| {
            let prompts: Vec<_> = n_tokens.iter().map(|n_tokens| (0, *n_tokens)).collect();
            share(64, &wanted(&prompts))
        };
        assert!(share(&[]).is_empty());
        assert_eq!(share(&[6000]), [64]);
        assert_eq!(share(&[6000, 6000]), [32, 32]);
        assert_eq!(share(&[6000, 500, 10]), [32, 22, 10]);
        assert_eq!(share(&[6000, 5, 10]), [49, 5, 10]);
        assert_eq!(share(&[5, 100, 100]), [5, 59, 0]);
        assert_eq!(super::share(1, &wanted(&[(0, 6000), (0, 5)])), [1, 0]);
    }

    #[test]
    fn short_ones_pass_a_long_one_until_its_turn_comes() {
        let share = |n_read| share(64, &wanted(&[(0, 6000), (0, 1000), (n_read, 20)]));
        assert_eq!(share(400), [32, 12, 20]);
        assert_eq!(share(600), [32, 32, 0]);
    }

    proptest! {
        #[test]
        fn nothing_is_left_while_somebody_wants_it(n_rows in 0usize..300, prompts in prop::collection::vec((0u64..99, 1usize..300), 0..9)) {
            let granted = share(n_rows, &wanted(&prompts));
            prop_assert!(granted.iter().zip(&prompts).all(|(granted, (_, wanted))| granted <= wanted));
            let all: usize = prompts.iter().map(|(_, wanted)| wanted).sum();
            prop_assert_eq!(granted.iter().sum::<usize>(), n_rows.min(all));
        }
    }
}
