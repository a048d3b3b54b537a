//! One file for each thing that can be wrong with a header, and the error it must end in. Random faults are tested
//! elsewhere.

mod samples;

use paceline_checkpoint::{Checkpoint, CheckpointError as E, GgufWriter, MetadataValue, ValueType};
use paceline_domain::{ErrorKind, WeightType};
use samples::RawGguf;

fn gguf_error(bytes: Vec<u8>) -> E {
    let error = Checkpoint::from_gguf_bytes(bytes).err().expect("the file is refused");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    error
}

fn safetensors_error(bytes: Vec<u8>) -> E {
    Checkpoint::from_safetensors_bytes(bytes, serde_json::json!({})).err().expect("the file is refused")
}

/// A file with one metadata entry named `k` and no tensor.
fn with_entry(value_type: ValueType, value: impl FnOnce(RawGguf) -> RawGguf) -> Vec<u8> {
    value(RawGguf::new(0, 1).entry("k", value_type)).data(0)
}

const F32: u32 = 0;
const Q4_0: u32 = 2;

macro_rules! refused {
    ($file:expr, $error:pat $(if $condition:expr)?) => {
        let error = $file;
        assert!(matches!(&error, $error $(if $condition)?), "{error:?}: {error}");
    };
}

#[test]
fn fronts_of_gguf_files() {
    refused!(gguf_error(b"GGML\x03\0\0\0".to_vec()), E::BadMagic { found } if found == b"GGML");
    refused!(gguf_error(b"GG".to_vec()), E::Truncated { offset: 0, needed: 4, available: 2, .. });
    let with_version =
        |version: u32| b"GGUF".iter().copied().chain(version.to_le_bytes()).collect::<Vec<_>>();
    refused!(gguf_error(with_version(1)), E::UnsupportedVersion { version: 1 });
    refused!(gguf_error(with_version(4)), E::UnsupportedVersion { version: 4 });
    refused!(gguf_error(with_version(3u32.swap_bytes())), E::BigEndian { .. });
    refused!(
        gguf_error(RawGguf::new(u64::MAX, 0).data(0)),
        E::CountTooLarge { offset: 8, count: u64::MAX, .. }
    );
    refused!(gguf_error(RawGguf::new(0, 1 << 40).data(0)), E::CountTooLarge { offset: 16, max: 0, .. });
    refused!(
        gguf_error(RawGguf::new(0, 2).data(28)),
        E::EmptyName { .. } | E::TooLong { .. } | E::Truncated { .. }
    );
    assert!(Checkpoint::from_gguf_bytes(RawGguf::new(0, 0).bytes).is_ok(), "nothing in it is fine");
}

#[test]
fn metadata_of_gguf_files() {
    let key_at = 24;
    refused!(
        gguf_error(RawGguf::new(0, 1).u64(1 << 16).data(20)),
        E::TooLong { offset: 24, len: 65_536, limit: 65_535, .. }
    );
    refused!(gguf_error(RawGguf::new(0, 1).string("").data(20)), E::EmptyName { offset: 24, .. });
    refused!(gguf_error(RawGguf::new(0, 1).u64(2).raw(b"\xff\xff").data(20)), E::NotUtf8 { offset: 32, .. });
    refused!(gguf_error(RawGguf::new(0, 1).string("k").u32(13).data(0)),
        E::UnknownValueType { code: 13, offset, place } if *offset == key_at + 9 && place.contains("\"k\""));
    refused!(
        gguf_error(with_entry(ValueType::Bool, |raw| raw.raw(&[2]))),
        E::BadBool { byte: 2, offset: 37, .. }
    );
    refused!(
        gguf_error(with_entry(ValueType::String, |raw| raw.u64((16 << 20) + 1))),
        E::TooLong { len: 16_777_217, .. }
    );
    refused!(gguf_error(with_entry(ValueType::String, |raw| raw.u64(1000))),
        E::Truncated { needed: 1000, available: 19, place, .. } if place == "value of key \"k\"");
    refused!(
        gguf_error(
            with_entry(ValueType::String, |raw| raw.string("ok").raw(&[])).split_off(0)[..45].to_vec()
        ),
        E::Truncated { needed: 2, available: 0, .. }
    );
    for element_type in ValueType::ALL {
        refused!(
            gguf_error(with_entry(ValueType::Array, |raw| raw.array(element_type, u64::MAX / 2))),
            E::CountTooLarge { offset: 41, .. }
        );
    }
    refused!(
        gguf_error(with_entry(ValueType::Array, |raw| raw.array(ValueType::Bool, 3).raw(&[0, 1, 9]))),
        E::BadBool { byte: 9, offset: 51, .. }
    );
    refused!(gguf_error(with_entry(ValueType::Array, |raw| {
        (0..4).fold(raw, |raw, _| raw.array(ValueType::Array, 1)).array(ValueType::U8, 0)
    })), E::NestedTooDeep { limit: 4, offset, .. } if *offset == 37 + 4 * 12);
    let twice = RawGguf::new(0, 2).entry("k", ValueType::U8).raw(&[1]).entry("k", ValueType::U8).raw(&[2]);
    refused!(gguf_error(twice.data(0)), E::DuplicateKey { key, offset: 38 } if key == "\"k\"");
}

