//! The load generator against a real cluster and against a server of canned answers: counts and fields, not times.

use std::{path::PathBuf, process::Stdio};

use paceline_tests::{ClusterSpec, TestCluster};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::mpsc,
};

fn load(endpoint: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(PathBuf::from(env!("CARGO_BIN_EXE_load")));
    command.args(["--json", "--endpoint", endpoint]).args(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn figures(endpoint: &str, arguments: &[&str]) -> Value {
    let output = load(endpoint, arguments).output().await.expect("it starts");
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {errors}");
    assert_eq!(out.lines().count(), 1, "{out}");
    serde_json::from_str(&out).expect("one object")
}

#[track_caller]
fn assert_counts(figures: &Value, expected: &[(&str, u64)]) {
    for (name, count) in expected {
        assert_eq!(figures[name].as_u64(), Some(*count), "{name} in {figures}");
    }
}

#[track_caller]
fn assert_times(figures: &Value) {
    for name in ["seconds", "tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"] {
        assert!(figures[name].as_f64().is_some_and(|value| value >= 0.0), "{name} in {figures}");
    }
    assert!(figures["ttft_p50_ms"].as_f64() <= figures["ttft_p99_ms"].as_f64(), "{figures}");
    assert!(figures["itl_p50_ms"].as_f64() <= figures["itl_p99_ms"].as_f64(), "{figures}");
}

#[tokio::test]
async fn a_real_cluster_is_measured_in_both_loops() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let address = cluster.address();
    let chats = ["--only", "chat", "--max-tokens", "6", "--ignore-eos", "--warmup", "1"];
    let run = async |more: &[&str]| figures(&address, &[&chats[..], more].concat()).await;

    let closed = run(&["--clients", "4", "--requests", "10"]).await;
    let counts =
        [("clients", 4), ("requests", 10), ("finished", 10), ("failed", 0), ("refused", 0), ("tokens", 60)];
    assert_counts(&closed, &counts);
    assert_times(&closed);
    assert!(closed["cached_tokens"].is_u64() && closed["rate"].is_null(), "{closed}");

    let open = run(&["--rate", "40", "--requests", "10"]).await;
    assert_counts(&open, &[("requests", 10), ("finished", 10), ("failed", 0), ("tokens", 60)]);
    assert_times(&open);
    assert_eq!(open["rate"].as_f64(), Some(40.0));

    let cancelled = run(&["--clients", "3", "--requests", "9", "--cancel-fraction", "1"]).await;
    assert_counts(&cancelled, &[("requests", 9), ("finished", 0), ("failed", 0), ("cancelled", 9)]);
    assert!(cancelled["tokens"].as_u64() < Some(54), "{cancelled}");
}

#[tokio::test]
async fn refusals_are_no_failures() {
    let scarce = ["--max-queued-tokens", "120", "--max-sequences", "1"];
    let cluster = TestCluster::start(ClusterSpec::small(1).coordinator_args(&scarce)).await;
    let arguments = [
        "--only",
        "raw",
        "--max-tokens",
        "100",
        "--ignore-eos",
        "--warmup",
        "0",
        "--clients",
        "6",
        "--requests",
        "6",
    ];
    let figures = figures(&cluster.address().replace("http://", "grpc://"), &arguments).await;
    assert_counts(&figures, &[("requests", 6), ("failed", 0)]);
    let [finished, refused] = ["finished", "refused"].map(|name| figures[name].as_u64().expect("a count"));
    assert!(finished >= 1 && refused >= 1 && finished + refused == 6, "{figures}");
}

const MODELS: &str = r#"{"data": [{"id": "canned"}]}"#;
/// Two tokens, the end, and what was counted.
const STREAM: &str = concat!(
    "data: {\"choices\": [{\"delta\": {\"role\": \"assistant\"}}]}\n\n",
    "data: {\"choices\": [{\"delta\": {\"content\": \"Two\"}}]}\n\n",
    "data: {\"choices\": [{\"delta\": {\"content\": \" tides\"}}]}\n\n",
    "data: {\"choices\": [{\"delta\": {}, \"finish_reason\": \"stop\"}]}\n\n",
    "data: {\"choices\": [], \"usage\": {\"completion_tokens\": 2}}\n\n",
    "data: [DONE]\n\n",
);

/// How completions are answered.
#[derive(Clone, Copy, PartialEq)]
enum Canned {
    Answer,
    Busy,
    CutOff,
    Never,
}

/// A server that answers every completion alike. It tells of each request that came.
async fn canned(kind: Canned) -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("an address"));
    let (told, requests) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, kind, told.clone()));
        }
    });
    (address, requests)
}

