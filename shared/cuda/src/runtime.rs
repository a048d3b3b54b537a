//! What the backend asks of a device: memory, copies, launches, graphs, all on one stream. `driver` does it on a GPU, the
//! tests' emulator on the CPU; nothing here knows what a kernel computes.

use std::time::Duration;

use paceline_model::link::{LinkId, Offer};

use crate::CudaError;

/// An address in device memory.
pub type DevicePtr = u64;

/// A kernel launch: blocks, threads and shared memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launch {
    /// Blocks in each dimension.
    pub grid: [u32; 3],
    /// Threads of a block, in one dimension.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// Tiles in device memory, and the box of them that a copy takes (kernels/hopper.cuh, `TileMap`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tiles {
    /// The first tile's first piece; a multiple of 16.
    pub first: DevicePtr,
    /// Bytes from a tile to the next; a multiple of 16.
    pub tile_bytes: u64,
    /// Tiles; a box may reach beyond, and gets zeros there.
    pub n_tiles: u32,
    /// Pieces of a tile, one behind the other; a box may reach beyond these too.
    pub n_pieces: u32,
    /// Bytes of a piece, a multiple of 16 and at most 2048.
    pub piece_bytes: u32,
    /// Tiles of a box, at most 256.
    pub box_tiles: u32,
    /// Pieces of each tile in a box, at most 256.
    pub box_pieces: u32,
}

/// What a kernel takes for [`Tiles`].
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct TileMap(pub [u64; 16]);

/// A sequence of launches that was captured and can be replayed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GraphId(pub usize);

/// What a device needs to be linked with those of other ranks.
pub struct Membership {
    /// From the first rank.
    pub id: LinkId,
    /// Place of this rank, from 0.
    pub rank: usize,
    /// Ranks in the group, each on a device of its own.
    pub n_ranks: usize,
    /// How long joining may take.
    pub connect_deadline: Duration,
    /// How long each later operation may take.
    pub deadline: Duration,
    /// Looked at in every wait; once it says yes, the wait ends, and the link with it.
    pub is_aborted: Box<dyn Fn() -> bool + Send>,
}

/// One device and one stream. Operations run in the order of the calls; only `download`, `synchronize` and `upload`
/// wait.
pub trait Runtime: Send {
    /// Memory of at least `n_bytes`, aligned to 256, filled with zeros. Freed when the runtime is dropped.
    ///
    /// # Errors
    /// When the device has not so much left.
    fn alloc(&mut self, n_bytes: usize) -> Result<DevicePtr, CudaError>;

    /// Copies to the device. `from` may be changed when the call returns. Not allowed during a capture.
    ///
    /// # Errors
    /// What the device reports.
    fn upload(&mut self, to: DevicePtr, from: &[u8]) -> Result<(), CudaError>;

    /// Copies from the device, after everything before has been done. Not allowed during a capture.
    ///
    /// # Errors
    /// What the device reports.
    fn download(&mut self, from: DevicePtr, to: &mut [u8]) -> Result<(), CudaError>;

    /// Starts a kernel with one struct of arguments, given as its bytes.
    ///
    /// # Errors
    /// An unknown kernel, or what the device reports.
    fn launch(&mut self, kernel: &'static str, launch: Launch, args: &[u8]) -> Result<(), CudaError>;

    /// Begins to record launches instead of running them.
    ///
    /// # Errors
    /// What the device reports.
    fn begin_capture(&mut self) -> Result<(), CudaError>;

    /// Ends the recording; nothing has run yet.
    ///
    /// # Errors
    /// What the device reports.
    fn end_capture(&mut self) -> Result<GraphId, CudaError>;

    /// Runs what was recorded.
    ///
    /// # Errors
    /// What the device reports.
    fn replay(&mut self, graph: GraphId) -> Result<(), CudaError>;

    /// Waits for everything before.
    ///
    /// # Errors
    /// What the device reports, also of earlier launches.
    fn synchronize(&mut self) -> Result<(), CudaError>;

    /// What the device brings for links with others.
    ///
    /// # Errors
    /// Why it has none.
    fn offer(&mut self) -> Result<Offer, CudaError> {
        Err(CudaError::Nccl(format!("{} has no links", self.name())))
    }

    /// An id for a group, made on the device of its first rank.
    ///
    /// # Errors
    /// What the library reports.
    fn link_id(&mut self) -> Result<LinkId, CudaError> {
        self.offer().map(|_| [0; _])
    }

    /// Links the device with those of other ranks, which do the same. From now on every wait watches the group: when it
    /// fails, the link ends, captured graphs are void, and this and later waits are errors.
    ///
    /// # Errors
    /// What the library reports, a rank that is late, or the abort flag.
    fn join(&mut self, membership: Membership) -> Result<(), CudaError> {
        let _ = membership;
        self.offer().map(|_| ())
    }

    /// Ends the link; what it has under way ends too. Graphs are void.
    fn part(&mut self) {}

    /// Brings `n_f32` numbers of every rank to all: `to` is `[n_ranks][n_f32]`. May be captured.
    ///
    /// # Errors
    /// What the library reports, a rank that is late, or the abort flag.
    fn all_gather(&mut self, from: DevicePtr, to: DevicePtr, n_f32: usize) -> Result<(), CudaError> {
        let _ = (from, to, n_f32);
        self.offer().map(|_| ())
    }

    /// Bytes free and in all.
    ///
    /// # Errors
    /// What the device reports.
    fn memory(&self) -> Result<(u64, u64), CudaError>;

    /// Most bytes of dynamic shared memory a block may have.
    fn max_shared_bytes(&self) -> u32;

    /// Multiprocessors of the device.
    fn n_multiprocessors(&self) -> u32;

    /// Whether it runs the kernels made for sm_90a (kernels/hopper.cuh).
    fn is_hopper(&self) -> bool;

    /// The map a kernel for Hopper copies tiles by.
    ///
    /// # Errors
    /// What the device reports.
    fn tile_map(&self, tiles: &Tiles) -> Result<TileMap, CudaError>;

    /// Name and architecture, for logs and fingerprints ("NVIDIA H100 80GB HBM3, sm_90").
    fn name(&self) -> String;
}
