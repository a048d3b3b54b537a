//! Reads a tokenizer from GGUF metadata. The keys are those of llama.cpp's converter; absent keys mean what they mean
//! there.

use paceline_checkpoint::Metadata;
use paceline_domain::TokenId;

use crate::bpe::ByteLevelBpe;
use crate::error::TextError;
use crate::pre_tokenizer::PreTokenizer;
use crate::sentence_piece::{SentencePiece, SpacePrefix};
use crate::special::SpecialSplitter;
use crate::tokenizer::{Encoder, Parts};
use crate::vocabulary::{Spelling, TokenKind, Vocabulary};

const MODEL: &str = "tokenizer.ggml.model";
const EOS: &str = "tokenizer.ggml.eos_token_id";

/// Control tokens that end a text or a turn in the supported families. Files often name only one of them as
/// end-of-sequence token, but models emit the others too.
const END_TEXTS: [&str; 6] =
    ["</s>", "<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"];

/// What `tokenizer.ggml.model` can be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Model {
    ByteLevelBpe,
    SentencePiece,
}

/// Builds everything a tokenizer is made of.
pub(crate) fn parts(metadata: &Metadata) -> Result<Parts, TextError> {
    let model = match metadata.optional_str(MODEL)?.ok_or(TextError::NoTokenizer)? {
        "gpt2" => Model::ByteLevelBpe,
        "llama" => Model::SentencePiece,
        other => {
            let found = other.to_owned();
            return Err(TextError::Unsupported { what: MODEL, found, supported: "gpt2, llama" });
        }
    };
    let vocabulary = vocabulary(metadata, model)?;
    let (encoder, adds_bos, strips_leading_space) = match model {
        Model::ByteLevelBpe => {
            let (encoder, adds_bos) = byte_level_bpe(metadata, &vocabulary)?;
            (encoder, adds_bos, false)
        }
        Model::SentencePiece => sentence_piece(metadata, &vocabulary)?,
    };
    let bos = special_id(metadata, "tokenizer.ggml.bos_token_id", &vocabulary)?;
    let bos = bos.or_else(|| default_id(model, &vocabulary, 1));
    let adds_bos =
        metadata.optional_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos) && bos.is_some();
    let eos = end_tokens(metadata, model, &vocabulary)?;
    Ok(Parts { vocabulary, encoder, bos, adds_bos, eos, strips_leading_space })
}

fn vocabulary(metadata: &Metadata, model: Model) -> Result<Vocabulary, TextError> {
    let texts: Vec<String> = metadata.strings("tokenizer.ggml.tokens")?.iter().map(str::to_owned).collect();
    let types = metadata.optional_i32s("tokenizer.ggml.token_type")?;
    let kinds = match types {
        None => vec![TokenKind::Normal; texts.len()],
        Some(types) => types.iter().enumerate().map(kind).collect::<Result<_, _>>()?,
    };
    let spelling = match model {
        Model::ByteLevelBpe => Spelling::ByteLevel,
        Model::SentencePiece => Spelling::SentencePiece,
    };
    Vocabulary::new(texts, kinds, spelling)
}

fn kind((id, code): (usize, &i32)) -> Result<TokenKind, TextError> {
    TokenKind::from_gguf_code(*code).ok_or_else(|| {
        TextError::malformed(
            "tokenizer.ggml.token_type",
            format!("token {id} has type {code}; types are 1 to 6"),
        )
    })
}

/// The encoder and whether its family adds the beginning-of-sequence token.
fn byte_level_bpe(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<(Encoder, bool), TextError> {
    let name = metadata.optional_str("tokenizer.ggml.pre")?.unwrap_or("default");
    let (pre_tokenizer, family) = PreTokenizer::from_name(name)?;
    let merges = metadata.strings("tokenizer.ggml.merges")?;
    let model = ByteLevelBpe::new(pre_tokenizer, family, vocabulary, merges.iter())?;
    Ok((Encoder::ByteLevelBpe(SpecialSplitter::new(vocabulary)?, Box::new(model)), family.adds_bos))
}

/// The encoder, whether a beginning-of-sequence token is added, and whether decoding drops a leading space.
fn sentence_piece(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<(Encoder, bool, bool), TextError> {
    let scores = metadata.f32s("tokenizer.ggml.scores")?;
    let unknown = special_id(metadata, "tokenizer.ggml.unknown_token_id", vocabulary)?;
    let unknown = unknown.or_else(|| default_id(Model::SentencePiece, vocabulary, 0));
    let adds_prefix = metadata.optional_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let prefix = if adds_prefix { SpacePrefix::Added } else { SpacePrefix::Absent };
    let model = SentencePiece::new(vocabulary, &scores, unknown, prefix)?;
    Ok((Encoder::SentencePiece(SpecialSplitter::new(vocabulary)?, Box::new(model)), true, adds_prefix))
}

/// The id under a key; an id beyond the usable vocabulary is an error.
fn special_id(
    metadata: &Metadata,
    key: &'static str,
    vocabulary: &Vocabulary,
) -> Result<Option<TokenId>, TextError> {
    let Some(id) = metadata.optional_u32(key)? else { return Ok(None) };
    if id as usize >= vocabulary.n_usable() {
        let problem = format!("token {id} is not among the {} usable tokens", vocabulary.n_usable());
        return Err(TextError::malformed(key, problem));
    }
    Ok(Some(TokenId(id)))
}

/// What SentencePiece vocabularies have at 0, 1 and 2, if the token there is special.
fn default_id(model: Model, vocabulary: &Vocabulary, id: u32) -> Option<TokenId> {
    let is_special = vocabulary.kind(id as usize).is_some_and(TokenKind::is_special);
    (model == Model::SentencePiece && is_special).then_some(TokenId(id))
}

fn end_tokens(metadata: &Metadata, model: Model, vocabulary: &Vocabulary) -> Result<Vec<TokenId>, TextError> {
    let mut ends = Vec::new();
    for key in [EOS, "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        let default = if key == EOS { default_id(model, vocabulary, 2) } else { None };
        ends.extend(special_id(metadata, key, vocabulary)?.or(default));
    }
    let is_end = |text, kind| kind == TokenKind::Control && END_TEXTS.contains(&text);
    let by_text = (0u32..).zip(vocabulary.iter()).filter(|(_, (text, kind))| is_end(*text, *kind));
    ends.extend(by_text.map(|(id, _)| TokenId(id)));
    Ok(ends)
}
