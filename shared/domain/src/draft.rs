//! What a coordinator and the draft service tell each other. Advice only: any of it may be lost, late or wrong without
//! changing a token.

use crate::{SamplingParams, TokenId};

/// A sequence to propose for.
#[derive(Clone, PartialEq, Debug)]
pub struct DraftOpen {
    /// Chosen by the coordinator.
    pub session: u64,
    /// Life of the id; a higher one replaces a lower one.
    pub generation: u32,
    /// Prompt and all output so far.
    pub tokens: Vec<TokenId>,
    /// Tokens of the prompt in `tokens`.
    pub n_prompt: u32,
    /// How the target chooses its tokens.
    pub sampling: SamplingParams,
    /// Most tokens to propose beyond the committed ones.
    pub budget: u32,
    /// W3C `traceparent` and `tracestate` of the request; empty when it is not traced.
    pub trace: (String, String),
}

/// Tokens that were verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DraftCommit {
    /// Whose.
    pub session: u64,
    /// Life of the id.
    pub generation: u32,
    /// Grows when the committed tokens diverge from what was proposed.
    pub epoch: u32,
    /// Committed tokens before these.
    pub base_len: u32,
    /// The tokens at `base_len` and after.
    pub tokens: Vec<TokenId>,
    /// Most tokens to propose beyond the committed ones; 0 pauses.
    pub budget: u32,
}

/// A sequence that ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DraftClose {
    /// Whose.
    pub session: u64,
    /// Life of the id.
    pub generation: u32,
}

/// What changed for all sequences since the last frame.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct DraftControl {
    /// Sequences that begin.
    pub opens: Vec<DraftOpen>,
    /// Sequences that went on.
    pub commits: Vec<DraftCommit>,
    /// Sequences that ended.
    pub closes: Vec<DraftClose>,
}

impl DraftControl {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.opens.is_empty() && self.commits.is_empty() && self.closes.is_empty()
    }
}

/// Proposed tokens.
#[derive(Clone, PartialEq, Debug)]
pub struct DraftProposal {
    /// Whose.
    pub session: u64,
    /// Life of the id.
    pub generation: u32,
    /// Epoch of the commit it continues.
    pub epoch: u32,
    /// Position of the first proposed token.
    pub start_pos: u32,
    /// The tokens.
    pub tokens: Vec<TokenId>,
    /// The draft's probability of each.
    pub confidence: Vec<f32>,
    /// What it would have said instead of each, the token itself where there is nothing; as many as there are tokens, or
    /// none.
    pub seconds: Vec<SecondGuess>,
    /// Microseconds that were computed for the session since it last proposed.
    pub compute_us: u32,
}

/// The token that a draft thinks likeliest after the one it proposes for a place.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SecondGuess {
    /// The token.
    pub token: TokenId,
    /// The draft's probability of it.
    pub confidence: f32,
}

/// The service cannot follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DraftNack {
    /// Whose sequence.
    pub session: u64,
    /// Life of the id.
    pub generation: u32,
    /// Committed tokens the service has; 0 when it has to be opened again.
    pub have_len: u32,
}

/// Everything the draft service says at once.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct DraftAnswer {
    /// New proposals.
    pub proposals: Vec<DraftProposal>,
    /// Complaints.
    pub nacks: Vec<DraftNack>,
}

impl DraftAnswer {
    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        self.proposals.is_empty() && self.nacks.is_empty()
    }
}
