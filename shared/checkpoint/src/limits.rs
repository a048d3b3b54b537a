//! Every static limit on what a checkpoint may hold. Limits that follow from the size of the file are not here:
//! they are checked where a count is read.
//!
//! # Memory
//! Opening allocates at most 1.4 bytes for each byte of a GGUF file and at most 2 bytes for each byte of a
//! safetensors file (1.1 when no name is written with escapes), plus some KiB, however the header is made. Metadata
//! is kept as one copy of its bytes with four bytes of index per entry, so a numeric array stays as compact as in the
//! file; a tensor costs 32 bytes plus its name and its dimensions; each vector is allocated once, after the items
//! have been seen. The JSON files beside a safetensors file are bounded by their own limits below.

/// Longest string value of a GGUF file, in bytes (chat templates are the long ones).
pub const MAX_STRING_BYTES: u64 = 16 << 20;
/// Longest metadata key or tensor name, in bytes.
pub const MAX_NAME_BYTES: u64 = (64 << 10) - 1;
/// Deepest nesting of arrays in metadata.
pub const MAX_ARRAY_NESTING: usize = 4;
/// Most dimensions of a tensor.
pub const MAX_DIMS: usize = 4;
/// Smallest and largest alignment of tensor data in a GGUF file.
pub const ALIGNMENT_RANGE: std::ops::RangeInclusive<u32> = 8..=4096;
/// Alignment when a GGUF file does not say.
pub const DEFAULT_ALIGNMENT: u32 = 32;
/// Largest GGUF header (metadata and tensor directory), in bytes.
pub const MAX_GGUF_HEADER_BYTES: u64 = 1 << 30;
/// Largest safetensors header, and largest shard index, in bytes.
pub const MAX_SAFETENSORS_HEADER_BYTES: u64 = 16 << 20;
/// Most files one sharded checkpoint may name.
pub const MAX_SHARDS: usize = 1024;
/// Largest config.json, generation_config.json, tokenizer_config.json or chat_template.jinja, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Most values in one of these JSON files; a value takes up to 80 bytes of memory.
pub const MAX_CONFIG_VALUES: usize = 200_000;
/// Largest tokenizer.json, in bytes.
pub const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
