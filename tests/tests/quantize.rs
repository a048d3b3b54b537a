//! `--quantize` and `--kv-type q8` as users meet them: the same tokens on any number of ranks, sizes are told, and services
//! that were told differently make no group.

use std::path::PathBuf;
use std::process::Output;

use paceline::cluster::{Cluster, ClusterSpec};
use paceline::process::Log;
use paceline::progress::Progress;
use paceline_domain::WeightType;
use paceline_model::config::ModelConfig;
use paceline_model::synthetic::{Synthetic, tiny_config};
use paceline_tests::program::{paceline, run};
use serde_json::Value;
use tempfile::TempDir;

/// A model in safetensors whose rows are whole superblocks.
fn model() -> (TempDir, String) {
    let directory = tempfile::tempdir().expect("a directory");
    let config = ModelConfig { n_embd: 256, n_ff: 512, ..tiny_config() };
    let synthetic = Synthetic { config, seed: 12, weight_type: |_, _| WeightType::BF16 };
    synthetic.write_hugging_face(directory.path()).expect("written");
    let path = directory.path().to_string_lossy().into_owned();
    (directory, path)
}

fn success(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}", text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

async fn json(arguments: &[&str]) -> Value {
    let (stdout, _) = success(&run(arguments).await);
    serde_json::from_str(&stdout).expect("one JSON object")
}

#[tokio::test]
async fn any_number_of_ranks_says_the_same_and_what_is_saved_is_told() {
    let (_directory, model) = model();
    let answer = async |ranks: &str, quantize: &[&str]| {
        let sampling = ["--raw", "--json", "--temperature", "0", "--max-tokens", "24", "--ignore-eos"];
        let arguments = [&["run", "--model", &model, "--ranks", ranks, "abcdefgh"], &sampling[..], quantize];
        let (stdout, stderr) = success(&run(&arguments.concat()).await);
        let json: Value = serde_json::from_str(&stdout).expect("one JSON object");
        (json["tokens"].clone(), stderr)
    };
    for quantization in ["q8_0", "q4_k"] {
        let (tokens, stderr) = answer("1", &["--quantize", quantization]).await;
        let told = format!("weights quantized to {quantization} at load: ");
        assert!(stderr.contains(&told) && stderr.contains("less than in the file"), "{stderr}");
        assert_eq!(answer("3", &["--quantize", quantization]).await.0, tokens);
    }
    assert!(!answer("2", &[]).await.1.contains("quantized"));
}

#[tokio::test]
async fn codes_in_the_kv_cache_are_the_same_on_any_number_of_ranks() {
    let (directory, model) = model();
    let answer = async |ranks: &str| {
        let sampling = ["--raw", "--json", "--temperature", "0", "--max-tokens", "40", "--ignore-eos"];
        let arguments =
            [&["run", "--model", &model, "--ranks", ranks, "--kv-type", "q8", "abcd"], &sampling[..]];
        json(&arguments.concat()).await["tokens"].clone()
    };
    assert_eq!(answer("1").await, answer("3").await);
    let config = directory.path().join("config.json").to_string_lossy().into_owned();
    let kv_bytes = async |kv_type: &str| {
        let plan =
            ["plan", "--model", &model, "--ranks", "1", "--json", "--device", "cpu", "--kv-type", kv_type];
        let shape = ["--shapes", "tg2", "--repeat", "1", "--no-machine", "--device", "cpu", "--json"];
        let bench = [&["bench", "--model", &model, "--kv-type", kv_type], &shape[..]].concat();
        assert_eq!(json(&bench).await["kv_type"], kv_type);
        let estimate = json(&["estimate", "--config", &config, "--json", "--kv-type", kv_type]).await;
        let a_token = json(&plan).await["ranks"][0]["kv_bytes_per_token"].as_u64().expect("bytes");
        assert_eq!(estimate["kv_bytes_per_1000_tokens"], 1000 * a_token);
        a_token
    };
    assert_eq!(kv_bytes("q8").await * 64, kv_bytes("f16").await * 34);
    let refused = run(&["run", "--model", &model, "--kv-type", "q5", "abcd"]).await;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("f16, f32 or q8, not `q5`"));
}

