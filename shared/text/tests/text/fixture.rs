//! Golden data, model files and vocabularies that the tests share.

use std::collections::BTreeMap;
use std::path::PathBuf;

use paceline_checkpoint::{Checkpoint, GgufWriter, MetadataValue};
use paceline_domain::TokenId;
use paceline_text::{TextError, Tokenizer};
use serde_json::Value;

pub const SMOLLM2: &str = "smollm2-135m-instruct.gguf";
pub const QWENS: [&str; 2] = ["qwen2.5-coder-0.5b-instruct.gguf", "qwen2.5-coder-1.5b-instruct.gguf"];

/// A file of tests/golden/tokenizer.
pub fn golden(name: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tokenizer").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap()
}

pub fn strings(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

pub fn ids(list: &Value) -> Vec<TokenId> {
    list.as_array().unwrap().iter().map(|id| TokenId(id.as_u64().unwrap() as u32)).collect()
}

/// A model file; the small one must be there.
pub fn model(name: &str) -> Checkpoint {
    let folder = std::env::var_os("PACELINE_TEST_MODELS").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/paceline/models")
    });
    let path = folder.join(name);
    Checkpoint::open(&path).unwrap_or_else(|error| {
        panic!(
            "{error}; run tests/run, which fetches the models, or set PACELINE_TEST_MODELS to their folder"
        )
    })
}

/// Whether tests of the large model files were asked for; says so when not.
pub fn all_models(test: &str) -> bool {
    let is_asked = std::env::var("PACELINE_TEST_MODELS_ALL").is_ok_and(|value| value == "1");
    if !is_asked {
        eprintln!("skipped {test}: it runs with PACELINE_TEST_MODELS_ALL=1");
    }
    is_asked
}

/// Tokenizer metadata that tests change and write to a GGUF file without tensors.
#[derive(Clone)]
pub struct Gguf(BTreeMap<String, MetadataValue>);

impl Gguf {
    /// A byte-level vocabulary of all letters with a few merges, control tokens and padding.
    pub fn byte_level() -> Self {
        let mut tokens: Vec<String> =
            vec!["<|end|>".into(), "<|begin|>".into(), "[tool]".into(), "[UNK]".into()];
        let mut types = vec![3, 3, 4, 2];
        let letters = (0..=255u8).map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            b'\0'..=b' ' => char::from_u32(0x100 + u32::from(byte)).unwrap(),
            0x7f..=0xa0 => char::from_u32(0x121 + u32::from(byte) - 0x7f).unwrap(),
            0xad => '\u{143}',
        });
        tokens.extend(letters.map(String::from));
        tokens.extend(["th", "the", "Ġthe", "ĠĠ"].map(String::from));
        types.resize(tokens.len(), 1);
        tokens.extend(["[PAD0]", "[PAD1]"].map(String::from));
        types.resize(tokens.len(), 5);
        Self(BTreeMap::new())
            .with("tokenizer.ggml.model", "gpt2")
            .with("tokenizer.ggml.pre", "qwen2")
            .with("tokenizer.ggml.tokens", tokens)
            .with("tokenizer.ggml.token_type", types)
            .with("tokenizer.ggml.merges", vec!["t h", "th e", "Ġ Ġ", "Ġ the"])
            .with("tokenizer.ggml.eos_token_id", 0u32)
            .with("tokenizer.ggml.bos_token_id", 1u32)
    }

    /// The vocabulary of golden file sentencepiece.json.
    pub fn sentence_piece() -> Self {
        let golden = golden("sentencepiece.json");
        let scores: Vec<f32> =
            golden["scores"].as_array().unwrap().iter().map(|score| score.as_f64().unwrap() as f32).collect();
        let types: Vec<i32> =
            golden["types"].as_array().unwrap().iter().map(|code| code.as_i64().unwrap() as i32).collect();
        Self(BTreeMap::new())
            .with("tokenizer.ggml.model", "llama")
            .with("tokenizer.ggml.tokens", strings(&golden["tokens"]))
            .with("tokenizer.ggml.scores", scores)
            .with("tokenizer.ggml.token_type", types)
            .with("tokenizer.ggml.bos_token_id", 1u32)
            .with("tokenizer.ggml.eos_token_id", 2u32)
            .with("tokenizer.ggml.unknown_token_id", 0u32)
    }

    /// The vocabulary of a real file of byte-level BPE with another splitting rule.
    pub fn with_pre(checkpoint: &Checkpoint, pre: &str) -> Self {
        let metadata = checkpoint.metadata();
        let list = |key| metadata.strings(key).unwrap().iter().map(str::to_owned).collect::<Vec<_>>();
        Self(BTreeMap::new())
            .with("tokenizer.ggml.model", "gpt2")
            .with("tokenizer.ggml.pre", pre)
            .with("tokenizer.ggml.tokens", list("tokenizer.ggml.tokens"))
            .with("tokenizer.ggml.merges", list("tokenizer.ggml.merges"))
            .with("tokenizer.ggml.token_type", metadata.i32s("tokenizer.ggml.token_type").unwrap())
    }

    pub fn with(mut self, key: &str, value: impl Into<MetadataValue>) -> Self {
        self.0.insert(key.to_owned(), value.into());
        self
    }

    pub fn without(mut self, key: &str) -> Self {
        self.0.remove(key);
        self
    }

    /// Changes one element of an array.
    pub fn with_element(mut self, key: &str, element: usize, value: impl Into<MetadataValue>) -> Self {
        match self.0.get_mut(key) {
            Some(MetadataValue::Array(_, elements)) => elements[element] = value.into(),
            _ => panic!("{key} is no array"),
        }
        self
    }

    pub fn checkpoint(&self) -> Checkpoint {
        let mut writer = GgufWriter::new().metadata("general.architecture", "llama");
        for (key, value) in &self.0 {
            writer = writer.metadata(key, value.clone());
        }
        Checkpoint::from_gguf_bytes(writer.to_bytes().unwrap()).unwrap()
    }

    pub fn tokenizer(&self) -> Result<Tokenizer, TextError> {
        Tokenizer::from_checkpoint(&self.checkpoint())
    }
}
