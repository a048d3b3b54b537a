//! The runtime whose device is the CPU: memory of the process, kernels run as fibers. It is stricter than a GPU: what
//! a kernel writes beside its memory is found after the launch, and what it reads there is NaN.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    collections::BTreeMap,
    ffi::CString,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use paceline_cuda::runtime::{Membership, TileMap, Tiles};
use paceline_cuda::{CudaError, DevicePtr, GraphId, Launch, Runtime};
use paceline_model::link::{LinkId, Offer};

use super::compiled::{Compiled, Sources};
use super::pretended_link::PretendedLink;

/// Of allocations, as on a device.
const ALIGNMENT: usize = 256;
/// Bytes before and at least so many behind an allocation that nobody may write.
const GUARD_BYTES: usize = 512;
/// NaN in all formats.
const GUARD: u8 = 0xff;
const DEFAULT_MEMORY_BYTES: u64 = 8 << 30;

/// A device that is the CPU.
pub struct Emulated {
    compiled: Arc<Compiled>,
    /// By the address of the first byte.
    allocations: BTreeMap<DevicePtr, Allocation>,
    memory_bytes: u64,
    used_bytes: u64,
    capture: Option<Vec<Recorded>>,
    graphs: Vec<Vec<Recorded>>,
    link: Option<PretendedLink>,
    max_shared_bytes: u32,
    is_hopper: bool,
    /// Decides the order in which threads run.
    seed: u64,
    n_launches: u64,
    /// Replays of graphs, for whoever asked to see them.
    n_replays: Arc<AtomicU64>,
}

/// An operation in a graph.
#[derive(Clone)]
enum Recorded {
    Launch { kernel: &'static str, launch: Launch, args: Vec<u8> },
    Gather { from: DevicePtr, to: DevicePtr, n_bytes: usize },
}

/// Memory with guards on both sides.
struct Allocation {
    n_bytes: usize,
    layout: Layout,
    base: *mut u8,
}

// SAFETY: the memory belongs to the runtime alone; no thread keeps a pointer after a launch.
unsafe impl Send for Allocation {}

impl Allocation {
    fn new(n_bytes: usize) -> Option<Self> {
        let size = n_bytes.checked_add(2 * GUARD_BYTES)?.checked_next_multiple_of(ALIGNMENT)?;
        let layout = Layout::from_size_align(size, ALIGNMENT).ok()?;
        // SAFETY: the size is at least that of the guards.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            return None;
        }
        let allocation = Self { n_bytes, layout, base };
        for (start, length) in allocation.guards() {
            // SAFETY: guards lie inside the memory.
            let guard = unsafe { base.add(start) };
            // SAFETY: as above; the memory is ours.
            unsafe { ptr::write_bytes(guard, GUARD, length) };
        }
        Some(allocation)
    }

    fn address(&self) -> DevicePtr {
        self.base.expose_provenance() as u64 + GUARD_BYTES as u64
    }

    /// Offset from the base, length.
    fn guards(&self) -> [(usize, usize); 2] {
        let end = GUARD_BYTES + self.n_bytes;
        [(0, GUARD_BYTES), (end, self.layout.size() - end)]
    }

    /// All bytes, guards too.
    fn bytes(&self) -> &[u8] {
        // SAFETY: the memory is initialized and as long as its layout; no kernel runs while the slice lives.
        unsafe { std::slice::from_raw_parts(self.base, self.layout.size()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.layout.size()) }
    }

    /// Offset from the first byte of the allocation of a guard byte that was written.
    fn damage(&self) -> Option<isize> {
        let bytes = self.bytes();
        self.guards().into_iter().find_map(|(start, length)| {
            let hit = bytes[start..start + length].iter().position(|byte| *byte != GUARD)?;
            Some((start + hit) as isize - GUARD_BYTES as isize)
        })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and not freed before.
        unsafe { dealloc(self.base, self.layout) };
    }
}

impl Emulated {
    /// A device of another generation, whose blocks have less shared memory.
    pub fn small() -> Self {
        Self { max_shared_bytes: 99 << 10, is_hopper: false, ..Self::new() }
    }

