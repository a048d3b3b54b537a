//! Requests leave nothing behind: no block, no place, no task, no byte. One test, because the heap is the whole process's.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use paceline_domain::TokenId;
use paceline_tests::{
    hash_model::HashModel,
    in_process::{InProcessCluster, InProcessSpec, N_VOCAB},
    schedule::{Job, Schedule},
    soak::Soak,
};
use paceline_wire::inference::SpeculationMode;
use paceline_wire::inference::inference_client::InferenceClient;
use tonic::{Code, transport::Channel};

const N_KV_BLOCKS: usize = 96;
/// Tokens that the pool holds.
const POOL: usize = 16 * N_KV_BLOCKS;
/// How long what belongs to requests that have ended may take to end too; far above what it takes.
const DEADLINE: Duration = Duration::from_secs(30);
/// Requests after the warm-up.
const N_REQUESTS: usize = 22_000;
/// A tenth of what so many requests would leave if each left a hundred bytes. What tables and buffers grow by is less.
const MOST_GROWTH: usize = N_REQUESTS * 100 / 10;

struct Counting;

/// Bytes on the heap.
static IN_USE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed to the system's allocator unchanged; the counter changes nothing about it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the block came from `System` with this layout.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// A request that needs every block of the pool, and every token of the budget.
fn whole_pool() -> Schedule {
    let prompt: Vec<TokenId> = (0..POOL - 8).map(|i| TokenId((i * i % 61) as u32)).collect();
    let job = Job::greedy_on_hash_model(N_VOCAB, prompt, 8);
    let job = Job { speculation: SpeculationMode::Auto, ..job };
    Schedule { seed: 0, jobs: vec![job] }
}

/// A lost block lets it wait for ever, a lost place gets it refused for ever. What was cancelled last may hold both for a
/// moment.
async fn assert_nothing_is_held(client: &InferenceClient<Channel>) {
    let (started, whole_pool) = (Instant::now(), whole_pool());
    loop {
        let run = tokio::time::timeout(DEADLINE, whole_pool.run(client)).await;
        let received = run.expect("a request of the whole pool waits: a block is lost");
        let mismatches = whole_pool.mismatches(received);
        let Some(mismatch) = mismatches.first() else { return };
        let is_refused =
            mismatch.received.as_ref().is_err_and(|status| status.code() == Code::ResourceExhausted);
        assert!(is_refused && started.elapsed() < DEADLINE, "{mismatch}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Tasks end a moment after their request.
async fn wait_for_tasks(cluster: &InProcessCluster, before: (usize, usize)) {
    let started = Instant::now();
    loop {
        let now = cluster.n_tasks();
        if now.0 <= before.0 && now.1 <= before.1 {
            return;
        }
        assert!(started.elapsed() < DEADLINE, "{now:?} tasks of coordinator and shards, {before:?} before");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn requests_and_cancels_leave_no_block_place_task_or_memory() {
    let (blocks, tokens) = (N_KV_BLOCKS.to_string(), POOL.to_string());
    let mut flags = vec!["--kv-blocks", &blocks, "--max-queued-tokens", &tokens, "--context", &tokens];
    flags.extend(["--max-tenant-percent", "100"]);
    let spec = InProcessSpec::new(&HashModel::new(), &flags);
    let cluster = InProcessCluster::start(&spec).await.expect("starts");
    let client = cluster.client().await.expect("a connection");
    let soak = |n_requests, seed| {
        let soak = Soak { n_requests, n_clients: 32, cancelled: 0.5, seed };
        soak.run(cluster.address())
    };
    assert_nothing_is_held(&client).await;
    let tasks = cluster.n_tasks();
    // Tables, pools of buffers and the prefix cache fill up.
    soak(3_000, 1).await;
    wait_for_tasks(&cluster, tasks).await;
    assert_nothing_is_held(&client).await;
    let before = IN_USE.load(Relaxed);

    let soaked = soak(N_REQUESTS, 2).await;
    assert_eq!((soaked.n_wrong, soaked.n_failed), (0, 0), "{soaked:?}");
    assert!(soaked.n_cancelled > 10_000 && soaked.n_right > 10_000, "{soaked:?}");
    wait_for_tasks(&cluster, tasks).await;
    assert_nothing_is_held(&client).await;
    let grown = IN_USE.load(Relaxed) as i64 - before as i64;
    println!("{soaked:?}; {before} bytes on the heap before, {grown:+} after");
    assert!(grown < MOST_GROWTH as i64, "{grown} bytes more after {N_REQUESTS} requests");
    drop(client);
    cluster.stop().await.expect("stops");
}
