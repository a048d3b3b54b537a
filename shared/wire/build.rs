//! Generates the protobuf types with a compiler in Rust, so that no `protoc` is needed.

use std::{env, error::Error, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let protos = ["inference.proto", "shard.proto", "draft.proto"];
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    for proto in protos {
        println!("cargo::rerun-if-changed={}", root.join(proto).display());
    }
    let descriptors = protox::compile(protos, [&root])?;
    let out = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    std::fs::write(out, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
