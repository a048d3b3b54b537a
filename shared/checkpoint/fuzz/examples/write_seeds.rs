//! Writes a few valid files into the corpus folders, for the fuzzers to start from.

#[path = "../../tests/samples/mod.rs"]
mod samples;

use std::path::Path;

use paceline_checkpoint::ValueType;
use paceline_domain::WeightType;
use samples::RawGguf;

fn main() -> std::io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let write = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(corpus.join(target))?;
        std::fs::write(corpus.join(target).join(name), bytes)
    };
    let small = paceline_checkpoint::GgufWriter::new().metadata("k", vec!["a", "b"]).tensor(
        "t",
        WeightType::F16,
        &[2, 2],
        vec![0; 8],
    );
    write("gguf_header", "all", &samples::gguf().to_bytes().expect("the sample is valid"))?;
    write("gguf_header", "small", &small.to_bytes().expect("the sample is valid"))?;
    let nested = RawGguf::new(0, 1).entry("k", ValueType::Array).array(ValueType::Array, 1);
    write("gguf_header", "nested", &nested.array(ValueType::Bool, 1).raw(&[1]).data(0))?;
    let file = samples::valid_safetensors();
    write("safetensors_header", "all", &file[8..file.len() - 66])
}
