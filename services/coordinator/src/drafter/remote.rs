//! One sequence as the draft service sees it: what it was told, and what it proposed beyond the committed tokens. Pure.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use paceline_domain::{
    DraftClose, DraftCommit, DraftControl, DraftOpen, DraftProposal, SamplingParams, TokenId,
};
use paceline_speculation::{ProposedToken, Source};

/// Most tokens of one proposal, and kept of all.
pub const MAX_BUFFERED: usize = 64;
/// Pauses before a session is opened again that the service gave up.
const REOPEN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Who has more tokens to read than this cannot be expected to answer soon.
pub const MANY_UNREAD: usize = 16;

/// Something that cannot be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Nonsense(pub String);

/// The draft service's side of a sequence.
#[derive(Debug)]
pub struct Remote {
    session: u64,
    generation: u32,
    epoch: u32,
    is_open: bool,
    /// What the service was told: committed tokens, epoch, budget.
    n_told: usize,
    /// Committed tokens since then that it has not drafted itself.
    n_unread: usize,
    told_epoch: u32,
    budget: u32,
    /// Proposed tokens that follow the committed ones.
    buffer: VecDeque<ProposedToken>,
    /// When the service may be asked again after it gave the session up, and how long the next pause is.
    reopen_at: Option<Instant>,
    pause: Duration,
    /// Since when the service could have proposed something and has not, and the tokens it had to read first.
    waiting: Option<Waiting>,
}

/// A first token that the service owes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Waiting {
    /// Since when.
    pub since: Instant,
    /// Tokens it had to read before.
    pub n_unread: usize,
}

impl Remote {
    /// A session the service does not know yet.
    pub fn new(session: u64) -> Self {
        Self {
            session,
            generation: 0,
            epoch: 0,
            is_open: false,
            n_told: 0,
            n_unread: 0,
            told_epoch: 0,
            budget: 0,
            buffer: VecDeque::new(),
            reopen_at: None,
            pause: REOPEN.0,
            waiting: None,
        }
    }

    /// Committed tokens that it has to read before it can propose anything.
    pub fn n_unread(&self, n_committed: usize) -> usize {
        if self.is_open { self.n_unread } else { n_committed }
    }

    /// Whether it may be opened now.
    pub fn may_open(&self, now: Instant) -> bool {
        self.reopen_at.is_none_or(|at| at <= now)
    }

