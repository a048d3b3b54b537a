//! A slice in the hands of many tasks, each of which has other parts of it.

use std::ops::Range;

/// A mutable slice whose parts are handed to tasks that run at once.
pub(crate) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    borrow: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it only gives out parts under the promise of `range_mut` that they are disjoint, and T may change threads.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: std::marker::PhantomData }
    }

    /// # Safety
    /// No two ranges in use at the same time overlap.
    ///
    /// # Panics
    /// When the range is not inside the slice.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn range_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} is not inside 0..{}", self.len);
        // SAFETY: the range was checked, so the offset stays inside the borrowed slice.
        let start = unsafe { self.start.add(range.start) };
        // SAFETY: inside the borrowed slice, and disjoint from other parts by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(start, range.len()) }
    }

    /// `n` rows, `first` and those that begin `stride` elements further each.
    ///
    /// # Safety
    /// As of [`Self::range_mut`], for every row.
    ///
    /// # Panics
    /// When a row is not inside the slice, or rows overlap.
    pub(crate) unsafe fn strided_mut(
        &self,
        first: Range<usize>,
        stride: usize,
        n: usize,
    ) -> StridedMut<'_, T> {
        let end = first.end + stride * n.saturating_sub(1);
        assert!(
            first.start <= first.end && end <= self.len,
            "{n} rows from {first:?} are not inside 0..{}",
            self.len
        );
        assert!(first.len() <= stride, "rows overlap");
        // SAFETY: the range was checked, so the offset stays inside the borrowed slice.
        let start = unsafe { self.start.add(first.start) };
        StridedMut { start, len: first.len(), stride, n, borrow: std::marker::PhantomData }
    }
}

/// Rows of a slice, as far from each other as is said, that nobody else uses.
pub(crate) struct StridedMut<'a, T> {
    start: *mut T,
    len: usize,
    stride: usize,
    n: usize,
    borrow: std::marker::PhantomData<&'a mut [T]>,
}

impl<T> StridedMut<'_, T> {
    /// One of the rows.
    ///
    /// # Panics
    /// When there are not so many.
    #[inline(always)]
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.n, "row {row} of {}", self.n);
        // SAFETY: the slice has room for `n` rows at this stride.
        let start = unsafe { self.start.add(row * self.stride) };
        // SAFETY: inside the slice; who made this promised that nobody else uses its rows.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}
