//! Tests of attention: a naive softmax in f64 as the oracle; equal bits for every ISA, thread count, batch,
//! grouping and block table.

use paceline_domain::{BlockId, KvType};
use proptest::prelude::*;

use super::*;
use crate::kv::{KvShape, NewKv};
use crate::testing::{Numbers, assert_same_bits};
use crate::{Isa, Pinning};

/// A layer whose sequences are filled, and queries for some of their positions.
struct Case {
    shape: KvShape,
    kv_of_head: Vec<usize>,
    window: Option<u32>,
    /// Positions filled, per sequence.
    lens: Vec<usize>,
    /// `[len, n_kv_heads, head_dim]`, per sequence.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    /// Sequence and position of each query row.
    rows: Vec<(usize, u32)>,
    q: Vec<f32>,
}

impl Case {
    fn new(seed: u64, shape: KvShape, kv_of_head: &[usize], lens: &[usize]) -> Self {
        let mut numbers = Numbers::new(seed);
        let per_position = shape.n_kv_heads * shape.head_dim;
        let fill =
            |numbers: &mut Numbers| lens.iter().map(|len| numbers.values(len * per_position)).collect();
        let (keys, values) = (fill(&mut numbers), fill(&mut numbers));
        // Of each sequence the last rows, as in prefill, and one from anywhere.
        let mut rows = Vec::new();
        for (sequence, len) in lens.iter().enumerate() {
            rows.push((sequence, numbers.below(*len) as u32));
            rows.extend((len.saturating_sub(7)..*len).map(|position| (sequence, position as u32)));
        }
        let q = numbers.values(rows.len() * kv_of_head.len() * shape.head_dim);
        let q = q.into_iter().map(|q| q * 4.0).collect();
        let n_blocks = lens.iter().map(|len| len.div_ceil(16)).sum::<usize>() + 3;
        let shape = KvShape { n_blocks, ..shape };
        let (kv_of_head, lens) = (kv_of_head.to_vec(), lens.to_vec());
        Self { shape, kv_of_head, window: None, lens, keys, values, rows, q }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    /// Block tables that take the pool's blocks in an order made from `seed`.
    fn tables(&self, seed: u64) -> Vec<Vec<BlockId>> {
        let mut numbers = Numbers::new(seed);
        let mut blocks: Vec<BlockId> = (0..self.shape.n_blocks as u32).map(BlockId).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, numbers.below(i + 1));
        }
        let mut blocks = blocks.into_iter();
        self.lens.iter().map(|len| blocks.by_ref().take(len.div_ceil(16)).collect()).collect()
    }

    fn layer(&self, kernels: &Kernels, tables: &[Vec<BlockId>]) -> KvLayer {
        let pool = ThreadPool::new(1, Pinning::None);
        let mut layer = KvLayer::new(self.shape);
        // What blocks held before must not matter: NaN everywhere first.
        let table: Vec<BlockId> = (0..self.shape.n_blocks as u32).map(BlockId).collect();
        let rows: Vec<KvRow<'_>> = (0..16 * self.shape.n_blocks as u32)
            .map(|position| KvRow { position, block_table: &table })
            .collect();
        let stale = vec![f32::NAN; rows.len() * self.shape.n_kv_heads * self.shape.head_dim];
        layer.store(kernels, &pool, &NewKv { rows: &rows, keys: &stale, values: &stale });
        for (sequence, table) in tables.iter().enumerate() {
            let rows: Vec<KvRow<'_>> = (0..self.lens[sequence] as u32)
                .map(|position| KvRow { position, block_table: table })
                .collect();
            let (keys, values) = (&self.keys[sequence], &self.values[sequence]);
            layer.store(kernels, &pool, &NewKv { rows: &rows, keys, values });
        }
        layer
    }

    /// All rows in one call.
    fn run(&self, isa: Isa, n_threads: usize, table_seed: u64) -> Vec<f32> {
        let (kernels, pool) = (Kernels::for_isa(isa), ThreadPool::new(n_threads, Pinning::None));
        let tables = self.tables(table_seed);
        let layer = self.layer(kernels, &tables);
        let rows: Vec<KvRow<'_>> = self
            .rows
            .iter()
            .map(|(sequence, position)| KvRow { position: *position, block_table: &tables[*sequence] })
            .collect();
        let mut out = vec![f32::NAN; self.q.len()];
        let mut scratch = AttentionScratch::default();
        attention(kernels, &pool, &self.args(&self.q, &rows, &layer), &mut scratch, &mut out);
        out
    }

    /// Every row in a call of its own.
    fn run_alone(&self, isa: Isa) -> Vec<f32> {
        let (kernels, pool) = (Kernels::for_isa(isa), ThreadPool::new(1, Pinning::None));
        let tables = self.tables(1);
        let layer = self.layer(kernels, &tables);
        let mut out = vec![f32::NAN; self.q.len()];
        let mut scratch = AttentionScratch::default();
        let row_len = self.q.len() / self.rows.len();
        for (i, (sequence, position)) in self.rows.iter().enumerate() {
            let rows = [KvRow { position: *position, block_table: &tables[*sequence] }];
            let range = i * row_len..(i + 1) * row_len;
            let args = self.args(&self.q[range.clone()], &rows, &layer);
            attention(kernels, &pool, &args, &mut scratch, &mut out[range]);
        }
        out
    }

    fn args<'a>(&'a self, q: &'a [f32], rows: &'a [KvRow<'a>], kv: &'a KvLayer) -> AttentionArgs<'a> {
        AttentionArgs { q, rows, kv, kv_of_head: &self.kv_of_head, scale: self.scale(), window: self.window }
    }

    /// Softmax attention as the textbook has it, in f64.
    fn naive(&self) -> Vec<f64> {
        let KvShape { n_kv_heads, head_dim, .. } = self.shape;
        let mut out = Vec::new();
        for (i, head) in self.q.chunks_exact(head_dim).enumerate() {
            let (sequence, position) = self.rows[i / self.kv_of_head.len()];
            let kv_head = self.kv_of_head[i % self.kv_of_head.len()];
            let last = position as usize;
            let first = self.window.map_or(0, |window| (last + 1).saturating_sub(window as usize));
            let at =
                |data: &[f32], j: usize, d: usize| f64::from(data[(j * n_kv_heads + kv_head) * head_dim + d]);
            let score = |j: usize| -> f64 {
                let keys = &self.keys[sequence];
                (0..head_dim).map(|d| f64::from(head[d]) * at(keys, j, d)).sum::<f64>()
                    * f64::from(self.scale())
            };
            let weights: Vec<f64> = (first..=last).map(|j| score(j).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for d in 0..head_dim {
                let values = &self.values[sequence];
                let weighted = weights.iter().zip(first..).map(|(weight, j)| weight * at(values, j, d));
                out.push(weighted.sum::<f64>() / sum);
            }
        }
        out
    }

    /// Everything this file promises about one case.
    fn check(&self) {
        let expected = self.run_alone(Isa::Scalar);
        for isa in Isa::available() {
            assert_same_bits(&self.run_alone(isa), &expected, &format!("{isa}, rows alone"));
            for n_threads in [1, 2, 5] {
                let got = self.run(isa, n_threads, 2 + n_threads as u64);
                assert_same_bits(&got, &expected, &format!("{isa}, {n_threads} threads"));
            }
        }
        let tolerance = match self.shape.kv_type {
            KvType::F32 => 1.0e-5,
            KvType::F16 => 4.0e-3,
            KvType::Q8 => 3.0e-2,
        };
        for (i, (got, expected)) in expected.iter().zip(self.naive()).enumerate() {
            let difference = (f64::from(*got) - expected).abs();
            assert!(difference < tolerance, "output {i} is {got}, not {expected}");
        }
    }
}

