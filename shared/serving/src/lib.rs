//! What services do alike as processes: flags about the parent process, listening, a gRPC server for other services of the
//! cluster, and its end. It knows no service.
//!
//! # Layout
//! * [`process`] – what a service and the process that started it tell each other
//! * [`internal`] – a gRPC server for other services of the cluster
#![forbid(unsafe_code)]

pub mod internal;
pub mod process;

pub use internal::{Internal, listen};
pub use process::ProcessOptions;
