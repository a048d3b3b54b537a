//! The memory that ranks of one host share: its layout and raw access. The protocol that makes accesses sound is in
//! `shared_memory`.
//!
//! One anonymous file, sealed against resizing so that no access can fault, mapped by every rank:
//! header, one [`Control`] per rank, then two slots (for odd and even pieces) per rank: [`SlotHeader`] and
//! [`SLOT_BYTES`] of data.

use crate::error::CollectiveError;
use memmap2::MmapRaw;
use paceline_domain::Epoch;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate,
    memfd_create,
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Data of one slot. Small enough that two ranks' slots stay in the second-level cache.
pub(crate) const SLOT_BYTES: usize = 256 << 10;

const MAGIC: u64 = u64::from_le_bytes(*b"PLSHARE1");
const ALIGN: usize = 128;
const SLOT_STRIDE: usize = ALIGN + SLOT_BYTES;

/// What all ranks of a region must agree on.
#[repr(C, align(128))]
struct RegionHeader {
    magic: AtomicU64,
    epoch: AtomicU64,
    n_ranks: AtomicU64,
    slot_bytes: AtomicU64,
}

/// One rank's state. Written by that rank, except `sleepers`.
#[repr(C, align(128))]
pub(crate) struct Control {
    /// Number of the last published piece, modulo 2^32. The futex word.
    pub(crate) published: AtomicU32,
    /// Ranks that sleep, or are about to, until `published` changes.
    pub(crate) sleepers: AtomicU32,
    /// Not 0 once the rank has left the group.
    pub(crate) left: AtomicU32,
}

/// What a slot holds. Written before `published`, read after it.
#[repr(C, align(128))]
pub(crate) struct SlotHeader {
    pub(crate) epoch: AtomicU64,
    pub(crate) sequence: AtomicU64,
    /// Size of the whole operation, of which this piece is part.
    pub(crate) total: AtomicU64,
    pub(crate) n_bytes: AtomicU32,
    pub(crate) kind: AtomicU32,
}

/// Types that may lie in shared memory behind a shared reference.
///
/// # Safety
/// Every field is an atomic integer, and the alignment is [`ALIGN`] at most.
unsafe trait Shared {}
// SAFETY: all fields are atomic integers; the alignment is 128.
unsafe impl Shared for RegionHeader {}
// SAFETY: all fields are atomic integers; the alignment is 128.
unsafe impl Shared for Control {}
// SAFETY: all fields are atomic integers; the alignment is 128.
unsafe impl Shared for SlotHeader {}

/// One rank's view of the shared memory.
#[derive(Debug)]
pub(crate) struct Region {
    map: MmapRaw,
    n_ranks: usize,
}

fn region_bytes(n_ranks: usize) -> usize {
    ALIGN + n_ranks * (ALIGN + 2 * SLOT_STRIDE)
}

