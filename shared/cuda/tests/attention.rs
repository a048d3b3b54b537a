//! Attention on the emulated device: right against plain sums in f64, and the same bits from every kernel, tile and batch.

mod support;

use std::collections::BTreeMap;

use half::{bf16, f16};
use paceline_cuda::kernels::attention::{
    AttendArgs, AttendGrid, HEAD_DIMS, SPLIT_ROWS, TILE_ROWS, attend_split, attend_tiles, n_counts, parts,
    score_factor,
};
use paceline_cuda::kernels::rope::{RotateStoreArgs, rotate_store};
use paceline_cuda::kernels::tiles::{AttentionTile, cut, runs, tiles, tokens_of_tile};
use paceline_cuda::{CudaError, DevicePtr};
use support::{
    arrays::{Random, get, key_index, only, operand_b_index, put, value_index},
    emulated::Emulated,
};

const BLOCK_POSITIONS: usize = 16;

/// A model's heads, and sequences of which some rows are in the batch.
#[derive(Clone, Debug)]
struct Case {
    head_dim: usize,
    /// Query heads of each KV head.
    groups: Vec<usize>,
    window: usize,
    /// Positions before the first row, rows.
    sequences: Vec<(usize, usize)>,
}

impl Case {
    fn new(head_dim: usize, groups: &[usize], window: usize, sequences: &[(usize, usize)]) -> Self {
        Self { head_dim, groups: groups.to_vec(), window, sequences: sequences.to_vec() }
    }

    fn n_heads(&self) -> usize {
        self.groups.iter().sum()
    }

    fn group(&self) -> usize {
        *self.groups.iter().max().expect("a KV head")
    }

    fn k_padded(&self) -> usize {
        (self.n_heads() * self.head_dim).next_multiple_of(64)
    }
}

/// A row of the batch: sequence, position.
type RowId = (usize, usize);

/// Queries, keys and values of a case, as numbers and on a device.
struct World {
    case: Case,
    device: Emulated,
    /// [sequence][position][head * head_dim + dim]
    queries: Vec<Vec<Vec<f16>>>,
    keys: Vec<Vec<Vec<f16>>>,
    values: Vec<Vec<Vec<f16>>>,
    /// Where the block table of each sequence begins.
    table_of: Vec<u32>,
    on_device: OnDevice,
}

/// Addresses of what all batches share.
#[derive(Clone, Copy)]
struct OnDevice {
    keys: DevicePtr,
    values: DevicePtr,
    tables: DevicePtr,
    first_head: DevicePtr,
    n_heads_of: DevicePtr,
    rotations: DevicePtr,
}

/// Cosine and sine of a pair of elements at a position: quarter turns, so that no number is rounded.
fn quarter_turn(position: usize, pair: usize) -> [f32; 2] {
    [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]][(position + position / 5 + pair) % 4]
}

/// What becomes these heads at a position when it is turned.
fn turned_back(heads: &[f16], head_dim: usize, position: usize) -> Vec<f32> {
    let element = |at: usize| {
        let (head, i) = (at / head_dim * head_dim, at % head_dim);
        let pair = i % (head_dim / 2);
        let [cos, sin] = quarter_turn(position, pair);
        let (low, high) = (heads[head + pair].to_f32(), heads[head + pair + head_dim / 2].to_f32());
        if i < head_dim / 2 { low * cos + high * sin } else { high * cos - low * sin }
    };
    (0..heads.len()).map(element).collect()
}

