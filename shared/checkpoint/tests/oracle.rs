//! Compares what the readers and the writer make of files with candle-core and the safetensors crate. Files with
//! faults are tested elsewhere.

mod samples;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file;
use paceline_checkpoint::{Checkpoint, Format, Value};
use paceline_domain::WeightType;
use safetensors::tensor::{Dtype, TensorView};

/// A model file of the tests' model directory.
fn model_file(name: &str) -> PathBuf {
    let directory = std::env::var_os("PACELINE_TEST_MODELS").map(PathBuf::from).unwrap_or_else(|| {
        let home = std::env::var_os("HOME").expect("HOME is set");
        Path::new(&home).join(".cache/paceline/models")
    });
    let path = directory.join(name);
    assert!(path.exists(), "{} is missing; run tests/run, which downloads it", path.display());
    path
}

fn assert_same_value(key: &str, ours: Value<'_>, candles: &gguf_file::Value) {
    let is_same = match (ours, candles) {
        (Value::U8(a), gguf_file::Value::U8(b)) => a == *b,
        (Value::I8(a), gguf_file::Value::I8(b)) => a == *b,
        (Value::U16(a), gguf_file::Value::U16(b)) => a == *b,
        (Value::I16(a), gguf_file::Value::I16(b)) => a == *b,
        (Value::U32(a), gguf_file::Value::U32(b)) => a == *b,
        (Value::I32(a), gguf_file::Value::I32(b)) => a == *b,
        (Value::U64(a), gguf_file::Value::U64(b)) => a == *b,
        (Value::I64(a), gguf_file::Value::I64(b)) => a == *b,
        (Value::F32(a), gguf_file::Value::F32(b)) => a.to_bits() == b.to_bits(),
        (Value::F64(a), gguf_file::Value::F64(b)) => a.to_bits() == b.to_bits(),
        (Value::Bool(a), gguf_file::Value::Bool(b)) => a == *b,
        (Value::String(a), gguf_file::Value::String(b)) => a == b,
        (Value::Array(a), gguf_file::Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{key}");
            a.iter().zip(b).for_each(|(a, b)| assert_same_value(key, a, b));
            true
        }
        _ => false,
    };
    assert!(is_same, "{key}: {ours:?} is not {candles:?}");
}

/// Compares names, shapes, types and bytes of every tensor, and every metadata value.
fn assert_same_gguf(path: &Path) -> Checkpoint {
    let ours = Checkpoint::open(path).expect("our reader takes the file");
    assert_eq!(ours.format(), Format::Gguf);
    let bytes = std::fs::read(path).expect("the file is readable");
    let mut reader = std::io::Cursor::new(&bytes);
    let candles = gguf_file::Content::read(&mut reader).expect("candle takes the file");

    assert_eq!(ours.metadata().len(), candles.metadata.len());
    for (key, value) in &candles.metadata {
        assert_same_value(key, ours.metadata().get(key).unwrap_or_else(|| panic!("{key} is missing")), value);
    }
    assert_eq!(ours.n_tensors(), candles.tensor_infos.len());
    for (name, info) in &candles.tensor_infos {
        let tensor = ours.tensor(name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(tensor.shape(), info.shape.dims(), "{name}");
        let type_name = tensor.weight_type().name().replace("_k", "k").replace("_", "");
        assert_eq!(type_name, format!("{:?}", info.ggml_dtype).to_lowercase().replace("_", ""), "{name}");
        let start = (candles.tensor_data_offset + info.offset) as usize;
        assert!(tensor.data() == &bytes[start..start + tensor.data().len()], "bytes of {name}");
        let loaded = candles.tensor(&mut reader, name, &Device::Cpu).expect("candle reads the tensor");
        assert!(*loaded.data().expect("on the CPU") == *tensor.data(), "bytes of {name}");
    }
    ours
}

#[test]
fn smollm2_is_what_candle_reads() {
    let ours = assert_same_gguf(&model_file("smollm2-135m-instruct.gguf"));
    assert_eq!(
        (ours.n_tensors(), ours.metadata().strings("tokenizer.ggml.tokens").unwrap().len()),
        (272, 49_152)
    );
    let embedding = ours.tensor("token_embd.weight").unwrap();
    assert_eq!(embedding.shape(), [49_152, 576]);
    assert_eq!(embedding.row(49_151), &embedding.data()[49_151 * embedding.row_bytes()..]);
    let tokens: Vec<&str> = ours.metadata().strings("tokenizer.ggml.tokens").unwrap().iter().collect();
    assert_eq!(&tokens[..2], ["<|endoftext|>", "<|im_start|>"]);
}

#[test]
fn qwen_is_what_candle_reads() {
    if std::env::var_os("PACELINE_TEST_MODELS_ALL").is_none_or(|all| all != "1") {
        println!("skipped: PACELINE_TEST_MODELS_ALL is not 1");
        return;
    }
    for name in ["qwen2.5-coder-0.5b-instruct.gguf", "qwen2.5-coder-1.5b-instruct.gguf"] {
        let ours = assert_same_gguf(&model_file(name));
        assert_eq!(ours.metadata().strings("tokenizer.ggml.tokens").unwrap().len(), 151_936);
    }
}

#[test]
fn a_file_of_our_writer_is_what_candle_reads() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sample.gguf");
    samples::gguf().write(&path).unwrap();
    let ours = assert_same_gguf(&path);
    assert_eq!(ours.tensor("cube").unwrap().shape(), [2, 3, 4]);
    assert_eq!(ours.tensor("cube").unwrap().row(5), [3; 8]);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "the temporary file is gone");
}

