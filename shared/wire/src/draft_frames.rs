//! Frames between coordinator and draft service, to and from the domain. A message that is malformed is told apart from
//! the others of its frame: one bad session must not end all.

use paceline_domain::{
    DraftAnswer, DraftClose, DraftCommit, DraftControl, DraftNack, DraftOpen, DraftProposal, SecondGuess,
    TokenId,
};

use crate::{ProtocolError, draft};

/// A message that cannot be understood.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Malformed {
    /// Whose session.
    pub session: u64,
    /// Life of the id.
    pub generation: u32,
    /// What is wrong.
    pub error: ProtocolError,
}

impl From<&DraftControl> for draft::ControlFrame {
    fn from(control: &DraftControl) -> Self {
        Self {
            opens: control.opens.iter().map(Into::into).collect(),
            commits: control.commits.iter().map(Into::into).collect(),
            closes: control.closes.iter().map(Into::into).collect(),
        }
    }
}

/// The messages of a frame that make sense, and the others.
pub fn control(frame: draft::ControlFrame) -> (DraftControl, Vec<Malformed>) {
    let mut control = DraftControl::default();
    let mut malformed = Vec::new();
    for open in frame.opens {
        let (session, generation) = (open.session, open.generation);
        match DraftOpen::try_from(open) {
            Ok(open) => control.opens.push(open),
            Err(error) => malformed.push(Malformed { session, generation, error }),
        }
    }
    control.commits = frame.commits.into_iter().map(Into::into).collect();
    control.closes = frame.closes.into_iter().map(Into::into).collect();
    (control, malformed)
}

impl From<&DraftAnswer> for draft::ProposalFrame {
    fn from(answer: &DraftAnswer) -> Self {
        Self {
            proposals: answer.proposals.iter().map(Into::into).collect(),
            nacks: answer.nacks.iter().map(Into::into).collect(),
        }
    }
}

/// The messages of a frame that make sense, and the others.
pub fn answer(frame: draft::ProposalFrame) -> (DraftAnswer, Vec<Malformed>) {
    let mut answer = DraftAnswer::default();
    let mut malformed = Vec::new();
    for proposal in frame.proposals {
        let (session, generation) = (proposal.session, proposal.generation);
        match DraftProposal::try_from(proposal) {
            Ok(proposal) => answer.proposals.push(proposal),
            Err(error) => malformed.push(Malformed { session, generation, error }),
        }
    }
    answer.nacks = frame.nacks.into_iter().map(Into::into).collect();
    (answer, malformed)
}

impl From<&DraftOpen> for draft::Open {
    fn from(open: &DraftOpen) -> Self {
        Self {
            session: open.session,
            generation: open.generation,
            tokens: tokens(&open.tokens),
            n_prompt: open.n_prompt,
            sampling: Some((&open.sampling).into()),
            budget: open.budget,
            traceparent: open.trace.0.clone(),
            tracestate: open.trace.1.clone(),
        }
    }
}

impl TryFrom<draft::Open> for DraftOpen {
    type Error = ProtocolError;

    fn try_from(open: draft::Open) -> Result<Self, ProtocolError> {
        let sampling = open
            .sampling
            .ok_or_else(|| ProtocolError(format!("session {} is opened without sampling", open.session)))?;
        if open.tokens.is_empty() || open.n_prompt as usize > open.tokens.len() {
            let (n_prompt, n_tokens) = (open.n_prompt, open.tokens.len());
            let session = open.session;
            return Err(ProtocolError(format!(
                "session {session}: a prompt of {n_prompt} among {n_tokens} tokens"
            )));
        }
        Ok(Self {
            session: open.session,
            generation: open.generation,
            tokens: token_ids(open.tokens),
            n_prompt: open.n_prompt,
            sampling: sampling.into(),
            budget: open.budget,
            trace: (open.traceparent, open.tracestate),
        })
    }
}

impl From<&DraftCommit> for draft::Commit {
    fn from(commit: &DraftCommit) -> Self {
        Self {
            session: commit.session,
            generation: commit.generation,
            epoch: commit.epoch,
            base_len: commit.base_len,
            tokens: tokens(&commit.tokens),
            budget: commit.budget,
        }
    }
}

impl From<draft::Commit> for DraftCommit {
    fn from(commit: draft::Commit) -> Self {
        Self {
            session: commit.session,
            generation: commit.generation,
            epoch: commit.epoch,
            base_len: commit.base_len,
            tokens: token_ids(commit.tokens),
            budget: commit.budget,
        }
    }
}

impl From<&DraftClose> for draft::Close {
    fn from(close: &DraftClose) -> Self {
        Self { session: close.session, generation: close.generation }
    }
}

impl From<draft::Close> for DraftClose {
    fn from(close: draft::Close) -> Self {
        Self { session: close.session, generation: close.generation }
    }
}

impl From<&DraftProposal> for draft::Proposal {
    fn from(proposal: &DraftProposal) -> Self {
        Self {
            session: proposal.session,
            generation: proposal.generation,
            epoch: proposal.epoch,
            start_pos: proposal.start_pos,
            tokens: tokens(&proposal.tokens),
            confidence: proposal.confidence.clone(),
            compute_us: proposal.compute_us,
            second_tokens: proposal.seconds.iter().map(|second| second.token.0).collect(),
            second_confidence: proposal.seconds.iter().map(|second| second.confidence).collect(),
        }
    }
}

