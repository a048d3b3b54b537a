//! Writes random models to disk with bounded memory: what a file begins with follows from shapes, the rest is made
//! in chunks of rows by several threads and put where it belongs. The bytes do not depend on the threads.

use std::fs;
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use paceline_checkpoint::{CheckpointError, FileLayout, Format, NewFile};
use paceline_domain::WeightType;
use serde_json::json;

use super::tensors::{Tensor, tensors};
use super::{Synthetic, tokenizer};
use crate::ModelError;

/// Bytes that a thread makes before it writes them.
const CHUNK_BYTES: usize = 2 << 20;

/// Tensor data in safetensors files begins at a multiple of this, in bytes.
const DATA_ALIGNMENT: usize = 64;

/// How a model is written.
pub struct Writing<'a> {
    /// Threads that make weights.
    pub n_threads: usize,
    /// Gets the bytes done and the bytes in all, from any thread; `Break` ends the writing.
    pub progress: &'a (dyn Fn(u64, u64) -> ControlFlow<()> + Sync),
}

impl Writing<'_> {
    /// On the calling thread, without reports.
    pub fn plain() -> Self {
        Self { n_threads: 1, progress: &|_, _| ControlFlow::Continue(()) }
    }
}

/// What was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    /// Bytes of tensors, and of what tells where they are.
    pub n_bytes: u64,
    /// Numbers in all tensors.
    pub n_parameters: u64,
    /// Matrices whose rows are not whole blocks of the wanted type and that have another, for instance this one.
    pub replaced: Option<(usize, WeightType)>,
}

impl Synthetic {
    /// Writes the model as a GGUF file: the bytes of [`Self::to_gguf`].
    ///
    /// # Errors
    /// A shape that GGUF cannot hold, the file system's error, or `Interrupted` when the progress said so. Nothing
    /// stays then.
    pub fn write_gguf(&self, path: &Path, writing: &Writing<'_>) -> Result<Written, ModelError> {
        let tensors = tensors(self, Format::Gguf);
        let declared = tensors.iter().fold(self.gguf_header(), |writer, tensor| {
            writer.declare(&tensor.name, tensor.weight_type, &tensor.shape)
        });
        let layout = declared.layout()?;
        write_file(path, &layout, &tensors, writing)?;
        Ok(self.written(&tensors, layout.n_bytes))
    }

    /// Writes the model as a Hugging Face directory: model.safetensors, config.json, tokenizer.json and
    /// tokenizer_config.json. The directory is made when it is missing.
    ///
    /// # Errors
    /// A type that safetensors do not have, the file system's error, or `Interrupted` when the progress said so.
    /// A directory that was made for it does not stay then.
    pub fn write_directory(&self, directory: &Path, writing: &Writing<'_>) -> Result<Written, ModelError> {
        let tensors = tensors(self, Format::Safetensors);
        let layout = safetensors_layout(&tensors)?;
        let is_new = !directory.exists();
        if is_new {
            fs::create_dir(directory).map_err(|source| io_error("create", directory, source))?;
        }
        let small = tokenizer::hugging_face_files(self.config.n_vocab);
        let small = small.into_iter().chain([("config.json", self.config_json())]);
        let result = write_file(&directory.join("model.safetensors"), &layout, &tensors, writing)
            .and_then(|()| small.into_iter().try_for_each(|(name, json)| write_json(directory, name, &json)));
        if result.is_err() && is_new {
            // Best effort: the first error is the one to report.
            let _ = fs::remove_dir_all(directory);
        }
        result.map(|()| self.written(&tensors, layout.n_bytes))
    }

    fn written(&self, tensors: &[Tensor], n_bytes: u64) -> Written {
        let n_parameters = |tensor: &Tensor| tensor.shape.iter().map(|dim| *dim as u64).product::<u64>();
        let others: Vec<WeightType> = tensors.iter().filter_map(Tensor::replacement).collect();
        Written {
            n_bytes,
            n_parameters: tensors.iter().map(n_parameters).sum(),
            replaced: others.first().map(|first| (others.len(), *first)),
        }
    }
}

/// A file in the making, shared by the threads that fill it.
struct Filling<'a> {
    path: &'a Path,
    file: &'a NewFile,
    chunks: &'a [Chunk<'a>],
    next: AtomicUsize,
    n_done: AtomicU64,
    n_bytes: u64,
    writing: &'a Writing<'a>,
}

