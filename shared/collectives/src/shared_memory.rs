//! Ranks of one host: every rank writes its pieces into its own slots of one shared region and reads those of its
//! peers in place. It decides neither who is in the group nor what the numbers mean.
//!
//! # Why no piece is read while it is written
//! Operations are cut into pieces, numbered 1, 2, 3, ... for the life of the group; piece s of a rank lies in its
//! slot s mod 2. For each piece every rank, in this order: (1) writes its slot, (2) stores `published = s` with
//! release ordering, (3) waits until it has loaded `published >= s` of every peer with acquire ordering, (4) reads
//! the peers' slots, (5) goes on to piece s + 1.
//!
//! *Reads see whole pieces:* the load in (3) synchronizes with the store in (2), so the writes of (1) happen before
//! the reads of (4).
//!
//! *Nothing is overwritten too early:* piece s is overwritten by piece s + 2 of the same rank. That rank has passed
//! (3) of piece s + 1, so it has seen `published >= s + 1` of every peer, and each peer stored that after its reads
//! of piece s. So those reads happen before the overwriting. For the same reason a waiting rank finds `published` at
//! s or s + 1, never further.
//!
//! *No wake-up is lost:* a rank that is about to sleep first raises `sleepers`, then looks at `published` once more,
//! by the futex call itself; a publisher stores `published`, then looks at `sleepers`. All four are sequentially
//! consistent, so at least one of the two sees the other.
//!
//! A rank that fails or is dropped sets `left`. One that is killed closes its socket to rank 0, which is kept for
//! that purpose: rank 0 then sets `left` in its place, and the death of rank 0 is seen by all.

use crate::collective::{Collective, CollectiveStats, MAX_GATHER_BYTES, OpKind};
use crate::error::CollectiveError;
use crate::finish::FinishPlans;
use crate::hello::is_pause;
use crate::region::{Control, Region, SLOT_BYTES};
use crate::solo::check_shapes;
use crate::wait::{Limits, SPINS_PER_LOOK, Watch};
use paceline_domain::{Epoch, ReduceTree};
use rustix::event::Timespec;
use rustix::thread::futex;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const FLOAT_BYTES: usize = size_of::<f32>();

/// A rank among ranks of the same host.
#[derive(Debug)]
pub struct SharedMemory {
    rank: usize,
    n_ranks: usize,
    epoch: Epoch,
    region: Region,
    /// On rank 0 the sockets of all others, on others that of rank 0; nothing travels on them any more.
    links: Vec<Option<UnixStream>>,
    /// Number of the last piece.
    sequence: u64,
    limits: Limits,
    stats: CollectiveStats,
    plans: FinishPlans,
    is_poisoned: bool,
}

/// Sizes in a slot's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Sizes {
    total: u64,
    n_bytes: usize,
}

impl SharedMemory {
    /// A member whose peers all have, or will have, this region.
    pub(crate) fn new(
        region: Region,
        rank: usize,
        links: Vec<Option<UnixStream>>,
        epoch: Epoch,
        limits: Limits,
    ) -> Self {
        Self {
            rank,
            n_ranks: links.len(),
            epoch,
            region,
            links,
            sequence: 0,
            limits,
            stats: CollectiveStats::default(),
            plans: FinishPlans::default(),
            is_poisoned: false,
        }
    }

    /// Runs an operation unless an earlier one failed; after a failure the peers see that this rank left.
    fn guarded(
        &mut self,
        operation: impl FnOnce(&mut Self) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if self.is_poisoned {
            return Err(CollectiveError::Poisoned);
        }
        let result = operation(self);
        if result.is_err() {
            self.is_poisoned = true;
            mark_left(self.region.control(self.rank));
        }
        result
    }

