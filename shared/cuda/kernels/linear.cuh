// Products of packed weights with rows of activations, by kernels for several sizes of batch. All of them give an output
// element by the same sequence of operations, in the order of K and 16 columns at a time. So a row's result does not depend
// on who else is in the batch, and each kernel is free in its tiling.
//
//   bf16     total = mma(a, b, total)
//   Q4_0 ... part = mma(codes, b, 0) over a group; sum = fma(scale, part, sum); sum = fma(min, sum of b, sum);
//            total = total + sum after each chunk of 256 columns, which begins with a sum of zero
//   K-quants see linear_super.cuh
//
// Unpacking codes takes more than one warp a tile: chunks can be dealt out. One accumulator less lets a warp of the large
// kernel for bf16 have 64 x 64 outputs, which saves a quarter of the traffic from the L2 cache.
#pragma once
#include "matrix.cuh"

// Memory that kernels use on their way; each finds it as it must be, and leaves it so.
struct Workspace {
    uint8_t *sums_of_x;  // of `sum_x`, for matrices with superblocks with minimums and more than few rows
    float *stretches;    // sums of blocks that several thread blocks work on
    uint32_t *arrivals;  // for each of these blocks 0
};

struct LinearArgs {
    Matrix matrix;
    const uint16_t *x;   // rows as operand B, padded to what the kernel reads; its first column meets the matrix's first
    const float *bias;   // [n_outputs], or null
    float *out;          // [n_rows][out_stride]; null for gated products
    uint16_t *gated;     // silu(gate) * up as operand B, [n_rows][gated_k_padded]; null for plain ones
    Workspace workspace;
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
DEVICE void multiply_group(float (&sum)[MT][NT][4], const uint8_t *weights, int tile_bytes, const uint32_t (&b)[NT][4], int group,
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
                    mma_bf16(sum[m][n], a[m], b[n][2 * half], b[n][2 * half + 1]);
                }
            }
        }
    } else {
        // Sums of the activations over the group.
        float of_x[NT][4] = {};
        if constexpr (F::MIN) {
            uint32_t ones[4];
#pragma unroll
            for (int i = 0; i < 4; i++) ones[i] = ONE_BF16 << 16 | ONE_BF16;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                mma_bf16(of_x[n], ones, b[n][0], b[n][1]);
                mma_bf16(of_x[n], ones, b[n][2], b[n][3]);
            }
        }
#pragma unroll
        for (int m = 0; m < MT; m++) {
            Unit unit = F::staged(weights + m * tile_bytes);
            uint32_t a[2][4];
            F::operand_a(a[0], unit, lane, group * 2);
            F::operand_a(a[1], unit, lane, group * 2 + 1);
            ScalePair pair = F::scales(unit, lane / 4, group);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float part[4] = {};
                mma_bf16(part, a[0], b[n][0], b[n][1]);
                mma_bf16(part, a[1], b[n][2], b[n][3]);
                add_scaled<F>(sum[m][n], part, pair, of_x[n]);
            }
        }
    }
}

DEVICE float silu_times(float gate, float up) {
    float exponential = exp2_fast(__fmul_rn(gate, -1.4426950408889634f));
    return __fmul_rn(__fmul_rn(gate, reciprocal_fast(__fadd_rn(1.0f, exponential))), up);
}

// Of the lane's outputs in a tile; they may be read long before the tile is written.
struct TileBias {
    float of[2] = {0.0f, 0.0f};

    DEVICE TileBias(const LinearArgs &args, int tile, int lane) {
        if (!args.bias) return;
        for (int high = 0; high < 2; high++) {
            int output = tile * TILE_ROWS + lane / 4 + 8 * high;
            if (output < args.n_outputs) of[high] = args.bias[output];
        }
    }
};

// Writes a tile of 16 outputs by 8 rows.
DEVICE void store_tile(const LinearArgs &args, const float (&total)[4], const TileBias &bias, int tile, int first_row, int lane) {
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
                args.out[(size_t)row * args.out_stride + output] = __fadd_rn(total[2 * high + i], bias.of[high]);
            }
        }
    }
}
DEVICE void store_tile(const LinearArgs &args, const float (&total)[4], int tile, int first_row, int lane) {
    store_tile(args, total, TileBias(args, tile, lane), tile, first_row, lane);
}

// A tile of gated results, 8 features by 8 rows, as a whole core matrix of the next operand.
DEVICE void store_gated_tile(const LinearArgs &args, const float (&total)[4], int tile, int n_tile, int lane) {
    int row = n_tile * 8 + lane % 4 * 2;
    bool is_feature = tile * 8 + lane / 4 < args.n_outputs;
    float first = is_feature && row < args.n_rows ? silu_times(total[0], total[2]) : 0.0f;
    float second = is_feature && row + 1 < args.n_rows ? silu_times(total[1], total[3]) : 0.0f;
    uint32_t pair = transpose(pack_bf16(first, second));
    if (tile * 8 >= args.gated_k_padded) return;
    uint8_t *core = reinterpret_cast<uint8_t *>(args.gated) + ((size_t)n_tile * (args.gated_k_padded / 8) + tile) * CORE_BYTES;
    *reinterpret_cast<uint32_t *>(core + lane * 4) = pair;
}

}  // namespace linear
