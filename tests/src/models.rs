//! Where model files are. `tests/run` puts them there; the harness never fetches.

use std::path::PathBuf;

/// Name of the small model.
pub const SMALL: &str = "smollm2-135m-instruct";

fn models_dir() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("PACELINE_TEST_MODELS")
        .or_else(|| set("HOME").map(|home| home.join(".cache/paceline/models")))
        .expect("PACELINE_TEST_MODELS or HOME is set")
}

/// The file of a model.
///
/// # Panics
/// When it is not there.
pub fn model(name: &str) -> PathBuf {
    let path = models_dir().join(format!("{name}.gguf"));
    assert!(
        path.is_file(),
        "{} is missing. Run tests/run, which fetches it, or set PACELINE_TEST_MODELS to a directory that has it",
        path.display()
    );
    path
}

/// SmolLM2-135M-Instruct.
///
/// # Panics
/// When it is not there.
pub fn small_model() -> PathBuf {
    model(SMALL)
}

/// The file of a large model, or `None`, with a line that says so, when large models are not asked for.
///
/// # Panics
/// When it is asked for and not there.
pub fn large_model(name: &str) -> Option<PathBuf> {
    if std::env::var_os("PACELINE_TEST_MODELS_ALL").is_none_or(|value| value != "1") {
        println!("skipped: {name} is tested by `tests/run --all-models`");
        return None;
    }
    Some(model(name))
}