fn shape(n_kv_heads: usize, head_dim: usize, kv_type: KvType) -> KvShape {
    KvShape { n_blocks: 0, n_kv_heads, head_dim, kv_type }
}

#[test]
fn grouped_heads_over_several_chunks() {
    for kv_type in KvType::ALL {
        Case::new(1, shape(3, 64, kv_type), &[0, 0, 0, 1, 1, 1, 2, 2, 2], &[600, 1, 17]).check();
        Case::new(2, shape(2, 128, kv_type), &[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1], &[257, 300]).check();
    }
}

#[test]
fn one_long_sequence_is_split_over_threads() {
    let mut case = Case::new(3, shape(1, 64, KvType::F16), &[0, 0], &[1_300]);
    case.rows.truncate(1);
    case.rows[0].1 = 1_299;
    case.q.truncate(128);
    case.check();
}

#[test]
fn uneven_shares_of_heads() {
    // A rank may own part of a group, in any order; and more heads than are worked on together.
    Case::new(4, shape(2, 64, KvType::F16), &[0, 1, 1, 0, 1], &[40, 270]).check();
    Case::new(5, shape(1, 16, KvType::F32), &[0; 19], &[33]).check();
}

#[test]
fn heads_of_any_size() {
    for (seed, head_dim) in [1, 7, 16, 24, 33, 80, 96].into_iter().enumerate() {
        Case::new(seed as u64, shape(2, head_dim, KvType::F32), &[0, 1], &[50, 3]).check();
        Case::new(seed as u64, shape(1, head_dim, KvType::F16), &[0, 0, 0], &[290]).check();
        Case::new(seed as u64, shape(2, head_dim, KvType::Q8), &[0, 1, 1], &[270, 5]).check();
    }
}

