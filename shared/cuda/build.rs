//! Compiles the kernels when feature `driver` is on: a fat binary, the same as PTX text, and the assembler's report.
//! Without the feature it does nothing, and no nvcc is needed.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, exit},
};

const KERNELS: &str = "kernels";
/// Oldest compiler whose output the driver bindings can load.
const OLDEST: (u32, u32) = (12, 4);
/// Architectures with machine code of their own, and the one whose PTX serves later ones.
const FAT_BINARY: [&str; 8] = [
    "-gencode",
    "arch=compute_80,code=sm_80",
    "-gencode",
    "arch=compute_90a,code=sm_90a",
    "-gencode",
    "arch=compute_90,code=compute_90",
    "-fatbin",
    "-Xptxas=-v",
];
const PTX: [&str; 3] = ["-gencode", "arch=compute_90,code=compute_90", "-ptx"];

fn main() {
    if env::var_os("CARGO_FEATURE_DRIVER").is_none() {
        println!("cargo:rerun-if-changed=build.rs");
        return;
    }
    println!("cargo:rerun-if-changed={KERNELS}");
    for name in ["NVCC", "CUDA_HOME", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if let Err(problem) = build() {
        eprintln!("\nerror: the CUDA kernels cannot be compiled: {problem}\n");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    let nvcc = find_nvcc()?;
    println!("cargo:rerun-if-changed={}", nvcc.display());
    let version = version(&nvcc)?;
    println!("cargo:rustc-env=PACELINE_NVCC_VERSION={version}");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo gives no OUT_DIR")?);
    compile(&nvcc, &PTX, &out.join("kernels.ptx"))?;
    let report = compile(&nvcc, &FAT_BINARY, &out.join("kernels.fatbin"))?;
    let path = out.join("kernels.report");
    fs::write(&path, report).map_err(|error| format!("{}: {error}", path.display()))
}

/// NVCC, else CUDA_HOME, else the search path, else what `tests/run --cuda` fetched.
fn find_nvcc() -> Result<PathBuf, String> {
    if let Some(named) = env::var_os("NVCC").filter(|named| !named.is_empty()) {
        let named = PathBuf::from(named);
        return if named.is_file() {
            Ok(named)
        } else {
            Err(format!("NVCC names {}, which is no file", named.display()))
        };
    }
    let mut places = Vec::new();
    if let Some(home) = env::var_os("CUDA_HOME").filter(|home| !home.is_empty()) {
        places.push(Path::new(&home).join("bin/nvcc"));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|dir| dir.join("nvcc")).find(|nvcc| nvcc.is_file());
    places.extend(on_path);
    places.push(fetched_nvcc());
    places.iter().find(|place| place.is_file()).cloned().ok_or_else(|| {
        let home = env::var("CUDA_HOME").map_or("not set".to_owned(), |home| format!("{home}, no bin/nvcc"));
        format!(
            "nvcc was not found. Looked for it by:\n  NVCC: not set\n  CUDA_HOME: {home}\n  PATH: {}\n  {}\n\
             `tests/run --cuda` fetches it there; or install the CUDA toolkit, {}.{} or newer.",
            path.to_string_lossy(),
            fetched_nvcc().display(),
            OLDEST.0,
            OLDEST.1,
        )
    })
}

fn fetched_nvcc() -> PathBuf {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let root = package.ancestors().nth(2).unwrap_or(&package);
    root.join("target/nvcc/nvidia/cu13/bin/nvcc")
}

/// "13.0.88", from "Cuda compilation tools, release 13.0, V13.0.88".
fn version(nvcc: &Path) -> Result<String, String> {
    let output = run(Command::new(nvcc).arg("--version"))?;
    let words = output.split_whitespace();
    let version = words.filter_map(|word| word.strip_prefix('V')).find(|word| word.contains('.'));
    let version = version.ok_or_else(|| format!("{} --version says:\n{output}", nvcc.display()))?;
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if found < OLDEST {
        let (major, minor) = OLDEST;
        return Err(format!("{} is version {version}; {major}.{minor} is needed", nvcc.display()));
    }
    Ok(version.to_owned())
}

/// Returns what the compiler said.
fn compile(nvcc: &Path, options: &[&str], to: &Path) -> Result<String, String> {
    let mut command = Command::new(nvcc);
    command.args(options).args(["-std=c++17", "-O3", "-o"]).arg(to);
    command.arg(Path::new(KERNELS).join("all.cu"));
    run(&mut command).map_err(|problem| {
        let has_host_compiler = env::var_os("NVCC_CCBIN").is_some()
            || Command::new("g++").arg("--version").output().is_ok_and(|output| output.status.success());
        let hint = "\nnvcc needs a C++ compiler of the host: install g++, or name one by NVCC_CCBIN.";
        format!("{problem}{}", if has_host_compiler { "" } else { hint })
    })
}

/// Standard output and error of a command that succeeds.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    if output.status.success() { Ok(said) } else { Err(format!("{command:?}: {}\n{said}", output.status)) }
}
