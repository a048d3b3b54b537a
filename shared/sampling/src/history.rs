//! Token counts of one sequence, a function of its token log. It keeps no text and applies no penalty.

use paceline_domain::TokenId;
use std::collections::BTreeMap;

/// How often a token is in prompt and output.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TokenCount {
    /// In the prompt.
    pub n_prompt: u32,
    /// In the output.
    pub n_output: u32,
}

/// The tokens before the one to be sampled, and how often each occurs.
///
/// All proposed tokens of a verification chunk are pushed at once: each of its rows names its position, and what
/// follows that does not count for it. Whatever is rejected goes away with [`TokenHistory::truncate`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TokenHistory {
    n_prompt: usize,
    tokens: Vec<TokenId>,
    counts: BTreeMap<u32, TokenCount>,
}

impl TokenHistory {
    /// An empty log whose first `n_prompt` tokens will be the prompt.
    pub fn new(n_prompt: usize) -> Self {
        Self { n_prompt, ..Self::default() }
    }

    /// Number of tokens; the position of the token to be sampled next.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The log.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Appends a token.
    pub fn push(&mut self, token: TokenId) {
        let count = self.counts.entry(token.0).or_default();
        *if self.tokens.len() < self.n_prompt { &mut count.n_prompt } else { &mut count.n_output } += 1;
        self.tokens.push(token);
    }

    /// Appends tokens in order.
    pub fn extend(&mut self, tokens: &[TokenId]) {
        tokens.iter().for_each(|token| self.push(*token));
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        while self.tokens.len() > len {
            let token = self.tokens.pop().expect("invariant: longer than len");
            let count = self.counts.get_mut(&token.0).expect("invariant: every token of the log is counted");
            *if self.tokens.len() < self.n_prompt { &mut count.n_prompt } else { &mut count.n_output } -= 1;
            if *count == TokenCount::default() {
                self.counts.remove(&token.0);
            }
        }
    }

    /// Counts of the tokens `vocab_start .. vocab_start + n` that occur before `position`, by their distance from
    /// `vocab_start`, rising. Quick where few tokens follow.
    pub fn counts_before(
        &self,
        position: u32,
        vocab_start: u32,
        n: usize,
    ) -> impl Iterator<Item = (usize, TokenCount)> {
        let end = vocab_start.saturating_add(u32::try_from(n).unwrap_or(u32::MAX));
        let n_before = self.tokens.len().min(position as usize);
        let later = &self.tokens[n_before..];
        let (prompt, output) = later.split_at(self.n_prompt.saturating_sub(n_before).min(later.len()));
        let n_of = |token: u32, part: &[TokenId]| part.iter().filter(|other| other.0 == token).count() as u32;
        self.counts.range(vocab_start..end).filter_map(move |(token, count)| {
            let n_prompt = count.n_prompt - n_of(*token, prompt);
            let n_output = count.n_output - n_of(*token, output);
            let count = TokenCount { n_prompt, n_output };
            (count != TokenCount::default()).then_some(((token - vocab_start) as usize, count))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pushing_and_truncating_leaves_a_function_of_the_log(
            n_prompt in 0usize..6,
            edits in prop::collection::vec((prop::collection::vec(0u32..5, 0..6), 0usize..12), 0..6),
        ) {
            let mut history = TokenHistory::new(n_prompt);
            let mut log: Vec<TokenId> = Vec::new();
            for (tokens, len) in edits {
                let tokens: Vec<TokenId> = tokens.into_iter().map(TokenId).collect();
                history.extend(&tokens);
                log.extend(&tokens);
                history.truncate(len);
                log.truncate(len);
            }
            let mut fresh = TokenHistory::new(n_prompt);
            fresh.extend(&log);
            prop_assert_eq!(&history, &fresh);
            prop_assert_eq!(history.tokens(), &log[..]);
            for position in 0..=log.len() + 1 {
                let before = &log[..position.min(log.len())];
                let (prompt, output) = before.split_at(n_prompt.min(before.len()));
                let of = |part: &[TokenId], token| part.iter().filter(|other| other.idx() == token).count() as u32;
                let counted = |(start, end)| (start..end)
                    .map(|token| TokenCount { n_prompt: of(prompt, token), n_output: of(output, token) })
                    .enumerate()
                    .filter(|(_, count)| *count != TokenCount::default())
                    .collect::<Vec<_>>();
                for (start, end) in [(0, 5), (2, 4)] {
                    let counts = history.counts_before(position as u32, start as u32, end - start);
                    prop_assert_eq!(counts.collect::<Vec<_>>(), counted((start, end)));
                }
            }
        }
    }
}
