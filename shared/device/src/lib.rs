//! What a process that runs a model computes with: the flags of shards and of the draft service, what the machine has,
//! and what is taken. Nothing is loaded here.
//!
//! # Layout
//! * [`choice`] – CPU or GPU
//! * [`cpu`] – threads and instruction set of the CPU
#![forbid(unsafe_code)]

pub mod choice;
pub mod cpu;

pub use choice::{DeviceChoice, DeviceOptions, GpuMemory, choose};
pub use cpu::{CpuOptions, IsaChoice};
