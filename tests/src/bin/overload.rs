//! What a flood does: goodput, refusals and memory far above capacity, and a light tenant beside a tenant that floods. For
//! people: nothing is asserted. `cargo run --release -p paceline-tests --bin overload -- --help`.

use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use paceline_tests::{
    ClusterSpec, TestCluster,
    load::{
        self, Options as LoadOptions,
        figures::{Figures, TenantFigures},
    },
    soak::resident_bytes_of,
};
use serde::Serialize;

/// Requests of a tenant that floods for each of one that does not.
const FLOOD: f64 = 100.0;
/// Memory is looked at this often.
const PERIOD: Duration = Duration::from_millis(500);

/// Measures a cluster of real processes with more load than it can carry.
///
/// Four runs: clients that wait for their answers find the peak; requests come ten times as fast as that; a tenant with a
/// tenth of the peak is alone; the same tenant beside one that sends a hundred times as much.
#[derive(Parser, Debug)]
#[command(version, about)]
struct Options {
    /// Shards, each with one thread
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Seconds of each run, but for what is still to be answered then
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Load, as a multiple of the peak
    #[arg(long, default_value_t = 10.0)]
    factor: f64,
    /// Which prompts of tests/load/prompts.jsonl
    #[arg(long, default_value = "chat")]
    only: String,
    /// Tokens of each answer
    #[arg(long, default_value_t = 32)]
    max_tokens: u32,
    /// Requests that run at once
    #[arg(long, default_value_t = 32)]
    max_sequences: usize,
    /// Tokens that may wait for a place
    #[arg(long, default_value_t = 10_000)]
    max_queued_tokens: u64,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// What the four runs have shown.
#[derive(Serialize, Debug)]
struct Report {
    peak_tokens_per_s: f64,
    peak_requests_per_s: f64,
    overload_rate: f64,
    overload_goodput_tokens_per_s: f64,
    goodput_share: f64,
    refused: usize,
    refused_p50_ms: Option<f64>,
    refused_p99_ms: Option<f64>,
    failed: usize,
    /// Bytes of the coordinator in memory after the peak run, at most during the overload, and after it.
    resident_bytes: [u64; 3],
    light_alone: TenantFigures,
    light_beside_flood: TenantFigures,
    flood: TenantFigures,
    /// Of the light tenant's first tokens, 99 of 100: beside the flood by alone.
    light_ttft_p99_ratio: Option<f64>,
}

#[tokio::main(worker_threads = 1)]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let (max_sequences, max_queued) =
        (options.max_sequences.to_string(), options.max_queued_tokens.to_string());
    let flags = ["--max-sequences", &max_sequences, "--max-queued-tokens", &max_queued];
    let spec = ClusterSpec::small(options.ranks).coordinator_args(&flags);
    let mut cluster = TestCluster::start(spec).await;
    let report = measure(&options, &mut cluster).await;
    cluster.stop().await;
    let report = report?;
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{report:#?}");
    }
    Ok(())
}

async fn measure(options: &Options, cluster: &mut TestCluster) -> anyhow::Result<Report> {
    let address = cluster.address();
    let coordinator = cluster.processes().processes().find(|process| process.name() == "coordinator");
    let pid = coordinator.and_then(|process| process.pid()).context("the coordinator runs")?;
    let n_clients = options.max_sequences.to_string();
    let n_requests = (8 * options.max_sequences).to_string();
    let peak = run(options, &address, &["--clients", &n_clients, "--requests", &n_requests]).await?;
    let peak_rate = peak.finished as f64 / peak.seconds;
    let before = resident_bytes_of(pid)?;

    let rate = options.factor * peak_rate;
    let mut most = 0;
    let rates = ["--rate", &rate.to_string()];
    let overload = tokio::select! {
        figures = at_rates(options, &address, &rates, rate) => figures?,
        () = watch(pid, &mut most) => anyhow::bail!("the watch ended"),
    };
    let after = resident_bytes_of(pid)?;

    let light_rate = options.factor * peak_rate / FLOOD;
    let light = format!("light={light_rate}");
    let alone = at_rates(options, &address, &["--tenants", &light], light_rate).await?;
    let both = format!("{light},flood={}", FLOOD * light_rate);
    let beside = at_rates(options, &address, &["--tenants", &both], (FLOOD + 1.0) * light_rate).await?;
    let (light_alone, [light_beside, flood]) = (of_tenants(alone)?, of_tenants(beside)?);
    let [light_alone] = light_alone;
    let ratio = light_beside.ttft_p99_ms.zip(light_alone.ttft_p99_ms).map(|(beside, alone)| beside / alone);
    Ok(Report {
        peak_tokens_per_s: peak.goodput_tokens_per_s,
        peak_requests_per_s: peak_rate,
        overload_rate: rate,
        overload_goodput_tokens_per_s: overload.goodput_tokens_per_s,
        goodput_share: overload.goodput_tokens_per_s / peak.goodput_tokens_per_s,
        refused: overload.refused,
        refused_p50_ms: overload.refused_p50_ms,
        refused_p99_ms: overload.refused_p99_ms,
        failed: peak.failed + overload.failed,
        resident_bytes: [before, most, after],
        light_alone,
        light_beside_flood: light_beside,
        flood,
        light_ttft_p99_ratio: ratio,
    })
}

/// Requests for the seconds of a run.
async fn at_rates(options: &Options, address: &str, rates: &[&str], total: f64) -> anyhow::Result<Figures> {
    let n_requests = (total * options.seconds).ceil().max(1.0).to_string();
    run(options, address, &[rates, &["--requests", &n_requests]].concat()).await
}

async fn run(options: &Options, address: &str, more: &[&str]) -> anyhow::Result<Figures> {
    let max_tokens = options.max_tokens.to_string();
    let fixed = ["load", "--endpoint", address, "--only", &options.only, "--max-tokens", &max_tokens];
    let arguments = fixed.iter().chain(&["--ignore-eos"]).chain(more);
    Ok(load::run(&LoadOptions::try_parse_from(arguments)?).await?.0)
}

fn of_tenants<const N: usize>(figures: Figures) -> anyhow::Result<[TenantFigures; N]> {
    figures.tenants.try_into().ok().context("figures of each tenant")
}

/// The most bytes that were seen, until it is dropped.
async fn watch(pid: u32, most: &mut u64) {
    let mut ticks = tokio::time::interval(PERIOD);
    loop {
        ticks.tick().await;
        // The run beside it says when the process has ended.
        *most = resident_bytes_of(pid).unwrap_or(0).max(*most);
    }
}
