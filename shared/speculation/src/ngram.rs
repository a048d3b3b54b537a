//! Proposes what followed the longest suffix of a request's tokens that occurred before: prompt lookup; and, where a longer
//! stretch is copied with small changes, what follows in the original. It needs no model, and only tokens that are
//! committed are indexed, so there is nothing to roll back.

use std::iter;

use paceline_domain::TokenId;

use crate::alignment::Alignment;
use crate::proposal::{ProposedToken, Source};
use crate::suffix_automaton::{Match, SuffixAutomaton};

/// Limits of a proposer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NgramConfig {
    /// Fewest tokens that must match.
    pub min_match: usize,
    /// Tokens the index is made of: at least this many of the last ones, at most twice as many.
    pub window: usize,
    /// Tokens in a row that may differ from what is copied; 0 follows no copy over a change.
    pub max_astray: usize,
}

impl Default for NgramConfig {
    fn default() -> Self {
        Self { min_match: 1, window: 16_384, max_astray: 6 }
    }
}

/// Proposes for one sequence.
#[derive(Clone, Debug)]
pub struct NgramProposer {
    config: NgramConfig,
    /// Prompt and committed output.
    tokens: Vec<TokenId>,
    /// Where the index begins in `tokens`.
    base: usize,
    automaton: SuffixAutomaton,
    /// What the last indexed tokens are copied from, over changes; and a place that may turn out to be the better one.
    alignment: Option<Alignment>,
    rival: Option<Alignment>,
}

impl NgramProposer {
    /// For a sequence without tokens.
    ///
    /// # Panics
    /// When a limit is 0.
    pub fn new(config: NgramConfig) -> Self {
        assert!(config.min_match > 0 && config.window > 0, "{config:?} has no room");
        let automaton = SuffixAutomaton::new();
        Self { config, tokens: Vec::new(), base: 0, automaton, alignment: None, rival: None }
    }

    /// The committed tokens.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Appends committed tokens. They count once they are indexed.
    pub fn extend(&mut self, tokens: &[TokenId]) {
        self.tokens.extend_from_slice(tokens);
    }

    /// Indexes up to `budget` tokens; whether all are. A long prompt may be spread over several calls, each a bounded piece
    /// of work.
    pub fn index(&mut self, budget: usize) -> bool {
        // Twice the window since the last start: the older half is left behind. Each token is indexed at most twice.
        if self.tokens.len() - self.base > 2 * self.config.window {
            self.base = self.tokens.len() - self.config.window;
            self.automaton = SuffixAutomaton::new();
            (self.alignment, self.rival) = (None, None);
        }
        let start = self.base + self.automaton.len();
        let end = self.tokens.len().min(start.saturating_add(budget));
        for at in start..end {
            self.automaton.push(self.tokens[at]);
            self.align(at + 1);
        }
        end == self.tokens.len()
    }

    /// Follows what the first `n_tokens` are copied from. The place counts that more of the last tokens are copied from.
    fn align(&mut self, n_tokens: usize) {
        let NgramConfig { min_match, max_astray, .. } = self.config;
        if max_astray == 0 {
            return;
        }
        let text = &self.tokens[..n_tokens];
        let followed = self.alignment.and_then(|alignment| alignment.follow(text, max_astray));
        let rival = self.rival.and_then(|rival| rival.follow(text, max_astray));
        let found = self.automaton.suffix().filter(|found| found.len >= min_match);
        let found = found.map(|found| Alignment::new(self.base + found.end, found.len));
        let better = |one: Option<Alignment>, other: Option<Alignment>| {
            let n_copied = |one: Option<Alignment>| one.map_or(0, |one| one.n_copied());
            if n_copied(other) > n_copied(one) { (other, one) } else { (one, other) }
        };
        let is_new = |found: &Alignment| [followed, rival].iter().flatten().all(|one| !one.is_at(found));
        let (rival, _) = better(rival, found.filter(is_new));
        (self.alignment, self.rival) = better(followed, rival);
    }

    /// Tokens to follow the committed ones and `tail`, which is not committed: proposed tokens of another source, for
    /// instance. They are found as they are asked for. None when too few tokens match or not all are indexed.
    pub fn following<'a>(&'a self, tail: &'a [TokenId]) -> impl Iterator<Item = ProposedToken> + 'a {
        let is_indexed = self.base + self.automaton.len() == self.tokens.len();
        let start = self.automaton.suffix();
        let matched = tail.iter().fold(start, |matched, token| self.automaton.follow(matched, *token));
        let found = matched.filter(|found| is_indexed && found.len >= self.config.min_match);
        let n_matched = found.map_or(0, |found| found.len);
        let is_surer =
            |alignment: &Alignment| is_indexed && tail.is_empty() && alignment.is_surer_than(n_matched);
        let alignment = self.alignment.filter(is_surer);
        let found = found.filter(|_| alignment.is_none());
        let original = alignment.into_iter().flat_map(|alignment| self.original(alignment));
        original.chain(found.into_iter().flat_map(|found| self.continuation(found, tail)))
    }

