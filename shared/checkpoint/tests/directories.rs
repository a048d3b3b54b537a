//! Paths that cannot be opened: what is missing or wrong around the weights, and that the message says what to do.

mod samples;

use std::path::Path;

use paceline_checkpoint::{Checkpoint, CheckpointError};
use paceline_domain::ErrorKind;

fn refusal(path: &Path) -> CheckpointError {
    Checkpoint::open(path).err().expect("it is refused")
}

/// A directory with these files.
fn directory(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("there is room");
    for (name, bytes) in files {
        std::fs::write(directory.path().join(name), bytes).expect("the directory is ours");
    }
    directory
}

#[test]
fn messages_say_what_to_do() {
    let weights = samples::valid_safetensors();
    type Files<'a> = &'a [(&'a str, &'a [u8])];
    let cases: [(Files<'_>, &str, &str); 8] = [
        (&[("m.gguf", b"")], "m.gguf", "the file is empty; download it again"),
        (&[("m.bin", b"PK\x03\x04")], "m.bin", "neither a GGUF nor a safetensors file; give one of those"),
        (&[("m.gguf", b"<html>404")], "m.gguf", "not a GGUF file"),
        (&[], "", "no config.json here; give a .gguf file, or a directory with config.json"),
        (&[("q.gguf", b"GGUF")], "", "no config.json here, but \"q.gguf\" is: give the path of that file"),
        (&[("model.safetensors", &weights)], "model.safetensors", "no config.json here"),
        (&[("config.json", b"{}"), ("pytorch_model.bin", b"x")], "", "only safetensors weights are read"),
        (&[("config.json", b"{]")], "", "config.json: not JSON: "),
    ];
    for (files, name, message) in cases {
        let directory = directory(files);
        let error = refusal(&directory.path().join(name));
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(message), "{error}");
        assert!(error.to_string().contains(&directory.path().display().to_string()), "{error}");
    }
}

#[test]
fn a_file_that_is_not_there_is_unavailable() {
    let directory = directory(&[]);
    let error = refusal(&directory.path().join("absent.gguf"));
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("absent.gguf"), "{error}");
    assert!(refusal(Path::new("/dev/null")).to_string().contains("not a regular file"));
}

#[test]
fn config_files_have_limits() {
    let weights = samples::valid_safetensors();
    let many_values = format!("[{}0]", "0,".repeat(200_000));
    let too_long = format!("\"{}\"", "x".repeat(16 << 20));
    for (config, message) in [(many_values, "number of values of 200002"), (too_long, "at most 16777216")] {
        let directory = directory(&[("config.json", config.as_bytes()), ("model.safetensors", &weights)]);
        let error = refusal(directory.path()).to_string();
        assert!(error.contains(message) && error.contains("config.json"), "{error}");
    }
}

/// The refusal of a sharded directory with this index; shard `s1` holds `a`, shard `s2` holds `b`.
fn index_refusal(index: &str) -> String {
    let header = |name| format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
    let directory = directory(&[
        ("config.json", b"{}"),
        ("s1.safetensors", &samples::safetensors(&header("a"), 4)),
        ("s2.safetensors", &samples::safetensors(&header("b"), 4)),
        ("bad.safetensors", &samples::safetensors(&header("c"), 5)),
        ("again.safetensors", &samples::safetensors(&header("a"), 4)),
        ("model.safetensors.index.json", index.as_bytes()),
    ]);
    refusal(directory.path()).to_string()
}

#[test]
fn shard_indexes() {
    let with_map =
        |pairs: &str| index_refusal(&format!(r#"{{"metadata":{{"x":[1,null]}},"weight_map":{{{pairs}}}}}"#));
    let escapes = [
        "../x.safetensors",
        "/etc/x.safetensors",
        "d/x.safetensors",
        "..",
        ".x.safetensors",
        "",
        "d\\\\x.safetensors",
        "x\\u0000.safetensors",
        "x.bin",
        "a..b.safetensors",
    ];
    for shard in escapes {
        let error = with_map(&format!(r#""a":"{shard}""#));
        assert!(error.contains("not a plain name") && error.contains("tensor \"a\""), "{shard}: {error}");
    }
    let both = r#""a":"s1.safetensors","b":"s2.safetensors""#;
    let cases = [
        (with_map(r#""a":"s3.safetensors""#), "s3.safetensors"),
        (
            with_map(r#""a":"s1.safetensors","b":"s1.safetensors""#),
            "tensor \"b\": the shard index and the shards disagree: no shard holds it",
        ),
        (
            with_map(r#""a":"s2.safetensors","b":"s1.safetensors""#),
            "tensor \"a\": the shard index and the shards disagree: s1.safetensors holds it",
        ),
        (with_map(&format!(r#"{both},"a":"s1.safetensors""#)), "the index names it twice"),
        (with_map(r#""x":"s1.safetensors""#), "tensor \"x\""),
        (
            with_map(&format!(r#"{both},"c":"bad.safetensors""#)),
            "bad.safetensors: bytes 66..67 of the tensor data belong to no tensor",
        ),
        (with_map(&format!(r#"{both},"c":"again.safetensors""#)), "tensor \"a\" at offset 9 is there twice"),
        (with_map(r#""a":1"#), "the shard index is not what is expected"),
        (index_refusal("{}"), "weight_map is missing"),
        (index_refusal(r#"{"weight_map":{},"weight_map":{}}"#), "weight_map is there twice"),
        (index_refusal("[]"), "'{' is expected"),
    ];
    for (error, message) in cases {
        assert!(error.contains(message), "{error} (not: {message})");
    }
    let many: Vec<String> = (0..1025).map(|i| format!(r#""t{i}":"s{i}.safetensors""#)).collect();
    let error = with_map(&many.join(","));
    assert!(error.contains("number of shards of 1025 is more than 1024"), "{error}");
}
