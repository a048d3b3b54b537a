//! The list of tensors of a checkpoint, compact and sorted by name, and the checks over all of them together. It
//! does not know which format a tensor came from.

use std::ops::Range;

use paceline_domain::WeightType;

use crate::error::{CheckpointError, quoted};
use crate::limits::MAX_DIMS;

/// A tensor as a header parser reports it, not yet placed in a directory.
#[derive(Clone, Copy)]
pub(crate) struct RawTensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) weight_type: WeightType,
    /// Outermost first, `n_dims` of them.
    pub(crate) dims: [usize; MAX_DIMS],
    pub(crate) n_dims: usize,
    /// First byte of the data, from the start of the file.
    pub(crate) start: u64,
    /// Where the header speaks of it.
    pub(crate) offset: u64,
}

/// What a directory will need, so that it is allocated once.
#[derive(Default)]
pub(crate) struct DirectorySize {
    n_tensors: usize,
    n_name_bytes: usize,
    n_dims: usize,
}

/// Whether bytes between tensors are allowed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    /// Padding is fine (GGUF).
    Loose,
    /// Every byte of the data belongs to a tensor (safetensors).
    Contiguous,
}

pub(crate) struct Directory {
    names: String,
    dims: Vec<usize>,
    /// Sorted by name.
    records: Vec<Record>,
}

/// 32 bytes.
struct Record {
    start: u64,
    name_start: u32,
    dims_start: u32,
    offset: u32,
    name_len: u16,
    file_idx: u16,
    n_dims: u8,
    weight_type: WeightType,
}

/// A tensor found in the directory.
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a str,
    pub(crate) weight_type: WeightType,
    pub(crate) shape: &'a [usize],
    pub(crate) file_idx: usize,
    /// Byte range in that file.
    pub(crate) range: Range<u64>,
    offset: u64,
}

/// Bytes of the tensor's data.
///
/// # Errors
/// A dimension of 0, a row that is not whole blocks, a size beyond 2^64.
pub(crate) fn data_bytes(weight_type: WeightType, shape: &[usize]) -> Result<u64, String> {
    if shape.len() > MAX_DIMS {
        return Err(format!("it has {} dimensions; at most {MAX_DIMS} are allowed", shape.len()));
    }
    if let Some(i) = shape.iter().position(|dim| *dim == 0) {
        return Err(format!("dimension {i} of shape {shape:?} is 0"));
    }
    let n_cols = shape.last().copied().unwrap_or(1);
    if !n_cols.is_multiple_of(weight_type.block_len()) {
        let (name, block_len) = (weight_type.name(), weight_type.block_len());
        return Err(format!(
            "its rows have {n_cols} weights, not a multiple of {name}'s block of {block_len}"
        ));
    }
    let outer = &shape[..shape.len().saturating_sub(1)];
    weight_type
        .row_bytes(n_cols)
        .and_then(|row_bytes| outer.iter().try_fold(row_bytes, |bytes, dim| bytes.checked_mul(*dim)))
        .and_then(|bytes| u64::try_from(bytes).ok())
        .ok_or_else(|| format!("the size of shape {shape:?} in {} overflows", weight_type.name()))
}

impl RawTensor<'_> {
    pub(crate) fn shape(&self) -> &[usize] {
        &self.dims[..self.n_dims]
    }

    /// Checks the shape and that the data lie inside `data`. Returns the end of the data.
    pub(crate) fn checked_end(&self, data: &Range<u64>) -> Result<u64, CheckpointError> {
        let n_bytes = data_bytes(self.weight_type, self.shape()).map_err(|why| {
            CheckpointError::BadShape { tensor: quoted(self.name), offset: self.offset, why }
        })?;
        let end = self.start.saturating_add(n_bytes);
        if self.start < data.start || end > data.end {
            return Err(CheckpointError::OutsideFile {
                tensor: quoted(self.name),
                offset: self.offset,
                start: self.start,
                end,
                data_start: data.start,
                data_end: data.end,
            });
        }
        Ok(end)
    }
}

impl DirectorySize {
    pub(crate) fn add(&mut self, tensor: &RawTensor<'_>) {
        self.n_tensors += 1;
        self.n_name_bytes += tensor.name.len();
        self.n_dims += tensor.n_dims;
    }
}

impl Directory {
    pub(crate) fn with_capacity(size: &DirectorySize) -> Self {
        Self {
            names: String::with_capacity(size.n_name_bytes),
            dims: Vec::with_capacity(size.n_dims),
            records: Vec::with_capacity(size.n_tensors),
        }
    }

