//! Products with K-quants on the emulated device: the kernels that only some shapes or devices take give the bits of the others.

mod support;

use paceline_cuda::kernels::linear::Size;
use paceline_cuda::pack::Kind;
use paceline_domain::WeightType;
use support::compiled::Sources;
use support::emulated::Emulated;
use support::products::{Activations, Bench, FileMatrix, packed_of};

const K_QUANTS: [Kind; 5] = [Kind::Q2_K, Kind::Q3_K, Kind::Q4_K, Kind::Q5_K, Kind::Q6_K];

struct Shape {
    n_outputs: usize,
    n_columns: usize,
    n_rows: usize,
}

fn differing(kind: Kind, shape: &Shape, sizes: [Size; 2]) -> Option<usize> {
    let Shape { n_outputs, n_columns, n_rows } = *shape;
    let packed = packed_of(&FileMatrix::new(kind.weight_type(), n_outputs, n_columns, 31), 0..n_columns);
    let x = Activations::new(0, n_rows, n_columns);
    let [a, b] = sizes.map(|size| {
        let device = Emulated::new().with_seed(n_rows as u64);
        Bench::new(device, &packed).multiply(size, &x, n_outputs, None)
    });
    assert!(a.iter().all(|value| value.is_finite()));
    a.iter().zip(&b).position(|(a, b)| a.to_bits() != b.to_bits())
}

#[test]
fn wide_blocks_give_the_same_bits() {
    // Two blocks of outputs for each 32, 64 or 128 rows, nine superblocks: stretches of two and of one.
    for kind in K_QUANTS {
        for n_rows in [9, 40, 130] {
            let shape = Shape { n_outputs: 140, n_columns: 2304, n_rows };
            assert_eq!(differing(kind, &shape, [Size::Wide, Size::Some]), None, "{kind:?}, {n_rows} rows");
        }
    }
}

#[test]
fn blocks_that_are_shared_and_blocks_that_are_not_give_the_same_bits() {
    // On four multiprocessors eight thread blocks: one block of outputs each, and of a ninth one stretch of three superblocks.
    let shape = Shape { n_outputs: 9 * 128 - 20, n_columns: 768, n_rows: 20 };
    assert_eq!(differing(Kind::Q4_K, &shape, [Size::Wide, Size::Some]), None);
    // With 64 rows four thread blocks, each with a block of outputs and stretches of a fifth.
    let shape = Shape { n_outputs: 600, n_columns: 2304, n_rows: 64 };
    assert_eq!(differing(Kind::Q6_K, &shape, [Size::Wide, Size::Some]), None);
}

#[test]
fn pairs_of_tiles_give_the_same_bits() {
    for kind in K_QUANTS {
        let shape = Shape { n_outputs: 33 * 16 - 5, n_columns: 1536, n_rows: 3 };
        assert_eq!(differing(kind, &shape, [Size::Few, Size::Some]), None, "{kind:?}");
    }
}

#[test]
fn counters_serve_one_product_after_the_other() {
    let (n_outputs, n_columns) = (140, 1280);
    let packed = packed_of(&FileMatrix::new(WeightType::Q4_K, n_outputs, n_columns, 7), 0..n_columns);
    let mut bench = Bench::new(Emulated::new(), &packed);
    let x = Activations::new(0, 12, n_columns);
    let args = bench.args(&x, n_outputs);
    let first = bench.multiply_with(Size::Wide, &args).expect("multiplies");
    let second = bench.multiply_with(Size::Wide, &args).expect("multiplies");
    assert_eq!(second, first, "the counters were not set back");
}

#[test]
fn mistakes_in_the_wide_kernel_are_found() {
    let (n_outputs, n_columns) = (160, 1280);
    let file = FileMatrix::new(WeightType::Q5_K, n_outputs, n_columns, 9);
    let products = |sources: &Sources, n_rows: usize| {
        let mut bench = Bench::new(Emulated::of(sources), &packed_of(&file, 0..n_columns));
        bench.try_multiply(Size::Wide, &Activations::new(0, n_rows, n_columns), n_outputs, None).ok()
    };
    for (from, to) in [
        // Multiplying a unit, and unpacking a superblock, that are still being copied.
        ("hopper::await(x_full(x_place.stage), x_place.parity);\n", "\n"),
        ("hopper::await(super_full(place.stage), place.parity);\n", "\n"),
        // Unpacking into registers that are still being read.
        ("hopper::products_wait<1>();\n", "\n"),
        // Ending a part that products are under way to.
        ("hopper::products_wait<0>();\n", "\n"),
        // A part that does not begin with zeros.
        ("unit + s > 0", "1"),
        // The sums of x of other rows.
        ("(n * F::SUM_WORDS + i)", "((n ^ 1) * F::SUM_WORDS + i)"),
        // Stretches added before all are there.
        ("== (uint32_t)n_stretches", "== 2"),
    ] {
        let mutated = Sources::product().mutated("linear_wide_super.cu", from, to);
        let right = products(&Sources::product(), 20);
        assert!(right.is_some(), "it multiplies");
        // Blocks are threads, and by chance they may come in the one order that does no harm.
        assert!((0..20).any(|_| products(&mutated, 20) != right), "`{from}` was not found");
    }
}
