//! Metadata values of a GGUF file, read from the header's bytes when asked for. It does not know any key.

use std::fmt;

use crate::cursor::Cursor;
use crate::error::{CheckpointError, Place};
use crate::limits::{MAX_ARRAY_NESTING, MAX_STRING_BYTES};

/// Type of a metadata value.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs)]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

/// One metadata value. Strings and arrays are borrowed from the metadata.
#[derive(Clone, Copy, PartialEq, Debug)]
#[allow(missing_docs)]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(&'a str),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of values of one type, as compact as in the file.
#[derive(Clone, Copy, PartialEq)]
pub struct Array<'a> {
    element_type: ValueType,
    len: usize,
    bytes: &'a [u8],
}

/// Elements of an [`Array`] in order.
pub struct ArrayIter<'a> {
    cursor: Cursor<'a>,
    element_type: ValueType,
    n_left: usize,
}

impl ValueType {
    /// Every type, in the order of their codes.
    pub const ALL: [ValueType; 13] = {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64]
    };

    /// The number GGUF gives the type.
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The type with this number.
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(code).ok()?).copied()
    }

    /// The name used in messages.
    pub const fn name(self) -> &'static str {
        const NAMES: [&str; 13] =
            ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"];
        NAMES[self as usize]
    }

    /// Bytes of a value of fixed size.
    fn fixed_bytes(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }

    /// Bytes the smallest value of this type takes in a file.
    fn min_bytes(self) -> u64 {
        match self {
            Self::String => 8,
            Self::Array => 12,
            _ => self.fixed_bytes().expect("invariant: only strings and arrays vary in size"),
        }
    }
}

impl<'a> Value<'a> {
    /// Type of the value.
    pub fn value_type(&self) -> ValueType {
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
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// The value of any integer type.
    pub fn as_integer(&self) -> Option<i128> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::I8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::I16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::I32(value) => Some(value.into()),
            Self::U64(value) => Some(value.into()),
            Self::I64(value) => Some(value.into()),
            _ => None,
        }
    }

    /// Reads and checks a value; arrays are walked to their end. `depth` counts the arrays around it.
    pub(crate) fn read(
        cursor: &mut Cursor<'a>,
        value_type: ValueType,
        place: Place<'_>,
        depth: usize,
    ) -> Result<Self, CheckpointError> {
        Ok(match value_type {
            ValueType::U8 => Self::U8(u8::from_le_bytes(cursor.array(place)?)),
            ValueType::I8 => Self::I8(i8::from_le_bytes(cursor.array(place)?)),
            ValueType::U16 => Self::U16(u16::from_le_bytes(cursor.array(place)?)),
            ValueType::I16 => Self::I16(i16::from_le_bytes(cursor.array(place)?)),
            ValueType::U32 => Self::U32(u32::from_le_bytes(cursor.array(place)?)),
            ValueType::I32 => Self::I32(i32::from_le_bytes(cursor.array(place)?)),
            ValueType::F32 => Self::F32(f32::from_le_bytes(cursor.array(place)?)),
            ValueType::U64 => Self::U64(u64::from_le_bytes(cursor.array(place)?)),
            ValueType::I64 => Self::I64(i64::from_le_bytes(cursor.array(place)?)),
            ValueType::F64 => Self::F64(f64::from_le_bytes(cursor.array(place)?)),
            ValueType::Bool => {
                let offset = cursor.offset();
                Self::Bool(checked_bools(cursor.take(1, place)?, offset, place)? == [1])
            }
            ValueType::String => Self::String(cursor.string(MAX_STRING_BYTES, place)?),
            ValueType::Array => Self::Array(Array::read(cursor, place, depth)?),
        })
    }

    /// Type of the value in words, with the element type of an array.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Array(array) => format!("an array of {} {}", array.len, array.element_type.name()),
            scalar => format!("of type {}", scalar.value_type().name()),
        }
    }
}

/// Reads the code of a value type.
pub(crate) fn read_type(cursor: &mut Cursor<'_>, place: Place<'_>) -> Result<ValueType, CheckpointError> {
    let offset = cursor.offset();
    let code = cursor.u32(place)?;
    ValueType::from_code(code).ok_or_else(|| CheckpointError::UnknownValueType {
        place: place.to_string(),
        offset,
        code,
    })
}

fn checked_bools<'a>(bytes: &'a [u8], offset: u64, place: Place<'_>) -> Result<&'a [u8], CheckpointError> {
    match bytes.iter().position(|byte| *byte > 1) {
        None => Ok(bytes),
        Some(i) => Err(CheckpointError::BadBool {
            place: place.to_string(),
            offset: offset + i as u64,
            byte: bytes[i],
        }),
    }
}

impl<'a> Array<'a> {
    fn read(cursor: &mut Cursor<'a>, place: Place<'_>, depth: usize) -> Result<Self, CheckpointError> {
        let offset = cursor.offset();
        if depth >= MAX_ARRAY_NESTING {
            let place = place.to_string();
            return Err(CheckpointError::NestedTooDeep { place, offset, limit: MAX_ARRAY_NESTING });
        }
        let element_type = read_type(cursor, place)?;
        let len = cursor.count(element_type.min_bytes(), place)?;
        let (start, from_start) = (cursor.offset(), cursor.rest());
        if let Some(element_bytes) = element_type.fixed_bytes() {
            // No overflow: `count` has compared the product with the bytes that are left.
            let bytes = cursor.take(len * element_bytes, place)?;
            if element_type == ValueType::Bool {
                checked_bools(bytes, start, place)?;
            }
        } else {
            for _ in 0..len {
                Value::read(cursor, element_type, place, depth + 1)?;
            }
        }
        let bytes = &from_start[..(cursor.offset() - start) as usize];
        Ok(Self { element_type, len: len as usize, bytes })
    }

    /// Type of the elements.
    pub fn element_type(&self) -> ValueType {
        self.element_type
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in order.
    pub fn iter(&self) -> ArrayIter<'a> {
        ArrayIter { cursor: Cursor::at(self.bytes, 0), element_type: self.element_type, n_left: self.len }
    }

    /// Numbers of a fixed size, each made from its bytes; `None` when the elements are of another type.
    pub(crate) fn numbers<T, const N: usize>(&self, is: ValueType, from: fn([u8; N]) -> T) -> Option<Vec<T>> {
        (self.element_type == is).then(|| self.bytes.as_chunks().0.iter().map(|bytes| from(*bytes)).collect())
    }
}

impl<'a> IntoIterator for Array<'a> {
    type Item = Value<'a>;
    type IntoIter = ArrayIter<'a>;

    fn into_iter(self) -> ArrayIter<'a> {
        self.iter()
    }
}

impl fmt::Debug for Array<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "[{}; {}]", self.element_type.name(), self.len)
    }
}

impl<'a> Iterator for ArrayIter<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        self.n_left = self.n_left.checked_sub(1)?;
        let value = Value::read(&mut self.cursor, self.element_type, Place::Header("array element"), 0);
        Some(value.expect("invariant: the array was walked when the header was read"))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.n_left, Some(self.n_left))
    }
}

impl ExactSizeIterator for ArrayIter<'_> {}
