//! A model file while it is being put together from parts, hashed as it grows. It knows nothing of where parts come
//! from. After a crash or an interruption it goes on behind the last complete part.

use std::{
    fs::{self, File},
    io::{Read, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    cache::{BUFFER_BYTES, hex},
    error::PullError,
    interrupt::CancelFlag,
};

/// What is complete, written after each part.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Mark {
    /// The source, as displayed; another one starts afresh.
    source: String,
    n_parts: u32,
    bytes: u64,
}

/// The growing file in its own directory.
#[derive(Debug)]
pub struct Assembly {
    dir: PathBuf,
    file: File,
    hasher: Sha256,
    mark: Mark,
    /// Bytes in the file, complete parts and the current one.
    bytes: u64,
}

impl Assembly {
    /// Opens or begins the assembly in `dir`, which is the caller's alone.
    ///
    /// # Errors
    /// When the directory cannot be written, or the user interrupts.
    pub fn open(dir: &Path, source: &str, cancel: &CancelFlag) -> Result<Self, PullError> {
        fs::create_dir_all(dir).map_err(PullError::io("create", dir))?;
        let path = dir.join("file");
        let io = |action| PullError::io(action, &path);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io("open"))?;
        let length = file.metadata().map_err(io("read"))?.len();
        let mark = read_mark(dir)
            .filter(|mark| mark.source == source && mark.bytes <= length)
            .unwrap_or(Mark { source: source.into(), n_parts: 0, bytes: 0 });
        file.set_len(mark.bytes).map_err(io("shorten"))?;
        let (mut hasher, mut buffer) = (Sha256::new(), vec![0; BUFFER_BYTES]);
        loop {
            cancel.check()?;
            match file.read(&mut buffer).map_err(io("read"))? {
                0 => break,
                n => hasher.update(&buffer[..n]),
            }
        }
        let bytes = mark.bytes;
        Ok(Self { dir: dir.into(), file, hasher, mark, bytes })
    }

    /// Parts that are complete.
    pub fn n_parts(&self) -> u32 {
        self.mark.n_parts
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Appends what `part` delivers, but not more than one byte over `limit` bytes in all. `done` is called with the
    /// bytes in the file.
    ///
    /// # Errors
    /// When reading or writing fails, or the user interrupts. The part counts only after [`Self::complete_part`].
    pub fn append(
        &mut self,
        part: &mut dyn Read,
        limit: u64,
        cancel: &CancelFlag,
        mut done: impl FnMut(u64),
    ) -> Result<(), PullError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut part = part.take((limit + 1).saturating_sub(self.bytes));
        loop {
            cancel.check()?;
            let n = part
                .read(&mut buffer)
                .map_err(|error| PullError::Source(format!("a part cannot be read: {error}")))?;
            if n == 0 {
                return Ok(());
            }
            self.file.write_all(&buffer[..n]).map_err(PullError::io("write", self.path()))?;
            self.hasher.update(&buffer[..n]);
            self.bytes += n as u64;
            done(self.bytes);
        }
    }

    /// Makes the appended bytes a part that survives interruptions.
    ///
    /// # Errors
    /// When it cannot be written to disk.
    pub fn complete_part(&mut self) -> Result<(), PullError> {
        self.file.sync_data().map_err(PullError::io("write", self.path()))?;
        self.mark.n_parts += 1;
        self.mark.bytes = self.bytes;
        write_mark(&self.dir, &self.mark)
    }

    /// Takes over a complete file by renaming it: the hub's client writes files of its own.
    ///
    /// # Errors
    /// When it cannot be moved or read.
    pub fn adopt(
        &mut self,
        whole: &Path,
        cancel: &CancelFlag,
        mut done: impl FnMut(u64),
    ) -> Result<(), PullError> {
        fs::rename(whole, self.path()).map_err(PullError::io("move", whole))?;
        let io = |action| PullError::io(action, self.path());
        self.file = File::options().read(true).write(true).open(self.path()).map_err(io("open"))?;
        (self.hasher, self.bytes) = (Sha256::new(), 0);
        self.file.seek(SeekFrom::Start(0)).map_err(PullError::io("read", self.path()))?;
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            cancel.check()?;
            let n = self.file.read(&mut buffer).map_err(PullError::io("read", self.path()))?;
            if n == 0 {
                return self.file.sync_data().map_err(PullError::io("write", self.path()));
            }
            self.hasher.update(&buffer[..n]);
            self.bytes += n as u64;
            done(self.bytes);
        }
    }

    /// The digest of all bytes in the file.
    pub fn digest(&self) -> String {
        hex(&self.hasher.clone().finalize())
    }

    /// Moves the finished file to its place in one step.
    ///
    /// # Errors
    /// When it cannot be written to disk or moved.
    pub fn publish(self, to: &Path) -> Result<(), PullError> {
        self.file.sync_all().map_err(PullError::io("write", self.path()))?;
        fs::rename(self.path(), to).map_err(PullError::io("move the finished file to", to))?;
        let parent = to.parent().unwrap_or(Path::new("."));
        File::open(parent).and_then(|dir| dir.sync_all()).map_err(PullError::io("write", parent))
    }

    fn path(&self) -> PathBuf {
        self.dir.join("file")
    }
}

