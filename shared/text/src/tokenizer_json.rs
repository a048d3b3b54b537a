//! Reads a tokenizer from tokenizer.json with its neighbours tokenizer_config.json, generation_config.json and
//! config.json, and encodes with the `tokenizers` crate. BPE models only: byte-level ones and those with byte fallback.

use std::panic::{AssertUnwindSafe, catch_unwind};

use paceline_checkpoint::Checkpoint;
use paceline_domain::TokenId;
use serde_json::Value;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedVocabulary, Model, NormalizedString, OffsetReferential, OffsetType, PostProcessor,
    PreTokenizedString, PreTokenizer as _, Tokenizer as Pipeline,
};

use crate::error::TextError;
use crate::pre_tokenizer::PreTokenizer;
use crate::special::SpecialTokens;
use crate::tokenizer::{Encoder, Parts};
use crate::vocabulary::{Spelling, TokenKind, Vocabulary};

const FILE: &str = "tokenizer.json";
/// Ids may have gaps, but a table by id must not outgrow the file: this many ids for each token.
const MAX_IDS_PER_TOKEN: usize = 4;

/// The pipeline of the file and its added tokens for texts in which control tokens are plain text.
pub(crate) struct TokenizerJson {
    pipeline: Pipeline,
    literal: AddedVocabulary,
    /// Cuts words where the rule is one we know. The library's expressions backtrack, and after a number of steps they
    /// silently stop cutting.
    words: Option<PreTokenizer>,
}

/// Builds everything a tokenizer is made of.
pub(crate) fn parts(checkpoint: &Checkpoint) -> Result<Parts, TextError> {
    let bytes = checkpoint.tokenizer_json().ok_or(TextError::NoTokenizer)?;
    let file: Value = serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    check_model(&file["model"])?;
    let (spelling, strips_leading_space) = spelling(&file)?;
    let pipeline = load(bytes)?;
    let vocabulary = vocabulary(&pipeline, &file["model"]["vocab"], spelling)?;
    let config = checkpoint.tokenizer_config_json();
    let bos = named_token(config, "bos_token", &pipeline);
    let adds_bos = bos.is_some_and(|bos| adds_bos(config, bos, &pipeline));
    let mut eos: Vec<TokenId> = named_token(config, "eos_token", &pipeline).into_iter().collect();
    for source in [checkpoint.generation_config_json(), checkpoint.config_json()].into_iter().flatten() {
        eos.extend(eos_ids(&source["eos_token_id"], &vocabulary)?);
    }
    let mut literal = pipeline.get_added_vocabulary().clone();
    literal.set_encode_special_tokens(true);
    let words = PreTokenizer::from_json(&file["pre_tokenizer"]);
    let encoder = Encoder::TokenizerJson(Box::new(TokenizerJson { pipeline, literal, words }));
    Ok(Parts { vocabulary, encoder, bos, adds_bos, eos, strips_leading_space })
}

impl TokenizerJson {
    /// Appends the tokens of `text`; nothing is added before or after.
    pub(crate) fn encode(
        &self,
        text: &str,
        special: SpecialTokens,
        tokens: &mut Vec<TokenId>,
    ) -> Result<(), TextError> {
        let added = match special {
            SpecialTokens::Parse => self.pipeline.get_added_vocabulary(),
            SpecialTokens::Literal => &self.literal,
        };
        let mut words = added.extract_and_normalize(self.pipeline.get_normalizer(), text);
        self.cut(&mut words)
            .and_then(|()| words.tokenize(|word| self.pipeline.get_model().tokenize(word.get())))
            .map_err(|error| TextError::Encode { n_bytes: text.len(), problem: error.to_string() })?;
        let splits = words.get_splits(OffsetReferential::Original, OffsetType::None);
        tokens.extend(
            splits.iter().flat_map(|(_, _, pieces)| pieces.iter().flatten()).map(|piece| TokenId(piece.id)),
        );
        Ok(())
    }
}

impl TokenizerJson {
    /// Cuts a text that was normalized into words, written in byte letters.
    fn cut(&self, text: &mut PreTokenizedString) -> tokenizers::Result<()> {
        match (&self.words, self.pipeline.get_pre_tokenizer()) {
            (Some(words), _) => {
                text.split(|_, piece| {
                    let slice = |range| piece.slice(tokenizers::normalizer::Range::Normalized(range));
                    let pieces: Option<Vec<NormalizedString>> =
                        words.ranges(piece.get()).map(slice).collect();
                    pieces.ok_or_else(|| "a word is not inside its text".into())
                })?;
                ByteLevel::new(false, false, false).pre_tokenize(text)
            }
            (None, Some(pre_tokenizer)) => pre_tokenizer.pre_tokenize(text),
            (None, None) => Ok(()),
        }
    }
}

fn malformed(problem: impl Into<String>) -> TextError {
    TextError::malformed(FILE, problem)
}

fn unsupported(what: &'static str, found: &Value, supported: &'static str) -> TextError {
    let found = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
    TextError::Unsupported { what, found: found.chars().take(80).collect(), supported }
}

/// BPE without affixes or dropout. Old files do not name the type.
fn check_model(model: &Value) -> Result<(), TextError> {
    let is_bpe = model["type"] == "BPE" || (model["type"].is_null() && model["merges"].is_array());
    if !is_bpe {
        return Err(unsupported("model.type of tokenizer.json", &model["type"], "BPE"));
    }
    for affix in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[affix].as_str().is_some_and(|affix| !affix.is_empty()) {
            return Err(unsupported("a subword affix of tokenizer.json", &model[affix], "none"));
        }
    }
    if model["dropout"].as_f64().is_some_and(|dropout| dropout != 0.0) {
        return Err(unsupported("dropout of tokenizer.json", &model["dropout"], "0"));
    }
    Ok(())
}