#[test]
fn alignments() {
    let with_alignment =
        |value: MetadataValue| GgufWriter::new().metadata("general.alignment", value).to_bytes().unwrap();
    for bad in [0u32, 1, 4, 33, 8192, u32::MAX] {
        refused!(gguf_error(with_alignment(bad.into())), E::BadAlignment { alignment } if *alignment == bad);
    }
    refused!(gguf_error(with_alignment("32".into())), E::WrongType { .. });
    refused!(gguf_error(with_alignment((-32i32).into())), E::OutOfRange { .. });
    for good in [8u32, 16, 4096] {
        assert!(Checkpoint::from_gguf_bytes(with_alignment(good.into())).is_ok());
    }
}

#[test]
fn tensors_of_gguf_files() {
    let one = |dims: &[u64], code, start, n_bytes| {
        gguf_error(RawGguf::new(1, 0).tensor("t", dims, code, start).data(n_bytes))
    };
    refused!(one(&[], F32, 0, 64), E::BadShape { offset: 24, why, .. } if why.contains("0 dimensions"));
    refused!(one(&[1; 5], F32, 0, 64), E::BadShape { why, .. } if why.contains("5 dimensions"));
    refused!(one(&[4, 0], F32, 0, 64), E::BadShape { why, .. } if why.contains("dimension 0 of shape [0, 4] is 0"));
    refused!(one(&[33], Q4_0, 0, 64), E::BadShape { why, .. } if why.contains("33 weights"));
    refused!(one(&[u64::MAX], F32, 0, 64), E::BadShape { why, .. } if why.contains("overflows"));
    refused!(one(&[1 << 32, 1 << 32], F32, 0, 64), E::BadShape { why, .. } if why.contains("overflows"));
    refused!(one(&[4], 4, 0, 64), E::UnknownTensorType { code: 4, offset: 45, tensor, .. } if tensor == "\"t\"");
    refused!(one(&[4], 16, 0, 64), E::UnknownTensorType { code: 16, known, .. } if known.contains("q6_k"));
    refused!(one(&[4], F32, 33, 64), E::UnalignedTensor { start: 33, alignment: 32, .. });
    refused!(one(&[4], F32, 64, 64), E::OutsideFile { start: 128, end: 144, data_end: 128, .. });
    refused!(one(&[17], F32, 0, 64), E::OutsideFile { start: 64, end: 132, .. });
    refused!(one(&[4], F32, u64::MAX - 31, 64), E::OutsideFile { .. });
    let two = |names: [&str; 2], starts: [u64; 2]| {
        let raw = RawGguf::new(2, 0).tensor(names[0], &[10], F32, starts[0]);
        gguf_error(raw.tensor(names[1], &[10], F32, starts[1]).data(256))
    };
    refused!(two(["a", "b"], [32, 0]), E::Overlap { tensor, other, start, end, offset: 24 }
        if tensor == "\"a\"" && other == "\"b\"" && start + 8 == *end);
    refused!(two(["a", "b"], [64, 64]), E::Overlap { .. });
    refused!(two(["a", "a"], [64, 0]), E::DuplicateTensor { offset: 57, .. });
    assert!(Checkpoint::from_gguf_bytes(RawGguf::new(1, 0).tensor("t", &[16], F32, 0).data(64)).is_ok());
}

