//! The harness for tests with real processes: clusters, models, clients. It holds no tests.
//!
//! # Layout
//! * [`cluster`] – shards and a coordinator as child processes
//! * [`models`] – where model files are
//! * [`client`] – requests and collected answers
//! * [`program`] – the `paceline` executable, run to its end
//! * [`load`] – the load generator
//! * [`random`] – numbers that follow from a seed
#![forbid(unsafe_code)]

pub mod client;
pub mod cluster;
pub mod load;
pub mod models;
pub mod program;
pub mod random;

pub use client::{Generation, generate, greedy};
pub use cluster::{ClusterSpec, TestCluster};
pub use models::small_model;
