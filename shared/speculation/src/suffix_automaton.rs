//! An online suffix automaton: every substring of a text that grows at its end, how often it occurs and where it was
//! last. It keeps no text and proposes nothing.
//!
//! The construction is that of Blumer et al. 1985: at most 2n states and 3n transitions, amortized constant time a
//! token. A state stands for all strings that end at the same places. After each token the states of the text's
//! suffixes that occurred before, longest first, are told that they occur again; that walk is cut off after
//! [`MAX_REFRESHED`] states, which keeps a text of one repeated token linear. Beyond it a state's last place may be an
//! earlier one; it is a true occurrence all the same.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{BuildHasher, Hasher, RandomState},
};

use paceline_domain::TokenId;

/// States that are refreshed after a token. In texts that are not periodic there are a handful.
pub const MAX_REFRESHED: usize = 64;

const ROOT: u32 = 0;
const NONE: u32 = u32::MAX;
/// The golden ratio, as a fraction of 2^64; odd.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// A substring of the text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Match {
    state: u32,
    /// Tokens of the substring.
    pub len: usize,
    /// Index of the token after one of its occurrences: of the last one, or of an earlier one where the text is periodic.
    pub end: usize,
    /// How often it is known to occur.
    pub count: usize,
}

#[derive(Clone, Debug)]
struct State {
    /// Tokens of its longest string.
    len: u32,
    /// State of the longest suffix that occurs elsewhere too.
    link: u32,
    end: u32,
    count: u32,
    /// Its first transition, if `next` is not `NONE`: most states have no other one.
    token: TokenId,
    next: u32,
    /// The others, as a list and in the table.
    first_edge: u32,
}

/// Further transitions of a state as a list, so that they can be copied.
#[derive(Clone, Debug)]
struct Edge {
    token: TokenId,
    next: u32,
}

/// A hash of two numbers by one long multiplication, with a secret seed: texts are others', and each token asks for
/// several entries.
#[derive(Clone, Debug)]
struct Seeded(u64);

/// A hash on its way.
struct Folded(u64);

impl Seeded {
    fn new() -> Self {
        Self(RandomState::new().hash_one(0))
    }
}

impl BuildHasher for Seeded {
    type Hasher = Folded;

    fn build_hasher(&self) -> Folded {
        Folded(self.0)
    }
}

