//! NVIDIA's NCCL library, looked for and loaded at run time. It offers its calls; `communicator` makes them safe.

mod communicator;

pub use crate::runtime::Membership;
pub use communicator::Communicator;

use crate::CudaError;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// What the services call the setting that names the library, for error messages.
pub const SETTING: &str = "PACELINE_NCCL_LIB";
/// Bytes of the id that the first rank makes and all ranks join with.
pub const ID_BYTES: usize = paceline_model::link::LINK_ID_BYTES;

const FILE: &str = "libnccl.so.2";
/// The first version whose calls need not block.
const OLDEST: c_int = version_code(2, 14, 0);
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const FLOAT32: c_int = 7;

/// `ncclComm_t`
type Handle = *mut c_void;

/// `ncclUniqueId`
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; ID_BYTES]);

/// `ncclConfig_t` as of version 2.14; later versions take their defaults for what it lacks.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

impl Config {
    const NON_BLOCKING: Self =
        Self { size: size_of::<Self>(), magic: 0xcafe_beef, version: OLDEST as u32, blocking: 0 };
}

/// The loaded library.
pub struct Nccl {
    calls: Calls,
    version: c_int,
    place: String,
}

/// Signatures of nccl.h.
struct Calls {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank_config: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Handle) -> c_int,
    comm_finalize: unsafe extern "C" fn(Handle) -> c_int,
    comm_destroy: unsafe extern "C" fn(Handle) -> c_int,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: unsafe extern "C" fn(Handle) -> *const c_char,
}

const fn version_code(major: c_int, minor: c_int, patch: c_int) -> c_int {
    if major <= 2 && minor <= 8 {
        major * 1000 + minor * 100 + patch
    } else {
        major * 10_000 + minor * 100 + patch
    }
}

impl Nccl {
    /// Loads the library: the file `named`, or `libnccl.so.2` in the folder `named`; without a name, where the dynamic
    /// linker looks.
    ///
    /// # Errors
    /// When it is not there or too old; the error says where it was looked for.
    pub fn load(named: Option<&Path>) -> Result<Self, CudaError> {
        let path = match named {
            Some(folder) if folder.is_dir() => folder.join(FILE),
            Some(file) => file.to_owned(),
            None => PathBuf::from(FILE),
        };
        let place = match named {
            Some(_) => format!("{} ({SETTING})", path.display()),
            None => format!("{FILE} by the dynamic linker (LD_LIBRARY_PATH, ld.so.conf, /usr/lib)"),
        };
        // SAFETY: NCCL's initializers have no requirements.
        let library = unsafe { Library::new(&path) }.map_err(|error| {
            let other =
                if named.is_some() { String::new() } else { format!(" and by {SETTING}, which is not set") };
            CudaError::Nccl(format!("looked for {place}{other}: {}", text_of(&error)))
        })?;
        let calls = Calls::find(&library).map_err(|error| {
            CudaError::Nccl(format!("{place} is no NCCL of version 2.14 or newer: {}", text_of(&error)))
        })?;
        // It starts threads of its own, so it stays.
        std::mem::forget(library);
        let mut version = 0;
        // SAFETY: the argument is a place for one number.
        let code = unsafe { (calls.get_version)(&mut version) };
        let nccl = Self { calls, version, place };
        nccl.check("ncclGetVersion", code)?;
        if version < OLDEST {
            let (found, place) = (nccl.version(), &nccl.place);
            return Err(CudaError::Nccl(format!("{place} is NCCL {found}; 2.14 or newer is needed")));
        }
        Ok(nccl)
    }

    /// "2.28.9"
    pub fn version(&self) -> String {
        let (code, scale) = (self.version, if self.version < 10_000 { 1000 } else { 10_000 });
        format!("{}.{}.{}", code / scale, code % scale / 100, code % 100)
    }

    /// Where it was found.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// An id for a new group, made by its first rank, which listens for the others from now on.
    ///
    /// # Errors
    /// What NCCL reports.
    pub fn unique_id(&self) -> Result<[u8; ID_BYTES], CudaError> {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: the argument is a place for one id.
        let code = unsafe { (self.calls.get_unique_id)(&mut id) };
        self.check("ncclGetUniqueId", code)?;
        Ok(id.0)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), CudaError> {
        if code == SUCCESS { Ok(()) } else { Err(self.error(call, code)) }
    }

    fn error(&self, call: &'static str, code: c_int) -> CudaError {
        // SAFETY: any number is allowed; the text is a constant of the library.
        let what = unsafe { (self.calls.get_error_string)(code) };
        // SAFETY: the communicator is not used; the text is a buffer of the library.
        let last = unsafe { (self.calls.get_last_error)(std::ptr::null_mut()) };
        let texts = [what, last].into_iter().filter(|text| !text.is_null()).map(|text| {
            // SAFETY: a text of the library that ends with zero.
            let text = unsafe { CStr::from_ptr(text) };
            text.to_string_lossy().trim().to_owned()
        });
        let texts: Vec<String> = texts.filter(|text| !text.is_empty()).collect();
        CudaError::Device { call, problem: texts.join(": ") }
    }
}

/// The reason of the dynamic linker, which the error's own text leaves out.
fn text_of(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

impl Calls {
    fn find(library: &Library) -> Result<Self, libloading::Error> {
        macro_rules! find {
            ($($field:ident = $name:literal,)*) => {
                Self { $($field: {
                    // SAFETY: the type is that of the declaration in nccl.h.
                    *unsafe { library.get($name) }?
                },)* }
            };
        }
        Ok(find! {
            get_version = "ncclGetVersion",
            get_unique_id = "ncclGetUniqueId",
            comm_init_rank_config = "ncclCommInitRankConfig",
            comm_get_async_error = "ncclCommGetAsyncError",
            comm_abort = "ncclCommAbort",
            comm_finalize = "ncclCommFinalize",
            comm_destroy = "ncclCommDestroy",
            all_gather = "ncclAllGather",
            get_error_string = "ncclGetErrorString",
            get_last_error = "ncclGetLastError",
        })
    }
}
