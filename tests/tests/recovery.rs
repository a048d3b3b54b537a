//! A shard that dies is a pause of the stream: no error, no gap, no other token.

use paceline::process::ServiceProcess;
use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{generate, greedy, seeded},
    cluster::replacement,
    small_model,
};
use paceline_wire::inference::{
    GenerateRequest, generate_response::Event, inference_client::InferenceClient,
};
use tonic::transport::Channel;

const PROMPT: &str = "A short history of the bicycle:";
const N_TOKENS: u32 = 48;
/// Tokens to see before the shard is killed.
const N_BEFORE: usize = 8;

/// Kills the shard of this rank while the answer is streamed, and puts another in its place.
async fn tokens_across_a_death(
    cluster: &mut TestCluster,
    rank: usize,
    request: GenerateRequest,
) -> (Vec<u32>, ServiceProcess) {
    let mut client: InferenceClient<Channel> = cluster.client().await;
    let mut stream = client.generate(request).await.expect("starts").into_inner();
    let (mut tokens, mut next_index, mut replaced) = (Vec::new(), 0, None);
    while let Some(chunk) = stream.message().await.expect("a dead shard is no error") {
        assert_eq!(chunk.index, next_index, "chunks are numbered without gaps");
        next_index += 1;
        if let Some(Event::Delta(delta)) = chunk.event {
            tokens.extend(delta.token_ids);
        }
        if tokens.len() >= N_BEFORE && replaced.is_none() {
            let cluster = cluster.processes();
            let address = cluster.shard_addresses()[rank].clone();
            cluster.processes().nth(rank).expect("a rank").kill().await.expect("was alive");
            replaced = Some(replacement(small_model(), &address));
        }
    }
    (tokens, replaced.expect("the stream was long enough"))
}

#[tokio::test]
async fn streams_outlive_any_rank() {
    let mut cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let mut client = cluster.client().await;
    let requests = [greedy(PROMPT, N_TOKENS), seeded(PROMPT, N_TOKENS, 7)];
    let mut expected = Vec::new();
    for request in &requests {
        expected.push(generate(&mut client, request.clone()).await.expect("generates").tokens);
    }
    let mut replacements = Vec::new();
    for (rank, request) in requests.into_iter().enumerate() {
        let bystander = greedy("Once upon a time", N_TOKENS);
        let alone = generate(&mut client, bystander.clone()).await.expect("generates").tokens;
        let mut other = client.clone();
        let bystander = tokio::spawn(async move { generate(&mut other, bystander).await });
        let (tokens, replacement) = tokens_across_a_death(&mut cluster, rank, request).await;
        replacements.push(replacement);
        assert_eq!(tokens, expected[rank], "rank {rank} was killed");
        assert_eq!(
            bystander.await.expect("no panic").expect("no error").tokens,
            alone,
            "rank {rank} was killed"
        );
    }
}
