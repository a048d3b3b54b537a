//! Options of a request on the command line: what they say reaches the server, and what comes back is shown.

use std::fs;

use paceline_tests::{ClusterSpec, TestCluster, program::run};
use serde_json::Value;
use tempfile::TempDir;

/// Standard output of `paceline generate` on this cluster, which must succeed.
async fn generate(cluster: &TestCluster, arguments: &[&str]) -> String {
    let server = cluster.address();
    let fixed = ["generate", "--server", &server, "--temperature", "0"];
    let output = run(&[&fixed[..], arguments].concat()).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

async fn refused(cluster: &TestCluster, arguments: &[&str]) -> String {
    let server = cluster.address();
    let output = run(&[&["generate", "--server", &server][..], arguments].concat()).await;
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).expect("text")
}

fn json(line: &str) -> Value {
    serde_json::from_str(line).expect("a JSON object")
}

#[tokio::test]
async fn what_the_text_must_be_comes_from_flags_and_files() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let folder = TempDir::new().expect("a folder");
    let file = |name: &str, text: &str| {
        fs::write(folder.path().join(name), text).expect("writes");
        folder.path().join(name).to_string_lossy().into_owned()
    };
    let schema = file(
        "schema.json",
        r#"{"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"],
           "additionalProperties": false}"#,
    );
    let lark = file("grammar.lark", "start: (\"ab\" | \"ba\") \"!\"");
    let text = generate(&cluster, &["--json-schema", &schema, "--max-tokens", "60", "A digit"]).await;
    let object = json(&text);
    assert!(object["n"].is_i64() && object.as_object().is_some_and(|object| object.len() == 1), "{text}");
    let text = generate(&cluster, &["--regex", "[0-9]{3}-[a-c]", "A number"]).await;
    assert!(text.len() == 5 && text[..3].bytes().all(|byte| byte.is_ascii_digit()), "{text}");
    let text = generate(&cluster, &["--lark", &lark, "A word"]).await;
    assert!(["ab!", "ba!"].contains(&text.as_str()), "{text}");
    let error = refused(&cluster, &["--regex", "(", "A word"]).await;
    assert!(error.contains("the regular expression cannot be used"), "{error}");
    let error = refused(&cluster, &["--json-schema", "/nowhere.json", "A word"]).await;
    assert!(error.contains("cannot read /nowhere.json"), "{error}");
}

#[tokio::test]
async fn several_completions_are_told_apart() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let several =
        ["--n", "3", "--seed", "5", "--temperature", "1", "--max-tokens", "6", "--ignore-eos", "Hi"];
    let server = cluster.address();
    let output = run(&[&["generate", "--server", &server, "--json"][..], &several].concat()).await;
    let lines: Vec<Value> = String::from_utf8_lossy(&output.stdout).lines().map(json).collect();
    let numbers: Vec<Option<u64>> = lines.iter().map(|line| line["choice"].as_u64()).collect();
    assert_eq!(numbers, [Some(0), Some(1), Some(2)]);
    assert!(lines[0]["seed"] == 5 && lines[1]["seed"] != lines[2]["seed"]);
    let text = run(&[&["generate", "--server", &server][..], &several].concat()).await.stdout;
    let expected = lines
        .iter()
        .enumerate()
        .map(|(i, line)| format!("--- {i} ---\n{}\n", line["text"].as_str().expect("a text")));
    assert_eq!(String::from_utf8_lossy(&text), expected.collect::<String>());
}

#[tokio::test]
async fn the_end_is_held_back_and_the_prompt_is_scored() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let prompt = "What is the capital of France? Answer in one word.";
    let short = json(&generate(&cluster, &["--json", "--max-tokens", "300", prompt]).await);
    let n = short["tokens"].as_array().expect("tokens").len();
    assert!((1..300).contains(&n), "it ends by itself, not after {n} tokens");
    let n_more = (n + 20).to_string();
    let arguments = ["--json", "--max-tokens", &n_more, "--min-tokens", &n_more, prompt];
    let long = json(&generate(&cluster, &arguments).await);
    assert_eq!(long["tokens"].as_array().map(Vec::len), Some(n + 20));
    let error = refused(&cluster, &["--max-tokens", "3", "--min-tokens", "4", "Hi"]).await;
    assert!(error.contains("min_tokens is 4"), "{error}");

    let arguments =
        ["--raw", "--json", "--max-tokens", "1", "--prompt-logprobs", "2", "The capital of France"];
    let scored = json(&generate(&cluster, &arguments).await);
    let scores = scored["prompt_logprobs"].as_array().expect("numbers");
    assert_eq!(scores.len() as u64 + 1, scored["usage"]["prompt_tokens"].as_u64().expect("a count"));
    for score in scores {
        let logprob = score["logprob"].as_f64().expect("a number");
        let top = score["top"].as_array().expect("a list");
        assert!(logprob <= 0.0 && top.len() == 2 && top[0][1].as_f64() >= Some(logprob), "{score}");
    }
    let error = refused(&cluster, &["--prompt-logprobs", "2", "Hi"]).await;
    assert!(error.contains("--json"), "{error}");
}
