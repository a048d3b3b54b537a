//! The forward pass on NVIDIA GPUs: kernels, packed weights, the backend that runs them. No model format, no service.
//!
//! # Layout
//! * [`runtime`] – what is asked of a device
//! * [`pack`] – weights in the order of the matrix kernels
//! * [`kernels`] – arguments and launches of the kernels
//! * [`backend`] – a rank's share of a model on a device, and the operations of a pass
//! * [`selftest`] – what a device must show
//! * [`error`] – what can go wrong
//!
//! With feature `driver`:
//! * `image` – what nvcc made of the kernels
//! * `driver` – a GPU through NVIDIA's driver library
//! * `gpu` – a GPU as a device of the decoder
//! * `nccl` – all-gather between GPUs through NVIDIA's NCCL library

pub mod backend;
#[cfg(feature = "driver")]
pub mod driver;
pub mod error;
#[cfg(feature = "driver")]
pub mod gpu;
#[cfg(feature = "driver")]
pub mod image;
pub mod kernels;
#[cfg(feature = "driver")]
pub mod nccl;
pub mod pack;
pub mod runtime;
pub mod selftest;

#[cfg(feature = "driver")]
pub use driver::Driver;
pub use error::CudaError;
#[cfg(feature = "driver")]
pub use gpu::Gpu;
pub use runtime::{DevicePtr, GraphId, Launch, Runtime};
