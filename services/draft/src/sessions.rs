//! What is known of each sequence: the committed tokens, the tokens drafted beyond them, and how many of all are in the
//! KV memory. Pure: events in, proposals and complaints out; no clock, no IO, no model.
//!
//! Rollback is implicit. A commit that differs from what was drafted cuts the chain at the first difference; keys and
//! values behind it are overwritten by the next pass. Tokens that were committed without having been drafted are caught
//! up with in as few passes as rows allow.

use std::collections::BTreeMap;

use paceline_domain::{
    BlockId, DraftAnswer, DraftClose, DraftCommit, DraftControl, DraftNack, DraftOpen, DraftProposal,
    SamplingParams, SecondGuess, TokenId, group::BLOCK_POSITIONS,
};
use paceline_sampling::TokenHistory;

use crate::choice::Drafted;

/// Sessions of one stream that may be in quarantine before the stream is given up.
pub const MAX_QUARANTINED: usize = 64;

/// A coordinator's stream.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StreamId(pub u64);

/// A session; coordinators choose their ids independently.
pub type Key = (StreamId, u64);

/// What bounds all sessions together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Most sessions.
    pub max_sessions: usize,
    /// Most tokens of one sequence.
    pub context: usize,
    /// Usable tokens of the vocabulary.
    pub n_vocab: u32,
    /// Most tokens drafted ahead of what is committed.
    pub max_ahead: u32,
    /// Blocks of the KV pool.
    pub n_kv_blocks: u32,
}

/// One sequence.
#[derive(Clone, Debug)]
pub struct Session {
    generation: u32,
    epoch: u32,
    sampling: SamplingParams,
    /// Committed tokens, then drafted ones.
    history: TokenHistory,
    n_committed: usize,
    /// Tokens whose keys and values are in the KV memory; always fewer than there are.
    n_computed: usize,
    /// Tokens that the coordinator knows of: committed, or proposed.
    n_known: usize,
    /// What was drafted beyond the committed tokens.
    drafted: Vec<Drafted>,
    /// Microseconds that were computed for it since it last proposed.
    compute_us: u32,
    blocks: Vec<BlockId>,
    budget: usize,
    last_used: u64,
    trace: (String, String),
}

#[derive(Clone, Debug)]
enum Entry {
    Live(Box<Session>),
    /// It sent what cannot be; nothing of this generation is looked at any more.
    Quarantined {
        generation: u32,
    },
}

/// All sequences of all coordinators.
#[derive(Debug)]
pub struct Sessions {
    limits: Limits,
    entries: BTreeMap<Key, Entry>,
    free_blocks: Vec<BlockId>,
    /// Counts events: who was used last.
    n_events: u64,
    nacks: Vec<(StreamId, DraftNack)>,
}

impl Session {
    /// How the target chooses tokens; asks for log probabilities, which become confidences.
    pub fn sampling(&self) -> &SamplingParams {
        &self.sampling
    }

    /// Committed and drafted tokens.
    pub fn history(&self) -> &TokenHistory {
        &self.history
    }

    /// Tokens in the KV memory.
    pub fn n_computed(&self) -> usize {
        self.n_computed
    }

    /// Committed tokens.
    pub fn n_committed(&self) -> usize {
        self.n_committed
    }

    /// Tokens drafted ahead.
    pub fn n_ahead(&self) -> usize {
        self.history.len() - self.n_committed
    }

    /// W3C `traceparent` and `tracestate` of the request; empty when it is not traced.
    pub fn trace(&self) -> &(String, String) {
        &self.trace
    }

    /// KV blocks.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Whether it waits for a token.
    fn wants_token(&self, context: usize) -> bool {
        // The token after the last position of the context can be chosen, but not run.
        self.n_ahead() < self.budget && self.history.len() < context
    }

    /// Appends committed tokens; what was drafted otherwise is forgotten.
    fn advance(&mut self, tokens: &[TokenId], epoch: u32) {
        let drafted = &self.history.tokens()[self.n_committed..];
        let n_matched = tokens.iter().zip(drafted).take_while(|(one, other)| one == other).count();
        if n_matched < tokens.len() {
            let n_kept = self.n_committed + n_matched;
            self.history.truncate(n_kept);
            self.history.extend(&tokens[n_matched..]);
            self.n_computed = self.n_computed.min(n_kept);
            self.n_known = self.n_known.min(n_kept);
            self.drafted.clear();
        } else {
            self.drafted.drain(..n_matched);
        }
        self.n_committed += tokens.len();
        self.n_known = self.n_known.max(self.n_committed);
        if epoch > self.epoch {
            // What was proposed under the old epoch is refused there: it is said again.
            self.epoch = epoch;
            self.n_known = self.n_committed;
        }
    }
}

