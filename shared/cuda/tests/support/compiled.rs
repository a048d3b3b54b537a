//! Kernels compiled by g++ into a shared library, together with the emulator. No GPU and no nvcc is needed.

use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_void},
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, PoisonError},
};

use libloading::Library;
use paceline_cuda::Launch;

/// Which kernels to compile.
#[derive(Clone, Default, Debug)]
pub struct Sources {
    /// A file beside the product's kernels, its path relative to `tests/emulator`.
    extra: Option<&'static str>,
    /// Changes of the text: file, what to look for, what to put there.
    mutations: Vec<(String, String, String)>,
}

impl Sources {
    /// The kernels of the product.
    pub fn product() -> Self {
        Self::default()
    }

    /// One more file, relative to `tests/emulator`.
    pub fn with(mut self, file: &'static str) -> Self {
        self.extra = Some(file);
        self
    }

    /// With the only occurrence of `from` in `file` (a name in `kernels` or the extra file) replaced, to show that a
    /// test finds the mistake.
    pub fn mutated(mut self, file: &str, from: &str, to: &str) -> Self {
        self.mutations.push((file.into(), from.into(), to.into()));
        self
    }

    /// Name and text of every file, changed.
    fn texts(&self) -> Vec<(String, String)> {
        let kernels = files_of(&crate_dir().join("kernels"));
        let extra = self.extra.map(|file| emulator_dir().join(file));
        let mut texts: Vec<(String, String)> =
            kernels.into_iter().chain(extra).map(|path| (name_of(&path), read(&path))).collect();
        for (file, from, to) in &self.mutations {
            let text = texts.iter_mut().find(|(name, _)| name == file);
            let (_, text) = text.unwrap_or_else(|| panic!("no kernel file {file}"));
            assert_eq!(text.matches(&**from).count(), 1, "`{from}` must be in {file} once");
            *text = text.replace(&**from, to);
        }
        texts
    }
}

type LaunchFn = unsafe extern "C" fn(
    name: *const c_char,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    n_threads: u32,
    shared_bytes: u32,
    args: *const c_void,
    args_bytes: usize,
    seed: u64,
    error: *mut c_char,
    error_capacity: usize,
) -> i32;
type KernelFn = unsafe extern "C" fn(usize, *mut *const c_char, *mut usize, *mut u32) -> i32;

/// Compiled kernels, loaded.
pub struct Compiled {
    launch: LaunchFn,
    kernel: KernelFn,
    /// Where the functions are.
    _library: Library,
}

/// A kernel as it was declared.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KernelInfo {
    pub name: String,
    pub args_bytes: usize,
    pub max_threads: u32,
}

impl Compiled {
    /// Compiles what has not been compiled before, and loads it; once in a process.
    pub fn load(sources: &Sources) -> Arc<Self> {
        static LOADED: Mutex<Option<HashMap<PathBuf, Arc<Compiled>>>> = Mutex::new(None);
        // Held while compiling: tests that run side by side wait for one compiler.
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let path = build(sources);
        let library = loaded.get_or_insert_default().entry(path.clone());
        Arc::clone(library.or_insert_with(|| Arc::new(Self::open(&path))))
    }

    fn open(path: &Path) -> Self {
        // SAFETY: the initializers of the library only fill its table of kernels.
        let library = unsafe { Library::new(path) };
        let library = library.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // SAFETY: emulator.cpp defines it with this signature.
        let launch = unsafe { library.get::<LaunchFn>(b"emulator_launch") };
        let launch = *launch.expect("defined by emulator.cpp");
        // SAFETY: emulator.cpp defines it with this signature.
        let kernel = unsafe { library.get::<KernelFn>(b"emulator_kernel") };
        let kernel = *kernel.expect("defined by emulator.cpp");
        Self { launch, kernel, _library: library }
    }

    /// All kernels.
    pub fn kernels(&self) -> Vec<KernelInfo> {
        (0..).map_while(|index| self.kernel(index)).collect()
    }

