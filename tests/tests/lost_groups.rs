//! Several groups of real processes: when a group is lost for good its streams go on in another one, without an error, a gap
//! or another token.

use std::time::{Duration, Instant};

use paceline_tests::{
    ClusterSpec, Generation, TestCluster,
    client::{from_tokens, generate, greedy, seeded},
    cluster::replacement,
    scrape::{get, of_group, scraped},
    small_model,
};
use paceline_wire::inference::{
    GenerateRequest, SpeculationMode, SpeculationOptions, inference_client::InferenceClient,
};
use tokio::task::JoinHandle;
use tonic::{Status, transport::Channel};

const N_TOKENS: u32 = 160;
/// Tokens that both groups have generated before one is killed.
const N_BEFORE: f64 = 16.0;
/// How long what must happen may take; far above what it takes.
const DEADLINE: Duration = Duration::from_secs(60);

/// Waits for a state of the metrics.
async fn until(http: &str, what: &str, is_so: impl Fn(&dyn Fn(usize, &str) -> f64) -> bool) {
    let started = Instant::now();
    loop {
        let metrics = scraped(http).await;
        if is_so(&|group, name| metrics[&of_group(group, name)]) {
            return;
        }
        assert!(started.elapsed() < DEADLINE, "not after {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn send(
    client: &InferenceClient<Channel>,
    requests: &[GenerateRequest],
) -> Vec<JoinHandle<Result<Generation, Status>>> {
    let send = |request: &GenerateRequest| {
        let (mut client, request) = (client.clone(), request.clone());
        tokio::spawn(async move { generate(&mut client, request).await })
    };
    requests.iter().map(send).collect()
}

async fn tokens(streams: Vec<JoinHandle<Result<Generation, Status>>>) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for stream in streams {
        let generation = stream.await.expect("no panic").expect("a lost group is no error");
        all.push(generation.tokens);
    }
    all
}

async fn is_ready(http: &str) -> bool {
    get(http, "/health/ready").await.0.starts_with("http/1.1 200")
}

#[tokio::test]
async fn streams_outlive_their_group() {
    let http = ["--http-listen", "127.0.0.1:0"];
    let mut cluster = TestCluster::start(ClusterSpec::small(1).groups(2).coordinator_args(&http)).await;
    let (client, http) = (cluster.client().await, cluster.http());
    let shards = cluster.processes().shard_addresses().to_vec();
    let own = |i: u32| from_tokens((0..40).map(|n| 1000 + i * 211 + n * 37).collect(), N_TOKENS);
    let requests = [own(0), own(1), own(2), seeded("A short history of the bicycle:", N_TOKENS, 7)];
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(generate(&mut client.clone(), request.clone()).await.expect("generates").tokens);
    }

    let before = scraped(&http).await;
    let n_before = |group| before[&of_group(group, "paceline_output_tokens_total")];
    let streams = send(&client, &requests);
    until(&http, "both groups generate", |value| {
        (0..2).all(|group| value(group, "paceline_output_tokens_total") >= n_before(group) + N_BEFORE)
    })
    .await;
    cluster.processes().processes().next().expect("a shard").kill().await.expect("was alive");
    assert_eq!(tokens(streams).await, alone);
    let metrics = scraped(&http).await;
    assert!(metrics[&of_group(0, "paceline_requests_moved_total")] >= 1.0);
    assert_eq!(metrics[&of_group(1, "paceline_requests_moved_total")], 0.0);
    assert_eq!(metrics[&of_group(1, "paceline_groups_formed_total")], 1.0, "the other one was not disturbed");
    assert!(is_ready(&http).await, "one group is enough");
    assert_eq!(tokens(send(&client, &requests)).await, alone);

    let _replacement = replacement(small_model(), &shards[0]);
    until(&http, "group 0 is formed anew", |value| value(0, "paceline_groups_formed_total") == 2.0).await;
    let streams = send(&client, &requests);
    cluster.processes().processes().nth(1).expect("a shard").kill().await.expect("was alive");
    assert_eq!(tokens(streams).await, alone);
}

#[tokio::test]
async fn groups_share_a_draft_service_and_streams_take_their_proposals_along() {
    let http = ["--http-listen", "127.0.0.1:0"];
    let spec = ClusterSpec::small(1).groups(2).draft(small_model()).coordinator_args(&http);
    let mut cluster = TestCluster::start(spec).await;
    let (client, http) = (cluster.client().await, cluster.http());
    let with = |mode: SpeculationMode| {
        let options = SpeculationOptions { mode: Some(mode.into()), max_tokens: None };
        let prompts = ["One two three one two three one two", "The quick brown fox", "Once upon a time"];
        prompts.map(|prompt| GenerateRequest { speculation: Some(options), ..greedy(prompt, N_TOKENS) })
    };
    let alone = tokens(send(&client, &with(SpeculationMode::Off))).await;
    assert_eq!(tokens(send(&client, &with(SpeculationMode::Draft))).await, alone);
    let before = scraped(&http).await;
    let n_before = |group| before[&of_group(group, "paceline_output_tokens_total")];
    let streams = send(&client, &with(SpeculationMode::Draft));
    until(&http, "both groups generate", |value| {
        (0..2).all(|group| value(group, "paceline_output_tokens_total") >= n_before(group) + N_BEFORE)
    })
    .await;
    cluster.processes().processes().nth(1).expect("a shard").kill().await.expect("was alive");
    assert_eq!(tokens(streams).await, alone);
}
