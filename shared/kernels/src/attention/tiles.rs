//! The SIMD twins of one chunk of attention: tiles of a few queries by a few registers of keys or values. What is
//! computed, and in which order, is defined by `chunk`.
//!
//! Keys and values of a head lie in pieces of a few KB, often but not always one behind the other, and a tile goes through
//! several at once, so the CPU's own prefetchers find too little: each tile asks for what comes next. In a chunk those are keys of its blocks, values of its blocks, keys of the next chunk.

use paceline_domain::group::{BLOCK_POSITIONS, KV_GROUP};

use super::CHUNK;
use super::chunk::{ChunkArgs, KvElement, Partials, Query, Scores};
use crate::math::exp::exp_lanes;
use crate::simd::{LANES, Simd, fold_lanes, max_lanes};

/// Blocks of a chunk.
const CHUNK_BLOCKS: usize = CHUNK / BLOCK_POSITIONS;
/// Blocks between what is worked on and what is asked for.
const AHEAD: usize = 4;
/// For each of B blocks its elements, a register at a time.
type Registers<'a, E, const B: usize> = [&'a [[E; LANES]]; B];

/// Registers of values that share a scale.
const GROUP_REGISTERS: usize = KV_GROUP / LANES;

/// A chunk in tiles of up to `Q` queries by `B` registers.
#[inline(always)]
pub(super) fn chunk<S: Simd, E: KvElement, const Q: usize, const B: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    scores: &mut Scores,
    out: &mut Partials<'_>,
) {
    let tiles = args.queries.chunks(Q);
    for (tile, (queries, scores)) in tiles.zip(scores.chunks_mut(Q)).enumerate() {
        let scores = &mut scores[..queries.len()];
        // Later tiles find everything in the cache.
        let ahead = if tile == 0 { AHEAD } else { usize::MAX };
        match queries.len() {
            1 => score_tile::<S, E, 1, B>(s, args, (queries, ahead), scores),
            2 => score_tile::<S, E, 2, B>(s, args, (queries, ahead), scores),
            3 if Q > 2 => score_tile::<S, E, 3, B>(s, args, (queries, ahead), scores),
            4 if Q > 2 => score_tile::<S, E, 4, B>(s, args, (queries, ahead), scores),
            5 if Q > 4 => score_tile::<S, E, 5, B>(s, args, (queries, ahead), scores),
            6 if Q > 4 => score_tile::<S, E, 6, B>(s, args, (queries, ahead), scores),
            n => unreachable!("invariant: a tile of at most {Q} queries has {n}"),
        }
        for (i, (query, scores)) in queries.iter().zip(&mut *scores).enumerate() {
            let i = tile * Q + i;
            (out.max[i], out.sum[i]) = softmax(s, query, scores);
            out.values_mut(i).fill(0.0);
        }
        weigh_values::<S, E, Q, B>(
            s,
            args,
            Weighted { first_query: tile * Q, queries, weights: scores, ahead },
            out,
        );
    }
}

/// What is asked for while the keys of a block of the chunk are worked on: the keys of a later block, or the values of
/// an early one.
#[inline(always)]
fn after_keys<'a, E: KvElement>(args: &ChunkArgs<'a, E>, block: usize, ahead: usize) -> &'a [[E; LANES]] {
    let Some(next) = block.checked_add(ahead) else { return &[] };
    match args.block_table.get(if next < CHUNK_BLOCKS { next } else { next - CHUNK_BLOCKS }) {
        Some(block) if next < CHUNK_BLOCKS => args.blocks.keys(*block, args.kv_head),
        Some(block) => args.blocks.values(*block, args.kv_head),
        None => &[],
    }
}

/// What is asked for while the values of a block of the chunk are worked on: the values of a later block, or the keys
/// of an early block of the next chunk.
#[inline(always)]
fn after_values<'a, E: KvElement>(args: &ChunkArgs<'a, E>, block: usize, ahead: usize) -> &'a [[E; LANES]] {
    let Some(next) = block.checked_add(ahead) else { return &[] };
    match args.block_table.get(next) {
        Some(block) if next < CHUNK_BLOCKS => args.blocks.values(*block, args.kv_head),
        Some(block) => args.blocks.keys(*block, args.kv_head),
        None => &[],
    }
}

