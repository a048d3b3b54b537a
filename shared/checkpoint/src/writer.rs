//! Writes GGUF files (version 3, little-endian, alignment 32): for small random models in tests and for synthetic
//! ones. It does not quantize; tensors come as bytes, or are declared and written by somebody else.

use std::path::Path;

use paceline_domain::WeightType;

use crate::directory::data_bytes;
use crate::error::{CheckpointError, quoted};
use crate::gguf::MAGIC;
use crate::limits::{DEFAULT_ALIGNMENT, MAX_NAME_BYTES};
use crate::new_file::NewFile;
use crate::value::ValueType;

const VERSION: u32 = 3;

/// A metadata value to write. `From` makes one from numbers, strings and vectors of them.
#[derive(Clone, PartialEq, Debug)]
#[allow(missing_docs)]
pub enum MetadataValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    /// Elements that are all of one type, which an empty array has too.
    Array(ValueType, Vec<MetadataValue>),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A GGUF file in the making.
#[derive(Default)]
pub struct GgufWriter {
    metadata: Vec<(String, MetadataValue)>,
    tensors: Vec<WriterTensor>,
}

/// Where everything lies in a file of tensors. Bytes that belong to nothing are zero.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileLayout {
    /// What the file begins with: all that comes before the data of tensors.
    pub header: Vec<u8>,
    /// First byte of each tensor's data, in the order in which they were added.
    pub starts: Vec<u64>,
    /// Bytes of the file.
    pub n_bytes: u64,
}

struct WriterTensor {
    name: String,
    weight_type: WeightType,
    shape: Vec<usize>,
    /// Absent when only declared.
    data: Option<Vec<u8>>,
}

macro_rules! from_scalar {
    ($($variant:ident($scalar:ty)),*) => {$(
        impl From<$scalar> for MetadataValue {
            fn from(value: $scalar) -> Self {
                Self::$variant(value.into())
            }
        }

        impl From<Vec<$scalar>> for MetadataValue {
            fn from(values: Vec<$scalar>) -> Self {
                Self::Array(ValueType::$variant, values.into_iter().map(Self::from).collect())
            }
        }
    )*};
}

from_scalar!(U8(u8), I8(i8), U16(u16), I16(i16), U32(u32), I32(i32), U64(u64), I64(i64), F32(f32), F64(f64));
from_scalar!(Bool(bool), String(String), String(&str));

impl MetadataValue {
    fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(..) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    fn write(&self, key: &str, out: &mut Vec<u8>) -> Result<(), CheckpointError> {
        match self {
            Self::U8(value) => out.push(*value),
            Self::I8(value) => out.extend(value.to_le_bytes()),
            Self::U16(value) => out.extend(value.to_le_bytes()),
            Self::I16(value) => out.extend(value.to_le_bytes()),
            Self::U32(value) => out.extend(value.to_le_bytes()),
            Self::I32(value) => out.extend(value.to_le_bytes()),
            Self::F32(value) => out.extend(value.to_le_bytes()),
            Self::Bool(value) => out.push(u8::from(*value)),
            Self::String(value) => write_string(value, out),
            Self::U64(value) => out.extend(value.to_le_bytes()),
            Self::I64(value) => out.extend(value.to_le_bytes()),
            Self::F64(value) => out.extend(value.to_le_bytes()),
            Self::Array(element_type, elements) => {
                out.extend(element_type.code().to_le_bytes());
                out.extend((elements.len() as u64).to_le_bytes());
                for element in elements {
                    if element.value_type() != *element_type {
                        let (is, not) = (element.value_type().name(), element_type.name());
                        let why = format!("an element is {is} in an array of {not}");
                        return Err(CheckpointError::Unwritable {
                            what: format!("key {}", quoted(key)),
                            why,
                        });
                    }
                    element.write(key, out)?;
                }
            }
        }
        Ok(())
    }
}

fn write_string(string: &str, out: &mut Vec<u8>) {
    out.extend((string.len() as u64).to_le_bytes());
    out.extend(string.as_bytes());
}

