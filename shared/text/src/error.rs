//! What can go wrong with tokenizers and chat templates.

use paceline_checkpoint::CheckpointError;
use paceline_domain::ErrorKind;

/// Why a tokenizer or template cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The checkpoint's metadata cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The checkpoint has nothing to tokenize with.
    #[error("the checkpoint has no tokenizer: GGUF metadata or tokenizer.json is needed")]
    NoTokenizer,
    /// A kind of tokenizer that Paceline does not know.
    #[error("{what} {found:?} is not supported; supported: {supported}")]
    Unsupported {
        /// The metadata key or JSON field.
        what: &'static str,
        /// Its value.
        found: String,
        /// The values that are supported.
        supported: &'static str,
    },
    /// The tokenizer's data contradicts itself.
    #[error("{what}: {problem}")]
    Malformed {
        /// The metadata key or JSON field.
        what: &'static str,
        /// What is wrong, with its numbers.
        problem: String,
    },
    /// A text could not be tokenized.
    #[error("tokenizing {n_bytes} bytes failed: {problem}")]
    Encode {
        /// Length of the text.
        n_bytes: usize,
        /// What the tokenizer said.
        problem: String,
    },
    /// A token id beyond the vocabulary.
    #[error("token {token} is not in the vocabulary of {n_vocab} tokens")]
    UnknownToken {
        /// The id.
        token: u32,
        /// One more than the largest usable id.
        n_vocab: u32,
    },
    /// The chat template is not a template.
    #[error("the chat template does not compile: {0}")]
    TemplateSyntax(String),
    /// The chat template refused the conversation with this message.
    #[error("the chat template refused the messages: {0}")]
    TemplateRefused(String),
    /// The chat template failed on the conversation.
    #[error("the chat template failed: {0}")]
    TemplateFailed(String),
    /// The chat template ran for too long.
    #[error("the chat template took more than {fuel} steps")]
    TemplateFuel {
        /// Steps allowed.
        fuel: u64,
    },
    /// The chat template wrote too much.
    #[error("the chat template wrote more than {limit} bytes")]
    TemplateOutput {
        /// Bytes allowed.
        limit: usize,
    },
}

impl TextError {
    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(error) => error.kind(),
            Self::NoTokenizer | Self::Unsupported { .. } => ErrorKind::Unfit,
            _ => ErrorKind::Invalid,
        }
    }

    pub(crate) fn malformed(what: &'static str, problem: impl Into<String>) -> Self {
        Self::Malformed { what, problem: problem.into() }
    }
}
