//! Renders chat messages to a prompt with the checkpoint's own template. It does not tokenize.
//!
//! The rendered text is meant for [`SpecialTokens::Parse`](crate::SpecialTokens::Parse): the template's control tokens
//! are text here. A message that spells out a control token is then obeyed like the template, because a template may
//! trim, cut and join contents, so what came from a message is not known afterwards. Whoever must prevent that asks
//! [`Tokenizer::find_control`](crate::Tokenizer::find_control) about each message first.

use std::io;
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use paceline_checkpoint::{Checkpoint, Format, Metadata};
use regex::Regex;

use crate::error::TextError;
use crate::template_json::tojson;
use crate::template_time::strftime;
use crate::tokenizer_json::token_text;

/// Steps a template may take for one conversation; 64 bytes of text made by it count as one.
const FUEL: u64 = 1_000_000;
/// Most bytes a template may write.
const MAX_OUTPUT_BYTES: usize = 16 << 20;
const RECURSION_LIMIT: usize = 100;
const NAME: &str = "chat_template";

/// One message of a conversation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// Whether the prompt ends with the header of the assistant's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AddGenerationPrompt {
    /// The model is to answer.
    Yes,
    /// The conversation is rendered as it is.
    No,
}

/// A compiled chat template in the dialect of the Transformers library.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// The source of an error that the template raised itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// The template of a checkpoint, or `None` when it has none. GGUF: `tokenizer.chat_template`. Otherwise
    /// chat_template.jinja, else `chat_template` of tokenizer_config.json (of a list the one named `default`).
    ///
    /// # Errors
    /// When the template does not compile.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Option<Self>, TextError> {
        if checkpoint.format() == Format::Gguf {
            let metadata = checkpoint.metadata();
            let Some(source) = metadata.optional_str("tokenizer.chat_template")? else { return Ok(None) };
            let bos_token = gguf_token(metadata, "tokenizer.ggml.bos_token_id")?;
            let eos_token = gguf_token(metadata, "tokenizer.ggml.eos_token_id")?;
            return Self::new(source, bos_token, eos_token).map(Some);
        }
        let config = checkpoint.tokenizer_config_json();
        let Some(source) = checkpoint.chat_template_jinja().or_else(|| default_template(config?)) else {
            return Ok(None);
        };
        let token = |name| config.and_then(|config| token_text(config, name)).map(str::to_owned);
        Self::new(source, token("bos_token"), token("eos_token")).map(Some)
    }

    /// Compiles a template. The tokens are what `bos_token` and `eos_token` mean in it.
    ///
    /// # Errors
    /// When it does not compile.
    pub fn new(
        source: &str,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, TextError> {
        let mut environment = environment();
        environment
            .add_template_owned(NAME, without_generation_blocks(source))
            .map_err(|error| TextError::TemplateSyntax(error.to_string()))?;
        Ok(Self { environment, bos_token, eos_token })
    }

    /// The prompt of a conversation.
    ///
    /// # Errors
    /// When the template refuses the messages, fails, takes too many steps or writes too much.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: AddGenerationPrompt,
    ) -> Result<String, TextError> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| Value::from_pairs([("role", &*message.role), ("content", &*message.content)]))
            .collect();
        let mut variables = vec![
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(add_generation_prompt == AddGenerationPrompt::Yes)),
            // Transformers defines them for every conversation, so templates may test `tools is not none`.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            variables.extend(token.as_deref().map(|token| (name, Value::from(token))));
        }
        let template = self.environment.get_template(NAME).map_err(|error| failure(&error))?;
        let mut output = BoundedOutput::default();
        match template.render_captured_to(Value::from_pairs(variables), &mut output) {
            Ok(_) => {}
            Err(_) if output.is_full => return Err(TextError::TemplateOutput { limit: MAX_OUTPUT_BYTES }),
            Err(error) => return Err(failure(&error)),
        }
        String::from_utf8(output.bytes).map_err(|error| TextError::TemplateFailed(error.to_string()))
    }
}

/// What the Transformers library sets up for chat templates, with limits.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("invariant: the default delimiters are valid"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment
        .add_filter("tojson", |value: Value, arguments: Kwargs| tojson(&value, &arguments, MAX_OUTPUT_BYTES));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    environment.add_function("strftime_now", |pattern: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs() as i64);
        strftime(now, &pattern)
    });
    environment
}

/// `{% generation %}` marks the assistant's words for training; for a prompt it is a block that is always there.
fn without_generation_blocks(source: &str) -> String {
    static BEGIN: LazyLock<Regex> = LazyLock::new(|| pattern("generation"));
    static END: LazyLock<Regex> = LazyLock::new(|| pattern("endgeneration"));
    fn pattern(tag: &str) -> Regex {
        Regex::new(&format!(r"(\{{%[-+]?)\s*{tag}\s*([-+]?%\}})")).expect("invariant: a valid pattern")
    }
    END.replace_all(&BEGIN.replace_all(source, "$1 if true $2"), "$1 endif $2").into_owned()
}

fn failure(error: &Error) -> TextError {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return TextError::TemplateRefused(message.clone());
        }
        source = cause.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => TextError::TemplateFuel { fuel: FUEL },
        _ => TextError::TemplateFailed(error.to_string()),
    }
}

fn gguf_token(metadata: &Metadata, key: &str) -> Result<Option<String>, TextError> {
    let Some(id) = metadata.optional_u32(key)? else { return Ok(None) };
    let Some(tokens) = metadata.optional_strings("tokenizer.ggml.tokens")? else { return Ok(None) };
    Ok(tokens.iter().nth(id as usize).map(str::to_owned))
}

/// `chat_template` of tokenizer_config.json: a string, or a list of named ones.
fn default_template(config: &serde_json::Value) -> Option<&str> {
    let template = &config["chat_template"];
    let named = |name| template.as_array()?.iter().find(|entry| entry["name"] == name)?["template"].as_str();
    template.as_str().or_else(|| named("default"))
}

/// Takes bytes up to the limit.
#[derive(Default)]
struct BoundedOutput {
    bytes: Vec<u8>,
    is_full: bool,
}

impl io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_OUTPUT_BYTES - self.bytes.len() {
            self.is_full = true;
            return Err(io::Error::other("the output limit is reached"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
