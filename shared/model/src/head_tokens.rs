//! Which tokens an output head is for: all of the vocabulary, or the first ones and some others, as of a draft model. A
//! row of the head, and a column of its logits, stands for a token. Nothing is chosen here.

use paceline_domain::TokenId;

use crate::ModelConfig;

/// The tokens of the rows of an output head, by rising number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeadTokens {
    /// Rows that stand for the tokens of their own number.
    n_first: usize,
    /// Tokens of the rows after them.
    others: Vec<TokenId>,
}

impl HeadTokens {
    /// All of a model's vocabulary.
    pub fn all(config: &ModelConfig) -> Self {
        Self::first(config.n_vocab)
    }

    /// The tokens below this number.
    pub fn first(n_first: usize) -> Self {
        Self { n_first, others: Vec::new() }
    }

    /// Those and others, as far as they are not among them.
    pub fn with(n_first: usize, others: &[TokenId]) -> Self {
        let mut others: Vec<TokenId> =
            others.iter().copied().filter(|token| token.idx() >= n_first).collect();
        others.sort_unstable();
        others.dedup();
        Self { n_first, others }
    }

    /// The part of them that a model has.
    pub(crate) fn of(&self, config: &ModelConfig) -> Self {
        let others: Vec<TokenId> =
            self.others.iter().copied().filter(|token| token.idx() < config.n_vocab).collect();
        Self { n_first: self.n_first.min(config.n_vocab), others }
    }

    /// Rows.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.n_first + self.others.len()
    }

    /// Rows that stand for the tokens of their own number.
    pub fn n_first(&self) -> usize {
        self.n_first
    }

    /// Tokens of the rows after them.
    pub fn others(&self) -> &[TokenId] {
        &self.others
    }

    /// The token that a row stands for.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn token(&self, row: usize) -> TokenId {
        if row < self.n_first { TokenId(row as u32) } else { self.others[row - self.n_first] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::tiny_config;

    #[test]
    fn rows_stand_for_tokens_by_rising_number() {
        let head = HeadTokens::with(3, &[9, 2, 7, 9, 400].map(TokenId));
        let tokens = |head: &HeadTokens| (0..head.len()).map(|row| head.token(row).0).collect::<Vec<_>>();
        assert_eq!(tokens(&head), [0, 1, 2, 7, 9, 400]);
        assert_eq!(tokens(&head.of(&tiny_config())), [0, 1, 2, 7, 9], "the model has 331 tokens");
        assert_eq!((head.n_first(), head.others()), (3, &[7, 9, 400].map(TokenId)[..]));
        assert_eq!(HeadTokens::first(9_999).of(&tiny_config()), HeadTokens::all(&tiny_config()));
        assert_eq!(HeadTokens::with(331, &[TokenId(5)]), HeadTokens::all(&tiny_config()));
    }
}
