//! Grammars over the vocabulary of the `HashModel`, for what a constrained request gets when it runs alone.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex},
};

use paceline_checkpoint::Checkpoint;
use paceline_domain::Grammar;
use paceline_grammar::{Compiler, Matcher};
use paceline_text::Tokenizer;

use crate::in_process::{N_VOCAB, model_file};

/// Texts of digits and punctuation, which the first 63 bytes spell: short and long ones, some that repeat themselves.
pub const REGEXES: [&str; 5] =
    ["[0-9]{2,4}( [0-9]{2}){0,9}", "(12 ){1,9}", "[!-/]+", "(1|2|34){5,30}", "(0+ ){2}[0-9 ]{0,20}"];

static COMPILER: LazyLock<Compiler> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("hash-model.gguf");
    std::fs::write(&path, model_file().expect("a model")).expect("written");
    let checkpoint = Checkpoint::open(&path).expect("opens");
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint).expect("a tokenizer");
    Compiler::new(&tokenizer, N_VOCAB).expect("a compiler")
});
static COMPILED: LazyLock<Mutex<HashMap<String, Matcher>>> = LazyLock::new(Mutex::default);

/// The beginning of a text that this regular expression matches.
///
/// # Panics
/// When it cannot be compiled.
pub fn matcher(regex: &str) -> Matcher {
    let mut compiled = COMPILED.lock().expect("nobody panicked");
    let compile = || COMPILER.compile(&Grammar::Regex(regex.into())).expect("compiles");
    compiled.entry(regex.into()).or_insert_with(compile).fork()
}
