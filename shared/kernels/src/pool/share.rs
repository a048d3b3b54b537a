//! The tasks of a job that belong to one thread and that nobody owns yet.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::N_UPCOMING;

/// Tasks taken at once from another thread's share; more of them would wait if the thief is disturbed.
const MOST_STOLEN: usize = 4;

/// Neighbouring tasks nobody owns yet: the first in the low half, one past the last in the high half. Alone in its
/// cache lines (the hardware fetches them in pairs).
#[repr(align(128))]
#[derive(Default)]
pub(super) struct Share {
    tasks: AtomicU64,
    /// Memory the thread's share of a later job begins with: addresses and bytes. Only ever fetched into caches.
    pub(super) upcoming: [(AtomicUsize, AtomicUsize); N_UPCOMING],
}

impl Share {
    pub(super) fn set(&self, tasks: Range<usize>) {
        // Release: who takes a task of it sees the job. Nobody takes meanwhile: the share was empty.
        self.tasks.store(pack(&tasks), Ordering::Release);
    }

    /// Takes the first task.
    pub(super) fn take_first(&self) -> Option<usize> {
        self.take(|tasks| tasks.start + 1..tasks.end).map(|taken| taken.start)
    }

    /// Takes a few of the back half: neighbours, so that who works on them reads memory in a row.
    pub(super) fn take_last(&self) -> Option<Range<usize>> {
        self.take(|tasks| tasks.start..tasks.end - tasks.len().div_ceil(2).min(MOST_STOLEN))
    }

    /// Leaves what `left` says of the tasks and returns the others. They are all behind or all before those.
    fn take(&self, left: impl Fn(&Range<usize>) -> Range<usize>) -> Option<Range<usize>> {
        let unpack = |bits: u64| (bits & 0xffff_ffff) as usize..(bits >> 32) as usize;
        let mut bits = self.tasks.load(Ordering::Relaxed);
        loop {
            let tasks = unpack(bits);
            if tasks.is_empty() {
                return None;
            }
            let left = left(&tasks);
            match self.tasks.compare_exchange_weak(bits, pack(&left), Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) if left.start > tasks.start => return Some(tasks.start..left.start),
                Ok(_) => return Some(left.end..tasks.end),
                Err(now) => bits = now,
            }
        }
    }
}

fn pack(tasks: &Range<usize>) -> u64 {
    (tasks.end as u64) << 32 | tasks.start as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_taken_from_both_ends_until_none_is_left() {
        let share = Share::default();
        assert_eq!((share.take_first(), share.take_last()), (None, None));
        share.set(3..15);
        assert_eq!(share.take_first(), Some(3));
        assert_eq!(share.take_last(), Some(11..15));
        assert_eq!(share.take_last(), Some(7..11));
        assert_eq!(share.take_last(), Some(5..7));
        assert_eq!(share.take_last(), Some(4..5));
        assert_eq!((share.take_first(), share.take_last()), (None, None));
        share.set(0..1);
        assert_eq!((share.take_first(), share.take_first()), (Some(0), None));
    }
}
