//! Which tokens of which sessions run in the next pass. Pure. Sessions that only need their next token go first, so that
//! a long prompt does not hold them up; what is left of the rows goes to catching up.

use paceline_domain::{BlockId, TokenId};

use crate::sessions::{Key, Sessions};

/// A session with no more tokens than this to run is nearly up to date.
const FEW: usize = 16;

/// What bounds a pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PassLimits {
    /// Most token rows.
    pub max_rows: usize,
    /// Most of them for catching up, when other sessions wait.
    pub prompt_rows: usize,
}

/// Tokens of one session to run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// Whose.
    pub key: Key,
    /// Position of the first token.
    pub start_pos: usize,
    /// The tokens; at least one.
    pub tokens: Vec<TokenId>,
    /// KV blocks of the session.
    pub blocks: Vec<BlockId>,
    /// Whether the chunk reaches the end of the chain, so that a token follows.
    pub is_last: bool,
}

impl Chunk {
    /// Position after the last token.
    pub fn end(&self) -> usize {
        self.start_pos + self.tokens.len()
    }
}

/// The next pass; empty when nobody waits. Blocks are reserved, for which idle sessions may be given up.
pub fn plan(sessions: &mut Sessions, limits: PassLimits) -> Vec<Chunk> {
    let n_pending = |sessions: &Sessions, key: &Key| {
        sessions.get(*key).map_or(0, |session| session.history().len() - session.n_computed())
    };
    let (near, far): (Vec<Key>, Vec<Key>) =
        sessions.waiting().into_iter().partition(|key| n_pending(sessions, key) <= FEW);
    let mut rows_left = limits.max_rows;
    let mut chunks = Vec::new();
    for key in near {
        rows_left -= add(sessions, key, rows_left, &mut chunks);
    }
    let mut rows_left = if chunks.is_empty() { rows_left } else { rows_left.min(limits.prompt_rows) };
    for key in far {
        rows_left -= add(sessions, key, rows_left, &mut chunks);
    }
    chunks
}

/// Adds a session's chunk of at most `rows_left` rows; how many it takes.
fn add(sessions: &mut Sessions, key: Key, rows_left: usize, chunks: &mut Vec<Chunk>) -> usize {
    let Some(session) = sessions.get(key).filter(|_| rows_left > 0) else { return 0 };
    let (start, len) = (session.n_computed(), session.history().len());
    let end = len.min(start + rows_left);
    if !sessions.reserve(key, end) {
        return 0;
    }
    let session = sessions.get(key).expect("invariant: it was reserved for");
    chunks.push(Chunk {
        key,
        start_pos: start,
        tokens: session.history().tokens()[start..end].to_vec(),
        blocks: session.blocks().to_vec(),
        is_last: end == len,
    });
    end - start
}

#[cfg(test)]
mod tests {
    use paceline_domain::{DraftControl, DraftOpen, SamplingParams};

    use super::*;
    use crate::{
        choice::Drafted,
        sessions::{Limits, StreamId},
    };

    fn sessions(n_kv_blocks: u32) -> Sessions {
        Sessions::new(Limits { max_sessions: 8, context: 1_000, n_vocab: 10, max_ahead: 4, n_kv_blocks })
    }

    fn open(sessions: &mut Sessions, id: u64, n_tokens: usize) {
        let open = DraftOpen {
            session: id,
            generation: 1,
            tokens: vec![TokenId(1); n_tokens],
            n_prompt: 1,
            sampling: SamplingParams::greedy(),
            budget: 2,
            trace: Default::default(),
        };
        sessions.control(StreamId(0), DraftControl { opens: vec![open], ..DraftControl::default() });
    }

    /// Session, start, length and whether it is the last of each chunk; all are then computed.
    fn step(sessions: &mut Sessions, limits: PassLimits) -> Vec<(u64, usize, usize, bool)> {
        let chunks = plan(sessions, limits);
        for chunk in &chunks {
            sessions.computed(chunk.key, chunk.end());
            if chunk.is_last {
                sessions.drafted(chunk.key, Drafted { token: TokenId(2), confidence: 0.5, second: None });
            }
        }
        chunks.iter().map(|chunk| (chunk.key.1, chunk.start_pos, chunk.tokens.len(), chunk.is_last)).collect()
    }

    #[test]
    fn near_sessions_go_first_and_prompts_do_not_hold_them_up() {
        let mut sessions = sessions(100);
        open(&mut sessions, 1, 100);
        open(&mut sessions, 2, 3);
        let limits = PassLimits { max_rows: 64, prompt_rows: 20 };
        assert_eq!(step(&mut sessions, limits), [(2, 0, 3, true), (1, 0, 20, false)]);
        assert_eq!(step(&mut sessions, limits), [(2, 3, 1, true), (1, 20, 20, false)]);
        // The second session has its two tokens: nobody waits for the prompt any more.
        assert_eq!(step(&mut sessions, limits), [(1, 40, 60, true)]);
        assert_eq!(step(&mut sessions, limits), [(1, 100, 1, true)]);
        assert_eq!(step(&mut sessions, limits), []);
    }

    #[test]
    fn rows_are_never_more_than_allowed() {
        let mut sessions = sessions(100);
        (1..=5).for_each(|id| open(&mut sessions, id, 10));
        let chunks = step(&mut sessions, PassLimits { max_rows: 25, prompt_rows: 25 });
        assert_eq!(chunks, [(1, 0, 10, true), (2, 0, 10, true), (3, 0, 5, false)]);
    }

    #[test]
    fn without_blocks_an_idle_session_goes_and_else_the_one_that_asks() {
        let mut sessions = sessions(3);
        let limits = PassLimits { max_rows: 64, prompt_rows: 64 };
        open(&mut sessions, 1, 10);
        step(&mut sessions, limits);
        step(&mut sessions, limits);
        open(&mut sessions, 2, 33);
        assert_eq!(step(&mut sessions, limits), [(2, 0, 33, true)], "session 1 was idle");
        open(&mut sessions, 3, 2);
        assert_eq!(step(&mut sessions, limits), [(2, 33, 1, true)], "nobody is idle");
        let nacked: Vec<u64> =
            sessions.take_answers()[&StreamId(0)].nacks.iter().map(|nack| nack.session).collect();
        assert_eq!(nacked, [1, 3]);
    }
}
