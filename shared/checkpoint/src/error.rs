//! Everything that can be wrong with a checkpoint. Messages carry the numbers and, where it helps, what to do; names
//! out of files are shortened and escaped.

use std::fmt;
use std::path::{Path, PathBuf};

use paceline_domain::ErrorKind;

/// Why a checkpoint cannot be opened, read or written. Offsets are bytes from the start of the file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CheckpointError {
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{}: {why}", path.display())]
    Unusable { path: PathBuf, why: String },
    #[error("{}: {source}", path.display())]
    InFile { path: PathBuf, source: Box<CheckpointError> },

    #[error("not a GGUF file: it starts with bytes {found:02x?} where \"GGUF\" is expected (offset 0)")]
    BadMagic { found: [u8; 4] },
    #[error(
        "the GGUF file is big-endian (version field {version:#010x} at offset 4); convert it to little-endian"
    )]
    BigEndian { version: u32 },
    #[error("GGUF version {version} (offset 4) is not supported; versions 2 and 3 are")]
    UnsupportedVersion { version: u32 },
    #[error("{place} at offset {offset} needs {needed} bytes; the file has {available} left")]
    Truncated { place: String, offset: u64, needed: u64, available: u64 },
    #[error("{place} at offset {offset} is {count}; the rest of the file has room for {max}")]
    CountTooLarge { place: String, offset: u64, count: u64, max: u64 },
    #[error("{place} at offset {offset} is {len} bytes long; at most {limit} are allowed")]
    TooLong { place: String, offset: u64, len: u64, limit: u64 },
    #[error("{place} at offset {offset} is empty")]
    EmptyName { place: String, offset: u64 },
    #[error("{place} at offset {offset} is not UTF-8")]
    NotUtf8 { place: String, offset: u64 },
    #[error("{place} at offset {offset} has the unknown type code {code}")]
    UnknownValueType { place: String, offset: u64, code: u32 },
    #[error("{place} at offset {offset} is a bool with byte {byte}; 0 and 1 are allowed")]
    BadBool { place: String, offset: u64, byte: u8 },
    #[error("{place} at offset {offset} nests arrays deeper than {limit}")]
    NestedTooDeep { place: String, offset: u64, limit: usize },
    #[error("key {key} at offset {offset} is there twice")]
    DuplicateKey { key: String, offset: u64 },

    #[error("key {key} is missing")]
    MissingKey { key: String },
    #[error("key {key} is {found}; {expected} is expected")]
    WrongType { key: String, expected: &'static str, found: String },
    #[error("key {key} is {value}, which does not fit {expected}")]
    OutOfRange { key: String, expected: &'static str, value: String },
    #[error("key \"general.alignment\" is {alignment}; a power of two from 8 to 4096 is expected")]
    BadAlignment { alignment: u32 },

    #[error("tensor {tensor} at offset {offset} has the unknown type code {code}; known are {known}")]
    UnknownTensorType { tensor: String, offset: u64, code: u32, known: String },
    #[error(
        "tensor {tensor} at offset {offset} has type {dtype}; F32, F16 and BF16 are supported in safetensors"
    )]
    UnsupportedDtype { tensor: String, offset: u64, dtype: String },
    #[error("tensor {tensor} at offset {offset}: {why}")]
    BadShape { tensor: String, offset: u64, why: String },
    #[error("tensor {tensor} at offset {offset} starts at {start}, which is not a multiple of {alignment}")]
    UnalignedTensor { tensor: String, offset: u64, start: u64, alignment: u32 },
    #[error(
        "tensor {tensor} at offset {offset} covers bytes {start}..{end}; tensor data lies in {data_start}..{data_end}"
    )]
    OutsideFile { tensor: String, offset: u64, start: u64, end: u64, data_start: u64, data_end: u64 },
    #[error(
        "tensor {tensor} at offset {offset} starts at byte {start}, inside tensor {other} that ends at {end}"
    )]
    Overlap { tensor: String, offset: u64, other: String, start: u64, end: u64 },
    #[error("bytes {start}..{end} of the tensor data belong to no tensor")]
    Hole { start: u64, end: u64 },
    #[error("tensor {tensor} at offset {offset} is there twice")]
    DuplicateTensor { tensor: String, offset: u64 },
    #[error("{what} of {size} is more than {limit}")]
    TooMuch { what: &'static str, size: u64, limit: u64 },

    #[error("{place} is not what is expected, at offset {offset}: {why}")]
    BadJson { place: &'static str, offset: u64, why: String },
    #[error("tensor {tensor} is said to be in {shard}, which is not a plain name of a .safetensors file")]
    BadShardName { tensor: String, shard: String },
    #[error("tensor {tensor}: the shard index and the shards disagree: {why}")]
    IndexMismatch { tensor: String, why: String },

    #[error("cannot write {what}: {why}")]
    Unwritable { what: String, why: String },
}

impl CheckpointError {
    /// What can be done about it: a file system error may pass, everything else is in the file.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { .. } => ErrorKind::Unavailable,
            Self::InFile { source, .. } => source.kind(),
            _ => ErrorKind::Invalid,
        }
    }

    /// The error without the file it happened in.
    pub fn innermost(&self) -> &CheckpointError {
        match self {
            Self::InFile { source, .. } => source.innermost(),
            other => other,
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn unusable(path: &Path, why: impl Into<String>) -> Self {
        Self::Unusable { path: path.to_owned(), why: why.into() }
    }

    pub(crate) fn in_file(self, path: &Path) -> Self {
        Self::InFile { path: path.to_owned(), source: Box::new(self) }
    }
}

/// A name out of a file in quotes, escaped and shortened, fit for a message.
pub(crate) fn quoted(name: &str) -> String {
    const MAX_SHOWN: usize = 100;
    match name.char_indices().nth(MAX_SHOWN) {
        None => format!("{name:?}"),
        Some((end, _)) => format!("{:?}... ({} bytes)", &name[..end], name.len()),
    }
}

/// Where in a GGUF header the cursor is. Turned into words only when something is wrong there.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place<'a> {
    Header(&'static str),
    Key(u64),
    Value(&'a str),
    TensorName(u64),
    Tensor(&'a str),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(what) => formatter.write_str(what),
            Self::Key(i) => write!(formatter, "key of metadata entry {i}"),
            Self::Value(key) => write!(formatter, "value of key {}", quoted(key)),
            Self::TensorName(i) => write!(formatter, "name of tensor {i}"),
            Self::Tensor(name) => write!(formatter, "directory entry of tensor {}", quoted(name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_and_shortened() {
        assert_eq!(quoted("a\n\u{1b}b"), "\"a\\n\\u{1b}b\"");
        let long = "é".repeat(5000);
        let shown = quoted(&long);
        assert!(shown.len() < 260 && shown.ends_with("... (10000 bytes)"), "{shown}");
    }
}
