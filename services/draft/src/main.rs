//! The draft service as a program of its own; `paceline draft` is the same.

use clap::Parser;

/// Proposes tokens with a small model; coordinators have them verified.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(flatten)]
    config: paceline_draft::Config,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let telemetry = paceline_telemetry::Telemetry::start(&paceline_telemetry::TelemetryConfig::from_env(
        "paceline-draft",
    ))?;
    let shutdown = paceline_telemetry::shutdown::requested(cli.config.process.parent_watch());
    let result = paceline_draft::run(cli.config, shutdown).await;
    telemetry.stop();
    result
}
