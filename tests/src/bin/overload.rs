//! What a flood does: goodput, refusals and memory far above capacity, and a light tenant beside a tenant that floods. For
//! people: nothing is asserted. `cargo run --release -p paceline-tests --bin overload -- --help`.

use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use paceline_tests::{
    ClusterSpec, TestCluster,
    load::{
        self, Options as LoadOptions,
        figures::{Figures, TenantFigures, percentile},
        target::Answer,
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
/// In each round four runs: clients that wait for their answers find the peak; requests come ten times as fast as that; a
/// tenant with a tenth of the peak is alone; the same tenant beside one that sends a hundred times as much. So peak and
/// overload, and the tenant with and without the other, take turns; its first tokens of all rounds are counted together.
#[derive(Parser, Debug)]
#[command(version, about)]
struct Options {
    /// Shards, each with one thread
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Rounds
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
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

/// What the runs have shown.
#[derive(Serialize, Debug)]
struct Report {
    /// Of each round, as are the next two.
    peak_tokens_per_s: Vec<f64>,
    overload_goodput_tokens_per_s: Vec<f64>,
    goodput_shares: Vec<f64>,
    goodput_share_median: Option<f64>,
    refused: usize,
    /// The slowest round.
    refused_p99_ms: Option<f64>,
    failed: usize,
    /// Bytes of the coordinator in memory after the first peak run, at most during overloads, and at the end.
    resident_bytes: [u64; 3],
    light_alone: TenantFigures,
    light_beside_flood: TenantFigures,
    flood: TenantFigures,
    /// Of the light tenant's first tokens, 99 of 100: beside the flood by alone.
    light_ttft_p99_ratio: Option<f64>,
}

/// What one round has shown.
struct Round {
    peak: Figures,
    overload: Figures,
    alone: Vec<Answer>,
    beside: Vec<Answer>,
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
    // As many requests as are a run of so many seconds, nearly.
    let first = peak(options, &address, 8 * options.max_sequences).await?;
    let (before, mut most) = (resident_bytes_of(pid)?, 0);
    let mut rate = first.finished as f64 / first.seconds;
    let mut rounds = Vec::new();
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}, {rate:.1} requests/s at the peak", options.rounds);
        let round = tokio::select! {
            round = one_round(options, &address, rate) => round?,
            () = watch(pid, &mut most) => anyhow::bail!("the watch ended"),
        };
        rate = round.peak.finished as f64 / round.peak.seconds;
        rounds.push(round);
    }
    let [light_alone] = tenants_of(options, &address, "light=1", rounds.iter().map(|round| &round.alone))?;
    let both = rounds.iter().map(|round| &round.beside);
    let [light_beside, flood] = tenants_of(options, &address, "light=1,flood=1", both)?;
    let peak_tokens_per_s: Vec<f64> = rounds.iter().map(|round| round.peak.goodput_tokens_per_s).collect();
    let goodput: Vec<f64> = rounds.iter().map(|round| round.overload.goodput_tokens_per_s).collect();
    let goodput_shares: Vec<f64> = goodput.iter().zip(&peak_tokens_per_s).map(|(n, peak)| n / peak).collect();
    let ratio = light_beside.ttft_p99_ms.zip(light_alone.ttft_p99_ms).map(|(beside, alone)| beside / alone);
    Ok(Report {
        goodput_share_median: percentile(&goodput_shares, 50.0),
        peak_tokens_per_s,
        overload_goodput_tokens_per_s: goodput,
        goodput_shares,
        refused: rounds.iter().map(|round| round.overload.refused).sum(),
        refused_p99_ms: rounds
            .iter()
            .filter_map(|round| round.overload.refused_p99_ms)
            .max_by(f64::total_cmp),
        failed: rounds.iter().map(|round| round.peak.failed + round.overload.failed).sum(),
        resident_bytes: [before, most, resident_bytes_of(pid)?],
        light_alone,
        light_beside_flood: light_beside,
        flood,
        light_ttft_p99_ratio: ratio,
    })
}

/// The four runs, where the peak is about so many requests a second.
async fn one_round(options: &Options, address: &str, rate: f64) -> anyhow::Result<Round> {
    let peak = peak(options, address, (rate * options.seconds).ceil() as usize).await?;
    let overload_rate = options.factor * peak.finished as f64 / peak.seconds;
    let overload = at_rates(options, address, &["--rate", &overload_rate.to_string()], overload_rate)?;
    let overload = load::run(&overload).await?.0;
    let light_rate = overload_rate / FLOOD;
    let light = format!("light={light_rate}");
    let alone = at_rates(options, address, &["--tenants", &light], light_rate)?;
    let (alone, _) = load::answers(&alone).await?;
    let both = format!("{light},flood={}", FLOOD * light_rate);
    let beside = at_rates(options, address, &["--tenants", &both], (FLOOD + 1.0) * light_rate)?;
    let (beside, _) = load::answers(&beside).await?;
    Ok(Round { peak, overload, alone, beside })
}

/// As many clients as sequences may run, each of which waits for its answer.
async fn peak(options: &Options, address: &str, n_requests: usize) -> anyhow::Result<Figures> {
    let (n_clients, n_requests) = (options.max_sequences.to_string(), n_requests.max(1).to_string());
    let more = ["--clients", &n_clients, "--requests", &n_requests];
    Ok(load::run(&load_options(options, address, &more)?).await?.0)
}

/// Requests for the seconds of a run.
fn at_rates(options: &Options, address: &str, rates: &[&str], total: f64) -> anyhow::Result<LoadOptions> {
    let n_requests = (total * options.seconds).ceil().max(1.0).to_string();
    load_options(options, address, &[rates, &["--requests", &n_requests]].concat())
}

fn load_options(options: &Options, address: &str, more: &[&str]) -> anyhow::Result<LoadOptions> {
    let max_tokens = options.max_tokens.to_string();
    let fixed = ["load", "--endpoint", address, "--only", &options.only, "--max-tokens", &max_tokens];
    let arguments = fixed.iter().chain(&["--ignore-eos"]).chain(more);
    Ok(LoadOptions::try_parse_from(arguments)?)
}

/// Figures of each of these tenants over all rounds.
fn tenants_of<'a, const N: usize>(
    options: &Options,
    address: &str,
    tenants: &str,
    answers: impl Iterator<Item = &'a Vec<Answer>>,
) -> anyhow::Result<[TenantFigures; N]> {
    let answers: Vec<Answer> = answers.flatten().cloned().collect();
    let figures = Figures::new(&load_options(options, address, &["--tenants", tenants])?, &answers);
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