    /// What is proposed to follow the committed tokens.
    pub fn buffer(&self) -> impl Iterator<Item = ProposedToken> + '_ {
        self.buffer.iter().copied()
    }

    /// Whether the service has the session.
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// Whether the service is to draft for it.
    pub fn is_drafting(&self) -> bool {
        self.is_open && self.budget > 0
    }

    /// The first token that is waited for, if one is.
    pub fn waiting(&self) -> Option<Waiting> {
        self.waiting
    }

    /// The connection is gone: the service knows nothing any more.
    pub fn forget(&mut self) {
        self.is_open = false;
        self.buffer.clear();
        self.waiting = None;
    }

    /// The service gave the session up.
    pub fn given_up(&mut self, generation: u32, now: Instant) {
        if generation == self.generation && self.is_open {
            self.forget();
            self.reopen_at = Some(now + self.pause);
            self.pause = (self.pause * 2).min(REOPEN.1);
        }
    }

    /// The service lacks tokens from here on.
    pub fn lacks(&mut self, generation: u32, have_len: usize) {
        if generation == self.generation && self.is_open {
            self.n_told = self.n_told.min(have_len);
        }
    }

    /// These tokens were committed. Those that were proposed otherwise end the epoch.
    pub fn committed(&mut self, tokens: &[TokenId]) {
        let n_drafted =
            tokens.iter().zip(&self.buffer).take_while(|(token, one)| one.token == **token).count();
        self.buffer.drain(..n_drafted);
        self.n_unread += tokens.len() - n_drafted;
        if n_drafted < tokens.len() && !self.buffer.is_empty() {
            self.diverged();
        }
    }

    fn diverged(&mut self) {
        self.buffer.clear();
        self.epoch += 1;
    }

    /// Takes in a proposal; `committed` are all committed tokens. Stale ones are dropped.
    ///
    /// # Errors
    /// Ids beyond the vocabulary, or more tokens than can be asked for.
    pub fn proposed(
        &mut self,
        proposal: &DraftProposal,
        committed: &[TokenId],
        n_vocab: u32,
    ) -> Result<(), Nonsense> {
        if let Some(token) = proposal.tokens.iter().find(|token| token.0 >= n_vocab) {
            return Err(Nonsense(format!("token {token} of a vocabulary of {n_vocab}")));
        }
        if let Some(second) = proposal.seconds.iter().find(|second| second.token.0 >= n_vocab) {
            return Err(Nonsense(format!("second guess {} of a vocabulary of {n_vocab}", second.token)));
        }
        if proposal.tokens.len() > MAX_BUFFERED {
            return Err(Nonsense(format!("{} tokens at once", proposal.tokens.len())));
        }
        let (start, n_committed) = (proposal.start_pos as usize, committed.len());
        let owed = (self.generation, self.told_epoch, self.n_told + self.budget as usize);
        if (proposal.generation, proposal.epoch) == (owed.0, owed.1)
            && start + proposal.tokens.len() >= owed.2
        {
            // All that was asked for, even if it comes too late to be used.
            self.waiting = None;
        }
        let is_current =
            self.is_open && (proposal.generation, proposal.epoch) == (self.generation, self.epoch);
        if !is_current || start > n_committed + self.buffer.len() {
            return Ok(());
        }
        let n_old = n_committed.saturating_sub(start).min(proposal.tokens.len());
        if proposal.tokens[..n_old] != committed[start.min(n_committed)..][..n_old] {
            // It was on its way while other tokens were committed; what follows it is wrong too.
            self.diverged();
            return Ok(());
        }
        self.buffer.truncate(start.saturating_sub(n_committed));
        let new = proposal.tokens.iter().zip(&proposal.confidence).enumerate().skip(n_old);
        let room = MAX_BUFFERED - self.buffer.len();
        self.buffer.extend(new.take(room).map(|(i, (token, confidence))| ProposedToken {
            token: *token,
            source: Source::Draft,
            confidence: *confidence,
            second: proposal.seconds.get(i).copied().filter(|second| second.token != *token),
        }));
        if !self.buffer.is_empty() {
            self.waiting = None;
            self.pause = REOPEN.0;
        }
        Ok(())
    }

    /// Whether the service, which is to draft, has something to propose now; `None` while it reads many tokens.
    pub fn is_available(&self) -> Option<bool> {
        let is_reading = self.waiting.is_some_and(|waiting| waiting.n_unread > MANY_UNREAD);
        (self.is_drafting() && !is_reading).then_some(!self.buffer.is_empty())
    }

    /// Adds to a frame what the service must be told: the session, if it may be opened, or what was committed since.
    pub fn tell(&mut self, known: &Known<'_>, budget: u32, now: Instant, frame: &mut DraftControl) {
        if !self.is_open {
            if budget > 0 && self.may_open(now) {
                self.open(known, budget, now, frame);
            }
            return;
        }
        let n_committed = known.tokens.len();
        if (self.n_told, self.told_epoch, self.budget) == (n_committed, self.epoch, budget) {
            return;
        }
        frame.commits.push(DraftCommit {
            session: self.session,
            generation: self.generation,
            epoch: self.epoch,
            base_len: self.n_told as u32,
            tokens: known.tokens[self.n_told..].to_vec(),
            budget,
        });
        self.told(n_committed, budget, now);
    }

    fn open(&mut self, known: &Known<'_>, budget: u32, now: Instant, frame: &mut DraftControl) {
        self.generation += 1;
        self.epoch = 0;
        self.is_open = true;
        self.reopen_at = None;
        self.n_told = 0;
        self.buffer.clear();
        frame.opens.push(DraftOpen {
            session: self.session,
            generation: self.generation,
            tokens: known.tokens.to_vec(),
            n_prompt: known.n_prompt as u32,
            sampling: SamplingParams { n_logprobs: None, ..known.sampling.clone() },
            budget,
            trace: known.trace.clone(),
        });
        self.told(known.tokens.len(), budget, now);
    }

    fn told(&mut self, n_committed: usize, budget: u32, now: Instant) {
        let n_unread = n_committed - self.n_told;
        self.n_unread = 0;
        (self.n_told, self.told_epoch, self.budget) = (n_committed, self.epoch, budget);
        let waits = budget > 0 && self.buffer.is_empty();
        self.waiting = waits.then(|| self.waiting.unwrap_or(Waiting { since: now, n_unread }));
    }

    /// Adds the session's end to a frame.
    pub fn close(&self, frame: &mut DraftControl) {
        if self.is_open {
            frame.closes.push(DraftClose { session: self.session, generation: self.generation });
        }
    }
}