impl Sessions {
    /// None yet.
    pub fn new(limits: Limits) -> Self {
        let free_blocks = (0..limits.n_kv_blocks).rev().map(BlockId).collect();
        Self { limits, entries: BTreeMap::new(), free_blocks, n_events: 0, nacks: Vec::new() }
    }

    /// A live session.
    pub fn get(&self, key: Key) -> Option<&Session> {
        match self.entries.get(&key)? {
            Entry::Live(session) => Some(session),
            Entry::Quarantined { .. } => None,
        }
    }

    /// Live sessions.
    pub fn live(&self) -> impl Iterator<Item = (Key, &Session)> {
        self.entries.iter().filter_map(|(key, entry)| match entry {
            Entry::Live(session) => Some((*key, session.as_ref())),
            Entry::Quarantined { .. } => None,
        })
    }

    /// Positions that one session can have at most, when there is no other.
    pub fn n_positions(&self) -> usize {
        (self.limits.n_kv_blocks as usize * BLOCK_POSITIONS).min(self.limits.context)
    }

    /// Blocks nobody holds.
    pub fn n_free_blocks(&self) -> usize {
        self.free_blocks.len()
    }

    /// Whether so many sessions of a stream are in quarantine that nothing it says is worth reading.
    pub fn is_hopeless(&self, stream: StreamId) -> bool {
        let of_stream = self.entries.range((stream, 0)..=(stream, u64::MAX));
        of_stream.filter(|(_, entry)| matches!(entry, Entry::Quarantined { .. })).count() > MAX_QUARANTINED
    }

    /// Takes in a frame.
    pub fn control(&mut self, stream: StreamId, control: DraftControl) {
        control.opens.into_iter().for_each(|open| self.open(stream, open));
        control.commits.into_iter().for_each(|commit| self.commit(stream, &commit));
        control.closes.into_iter().for_each(|close| self.close(stream, close));
    }

    /// Forgets a stream's sessions.
    pub fn leave(&mut self, stream: StreamId) {
        let keys: Vec<Key> =
            self.entries.range((stream, 0)..=(stream, u64::MAX)).map(|(key, _)| *key).collect();
        keys.into_iter().for_each(|key| self.remove(key));
        self.nacks.retain(|(other, _)| *other != stream);
    }

    /// Ends a session that said what cannot be; the others go on.
    pub fn quarantine(&mut self, key: Key, generation: u32, problem: &str) {
        tracing::warn!(stream = key.0.0, session = key.1, generation, problem, "session in quarantine");
        self.remove(key);
        self.entries.insert(key, Entry::Quarantined { generation });
    }

    fn open(&mut self, stream: StreamId, open: DraftOpen) {
        let key = (stream, open.session);
        let generation = match self.entries.get(&key) {
            Some(Entry::Live(session)) => Some(session.generation),
            Some(Entry::Quarantined { generation }) => Some(*generation),
            None => None,
        };
        if generation.is_some_and(|generation| open.generation <= generation) {
            return;
        }
        if let Err(problem) = self.check_open(&open) {
            return self.quarantine(key, open.generation, &problem);
        }
        self.remove(key);
        if self.live().count() >= self.limits.max_sessions && !self.evict(key) {
            return self.nack(key, open.generation, 0);
        }
        let mut history = TokenHistory::new(open.n_prompt as usize);
        history.extend(&open.tokens);
        let n_committed = open.tokens.len();
        let session = Session {
            generation: open.generation,
            epoch: 0,
            sampling: SamplingParams { n_logprobs: Some(0), ..open.sampling },
            history,
            n_committed,
            n_computed: 0,
            n_known: n_committed,
            drafted: Vec::new(),
            compute_us: 0,
            blocks: Vec::new(),
            budget: open.budget.min(self.limits.max_ahead) as usize,
            last_used: self.tick(),
            trace: open.trace,
        };
        self.entries.insert(key, Entry::Live(Box::new(session)));
    }

