// Products of packed weights with rows of activations, for three sizes of batch. All of them give an output element by
// the same sequence of operations, in the order of K and 16 columns at a time. So a row's result does not depend on who else
// is in the batch, and each kernel is free in its tiling.
//
//   bf16       total = mma(a, b, total)
//   quantized  part = mma(codes, b, 0) over a group; sum = fma(scale, part, sum); sum = fma(min, sum of b, sum);
//              total = total + sum after each chunk of 256 columns, which begins with a sum of zero
//
// Unpacking codes takes more than one warp a tile: chunks can be dealt out. One accumulator less lets a warp of the large
// kernel for bf16 have 64 x 64 outputs, which saves a quarter of the traffic from the L2 cache.
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

// Units of a chunk.
constexpr int CHUNK = 4;

// Adds a group's part to the sums: rows g (0, 1) and g + 8 (2, 3); `of_x` are the sums of the two columns' activations.
template <class F>
DEVICE void add_scaled(float (&sum)[4], const float (&part)[4], const ScalePair &pair, const float (&of_x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum[i] = fmaf(pair.scale[i / 2], part[i], sum[i]);
        if constexpr (F::MIN) sum[i] = fmaf(pair.min[i / 2], of_x[i % 2], sum[i]);
    }
}

// Adds half a unit, a group of 32 columns: MT tiles of 16 outputs, `tile_bytes` apart, by NT tiles of 8 rows `b`.
template <class F, int MT, int NT>
DEVICE void multiply_group(float (&sum)[MT][NT][4], const uint8_t *weights, int tile_bytes, const uint4 (&b)[NT], int group,
                           int lane) {
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
                    mma_bf16(sum[m][n], a[m], half ? b[n].z : b[n].x, half ? b[n].w : b[n].y);
                }
            }
        }
    } else {
        // Sums of the activations over the group, or over each half of it.
        float of_x[NT][2][4] = {};
        if constexpr (F::MIN) {
            uint32_t ones[4];
#pragma unroll
            for (int i = 0; i < 4; i++) ones[i] = ONE_BF16 << 16 | ONE_BF16;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                mma_bf16(of_x[n][0], ones, b[n].x, b[n].y);
                mma_bf16(of_x[n][F::PER_HALF ? 1 : 0], ones, b[n].z, b[n].w);
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
                    add_scaled<F>(sum[m][n], part, first, of_x[n][0]);
#pragma unroll
                    for (int i = 0; i < 4; i++) part[i] = 0.0f;
                }
                mma_bf16(part, a[1], b[n].z, b[n].w);
                add_scaled<F>(sum[m][n], part, second, of_x[n][F::PER_HALF ? 1 : 0]);
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

// Up to 8 rows as operand B of group `group` of unit `unit`. Rows that are not there are zeros, and cost no traffic.
DEVICE uint4 x_of(const LinearArgs &args, int unit, int group, int lane) {
    if (lane / 4 >= args.n_rows || unit >= args.matrix.n_units) return make_uint4(0, 0, 0, 0);
    const uint8_t *x = reinterpret_cast<const uint8_t *>(args.x);
    return *reinterpret_cast<const uint4 *>(x + (size_t)unit * X_BYTES + group * 512 + lane * 16);
}

// Up to 8 rows, plain numbers: a warp for each tile of 16 outputs. It is one chain of products, whose latency hides the
// copies that are issued between them: RING units of weights and activations are under way. Nothing is loaded to registers
// but from shared memory: a product must not wait for a load that went out with its operands.
template <int RING> DEVICE void few_rows_plain(const LinearArgs &args, uint8_t *shared) {
    constexpr int UNIT_BYTES = Bf16::CODE_BYTES + X_BYTES;
    const int lane = threadIdx.x, n_units = args.matrix.n_units;
    const uint8_t *const weights = args.matrix.tiles + blockIdx.x * args.matrix.tile_bytes + lane * 16;
    const uint8_t *const x = reinterpret_cast<const uint8_t *>(args.x) + lane * 16;
    const bool is_row = lane / 4 < args.n_rows;
    auto place = [&](int unit) { return shared + unit % RING * UNIT_BYTES + lane * 16; };
    auto copy_weights = [&](int unit, int s) {
        const uint8_t *from = weights + (size_t)unit * Bf16::CODE_BYTES + s * 512;
        if (unit < n_units) copy_async(place(unit) + s * 512, from, true);
    };
    // Rows that are not there are zeros, and cost no traffic.
    auto copy_x = [&](int unit, int group) {
        const uint8_t *from = x + (size_t)unit * X_BYTES + group * 512;
        if (unit < n_units) copy_async(place(unit) + Bf16::CODE_BYTES + group * 512, from, is_row);
    };
    // Weights do not depend on the kernels before: they are under way while those end.
#pragma unroll
    for (int unit = 0; unit < RING - 1; unit++) {
#pragma unroll
        for (int s = 0; s < 4; s++) copy_weights(unit, s);
    }
    grid_wait();
#pragma unroll
    for (int unit = 0; unit < RING - 1; unit++) {
        copy_x(unit, 0), copy_x(unit, 1);
        copy_commit();
    }
    float total[4] = {};
#pragma unroll 4
    for (int unit = 0; unit < n_units; unit++) {
        copy_wait<RING - 2>();
        sync_warp();
        const uint8_t *staged = shared + unit % RING * UNIT_BYTES;
        const uint4 *b = reinterpret_cast<const uint4 *>(staged + Bf16::CODE_BYTES) + lane;
        const uint4 low = b[0], high = b[32];
        uint32_t a[4][4];
#pragma unroll
        for (int s = 0; s < 4; s++) Bf16::operand_a(a[s], Bf16::staged(staged), lane, s);
        const int next = unit + RING - 1;
        mma_bf16(total, a[0], low.x, low.y);
        copy_weights(next, 0), copy_weights(next, 1);
        mma_bf16(total, a[1], low.z, low.w);
        copy_weights(next, 2), copy_weights(next, 3);
        mma_bf16(total, a[2], high.x, high.y);
        copy_x(next, 0), copy_x(next, 1);
        mma_bf16(total, a[3], high.z, high.w);
        copy_commit();
    }
    store_tile(args, total, blockIdx.x, 0, lane);
}

// Up to 8 rows, quantized: a block for each tile of 16 outputs. Its warps take chunks in turn, each with STAGES - 1 stages of
// UNITS units of weights under way; at the end the sums of all chunks are added in order.
// Shared: the stages of each warp; then the chunks' sums, [n_chunks][32 lanes][4].
template <class F, int WARPS, int STAGES, int UNITS> DEVICE void few_rows(const LinearArgs &args, uint8_t *shared) {
    constexpr int STAGE_BYTES = UNITS * F::STAGED_BYTES, STAGES_OF_CHUNK = CHUNK / UNITS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_units = args.matrix.n_units;
    const int n_chunks = (n_units + CHUNK - 1) / CHUNK;
    const int n_stages = (n_chunks - warp + WARPS - 1) / WARPS * STAGES_OF_CHUNK;
    uint8_t *const ring = shared + warp * STAGES * STAGE_BYTES;
    float4 *const sums = reinterpret_cast<float4 *>(shared + WARPS * STAGES * STAGE_BYTES);
    auto first_unit = [&](int stage) {
        return (stage / STAGES_OF_CHUNK * WARPS + warp) * CHUNK + stage % STAGES_OF_CHUNK * UNITS;
    };
    auto load = [&](int stage) {
        if (stage >= n_stages) return;
        uint8_t *to = ring + stage % STAGES * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < UNITS; i++, to += F::STAGED_BYTES) {
            int unit = first_unit(stage) + i;
            if (unit >= n_units) break;
            Unit from = F::unit_of(args.matrix, blockIdx.x, unit);
#pragma unroll
            for (int offset = 0; offset < F::STAGED_BYTES; offset += 512) {
                int at = offset + lane * 16;
                if (at < F::STAGED_BYTES) copy_async(to + at, F::source(from, at), true);
            }
        }
    };
    auto load_x = [&](uint4 (&b)[UNITS][2], int stage) {
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
#pragma unroll
            for (int group = 0; group < 2; group++) b[i][group] = x_of(args, first_unit(stage) + i, group, lane);
        }
    };
    // Weights do not depend on the kernels before: they are under way while those end.
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        load(stage);
        copy_commit();
    }
    grid_wait();
    float sum[1][1][4] = {};
    float(&of_chunk)[4] = sum[0][0];
    uint4 b[UNITS][2], next[UNITS][2];
    load_x(b, 0);
    for (int stage = 0; stage < n_stages; stage++) {
        load_x(next, stage + 1);
        copy_wait<STAGES - 2>();
        sync_warp();
        load(stage + STAGES - 1);
        copy_commit();
        const uint8_t *staged = ring + stage % STAGES * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < UNITS; i++, staged += F::STAGED_BYTES) {
            if (first_unit(stage) + i >= n_units) break;
#pragma unroll
            for (int group = 0; group < 2; group++) {
                const uint4(&one)[1] = {b[i][group]};
                multiply_group<F, 1, 1>(sum, staged, 0, one, group, lane);
            }
        }
