//! Decoder models: what a checkpoint must hold, how it is split over ranks, and the forward pass that runs it.
//! It knows nothing of requests, sampling or services; tensors arrive as rows of a memory map and leave as logits.
//!
//! # Layout
//! * [`config`] – the shape of a decoder, checked; `config_gguf` and `config_json` read it
//! * [`names`] – the one table of tensors: names, shapes, which dimension is cut
//! * [`split`] – which slice of every tensor each rank holds
//! * [`estimate`] – memory and exchanged bytes from shapes alone
//! * [`rope`] – frequencies of the rotary embedding
//! * [`weights`] – a rank's slices, packed straight from the memory map
//! * [`kv_store`] – the paged KV memory of all layers
//! * [`batch`] – what goes into a forward pass and what comes out
//! * `activation_bits` – how fine activations are quantized
//! * `scratch` – the buffers of a forward pass, allocated once
//! * [`decoder`] – the forward pass
//! * [`fingerprint`] – what must be equal for two processes to compute the same bits
//! * [`synthetic`] – random models of any shape, for tests and measurements
//! * [`error`] – what can go wrong

#![forbid(unsafe_code)]

mod activation_bits;
pub mod batch;
pub mod config;
mod config_gguf;
mod config_json;
pub mod decoder;
pub mod error;
pub mod estimate;
pub mod fingerprint;
pub mod kv_store;
pub mod names;
pub mod rope;
mod scratch;
pub mod split;
pub mod synthetic;
pub mod weights;

pub use batch::{Batch, Logits};
pub use config::{Architecture, ModelConfig};
pub use decoder::{Decoder, LoadSpec};
pub use error::ModelError;
pub use estimate::{Capacity, ConfigEstimate, DeviceFit, Dtype, MemoryEstimate};
pub use fingerprint::fingerprint;
pub use split::{Share, SplitPlan};
pub use weights::LoadProgress;
