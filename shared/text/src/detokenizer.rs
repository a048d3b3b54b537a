//! Turns the tokens of one generation into text as they come. It does not look for stop strings.

use std::sync::Arc;

use paceline_domain::TokenId;

use crate::tokenizer::{ControlText, Tokenizer};
use crate::utf8::Utf8Stream;

/// An incremental detokenizer. It gives whole characters only; its state is a function of the tokens pushed, so
/// pushing them again to a fresh one gives the same text.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    control: ControlText,
    stream: Utf8Stream,
    /// The next byte may be the space that the tokenizer puts before a text.
    at_start: bool,
}

impl Detokenizer {
    /// For tokens that continue a prompt: a leading space is part of the text, control tokens are not.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, control: ControlText::Skip, stream: Utf8Stream::default(), at_start: false }
    }

    /// For tokens that are a text of their own: gives piece by piece what [`Tokenizer::decode`] gives.
    pub fn from_start(tokenizer: Arc<Tokenizer>, control: ControlText) -> Self {
        let at_start = tokenizer.strips_leading_space();
        Self { tokenizer, control, stream: Utf8Stream::default(), at_start }
    }

    /// Takes the next token and gives the characters it completes.
    pub fn push(&mut self, token: TokenId) -> String {
        let mut bytes = self.tokenizer.shown_bytes(token, self.control);
        if self.at_start && !bytes.is_empty() {
            self.at_start = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        let mut text = String::new();
        self.stream.push(bytes, &mut text);
        text
    }

    /// What is left when no more tokens come: U+FFFD for an unfinished character, else nothing.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.stream.finish(&mut text);
        text
    }
}
