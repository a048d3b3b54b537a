// Products of K-quants with more rows by mma.sync: `some` for up to 64 rows, `many` beyond.
#include "linear_super.cuh"

// Sums of x over groups as the operand B that minimums are multiplied with.
struct SumXArgs {
    Matrix matrix;
    const uint16_t *x;
    uint8_t *sums;         // [n_rows / 8][n_supers][2 or 4 core matrices]
    int64_t x_tile_bytes;
    int32_t n_rows;
    int32_t per_half;      // whether sums are over half groups
};

namespace linear {

// A warp a superblock and 8 rows.
template <bool PER_HALF> DEVICE void sum_x(const SumXArgs &args) {
    const int lane = threadIdx.x % 32, item = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int row_tile = item / args.matrix.n_supers, super = item % args.matrix.n_supers;
    if (row_tile * 8 >= args.n_rows) return;
    const uint8_t *x = reinterpret_cast<const uint8_t *>(args.x) + row_tile * args.x_tile_bytes;
    SumsOfX<PER_HALF> sums;
#pragma unroll
    for (int group = 0; group < 8; group++) {
        int at = group_of_x(args.matrix, super, group) * 4 * CORE_BYTES + lane * 4;
        uint32_t b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) b[i] = word_at(x, at + i * CORE_BYTES);
        sums.add(group, b, lane);
    }
    uint32_t b[SumsOfX<PER_HALF>::WORDS];
    sums.operand_b(b);
    uint8_t *to = args.sums + (int64_t)item * SumsOfX<PER_HALF>::WORDS * CORE_BYTES;
#pragma unroll
    for (int i = 0; i < SumsOfX<PER_HALF>::WORDS; i++) *reinterpret_cast<uint32_t *>(to + i * CORE_BYTES + lane * 4) = b[i];
}