async fn answer(mut stream: TcpStream, kind: Canned, told: mpsc::UnboundedSender<String>) {
    let mut request = String::new();
    while !is_whole(&request) {
        let mut bytes = [0; 4096];
        let n_bytes = stream.read(&mut bytes).await.expect("reads");
        request.push_str(std::str::from_utf8(&bytes[..n_bytes]).expect("text"));
    }
    let is_models = request.starts_with("GET /v1/models ");
    let _ = told.send(request);
    let (status, body) = match kind {
        _ if is_models => ("200 OK", MODELS),
        Canned::Answer => ("200 OK", STREAM),
        Canned::CutOff => ("200 OK", &STREAM[..STREAM.find(" tides").expect("it is there")]),
        Canned::Busy => ("503 Service Unavailable", "{}"),
        Canned::Never => std::future::pending().await,
    };
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).await.expect("writes");
}

fn is_whole(request: &str) -> bool {
    let Some((head, body)) = request.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    body.len() >= length.map_or(0, |length| length.parse().expect("a length"))
}

#[tokio::test]
async fn servers_for_openais_clients_are_measured_too() {
    let arguments = [
        "--protocol",
        "openai",
        "--clients",
        "2",
        "--requests",
        "5",
        "--only",
        "chat-define",
        "--warmup",
        "0",
    ];
    let (address, mut requests) = canned(Canned::Answer).await;
    let whole = figures(&address, &arguments).await;
    assert_counts(&whole, &[("requests", 5), ("finished", 5), ("failed", 0), ("tokens", 10)]);
    assert_times(&whole);
    requests.recv().await.expect("the list of models");
    let request = requests.recv().await.expect("a completion");
    assert!(request.starts_with("POST /v1/chat/completions "), "{request}");
    let body: Value = serde_json::from_str(request.split("\r\n\r\n").nth(1).expect("a body")).expect("JSON");
    assert_eq!((body["model"].as_str(), body["stream"].as_bool()), (Some("canned"), Some(true)));
    assert_eq!(body["max_tokens"].as_u64(), Some(48));

    let busy = figures(&canned(Canned::Busy).await.0, &arguments).await;
    assert_counts(&busy, &[("requests", 5), ("refused", 5), ("failed", 0)]);
    let cut = figures(&canned(Canned::CutOff).await.0, &arguments).await;
    assert_counts(&cut, &[("requests", 5), ("finished", 0), ("failed", 5)]);
    assert!(cut["failures"][0][0].as_str().is_some_and(|reason| !reason.is_empty()), "{cut}");
}

#[tokio::test]
async fn an_interrupt_ends_it_with_what_there_is() {
    let (address, mut requests) = canned(Canned::Never).await;
    let arguments = ["--protocol", "openai", "--clients", "2", "--requests", "9", "--warmup", "0"];
    let child = load(&address, &arguments).spawn().expect("it starts");
    for _ in 0..3 {
        requests.recv().await.expect("the list of models, and a request of each client");
    }
    let process = child.id().expect("it runs").to_string();
    let sent = Command::new("kill").args(["-INT", &process]).status().await.expect("kill is there");
    assert!(sent.success());
    let output = child.wait_with_output().await.expect("it ends");
    assert_eq!(output.status.code(), Some(130));
    let figures: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_counts(&figures, &[("requests", 2), ("finished", 0), ("failed", 2), ("tokens", 0)]);
    assert!(figures["failures"].to_string().contains("broken off"), "{figures}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_said_to_be_so() {
    let (endpoint, refused) = ("http://127.0.0.1:9", "127.0.0.1:9");
    for protocol in ["grpc", "openai"] {
        let output = load(endpoint, &["--protocol", protocol]).output().await.expect("it starts");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1));
        assert!(errors.starts_with("error: no ") && errors.contains(refused), "{errors}");
    }
}
