//! The `paceline` executable as users and scripts meet it: output, exit codes, and no process left behind.

use std::{
    collections::BTreeSet,
    fs,
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use paceline::answer::connect;
use paceline_tests::{
    client::{generate, greedy},
    models::small_model,
    program::{command, run},
};
use paceline_wire::inference::{ListModelsRequest, generate_response::Event};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, Command},
};

/// How long anything here may take; far above what it takes.
const DEADLINE: Duration = Duration::from_secs(120);

fn model() -> String {
    small_model().to_string_lossy().into_owned()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn success(output: &Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// Process ids of the direct children.
fn children(pid: u32) -> BTreeSet<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("children")).ok());
    lists.flat_map(|list| list.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()).collect()
}

/// Waits until none of the processes runs; a zombie that nobody has waited for yet does not run.
async fn all_gone(pids: &BTreeSet<u32>) {
    let runs = |pid: &&u32| {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|rest| !rest.starts_with('Z')))
    };
    let started = Instant::now();
    while let Some(pid) = pids.iter().find(runs) {
        assert!(started.elapsed() < DEADLINE, "process {pid} is still there");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn signal(child: &Child, name: &str) {
    let pid = child.id().expect("it runs").to_string();
    let sent = Command::new("kill").args([name, &pid]).status().await.expect("runs");
    assert!(sent.success());
}

/// A `run` that goes on until it is stopped, with its children, after its first output.
async fn endless_run() -> (Child, BTreeSet<u32>) {
    let model = model();
    let arguments =
        ["run", "--model", &model, "--ranks", "2", "--raw", "--ignore-eos", "--max-tokens", "8000", "Count:"];
    let mut child = command(&arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("starts");
    let mut first = [0];
    let stdout = child.stdout.as_mut().expect("is piped");
    let read = tokio::time::timeout(DEADLINE, stdout.read_exact(&mut first)).await;
    read.expect("output in time").expect("output");
    let children = children(child.id().expect("it runs"));
    assert_eq!(children.len(), 3, "two shards and a coordinator");
    (child, children)
}

#[tokio::test]
async fn run_writes_the_text_alone_and_json_the_promised_fields() {
    let model = model();
    let arguments = [
        "run",
        "--model",
        &model,
        "--ranks",
        "2",
        "--max-tokens",
        "12",
        "--temperature",
        "0",
        "--seed",
        "5",
        "--ignore-eos",
        "--raw",
        "--json",
        "The capital of France is",
    ];
    let json: Value = serde_json::from_str(&success(&run(&arguments).await)).expect("one JSON object");
    let tokens = json["tokens"].as_array().expect("tokens");
    assert_eq!(tokens.len(), 12);
    assert!(tokens.iter().all(Value::is_u64));
    assert_eq!(json["finish_reason"], "length");
    assert_eq!(json["usage"]["completion_tokens"], 12);
    assert!(json["usage"]["prompt_tokens"].as_u64() > Some(3));
    assert!(json["timings"]["first_token_us"].as_u64() > Some(0));
    assert!(json["timings"]["total_us"].as_u64() >= json["timings"]["first_token_us"].as_u64());

    let plain: Vec<&str> = arguments.into_iter().filter(|argument| *argument != "--json").collect();
    let output = run(&plain).await;
    assert_eq!(success(&output), json["text"].as_str().expect("text"), "the text alone");
    let summary = text(&output.stderr);
    assert!(summary.contains("12 tokens in") && summary.contains("tokens/s"), "{summary}");
}

#[tokio::test]
async fn run_uses_the_chat_template_unless_told_not_to() {
    let model = model();
    let prompt_tokens = async |extra: &[&str]| {
        let mut arguments =
            vec!["run", "--model", &model, "--ranks", "1", "--max-tokens", "1", "--json", "Hi"];
        arguments.extend(extra);
        let json: Value = serde_json::from_str(&success(&run(&arguments).await)).expect("JSON");
        json["usage"]["prompt_tokens"].as_u64().expect("a number")
    };
    assert_eq!(prompt_tokens(&["--raw"]).await, 1);
    assert!(prompt_tokens(&[]).await > 5);
}

#[tokio::test]
async fn an_interrupt_leaves_no_process_and_exits_130() {
    let (mut child, children) = endless_run().await;
    signal(&child, "-INT").await;
    let status = tokio::time::timeout(DEADLINE, child.wait()).await.expect("ends").expect("waits");
    assert_eq!(status.code(), Some(130));
    all_gone(&children).await;
}

#[tokio::test]
async fn children_end_when_the_program_is_killed() {
    let (mut child, children) = endless_run().await;
    signal(&child, "-KILL").await;
    child.wait().await.expect("waits");
    all_gone(&children).await;
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_the_program() {
    let (mut child, children) = endless_run().await;
    drop(child.stdout.take());
    let status = tokio::time::timeout(DEADLINE, child.wait()).await.expect("ends").expect("waits");
    assert_eq!(status.code(), Some(128 + 13));
    all_gone(&children).await;
}

#[tokio::test]
async fn a_shard_that_cannot_start_is_explained() {
    let model = model();
    let output = run(&["run", "--model", &model, "--isa", "pdp11", "Hi"]).await;
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("shard 0 ended") && error.contains("pdp11"), "{error}");
    assert!(output.stdout.is_empty());
}

#[tokio::test]
async fn a_file_that_is_no_model_is_explained() {
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().expect("file");
    fs::write(file.path(), "not a model").expect("writes");
    let path = file.path().to_string_lossy().into_owned();
    let output = run(&["run", "--model", &path, "Hi"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains(&path), "{}", text(&output.stderr));
}

#[tokio::test]
async fn up_starts_groups_that_share_the_requests() {
    let model = model();
    let arguments = ["up", "--model", &model, "--groups", "2", "--ranks", "1", "--listen", "127.0.0.1:0"];
    let mut up = command(&arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("starts");
    let mut lines = BufReader::new(up.stdout.take().expect("is piped")).lines();
    let mut addresses = Vec::new();
    for name in ["coordinator", "group 0 shard 0", "group 1 shard 0"] {
        let line = tokio::time::timeout(DEADLINE, lines.next_line()).await.expect("in time").expect("reads");
        let line = line.expect("a line for each service");
        let address = line.strip_prefix(&format!("{name} ")).unwrap_or_else(|| panic!("{name}: {line}"));
        addresses.push(address.to_owned());
    }
    let children = children(up.id().expect("it runs"));
    let mut client = connect(&addresses[0]).await.expect("it answers");
    let listed = client.list_models(ListModelsRequest {}).await.expect("it answers").into_inner();
    let groups: Vec<(u32, bool)> =
        listed.models[0].groups.iter().map(|group| (group.ranks, group.ready)).collect();
    assert_eq!(groups, [(1, true), (1, true)]);

    // Nothing is cached: where less was sent so far is next, so both groups answer both.
    let prompts = ["One, two,", "Three, four,"].map(|prompt| greedy(prompt, 8));
    let mut answers = Vec::new();
    for prompt in [0, 1, 1, 0].map(|i| prompts[i].clone()) {
        answers.push(generate(&mut client, prompt).await.expect("generates").tokens);
    }
    assert_eq!((&answers[0], &answers[1]), (&answers[3], &answers[2]));
    drop(client);
    signal(&up, "-TERM").await;
    let status = tokio::time::timeout(DEADLINE, up.wait()).await.expect("ends").expect("waits");
    assert_eq!(status.code(), Some(0));
    all_gone(&children).await;
}

/// Which of these processes is a service with this argument.
fn service(pids: &BTreeSet<u32>, argument: &str) -> Option<u32> {
    let has = |pid: &&u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == argument.as_bytes())
    };
    pids.iter().find(has).copied()
}

#[tokio::test]
async fn a_shard_that_ends_under_up_is_started_again_and_the_stream_goes_on() {
    const N_TOKENS: u32 = 64;
    let model = model();
    let arguments = ["up", "--model", &model, "--ranks", "2", "--listen", "127.0.0.1:0"];
    let mut up = command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let mut lines = BufReader::new(up.stdout.take().expect("is piped")).lines();
    let line = tokio::time::timeout(DEADLINE, lines.next_line()).await.expect("in time").expect("reads");
    let line = line.expect("a line for the coordinator");
    let mut client =
        connect(line.strip_prefix("coordinator ").expect("an address")).await.expect("it answers");
    let expected = generate(&mut client, greedy("One, two,", N_TOKENS)).await.expect("generates").tokens;

    let before = children(up.id().expect("it runs"));
    let mut stream = client.generate(greedy("One, two,", N_TOKENS)).await.expect("starts").into_inner();
    let (mut tokens, mut killed) = (Vec::new(), None);
    while let Some(chunk) = stream.message().await.expect("a shard that ended is no error") {
        if let Some(Event::Delta(delta)) = chunk.event {
            tokens.extend(delta.token_ids);
        }
        if tokens.len() >= 8 && killed.is_none() {
            killed = service(&before, "shard");
            let pid = killed.expect("two of them run").to_string();
            assert!(Command::new("kill").args(["-KILL", &pid]).status().await.expect("runs").success());
        }
    }
    assert_eq!(tokens, expected);
    let after = children(up.id().expect("it runs"));
    assert_eq!(after.len(), before.len());
    assert_eq!(before.difference(&after).copied().collect::<Vec<_>>(), [killed.expect("it was killed")]);

    drop(client);
    signal(&up, "-TERM").await;
    let output = tokio::time::timeout(DEADLINE, up.wait_with_output()).await.expect("ends").expect("waits");
    assert_eq!(output.status.code(), Some(0));
    let log = text(&output.stderr);
    assert!(log.contains("shard 0 is started again") || log.contains("shard 1 is started again"), "{log}");
    all_gone(&after).await;
}

#[tokio::test]
async fn up_serves_generate_and_chat_until_it_is_stopped() {
    let model = model();
    let arguments = ["up", "--model", &model, "--ranks", "2", "--listen", "127.0.0.1:0"];
    let mut up = command(&arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("starts");
    let mut lines = BufReader::new(up.stdout.take().expect("is piped")).lines();
    let mut addresses = Vec::new();
    for name in ["coordinator", "shard 0", "shard 1"] {
        let line = tokio::time::timeout(DEADLINE, lines.next_line()).await.expect("in time").expect("reads");
        let line = line.expect("a line for each service");
        let address =
            line.strip_prefix(&format!("{name} http://")).unwrap_or_else(|| panic!("{name}: {line}"));
        addresses.push(address.to_owned());
    }
    let children = children(up.id().expect("it runs"));

    let server = ["--server", &addresses[0], "--temperature", "0", "--max-tokens", "8"];
    let generate: Vec<&str> = ["generate", "One, two,"].into_iter().chain(server).collect();
    let first = success(&run(&generate).await);
    assert!(!first.is_empty());
    assert_eq!(success(&run(&generate).await), first);

    let chat: Vec<&str> = ["chat"].into_iter().chain(server).collect();
    let mut chat = command(&chat).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starts");
    let mut stdin = chat.stdin.take().expect("is piped");
    stdin.write_all(b"Hello\n\nAnd again\n/exit\nnot sent\n").await.expect("writes");
    drop(stdin);
    let answers = success(&chat.wait_with_output().await.expect("ends"));
    assert!(answers.ends_with('\n') && answers.lines().count() >= 2, "{answers:?}");

    signal(&up, "-TERM").await;
    let status = tokio::time::timeout(DEADLINE, up.wait()).await.expect("ends").expect("waits");
    assert_eq!(status.code(), Some(0));
    all_gone(&children).await;
}
