//! A shard: one rank of a group. It owns its slice of the weights and the KV memory that belongs to it, and
//! executes the plans it is sent. It makes no decision: no clock, no scheduling, no abort of its own.
//!
//! # Layout
//! * [`config`] – command-line flags and environment
//! * [`server`] – listens, and ends cleanly
//! * [`service`] – the gRPC session: handshake, then plans in and results out
//! * [`executor`] – the thread that owns model, KV memory and collective
//! * [`ahead`] – tokens that plans leave open, because the step before samples them
//! * [`sequences`] – what a shard knows of each sequence
//! * [`masks`] – what constrained rows may choose, waited for
//! * [`scorer`] – log probabilities of prompt tokens on rank 0
//! * `sampled_rows` – what the token of a row depends on beside its logits
//! * [`sampler`] – from logits of all ranks to tokens on rank 0
#![forbid(unsafe_code)]

pub mod ahead;
pub mod config;
pub mod executor;
pub mod masks;
mod sampled_rows;
pub mod sampler;
pub mod scorer;
pub mod sequences;
pub mod server;
pub mod service;

pub use config::Config;
pub use paceline_device as device;
pub use server::{run, run_on};