    /// The kernels of the product.
    pub fn new() -> Self {
        Self::of(&Sources::product())
    }

    /// Other kernels.
    pub fn of(sources: &Sources) -> Self {
        Self {
            compiled: Compiled::load(sources),
            allocations: BTreeMap::new(),
            memory_bytes: DEFAULT_MEMORY_BYTES,
            used_bytes: 0,
            capture: None,
            graphs: Vec::new(),
            link: None,
            max_shared_bytes: 227 << 10,
            is_hopper: true,
            seed: 1,
            n_launches: 0,
            n_replays: Arc::default(),
        }
    }

    /// Counts replays of graphs here.
    pub fn counting_replays(mut self, n_replays: &Arc<AtomicU64>) -> Self {
        self.n_replays = Arc::clone(n_replays);
        self
    }

    /// Threads run in another order.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// A device with so much memory.
    pub fn with_memory(mut self, n_bytes: u64) -> Self {
        self.memory_bytes = n_bytes;
        self
    }

    /// A device that can be linked with others.
    pub fn with_link(mut self, link: PretendedLink) -> Self {
        self.link = Some(link);
        self
    }

    /// What was compiled.
    pub fn compiled(&self) -> &Compiled {
        &self.compiled
    }

    /// The allocation with all of the range, and the range in its bytes.
    fn find(&mut self, address: DevicePtr, n_bytes: usize) -> Option<(&mut Allocation, usize)> {
        let (start, allocation) = self.allocations.range_mut(..=address).next_back()?;
        let offset = usize::try_from(address - start).ok()?;
        let fits = offset.checked_add(n_bytes)? <= allocation.n_bytes;
        fits.then_some((allocation, GUARD_BYTES + offset))
    }

    fn not_in_capture(&self, call: &'static str) -> Result<(), CudaError> {
        if self.capture.is_some() {
            return Err(failure(call, "not allowed during a capture"));
        }
        Ok(())
    }

    fn do_or_record(&mut self, operation: Recorded) -> Result<(), CudaError> {
        match &mut self.capture {
            Some(capture) => {
                capture.push(operation);
                Ok(())
            }
            None => self.run(&operation),
        }
    }

    fn run(&mut self, recorded: &Recorded) -> Result<(), CudaError> {
        match recorded {
            Recorded::Launch { kernel, launch, args } => self.run_kernel(kernel, *launch, args),
            Recorded::Gather { from, to, n_bytes } => {
                let mut own = vec![0; *n_bytes];
                self.download(*from, &mut own)?;
                let all = self.linked()?.all_gather(own)?;
                self.upload(*to, &all)
            }
        }
    }

    fn linked(&mut self) -> Result<&mut PretendedLink, CudaError> {
        self.link.as_mut().ok_or_else(|| CudaError::Nccl("the emulation has no links".into()))
    }

    fn run_kernel(&mut self, kernel: &str, launch: Launch, args: &[u8]) -> Result<(), CudaError> {
        self.n_launches += 1;
        let seed = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(self.n_launches);
        let name = CString::new(kernel).expect("a kernel's name has no zero byte");
        // SAFETY: the test's kernels and arguments: pointers are of this runtime's allocations, and writes beside them
        // are found below.
        let outcome = unsafe { self.compiled.launch(&name, launch, args, seed) };
        outcome.map_err(|problem| failure("launch", problem))?;
        for allocation in self.allocations.values() {
            if let Some(offset) = allocation.damage() {
                let n_bytes = allocation.n_bytes;
                let problem =
                    format!("kernel {kernel}: wrote byte {offset} of an allocation of {n_bytes} bytes");
                return Err(failure("launch", problem));
            }
        }
        Ok(())
    }
}

fn failure(call: &'static str, problem: impl Into<String>) -> CudaError {
    CudaError::Device { call, problem: problem.into() }
}