#[test]
fn a_file_of_candles_writer_is_what_we_read() {
    let source = candle_core::Tensor::arange(0f32, 1024.0, &Device::Cpu).unwrap().reshape((4, 256)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("candle.gguf");
    use candle_core::quantized::{GgmlDType, QTensor};
    let types = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];
    let tensors: Vec<_> = types
        .iter()
        .map(|dtype| (format!("{dtype:?}"), QTensor::quantize(&source, *dtype).expect("candle quantizes")))
        .collect();
    let named: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let value = gguf_file::Value::String("llama".to_owned());
    let mut file = std::fs::File::create(&path).unwrap();
    gguf_file::write(&mut file, &[("general.architecture", &value)], &named).unwrap();
    let ours = assert_same_gguf(&path);
    assert_eq!(ours.n_tensors(), WeightType::ALL.len());
    assert_eq!(ours.metadata().str("general.architecture").unwrap(), "llama");
}

/// Three tensors with bytes that tell them apart, as (name, type, shape, bytes).
fn tensors() -> Vec<(String, Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = |n: usize, step: u8| (0..n).map(|i| (i as u8).wrapping_mul(step)).collect::<Vec<_>>();
    vec![
        ("model.embed".to_owned(), Dtype::F32, vec![3, 4], bytes(48, 3)),
        ("model.norm".to_owned(), Dtype::BF16, vec![7], bytes(14, 5)),
        ("model.é \"quoted\"".to_owned(), Dtype::F16, vec![2, 2, 2], bytes(16, 7)),
    ]
}

fn safetensors_bytes(tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).expect("shape and bytes agree"))
    });
    let about = HashMap::from([("format".to_owned(), "pt\n".to_owned())]);
    safetensors::serialize(views, Some(about)).expect("the crate writes it")
}

fn assert_holds(ours: &Checkpoint, tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) {
    assert_eq!(ours.n_tensors(), tensors.len());
    for (name, dtype, shape, bytes) in tensors {
        let tensor = ours.tensor(name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(format!("{dtype:?}").to_lowercase(), tensor.weight_type().name());
        assert_eq!((tensor.shape(), tensor.data()), (shape.as_slice(), bytes.as_slice()), "{name}");
    }
}

#[test]
fn a_safetensors_file_is_what_the_crate_wrote_and_candle_reads() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    std::fs::write(&path, safetensors_bytes(&tensors())).unwrap();
    std::fs::write(directory.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    std::fs::write(directory.path().join("tokenizer.json"), "{}").unwrap();
    std::fs::write(directory.path().join("chat_template.jinja"), "{{ x }}").unwrap();

    let loaded = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    for opened in [Checkpoint::open(&path).unwrap(), Checkpoint::open(directory.path()).unwrap()] {
        assert_eq!(opened.format(), Format::Safetensors);
        assert_holds(&opened, &tensors());
        for (name, tensor) in &loaded {
            assert_eq!(opened.tensor(name).unwrap().shape(), tensor.dims());
        }
        assert_eq!(opened.config_json().unwrap()["model_type"], "llama");
        assert_eq!(opened.tokenizer_json(), Some(&b"{}"[..]));
        assert_eq!(opened.chat_template_jinja(), Some("{{ x }}"));
        assert!(opened.tokenizer_config_json().is_none() && opened.generation_config_json().is_none());
        assert!(opened.metadata().is_empty());
    }
    let numbers = loaded["model.embed"].to_vec2::<f32>().unwrap();
    let embed = Checkpoint::open(&path).unwrap();
    let row = embed.tensor("model.embed").unwrap().row(2);
    let row: Vec<u32> = row.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    assert_eq!(row, numbers[2].iter().map(|number| number.to_bits()).collect::<Vec<_>>());
}

#[test]
fn shards_are_one_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let all = tensors();
    let (first, second) = all.split_at(1);
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let mut weight_map = serde_json::Map::new();
    for (shard, name) in [first, second].iter().zip(names) {
        std::fs::write(directory.path().join(name), safetensors_bytes(shard)).unwrap();
        weight_map.extend(shard.iter().map(|tensor| (tensor.0.clone(), name.into())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 78}, "weight_map": weight_map});
    std::fs::write(directory.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::write(directory.path().join("config.json"), "{}").unwrap();
    assert_holds(&Checkpoint::open(directory.path()).unwrap(), &all);
}

#[test]
fn the_digest_tells_checkpoints_apart() {
    let digest = |bytes: Vec<u8>| Checkpoint::from_gguf_bytes(bytes).unwrap().digest();
    let file = samples::gguf().to_bytes().unwrap();
    assert_eq!(digest(file.clone()), digest(file.clone()));
    let mut other_weight = file.clone();
    let last = other_weight.iter().rposition(|byte| *byte == 4).unwrap();
    other_weight[last] = 5;
    assert_ne!(digest(file.clone()), digest(other_weight));
    assert_ne!(digest(file), digest(samples::gguf().metadata("more", 1u8).to_bytes().unwrap()));
    let config = |theta: u32| {
        let config = serde_json::json!({"rope_theta": theta});
        Checkpoint::from_safetensors_bytes(samples::valid_safetensors(), config).unwrap().digest()
    };
    assert_ne!(config(1), config(2));
}

#[test]
fn a_checkpoint_is_shared_between_threads() {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Checkpoint>();
}
