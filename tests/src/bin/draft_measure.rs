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
    /// Compute threads of the model
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
        let spec =
            ClusterSpec { threads_per_rank: options.threads, ..ClusterSpec::of(or_small(&options.model), 1) };
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
        let pid = bench.draft_pid()?;
        signal(pid, if fault == "stopped" { "-STOP" } else { "-KILL" })?;
        let without = bench.phase(SpeculationMode::Auto).await?;
        let back = back(&mut bench, fault, pid).await?;
        lines.push(json!({
            "fault": fault,
            "p99_ms_off": plain.p99_ms(),
            "p99_ms": without.p99_ms(),
            "p99_ratio": without.p99_ms() / plain.p99_ms(),
            "gaps": without.gaps_ms.len(),
            "longest_ms": without.gaps_ms.iter().copied().fold(0.0, f64::max),
            "back_after_s": back.map(|back| back.as_secs_f64()),
        }));
    }
    bench.cluster.stop().await;
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// Lets it come back; how long it takes until its tokens are verified again. A killed one is started by who runs the cluster,
/// which counts.
async fn back(bench: &mut Bench, fault: &str, pid: u32) -> anyhow::Result<Option<Duration>> {
    let (client, known, n_clients, http) =
        (bench.client.clone(), bench.known.clone(), bench.n_clients, bench.http.clone());
    let processes = bench.cluster.processes();
    let start = Instant::now();
    let drafted = async {
        if fault == "stopped" {
            signal(pid, "-CONT")?;
        }
        tokio::select! {
            ended = processes.any_ended() => Err(ended.into()),
            back = until_drafted(&http, BACK_DEADLINE) => Ok(back.map(|_| start.elapsed())),
        }
    };
    let (back, seen) = during(&client, (&known, SpeculationMode::Auto), n_clients, drafted).await?;
    ensure!(seen.n_different == 0, "tokens differ after it came back");
    back
}

async fn machines(options: &Options) -> anyhow::Result<()> {
    let mut waits = Vec::new();
    for placement in ["together", "apart"] {
        let mut bench = Bench::start(options, placement).await?;
        pin(&mut bench)?;
        bench.under_load(SpeculationMode::Draft, tokio::time::sleep(WARM_UP)).await?;
        let plain = bench.phase(SpeculationMode::Off).await?;
        let names = ["paceline_draft_wait_seconds_total", DRAFT_TOKENS, ACCEPTED];
        let mut counts = [0.0; 3];
        for (count, name) in counts.iter_mut().zip(names) {
            *count = -metric(&bench.http, name).await;
        }
        let drafted = bench.phase(SpeculationMode::Draft).await?;
        for (count, name) in counts.iter_mut().zip(names) {
            *count += metric(&bench.http, name).await;
        }
        let [waited_s, draft_tokens, accepted] = counts;
        waits.push(waited_s / accepted);
        println!(
            "{}",
            json!({
                "placement": placement,
                "requests_off": plain.n_requests,
                "requests": drafted.n_requests,
                "speedup": drafted.n_requests as f64 / plain.n_requests as f64,
                "waited_s": waited_s,
                "draft_tokens": draft_tokens,
                "accepted_tokens": accepted,
                "waited_ms_per_accepted": 1e3 * waited_s / accepted,
            })
        );
        bench.cluster.stop().await;
    }
    // Who takes turns waits for all that the draft computes.
    ensure!(waits.iter().all(|wait| wait.is_finite()), "no share of time is hidden where nothing is drafted");
    println!("{}", json!({ "hidden": 1.0 - waits[1] / waits[0] }));
    Ok(())
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
