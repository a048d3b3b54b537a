//! The logits of a pass, wherever they are: whole rows are brought to the host when asked for, the best tokens are found
//! where the rows lie. It gives no log probability.

use std::ops::Range;

use paceline_domain::{SamplingParams, TokenId};
use paceline_sampling::{Candidate, TokenHistory, has_filter, is_plain, local_best, plain_best};

use crate::ModelError;

/// A row and all that its next token depends on beside the logits.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Choice<'a> {
    /// Index among the output rows.
    pub row: usize,
    /// Position of the token that is chosen: the number of tokens before it.
    pub position: u32,
    /// How it is chosen. Filters need a rank that has the whole vocabulary; log probabilities are not given here.
    pub sampling: &'a SamplingParams,
    /// Tokens of the sequence, for the penalties; from `position` on they do not count.
    pub history: &'a TokenHistory,
}

impl Choice<'_> {
    /// Whether nothing but the row's logits and its noise matters: no filter, penalty or bias.
    pub fn is_plain(&self) -> bool {
        is_plain(self.sampling)
    }

    /// The best column of the row on the host, by definition: a row that is changed is copied.
    ///
    /// # Panics
    /// When there are filters and the columns are not the whole vocabulary.
    pub fn best_of(&self, columns: Columns, row: &[f32]) -> Candidate {
        let Self { position, sampling, history, .. } = *self;
        let (first, row) = (columns.first_token.0, &row[..columns.n_usable]);
        if self.is_plain() {
            return plain_best(sampling.seed, position, sampling.temperature, first, row);
        }
        local_best(sampling, history, position, first, &mut row.to_vec())
    }
}

/// Columns of a rank's logits that may be chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Columns {
    /// The token of column 0.
    pub first_token: TokenId,
    /// Columns from the first on; what follows is padding of the vocabulary.
    pub n_usable: usize,
}

/// What keeps the logits of the last pass.
pub trait LogitRows: Send {
    /// This rank's logits of one output row, on the host.
    ///
    /// # Errors
    /// What the device reports.
    fn row(&mut self, row: usize) -> Result<&[f32], ModelError>;

    /// The best column of each row asked for, as [`Choice::best_of`] finds it; `best` receives one candidate for each
    /// choice, in order. The logits stay as they are.
    ///
    /// # Errors
    /// What the device reports.
    fn best(
        &mut self,
        columns: Columns,
        choices: &[Choice<'_>],
        best: &mut Vec<Candidate>,
    ) -> Result<(), ModelError> {
        best.clear();
        for choice in choices {
            let row = self.row(choice.row)?;
            best.push(choice.best_of(columns, row));
        }
        Ok(())
    }
}

/// This rank's part of the logits of the asked rows.
pub struct Logits<'a> {
    rows: &'a mut dyn LogitRows,
    n_rows: usize,
    vocab: Range<usize>,
}

impl<'a> Logits<'a> {
    /// Logits of `n_rows` rows and the tokens `vocab`.
    pub fn new(rows: &'a mut dyn LogitRows, n_rows: usize, vocab: Range<usize>) -> Self {
        Self { rows, n_rows, vocab }
    }

    /// Rows asked for.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// The tokens of this rank.
    pub fn vocab_range(&self) -> Range<usize> {
        self.vocab.clone()
    }

    /// The logits of a row, `[vocab_range.len()]`.
    ///
    /// # Errors
    /// What the device reports.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(&mut self, row: usize) -> Result<&[f32], ModelError> {
        assert!(row < self.n_rows, "row {row} of {} output rows", self.n_rows);
        if self.vocab.is_empty() {
            return Ok(&[]);
        }
        self.rows.row(row)
    }

    /// This rank's best token of each of these rows; tokens from `n_usable` on are padding. A rank that has no token to
    /// offer answers with one that never wins.
    ///
    /// # Errors
    /// What the device reports.
    ///
    /// # Panics
    /// When there is no such row, or filters are asked of a rank that has a part of the vocabulary.
    pub fn best(
        &mut self,
        n_usable: usize,
        choices: &[Choice<'_>],
        best: &mut Vec<Candidate>,
    ) -> Result<(), ModelError> {
        let columns = self.columns(n_usable);
        for Choice { row, sampling, .. } in choices {
            assert!(*row < self.n_rows, "row {row} of {} output rows", self.n_rows);
            let is_whole = columns.n_usable == n_usable;
            assert!(is_whole || !has_filter(sampling), "filters of row {row} in {columns:?} of {n_usable}");
        }
        best.clear();
        if columns.n_usable == 0 {
            best.extend(choices.iter().map(|choice| choice.best_of(columns, &[])));
        } else if !choices.is_empty() {
            self.rows.best(columns, choices, best)?;
        }
        Ok(())
    }

    /// The columns whose tokens are below `n_usable`.
    pub fn columns(&self, n_usable: usize) -> Columns {
        let n_usable = self.vocab.end.min(n_usable).saturating_sub(self.vocab.start);
        Columns { first_token: TokenId(self.vocab.start as u32), n_usable }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rows(Vec<Vec<f32>>);

    impl LogitRows for Rows {
        fn row(&mut self, row: usize) -> Result<&[f32], ModelError> {
            Ok(&self.0[row])
        }
    }

    #[test]
    fn columns_end_with_the_usable_vocabulary() {
        let mut rows = Rows(Vec::new());
        let mut columns = |vocab| {
            let Columns { first_token, n_usable } = Logits::new(&mut rows, 0, vocab).columns(10);
            (first_token.0, n_usable)
        };
        assert_eq!([columns(0..8), columns(8..16), columns(16..24)], [(0, 8), (8, 2), (16, 0)]);
    }

    #[test]
    fn the_best_of_each_row_asked_for() {
        let mut rows = Rows(vec![vec![0.0, 2.0, 2.0, 9.0], vec![f32::NAN, f32::NEG_INFINITY, f32::NAN, 9.0]]);
        let mut logits = Logits::new(&mut rows, 2, 16..20);
        let (sampling, history) = (SamplingParams::greedy(), TokenHistory::default());
        let greedy = |row| Choice { row, position: 3, sampling: &sampling, history: &history };
        let mut best = Vec::new();
        logits.best(19, &[greedy(1), greedy(0)], &mut best).expect("rows");
        let none = Candidate { value: f32::NEG_INFINITY, token: TokenId(16) };
        assert_eq!(best, [none, Candidate { value: 2.0, token: TokenId(17) }]);
        logits.best(16, &[greedy(0)], &mut best).expect("rows");
        assert_eq!(best, [none], "nothing but padding");
    }

    #[test]
    fn a_rank_without_tokens_has_empty_rows_and_never_wins() {
        let mut rows = Rows(Vec::new());
        let mut logits = Logits::new(&mut rows, 1, 20..20);
        assert!(logits.row(0).expect("a row").is_empty());
        let mut best = Vec::new();
        let sampling = SamplingParams { presence_penalty: 1.0, ..SamplingParams::default() };
        let choice = Choice { row: 0, position: 0, sampling: &sampling, history: &TokenHistory::default() };
        logits.best(20, &[choice], &mut best).expect("rows");
        assert_eq!(best, [Candidate { value: f32::NEG_INFINITY, token: TokenId(20) }]);
    }
}
