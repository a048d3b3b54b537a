//! Text in and out of a model: tokenizer, chat template, incremental detokenizer, stop strings. It never touches a
//! tensor, does no IO, and leaves limits on lengths to its callers.
//!
//! # Layout
//! * [`tokenizer`] – the tokenizer: encode, decode, special ids, digest
//! * [`special`] – control and user-defined tokens inside texts
//! * `vocabulary`, `byte_level` – tokens, their kinds and their bytes
//! * `gguf`, `tokenizer_json` – the two files a tokenizer is read from
//! * `pre_tokenizer`, `bpe` – byte-level BPE of GGUF files
//! * `sentence_piece` – SentencePiece BPE of GGUF files
//! * [`detokenizer`], `utf8` – tokens to text as they come, whole characters only
//! * [`stop_matcher`] – stop strings across the borders of pieces
//! * [`chat_template`], `template_json`, `template_time` – messages to a prompt
//! * [`error`] – everything that can go wrong

#![forbid(unsafe_code)]

mod bpe;
mod byte_level;
pub mod chat_template;
pub mod detokenizer;
pub mod error;
mod gguf;
mod pre_tokenizer;
mod sentence_piece;
pub mod special;
pub mod stop_matcher;
mod template_json;
mod template_time;
pub mod tokenizer;
mod tokenizer_json;
mod utf8;
mod vocabulary;

pub use chat_template::{AddGenerationPrompt, ChatMessage, ChatTemplate};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use special::SpecialTokens;
pub use stop_matcher::{StopMatcher, StopOutput};
pub use tokenizer::{ControlText, Tokenizer};

/// One tokenizer and one template serve all threads.
const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<Tokenizer>();
    is_shared::<ChatTemplate>();
};