#[test]
fn getters_name_the_key_and_both_types() {
    let file = Checkpoint::from_gguf_bytes(samples::gguf().to_bytes().unwrap()).unwrap();
    let metadata = file.metadata();
    assert_eq!((metadata.u32("a.u8").unwrap(), metadata.u64("a.u64").unwrap()), (200, u64::MAX));
    assert_eq!((metadata.f32("a.f32").unwrap(), metadata.f32("a.f64").unwrap()), (0.5, 0.1));
    assert_eq!(
        (metadata.bool("a.bool").unwrap(), metadata.str("general.architecture").unwrap()),
        (true, "llama")
    );
    assert_eq!(metadata.strings("list.strings").unwrap().iter().collect::<Vec<_>>(), ["", "é", "three"]);
    assert_eq!(metadata.i32s("list.i32").unwrap(), [-1, 0, 1]);
    assert_eq!(metadata.i32s("list.u32").unwrap(), [0, 7]);
    assert_eq!(metadata.u32s("list.u32").unwrap(), [0, 7]);
    assert_eq!(metadata.f32s("list.f32").unwrap(), [0.25, -3.0]);
    assert!(
        metadata.optional_u32("none").unwrap().is_none() && metadata.optional_str("none").unwrap().is_none()
    );
    let messages = [
        (metadata.u32("none").unwrap_err(), "key \"none\" is missing"),
        (metadata.u32("a.u64").unwrap_err(), "key \"a.u64\" is 18446744073709551615, which does not fit u32"),
        (metadata.u32("a.i8").unwrap_err(), "key \"a.i8\" is -100, which does not fit u32"),
        (metadata.optional_f32("a.i8").unwrap_err(), "key \"a.i8\" is of type i8; f32 is expected"),
        (metadata.str("list.u8").unwrap_err(), "key \"list.u8\" is an array of 40 u8; string is expected"),
        (metadata.strings("a.i8").unwrap_err(), "key \"a.i8\" is of type i8; an array of string is expected"),
        (
            metadata.u32s("list.i32").unwrap_err(),
            "key \"list.i32\" is -1, which does not fit an array of u32",
        ),
    ];
    for (error, message) in messages {
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let tensor = |name: &str, shape: &[usize], n_bytes| {
        let writer = GgufWriter::new().tensor(name, WeightType::Q8_0, shape, vec![0; n_bytes]);
        writer.to_bytes().expect_err("it is refused").to_string()
    };
    assert!(tensor("t", &[2, 32], 67).contains("shape [2, 32] needs 68 bytes, not 67"));
    assert!(tensor("t", &[2, 31], 68).contains("not a multiple of q8_0's block of 32"));
    assert!(tensor("t", &[], 68).contains("no dimension"));
    assert!(tensor("", &[2, 32], 68).contains("0 bytes long"));
    let mixed = MetadataValue::Array(ValueType::U8, vec![1u8.into(), 1i8.into()]);
    refused!(GgufWriter::new().metadata("k", mixed).to_bytes().unwrap_err(), E::Unwritable { .. });
}

#[test]
fn headers_of_safetensors_files() {
    let refuse = |header: &str, n_bytes| safetensors_error(samples::safetensors(header, n_bytes));
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    refused!(safetensors_error(vec![1, 2, 3]), E::Truncated { needed: 8, available: 3, .. });
    refused!(
        safetensors_error(((16u64 << 20) + 1).to_le_bytes().to_vec()),
        E::TooLong { len: 16_777_217, .. }
    );
    refused!(safetensors_error(100u64.to_le_bytes().to_vec()), E::Truncated { offset: 8, needed: 100, .. });
    refused!(refuse("{\"\u{1}\":1}", 0), E::BadJson { offset: 10, .. });
    refused!(refuse(" {}", 0), E::BadJson { offset: 8, .. });
    refused!(refuse("{} {", 0), E::BadJson { offset: 11, .. });
    let mut not_utf8 = samples::safetensors("{\"x\":0}", 0);
    not_utf8[10] = 0xff;
    refused!(safetensors_error(not_utf8), E::NotUtf8 { offset: 10, .. });
    refused!(refuse(&tensor("I64", "[1]", "[0,8]"), 8), E::UnsupportedDtype { tensor, dtype, offset: 9 }
        if tensor == "\"t\"" && dtype == "\"I64\"");
    refused!(refuse(&tensor("F32", "[1,1,1,1,1]", "[0,4]"), 4), E::BadShape { .. });
    refused!(refuse(&tensor("F32", "[0]", "[0,0]"), 0), E::BadShape { why, .. } if why.contains("is 0"));
    refused!(refuse(&tensor("F32", "[4294967296,4294967296]", "[0,4]"), 4), E::BadShape { .. });
    refused!(refuse(&tensor("F32", "[2]", "[0,4]"), 8), E::BadShape { why, .. } if why.contains("needs 8 bytes"));
    refused!(refuse(&tensor("F32", "[2]", "[8,0]"), 8), E::OutsideFile { .. });
    refused!(refuse(&tensor("F32", "[2]", "[0,8]"), 4), E::OutsideFile { .. });
    refused!(refuse(&tensor("F32", "[1.0]", "[0,4]"), 4), E::BadJson { .. });
    refused!(refuse(&tensor("F32", "[-1]", "[0,4]"), 4), E::BadJson { .. });
    refused!(refuse(&tensor("F32", "[1]", "[0,4,4]"), 4), E::BadJson { .. });
    refused!(refuse(&tensor("F32", "[1]", "[18446744073709551616,4]"), 4), E::BadJson { .. });
    refused!(refuse(&tensor("F32", "[1]", "[0,4]"), 5), E::Hole { .. });
    refused!(refuse(&tensor("F32", "[1]", "[1,5]"), 5), E::Hole { .. });
    refused!(refuse(r#"{"t":{"dtype":"F32","shape":[1]}}"#, 4), E::BadJson { why, .. } if why.contains("no data_offsets"));
    refused!(refuse(r#"{"t":{"dtype":"F32","dtype":"F32"}}"#, 4), E::BadJson { why, .. } if why.contains("twice"));
    refused!(refuse(r#"{"t":{"dtyp":"F32"}}"#, 4), E::BadJson { .. });
    refused!(refuse(r#"{"":{}}"#, 4), E::EmptyName { .. });
    refused!(refuse(r#"{"__metadata__":{"a":1}}"#, 0), E::BadJson { .. });
    refused!(refuse(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), E::BadJson { .. });
    refused!(refuse(&format!("{{\"{}\":0}}", "n".repeat(1 << 16)), 0), E::TooLong { len: 65_536, .. });
    refused!(refuse(&format!("{{\"\\n{}\":0}}", "n".repeat(1 << 16)), 0), E::TooLong { len: 65_537, .. });
    let pair = |names: [&str; 2], offsets: [&str; 2]| {
        let entry = |i: usize| {
            format!(r#""{}":{{"dtype":"F16","shape":[2],"data_offsets":{}}}"#, names[i], offsets[i])
        };
        refuse(&format!("{{{},{}}}", entry(0), entry(1)), 8)
    };
    refused!(pair(["a", "b"], ["[0,4]", "[2,6]"]), E::Overlap { tensor, .. } if tensor == "\"b\"");
    refused!(pair(["a", "\\u0061"], ["[0,4]", "[4,8]"]), E::DuplicateTensor { tensor, .. } if tensor == "\"a\"");
}