    pub(crate) fn push(&mut self, tensor: &RawTensor<'_>, file_idx: usize) -> Result<(), CheckpointError> {
        let narrow = |what, size: usize| {
            u32::try_from(size).map_err(|_| CheckpointError::TooMuch {
                what,
                size: size as u64,
                limit: u32::MAX.into(),
            })
        };
        self.records.push(Record {
            start: tensor.start,
            name_start: narrow("total length of tensor names", self.names.len())?,
            dims_start: narrow("number of dimensions", self.dims.len())?,
            offset: narrow("header length", usize::try_from(tensor.offset).unwrap_or(usize::MAX))?,
            name_len: u16::try_from(tensor.name.len()).expect("invariant: parsers limit names to 64 KiB"),
            file_idx: u16::try_from(file_idx).expect("invariant: the number of shards is limited"),
            n_dims: tensor.n_dims as u8,
            weight_type: tensor.weight_type,
        });
        self.names.push_str(tensor.name);
        self.dims.extend_from_slice(tensor.shape());
        Ok(())
    }

    /// Sorts, and refuses overlaps, holes (when `Contiguous`) and duplicates. `data` is the region of tensor data of
    /// each file. An error comes with the index of the file it is in.
    pub(crate) fn finish(
        mut self,
        data: &[Range<u64>],
        packing: Packing,
    ) -> Result<Self, (usize, CheckpointError)> {
        self.records.sort_unstable_by_key(|record| (record.file_idx, record.start));
        for (file_idx, data) in data.iter().enumerate() {
            self.check_file(file_idx, data, packing).map_err(|error| (file_idx, error))?;
        }
        let (names, mut records) = (&self.names, std::mem::take(&mut self.records));
        records.sort_unstable_by(|a, b| a.name(names).cmp(b.name(names)));
        self.records = records;
        let twice =
            self.records.windows(2).find(|pair| pair[0].name(&self.names) == pair[1].name(&self.names));
        match twice {
            None => Ok(self),
            Some(pair) => {
                let last = if pair[0].place() > pair[1].place() { &pair[0] } else { &pair[1] };
                let (tensor, offset) = (quoted(last.name(&self.names)), last.offset.into());
                Err((last.file_idx.into(), CheckpointError::DuplicateTensor { tensor, offset }))
            }
        }
    }

    /// Checks the tensors of one file while the records are sorted by place.
    fn check_file(
        &self,
        file_idx: usize,
        data: &Range<u64>,
        packing: Packing,
    ) -> Result<(), CheckpointError> {
        let first = self.records.partition_point(|record| usize::from(record.file_idx) < file_idx);
        let end = self.records.partition_point(|record| usize::from(record.file_idx) <= file_idx);
        let mut covered = data.start;
        for i in first..end {
            let entry = self.entry(i);
            if entry.range.start < covered {
                return Err(CheckpointError::Overlap {
                    tensor: quoted(entry.name),
                    offset: entry.offset,
                    other: quoted(self.entry(i - 1).name),
                    start: entry.range.start,
                    end: covered,
                });
            }
            if packing == Packing::Contiguous && entry.range.start > covered {
                return Err(CheckpointError::Hole { start: covered, end: entry.range.start });
            }
            covered = entry.range.end;
        }
        if packing == Packing::Contiguous && covered != data.end {
            return Err(CheckpointError::Hole { start: covered, end: data.end });
        }
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// The tensor at a place in name order.
    pub(crate) fn entry(&self, i: usize) -> Entry<'_> {
        let record = &self.records[i];
        let dims_start = record.dims_start as usize;
        let shape = &self.dims[dims_start..dims_start + usize::from(record.n_dims)];
        let n_bytes = data_bytes(record.weight_type, shape).expect("invariant: parsers check each shape");
        Entry {
            name: record.name(&self.names),
            weight_type: record.weight_type,
            shape,
            file_idx: record.file_idx.into(),
            range: record.start..record.start + n_bytes,
            offset: record.offset.into(),
        }
    }

    /// Place of a name in name order.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.records.binary_search_by(|record| record.name(&self.names).cmp(name)).ok()
    }
}

impl Record {
    /// Where its header entry is: file, offset.
    fn place(&self) -> (u16, u32) {
        (self.file_idx, self.offset)
    }

    fn name<'a>(&self, names: &'a str) -> &'a str {
        let start = self.name_start as usize;
        &names[start..start + usize::from(self.name_len)]
    }
}