impl Hasher for Folded {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32(u32::from(*byte)));
    }

    fn write_u32(&mut self, value: u32) {
        let product = u128::from(self.0 ^ u64::from(value)) * u128::from(MULTIPLIER);
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// All substrings of a growing text.
#[derive(Clone, Debug)]
pub struct SuffixAutomaton {
    states: Vec<State>,
    edges: Vec<Edge>,
    /// All but the first of each state.
    transitions: HashMap<(u32, TokenId), u32, Seeded>,
    last: u32,
    n_tokens: usize,
    suffix: Option<Match>,
}

impl Default for SuffixAutomaton {
    fn default() -> Self {
        Self {
            states: vec![State::new(0, NONE)],
            edges: Vec::new(),
            transitions: HashMap::with_hasher(Seeded::new()),
            last: ROOT,
            n_tokens: 0,
            suffix: None,
        }
    }
}

impl State {
    /// Of a text of so many tokens, without a transition.
    fn new(n_tokens: usize, link: u32) -> Self {
        let (end, count) = (n_tokens as u32, u32::from(n_tokens > 0));
        Self { len: end, link, end, count, token: TokenId(0), next: NONE, first_edge: NONE }
    }
}

impl SuffixAutomaton {
    /// Of an empty text.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tokens of the text.
    pub fn len(&self) -> usize {
        self.n_tokens
    }

    /// Whether the text is empty.
    pub fn is_empty(&self) -> bool {
        self.n_tokens == 0
    }

    /// States and transitions: what memory grows with.
    pub fn size(&self) -> (usize, usize) {
        let n_first = self.states.iter().filter(|state| state.next != NONE).count();
        (self.states.len(), n_first + self.edges.len())
    }

    /// The longest suffix of the text that occurred before. Its `end` is that of an earlier occurrence, and `count` counts
    /// earlier ones only.
    pub fn suffix(&self) -> Option<Match> {
        self.suffix
    }

    /// Appends a token.
    pub fn push(&mut self, token: TokenId) {
        self.n_tokens += 1;
        let current = self.add(State::new(self.n_tokens, ROOT));
        let mut state = self.last;
        while state != NONE && self.connect(state, token, current) {
            state = self.states[state as usize].link;
        }
        if state != NONE {
            self.states[current as usize].link = self.suffix_state(state, token);
        }
        self.last = current;
        let link = self.states[current as usize].link;
        self.suffix = (link != ROOT).then(|| self.found(link, self.states[link as usize].len as usize));
        self.refresh(link);
    }

    /// The longest suffix of `matched` and this token that is in the text; none if it is empty.
    pub fn follow(&self, matched: Option<Match>, token: TokenId) -> Option<Match> {
        let (mut state, mut len) = matched.map_or((ROOT, 0), |matched| (matched.state, matched.len));
        loop {
            if let Some(next) = self.next(state, token) {
                return Some(self.found(next, len + 1));
            }
            state = self.states[state as usize].link;
            if state == NONE {
                return None;
            }
            len = self.states[state as usize].len as usize;
        }
    }

    fn found(&self, state: u32, len: usize) -> Match {
        let State { end, count, .. } = self.states[state as usize];
        Match { state, len, end: end as usize, count: count as usize }
    }

    fn add(&mut self, state: State) -> u32 {
        self.states.push(state);
        self.states.len() as u32 - 1
    }

    fn next(&self, state: u32, token: TokenId) -> Option<u32> {
        let first = &self.states[state as usize];
        match first.next {
            NONE => None,
            next if first.token == token => Some(next),
            _ if first.first_edge == NONE => None,
            _ => self.transitions.get(&(state, token)).copied(),
        }
    }

    /// Adds a transition to a state that has none by this token; whether that was so.
    fn connect(&mut self, from: u32, token: TokenId, to: u32) -> bool {
        let first = &mut self.states[from as usize];
        if first.next == NONE {
            (first.token, first.next) = (token, to);
            return true;
        }
        if first.token == token {
            return false;
        }
        let Entry::Vacant(place) = self.transitions.entry((from, token)) else { return false };
        place.insert(to);
        let next = std::mem::replace(&mut self.states[from as usize].first_edge, self.edges.len() as u32);
        self.edges.push(Edge { token, next });
        true
    }

    /// Changes where the transition of a state by this token leads; there is one.
    fn redirect(&mut self, from: u32, token: TokenId, to: u32) {
        let first = &mut self.states[from as usize];
        if first.token == token {
            first.next = to;
        } else {
            self.transitions.insert((from, token), to);
        }
    }

    /// The state of the new text's longest suffix that occurred before; `state` is the first on the path that has a
    /// transition by the token. A state that also stands for longer strings is split.
    fn suffix_state(&mut self, state: u32, token: TokenId) -> u32 {
        let next = self.next(state, token).expect("invariant: it has a transition by the token");
        let len = self.states[state as usize].len + 1;
        if self.states[next as usize].len == len {
            return next;
        }
        let split = self.add(State { len, first_edge: NONE, ..self.states[next as usize].clone() });
        let mut edge = self.states[next as usize].first_edge;
        while edge != NONE {
            let Edge { token, next: following } = self.edges[edge as usize].clone();
            self.connect(split, token, self.transitions[&(next, token)]);
            edge = following;
        }
        let mut state = state;
        while state != NONE && self.next(state, token) == Some(next) {
            self.redirect(state, token, split);
            state = self.states[state as usize].link;
        }
        self.states[next as usize].link = split;
        split
    }

    fn refresh(&mut self, mut state: u32) {
        for _ in 0..MAX_REFRESHED {
            if state == ROOT {
                return;
            }
            let refreshed = &mut self.states[state as usize];
            refreshed.end = self.n_tokens as u32;
            refreshed.count += 1;
            state = refreshed.link;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn automaton(text: &[u32]) -> SuffixAutomaton {
        let mut automaton = SuffixAutomaton::new();
        text.iter().for_each(|id| automaton.push(TokenId(*id)));
        automaton
    }

    /// Length, last end and count of the longest suffix of `pattern` that ends in `text` before or at `limit`.
    fn naive(text: &[u32], pattern: &[u32], limit: usize) -> Option<(usize, usize, usize)> {
        (0..pattern.len()).find_map(|start| {
            let wanted = &pattern[start..];
            let ends = (wanted.len()..=limit).filter(|end| &text[end - wanted.len()..*end] == wanted);
            let ends: Vec<usize> = ends.collect();
            ends.last().map(|last| (wanted.len(), *last, ends.len()))
        })
    }

    fn parts(found: Option<Match>) -> Option<(usize, usize, usize)> {
        found.map(|found| (found.len, found.end, found.count))
    }

    proptest! {
        #[test]
        fn the_longest_earlier_suffix_is_that_of_the_definition(
            text in prop::collection::vec(0u32..3, 0..50),
        ) {
            let found = parts(automaton(&text).suffix());
            prop_assert_eq!(found, naive(&text, &text, text.len().saturating_sub(1)));
        }

        #[test]
        fn following_finds_the_longest_suffix_in_the_text(
            text in prop::collection::vec(0u32..3, 0..40),
            path in prop::collection::vec(0u32..4, 0..12),
        ) {
            let automaton = automaton(&text);
            let mut found = None;
            for (i, id) in path.iter().enumerate() {
                found = automaton.follow(found, TokenId(*id));
                prop_assert_eq!(parts(found), naive(&text, &path[..=i], text.len()));
            }
        }

        #[test]
        fn memory_is_linear(text in prop::collection::vec(0u32..3, 2..200)) {
            let (n_states, n_transitions) = automaton(&text).size();
            prop_assert!(n_states <= 2 * text.len());
            prop_assert!(n_transitions <= 3 * text.len());
        }
    }

    #[test]
    fn one_repeated_token_takes_linear_work_and_still_names_an_occurrence() {
        let automaton = automaton(&[7; 20_000]);
        let suffix = automaton.suffix().expect("repeats");
        assert_eq!((suffix.len, suffix.end), (19_999, 19_999));
        let mut found = None;
        for len in 1..=100 {
            found = automaton.follow(found, TokenId(7));
            let found = found.expect("occurs");
            assert!(found.len == len && (len..=20_000).contains(&found.end), "{found:?}");
        }
    }
}
