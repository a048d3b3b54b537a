// Products of packed weights with rows of activations, for three sizes of batch. All of them give an output element by
// the same sequence of operations: in the order of K, 16 columns at a time, one accumulator. So a row's result does not
// depend on who else is in the batch, and each kernel is free in its tiling.
//
//   bf16       total = mma(a, b, total)
//   quantized  part = mma(codes, b, 0) over a group; total = fma(scale, part, total); total = fma(min, sum of b, total)
#include "matrix.cuh"

struct LinearArgs {
    Matrix matrix;
    const uint16_t *x;   // rows as operand B, padded to what the kernel reads; its first column meets the matrix's first
    const float *bias;   // [n_outputs], or null
    float *out;          // [n_rows][out_stride]; null for gated products
    uint16_t *gated;     // silu(gate) * up as operand B, [n_rows][gated_k_padded]; null for plain ones
    int64_t x_tile_bytes;  // from 8 rows of x to the next 8
    int32_t n_rows;      // rows of activations
    int32_t n_outputs;   // rows of the matrix; for gated products features, half of them
    int32_t out_stride;
    int32_t gated_k_padded;
};

namespace linear {

constexpr uint32_t ONE_BF16 = 0x3f80u;
// Bytes of 8 rows of activations in one unit.
constexpr int X_BYTES = 8 * UNIT_K * 2;

// Adds a group's part to the totals: rows g (0, 1) and g + 8 (2, 3); `sums` are those of the two columns' activations.
template <class F>
DEVICE void add_scaled(float (&total)[4], const float (&part)[4], const ScalePair &pair, const float (&sums)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        total[i] = fmaf(pair.scale[i / 2], part[i], total[i]);
        if constexpr (F::MIN) total[i] = fmaf(pair.min[i / 2], sums[i % 2], total[i]);
    }
}

// Adds one unit of 64 columns: MT tiles of 16 outputs, `tile_bytes` apart, by NT tiles of 8 rows.
template <class F, int MT, int NT>
DEVICE void multiply_unit(float (&total)[MT][NT][4], const uint8_t *weights, int tile_bytes, const uint8_t *x, int lane) {
#pragma unroll
    for (int group = 0; group < 2; group++) {
        uint4 b[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            b[n] = *reinterpret_cast<const uint4 *>(x + n * X_BYTES + group * 512 + lane * 16);
        }
        if constexpr (!F::QUANTIZED) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t a[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    F::operand_a(a[m], F::staged(weights + m * tile_bytes), lane, group * 2 + half);
                }
#pragma unroll
                for (int m = 0; m < MT; m++) {
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        mma_bf16(total[m][n], a[m], half ? b[n].z : b[n].x, half ? b[n].w : b[n].y);
                    }
                }
            }
        } else {
            // Sums of the activations over the group, or over each half of it.
            float sums[NT][2][4] = {};
            if constexpr (F::MIN) {
                uint32_t ones[4];
#pragma unroll
                for (int i = 0; i < 4; i++) ones[i] = ONE_BF16 << 16 | ONE_BF16;
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    mma_bf16(sums[n][0], ones, b[n].x, b[n].y);
                    mma_bf16(sums[n][F::PER_HALF ? 1 : 0], ones, b[n].z, b[n].w);
                }
            }
#pragma unroll
            for (int m = 0; m < MT; m++) {
                Unit unit = F::staged(weights + m * tile_bytes);
                uint32_t a[2][4];
                F::operand_a(a[0], unit, lane, group * 2);
                F::operand_a(a[1], unit, lane, group * 2 + 1);
                ScalePair first = F::scales(unit, lane / 4, group, 0);
                ScalePair second = F::PER_HALF ? F::scales(unit, lane / 4, group, 1) : first;
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    float part[4] = {};
                    mma_bf16(part, a[0], b[n].x, b[n].y);
                    if constexpr (F::PER_HALF) {
                        add_scaled<F>(total[m][n], part, first, sums[n][0]);
#pragma unroll
                        for (int i = 0; i < 4; i++) part[i] = 0.0f;
                    }
                    mma_bf16(part, a[1], b[n].z, b[n].w);
                    add_scaled<F>(total[m][n], part, second, sums[n][F::PER_HALF ? 1 : 0]);
                }
            }
        }
    }
}

DEVICE float silu_times(float gate, float up) {
    float exponential = exp2_fast(__fmul_rn(gate, -1.4426950408889634f));
    return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, exponential)), up);
}

// Writes a tile of 16 outputs by 8 rows.
DEVICE void store_tile(const LinearArgs &args, const float (&total)[4], int tile, int first_row, int lane) {
    int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = first_row + 2 * t + i;
        if (row >= args.n_rows) continue;
        if (args.gated) {
            // A tile has 8 rows of the gate, then the same 8 of the other matrix.
            int feature = tile * 8 + g;
            if (feature >= args.n_outputs) continue;
            args.gated[operand_b_index(row, feature, args.gated_k_padded)] =
                float_to_bf16(silu_times(total[i], total[2 + i]));
        } else {
#pragma unroll
            for (int high = 0; high < 2; high++) {
                int output = tile * TILE_ROWS + g + 8 * high;
                if (output >= args.n_outputs) continue;
                float bias = args.bias ? args.bias[output] : 0.0f;
                args.out[(size_t)row * args.out_stride + output] = __fadd_rn(total[2 * high + i], bias);
            }
        }
    }
}