    fn reduce(
        &mut self,
        tree: &ReduceTree,
        partials: &[f32],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let watch = self.limits.watch(OpKind::Reduce.name());
        let n = out.len();
        let n_own = tree.subtrees(self.rank).len();
        let n_widest = (0..self.n_ranks).map(|rank| tree.subtrees(rank).len()).max().unwrap_or(1);
        let n_per_piece = SLOT_BYTES / FLOAT_BYTES / n_widest;
        assert!(n_per_piece > 0, "{n_widest} subtrees of one rank do not fit a slot");
        let mut start = 0;
        // Also without elements there is one piece: all operations keep ranks in step.
        loop {
            let len = n_per_piece.min(n - start);
            let own = |subtree: usize| &partials[subtree * n + start..][..len];
            self.publish(OpKind::Reduce, n as u64, (0..n_own).map(|i| bytemuck::cast_slice(own(i))));
            for peer in self.peers() {
                let n_bytes = tree.subtrees(peer).len() * len * FLOAT_BYTES;
                let sizes = self.await_piece(OpKind::Reduce, peer, &watch)?;
                self.check_sizes(peer, sizes, Sizes { total: n as u64, n_bytes })?;
            }
            let (region, rank, sequence) = (&self.region, self.rank, self.sequence);
            let part = |peer: usize, subtree: usize| -> &[f32] {
                if peer == rank {
                    return own(subtree);
                }
                let n_bytes = tree.subtrees(peer).len() * len * FLOAT_BYTES;
                // SAFETY: `await_piece` has seen this piece published, and its owner overwrites it only after this
                // rank has published its next piece ("Why no piece is read while it is written").
                let slot = unsafe { region.read(peer, sequence, n_bytes) };
                &bytemuck::cast_slice(slot)[subtree * len..][..len]
            };
            self.plans.run(tree, part, &mut out[start..start + len]);
            start += len;
            if start == n {
                return Ok(());
            }
        }
    }

    fn gather_pieces(&mut self, own: &[u8], parts: &mut Vec<Vec<u8>>) -> Result<(), CollectiveError> {
        let watch = self.limits.watch(OpKind::Gather.name());
        let is_root = self.rank == 0;
        parts.resize_with(if is_root { self.n_ranks } else { 0 }, Vec::new);
        parts.iter_mut().for_each(Vec::clear);
        if is_root {
            parts[0].extend_from_slice(own);
        }
        let mut start = 0;
        // Every rank takes part in as many pieces as the longest share has.
        let mut longest = own.len();
        loop {
            let of_share = |total: usize| total.saturating_sub(start).min(SLOT_BYTES);
            let piece = &own[start.min(own.len())..][..of_share(own.len())];
            self.publish(OpKind::Gather, own.len() as u64, std::iter::once(piece));
            for peer in self.peers() {
                let sizes = self.await_piece(OpKind::Gather, peer, &watch)?;
                let total = usize::try_from(sizes.total).unwrap_or(usize::MAX).min(MAX_GATHER_BYTES);
                self.check_sizes(peer, sizes, Sizes { total: total as u64, n_bytes: of_share(total) })?;
                longest = longest.max(total);
                if is_root {
                    // SAFETY: as in `reduce`.
                    parts[peer]
                        .extend_from_slice(unsafe { self.region.read(peer, self.sequence, sizes.n_bytes) });
                }
            }
            start += SLOT_BYTES;
            if start >= longest {
                return Ok(());
            }
        }
    }

    fn meet(&mut self) -> Result<(), CollectiveError> {
        let watch = self.limits.watch(OpKind::Barrier.name());
        self.publish(OpKind::Barrier, 0, std::iter::empty());
        for peer in self.peers() {
            let sizes = self.await_piece(OpKind::Barrier, peer, &watch)?;
            self.check_sizes(peer, sizes, Sizes { total: 0, n_bytes: 0 })?;
        }
        Ok(())
    }

