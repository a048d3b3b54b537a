//! The harness for tests with real processes: clusters, models, clients. It holds no tests.
//!
//! # Layout
//! * [`cluster`] – shards and a coordinator as child processes
//! * [`models`] – where model files are
//! * [`client`] – requests and collected answers
//! * [`program`] – the `paceline` executable, run to its end
//! * [`scrape`] – metrics and health by HTTP
//! * [`in_process`] – the services inside this process, on a model that takes no time
//! * [`hash_model`] – that model: its tokens tell whether the KV cache is right
//! * [`hostile_draft`] – a draft service of that model that is good, wrong, silent, dying or talks nonsense
//! * [`foreseeing_draft`] – the real draft service, around a double of a model that foresees that model's tokens
//! * [`corrupt_network`] – a proxy that flips bytes, leaves some out and cuts connections
//! * [`draft_load`] – requests without a pause while something happens to a draft service
//! * [`constrained`] – grammars over its vocabulary
//! * [`schedule`] – random requests, and what each gets when it runs alone
//! * [`soak`] – thousands of short requests, and what the process looks like after them
//! * [`bare_writes`] – what the system takes for writes alone
//! * [`load`] – the load generator
//! * [`random`] – numbers that follow from a seed
#![forbid(unsafe_code)]

pub mod bare_writes;
pub mod client;
pub mod cluster;
pub mod constrained;
pub mod corrupt_network;
pub mod draft_load;
pub mod foreseeing_draft;
pub mod hash_model;
pub mod hostile_draft;
pub mod in_process;
pub mod load;
pub mod models;
pub mod program;
pub mod random;
pub mod schedule;
pub mod scrape;
pub mod soak;

pub use client::{Generation, generate, greedy};
pub use cluster::{ClusterSpec, TestCluster};
pub use models::small_model;