// Up to 8 rows: a warp for each tile of 16 outputs. It reads its tile once, in a row, with STAGES - 1 stages of UNITS units
// under way; no other warp is waited for.
template <class F, int STAGES, int UNITS> DEVICE void few_rows(const LinearArgs &args, uint8_t *shared) {
    constexpr int UNIT_BYTES = F::STAGED_BYTES + X_BYTES, STAGE_BYTES = UNITS * UNIT_BYTES;
    const int lane = threadIdx.x, tile = blockIdx.x, n_units = args.matrix.n_units;
    const int n_stages = (n_units + UNITS - 1) / UNITS;
    auto load_weights = [&](int stage) {
        uint8_t *to = shared + stage % STAGES * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < UNITS; i++, to += UNIT_BYTES) {
            int unit = stage * UNITS + i;
            if (unit >= n_units) break;
            Unit from = F::unit_of(args.matrix, tile, unit);
#pragma unroll
            for (int offset = 0; offset < F::STAGED_BYTES; offset += 512) {
                int at = offset + lane * 16;
                if (at < F::STAGED_BYTES) copy_async(to + at, F::source(from, at), true);
            }
        }
    };
    auto load_x = [&](int stage) {
        uint8_t *to = shared + stage % STAGES * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < UNITS; i++, to += UNIT_BYTES) {
            int unit = stage * UNITS + i;
            if (unit >= n_units) break;
            const uint8_t *x = reinterpret_cast<const uint8_t *>(args.x) + (size_t)unit * X_BYTES;
#pragma unroll
            for (int offset = 0; offset < X_BYTES; offset += 512) {
                // Rows that are not there are zeros, and cost no traffic.
                copy_async(to + F::STAGED_BYTES + offset + lane * 16, x + offset + lane * 16, lane / 4 < args.n_rows);
            }
        }
    };
    float total[1][1][4] = {};
    // Weights do not depend on the kernels before: they are under way while those end.
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) load_weights(stage);
    grid_wait();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        load_x(stage);
        copy_commit();
    }
    for (int stage = 0; stage < n_stages; stage++) {
        copy_wait<STAGES - 2>();
        sync_warp();
        load_weights(stage + STAGES - 1);
        load_x(stage + STAGES - 1);
        copy_commit();
        const uint8_t *staged = shared + stage % STAGES * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < UNITS; i++, staged += UNIT_BYTES) {
            if (stage * UNITS + i >= n_units) break;
            multiply_unit<F, 1, 1>(total, staged, 0, staged + F::STAGED_BYTES, lane);
        }
    }
    store_tile(args, total[0][0], tile, 0, lane);
}

