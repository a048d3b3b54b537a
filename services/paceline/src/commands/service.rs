//! `paceline shard`, `paceline draft` and `paceline coordinator`: the services as subcommands, so that one executable is everything.

use std::future::Future;

use clap::Args;
use paceline_telemetry::shutdown::requested;

/// One tensor-parallel rank of a group, as a process of its own.
#[derive(Args, Debug)]
pub struct ShardArgs {
    #[command(flatten)]
    config: paceline_shard::Config,
}

/// Proposes tokens with a small model; coordinators have them verified.
#[derive(Args, Debug)]
pub struct DraftArgs {
    #[command(flatten)]
    config: paceline_draft::Config,
}

/// Serves a model from one or several groups of shards.
#[derive(Args, Debug)]
pub struct CoordinatorArgs {
    #[command(flatten)]
    config: paceline_coordinator::Config,
}

/// Runs a shard until it is told to end.
pub fn shard(args: &ShardArgs) -> impl Future<Output = anyhow::Result<()>> + use<> {
    let config = args.config.clone();
    let shutdown = requested(config.process.parent_watch());
    paceline_shard::run(config, shutdown)
}

/// Runs a draft service until it is told to end.
pub fn draft(args: &DraftArgs) -> impl Future<Output = anyhow::Result<()>> + use<> {
    let config = args.config.clone();
    let shutdown = requested(config.process.parent_watch());
    paceline_draft::run(config, shutdown)
}

/// Runs a coordinator until it is told to end.
pub fn coordinator(args: &CoordinatorArgs) -> impl Future<Output = anyhow::Result<()>> + use<> {
    let config = args.config.clone();
    let shutdown = requested(config.process.parent_watch());
    paceline_coordinator::run(config, shutdown)
}
