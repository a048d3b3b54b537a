//! Small files for the tests and fuzz targets: headers made by hand, field by field, and a reader of everything a
//! checkpoint offers. It checks nothing itself.

#![allow(dead_code)]

use paceline_checkpoint::{Array, Checkpoint, GgufWriter, MetadataValue, Value, ValueType};
use paceline_domain::WeightType;

/// A GGUF header under construction, right or wrong as the caller likes.
#[derive(Clone)]
pub struct RawGguf {
    pub bytes: Vec<u8>,
}

impl RawGguf {
    pub fn new(n_tensors: u64, n_entries: u64) -> Self {
        let raw = Self { bytes: b"GGUF".to_vec() };
        raw.u32(3).u64(n_tensors).u64(n_entries)
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self
    }

    pub fn u32(self, value: u32) -> Self {
        self.raw(&value.to_le_bytes())
    }

    pub fn u64(self, value: u64) -> Self {
        self.raw(&value.to_le_bytes())
    }

    pub fn string(self, text: &str) -> Self {
        self.u64(text.len() as u64).raw(text.as_bytes())
    }

    /// The key and type of an entry; its value follows.
    pub fn entry(self, key: &str, value_type: ValueType) -> Self {
        self.string(key).u32(value_type.code())
    }

    /// The front of an array; its elements follow.
    pub fn array(self, element_type: ValueType, len: u64) -> Self {
        self.u32(element_type.code()).u64(len)
    }

    /// A directory entry; `dims` innermost first, as in the file.
    pub fn tensor(self, name: &str, dims: &[u64], type_code: u32, start: u64) -> Self {
        let raw = self.string(name).u32(dims.len() as u32);
        dims.iter().fold(raw, |raw, dim| raw.u64(*dim)).u32(type_code).u64(start)
    }

    /// Pads to a multiple of 32 and adds `n_bytes` of data.
    pub fn data(mut self, n_bytes: usize) -> Vec<u8> {
        self.bytes.resize(self.bytes.len().next_multiple_of(32) + n_bytes, 7);
        self.bytes
    }
}

/// A valid GGUF file with every value type and several tensor types.
pub fn gguf() -> GgufWriter {
    let nested = |depth: usize| {
        (1..depth).fold(MetadataValue::from(vec![1u16, 2]), |inner, _| {
            MetadataValue::Array(ValueType::Array, vec![inner.clone(), inner])
        })
    };
    GgufWriter::new()
        .metadata("general.architecture", "llama")
        .metadata("general.alignment", 32u32)
        .metadata("a.u8", 200u8)
        .metadata("a.i8", -100i8)
        .metadata("a.u16", 60_000u16)
        .metadata("a.i16", -30_000i16)
        .metadata("a.i32", -7i32)
        .metadata("a.u64", u64::MAX)
        .metadata("a.i64", i64::MIN)
        .metadata("a.f32", 0.5f32)
        .metadata("a.f64", 0.1f64)
        .metadata("a.bool", true)
        .metadata("list.strings", vec!["", "é", "three"])
        .metadata("list.i32", vec![-1i32, 0, 1])
        .metadata("list.u32", vec![0u32, 7])
        .metadata("list.f32", vec![0.25f32, -3.0])
        .metadata("list.bool", vec![true, false])
        .metadata("list.u8", vec![9u8; 40])
        .metadata("list.empty", Vec::<u64>::new())
        .metadata("list.nested", nested(4))
        .tensor("token_embd.weight", WeightType::Q4_0, &[3, 64], vec![1; 3 * 36])
        .tensor("norm", WeightType::F32, &[5], vec![2; 20])
        .tensor("cube", WeightType::BF16, &[2, 3, 4], vec![3; 48])
        .tensor("k", WeightType::Q6_K, &[1, 1, 2, 256], vec![4; 420])
}

/// A safetensors file from the text of its header.
pub fn safetensors(header: &str, n_data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + n_data_bytes, 5);
    bytes
}

/// A valid safetensors file.
pub fn valid_safetensors() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
        "a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
        "n\u00e9":{"data_offsets":[16,64],"shape":[1,2,3,4],"dtype":"F16"},
        "scalar":{"dtype":"F16","shape":[],"data_offsets":[64,66]}}   "#;
    safetensors(header, 66)
}

/// Reads all a checkpoint offers. Returns a number that depends on all of it.
pub fn read_everything(checkpoint: &Checkpoint) -> usize {
    let metadata = checkpoint.metadata();
    let mut sum = checkpoint.digest().0[0].into();
    for key in metadata.keys() {
        sum += key.len() + metadata.get(key).map_or(0, read_value);
        sum += usize::from(metadata.u32(key).is_ok()) + usize::from(metadata.optional_bool(key).is_ok());
        sum += usize::from(metadata.f32(key).is_ok()) + usize::from(metadata.u64(key).is_ok());
        sum += metadata.i32s(key).map_or(0, |values| values.len());
        sum += metadata.u32s(key).map_or(0, |values| values.len());
        sum += metadata.f32s(key).map_or(0, |values| values.len());
        sum += metadata.str(key).map_or(0, str::len);
        sum += metadata.strings(key).map_or(0, |strings| strings.iter().map(str::len).sum());
    }
    for tensor in checkpoint.tensors() {
        assert_eq!(checkpoint.tensor(tensor.name()).expect("its name is listed").data(), tensor.data());
        assert_eq!(tensor.n_rows() * tensor.row_bytes(), tensor.data().len());
        assert_eq!(tensor.weight_type().row_bytes(tensor.n_cols()), Some(tensor.row_bytes()));
        sum += usize::from(tensor.row(0)[0]) + tensor.row(tensor.n_rows() - 1).len();
    }
    sum
}

fn read_value(value: Value<'_>) -> usize {
    match value {
        Value::Array(array) => read_array(array),
        Value::String(text) => text.len(),
        other => other.as_integer().is_some().into(),
    }
}

fn read_array(array: Array<'_>) -> usize {
    array.iter().map(read_value).sum()
}