    fn check_open(&self, open: &DraftOpen) -> Result<(), String> {
        let Limits { context, n_vocab, .. } = self.limits;
        if open.tokens.is_empty() || open.tokens.len() > context {
            return Err(format!("{} tokens; 1 to {context} fit", open.tokens.len()));
        }
        self.check_tokens(&open.tokens)?;
        if let Some(problem) = open.sampling.problems(n_vocab).into_iter().next() {
            return Err(problem);
        }
        if !open.sampling.logit_bias.is_sorted_by(|one, other| one.0 < other.0) {
            return Err("the logit bias is not sorted by token".into());
        }
        Ok(())
    }

    fn check_tokens(&self, tokens: &[TokenId]) -> Result<(), String> {
        let n_vocab = self.limits.n_vocab;
        match tokens.iter().find(|token| token.0 >= n_vocab) {
            Some(token) => Err(format!("token {token} of a vocabulary of {n_vocab}")),
            None => Ok(()),
        }
    }

    fn commit(&mut self, stream: StreamId, commit: &DraftCommit) {
        let key = (stream, commit.session);
        match self.entries.get(&key) {
            Some(Entry::Live(session)) if session.generation == commit.generation => {}
            // Of a life that is over.
            Some(Entry::Live(session)) if session.generation > commit.generation => return,
            Some(Entry::Quarantined { generation }) if *generation >= commit.generation => return,
            _ => return self.nack(key, commit.generation, 0),
        }
        match self.check_commit(key, commit) {
            Ok(Some(have_len)) => self.nack(key, commit.generation, have_len),
            Ok(None) => self.advance(key, commit),
            Err(problem) => self.quarantine(key, commit.generation, &problem),
        }
    }

    /// Whether a commit fits; where tokens before it are missing, how many there are.
    fn check_commit(&self, key: Key, commit: &DraftCommit) -> Result<Option<u32>, String> {
        let session = self.get(key).expect("invariant: commit() found it");
        self.check_tokens(&commit.tokens)?;
        if commit.epoch < session.epoch {
            return Err(format!("epoch {} after {}", commit.epoch, session.epoch));
        }
        let (base, n_committed) = (commit.base_len as usize, session.n_committed);
        if base > n_committed {
            return Ok(Some(n_committed as u32));
        }
        let held = &session.history.tokens()[base..n_committed];
        if held.iter().zip(&commit.tokens).any(|(held, token)| held != token) {
            return Err(format!("tokens from position {base} on are committed anew, otherwise"));
        }
        let (len, context) = (base + commit.tokens.len(), self.limits.context);
        if len > context {
            return Err(format!("{len} tokens; at most {context} fit"));
        }
        Ok(None)
    }

    fn advance(&mut self, key: Key, commit: &DraftCommit) {
        let (now, max_ahead) = (self.tick(), self.limits.max_ahead);
        let session = self.live_mut(key);
        let n_held = session.n_committed - commit.base_len as usize;
        session.advance(commit.tokens.get(n_held..).unwrap_or_default(), commit.epoch);
        session.budget = commit.budget.min(max_ahead) as usize;
        session.last_used = now;
        // Blocks behind the chain's end go back.
        let n_needed = session.history.len().div_ceil(BLOCK_POSITIONS);
        let surplus = session.blocks.split_off(n_needed.min(session.blocks.len()));
        self.free_blocks.extend(surplus);
    }

    fn close(&mut self, stream: StreamId, close: DraftClose) {
        let key = (stream, close.session);
        let is_meant = match self.entries.get(&key) {
            Some(Entry::Live(session)) => session.generation <= close.generation,
            Some(Entry::Quarantined { generation }) => *generation <= close.generation,
            None => false,
        };
        if is_meant {
            self.remove(key);
        }
    }

    /// Live sessions that wait for a token, the least far ahead first.
    pub fn waiting(&self) -> Vec<Key> {
        let context = self.limits.context;
        let mut waiting: Vec<_> = self.live().filter(|(_, session)| session.wants_token(context)).collect();
        waiting.sort_by_key(|(_, session)| (session.n_ahead(), session.last_used));
        waiting.into_iter().map(|(key, _)| key).collect()
    }

