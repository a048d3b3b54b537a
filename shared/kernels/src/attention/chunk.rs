//! One chunk of attention: scores, softmax and weighted values of up to 16 queries of one KV head, and the merging
//! of two chunks. Every query has its own accumulators and its own order; sharing is only of loads.

use paceline_domain::BlockId;
use paceline_domain::group::BLOCK_POSITIONS;

use super::{CHUNK, MAX_QUERIES};
use crate::kv::KvBlocks;
use crate::math::exp::{exp_f32, exp_lanes};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{LANES, Simd, fold_lanes, greater, max_lanes};

/// Scores of each query, then their exponentials; by position in the chunk.
pub(crate) type Scores = [[f32; CHUNK]; MAX_QUERIES];

/// The kernels of one instruction set.
#[derive(Clone, Copy)]
pub(crate) struct AttentionKernels {
    pub(crate) chunk_f16: ChunkKernel<u16>,
    pub(crate) chunk_f32: ChunkKernel<f32>,
    pub(crate) merge: MergeKernel,
}

/// Fills the partial results of a chunk, all of them.
pub(crate) type ChunkKernel<E> = unsafe fn(&ChunkArgs<'_, E>, &mut Scores, &mut Partials<'_>);
/// Adds a later chunk to what came before.
pub(crate) type MergeKernel = unsafe fn(state: &mut Partials<'_>, later: &Partials<'_>);

/// One query head of one row in one chunk.
#[derive(Clone, Copy, Default)]
pub(crate) struct Query<'a> {
    pub(crate) q: &'a [f32],
    /// It sees the positions `start .. end` of the chunk, possibly none.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// What a chunk reads.
pub(crate) struct ChunkArgs<'a, E> {
    pub(crate) queries: &'a [Query<'a>],
    pub(crate) blocks: KvBlocks<'a, E>,
    /// Block 0 is the chunk's first.
    pub(crate) block_table: &'a [BlockId],
    pub(crate) kv_head: usize,
    pub(crate) scale: f32,
}

/// Partial results of some queries: of one chunk, or of all chunks so far. A query that saw nothing has sum 0.
pub(crate) struct Partials<'a> {
    /// Largest score, per query.
    pub(crate) max: &'a mut [f32],
    /// Sum of `exp(score - max)`, per query.
    pub(crate) sum: &'a mut [f32],
    /// Values weighted by `exp(score - max)`: `[n_queries, value_dim]`.
    values: &'a mut [f32],
    value_dim: usize,
}

impl<'a> Partials<'a> {
    /// Numbers needed for so many queries.
    pub(crate) fn len(n_queries: usize, value_dim: usize) -> usize {
        n_queries * (2 + value_dim)
    }

    /// Partial results in `memory`, as they are there.
    pub(crate) fn new(memory: &'a mut [f32], n_queries: usize, value_dim: usize) -> Self {
        let (values, memory) = memory.split_at_mut(n_queries * value_dim);
        let (max, memory) = memory.split_at_mut(n_queries);
        Self { max, sum: &mut memory[..n_queries], values, value_dim }
    }

    /// No query saw anything.
    pub(crate) fn clear(&mut self) {
        self.sum.fill(0.0);
    }

    pub(crate) fn values(&self, query: usize) -> &[f32] {
        &self.values[query * self.value_dim..(query + 1) * self.value_dim]
    }

    fn values_mut(&mut self, query: usize) -> &mut [f32] {
        &mut self.values[query * self.value_dim..(query + 1) * self.value_dim]
    }
}

/// An element of the KV cache.
pub(crate) trait KvElement: Copy {
    fn widen(self) -> f32;
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F32;
}

impl KvElement for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[f32; LANES]) -> S::F32 {
        s.load(from)
    }
}

impl KvElement for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        half::f16::from_bits(self).to_f32()
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[u16; LANES]) -> S::F32 {
        s.load_f16(from)
    }
}