impl World {
    fn new(case: &Case, mut device: Emulated, seed: u64) -> Self {
        let mut random = Random(seed);
        let (kv_width, q_width) = (case.groups.len() * case.head_dim, case.n_heads() * case.head_dim);
        // Sharp and flat rows of weights.
        let mut rows = |width: usize, size: f32| -> Vec<Vec<Vec<f16>>> {
            let lengths = case.sequences.iter().map(|(before, n)| before + n);
            let mut row = || random.numbers(width).iter().map(|x| f16::from_f32(size * x)).collect();
            lengths.map(|length| (0..length).map(|_| row()).collect()).collect()
        };
        let (queries, keys, values) = (rows(q_width, 3.0), rows(kv_width, 2.0), rows(kv_width, 1.0));
        let n_blocks: Vec<usize> = keys.iter().map(|rows| rows.len().div_ceil(BLOCK_POSITIONS)).collect();
        let mut ids: Vec<u32> = (0..n_blocks.iter().sum::<usize>() as u32 + 5).collect();
        for i in 0..ids.len() {
            let other = random.below(ids.len());
            ids.swap(i, other);
        }
        let mut stale =
            |n: usize| -> Vec<f16> { (0..n).map(|_| f16::from_f32(6e4 * random.number())).collect() };
        let n_elements = ids.len() * kv_width * BLOCK_POSITIONS;
        let (mut key_cache, mut value_cache) = (stale(n_elements), stale(n_elements));
        let (mut table_of, mut n_before) = (Vec::new(), 0);
        for (sequence, n) in n_blocks.iter().enumerate() {
            table_of.push(n_before as u32);
            // Rows of batches store their keys themselves.
            for position in 0..case.sequences[sequence].0 {
                let block = ids[n_before + position / BLOCK_POSITIONS] as usize;
                let slot = position % BLOCK_POSITIONS;
                for i in 0..kv_width {
                    let (head, dim) = (i / case.head_dim, i % case.head_dim);
                    let at = (block * case.groups.len() + head) * BLOCK_POSITIONS * case.head_dim;
                    key_cache[at + key_index(slot, dim, case.head_dim)] = keys[sequence][position][i];
                    value_cache[at + value_index(slot, dim)] = values[sequence][position][i];
                }
            }
            n_before += n;
        }
        ids.truncate(n_before);
        let n_positions = keys.iter().map(Vec::len).max().unwrap_or(0);
        let rotations: Vec<[f32; 2]> = (0..n_positions * case.head_dim / 2)
            .map(|i| quarter_turn(i / (case.head_dim / 2), i % (case.head_dim / 2)))
            .collect();
        let n_heads_of: Vec<u32> = case.groups.iter().map(|n| *n as u32).collect();
        let first_head: Vec<u32> =
            (0..n_heads_of.len()).map(|kv_head| n_heads_of[..kv_head].iter().sum()).collect();
        let on_device = OnDevice {
            keys: put(&mut device, &key_cache),
            values: put(&mut device, &value_cache),
            tables: put(&mut device, &ids),
            first_head: put(&mut device, &first_head),
            n_heads_of: put(&mut device, &n_heads_of),
            rotations: put(&mut device, &rotations),
        };
        Self { case: case.clone(), device, queries, keys, values, table_of, on_device }
    }

    /// All rows of the case.
    fn rows(&self) -> Vec<RowId> {
        let of = |(sequence, (before, n)): (usize, &(usize, usize))| {
            (*before..before + n).map(move |position| (sequence, position)).collect::<Vec<_>>()
        };
        self.case.sequences.iter().enumerate().flat_map(of).collect()
    }

    /// The row's result, and the sum of the weighted magnitudes, in f64.
    fn exact(&self, (sequence, position): RowId) -> Vec<(f64, f64)> {
        let Case { head_dim, window, .. } = self.case;
        let first = if window > 0 { (position + 1).saturating_sub(window) } else { 0 };
        let mut out = Vec::new();
        let kv_heads = self.case.groups.iter().enumerate().flat_map(|(kv, n)| std::iter::repeat_n(kv, *n));
        for (head, kv_head) in kv_heads.enumerate() {
            let q = &self.queries[sequence][position][head * head_dim..][..head_dim];
            let of =
                |rows: &Vec<Vec<f16>>, key: usize, dim: usize| rows[key][kv_head * head_dim + dim].to_f64();
            let scores: Vec<f64> = (first..=position)
                .map(|key| {
                    (0..head_dim).map(|i| q[i].to_f64() * of(&self.keys[sequence], key, i)).sum::<f64>()
                })
                .map(|score| score / (head_dim as f64).sqrt())
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for dim in 0..head_dim {
                let terms = weights.iter().enumerate();
                let terms =
                    terms.map(|(i, weight)| weight / sum * of(&self.values[sequence], first + i, dim));
                out.push(terms.fold((0.0, 0.0), |(value, size), term| (value + term, size + term.abs())));
            }
        }
        out
    }

