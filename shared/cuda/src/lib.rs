//! The forward pass on NVIDIA GPUs: kernels, packed weights, the backend that runs them. No model format, no service.
//!
//! # Layout
//! * [`runtime`] – what is asked of a device
//! * [`error`] – what can go wrong
//! * [`kernels`] – launchers of the kernels
//!
//! With feature `driver`:
//! * `image` – what nvcc made of the kernels
//! * `driver` – a GPU through NVIDIA's driver library
//! * `nccl` – all-gather between GPUs through NVIDIA's NCCL library

#[cfg(feature = "driver")]
pub mod driver;
pub mod error;
#[cfg(feature = "driver")]
pub mod image;
pub mod kernels;
#[cfg(feature = "driver")]
pub mod nccl;
pub mod runtime;

#[cfg(feature = "driver")]
pub use driver::Driver;
pub use error::CudaError;
pub use runtime::{DevicePtr, GraphId, Launch, Runtime};
