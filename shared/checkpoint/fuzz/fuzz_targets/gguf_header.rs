//! Any bytes as a GGUF file: read through or refused, never a panic.
#![no_main]

#[path = "../../tests/samples/mod.rs"]
mod samples;

use libfuzzer_sys::fuzz_target;
use paceline_checkpoint::Checkpoint;

fuzz_target!(|bytes: &[u8]| {
    match Checkpoint::from_gguf_bytes(bytes) {
        Ok(checkpoint) => {
            samples::read_everything(&checkpoint);
        }
        Err(error) => assert!(error.to_string().len() < 4096),
    }
});
