//! What the tests of this crate share: kernels compiled for the CPU, and the runtime that launches them.
#![allow(dead_code, reason = "every test uses a part")]

pub mod arrays;
pub mod compiled;
pub mod emulated;
pub mod pretended_link;
pub mod products;
