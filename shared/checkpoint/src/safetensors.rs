//! The header of a safetensors file, as described in
//! <https://github.com/huggingface/safetensors#format>: streamed from its JSON, so that memory stays within what
//! the tensors need. Only F32, F16 and BF16 are read.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use paceline_domain::WeightType;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::cursor::Cursor;
use crate::directory::RawTensor;
use crate::error::{CheckpointError, Place, quoted};
use crate::limits::{MAX_DIMS, MAX_NAME_BYTES, MAX_SAFETENSORS_HEADER_BYTES};

/// Bytes of the length in front of the header.
const LENGTH_BYTES: usize = 8;

/// Receives each tensor of a header, checked on its own.
pub(crate) type TensorSink<'s> = dyn FnMut(&RawTensor<'_>) -> Result<(), CheckpointError> + 's;

/// Length of the header with the length in front, and the region of tensor data.
pub(crate) fn regions(file: &[u8]) -> Result<(usize, Range<u64>), CheckpointError> {
    let place = Place::Header("header length");
    let mut cursor = Cursor::at(file, 0);
    let len = cursor.u64(place)?;
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
    let json = &file[LENGTH_BYTES..header_bytes];
    let mut problem = None;
    let header = HeaderVisitor { json, data, sink, problem: &mut problem };
    stream_json(json, LENGTH_BYTES, "the safetensors header", header)
        .map_err(|error| problem.unwrap_or(error))
}

/// Deserializes a JSON object with a visitor; an error tells the byte where it was met.
pub(crate) fn stream_json<'de, V: Visitor<'de>>(
    json: &'de [u8],
    base: usize,
    place: &'static str,
    visitor: V,
) -> Result<V::Value, CheckpointError> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = deserializer.deserialize_map(visitor);
    value.and_then(|value| deserializer.end().map(|()| value)).map_err(|error| CheckpointError::BadJson {
        place,
        offset: (base + byte_of(json, error.line(), error.column())) as u64,
        why: error.to_string(),
    })
}

/// The byte of a line and column counted from 1.
fn byte_of(json: &[u8], line: usize, column: usize) -> usize {
    let line_start: usize =
        json.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    (line_start + column.saturating_sub(1)).min(json.len())
}

struct HeaderVisitor<'a, 's> {
    json: &'a [u8],
    data: Range<u64>,
    sink: &'a mut TensorSink<'s>,
    /// A typed error: serde can only carry words.
    problem: &'a mut Option<CheckpointError>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct TensorJson<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: ShapeJson,
    data_offsets: (u64, u64),
}

struct ShapeJson {
    dims: [usize; MAX_DIMS],
    n_dims: usize,
}

impl<'de> Visitor<'de> for HeaderVisitor<'_, '_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(Name(name)) = map.next_key_seed(NameSeed)? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let tensor: TensorJson<'_> = map
                .next_value()
                .map_err(|error| A::Error::custom(format!("tensor {}: {error}", quoted(&name))))?;
            if let Err(error) = self.report(&name, &tensor) {
                *self.problem = Some(error);
                return Err(A::Error::custom("a tensor is refused"));
            }
        }
        Ok(())
    }
}

impl HeaderVisitor<'_, '_> {
    fn report(&mut self, name: &str, tensor: &TensorJson<'_>) -> Result<(), CheckpointError> {
        let offset = (LENGTH_BYTES + self.position(name)) as u64;
        let weight_type = match tensor.dtype.as_ref() {
            "F32" => WeightType::F32,
            "F16" => WeightType::F16,
            "BF16" => WeightType::BF16,
            other => {
                let (tensor, dtype) = (quoted(name), quoted(other));
                return Err(CheckpointError::UnsupportedDtype { tensor, offset, dtype });
            }
        };
        if name.is_empty() || name.len() as u64 > MAX_NAME_BYTES {
            let (place, len) = ("name of a tensor".to_owned(), name.len() as u64);
            return Err(match len {
                0 => CheckpointError::EmptyName { place, offset },
                _ => CheckpointError::TooLong { place, offset, len, limit: MAX_NAME_BYTES },
            });
        }
        let ShapeJson { dims, n_dims } = tensor.shape;
        let start = tensor.data_offsets.0.saturating_add(self.data.start);
        let raw = RawTensor { name, weight_type, dims, n_dims, start, offset };
        let end = raw.checked_end(&self.data)?;
        if tensor.data_offsets.1.saturating_add(self.data.start) != end {
            let (start, said) = tensor.data_offsets;
            let needed = end - raw.start;
            let why = format!("data_offsets are {start}..{said}; its shape needs {needed} bytes");
            return Err(CheckpointError::BadShape { tensor: quoted(name), offset, why });
        }
        (self.sink)(&raw)
    }

    /// Where a name stands in the JSON; 0 for a name written with escapes, which is not a slice of it.
    fn position(&self, name: &str) -> usize {
        let distance = name.as_ptr().addr().wrapping_sub(self.json.as_ptr().addr());
        if distance < self.json.len() { distance } else { 0 }
    }
}

/// A name borrowed from the JSON where it has no escapes.
pub(crate) struct Name<'de>(pub(crate) Cow<'de, str>);

/// Reads a [`Name`]: serde's own impl for `Cow` always copies.
pub(crate) struct NameSeed;

impl<'de> DeserializeSeed<'de> for NameSeed {
    type Value = Name<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Name<'de>, D::Error> {
        struct NameVisitor;
        impl<'de> Visitor<'de> for NameVisitor {
            type Value = Name<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Borrowed(name)))
            }

            fn visit_str<E>(self, name: &str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Owned(name.to_owned())))
            }
        }
        deserializer.deserialize_str(NameVisitor)
    }
}

impl<'de> serde::Deserialize<'de> for ShapeJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = ShapeJson;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, "an array of at most {MAX_DIMS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<ShapeJson, A::Error> {
                let mut shape = ShapeJson { dims: [0; MAX_DIMS], n_dims: 0 };
                while let Some(dim) = seq.next_element()? {
                    let Some(place) = shape.dims.get_mut(shape.n_dims) else {
                        return Err(A::Error::invalid_length(MAX_DIMS + 1, &self));
                    };
                    *place = dim;
                    shape.n_dims += 1;
                }
                Ok(shape)
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}