    /// What follows in the original of a copy.
    fn original(&self, alignment: Alignment) -> impl Iterator<Item = ProposedToken> + '_ {
        let rest = self.tokens.get(alignment.expected()..).unwrap_or_default();
        let proposed = move |(n_ahead, token): (usize, &TokenId)| ProposedToken {
            token: *token,
            source: Source::Ngram,
            confidence: alignment.confidence(n_ahead),
            second: None,
        };
        rest.iter().enumerate().map(proposed)
    }

    /// What follows an occurrence. Where it runs into the end of the text it goes on with what it has proposed: a period
    /// repeats.
    fn continuation<'a>(
        &'a self,
        found: Match,
        tail: &'a [TokenId],
    ) -> impl Iterator<Item = ProposedToken> + 'a {
        let mut proposed: Vec<TokenId> = Vec::new();
        let mut context = Some(found);
        iter::repeat_with(move || {
            let i = proposed.len();
            let at = self.base + found.end + i;
            let committed = self.tokens.get(at).or_else(|| tail.get(at - self.tokens.len())).copied();
            let token = committed.unwrap_or_else(|| proposed[at - self.tokens.len() - tail.len()]);
            let next = self.automaton.follow(context, token);
            let confidence = confidence(context, next, found.len + i);
            context = next;
            proposed.push(token);
            ProposedToken { token, source: Source::Ngram, confidence, second: None }
        })
    }
}

