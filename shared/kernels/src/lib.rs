//! CPU kernels of Paceline: packed weights, attention, norms and the thread pool that runs them. No model, no IO.
//!
//! Every kernel has a scalar definition; its SIMD twins give the same bits, for any number of threads and any
//! batch. Lanes are output elements, or a fixed pattern of 16, never a choice made at run time.
//!
//! # Layout
//! * [`isa`] – the instruction sets kernels exist for
//! * [`dispatch`] – the table of function pointers of one instruction set
//! * [`pool`] – the thread pool: one job at a time, tasks claimed one by one

pub mod dispatch;
pub mod isa;
pub mod pool;

pub use dispatch::Kernels;
pub use isa::Isa;
pub use pool::{Pinning, ThreadPool};
