//! Metadata of a GGUF file: an owned copy of its bytes, found by key, read by typed getters. It does not know which
//! keys a model needs.

use crate::cursor::Cursor;
use crate::error::{CheckpointError, Place, quoted};
use crate::limits::MAX_GGUF_HEADER_BYTES;
use crate::value::{Array, Value, ValueType, read_type};

/// Where the entries start: after magic, version and the two counts.
pub(crate) const ENTRIES_START: usize = 24;
/// Bytes of the smallest entry: a key of one byte with its length, a type, a value of one byte.
pub(crate) const MIN_ENTRY_BYTES: u64 = 8 + 1 + 4 + 1;

/// Metadata by key. Empty for safetensors.
///
/// Each getter comes in two forms: `u32(key)` for keys that must be there, `optional_u32(key)` for those that may be
/// absent. A value of another type is an error in both. Integer getters take every integer type whose value fits.
#[derive(Default)]
pub struct Metadata {
    /// The header up to the last entry.
    bytes: Box<[u8]>,
    /// Offsets of the entries in `bytes`, sorted by key.
    index: Vec<u32>,
}

/// The strings of one array, in order.
#[derive(Clone, Copy, Debug)]
pub struct Strings<'a> {
    array: Array<'a>,
}

macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident, $optional:ident, $value:ty, $expected:literal, $convert:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// Names the key when it is missing, of another type, or out of range.
        pub fn $name(&self, key: &str) -> Result<$value, CheckpointError> {
            self.$optional(key)?.ok_or_else(|| CheckpointError::MissingKey { key: quoted(key) })
        }

        $(#[$doc])*
        /// `None` when the key is absent.
        ///
        /// # Errors
        /// Names the key when it is of another type or out of range.
        pub fn $optional(&self, key: &str) -> Result<Option<$value>, CheckpointError> {
            let Some(value) = self.get(key) else { return Ok(None) };
            let convert: fn(Value<'_>) -> Converted<$value> = $convert;
            match convert(value) {
                Converted::Value(value) => Ok(Some(value)),
                Converted::WrongType => Err(CheckpointError::WrongType {
                    key: quoted(key), expected: $expected, found: value.describe(),
                }),
                Converted::OutOfRange(value) => Err(CheckpointError::OutOfRange {
                    key: quoted(key), expected: $expected, value: value.to_string(),
                }),
            }
        }
    )*};
}

/// What came of a conversion.
enum Converted<T> {
    Value(T),
    WrongType,
    OutOfRange(i128),
}

impl Metadata {
    /// Reads `n_entries` from a header. Returns where they end.
    pub(crate) fn read(header: &[u8], n_entries: u64) -> Result<(Self, usize), CheckpointError> {
        let end = walk(header, n_entries, &mut |_| ())?;
        // The copy is walked again: what the getters rely on was seen in bytes that cannot change any more.
        let bytes: Box<[u8]> = header[..end].into();
        let mut index = Vec::with_capacity(n_entries as usize);
        walk(&bytes, n_entries, &mut |offset| index.push(offset))?;
        index.sort_unstable_by(|a, b| key_at(&bytes, *a).cmp(key_at(&bytes, *b)));
        for pair in index.windows(2) {
            let (key, offset) = (key_at(&bytes, pair[0]), pair[0].max(pair[1]));
            if key == key_at(&bytes, pair[1]) {
                return Err(CheckpointError::DuplicateKey { key: quoted(key), offset: offset.into() });
            }
        }
        Ok((Self { bytes, index }, end))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Keys in sorted order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.index.iter().map(|offset| key_at(&self.bytes, *offset))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        let i = self.index.binary_search_by(|offset| key_at(&self.bytes, *offset).cmp(key)).ok()?;
        let mut cursor = Cursor::at(&self.bytes, self.index[i] as usize);
        let entry = read_entry(&mut cursor, i as u64);
        Some(entry.expect("invariant: every entry was read when the header was").1)
    }

    getters! {
        /// An integer of at most 32 bits.
        u32, optional_u32, u32, "u32", integer;
        /// An integer of at most 64 bits.
        u64, optional_u64, u64, "u64", integer;
        /// A floating-point number; f64 is rounded.
        f32, optional_f32, f32, "f32", |value| match value {
            Value::F32(value) => Converted::Value(value),
            Value::F64(value) => Converted::Value(value as f32),
            _ => Converted::WrongType,
        };
        /// A truth value.
        bool, optional_bool, bool, "bool", |value| match value {
            Value::Bool(value) => Converted::Value(value),
            _ => Converted::WrongType,
        };
        /// An array of i32 (or u32 with values that fit).
        i32s, optional_i32s, Vec<i32>, "an array of i32", |value| match value {
            Value::Array(array) => i32s(array),
            _ => Converted::WrongType,
        };
        /// An array of u32 (or i32 without negative values).
        u32s, optional_u32s, Vec<u32>, "an array of u32", |value| match value {
            Value::Array(array) => u32s(array),
            _ => Converted::WrongType,
        };
        /// An array of f32.
        f32s, optional_f32s, Vec<f32>, "an array of f32", |value| match value {
            Value::Array(array) => found(array.numbers(ValueType::F32, f32::from_le_bytes)),
            _ => Converted::WrongType,
        };
    }