    /// Makes sure that a session's blocks hold its first `n_positions` tokens. Where the pool has none left, the session
    /// that has been idle longest is given up; where none is idle, this one. False means that it is gone.
    pub fn reserve(&mut self, key: Key, n_positions: usize) -> bool {
        let n_blocks = n_positions.div_ceil(BLOCK_POSITIONS);
        loop {
            let Some(Entry::Live(session)) = self.entries.get_mut(&key) else { return false };
            let n_missing = n_blocks.saturating_sub(session.blocks.len());
            if n_missing <= self.free_blocks.len() {
                let n_left = self.free_blocks.len() - n_missing;
                session.blocks.extend(self.free_blocks.drain(n_left..).rev());
                return true;
            }
            if !self.evict(key) {
                self.give_up(key);
                return false;
            }
        }
    }

    /// Gives up the session that has been idle longest, but not this one; whether there was one.
    fn evict(&mut self, but: Key) -> bool {
        let context = self.limits.context;
        let idle = self.live().filter(|(key, session)| *key != but && !session.wants_token(context));
        let Some((key, _)) = idle.min_by_key(|(_, session)| session.last_used) else { return false };
        self.give_up(key);
        true
    }

    fn give_up(&mut self, key: Key) {
        let generation = self.live_mut(key).generation;
        self.remove(key);
        self.nack(key, generation, 0);
    }

    /// A pass has computed for a session for so many microseconds.
    pub fn took(&mut self, key: Key, us: u32) {
        let compute_us = &mut self.live_mut(key).compute_us;
        *compute_us = compute_us.saturating_add(us);
    }

    /// A pass has put a session's first `n_computed` tokens into the KV memory.
    pub fn computed(&mut self, key: Key, n_computed: usize) {
        self.live_mut(key).n_computed = n_computed;
    }

    /// A pass has given the next token of a chain.
    pub fn drafted(&mut self, key: Key, drafted: Drafted) {
        let session = self.live_mut(key);
        session.history.push(drafted.token);
        session.drafted.push(drafted);
    }

    /// Everything there is to say, for each stream.
    pub fn take_answers(&mut self) -> BTreeMap<StreamId, DraftAnswer> {
        let mut answers: BTreeMap<StreamId, DraftAnswer> = BTreeMap::new();
        for (stream, nack) in self.nacks.drain(..) {
            answers.entry(stream).or_default().nacks.push(nack);
        }
        for ((stream, id), entry) in &mut self.entries {
            let Entry::Live(session) = entry else { continue };
            let start = session.n_known;
            let tokens = &session.history.tokens()[start..];
            if tokens.is_empty() {
                continue;
            }
            let drafted = &session.drafted[start - session.n_committed..];
            let none = |drafted: &Drafted| SecondGuess { token: drafted.token, confidence: 0.0 };
            let second = |drafted: &Drafted| drafted.second.unwrap_or_else(|| none(drafted));
            let proposal = DraftProposal {
                session: *id,
                generation: session.generation,
                epoch: session.epoch,
                start_pos: start as u32,
                tokens: tokens.to_vec(),
                confidence: drafted.iter().map(|drafted| drafted.confidence).collect(),
                seconds: drafted.iter().map(second).collect(),
                compute_us: std::mem::take(&mut session.compute_us),
            };
            session.n_known = session.history.len();
            answers.entry(*stream).or_default().proposals.push(proposal);
        }
        answers
    }

    /// An answer could not be sent: its proposals are said again with the next one.
    pub fn unsaid(&mut self, stream: StreamId, answer: DraftAnswer) {
        for proposal in answer.proposals {
            if let Some(Entry::Live(session)) = self.entries.get_mut(&(stream, proposal.session)) {
                session.n_known = session.n_committed;
                session.compute_us = session.compute_us.saturating_add(proposal.compute_us);
            }
        }
        self.nacks.extend(answer.nacks.into_iter().map(|nack| (stream, nack)));
    }

    fn nack(&mut self, key: Key, generation: u32, have_len: u32) {
        self.nacks.push((key.0, DraftNack { session: key.1, generation, have_len }));
    }

    fn remove(&mut self, key: Key) {
        if let Some(Entry::Live(session)) = self.entries.remove(&key) {
            self.free_blocks.extend(session.blocks);
        }
    }

    fn live_mut(&mut self, key: Key) -> &mut Session {
        match self.entries.get_mut(&key) {
            Some(Entry::Live(session)) => session,
            _ => unreachable!("invariant: the caller found session {key:?}"),
        }
    }

    fn tick(&mut self) -> u64 {
        self.n_events += 1;
        self.n_events
    }
}

#[cfg(test)]
#[path = "sessions_tests.rs"]
mod tests;