impl Runtime for Emulated {
    fn alloc(&mut self, n_bytes: usize) -> Result<DevicePtr, CudaError> {
        self.not_in_capture("alloc")?;
        let memory = CudaError::Memory { wanted: n_bytes as u64, free: self.memory_bytes - self.used_bytes };
        if n_bytes as u64 > self.memory_bytes - self.used_bytes {
            return Err(memory);
        }
        let allocation = Allocation::new(n_bytes).ok_or(memory)?;
        let address = allocation.address();
        self.used_bytes += n_bytes as u64;
        self.allocations.insert(address, allocation);
        Ok(address)
    }

    fn upload(&mut self, to: DevicePtr, from: &[u8]) -> Result<(), CudaError> {
        self.not_in_capture("upload")?;
        let found = self.find(to, from.len());
        let (allocation, start) = found.ok_or_else(|| failure("upload", "not within an allocation"))?;
        allocation.bytes_mut()[start..start + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn download(&mut self, from: DevicePtr, to: &mut [u8]) -> Result<(), CudaError> {
        self.not_in_capture("download")?;
        let found = self.find(from, to.len());
        let (allocation, start) = found.ok_or_else(|| failure("download", "not within an allocation"))?;
        to.copy_from_slice(&allocation.bytes()[start..start + to.len()]);
        Ok(())
    }

    fn launch(&mut self, kernel: &'static str, launch: Launch, args: &[u8]) -> Result<(), CudaError> {
        self.do_or_record(Recorded::Launch { kernel, launch, args: args.to_vec() })
    }

    fn begin_capture(&mut self) -> Result<(), CudaError> {
        self.not_in_capture("begin_capture")?;
        self.capture = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&mut self) -> Result<GraphId, CudaError> {
        let capture = self.capture.take();
        self.graphs.push(capture.ok_or_else(|| failure("end_capture", "there is no capture"))?);
        Ok(GraphId(self.graphs.len() - 1))
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), CudaError> {
        self.not_in_capture("replay")?;
        self.n_replays.fetch_add(1, Ordering::Relaxed);
        let launches = self.graphs.get(graph.0).cloned();
        let launches = launches.ok_or_else(|| failure("replay", "there is no such graph"))?;
        launches.iter().try_for_each(|recorded| self.run(recorded))
    }

    fn synchronize(&mut self) -> Result<(), CudaError> {
        self.not_in_capture("synchronize")
    }

    fn offer(&mut self) -> Result<Offer, CudaError> {
        self.linked()?.offer()
    }

    fn link_id(&mut self) -> Result<LinkId, CudaError> {
        self.linked()?.id()
    }

    fn join(&mut self, membership: Membership) -> Result<(), CudaError> {
        self.linked()?.join(membership)
    }

    fn part(&mut self) {
        self.graphs.clear();
        if let Some(link) = &mut self.link {
            link.part();
        }
    }

    fn all_gather(&mut self, from: DevicePtr, to: DevicePtr, n_f32: usize) -> Result<(), CudaError> {
        let is_capturing = self.capture.is_some();
        self.linked()?.note(is_capturing);
        self.do_or_record(Recorded::Gather { from, to, n_bytes: 4 * n_f32 })
    }

    fn memory(&self) -> Result<(u64, u64), CudaError> {
        Ok((self.memory_bytes - self.used_bytes, self.memory_bytes))
    }

    fn max_shared_bytes(&self) -> u32 {
        self.max_shared_bytes
    }

    fn n_multiprocessors(&self) -> u32 {
        4
    }

    fn is_hopper(&self) -> bool {
        self.is_hopper
    }

    /// As `TileMap` of emulator.h has it.
    fn tile_map(&self, tiles: &Tiles) -> Result<TileMap, CudaError> {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let mut map = [0; 16];
        map[..5].copy_from_slice(&[
            tiles.first,
            tiles.tile_bytes,
            pair(tiles.n_tiles, tiles.n_pieces),
            pair(tiles.box_tiles, tiles.box_pieces),
            pair(tiles.piece_bytes, 0),
        ]);
        Ok(TileMap(map))
    }

    fn name(&self) -> String {
        "CPU emulation".into()
    }
}
