//! A validated generation request and how it ends. Text is already tokens here.

use crate::{RequestId, SamplingParams, TokenId};

/// Most stop strings one request may have.
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string in bytes.
pub const MAX_STOP_STRING_BYTES: usize = 512;
/// Most completions of one prompt.
pub const MAX_CHOICES: u32 = 16;

/// The tokens a generation starts from; never empty.
#[derive(Clone, PartialEq, Debug)]
pub struct Prompt(Vec<TokenId>);

impl Prompt {
    /// `None` when there is no token.
    pub fn new(tokens: Vec<TokenId>) -> Option<Self> {
        (!tokens.is_empty()).then_some(Self(tokens))
    }

    /// The tokens, at least one.
    pub fn tokens(&self) -> &[TokenId] {
        &self.0
    }
}

/// When a generation ends.
#[derive(Clone, PartialEq, Debug)]
pub struct StopRules {
    /// Most tokens to generate; at least 1, and prompt + this fits the context.
    pub max_tokens: u32,
    /// Fewest tokens: until then no token that ends the generation can be chosen; at most `max_tokens`.
    pub min_tokens: u32,
    /// Texts that end the generation; they are not part of the output.
    pub stop_strings: Vec<String>,
    /// Tokens that end the generation beside the model's own end tokens; they are not part of the text.
    pub stop_tokens: Vec<TokenId>,
    /// Go on after the model's own end tokens.
    pub ignore_eos: bool,
}

/// Longest proposal unless a request says otherwise, in tokens.
pub const DEFAULT_PROPOSAL: usize = 16;
/// Longest proposal a request may ask for, in tokens.
pub const MAX_PROPOSAL: usize = 32;

/// Who may propose tokens for a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Speculation {
    /// Nobody.
    Off,
    /// Whoever promises most.
    #[default]
    Auto,
    /// The request's own tokens only.
    Ngram,
    /// The draft service only.
    Draft,
}

/// What a request wants of speculation. It changes no token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SpeculationOptions {
    /// Who may propose.
    pub mode: Speculation,
    /// Most tokens in one proposal.
    pub max_tokens: usize,
}

impl Default for SpeculationOptions {
    fn default() -> Self {
        Self { mode: Speculation::Auto, max_tokens: DEFAULT_PROPOSAL }
    }
}

/// What the generated text must be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that this schema allows.
    JsonSchema(String),
    /// Text that this regular expression matches as a whole.
    Regex(String),
    /// Text of this grammar in Lark's notation.
    Lark(String),
}

/// A request whose every limit was checked.
#[derive(Clone, PartialEq, Debug)]
pub struct GenerateRequest {
    /// Made by the coordinator.
    pub id: RequestId,
    /// What to continue.
    pub prompt: Prompt,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopRules,
    /// Who may propose tokens.
    pub speculation: SpeculationOptions,
    /// Completions, each with a seed of its own; see [`SamplingParams::of_choice`].
    pub n_choices: u32,
    /// `Some(n)`: report the log probability of each prompt token but the first, and of the n likeliest in its place.
    pub n_prompt_logprobs: Option<u32>,
}

/// Why a generation ended.
#[derive(Clone, PartialEq, Debug)]
pub enum FinishReason {
    /// The model's end token, or a stop token.
    StopToken(TokenId),
    /// A stop string, by its index in the request.
    StopString(usize),
    /// The most tokens allowed.
    Length,
    /// The client went away or asked for it.
    Cancelled,
}

/// Tokens counted for a finished request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub n_prompt: u32,
    /// Tokens generated, the stop token included.
    pub n_completion: u32,
    /// Prompt tokens whose KV was found in the prefix cache.
    pub n_cached: u32,
}
