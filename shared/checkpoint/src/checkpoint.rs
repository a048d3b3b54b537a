//! Opens a checkpoint and answers for its tensors, metadata and digest. It reads no weights until a row is asked for.

use std::path::Path;
use std::sync::OnceLock;

use paceline_domain::Digest;
use serde_json::Value;

use crate::directory::{Directory, DirectorySize, Packing};
use crate::error::CheckpointError;
use crate::gguf;
use crate::limits::MAX_SAFETENSORS_HEADER_BYTES;
use crate::map::FileBytes;
use crate::metadata::Metadata;
use crate::safetensors;
use crate::shard_index;
use crate::sidecar::{self, Sidecars};
use crate::tensor::TensorView;

/// Bytes hashed at each end of a tensor for the digest.
const SAMPLE_BYTES: usize = 4096;

/// How the weights are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// One GGUF file that carries everything.
    Gguf,
    /// Safetensors with config.json beside.
    Safetensors,
}

/// An open checkpoint. The file is mapped, so clones of it are best shared by `Arc`.
pub struct Checkpoint {
    format: Format,
    metadata: Metadata,
    sidecars: Sidecars,
    files: Vec<WeightFile>,
    directory: Directory,
    digest: OnceLock<Digest>,
}

struct WeightFile {
    bytes: FileBytes,
    header_bytes: usize,
}

