//! The tokens of a model: their texts, kinds and bytes. It does not tokenize.

use std::collections::HashSet;

use crate::byte_level;
use crate::error::TextError;

/// The character that SentencePiece writes for a space.
pub(crate) const METASPACE: char = '\u{2581}';

/// What a token stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TokenKind {
    /// A piece of text.
    Normal,
    /// Stands for what the vocabulary cannot spell.
    Unknown,
    /// Has a meaning to the model and no text.
    Control,
    /// Text that is always one token.
    UserDefined,
    /// Padding of the vocabulary.
    Unused,
    /// One byte, spelled `<0x0A>`.
    Byte,
}

/// How the text of a normal token spells its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Spelling {
    /// One letter for each byte, as GPT-2 does.
    ByteLevel,
    /// Plain text with [`METASPACE`] for spaces.
    SentencePiece,
}

/// All tokens by id.
pub(crate) struct Vocabulary {
    texts: Vec<String>,
    kinds: Vec<TokenKind>,
    bytes: Vec<u8>,
    /// `bytes[ends[id - 1]..ends[id]]` are the bytes of a token.
    ends: Vec<usize>,
    n_usable: usize,
}

impl TokenKind {
    /// The kind with this number in `tokenizer.ggml.token_type`.
    pub(crate) fn from_gguf_code(code: i32) -> Option<Self> {
        use TokenKind::*;
        [Normal, Unknown, Control, UserDefined, Unused, Byte]
            .get(usize::try_from(code).ok()?.checked_sub(1)?)
            .copied()
    }

    /// Whether text must be asked explicitly to become this token.
    pub(crate) fn is_special(self) -> bool {
        matches!(self, Self::Control | Self::Unknown)
    }
}

impl Vocabulary {
    /// Checks that texts and kinds fit each other and that no two usable tokens look alike.
    pub(crate) fn new(
        texts: Vec<String>,
        kinds: Vec<TokenKind>,
        spelling: Spelling,
    ) -> Result<Self, TextError> {
        let malformed = |problem| Err(TextError::malformed("the vocabulary", problem));
        if texts.len() != kinds.len() {
            return malformed(format!("{} tokens but {} token types", texts.len(), kinds.len()));
        }
        if u32::try_from(texts.len()).is_err() {
            return malformed(format!("{} tokens are more than 32 bits can number", texts.len()));
        }
        let mut seen = HashSet::with_capacity(texts.len());
        for (id, text) in texts.iter().enumerate().filter(|(id, _)| kinds[*id] != TokenKind::Unused) {
            if !seen.insert(text.as_str()) {
                return malformed(format!("token {id} has the text {text:?} of an earlier token"));
            }
        }
        let Some(last) = kinds.iter().rposition(|kind| *kind != TokenKind::Unused) else {
            return malformed(format!("none of {} tokens is usable", texts.len()));
        };
        let mut vocabulary = Self { texts, kinds, bytes: Vec::new(), ends: Vec::new(), n_usable: last + 1 };
        vocabulary.spell(spelling)?;
        Ok(vocabulary)
    }

    /// Fills `bytes` and `ends`.
    fn spell(&mut self, spelling: Spelling) -> Result<(), TextError> {
        for (id, (text, kind)) in self.texts.iter().zip(&self.kinds).enumerate() {
            match (kind, spelling) {
                (TokenKind::Unused, _) => {}
                (TokenKind::Byte, _) => self.bytes.push(byte_of(text).ok_or_else(|| {
                    TextError::malformed(
                        "the vocabulary",
                        format!("byte token {id} is {text:?}, not like <0x0A>"),
                    )
                })?),
                (TokenKind::Normal, Spelling::ByteLevel) => byte_level::append_bytes(text, &mut self.bytes),
                (TokenKind::Normal, Spelling::SentencePiece) => {
                    self.bytes.extend_from_slice(text.replace(METASPACE, " ").as_bytes());
                }
                _ => self.bytes.extend_from_slice(text.as_bytes()),
            }
            self.ends.push(self.bytes.len());
        }
        Ok(())
    }