// More rows: a block for BLOCK_M tiles of outputs by BLOCK_N tiles of rows, a warp of it for MT by NT of them. Weights and
// activations pass through STAGES stages of one unit in shared memory.
template <class F, int MT, int NT, int WARPS_M, int WARPS_N, int STAGES>
DEVICE void many_rows(const LinearArgs &args, uint8_t *shared) {
    constexpr int BLOCK_M = MT * WARPS_M, BLOCK_N = NT * WARPS_N, THREADS = 32 * WARPS_M * WARPS_N;
    constexpr int TILE_CHUNKS = F::STAGED_BYTES / 16, X_CHUNKS = X_BYTES / 16;
    constexpr int WEIGHT_BYTES = BLOCK_M * F::STAGED_BYTES, STAGE_BYTES = WEIGHT_BYTES + BLOCK_N * X_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
    const int first_n = blockIdx.x * BLOCK_N, first_m = blockIdx.y * BLOCK_M, n_units = args.matrix.n_units;
    auto load_weights = [&](int unit) {
        if (unit >= n_units) return;
        uint8_t *to = shared + unit % STAGES * STAGE_BYTES;
#pragma unroll
        for (int first = 0; first < BLOCK_M * TILE_CHUNKS; first += THREADS) {
            int chunk = first + threadIdx.x;
            if (BLOCK_M * TILE_CHUNKS % THREADS != 0 && chunk >= BLOCK_M * TILE_CHUNKS) break;
            int tile = first_m + chunk / TILE_CHUNKS, offset = chunk % TILE_CHUNKS * 16;
            // Tiles beyond the last are not stored: any will do.
            tile = tile < args.matrix.n_tiles ? tile : args.matrix.n_tiles - 1;
            copy_async(to + chunk * 16, F::source(F::unit_of(args.matrix, tile, unit), offset), true);
        }
    };
    auto load_x = [&](int unit) {
        if (unit >= n_units) return;
        uint8_t *to = shared + unit % STAGES * STAGE_BYTES + WEIGHT_BYTES;
#pragma unroll
        for (int first = 0; first < BLOCK_N * X_CHUNKS; first += THREADS) {
            int chunk = first + threadIdx.x;
            if (BLOCK_N * X_CHUNKS % THREADS != 0 && chunk >= BLOCK_N * X_CHUNKS) break;
            int tile = first_n + chunk / X_CHUNKS;
            const uint8_t *x = reinterpret_cast<const uint8_t *>(args.x) + tile * args.x_tile_bytes + unit * X_BYTES;
            copy_async(to + chunk * 16, x + chunk % X_CHUNKS * 16, tile * 8 < args.n_rows);
        }
    };
    float total[MT][NT][4] = {};
#pragma unroll
    for (int unit = 0; unit < STAGES - 1; unit++) load_weights(unit);
    grid_wait();
#pragma unroll
    for (int unit = 0; unit < STAGES - 1; unit++) {
        load_x(unit);
        copy_commit();
    }
    for (int unit = 0; unit < n_units; unit++) {
        copy_wait<STAGES - 2>();
        // Also: everybody is done with the stage that is filled next.
        sync_block();
        load_weights(unit + STAGES - 1);
        load_x(unit + STAGES - 1);
        copy_commit();
        const uint8_t *staged = shared + unit % STAGES * STAGE_BYTES;
        multiply_unit<F, MT, NT>(total, staged + warp_m * MT * F::STAGED_BYTES, F::STAGED_BYTES,
                                 staged + WEIGHT_BYTES + warp_n * NT * X_BYTES, lane);
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
        int tile = first_m + warp_m * MT + m;
        if (tile >= args.matrix.n_tiles) break;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            store_tile(args, total[m][n], tile, (first_n + warp_n * NT + n) * 8, lane);
        }
    }
}

}  // namespace linear

// For gates and ups that are held differently and so are two matrices.
struct SiluArgs {
    const float *gate;  // [n_rows][n_features]
    const float *up;    // [n_rows][n_features]
    uint16_t *gated;    // operand B, [n_rows][gated_k_padded]
    int32_t n_rows;
    int32_t n_features;
    int32_t gated_k_padded;
    int32_t unused;
};

KERNEL(silu_times_up, SiluArgs, 256, 4) {
    int row = blockIdx.x;
    for (int k = threadIdx.x; k < args.n_features; k += blockDim.x) {
        size_t at = (size_t)row * args.n_features + k;
        args.gated[operand_b_index(row, k, args.gated_k_padded)] =
            float_to_bf16(linear::silu_times(args.gate[at], args.up[at]));
    }
}

// Shapes of the kernels; src/kernels/linear.rs computes grids and shared memory from the same numbers.
#define LINEAR_KERNELS(name, F, UNITS, MT, NT, WARPS_M, WARPS_N)                                        \
    KERNEL_AHEAD(linear_few_##name, LinearArgs, 32, 4) {                                                      \
        SHARED(uint8_t, shared);                                                                        \
        grid_release();                                                                                 \
        linear::few_rows<F, 8, UNITS>(args, shared);                                                    \
    }                                                                                                   \
    KERNEL_AHEAD(linear_some_##name, LinearArgs, 128, 2) {                                                    \
        SHARED(uint8_t, shared);                                                                        \
        grid_release();                                                                                 \
        linear::many_rows<F, 1, 4, 4, 1, 8>(args, shared);                                              \
    }                                                                                                   \
    KERNEL_AHEAD(linear_many_##name, LinearArgs, 32 * WARPS_M * WARPS_N, 1) {                                 \
        SHARED(uint8_t, shared);                                                                        \
        grid_release();                                                                                 \
        linear::many_rows<F, MT, NT, WARPS_M, WARPS_N, 4>(args, shared);                                \
    }

LINEAR_KERNELS(bf16, Bf16, 1, 4, 8, 2, 4)
LINEAR_KERNELS(q4_0, Q4_0, 2, 2, 8, 4, 2)
LINEAR_KERNELS(q4_1, Q4_1, 2, 2, 8, 4, 2)
LINEAR_KERNELS(q5_0, Q5_0, 2, 2, 8, 4, 2)
LINEAR_KERNELS(q5_1, Q5_1, 2, 2, 8, 4, 2)
LINEAR_KERNELS(q8_0, Q8_0, 1, 2, 8, 4, 2)
LINEAR_KERNELS(q2_k, Q2_K, 2, 2, 4, 4, 2)
LINEAR_KERNELS(q3_k, Q3_K, 2, 2, 8, 4, 2)
LINEAR_KERNELS(q4_k, Q4_K, 2, 2, 8, 4, 2)
LINEAR_KERNELS(q5_k, Q5_K, 2, 2, 8, 4, 2)
LINEAR_KERNELS(q6_k, Q6_K, 2, 2, 8, 4, 2)
