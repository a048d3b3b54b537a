//! A file that appears under its name whole or not at all: it is written under a temporary name beside it. What is
//! written into it is the caller's matter.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::error::CheckpointError;

/// A file in the making. Dropped before [`NewFile::commit`], it leaves nothing behind; a file that had the name
/// before stays until then.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    is_committed: bool,
}

impl NewFile {
    /// An empty file that will have this name.
    ///
    /// # Errors
    /// The file system's.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref().to_owned();
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}.tmp", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let file = File::create(&temporary).map_err(|error| CheckpointError::io("write", &path, error))?;
        Ok(Self { file, temporary, path, is_committed: false })
    }

    /// Sets its length; what is not written is zero.
    ///
    /// # Errors
    /// The file system's.
    pub fn set_len(&self, n_bytes: u64) -> Result<(), CheckpointError> {
        self.file.set_len(n_bytes).map_err(|error| self.error(error))
    }

    /// Writes bytes at a place of the file. Several threads may write at once.
    ///
    /// # Errors
    /// The file system's.
    pub fn write_at(&self, bytes: &[u8], start: u64) -> Result<(), CheckpointError> {
        self.file.write_all_at(bytes, start).map_err(|error| self.error(error))
    }

    /// Waits until all of it is on the disk.
    ///
    /// # Errors
    /// The file system's.
    pub fn sync(&self) -> Result<(), CheckpointError> {
        self.file.sync_all().map_err(|error| self.error(error))
    }

    /// Gives it its name.
    ///
    /// # Errors
    /// The file system's.
    pub fn commit(mut self) -> Result<(), CheckpointError> {
        fs::rename(&self.temporary, &self.path).map_err(|error| self.error(error))?;
        self.is_committed = true;
        Ok(())
    }

    fn error(&self, error: std::io::Error) -> CheckpointError {
        CheckpointError::io("write", &self.path, error)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.is_committed {
            // Best effort: the error that led here is the one to report.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).expect("a directory");
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn it_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("model");
        fs::write(&path, "old").expect("writes");
        let file = NewFile::create(&path).expect("creates");
        file.set_len(4).expect("grows");
        file.write_at(b"x", 2).expect("writes");
        assert_eq!(fs::read(&path).expect("reads"), b"old");
        drop(file);
        assert_eq!(names(dir.path()), ["model"]);
        let file = NewFile::create(&path).expect("creates");
        file.set_len(4).expect("grows");
        file.write_at(b"x", 2).expect("writes");
        file.commit().expect("renames");
        assert_eq!(fs::read(&path).expect("reads"), b"\0\0x\0");
        assert_eq!(names(dir.path()), ["model"]);
    }

    #[test]
    fn a_place_that_is_not_there_is_named() {
        let error = NewFile::create("/nowhere/at/all.gguf").expect_err("refused").to_string();
        assert!(error.starts_with("cannot write /nowhere/at/all.gguf: "), "{error}");
    }
}