/// How tokens spell bytes, and whether decoding drops one leading space: told by the decoder.
fn spelling(file: &Value) -> Result<(Spelling, bool), TextError> {
    let decoder = &file["decoder"];
    let steps = decoder["decoders"].as_array().map_or(std::slice::from_ref(decoder), Vec::as_slice);
    let has = |name: &str| steps.iter().any(|step| step["type"] == name);
    if has("ByteLevel") {
        return Ok((Spelling::ByteLevel, false));
    }
    let prepends = |step: &Value| {
        step["type"] == "Metaspace" && step["prepend_scheme"] != "never" && step["add_prefix_space"] != false
    };
    let strips = |step: &Value| step["type"] == "Strip" && step["content"] == " " && step["start"] == 1;
    if has("ByteFallback") || has("Metaspace") {
        return Ok((Spelling::SentencePiece, steps.iter().any(|step| strips(step) || prepends(step))));
    }
    Err(unsupported("decoder of tokenizer.json", &decoder["type"], "ByteLevel, ByteFallback, Metaspace"))
}

/// The file comes from outside and the parser is not ours: a panic in it is an error of the file.
fn load(bytes: &[u8]) -> Result<Pipeline, TextError> {
    match catch_unwind(AssertUnwindSafe(|| Pipeline::from_bytes(bytes))) {
        Ok(Ok(pipeline)) => Ok(pipeline),
        Ok(Err(error)) => Err(malformed(error.to_string())),
        Err(_) => Err(malformed("the tokenizers library failed on it")),
    }
}

/// Tokens by id. Gaps become padding; two tokens with one id are an error.
fn vocabulary(pipeline: &Pipeline, model: &Value, spelling: Spelling) -> Result<Vocabulary, TextError> {
    let added = pipeline.get_added_vocabulary().get_added_tokens_decoder();
    let model = model.as_object().ok_or_else(|| malformed("model.vocab is not an object"))?;
    let n_tokens = model.len() + added.len();
    let mut tokens: Vec<(String, TokenKind)> = Vec::new();
    let mut place = |id: u64, text: &str, kind| {
        let id = usize::try_from(id).ok().filter(|id| id / MAX_IDS_PER_TOKEN <= n_tokens);
        let id =
            id.ok_or_else(|| malformed(format!("the id of {text:?} is too large for {n_tokens} tokens")))?;
        if tokens.len() <= id {
            tokens.resize(id + 1, (String::new(), TokenKind::Unused));
        }
        let is_taken = tokens[id].1 != TokenKind::Unused && tokens[id].0 != text;
        if is_taken {
            return Err(malformed(format!("tokens {:?} and {text:?} both have id {id}", tokens[id].0)));
        }
        tokens[id] = (text.to_owned(), kind);
        Ok(())
    };
    let byte_fallback = spelling == Spelling::SentencePiece;
    for (text, id) in model {
        let id = id.as_u64().ok_or_else(|| malformed(format!("the id of {text:?} is {id}")))?;
        let is_byte = byte_fallback && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        place(id, text, if is_byte { TokenKind::Byte } else { TokenKind::Normal })?;
    }
    for (id, token) in added {
        let kind = if token.special { TokenKind::Control } else { TokenKind::UserDefined };
        place((*id).into(), &token.content, kind)?;
    }
    let (texts, kinds) = tokens.into_iter().unzip();
    Vocabulary::new(texts, kinds, spelling)
}

/// A token named in tokenizer_config.json, by its text or by an object with its text.
fn named_token(config: Option<&Value>, name: &str, pipeline: &Pipeline) -> Option<TokenId> {
    pipeline.token_to_id(token_text(config?, name)?).map(TokenId)
}

/// The text of a token named in tokenizer_config.json.
pub(crate) fn token_text<'c>(config: &'c Value, name: &str) -> Option<&'c str> {
    config[name].as_str().or_else(|| config[name]["content"].as_str())
}

/// The configuration decides; where it is silent, what the file's own post-processor does to an empty text.
fn adds_bos(config: Option<&Value>, bos: TokenId, pipeline: &Pipeline) -> bool {
    if let Some(adds_bos) = config.and_then(|config| config["add_bos_token"].as_bool()) {
        return adds_bos;
    }
    let Some(post_processor) = pipeline.get_post_processor() else { return false };
    let processed = post_processor.process(tokenizers::Encoding::default(), None, true);
    processed.is_ok_and(|encoding| encoding.get_ids().first() == Some(&bos.0))
}

/// One id or a list of ids.
fn eos_ids(value: &Value, vocabulary: &Vocabulary) -> Result<Vec<TokenId>, TextError> {
    let ids = match value {
        Value::Null => &[],
        Value::Array(ids) => ids.as_slice(),
        id => std::slice::from_ref(id),
    };
    let checked = |id: &Value| {
        let usable = id
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .filter(|id| (*id as usize) < vocabulary.n_usable());
        usable.map(TokenId).ok_or_else(|| {
            TextError::malformed("eos_token_id", format!("{id} is no id below {}", vocabulary.n_usable()))
        })
    };
    ids.iter().map(checked).collect()
}