#pragma unroll
        for (int i = 0; i < UNITS; i++) b[i][0] = next[i][0], b[i][1] = next[i][1];
        if (stage % STAGES_OF_CHUNK == STAGES_OF_CHUNK - 1) {
            int chunk = stage / STAGES_OF_CHUNK * WARPS + warp;
            sums[chunk * 32 + lane] = make_float4(of_chunk[0], of_chunk[1], of_chunk[2], of_chunk[3]);
#pragma unroll
            for (int i = 0; i < 4; i++) of_chunk[i] = 0.0f;
        }
    }
    sync_block();
    if (warp > 0) return;
    float total[4] = {};
#pragma unroll 8
    for (int chunk = 0; chunk < n_chunks; chunk++) {
        float4 next_sum = sums[chunk * 32 + lane];
        total[0] = __fadd_rn(total[0], next_sum.x), total[1] = __fadd_rn(total[1], next_sum.y);
        total[2] = __fadd_rn(total[2], next_sum.z), total[3] = __fadd_rn(total[3], next_sum.w);
    }
    store_tile(args, total, blockIdx.x, 0, lane);
}

// Adds a chunk's sums and begins the next.
template <int MT, int NT> DEVICE void end_chunk(float (&total)[MT][NT][4], float (&sum)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                total[m][n][i] = __fadd_rn(total[m][n][i], sum[m][n][i]);
                sum[m][n][i] = 0.0f;
            }
        }
    }
}

