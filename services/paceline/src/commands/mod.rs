//! The commands, one file each.

pub mod bench;
pub mod chat;
pub mod estimate;
pub mod generate;
pub mod models;
pub mod plan;
pub mod run;
pub mod service;
pub mod synth;
pub mod up;
