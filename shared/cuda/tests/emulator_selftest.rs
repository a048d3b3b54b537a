//! The emulator itself: what it computes, and that it finds the mistakes it is there to find.

mod support;

use half::{bf16, f16};
use paceline_cuda::{CudaError, DevicePtr, Launch, Runtime};
use support::{compiled::Sources, emulated::Emulated};

fn sources() -> Sources {
    Sources::product().with("selftest.cu")
}

fn launch(blocks: u32, threads: u32, shared_bytes: u32) -> Launch {
    Launch { grid: [blocks, 1, 1], threads, shared_bytes }
}

fn upload(device: &mut Emulated, words: &[u32]) -> DevicePtr {
    let bytes = bytemuck::cast_slice(words);
    let buffer = device.alloc(bytes.len()).expect("memory");
    device.upload(buffer, bytes).expect("uploads");
    buffer
}

fn download<T: bytemuck::Pod>(device: &mut Emulated, from: DevicePtr, n: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); n];
    device.download(from, bytemuck::cast_slice_mut(&mut values)).expect("downloads");
    values
}

/// Numbers without a pattern (splitmix64).
fn random(seed: u64) -> impl FnMut() -> u32 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb) >> 33) as u32
    }
}

/// Fragments of matrices as mma.m16n8k16 wants them: [32 lanes, registers].
struct Fragments {
    a: Vec<u32>,
    b: Vec<u32>,
    c: Vec<u32>,
}

fn fragments(a: &[[u16; 16]; 16], b: &[[u16; 8]; 16], c: &[[f32; 8]; 16]) -> Fragments {
    let mut fragments = Fragments { a: Vec::new(), b: Vec::new(), c: Vec::new() };
    let pair = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4 * 2);
        for (row, k) in [(g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8)] {
            fragments.a.push(pair(a[row][k], a[row][k + 1]));
        }
        for k in [t, t + 8] {
            fragments.b.push(pair(b[k][g], b[k + 1][g]));
        }
        for (row, column) in [(g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1)] {
            fragments.c.push(c[row][column].to_bits());
        }
    }
    fragments
}

fn check_mma(is_half: bool, seed: u64) {
    let mut next = random(seed);
    let mut number = || (next() as f32 / 2f32.powi(31) - 0.5) * 2f32.powi((next() % 20) as i32 - 10);
    let code = |x: f32| if is_half { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() };
    let value =
        |code: u16| if is_half { f16::from_bits(code).to_f32() } else { bf16::from_bits(code).to_f32() };
    let a: [[u16; 16]; 16] = [(); 16].map(|()| [(); 16].map(|()| code(number())));
    let b: [[u16; 8]; 16] = [(); 16].map(|()| [(); 8].map(|()| code(number())));
    let c: [[f32; 8]; 16] = [(); 16].map(|()| [(); 8].map(|()| number()));
    let mut expected = c;
    for (row, column, k) in (0..16 * 8 * 16).map(|i| (i / 128, i / 16 % 8, i % 16)) {
        expected[row][column] += value(a[row][k]) * value(b[k][column]);
    }

    let mut device = Emulated::of(&sources()).with_seed(seed);
    let brought = fragments(&a, &b, &c);
    let [a, b, c] = [&brought.a, &brought.b, &brought.c].map(|words| upload(&mut device, words));
    let args = [a, b, c, 1 | u64::from(is_half) << 32];
    device.launch("selftest_mma", launch(1, 32, 0), bytemuck::cast_slice(&args)).expect("runs");
    let got: Vec<u32> = download(&mut device, c, 128);
    let none = ([[0; 16]; 16], [[0; 8]; 16]);
    assert_eq!(got, fragments(&none.0, &none.1, &expected).c);
}

#[test]
fn matrix_instructions_are_the_plain_product() {
    for seed in 0..20 {
        check_mma(false, seed);
        check_mma(true, seed);
    }
}