// Gated results of a block: through shared memory into the order of operand B, so that whole sectors are written. All
// threads of the block call it, when nobody reads the stages any more.
template <int MT, int NT, int WARPS_M, int WARPS_N, class Result>
DEVICE void store_gated(const LinearArgs &args, const Result &result, int first_m, int first_n, uint16_t *staged) {
    constexpr int BLOCK_M = MT * WARPS_M, BLOCK_N = NT * WARPS_N, THREADS = 32 * WARPS_M * WARPS_N;
    constexpr int K_TILES = BLOCK_M * 8 / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        int tile = warp_m * MT + m, feature = tile * 8 + g;
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int row = (warp_n * NT + n) * 8 + 2 * t + i;
                bool is_there = first_m + tile < args.matrix.n_tiles && first_n * 8 + row < args.n_rows;
                float value = is_there ? silu_times(result(m, n)[i], result(m, n)[2 + i]) : 0.0f;
                staged[operand_b_index(row, feature, K_TILES * 32)] = float_to_bf16(value);
            }
        }
    }
    sync_block();
    const uint4 *from = reinterpret_cast<const uint4 *>(staged);
    const int k_tiles = args.gated_k_padded / 32, first_k = first_m * 8 / 32;
    for (int piece = threadIdx.x; piece < BLOCK_N * K_TILES * 32; piece += THREADS) {
        int tile = piece / (K_TILES * 32), k_tile = first_k + piece / 32 % K_TILES;
        if (k_tile >= k_tiles || (first_n + tile) * 8 >= args.n_rows) continue;
        uint4 *to = reinterpret_cast<uint4 *>(args.gated) + ((size_t)(first_n + tile) * k_tiles + k_tile) * 32;
        to[piece % 32] = from[piece];
    }
}

