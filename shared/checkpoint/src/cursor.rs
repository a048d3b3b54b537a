//! Bounds-checked little-endian reading from a header in memory. It never allocates, except to word an error.

use crate::error::{CheckpointError, Place};

/// A position in the bytes of a file.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn at(bytes: &'a [u8], position: usize) -> Self {
        Self { bytes, position: position.min(bytes.len()) }
    }

    pub(crate) fn position(&self) -> usize {
        self.position
    }

    pub(crate) fn offset(&self) -> u64 {
        self.position as u64
    }

    /// Everything that follows.
    pub(crate) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.position..]
    }

    fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    pub(crate) fn take(&mut self, n_bytes: u64, place: Place<'_>) -> Result<&'a [u8], CheckpointError> {
        let available = self.remaining() as u64;
        if n_bytes > available {
            let (place, offset) = (place.to_string(), self.offset());
            return Err(CheckpointError::Truncated { place, offset, needed: n_bytes, available });
        }
        let end = self.position + n_bytes as usize;
        let taken = &self.bytes[self.position..end];
        self.position = end;
        Ok(taken)
    }

    /// The next N bytes, for `from_le_bytes`.
    pub(crate) fn array<const N: usize>(&mut self, place: Place<'_>) -> Result<[u8; N], CheckpointError> {
        let taken = self.take(N as u64, place)?;
        Ok(taken.try_into().expect("invariant: take gives as many bytes as asked"))
    }

    pub(crate) fn u32(&mut self, place: Place<'_>) -> Result<u32, CheckpointError> {
        Ok(u32::from_le_bytes(self.array(place)?))
    }

    pub(crate) fn u64(&mut self, place: Place<'_>) -> Result<u64, CheckpointError> {
        Ok(u64::from_le_bytes(self.array(place)?))
    }

    /// A count of items that take at least `min_item_bytes` each and still follow.
    pub(crate) fn count(&mut self, min_item_bytes: u64, place: Place<'_>) -> Result<u64, CheckpointError> {
        let offset = self.offset();
        let count = self.u64(place)?;
        let max = self.remaining() as u64 / min_item_bytes;
        if count > max {
            return Err(CheckpointError::CountTooLarge { place: place.to_string(), offset, count, max });
        }
        Ok(count)
    }

    /// A string with its length in front.
    pub(crate) fn string(&mut self, limit: u64, place: Place<'_>) -> Result<&'a str, CheckpointError> {
        let offset = self.offset();
        let len = self.u64(place)?;
        if len > limit {
            return Err(CheckpointError::TooLong { place: place.to_string(), offset, len, limit });
        }
        let bytes = self.take(len, place)?;
        std::str::from_utf8(bytes)
            .map_err(|_| CheckpointError::NotUtf8 { place: place.to_string(), offset: offset + 8 })
    }

    /// A string that names something: not empty, at most 64 KiB.
    pub(crate) fn name(&mut self, place: Place<'_>) -> Result<&'a str, CheckpointError> {
        let offset = self.offset();
        let name = self.string(crate::limits::MAX_NAME_BYTES, place)?;
        if name.is_empty() {
            return Err(CheckpointError::EmptyName { place: place.to_string(), offset });
        }
        Ok(name)
    }
}