// A block for BLOCK_M tiles of outputs by BLOCK_N tiles of rows, a warp of it for MT by NT of them. Shared: two superblocks of
// weights with their sums of x, and a ring of units of x.
template <class F, int MT, int NT, int WARPS_M, int WARPS_N> struct ManySuper {
    static constexpr int BLOCK_M = MT * WARPS_M, BLOCK_N = NT * WARPS_N, THREADS = 32 * WARPS_M * WARPS_N, X_RING = 4;
    static constexpr int SUM_BYTES = F::SUM_WORDS * CORE_BYTES, WEIGHT_BYTES = BLOCK_M * F::RECORD_BYTES;
    static constexpr int SUPER_BYTES = WEIGHT_BYTES + BLOCK_N * SUM_BYTES, UNIT_BYTES = BLOCK_N * X_BYTES;

    const LinearArgs &args;
    uint8_t *const shared;
    const int warp_m, warp_n, lane, first_m, first_n, n_supers;

    DEVICE ManySuper(const LinearArgs &args, uint8_t *shared)
        : args(args), shared(shared), warp_m(threadIdx.x / 32 % WARPS_M), warp_n(threadIdx.x / 32 / WARPS_M),
          lane(threadIdx.x % 32), first_m(blockIdx.y * BLOCK_M), first_n(blockIdx.x * BLOCK_N), n_supers(args.matrix.n_supers) {}

    DEVICE uint8_t *super_at(int super) const { return shared + super % 2 * SUPER_BYTES; }
    DEVICE uint8_t *unit_at(int unit) const { return shared + 2 * SUPER_BYTES + unit % X_RING * UNIT_BYTES; }

    DEVICE void copy_weights(int super) const {
        constexpr int PIECES = F::RECORD_BYTES / 16;
        if (super >= n_supers) return;
        for (int piece = threadIdx.x; piece < BLOCK_M * PIECES; piece += THREADS) {
            // Tiles beyond the last are not stored: any will do.
            int tile = min(first_m + piece / PIECES, args.matrix.n_tiles - 1);
            const uint8_t *from = args.matrix.tiles + tile * args.matrix.tile_bytes + super * F::RECORD_BYTES;
            copy_async(super_at(super) + piece * 16, from + piece % PIECES * 16, true);
        }
    }
    DEVICE bool has_rows(int row_tile) const { return (first_n + row_tile) * 8 < args.n_rows; }
    DEVICE void copy_sums(int super) const {
        if constexpr (F::MIN) {
            constexpr int PIECES = SUM_BYTES / 16;
            if (super >= n_supers) return;
            for (int piece = threadIdx.x; piece < BLOCK_N * PIECES; piece += THREADS) {
                int row_tile = piece / PIECES;
                const uint8_t *from = args.workspace.sums_of_x + ((int64_t)(first_n + row_tile) * n_supers + super) * SUM_BYTES;
                uint8_t *to = super_at(super) + WEIGHT_BYTES + piece * 16;
                copy_async(to, from + piece % PIECES * 16, has_rows(row_tile));
            }
        }
    }
    DEVICE void copy_x(int unit) const {
        constexpr int PIECES = X_BYTES / 16;
        if (unit >= n_supers * SUPER_UNITS) return;
        for (int piece = threadIdx.x; piece < BLOCK_N * PIECES; piece += THREADS) {
            int row_tile = piece / PIECES, in_unit = piece % PIECES, group = unit % SUPER_UNITS * 2 + in_unit / 32;
            const uint8_t *from = reinterpret_cast<const uint8_t *>(args.x) + (first_n + row_tile) * args.x_tile_bytes;
            from += group_of_x(args.matrix, unit / SUPER_UNITS, group) * 4 * CORE_BYTES + in_unit % 32 * 16;
            copy_async(unit_at(unit) + piece * 16, from, has_rows(row_tile));
        }
    }

    DEVICE const uint8_t *record(int super, int m) const {
        return super_at(super) + (warp_m * MT + m) * F::RECORD_BYTES;
    }

    DEVICE void multiply_unit(float (&part)[MT][NT][4], const typename F::Scales (&scales)[MT], int super, int unit) const {
        typename F::Codes codes[MT];
        typename F::Factors factors[MT];
#pragma unroll
        for (int m = 0; m < MT; m++) codes[m].load(record(super, m), unit, lane, Read());
        const uint8_t *x = unit_at(super * SUPER_UNITS + unit) + warp_n * NT * X_BYTES;
#pragma unroll
        for (int s = 0; s < 4; s++) {
            uint32_t a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                if (s % F::STEPS_OF_FACTORS == 0) factors[m] = F::factors(scales[m], unit, s);
                F::operand_a(a[m], codes[m], factors[m], s);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const uint8_t *b = x + n * X_BYTES + s * 2 * CORE_BYTES;
                uint32_t b0 = word_at(b, lane * 4), b1 = word_at(b, CORE_BYTES + lane * 4);
#pragma unroll
                for (int m = 0; m < MT; m++) mma_bf16(part[m][n], a[m], b0, b1);
            }
        }
    }

    DEVICE void end_super(float (&total)[MT][NT][4], float (&part)[MT][NT][4], const typename F::Scales (&scales)[MT],
                          int super) const {
#pragma unroll
        for (int m = 0; m < MT; m++) {
            float scale[2] = {scales[m].scale(0), scales[m].scale(1)}, minimum[2] = {};
            uint32_t a[4] = {};
            if constexpr (F::MIN) {
                F::minimums_a(a, scales[m]);
                minimum[0] = scales[m].minimum(0), minimum[1] = scales[m].minimum(1);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float q[4] = {};
                if constexpr (F::MIN) {
                    const uint8_t *at = super_at(super) + WEIGHT_BYTES + (warp_n * NT + n) * SUM_BYTES + lane * 4;
                    uint32_t sums[F::SUM_WORDS];
#pragma unroll
                    for (int i = 0; i < F::SUM_WORDS; i++) sums[i] = word_at(at, i * CORE_BYTES);
                    multiply_minimums<F>(q, a, sums);
                }
                finish_part<F>(part[m][n], q, scale, minimum);
#pragma unroll
                for (int i = 0; i < 4; i++) total[m][n][i] = __fadd_rn(total[m][n][i], part[m][n][i]), part[m][n][i] = 0.0f;
            }
        }
    }

    DEVICE void end_stretch(float (&grand)[MT][NT][4], float (&total)[MT][NT][4], bool is_first) const {
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++) {
            float &to = grand[i / (NT * 4)][i / 4 % NT][i % 4], &of_stretch = total[i / (NT * 4)][i / 4 % NT][i % 4];
            to = is_first ? of_stretch : __fadd_rn(to, of_stretch);
            of_stretch = 0.0f;
        }
    }

    DEVICE void run() const {
        copy_weights(0);
        grid_wait();
        copy_sums(0);
#pragma unroll
        for (int unit = 0; unit < X_RING - 1; unit++) {
            copy_x(unit);
            copy_commit();
        }
        const int stretch = stretch_of(n_supers);
        float grand[MT][NT][4] = {}, total[MT][NT][4] = {}, part[MT][NT][4] = {};
        for (int super = 0; super < n_supers; super++) {
            typename F::Scales scales[MT];
#pragma unroll
            for (int unit = 0; unit < SUPER_UNITS; unit++) {
                copy_wait<X_RING - 2>();
                // Also: everybody is done with what is filled next.
                sync_block();
                if (unit == 0) {
#pragma unroll
                    for (int m = 0; m < MT; m++) scales[m].load(record(super, m), lane, Read());
                    copy_weights(super + 1);
                    copy_sums(super + 1);
                }
                copy_x(super * SUPER_UNITS + unit + X_RING - 1);
                copy_commit();
                multiply_unit(part, scales, super, unit);
            }
            end_super(total, part, scales, super);
            if ((super + 1) % stretch == 0 || super + 1 == n_supers) end_stretch(grand, total, super < stretch);
        }
#pragma unroll
        for (int m = 0; m < MT; m++) {
            int tile = first_m + warp_m * MT + m;
            if (tile >= args.matrix.n_tiles) break;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                int n_tile = first_n + warp_n * NT + n;
                if (n_tile * 8 >= args.n_rows) break;
                args.gated ? store_gated_tile(args, grand[m][n], tile, n_tile, lane)
                           : store_tile(args, grand[m][n], tile, n_tile * 8, lane);
            }
        }
    }
};

}  // namespace linear

KERNEL(sum_x, SumXArgs, 128, 4) { args.per_half ? linear::sum_x<true>(args) : linear::sum_x<false>(args); }

// Shapes of the kernels; src/kernels/linear_super.rs computes grids and shared memory from the same numbers.
#define MORE_ROWS_SUPER(name, F)                                 \
    KERNEL_AHEAD(linear_some_##name, LinearArgs, 128, 2) {       \
        SHARED(uint8_t, shared);                                 \
        grid_release();                                          \
        linear::ManySuper<F, 1, 4, 4, 1>(args, shared).run();    \
    }                                                            \
    KERNEL_AHEAD(linear_many_##name, LinearArgs, 256, 1) {       \
        SHARED(uint8_t, shared);                                 \
        grid_release();                                          \
        linear::ManySuper<F, 2, 4, 4, 2>(args, shared).run();    \
    }

MORE_ROWS_SUPER(q2_k, Q2_K)
MORE_ROWS_SUPER(q3_k, Q3_K)
MORE_ROWS_SUPER(q4_k, Q4_K)
MORE_ROWS_SUPER(q5_k, Q5_K)
MORE_ROWS_SUPER(q6_k, Q6_K)
