//! The header of a safetensors file, as described in <https://github.com/huggingface/safetensors#format>. Only F32,
//! F16 and BF16 are read; whether the tensors fit an architecture is not asked here.
//!
//! It is streamed by our own reader: building a JSON tree takes many times the memory of its text.

use std::ops::Range;

use paceline_domain::WeightType;

use crate::cursor::Cursor;
use crate::directory::RawTensor;
use crate::error::{CheckpointError, Place, quoted};
use crate::json::{JsonReader, Key};
use crate::limits::{MAX_DIMS, MAX_SAFETENSORS_HEADER_BYTES};

/// Bytes of the length in front of the header.
const LENGTH_BYTES: usize = 8;

/// Receives each tensor of a header, checked on its own.
pub(crate) type TensorSink<'s> = dyn FnMut(&RawTensor<'_>) -> Result<(), CheckpointError> + 's;

/// A tensor's entry as it stands in the header.
struct TensorEntry {
    weight_type: WeightType,
    dims: [usize; MAX_DIMS],
    n_dims: usize,
    data_offsets: [u64; 2],
}

/// Length of the header with the length in front, and the region of tensor data.
pub(crate) fn regions(file: &[u8]) -> Result<(usize, Range<u64>), CheckpointError> {
    let mut cursor = Cursor::at(file, 0);
    let len = cursor.u64(Place::Header("header length"))?;
    if len > MAX_SAFETENSORS_HEADER_BYTES {
        let (place, limit) = ("header".to_owned(), MAX_SAFETENSORS_HEADER_BYTES);
        return Err(CheckpointError::TooLong { place, offset: 0, len, limit });
    }
    cursor.take(len, Place::Header("header"))?;
    Ok((cursor.position(), cursor.offset()..file.len() as u64))
}

/// Streams the tensors of a header into `sink`.
pub(crate) fn walk(file: &[u8], sink: &mut TensorSink<'_>) -> Result<(), CheckpointError> {
    let (header_bytes, data) = regions(file)?;
    let json_bytes = &file[LENGTH_BYTES..header_bytes];
    let mut json = JsonReader::new(json_bytes, LENGTH_BYTES, "the safetensors header")?;
    if json_bytes.first() != Some(&b'{') {
        return Err(json.error("'{' is expected"));
    }
    let mut members = json.begin(b'{')?;
    let mut has_metadata = false;
    while let Some(key) = json.next_key(&mut members)? {
        if key.name != "__metadata__" {
            report(&mut json, &key, &data, sink)?;
            continue;
        }
        if std::mem::replace(&mut has_metadata, true) {
            return Err(json.error("__metadata__ is there twice"));
        }
        skip_metadata(&mut json)?;
    }
    json.end()
}

/// `__metadata__` is an object of strings.
fn skip_metadata(json: &mut JsonReader<'_>) -> Result<(), CheckpointError> {
    let mut members = json.begin(b'{')?;
    while json.next_item(&mut members, b'}')? {
        json.skip_member()?;
    }
    Ok(())
}

/// Reads one tensor's entry, checks it and hands it on.
fn report(
    json: &mut JsonReader<'_>,
    key: &Key<'_>,
    data: &Range<u64>,
    sink: &mut TensorSink<'_>,
) -> Result<(), CheckpointError> {
    let (name, offset) = (key.name.as_ref(), key.offset);
    if name.is_empty() {
        return Err(CheckpointError::EmptyName { place: "name of a tensor".to_owned(), offset });
    }
    let TensorEntry { weight_type, dims, n_dims, data_offsets } = read_entry(json, key)?;
    let start = data_offsets[0].saturating_add(data.start);
    let tensor = RawTensor { name, weight_type, dims, n_dims, start, offset };
    let end = tensor.checked_end(data)?;
    if data_offsets[1].saturating_add(data.start) != end {
        let ([start, said], needed) = (data_offsets, end - start);
        let why = format!("data_offsets are {start}..{said}; its shape needs {needed} bytes");
        return Err(CheckpointError::BadShape { tensor: quoted(name), offset, why });
    }
    sink(&tensor)
}

fn read_entry(json: &mut JsonReader<'_>, tensor: &Key<'_>) -> Result<TensorEntry, CheckpointError> {
    let (mut weight_type, mut shape, mut data_offsets) = (None, None, None);
    let mut members = json.begin(b'{')?;
    while let Some(field) = json.next_key(&mut members)? {
        let is_new = match field.name.as_ref() {
            "dtype" => weight_type.replace(read_dtype(json, tensor)?).is_none(),
            "shape" => shape.replace(read_shape(json, tensor)?).is_none(),
            "data_offsets" => data_offsets.replace(read_offsets(json)?).is_none(),
            _ => false,
        };
        if !is_new {
            let (tensor, field) = (quoted(&tensor.name), quoted(&field.name));
            return Err(json.error(format!("field {field} of tensor {tensor} is unknown or there twice")));
        }
    }
    let missing = |field| json.error(format!("tensor {} has no {field}", quoted(&tensor.name)));
    let (dims, n_dims) = shape.ok_or_else(|| missing("shape"))?;
    Ok(TensorEntry {
        weight_type: weight_type.ok_or_else(|| missing("dtype"))?,
        dims,
        n_dims,
        data_offsets: data_offsets.ok_or_else(|| missing("data_offsets"))?,
    })
}

fn read_dtype(json: &mut JsonReader<'_>, tensor: &Key<'_>) -> Result<WeightType, CheckpointError> {
    match json.name()?.as_ref() {
        "F32" => Ok(WeightType::F32),
        "F16" => Ok(WeightType::F16),
        "BF16" => Ok(WeightType::BF16),
        other => Err(CheckpointError::UnsupportedDtype {
            tensor: quoted(&tensor.name),
            offset: tensor.offset,
            dtype: quoted(other),
        }),
    }
}

fn read_shape(
    json: &mut JsonReader<'_>,
    tensor: &Key<'_>,
) -> Result<([usize; MAX_DIMS], usize), CheckpointError> {
    let mut dims = [0; MAX_DIMS];
    let mut n_dims = 0;
    let mut members = json.begin(b'[')?;
    while json.next_item(&mut members, b']')? {
        let size = json.unsigned()?;
        let (Some(dim), Ok(size)) = (dims.get_mut(n_dims), usize::try_from(size)) else {
            return Err(CheckpointError::BadShape {
                tensor: quoted(&tensor.name),
                offset: tensor.offset,
                why: format!("it has more than {MAX_DIMS} dimensions"),
            });
        };
        *dim = size;
        n_dims += 1;
    }
    Ok((dims, n_dims))
}

fn read_offsets(json: &mut JsonReader<'_>) -> Result<[u64; 2], CheckpointError> {
    let mut offsets = [0; 2];
    let mut members = json.begin(b'[')?;
    for offset in &mut offsets {
        if !json.next_item(&mut members, b']')? {
            return Err(json.error("data_offsets needs two numbers"));
        }
        *offset = json.unsigned()?;
    }
    match json.next_item(&mut members, b']')? {
        true => Err(json.error("data_offsets has more than two numbers")),
        false => Ok(offsets),
    }
}
