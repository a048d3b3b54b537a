//! The bytes of a file, memory-mapped read-only, or held in memory. The only unsafe lines of the crate are here.
//!
//! A map shares the page cache: when another process shortens the file while it is mapped, reading the lost pages
//! ends the process with SIGBUS. Replace model files by renaming a new file over them, never in place.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::Mmap;

use crate::error::CheckpointError;

/// All bytes of one file.
pub(crate) enum FileBytes {
    Mapped(Mmap),
    Owned(Box<[u8]>),
}

impl FileBytes {
    /// Maps a regular file that is not empty.
    #[allow(unsafe_code)]
    pub(crate) fn map(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(|error| CheckpointError::io("open", path, error))?;
        let about = file.metadata().map_err(|error| CheckpointError::io("inspect", path, error))?;
        if !about.is_file() {
            return Err(CheckpointError::unusable(path, "it is not a regular file; give a model file"));
        }
        if about.len() == 0 {
            return Err(CheckpointError::unusable(path, "the file is empty; download it again"));
        }
        // SAFETY: the map is private and read-only, and this process never writes to a model file. Others changing
        // it while it is mapped is the caveat every map has; the module's description tells how to avoid it.
        let map = unsafe { Mmap::map(&file) };
        map.map(Self::Mapped).map_err(|error| CheckpointError::io("map", path, error))
    }

    /// Takes the range's pages out of this process's resident memory. They stay in the system's page cache as long as
    /// it likes, and come back when they are read.
    #[allow(unsafe_code)]
    pub(crate) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Self::Mapped(map) = self
            && !range.is_empty()
        {
            // SAFETY: the pages are those of a file and were never written to, so reading them again gives the same
            // bytes. Borrowed slices stay valid. A refusal leaves the pages resident, which is no harm.
            let _ = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}
