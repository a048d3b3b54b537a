//! The forward pass on NVIDIA GPUs: kernels, packed weights, the backend that runs them. No model format, no service.
//!
//! # Layout
//! * [`runtime`] – what is asked of a device
//! * [`pack`] – weights in the order of the matrix kernels
//! * [`kernels`] – arguments and launches of the kernels
//! * [`error`] – what can go wrong

pub mod error;
pub mod kernels;
pub mod pack;
pub mod runtime;

pub use error::CudaError;
pub use runtime::{DevicePtr, GraphId, Launch, Runtime};
