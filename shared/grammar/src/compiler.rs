//! Grammars over the tokens of one tokenizer. All limits are of work, not of time, so that the same grammar is accepted on
//! every machine.

use std::sync::Arc;

use llguidance::{
    ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie},
};
use paceline_domain::{ErrorKind, Grammar, TokenId};
use paceline_text::Tokenizer;

use crate::matcher::Matcher;

/// Longest text of a grammar, in bytes.
pub const MAX_GRAMMAR_BYTES: usize = 64 << 10;

/// Bounds of the work for one grammar. By the rates that the crate states a mask takes at most about ten milliseconds.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 1_000,
        initial_lexer_fuel: 500_000,
        step_lexer_fuel: 100_000,
        step_max_items: 50_000,
        max_lexer_states: 50_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: false,
        // Errors go to clients and logs: nothing of the output may be in them.
        verbose_errors: false,
    }
}

/// Why a grammar cannot be used.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum GrammarError {
    /// It is too long.
    #[error("the grammar has {0} bytes; at most {MAX_GRAMMAR_BYTES} are taken")]
    TooLong(usize),
    /// It is not what it says it is, or asks for something that is not supported.
    #[error("the {kind} cannot be used: {problem}")]
    Bad {
        /// What it says it is.
        kind: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// It went beyond its limits, or no token can follow, while it was used.
    #[error("the grammar cannot go on: {0}")]
    Stuck(String),
    /// The tokenizer has nothing that ends a text.
    #[error("this model has no end token, so that no grammar could come to its end")]
    Endless,
    /// The tokenizer cannot be used for grammars.
    #[error("grammars cannot be used with this model's tokenizer: {0}")]
    Tokenizer(String),
}

impl GrammarError {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::TooLong(_) | Self::Bad { .. } => ErrorKind::Invalid,
            Self::Stuck(_) | Self::Endless => ErrorKind::Unfit,
            Self::Tokenizer(_) => ErrorKind::Bug,
        }
    }
}

/// Compiles grammars for one tokenizer.
pub struct Compiler {
    factory: ParserFactory,
    n_vocab: usize,
}

impl Compiler {
    /// For a tokenizer whose ids from `n_vocab` on are never chosen. It takes some tenths of a second.
    ///
    /// # Errors
    /// When the tokenizer has no end token, or its vocabulary cannot be used.
    pub fn new(tokenizer: &Tokenizer, n_vocab: usize) -> Result<Self, GrammarError> {
        let usable = |token: &&TokenId| token.idx() < n_vocab;
        let ends: Vec<u32> = tokenizer.eos_tokens().iter().filter(usable).map(|token| token.0).collect();
        let end = *ends.first().ok_or(GrammarError::Endless)?;
        let words: Vec<Vec<u8>> = (0..n_vocab as u32).map(|id| word(tokenizer, TokenId(id))).collect();
        let trie = TokTrie::from(&TokRxInfo::new(n_vocab as u32, end), &words).with_eos_tokens(&ends);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let unusable = |error: &dyn std::fmt::Display| GrammarError::Tokenizer(error.to_string());
        let mut factory = ParserFactory::new_simple(&environment).map_err(|error| unusable(&error))?;
        *factory.limits_mut() = limits();
        factory.quiet();
        Ok(Self { factory, n_vocab })
    }

    /// The beginning of a text in this grammar.
    ///
    /// # Errors
    /// When it is malformed, not supported, or beyond the limits.
    pub fn compile(&self, grammar: &Grammar) -> Result<Matcher, GrammarError> {
        let (kind, text) = match grammar {
            Grammar::JsonObject => ("JSON object", r#"{"type":"object"}"#),
            Grammar::JsonSchema(schema) => ("JSON schema", schema.as_str()),
            Grammar::Regex(regex) => ("regular expression", regex.as_str()),
            Grammar::Lark(grammar) => ("grammar", grammar.as_str()),
        };
        if text.len() > MAX_GRAMMAR_BYTES {
            return Err(GrammarError::TooLong(text.len()));
        }
        let bad = |problem: String| GrammarError::Bad { kind, problem };
        let top = match grammar {
            Grammar::JsonObject | Grammar::JsonSchema(_) => {
                let schema: serde_json::Value =
                    serde_json::from_str(text).map_err(|error| bad(format!("it is not JSON: {error}")))?;
                if !(schema.is_object() || schema.is_boolean()) {
                    return Err(bad("it is neither a JSON object nor true or false".into()));
                }
                TopLevelGrammar::from_json_schema(schema)
            }
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        };
        let parser = self.factory.create_parser(top).map_err(|error| bad(format!("{error:#}")))?;
        Matcher::begin(parser, self.n_vocab).map_err(|error| match error {
            GrammarError::Stuck(problem) => bad(problem),
            other => other,
        })
    }
}

/// The bytes of a token, as the crate wants them: special ones behind a marker, so that no text is one.
fn word(tokenizer: &Tokenizer, token: TokenId) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(token);
    if tokenizer.is_special(token) && !bytes.is_empty() {
        return [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat();
    }
    bytes.to_vec()
}
