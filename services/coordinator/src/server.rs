//! Opens the model's text side, starts a loop for each group, listens, and ends cleanly when asked to.

use std::{
    future::Future,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use paceline_checkpoint::Checkpoint;
use paceline_model::ModelConfig;
use paceline_serving::{ProcessOptions, listen};
use paceline_wire::{
    DESCRIPTORS,
    inference::{Model, ServingGroup, inference_server::InferenceServer},
};
use tokio::{
    net::TcpListener,
    runtime::Builder,
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tonic::transport::{Server, server::TcpIncoming};
use tonic_health::server::HealthReporter;

use crate::{
    Config,
    admission::Admission,
    config::ShardList,
    constraint::Grammars,
    drafter::{DrafterConfig, link::Target},
    engine::{self, Engine},
    groups::{GroupStatus, Groups, Seat},
    http,
    metrics::Metrics,
    scheduler::Limits,
    service::InferenceService,
    shard_group::GroupSpec,
    text::TextModel,
    validate::Served,
};

/// How long clients may take to read their last chunks after a shutdown was asked for.
const DRAIN: Duration = Duration::from_secs(3);
/// Name of the thread that serves.
const THREAD: &str = "coordinator";
/// Largest request: a prompt of the longest text and its options.
const MAX_REQUEST_BYTES: usize = 4 << 20;

/// Serves until `shutdown` resolves, on a thread of its own.
///
/// # Errors
/// When the model cannot be opened or is not supported, a flag is out of range, or the address cannot be bound.
pub async fn run(config: Config, shutdown: impl Future<Output = ()> + Send + 'static) -> anyhow::Result<()> {
    on_one_thread(async move {
        let parts = Parts::open(&config)?;
        let listener = listen(config.listen).await?;
        serve(parts, config, listener, shutdown).await
    })
    .await
}

/// A step's result sets off a chain of short pieces of work, from the next plan to a write for each client, that wake each
/// other. Between threads each of these wake-ups is a system call that takes longer than the work; on one thread all
/// chunks of a connection also become one write. What takes long (tokenizing, grammars) has threads of its own.
async fn on_one_thread(
    work: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().thread_name(THREAD).enable_all().build()?;
    let (ended, outcome) = oneshot::channel();
    thread::Builder::new().name(THREAD.into()).spawn(move || {
        let result = runtime.block_on(work);
        runtime.shutdown_background();
        // Who has asked is gone when the process ends.
        let _ = ended.send(result);
    })?;
    outcome.await.context("the coordinator's thread has panicked")?
}

/// [`run`] on the present runtime and a listener that is bound already, for who must know the address before.
///
/// # Errors
/// As [`run`], but for the address.
pub async fn run_on(
    listener: TcpListener,
    config: Config,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    serve(Parts::open(&config)?, config, listener, shutdown).await
}

async fn serve(
    parts: Parts,
    config: Config,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let address = listener.local_addr()?;
    tracing::info!(%address, model = parts.served.model, "coordinator listening");
    config.process.listening(address);

    let metrics = Arc::new(Metrics::new().context("metrics")?);
    let n_vocab = parts.served.n_vocab;
    let (groups, seats) = Groups::new(group_names(&config), parts.limits.model);
    let mut loops = Vec::new();
    for (seat, shards) in seats.into_iter().zip(&config.shards) {
        loops.push(parts.start_loop(seat, shards, &config, &metrics)?);
    }
    let http = Http::start(&config, &metrics, groups.status()).await?;
    let (health_reporter, health) = tonic_health::server::health_reporter();
    let ready = ready_fields(&config, address, http.address);
    tokio::spawn(announce(groups.status().clone(), health_reporter, config.process, ready));

    let service = InferenceService {
        served: parts.served,
        model: parts.model,
        grammars: Grammars::new(parts.text.tokenizer().clone(), n_vocab),
        text: parts.text,
        metrics,
        admission: Admission::new(config.budget(), Instant::now()),
        reader_buffer: config.reader_buffer,
        groups: groups.clone(),
    };
    // Python's reflection client and older tools speak v1alpha only.
    let old_reflection = reflection().build_v1alpha().context("reflection descriptors")?;
    let reflection = reflection().build_v1().context("reflection descriptors")?;
    let (stopped, stop) = oneshot::channel();
    let serving = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .http2_max_local_error_reset_streams(Some(1024))
        .http2_max_header_list_size(Some(16 << 10))
        .max_concurrent_streams(Some(256))
        .add_service(InferenceServer::new(service).max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(health)
        .add_service(reflection)
        .add_service(old_reflection)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async move {
            shutdown.await;
            groups.stop().await;
            let _ = stopped.send(());
        });
    let served = tokio::select! {
        served = serving => served.context("serving gRPC"),
        () = async { let _ = stop.await; tokio::time::sleep(DRAIN).await } => Ok(()),
    };
    loops.iter().for_each(JoinHandle::abort);
    http.stop();
    served
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name("paceline.v1.Inference")
        .with_service_name("grpc.health.v1.Health")
}

/// What the event says that is not known of the group.
fn ready_fields(config: &Config, address: SocketAddr, http: Option<SocketAddr>) -> String {
    let or_null = |text: Option<String>| text.map_or("null".into(), |text| json_string(&text));
    let quantize = or_null(config.quantize.map(|quantization| quantization.name().to_owned()));
    let (http, model) = (or_null(http.map(|http| http.to_string())), json_string(&config.model_name()));
    format!("\"address\":\"{address}\",\"http\":{http},\"model\":{model},\"quantize\":{quantize}")
}

/// The HTTP port, if there is one.
struct Http {
    address: Option<SocketAddr>,
    server: Option<JoinHandle<()>>,
}

impl Http {
    async fn start(
        config: &Config,
        metrics: &Arc<Metrics>,
        status: &watch::Receiver<Vec<GroupStatus>>,
    ) -> anyhow::Result<Self> {
        let Some(address) = config.http_listen else { return Ok(Self { address: None, server: None }) };
        let listener = listen(address).await.context("the HTTP port")?;
        let address = listener.local_addr()?;
        tracing::info!(%address, "metrics and health by HTTP");
        let serving = http::serve(listener, metrics.clone(), status.clone());
        let server = tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "the HTTP port is closed");
            }
        });
        Ok(Self { address: Some(address), server: Some(server) })
    }

    fn stop(self) {
        self.server.iter().for_each(JoinHandle::abort);
    }
}

