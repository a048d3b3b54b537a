//! GGUF and safetensors files: hardened headers, a tensor directory, rows from the memory map. It knows names,
//! types, shapes and bytes; what an architecture needs and how a block is laid out inside are known elsewhere.
//!
//! Whatever a file holds, opening it ends in a checkpoint or in a [`CheckpointError`] that names the key or tensor
//! and the byte offset. Memory for a header is bounded by the file that carries it (see [`limits`]), and the time
//! is linear in the header but for sorting its names.
//!
//! # Layout
//! * [`checkpoint`] – opening a file or directory; the face of the crate
//! * [`tensor`] – one tensor's rows
//! * [`metadata`] – typed getters over the metadata of a GGUF file
//! * [`value`] – its values and arrays
//! * `gguf`, `safetensors`, `shard_index` – the three header parsers
//! * `cursor` – bounds-checked little-endian reading
//! * `json` – strict streaming reading of JSON
//! * `directory` – the compact sorted list of tensors and the checks over all of them
//! * `sidecar` – config.json and its neighbours
//! * `map` – the read-only memory map, the only unsafe lines
//! * [`writer`] – writes GGUF files
//! * [`new_file`] – a file that appears whole or not at all
//! * [`limits`] – every static limit
//! * [`error`] – everything that can be wrong

#![deny(unsafe_code)]

// Offsets and sizes of a file fit `usize`.
const _: () = assert!(usize::BITS == 64);

pub mod checkpoint;
mod cursor;
mod directory;
pub mod error;
mod gguf;
mod json;
pub mod limits;
mod map;
pub mod metadata;
pub mod new_file;
mod safetensors;
mod shard_index;
mod sidecar;
pub mod tensor;
pub mod value;
pub mod writer;

pub use checkpoint::{Checkpoint, Format};
pub use error::CheckpointError;
pub use metadata::Metadata;
pub use new_file::NewFile;
pub use tensor::TensorView;
pub use value::{Array, Value, ValueType};
pub use writer::{FileLayout, GgufWriter, MetadataValue};
