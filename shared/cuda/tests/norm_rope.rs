//! Norm and rotary embedding on the emulated device: right against plain sums in f64, the same bits in every batch,
//! everything at its place.

mod support;

use half::{bf16, f16};
use paceline_cuda::CudaError;
use paceline_cuda::kernels::norm::{AddNormArgs, add_norm};
use paceline_cuda::kernels::rope::{RotateStoreArgs, rotate_store};
use support::{
    arrays::{Random, get, key_index, only, operand_b_index, put, value_index},
    emulated::Emulated,
};

const EPSILON: f32 = 1e-5;
const BLOCK_POSITIONS: usize = 16;

/// Rows of the residual stream and what is added to them.
struct Rows {
    n_embd: usize,
    hidden: Vec<Vec<f32>>,
    delta: Vec<Vec<f32>>,
    weight: Vec<f32>,
}

/// What the norm leaves: the residual stream, and the bits of normalized rows with their padding.
#[derive(PartialEq, Debug)]
struct Normed {
    hidden: Vec<f32>,
    rows: Vec<Vec<u16>>,
}

impl Rows {
    fn new(n_rows: usize, n_embd: usize) -> Self {
        let mut random = Random(n_embd as u64);
        // Some rows are large, some small.
        let size = |row: usize| 10f32.powi(row as i32 % 7 - 3);
        let mut rows = |scale: f32| -> Vec<Vec<f32>> {
            let mut row = |row: usize| random.numbers(n_embd).iter().map(|x| scale * size(row) * x).collect();
            (0..n_rows).map(&mut row).collect()
        };
        let (hidden, delta) = (rows(1.0), rows(0.3));
        Self { n_embd, hidden, delta, weight: random.numbers(n_embd) }
    }

    /// Norms these rows; `outputs` are places among them. The grid is larger than the batch.
    fn run(
        &self,
        mut device: Emulated,
        rows: &[usize],
        with_delta: bool,
        outputs: Option<&[u32]>,
    ) -> Result<Normed, CudaError> {
        let device = &mut device;
        let k_padded = self.n_embd.next_multiple_of(64);
        let n_outputs = outputs.map_or(rows.len(), <[u32]>::len);
        let of = |values: &[Vec<f32>]| rows.iter().flat_map(|row| values[*row].clone()).collect::<Vec<f32>>();
        let hidden = put(device, &of(&self.hidden));
        let normed = put(device, &vec![0x7fc0u16; (n_outputs + 3).next_multiple_of(8) * k_padded]);
        let args = AddNormArgs {
            hidden,
            delta: if with_delta { put(device, &of(&self.delta)) } else { 0 },
            weight: put(device, &self.weight),
            normed,
            header: put(device, &[rows.len() as u32, n_outputs as u32, 0, 0]),
            output_rows: outputs.map_or(0, |outputs| put(device, outputs)),
            n_embd: self.n_embd as u32,
            k_padded: k_padded as u32,
            epsilon: EPSILON,
            unused: 0,
        };
        add_norm(device, n_outputs + 3, &args)?;
        let bits: Vec<u16> = get(device, normed, (n_outputs + 3).next_multiple_of(8) * k_padded);
        let row = |row: usize| (0..k_padded).map(|k| bits[operand_b_index(row, k, k_padded)]).collect();
        let all: Vec<Vec<u16>> = (0..n_outputs + 3).map(row).collect();
        assert!(all[n_outputs..].iter().flatten().all(|bits| *bits == 0x7fc0), "rows beyond the batch");
        let hidden = get(device, hidden, rows.len() * self.n_embd);
        Ok(Normed { hidden, rows: all[..n_outputs].to_vec() })
    }

    /// The residual stream after an addition.
    fn sum(&self, row: usize, with_delta: bool) -> Vec<f32> {
        let delta = self.delta[row].iter().map(|d| if with_delta { *d } else { 0.0 });
        self.hidden[row].iter().zip(delta).map(|(x, d)| x + d).collect()
    }

