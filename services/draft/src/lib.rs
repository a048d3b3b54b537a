//! The draft service: a small model that runs ahead of the target and says which tokens it expects. Its proposals are
//! advice; whatever it says, and whenever, no token changes. It serves several coordinators at once, in one batch.
//!
//! # Layout
//! * [`config`] – command-line flags and environment
//! * [`server`] – loads the model, listens, and ends cleanly
//! * [`service`] – the gRPC face: frames in and out, nothing else
//! * [`drafting`] – the thread that owns sessions and model
//! * [`sessions`] – pure: what is known of each sequence; commits in, proposals out
//! * [`planner`] – pure: which tokens of which sessions run in the next pass
//! * [`model`] – a pass of the model
//! * [`choice`] – pure: the token that a row of logits says
//! * [`vocabulary`] – pure: which tokens the output head is for
#![forbid(unsafe_code)]

pub mod choice;
pub mod config;
pub mod drafting;
pub mod model;
pub mod planner;
pub mod server;
pub mod service;
pub mod sessions;
pub mod vocabulary;

pub use config::Config;
pub use server::run;