/// What follows from the flags and the model file.
struct Parts {
    served: Served,
    limits: Limits,
    model: Model,
    text: TextModel,
    /// Of every group, but for its shards.
    group: GroupSpec,
    drafter: DrafterConfig,
}

fn group_names(config: &Config) -> Vec<String> {
    config.shards.iter().enumerate().map(|(group, shards)| format!("group {group} ({shards})")).collect()
}

fn serving_group(shards: &ShardList) -> ServingGroup {
    ServingGroup { ranks: shards.0.len() as u32, ready: false, kv_blocks: 0 }
}

impl Parts {
    /// Starts the loop of a group.
    fn start_loop(
        &self,
        seat: Seat,
        shards: &ShardList,
        config: &Config,
        metrics: &Metrics,
    ) -> anyhow::Result<JoinHandle<()>> {
        let parts = engine::Parts {
            group: GroupSpec { shards: shards.0.clone(), ..self.group.clone() },
            limits: self.limits,
            drafter: self.drafter.clone(),
            reader_limit: config.reader_limit(),
            metrics: metrics.group(seat.member.group()).context("metrics")?,
            member: seat.member,
        };
        Ok(tokio::spawn(Engine::new(parts).run(seat.inbox)))
    }

    fn open(config: &Config) -> anyhow::Result<Self> {
        let path = config.model.display();
        let checkpoint =
            Checkpoint::open(&config.model).with_context(|| format!("cannot open the model {path}"))?;
        let architecture = ModelConfig::from_checkpoint(&checkpoint)
            .with_context(|| format!("cannot serve the model {path}"))?;
        let text = TextModel::open(&checkpoint)
            .with_context(|| format!("cannot use the tokenizer or template of {path}"))?;
        let sizes = config.sizes(architecture.context_length)?;
        let n_vocab = u32::try_from(text.tokenizer().n_vocab().min(architecture.n_vocab))?;
        let name = config.model_name();
        Ok(Self {
            model: Model {
                name: name.clone(),
                architecture: architecture.architecture.name().to_owned(),
                context_tokens: sizes.context as u32,
                vocabulary_tokens: n_vocab,
                digest: checkpoint.digest().to_string(),
                ranks: config.shards[0].0.len() as u32,
                chat: text.has_template(),
                groups: config.shards.iter().map(serving_group).collect(),
            },
            served: Served { model: name, n_vocab, context: sizes.context },
            limits: Limits {
                max_rows: sizes.max_rows,
                max_sampled_rows: sizes.max_sampled_rows,
                max_sequences: sizes.max_sequences,
                itl_bound: config.itl_bound(),
                run_ahead_below: config.run_ahead_below(),
                promote_after: config.promote_after,
                model: checkpoint.digest(),
            },
            drafter: DrafterConfig {
                service: config.draft.clone(),
                target: Target { model: config.model_name(), tokenizer: text.tokenizer().digest(), n_vocab },
                max_ahead: config.draft_ahead,
                max_wait: Duration::from_millis(config.draft_wait_ms.into()),
                placement: config.draft_placement,
            },
            text,
            group: GroupSpec {
                shards: Vec::new(),
                model: checkpoint.digest(),
                quantize: config.quantize,
                pool: sizes.pool,
                kv_type: config.kv_type,
                max_rows: sizes.max_rows,
                max_sampled_rows: sizes.max_sampled_rows,
                n_vocab,
                collective_deadline: config.collective_deadline(),
            },
        })
    }
}