#[tokio::test]
async fn plan_bench_and_estimate_tell_the_sizes() {
    let (directory, model) = model();
    let plan = async |quantize: &[&str]| {
        let arguments =
            [&["plan", "--model", &model, "--ranks", "1", "--json", "--device", "cpu"], quantize].concat();
        json(&arguments).await["ranks"][0].clone()
    };
    let (float, four) = (plan(&[]).await, plan(&["--quantize", "q4_k"]).await);
    let bytes = |rank: &Value, name: &str| rank[name].as_u64().expect("bytes");
    assert_eq!(bytes(&float, "saved_bytes"), 0);
    assert_eq!(bytes(&four, "saved_bytes"), bytes(&float, "weight_bytes") - bytes(&four, "weight_bytes"));
    assert!(bytes(&four, "weight_bytes") * 2 < bytes(&float, "weight_bytes"));

    let shape = ["--shapes", "tg2", "--repeat", "1", "--no-machine", "--device", "cpu", "--json"];
    let bench = json(&[&["bench", "--model", &model, "--quantize", "q4_k"], &shape[..]].concat()).await;
    assert_eq!(bench["quantize"], "q4_k");
    assert_eq!(bytes(&bench, "saved_bytes"), bytes(&four, "saved_bytes"));

    let config = directory.path().join("config.json").to_string_lossy().into_owned();
    let estimate = ["estimate", "--config", &config, "--quantize", "q4_k", "--json"];
    let (plain, quantized) =
        (json(&["estimate", "--config", &config, "--json"]).await, json(&estimate).await);
    let saved = bytes(&plain, "weight_bytes") - bytes(&quantized, "weight_bytes");
    assert_eq!(saved, bytes(&four, "saved_bytes"));
    let refused = run(&[&estimate[..], &["--dtype", "q8_0"]].concat()).await;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--quantize is for weights of plain numbers"));
}

#[tokio::test]
async fn services_that_were_told_differently_make_no_group() {
    let (_directory, model) = model();
    let spec = ClusterSpec {
        draft: None,
        program: paceline(),
        model: PathBuf::from(model),
        model_name: "test-model".into(),
        listen: "127.0.0.1:0".into(),
        n_groups: 1,
        threads: vec![1, 1],
        devices: Vec::new(),
        shard_args: ["--quantize", "q8_0"].map(Into::into).to_vec(),
        coordinator_args: Vec::new(),
        env: Vec::new(),
        log: Log::Keep,
    };
    let error = Cluster::start(&spec, &Progress::to_stderr()).await.expect_err("must be refused");
    let error = format!("{error:#}");
    assert!(
        error.contains("give both the same --quantize") && error.contains("FailedPrecondition"),
        "{error}"
    );
}

#[tokio::test]
async fn a_draft_may_lose_bits_and_tokens() {
    let (_directory, model) = model();
    let answer = async |draft: &[&str]| {
        let sampling = ["--raw", "--json", "--temperature", "0.9", "--seed", "4", "--max-tokens", "40"];
        let arguments =
            [&["run", "--model", &model, "--ranks", "1", "--ignore-eos", "abcdefgh"], &sampling[..]];
        run(&[&arguments.concat()[..], draft].concat()).await
    };
    let tokens = |output: &Output| -> Value {
        let (stdout, _) = success(output);
        serde_json::from_str::<Value>(&stdout).expect("one JSON object")["tokens"].clone()
    };
    let plain = tokens(&answer(&[]).await);
    let draft = ["--draft", &model, "--speculate", "draft", "--draft-quantize", "q4_0", "--draft-vocabulary"];
    assert_eq!(tokens(&answer(&[&draft[..], &["96"]].concat()).await), plain);
    assert_eq!(tokens(&answer(&[&draft[..], &["0"]].concat()).await), plain);
    let as_in_file = ["--draft", &model, "--speculate", "draft", "--draft-quantize", "none"];
    assert_eq!(tokens(&answer(&as_in_file).await), plain);

    let refused = async |draft: &[&str], reason: &str| {
        let output = answer(draft).await;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(reason), "{stderr}");
    };
    refused(&[&draft[..], &["9999"]].concat(), "--vocabulary is 9999; the draft model has").await;
    refused(&["--draft-vocabulary", "96"], "need --draft MODEL").await;
    refused(&["--draft-quantize", "q5_0"], "q8_0, q4_k, q4_0, q4_1 or none, not to `q5_0`").await;
    refused(&["--quantize", "q4_0"], "q8_0 or q4_k, not to `q4_0`").await;
}

#[tokio::test]
async fn a_draft_is_measured_as_it_is_loaded() {
    let (_directory, model) = model();
    let bench = async |draft: &[&str]| {
        let shape = ["--shapes", "tg2", "--repeat", "1", "--no-machine", "--device", "cpu", "--json"];
        json(&[&["bench", "--model", &model], &shape[..], draft].concat()).await
    };
    let bytes = |bench: &Value, name: &str| bench[name].as_u64().expect("bytes");
    let (whole, draft) =
        (bench(&[]).await, bench(&["--draft-quantize", "q4_0", "--draft-vocabulary", "96"]).await);
    assert_eq!((&draft["quantize"], &draft["vocabulary"]), (&"q4_0".into(), &96.into()));
    assert_eq!((bytes(&whole, "vocabulary"), bytes(&whole, "saved_bytes")), (331, 0));
    let less = bytes(&whole, "weight_bytes") - bytes(&draft, "weight_bytes");
    assert!(less.abs_diff(bytes(&draft, "saved_bytes")) * 20 < less, "{less} bytes less: {draft}");
}
