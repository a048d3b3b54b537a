//! Zeroed buffers on cache-line boundaries, large ones in chunks of huge pages. They never grow.
//!
//! Walks through the page tables cost as much as the weights they lead to where pages are small, so buffers too small
//! for a huge page of their own share chunks: each takes the next bytes of the newest chunk. Nothing is used twice,
//! and a chunk goes back to the system when its last buffer does.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytemuck::Zeroable;

/// Alignment of every buffer: one cache line, one AVX-512 register.
pub const ALIGNMENT: usize = 64;
/// Size of a huge page of the usual kind.
const HUGE_PAGE: usize = 2 << 20;
/// Address space of a chunk; larger buffers have one of their own. Untouched pages take no memory.
const CHUNK_BYTES: usize = 64 << 20;
/// From this size on buffers are in chunks.
const MIN_CHUNKED_BYTES: usize = 32 << 10;

/// A fixed number of elements, zero at first, aligned to [`ALIGNMENT`]. Large ones are on huge pages where the system
/// has them, and pages nobody wrote to take no memory.
pub struct AlignedVec<T> {
    start: NonNull<T>,
    len: usize,
    memory: Memory,
}

/// Where a buffer comes from, and so how it is given back.
enum Memory {
    None,
    Heap(Layout),
    /// Keeps the chunk alive.
    #[cfg(target_os = "linux")]
    Chunk {
        _chunk: Arc<Chunk>,
    },
}

/// Zeroed pages from the system.
#[cfg(target_os = "linux")]
struct Chunk {
    map: *mut std::ffi::c_void,
    map_len: usize,
    /// The first huge-page boundary.
    start: NonNull<u8>,
    /// Bytes from there on.
    len: usize,
}

/// The newest chunk and how much of it is given out.
#[cfg(target_os = "linux")]
static NEWEST: Mutex<(Weak<Chunk>, usize)> = Mutex::new((Weak::new(), 0));

// SAFETY: it owns its elements like a Vec; the pointers are to nobody else's memory.
unsafe impl<T: Send> Send for AlignedVec<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for AlignedVec<T> {}

impl<T: Zeroable + Copy> AlignedVec<T> {
    /// `len` zeros.
    ///
    /// # Panics
    /// When the size overflows; aborts when the system has no memory.
    pub fn zeroed(len: usize) -> Self {
        const { assert!(align_of::<T>() <= ALIGNMENT) };
        let n_bytes = len.checked_mul(size_of::<T>()).expect("invariant: sizes were checked against memory");
        if n_bytes == 0 {
            return Self { start: NonNull::dangling(), len, memory: Memory::None };
        }
        #[cfg(target_os = "linux")]
        if n_bytes >= MIN_CHUNKED_BYTES
            && let Some((start, chunk)) = Chunk::part(n_bytes)
        {
            return Self { start: start.cast(), len, memory: Memory::Chunk { _chunk: chunk } };
        }
        let layout =
            Layout::from_size_align(n_bytes, ALIGNMENT).expect("invariant: sizes fit the address space");
        // SAFETY: the size is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start: start.cast(), len, memory: Memory::Heap(layout) }
    }
}

impl<T: Zeroable + Copy> Default for AlignedVec<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

#[cfg(target_os = "linux")]
impl Chunk {
    /// So many bytes nobody had before, from the newest chunk if it has them.
    fn part(n_bytes: usize) -> Option<(NonNull<u8>, Arc<Self>)> {
        let n_bytes = n_bytes.checked_next_multiple_of(ALIGNMENT)?;
        let mut newest = NEWEST.lock().unwrap_or_else(PoisonError::into_inner);
        let (chunk, used) = match newest.0.upgrade() {
            Some(chunk) if chunk.len - newest.1 >= n_bytes => (chunk, newest.1),
            _ => (Arc::new(Self::map(n_bytes.max(CHUNK_BYTES))?), 0),
        };
        *newest = (Arc::downgrade(&chunk), used + n_bytes);
        // SAFETY: the chunk has so many bytes more.
        let start = unsafe { chunk.start.add(used) };
        Some((start, chunk))
    }

    fn map(len: usize) -> Option<Self> {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
        let len = len.checked_next_multiple_of(HUGE_PAGE)?;
        let map_len = len.checked_add(HUGE_PAGE)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the system chooses a place that overlaps nothing.
        let map = unsafe { mmap_anonymous(std::ptr::null_mut(), map_len, access, MapFlags::PRIVATE) }.ok()?;
        let offset = map.cast::<u8>().align_offset(HUGE_PAGE);
        // SAFETY: the map is longer than asked for by as much as this can be.
        let start = unsafe { map.cast::<u8>().add(offset) };
        // SAFETY: the range is inside the map. The advice changes no content; where it is not taken pages are small.
        let _ = unsafe { madvise(start.cast(), len, Advice::LinuxHugepage) };
        Some(Self { map, map_len, start: NonNull::new(start)?, len })
    }
}

#[cfg(target_os = "linux")]
impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: the map is ours, and no buffer in it is left. Unmapping a whole map cannot fail.
        let _ = unsafe { rustix::mm::munmap(self.map, self.map_len) };
    }
}

// SAFETY: it owns its pages; who may touch which of them is for the buffers to keep.
#[cfg(target_os = "linux")]
unsafe impl Send for Chunk {}
// SAFETY: as above; the chunk itself touches none.
#[cfg(target_os = "linux")]
unsafe impl Sync for Chunk {}

impl<T> Drop for AlignedVec<T> {
    fn drop(&mut self) {
        if let Memory::Heap(layout) = self.memory {
            // SAFETY: it was allocated with this layout; elements are Copy, so there is nothing else to drop.
            unsafe { dealloc(self.start.as_ptr().cast(), layout) }
        }
    }
}

impl<T> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the buffer holds `len` elements, zero or written since; T is Zeroable.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for Deref, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> std::fmt::Debug for AlignedVec<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "AlignedVec({} elements)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_every_size_are_aligned_zero_and_writable() {
        for len in [0, 1, 15, 16, 1_000, 40_001, 40_001, (2 << 20) - 1, 2 << 20, (5 << 20) + 7, 65 << 20] {
            let mut buffer = AlignedVec::<u8>::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(ALIGNMENT));
            assert!(buffer.iter().all(|byte| *byte == 0));
            buffer.fill(7);
            assert_eq!(buffer.iter().map(|byte| usize::from(*byte)).sum::<usize>(), 7 * len);
        }
    }

    #[test]
    fn neighbours_in_a_chunk_are_apart_and_outlive_each_other() {
        let mut buffers: Vec<AlignedVec<u8>> = (0..200).map(|_| AlignedVec::zeroed(1_000_001)).collect();
        for (idx, buffer) in buffers.iter_mut().enumerate() {
            buffer.fill(idx as u8);
        }
        let mut odd = 0;
        buffers.retain(|_| {
            odd += 1;
            odd % 2 == 0
        });
        for (idx, buffer) in buffers.iter().enumerate() {
            assert!(buffer.iter().all(|byte| *byte == (2 * idx + 1) as u8));
        }
    }

    #[test]
    fn elements_keep_their_type() {
        let mut buffer = AlignedVec::<f32>::zeroed(1 << 20);
        buffer[(1 << 20) - 1] = 2.5;
        assert_eq!(buffer.iter().sum::<f32>(), 2.5);
        let moved = std::thread::spawn(move || buffer[0]).join();
        assert_eq!(moved.ok(), Some(0.0));
    }
}