/// Scalar definition of a chunk.
pub(crate) fn chunk_scalar<E: KvElement>(
    args: &ChunkArgs<'_, E>,
    scores: &mut Scores,
    out: &mut Partials<'_>,
) {
    let keys = |position: usize| args.blocks.keys(args.block_table[position / LANES], args.kv_head);
    let values = |position: usize| args.blocks.values(args.block_table[position / LANES], args.kv_head);
    for (i, query) in args.queries.iter().enumerate() {
        let positions = query.start..query.end;
        out.values_mut(i).fill(0.0);
        out.sum[i] = 0.0;
        out.max[i] = f32::NEG_INFINITY;
        if positions.is_empty() {
            continue;
        }
        let mut max = [f32::NEG_INFINITY; LANES];
        for position in positions.clone() {
            let lane = position % LANES;
            let mut score = 0.0_f32;
            for (q, key) in query.q.iter().zip(keys(position)) {
                score = q.mul_add(key[lane].widen(), score);
            }
            scores[i][position] = score * args.scale;
            max[lane] = greater(scores[i][position], max[lane]);
        }
        let max = max_lanes(max);
        let mut sum = [0.0_f32; LANES];
        for position in positions.clone() {
            scores[i][position] = exp_f32(scores[i][position] - max);
            sum[position % LANES] += scores[i][position];
        }
        for position in positions {
            let columns = values(position).as_flattened();
            let row = &columns[position % LANES * out.value_dim..];
            for (value, v) in out.values_mut(i).iter_mut().zip(row) {
                *value = scores[i][position].mul_add(v.widen(), *value);
            }
        }
        out.max[i] = max;
        out.sum[i] = fold_lanes(sum);
    }
}

/// Scalar definition of merging. What saw nothing changes nothing.
pub(crate) fn merge_scalar(state: &mut Partials<'_>, later: &Partials<'_>) {
    for i in 0..state.sum.len() {
        let Some([before, after]) = merge_sums(state, later, i) else { continue };
        for (value, later) in state.values_mut(i).iter_mut().zip(later.values(i)) {
            *value = value.mul_add(before, later * after);
        }
    }
}

/// Merges maximum and sum of query i. The factors of the values, unless one side saw nothing: then all is done.
#[inline(always)]
fn merge_sums(state: &mut Partials<'_>, later: &Partials<'_>, i: usize) -> Option<[f32; 2]> {
    if later.sum[i] == 0.0 {
        return None;
    }
    if state.sum[i] == 0.0 {
        (state.max[i], state.sum[i]) = (later.max[i], later.sum[i]);
        state.values_mut(i).copy_from_slice(later.values(i));
        return None;
    }
    let max = greater(later.max[i], state.max[i]);
    let before = exp_f32(state.max[i] - max);
    let after = exp_f32(later.max[i] - max);
    state.max[i] = max;
    state.sum[i] = state.sum[i] * before + later.sum[i] * after;
    Some([before, after])
}

#[inline(always)]
fn merge<S: Simd>(s: S, state: &mut Partials<'_>, later: &Partials<'_>) {
    for i in 0..state.sum.len() {
        let Some([before, after]) = merge_sums(state, later, i) else { continue };
        let (before, after) = (s.splat(before), s.splat(after));
        // value_dim is a multiple of 16.
        let values = state.values_mut(i).as_chunks_mut::<LANES>().0;
        for (value, later) in values.iter_mut().zip(later.values(i).as_chunks::<LANES>().0) {
            s.store(s.fma(s.load(value), before, s.mul(s.load(later), after)), value);
        }
    }
}

/// A chunk in tiles of up to `T` queries by `T` registers.
#[inline(always)]
fn chunk<S: Simd, E: KvElement, const T: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    scores: &mut Scores,
    out: &mut Partials<'_>,
) {
    let tiles = args.queries.chunks(T);
    for (tile, (queries, scores)) in tiles.zip(scores.chunks_mut(T)).enumerate() {
        let scores = &mut scores[..queries.len()];
        match queries.len() {
            1 => score_tile::<S, E, 1, T>(s, args, queries, scores),
            2 => score_tile::<S, E, 2, T>(s, args, queries, scores),
            3 if T > 2 => score_tile::<S, E, 3, T>(s, args, queries, scores),
            4 if T > 2 => score_tile::<S, E, 4, T>(s, args, queries, scores),
            n => unreachable!("invariant: a tile of at most {T} queries has {n}"),
        }
        for (i, (query, scores)) in queries.iter().zip(&mut *scores).enumerate() {
            let i = tile * T + i;
            (out.max[i], out.sum[i]) = softmax(s, query, scores);
            out.values_mut(i).fill(0.0);
        }
        weigh_values::<S, E, T>(s, args, (tile * T, queries, scores), out);
    }
}

