//! Random schedules on a real model and real processes: every request gets the tokens it has when it runs alone.

use paceline_domain::TokenId;
use paceline_tests::{
    ClusterSpec, Generation, TestCluster,
    client::generate,
    schedule::{Alone, Job, Schedules, Shape, WITHOUT_DRAFT, scored},
};
use paceline_wire::inference::inference_client::InferenceClient;
use tokio::runtime::Handle;
use tonic::transport::Channel;

const N_SCHEDULES: u64 = 5;
/// Its shape: what fits a pool of ten blocks, and tokens of SmolLM2.
const SHAPE: Shape = Shape {
    max_jobs: 10,
    max_tokens: 120,
    max_output: 24,
    n_vocab: 49_152,
    end_token: TokenId(2),
    modes: &WITHOUT_DRAFT,
    scored: 0.3,
};

#[tokio::test(flavor = "multi_thread")]
async fn schedules_on_a_real_model_give_each_request_what_it_gets_alone() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let client = cluster.client().await;
    let alone = |job: &Job| {
        let generation = generate_now(client.clone(), job);
        let tokens = generation.tokens.into_iter().map(TokenId).collect();
        Alone { tokens, scores: generation.prompt_logprobs.iter().map(scored).collect() }
    };
    let schedules = Schedules::new(1, SHAPE, &alone);
    let schedules: Vec<_> = (0..N_SCHEDULES).map(|seed| schedules.schedule(seed)).collect();
    let n_scored: usize =
        schedules.iter().flat_map(|schedule| &schedule.jobs).map(|job| job.scores_alone.len()).sum();
    assert!(n_scored > 100, "only {n_scored} prompt tokens are scored");
    cluster.stop().await;

    let scarce = ["--context", "160", "--max-sequences", "4", "--max-rows", "24", "--kv-blocks", "10"];
    let cluster = TestCluster::start(ClusterSpec::small(2).coordinator_args(&scarce)).await;
    let client = cluster.client().await;
    for schedule in schedules {
        let mismatches = schedule.mismatches(schedule.run(&client).await);
        let shown: Vec<String> = mismatches.iter().map(ToString::to_string).collect();
        assert!(shown.is_empty(), "{}", shown.join("\n"));
    }
}

/// A schedule is made outside of the runtime.
fn generate_now(mut client: InferenceClient<Channel>, job: &Job) -> Generation {
    let request = job.request();
    let generation =
        tokio::task::block_in_place(|| Handle::current().block_on(generate(&mut client, request)));
    generation.expect("generates alone")
}