impl GgufWriter {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata entry.
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<MetadataValue>) -> Self {
        self.metadata.push((key.into(), value.into()));
        self
    }

    /// Adds a tensor. `shape` is outermost first; `data` are its rows as they will lie in the file.
    pub fn tensor(
        self,
        name: impl Into<String>,
        weight_type: WeightType,
        shape: &[usize],
        data: impl Into<Vec<u8>>,
    ) -> Self {
        self.add(name.into(), weight_type, shape, Some(data.into()))
    }

    /// Adds a tensor without its data, which the caller puts where [`Self::layout`] says.
    pub fn declare(self, name: impl Into<String>, weight_type: WeightType, shape: &[usize]) -> Self {
        self.add(name.into(), weight_type, shape, None)
    }

    fn add(mut self, name: String, weight_type: WeightType, shape: &[usize], data: Option<Vec<u8>>) -> Self {
        self.tensors.push(WriterTensor { name, weight_type, shape: shape.to_vec(), data });
        self
    }

    /// Where everything lies in the file.
    ///
    /// # Errors
    /// A bad name or shape, data of another length than the shape needs, an array with mixed types.
    pub fn layout(&self) -> Result<FileLayout, CheckpointError> {
        let mut header = Vec::new();
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            check_name("key", key)?;
            write_string(key, &mut header);
            header.extend(value.value_type().code().to_le_bytes());
            value.write(key, &mut header)?;
        }
        let (mut starts, mut end) = (Vec::with_capacity(self.tensors.len()), 0);
        for tensor in &self.tensors {
            let n_bytes = tensor.checked_bytes()?;
            tensor.write_directory_entry(end, &mut header);
            starts.push(end);
            end = padded(end + n_bytes);
        }
        let data_start = padded(header.len() as u64);
        starts.iter_mut().for_each(|start| *start += data_start);
        Ok(FileLayout { header, starts, n_bytes: data_start + end })
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// As [`Self::layout`]; a tensor that was only declared.
    pub fn to_bytes(&self) -> Result<Vec<u8>, CheckpointError> {
        let FileLayout { header: mut out, starts, n_bytes } = self.layout()?;
        for (tensor, start) in self.tensors.iter().zip(starts) {
            let data =
                tensor.data.as_ref().ok_or_else(|| tensor.unwritable("its data is not here".into()))?;
            out.resize(start as usize, 0);
            out.extend(data);
        }
        out.resize(n_bytes as usize, 0);
        Ok(out)
    }

    /// Writes the file in one piece: another file of that name stays until the new one is whole.
    ///
    /// # Errors
    /// Those of [`GgufWriter::to_bytes`] and of the file system.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), CheckpointError> {
        let bytes = self.to_bytes()?;
        let file = NewFile::create(path)?;
        file.write_at(&bytes, 0)?;
        file.sync()?;
        file.commit()
    }
}

impl WriterTensor {
    fn unwritable(&self, why: String) -> CheckpointError {
        CheckpointError::Unwritable { what: format!("tensor {}", quoted(&self.name)), why }
    }

    /// Bytes of its data, when all about it is right.
    fn checked_bytes(&self) -> Result<u64, CheckpointError> {
        check_name("tensor name", &self.name)?;
        if self.shape.is_empty() {
            return Err(self.unwritable("it has no dimension".to_owned()));
        }
        let needed = data_bytes(self.weight_type, &self.shape).map_err(|why| self.unwritable(why))?;
        let given = self.data.as_ref().map_or(needed, |data| data.len() as u64);
        if needed != given {
            return Err(self.unwritable(format!("shape {:?} needs {needed} bytes, not {given}", self.shape)));
        }
        Ok(needed)
    }

    fn write_directory_entry(&self, start: u64, out: &mut Vec<u8>) {
        write_string(&self.name, out);
        out.extend((self.shape.len() as u32).to_le_bytes());
        // Innermost first in the file.
        for dim in self.shape.iter().rev() {
            out.extend((*dim as u64).to_le_bytes());
        }
        out.extend(self.weight_type.gguf_code().to_le_bytes());
        out.extend(start.to_le_bytes());
    }
}

fn check_name(what: &str, name: &str) -> Result<(), CheckpointError> {
    if name.is_empty() || name.len() as u64 > MAX_NAME_BYTES {
        let why = format!("it is {} bytes long; 1 to {MAX_NAME_BYTES} are allowed", name.len());
        return Err(CheckpointError::Unwritable { what: format!("{what} {}", quoted(name)), why });
    }
    Ok(())
}

fn padded(len: u64) -> u64 {
    len.next_multiple_of(DEFAULT_ALIGNMENT.into())
}