    /// A string.
    ///
    /// # Errors
    /// Names the key when it is missing or of another type.
    pub fn str(&self, key: &str) -> Result<&str, CheckpointError> {
        self.optional_str(key)?.ok_or_else(|| CheckpointError::MissingKey { key: quoted(key) })
    }

    /// A string. `None` when the key is absent.
    ///
    /// # Errors
    /// Names the key when it is of another type.
    pub fn optional_str(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(wrong_type(key, "string", other)),
        }
    }

    /// An array of strings, borrowed.
    ///
    /// # Errors
    /// Names the key when it is missing or of another type.
    pub fn strings(&self, key: &str) -> Result<Strings<'_>, CheckpointError> {
        self.optional_strings(key)?.ok_or_else(|| CheckpointError::MissingKey { key: quoted(key) })
    }

    /// An array of strings, borrowed. `None` when the key is absent.
    ///
    /// # Errors
    /// Names the key when it is of another type.
    pub fn optional_strings(&self, key: &str) -> Result<Option<Strings<'_>>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if array.element_type() == ValueType::String => {
                Ok(Some(Strings { array }))
            }
            Some(other) => Err(wrong_type(key, "an array of string", other)),
        }
    }
}

impl<'a> Strings<'a> {
    /// Number of strings.
    pub fn len(&self) -> usize {
        self.array.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.array.is_empty()
    }

    /// The strings in order. Use `collect` for access by index.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a str> + use<'a> {
        self.array.iter().map(|value| match value {
            Value::String(string) => string,
            _ => unreachable!("invariant: made from an array of strings only"),
        })
    }
}

fn wrong_type(key: &str, expected: &'static str, found: Value<'_>) -> CheckpointError {
    CheckpointError::WrongType { key: quoted(key), expected, found: found.describe() }
}

fn integer<T: TryFrom<i128>>(value: Value<'_>) -> Converted<T> {
    match value.as_integer().map(|integer| (T::try_from(integer), integer)) {
        None => Converted::WrongType,
        Some((Ok(fits), _)) => Converted::Value(fits),
        Some((Err(_), integer)) => Converted::OutOfRange(integer),
    }
}

fn found<T>(values: Option<Vec<T>>) -> Converted<Vec<T>> {
    values.map_or(Converted::WrongType, Converted::Value)
}

fn i32s(array: Array<'_>) -> Converted<Vec<i32>> {
    match array.numbers(ValueType::U32, u32::from_le_bytes) {
        None => found(array.numbers(ValueType::I32, i32::from_le_bytes)),
        Some(values) => converted(values),
    }
}

fn u32s(array: Array<'_>) -> Converted<Vec<u32>> {
    match array.numbers(ValueType::I32, i32::from_le_bytes) {
        None => found(array.numbers(ValueType::U32, u32::from_le_bytes)),
        Some(values) => converted(values),
    }
}

fn converted<From: Copy + Into<i128>, To: TryFrom<From>>(values: Vec<From>) -> Converted<Vec<To>> {
    let bad = values.iter().find(|value| To::try_from(**value).is_err()).copied();
    match bad {
        Some(value) => Converted::OutOfRange(value.into()),
        None => Converted::Value(values.into_iter().filter_map(|value| To::try_from(value).ok()).collect()),
    }
}

/// Reads and checks all entries; `visit` gets the offset of each. Returns where they end.
fn walk(header: &[u8], n_entries: u64, visit: &mut dyn FnMut(u32)) -> Result<usize, CheckpointError> {
    let mut cursor = Cursor::at(header, ENTRIES_START);
    for i in 0..n_entries {
        let offset = cursor.offset();
        read_entry(&mut cursor, i)?;
        if cursor.offset() > MAX_GGUF_HEADER_BYTES {
            let (size, limit) = (cursor.offset(), MAX_GGUF_HEADER_BYTES);
            return Err(CheckpointError::TooMuch { what: "metadata", size, limit });
        }
        visit(u32::try_from(offset).expect("invariant: the header limit is below 2^32"));
    }
    Ok(cursor.position())
}

fn read_entry<'a>(cursor: &mut Cursor<'a>, i: u64) -> Result<(&'a str, Value<'a>), CheckpointError> {
    let key = cursor.name(Place::Key(i))?;
    let place = Place::Value(key);
    let value_type = read_type(cursor, place)?;
    Ok((key, Value::read(cursor, value_type, place, 0)?))
}

fn key_at(bytes: &[u8], offset: u32) -> &str {
    Cursor::at(bytes, offset as usize)
        .name(Place::Header("key"))
        .expect("invariant: every entry was read when the header was")
}