    /// Tokens, padding included.
    pub(crate) fn len(&self) -> usize {
        self.texts.len()
    }

    /// One more than the largest id that is not padding.
    pub(crate) fn n_usable(&self) -> usize {
        self.n_usable
    }

    /// Text and kind of every token, in id order.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = (&str, TokenKind)> {
        self.texts.iter().map(String::as_str).zip(self.kinds.iter().copied())
    }

    pub(crate) fn kind(&self, id: usize) -> Option<TokenKind> {
        self.kinds.get(id).copied()
    }

    /// The bytes a token adds to the text; none for padding and for ids beyond the vocabulary.
    pub(crate) fn bytes(&self, id: usize) -> &[u8] {
        let Some(end) = self.ends.get(id) else { return &[] };
        let start = id.checked_sub(1).map_or(0, |previous| self.ends[previous]);
        &self.bytes[start..*end]
    }
}

/// The byte that `<0x0A>` stands for.
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary(tokens: &[(&str, TokenKind)], spelling: Spelling) -> Result<Vocabulary, TextError> {
        let (texts, kinds) = tokens.iter().map(|(text, kind)| (text.to_string(), *kind)).unzip();
        Vocabulary::new(texts, kinds, spelling)
    }

    #[test]
    fn bytes_are_spelled_by_kind() {
        use TokenKind::*;
        let tokens =
            [("<s>", Control), ("<0xe2>", Byte), ("▁Ġ", Normal), ("▁x", UserDefined), ("pad", Unused)];
        let pieces = vocabulary(&tokens, Spelling::SentencePiece).unwrap();
        let bytes: Vec<&[u8]> = (0..6).map(|id| pieces.bytes(id)).collect();
        assert_eq!(bytes, [b"<s>".as_slice(), &[0xe2], " Ġ".as_bytes(), "▁x".as_bytes(), b"", b""]);
        assert_eq!((pieces.len(), pieces.n_usable()), (5, 4));
        let letters = vocabulary(&[("ĠĊâĢ", Normal), ("a b", Normal)], Spelling::ByteLevel).unwrap();
        assert_eq!(letters.bytes(0), [b' ', b'\n', 0xe2, 0x80]);
        assert_eq!(
            letters.bytes(1),
            b"a b",
            "a text with characters that are no byte letters stands for itself"
        );
    }

    #[test]
    fn contradictions_are_named() {
        use TokenKind::*;
        let problem = |tokens: &[(&str, TokenKind)]| match vocabulary(tokens, Spelling::ByteLevel) {
            Err(error) => error.to_string(),
            Ok(_) => "no error".to_owned(),
        };
        assert!(
            problem(&[("a", Normal), ("b", Normal), ("a", Control)]).contains("token 2 has the text \"a\"")
        );
        assert_eq!(problem(&[("a", Normal), ("p", Unused), ("p", Unused)]), "no error");
        assert!(problem(&[("p", Unused)]).contains("none of 1 tokens is usable"));
        assert!(problem(&[]).contains("none of 0 tokens is usable"));
        for text in ["<0x0>", "<0x+1>", "0x00", "<0xé>"] {
            assert!(problem(&[("a", Normal), (text, Byte)]).contains("byte token 1"), "{text}");
        }
        assert!(Vocabulary::new(vec!["a".into()], Vec::new(), Spelling::ByteLevel).is_err());
    }

    #[test]
    fn kinds_have_gguf_codes_from_one() {
        assert_eq!(TokenKind::from_gguf_code(1), Some(TokenKind::Normal));
        assert_eq!(TokenKind::from_gguf_code(6), Some(TokenKind::Byte));
        for code in [0, 7, -1, i32::MIN, i32::MAX] {
            assert_eq!(TokenKind::from_gguf_code(code), None, "{code}");
        }
    }
}