    /// All other ranks, the next one first, so that not everybody looks at the same one.
    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, n_ranks) = (self.rank, self.n_ranks);
        (1..n_ranks).map(move |distance| (rank + distance) % n_ranks)
    }

    /// Steps (1) and (2) of a piece.
    fn publish<'a>(&mut self, kind: OpKind, total: u64, parts: impl Iterator<Item = &'a [u8]>) {
        self.sequence += 1;
        let mut n_bytes = 0;
        for part in parts {
            // SAFETY: this rank's own slot; every peer has finished reading the piece before the last one ("Why no
            // piece is read while it is written").
            unsafe { self.region.write(self.rank, self.sequence, n_bytes, part) };
            n_bytes += part.len();
        }
        let slot = self.region.slot(self.rank, self.sequence);
        slot.epoch.store(self.epoch.0, Ordering::Relaxed);
        slot.sequence.store(self.sequence, Ordering::Relaxed);
        slot.total.store(total, Ordering::Relaxed);
        slot.n_bytes.store(n_bytes as u32, Ordering::Relaxed);
        slot.kind.store(kind as u32, Ordering::Relaxed);
        self.stats.bytes_sent += n_bytes as u64;
        let control = self.region.control(self.rank);
        control.published.store(self.sequence as u32, Ordering::SeqCst);
        wake_sleepers(control);
    }

    /// Step (3) of a piece for one peer.
    fn await_piece(&mut self, kind: OpKind, peer: usize, watch: &Watch) -> Result<Sizes, CollectiveError> {
        if !self.has_published(peer) {
            let start = Instant::now();
            let result = self.await_published(peer, watch);
            self.stats.wait += start.elapsed();
            result?;
        }
        let slot = self.region.slot(peer, self.sequence);
        let theirs = Epoch(slot.epoch.load(Ordering::Relaxed));
        if theirs != self.epoch {
            return Err(CollectiveError::Epoch { rank: peer, theirs, ours: self.epoch });
        }
        let sequence = slot.sequence.load(Ordering::Relaxed);
        let their_kind = slot.kind.load(Ordering::Relaxed);
        if sequence != self.sequence || their_kind != kind as u32 {
            let what = format!(
                "it is at piece {sequence} of {}, this rank at piece {} of {}",
                OpKind::name_of(their_kind),
                self.sequence,
                kind.name()
            );
            return Err(CollectiveError::Mismatch { rank: peer, what });
        }
        let n_bytes = slot.n_bytes.load(Ordering::Relaxed) as usize;
        Ok(Sizes { total: slot.total.load(Ordering::Relaxed), n_bytes })
    }

    fn check_sizes(&self, peer: usize, theirs: Sizes, expected: Sizes) -> Result<(), CollectiveError> {
        if theirs == expected {
            return Ok(());
        }
        let what = format!("it sent {theirs:?}, this rank expected {expected:?}");
        Err(CollectiveError::Mismatch { rank: peer, what })
    }

    fn has_published(&self, peer: usize) -> bool {
        has_reached(self.region.control(peer).published.load(Ordering::Acquire), self.sequence)
    }

    fn await_published(&mut self, peer: usize, watch: &Watch) -> Result<(), CollectiveError> {
        let control = self.region.control(peer);
        let start = Instant::now();
        while start.elapsed() < self.limits.spin {
            for _ in 0..SPINS_PER_LOOK {
                if self.has_published(peer) {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            watch.nap(peer)?;
        }
        loop {
            let has_left = control.left.load(Ordering::Acquire) != 0;
            // Looked at after `left`: a rank that published and then left has done its part.
            if self.has_published(peer) {
                return Ok(());
            }
            if has_left {
                return Err(watch.left(peer));
            }
            let nap = watch.nap(peer)?;
            if !self.sleep(peer, nap) && self.is_dead(peer) {
                mark_left(control);
            }
        }
    }

    /// Sleeps until the peer publishes; false when nothing happened for the whole nap.
    fn sleep(&self, peer: usize, nap: Duration) -> bool {
        let control = self.region.control(peer);
        let nap = Timespec::try_from(nap).expect("invariant: a nap is short");
        control.sleepers.fetch_add(1, Ordering::SeqCst);
        let published = control.published.load(Ordering::SeqCst);
        let is_woken = has_reached(published, self.sequence)
            || futex::wait(&control.published, futex::Flags::empty(), published, Some(&nap))
                != Err(rustix::io::Errno::TIMEDOUT);
        control.sleepers.fetch_sub(1, Ordering::SeqCst);
        is_woken
    }

    /// Whether the peer's process closed its socket to this rank.
    fn is_dead(&self, peer: usize) -> bool {
        let Some(mut link) = self.links[peer].as_ref() else { return false };
        match link.read(&mut [0]) {
            Ok(n) => n == 0,
            Err(error) => !is_pause(&error),
        }
    }
}

impl Collective for SharedMemory {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_ranks(&self) -> usize {
        self.n_ranks
    }

    fn all_reduce_tree(
        &mut self,
        tree: &ReduceTree,
        partials: &[f32],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        check_shapes(tree, self.rank, self.n_ranks, partials, out);
        self.guarded(|this| this.reduce(tree, partials, out))
    }

    fn gather(&mut self, own: &[u8], parts: &mut Vec<Vec<u8>>) -> Result<(), CollectiveError> {
        assert!(own.len() <= MAX_GATHER_BYTES, "{} bytes are too many to gather", own.len());
        self.guarded(|this| this.gather_pieces(own, parts))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.guarded(Self::meet)
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.limits.deadline = deadline;
    }

    fn take_stats(&mut self) -> CollectiveStats {
        std::mem::take(&mut self.stats)
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        mark_left(self.region.control(self.rank));
    }
}

/// Whether a counter modulo 2^32 has come to `sequence`, which it is at most two away from.
fn has_reached(published: u32, sequence: u64) -> bool {
    published.wrapping_sub(sequence as u32) < 1 << 31
}

fn mark_left(control: &Control) {
    control.left.store(1, Ordering::SeqCst);
    wake_sleepers(control);
}

fn wake_sleepers(control: &Control) {
    if control.sleepers.load(Ordering::SeqCst) > 0 {
        // It cannot fail on a mapped word; a sleeper that was missed would still look again after its nap.
        let _ = futex::wake(&control.published, futex::Flags::empty(), i32::MAX as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::AbortFlag;
    use std::os::fd::AsFd;

    fn pair(epochs: [u64; 2]) -> [SharedMemory; 2] {
        let (first, fd) = Region::create(2, Epoch(epochs[0])).unwrap();
        let second = Region::attach(fd.as_fd(), 2, Epoch(epochs[0])).unwrap();
        let limits =
            Limits { deadline: Duration::from_secs(60), abort: AbortFlag::new(), spin: Duration::ZERO };
        let of = |region, rank: usize| {
            SharedMemory::new(region, rank, vec![None, None], Epoch(epochs[rank]), limits.clone())
        };
        [of(first, 0), of(second, 1)]
    }

    #[test]
    fn a_slot_of_a_lower_epoch_is_refused() {
        let [mut first, mut second] = pair([8, 7]);
        let (near, far) = std::thread::scope(|scope| {
            let far = scope.spawn(|| second.barrier());
            (first.barrier(), far.join().unwrap())
        });
        assert!(matches!(near, Err(CollectiveError::Epoch { rank: 1, theirs: Epoch(7), ours: Epoch(8) })));
        assert!(matches!(far, Err(CollectiveError::Epoch { rank: 0, .. })));
        assert!(matches!(first.barrier(), Err(CollectiveError::Poisoned)));
    }

    #[test]
    fn numbers_of_pieces_may_wrap() {
        let mut both = pair([1, 1]);
        for member in &mut both {
            member.sequence = u64::from(u32::MAX) - 3;
            member.region.control(member.rank).published.store(u32::MAX - 3, Ordering::SeqCst);
        }
        let [mut first, mut second] = both;
        std::thread::scope(|scope| {
            let far = scope.spawn(move || (0..9).try_for_each(|_| second.barrier()));
            (0..9).try_for_each(|_| first.barrier()).unwrap();
            far.join().unwrap().unwrap();
        });
    }
}
