//! The load generator: sends requests to a server as many clients would and says how long they waited. It knows servers
//! only by their protocol, so that a peer is measured by the same tool. It judges nothing.
//!
//! # Layout
//! * [`options`] – the command line
//! * [`prompts`] – a file of prompts to requests
//! * [`arrivals`] – when requests are sent, and which are broken off
//! * [`target`] – a server and its protocol; what became of one request
//! * [`grpc`], [`openai`], [`sse`] – the protocols
//! * [`driver`] – all requests of a run
//! * [`figures`] – percentiles, the table, the JSON object

pub mod arrivals;
pub mod driver;
pub mod figures;
pub mod grpc;
pub mod openai;
pub mod options;
pub mod prompts;
pub mod sse;
pub mod target;

pub use driver::{answers, run};
pub use options::Options;
