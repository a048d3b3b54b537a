//! The `paceline` executable of this build, run as a user runs it.

use std::{path::PathBuf, process::Output};

use tokio::process::Command;

/// The executable of the build that this one is of: tests lie in `deps`, programs beside it.
///
/// # Panics
/// When it was not built.
pub fn paceline() -> PathBuf {
    let test = std::env::current_exe().expect("the test executable has a path");
    let folder = test.parent().expect("the executable lies in a folder");
    let build = if folder.ends_with("deps") { folder.parent().expect("target/*/deps") } else { folder };
    let program = build.join("paceline");
    assert!(
        program.is_file(),
        "{} is missing: `cargo test --workspace --release` builds it, as does `cargo build --release -p paceline`",
        program.display()
    );
    program
}

/// `paceline` with these arguments and without the caller's log and model settings.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(paceline());
    command.args(arguments).kill_on_drop(true);
    for variable in ["PACELINE_LOG", "RUST_LOG", "OTEL_EXPORTER_OTLP_ENDPOINT", "PACELINE_CATALOGUE"] {
        command.env_remove(variable);
    }
    command
}

/// Runs it to its end.
///
/// # Panics
/// When it cannot be started.
pub async fn run(arguments: &[&str]) -> Output {
    command(arguments).output().await.expect("paceline starts")
}