    /// Runs a batch of these rows, each tile by the kernel of its list; bits of every row.
    fn run(&mut self, rows: &[RowId], batch: &Batch) -> Result<BTreeMap<RowId, Vec<u16>>, CudaError> {
        let qkv: Vec<f32> = rows.iter().flat_map(|id| self.product(*id)).collect();
        let table_of_row = self.tables(rows);
        let (case, device) = (self.case.clone(), &mut self.device);
        let n_positions = rows.iter().map(|(_, position)| position + 1).max().unwrap_or(0);
        let n_splits = n_positions.div_ceil(256) + batch.n_splits_more;
        let n_counts = n_counts(rows.len(), case.groups.len(), case.group());
        let n_partials = rows.len() * case.n_heads() * n_splits;
        let qkv = put(device, &qkv);
        let q = put(device, &vec![0x7e00u16; rows.len() * case.n_heads() * case.head_dim]);
        let k_padded = case.k_padded();
        let out = put(device, &vec![0x7fc0u16; rows.len().next_multiple_of(8) * k_padded]);
        let args = AttendArgs {
            q,
            keys: self.on_device.keys,
            values: self.on_device.values,
            qkv,
            rotations: self.on_device.rotations,
            tiles: 0,
            n_tiles: 0,
            tables: self.on_device.tables,
            first_head: self.on_device.first_head,
            n_heads_of: self.on_device.n_heads_of,
            partial: put(device, &vec![f32::NAN; n_partials * case.head_dim]),
            partial_sums: put(device, &vec![f32::NAN; n_partials * 2]),
            n_done: put(device, &vec![0u32; n_counts]),
            out,
            n_heads: case.n_heads() as u32,
            n_kv_heads: case.groups.len() as u32,
            n_splits: n_splits as u32,
            parts: 0,
            window: case.window as u32,
            k_padded: k_padded as u32,
            factor: score_factor(1.0 / (case.head_dim as f32).sqrt()),
            unused: 0,
        };
        if !batch.many.is_empty() {
            let positions: Vec<u32> = rows.iter().map(|(_, position)| *position as u32).collect();
            let rotation = RotateStoreArgs {
                qkv,
                q,
                keys: args.keys,
                values: args.values,
                rotations: args.rotations,
                header: put(device, &[rows.len() as u32, 0, 0, 0]),
                positions: put(device, &positions),
                table_of_row: put(device, &table_of_row),
                tables: args.tables,
                n_heads: args.n_heads,
                n_kv_heads: args.n_kv_heads,
                head_dim: case.head_dim as u32,
                unused: 0,
            };
            rotate_store(device, rows.len(), &rotation)?;
        }
        attend_lists(device, &case, batch, &args)?;
        let counts: Vec<u32> = get(device, args.n_done, n_counts);
        assert!(counts.iter().all(|count| *count == 0), "counts are left for the next layer");
        let bits: Vec<u16> = get(device, out, rows.len().next_multiple_of(8) * k_padded);
        let row = |row: usize| (0..k_padded).map(|k| bits[operand_b_index(row, k, k_padded)]).collect();
        Ok(rows.iter().enumerate().map(|(i, id)| (*id, row(i))).collect())
    }

    /// A row as the query, key and value matrices give it.
    fn product(&self, (sequence, position): RowId) -> Vec<f32> {
        let back = |heads: &[f16]| turned_back(heads, self.case.head_dim, position);
        let (queries, keys) = (&self.queries[sequence][position], &self.keys[sequence][position]);
        let values = self.values[sequence][position].iter().map(|value| value.to_f32());
        back(queries).into_iter().chain(back(keys)).chain(values).collect()
    }

    /// Rows as runs of the batch.
    fn runs(&self, rows: &[RowId]) -> Vec<AttentionTile> {
        let positions: Vec<u32> = rows.iter().map(|(_, position)| *position as u32).collect();
        runs(&positions, &self.tables(rows))
    }

    fn tables(&self, rows: &[RowId]) -> Vec<u32> {
        rows.iter().map(|(sequence, _)| self.table_of[*sequence]).collect()
    }

    fn cut(&self, rows: &[RowId], max_tokens: usize) -> Vec<AttentionTile> {
        let mut tiles = Vec::new();
        self.runs(rows).into_iter().for_each(|run| cut(run, max_tokens as u32, &mut tiles));
        tiles
    }

