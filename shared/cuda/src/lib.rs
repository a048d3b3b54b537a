//! The forward pass on NVIDIA GPUs: kernels, packed weights, the backend that runs them. No model format, no service.
//!
//! # Layout
//! * [`runtime`] – what is asked of a device
//! * [`pack`] – weights in the order of the matrix kernels
//! * [`kernels`] – arguments and launches of the kernels
//! * [`backend`] – a rank's share of a model on a device, and the operations of a pass
//! * [`selftest`] – what a device must show
//! * [`error`] – what can go wrong

pub mod backend;
pub mod error;
pub mod kernels;
pub mod pack;
pub mod runtime;
pub mod selftest;

pub use error::CudaError;
pub use runtime::{DevicePtr, GraphId, Launch, Runtime};