/// Scores of N queries with every block one of them sees, B blocks at a time. Lanes are positions; scores of
/// positions that a query does not see are garbage.
#[inline(always)]
fn score_tile<S: Simd, E: KvElement, const N: usize, const B: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    (queries, ahead): (&[Query<'_>], usize),
    scores: &mut [[f32; CHUNK]],
) {
    let Some((start, end)) = seen_by_any(queries) else { return };
    let (mut block, end) = (start / BLOCK_POSITIONS, (end - 1) / BLOCK_POSITIONS + 1);
    while block < end {
        let left = end - block;
        match left {
            1 => score_blocks::<S, E, N, 1>(s, args, (queries, ahead), block..end, scores),
            2 => score_blocks::<S, E, N, 2>(s, args, (queries, ahead), block..end, scores),
            _ => score_blocks::<S, E, N, B>(s, args, (queries, ahead), block..end, scores),
        }
        block += if left > 2 { B } else { left };
    }
}

/// Scores of N queries with the first B blocks of `blocks`. Where there are fewer, the last one is worked on again and not
/// stored.
#[inline(always)]
fn score_blocks<S: Simd, E: KvElement, const N: usize, const B: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    (queries, ahead): (&[Query<'_>], usize),
    blocks: std::ops::Range<usize>,
    scores: &mut [[f32; CHUNK]],
) {
    let first = blocks.start;
    let ids: [_; B] = std::array::from_fn(|b| args.block_table[(first + b).min(blocks.end - 1)]);
    let keys = ids.map(|id| args.blocks.keys(id, args.kv_head));
    let next: [_; B] = std::array::from_fn(|b| after_keys(args, first + b, ahead));
    let n_dims = keys[0].len();
    let group_len = if E::IS_CODE { KV_GROUP } else { n_dims };
    let mut total = [[s.splat(0.0); B]; N];
    let mut group_start = 0;
    while group_start < n_dims {
        let dims = group_start..n_dims.min(group_start + group_len);
        let sums = key_group::<S, E, N, B>(s, queries, (&keys, &next), dims);
        if E::IS_CODE {
            let scales = ids.map(|id| &args.blocks.key_scales(id, args.kv_head)[group_start / KV_GROUP]);
            for b in 0..B {
                let scale = s.load_f16(scales[b]);
                for n in 0..N {
                    total[n][b] = s.fma(sums[n][b], scale, total[n][b]);
                }
            }
        } else {
            total = sums;
        }
        group_start += group_len;
    }
    let scale = s.splat(args.scale);
    for n in 0..N {
        let scores = scores[n].as_chunks_mut::<LANES>().0;
        for b in 0..B.min(blocks.len()) {
            s.store(s.mul(total[n][b], scale), &mut scores[first + b]);
        }
    }
}

/// Products of some elements of the queries and keys, summed in order.
#[inline(always)]
fn key_group<S: Simd, E: KvElement, const N: usize, const B: usize>(
    s: S,
    queries: &[Query<'_>],
    (keys, next): (&Registers<'_, E, B>, &Registers<'_, E, B>),
    dims: std::ops::Range<usize>,
) -> [[S::F32; B]; N] {
    let mut acc = [[s.splat(0.0); B]; N];
    let mut key = [s.splat(0.0); B];
    for d in dims {
        for b in 0..B {
            s.prefetch(next[b].get(d));
            key[b] = E::load(s, &keys[b][d]);
        }
        for n in 0..N {
            let q = s.splat(queries[n].q[d]);
            for b in 0..B {
                acc[n][b] = s.fma(q, key[b], acc[n][b]);
            }
        }
    }
    acc
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

/// The queries of a tile, and how much their values count.
#[derive(Clone, Copy)]
struct Weighted<'a> {
    /// Place of the first query among all.
    first_query: usize,
    queries: &'a [Query<'a>],
    /// Per query, by position in the chunk.
    weights: &'a [[f32; CHUNK]],
    ahead: usize,
}

/// Adds the weighted values of a tile's queries: first the positions that only some see, each query alone, then
/// those all see, together, then again those that only some see. So every query has its order of positions.
#[inline(always)]
fn weigh_values<S: Simd, E: KvElement, const Q: usize, const C: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    tile: Weighted<'_>,
    out: &mut Partials<'_>,
) {
    let Weighted { first_query, queries, weights, ahead } = tile;
    let of = |n: usize, positions, ahead| Rows { weights: &weights[n..], positions, ahead };
    let start = queries.iter().map(|query| query.start).max().unwrap_or(0);
    let end = queries.iter().map(|query| query.end).min().unwrap_or(0);
    let dim = out.value_dim;
    for (n, query) in queries.iter().enumerate() {
        let before = if start < end { query.start..start } else { query.start..query.end };
        let values = out.values_mut(first_query + n);
        value_rows::<S, E, 1, C>(s, args, of(n, before, usize::MAX), values);
    }
    if start >= end {
        return;
    }
    let values = &mut out.values[first_query * dim..(first_query + queries.len()) * dim];
    let together = of(0, start..end, ahead);
    match queries.len() {
        1 => value_rows::<S, E, 1, C>(s, args, together, values),
        2 => value_rows::<S, E, 2, C>(s, args, together, values),
        3 if Q > 2 => value_rows::<S, E, 3, C>(s, args, together, values),
        4 if Q > 2 => value_rows::<S, E, 4, C>(s, args, together, values),
        5 if Q > 4 => value_rows::<S, E, 5, C>(s, args, together, values),
        6 if Q > 4 => value_rows::<S, E, 6, C>(s, args, together, values),
        n => unreachable!("invariant: a tile of at most {Q} queries has {n}"),
    }
    for (n, query) in queries.iter().enumerate() {
        let values = out.values_mut(first_query + n);
        value_rows::<S, E, 1, C>(s, args, of(n, end..query.end, usize::MAX), values);
    }
}

/// Positions whose values are added up, and their weights, per query.
struct Rows<'a> {
    weights: &'a [[f32; CHUNK]],
    positions: std::ops::Range<usize>,
    ahead: usize,
}

