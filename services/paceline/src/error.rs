//! What can go wrong between a model's name and its file. Errors of commands are `anyhow`; these are typed because
//! callers tell them apart.

use std::{io, path::PathBuf};

/// A model file that could not be had.
#[derive(thiserror::Error, Debug)]
pub enum PullError {
    /// The catalogue breaks a rule of its format.
    #[error("the catalogue {} cannot be used: {problem}", path.display())]
    Catalogue {
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// There is no model to default to.
    #[error("the catalogue has no model")]
    EmptyCatalogue,
    /// A name that the catalogue lacks.
    #[error("there is no model `{name}`; known are {}. A path to a .gguf file, a .safetensors file or a model \
             directory works too", known.join(", "))]
    UnknownModel {
        /// As asked for.
        name: String,
        /// Those there are.
        known: Vec<String>,
    },
    /// A path where nothing is.
    #[error("there is no model file {}", path.display())]
    NoSuchFile {
        /// As asked for.
        path: PathBuf,
    },
    /// Neither a cache directory was given nor a home to put it in.
    #[error("no place for models: set PACELINE_MODELS_DIR, XDG_CACHE_HOME or HOME")]
    NoCacheDirectory,
    /// A source delivered other bytes than the catalogue promises. Nothing of them is kept.
    #[error(
        "{source_name} delivered {bytes} bytes with sha256 {actual}, but `{name}` must be {expected_bytes} bytes \
             with sha256 {expected}; nothing was kept"
    )]
    WrongDigest {
        /// The model.
        name: String,
        /// The source.
        source_name: String,
        /// Bytes delivered.
        bytes: u64,
        /// Digest of what was delivered.
        actual: String,
        /// Bytes promised.
        expected_bytes: u64,
        /// Digest promised.
        expected: String,
    },
    /// Every source failed.
    #[error("`{name}` could not be fetched:\n{}", attempts.join("\n"))]
    NoSourceWorked {
        /// The model.
        name: String,
        /// One line for each source.
        attempts: Vec<String>,
    },
    /// One source failed; another may work.
    #[error("{0}")]
    Source(String),
    /// The user interrupted.
    #[error("interrupted; what was fetched so far is kept, and the next pull goes on from there")]
    Interrupted,
    /// Reading or writing failed.
    #[error("cannot {action} {}: {error}", path.display())]
    Io {
        /// What was tried, as in "cannot ...".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

impl PullError {
    /// For `map_err` on file operations.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |error| Self::Io { action, path, error }
    }
}
