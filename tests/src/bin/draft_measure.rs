//! What a draft service costs while it is stopped or killed, how soon it is of use again, and how much of its time drafting
//! ahead hides when it has a core of its own. To be run alone on a machine:
//! `cargo run --release -p paceline-tests --bin draft_measure -- --help`.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::{Args, Parser, Subcommand};
use paceline_tests::{
    ClusterSpec, TestCluster,
    client::chat,
    draft_load::{DRAFT_TOKENS, Known, Seen, during, known, until_drafted},
    models::small_model,
    scrape::metric,
};
use paceline_wire::inference::{SpeculationMode, inference_client::InferenceClient};
use serde_json::json;
use tokio::net::TcpStream;
use tonic::transport::Channel;

/// Code that a draft model foresees well.
const PROMPTS: [&str; 3] = [
    "Write a Python function that returns the n-th Fibonacci number, with a loop.",
    "Write a Rust function that reverses a vector in place, and a test for it.",
    "Write a Python class for a stack with push, pop, peek and is_empty.",
];
const BACK_DEADLINE: Duration = Duration::from_secs(60);
/// Time for models to be in memory and for steps to be learnt.
const WARM_UP: Duration = Duration::from_secs(10);

/// Measures a cluster with a draft service. One JSON object a line.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// p99 of the time between tokens with a stopped and a killed draft beside that without one, and the time until
    /// speculation is back
    Faults(Options),
    /// How much of the draft's time drafting ahead hides, target and draft each with a core of its own
    Machines(Options),
}

#[derive(Args, Clone)]
struct Options {
    /// Model file [default: the small test model]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Draft model file [default: the small test model]
    #[arg(long)]
    draft: Option<PathBuf>,
    /// Compute threads of the model and of the draft
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Requests at the same time
    #[arg(long, default_value_t = 1)]
    clients: usize,
    /// Tokens of each answer
    #[arg(long, default_value_t = 128)]
    max_tokens: u32,
    /// Seconds of each phase
    #[arg(long, default_value_t = 15)]
    seconds: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Cli::parse().what {
        What::Faults(options) => faults(&options).await,
        What::Machines(options) => machines(&options).await,
    }
}

/// A cluster that answers, and the requests.
struct Bench {
    cluster: TestCluster,
    client: InferenceClient<Channel>,
    http: String,
    known: Vec<Known>,
    n_clients: usize,
    phase: Duration,
}

impl Bench {
    async fn start(options: &Options, placement: &str) -> anyhow::Result<Self> {
        let or_small = |path: &Option<PathBuf>| path.clone().unwrap_or_else(small_model);
        let spec = ClusterSpec {
            threads_per_rank: options.threads,
            draft_threads: options.threads,
            ..ClusterSpec::of(or_small(&options.model), 1)
        };
        let flags = ["--http-listen", "127.0.0.1:0", "--draft-placement", placement];
        let cluster = TestCluster::start(spec.coordinator_args(&flags).draft(or_small(&options.draft))).await;
        let (client, http) = (cluster.client().await, cluster.http());
        let requests = PROMPTS.map(|prompt| chat(prompt, options.max_tokens)).to_vec();
        let known = known(&client, requests).await?;
        let (n_clients, phase) = (options.clients, Duration::from_secs(options.seconds));
        Ok(Self { cluster, client, http, known, n_clients, phase })
    }

    /// Runs `what` under load; no token may differ.
    async fn under_load<T>(
        &self,
        mode: SpeculationMode,
        what: impl Future<Output = T>,
    ) -> anyhow::Result<(T, Seen)> {
        let (came, seen) = during(&self.client, (&self.known, mode), self.n_clients, what).await?;
        ensure!(
            seen.n_different == 0,
            "{} of {} requests have other tokens",
            seen.n_different,
            seen.n_requests
        );
        Ok((came, seen))
    }

    async fn phase(&self, mode: SpeculationMode) -> anyhow::Result<Seen> {
        Ok(self.under_load(mode, tokio::time::sleep(self.phase)).await?.1)
    }

    fn draft_pid(&mut self) -> anyhow::Result<u32> {
        self.cluster
            .processes()
            .draft()
            .and_then(|draft| draft.pid())
            .context("the draft service does not run")
    }
}

fn signal(pid: u32, name: &str) -> anyhow::Result<()> {
    ensure!(Command::new("kill").args([name, &pid.to_string()]).status()?.success(), "kill {name} {pid}");
    Ok(())
}

