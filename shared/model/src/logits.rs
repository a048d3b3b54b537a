//! The logits of a pass, wherever they are: whole rows are brought to the host when asked for, the best tokens of plain
//! rows are found where the rows lie.

use std::ops::Range;

use paceline_domain::TokenId;
use paceline_sampling::{Candidate, plain_best};

use crate::ModelError;

/// A row whose next token depends on nothing but its logits and its noise: no filter, penalty, bias or log probability.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Choice {
    /// Index among the output rows.
    pub row: usize,
    /// Position of the token that is chosen: the number of tokens before it.
    pub position: u32,
    /// Seed of the noise.
    pub seed: u64,
    /// Factor of the noise; 0 takes the likeliest token.
    pub temperature: f32,
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

    /// The best column of each row asked for, after its noise, as [`plain_best`] finds it; `best` receives one
    /// candidate for each choice, in order.
    ///
    /// # Errors
    /// What the device reports.
    fn best(
        &mut self,
        columns: Columns,
        choices: &[Choice],
        best: &mut Vec<Candidate>,
    ) -> Result<(), ModelError> {
        best.clear();
        for choice in choices {
            let row = self.row(choice.row)?;
            best.push(best_of_row(columns, choice, row));
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
    /// When there is no such row.
    pub fn best(
        &mut self,
        n_usable: usize,
        choices: &[Choice],
        best: &mut Vec<Candidate>,
    ) -> Result<(), ModelError> {
        let missing = choices.iter().find(|choice| choice.row >= self.n_rows);
        assert!(missing.is_none(), "{missing:?} of {} output rows", self.n_rows);
        let columns = self.columns(n_usable);
        best.clear();
        if columns.n_usable == 0 {
            best.extend(choices.iter().map(|choice| best_of_row(columns, choice, &[])));
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

/// The best column of a row on the host.
pub(crate) fn best_of_row(columns: Columns, choice: &Choice, row: &[f32]) -> Candidate {
    let Choice { position, seed, temperature, .. } = *choice;
    plain_best(seed, position, temperature, columns.first_token.0, &row[..columns.n_usable])
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
        let greedy = |row| Choice { row, position: 3, seed: 1, temperature: 0.0 };
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
        let choice = Choice { row: 0, position: 0, seed: 0, temperature: 1.0 };
        logits.best(20, &[choice], &mut best).expect("rows");
        assert_eq!(best, [Candidate { value: f32::NEG_INFINITY, token: TokenId(20) }]);
    }
}
