//! A pool that is too small for all streams: some give up their blocks to older ones and are computed again, and each
//! gets the tokens it has alone.

use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{generate, greedy, seeded},
};
use paceline_wire::inference::{GenerateRequest, GenerateResponse, generate_response::Event};
use tonic::Streaming;

const N_STREAMS: usize = 5;
const N_TOKENS: u32 = 180;

fn requests() -> Vec<GenerateRequest> {
    let prompt = |i: usize| format!("Letter number {i} to a friend far away, about tea and rivers:");
    let request = |i: usize| match i % 2 {
        0 => greedy(&prompt(i), N_TOKENS),
        _ => seeded(&prompt(i), N_TOKENS, i as u64),
    };
    (0..N_STREAMS).map(request).collect()
}

async fn rest(mut stream: Streaming<GenerateResponse>, mut tokens: Vec<u32>) -> Vec<u32> {
    while let Some(chunk) = stream.message().await.expect("preemption is no error") {
        if let Some(Event::Delta(delta)) = chunk.event {
            tokens.extend(delta.token_ids);
        }
    }
    tokens
}

#[tokio::test]
async fn streams_that_lose_their_blocks_get_the_tokens_they_have_alone() {
    // Each stream ends with 13 blocks, so that at most two of them fit to their end.
    let tiny = ["--kv-blocks", "27", "--max-sequences", "5", "--max-rows", "32"];
    let mut cluster = TestCluster::start(ClusterSpec::small(2).coordinator_args(&tiny)).await;
    let mut client = cluster.client().await;
    let mut alone = Vec::new();
    for request in requests() {
        alone.push(generate(&mut client, request).await.expect("generates alone").tokens);
    }
    let mut streams = Vec::new();
    for request in requests() {
        let mut stream = client.generate(request).await.expect("starts").into_inner();
        // Whoever has a token has a place: all of them run at the same time.
        let mut tokens = Vec::new();
        while tokens.is_empty() {
            let chunk = stream.message().await.expect("a chunk").expect("more");
            if let Some(Event::Delta(delta)) = chunk.event {
                tokens.extend(delta.token_ids);
            }
        }
        streams.push(tokio::spawn(rest(stream, tokens)));
    }
    for (i, stream) in streams.into_iter().enumerate() {
        assert_eq!(stream.await.expect("no panic"), alone[i], "stream {i}");
    }
    let log: Vec<String> = cluster.processes().processes().flat_map(|process| process.log_tail()).collect();
    assert!(log.iter().any(|line| line.contains("gave up its blocks")), "{log:?}");
}
