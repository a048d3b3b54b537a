// Kernels of the emulator's own test.
#include "ptx.cuh"

namespace {

struct MmaArgs {
    const uint32_t *a;  // [n, 32 lanes, 4]
    const uint32_t *b;  // [n, 32 lanes, 2]
    float *c;           // [n, 32 lanes, 4]
    uint32_t n_repeats, is_half;
};

}  // namespace

// c += a * b, for one fragment a warp.
KERNEL(selftest_mma, MmaArgs, 128, 1) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t a[4];
    float c[4];
    for (int j = 0; j < 4; j++) a[j] = args.a[4 * i + j], c[j] = args.c[4 * i + j];
    for (uint32_t repeat = 0; repeat < args.n_repeats; repeat++) {
        if (args.is_half)
            mma_half(c, a, args.b[2 * i], args.b[2 * i + 1]);
        else
            mma_bf16(c, a, args.b[2 * i], args.b[2 * i + 1]);
    }
    for (int j = 0; j < 4; j++) args.c[4 * i + j] = c[j];
}

namespace {

struct ConvertArgs {
    const uint32_t *from;  // bits of floats
    uint16_t *bf16;
    uint16_t *half;
    uint32_t *from_half;  // of the lower 16 bits of `from`
};

}  // namespace

KERNEL(selftest_convert, ConvertArgs, 128, 1) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    float x = __uint_as_float(args.from[i]);
    args.bf16[i] = float_to_bf16(x);
    args.half[i] = float_to_half(x);
    args.from_half[i] = __float_as_uint(half_to_float((uint16_t)args.from[i]));
}

namespace {

struct ReverseArgs {
    const uint32_t *from;  // [blocks, threads]
    uint32_t *to;
};

}  // namespace

// Each block reverses its numbers: by an asynchronous copy to shared memory.
KERNEL(selftest_reverse, ReverseArgs, 1024, 1) {
    SHARED(uint32_t, numbers);
    uint32_t i = threadIdx.x, n = blockDim.x;
    const uint32_t *from = args.from + blockIdx.x * n;
    if (i < n / 4) copy_async(numbers + 4 * i, from + 4 * i, true);
    copy_commit();
    copy_wait<0>();
    sync_block();
    args.to[blockIdx.x * n + i] = numbers[n - 1 - i];
}

// The same within each warp, and each number is added to what a shuffle of all brings.
KERNEL(selftest_warp_reverse, ReverseArgs, 1024, 1) {
    SHARED(uint32_t, numbers);
    uint32_t i = threadIdx.x, x = args.from[blockIdx.x * blockDim.x + i];
    numbers[i] = x;
    sync_warp();
    uint32_t reversed = numbers[i ^ 31], sum = x;
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    args.to[blockIdx.x * blockDim.x + i] = reversed + sum;
}

namespace {

struct MistakeArgs {
    uint32_t *to;
    uint32_t mistake, zero;
};

}  // namespace

// One mistake each.
KERNEL(selftest_mistake, MistakeArgs, 64, 1) {
    SHARED(uint32_t, numbers);
    uint32_t i = threadIdx.x, mistake = args.mistake;
    if (mistake == 1 && i == 3) return;
    if (mistake == 2 && i >= 32) return;
    if (mistake == 3) i < 16 ? sync_warp() : (void)shuffle_xor(i, 1);
    if (mistake == 4) i % 2 ? sync_warp()
                            : sync_warp();
    if (mistake == 5) shuffle_xor(i, i == 7 ? 2 : 1);
    if (mistake == 6) numbers[64] = i;
    if (mistake == 7) args.to[64] = i;
    if (mistake == 8) args.to[-1] = i;
    if (mistake == 9) copy_async(numbers + 1, args.to, true);
    if (mistake == 10) copy_async(numbers + 64, args.to, true);
    if (mistake == 11) {
        if (i < 32)
            sync_block();
        else
            sync_block();
    }
    sync_block();
    args.to[i] = i;
}
