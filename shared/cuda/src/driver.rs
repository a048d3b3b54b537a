//! A GPU through NVIDIA's driver library, which is loaded when first asked for. It knows no kernel by name.

mod device;
mod link;
mod staging;
mod tile_map;

use crate::runtime::{DevicePtr, GraphId, Launch, Membership, Runtime, TileMap, Tiles};
use crate::{CudaError, image, kernels};
use cudarc::driver::{result, sys};
use device::{Device, check, problem_of};
use link::{Link, Work};
use paceline_model::link::{LinkId, Offer};
use staging::Staging;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::time::Duration;

/// Dynamic shared memory that every kernel may use without asking.
const FREE_SHARED_BYTES: u32 = 48 << 10;
/// Most bytes of a kernel's arguments.
const MAX_ARGS_BYTES: usize = 4096;

/// One device, one stream on it, and everything that was made there.
pub struct Driver {
    stream: sys::CUstream,
    module: sys::CUmodule,
    functions: HashMap<&'static str, Function>,
    link: Link,
    allocations: Vec<DevicePtr>,
    staging: Option<Staging>,
    /// Events of marks that were used up.
    events: Vec<sys::CUevent>,
    args: Box<Args>,
    is_capturing: bool,
    /// The last operation was another library's, behind which nothing is launched ahead.
    is_behind_gather: bool,
    // Dropped last: it releases the context.
    device: Device,
}

/// A point of time on the stream.
#[derive(Debug)]
pub struct Mark(sys::CUevent);

/// The stream of a driver, as other libraries take it; void when the driver is dropped.
#[derive(Clone, Copy, Debug)]
pub struct Stream(sys::CUstream);

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory it may use.
    shared_bytes: u32,
}

/// The driver reads as many bytes as the kernel takes, so there are always enough of them.
#[repr(C, align(16))]
struct Args([u8; MAX_ARGS_BYTES]);

// SAFETY: handles of the driver may be used from any thread; `enter` makes the context current on the thread of each
// call, and `&mut self` keeps calls apart.
unsafe impl Send for Driver {}

// SAFETY: a handle of the driver, see above.
unsafe impl Send for Mark {}

// SAFETY: a handle of the driver, see above.
unsafe impl Send for Stream {}

impl Stream {
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self(std::ptr::null_mut())
    }

    pub(crate) fn handle(self) -> *mut c_void {
        self.0.cast()
    }
}

impl Driver {
    /// Number of devices, at least one.
    ///
    /// # Errors
    /// When there is no driver, it is too old, or it sees no device.
    pub fn count() -> Result<usize, CudaError> {
        device::count()
    }

