//! `paceline up`: a cluster of child processes that stays until it is stopped.

use std::path::PathBuf;

use clap::Args;

use crate::{
    answer::write_stdout,
    cluster::{Cluster, ClusterSpec},
    interrupt::Interrupts,
    options::{ClusterOptions, ModelPlaces},
    process::Log,
    progress::Progress,
};

/// Starts a cluster on this machine, prints its addresses when it is ready, and stays until Ctrl-C.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  paceline up
  paceline up --model qwen2.5-coder-1.5b-instruct --ranks 2 --listen 0.0.0.0:50051
  paceline up --groups 2 --ranks 1     # two copies of the model share the requests

Standard output gets one line for each service, \"coordinator http://...\" first, once the cluster is ready.
Clients: paceline generate, paceline chat, or any gRPC client (reflection is on).")]
pub struct UpArgs {
    #[command(flatten)]
    cluster: ClusterOptions,
    /// Where the coordinator listens for clients
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
    listen: String,
    /// Where the coordinator serves metrics and health by HTTP [default: nowhere]
    #[arg(long, value_name = "HOST:PORT")]
    http_listen: Option<String>,
}

/// Runs the command; a signal to stop is its normal end.
///
/// # Errors
/// When the model cannot be had, a service fails, or the user interrupts before the cluster is ready.
pub async fn up(args: &UpArgs, places: &ModelPlaces) -> anyhow::Result<()> {
    let (mut interrupts, progress) = (Interrupts::listen()?, Progress::to_stderr());
    let model = places.obtain(args.cluster.model.as_deref(), &progress, &mut interrupts).await?;
    let mut spec = embedded_spec(&args.cluster, model, &args.listen)?;
    spec.draft = args.cluster.draft_spec(places, &progress, &mut interrupts).await?;
    spec.log = Log::Forward;
    if let Some(listen) = &args.http_listen {
        spec.coordinator_args.extend(["--http-listen".into(), listen.into()]);
    }
    let mut cluster = start(&spec, &progress, &mut interrupts).await?;
    write_stdout(&addresses(&cluster, &spec))?;
    progress.line("ready; Ctrl-C stops it");
    let result = tokio::select! {
        ended = cluster.any_ended() => Err(ended.into()),
        _ = interrupts.next() => Ok(()),
    };
    tokio::select! {
        () = cluster.stop() => result,
        // Impatience: dropping the cluster kills it.
        signal = interrupts.next() => Err(signal.into()),
    }
}

/// What to start for these options: this executable, N times.
///
/// # Errors
/// When the path of this executable is unknown, or there are several devices but not one for each rank.
pub fn embedded_spec(
    options: &ClusterOptions,
    (model, model_name): (PathBuf, String),
    listen: &str,
) -> anyhow::Result<ClusterSpec> {
    Ok(ClusterSpec {
        program: std::env::current_exe()?,
        model,
        model_name,
        listen: listen.into(),
        n_groups: options.groups.get(),
        threads: options.threads_per_rank(),
        devices: options.devices()?,
        shard_args: options.shard_args(),
        coordinator_args: options.coordinator_args(),
        draft: None,
        env: Vec::new(),
        log: Log::Keep,
    })
}

/// Starts the cluster unless a signal comes first; then nothing is left of it.
///
/// # Errors
/// When it does not start, or the user interrupts.
pub async fn start(
    spec: &ClusterSpec,
    progress: &Progress,
    interrupts: &mut Interrupts,
) -> anyhow::Result<Cluster> {
    tokio::select! {
        cluster = Cluster::start(spec, progress) => cluster,
        signal = interrupts.next() => Err(signal.into()),
    }
}

fn addresses(cluster: &Cluster, spec: &ClusterSpec) -> String {
    let shards = cluster.shard_addresses().iter().enumerate();
    let shards = shards.map(|(shard, address)| format!("{} {address}\n", spec.shard_name(shard)));
    let http = cluster.http().map(|http| format!("metrics http://{http}/metrics\n"));
    [format!("coordinator {}\n", cluster.address())].into_iter().chain(shards).chain(http).collect()
}
