//! CPU kernels of Paceline: packed weights, attention, norms and the thread pool that runs them. No model, no IO.
//!
//! Every kernel has a scalar definition; its SIMD twins give the same bits, for any number of threads and any
//! batch. Lanes are output elements, or a fixed pattern of 16, never a choice made at run time.
//!
//! # Layout
//! * [`isa`] – the instruction sets kernels exist for
//! * `cache` – how large the nearest cache is
//! * `ahead` – how far ahead of the sums weights are fetched
//! * [`dispatch`] – the table of function pointers of one instruction set
//! * [`pool`] – the thread pool: one job at a time, tasks claimed one by one
//! * [`formats`] – what the blocks of every weight type mean
//! * [`quantize`] – activations as 8-bit or 16-bit codes with a scale for each 32
//! * [`packed`] – weights repacked into tiles of 16 interleaved rows
//! * [`linear`] – products of packed weights with activations
//! * [`error`] – why weights cannot be packed
//! * [`aligned`] – zeroed buffers on cache-line and huge-page boundaries
//! * `simd` – sixteen lanes of f32, the same operations in each instruction set
//! * [`math`] – exp, ln, sin, cos by fixed operations of ours
//! * [`elementwise`] – add, add a bias row, SiLU times up
//! * [`argmax`] – the largest value of a row
//! * [`rms_norm`] – RMSNorm
//! * [`residual`] – add, RMSNorm and quantize in one pass over a row
//! * [`rope`] – rotary position embedding
//! * [`kv`] – memory of the paged KV cache of one layer
//! * [`attention`] – paged attention over it
//! * [`machine`] – loops that show how fast the machine reads and multiplies

pub mod aligned;
pub mod argmax;
pub mod attention;
pub mod dispatch;
pub mod elementwise;
pub mod error;
pub mod formats;
pub mod isa;
pub mod kv;
pub mod linear;
pub mod machine;
pub mod math;
pub mod packed;
pub mod pool;
pub mod quantize;
pub mod residual;
pub mod rms_norm;
pub mod rope;

mod ahead;
mod cache;
mod simd;
#[cfg(test)]
mod testing;

pub use aligned::AlignedVec;
pub use dispatch::Kernels;
pub use error::KernelError;
pub use formats::dequantize_row;
pub use isa::Isa;
pub use linear::{GateUp, GatedOutput, Input, Product, gated_matmul, matmul};
pub use packed::{InputKind, PackSpec, PackedMatrix};
pub use pool::{Pinning, ThreadPool};
pub use quantize::{CodeBits, QuantizedRows, quantize_rows};

/// Version of the order of operations: part of a group's fingerprint. It grows when a kernel's scalar definition, or
/// the order in which the model uses kernels and leaves, comes to give other bits.
pub const NUMERICS: u32 = 4;