impl TryFrom<draft::Proposal> for DraftProposal {
    type Error = ProtocolError;

    fn try_from(proposal: draft::Proposal) -> Result<Self, ProtocolError> {
        let (session, n_tokens, n_confidences) =
            (proposal.session, proposal.tokens.len(), proposal.confidence.len());
        if n_tokens == 0 || n_confidences != n_tokens {
            return Err(ProtocolError(format!(
                "session {session}: {n_tokens} tokens are proposed with {n_confidences} confidences"
            )));
        }
        let (n_seconds, n_confidences) = (proposal.second_tokens.len(), proposal.second_confidence.len());
        if n_seconds != n_confidences || (n_seconds > 0 && n_seconds != n_tokens) {
            return Err(ProtocolError(format!(
                "session {session}: {n_tokens} tokens are proposed with {n_seconds} second guesses and {n_confidences} \
                 confidences of these"
            )));
        }
        let mut confidences = proposal.confidence.iter().chain(&proposal.second_confidence);
        if let Some(confidence) = confidences.find(|value| !(0.0..=1.0).contains(*value)) {
            return Err(ProtocolError(format!("session {session}: a confidence of {confidence}")));
        }
        let seconds = proposal.second_tokens.into_iter().zip(proposal.second_confidence);
        let second = |(token, confidence)| SecondGuess { token: TokenId(token), confidence };
        Ok(Self {
            session,
            generation: proposal.generation,
            epoch: proposal.epoch,
            start_pos: proposal.start_pos,
            tokens: token_ids(proposal.tokens),
            confidence: proposal.confidence,
            seconds: seconds.map(second).collect(),
            compute_us: proposal.compute_us,
        })
    }
}

impl From<&DraftNack> for draft::Nack {
    fn from(nack: &DraftNack) -> Self {
        Self { session: nack.session, generation: nack.generation, have_len: nack.have_len }
    }
}

impl From<draft::Nack> for DraftNack {
    fn from(nack: draft::Nack) -> Self {
        Self { session: nack.session, generation: nack.generation, have_len: nack.have_len }
    }
}

fn tokens(ids: &[TokenId]) -> Vec<u32> {
    ids.iter().map(|id| id.0).collect()
}

fn token_ids(ids: Vec<u32>) -> Vec<TokenId> {
    ids.into_iter().map(TokenId).collect()
}

#[cfg(test)]
mod tests {
    use paceline_domain::SamplingParams;

    use super::*;

    fn open(session: u64) -> DraftOpen {
        DraftOpen {
            session,
            generation: 2,
            tokens: vec![TokenId(5), TokenId(6)],
            n_prompt: 1,
            sampling: SamplingParams { seed: u64::MAX, ..SamplingParams::greedy() },
            budget: 4,
            trace: ("00-1-2-01".into(), "a=b".into()),
        }
    }

    fn proposal(session: u64) -> DraftProposal {
        DraftProposal {
            session,
            generation: 1,
            epoch: 3,
            start_pos: 7,
            tokens: vec![TokenId(9)],
            confidence: vec![0.5],
            seconds: vec![SecondGuess { token: TokenId(4), confidence: 0.25 }],
            compute_us: 1_500,
        }
    }

    #[test]
    fn frames_survive_the_wire() {
        let commit = DraftCommit {
            session: 1,
            generation: 2,
            epoch: 3,
            base_len: 4,
            tokens: vec![TokenId(5)],
            budget: 6,
        };
        let close = DraftClose { session: 7, generation: 8 };
        let control = DraftControl { opens: vec![open(1)], commits: vec![commit], closes: vec![close] };
        assert_eq!(super::control((&control).into()), (control, vec![]));
        let nack = DraftNack { session: 1, generation: 2, have_len: 3 };
        let answer = DraftAnswer { proposals: vec![proposal(1)], nacks: vec![nack] };
        assert_eq!(super::answer((&answer).into()), (answer, vec![]));
    }

    #[test]
    fn a_malformed_message_is_named_and_the_others_stay() {
        let control = DraftControl { opens: (1..=4).map(open).collect(), ..DraftControl::default() };
        let mut frame = draft::ControlFrame::from(&control);
        frame.opens[0].sampling = None;
        frame.opens[1].tokens.clear();
        frame.opens[2].n_prompt = 3;
        let (understood, malformed) = super::control(frame);
        assert_eq!(understood.opens, [open(4)]);
        let named: Vec<_> = malformed.iter().map(|one| (one.session, one.generation)).collect();
        assert_eq!(named, [(1, 2), (2, 2), (3, 2)]);

        let answer = DraftAnswer { proposals: (1..=6).map(proposal).collect(), nacks: vec![] };
        let mut frame = draft::ProposalFrame::from(&answer);
        frame.proposals[0].confidence[0] = f32::NAN;
        frame.proposals[1].confidence.clear();
        frame.proposals[2].tokens.clear();
        frame.proposals[2].confidence.clear();
        frame.proposals[3].second_confidence[0] = 1.5;
        frame.proposals[4].second_tokens.push(3);
        let (understood, malformed) = super::answer(frame);
        assert_eq!(understood.proposals, [proposal(6)]);
        assert_eq!(malformed.len(), 5);
    }
}
