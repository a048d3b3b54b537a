//! Which tokens of a vocabulary may be chosen, a bit each. It does not know why.

use crate::TokenId;

/// Tokens that may be chosen; by default all.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TokenMask(Vec<u32>);

impl TokenMask {
    /// Those whose bit is set: bit `id % 32` of word `id / 32`. Ids beyond the words are not allowed; no words at all allow
    /// everything.
    pub fn of_words(words: Vec<u32>) -> Self {
        Self(words)
    }

    /// The words.
    pub fn words(&self) -> &[u32] {
        &self.0
    }

    /// Whether everything is allowed.
    pub fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether nothing is allowed.
    pub fn is_nothing(&self) -> bool {
        !self.is_open() && self.0.iter().all(|word| *word == 0)
    }

    /// Whether a token may be chosen.
    pub fn allows(&self, token: TokenId) -> bool {
        let word = || self.0.get(token.idx() / 32).copied().unwrap_or(0);
        self.is_open() || (word() >> (token.0 % 32)) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_tokens_and_no_bits_are_all() {
        let mask = TokenMask::of_words(vec![1, 1 << 31]);
        let allowed: Vec<u32> = (0..200).filter(|id| mask.allows(TokenId(*id))).collect();
        assert_eq!(allowed, [0, 63]);
        assert!(TokenMask::default().allows(TokenId(7)) && !TokenMask::default().is_nothing());
        assert!(TokenMask::of_words(vec![0, 0]).is_nothing() && !mask.is_nothing());
    }
}