#[test]
fn number_formats_are_those_of_the_half_crate() {
    // Every code of 16 bits as the upper and as the lower half of a float, at and beside the rounding borders; and for
    // halves the borders between each two.
    let low = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
    let mut floats: Vec<u32> = (0..=u16::MAX).map(u32::from).collect();
    floats.extend((0..=u16::MAX).flat_map(|high| low.map(|low| u32::from(high) << 16 | low)));
    let halves = (0..=u16::MAX).map(|code| f16::from_bits(code).to_f32().to_bits());
    floats.extend(halves.flat_map(|bits| [0x0fff, 0x1000, 0x1001].map(|offset| bits.wrapping_add(offset))));
    // Between two subnormal halves.
    let borders = (0..1024u32).map(|code| (f64::from(2 * code + 1) / 2f64.powi(25)) as f32);
    floats.extend(borders.flat_map(|x| [x.to_bits() - 1, x.to_bits(), x.to_bits() + 1]));
    floats.resize(floats.len().next_multiple_of(128), 0);

    let n = floats.len();
    let mut device = Emulated::of(&sources());
    let from = upload(&mut device, &floats);
    let [bf16s, halves, from_half] = [2, 2, 4].map(|size| device.alloc(n * size).expect("memory"));
    let args = [from, bf16s, halves, from_half];
    device
        .launch("selftest_convert", launch(n as u32 / 128, 128, 0), bytemuck::cast_slice(&args))
        .expect("runs");
    let bf16s: Vec<u16> = download(&mut device, bf16s, n);
    let halves: Vec<u16> = download(&mut device, halves, n);
    let from_half: Vec<u32> = download(&mut device, from_half, n);
    for (i, bits) in floats.into_iter().enumerate() {
        let x = f32::from_bits(bits);
        let expected = if x.is_nan() {
            (0x7fff, 0x7fff)
        } else {
            (bf16::from_f32(x).to_bits(), f16::from_f32(x).to_bits())
        };
        assert_eq!((bf16s[i], halves[i]), expected, "{x:e} = {bits:#x}");
        let (got, expected) = (f32::from_bits(from_half[i]), f16::from_bits(bits as u16).to_f32());
        assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(), "{bits:#x}");
    }
}

/// Whether `kernel` reverses groups of `group` numbers, and adds the group's sum if it is a warp.
fn reverses(sources: &Sources, kernel: &'static str, seed: u64) -> bool {
    let (n_blocks, n_threads, mut next) = (9, 256, random(seed));
    let n = n_blocks * n_threads;
    let numbers: Vec<u32> = (0..n).map(|_| next() % 1000).collect();
    let mut device = Emulated::of(sources).with_seed(seed);
    let (from, to) = (upload(&mut device, &numbers), device.alloc(n * 4).expect("memory"));
    let shape = launch(n_blocks as u32, n_threads as u32, n_threads as u32 * 4);
    device.launch(kernel, shape, bytemuck::cast_slice(&[from, to])).expect("runs");
    let is_warp = kernel == "selftest_warp_reverse";
    let expected = numbers.chunks(if is_warp { 32 } else { n_threads }).flat_map(|group| {
        let sum: u32 = if is_warp { group.iter().sum() } else { 0 };
        group.iter().rev().map(move |x| x + sum)
    });
    download::<u32>(&mut device, to, n) == expected.collect::<Vec<_>>()
}

#[test]
fn barriers_copies_and_shuffles_work_in_every_order() {
    for seed in 0..10 {
        assert!(reverses(&sources(), "selftest_reverse", seed));
        assert!(reverses(&sources(), "selftest_warp_reverse", seed));
    }
}