/// What the coordinator knows of a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// Prompt and committed output.
    pub tokens: &'a [TokenId],
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// How tokens are chosen.
    pub sampling: &'a SamplingParams,
    /// W3C `traceparent` and `tracestate` of its request; empty when it is not traced.
    pub trace: &'a (String, String),
}

#[cfg(test)]
mod tests {
    use super::*;

    const N_VOCAB: u32 = 100;

    fn ids(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    fn proposal(epoch: u32, start_pos: u32, tokens: &[u32]) -> DraftProposal {
        let confidence = vec![0.5; tokens.len()];
        let tokens = ids(tokens);
        DraftProposal {
            session: 7,
            generation: 1,
            epoch,
            start_pos,
            tokens,
            confidence,
            seconds: Vec::new(),
            compute_us: 0,
        }
    }

    fn tell(remote: &mut Remote, tokens: &[TokenId], budget: u32) -> DraftControl {
        let mut frame = DraftControl::default();
        let sampling = SamplingParams::greedy();
        let trace = Default::default();
        let known = Known { tokens, n_prompt: 2, sampling: &sampling, trace: &trace };
        remote.tell(&known, budget, Instant::now(), &mut frame);
        frame
    }

    fn opened(tokens: &[TokenId]) -> Remote {
        let mut remote = Remote::new(7);
        assert_eq!(tell(&mut remote, tokens, 4).opens.len(), 1);
        remote
    }

    fn buffered(remote: &Remote) -> Vec<u32> {
        remote.buffer().map(|proposed| proposed.token.0).collect()
    }

    #[test]
    fn proposals_continue_what_is_committed_or_are_dropped() {
        let committed = ids(&[1, 2]);
        let cases = [
            (vec![proposal(0, 2, &[3, 4])], vec![3, 4]),
            (vec![proposal(0, 2, &[3]), proposal(0, 3, &[4])], vec![3, 4]),
            (vec![proposal(0, 3, &[4])], vec![]),
            (vec![proposal(1, 2, &[3])], vec![]),
            (vec![proposal(0, 1, &[2, 3])], vec![3]),
            (vec![proposal(0, 0, &[1, 2])], vec![]),
            // What is said later counts.
            (vec![proposal(0, 2, &[3, 4, 5]), proposal(0, 3, &[9])], vec![3, 9]),
            // It was drafted from other tokens: nothing of that epoch is believed any more.
            (vec![proposal(0, 1, &[9, 3]), proposal(0, 2, &[3])], vec![]),
        ];
        for (proposals, expected) in cases {
            let mut remote = opened(&committed);
            for proposal in &proposals {
                remote.proposed(proposal, &committed, N_VOCAB).expect("makes sense");
            }
            assert_eq!(buffered(&remote), expected, "{proposals:?}");
        }
    }

    #[test]
    fn an_answer_that_comes_too_late_is_an_answer() {
        let mut committed = ids(&[1, 2]);
        let mut remote = opened(&committed);
        assert_eq!((remote.n_unread(2), Remote::new(8).n_unread(2)), (0, 2));
        remote.committed(&ids(&[3, 4, 9]));
        assert_eq!(remote.n_unread(5), 3);
        committed.extend(ids(&[3, 4, 9]));
        remote.proposed(&proposal(0, 2, &[3]), &committed, N_VOCAB).expect("makes sense");
        assert!(remote.waiting().is_some(), "it was asked for four");
        remote.proposed(&proposal(0, 3, &[4, 5, 6]), &committed, N_VOCAB).expect("makes sense");
        assert!(remote.waiting().is_none() && buffered(&remote).is_empty());
    }

    #[test]
    fn a_new_epoch_is_told_even_without_new_tokens() {
        let committed = ids(&[1, 2]);
        let mut remote = opened(&committed);
        remote.proposed(&proposal(0, 1, &[9]), &committed, N_VOCAB).expect("makes sense");
        let frame = tell(&mut remote, &committed, 4);
        assert_eq!((frame.commits[0].epoch, frame.commits[0].tokens.len()), (1, 0));
    }

    #[test]
    fn nonsense_is_named() {
        let mut remote = opened(&ids(&[1]));
        assert!(remote.proposed(&proposal(0, 1, &[100]), &ids(&[1]), N_VOCAB).is_err());
        assert!(remote.proposed(&proposal(0, 1, &[1; MAX_BUFFERED + 1]), &ids(&[1]), N_VOCAB).is_err());
    }

    #[test]
    fn a_match_keeps_the_rest_and_a_difference_ends_the_epoch() {
        let mut committed = ids(&[1, 2]);
        let mut remote = opened(&committed);
        remote.proposed(&proposal(0, 2, &[3, 4, 5]), &committed, N_VOCAB).expect("makes sense");
        remote.committed(&ids(&[3, 4]));
        committed.extend(ids(&[3, 4]));
        assert_eq!(buffered(&remote), [5]);
        let frame = tell(&mut remote, &committed, 4);
        assert_eq!((frame.commits[0].epoch, frame.commits[0].base_len), (0, 2));
        assert!(tell(&mut remote, &committed, 4).is_empty(), "nothing new");
        remote.committed(&ids(&[8, 5]));
        committed.extend(ids(&[8, 5]));
        assert_eq!(buffered(&remote), [0; 0]);
        let frame = tell(&mut remote, &committed, 0);
        let commit = &frame.commits[0];
        assert_eq!((commit.epoch, commit.base_len, commit.tokens.len(), commit.budget), (1, 4, 2, 0));
    }

    #[test]
    fn a_session_that_was_given_up_is_opened_again_after_a_pause() {
        let (mut remote, tokens, now) = (opened(&ids(&[1, 2])), ids(&[1, 2]), Instant::now());
        let sampling = SamplingParams::greedy();
        let trace = Default::default();
        let known = Known { tokens: &tokens, n_prompt: 2, sampling: &sampling, trace: &trace };
        let tell = |remote: &mut Remote, after_ms: u64| {
            let mut frame = DraftControl::default();
            remote.tell(&known, 4, now + Duration::from_millis(after_ms), &mut frame);
            frame.opens.first().map(|open| open.generation)
        };
        remote.given_up(1, now);
        assert_eq!(tell(&mut remote, 50), None);
        assert_eq!(tell(&mut remote, 100), Some(2));
        remote.given_up(1, now);
        assert!(remote.is_open(), "of the life before");
        remote.given_up(2, now + Duration::from_millis(100));
        assert_eq!(tell(&mut remote, 250), None, "twice as long");
        assert_eq!(tell(&mut remote, 300), Some(3));
        remote.lacks(3, 1);
        let mut frame = DraftControl::default();
        remote.tell(&known, 4, now, &mut frame);
        assert_eq!((frame.commits[0].base_len, frame.commits[0].tokens.len()), (1, 1));
    }
}
