//! Tokenizers from tokenizer.json: the same ids as from GGUF, and errors for what is not supported.

use std::path::Path;

use paceline_checkpoint::{Checkpoint, GgufWriter};
use paceline_domain::TokenId;
use paceline_text::{ChatTemplate, ControlText, SpecialTokens, TextError, Tokenizer};
use serde_json::{Value, json};

use crate::fixture::{self, Gguf};
use crate::golden;

/// A safetensors checkpoint in a folder: one tensor of one number, config.json, and the files given.
fn folder(files: &[(&str, &Value)]) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let write =
        |name: &str, bytes: &[u8]| std::fs::write(Path::new(folder.path()).join(name), bytes).unwrap();
    let header = r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let padded = format!("{header:<64}");
    write("model.safetensors", &[&64u64.to_le_bytes(), padded.as_bytes(), &[0; 4]].concat());
    write("config.json", br#"{"architectures":["LlamaForCausalLM"],"eos_token_id":[0,2]}"#);
    for (name, value) in files {
        write(name, value.to_string().as_bytes());
    }
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

fn tokenizer(file: &Value) -> Result<Tokenizer, TextError> {
    Tokenizer::from_checkpoint(&folder(&[("tokenizer.json", file)]).1)
}

/// The tokenizer of a GGUF file of the SmolLM2 family as its makers would write it to tokenizer.json.
fn smollm2_json(checkpoint: &Checkpoint) -> Value {
    let metadata = checkpoint.metadata();
    let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap();
    let types = metadata.i32s("tokenizer.ggml.token_type").unwrap();
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, text)| (text.to_owned(), id.into())).collect();
    let added: Vec<Value> = tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| types[*id] == 3)
        .map(|(id, text)| {
            json!({"id": id, "content": text, "special": true, "normalized": false,
                   "single_word": false, "lstrip": false, "rstrip": false})
        })
        .collect();
    json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab,
                  "merges": metadata.strings("tokenizer.ggml.merges").unwrap().iter().collect::<Vec<_>>()},
    })
}

#[test]
fn smollm2_has_the_same_ids_from_both_files() {
    let gguf = fixture::model(fixture::SMOLLM2);
    let from_gguf = Tokenizer::from_checkpoint(&gguf).unwrap();
    let config = json!({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}});
    let file = smollm2_json(&gguf);
    let (_folder, checkpoint) = folder(&[("tokenizer.json", &file), ("tokenizer_config.json", &config)]);
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint).unwrap();
    let texts = fixture::strings(&fixture::golden("texts.json"));
    golden::check(&tokenizer, &texts, &fixture::golden("smollm2-135m-instruct.json")["cases"]);
    assert_eq!(tokenizer.digest(), from_gguf.digest());
    assert_eq!(tokenizer.eos_tokens(), [TokenId(0), TokenId(2)]);
    assert_eq!((tokenizer.bos(), tokenizer.adds_bos()), (Some(TokenId(1)), false));
}

/// Pre-tokenizers and normalizers as the makers of SmolLM2, Qwen 2, Llama 3 and GPT-2 write them, on SmolLM2's
/// vocabulary, and one that only the library knows.
#[test]
fn published_pipelines_equal_the_library() {
    let texts = fixture::strings(&fixture::golden("texts.json"));
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let split = |digits: &str| {
        let regex = format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        let split =
            json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, bytes]})
    };
    let gpt2 =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let nfc = json!({"type": "NFC"});
    let pipelines = [
        ("smollm2", Value::Null, Value::Null, false),
        ("qwen2", nfc.clone(), split(r"\p{N}"), false),
        ("llama3", Value::Null, split(r"\p{N}{1,3}"), true),
        ("gpt2", nfc, gpt2, false),
        ("other", Value::Null, split(r"\p{N}{2}"), false),
    ];
    let base = smollm2_json(&fixture::model(fixture::SMOLLM2));
    for (name, normalizer, pre_tokenizer, ignore_merges) in pipelines {
        let mut file = base.clone();
        file["normalizer"] = normalizer;
        if !pre_tokenizer.is_null() {
            file["pre_tokenizer"] = pre_tokenizer;
        }
        file["model"]["ignore_merges"] = ignore_merges.into();
        let tokenizer = tokenizer(&file).unwrap();
        let library = tokenizers::Tokenizer::from_bytes(file.to_string()).unwrap();
        for text in &texts {
            let expected = library.encode_fast(text.as_str(), false).unwrap();
            let tokens = tokenizer.encode(text, SpecialTokens::Parse).unwrap();
            assert!(tokens.iter().map(|token| &token.0).eq(expected.get_ids()), "{name} {text:?}");
        }
    }
}

/// The library's own regular expressions have a step limit, after which they silently stop cutting: long runs must
/// not reach it.
#[test]
fn long_runs_have_the_same_ids_from_both_files() {
    let gguf = fixture::model(fixture::SMOLLM2);
    let from_gguf = Tokenizer::from_checkpoint(&gguf).unwrap();
    let tokenizer = tokenizer(&smollm2_json(&gguf)).unwrap();
    for unit in [" ", "a", "\n", "😀", "1", "<|im_end"] {
        let text = unit.repeat((1 << 20) / unit.len()) + "x y";
        let start = std::time::Instant::now();
        let tokens = tokenizer.encode(&text, SpecialTokens::Parse).unwrap();
        println!("tokenizer.json {unit:?}: {} tokens in {:?}", tokens.len(), start.elapsed());
        assert!(tokens == from_gguf.encode(&text, SpecialTokens::Parse).unwrap(), "{unit:?}");
    }
}

