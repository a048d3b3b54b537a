//! Matrix products and look-ups on the emulated device: right against dequantized weights, and the same bits from every
//! kernel for every batch.

mod support;

use half::bf16;
use paceline_cuda::kernels::linear::{
    EmbedArgs, LinearArgs, Matrix, SOME_ROWS, SiluArgs, Size, embed, linear, silu_times_up,
};
use paceline_cuda::kernels::linear_super::sums_bytes;
use paceline_cuda::pack::{Arrangement, Kind, Packed, Rows, UNIT_COLUMNS, pack};
use paceline_cuda::{CudaError, DevicePtr, Runtime};
use paceline_domain::WeightType;
use paceline_kernels::formats::{GROUP_LEN, GROUPS_PER_SUPER, ScaleLayout, code_layout, group_of_row};
use paceline_kernels::{Pinning, ThreadPool, dequantize_row};
use std::ops::Range;
use support::{compiled::Sources, emulated::Emulated};

/// Counter-based numbers, so that every element can be made on its own.
fn random(seed: u64, at: usize) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (at as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
    x = (x ^ (x >> 32)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^ (x >> 29)
}

/// In -1..1.
fn number(seed: u64, at: usize) -> f32 {
    (random(seed, at) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// A matrix in the bytes of its file: any codes, scales of ordinary size.
struct FileMatrix {
    weight_type: WeightType,
    n_rows: usize,
    n_cols: usize,
    bytes: Vec<u8>,
}

impl FileMatrix {
    fn new(weight_type: WeightType, n_rows: usize, n_cols: usize, seed: u64) -> Self {
        let row_bytes = weight_type.row_bytes(n_cols).expect("whole blocks");
        let mut bytes: Vec<u8> = (0..n_rows * row_bytes).map(|at| random(seed, at) as u8).collect();
        let halves: &[usize] = match weight_type {
            WeightType::Q4_0 | WeightType::Q5_0 | WeightType::Q8_0 => &[0],
            WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4_K | WeightType::Q5_K => &[0, 2],
            WeightType::Q2_K => &[80, 82],
            WeightType::Q3_K => &[108],
            WeightType::Q6_K => &[208],
            WeightType::F32 | WeightType::F16 | WeightType::BF16 => &[],
        };
        for (idx, block) in bytes.chunks_exact_mut(weight_type.block_bytes()).enumerate() {
            let value = number(seed + 1, idx);
            match weight_type {
                WeightType::F32 => block.copy_from_slice(&value.to_le_bytes()),
                WeightType::F16 => block.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
                WeightType::BF16 => block.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                _ => {
                    for (i, at) in halves.iter().enumerate() {
                        let scale = half::f16::from_f32(number(seed + 2 + i as u64, idx));
                        block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
                    }
                }
            }
        }
        Self { weight_type, n_rows, n_cols, bytes }
    }

    fn row(&self, row: usize) -> &[u8] {
        let row_bytes = self.bytes.len() / self.n_rows;
        &self.bytes[row * row_bytes..][..row_bytes]
    }

    /// What the device holds: the weights of the file, plain numbers as bfloat16.
    fn weights(&self, row: usize) -> Vec<f32> {
        let mut weights = vec![0.0; self.n_cols];
        dequantize_row(self.weight_type, self.row(row), &mut weights);
        if !self.weight_type.is_quantized() {
            weights.iter_mut().for_each(|weight| *weight = bf16::from_f32(*weight).to_f32());
        }
        weights
    }
}

fn pool() -> ThreadPool {
    ThreadPool::new(2, Pinning::None)
}

/// A device with one matrix on it.
struct Bench {
    device: Emulated,
    kind: Kind,
    matrix: Matrix,
}

impl Bench {
    fn new(mut device: Emulated, packed: &Packed) -> Self {
        let tiles = put(&mut device, &packed.bytes);
        let matrix = Matrix {
            tiles,
            tile_bytes: packed.tile_bytes as i64,
            n_tiles: packed.n_tiles as i32,
            n_units: packed.n_units as i32,
            n_supers: packed.n_supers as i32,
            first_group: packed.first_group as i32,
        };
        Self { device, kind: packed.kind, matrix }
    }

    fn multiply(&mut self, size: Size, x: &Activations, n_outputs: usize, bias: Option<&[f32]>) -> Vec<f32> {
        self.try_multiply(size, x, n_outputs, bias).expect("multiplies")
    }

    fn try_multiply(
        &mut self,
        size: Size,
        x: &Activations,
        n_outputs: usize,
        bias: Option<&[f32]>,
    ) -> Result<Vec<f32>, CudaError> {
        let out = self.device.alloc(x.n_rows * n_outputs * 4).expect("memory");
        let sums_of_x = self.device.alloc(sums_bytes(x.n_rows, x.n_columns_padded)).expect("memory");
        let bias = bias.map_or(0, |bias| put(&mut self.device, bytemuck::cast_slice(bias)));
        let args = LinearArgs {
            matrix: self.matrix,
            x: put(&mut self.device, bytemuck::cast_slice(&x.packed)),
            bias,
            out,
            gated: 0,
            sums_of_x,
            x_tile_bytes: (x.n_columns_padded * 16) as i64,
            n_rows: x.n_rows as i32,
            n_outputs: n_outputs as i32,
            out_stride: n_outputs as i32,
            gated_k_padded: 0,
        };
        linear(&mut self.device, self.kind, size, &args)?;
        Ok(floats(&mut self.device, out, x.n_rows * n_outputs))
    }
}

fn put(device: &mut Emulated, bytes: &[u8]) -> DevicePtr {
    let to = device.alloc(bytes.len()).expect("memory");
    device.upload(to, bytes).expect("uploads");
    to
}

fn floats(device: &mut Emulated, from: DevicePtr, n: usize) -> Vec<f32> {
    let mut values = vec![0.0; n];
    device.download(from, bytemuck::cast_slice_mut(&mut values)).expect("downloads");
    values
}

/// As kernels/layout.cuh has it.
fn operand_b_index(row: usize, k: usize, k_padded: usize) -> usize {
    (row / 8 * (k_padded / 8) + k / 8) * 64 + row % 8 * 8 + k % 8
}

/// Rows of bfloat16 activations; rows that are not in the batch hold something else.
struct Activations {
    n_rows: usize,
    n_columns_padded: usize,
    values: Vec<Vec<f32>>,
    packed: Vec<u16>,
}

impl Activations {
    /// Row `i` of the batch is the activation row `first + i` of a fixed set.
    fn new(first: usize, n_rows: usize, n_columns: usize) -> Self {
        let n_columns_padded = n_columns.next_multiple_of(UNIT_COLUMNS);
        let n_rows_padded = n_rows.next_multiple_of(256);
        let value = |row: usize, k: usize| bf16::from_f32(number(77 + row as u64, k));
        let mut packed = vec![bf16::from_f32(3.5).to_bits(); n_rows_padded * n_columns_padded];
        for row in 0..n_rows {
            for k in 0..n_columns_padded {
                let bits = if k < n_columns { value(first + row, k).to_bits() } else { 0 };
                packed[operand_b_index(row, k, n_columns_padded)] = bits;
            }
        }
        let values = |row: usize| (0..n_columns).map(|k| value(first + row, k).to_f32()).collect();
        Self { n_rows, n_columns_padded, values: (0..n_rows).map(values).collect(), packed }
    }
}

fn packed_of(file: &FileMatrix, columns: std::ops::Range<usize>) -> Packed {
    let row = |row: usize| file.row(row).into();
    let rows = [Rows { weight_type: file.weight_type, n_rows: file.n_rows, row: &row }];
    pack(&Arrangement::Stacked(&rows), columns, &pool())
}

/// Most that a product may differ from exact arithmetic, relative to the sum of the absolute products.
const TOLERANCE: f64 = 3e-6;

/// The exact product, and the sum of the absolute products.
fn exact(weights: &[f32], x: &[f32]) -> (f64, f64) {
    let products = weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
    products.fold((0.0, 0.0), |(sum, magnitude), product| (sum + product, magnitude + product.abs()))
}

/// The same for K-quants, whose codes times small scales are rounded to bfloat16, as are sums of activations and what that
/// leaves over of them.
fn exact_in_supers(file: &FileMatrix, output: usize, columns: &Range<usize>, x: &[f32]) -> (f64, f64) {
    let layout = code_layout(file.weight_type).expect("a K-quant");
    let (mut sum, mut magnitude) = (0.0, 0.0);
    for (idx, x) in x.chunks(GROUP_LEN).enumerate() {
        let group = group_of_row(file.weight_type, file.row(output), columns.start / GROUP_LEN + idx);
        let [d, m] =
            [group.scales.d, group.scales.m].map(|bits| f64::from(half::f16::from_bits(bits).to_f32()));
        for (half, x) in x.chunks(GROUP_LEN / 2).enumerate() {
            let sub = group.scales.sub;
            let (small, minimum) = match layout.scales {
                ScaleLayout::Super32Min => (i32::from(sub[0]), sub[1]),
                ScaleLayout::Super16Min => (i32::from(sub[half] & 15), sub[half] >> 4),
                _ => (i32::from(sub[half] as i8), 0),
            };
            for (x, code) in x.iter().zip(&group.codes[half * GROUP_LEN / 2..]) {
                let rounded = bf16::from_f32(((i32::from(*code) - layout.offset) * small) as f32);
                let product = d * f64::from(rounded.to_f32()) * f64::from(*x);
                sum += product;
                magnitude += product.abs();
            }
            if layout.scales == ScaleLayout::Super16Min {
                let product = m * f64::from(minimum) * rounded_sum(x);
                sum -= product;
                magnitude += product.abs();
            }
        }
        if layout.scales == ScaleLayout::Super32Min {
            let product = m * f64::from(group.scales.sub[1]) * rounded_sum(x);
            sum -= product;
            magnitude += product.abs();
        }
    }
    (sum, magnitude)
}

/// A sum of activations as two bfloat16 numbers.
fn rounded_sum(x: &[f32]) -> f64 {
    let sum: f64 = x.iter().map(|x| f64::from(*x)).sum();
    let high = f64::from(bf16::from_f64(sum).to_f32());
    high + f64::from(bf16::from_f64(sum - high).to_f32())
}

fn check_product(
    device: Emulated,
    file: &FileMatrix,
    columns: std::ops::Range<usize>,
    n_rows: usize,
    size: Size,
) -> f64 {
    let mut bench = Bench::new(device, &packed_of(file, columns.clone()));
    let x = Activations::new(0, n_rows, columns.len());
    let bias: Vec<f32> = (0..file.n_rows).map(|output| number(5, output)).collect();
    let out = bench.multiply(size, &x, file.n_rows, Some(&bias));
    let mut worst = 0f64;
    for output in 0..file.n_rows {
        let weights = &file.weights(output)[columns.clone()];
        for row in 0..n_rows {
            let (sum, magnitude) = if file.weight_type.block_len() == GROUP_LEN * GROUPS_PER_SUPER {
                exact_in_supers(file, output, &columns, &x.values[row])
            } else {
                exact(weights, &x.values[row])
            };
            let got = f64::from(out[row * file.n_rows + output]);
            // Minimums are multiplied with sums: their part of the magnitude is another.
            let scale = magnitude + 64.0;
            let difference = (got - sum - f64::from(bias[output])).abs() / scale;
            worst = if difference.is_nan() { f64::INFINITY } else { worst.max(difference) };
        }
    }
    worst
}

#[test]
fn every_type_multiplies_as_it_dequantizes() {
    for weight_type in WeightType::ALL {
        let n_cols = if weight_type.block_len() == 256 { 1280 } else { 1184 };
        let file = FileMatrix::new(weight_type, 37, n_cols, 9);
        for (n_rows, size) in [(1, Size::Few), (7, Size::Few), (11, Size::Some), (3, Size::Many)] {
            let worst = check_product(Emulated::new(), &file, 0..n_cols, n_rows, size);
            assert!(worst < TOLERANCE, "{} {size:?} {n_rows} rows: {worst:e}", weight_type.name());
        }
    }
}

#[test]
fn columns_may_begin_and_end_inside_a_superblock() {
    for weight_type in
        [WeightType::Q4_K, WeightType::Q6_K, WeightType::Q2_K, WeightType::Q8_0, WeightType::BF16]
    {
        let file = FileMatrix::new(weight_type, 16, 768, 3);
        for columns in [32..544, 96..128, 224..768, 256..320] {
            for size in [Size::Few, Size::Some, Size::Many] {
                let worst = check_product(Emulated::new(), &file, columns.clone(), 2, size);
                assert!(worst < TOLERANCE, "{} {columns:?} {size:?}: {worst:e}", weight_type.name());
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch_and_kernel() {
    for kind in Kind::ALL {
        // Plain numbers: more than what is under way at once.
        let n_columns = if kind == Kind::BF16 { 4_352 } else { 2_560 };
        let file = FileMatrix::new(kind.weight_type(), 40, n_columns, 21);
        let packed = packed_of(&file, 0..n_columns);
        let run = |size: Size, first: usize, n_rows: usize, seed: u64| {
            let mut bench = Bench::new(Emulated::new().with_seed(seed), &packed);
            bench.multiply(size, &Activations::new(first, n_rows, n_columns), 40, None)
        };
        let alone: Vec<f32> = (0..3).flat_map(|row| run(Size::Few, row, 1, 1)).collect();
        assert!(alone.iter().all(|value| value.is_finite()));
        for (size, n_rows) in [
            (Size::Few, 2),
            (Size::Few, 3),
            (Size::Few, 8),
            (Size::Some, 5),
            (Size::Some, 33),
            (Size::Many, 1),
            (Size::Many, 70),
        ] {
            let batch = run(size, 0, n_rows, n_rows as u64);
            let n = 40 * n_rows.min(3);
            let same = batch[..n].iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{kind:?}: {size:?} with {n_rows} rows differs from rows alone");
        }
    }
}

#[test]
fn the_size_of_a_batch_chooses_the_kernel() {
    let (hopper, small) = (Emulated::new(), Emulated::small());
    let sizes = [8, 9, SOME_ROWS, SOME_ROWS + 1].map(|n_rows| Size::of(Kind::Q4_K, n_rows, &hopper));
    assert_eq!(sizes, [Size::Few, Size::Some, Size::Some, Size::Many]);
    assert_eq!(Size::of(Kind::BF16, SOME_ROWS + 1, &hopper), Size::Wide);
    assert_eq!(Size::of(Kind::BF16, SOME_ROWS + 1, &small), Size::Some, "blocks of small GPUs");
}

#[test]
fn wide_blocks_give_the_same_bits() {
    // Two blocks of outputs, rows and columns that fill none; blocks take several turns.
    let (n_outputs, n_columns) = (280, 480);
    let file = FileMatrix::new(WeightType::BF16, n_outputs, n_columns, 31);
    let packed = packed_of(&file, 0..n_columns);
    let bias: Vec<f32> = (0..n_outputs).map(|output| number(6, output)).collect();
    for (n_rows, seed) in [(1, 1), (130, 2), (397, 3), (600, 4)] {
        let x = Activations::new(0, n_rows, n_columns);
        let run = |size| {
            let device = Emulated::new().with_seed(seed);
            Bench::new(device, &packed).multiply(size, &x, n_outputs, Some(&bias))
        };
        let (wide, many) = (run(Size::Wide), run(Size::Many));
        let differ = wide.iter().zip(&many).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differ, None, "{n_rows} rows, {n_outputs} outputs");
    }
}

#[test]
fn gated_products_are_silu_of_the_gate_times_up_in_operand_order() {
    check_gated(WeightType::Q4_K, &[Size::Few, Size::Some, Size::Many]);
    check_gated(WeightType::BF16, &[Size::Few, Size::Some, Size::Many, Size::Wide]);
}

fn check_gated(weight_type: WeightType, sizes: &[Size]) {
    let (n_features, n_cols, n_rows) = (21, 256, 5);
    let [gate, up] = [4, 5].map(|seed| FileMatrix::new(weight_type, n_features, n_cols, seed));
    let (gate_row, up_row) = (|row: usize| gate.row(row).into(), |row: usize| up.row(row).into());
    let rows = |row| Rows { weight_type, n_rows: n_features, row };
    let packed = pack(&Arrangement::Gated([rows(&gate_row), rows(&up_row)]), 0..n_cols, &pool());
    let x = Activations::new(0, n_rows, n_cols);
    let apart = [&gate, &up].map(|file| {
        Bench::new(Emulated::new(), &packed_of(file, 0..n_cols)).multiply(Size::Few, &x, n_features, None)
    });
    let mut expected = vec![0u16; 256 * 64];
    let mut device = Emulated::new();
    let separate = device.alloc(2 * expected.len()).expect("memory");
    let args = SiluArgs {
        gate: put(&mut device, bytemuck::cast_slice(&apart[0])),
        up: put(&mut device, bytemuck::cast_slice(&apart[1])),
        gated: separate,
        n_rows: n_rows as i32,
        n_features: n_features as i32,
        gated_k_padded: 64,
        unused: 0,
    };
    silu_times_up(&mut device, &args).expect("runs");
    device.download(separate, bytemuck::cast_slice_mut(&mut expected)).expect("downloads");
    for row in 0..n_rows {
        for feature in 0..n_features {
            let [gate, up] = [0, 1].map(|i| f64::from(apart[i][row * n_features + feature]));
            let exact = gate / (1.0 + (-gate).exp()) * up;
            let got = f64::from(bf16::from_bits(expected[operand_b_index(row, feature, 64)]).to_f32());
            assert!(
                (got - exact).abs() <= exact.abs() / 250.0 + 1e-6,
                "row {row} feature {feature}: {got} {exact}"
            );
        }
    }
    for size in sizes {
        let mut bench = Bench::new(Emulated::new(), &packed);
        let gated = bench.device.alloc(2 * expected.len()).expect("memory");
        let sums_of_x = bench.device.alloc(sums_bytes(n_rows, n_cols)).expect("memory");
        let args = LinearArgs {
            matrix: bench.matrix,
            x: put(&mut bench.device, bytemuck::cast_slice(&x.packed)),
            bias: 0,
            out: 0,
            gated,
            sums_of_x,
            x_tile_bytes: (x.n_columns_padded * 16) as i64,
            n_rows: n_rows as i32,
            n_outputs: n_features as i32,
            out_stride: 0,
            gated_k_padded: 64,
        };
        linear(&mut bench.device, bench.kind, *size, &args).expect("multiplies");
        let mut got = vec![0u16; expected.len()];
        bench.device.download(gated, bytemuck::cast_slice_mut(&mut got)).expect("downloads");
        assert!(got == expected, "{size:?} gives other bits than two products");
    }
}

#[test]
fn embeddings_are_looked_up_exactly() {
    for weight_type in WeightType::ALL {
        let file = FileMatrix::new(weight_type, 19, 256, 8);
        let mut bench = Bench::new(Emulated::new(), &packed_of(&file, 0..256));
        let tokens = [18u32, 0, 7, 7];
        let hidden = bench.device.alloc(4 * 256 * 4).expect("memory");
        let args = EmbedArgs {
            matrix: bench.matrix,
            header: put(&mut bench.device, bytemuck::cast_slice(&[3u32, 0, 0, 0])),
            tokens: put(&mut bench.device, bytemuck::cast_slice(&tokens)),
            hidden,
            kind: bench.kind.number(),
            n_embd: 256,
        };
        embed(&mut bench.device, 4, &args).expect("looks up");
        let got = floats(&mut bench.device, hidden, 4 * 256);
        for row in 0..3 {
            let expected = file.weights(tokens[row] as usize);
            assert_eq!(got[row * 256..][..256], expected, "{} row {row}", weight_type.name());
        }
        assert!(got[3 * 256..].iter().all(|value| *value == 0.0), "a row beyond the batch was written");
    }
}

#[test]
fn mistakes_in_the_kernels_are_found() {
    let legacy = FileMatrix::new(WeightType::Q5_1, 37, 512, 9);
    let in_supers = FileMatrix::new(WeightType::Q5_K, 37, 1280, 9);
    for (file, source, from, to) in [
        // A scale of the wrong group.
        (&legacy, "matrix.cuh", "row * 8 + group * 4", "row * 8"),
        (&in_supers, "superblock.cuh", "(s / 2 * 2 + half)", "half"),
        // A neighbour's bits.
        (&legacy, "matrix.cuh", ">> (s * 4 + p)) & 0x00010001u", ">> (s * 4 + (p ^ 1))) & 0x00010001u"),
        (&in_supers, "superblock.cuh", "codes.words[bit] >> (15 - bit)", "codes.words[bit] >> 15"),
        // Reading what copies have not brought yet.
        (
            &legacy,
            "linear_few_quantized.cu",
            "copy_wait<STAGES - 2>();\n        sync_warp();\n        load(",
            "sync_warp();\n        load(",
        ),
        (&in_supers, "linear_few_super.cu", "copy_wait<1>();\n            sync_warp();", "sync_warp();"),
        // Sums of activations of the wrong groups.
        (&in_supers, "linear_super.cuh", "PER_HALF ? s : s / 2", "PER_HALF ? s : s / 4"),
    ] {
        let device = Emulated::of(&Sources::product().mutated(source, from, to));
        let worst = check_product(device, file, 0..file.n_cols, 2, Size::Few);
        assert!(worst > 100.0 * TOLERANCE, "`{to}` was not found: {worst:e}");
    }
    let plain = FileMatrix::new(WeightType::BF16, 16, 4_096, 5);
    for (from, to) in
        [("                    await(full + slot, parity);\n", ""), ("row = piece % ROWS", "row = piece % 2")]
    {
        let device = Emulated::of(&Sources::product().mutated("linear_few.cu", from, to));
        let worst = check_product(device, &plain, 0..4_096, 3, Size::Few);
        assert!(worst > 100.0 * TOLERANCE, "`{to}` was not found: {worst:e}");
    }
}

#[test]
fn mistakes_in_the_wide_kernel_are_found() {
    let file = FileMatrix::new(WeightType::BF16, 160, 640, 9);
    for (from, to) in [
        // Multiplying a stage that is still being copied.
        ("hopper::await(&full[stage], parity);\n", "\n"),
        // Giving a stage back that is still being read.
        ("hopper::products_wait<1>();\n", "\n"),
        // Storing sums of products that are under way.
        ("hopper::products_wait<0>();\n", "\n"),
        // The second operand a step behind.
        ("hopper::next_step(b, s)", "hopper::next_step(b, s & 2)"),
    ] {
        let products = |sources: &Sources| {
            let mut bench = Bench::new(Emulated::of(sources), &packed_of(&file, 0..640));
            bench.try_multiply(Size::Wide, &Activations::new(0, 300, 640), 160, None).ok()
        };
        let mutated = products(&Sources::product().mutated("linear_wide.cu", from, to));
        let right = products(&Sources::product()).expect("multiplies");
        assert_ne!(mutated, Some(right), "`{from}`");
    }
}
