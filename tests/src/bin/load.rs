//! The load generator as a program: `cargo run --release -p paceline-tests --bin load -- --help`.

use std::{io::Write as _, process::ExitCode};

use clap::Parser;
use paceline_tests::load::{self, Options, driver::Interrupted};

/// What shells know as an interrupt.
const INTERRUPTED: u8 = 130;

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let (figures, interrupted) = match load::run(&options).await {
        Ok(done) => done,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let text = match options.json {
        true => {
            serde_json::to_string(&figures).expect("invariant: figures are plain numbers and texts") + "\n"
        }
        false => figures.to_string(),
    };
    // Whoever reads it may have gone.
    let _ = std::io::stdout().write_all(text.as_bytes());
    match interrupted {
        Interrupted::Yes => ExitCode::from(INTERRUPTED),
        Interrupted::No => ExitCode::SUCCESS,
    }
}
