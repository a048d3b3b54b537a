//! The shard as a program of its own; `paceline shard` is the same.

use clap::Parser;

/// One tensor-parallel rank of a Paceline group.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(flatten)]
    config: paceline_shard::Config,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let telemetry = paceline_telemetry::Telemetry::start(&paceline_telemetry::TelemetryConfig::from_env(
        "paceline-shard",
    ))?;
    let shutdown = paceline_telemetry::shutdown::requested(cli.config.process.parent_watch());
    let result = paceline_shard::run(cli.config, shutdown).await;
    telemetry.stop();
    result
}
