//! SentencePiece BPE (Kudo and Richardson 2018) of GGUF files, as Llama 2 and Mistral use it: of all neighbours that
//! form a token the pair with the best score is merged, the leftmost first; what stays unknown is spelled in byte
//! tokens. Special tokens were cut out before.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use paceline_domain::TokenId;

use crate::error::TextError;
use crate::vocabulary::{METASPACE, TokenKind, Vocabulary};

const SCORES: &str = "tokenizer.ggml.scores";

/// Whether a text that starts a prompt or follows a special token gets a space before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SpacePrefix {
    Added,
    Absent,
}

/// Encodes text without special tokens.
pub(crate) struct SentencePiece {
    /// Pieces that text can become. Control, byte and unused tokens are not among them.
    pieces: HashMap<String, Piece>,
    /// What each byte becomes that is in no piece.
    byte_tokens: Vec<TokenId>,
    space_prefix: SpacePrefix,
    longest_piece: usize,
}

#[derive(Clone, Copy)]
struct Piece {
    token: TokenId,
    score: f32,
}

/// A run of characters that is one piece so far. Symbols form a list; a merged-away one has no bytes.
struct Symbol {
    start: usize,
    n_bytes: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// Two neighbours that would form a piece.
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both: tells whether one of them has changed since.
    n_bytes: usize,
}

impl SentencePiece {
    pub(crate) fn new(
        vocabulary: &Vocabulary,
        scores: &[f32],
        unknown: Option<TokenId>,
        space_prefix: SpacePrefix,
    ) -> Result<Self, TextError> {
        if scores.len() != vocabulary.len() {
            let problem = format!("{} scores for {} tokens", scores.len(), vocabulary.len());
            return Err(TextError::malformed(SCORES, problem));
        }
        let mut pieces = HashMap::new();
        let mut byte_tokens = vec![unknown; 256];
        for (id, ((text, kind), score)) in (0u32..).zip(vocabulary.iter().zip(scores)) {
            let token = TokenId(id);
            match kind {
                _ if !score.is_finite() => {
                    return Err(TextError::malformed(SCORES, format!("the score of token {id} is {score}")));
                }
                TokenKind::Normal | TokenKind::UserDefined => {
                    // Adding zero makes -0 equal to 0.
                    pieces.insert(text.to_owned(), Piece { token, score: *score + 0.0 });
                }
                TokenKind::Byte => byte_tokens[usize::from(vocabulary.bytes(token.idx())[0])] = Some(token),
                TokenKind::Control | TokenKind::Unknown | TokenKind::Unused => {}
            }
        }
        let byte_tokens = byte_tokens.into_iter().collect::<Option<Vec<TokenId>>>().ok_or_else(|| {
            TextError::malformed(
                "the vocabulary",
                "it has neither a token for every byte nor an unknown token",
            )
        })?;
        let longest_piece = pieces.keys().map(String::len).max().unwrap_or(0);
        Ok(Self { pieces, byte_tokens, space_prefix, longest_piece })
    }

    /// Appends the tokens of a text that starts a prompt or follows a special token.
    pub(crate) fn encode(&self, text: &str, tokens: &mut Vec<TokenId>) {
        let prefix = match self.space_prefix {
            SpacePrefix::Added => METASPACE.to_string(),
            SpacePrefix::Absent => String::new(),
        };
        let text = prefix + &text.replace(' ', METASPACE.encode_utf8(&mut [0; 4]));
        for symbol in self.merge(&text) {
            match self.pieces.get(symbol) {
                Some(piece) => tokens.push(piece.token),
                None => tokens.extend(symbol.bytes().map(|byte| self.byte_tokens[usize::from(byte)])),
            }
        }
    }

    /// Merges until no two neighbours form a piece. Each merge adds at most two candidates, so the work is
    /// O(n log n) for n characters.
    fn merge<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> + use<'t> {
        let mut symbols = characters(text);
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() {
            queue.extend(self.candidate(text, &symbols, right - 1));
        }
        while let Some(candidate) = queue.pop() {
            let (left, right) = (candidate.left, candidate.right);
            let is_stale = symbols[left].n_bytes == 0
                || symbols[right].n_bytes == 0
                || symbols[left].n_bytes + symbols[right].n_bytes != candidate.n_bytes;
            if is_stale {
                continue;
            }
            symbols[left].n_bytes = candidate.n_bytes;
            symbols[right].n_bytes = 0;
            let next = symbols[right].next;
            symbols[left].next = next;
            if let Some(next) = next {
                symbols[next].previous = Some(left);
            }
            queue
                .extend(symbols[left].previous.and_then(|previous| self.candidate(text, &symbols, previous)));
            queue.extend(self.candidate(text, &symbols, left));
        }
        symbols
            .into_iter()
            .filter(|symbol| symbol.n_bytes > 0)
            .map(|symbol| &text[symbol.start..symbol.start + symbol.n_bytes])
    }

    /// The candidate of a symbol and the one after it.
    fn candidate(&self, text: &str, symbols: &[Symbol], left: usize) -> Option<Candidate> {
        let right = symbols[left].next?;
        let n_bytes = symbols[left].n_bytes + symbols[right].n_bytes;
        if n_bytes > self.longest_piece {
            return None;
        }
        let start = symbols[left].start;
        let piece = self.pieces.get(&text[start..start + n_bytes])?;
        Some(Candidate { score: piece.score, left, right, n_bytes })
    }
}

fn characters(text: &str) -> Vec<Symbol> {
    let n = text.chars().count();
    let symbol = |(i, (start, character)): (usize, (usize, char))| Symbol {
        start,
        n_bytes: character.len_utf8(),
        previous: i.checked_sub(1),
        next: (i + 1 < n).then_some(i + 1),
    };
    text.char_indices().enumerate().map(symbol).collect()
}

impl Ord for Candidate {
    /// The greatest is merged first: the best score, then the leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}