    fn kernel(&self, index: usize) -> Option<KernelInfo> {
        let (mut name, mut args_bytes, mut max_threads) = (std::ptr::null(), 0, 0);
        // SAFETY: the pointers are to variables of the types the function writes.
        let found = unsafe { (self.kernel)(index, &mut name, &mut args_bytes, &mut max_threads) };
        if found == 0 {
            return None;
        }
        // SAFETY: the function has set it to a literal of the library, which is still loaded.
        let name = unsafe { CStr::from_ptr(name) };
        Some(KernelInfo { name: name.to_string_lossy().into_owned(), args_bytes, max_threads })
    }

    /// Runs a kernel to its end. The order in which threads run follows from `seed`. The error names the kernel.
    ///
    /// # Safety
    /// The pointers in `args` must be good for what the kernel does with them.
    pub unsafe fn launch(&self, kernel: &CStr, launch: Launch, args: &[u8], seed: u64) -> Result<(), String> {
        let [x, y, z] = launch.grid;
        let mut error = [0u8; 1024];
        // SAFETY: `args` and `error` are as long as said; the caller answers for the pointers in `args`.
        let status = unsafe {
            (self.launch)(
                kernel.as_ptr(),
                x,
                y,
                z,
                launch.threads,
                launch.shared_bytes,
                args.as_ptr().cast(),
                args.len(),
                seed,
                error.as_mut_ptr().cast(),
                error.len(),
            )
        };
        if status == 0 {
            return Ok(());
        }
        let text = CStr::from_bytes_until_nul(&error).expect("the library ends its text");
        Err(text.to_string_lossy().into_owned())
    }
}

fn crate_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn emulator_dir() -> PathBuf {
    crate_dir().join("tests/emulator")
}

fn files_of(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("lists").path()).collect();
    paths.sort();
    paths
}

fn name_of(path: &Path) -> String {
    path.file_name().expect("a file").to_string_lossy().into_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The emulator needs no instruction set; with these its products are several times as fast.
fn machine_flag() -> Option<&'static str> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("bmi2")
    {
        return Some("-march=x86-64-v3");
    }
    None
}

const FLAGS: [&str; 14] = [
    "-std=c++20",
    "-O2",
    "-fno-fast-math",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-shared",
    "-fPIC",
    // Several libraries are loaded at once; none may take another's functions.
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-pthread",
    "-xc++",
];

/// Path of the library made of the sources. It is named by a hash of all that went into it, and appears complete.
fn build(sources: &Sources) -> PathBuf {
    let texts = sources.texts();
    let mut hasher = DefaultHasher::new();
    (&texts, FLAGS, machine_flag()).hash(&mut hasher);
    files_of(&emulator_dir()).iter().for_each(|path| (name_of(path), read(path)).hash(&mut hasher));
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let name = format!("kernels-{:016x}", hasher.finish());
    let library = dir.join(format!("{name}.so"));
    if library.exists() {
        return library;
    }
    let work = dir.join(format!("{name}-{}", std::process::id()));
    fs::create_dir_all(&work).expect("a folder for the sources");
    texts.iter().for_each(|(name, text)| fs::write(work.join(name), text).expect("writes a source"));
    let made = work.join("made.so");
    compile(&work, sources.extra, &made);
    fs::rename(&made, &library).expect("moves the library");
    fs::remove_dir_all(&work).expect("removes the sources");
    library
}

fn compile(kernels: &Path, extra: Option<&str>, to: &Path) {
    let mut command = Command::new("g++");
    command.args(FLAGS).args(machine_flag()).arg("-I").arg(emulator_dir()).arg("-I").arg(kernels);
    command.arg(emulator_dir().join("emulator.cpp")).arg(kernels.join("all.cu"));
    command.args(extra.map(|file| kernels.join(name_of(Path::new(file))))).arg("-o").arg(to);
    let output = command.output();
    let output =
        output.unwrap_or_else(|error| panic!("g++ compiles the kernels for the CPU: install g++ ({error})"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "g++ of the kernels: {}\n{said}", output.status);
}