    /// Differences from exact results beyond what rounding explains.
    fn check_values(&self, bits: &BTreeMap<RowId, Vec<u16>>) -> Result<(), String> {
        for (id, row) in bits {
            let exact = self.exact(*id);
            for (column, (value, size)) in exact.iter().enumerate() {
                let got = bf16::from_bits(row[column]).to_f64();
                // The result is rounded to 8 bits, weights to 11, scores to f32 with exp2 of 2 ulp.
                let bound = value.abs() / 256.0 + size / 1500.0 + 1e-6;
                if (got - value).is_nan() || (got - value).abs() > bound {
                    return Err(format!("row {id:?} column {column}: {got}, exactly {value} +- {bound}"));
                }
            }
            if row[exact.len()..].iter().any(|bits| *bits != 0) {
                return Err(format!("row {id:?}: padding is not zero"));
            }
        }
        Ok(())
    }
}

/// Attends to the tiles of both lists, each by its kernel.
fn attend_lists(
    device: &mut Emulated,
    case: &Case,
    batch: &Batch,
    args: &AttendArgs,
) -> Result<(), CudaError> {
    for (list, n_rows) in [(&batch.few, SPLIT_ROWS), (&batch.many, TILE_ROWS)] {
        let n_tokens = list.iter().map(|tile| tile.n_tokens as usize).max().unwrap_or(0);
        let n_tiles = list.len() + batch.n_tiles_more;
        let n_splits = args.n_splits as usize;
        let grid = AttendGrid { head_dim: case.head_dim, n_tiles, n_tokens, n_splits };
        let args = AttendArgs {
            tiles: put(device, list),
            n_tiles: put(device, &[list.len() as u32]),
            parts: parts(n_tokens, case.group(), n_rows),
            ..*args
        };
        match (list.is_empty(), n_rows) {
            (true, _) => {}
            (_, SPLIT_ROWS) => attend_split(device, grid, &args)?,
            _ => attend_tiles(device, grid, &args)?,
        }
    }
    Ok(())
}

/// How a batch is worked on.
#[derive(Clone, Default)]
struct Batch {
    few: Vec<AttentionTile>,
    many: Vec<AttentionTile>,
    /// What the grid is larger than needed.
    n_tiles_more: usize,
    n_splits_more: usize,
}

/// Values right, bits equal in all ways to work on the rows.
fn check(case: &Case, device: Emulated) -> Result<(), String> {
    let mut world = World::new(case, device, 7);
    let rows = world.rows();
    let text = |error: CudaError| error.to_string();
    let few = Batch { few: world.cut(&rows, tokens_of_tile(SPLIT_ROWS, case.group())), ..Batch::default() };
    let expected = world.run(&rows, &few).map_err(text)?;
    world.check_values(&expected)?;
    let many = Batch { many: world.cut(&rows, tokens_of_tile(TILE_ROWS, case.group())), ..Batch::default() };
    for (name, batch) in ways(&world, &rows, &few, &many) {
        if world.run(&rows, &batch).map_err(text)? != expected {
            return Err(format!("{name}: other bits"));
        }
    }
    // Every third row, from the last to the first, so that no two follow each other.
    let some: Vec<RowId> = rows.iter().rev().step_by(3).copied().collect();
    let alone = Batch { few: world.cut(&some, 1), ..Batch::default() };
    let bits = world.run(&some, &alone).map_err(text)?;
    if bits.iter().any(|(id, row)| *row != expected[id]) {
        return Err("rows in another batch: other bits".into());
    }
    Ok(())
}

fn ways(world: &World, rows: &[RowId], few: &Batch, many: &Batch) -> Vec<(&'static str, Batch)> {
    let positions: Vec<u32> = rows.iter().map(|(_, position)| *position as u32).collect();
    let chosen = tiles(&positions, &world.tables(rows), world.case.group());
    let larger = |batch: &Batch| Batch { n_tiles_more: 3, n_splits_more: 2, ..batch.clone() };
    vec![
        ("many rows", many.clone()),
        ("a larger grid, few rows", larger(few)),
        ("a larger grid, many rows", larger(many)),
        ("one token a tile, many rows", Batch { many: world.cut(rows, 1), ..Batch::default() }),
        ("five tokens a tile, many rows", Batch { many: world.cut(rows, 5), ..Batch::default() }),
        ("five tokens a tile, few rows", Batch { few: world.cut(rows, 5), ..Batch::default() }),
        ("each as it is chosen", Batch { few: chosen.few, many: chosen.many, ..Batch::default() }),
    ]
}

fn assert_right(case: &Case) {
    if let Err(problem) = check(case, Emulated::new()) {
        panic!("{case:?}: {problem}");
    }
}

