//! Zeroed buffers on cache-line boundaries; large ones on huge pages. They never grow.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytemuck::Zeroable;

/// Alignment of every buffer: one cache line, one AVX-512 register.
pub const ALIGNMENT: usize = 64;
/// Size of a huge page of the usual kind.
const HUGE_PAGE: usize = 2 << 20;

/// A fixed number of elements, zero at first, aligned to [`ALIGNMENT`]. From 2 MiB on the system is asked for huge
/// pages, and pages nobody wrote to take no memory.
pub struct AlignedVec<T> {
    start: NonNull<T>,
    len: usize,
    memory: Memory,
}

/// Where a buffer comes from, and so how it is given back.
enum Memory {
    None,
    Heap(Layout),
    #[cfg(target_os = "linux")]
    Mapped {
        start: *mut std::ffi::c_void,
        len: usize,
    },
}

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
        if n_bytes >= HUGE_PAGE
            && let Some((start, memory)) = map(n_bytes)
        {
            return Self { start: start.cast(), len, memory };
        }
        let layout =
            Layout::from_size_align(n_bytes, ALIGNMENT).expect("invariant: sizes fit the address space");
        // SAFETY: the size is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start: start.cast(), len, memory: Memory::Heap(layout) }
    }
}

/// Zeroed pages from the system, the first byte on a huge-page boundary.
#[cfg(target_os = "linux")]
fn map(n_bytes: usize) -> Option<(NonNull<u8>, Memory)> {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
    let len = n_bytes.checked_add(HUGE_PAGE)?;
    // SAFETY: the system chooses a place that overlaps nothing.
    let start = unsafe {
        mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
    }
    .ok()?;
    let offset = start.cast::<u8>().align_offset(HUGE_PAGE);
    // SAFETY: the map is longer than asked for by as much as this can be.
    let aligned = unsafe { start.cast::<u8>().add(offset) };
    // SAFETY: the range is inside the map. The advice changes no content, and where it is not taken pages are small.
    let _ = unsafe { madvise(aligned.cast(), n_bytes, Advice::LinuxHugepage) };
    Some((NonNull::new(aligned)?, Memory::Mapped { start, len }))
}

impl<T> Drop for AlignedVec<T> {
    fn drop(&mut self) {
        match self.memory {
            Memory::None => {}
            // SAFETY: it was allocated with this layout; elements are Copy, so there is nothing else to drop.
            Memory::Heap(layout) => unsafe { dealloc(self.start.as_ptr().cast(), layout) },
            #[cfg(target_os = "linux")]
            Memory::Mapped { start, len } => {
                // SAFETY: the map is ours and nothing borrows from it any more. Unmapping a whole map cannot fail.
                let _ = unsafe { rustix::mm::munmap(start, len) };
            }
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
        for len in [0, 1, 15, 16, 1_000, (2 << 20) - 1, 2 << 20, (5 << 20) + 7] {
            let mut buffer = AlignedVec::<u8>::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(ALIGNMENT));
            assert!(buffer.iter().all(|byte| *byte == 0));
            buffer.fill(7);
            assert_eq!(buffer.iter().map(|byte| usize::from(*byte)).sum::<usize>(), 7 * len);
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