/// How often the token followed its context, less for short contexts.
fn confidence(context: Option<Match>, next: Option<Match>, n_matched: usize) -> f32 {
    let n_context = context.map_or(0, |context| context.count) as f32;
    // A match that lost tokens on the way is of another context.
    let is_longer = |next: &Match| context.is_some_and(|context| next.len == context.len + 1);
    let n_followed = next.filter(is_longer).map_or(0, |next| next.count) as f32;
    let frequency = ((n_followed + 0.5) / (n_context + 1.0)).min(1.0);
    frequency * n_matched as f32 / (n_matched as f32 + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ids(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    fn propose(proposer: &NgramProposer, tail: &[TokenId], n_tokens: usize) -> Vec<ProposedToken> {
        proposer.following(tail).take(n_tokens).collect()
    }

    fn proposer(text: &[TokenId], config: NgramConfig) -> NgramProposer {
        let mut proposer = NgramProposer::new(config);
        proposer.extend(text);
        assert!(proposer.index(usize::MAX));
        proposer
    }

    /// The definition: the longest suffix of text and tail that ends before the end, at its last place in the text,
    /// copied from there.
    fn naive(text: &[TokenId], tail: &[TokenId], min_match: usize, n_tokens: usize) -> Vec<TokenId> {
        let mut all = [text, tail].concat();
        let n_all = all.len();
        let last_end = if tail.is_empty() { text.len().saturating_sub(1) } else { text.len() };
        let ends = |len: usize| (len..=last_end).rev().find(|end| all[end - len..*end] == all[n_all - len..]);
        let Some(end) = (min_match..=n_all).rev().find_map(ends) else { return Vec::new() };
        for i in 0..n_tokens {
            all.push(all[end + i]);
        }
        all.split_off(n_all)
    }

    proptest! {
        #[test]
        fn proposals_are_those_of_the_definition(
            text in prop::collection::vec(0u32..4, 0..60),
            tail in prop::collection::vec(0u32..4, 0..5),
            min_match in 1usize..4,
            n_tokens in 0usize..12,
        ) {
            let (text, tail) = (ids(&text), ids(&tail));
            let proposer = proposer(&text, NgramConfig { min_match, window: 1_000, max_astray: 0 });
            let proposed = propose(&proposer, &tail, n_tokens);
            let tokens: Vec<TokenId> = proposed.iter().map(|proposed| proposed.token).collect();
            prop_assert_eq!(tokens, naive(&text, &tail, min_match, n_tokens));
            prop_assert!(proposed.iter().all(|proposed| (0.0..=1.0).contains(&proposed.confidence)));
        }

        #[test]
        fn pieces_give_what_the_whole_gives(
            pieces in prop::collection::vec(prop::collection::vec(0u32..3, 0..9), 0..8),
            budget in 1usize..5,
        ) {
            let config = NgramConfig { min_match: 1, window: 1_000, max_astray: 3 };
            let mut grown = NgramProposer::new(config);
            for piece in &pieces {
                grown.extend(&ids(piece));
                while !grown.index(budget) {
                    prop_assert!(propose(&grown, &[], 3).is_empty(), "not all is indexed");
                }
            }
            let whole = proposer(&ids(&pieces.concat()), config);
            prop_assert_eq!(propose(&grown, &[], 6), propose(&whole, &[], 6));
        }
    }

    #[test]
    fn an_old_beginning_is_left_behind() {
        let mut proposer = NgramProposer::new(NgramConfig { min_match: 2, window: 8, max_astray: 0 });
        proposer.extend(&ids(&[1, 2, 3]));
        proposer.extend(&ids(&(100..111).collect::<Vec<_>>()));
        proposer.extend(&ids(&[1, 2]));
        assert!(proposer.index(usize::MAX));
        assert_eq!(
            propose(&proposer, &[], 1).first().map(|next| next.token),
            Some(TokenId(3)),
            "still there"
        );
        proposer.extend(&ids(&[9, 1, 2]));
        assert!(proposer.index(usize::MAX));
        assert_eq!(propose(&proposer, &[], 1).first().map(|next| next.token), Some(TokenId(9)));
        assert!(proposer.automaton.len() <= 16);
        assert_eq!(proposer.tokens().len(), 19);
    }

    #[test]
    fn what_always_followed_is_surer_than_what_sometimes_did() {
        let config = NgramConfig::default();
        let always = propose(&proposer(&ids(&[1, 2, 3, 8, 1, 2, 3, 9, 1, 2]), config), &[], 1);
        let sometimes = propose(&proposer(&ids(&[1, 2, 4, 8, 1, 2, 3, 9, 1, 2]), config), &[], 1);
        assert_eq!((always[0].token, sometimes[0].token), (TokenId(3), TokenId(3)));
        assert!(always[0].confidence > sometimes[0].confidence, "{always:?} {sometimes:?}");
    }

    /// Passes that a text takes when each verifies up to `n_tokens` proposals.
    fn n_passes(prompt: &[TokenId], text: &[TokenId], n_tokens: usize, config: NgramConfig) -> usize {
        let (mut proposer, mut n_done, mut n_passes) = (proposer(prompt, config), 0, 0);
        while n_done < text.len() {
            let proposed = propose(&proposer, &[], n_tokens);
            let rest = &text[n_done..];
            let n_accepted =
                proposed.iter().zip(rest).take_while(|(one, token)| one.token == **token).count();
            let n_new = (n_accepted + 1).min(rest.len());
            proposer.extend(&rest[..n_new]);
            assert!(proposer.index(usize::MAX));
            n_done += n_new;
            n_passes += 1;
        }
        n_passes
    }

    #[test]
    fn a_copy_with_changes_takes_a_pass_or_two_a_change() {
        // Lines of seven tokens: the first is their number, the second a name that is changed everywhere.
        let line = |i: u32, name: u32| ids(&[100 + i, name, 1, 200 + i, 2, 300 + i, 3]);
        let original: Vec<TokenId> = (0..20).flat_map(|i| line(i, 50)).collect();
        let renamed: Vec<TokenId> = (0..20).flat_map(|i| line(i, 51)).collect();
        assert!(n_passes(&original, &renamed, 7, NgramConfig::default()) <= 30);
        // Where two tokens must match, nothing but the place tells what follows a changed one.
        let config = NgramConfig { min_match: 2, ..NgramConfig::default() };
        let with = n_passes(&original, &renamed, 7, config);
        let without = n_passes(&original, &renamed, 7, NgramConfig { max_astray: 0, ..config });
        assert!(with <= 30 && without >= 2 * with, "{with} passes, without the place {without}");
        // A token more in each line.
        let longer: Vec<TokenId> = (0..20).flat_map(|i| [line(i, 50), ids(&[400 + i])].concat()).collect();
        let with = n_passes(&original, &longer, 7, config);
        assert!(with <= 45, "{with} passes");
    }

    proptest! {
        #[test]
        fn whatever_is_copied_proposals_are_of_the_text(
            text in prop::collection::vec(0u32..6, 0..80),
            n_tokens in 0usize..12,
        ) {
            let text = ids(&text);
            let proposed = propose(&proposer(&text, NgramConfig::default()), &[], n_tokens);
            prop_assert!(proposed.len() <= n_tokens);
            prop_assert!(proposed.iter().all(|one| text.contains(&one.token)));
            prop_assert!(proposed.iter().all(|one| (0.0..=1.0).contains(&one.confidence)));
        }
    }
}