/// A tiny Llama-2-like file: byte fallback, a space before the text, a post-processor that adds `<s>`.
fn llama2_json() -> Value {
    let mut vocab = serde_json::Map::new();
    for (id, text) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        vocab.insert(text.into(), id.into());
    }
    for byte in 0..=255 {
        vocab.insert(format!("<0x{byte:02X}>"), (3 + byte).into());
    }
    for (i, text) in ["▁", "H", "i", "Hi", "▁Hi", "<", "s", ">"].into_iter().enumerate() {
        vocab.insert(text.into(), (259 + i).into());
    }
    let added = |id, content| {
        json!({"id": id, "content": content, "special": true, "normalized": false,
               "single_word": false, "lstrip": false, "rstrip": false})
    };
    json!({
        "version": "1.0",
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                  "vocab": vocab, "merges": ["H i", "▁ Hi"]},
    })
}

#[test]
fn byte_fallback_space_prefix_and_bos() {
    let config = json!({"bos_token": "<s>", "eos_token": "</s>",
        "chat_template": [{"name": "tool_use", "template": "no"},
                          {"name": "default", "template": "{{ bos_token }}Hi{{ eos_token }}"}]});
    let file = llama2_json();
    let (_folder, checkpoint) = folder(&[("tokenizer.json", &file), ("tokenizer_config.json", &config)]);
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint).unwrap();
    let prompt = tokenizer.encode_prompt("Hi é", SpecialTokens::Parse).unwrap();
    assert_eq!(prompt, [1, 263, 259, 3 + 0xc3, 3 + 0xa9].map(TokenId));
    assert_eq!(tokenizer.decode(&prompt, ControlText::Skip), "Hi é");
    let literal = tokenizer.encode("<s>", SpecialTokens::Literal).unwrap();
    assert_eq!(literal, [259, 264, 265, 266].map(TokenId));
    assert_eq!(tokenizer.encode("<s>", SpecialTokens::Parse).unwrap(), [TokenId(1)]);
    assert!(tokenizer.adds_bos());
    let template = ChatTemplate::from_checkpoint(&checkpoint).unwrap().unwrap();
    assert_eq!(template.render(&[], paceline_text::AddGenerationPrompt::Yes).unwrap(), "<s>Hi</s>");
    let config = json!({"bos_token": "<s>", "add_bos_token": false});
    let (_folder, checkpoint) = folder(&[("tokenizer.json", &file), ("tokenizer_config.json", &config)]);
    assert!(!Tokenizer::from_checkpoint(&checkpoint).unwrap().adds_bos());
    assert!(ChatTemplate::from_checkpoint(&checkpoint).unwrap().is_none());
}

#[test]
fn what_is_not_supported_or_broken_is_named() {
    let change = |pointer: &str, value: Value| {
        let mut file = llama2_json();
        *file.pointer_mut(pointer).unwrap() = value;
        tokenizer(&file).err().map_or("no error".into(), |error| error.to_string())
    };
    let cases = [
        ("/model/type", json!("Unigram"), "\"Unigram\" is not supported"),
        ("/model", json!(null), "is not supported"),
        ("/decoder", json!({"type": "WordPiece"}), "\"WordPiece\" is not supported"),
        ("/model/vocab/H", json!(261), "both have id 261"),
        ("/model/vocab/H", json!(4_000_000_000u32), "too large"),
        ("/model/vocab/H", json!("x"), "tokenizer.json"),
        ("/model/merges/0", json!("H"), "tokenizer.json"),
        ("/model/merges/0", json!("H nope"), "tokenizer.json"),
        (
            "/pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}),
            "tokenizer.json",
        ),
    ];
    for (pointer, value, expected) in cases {
        let message = change(pointer, value);
        assert!(message.contains(expected), "{pointer}: {message}");
    }
    let mut affixed = llama2_json();
    affixed["model"]["continuing_subword_prefix"] = json!("a long prefix that no token has");
    assert!(tokenizer(&affixed).err().unwrap().to_string().contains("affix"));
    assert!(matches!(Tokenizer::from_checkpoint(&folder(&[]).1), Err(TextError::NoTokenizer)));
    let config = json!({"eos_token_id": 100_000});
    let files = [("tokenizer.json", &llama2_json()), ("generation_config.json", &config)];
    let error = Tokenizer::from_checkpoint(&folder(&files).1).err().unwrap().to_string();
    assert!(error.contains("100000"), "{error}");
}

#[test]
fn a_gguf_file_without_tokenizer_is_told() {
    let bytes = GgufWriter::new().metadata("general.architecture", "llama").to_bytes().unwrap();
    let checkpoint = Checkpoint::from_gguf_bytes(bytes).unwrap();
    assert!(matches!(Tokenizer::from_checkpoint(&checkpoint), Err(TextError::NoTokenizer)));
    assert!(ChatTemplate::from_checkpoint(&checkpoint).unwrap().is_none());
    let template =
        Gguf::byte_level().with("tokenizer.chat_template", "{{ eos_token }}{{ bos_token }}").checkpoint();
    let template = ChatTemplate::from_checkpoint(&template).unwrap().unwrap();
    assert_eq!(template.render(&[], paceline_text::AddGenerationPrompt::No).unwrap(), "<|end|><|begin|>");
}