/// How a group is doing now; `ready` is what is said of all of them.
fn tell(process: ProcessOptions, group: usize, status: &GroupStatus, ready: &str) {
    match status {
        GroupStatus::Ready { n_ranks, weight_bytes, saved_bytes, .. } => process.event(format_args!(
            "{{\"event\":\"ready\",\"group\":{group},{ready},\"ranks\":{n_ranks},\"weight_bytes\":{weight_bytes},\
             \"saved_bytes\":{saved_bytes}}}"
        )),
        GroupStatus::Loading { rank, done_bytes, total_bytes } => process.event(format_args!(
            "{{\"event\":\"loading\",\"group\":{group},\"rank\":{rank},\"done_bytes\":{done_bytes},\
             \"total_bytes\":{total_bytes}}}"
        )),
        GroupStatus::Forming(None) => {}
        GroupStatus::Forming(Some(problem)) => process.event(format_args!(
            "{{\"event\":\"forming\",\"group\":{group},\"problem\":{}}}",
            json_string(problem)
        )),
    }
}

/// Tells health checks and the parent process how the groups are doing. One that is ready is enough to serve.
async fn announce(
    mut status: watch::Receiver<Vec<GroupStatus>>,
    health: HealthReporter,
    process: ProcessOptions,
    ready: String,
) {
    let mut told = Vec::new();
    loop {
        let now = status.borrow_and_update().clone();
        if now.iter().any(GroupStatus::is_ready) {
            health.set_serving::<InferenceServer<InferenceService>>().await;
            health.set_service_status("", tonic_health::ServingStatus::Serving).await;
        } else {
            health.set_not_serving::<InferenceServer<InferenceService>>().await;
            health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        }
        for (group, status) in now.iter().enumerate().filter(|(group, new)| told.get(*group) != Some(*new)) {
            tell(process, group, status, &ready);
        }
        told = now;
        if status.changed().await.is_err() {
            return;
        }
    }
}

/// A JSON string literal.
fn json_string(text: &str) -> String {
    let escaped = text.chars().map(|character| match character {
        '"' | '\\' => format!("\\{character}"),
        character if character < ' ' => format!("\\u{:04x}", u32::from(character)),
        character => character.to_string(),
    });
    format!("\"{}\"", escaped.collect::<String>())
}
