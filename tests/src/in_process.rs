//! A cluster inside this process: the real coordinator and shards over loopback gRPC, with a `HashModel` for a device.
//! Coordinator and shards have runtimes of their own, so that what each costs can be seen. For thousands of requests on
//! a model that takes no time; everything else is tested with real processes.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use paceline::answer::connect;
use paceline_checkpoint::Checkpoint;
use paceline_collectives::{BindSpec, Transport};
use paceline_domain::{Digest, WeightType};
use paceline_model::{
    ModelConfig,
    synthetic::{Synthetic, tiny_config, uniform},
};
use paceline_shard::executor::Machine;
use paceline_text::Tokenizer;
use paceline_wire::inference::{ListModelsRequest, inference_client::InferenceClient};
use tempfile::TempDir;
use tokio::{
    net::TcpListener,
    runtime::{Builder, Handle},
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tonic::{Code, transport::Channel};

use crate::{
    client::{from_tokens, generate},
    hash_model::HashModel,
};

/// Tokens of the served vocabulary, all usable; the last one ends a text.
pub const N_VOCAB: usize = 64;
/// Most tokens that the model takes.
pub const CONTEXT: usize = 4096;
/// How long a cluster may take to become ready or to stop; far above what it takes.
const DEADLINE: Duration = Duration::from_secs(60);

/// What to start.
#[derive(Clone, Debug)]
pub struct InProcessSpec {
    /// What computes on every rank of each group.
    pub groups: Vec<HashModel>,
    /// Number of shards of each group.
    pub n_ranks: usize,
    /// Threads of the coordinator's runtime; one as in the coordinator's own program, more to compare.
    pub coordinator_threads: usize,
    /// Flags of the coordinator, beside model and shards.
    pub coordinator_args: Vec<String>,
}

impl InProcessSpec {
    /// This device on one rank of one group, a coordinator of one thread with these flags.
    pub fn new(device: &HashModel, coordinator_args: &[&str]) -> Self {
        let coordinator_args = coordinator_args.iter().map(|argument| argument.to_string()).collect();
        Self { groups: vec![device.clone()], n_ranks: 1, coordinator_threads: 1, coordinator_args }
    }

    /// One more group, of this device.
    pub fn group(mut self, device: &HashModel) -> Self {
        self.groups.push(device.clone());
        self
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct InProcessCluster {
    address: String,
    coordinator: Background,
    shards: Background,
    tasks: Vec<JoinHandle<anyhow::Result<()>>>,
    stop: watch::Sender<bool>,
    _model: TempDir,
}

/// A runtime with threads of its own, which may be dropped inside another one.
#[derive(Debug)]
struct Background {
    handle: Handle,
    /// Dropping it ends the runtime.
    _ends: oneshot::Sender<()>,
}

/// The coordinator's flags as they are on its command line.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    config: paceline_coordinator::Config,
}

impl InProcessCluster {
    /// Starts a cluster and waits until it answers.
    ///
    /// # Errors
    /// A flag that is refused, or a cluster that does not become ready.
    pub async fn start(spec: &InProcessSpec) -> anyhow::Result<Self> {
        let folder = TempDir::new()?;
        let model = folder.path().join("hash-model.gguf");
        std::fs::write(&model, model_file()?)?;
        let (stop, stopped) = watch::channel(false);
        let coordinator = Background::start("coordinator", spec.coordinator_threads)?;
        let shards = Background::start("shards", 1)?;
        let (mut tasks, mut addresses) = (Vec::new(), Vec::new());
        for device in spec.groups.iter().flat_map(|device| vec![device; spec.n_ranks]) {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            addresses.push(format!("http://{}", listener.local_addr()?));
            let (machine, listener) = (machine(&model, device)?, listener.into_std()?);
            let (binding, stopped) =
                (BindSpec { host: "127.0.0.1".into(), port: 0, advertised_host: None }, stopped.clone());
            tasks.push(shards.handle.spawn(async move {
                let listener = TcpListener::from_std(listener)?;
                paceline_shard::run_on(listener, machine, binding, asked(stopped)).await
            }));
        }
        let groups: Vec<String> = addresses.chunks(spec.n_ranks).map(|group| group.join(",")).collect();
        let config = config(&model, &groups, &spec.coordinator_args)?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let listener = listener.into_std()?;
        tasks.push(coordinator.handle.spawn(async move {
            let listener = TcpListener::from_std(listener)?;
            paceline_coordinator::run_on(listener, config, asked(stopped)).await
        }));
        let cluster = Self { address, coordinator, shards, tasks, stop, _model: folder };
        cluster.answers().await?;
        Ok(cluster)
    }

    /// Where clients reach it, as a URL.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A new connection.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn client(&self) -> anyhow::Result<InferenceClient<Channel>> {
        connect(&self.address).await
    }

    /// Tasks of the coordinator and of the shards that have not ended.
    pub fn n_tasks(&self) -> (usize, usize) {
        let of = |runtime: &Background| runtime.handle.metrics().num_alive_tasks();
        (of(&self.coordinator), of(&self.shards))
    }

    /// Which groups execute requests.
    ///
    /// # Errors
    /// When the coordinator does not answer.
    pub async fn ready_groups(&self) -> anyhow::Result<Vec<bool>> {
        let listed = self.client().await?.list_models(ListModelsRequest {}).await?.into_inner();
        let model = listed.models.first().context("no model is served")?;
        Ok(model.groups.iter().map(|group| group.ready).collect())
    }

    /// Waits until all groups are ready and a request is answered.
    async fn answers(&self) -> anyhow::Result<()> {
        let (started, mut client) = (Instant::now(), self.client().await?);
        loop {
            match generate(&mut client, from_tokens(vec![1], 1)).await {
                Ok(_) if self.ready_groups().await?.contains(&false) => {}
                Ok(_) => return Ok(()),
                Err(status) if status.code() == Code::Unavailable => {}
                Err(status) => return Err(status).context("the cluster does not answer"),
            }
            ensure!(started.elapsed() < DEADLINE, "the cluster was not ready after {DEADLINE:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Stops everything. The cluster's clients must be gone, else their connections are waited for.
    ///
    /// # Errors
    /// What a service ended with.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.stop.send_replace(true);
        let ended = async {
            for task in self.tasks {
                task.await??;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(DEADLINE, ended).await.context("a service does not stop")?
    }
}

impl Background {
    /// The name is that of its threads.
    fn start(name: &str, n_threads: usize) -> anyhow::Result<Self> {
        let mut builder = match n_threads {
            1 => Builder::new_current_thread(),
            _ => Builder::new_multi_thread(),
        };
        let runtime = builder.worker_threads(n_threads).thread_name(name).enable_all().build()?;
        let (handle, (ends, ended)) = (runtime.handle().clone(), oneshot::channel());
        std::thread::Builder::new().name(name.into()).spawn(move || {
            // It ends when the cluster is dropped.
            let _ = runtime.block_on(ended);
            runtime.shutdown_background();
        })?;
        Ok(Self { handle, _ends: ends })
    }
}

async fn asked(mut stopped: watch::Receiver<bool>) {
    // A cluster that is dropped stops too.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// The model: its tokenizer and shape count, its weights are never looked at.
pub(crate) fn model_file() -> anyhow::Result<Vec<u8>> {
    let config = ModelConfig { n_vocab: N_VOCAB, context_length: CONTEXT, ..tiny_config() };
    Ok(Synthetic { config, seed: 1, weight_type: uniform(WeightType::F32) }.to_gguf()?)
}

/// What a draft service must say its tokenizer is.
///
/// # Errors
/// Never: the model is made here.
pub fn tokenizer_digest() -> anyhow::Result<Digest> {
    let checkpoint = Checkpoint::from_gguf_bytes(model_file()?)?;
    Ok(Tokenizer::from_checkpoint(&checkpoint)?.digest())
}

fn machine(model: &Path, device: &HashModel) -> anyhow::Result<Machine> {
    let checkpoint = Checkpoint::open(model)?;
    Ok(Machine {
        quantize: None,
        config: Arc::new(ModelConfig::from_checkpoint(&checkpoint)?),
        checkpoint: Arc::new(checkpoint),
        device: Arc::new(device.clone()),
        n_threads: 1,
        transport: Transport::Auto,
    })
}

fn config(
    model: &Path,
    groups: &[String],
    arguments: &[String],
) -> anyhow::Result<paceline_coordinator::Config> {
    let model = model.to_str().context("the folder of temporary files is not UTF-8")?;
    let shards = groups.join(";");
    let fixed = ["coordinator", "--model", model, "--model-name", "hash-model", "--shards", &shards];
    let arguments = fixed.into_iter().chain(arguments.iter().map(String::as_str));
    Ok(Flags::try_parse_from(arguments)?.config)
}