    /// Opens a device and loads the kernels.
    ///
    /// # Errors
    /// When there is no such device, it is too old, or it has not enough memory.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        let device = Device::open(ordinal)?;
        device.enter()?;
        let mut driver = Self {
            stream: std::ptr::null_mut(),
            module: std::ptr::null_mut(),
            functions: HashMap::new(),
            link: Link::new(),
            allocations: Vec::new(),
            staging: None,
            events: Vec::new(),
            args: Box::new(Args([0; MAX_ARGS_BYTES])),
            is_capturing: false,
            is_behind_gather: false,
            device,
        };
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        driver.stream = check("cuStreamCreate", stream)?;
        // SAFETY: a whole fat binary, aligned, that lives as long as the program.
        let module = unsafe { result::module::load_data(image::FAT_BINARY.as_ptr().cast()) };
        driver.module = check("cuModuleLoadData", module)?;
        driver.staging = Some(Staging::new()?);
        // All now: loading a kernel during a capture is not allowed everywhere.
        for (name, _) in kernels::signatures() {
            driver.function(name)?;
        }
        Ok(driver)
    }

    /// Where NCCL is looked for; see [`crate::nccl::Nccl::load`].
    pub fn with_nccl(mut self, place: Option<PathBuf>) -> Self {
        self.link.look_in(place);
        self
    }

    /// The stream, for libraries that queue work of their own.
    pub fn stream(&self) -> Stream {
        Stream(self.stream)
    }

    /// Which device it is, the same text in every process: "GPU-" and 32 hexadecimal digits.
    ///
    /// # Errors
    /// What the device reports.
    pub fn uuid(&self) -> Result<String, CudaError> {
        self.device.uuid()
    }

    /// Makes the device current on the calling thread, for libraries that ask CUDA for it.
    ///
    /// # Errors
    /// What the device reports.
    pub fn enter(&self) -> Result<(), CudaError> {
        self.device.enter()
    }

    /// Whether everything before has been done; does not wait.
    ///
    /// # Errors
    /// What the device reports, also of earlier launches.
    pub fn is_idle(&self) -> Result<bool, CudaError> {
        self.device.enter()?;
        // SAFETY: the stream lives.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuStreamQuery", result.result()).map(|()| true),
        }
    }

    /// Copies on the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn copy(&mut self, to: DevicePtr, from: DevicePtr, n_bytes: usize) -> Result<(), CudaError> {
        self.device.enter()?;
        // SAFETY: the caller's ranges are on the device; the stream lives.
        let result = unsafe { result::memcpy_dtod_async(to, from, n_bytes, self.stream) };
        check("cuMemcpyDtoDAsync", result)
    }

    /// Marks the point of time when everything before has been done.
    ///
    /// # Errors
    /// What the device reports.
    pub fn mark(&mut self) -> Result<Mark, CudaError> {
        self.device.enter()?;
        let event = match self.events.pop() {
            Some(event) => event,
            None => check("cuEventCreate", result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT))?,
        };
        // SAFETY: event and stream live.
        let result = unsafe { result::event::record(event, self.stream) };
        check("cuEventRecord", result)?;
        Ok(Mark(event))
    }

    /// Waits for both marks and returns the time between them, as measured by the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn elapsed(&mut self, from: Mark, to: Mark) -> Result<Duration, CudaError> {
        self.device.enter()?;
        self.events.extend([from.0, to.0]);
        self.link.wait(Work::Event(to.0))?;
        // SAFETY: both events have been recorded on the one stream.
        let milliseconds = unsafe { result::event::elapsed(from.0, to.0) };
        let milliseconds = check("cuEventElapsedTime", milliseconds)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }

    /// Destroys all graphs; their ids are void. Before a communicator that was captured in them goes.
    pub fn destroy_graphs(&mut self) {
        if self.device.enter().is_ok() {
            self.link.destroy_graphs();
        }
    }

    /// Ends a capture of which nothing is kept.
    fn discard_capture(&mut self) {
        if std::mem::take(&mut self.is_capturing) {
            // SAFETY: the stream lives.
            if let Ok(graph) = unsafe { result::stream::end_capture(self.stream) } {
                // SAFETY: just captured.
                let _ = unsafe { result::graph::destroy(graph) };
            }
        }
    }

    fn function(&mut self, name: &'static str) -> Result<Function, CudaError> {
        if let Some(function) = self.functions.get(name) {
            return Ok(*function);
        }
        let c_name = CString::new(name).expect("invariant: names of kernels are identifiers");
        // SAFETY: the module is loaded.
        let handle = unsafe { result::module::get_function(self.module, c_name) };
        let handle = handle.map_err(|error| CudaError::Device {
            call: "cuModuleGetFunction",
            problem: format!("{name}: {}", problem_of(error)),
        })?;
        let function = Function { handle, shared_bytes: FREE_SHARED_BYTES };
        self.functions.insert(name, function);
        Ok(function)
    }

    /// Allows `name` as much shared memory as it asks for.
    fn allow_shared(&mut self, name: &'static str, n_bytes: u32) -> Result<(), CudaError> {
        let most = self.device.max_shared_bytes;
        if n_bytes > most {
            let problem = format!("{name} asks for {n_bytes} bytes of shared memory, a block has {most}");
            return Err(CudaError::Device { call: "cuFuncSetAttribute", problem });
        }
        let function = self.functions.get_mut(name).expect("invariant: looked up before");
        use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as ATTRIBUTE;
        // SAFETY: a function of the loaded module.
        let result =
            unsafe { result::function::set_function_attribute(function.handle, ATTRIBUTE, n_bytes as i32) };
        check("cuFuncSetAttribute", result)?;
        function.shared_bytes = n_bytes;
        Ok(())
    }

    fn staging(&mut self) -> (&mut Staging, &mut Link) {
        assert!(!self.is_capturing, "copies to and from the host cannot be captured");
        (self.staging.as_mut().expect("invariant: made by `open`"), &mut self.link)
    }
}

