//! The tokenizer of random models: one token a byte, no merges, an end token; padding up to the model's vocabulary.

use paceline_checkpoint::MetadataValue;
use serde_json::{Value, json};

const END_TEXT: &str = "<|endoftext|>";

/// The id of the end token: after the bytes, or the last one of a vocabulary with no room for them.
pub(super) fn end(n_vocab: usize) -> usize {
    256.min(n_vocab - 1)
}

/// It as GGUF metadata.
pub(super) fn gguf_metadata(n_vocab: usize) -> Vec<(String, MetadataValue)> {
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const UNUSED: i32 = 5;
    let end = end(n_vocab);
    let token = |id: usize| match id {
        id if id == end => END_TEXT.to_string(),
        id if id < 256 => byte_symbol(id as u8).to_string(),
        id => format!("<|filler_{id}|>"),
    };
    let kind = |id: usize| {
        if id == end {
            CONTROL
        } else if id < 256 {
            NORMAL
        } else {
            UNUSED
        }
    };
    [
        ("model", "gpt2".into()),
        ("pre", "smollm".into()),
        ("tokens", (0..n_vocab).map(token).collect::<Vec<String>>().into()),
        ("token_type", (0..n_vocab).map(kind).collect::<Vec<i32>>().into()),
        ("merges", Vec::<String>::new().into()),
        ("bos_token_id", (end as u32).into()),
        ("eos_token_id", (end as u32).into()),
        ("add_bos_token", false.into()),
    ]
    .into_iter()
    .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
    .collect()
}

/// It as the files of a Hugging Face directory: names and contents. Padding is not spelled out there.
pub(super) fn hugging_face_files(n_vocab: usize) -> [(&'static str, Value); 2] {
    let end = end(n_vocab);
    let bytes: serde_json::Map<String, Value> =
        (0..end).map(|id| (byte_symbol(id as u8).to_string(), id.into())).collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true });
    let end_token = json!({
        "id": end, "content": END_TEXT, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false,
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [end_token], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": bytes, "merges": [],
        },
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_TEXT, "eos_token": END_TEXT,
        "add_bos_token": false, "clean_up_tokenization_spaces": false,
    });
    [("tokenizer.json", tokenizer), ("tokenizer_config.json", config)]
}

/// The printable stand-in of a byte in byte-level vocabularies: itself when printable in Latin-1, else the next
/// free character from U+0100 on (GPT-2's table).
fn byte_symbol(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|earlier| !printable(*earlier)).count() as u32;
    char::from_u32(0x100 + before).expect("invariant: U+0100.. are characters")
}
