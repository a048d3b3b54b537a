//! `paceline synth` as users meet it: files that other commands take, clear errors, nothing left behind.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use paceline_checkpoint::Checkpoint;
use paceline_domain::{TokenId, WeightType};
use paceline_model::{
    ModelConfig,
    synthetic::{Synthetic, tiny_config, uniform},
};
use paceline_text::{ControlText, SpecialTokens, Tokenizer};
use serde_json::{Value, json};
use tempfile::TempDir;

fn synth(dir: &TempDir, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_paceline"))
        .arg("synth")
        .args(arguments.split(' '))
        .current_dir(dir.path())
        .env_remove("PACELINE_CATALOGUE")
        .output()
        .expect("runs")
}

fn success(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn a_file_is_the_random_model_of_its_seed() {
    let dir = TempDir::new().expect("directory");
    let text = success(&synth(&dir, "--shape tiny --type q8_0 --seed 5 --out tiny.gguf --json"));
    let report: Value = serde_json::from_str(&text).expect("JSON");
    let bytes = fs::read(dir.path().join("tiny.gguf")).expect("reads");
    let model = Synthetic { config: tiny_config(), seed: 5, weight_type: uniform(WeightType::Q8_0) };
    assert!(bytes == model.to_gguf().expect("bytes"));
    assert_eq!(
        (&report["shape"], &report["type"], &report["seed"]),
        (&json!("tiny"), &json!("q8_0"), &json!(5))
    );
    assert_eq!((&report["bytes"], &report["replaced_matrices"]), (&json!(bytes.len()), &json!(0)));
    assert_eq!(names_in(dir.path()), ["tiny.gguf"]);
}

#[test]
fn a_configuration_gives_a_directory_with_the_same_tokenizer_as_the_file() {
    let dir = TempDir::new().expect("directory");
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": true,
    });
    fs::write(dir.path().join("config.json"), config.to_string()).expect("writes");
    success(&synth(&dir, "--config config.json --out model --threads 2"));
    success(&synth(&dir, "--config config.json --type q4_k --out model.gguf"));
    let open = |name: &str| Checkpoint::open(dir.path().join(name)).expect("opens");
    let (folder, file) = (open("model"), open("model.gguf"));
    let read = |checkpoint: &Checkpoint| ModelConfig::from_checkpoint(checkpoint).expect("a configuration");
    assert_eq!(read(&folder), ModelConfig::from_config_json(&config).expect("a configuration"));
    assert_eq!((read(&folder).n_vocab, read(&file).n_vocab), (300, 300));
    let tokenizer = |checkpoint: &Checkpoint| Tokenizer::from_checkpoint(checkpoint).expect("a tokenizer");
    let (of_folder, of_file) = (tokenizer(&folder), tokenizer(&file));
    let tokens = of_folder.encode("Hé <|endoftext|>", SpecialTokens::Parse).expect("encodes");
    assert_eq!(tokens, [72, 195, 169, 32, 256].map(TokenId));
    assert_eq!(tokens, of_file.encode("Hé <|endoftext|>", SpecialTokens::Parse).expect("encodes"));
    assert_eq!(of_folder.decode(&tokens, ControlText::Skip), "Hé ");
    assert_eq!((of_folder.n_vocab(), of_folder.digest()), (257, of_file.digest()));
}

#[test]
fn what_cannot_be_written_is_told_and_leaves_nothing() {
    let dir = TempDir::new().expect("directory");
    fs::write(dir.path().join("config.json"), "{}").expect("writes");
    let refusals = [
        ("--shape qwen9 --out a.gguf", 1, "known are tiny, qwen2.5-0.5b"),
        ("--shape tiny --type q4_k --out a", 1, "safetensors have no q4_k"),
        ("--shape tiny --type q9 --out a.gguf", 2, "known are f32"),
        (
            "--shape tiny --out nowhere/a.gguf",
            1,
            "cannot write nowhere/a.gguf: No such file or directory (os error 2)\n",
        ),
        ("--shape tiny --out nowhere/a", 1, "cannot create nowhere/a: No such file"),
        ("--config config.json --out a", 1, "config.json: "),
        ("--config missing.json --out a", 1, "missing.json"),
        ("--out a", 2, "--shape"),
    ];
    for (arguments, code, part) in refusals {
        let output = synth(&dir, arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments}: {error}");
        assert!(error.contains(part), "{arguments}: {error}");
    }
    assert_eq!(names_in(dir.path()), ["config.json"]);
}