async fn faults(options: &Options) -> anyhow::Result<()> {
    let mut bench = Bench::start(options, "together").await?;
    bench.under_load(SpeculationMode::Auto, tokio::time::sleep(WARM_UP)).await?;
    let mut lines = Vec::new();
    for fault in ["stopped", "killed"] {
        let plain = bench.phase(SpeculationMode::Off).await?;
        // What is left without a draft service.
        let ngram = bench.phase(SpeculationMode::Ngram).await?;
        let pid = bench.draft_pid()?;
        signal(pid, if fault == "stopped" { "-STOP" } else { "-KILL" })?;
        let without = bench.phase(SpeculationMode::Auto).await?;
        let back = back(&mut bench, fault, pid).await?;
        lines.push(json!({
            "fault": fault,
            "p99_ms_off": plain.p99_ms(),
            "p99_ms_ngram": ngram.p99_ms(),
            "p99_ms": without.p99_ms(),
            "p99_ratio": without.p99_ms() / ngram.p99_ms(),
            "gaps": without.gaps_ms.len(),
            "longest_ms": without.longest_ms(),
            "p99_ms_coming_back": back.seen.p99_ms(),
            "longest_ms_coming_back": back.seen.longest_ms(),
            "serves_after_s": back.serves.as_secs_f64(),
            "drafted_after_s": back.drafted.map(|drafted| drafted.as_secs_f64()),
        }));
    }
    bench.cluster.stop().await;
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// How a draft service came back.
struct Back {
    /// Until it serves: a killed one is started by who runs the cluster, and loads its model. A stopped one does at once.
    serves: Duration,
    /// From then on until its tokens are verified again.
    drafted: Option<Duration>,
    /// What clients saw meanwhile.
    seen: Seen,
}

/// Lets it come back.
async fn back(bench: &mut Bench, fault: &str, pid: u32) -> anyhow::Result<Back> {
    let (client, known, n_clients, http) =
        (bench.client.clone(), bench.known.clone(), bench.n_clients, bench.http.clone());
    let processes = bench.cluster.processes();
    let address = processes.draft_address().context("there is a draft service")?.to_owned();
    let comes_back = async {
        let start = Instant::now();
        if fault == "stopped" {
            signal(pid, "-CONT")?;
        } else {
            // It binds its address when the model is loaded.
            while TcpStream::connect(&address).await.is_err() {
                ensure!(start.elapsed() < BACK_DEADLINE, "it is not started again");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        let serves = start.elapsed();
        Ok((serves, until_drafted(&http, BACK_DEADLINE).await))
    };
    let comes_back = async {
        tokio::select! {
            ended = processes.any_ended() => Err(ended.into()),
            back = comes_back => back,
        }
    };
    let (times, seen) = during(&client, (&known, SpeculationMode::Auto), n_clients, comes_back).await?;
    ensure!(seen.n_different == 0, "tokens differ after it came back");
    let (serves, drafted) = times?;
    Ok(Back { serves, drafted, seen })
}

async fn machines(options: &Options) -> anyhow::Result<()> {
    for placement in ["apart", "together"] {
        let mut bench = Bench::start(options, placement).await?;
        pin(&mut bench)?;
        bench.under_load(SpeculationMode::Draft, tokio::time::sleep(WARM_UP)).await?;
        let plain = bench.phase(SpeculationMode::Off).await?;
        let before = Counts::read(&bench.http).await;
        let drafted = bench.phase(SpeculationMode::Draft).await?;
        let counts = Counts::read(&bench.http).await.since(&before);
        println!(
            "{}",
            json!({
                "placement": placement,
                "requests_off": plain.n_requests,
                "requests": drafted.n_requests,
                "speedup": drafted.n_requests as f64 / plain.n_requests as f64,
                "proposed_tokens": counts.proposed,
                "verified_tokens": counts.verified,
                "accepted_tokens": counts.accepted,
                "computed_s": counts.computed_s,
                "waited_s": counts.waited_s,
                "hidden_share": counts.hidden_share(),
            })
        );
        bench.cluster.stop().await;
    }
    Ok(())
}

/// What a draft service did, as the coordinator counts it.
#[derive(Clone, Copy)]
struct Counts {
    proposed: f64,
    verified: f64,
    accepted: f64,
    /// Seconds that it computed for what it proposed.
    computed_s: f64,
    /// Seconds that steps waited for it.
    waited_s: f64,
}

impl Counts {
    async fn read(http: &str) -> Self {
        Self {
            proposed: metric(http, "paceline_draft_proposed_tokens_total").await,
            verified: metric(http, DRAFT_TOKENS).await,
            accepted: metric(http, ACCEPTED).await,
            computed_s: metric(http, "paceline_draft_compute_seconds_total").await,
            waited_s: metric(http, "paceline_draft_wait_seconds_total").await,
        }
    }

    fn since(self, before: &Self) -> Self {
        Self {
            proposed: self.proposed - before.proposed,
            verified: self.verified - before.verified,
            accepted: self.accepted - before.accepted,
            computed_s: self.computed_s - before.computed_s,
            waited_s: self.waited_s - before.waited_s,
        }
    }

    /// How much of the time computed for tokens that were verified nobody waited for; none where nothing was.
    fn hidden_share(&self) -> Option<f64> {
        let used_s = self.computed_s * self.verified / self.proposed;
        (used_s > 0.0).then(|| 1.0 - self.waited_s / used_s)
    }
}

const ACCEPTED: &str = "paceline_speculation_accepted_tokens_total{source=\"draft\"}";

/// Shard on the first core, draft on the second, the coordinator, which does little, beside the draft.
fn pin(bench: &mut Bench) -> anyhow::Result<()> {
    let draft = bench.draft_pid()?;
    let pids: Vec<u32> = bench.cluster.processes().processes().filter_map(|process| process.pid()).collect();
    let cores = pids.iter().enumerate().map(|(i, pid)| (*pid, usize::from(i > 0)));
    for (pid, core) in cores.chain([(draft, 1)]) {
        let arguments = ["-a", "-p", "-c", &core.to_string(), &pid.to_string()].map(str::to_owned);
        let output = Command::new("taskset").args(arguments).output();
        let output = output.context("taskset, of util-linux, is needed")?;
        ensure!(output.status.success(), "taskset: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