impl Checkpoint {
    /// Opens a `.gguf` file, a `.safetensors` file with config.json beside it, or a directory with config.json and
    /// `model.safetensors` or `model.safetensors.index.json` with its shards.
    ///
    /// # Errors
    /// Names the file, the key or tensor, and the offset; or says what to give instead.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let about = std::fs::metadata(path).map_err(|error| CheckpointError::io("open", path, error))?;
        if about.is_dir() {
            return Self::open_directory(path);
        }
        let bytes = FileBytes::map(path)?;
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if bytes.starts_with(&gguf::MAGIC) || extension.eq_ignore_ascii_case("gguf") {
            return Self::from_gguf(bytes).map_err(|error| error.in_file(path));
        }
        if !extension.eq_ignore_ascii_case("safetensors") {
            let why =
                "neither a GGUF nor a safetensors file; give one of those, or a directory with config.json";
            return Err(CheckpointError::unusable(path, why));
        }
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let sidecars = Sidecars::read(directory.unwrap_or(Path::new(".")))?;
        Self::from_safetensors(vec![bytes], sidecars).map_err(|(_, error)| error.in_file(path))
    }

    /// A GGUF file that is in memory.
    ///
    /// # Errors
    /// Names the key or tensor and the offset.
    pub fn from_gguf_bytes(bytes: impl Into<Box<[u8]>>) -> Result<Self, CheckpointError> {
        Self::from_gguf(FileBytes::Owned(bytes.into()))
    }

    /// A safetensors file that is in memory, with its config.json.
    ///
    /// # Errors
    /// Names the tensor and the offset.
    pub fn from_safetensors_bytes(
        bytes: impl Into<Box<[u8]>>,
        config: Value,
    ) -> Result<Self, CheckpointError> {
        let config_bytes = config.to_string().into_bytes();
        let sidecars = Sidecars { config: Some(config), config_bytes, ..Sidecars::default() };
        Self::from_safetensors(vec![FileBytes::Owned(bytes.into())], sidecars).map_err(|(_, error)| error)
    }

    fn from_gguf(bytes: FileBytes) -> Result<Self, CheckpointError> {
        let header = gguf::parse(&bytes)?;
        Ok(Self {
            format: Format::Gguf,
            metadata: header.metadata,
            sidecars: Sidecars::default(),
            files: vec![WeightFile { bytes, header_bytes: header.header_bytes }],
            directory: header.directory,
            digest: OnceLock::new(),
        })
    }

    /// An error comes with the index of the file it is in.
    fn from_safetensors(files: Vec<FileBytes>, sidecars: Sidecars) -> Result<Self, (usize, CheckpointError)> {
        let mut size = DirectorySize::default();
        let mut regions = Vec::with_capacity(files.len());
        for (i, file) in files.iter().enumerate() {
            regions.push(safetensors::regions(file).map_err(|error| (i, error))?);
            safetensors::walk(file, &mut |tensor| {
                size.add(tensor);
                Ok(())
            })
            .map_err(|error| (i, error))?;
        }
        let mut directory = Directory::with_capacity(&size);
        for (i, file) in files.iter().enumerate() {
            safetensors::walk(file, &mut |tensor| directory.push(tensor, i)).map_err(|error| (i, error))?;
        }
        let data: Vec<_> = regions.iter().map(|(_, data)| data.clone()).collect();
        let directory = directory.finish(&data, Packing::Contiguous)?;
        let headers = regions.into_iter().map(|(header_bytes, _)| header_bytes);
        let files = files.into_iter().zip(headers);
        Ok(Self {
            format: Format::Safetensors,
            metadata: Metadata::default(),
            sidecars,
            files: files.map(|(bytes, header_bytes)| WeightFile { bytes, header_bytes }).collect(),
            directory,
            digest: OnceLock::new(),
        })
    }

    fn open_directory(path: &Path) -> Result<Self, CheckpointError> {
        let sidecars = Sidecars::read(path)?;
        let single = path.join("model.safetensors");
        if single.exists() {
            let files = vec![FileBytes::map(&single)?];
            return Self::from_safetensors(files, sidecars).map_err(|(_, error)| error.in_file(&single));
        }
        let index_path = path.join("model.safetensors.index.json");
        let Some(index) = sidecar::read_limited(&index_path, MAX_SAFETENSORS_HEADER_BYTES)? else {
            let why = "neither model.safetensors nor model.safetensors.index.json is here; only safetensors weights \
                       are read from a directory";
            return Err(CheckpointError::unusable(path, why));
        };
        let shards = shard_index::shard_names(&index).map_err(|error| error.in_file(&index_path))?;
        let maps = shards.iter().map(|shard| FileBytes::map(&path.join(shard)));
        let files = maps.collect::<Result<Vec<_>, _>>()?;
        let checkpoint = Self::from_safetensors(files, sidecars)
            .map_err(|(i, error)| error.in_file(&path.join(&shards[i])))?;
        shard_index::confirm(&index, &shards, &checkpoint.directory)
            .map_err(|error| error.in_file(&index_path))?;
        Ok(checkpoint)
    }

    /// How the weights are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Metadata of a GGUF file; empty for safetensors.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// config.json; none for GGUF.
    pub fn config_json(&self) -> Option<&Value> {
        self.sidecars.config.as_ref()
    }

    /// generation_config.json, if there is one.
    pub fn generation_config_json(&self) -> Option<&Value> {
        self.sidecars.generation_config.as_ref()
    }

    /// Bytes of tokenizer.json, if there is one.
    pub fn tokenizer_json(&self) -> Option<&[u8]> {
        self.sidecars.tokenizer.as_deref()
    }

    /// tokenizer_config.json, if there is one.
    pub fn tokenizer_config_json(&self) -> Option<&Value> {
        self.sidecars.tokenizer_config.as_ref()
    }

    /// chat_template.jinja, if there is one; other checkpoints have the template in the tokenizer's configuration
    /// or the GGUF metadata.
    pub fn chat_template_jinja(&self) -> Option<&str> {
        self.sidecars.chat_template.as_deref()
    }

    /// Number of tensors.
    pub fn n_tensors(&self) -> usize {
        self.directory.len()
    }

    /// Names of all tensors, sorted.
    pub fn tensor_names(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.directory.len()).map(|i| self.directory.entry(i).name)
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        (0..self.directory.len()).map(|i| self.view(i))
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.directory.position(name).map(|i| self.view(i))
    }

    /// Takes a tensor's pages out of this process's resident memory, when they will hardly be read again.
    pub fn release(&self, name: &str) {
        if let Some(i) = self.directory.position(name) {
            let entry = self.directory.entry(i);
            self.files[entry.file_idx].bytes.release(entry.range.start as usize..entry.range.end as usize);
        }
    }

    fn view(&self, i: usize) -> TensorView<'_> {
        let entry = self.directory.entry(i);
        let range = entry.range.start as usize..entry.range.end as usize;
        let data = &self.files[entry.file_idx].bytes[range];
        TensorView { name: entry.name, weight_type: entry.weight_type, shape: entry.shape, data }
    }

    /// BLAKE3 over config.json, each file's length and header, and the first and last 4 KiB of every tensor in name
    /// order. Tells checkpoints apart in a handshake; it is no proof that a download is whole.
    pub fn digest(&self) -> Digest {
        *self.digest.get_or_init(|| {
            let mut hasher = blake3::Hasher::new();
            let mut part = |bytes: &[u8]| {
                hasher.update(&(bytes.len() as u64).to_le_bytes());
                hasher.update(bytes);
            };
            part(&self.sidecars.config_bytes);
            for file in &self.files {
                part(&(file.bytes.len() as u64).to_le_bytes());
                part(&file.bytes[..file.header_bytes]);
            }
            for tensor in self.tensors() {
                let data = tensor.data();
                part(&data[..data.len().min(SAMPLE_BYTES)]);
                part(&data[data.len().saturating_sub(SAMPLE_BYTES)..]);
            }
            Digest(*hasher.finalize().as_bytes())
        })
    }
}
