//! Decoder models: what a checkpoint must hold, how it is split over ranks, and the forward pass that runs it.
//! It knows nothing of requests or services; tensors arrive as rows of a memory map and leave as logits.
//!
//! # Layout
//! * [`config`] – the shape of a decoder, checked; `config_gguf` and `config_json` read it
//! * [`names`] – the one table of tensors: names, shapes, which dimension is cut
//! * [`quantization`] – which matrices are quantized while they are loaded
//! * [`head_tokens`] – which tokens an output head is for
//! * [`split`] – which slice of every tensor each rank holds
//! * [`estimate`] – memory and exchanged bytes from shapes alone
//! * [`rope`] – frequencies of the rotary embedding
//! * [`weights`] – a rank's slices: rows of the file, and what a backend makes of them
//! * [`loader`] – the walk over the table, straight from the memory map
//! * [`batch`] – what goes into a forward pass
//! * [`logits`] – what comes out
//! * [`backend`] – what the forward pass asks of a device
//! * [`link`] – whether devices of a group reach each other without the host
//! * [`decoder`] – the forward pass, once for all backends
//! * [`cpu`] – the backend of CPUs
//! * [`fingerprint`] – what must be equal for two processes to compute the same bits
//! * [`synthetic`] – random models of any shape, for tests and measurements
//! * [`error`] – what can go wrong

#![forbid(unsafe_code)]

pub mod backend;
pub mod batch;
pub mod config;
mod config_gguf;
mod config_json;
pub mod cpu;
pub mod decoder;
pub mod error;
pub mod estimate;
pub mod fingerprint;
pub mod head_tokens;
pub mod link;
pub mod loader;
pub mod logits;
pub mod names;
pub mod quantization;
pub mod rope;
pub mod split;
pub mod synthetic;
pub mod weights;

pub use backend::{Backend, Device};
pub use batch::Batch;
pub use config::{Architecture, ModelConfig};
pub use cpu::Cpu;
pub use decoder::Decoder;
pub use error::ModelError;
pub use estimate::{Capacity, ConfigEstimate, DeviceFit, DeviceRoom, Dtype, MemoryEstimate};
pub use fingerprint::fingerprint;
pub use head_tokens::HeadTokens;
pub use loader::{LoadProgress, LoadSpec};
pub use logits::Logits;
pub use quantization::WeightTypes;
pub use split::{Share, SplitPlan};
