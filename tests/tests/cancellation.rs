//! A client that goes away gives its place back.

use std::time::{Duration, Instant};

use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{generate, greedy},
};
use paceline_wire::inference::generate_response::Event;
use tonic::Code;
use tonic_types::StatusExt as _;

/// Tokens of a request that goes on for far longer than the test.
const LONG: u32 = 8000;
/// Far below the time that so many tokens take, far above the time to notice.
const NOTICED: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_dropped_stream_frees_its_place() {
    let scarce = ["--max-sequences", "1", "--max-queued-tokens", "8100"];
    let cluster = TestCluster::start(ClusterSpec::small(2).coordinator_args(&scarce)).await;
    let mut client = cluster.client().await;
    let mut long = client.generate(greedy("Once upon a time", LONG)).await.expect("starts").into_inner();
    loop {
        let chunk = long.message().await.expect("a chunk").expect("more");
        if matches!(chunk.event, Some(Event::Delta(_))) {
            break;
        }
    }
    let busy = generate(&mut client, greedy("Once upon a time", 200)).await.expect_err("no place");
    assert_eq!(busy.code(), Code::ResourceExhausted, "{busy:?}");
    let retry = busy.get_details_retry_info().and_then(|info| info.retry_delay);
    assert!(retry.is_some_and(|delay| delay > Duration::ZERO), "{busy:?}");

    drop(long);
    let dropped = Instant::now();
    loop {
        match generate(&mut client, greedy("Once upon a time", 200)).await {
            Ok(generation) => break assert_eq!(generation.tokens.len(), 200),
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}"),
        }
        assert!(dropped.elapsed() < NOTICED, "the place of the dropped stream is still taken");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn many_dropped_streams_leave_the_cluster_as_it_was() {
    let cluster = TestCluster::start(ClusterSpec::small(2).coordinator_args(&["--kv-blocks", "600"])).await;
    let mut client = cluster.client().await;
    let before = generate(&mut client, greedy("Once upon a time", 24)).await.expect("generates");
    for round in 0..40 {
        // Each holds most of the pool, and some are dropped before their first token.
        let mut stream =
            client.generate(greedy("Once upon a time", LONG)).await.expect("starts").into_inner();
        for _ in 0..round % 4 {
            stream.message().await.expect("a chunk");
        }
    }
    let after = generate(&mut client, greedy("Once upon a time", 24)).await.expect("generates");
    assert_eq!(before.tokens, after.tokens);
}
