//! Matrix products and look-ups on the emulated device: right against dequantized weights, and the same bits from every
//! kernel for every batch.

mod support;

use half::bf16;
use paceline_cuda::Runtime;
use paceline_cuda::kernels::linear::{
    EmbedArgs, LinearArgs, SOME_ROWS, SiluArgs, Size, embed, linear, silu_times_up,
};
use paceline_cuda::pack::{Arrangement, Kind, Rows, pack};
use paceline_domain::WeightType;
use support::compiled::Sources;
use support::emulated::Emulated;
use support::products::{
    Activations, Bench, FileMatrix, TOLERANCE, check_product, floats, number, operand_b_index, packed_of,
    pool, put, workspace,
};

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
            let wide = if weight_type.block_len() == 256 { Some(Size::Wide) } else { None };
            for size in [Size::Few, Size::Some, Size::Many].into_iter().chain(wide) {
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
    let sizes = |kind: Kind| [8, 9, SOME_ROWS, SOME_ROWS + 1].map(|n_rows| Size::of(kind, n_rows, &hopper));
    assert_eq!(sizes(Kind::Q4_0), [Size::Few, Size::Some, Size::Some, Size::Many]);
    assert_eq!(sizes(Kind::Q4_K), [Size::Few, Size::Wide, Size::Wide, Size::Wide]);
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
    check_gated(WeightType::Q4_K, &[Size::Few, Size::Some, Size::Many, Size::Wide]);
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
        let workspace = workspace(&mut bench.device, n_rows, n_cols, 2 * n_features);
        let args = LinearArgs {
            matrix: bench.matrix,
            x: put(&mut bench.device, bytemuck::cast_slice(&x.packed)),
            bias: 0,
            out: 0,
            gated,
            workspace,
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
        (&in_supers, "linear_few_super.cu", "copy_wait<1>();\n", "\n"),
        // Sums of activations of the wrong groups.
        (&in_supers, "linear_super.cuh", "2 * group + half : group;", "2 * group + half : group / 2;"),
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
