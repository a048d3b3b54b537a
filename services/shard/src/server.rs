//! Opens the model file, listens, and ends cleanly when asked to.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context as _;
use paceline_checkpoint::Checkpoint;
use paceline_collectives::BindSpec;
use paceline_model::ModelConfig;
use paceline_wire::{DESCRIPTORS, MAX_INTERNAL_MESSAGE_BYTES, shard::shard_server::ShardServer};
use tokio::net::TcpListener;
use tonic::transport::{Server, server::TcpIncoming};

use crate::{Config, device, executor::Machine, service::ShardService};

/// How long open sessions may take to end after a shutdown was asked for.
const DRAIN: Duration = Duration::from_secs(2);

/// Serves until `shutdown` resolves.
///
/// # Errors
/// When the model cannot be opened or is not supported, or the address cannot be bound.
pub async fn run(config: Config, shutdown: impl Future<Output = ()> + Send + 'static) -> anyhow::Result<()> {
    let machine = machine(&config)?;
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}: is another process there?", config.listen))?;
    let address = listener.local_addr()?;
    tracing::info!(%address, "shard listening");
    if config.events {
        println!("{{\"event\":\"listening\",\"address\":\"{address}\"}}");
    }
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
    let (health_reporter, health) = tonic_health::server::health_reporter();
    health_reporter.set_serving::<ShardServer<ShardService>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("reflection descriptors")?;
    let (stopped, stop) = tokio::sync::oneshot::channel();
    let serving = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(1)))
        .http2_keepalive_timeout(Some(Duration::from_secs(4)))
        .http2_max_local_error_reset_streams(Some(1024))
        .max_concurrent_streams(Some(64))
        .add_service(service)
        .add_service(health)
        .add_service(reflection)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async {
            shutdown.await;
            let _ = stopped.send(());
        });
    tokio::select! {
        served = serving => served.context("serving gRPC"),
        // A session lives as long as its group: after the drain time it is cut.
        () = async { let _ = stop.await; tokio::time::sleep(DRAIN).await } => Ok(()),
    }
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