// More rows: a block for BLOCK_M tiles of outputs by BLOCK_N tiles of rows, a warp of it for MT by NT of them. Weights and
// activations pass through STAGES stages of UNITS units in shared memory.
template <class F, int MT, int NT, int WARPS_M, int WARPS_N, int STAGES, int UNITS>
DEVICE void many_rows(const LinearArgs &args, uint8_t *shared) {
    constexpr int BLOCK_M = MT * WARPS_M, BLOCK_N = NT * WARPS_N, THREADS = 32 * WARPS_M * WARPS_N;
    constexpr int WEIGHT_BYTES = BLOCK_M * F::STAGED_BYTES, UNIT_BYTES = WEIGHT_BYTES + BLOCK_N * X_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
    const int first_n = blockIdx.x * BLOCK_N, first_m = blockIdx.y * BLOCK_M, n_units = args.matrix.n_units;
    // Each thread copies the same places of every unit, 16 bytes each.
    constexpr int TILE_PIECES = F::STAGED_BYTES / 16, PIECES = BLOCK_M * TILE_PIECES;
    constexpr int COPIES = (PIECES + THREADS - 1) / THREADS;
    constexpr int X_PIECES = BLOCK_N * X_BYTES / 16, X_COPIES = (X_PIECES + THREADS - 1) / THREADS;
    // Tiles beyond the last are not stored: any will do.
    auto source = [&](int piece, int unit) {
        int tile = min(first_m + piece / TILE_PIECES, args.matrix.n_tiles - 1);
        return F::source(F::unit_of(args.matrix, tile, unit), piece % TILE_PIECES * 16);
    };
    // Plain numbers follow each other in steps; the planes of quantized ones would take too many registers.
    const uint8_t *from[COPIES], *x_from[X_COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; i++) from[i] = F::QUANTIZED ? nullptr : source(i * THREADS + threadIdx.x, 0);
#pragma unroll
    for (int i = 0; i < X_COPIES; i++) {
        int piece = i * THREADS + threadIdx.x, tile = first_n + piece / (X_BYTES / 16);
        x_from[i] = reinterpret_cast<const uint8_t *>(args.x) + tile * args.x_tile_bytes + piece % (X_BYTES / 16) * 16;
    }
    auto load_weights = [&](int unit, uint8_t *to) {
        if (unit >= n_units) return;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            int piece = i * THREADS + threadIdx.x;
            if (PIECES % THREADS != 0 && piece >= PIECES) break;
            const uint8_t *at = F::QUANTIZED ? source(piece, unit) : from[i] + (size_t)unit * F::CODE_BYTES;
            copy_async(to + piece * 16, at, true);
        }
    };
    auto load_x = [&](int unit, uint8_t *to) {
        if (unit >= n_units) return;
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            int piece = i * THREADS + threadIdx.x;
            if (X_PIECES % THREADS != 0 && piece >= X_PIECES) break;
            bool is_there = (first_n + piece / (X_BYTES / 16)) * 8 < args.n_rows;
            copy_async(to + WEIGHT_BYTES + piece * 16, x_from[i] + (size_t)unit * X_BYTES, is_there);
        }
    };
    auto place = [&](int stage, int i) { return shared + (stage % STAGES * UNITS + i) * UNIT_BYTES; };
    float total[MT][NT][4] = {}, sum[MT][NT][4] = {};
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        for (int i = 0; i < UNITS; i++) load_weights(stage * UNITS + i, place(stage, i));
    }
    grid_wait();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        for (int i = 0; i < UNITS; i++) load_x(stage * UNITS + i, place(stage, i));
        copy_commit();
    }
    for (int stage = 0; stage * UNITS < n_units; stage++) {
        copy_wait<STAGES - 2>();
        // Also: everybody is done with the stage that is filled next.
        sync_block();
        const int next = stage + STAGES - 1;
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            int unit = stage * UNITS + i;
            if (UNITS > 1 && unit >= n_units) break;
            const uint8_t *weights = place(stage, i) + warp_m * MT * F::STAGED_BYTES;
            const uint8_t *x = place(stage, i) + WEIGHT_BYTES + warp_n * NT * X_BYTES + lane * 16;
#pragma unroll
            for (int group = 0; group < 2; group++) {
                uint4 b[NT];
#pragma unroll
                for (int n = 0; n < NT; n++) b[n] = *reinterpret_cast<const uint4 *>(x + n * X_BYTES + group * 512);
                multiply_group<F, MT, NT>(sum, weights, F::STAGED_BYTES, b, group, lane);
                // Copies for the next stage go out between products, not in a burst that operands would wait behind.
                if (i > 0) continue;
#pragma unroll
                for (int j = 0; j < UNITS; j++) {
                    if (group == 0) load_weights(next * UNITS + j, place(next, j));
                    if (group == 1) load_x(next * UNITS + j, place(next, j));
                }
            }
            if (F::QUANTIZED && (unit % CHUNK == CHUNK - 1 || unit + 1 == n_units)) end_chunk(total, sum);
        }
        copy_commit();
    }
    auto result = [&](int m, int n) -> const float(&)[4] { return F::QUANTIZED ? total[m][n] : sum[m][n]; };
    if (args.gated) {
        copy_wait<0>();
        sync_block();
        store_gated<MT, NT, WARPS_M, WARPS_N>(args, result, first_m, first_n, reinterpret_cast<uint16_t *>(shared));
        return;
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
        int tile = first_m + warp_m * MT + m;
        if (tile >= args.matrix.n_tiles) break;
#pragma unroll
        for (int n = 0; n < NT; n++) store_tile(args, result(m, n), tile, (first_n + warp_n * NT + n) * 8, lane);
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
#define MORE_ROWS(name, F, NT, STAGES, UNITS)                                    \
    KERNEL_AHEAD(linear_some_##name, LinearArgs, 128, 2) {                       \
        SHARED(uint8_t, shared);                                                 \
        grid_release();                                                          \
        linear::many_rows<F, 1, 4, 4, 1, 8, 1>(args, shared);                    \
    }                                                                            \
    KERNEL_AHEAD(linear_many_##name, LinearArgs, 256, 1) {                       \
        SHARED(uint8_t, shared);                                                 \
        grid_release();                                                          \
        linear::many_rows<F, 4, NT, 2, 4, STAGES, UNITS>(args, shared);          \
    }
#define QUANTIZED_KERNELS(name, F, UNITS)                                        \
    KERNEL_AHEAD(linear_few_##name, LinearArgs, 256, 3) {                        \
        SHARED(uint8_t, shared);                                                 \
        grid_release();                                                          \
        linear::few_rows<F, 8, 4, UNITS>(args, shared);                          \
    }                                                                            \
    MORE_ROWS(name, F, 4, 4, 1)

KERNEL_AHEAD(linear_few_bf16, LinearArgs, 32, 6) {
    SHARED(uint8_t, shared);
    grid_release();
    linear::few_rows_plain<16>(args, shared);
}
MORE_ROWS(bf16, Bf16, 8, 2, 2)
QUANTIZED_KERNELS(q4_0, Q4_0, 2)
QUANTIZED_KERNELS(q4_1, Q4_1, 2)
QUANTIZED_KERNELS(q5_0, Q5_0, 2)
QUANTIZED_KERNELS(q5_1, Q5_1, 2)
QUANTIZED_KERNELS(q8_0, Q8_0, 1)
QUANTIZED_KERNELS(q2_k, Q2_K, 2)
QUANTIZED_KERNELS(q3_k, Q3_K, 2)
QUANTIZED_KERNELS(q4_k, Q4_K, 2)
QUANTIZED_KERNELS(q5_k, Q5_K, 2)
QUANTIZED_KERNELS(q6_k, Q6_K, 2)
