//! The header of a GGUF file (versions 2 and 3, little-endian), as described in
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. It checks the file on its own; whether the tensors
//! fit an architecture is not asked here.

use std::ops::Range;

use paceline_domain::WeightType;

use crate::cursor::Cursor;
use crate::directory::{Directory, DirectorySize, Packing, RawTensor};
use crate::error::{CheckpointError, Place, quoted};
use crate::limits::{ALIGNMENT_RANGE, DEFAULT_ALIGNMENT, MAX_DIMS, MAX_GGUF_HEADER_BYTES};
use crate::metadata::{MIN_ENTRY_BYTES, Metadata};

pub(crate) const MAGIC: [u8; 4] = *b"GGUF";

/// Bytes of the smallest directory entry: a name of one byte with its length, a dimension count, one dimension,
/// type and place.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// A checked header.
pub(crate) struct GgufHeader {
    pub(crate) metadata: Metadata,
    pub(crate) directory: Directory,
    pub(crate) header_bytes: usize,
}

/// The part of the file the tensors are read with.
struct TensorSection<'a> {
    file: &'a [u8],
    start: usize,
    n_tensors: u64,
    alignment: u32,
}

/// Reads and checks the header of a whole file.
pub(crate) fn parse(file: &[u8]) -> Result<GgufHeader, CheckpointError> {
    let mut cursor = Cursor::at(file, 0);
    read_version(&mut cursor)?;
    let n_tensors = cursor.count(MIN_TENSOR_BYTES, Place::Header("number of tensors"))?;
    let n_entries = cursor.count(MIN_ENTRY_BYTES, Place::Header("number of metadata entries"))?;
    let (metadata, start) = Metadata::read(file, n_entries)?;
    let alignment = read_alignment(&metadata)?;
    let section = TensorSection { file, start, n_tensors, alignment };

    let mut size = DirectorySize::default();
    let header_bytes = section.walk(&mut |_| Ok(()))?;
    let data_start = (header_bytes as u64).next_multiple_of(alignment.into());
    // A file without tensors may end before the padding does.
    let data = data_start..(file.len() as u64).max(data_start);
    section.walk(&mut |tensor| {
        size.add(&section.placed(tensor, &data)?);
        Ok(())
    })?;
    let mut directory = Directory::with_capacity(&size);
    section.walk(&mut |tensor| directory.push(&section.placed(tensor, &data)?, 0))?;
    let directory = directory.finish(&[data], Packing::Loose).map_err(|(_, error)| error)?;
    Ok(GgufHeader { metadata, directory, header_bytes })
}

fn read_version(cursor: &mut Cursor<'_>) -> Result<(), CheckpointError> {
    let found = cursor.array(Place::Header("magic number"))?;
    if found != MAGIC {
        return Err(CheckpointError::BadMagic { found });
    }
    match cursor.u32(Place::Header("version"))? {
        2 | 3 => Ok(()),
        version if version & 0xffff == 0 && version != 0 => Err(CheckpointError::BigEndian { version }),
        version => Err(CheckpointError::UnsupportedVersion { version }),
    }
}

fn read_alignment(metadata: &Metadata) -> Result<u32, CheckpointError> {
    let alignment = metadata.optional_u32("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || !ALIGNMENT_RANGE.contains(&alignment) {
        return Err(CheckpointError::BadAlignment { alignment });
    }
    Ok(alignment)
}

impl TensorSection<'_> {
    /// Reads each directory entry; its `start` is still counted from the start of the data. Returns where the
    /// directory ends.
    fn walk(
        &self,
        visit: &mut dyn FnMut(RawTensor<'_>) -> Result<(), CheckpointError>,
    ) -> Result<usize, CheckpointError> {
        let mut cursor = Cursor::at(self.file, self.start);
        for i in 0..self.n_tensors {
            visit(read_tensor(&mut cursor, i)?)?;
            if cursor.offset() > MAX_GGUF_HEADER_BYTES {
                let (size, limit) = (cursor.offset(), MAX_GGUF_HEADER_BYTES);
                return Err(CheckpointError::TooMuch { what: "header", size, limit });
            }
        }
        Ok(cursor.position())
    }

    /// The tensor with its start counted from the start of the file, all of it inside `data`.
    fn placed<'t>(&self, tensor: RawTensor<'t>, data: &Range<u64>) -> Result<RawTensor<'t>, CheckpointError> {
        if !tensor.start.is_multiple_of(self.alignment.into()) {
            return Err(CheckpointError::UnalignedTensor {
                tensor: quoted(tensor.name),
                offset: tensor.offset,
                start: tensor.start,
                alignment: self.alignment,
            });
        }
        let placed = RawTensor { start: tensor.start.saturating_add(data.start), ..tensor };
        placed.checked_end(data)?;
        Ok(placed)
    }
}

fn read_tensor<'a>(cursor: &mut Cursor<'a>, i: u64) -> Result<RawTensor<'a>, CheckpointError> {
    let offset = cursor.offset();
    let name = cursor.name(Place::TensorName(i))?;
    let place = Place::Tensor(name);
    let bad_shape = |why| CheckpointError::BadShape { tensor: quoted(name), offset, why };
    let n_dims = cursor.u32(place)? as usize;
    if !(1..=MAX_DIMS).contains(&n_dims) {
        return Err(bad_shape(format!("it has {n_dims} dimensions; 1 to {MAX_DIMS} are allowed")));
    }
    let mut dims = [0; MAX_DIMS];
    // The file has the innermost dimension first.
    for dim in dims[..n_dims].iter_mut().rev() {
        let size = cursor.u64(place)?;
        *dim = usize::try_from(size).map_err(|_| bad_shape(format!("dimension {size} is too large")))?;
    }
    let type_offset = cursor.offset();
    let code = cursor.u32(place)?;
    let weight_type = WeightType::from_gguf_code(code).ok_or_else(|| CheckpointError::UnknownTensorType {
        tensor: quoted(name),
        offset: type_offset,
        code,
        known: WeightType::ALL.map(WeightType::name).join(", "),
    })?;
    let start = cursor.u64(place)?;
    Ok(RawTensor { name, weight_type, dims, n_dims, start, offset })
}