/// Scores of N queries with every block one of them sees, B blocks at a time. Lanes are positions; scores of
/// positions that a query does not see are garbage.
#[inline(always)]
fn score_tile<S: Simd, E: KvElement, const N: usize, const B: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    queries: &[Query<'_>],
    scores: &mut [[f32; CHUNK]],
) {
    let Some((start, end)) = seen_by_any(queries) else { return };
    let (first, last) = (start / BLOCK_POSITIONS, (end - 1) / BLOCK_POSITIONS);
    let scale = s.splat(args.scale);
    let mut block = first;
    while block <= last {
        let mut acc = [[s.splat(0.0); B]; N];
        // Past the end the last block is worked on again, and not stored.
        let mut keys = [&[] as &[[E; LANES]]; B];
        for b in 0..B {
            keys[b] = args.blocks.keys(args.block_table[(block + b).min(last)], args.kv_head);
        }
        for d in 0..keys[0].len() {
            let mut key = [s.splat(0.0); B];
            for b in 0..B {
                key[b] = E::load(s, &keys[b][d]);
            }
            for n in 0..N {
                let q = s.splat(queries[n].q[d]);
                for b in 0..B {
                    acc[n][b] = s.fma(q, key[b], acc[n][b]);
                }
            }
        }
        for n in 0..N {
            let scores = scores[n].as_chunks_mut::<LANES>().0;
            for b in 0..B.min(last + 1 - block) {
                s.store(s.mul(acc[n][b], scale), &mut scores[block + b]);
            }
        }
        block += B;
    }
}

/// From the first to the last position that one of the queries sees.
#[inline(always)]
fn seen_by_any(queries: &[Query<'_>]) -> Option<(usize, usize)> {
    let seen = queries.iter().filter(|query| query.start < query.end);
    seen.map(|query| (query.start, query.end)).reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))
}

/// Scores to `exp(score - max)`; gives the maximum and the sum.
#[inline(always)]
fn softmax<S: Simd>(s: S, query: &Query<'_>, scores: &mut [f32; CHUNK]) -> (f32, f32) {
    let (start, end) = (query.start, query.end);
    if start >= end {
        return (f32::NEG_INFINITY, 0.0);
    }
    let blocks = start / LANES..(end - 1) / LANES + 1;
    scores[blocks.start * LANES..start].fill(f32::NEG_INFINITY);
    scores[end..blocks.end * LANES].fill(f32::NEG_INFINITY);
    let scores = &mut scores.as_chunks_mut::<LANES>().0[blocks];
    let mut max = s.splat(f32::NEG_INFINITY);
    for block in scores.iter() {
        max = s.greater(s.load(block), max);
    }
    let max = max_lanes(s.to_array(max));
    let mut sum = s.splat(0.0);
    for block in scores {
        // Masked lanes give +0, which changes no bit of a sum of exponentials.
        let p = exp_lanes(s, s.sub(s.load(block), s.splat(max)));
        sum = s.add(sum, p);
        s.store(p, block);
    }
    (max, fold_lanes(s.to_array(sum)))
}