impl Region {
    /// A fresh region; the descriptor is what peers attach to.
    pub(crate) fn create(n_ranks: usize, epoch: Epoch) -> Result<(Self, OwnedFd), CollectiveError> {
        let during = "creating shared memory";
        let fd = memfd_create("paceline-collectives", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(CollectiveError::os(during))?;
        let n_bytes = region_bytes(n_ranks) as u64;
        ftruncate(&fd, n_bytes).map_err(CollectiveError::os(during))?;
        // Memory that cannot be had is an error here, not a fault later.
        fallocate(&fd, FallocateFlags::empty(), 0, n_bytes).map_err(CollectiveError::os(during))?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(CollectiveError::os(during))?;
        let region = Self::map(fd.as_fd(), n_ranks)?;
        let header = region.header();
        header.epoch.store(epoch.0, Ordering::Relaxed);
        header.n_ranks.store(n_ranks as u64, Ordering::Relaxed);
        header.slot_bytes.store(SLOT_BYTES as u64, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        Ok((region, fd))
    }

    /// The region behind a descriptor that rank 0 sent.
    pub(crate) fn attach(fd: BorrowedFd<'_>, n_ranks: usize, epoch: Epoch) -> Result<Self, CollectiveError> {
        let during = "attaching to shared memory";
        let wrong = |what: String| CollectiveError::Mismatch { rank: 0, what };
        let seals = fcntl_get_seals(fd).map_err(CollectiveError::os(during))?;
        let n_bytes = fstat(fd).map_err(CollectiveError::os(during))?.st_size;
        if !seals.contains(SealFlags::SHRINK) || usize::try_from(n_bytes) != Ok(region_bytes(n_ranks)) {
            return Err(wrong(format!(
                "its region has {n_bytes} bytes and seals {seals:?}; {} bytes and a seal on the size were expected",
                region_bytes(n_ranks)
            )));
        }
        let region = Self::map(fd, n_ranks)?;
        let header = region.header();
        if header.magic.load(Ordering::Acquire) != MAGIC
            || header.slot_bytes.load(Ordering::Relaxed) != SLOT_BYTES as u64
            || header.n_ranks.load(Ordering::Relaxed) != n_ranks as u64
        {
            return Err(wrong("its region has another layout".to_owned()));
        }
        let theirs = Epoch(header.epoch.load(Ordering::Relaxed));
        if theirs != epoch {
            return Err(CollectiveError::Epoch { rank: 0, theirs, ours: epoch });
        }
        Ok(region)
    }

    fn map(fd: BorrowedFd<'_>, n_ranks: usize) -> Result<Self, CollectiveError> {
        let map = MmapRaw::map_raw(fd.as_raw_fd()).map_err(CollectiveError::io("mapping shared memory"))?;
        assert_eq!(map.len(), region_bytes(n_ranks), "invariant: the file has the size of the region");
        Ok(Self { map, n_ranks })
    }

    /// One rank's state.
    pub(crate) fn control(&self, rank: usize) -> &Control {
        assert!(rank < self.n_ranks);
        self.at(ALIGN + rank * ALIGN)
    }

    /// What one rank's slot for odd or even pieces holds.
    pub(crate) fn slot(&self, rank: usize, sequence: u64) -> &SlotHeader {
        self.at(self.slot_offset(rank, sequence))
    }

    /// Copies `bytes` into a slot's data.
    ///
    /// # Safety
    /// The slot belongs to this rank, and no rank reads or writes its data until the piece is published.
    pub(crate) unsafe fn write(&self, rank: usize, sequence: u64, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= SLOT_BYTES);
        let target = self.pointer(self.slot_offset(rank, sequence) + ALIGN + offset, bytes.len());
        // SAFETY: the target is `bytes.len()` bytes inside the mapping; `bytes` is a live borrow that cannot overlap
        // it, since the caller promises that nobody reads the slot; nobody writes it either.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) }
    }

    /// The first `n_bytes` of a slot's data.
    ///
    /// # Safety
    /// The slot's owner has published the piece, which this rank has seen with acquire ordering, and does not write
    /// the slot again while the result lives.
    pub(crate) unsafe fn read(&self, rank: usize, sequence: u64, n_bytes: usize) -> &[u8] {
        assert!(n_bytes <= SLOT_BYTES);
        let source = self.pointer(self.slot_offset(rank, sequence) + ALIGN, n_bytes);
        // SAFETY: `n_bytes` bytes inside the mapping, which lives as long as self; initialized, since the file
        // began as zeros; not written while the result lives, as the caller promises.
        unsafe { std::slice::from_raw_parts(source, n_bytes) }
    }

    fn header(&self) -> &RegionHeader {
        self.at(0)
    }

    fn slot_offset(&self, rank: usize, sequence: u64) -> usize {
        assert!(rank < self.n_ranks);
        ALIGN + self.n_ranks * ALIGN + (2 * rank + (sequence & 1) as usize) * SLOT_STRIDE
    }

    fn at<T: Shared>(&self, offset: usize) -> &T {
        assert!(offset.is_multiple_of(ALIGN));
        let target = self.pointer(offset, size_of::<T>()).cast::<T>();
        // SAFETY: inside the mapping, which lives as long as self; aligned, since the mapping is page-aligned and
        // the offset a multiple of 128; atomic integers are valid for any bits and may be shared (`Shared`).
        unsafe { &*target }
    }

    /// The address of `n_bytes` bytes of the mapping.
    fn pointer(&self, offset: usize, n_bytes: usize) -> *mut u8 {
        assert!(offset + n_bytes <= self.map.len());
        // SAFETY: the offset is inside the mapping or one past its end.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_views_show_the_same_memory() {
        let (near, fd) = Region::create(3, Epoch(9)).unwrap();
        let far = Region::attach(fd.as_fd(), 3, Epoch(9)).unwrap();
        near.control(2).published.store(77, Ordering::Release);
        assert_eq!(far.control(2).published.load(Ordering::Acquire), 77);
        let bytes: Vec<u8> = (0..SLOT_BYTES).map(|i| (i * 31) as u8).collect();
        for rank in 0..3 {
            for sequence in [6, 7] {
                let bytes = &bytes[rank..];
                // SAFETY: nobody reads yet.
                unsafe { near.write(rank, sequence, 0, bytes) };
                // SAFETY: one thread; it does not write while it compares.
                assert_eq!(unsafe { far.read(rank, sequence, bytes.len()) }, bytes);
            }
        }
        assert_eq!(far.control(2).published.load(Ordering::Acquire), 77);
    }

    #[test]
    fn a_region_of_another_group_is_refused() {
        let (_region, fd) = Region::create(2, Epoch(9)).unwrap();
        let error = Region::attach(fd.as_fd(), 3, Epoch(9)).unwrap_err();
        assert!(matches!(error, CollectiveError::Mismatch { rank: 0, .. }), "{error}");
        let error = Region::attach(fd.as_fd(), 2, Epoch(10)).unwrap_err();
        assert!(matches!(error, CollectiveError::Epoch { rank: 0, theirs: Epoch(9), .. }), "{error}");
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, region_bytes(2) as u64).unwrap();
        let error = Region::attach(fd.as_fd(), 2, Epoch(0)).unwrap_err();
        assert!(error.to_string().contains("seal"), "{error}");
        let (_region, sealed) = Region::create(2, Epoch(0)).unwrap();
        assert!(ftruncate(&sealed, 1).is_err());
    }
}
