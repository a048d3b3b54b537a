//! Files from Hugging Face repositories, by the `hf-hub` client. It honours `HF_ENDPOINT`, `HF_HOME` and the stored
//! token, and goes on where an interrupted download stopped.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use hf_hub::{
    Repo, RepoType,
    api::{Progress, sync::ApiBuilder},
};

use crate::{error::PullError, interrupt::CancelFlag, progress::Bar};

/// The client has no time limits of its own: a download that delivers nothing for this long has failed.
const STALLED: Duration = Duration::from_secs(30);
/// How often a running download is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Times the client tries again by itself.
const RETRIES: usize = 2;

/// A hub source.
#[derive(Clone, Debug)]
pub struct HubFile {
    /// `owner/name`.
    pub repository: String,
    /// Commit, tag or branch.
    pub revision: String,
    /// Path in the repository.
    pub file: String,
}

/// Downloads the file into `dir`, which is the caller's alone, and gives its path there.
///
/// # Errors
/// When the hub does not answer or does not deliver, or the user interrupts.
pub fn fetch(file: &HubFile, dir: &Path, bar: &Bar, cancel: &CancelFlag) -> Result<PathBuf, PullError> {
    let fetched = Arc::new(AtomicU64::new(0));
    let (sender, receiver) = mpsc::channel();
    let (task, dir, counter) = (file.clone(), dir.to_path_buf(), Fetched(fetched.clone()));
    // A blocked read cannot be interrupted: the thread is left to end with the process.
    thread::spawn(move || {
        // The receiver is gone when the download was given up.
        let _ = sender.send(download(&task, &dir, counter));
    });
    let (mut seen, mut last_growth) = (0, Instant::now());
    loop {
        cancel.check()?;
        match receiver.recv_timeout(POLL) {
            Ok(result) => return result.map_err(PullError::Source),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(PullError::Source("the hub client ended without a result".into()));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        let now = fetched.load(Ordering::Relaxed);
        if now != seen {
            (seen, last_growth) = (now, Instant::now());
            bar.set(now);
        } else if last_growth.elapsed() > STALLED {
            return Err(PullError::Source(format!(
                "{} delivered nothing for {} seconds",
                file.repository,
                STALLED.as_secs()
            )));
        }
    }
}

fn download(file: &HubFile, dir: &Path, progress: Fetched) -> Result<PathBuf, String> {
    let cache = dir.join("hub");
    fs::create_dir_all(&cache).map_err(|error| format!("cannot create {}: {error}", cache.display()))?;
    let api = ApiBuilder::from_env().with_cache_dir(cache).with_progress(false).with_retries(RETRIES);
    let repo = Repo::with_revision(file.repository.clone(), RepoType::Model, file.revision.clone());
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", file.repository);
    let api = api.build().map_err(|error| failed(&error))?;
    let pointer =
        api.repo(repo).download_with_progress(&file.file, progress).map_err(|error| failed(&error))?;
    // The client's cache links to the blob; the blob is what can be moved.
    fs::canonicalize(&pointer).map_err(|error| failed(&error))
}

/// Counts bytes for whoever looks on.
struct Fetched(Arc<AtomicU64>);

impl Progress for Fetched {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.0.store(0, Ordering::Relaxed);
    }

    fn update(&mut self, size: usize) {
        self.0.fetch_add(size as u64, Ordering::Relaxed);
    }

    fn finish(&mut self) {}
}