/// `values[n] += weights[n][j] * v[j]` for the positions j in order, up to C registers of columns at a time.
#[inline(always)]
fn value_rows<S: Simd, E: KvElement, const N: usize, const C: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    rows: Rows<'_>,
    values: &mut [f32],
) {
    if rows.positions.is_empty() {
        return;
    }
    let n_columns = values.len() / N / LANES;
    let values = values.as_chunks_mut::<LANES>().0;
    let mut column = 0;
    while column + C <= n_columns {
        value_tile::<S, E, N, C>(s, args, &rows, values, column);
        column += C;
    }
    while column < n_columns {
        value_tile::<S, E, N, 1>(s, args, &rows, values, column);
        column += 1;
    }
}

#[inline(always)]
fn value_tile<S: Simd, E: KvElement, const N: usize, const C: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    Rows { weights, positions, ahead }: &Rows<'_>,
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
        let id = args.block_table[block];
        let (rows, next) = (args.blocks.values(id, args.kv_head), after_values(args, block, *ahead));
        let block_end = positions.end.min((block + 1) * BLOCK_POSITIONS);
        let scaled = if E::IS_CODE {
            scaled_weights::<S, E, N>(s, args, (weights, block), column / GROUP_REGISTERS)
        } else {
            [[[0.0; LANES]; 2]; N]
        };
        for j in position..block_end {
            let start = j % BLOCK_POSITIONS * n_columns + column;
            let row = &rows[start..start + C];
            let mut v = [s.splat(0.0); C];
            for c in 0..C {
                s.prefetch(next.get(start + c));
                v[c] = E::load(s, &row[c]);
            }
            for n in 0..N {
                for c in 0..C {
                    let group = (column + c) / GROUP_REGISTERS - column / GROUP_REGISTERS;
                    let weight =
                        if E::IS_CODE { scaled[n][group][j % BLOCK_POSITIONS] } else { weights[n][j] };
                    acc[n][c] = s.fma(s.splat(weight), v[c], acc[n][c]);
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

/// The weights of a block's positions times the scales of its values, for up to two groups from `group` on.
#[inline(always)]
fn scaled_weights<S: Simd, E: KvElement, const N: usize>(
    s: S,
    args: &ChunkArgs<'_, E>,
    (weights, block): (&[[f32; CHUNK]], usize),
    group: usize,
) -> [[[f32; LANES]; 2]; N] {
    let scales = args.blocks.value_scales(args.block_table[block], args.kv_head);
    let mut scaled = [[[0.0; LANES]; 2]; N];
    for (g, scales) in scales[group..].iter().take(2).enumerate() {
        let scales = s.load_f16(scales);
        for n in 0..N {
            let weights = s.load(&weights[n].as_chunks::<LANES>().0[block]);
            s.store(s.mul(weights, scales), &mut scaled[n][g]);
        }
    }
    scaled
}