/// Some units of a tensor and where they lie in the file.
struct Chunk<'a> {
    tensor: &'a Tensor,
    units: Range<usize>,
    start: u64,
}

fn write_file(
    path: &Path,
    layout: &FileLayout,
    tensors: &[Tensor],
    writing: &Writing<'_>,
) -> Result<(), ModelError> {
    let file = NewFile::create(path)?;
    file.set_len(layout.n_bytes)?;
    file.write_at(&layout.header, 0)?;
    let chunks: Vec<Chunk<'_>> =
        tensors.iter().zip(&layout.starts).flat_map(|(tensor, start)| Chunk::of(tensor, *start)).collect();
    let header_bytes = layout.header.len() as u64;
    let n_done = AtomicU64::new(header_bytes);
    // Without the padding between tensors, which nobody writes.
    let n_bytes = header_bytes + tensors.iter().map(|tensor| tensor.n_bytes() as u64).sum::<u64>();
    let next = AtomicUsize::new(0);
    let filling = Filling { path, file: &file, chunks: &chunks, next, n_done, n_bytes, writing };
    let results: Vec<Result<(), CheckpointError>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..writing.n_threads.max(1)).map(|_| scope.spawn(|| filling.work())).collect();
        let join =
            |thread: thread::ScopedJoinHandle<'_, _>| thread.join().expect("invariant: filling never panics");
        threads.into_iter().map(join).collect()
    });
    results.into_iter().collect::<Result<(), _>>()?;
    Ok(file.commit()?)
}

impl<'a> Chunk<'a> {
    fn of(tensor: &'a Tensor, start: u64) -> impl Iterator<Item = Self> {
        let n_units = (CHUNK_BYTES / tensor.unit_bytes).max(1);
        (0..tensor.n_units).step_by(n_units).map(move |first| Self {
            tensor,
            units: first..(first + n_units).min(tensor.n_units),
            start: start + (first * tensor.unit_bytes) as u64,
        })
    }
}

impl Filling<'_> {
    /// Makes and writes chunks until none is left. After an error the other threads stop too.
    fn work(&self) -> Result<(), CheckpointError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunks.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            bytes.resize(chunk.units.len() * chunk.tensor.unit_bytes, 0);
            chunk.tensor.fill(chunk.units.clone(), &mut bytes);
            let n_bytes = bytes.len() as u64;
            let written = self.file.write_at(&bytes, chunk.start).and_then(|()| self.report(n_bytes));
            if written.is_err() {
                self.next.store(self.chunks.len(), Ordering::Relaxed);
                return written;
            }
        }
        Ok(())
    }

    fn report(&self, n_bytes: u64) -> Result<(), CheckpointError> {
        let n_done = self.n_done.fetch_add(n_bytes, Ordering::Relaxed) + n_bytes;
        match (self.writing.progress)(n_done, self.n_bytes) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(io_error("write", self.path, io::ErrorKind::Interrupted.into())),
        }
    }
}

fn write_json(directory: &Path, name: &str, json: &serde_json::Value) -> Result<(), ModelError> {
    let file = NewFile::create(directory.join(name))?;
    file.write_at(json.to_string().as_bytes(), 0)?;
    Ok(file.commit()?)
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> CheckpointError {
    CheckpointError::Io { action, path: path.to_owned(), source }
}

fn safetensors_layout(tensors: &[Tensor]) -> Result<FileLayout, ModelError> {
    let (mut header, mut starts, mut end) = (serde_json::Map::new(), Vec::new(), 0);
    // The transformers library asks for it.
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    for tensor in tensors {
        let dtype = match tensor.weight_type {
            WeightType::F32 => "F32",
            WeightType::F16 => "F16",
            WeightType::BF16 => "BF16",
            other => return Err(ModelError::Unfit(format!("safetensors have no {}", other.name()))),
        };
        starts.push(end as u64);
        let range = [end, end + tensor.n_bytes()];
        end = range[1];
        let entry = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": range });
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize((8 + header.len()).next_multiple_of(DATA_ALIGNMENT) - 8, b' ');
    let header = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
    starts.iter_mut().for_each(|start| *start += header.len() as u64);
    Ok(FileLayout { n_bytes: (header.len() + end) as u64, header, starts })
}
