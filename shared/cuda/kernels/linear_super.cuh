// Products with K-quants: what all their kernels have in common.
//
//   P = mma over a superblock's columns of bfloat16(code * small scale) and x
//   Q = mma of the superblock's small minimums and sums of x over the groups, as bfloat16 numbers and what these leave over
//   sum = fma(-m, Q, d * P)
//   total = total + stretch over up to eight stretches, each of which is stretch = stretch + sum over superblocks in order
//
// Sums of superblocks let warps of a block share a row, stretches let blocks share one.
#pragma once
#include "linear.cuh"
#include "superblock.cuh"

namespace linear {

// Bytes of 8 rows of activations in a superblock.
constexpr int SUPER_X_BYTES = SUPER_UNITS * X_BYTES;

// Superblocks of each stretch but the last; there may be fewer than eight.
constexpr int STRETCHES = 8;
DEVICE int stretch_of(int n_supers) { return (n_supers + STRETCHES - 1) / STRETCHES; }

// Where 32 columns of x are that meet group `group` of superblock `super`. Where the matrix has no columns, scales and minimums
// are zeros, and any numbers of x will do.
DEVICE int group_of_x(const Matrix &matrix, int super, int group) {
    return min(max(super * 8 + group - matrix.first_group, 0), 2 * matrix.n_units - 1);
}

// Sums of 8 rows of x over the groups, or half groups, of a superblock, as operand B.
template <bool PER_HALF> struct SumsOfX {
    static constexpr int WORDS = PER_HALF ? 4 : 2;
    // Of the group with the number g, and with 8 more, for rows 2 t and 2 t + 1.
    float sums[WORDS] = {};

    // Takes 32 columns: group `group` of the superblock.
    DEVICE void add(int group, const uint32_t (&b)[4], int lane) {
        const uint32_t ones[4] = {ONE_BF16 << 16 | ONE_BF16, ONE_BF16 << 16 | ONE_BF16, ONE_BF16 << 16 | ONE_BF16,
                                  ONE_BF16 << 16 | ONE_BF16};
        float all[2][4] = {};
        mma_bf16(all[0], ones, b[0], b[1]);
        mma_bf16(all[PER_HALF ? 1 : 0], ones, b[2], b[3]);
#pragma unroll
        for (int half = 0; half < (PER_HALF ? 2 : 1); half++) {
            int row = PER_HALF ? 2 * group + half : group;
            bool is_mine = lane / 4 == row % 8;
#pragma unroll
            for (int i = 0; i < 2; i++) sums[row / 8 * 2 + i] = is_mine ? all[half][i] : sums[row / 8 * 2 + i];
        }
    }
    DEVICE void operand_b(uint32_t (&b)[WORDS]) const {
#pragma unroll
        for (int i = 0; i < WORDS / 2; i++) {
            float x = sums[2 * i], y = sums[2 * i + 1];
            uint32_t high = pack_bf16(x, y);
            float x_left = __fsub_rn(x, bf16_to_float((uint16_t)high));
            float y_left = __fsub_rn(y, bf16_to_float((uint16_t)(high >> 16)));
            b[i] = transpose(high);
            b[WORDS / 2 + i] = transpose(pack_bf16(x_left, y_left));
        }
    }
};

// The products of minimums with sums of x.
template <class F> DEVICE void multiply_minimums(float (&q)[4], const uint32_t (&a)[4], const uint32_t *sums_of_x) {
#pragma unroll
    for (int i = 0; i < F::SUM_WORDS; i += 2) mma_bf16(q, a, sums_of_x[i], sums_of_x[i + 1]);
}

// Rows g (0, 1) and g + 8 (2, 3) of a superblock's part become its sum.
template <class F> DEVICE void finish_part(float (&part)[4], const float (&q)[4], const float (&scale)[2], const float (&minimum)[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        part[i] = __fmul_rn(scale[i / 2], part[i]);
        if constexpr (F::MIN) part[i] = fmaf(minimum[i / 2], q[i], part[i]);
    }
}

}  // namespace linear
