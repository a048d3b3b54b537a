//! Byte-level BPE of GGUF files: words by the family's rule, merges by the `tokenizers` crate. Special tokens were cut
//! out before.

use paceline_domain::TokenId;
use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Merges, Vocab};

use crate::byte_level;
use crate::error::TextError;
use crate::pre_tokenizer::{FamilyDefaults, PreTokenizer};
use crate::vocabulary::{TokenKind, Vocabulary};

const MERGES: &str = "tokenizer.ggml.merges";

/// Encodes text without special tokens.
pub(crate) struct ByteLevelBpe {
    pre_tokenizer: PreTokenizer,
    model: BPE,
}

impl ByteLevelBpe {
    /// `merges` are pairs like `Ġ t`, the most frequent first. Control tokens, the unknown token and padding are left
    /// out of what merges can reach, so that no ordinary text becomes one of them.
    pub(crate) fn new<'m>(
        pre_tokenizer: PreTokenizer,
        family: FamilyDefaults,
        vocabulary: &Vocabulary,
        merges: impl Iterator<Item = &'m str>,
    ) -> Result<Self, TextError> {
        let reachable = |kind| matches!(kind, TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte);
        let tokens = (0u32..).zip(vocabulary.iter());
        let ids: Vocab = tokens
            .filter(|(_, (_, kind))| reachable(*kind))
            .map(|(id, (text, _))| (text.to_owned(), id))
            .collect();
        let merges =
            merges.enumerate().map(|(rank, merge)| pair(rank, merge, &ids)).collect::<Result<Merges, _>>()?;
        let model = BPE::builder()
            .vocab_and_merges(ids, merges)
            .ignore_merges(family.ignores_merges)
            .build()
            .map_err(|error| TextError::malformed(MERGES, error.to_string()))?;
        Ok(Self { pre_tokenizer, model })
    }

    /// Appends the tokens of `text`.
    pub(crate) fn encode(&self, text: &str, tokens: &mut Vec<TokenId>) -> Result<(), TextError> {
        let mut letters = String::new();
        for word in self.pre_tokenizer.words(text) {
            letters.clear();
            letters.extend(word.bytes().map(byte_level::letter));
            let pieces = self
                .model
                .tokenize(&letters)
                .map_err(|error| TextError::Encode { n_bytes: text.len(), problem: error.to_string() })?;
            tokens.extend(pieces.into_iter().map(|piece| TokenId(piece.id)));
        }
        Ok(())
    }
}

/// The two sides of a merge, which must be tokens and give a token. A side has no space, since bytes are letters.
fn pair(rank: usize, merge: &str, ids: &Vocab) -> Result<(String, String), TextError> {
    let malformed =
        |problem: String| TextError::malformed(MERGES, format!("merge {rank} {merge:?} {problem}"));
    let Some((left, right)) = merge
        .split_once(' ')
        .filter(|(left, right)| !left.is_empty() && !right.is_empty() && !right.contains(' '))
    else {
        return Err(malformed("is not two tokens with a space between".into()));
    };
    let whole = [left, right].concat();
    for part in [left, right, &whole] {
        if !ids.contains_key(part) {
            return Err(malformed(format!("needs {part:?}, which is no text token of the vocabulary")));
        }
    }
    Ok((left.to_owned(), right.to_owned()))
}
