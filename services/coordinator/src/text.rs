//! Text to prompt tokens and back, off the async threads. It knows the served model's tokenizer and template and
//! nothing of requests.

use std::sync::Arc;

use paceline_checkpoint::Checkpoint;
use paceline_domain::{ErrorKind, TokenId};
use paceline_text::{
    AddGenerationPrompt, ChatMessage, ChatTemplate, ControlText, SpecialTokens, TextError, Tokenizer,
};
use tokio::sync::Semaphore;

/// Tokenizations that run at the same time; more wait for one of them.
const MAX_CONCURRENT: usize = 4;

/// What is to be tokenized.
#[derive(Clone, Debug)]
pub enum TextInput {
    /// Raw text.
    Raw(String, SpecialTokens),
    /// A conversation.
    Chat(Vec<ChatMessage>),
}

/// Why text cannot become a prompt.
#[derive(thiserror::Error, Debug)]
pub enum PromptError {
    /// Tokenizer or template refused it.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The model has no chat template.
    #[error("this model has no chat template; send `prompt` or `token_ids` instead of `chat`")]
    NoTemplate,
    /// The tokenizer panicked.
    #[error("the tokenizer failed on this text")]
    Panicked,
}

impl PromptError {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Text(error) => error.kind(),
            Self::NoTemplate => ErrorKind::Unfit,
            Self::Panicked => ErrorKind::Bug,
        }
    }
}

/// Tokenizer and chat template of the served model.
#[derive(Clone)]
pub struct TextModel {
    tokenizer: Arc<Tokenizer>,
    template: Option<Arc<ChatTemplate>>,
    places: Arc<Semaphore>,
}

impl TextModel {
    /// Reads both from the checkpoint.
    ///
    /// # Errors
    /// When one of them is there but cannot be used.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self, TextError> {
        Ok(Self {
            tokenizer: Arc::new(Tokenizer::from_checkpoint(checkpoint)?),
            template: ChatTemplate::from_checkpoint(checkpoint)?.map(Arc::new),
            places: Arc::new(Semaphore::new(MAX_CONCURRENT)),
        })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Whether conversations can be rendered.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The token ids of a prompt.
    ///
    /// # Errors
    /// When the template or the tokenizer refuses it.
    pub async fn prompt_tokens(&self, input: TextInput) -> Result<Vec<TokenId>, PromptError> {
        let (tokenizer, template) = (self.tokenizer.clone(), self.template.clone());
        let work = move || match input {
            TextInput::Raw(text, special) => Ok(tokenizer.encode_prompt(&text, special)?),
            TextInput::Chat(messages) => {
                let template = template.ok_or(PromptError::NoTemplate)?;
                let text = template.render(&messages, AddGenerationPrompt::Yes)?;
                Ok(tokenizer.encode_prompt(&text, SpecialTokens::Parse)?)
            }
        };
        self.off_the_reactor(work).await?
    }

    /// The text of token ids.
    ///
    /// # Errors
    /// When an id is not in the vocabulary.
    pub async fn decode(&self, tokens: Vec<TokenId>, control: ControlText) -> Result<String, PromptError> {
        let tokenizer = self.tokenizer.clone();
        let work = move || {
            tokenizer.check_tokens(&tokens)?;
            Ok(tokenizer.decode(&tokens, control))
        };
        self.off_the_reactor(work).await?
    }

    async fn off_the_reactor<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PromptError> {
        let _place = self.places.acquire().await.expect("invariant: the semaphore is never closed");
        tokio::task::spawn_blocking(work).await.map_err(|_| PromptError::Panicked)
    }
}
