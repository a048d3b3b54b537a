//! What the coordinator costs, measured on a model that takes no time: microseconds a step, memory over many requests. For
//! people: nothing is asserted. `cargo run --release -p paceline-tests --bin overhead -- --help`.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicBool, AtomicI64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use futures_util::future::try_join_all;
use paceline_tests::{
    bare_writes::BareWrites,
    client::{from_tokens, generate},
    hash_model::{HashModel, RecordedPass},
    in_process::{InProcessCluster, InProcessSpec},
    load::figures::percentile,
    soak::{Soak, ThreadTime, resident_bytes},
};
use paceline_wire::inference::{Delta, GenerateResponse, generate_response::Event};
use prost::Message as _;
use serde::Serialize;

/// Bytes around a chunk: headers of a gRPC message and of an HTTP/2 frame.
const HEADER_BYTES: usize = 5 + 9;

/// Counts the heap while that is wanted; else it would be in what steps take.
struct Counting;

static IS_COUNTING: AtomicBool = AtomicBool::new(false);
/// Bytes on the heap more than when counting began.
static ON_HEAP: AtomicI64 = AtomicI64::new(0);

fn count(n_bytes: i64) {
    if IS_COUNTING.load(Relaxed) {
        ON_HEAP.fetch_add(n_bytes, Relaxed);
    }
}

// SAFETY: every call is handed to the system's allocator unchanged; the counter changes nothing about it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, n_bytes: usize) -> *mut u8 {
        count(n_bytes as i64 - layout.size() as i64);
        // SAFETY: the caller keeps the contract of `realloc`; the block came from `System`.
        unsafe { System.realloc(block, layout, n_bytes) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the block came from `System` with this layout.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Measures the coordinator with a model that takes no time.
#[derive(Parser, Debug)]
#[command(version, about)]
struct Options {
    /// Sequences that decode together; several separated by commas
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64])]
    sequences: Vec<usize>,
    /// Decode steps of each round
    #[arg(long, default_value_t = 256)]
    steps: u32,
    /// Rounds for each number of sequences
    #[arg(long, default_value_t = 4)]
    rounds: usize,
    /// Connections that the streams share [default: one each]
    #[arg(long)]
    connections: Option<usize>,
    /// Microseconds for which the device does nothing in each pass, so that all others are done before the next one, as
    /// with a real model; by default the next pass begins at once
    #[arg(long, default_value_t = 0)]
    pass_us: u64,
    /// Short requests whose memory is watched; 0 for none
    #[arg(long, default_value_t = 100_000)]
    requests: usize,
    /// Share of them that is broken off at a random place
    #[arg(long, default_value_t = 0.1)]
    cancel_fraction: f64,
    /// Threads of the coordinator; its own program has one
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Steps in which all sequences decode. Microseconds.
#[derive(Serialize, Debug)]
struct StepCost {
    sequences: usize,
    connections: usize,
    steps: usize,
    /// From pass to pass.
    step_us_p50: f64,
    step_us_p99: f64,
    /// Of it in the model.
    pass_us_p50: f64,
    /// From the end of a pass to the begin of the next one: coordinator, gRPC both ways, the shard's own work.
    between_us_p50: f64,
    between_us_p99: f64,
    /// Processor time of the coordinator's threads for a step, streaming to clients included.
    coordinator_cpu_us: f64,
    /// Of it outside and inside the system, which is sampled.
    coordinator_user_us: f64,
    coordinator_system_us: f64,
    /// Processor time of writes alone: as many bytes into as many connections, without a coordinator.
    bare_writes_us: f64,
    /// Processor time of the shard's threads of gRPC for a step.
    shard_cpu_us: f64,
}

/// Memory over many requests.
#[derive(Serialize, Debug)]
struct Memory {
    requests: usize,
    cancelled: usize,
    /// With other tokens than alone.
    wrong: usize,
    failed: usize,
    /// Of the first that failed.
    problem: Option<String>,
    requests_per_s: f64,
    /// Bytes in memory before the first and after each tenth of the requests.
    resident_bytes: Vec<u64>,
    /// Bytes on the heap then, more than before the cluster was started.
    heap_bytes: Vec<i64>,
    /// Tasks of coordinator and shards before the first and after the last one.
    tasks_before: (usize, usize),
    tasks_after: (usize, usize),
}

#[tokio::main(worker_threads = 1)]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    for n_sequences in &options.sequences {
        let cost = step_cost(&options, *n_sequences).await?;
        if options.json {
            println!("{}", serde_json::to_string(&cost)?);
        } else {
            println!("{cost:#?}");
        }
    }
    if options.requests >= 10 {
        let memory = memory(&options).await?;
        if options.json {
            println!("{}", serde_json::to_string(&memory)?);
        } else {
            println!("{memory:#?}");
        }
    }
    Ok(())
}

async fn start(
    options: &Options,
    device: &HashModel,
    n_sequences: usize,
) -> anyhow::Result<InProcessCluster> {
    let max_sequences = n_sequences.to_string();
    let flags = ["--max-sequences", &max_sequences, "--kv-blocks", "8192"];
    let coordinator_threads = options.threads.max(1);
    InProcessCluster::start(&InProcessSpec { coordinator_threads, ..InProcessSpec::new(device, &flags) })
        .await
}