/// Lets a kernel begin while the one before ends: every kernel waits itself for what it needs (`grid_wait`).
fn launched_ahead() -> sys::CUlaunchAttribute {
    // SAFETY: a union of plain numbers and pointers, for all of which zeros are values.
    let mut value: sys::CUlaunchAttributeValue = unsafe { std::mem::zeroed() };
    value.programmaticStreamSerializationAllowed = 1;
    let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    sys::CUlaunchAttribute { id, pad: [0; 4], value }
}

impl Runtime for Driver {
    fn alloc(&mut self, n_bytes: usize) -> Result<DevicePtr, CudaError> {
        assert!(!self.is_capturing, "memory cannot be allocated during a capture");
        self.device.enter()?;
        let n_bytes = n_bytes.max(1);
        // SAFETY: no requirements; freed on drop.
        let memory = match unsafe { result::malloc_sync(n_bytes) } {
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, _) = self.memory()?;
                return Err(CudaError::Memory { wanted: n_bytes as u64, free });
            }
            memory => check("cuMemAlloc", memory)?,
        };
        self.allocations.push(memory);
        // SAFETY: just the bytes that were allocated.
        let result = unsafe { result::memset_d8_async(memory, 0, n_bytes, self.stream) };
        check("cuMemsetD8Async", result)?;
        Ok(memory)
    }

    fn upload(&mut self, to: DevicePtr, from: &[u8]) -> Result<(), CudaError> {
        self.device.enter()?;
        let stream = self.stream;
        let (staging, link) = self.staging();
        staging.upload((stream, link), to, from)
    }

    fn download(&mut self, from: DevicePtr, to: &mut [u8]) -> Result<(), CudaError> {
        self.device.enter()?;
        let stream = self.stream;
        let (staging, link) = self.staging();
        staging.download((stream, link), from, to)
    }

    fn launch(&mut self, kernel: &'static str, launch: Launch, args: &[u8]) -> Result<(), CudaError> {
        self.device.enter()?;
        let function = self.function(kernel)?;
        if launch.shared_bytes > function.shared_bytes {
            self.allow_shared(kernel, launch.shared_bytes)?;
        }
        self.args.0[..args.len()].copy_from_slice(args);
        let mut parameters: [*mut c_void; 1] = [self.args.0.as_mut_ptr().cast()];
        let [x, y, z] = launch.grid;
        let mut ahead = launched_ahead();
        let is_behind_gather = std::mem::take(&mut self.is_behind_gather);
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream,
            attrs: &mut ahead,
            numAttrs: u32::from(self.device.waits_in_kernels && !is_behind_gather),
        };
        // SAFETY: the function takes one struct, as tests/kernel_signatures.rs checks, and the driver copies it and the
        // configuration before it returns; what its pointers point to is up to the launcher of the kernel.
        let result = unsafe {
            sys::cuLaunchKernelEx(&config, function.handle, parameters.as_mut_ptr(), std::ptr::null_mut())
        };
        let result = result.result();
        result.map_err(|error| CudaError::Device {
            call: "cuLaunchKernelEx",
            problem: format!("{kernel} with {launch:?}: {}", problem_of(error)),
        })
    }

    fn begin_capture(&mut self) -> Result<(), CudaError> {
        assert!(!self.is_capturing, "a capture has been begun");
        self.device.enter()?;
        use sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as MODE;
        // SAFETY: the stream lives.
        let result = unsafe { result::stream::begin_capture(self.stream, MODE) };
        check("cuStreamBeginCapture", result)?;
        self.is_capturing = true;
        Ok(())
    }

    fn end_capture(&mut self) -> Result<GraphId, CudaError> {
        if !self.is_capturing {
            let problem = "nothing is being captured, or the capture ended with a failure".to_owned();
            return Err(CudaError::Device { call: "cuStreamEndCapture", problem });
        }
        self.device.enter()?;
        self.is_capturing = false;
        // SAFETY: the stream lives.
        let graph = unsafe { result::stream::end_capture(self.stream) };
        let graph = check("cuStreamEndCapture", graph)?;
        // SAFETY: the graph was just captured.
        let result = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        // SAFETY: as above; what was instantiated does not need it.
        let destroyed = unsafe { result::graph::destroy(graph) };
        let executable = check("cuGraphInstantiateWithFlags", result)?;
        let id = self.link.keep(executable);
        check("cuGraphDestroy", destroyed)?;
        // SAFETY: just instantiated; the stream lives.
        let uploaded = unsafe { result::graph::upload(executable, self.stream) };
        check("cuGraphUpload", uploaded)?;
        Ok(id)
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), CudaError> {
        self.device.enter()?;
        let executable = self.link.graph(graph)?;
        // SAFETY: instantiated and not destroyed; the stream lives.
        let result = unsafe { result::graph::launch(executable, self.stream) };
        check("cuGraphLaunch", result)
    }

    fn synchronize(&mut self) -> Result<(), CudaError> {
        self.device.enter()?;
        self.link.wait(Work::Stream(self.stream))
    }

    fn offer(&mut self) -> Result<Offer, CudaError> {
        let library = format!("NCCL {}", self.link.nccl()?.version());
        Ok(Offer { device: self.device.uuid_bytes()?, library })
    }

    fn link_id(&mut self) -> Result<LinkId, CudaError> {
        self.device.enter()?;
        self.link.nccl()?.unique_id()
    }

    fn join(&mut self, membership: Membership) -> Result<(), CudaError> {
        self.device.enter()?;
        self.link.join(membership)
    }

    fn part(&mut self) {
        if self.device.enter().is_ok() {
            self.discard_capture();
            self.link.end();
        }
    }

    fn all_gather(&mut self, from: DevicePtr, to: DevicePtr, n_f32: usize) -> Result<(), CudaError> {
        self.device.enter()?;
        let (stream, is_capturing) = (self.stream(), self.is_capturing);
        self.is_behind_gather = true;
        let gathered = self.link.all_gather((from, to), n_f32, stream, is_capturing);
        if gathered.is_err() {
            self.part();
        }
        gathered
    }

    fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.device.enter()?;
        let (free, total) = check("cuMemGetInfo", result::mem_get_info())?;
        Ok((free as u64, total as u64))
    }

    fn max_shared_bytes(&self) -> u32 {
        self.device.max_shared_bytes
    }

    fn n_multiprocessors(&self) -> u32 {
        self.device.n_multiprocessors
    }

    fn is_hopper(&self) -> bool {
        self.device.is_hopper()
    }

    fn tile_map(&self, tiles: &Tiles) -> Result<TileMap, CudaError> {
        tile_map::encode(tiles)
    }

    fn name(&self) -> String {
        self.device.name()
    }
}

/// After a failure of the device every call reports it again, so answers are not looked at here.
impl Drop for Driver {
    fn drop(&mut self) {
        if self.device.enter().is_err() {
            return;
        }
        self.discard_capture();
        self.link.free(self.stream);
        if !self.stream.is_null() {
            // SAFETY: the stream lives.
            let _ = unsafe { result::stream::synchronize(self.stream) };
        }
        if !self.module.is_null() {
            // SAFETY: loaded by `open`; nothing runs any more.
            let _ = unsafe { result::module::unload(self.module) };
        }
        for memory in self.allocations.drain(..) {
            // SAFETY: allocated by `alloc`, freed once; nothing runs any more.
            let _ = unsafe { result::free_sync(memory) };
        }
        if let Some(mut staging) = self.staging.take() {
            staging.free();
        }
        for event in self.events.drain(..) {
            // SAFETY: created by `mark`, destroyed once.
            let _ = unsafe { result::event::destroy(event) };
        }
        if !self.stream.is_null() {
            // SAFETY: created by `open`.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
    }
}
