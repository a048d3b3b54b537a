//! Finding a device: the driver library, its version, the primary context of one device. No memory, no launches.

use crate::CudaError;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

/// Oldest compute capability the kernels are written for.
const OLDEST: (i32, i32) = (8, 0);

/// One device with its primary context, which is given back on drop.
pub(super) struct Device {
    handle: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    capability: (i32, i32),
    pub(super) n_multiprocessors: u32,
    /// Most bytes of dynamic shared memory a block may ask for.
    pub(super) max_shared_bytes: u32,
    /// Kernels may be launched ahead of the end of those before.
    pub(super) waits_in_kernels: bool,
}

/// Names the call an error comes from.
pub(super) fn check<T>(call: &'static str, result: Result<T, DriverError>) -> Result<T, CudaError> {
    result.map_err(|error| CudaError::Device { call, problem: problem_of(error) })
}

/// "CUDA_ERROR_INVALID_VALUE (invalid argument)"
pub(super) fn problem_of(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{:?} ({})", error.0, text.to_string_lossy()),
        Err(_) => format!("{:?}", error.0),
    }
}

/// Number of devices the driver sees, at least one.
pub(super) fn count() -> Result<usize, CudaError> {
    let unavailable = |problem: String| Err(CudaError::Unavailable(problem));
    // SAFETY: it opens the library of the driver, whose initializers have no requirements.
    if !unsafe { sys::is_culib_present() } {
        return unavailable(
            "libcuda.so.1 cannot be loaded: no NVIDIA driver is installed here, or it is not visible in this \
             container"
                .to_owned(),
        );
    }
    if let Err(error) = result::init() {
        return unavailable(match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => "the NVIDIA driver sees no device".to_owned(),
            _ => format!("the NVIDIA driver does not start: cuInit: {}", problem_of(error)),
        });
    }
    check_version()?;
    match check("cuDeviceGetCount", result::device::get_count())? {
        n if n > 0 => Ok(n as usize),
        _ => unavailable("the NVIDIA driver sees no device (CUDA_VISIBLE_DEVICES may hide them)".to_owned()),
    }
}

/// Machine code of one major version of CUDA runs on drivers of that one and later ones.
fn check_version() -> Result<(), CudaError> {
    let mut version = 0;
    // SAFETY: the argument is a place for one number.
    let result = unsafe { sys::cuDriverGetVersion(&mut version) };
    check("cuDriverGetVersion", result.result())?;
    let needed = crate::image::cuda_major();
    if version / 1000 < needed as i32 {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(CudaError::Unavailable(format!(
            "the NVIDIA driver is too old: it supports CUDA {major}.{minor}, the kernels need CUDA {needed}; \
             update the driver"
        )));
    }
    Ok(())
}

impl Device {
    pub(super) fn open(ordinal: usize) -> Result<Self, CudaError> {
        let n_devices = count()?;
        if ordinal >= n_devices {
            let problem = format!("there is no device {ordinal}, the driver sees {n_devices}");
            return Err(CudaError::Unavailable(problem));
        }
        let handle = check("cuDeviceGet", result::device::get(ordinal as i32))?;
        let name = check("cuDeviceGetName", result::device::get_name(handle))?;
        use sys::CUdevice_attribute_enum as Attribute;
        let attribute = |attribute| {
            // SAFETY: the device comes from cuDeviceGet.
            let value = unsafe { result::device::get_attribute(handle, attribute) };
            check("cuDeviceGetAttribute", value)
        };
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < OLDEST {
            return Err(CudaError::Unavailable(format!(
                "{name} (device {ordinal}) has compute capability {}.{}, the kernels need {}.{} or newer",
                capability.0, capability.1, OLDEST.0, OLDEST.1
            )));
        }
        let n_multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let max_shared_bytes =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        // SAFETY: the device comes from cuDeviceGet; the context is released once, on drop.
        let context = unsafe { result::primary_ctx::retain(handle) };
        let context = check("cuDevicePrimaryCtxRetain", context)?;
        let waits_in_kernels = capability >= (9, 0);
        Ok(Self { handle, context, name, capability, n_multiprocessors, max_shared_bytes, waits_in_kernels })
    }

    /// Whether machine code for sm_90a runs here: on no other device than that.
    pub(super) fn is_hopper(&self) -> bool {
        self.capability == (9, 0)
    }

    /// Makes the context current on the calling thread; every call on the device needs it.
    pub(super) fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained until drop.
        let result = unsafe { result::ctx::set_current(self.context) };
        check("cuCtxSetCurrent", result)
    }

    /// "GPU-" and 32 hexadecimal digits: the same device has the same everywhere.
    pub(super) fn uuid(&self) -> Result<String, CudaError> {
        let digit_pairs = self.uuid_bytes()?.map(|byte| format!("{byte:02x}"));
        Ok(format!("GPU-{}", digit_pairs.concat()))
    }

    /// The same as bytes.
    pub(super) fn uuid_bytes(&self) -> Result<[u8; 16], CudaError> {
        let uuid = check("cuDeviceGetUuid", result::device::get_uuid(self.handle))?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    /// "NVIDIA H100 80GB HBM3, sm_90"
    pub(super) fn name(&self) -> String {
        format!("{}, sm_{}{}", self.name, self.capability.0, self.capability.1)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained in `open`; the owner has destroyed what it made in the context.
        let result = unsafe { result::primary_ctx::release(self.handle) };
        if let Err(error) = result {
            tracing::warn!(problem = problem_of(error), "a GPU's context could not be released");
        }
    }
}
