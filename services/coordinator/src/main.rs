//! The coordinator as a program of its own; `paceline coordinator` is the same.

use clap::Parser;

/// Serves a model from one or several groups of shards.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(flatten)]
    config: paceline_coordinator::Config,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let telemetry = paceline_telemetry::Telemetry::start(&paceline_telemetry::TelemetryConfig::from_env(
        "paceline-coordinator",
    ))?;
    let shutdown = paceline_telemetry::shutdown::requested(cli.config.process.parent_watch());
    let result = paceline_coordinator::run(cli.config, shutdown).await;
    telemetry.stop();
    result
}
