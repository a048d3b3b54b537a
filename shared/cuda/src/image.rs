//! What the build made of the kernels: machine code, PTX text, the assembler's report. It reads them; it loads nothing.

use std::fmt::Write;

/// Machine code for every architecture the build knows, and PTX for later ones.
pub static FAT_BINARY: &[u8] = &ALIGNED.bytes;
/// The kernels as PTX.
pub const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));
/// What the assembler said of each kernel.
pub const REPORT: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.report"));
/// Version of the compiler: "13.0.88".
pub const NVCC_VERSION: &str = env!("PACELINE_NVCC_VERSION");

/// The driver reads the header of a fat binary as words.
#[repr(C, align(16))]
struct Aligned<T: ?Sized> {
    bytes: T,
}

static ALIGNED: &Aligned<[u8]> =
    &Aligned { bytes: *include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")) };

/// What one kernel takes of a multiprocessor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resources {
    /// Name of the kernel.
    pub kernel: String,
    /// "sm_90"
    pub arch: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of registers a thread keeps in memory: stores and loads.
    pub spill_bytes: u32,
    /// Bytes of static shared memory of a block.
    pub shared_bytes: u32,
}

/// Major version of the CUDA that a driver must support to load the kernels.
pub fn cuda_major() -> u32 {
    let major = NVCC_VERSION.split('.').next().and_then(|major| major.parse().ok());
    major.expect("invariant: build.rs has read the version as numbers")
}

/// Name and bytes of each parameter of every kernel in PTX text.
///
/// # Panics
/// When a parameter is neither a struct nor a plain number.
pub fn parameters(ptx: &str) -> Vec<(String, Vec<usize>)> {
    let entries = ptx.split(".entry ").skip(1);
    entries
        .map(|entry| {
            let (name, rest) = entry.split_once('(').expect("invariant: an entry has a list of parameters");
            let list = rest.split(')').next().unwrap_or_default();
            (name.trim().to_owned(), list.split(".param ").skip(1).map(parameter_bytes).collect())
        })
        .collect()
}

/// Bytes of ".align 8 .b8 name_param_0[24]" or ".u64 name_param_0".
fn parameter_bytes(declaration: &str) -> usize {
    let words: Vec<&str> = declaration.split_whitespace().collect();
    let kind = words.iter().rev().nth(1).copied().unwrap_or_default();
    let bits: usize = kind.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0);
    let array = words.last().and_then(|word| word.split_once('['));
    let n = array.map_or(Some(1), |(_, n)| n.trim_end_matches([']', ',']).parse().ok());
    let n_bytes = n.map_or(0, |n| n * bits / 8);
    assert!(n_bytes > 0, "unknown kind of parameter: {declaration}");
    n_bytes
}

/// What the report says of each kernel, by name and architecture.
pub fn resources(report: &str) -> Vec<Resources> {
    let mut all: Vec<Resources> = Vec::new();
    for line in report.lines() {
        if line.contains("Compiling entry function") {
            let mut quoted = line.split('\'').skip(1).step_by(2).map(str::to_owned);
            let (kernel, arch) = (quoted.next().unwrap_or_default(), quoted.next().unwrap_or_default());
            all.push(Resources { kernel, arch, registers: 0, spill_bytes: 0, shared_bytes: 0 });
        } else if let Some(last) = all.last_mut() {
            last.registers += number_before(line, " registers");
            last.spill_bytes += number_before(line, " bytes spill stores");
            last.spill_bytes += number_before(line, " bytes spill loads");
            last.shared_bytes += number_before(line, " bytes smem");
        }
    }
    all.sort_by(|a, b| (&a.kernel, &a.arch).cmp(&(&b.kernel, &b.arch)));
    all
}

/// The number that stands before `unit`, else 0.
fn number_before(line: &str, unit: &str) -> u32 {
    let before = line.split_once(unit).map(|(before, _)| before);
    before.and_then(|before| before.rsplit([' ', '\t']).next()?.parse().ok()).unwrap_or(0)
}

/// A Markdown table of them.
pub fn table(resources: &[Resources]) -> String {
    let mut table = String::from(
        "| Kernel | Architecture | Registers | Spilled bytes | Static shared bytes |\n|---|---|---|---|---|\n",
    );
    for it in resources {
        let Resources { kernel, arch, registers, spill_bytes, shared_bytes } = it;
        writeln!(table, "| `{kernel}` | {arch} | {registers} | {spill_bytes} | {shared_bytes} |")
            .expect("invariant: writing to a string succeeds");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_from_ptx() {
        let ptx = ".visible .entry add(\n\t.param .align 8 .b8 add_param_0[24]\n)\n.maxntid 128, 1, 1\n{\n\
                   \tld.param.b32 %r4, [add_param_0+16];\n}\n.visible .entry two(\n\t.param .u64 two_param_0,\n\
                   \t.param .align 4 .b8 two_param_1[12]\n)\n{ }\n.visible .entry none()\n{ }\n";
        let expected = [("add", vec![24]), ("two", vec![8, 12]), ("none", vec![])];
        assert_eq!(parameters(ptx), expected.map(|(name, bytes)| (name.to_owned(), bytes)));
    }

    #[test]
    fn resources_are_read_from_the_report() {
        let report = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'b' for 'sm_80'\n\
            ptxas info    : Function properties for b\n    \
                16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n\
            ptxas info    : Used 10 registers, used 0 barriers, 1024 bytes smem, 376 bytes cmem[0]\n\
            ptxas info    : Compiling entry function 'a' for 'sm_90'\n    \
                0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 168 registers, used 1 barriers\n";
        let a = "| `a` | sm_90 | 168 | 0 | 0 |\n";
        let b = "| `b` | sm_80 | 10 | 20 | 1024 |\n";
        assert!(table(&resources(report)).ends_with(&format!("|---|\n{a}{b}")));
    }
}
