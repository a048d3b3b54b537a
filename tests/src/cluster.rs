//! A cluster of real processes for one test. Only one per test executable runs at a time: tests compete for cores
//! otherwise, and a deadline that passes says nothing.

use std::path::PathBuf;

use paceline::{
    answer::connect,
    cluster::{Cluster, ClusterSpec as Processes, DraftSpec},
    process::{Log, ServiceProcess, ServiceSpec},
    progress::Progress,
};
use paceline_wire::inference::inference_client::InferenceClient;
use tokio::{
    sync::{Mutex, MutexGuard},
    time::{Duration, timeout},
};
use tonic::transport::Channel;

use crate::{models, program::paceline};

/// How long a cluster may take to become ready; far above what it takes.
const READY_DEADLINE: Duration = Duration::from_secs(120);

static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// What to start.
#[derive(Clone, Debug)]
pub struct ClusterSpec {
    /// Model file or directory.
    pub model: PathBuf,
    /// Name to serve it under.
    pub model_name: String,
    /// Groups that each have the whole model.
    pub n_groups: usize,
    /// Number of shards of each group.
    pub n_ranks: usize,
    /// Compute threads of each.
    pub threads_per_rank: usize,
    /// Further arguments of every shard.
    pub shard_args: Vec<String>,
    /// Further arguments of the coordinator.
    pub coordinator_args: Vec<String>,
    /// Draft model, for a draft service.
    pub draft: Option<PathBuf>,
    /// Compute threads of the draft service.
    pub draft_threads: usize,
    /// Variables added to every process.
    pub env: Vec<(String, String)>,
}

impl ClusterSpec {
    /// The small model on this many ranks with one thread each.
    pub fn small(n_ranks: usize) -> Self {
        Self::of(models::small_model(), n_ranks)
    }

    /// Any model on this many ranks with one thread each.
    pub fn of(model: PathBuf, n_ranks: usize) -> Self {
        Self {
            model,
            model_name: "test-model".into(),
            n_groups: 1,
            n_ranks,
            threads_per_rank: 1,
            shard_args: Vec::new(),
            coordinator_args: Vec::new(),
            draft: None,
            draft_threads: 1,
            env: Vec::new(),
        }
    }

    /// So many groups instead of one.
    pub fn groups(mut self, n_groups: usize) -> Self {
        self.n_groups = n_groups;
        self
    }

    /// Adds arguments for every shard.
    pub fn shard_args(mut self, arguments: &[&str]) -> Self {
        self.shard_args.extend(arguments.iter().map(|argument| argument.to_string()));
        self
    }

    /// Adds arguments for the coordinator.
    pub fn coordinator_args(mut self, arguments: &[&str]) -> Self {
        self.coordinator_args.extend(arguments.iter().map(|argument| argument.to_string()));
        self
    }

    /// Adds a draft service.
    pub fn draft(mut self, model: PathBuf) -> Self {
        self.draft = Some(model);
        self
    }

    /// Adds a variable to every process.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }
}

/// A running cluster. Its processes are killed when it is dropped; after a failed test their last log lines are
/// shown.
#[derive(Debug)]
pub struct TestCluster {
    cluster: Option<Cluster>,
    _turn: MutexGuard<'static, ()>,
}

impl TestCluster {
    /// Starts a cluster and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready; the message has the end of the log of whoever failed.
    pub async fn start(spec: ClusterSpec) -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        let draft = spec.draft.map(|model| {
            let threads = spec.draft_threads.to_string();
            // With all its bits a model foresees its own tokens.
            let quantize = if model == spec.model { &["--quantize", "none"][..] } else { &[] };
            let args = ["--threads", &threads].iter().chain(quantize).map(Into::into).collect();
            DraftSpec { model, args }
        });
        let processes = Processes {
            program: paceline(),
            model: spec.model,
            model_name: spec.model_name,
            listen: "127.0.0.1:0".into(),
            n_groups: spec.n_groups,
            threads: vec![spec.threads_per_rank; spec.n_groups * spec.n_ranks],
            devices: Vec::new(),
            shard_args: spec.shard_args.into_iter().map(Into::into).collect(),
            coordinator_args: spec.coordinator_args.into_iter().map(Into::into).collect(),
            draft,
            env: spec.env,
            log: Log::Keep,
        };
        let progress = Progress::to_stderr();
        match timeout(READY_DEADLINE, Cluster::start(&processes, &progress)).await {
            Ok(Ok(cluster)) => Self { cluster: Some(cluster), _turn: turn },
            Ok(Err(error)) => panic!("the cluster did not start: {error:#}"),
            Err(_) => panic!("the cluster was not ready after {READY_DEADLINE:?}"),
        }
    }

    fn cluster(&self) -> &Cluster {
        self.cluster.as_ref().expect("invariant: it is there until it is stopped")
    }

    /// The processes, to look at or to harm.
    pub fn processes(&mut self) -> &mut Cluster {
        self.cluster.as_mut().expect("invariant: it is there until it is stopped")
    }

    /// Where clients reach it, as a URL.
    pub fn address(&self) -> String {
        self.cluster().address()
    }

    /// Where the coordinator's metrics are, as `host:port`.
    ///
    /// # Panics
    /// When it was not given an HTTP port.
    pub fn http(&self) -> String {
        self.cluster().http().expect("the coordinator has an HTTP port").to_owned()
    }

    /// A new connection.
    ///
    /// # Panics
    /// When nobody answers.
    pub async fn client(&self) -> InferenceClient<Channel> {
        connect(&self.address()).await.expect("the coordinator answers")
    }

    /// Stops all processes in order, so that they send what they still have.
    pub async fn stop(mut self) {
        if let Some(cluster) = self.cluster.take() {
            cluster.stop().await;
        }
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        if let Some(cluster) = self.cluster.as_mut().filter(|_| std::thread::panicking()) {
            for process in cluster.processes() {
                eprintln!("--- log of {}:\n{}", process.name(), process.log_tail().join("\n"));
            }
        }
    }
}

/// A shard in the place of one that is gone: same address, fresh memory.
///
/// # Panics
/// When it cannot be started.
pub fn replacement(model: PathBuf, address: &str) -> ServiceProcess {
    let listen = address.trim_start_matches("http://");
    let args = ["shard", "--listen", listen, "--threads", "1", "--model"].map(Into::into);
    let spec = ServiceSpec {
        name: "replacement".into(),
        program: paceline(),
        args: args.into_iter().chain([model.into()]).collect(),
        env: Vec::new(),
        log: Log::Keep,
    };
    ServiceProcess::start(&spec).expect("starts")
}