async fn step_cost(options: &Options, n_sequences: usize) -> anyhow::Result<StepCost> {
    ensure!((1..=256).contains(&n_sequences), "--sequences must be from 1 to 256, not {n_sequences}");
    let device = HashModel::recording(Duration::from_micros(options.pass_us));
    let cluster = start(options, &device, n_sequences).await?;
    let n_connections = options.connections.unwrap_or(n_sequences).clamp(1, n_sequences);
    let clients = try_join_all((0..n_connections).map(|_| cluster.client())).await?;
    let (mut between, mut step, mut pass) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cpu, mut n_steps) = ([ThreadTime::default(); 2], 0);
    // The first round warms up.
    for round in 0..=options.rounds {
        device.take_recorded();
        let before = processor_time()?;
        let streams = (0..n_sequences).map(async |i| {
            let mut client = clients[i % n_connections].clone();
            let request = from_tokens(vec![i as u32 % 60, 1 + i as u32 / 60], options.steps);
            generate(&mut client, request).await.context("a stream failed")
        });
        try_join_all(streams).await?;
        let after = processor_time()?;
        let passes = device.take_recorded();
        if round == 0 {
            continue;
        }
        (0..2).for_each(|who| cpu[who] = cpu[who].and(after[who].since(before[who])));
        n_steps += passes.len();
        let full = |pair: &&[RecordedPass]| {
            pair.iter().all(|pass| pass.n_rows == n_sequences && pass.n_sequences == n_sequences)
        };
        for pair in passes.windows(2).filter(full) {
            between.push(microseconds(pair[1].began.saturating_duration_since(pair[0].ended)));
            step.push(microseconds(pair[1].began - pair[0].began));
            pass.push(microseconds(pair[0].ended - pair[0].began));
        }
    }
    drop(clients);
    cluster.stop().await?;
    let bare_writes = bare_writes(options, n_sequences, n_connections).await?;
    let of = |values: &[f64], percent| percentile(values, percent).context("no step had all sequences");
    let [coordinator, shard] = cpu.map(|time| time.nanoseconds as f64 / 1e3 / n_steps as f64);
    let in_system = cpu[0].system_share();
    Ok(StepCost {
        sequences: n_sequences,
        connections: n_connections,
        steps: step.len(),
        step_us_p50: of(&step, 50.0)?,
        step_us_p99: of(&step, 99.0)?,
        pass_us_p50: of(&pass, 50.0)?,
        between_us_p50: of(&between, 50.0)?,
        between_us_p99: of(&between, 99.0)?,
        coordinator_cpu_us: coordinator,
        coordinator_user_us: coordinator * (1.0 - in_system),
        coordinator_system_us: coordinator * in_system,
        bare_writes_us: microseconds(bare_writes),
        shard_cpu_us: shard,
    })
}

/// Of a step's chunks, those of a connection in one write.
async fn bare_writes(
    options: &Options,
    n_sequences: usize,
    n_connections: usize,
) -> anyhow::Result<Duration> {
    let delta = Delta { text: "word".into(), token_ids: vec![7], ..Delta::default() };
    let index = u64::from(options.steps) / 2;
    let chunk = GenerateResponse { index, event: Some(Event::Delta(delta)), ..GenerateResponse::default() };
    let n_bytes = (HEADER_BYTES + chunk.encoded_len()) * n_sequences.div_ceil(n_connections);
    BareWrites { n_connections, n_bytes, n_rounds: options.steps as usize * options.rounds }.measure().await
}

async fn memory(options: &Options) -> anyhow::Result<Memory> {
    IS_COUNTING.store(true, Relaxed);
    let cluster = start(options, &HashModel::new(), 64).await?;
    let soak = |n_requests, seed| {
        let soak = Soak { n_requests, n_clients: 64, cancelled: options.cancel_fraction, seed };
        soak.run(cluster.address())
    };
    let tasks_before = cluster.n_tasks();
    soak(1_000, 0).await;
    let started = Instant::now();
    let (mut cancelled, mut wrong, mut failed, mut problem) = (0, 0, 0, None);
    let (mut sizes, mut heap) = (vec![resident_bytes()?], vec![ON_HEAP.load(Relaxed)]);
    for tenth in 1..=10 {
        let soaked = soak(options.requests / 10, tenth).await;
        cancelled += soaked.n_cancelled;
        wrong += soaked.n_wrong;
        failed += soaked.n_failed;
        problem = problem.or(soaked.problem);
        sizes.push(resident_bytes()?);
        heap.push(ON_HEAP.load(Relaxed));
        eprintln!(
            "{} of {} requests, {} KB, {} KB on the heap",
            tenth as usize * options.requests / 10,
            options.requests,
            sizes[tenth as usize] >> 10,
            heap[tenth as usize] >> 10
        );
    }
    let requests_per_s = options.requests as f64 / started.elapsed().as_secs_f64();
    // Tasks of the last requests end a moment after them.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let tasks_after = cluster.n_tasks();
    cluster.stop().await?;
    Ok(Memory {
        requests: options.requests,
        cancelled,
        wrong,
        failed,
        problem,
        requests_per_s,
        resident_bytes: sizes,
        heap_bytes: heap,
        tasks_before,
        tasks_after,
    })
}

/// Of the coordinator's and the shards' runtimes. Executors have threads of their own.
fn processor_time() -> anyhow::Result<[ThreadTime; 2]> {
    Ok([ThreadTime::of("coordinator")?, ThreadTime::of("shards")?])
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
