//! What the tests of this crate share: models, ways to run them, ranks as threads.

#![allow(dead_code)]

pub mod models;
pub mod reference;
pub mod rig;
pub mod threads;
pub mod transports;
