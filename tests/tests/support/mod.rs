//! What tests of the decoder on real models share.

#![allow(dead_code)]

pub mod golden_decoder;
#[path = "../../../shared/model/tests/support/rig.rs"]
pub mod rig;
#[path = "../../../shared/model/tests/support/threads.rs"]
pub mod threads;
#[path = "../../../shared/model/tests/support/transports.rs"]
pub mod transports;
