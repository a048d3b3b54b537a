//! Random models on disk: the same bytes however they are written, the same weights in both formats, nothing left
//! behind after an error.

mod support;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use paceline_checkpoint::{Checkpoint, CheckpointError};
use paceline_domain::{KvType, WeightType};
use paceline_model::synthetic::{Synthetic, Writing, built_in_shape, uniform};
use paceline_model::{ConfigEstimate, Dtype, ModelError};
use support::models;
use support::rig::{Rig, in_pieces, tokens};

fn quiet(n_threads: usize) -> Writing<'static> {
    Writing { n_threads, ..Writing::plain() }
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry"));
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_seed_gives_the_weights_it_always_gave() {
    let mut digest = blake3::Hasher::new();
    for (_, model) in models::all() {
        digest.update(&model.to_gguf().expect("bytes"));
    }
    let expected = "a11182f0dc0a6e23fe61a6701d3c613cce6789df9ef9e97cdb078e8d5631ebe4";
    assert_eq!(digest.finalize().to_string(), expected);
}

#[test]
fn a_file_has_the_same_bytes_for_any_number_of_threads() {
    let directory = tempfile::tempdir().expect("a directory");
    for (what, model) in models::all() {
        let expected = model.to_gguf().expect("bytes");
        for n_threads in [1, 2, 3] {
            let path = directory.path().join("model.gguf");
            let written = model.write_gguf(&path, &quiet(n_threads)).expect("written");
            assert!(fs::read(&path).expect("reads") == expected, "{what}, {n_threads} threads");
            assert_eq!(written.n_bytes, expected.len() as u64);
        }
    }
    assert_eq!(names_in(directory.path()), ["model.gguf"]);
}

#[test]
fn both_formats_of_a_seed_are_the_same_model() {
    let directory = tempfile::tempdir().expect("a directory");
    let bf16 = |model: Synthetic| Synthetic { weight_type: uniform(WeightType::BF16), ..model };
    for (i, model) in [bf16(models::llama3_scaled()), bf16(models::qwen2())].into_iter().enumerate() {
        let (file, folder) =
            (directory.path().join(format!("{i}.gguf")), directory.path().join(i.to_string()));
        let written = model.write_gguf(&file, &quiet(2)).expect("written");
        model.write_directory(&folder, &quiet(2)).expect("written");
        let n_parameters =
            ConfigEstimate::new(&model.config, Dtype::Bits(16), None, KvType::F16).n_parameters;
        assert!((n_parameters..n_parameters + 100).contains(&written.n_parameters));
        let logits = |path: &Path| {
            let rig = Rig::new(Checkpoint::open(path).expect("a checkpoint"));
            assert_eq!(rig.config.n_vocab, model.config.n_vocab);
            rig.run(&in_pieces(&tokens(3, 12, model.config.n_vocab), &[12]))
        };
        let in_memory =
            Rig::new(Checkpoint::from_gguf_bytes(model.to_gguf().expect("bytes")).expect("a checkpoint"));
        let expected = in_memory.run(&in_pieces(&tokens(3, 12, model.config.n_vocab), &[12]));
        assert!(logits(&file) == expected && logits(&folder) == expected);
    }
}

#[test]
fn types_that_rows_do_not_fit_are_replaced_and_told() {
    let directory = tempfile::tempdir().expect("a directory");
    let config = built_in_shape("tiny").expect("is known");
    let model = Synthetic { config, seed: 1, weight_type: uniform(WeightType::Q4_K) };
    let written = model.write_gguf(&directory.path().join("tiny.gguf"), &quiet(1)).expect("written");
    assert_eq!(written.replaced, Some((2 + 2 * 7, WeightType::Q8_0)));
    let error = model.write_directory(&directory.path().join("tiny"), &quiet(1)).expect_err("refused");
    assert!(error.to_string().contains("safetensors have no q8_0"), "{error}");
    assert_eq!(names_in(directory.path()), ["tiny.gguf"]);
}

#[test]
fn nothing_stays_when_writing_ends_early() {
    let directory = tempfile::tempdir().expect("a directory");
    let model = Synthetic { weight_type: uniform(WeightType::F32), ..models::qwen2() };
    let n_reports = AtomicU64::new(0);
    let progress = |done: u64, total: u64| {
        assert!(done <= total);
        if n_reports.fetch_add(1, Ordering::Relaxed) < 3 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    };
    let writing = Writing { n_threads: 2, progress: &progress };
    let is_interrupted = |error: ModelError| {
        let ModelError::Checkpoint(CheckpointError::Io { source, .. }) = error else { return false };
        source.kind() == std::io::ErrorKind::Interrupted
    };
    let error = model.write_gguf(&directory.path().join("model.gguf"), &writing).expect_err("ended");
    assert!(is_interrupted(error));
    let error = model.write_directory(&directory.path().join("model"), &writing).expect_err("ended");
    assert!(is_interrupted(error));
    assert_eq!(names_in(directory.path()), Vec::<String>::new());
    // A directory cannot take the name of a file.
    fs::create_dir(directory.path().join("taken.gguf")).expect("creates");
    let error = model.write_gguf(&directory.path().join("taken.gguf"), &quiet(1)).expect_err("refused");
    assert!(error.to_string().contains("taken.gguf"), "{error}");
    assert_eq!(names_in(directory.path()), ["taken.gguf"]);
}

#[test]
fn progress_ends_at_all_bytes() {
    let directory = tempfile::tempdir().expect("a directory");
    let (most, all) = (AtomicU64::new(0), AtomicU64::new(0));
    let progress = |done: u64, total: u64| {
        most.fetch_max(done, Ordering::Relaxed);
        all.store(total, Ordering::Relaxed);
        ControlFlow::Continue(())
    };
    let model = Synthetic { weight_type: uniform(WeightType::BF16), ..models::qwen2() };
    let writing = Writing { n_threads: 2, progress: &progress };
    let written = model.write_directory(&directory.path().join("model"), &writing).expect("written");
    assert_eq!(
        (most.load(Ordering::Relaxed), all.load(Ordering::Relaxed)),
        (written.n_bytes, written.n_bytes)
    );
    most.store(0, Ordering::Relaxed);
    models::llama3_scaled().write_gguf(&directory.path().join("model.gguf"), &writing).expect("written");
    assert_eq!(most.into_inner(), all.into_inner());
    let names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names_in(&directory.path().join("model")), names);
}
