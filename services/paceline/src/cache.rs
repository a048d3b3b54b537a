//! The directory of model files: where it is, what is in it, and who may write to it. It fetches nothing.

use std::{
    ffi::OsString,
    fs::{self, File, TryLockError},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use sha2::{Digest as _, Sha256};

use crate::{catalogue::Entry, error::PullError, interrupt::CancelFlag};

/// Bytes read at once.
pub const BUFFER_BYTES: usize = 1 << 20;
/// How often a held lock is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(200);

/// The directory of model files, `<name>.gguf` each. A file is there whole and verified, or not at all.
#[derive(Clone, Debug)]
pub struct ModelCache {
    dir: PathBuf,
}

impl ModelCache {
    /// The directory given, else `$XDG_CACHE_HOME/paceline/models`, else `~/.cache/paceline/models`.
    ///
    /// # Errors
    /// When none of them is known.
    pub fn locate(
        given: Option<&Path>,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, PullError> {
        let from =
            |variable: &str| environment(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
        let caches = || from("XDG_CACHE_HOME").or_else(|| from("HOME").map(|home| home.join(".cache")));
        let dir = given.map(Path::to_path_buf).or_else(|| caches().map(|dir| dir.join("paceline/models")));
        dir.map(|dir| Self { dir }).ok_or(PullError::NoCacheDirectory)
    }

    /// Where the files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the file of a model is, once it is there.
    pub fn path(&self, entry: &Entry) -> PathBuf {
        self.dir.join(format!("{}.gguf", entry.name))
    }

    /// Where unfinished downloads of a model are kept.
    pub fn partial_dir(&self, entry: &Entry) -> PathBuf {
        self.dir.join(format!(".{}.partial", entry.name))
    }

    /// Whether the file is there with the right size. It got there by being verified.
    pub fn has(&self, entry: &Entry) -> bool {
        fs::metadata(self.path(entry)).is_ok_and(|file| file.is_file() && file.len() == entry.bytes)
    }

    /// Makes the caller the only one to fetch this model; waits for another process that does. `waiting` is called
    /// once when it has to.
    ///
    /// # Errors
    /// When the directory cannot be made or written, or the user interrupts.
    pub fn lock(
        &self,
        entry: &Entry,
        cancel: &CancelFlag,
        waiting: impl FnOnce(),
    ) -> Result<CacheLock, PullError> {
        fs::create_dir_all(&self.dir).map_err(PullError::io("create the model directory", &self.dir))?;
        let path = self.dir.join(format!(".{}.lock", entry.name));
        let mut waiting = Some(waiting);
        loop {
            cancel.check()?;
            match try_lock(&path).map_err(PullError::io("lock", &path))? {
                Some(file) => return Ok(CacheLock { path, _file: file }),
                None => {
                    if let Some(waiting) = waiting.take() {
                        waiting();
                    }
                    std::thread::sleep(LOCK_RETRY);
                }
            }
        }
    }
}

/// The lock file is removed by its holder, so a lock counts only while its file is still the one at the path.
fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
        Ok(()) => {
            let same = fs::metadata(path).is_ok_and(|at_path| {
                file.metadata().is_ok_and(|mine| (mine.dev(), mine.ino()) == (at_path.dev(), at_path.ino()))
            });
            Ok(same.then_some(file))
        }
    }
}

/// Held while a model is fetched.
#[derive(Debug)]
pub struct CacheLock {
    path: PathBuf,
    _file: File,
}

impl Drop for CacheLock {
    fn drop(&mut self) {
        // Removed before it is unlocked; a lock file that stays does no harm.
        let _ = fs::remove_file(&self.path);
    }
}

/// SHA-256 of a file in lower-case hex. `done` is called with the bytes read so far.
///
/// # Errors
/// When the file cannot be read or the user interrupts.
pub fn file_digest(path: &Path, cancel: &CancelFlag, mut done: impl FnMut(u64)) -> Result<String, PullError> {
    let mut file = File::open(path).map_err(PullError::io("open", path))?;
    let (mut hasher, mut buffer, mut total) = (Sha256::new(), vec![0; BUFFER_BYTES], 0);
    loop {
        cancel.check()?;
        let n = file.read(&mut buffer).map_err(PullError::io("read", path))?;
        if n == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..n]);
        total += n as u64;
        done(total);
    }
}

/// Bytes of all files below `dir`; what disappears meanwhile counts as nothing.
pub fn dir_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => dir_bytes(&entry.path()),
            Ok(_) => entry.metadata().map_or(0, |file| file.len()),
            Err(_) => 0,
        })
        .sum()
}

/// Lower-case hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Catalogue;

    #[test]
    fn the_directory_follows_the_conventions() {
        let environment = |set: &'static [(&str, &str)]| {
            move |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
        };
        let both = environment(&[("HOME", "/home/x"), ("XDG_CACHE_HOME", "/caches")]);
        let dir = |cache: Result<ModelCache, PullError>| cache.expect("a place").dir().to_path_buf();
        assert_eq!(dir(ModelCache::locate(Some(Path::new("/given")), both)), Path::new("/given"));
        assert_eq!(dir(ModelCache::locate(None, both)), Path::new("/caches/paceline/models"));
        let home = environment(&[("HOME", "/home/x"), ("XDG_CACHE_HOME", "")]);
        assert_eq!(dir(ModelCache::locate(None, home)), Path::new("/home/x/.cache/paceline/models"));
        assert!(matches!(ModelCache::locate(None, |_| None), Err(PullError::NoCacheDirectory)));
    }

    #[test]
    fn a_lock_excludes_and_leaves_no_file() {
        let dir = tempfile::tempdir().expect("directory");
        let cache = ModelCache { dir: dir.path().join("models") };
        let catalogue = Catalogue::load(None).expect("parses");
        let (entry, cancel) = (&catalogue.entries()[0], CancelFlag::default());
        let lock = cache.lock(entry, &cancel, || panic!("nobody holds it")).expect("locks");
        assert!(try_lock(&lock.path).expect("tries").is_none(), "a second holder");
        cancel.set();
        assert!(matches!(cache.lock(entry, &cancel, || ()), Err(PullError::Interrupted)));
        drop(lock);
        assert_eq!(fs::read_dir(cache.dir()).expect("lists").count(), 0);
    }

    #[test]
    fn the_digest_is_sha256() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("abc");
        fs::write(&path, "abc").expect("writes");
        let digest = file_digest(&path, &CancelFlag::default(), |_| ()).expect("reads");
        assert_eq!(digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
