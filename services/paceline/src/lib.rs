//! The command line of Paceline. It starts services as processes and talks to them as any client does; it computes
//! nothing itself, but for measurements.
//!
//! # Layout
//! * [`cli`] – the command line and its dispatch
//! * [`commands`] – one file a command
//! * [`options`], [`draft_weights`], [`response_format`], [`device_memory`] – options that several commands share
//! * [`cluster`], [`supervisor`], [`process`], [`event`] – services as child processes
//! * [`answer`] – one generation as a client sees it
//! * [`catalogue`], [`cache`], [`pull`] – models by name, their files, fetching
//! * [`wheel`], [`hub`], [`assembly`] – the two kinds of sources, and the file they fill
//! * [`progress`], [`interrupt`], [`error`] – bars, signals, errors
#![forbid(unsafe_code)]

pub mod answer;
pub mod assembly;
pub mod cache;
pub mod catalogue;
pub mod cli;
pub mod cluster;
pub mod commands;
pub mod device_memory;
pub mod draft_weights;
pub mod error;
pub mod event;
pub mod hub;
pub mod interrupt;
pub mod options;
pub mod process;
pub mod progress;
pub mod pull;
pub mod response_format;
pub mod supervisor;
pub mod wheel;
