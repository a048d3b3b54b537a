//! The small files beside a safetensors checkpoint: config.json, tokenizer.json and friends. It limits their size
//! and parses JSON; it does not look into them.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde_json::Value;

use crate::error::CheckpointError;
use crate::limits::{MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, MAX_TOKENIZER_BYTES};

/// What lies beside the weights.
#[derive(Default)]
pub(crate) struct Sidecars {
    pub(crate) config: Option<Value>,
    /// The bytes of config.json, for the digest.
    pub(crate) config_bytes: Vec<u8>,
    pub(crate) generation_config: Option<Value>,
    pub(crate) tokenizer: Option<Vec<u8>>,
    pub(crate) tokenizer_config: Option<Value>,
    pub(crate) chat_template: Option<String>,
}

impl Sidecars {
    /// Reads what there is in a directory; config.json must be there.
    pub(crate) fn read(directory: &Path) -> Result<Self, CheckpointError> {
        let config_path = directory.join("config.json");
        let config_bytes = read_limited(&config_path, MAX_CONFIG_BYTES)?
            .ok_or_else(|| CheckpointError::unusable(directory, missing_config(directory)))?;
        Ok(Self {
            config: Some(parse_json(&config_path, &config_bytes)?),
            config_bytes,
            generation_config: read_json(&directory.join("generation_config.json"))?,
            tokenizer: read_limited(&directory.join("tokenizer.json"), MAX_TOKENIZER_BYTES)?,
            tokenizer_config: read_json(&directory.join("tokenizer_config.json"))?,
            chat_template: read_text(&directory.join("chat_template.jinja"))?,
        })
    }
}

fn missing_config(directory: &Path) -> String {
    let gguf = std::fs::read_dir(directory).ok().and_then(|entries| {
        let mut names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.find(|name| name.ends_with(".gguf"))
    });
    match gguf {
        Some(name) => format!("no config.json here, but {name:?} is: give the path of that file"),
        None => {
            "no config.json here; give a .gguf file, or a directory with config.json, tokenizer.json and \
                 model.safetensors"
                .to_owned()
        }
    }
}

/// The bytes of a file, or `None` when it is not there.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CheckpointError::io("open", path, error)),
    };
    let len = file.metadata().map_err(|error| CheckpointError::io("inspect", path, error))?.len();
    let mut bytes = Vec::with_capacity(len.min(limit) as usize + 1);
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| CheckpointError::io("read", path, error))?;
    if bytes.len() as u64 > limit {
        let place = "the file".to_owned();
        return Err(CheckpointError::TooLong { place, offset: 0, len, limit }.in_file(path));
    }
    Ok(Some(bytes))
}

fn read_json(path: &Path) -> Result<Option<Value>, CheckpointError> {
    read_limited(path, MAX_CONFIG_BYTES)?.map(|bytes| parse_json(path, &bytes)).transpose()
}

fn read_text(path: &Path) -> Result<Option<String>, CheckpointError> {
    let Some(bytes) = read_limited(path, MAX_CONFIG_BYTES)? else { return Ok(None) };
    let text = String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to() as u64;
        CheckpointError::NotUtf8 { place: "text".to_owned(), offset }.in_file(path)
    })?;
    Ok(Some(text))
}

/// Parses JSON whose number of values is limited first: a value takes far more memory than its text.
fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value, CheckpointError> {
    let n_values = bytes.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count() + 1;
    if n_values > MAX_CONFIG_VALUES {
        let (size, limit) = (n_values as u64, MAX_CONFIG_VALUES as u64);
        return Err(CheckpointError::TooMuch { what: "number of values", size, limit }.in_file(path));
    }
    serde_json::from_slice(bytes)
        .map_err(|error| CheckpointError::unusable(path, format!("not JSON: {error}")))
}
