//! Counts the heap while files are opened: however a header is made, it takes at most twice the file and a little.
//! The only test of its binary, since the counter sees the whole process.

mod samples;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use paceline_checkpoint::{Checkpoint, ValueType};
use samples::RawGguf;

/// Paths, file handles, error messages.
const CONSTANT: usize = 32 << 10;

struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed to the system's allocator unchanged; the counters change nothing about it. Growing
// goes through the trait's own `realloc`, which holds the old and the new block at once, so it is counted in full.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let in_use = IN_USE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(in_use, Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the block came from `System` with this layout.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Bytes on the heap at the worst moment of opening, and whether the file was taken.
fn peak_of_opening(path: &Path) -> (usize, bool) {
    let before = IN_USE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let opened = Checkpoint::open(path);
    let peak = PEAK.load(Relaxed) - before;
    (peak, opened.is_ok())
}

struct Bench {
    directory: tempfile::TempDir,
    n_taken: usize,
    n_refused: usize,
    worst: f64,
}

impl Bench {
    fn check(&mut self, name: &str, extension: &str, bytes: &[u8]) {
        let path = self.directory.path().join(format!("model.{extension}"));
        std::fs::write(&path, bytes).expect("the directory is ours");
        let (peak, is_taken) = peak_of_opening(&path);
        let limit = 2 * bytes.len() + CONSTANT;
        assert!(peak <= limit, "{name}: {peak} bytes on the heap for a file of {}", bytes.len());
        *if is_taken { &mut self.n_taken } else { &mut self.n_refused } += 1;
        if bytes.len() > 100 * CONSTANT {
            println!("{name}: {:.2} bytes per byte", peak as f64 / bytes.len() as f64);
            self.worst = self.worst.max(peak as f64 / bytes.len() as f64);
        }
    }

    fn gguf(&mut self, name: &str, bytes: &[u8]) {
        self.check(name, "gguf", bytes);
    }

    fn safetensors(&mut self, name: &str, header: &str, n_data_bytes: usize) {
        self.check(name, "safetensors", &samples::safetensors(header, n_data_bytes));
    }
}

/// Files made to take as much memory as they can.
fn gluttons(bench: &mut Bench) {
    let n = 400_000u32;
    let tiny_keys = (0..n)
        .fold(RawGguf::new(0, n.into()), |raw, i| raw.entry(&format!("{i:x}"), ValueType::U8).raw(&[0]));
    bench.gguf("smallest metadata entries", &tiny_keys.data(0));
    for n_dims in [1, 4] {
        let dims = vec![1; n_dims];
        let aligned = RawGguf::new(n.into(), 1).entry("general.alignment", ValueType::U32).u32(8);
        let tiny_tensors = (0..n)
            .fold(aligned, |raw, i| raw.tensor(&format!("{i:x}"), &dims, 1, u64::from(i) * 8))
            .data(n as usize * 8);
        bench.gguf("smallest tensors", &tiny_tensors);
        let entries: Vec<String> = (0..n / 4)
            .map(|i| {
                let (start, end) = (2 * i, 2 * i + 2);
                format!(r#""{i:x}":{{"dtype":"F16","shape":{dims:?},"data_offsets":[{start},{end}]}}"#)
            })
            .collect();
        bench.safetensors("smallest tensors", &format!("{{{}}}", entries.join(",")), n as usize / 2);
    }
    for value_type in [ValueType::U8, ValueType::F64] {
        let numbers = RawGguf::new(0, 1).entry("k", ValueType::Array).array(value_type, 1_000_000);
        bench.gguf("an array of numbers", &numbers.data(8_000_000));
    }
    let strings = RawGguf::new(0, 1).entry("k", ValueType::Array).array(ValueType::String, 1_000_000);
    bench.gguf("an array of empty strings", &(0..1_000_000).fold(strings, |raw, _| raw.u64(0)).data(0));
    let arrays = RawGguf::new(0, 1).entry("k", ValueType::Array).array(ValueType::Array, 500_000);
    let arrays = (0..500_000).fold(arrays, |raw, _| raw.array(ValueType::String, 0));
    bench.gguf("an array of empty arrays", &arrays.data(0));

    let digits = "1,".repeat(2_000_000);
    let long = "x".repeat(4_000_000);
    bench.safetensors("a long shape", &format!(r#"{{"t":{{"dtype":"F16","shape":[{digits}1]}}}}"#), 0);
    bench.safetensors("a long name", &format!(r#"{{"{long}":{{}}}}"#), 0);
    bench.safetensors("a long name with an escape", &format!(r#"{{"{long}\n":{{}}}}"#), 0);
    let escaped = "\\u0041".repeat(60_000);
    let entry = r#"{"dtype":"F16","shape":[1],"data_offsets":[0,2]}"#;
    bench.safetensors("a name of escapes", &format!(r#"{{"{escaped}":{entry}}}"#), 2);
    bench.safetensors(
        "a name and a type of escapes",
        &format!(r#"{{"{escaped}":{{"dtype":"{escaped}"}}}}"#),
        2,
    );
    bench.safetensors("a long type", &format!(r#"{{"t":{{"dtype":"{long}\n"}}}}"#), 0);
    bench.safetensors("a long string for a number", &format!(r#"{{"t":{{"shape":["{long}"]}}}}"#), 0);
    bench.safetensors("a long field name", &format!(r#"{{"t":{{"{long}":0}}}}"#), 0);
    bench.safetensors("deep nesting", &"[{\"a\":".repeat(500_000), 0);
    bench.safetensors("much metadata", &format!(r#"{{"__metadata__":{{"a":"{long}\n"}}}}"#), 0);
}

/// A generator of numbers; the same numbers each time.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Files with a few bytes or fields overwritten in their headers.
fn damaged(bench: &mut Bench) {
    let gguf =
        samples::gguf().metadata("list.long", vec![3u16; 30_000]).to_bytes().expect("the sample is valid");
    let safetensors = samples::valid_safetensors();
    let mut state = 20_260_101;
    for round in 0..1000 {
        for (extension, file, header_bytes) in [("gguf", &gguf, 1500), ("safetensors", &safetensors, 300)] {
            let mut file = file.clone();
            for _ in 0..=round % 3 {
                let start = next(&mut state) as usize % header_bytes;
                let value = match next(&mut state) % 3 {
                    0 => u64::MAX >> (next(&mut state) % 64),
                    1 => 1 << (next(&mut state) % 64),
                    _ => next(&mut state),
                };
                let n_bytes = [1, 4, 8][next(&mut state) as usize % 3];
                file[start..start + n_bytes].copy_from_slice(&value.to_le_bytes()[..n_bytes]);
            }
            bench.check("a damaged file", extension, &file);
        }
    }
}

#[test]
fn opening_takes_at_most_twice_the_file() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("config.json"), "{}").unwrap();
    let mut bench = Bench { directory, n_taken: 0, n_refused: 0, worst: 0.0 };
    gluttons(&mut bench);
    damaged(&mut bench);
    println!("{} taken, {} refused, at most {:.2}", bench.n_taken, bench.n_refused, bench.worst);
    assert!(bench.n_taken > 100 && bench.n_refused > 500, "faults of both kinds are in the set");
}
