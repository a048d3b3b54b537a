//! Pinned memory of the host through which all copies go. Uploads fill its two halves in turn, so that one is copied
//! to the device while the other is filled; it knows nothing of what is copied.

use super::device::check;
use super::link::{Link, Work};
use crate::{CudaError, DevicePtr};
use cudarc::driver::{result, sys};
use std::ptr::NonNull;

/// Bytes of a half: a weight matrix is copied in pieces of this size.
const HALF_BYTES: usize = 4 << 20;
/// Pieces start at multiples of this.
const ALIGNMENT: usize = 256;

/// The memory, and where the next upload goes. All calls need the device's context to be current.
pub(super) struct Staging {
    memory: NonNull<u8>,
    /// Recorded when a half was full: once it has happened, the half can be filled again.
    events: [sys::CUevent; 2],
    /// The half being filled, and how far it is.
    half: usize,
    used: usize,
}

impl Staging {
    pub(super) fn new() -> Result<Self, CudaError> {
        // SAFETY: no requirements; freed once, by `free`.
        let memory = unsafe { result::malloc_host(2 * HALF_BYTES, 0) };
        let memory = NonNull::new(check("cuMemHostAlloc", memory)?.cast::<u8>());
        let memory = memory.expect("invariant: the driver gives memory or an error");
        let mut staging = Self { memory, events: [std::ptr::null_mut(); 2], half: 0, used: 0 };
        for i in 0..2 {
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
            match check("cuEventCreate", event) {
                Ok(event) => staging.events[i] = event,
                Err(error) => {
                    staging.free();
                    return Err(error);
                }
            }
        }
        Ok(staging)
    }

    /// Queues a copy to the device. `from` has been read when this returns.
    pub(super) fn upload(
        &mut self,
        (stream, link): (sys::CUstream, &mut Link),
        to: DevicePtr,
        from: &[u8],
    ) -> Result<(), CudaError> {
        let mut done = 0;
        while done < from.len() {
            if self.used == HALF_BYTES {
                self.turn(stream, link)?;
            }
            let n_bytes = (from.len() - done).min(HALF_BYTES - self.used);
            let piece = self.piece(self.half * HALF_BYTES + self.used, n_bytes);
            piece.copy_from_slice(&from[done..][..n_bytes]);
            // SAFETY: pinned memory that is not written before this copy has happened; the caller's range is on the
            // device.
            let result = unsafe { result::memcpy_htod_async(to + done as u64, piece, stream) };
            check("cuMemcpyHtoDAsync", result)?;
            done += n_bytes;
            self.used = (self.used + n_bytes).next_multiple_of(ALIGNMENT);
        }
        Ok(())
    }

    /// Goes to the other half, when it has been copied.
    fn turn(&mut self, stream: sys::CUstream, link: &mut Link) -> Result<(), CudaError> {
        // SAFETY: event and stream live.
        let result = unsafe { result::event::record(self.events[self.half], stream) };
        check("cuEventRecord", result)?;
        self.half = 1 - self.half;
        self.used = 0;
        // An event that was never recorded has happened.
        link.wait(Work::Event(self.events[self.half]))
    }

    /// Copies from the device and waits for it, and so for all uploads before.
    pub(super) fn download(
        &mut self,
        (stream, link): (sys::CUstream, &mut Link),
        from: DevicePtr,
        to: &mut [u8],
    ) -> Result<(), CudaError> {
        for (i, chunk) in to.chunks_mut(2 * HALF_BYTES).enumerate() {
            let from = from + (i * 2 * HALF_BYTES) as u64;
            let piece = self.piece(0, chunk.len());
            // SAFETY: the stream has copied earlier uploads out of this memory before it writes here; the caller's
            // range is on the device.
            let result = unsafe { result::memcpy_dtoh_async(piece, from, stream) };
            check("cuMemcpyDtoHAsync", result)?;
            link.wait(Work::Stream(stream))?;
            chunk.copy_from_slice(self.piece(0, chunk.len()));
            (self.half, self.used) = (0, 0);
        }
        Ok(())
    }

    fn piece(&mut self, start: usize, n_bytes: usize) -> &mut [u8] {
        assert!(start + n_bytes <= 2 * HALF_BYTES, "invariant: pieces lie inside");
        // SAFETY: inside the allocation, as asserted.
        let first = unsafe { self.memory.add(start) };
        // SAFETY: the range belongs to this object, pinned memory is initialized, and the borrow of `self` keeps it
        // from being lent twice.
        unsafe { std::slice::from_raw_parts_mut(first.as_ptr(), n_bytes) }
    }

    /// Gives everything back; called once, when the stream has nothing to do.
    pub(super) fn free(&mut self) {
        for event in self.events.iter().filter(|event| !event.is_null()) {
            // SAFETY: created in `new`, destroyed only here.
            let _ = unsafe { result::event::destroy(*event) };
        }
        // SAFETY: allocated in `new`, freed only here.
        let _ = unsafe { result::free_host(self.memory.as_ptr().cast()) };
    }
}