fn read_mark(dir: &Path) -> Option<Mark> {
    serde_json::from_slice(&fs::read(dir.join("mark.json")).ok()?).ok()
}

fn write_mark(dir: &Path, mark: &Mark) -> Result<(), PullError> {
    let (path, temporary) = (dir.join("mark.json"), dir.join("mark.json.new"));
    let text = serde_json::to_vec(mark).expect("invariant: a mark is plain data");
    fs::write(&temporary, text).map_err(PullError::io("write", &temporary))?;
    fs::rename(&temporary, &path).map_err(PullError::io("write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(assembly: &mut Assembly, bytes: &[u8]) {
        assembly.append(&mut &bytes[..], 100, &CancelFlag::default(), |_| ()).expect("appends");
    }

    #[test]
    fn an_interrupted_part_is_forgotten_and_a_complete_one_kept() {
        let (dir, cancel) = (tempfile::tempdir().expect("directory"), CancelFlag::default());
        let mut assembly = Assembly::open(dir.path(), "wheels", &cancel).expect("opens");
        append(&mut assembly, b"ab");
        assembly.complete_part().expect("completes");
        append(&mut assembly, b"half of the next");
        drop(assembly);

        let mut assembly = Assembly::open(dir.path(), "wheels", &cancel).expect("opens");
        assert_eq!((assembly.n_parts(), assembly.bytes()), (1, 2));
        append(&mut assembly, b"c");
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(assembly.digest(), abc);

        let other = Assembly::open(dir.path(), "hub", &cancel).expect("opens");
        assert_eq!((other.n_parts(), other.bytes()), (0, 0), "another source starts afresh");
    }

    #[test]
    fn an_endless_part_ends_one_byte_over_the_limit() {
        let dir = tempfile::tempdir().expect("directory");
        let mut assembly = Assembly::open(dir.path(), "wheels", &CancelFlag::default()).expect("opens");
        assembly.append(&mut std::io::repeat(7), 10, &CancelFlag::default(), |_| ()).expect("appends");
        assert_eq!(assembly.bytes(), 11);
    }

    #[test]
    fn a_whole_file_is_adopted_and_published() {
        let dir = tempfile::tempdir().expect("directory");
        let (whole, to, cancel) =
            (dir.path().join("blob"), dir.path().join("model.gguf"), CancelFlag::default());
        fs::write(&whole, "abc").expect("writes");
        let mut assembly = Assembly::open(&dir.path().join("partial"), "hub", &cancel).expect("opens");
        assembly.adopt(&whole, &cancel, |_| ()).expect("adopts");
        assert!(assembly.digest().starts_with("ba7816bf"));
        assembly.publish(&to).expect("publishes");
        assert_eq!(fs::read(&to).expect("reads"), b"abc");
        assert!(!whole.exists());
    }
}
