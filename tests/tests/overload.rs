//! Deadlines, refusals and slow readers: a request ends with the status that says why, and nobody else notices. Nothing
//! here depends on how long anything takes: what must come first holds back what must come second.

use std::time::Duration;

use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{generate, greedy},
};
use paceline_wire::inference::{
    GenerateRequest, GenerateResponse, Priority, generate_response::Event, inference_client::InferenceClient,
};
use tonic::{
    Code, Request, Status, Streaming,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

const PROMPT: &str = "Once upon a time";
/// Tokens of a request that goes on for far longer than the test.
const LONG: u32 = 8000;

async fn cluster(arguments: &[&str]) -> TestCluster {
    TestCluster::start(ClusterSpec::small(1).coordinator_args(arguments)).await
}

fn of(tenant: &'static str, request: GenerateRequest) -> Request<GenerateRequest> {
    let mut request = Request::new(request);
    request.metadata_mut().insert("x-tenant", tenant.parse().expect("a name"));
    request
}

/// As a client of another language sends it: not enforced on this side.
fn until(timeout: &'static str, request: GenerateRequest) -> Request<GenerateRequest> {
    let mut request = Request::new(request);
    request.metadata_mut().insert("grpc-timeout", timeout.parse().expect("a timeout"));
    request
}

/// A client that takes a few dozen chunks ahead of its reader, where others take thousands.
async fn narrow(cluster: &TestCluster) -> InferenceClient<Channel> {
    let endpoint =
        Endpoint::from_shared(cluster.address()).expect("an address").initial_stream_window_size(1024);
    InferenceClient::new(endpoint.connect().await.expect("a connection"))
}

/// Reads to the end: the tokens that came, and the status of a stream that did not finish.
async fn read(stream: &mut Streaming<GenerateResponse>) -> (usize, Option<Status>) {
    let (mut n_tokens, mut next_index) = (0, 0);
    loop {
        let chunk = match stream.message().await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return (n_tokens, None),
            Err(status) => return (n_tokens, Some(status)),
        };
        assert_eq!(chunk.index, next_index, "chunks are numbered without gaps");
        next_index += 1;
        if let Some(Event::Delta(delta)) = chunk.event {
            n_tokens += delta.token_ids.len();
        }
    }
}

#[tokio::test]
async fn a_deadline_ends_a_running_request_after_what_it_generated() {
    let cluster = cluster(&[]).await;
    let mut client = cluster.client().await;
    let mut stream = client.generate(until("1S", greedy(PROMPT, LONG))).await.expect("starts").into_inner();
    let (n_tokens, status) = read(&mut stream).await;
    let status = status.expect("it takes longer than that");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    let told = format!("{n_tokens} tokens were generated");
    assert!(status.message().contains(&told), "{told}: {status:?}");
    assert_eq!(generate(&mut client, greedy(PROMPT, 5)).await.expect("generates").tokens.len(), 5);
}

#[tokio::test]
async fn a_deadline_ends_a_request_in_the_queue() {
    let cluster = cluster(&["--max-sequences", "1"]).await;
    let mut client = cluster.client().await;
    let mut first = client.generate(greedy(PROMPT, LONG)).await.expect("starts").into_inner();
    first.message().await.expect("a chunk");
    let mut second = client.generate(until("500m", greedy(PROMPT, 5))).await.expect("is queued").into_inner();
    // The first one has the only place and goes on.
    let (n_tokens, status) = read(&mut second).await;
    assert_eq!((n_tokens, status.map(|status| status.code())), (0, Some(Code::DeadlineExceeded)));
    assert!(first.message().await.expect("goes on").is_some());
}

#[tokio::test]
async fn malformed_deadlines_and_priorities_are_refused() {
    let cluster = cluster(&[]).await;
    let mut client = cluster.client().await;
    let status = client.generate(until("soon", greedy(PROMPT, 5))).await.expect_err("no deadline");
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let request = GenerateRequest { priority: Some(9), ..greedy(PROMPT, 5) };
    let status = client.generate(request).await.expect_err("no priority");
    assert!(status.code() == Code::InvalidArgument && status.message().contains("priority 9"), "{status:?}");
    for priority in [Priority::Low, Priority::High] {
        let request = GenerateRequest { priority: Some(priority.into()), ..greedy(PROMPT, 5) };
        assert_eq!(generate(&mut client, request).await.expect("generates").tokens.len(), 5);
    }
}

#[tokio::test]
async fn a_flooding_tenant_is_refused_and_leaves_room() {
    let scarce = ["--max-sequences", "1", "--max-queued-tokens", "9000", "--max-tenant-percent", "90"];
    let cluster = cluster(&scarce).await;
    let mut client = cluster.client().await;
    let mut first = client.generate(of("flood", greedy(PROMPT, LONG))).await.expect("starts").into_inner();
    first.message().await.expect("a chunk");
    let status = client.generate(of("flood", greedy(PROMPT, 300))).await.expect_err("its part is used up");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("this tenant's requests"), "{status:?}");
    let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
    assert!(retry.is_some_and(|delay| delay > Duration::ZERO), "{status:?}");
    // The other one is queued; the first is not needed any more.
    let mut other = client.generate(of("light", greedy(PROMPT, 300))).await.expect("is queued").into_inner();
    let status = client.generate(of("third", greedy(PROMPT, 900))).await.expect_err("all is used up");
    assert!(status.message().contains("of other requests"), "{status:?}");
    drop(first);
    let (n_tokens, status) = read(&mut other).await;
    assert!(n_tokens == 300 && status.is_none(), "{n_tokens} {status:?}");
}

#[tokio::test]
async fn a_reader_that_stalls_is_given_up_and_its_place_goes_to_the_next() {
    let flags = ["--max-sequences", "1", "--reader-buffer", "4", "--reader-limit-ms", "200"];
    let cluster = cluster(&flags).await;
    let (mut client, mut other) = (narrow(&cluster).await, cluster.client().await);
    let mut stalled = client.generate(greedy(PROMPT, LONG)).await.expect("starts").into_inner();
    stalled.message().await.expect("a chunk");
    // It holds the only place until it is given up: all it may have does not fit what lies between it and the server.
    assert_eq!(generate(&mut other, greedy(PROMPT, 5)).await.expect("generates").tokens.len(), 5);
    let mut next_index = 1;
    let status = loop {
        match stalled.message().await {
            Ok(chunk) => assert_eq!(chunk.expect("no end without a status").index, next_index),
            Err(status) => break status,
        }
        next_index += 1;
    };
    assert!(
        status.code() == Code::Aborted && status.message().contains("read nothing for 200 ms"),
        "{status:?}"
    );
    assert!(next_index < u64::from(LONG));
}

#[tokio::test]
async fn a_slow_reader_gets_every_token() {
    let cluster = cluster(&["--reader-buffer", "1"]).await;
    let mut client = narrow(&cluster).await;
    let expected = generate(&mut client, greedy(PROMPT, 3000)).await.expect("generates");
    let mut stream = client.generate(greedy(PROMPT, 3000)).await.expect("starts").into_inner();
    let mut tokens = Vec::new();
    while let Some(chunk) = stream.message().await.expect("a chunk") {
        if let Some(Event::Delta(delta)) = chunk.event {
            tokens.extend(delta.token_ids);
        }
        if tokens.len() % 1000 == 500 {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
    assert_eq!(tokens, expected.tokens);
}