/// Adds the weighted values of a tile's queries: first the positions that only some see, each query alone, then
/// those all see, together, then again those that only some see. So every query has its order of positions.
#[inline(always)]
fn weigh_values<S: Simd, E: KvElement, const T: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    (first_query, queries, weights): (usize, &[Query<'_>], &[[f32; CHUNK]]),
    out: &mut Partials<'_>,
) {
    let weighted = |n: usize, positions| Weighted { weights: &weights[n..], positions };
    let start = queries.iter().map(|query| query.start).max().unwrap_or(0);
    let end = queries.iter().map(|query| query.end).min().unwrap_or(0);
    let dim = out.value_dim;
    for (n, query) in queries.iter().enumerate() {
        let before = if start < end { query.start..start } else { query.start..query.end };
        let values = out.values_mut(first_query + n);
        value_rows::<S, E, 1, T>(s, args, weighted(n, before), values);
    }
    if start >= end {
        return;
    }
    let values = &mut out.values[first_query * dim..(first_query + queries.len()) * dim];
    match queries.len() {
        1 => value_rows::<S, E, 1, T>(s, args, weighted(0, start..end), values),
        2 => value_rows::<S, E, 2, T>(s, args, weighted(0, start..end), values),
        3 if T > 2 => value_rows::<S, E, 3, T>(s, args, weighted(0, start..end), values),
        4 if T > 2 => value_rows::<S, E, 4, T>(s, args, weighted(0, start..end), values),
        n => unreachable!("invariant: a tile of at most {T} queries has {n}"),
    }
    for (n, query) in queries.iter().enumerate() {
        let values = out.values_mut(first_query + n);
        value_rows::<S, E, 1, T>(s, args, weighted(n, end..query.end), values);
    }
}

/// Positions whose values are added up, and their weights, per query.
struct Weighted<'a> {
    weights: &'a [[f32; CHUNK]],
    positions: std::ops::Range<usize>,
}

/// `values[n] += weights[n][j] * v[j]` for the positions j in order, up to T registers of columns at a time.
#[inline(always)]
fn value_rows<S: Simd, E: KvElement, const N: usize, const T: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    weighted: Weighted<'_>,
    values: &mut [f32],
) {
    if weighted.positions.is_empty() {
        return;
    }
    let n_columns = values.len() / N / LANES;
    let values = values.as_chunks_mut::<LANES>().0;
    let mut column = 0;
    while column + T <= n_columns {
        value_tile::<S, E, N, T>(s, args, &weighted, values, column);
        column += T;
    }
    while column < n_columns {
        value_tile::<S, E, N, 1>(s, args, &weighted, values, column);
        column += 1;
    }
}

#[inline(always)]
fn value_tile<S: Simd, E: KvElement, const N: usize, const C: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    Weighted { weights, positions }: &Weighted<'_>,
    values: &mut [[f32; LANES]],
    column: usize,
) {
    let n_columns = values.len() / N;
    let mut acc = [[s.splat(0.0); C]; N];
    for n in 0..N {
        for c in 0..C {
            acc[n][c] = s.load(&values[n * n_columns + column + c]);
        }
    }
    let mut position = positions.start;
    while position < positions.end {
        let block = position / BLOCK_POSITIONS;
        let rows = args.blocks.values(args.block_table[block], args.kv_head);
        let block_end = positions.end.min((block + 1) * BLOCK_POSITIONS);
        for j in position..block_end {
            let start = j % BLOCK_POSITIONS * n_columns + column;
            let row = &rows[start..start + C];
            let mut v = [s.splat(0.0); C];
            for c in 0..C {
                v[c] = E::load(s, &row[c]);
            }
            for n in 0..N {
                let weight = s.splat(weights[n][j]);
                for c in 0..C {
                    acc[n][c] = s.fma(weight, v[c], acc[n][c]);
                }
            }
        }
        position = block_end;
    }
    for n in 0..N {
        for c in 0..C {
            s.store(acc[n][c], &mut values[n * n_columns + column + c]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn chunk_avx2<E: KvElement>(args: &ChunkArgs<'_, E>, scores: &mut Scores, out: &mut Partials<'_>) {
    chunk::<Avx2, E, 2>(Avx2::token(), args, scores, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn chunk_avx512<E: KvElement>(
    args: &ChunkArgs<'_, E>,
    scores: &mut Scores,
    out: &mut Partials<'_>,
) {
    chunk::<Avx512, E, 4>(Avx512::token(), args, scores, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn merge_avx2(state: &mut Partials<'_>, later: &Partials<'_>) {
    merge(Avx2::token(), state, later);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn merge_avx512(state: &mut Partials<'_>, later: &Partials<'_>) {
    merge(Avx512::token(), state, later);
}
