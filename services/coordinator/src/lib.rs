//! The coordinator: owns every request from validation to the last chunk. It never touches a tensor.
//!
//! # Layout, in the order a request meets it
//! * [`config`] – command-line flags and environment
//! * [`server`] – listens, starts a loop for each group, ends cleanly
//! * [`service`] – the gRPC face for clients
//! * [`caller`] – whose a request is, and until when it is wanted
//! * [`validate`] – protobuf to domain; every limit is checked here, once
//! * [`text`] – chat template and tokenizer, off the async threads
//! * [`admission`] – a place in the queue, or a refusal at once
//! * [`router`] – pure: which group gets a request
//! * [`groups`] – all groups as the rest of the process sees them
//! * [`constraint`] – grammars: compiled off the async threads, run off the loop
//! * [`engine`] – the one event loop of a group
//! * [`metrics`], [`http`] – numbers for Prometheus, and the port for them and for health
//! * [`deadlines`] – pure: which requests nobody wants any more
//! * [`scheduler`] – pure: which tokens of which sequences run in the next step
//! * [`ledger`] – pure: who holds which KV blocks, and which hold a known prefix
//! * [`prefix`] – pure: names of token prefixes
//! * [`id_map`] – pure: maps by ids of ours
//! * [`pool`] – pure: how many KV blocks a group has
//! * [`drafter`] – proposals for the next step, from the draft service and from the requests' own tokens
//! * [`shard_group`] – one stream to each rank
//! * [`output`] – tokens of one request to text, stop rules, chunks
//! * [`client`] – the choices of one request as one stream of chunks
//! * [`reader`] – chunks to a client, and what becomes of one that reads too slowly
#![forbid(unsafe_code)]

pub mod admission;
pub mod caller;
pub mod client;
pub mod config;
pub mod constraint;
pub mod deadlines;
pub mod drafter;
pub mod engine;
pub mod groups;
pub mod http;
pub mod id_map;
pub mod ledger;
pub mod metrics;
pub mod output;
pub mod pool;
pub mod prefix;
pub mod reader;
pub mod router;
pub mod scheduler;
pub mod server;
pub mod service;
pub mod shard_group;
pub mod text;
pub mod validate;

pub use config::Config;
pub use server::{run, run_on};
