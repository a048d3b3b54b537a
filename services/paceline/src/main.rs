//! The `paceline` executable.

fn main() -> std::process::ExitCode {
    paceline::cli::main()
}
