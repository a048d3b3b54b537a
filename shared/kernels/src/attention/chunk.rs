//! One chunk of attention: scores, softmax and weighted values of up to 16 queries of one KV head, and the merging
//! of two chunks. Every query has its own accumulators and its own order; sharing is only of loads.
//!
//! Where elements are codes, a score sums each group of 32 elements on its own, then adds `sum * scale` of the groups in
//! order; the weight of a value is multiplied with the value's scale before the value is.

use paceline_domain::BlockId;
use paceline_domain::group::KV_GROUP;

use super::tiles::chunk;
use super::{CHUNK, MAX_QUERIES};
use crate::kv::KvBlocks;
use crate::math::exp::exp_f32;
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
    pub(crate) chunk_q8: ChunkKernel<i8>,
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
    pub(super) values: &'a mut [f32],
    pub(super) value_dim: usize,
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

    pub(super) fn values_mut(&mut self, query: usize) -> &mut [f32] {
        &mut self.values[query * self.value_dim..(query + 1) * self.value_dim]
    }
}

/// An element of the KV cache.
pub(crate) trait KvElement: Copy {
    /// Whether it is a code, which means something with its group's scale only.
    const IS_CODE: bool = false;

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

impl KvElement for i8 {
    const IS_CODE: bool = true;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[i8; LANES]) -> S::F32 {
        s.load_i8(from)
    }
}

/// Scalar definition of a score, before it is scaled.
fn score_scalar<E: KvElement>(q: &[f32], keys: &[[E; LANES]], scales: &[[u16; LANES]], lane: usize) -> f32 {
    let dot = |q: &[f32], keys: &[[E; LANES]]| {
        q.iter().zip(keys).fold(0.0_f32, |sum, (q, key)| q.mul_add(key[lane].widen(), sum))
    };
    if !E::IS_CODE {
        return dot(q, keys);
    }
    let groups = q.chunks(KV_GROUP).zip(keys.chunks(KV_GROUP)).zip(scales);
    groups.fold(0.0, |score, ((q, keys), scales)| dot(q, keys).mul_add(scales[lane].widen(), score))
}

/// Scalar definition of a chunk.
pub(crate) fn chunk_scalar<E: KvElement>(
    args: &ChunkArgs<'_, E>,
    scores: &mut Scores,
    out: &mut Partials<'_>,
) {
    let block = |position: usize| (args.block_table[position / LANES], args.kv_head);
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
            let (block, head) = block(position);
            let (keys, scales) = (args.blocks.keys(block, head), args.blocks.key_scales(block, head));
            scores[i][position] = score_scalar(query.q, keys, scales, lane) * args.scale;
            max[lane] = greater(scores[i][position], max[lane]);
        }
        let max = max_lanes(max);
        let mut sum = [0.0_f32; LANES];
        for position in positions.clone() {
            scores[i][position] = exp_f32(scores[i][position] - max);
            sum[position % LANES] += scores[i][position];
        }
        for position in positions {
            let (slot, (block, head)) = (position % LANES, block(position));
            let scales = args.blocks.value_scales(block, head);
            let row = &args.blocks.values(block, head).as_flattened()[slot * out.value_dim..];
            for (e, (value, v)) in out.values_mut(i).iter_mut().zip(row).enumerate() {
                let weight = scores[i][position];
                let weight = if E::IS_CODE { weight * scales[e / KV_GROUP][slot].widen() } else { weight };
                *value = weight.mul_add(v.widen(), *value);
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

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn chunk_avx2<E: KvElement>(args: &ChunkArgs<'_, E>, scores: &mut Scores, out: &mut Partials<'_>) {
    chunk::<Avx2, E, 2, 2>(Avx2::token(), args, scores, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn chunk_avx512<E: KvElement>(
    args: &ChunkArgs<'_, E>,
    scores: &mut Scores,
    out: &mut Partials<'_>,
) {
    chunk::<Avx512, E, 6, 4>(Avx512::token(), args, scores, out);
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
