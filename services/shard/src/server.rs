//! Opens the model file, listens, and ends cleanly when asked to.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context as _;
use paceline_checkpoint::Checkpoint;
use paceline_collectives::BindSpec;
use paceline_model::ModelConfig;
use paceline_serving::{Internal, listen};
use paceline_wire::{MAX_INTERNAL_MESSAGE_BYTES, shard::shard_server::ShardServer};
use tokio::net::TcpListener;
use tonic::service::Routes;

use crate::{Config, device, executor::Machine, service::ShardService};

/// Most streams of one coordinator.
const MAX_STREAMS: u32 = 64;
/// How long open sessions may take to end after a shutdown was asked for: they live as long as their group.
const DRAIN: Duration = Duration::from_secs(2);

/// Serves until `shutdown` resolves.
///
/// # Errors
/// When the model cannot be opened or is not supported, or the address cannot be bound.
pub async fn run(config: Config, shutdown: impl Future<Output = ()> + Send + 'static) -> anyhow::Result<()> {
    let machine = machine(&config)?;
    let listener = listen(config.listen).await?;
    let address = listener.local_addr()?;
    tracing::info!(%address, "shard listening");
    config.process.listening(address);
    run_on(listener, machine, config.peer_binding(), shutdown).await
}

/// [`run`] on a listener that is bound already, with a machine that was put together by who calls.
///
/// # Errors
/// When the connection cannot be served.
pub async fn run_on(
    listener: TcpListener,
    machine: Machine,
    binding: BindSpec,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let service = ShardServer::new(ShardService::new(machine, binding))
        .max_decoding_message_size(MAX_INTERNAL_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_INTERNAL_MESSAGE_BYTES);
    let internal = Internal { routes: Routes::new(service), max_streams: MAX_STREAMS, drain: DRAIN };
    internal.serve::<ShardServer<ShardService>>(listener, shutdown).await
}

fn machine(config: &Config) -> anyhow::Result<Machine> {
    let checkpoint = Checkpoint::open(&config.model)
        .with_context(|| format!("cannot open the model {}", config.model.display()))?;
    let model = ModelConfig::from_checkpoint(&checkpoint)
        .with_context(|| format!("cannot serve the model {}", config.model.display()))?;
    let cpu = config.cpu.cpu()?;
    Ok(Machine {
        checkpoint: Arc::new(checkpoint),
        config: Arc::new(model),
        quantize: config.quantize,
        device: device::choose(&config.device, cpu)?,
        n_threads: cpu.n_threads,
        transport: config.transport.into(),
    })
}