    fn check_row(&self, x: &[f32], bits: &[u16]) -> Result<(), String> {
        let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
        let scale = 1.0 / (squares / self.n_embd as f64 + f64::from(EPSILON)).sqrt();
        for (k, (x, w)) in x.iter().zip(&self.weight).enumerate() {
            let exact = f64::from(*x) * scale * f64::from(*w);
            let got = bf16::from_bits(bits[k]).to_f64();
            // Half a unit of 8 bits, and little more for the f32 before it.
            if (got - exact).is_nan() || (got - exact).abs() > exact.abs() / 255.0 + 1e-30 {
                return Err(format!("column {k}: {got}, exactly {exact}"));
            }
        }
        let is_padded = bits[self.n_embd..].iter().all(|bits| *bits == 0);
        is_padded.then_some(()).ok_or_else(|| "padding is not zero".into())
    }

    fn check(&self, device: Emulated, with_delta: bool) -> Result<Normed, String> {
        let rows: Vec<usize> = (0..self.hidden.len()).collect();
        let normed = self.run(device, &rows, with_delta, None).map_err(|error| error.to_string())?;
        for row in rows {
            let sum = self.sum(row, with_delta);
            if normed.hidden[row * self.n_embd..][..self.n_embd] != sum {
                return Err(format!("row {row}: another sum"));
            }
            self.check_row(&sum, &normed.rows[row]).map_err(|problem| format!("row {row}: {problem}"))?;
        }
        Ok(normed)
    }
}

#[test]
fn norms_are_right() {
    for n_embd in [4, 60, 64, 576, 1_024, 2_052, 8_192] {
        let rows = Rows::new(9, n_embd);
        for with_delta in [false, true] {
            if let Err(problem) = rows.check(Emulated::new(), with_delta) {
                panic!("{n_embd} columns: {problem}");
            }
        }
    }
}

#[test]
fn a_row_has_its_bits_in_every_batch() {
    let rows = Rows::new(11, 1_100);
    let all = rows.check(Emulated::new(), true).expect("right");
    for batch in [vec![4], vec![10, 3, 0], (0..11).rev().collect()] {
        let normed = rows.run(Emulated::new().with_seed(5), &batch, true, None).expect("runs");
        for (place, row) in batch.iter().enumerate() {
            assert_eq!(normed.rows[place], all.rows[*row]);
        }
    }
    // The final norm: some rows only, and the stream stays as it is.
    let outputs = [9, 2, 2, 0];
    let batch: Vec<usize> = (0..11).collect();
    let last = rows.run(Emulated::new(), &batch, true, Some(&outputs)).expect("runs");
    assert_eq!(last.hidden, rows.hidden.concat());
    let expected: Vec<Vec<u16>> = outputs.iter().map(|row| all.rows[*row as usize].clone()).collect();
    assert_eq!(last.rows, expected);
}

#[test]
fn odd_widths_are_refused() {
    let args = AddNormArgs { n_embd: 62, k_padded: 64, ..bytemuck::Zeroable::zeroed() };
    assert!(matches!(add_norm(&mut Emulated::new(), 1, &args), Err(CudaError::Unfit(_))));
    let args = AddNormArgs { n_embd: 16_388, k_padded: 16_448, ..args };
    assert!(matches!(add_norm(&mut Emulated::new(), 1, &args), Err(CudaError::Unfit(_))));
}

#[test]
fn mistakes_of_the_norm_are_found() {
    let rows = Rows::new(3, 1_100);
    assert!(rows.check(Emulated::of(&only(&["norm.cu"])), true).is_ok());
    for (from, to) in [
        ("__fadd_rn(four[2].x, four[3].x)", "four[3].x"),
        ("if (is_changed && k", "if (!is_changed && k"),
        ("k >= args.k_padded", "k >= args.n_embd"),
    ] {
        let device = Emulated::of(&only(&["norm.cu"]).mutated("norm.cu", from, to));
        assert!(rows.check(device, true).is_err(), "{to}");
    }
}

/// Heads, and a batch of (position, sequence) rows.
struct Rotation {
    head_dim: usize,
    n_heads: usize,
    n_kv_heads: usize,
    rows: Vec<(usize, usize)>,
    qkv: Vec<f32>,
    angles: Vec<[f32; 2]>,
}

const N_POSITIONS: usize = 200;
const N_SEQUENCES: usize = 3;
const STALE: u16 = 0x1234;