#[test]
fn one_split() {
    for (head_dim, groups) in [(32, &[1, 1][..]), (64, &[3]), (96, &[2, 2]), (128, &[7])] {
        assert_right(&Case::new(head_dim, groups, 0, &[(0, 1), (63, 2), (0, 70), (90, 5)]));
    }
}

#[test]
fn several_splits() {
    for (head_dim, groups) in [(32, &[7][..]), (64, &[1, 1]), (96, &[4]), (128, &[3])] {
        assert_right(&Case::new(head_dim, groups, 0, &[(255, 3), (1_100, 1), (500, 30)]));
    }
}

#[test]
fn a_sliding_window() {
    for (window, head_dim) in [(1, 32), (40, 32), (64, 64), (300, 64), (257, 128)] {
        assert_right(&Case::new(head_dim, &[2], window, &[(0, 70), (511, 3), (700, 30), (1_023, 1)]));
    }
}

#[test]
fn heads_that_fill_no_tile() {
    // A rank's share may give KV heads different numbers of query heads, also more than a block has rows.
    assert_right(&Case::new(32, &[1, 3, 2], 0, &[(300, 1), (0, 9)]));
    assert_right(&Case::new(32, &[20], 0, &[(260, 3), (5, 1)]));
    assert_right(&Case::new(32, &[70, 1], 0, &[(40, 2)]));
}

#[test]
fn every_order_of_threads_gives_the_same() {
    let case = Case::new(64, &[3], 100, &[(250, 30), (400, 1)]);
    for seed in [2, 3] {
        assert_eq!(check(&case, Emulated::new().with_seed(seed)), Ok(()));
    }
}

#[test]
fn other_head_dimensions_are_refused() {
    let mut device = Emulated::new();
    let args: AttendArgs = bytemuck::Zeroable::zeroed();
    for head_dim in [16, 48, 80, 256] {
        assert!(!HEAD_DIMS.contains(&head_dim));
        let grid = AttendGrid { head_dim, n_tiles: 1, n_tokens: 1, n_splits: 1 };
        assert!(matches!(attend_split(&mut device, grid, &args), Err(CudaError::Unfit(_))));
        assert!(matches!(attend_tiles(&mut device, grid, &args), Err(CudaError::Unfit(_))));
    }
}

#[test]
fn mistakes_are_found() {
    let case = Case::new(32, &[3], 90, &[(250, 26), (511, 1)]);
    assert_eq!(check(&case, Emulated::of(&only(&["attention.cu", "rope.cu"]))), Ok(()));
    for (file, from, to) in [
        // The split kernel does not go as far as the last chunk.
        ("attention_split.cuh", "(end + CHUNK - 1) / CHUNK", "end / CHUNK"),
        // The merge forgets the last split.
        ("attention_split.cuh", "split <= position / SPLIT", "split < position / SPLIT"),
        // The split kernel reads values before they are there.
        (
            "attention_split.cuh",
            "copy_wait<0>();\n    sync_block();\n    SplitSoftmax",
            "sync_block();\n    SplitSoftmax",
        ),
        // A chunk does not know the largest score of the one before it.
        ("attention_split.cuh", "c <= warp", "c < warp"),
        // The kernel for many rows waits for the wrong copy.
        ("attention.cu", "copy_wait<TILE_STAGES - 1>();", "copy_wait<TILE_STAGES>();"),
        // It merges splits in another rhythm.
        ("attention.cu", "(first_key + CHUNK) % SPLIT == 0", "(first_key + 2 * CHUNK) % SPLIT == 0"),
        // A key too many at the window's edge.
        ("attention.cuh", "key < sight.lowest[i / 2]", "key + 1 < sight.lowest[i / 2]"),
        // The split kernel stores the last new key of its own tile only.
        ("attention_split.cuh", "max(first_key, first_new)", "max(first_key, (int)rows.tile.last_position)"),
        // It does not use the new keys it has at hand, or those it has not.
        ("attention_split.cuh", "keys.replace(shared.new_keys, fresh.brought, chunk, lane);", ""),
        ("attention_split.cuh", "keys.load(args.keys, again, lane);", ""),
        // Old sums do not fade.
        ("attention.cuh", "fmaf(softmax.l[r], step.fade, sum)", "softmax.l[r] + sum"),
    ] {
        let sources = only(&["attention.cu", "rope.cu"]).mutated(file, from, to);
        assert!(check(&case, Emulated::of(&sources)).is_err(), "{to}");
    }
}
