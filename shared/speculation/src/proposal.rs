//! Proposed tokens, where they come from, and what became of them. It makes none.

use paceline_domain::{SecondGuess, TokenId};

/// Positions of a proposal that are counted apart; later ones count as the last.
pub const MAX_POSITIONS: usize = 16;

/// Who proposes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Source {
    /// The draft service's model.
    Draft,
    /// The request's own tokens.
    Ngram,
}

impl Source {
    /// Every source, in the order of [`Source::idx`].
    pub const ALL: [Self; 2] = [Self::Draft, Self::Ngram];

    /// The name in messages and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Draft => "draft",
            Self::Ngram => "ngram",
        }
    }

    /// Its place in [`Source::ALL`].
    pub fn idx(self) -> usize {
        self as usize
    }
}

/// One proposed token.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ProposedToken {
    /// The token.
    pub token: TokenId,
    /// Who proposes it; a proposal may change its source on the way.
    pub source: Source,
    /// How sure the source is, 0 to 1. Not calibrated.
    pub confidence: f32,
    /// What it would say instead.
    pub second: Option<SecondGuess>,
}

/// What a step is to verify at one place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Guess {
    /// The proposed token.
    pub token: TokenId,
    /// Another one, which gets a row of its own: a branch.
    pub second: Option<TokenId>,
}

impl From<TokenId> for Guess {
    fn from(token: TokenId) -> Self {
        Self { token, second: None }
    }
}

/// What became of a source's proposals, counted as other engines do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SourceCounters {
    /// Proposals that were verified.
    pub drafts: u64,
    /// Their tokens.
    pub draft_tokens: u64,
    /// The same by position in the proposal.
    pub drafted_per_position: [u64; MAX_POSITIONS],
    /// Tokens of them that were accepted; the free token after them is not counted.
    pub accepted_tokens: u64,
    /// The same by position in the proposal.
    pub accepted_per_position: [u64; MAX_POSITIONS],
    /// Second guesses that were verified beside them.
    pub branches: u64,
    /// Those of them that were sampled.
    pub accepted_branches: u64,
}

impl SourceCounters {
    /// Counts the tokens of this source in a proposal of which the first `n_accepted` were accepted.
    pub fn add(&mut self, source: Source, proposal: &[ProposedToken], n_accepted: usize) {
        let mine = |(_, proposed): &(usize, &ProposedToken)| proposed.source == source;
        let n_before = self.draft_tokens;
        for (position, _) in proposal.iter().enumerate().filter(mine) {
            let is_accepted = u64::from(position < n_accepted);
            let position = position.min(MAX_POSITIONS - 1);
            self.draft_tokens += 1;
            self.drafted_per_position[position] += 1;
            self.accepted_tokens += is_accepted;
            self.accepted_per_position[position] += is_accepted;
        }
        self.drafts += u64::from(self.draft_tokens > n_before);
    }

    /// Counts second guesses that were verified together, and whether one of them was right.
    pub fn add_branches(&mut self, n_branches: usize, took_branch: bool) {
        self.branches += n_branches as u64;
        self.accepted_branches += u64::from(took_branch);
    }

    /// Accepted of proposed tokens, 0 to 1; 0 when there were none.
    pub fn acceptance(&self) -> f64 {
        if self.draft_tokens == 0 { 0.0 } else { self.accepted_tokens as f64 / self.draft_tokens as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixed_proposal_is_counted_by_source_and_position() {
        let proposed = |source| ProposedToken { token: TokenId(1), source, confidence: 0.5, second: None };
        let proposal = [proposed(Source::Draft), proposed(Source::Draft), proposed(Source::Ngram)];
        let mut counters = [SourceCounters::default(); 2];
        for source in Source::ALL {
            counters[source.idx()].add(source, &proposal, 3);
            counters[source.idx()].add(source, &proposal, 1);
        }
        let [draft, ngram] = counters;
        assert_eq!((draft.drafts, draft.draft_tokens, draft.accepted_tokens), (2, 4, 3));
        assert_eq!(draft.drafted_per_position[..3], [2, 2, 0]);
        assert_eq!(draft.accepted_per_position[..3], [2, 1, 0]);
        assert_eq!((ngram.drafts, ngram.draft_tokens, ngram.accepted_tokens), (2, 2, 1));
        assert_eq!(ngram.accepted_per_position[..3], [0, 0, 1]);
        assert_eq!(draft.acceptance(), 0.75);
        let mut branched = draft;
        branched.add_branches(3, true);
        branched.add_branches(2, false);
        assert_eq!((branched.branches, branched.accepted_branches, branched.acceptance()), (5, 1, 0.75));
        assert_eq!(SourceCounters::default().acceptance(), 0.0);
    }
}