impl Rotation {
    fn new(head_dim: usize, n_heads: usize, n_kv_heads: usize, rows: &[(usize, usize)]) -> Self {
        let mut random = Random(head_dim as u64);
        let qkv = random.numbers(rows.len() * (n_heads + 2 * n_kv_heads) * head_dim);
        let angle = |i: usize| {
            let (position, pair) = (i / (head_dim / 2), i % (head_dim / 2));
            let angle = position as f64 * 1e4f64.powf(-2.0 * pair as f64 / head_dim as f64);
            [angle.cos() as f32, angle.sin() as f32]
        };
        let angles = (0..N_POSITIONS * head_dim / 2).map(angle).collect();
        Self { head_dim, n_heads, n_kv_heads, rows: rows.to_vec(), qkv, angles }
    }

    fn n_blocks(&self) -> usize {
        N_POSITIONS.div_ceil(BLOCK_POSITIONS)
    }

    /// Block tables, one after the other: all blocks, in an order without a pattern.
    fn tables(&self) -> Vec<u32> {
        let n = (N_SEQUENCES * self.n_blocks()) as u32;
        (0..n).map(|i| i * 17 % n).collect()
    }

    /// A head of a row before and after, in f64.
    fn turned(&self, row: usize, first_column: usize) -> Vec<f64> {
        let width = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim;
        let head = &self.qkv[row * width + first_column..][..self.head_dim];
        let half_dim = self.head_dim / 2;
        let angles = &self.angles[self.rows[row].0 * half_dim..][..half_dim];
        let element = |i: usize| {
            let [cos, sin] = angles[i % half_dim].map(f64::from);
            let (low, high) = (f64::from(head[i % half_dim]), f64::from(head[i % half_dim + half_dim]));
            if i < half_dim { low * cos - high * sin } else { high * cos + low * sin }
        };
        (0..self.head_dim).map(element).collect()
    }

    fn check(&self, mut device: Emulated) -> Result<(), String> {
        let device = &mut device;
        let (n_rows, n_more) = (self.rows.len(), 2);
        let q_width = self.n_heads * self.head_dim;
        let n_cache = N_SEQUENCES * self.n_blocks() * BLOCK_POSITIONS * self.n_kv_heads * self.head_dim;
        let positions: Vec<u32> = self.rows.iter().map(|(position, _)| *position as u32).collect();
        let table_of_row: Vec<u32> =
            self.rows.iter().map(|(_, sequence)| (sequence * self.n_blocks()) as u32).collect();
        let q = put(device, &vec![STALE; (n_rows + n_more) * q_width]);
        let (keys, values) = (put(device, &vec![STALE; n_cache]), put(device, &vec![STALE; n_cache]));
        let args = RotateStoreArgs {
            qkv: put(device, &self.qkv),
            q,
            keys,
            values,
            rotations: put(device, &self.angles),
            header: put(device, &[n_rows as u32, 0, 0, 0]),
            positions: put(device, &positions),
            table_of_row: put(device, &table_of_row),
            tables: put(device, &self.tables()),
            n_heads: self.n_heads as u32,
            n_kv_heads: self.n_kv_heads as u32,
            head_dim: self.head_dim as u32,
            unused: 0,
        };
        rotate_store(device, n_rows + n_more, &args).map_err(|error| error.to_string())?;
        let q = get(device, q, (n_rows + n_more) * q_width);
        let (keys, values) = (get(device, keys, n_cache), get(device, values, n_cache));
        self.check_queries(&q)?;
        self.check_cache(&keys, &values)
    }

    fn check_queries(&self, q: &[u16]) -> Result<(), String> {
        let q_width = self.n_heads * self.head_dim;
        for (row, head) in (0..self.rows.len() * self.n_heads).map(|i| (i / self.n_heads, i % self.n_heads)) {
            let got = &q[row * q_width + head * self.head_dim..][..self.head_dim];
            close("query", got, &self.turned(row, head * self.head_dim))?;
        }
        let beyond = &q[self.rows.len() * q_width..];
        if beyond.iter().any(|bits| *bits != STALE) {
            return Err("a query beyond the batch".into());
        }
        Ok(())
    }

