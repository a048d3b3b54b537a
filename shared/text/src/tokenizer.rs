//! The tokenizer of a model: text to token ids and back. It renders no chat and checks no lengths.

use paceline_checkpoint::{Checkpoint, Format};
use paceline_domain::{Digest, TokenId};

use crate::bpe::ByteLevelBpe;
use crate::error::TextError;
use crate::sentence_piece::SentencePiece;
use crate::special::{Fragment, SpecialSplitter, SpecialTokens};
use crate::tokenizer_json::TokenizerJson;
use crate::utf8::Utf8Stream;
use crate::vocabulary::{TokenKind, Vocabulary};
use crate::{gguf, tokenizer_json};

/// Whether control tokens appear in decoded text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ControlText {
    /// They have no text.
    Skip,
    /// They are written out, like `<|im_end|>`.
    Show,
}

/// Text to token ids and back, for one model.
pub struct Tokenizer {
    parts: Parts,
    control: SpecialSplitter,
    digest: Digest,
}

/// What a tokenizer is made of, whatever file it comes from.
pub(crate) struct Parts {
    pub(crate) vocabulary: Vocabulary,
    pub(crate) encoder: Encoder,
    pub(crate) bos: Option<TokenId>,
    pub(crate) adds_bos: bool,
    /// May have repetitions.
    pub(crate) eos: Vec<TokenId>,
    /// The tokenizer puts a space before a text, so decoding from the start takes one away.
    pub(crate) strips_leading_space: bool,
}

/// How text becomes tokens.
pub(crate) enum Encoder {
    ByteLevelBpe(SpecialSplitter, Box<ByteLevelBpe>),
    SentencePiece(SpecialSplitter, Box<SentencePiece>),
    TokenizerJson(Box<TokenizerJson>),
}

impl Tokenizer {
    /// The tokenizer in GGUF metadata, or tokenizer.json beside safetensors.
    ///
    /// # Errors
    /// When there is none, when its kind is not supported, or when its data contradicts itself.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, TextError> {
        let mut parts = match checkpoint.format() {
            Format::Gguf => gguf::parts(checkpoint.metadata())?,
            Format::Safetensors => tokenizer_json::parts(checkpoint)?,
        };
        parts.eos.sort_unstable();
        parts.eos.dedup();
        let control = SpecialSplitter::new(&parts.vocabulary)?;
        let digest = digest(&parts);
        Ok(Self { parts, control, digest })
    }

    /// The tokens of a text, without a beginning-of-sequence token. The work is O(n log n) in its bytes at most.
    ///
    /// # Errors
    /// When the `tokenizers` crate fails on it.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<TokenId>, TextError> {
        let mut tokens = Vec::new();
        self.encode_into(text, special, &mut tokens)?;
        Ok(tokens)
    }

    /// The tokens of a whole prompt: starts with the beginning-of-sequence token when the model wants one, even if
    /// the text was rendered without it, and only once if the text has it.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_prompt(&self, text: &str, special: SpecialTokens) -> Result<Vec<TokenId>, TextError> {
        let bos = self.parts.bos.filter(|_| self.parts.adds_bos);
        let mut tokens: Vec<TokenId> = bos.into_iter().collect();
        self.encode_into(text, special, &mut tokens)?;
        if bos.is_some() && tokens.get(1) == tokens.first() {
            tokens.remove(0);
        }
        Ok(tokens)
    }

    fn encode_into(
        &self,
        text: &str,
        special: SpecialTokens,
        tokens: &mut Vec<TokenId>,
    ) -> Result<(), TextError> {
        let splitter = match &self.parts.encoder {
            Encoder::ByteLevelBpe(splitter, _) | Encoder::SentencePiece(splitter, _) => splitter,
            Encoder::TokenizerJson(pipeline) => return pipeline.encode(text, special, tokens),
        };
        for fragment in splitter.fragments(text, special) {
            match (fragment, &self.parts.encoder) {
                (Fragment::Token(token), _) => tokens.push(token),
                (Fragment::Text(text), Encoder::ByteLevelBpe(_, model)) => model.encode(text, tokens)?,
                (Fragment::Text(text), Encoder::SentencePiece(_, model)) => model.encode(text, tokens),
                (_, Encoder::TokenizerJson(_)) => unreachable!("invariant: it has no splitter"),
            }
        }
        Ok(())
    }

    /// The text of a whole token sequence. Bytes that are no character become U+FFFD; ids beyond the vocabulary have
    /// no text.
    pub fn decode(&self, tokens: &[TokenId], control: ControlText) -> String {
        let mut bytes = Vec::new();
        for token in tokens {
            bytes.extend_from_slice(self.shown_bytes(*token, control));
        }
        let bytes = bytes.strip_prefix(b" ").filter(|_| self.parts.strips_leading_space).unwrap_or(&bytes);
        let mut text = String::new();
        let mut stream = Utf8Stream::default();
        stream.push(bytes, &mut text);
        stream.finish(&mut text);
        text
    }

    /// The bytes a token adds to decoded text.
    pub(crate) fn shown_bytes(&self, token: TokenId, control: ControlText) -> &[u8] {
        if control == ControlText::Skip && self.is_special(token) { &[] } else { self.token_bytes(token) }
    }

    pub(crate) fn strips_leading_space(&self) -> bool {
        self.parts.strips_leading_space
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<TokenId> {
        self.parts.bos
    }

    /// Whether a prompt starts with [`Self::bos`]; then there is one.
    pub fn adds_bos(&self) -> bool {
        self.parts.adds_bos
    }

    /// Tokens that end a generation, in rising order.
    pub fn eos_tokens(&self) -> &[TokenId] {
        &self.parts.eos
    }

    /// One more than the largest id that can be used. The model's logits may have more rows: padding.
    pub fn n_vocab(&self) -> usize {
        self.parts.vocabulary.n_usable()
    }

    /// The bytes of a token, of a control token its name; none for padding and for ids beyond the vocabulary.
    pub fn token_bytes(&self, token: TokenId) -> &[u8] {
        self.parts.vocabulary.bytes(token.idx())
    }

    /// Whether a token is a control token or the unknown token.
    pub fn is_special(&self, token: TokenId) -> bool {
        self.parts.vocabulary.kind(token.idx()).is_some_and(TokenKind::is_special)
    }

    /// The first control token that is written out in a text, if any: what [`SpecialTokens::Parse`] would obey.
    pub fn find_control(&self, text: &str) -> Option<TokenId> {
        self.control.find_control(text)
    }

    /// Checks that ids that came from outside are in the vocabulary.
    ///
    /// # Errors
    /// Names the first that is not.
    pub fn check_tokens(&self, tokens: &[TokenId]) -> Result<(), TextError> {
        match tokens.iter().find(|token| token.idx() >= self.n_vocab()) {
            Some(token) => Err(TextError::UnknownToken { token: token.0, n_vocab: self.n_vocab() as u32 }),
            None => Ok(()),
        }
    }

    /// Digest of the usable vocabulary (texts and kinds) and the ids with a meaning. Two models whose digests are
    /// equal understand each other's token ids.
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

fn digest(parts: &Parts) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"paceline tokenizer 1");
    for (text, kind) in parts.vocabulary.iter().take(parts.vocabulary.n_usable()) {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes()).update(&[kind as u8]);
    }
    let bos = parts.bos.map_or(u64::MAX, |bos| bos.0.into());
    hasher.update(&bos.to_le_bytes()).update(&[parts.adds_bos.into()]);
    for eos in &parts.eos {
        hasher.update(&eos.0.to_le_bytes());
    }
    Digest(*hasher.finalize().as_bytes())
}
