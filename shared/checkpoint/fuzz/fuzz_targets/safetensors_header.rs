//! Any bytes as a safetensors header (its length is put in front): read through or refused, never a panic, and what
//! is taken is valid for the safetensors crate too.
#![no_main]

#[path = "../../tests/samples/mod.rs"]
mod samples;

use libfuzzer_sys::fuzz_target;
use paceline_checkpoint::Checkpoint;

/// Bytes of data behind the header, so that small tensors fit.
const N_DATA_BYTES: usize = 66;

fuzz_target!(|header: &[u8]| {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.resize(file.len() + N_DATA_BYTES, 0);
    match Checkpoint::from_safetensors_bytes(file.clone(), serde_json::Value::Null) {
        Ok(checkpoint) => {
            samples::read_everything(&checkpoint);
            assert!(safetensors::SafeTensors::deserialize(&file).is_ok());
        }
        Err(error) => assert!(error.to_string().len() < 4096),
    }
});
