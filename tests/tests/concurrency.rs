//! Many streams at once: each gets what it would get alone.

use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{chat, generate, greedy, seeded},
};
use paceline_wire::inference::GenerateRequest;

const N_STREAMS: usize = 32;

/// Prompts and lengths that differ, so that prefill and decoding of different requests meet in one step.
fn requests() -> Vec<GenerateRequest> {
    let topics =
        ["rivers", "bicycles", "prime numbers", "the moon", "tea", "\u{4E2D}\u{6587}", "\u{1F6B2} racing"];
    (0..N_STREAMS)
        .map(|i| {
            let topic = topics[i % topics.len()];
            let n_tokens = 4 + (i * 7 % 29) as u32;
            match i % 4 {
                0 => greedy(&format!("A note about {topic}: {}", "and so on, ".repeat(i)), n_tokens),
                1 => seeded(&format!("{i} facts about {topic}:"), n_tokens, i as u64),
                2 => chat(&format!("Tell me {i} things about {topic}."), n_tokens),
                _ => {
                    let mut request = seeded(topic, n_tokens, 1000 + i as u64);
                    let sampling = request.sampling.as_mut().expect("has sampling");
                    (sampling.top_k, sampling.repetition_penalty) = (Some(20), Some(1.1));
                    request
                }
            }
        })
        .collect()
}

async fn alone_and_together(spec: ClusterSpec) {
    let cluster = TestCluster::start(spec).await;
    let mut client = cluster.client().await;
    let mut alone = Vec::new();
    for request in requests() {
        let generation = generate(&mut client, request).await.expect("generates alone");
        alone.push((generation.text, generation.tokens));
    }
    let together: Vec<_> = requests()
        .into_iter()
        .map(|request| {
            let mut client = client.clone();
            tokio::spawn(async move { generate(&mut client, request).await })
        })
        .collect();
    for (i, task) in together.into_iter().enumerate() {
        let generation = task.await.expect("no panic").expect("generates together");
        assert_eq!((generation.text, generation.tokens), alone[i], "stream {i}");
    }
}

#[tokio::test]
async fn thirty_two_streams_each_get_what_they_get_alone() {
    alone_and_together(ClusterSpec::small(2)).await;
}

#[tokio::test]
async fn so_they_do_when_places_rows_and_blocks_are_scarce() {
    let scarce = ["--max-sequences", "5", "--max-rows", "32", "--kv-blocks", "64"];
    alone_and_together(ClusterSpec::small(2).coordinator_args(&scarce)).await;
}