#[test]
fn what_is_missing_is_found() {
    let wait = sources().mutated("selftest.cu", "copy_wait<0>();", "");
    assert!(!reverses(&wait, "selftest_reverse", 1), "a wait for a copy");
    let barrier = sources().mutated("selftest.cu", "copy_wait<0>();\n    sync_block();", "copy_wait<0>();");
    assert!(!reverses(&barrier, "selftest_reverse", 1), "a barrier of the block");
    let barrier = sources().mutated("selftest.cu", "numbers[i] = x;\n    sync_warp();", "numbers[i] = x;");
    assert!(!reverses(&barrier, "selftest_warp_reverse", 1), "a barrier of the warp");
}

/// What is said of the kernel with mistakes.
fn mistake(number: u32) -> String {
    let mut device = Emulated::of(&sources());
    let to = device.alloc(64 * 4).expect("memory");
    let args = [to, u64::from(number)];
    match device.launch("selftest_mistake", launch(1, 64, 256), bytemuck::cast_slice(&args)) {
        Ok(()) => String::new(),
        Err(CudaError::Device { problem, .. }) => problem,
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn mistakes_are_told() {
    assert_eq!(mistake(0), "");
    let expected = [
        "lane 3 of its warp has left", // or it leaves while others wait
        "32 threads have left, others wait in sync_block",
        "the warp diverges",
        "the warp diverges",
        "lanes of a warp shuffle by",
        "something was written to shared + 256, of 256 bytes",
        "wrote byte 256 of an allocation of 256 bytes",
        "wrote byte -4 of an allocation of 256 bytes",
        "not aligned to 16",
        "to shared + 256, of 256 bytes",
        "threads of a block wait in sync_block at",
    ];
    for (number, text) in (1..).zip(expected) {
        let problem = mistake(number);
        let leaves = number == 1 && problem.contains("lane 3 leaves, lane");
        assert!(problem.contains(text) || leaves, "mistake {number} is told as `{problem}`");
        assert!(problem.starts_with("kernel selftest_mistake"), "{problem}");
    }
}

#[test]
fn launches_are_checked() {
    let mut device = Emulated::of(&sources());
    let shapes = [launch(1, 33, 0), launch(1, 96, 0), launch(0, 64, 0), launch(1, 64, 1 << 20)];
    shapes.into_iter().for_each(|shape| {
        assert!(device.launch("selftest_mistake", shape, &[0; 16]).is_err(), "{shape:?}");
    });
    assert!(device.launch("selftest_mistake", launch(1, 64, 0), &[0; 8]).is_err());
    assert!(device.launch("selftest_nothing", launch(1, 64, 0), &[0; 16]).is_err());
    let info = device.compiled().kernels().into_iter().find(|kernel| kernel.name == "selftest_mistake");
    assert_eq!(info.map(|info| (info.args_bytes, info.max_threads)), Some((16, 64)));
}

#[test]
fn memory_and_graphs_are_those_of_a_device() {
    let mut device = Emulated::of(&sources()).with_memory(1000);
    let to = device.alloc(64 * 4).expect("memory");
    assert_eq!(to % 256, 0);
    assert_eq!(device.memory(), Ok((744, 1000)));
    assert_eq!(device.alloc(745), Err(CudaError::Memory { wanted: 745, free: 744 }));
    assert!(device.upload(to, &[0; 257]).is_err());
    assert!(device.download(to + 200, &mut [0; 57]).is_err());

    device.begin_capture().expect("captures");
    let args = [to, 0];
    device.launch("selftest_mistake", launch(1, 64, 256), bytemuck::cast_slice(&args)).expect("records");
    assert!(device.upload(to, &[0; 4]).is_err());
    assert!(device.download(to, &mut [0; 4]).is_err());
    let graph = device.end_capture().expect("ends");
    assert!(device.end_capture().is_err());
    assert_eq!(download::<u32>(&mut device, to, 64), [0; 64]);
    for _ in 0..2 {
        device.upload(to, &[7; 256]).expect("uploads");
        device.replay(graph).expect("replays");
        assert_eq!(download::<u32>(&mut device, to, 64), (0..64).collect::<Vec<_>>());
    }
}