#[test]
fn sliding_windows_of_any_size() {
    for window in [1, 2, 15, 16, 17, 100, 255, 256, 257, 600, 5_000] {
        let mut case = Case::new(6, shape(1, 32, KvType::F32), &[0, 0], &[700, 90]);
        case.window = Some(window);
        case.check();
    }
}

#[test]
fn a_window_that_covers_all_changes_nothing() {
    let mut case = Case::new(7, shape(1, 64, KvType::F16), &[0], &[520]);
    let whole = case.run(Isa::detect(), 2, 1);
    case.window = Some(520);
    assert_same_bits(&case.run(Isa::detect(), 2, 1), &whole, "window of the whole context");
    case.window = Some(519);
    assert_ne!(case.run(Isa::detect(), 2, 1), whole);
}

#[test]
fn large_scores_do_not_overflow() {
    let mut case = Case::new(8, shape(1, 64, KvType::F32), &[0], &[400]);
    case.q.iter_mut().for_each(|q| *q *= 1.0e4);
    let expected = case.run_alone(Isa::Scalar);
    assert!(expected.iter().all(|x| x.is_finite() && x.abs() <= 1.0));
    for isa in Isa::available() {
        assert_same_bits(&case.run(isa, 2, 3), &expected, isa.name());
    }
}

#[test]
fn infinities_and_nan_stay_in_their_rows() {
    for kv_type in KvType::ALL {
        let mut case = Case::new(9, shape(1, 32, kv_type), &[0, 0], &[40]);
        let clean = case.run_alone(Isa::Scalar);
        let wild = Numbers::new(10).wild_values(64);
        case.q[64..128].copy_from_slice(&wild);
        let expected = case.run_alone(Isa::Scalar);
        for isa in Isa::available() {
            let got = case.run(isa, 2, 3);
            assert_same_bits(&got, &expected, isa.name());
            assert_same_bits(&got[..64], &clean[..64], isa.name());
            assert_same_bits(&got[128..], &clean[128..], isa.name());
        }
    }
}

#[test]
fn wild_keys_and_values_are_the_same_everywhere() {
    for kv_type in KvType::ALL {
        let mut case = Case::new(11, shape(1, 48, kv_type), &[0, 0, 0], &[300]);
        case.keys[0][48 * 20..48 * 24].copy_from_slice(&Numbers::new(12).wild_values(48 * 4));
        case.values[0][48 * 270..48 * 272].copy_from_slice(&Numbers::new(13).wild_values(48 * 2));
        let expected = case.run_alone(Isa::Scalar);
        for isa in Isa::available() {
            assert_same_bits(&case.run(isa, 2, 3), &expected, isa.name());
        }
    }
}

#[test]
fn the_twins_in_the_tables_are_the_named_ones() {
    type Merge = chunk::MergeKernel;
    type Chunk<E> = ChunkKernel<E>;
    let same = |named: usize, in_table: usize, name: &str| assert_eq!(named, in_table, "{name}");
    for (name, twin) in crate::testing::twins!(chunk::merge_avx2, chunk::merge_avx512; Merge) {
        let isa = if name.ends_with("avx2") { Isa::Avx2 } else { Isa::Avx512 };
        same(twin as usize, Kernels::for_isa(isa).attention.merge as usize, name);
    }
    for (name, twin) in crate::testing::twins!(chunk::chunk_avx2, chunk::chunk_avx512; Chunk<u16>) {
        let isa = if name.ends_with("avx2") { Isa::Avx2 } else { Isa::Avx512 };
        same(twin as usize, Kernels::for_isa(isa).attention.chunk_f16 as usize, name);
    }
    for (name, twin) in crate::testing::twins!(chunk::chunk_avx2, chunk::chunk_avx512; Chunk<i8>) {
        let isa = if name.ends_with("avx2") { Isa::Avx2 } else { Isa::Avx512 };
        same(twin as usize, Kernels::for_isa(isa).attention.chunk_q8 as usize, name);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_row_depends_on_itself_and_its_keys_only(
        seed in any::<u64>(),
        n_kv_heads in 1..4_usize,
        group in 1..8_usize,
        head_dim in prop::sample::select(vec![4_usize, 16, 40, 64]),
        lens in prop::collection::vec(1..560_usize, 1..4),
        kv_type in prop::sample::select(KvType::ALL.to_vec()),
        window in prop::option::of(1..700_u32),
    ) {
        let kv_of_head: Vec<usize> = (0..n_kv_heads * group).map(|head| head / group).collect();
        let mut case = Case::new(seed, shape(n_kv_heads, head_dim, kv_type), &kv_of_head, &lens);
        case.window = window;
        case.check();
    }
}