    /// Every key and value of the batch is at its place, and nothing else has changed.
    fn check_cache(&self, keys: &[u16], values: &[u16]) -> Result<(), String> {
        let (mut keys, mut values) = (keys.to_vec(), values.to_vec());
        let (tables, n_heads, head_dim) = (self.tables(), self.n_kv_heads, self.head_dim);
        let width = (self.n_heads + 2 * n_heads) * head_dim;
        for (row, (position, sequence)) in self.rows.iter().enumerate() {
            let block = tables[sequence * self.n_blocks() + position / BLOCK_POSITIONS] as usize;
            let slot = position % BLOCK_POSITIONS;
            for head in 0..n_heads {
                let at = (block * n_heads + head) * BLOCK_POSITIONS * head_dim;
                let take = |cache: &mut [u16], index: usize| std::mem::replace(&mut cache[at + index], STALE);
                let got: Vec<u16> =
                    (0..head_dim).map(|i| take(&mut keys, key_index(slot, i, head_dim))).collect();
                let first_column = (self.n_heads + head) * head_dim;
                close("key", &got, &self.turned(row, first_column))?;
                let got: Vec<u16> = (0..head_dim).map(|i| take(&mut values, value_index(slot, i))).collect();
                let first = row * width + first_column + n_heads * head_dim;
                let expected: Vec<f64> =
                    self.qkv[first..first + head_dim].iter().map(|x| f64::from(*x)).collect();
                close("value", &got, &expected)?;
            }
        }
        let is_clean = keys.iter().chain(&values).all(|bits| *bits == STALE);
        is_clean.then_some(()).ok_or_else(|| "something else in the cache".into())
    }
}

fn close(what: &str, got: &[u16], expected: &[f64]) -> Result<(), String> {
    for (i, (bits, exact)) in got.iter().zip(expected).enumerate() {
        let got = f16::from_bits(*bits).to_f64();
        // Half a unit of 11 bits, and the f32 before it.
        if (got - exact).is_nan() || (got - exact).abs() > exact.abs() / 2047.0 + 1e-6 {
            return Err(format!("{what} {i}: {got}, exactly {exact}"));
        }
    }
    Ok(())
}

#[test]
fn queries_and_keys_are_turned_and_stored() {
    let rows = [(0, 0), (1, 0), (15, 1), (16, 1), (17, 1), (199, 2), (40, 0)];
    for (head_dim, n_heads, n_kv_heads) in [(32, 2, 2), (64, 7, 1), (96, 4, 2), (128, 9, 3)] {
        assert_eq!(Rotation::new(head_dim, n_heads, n_kv_heads, &rows).check(Emulated::new()), Ok(()));
    }
}

#[test]
fn what_the_cache_holds_is_finite() {
    let mut rotation = Rotation::new(32, 1, 1, &[(0, 0)]);
    rotation.qkv[32..].iter_mut().step_by(3).for_each(|x| *x = 1e9);
    rotation.qkv[33..].iter_mut().step_by(3).for_each(|x| *x = f32::NEG_INFINITY);
    rotation.qkv[34..].iter_mut().step_by(3).for_each(|x| *x = f32::NAN);
    let problem = rotation.check(Emulated::new()).expect_err("what does not fit is another number");
    assert!(problem.contains("65504"), "{problem}");
}

#[test]
fn mistakes_of_the_rotation_are_found() {
    let rotation = Rotation::new(64, 3, 1, &[(3, 0), (40, 1)]);
    assert_eq!(rotation.check(Emulated::of(&only(&["rope.cu"]))), Ok(()));
    for (file, from, to) in [
        ("turn.cuh", "-__fmul_rn(b.y, rotation.w)", "-__fmul_rn(b.y, rotation.y)"),
        ("rope.cu", "slot = position % BLOCK_POSITIONS", "slot = position % 8"),
        ("turn.cuh", "value_index(slot, i)", "key_index(slot, i, 2 * half_dim)"),
    ] {
        let device = Emulated::of(&only(&["rope.cu"]).mutated(file, from, to));
        assert!(rotation.check(device).is_err(), "{to}");
    }
}
