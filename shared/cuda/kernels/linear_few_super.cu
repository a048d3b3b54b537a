// Products of K-quants with up to 8 rows: what decoding a few sequences waits for.
#include "linear_super.cuh"

namespace linear {

// A block for TILES tiles of 16 outputs. Its warps take superblocks in turn. Each has the weights of one in registers, where those
// of its next one replace them as they are multiplied, and the activations of the next one under way to shared memory.
// Shared: two superblocks of x for each warp; then all sums of superblocks, [n_supers][TILES][8 g][(n_rows + 1) / 2] float4.
template <class F, int TILES, int WARPS> struct FewSuper {
    // A superblock of a tile.
    struct Held {
        typename F::Codes codes[SUPER_UNITS];
        typename F::Scales scales;
    };

    const LinearArgs &args;
    const int warp, lane, n_supers, n_rows;
    // Of each tile the record that is loaded next.
    const uint8_t *next[TILES];
    uint8_t *ring;
    float4 *sums;
    // Where a lane has columns of x that are there, the place of its sums; else -1.
    int kept_at, n_kept;

    DEVICE FewSuper(const LinearArgs &args, uint8_t *shared)
        : args(args), warp(threadIdx.x / 32), lane(threadIdx.x % 32), n_supers(args.matrix.n_supers), n_rows(args.n_rows),
          ring(shared + warp * 2 * SUPER_X_BYTES), sums(reinterpret_cast<float4 *>(shared + WARPS * 2 * SUPER_X_BYTES)) {
        int n_columns = (n_rows + 1) / 2;
        kept_at = lane % 4 < n_columns ? lane / 4 * n_columns + lane % 4 : -1;
        n_kept = 8 * n_columns;
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            // Tiles beyond the last are not stored: any will do.
            int tile = min((int)blockIdx.x * TILES + m, args.matrix.n_tiles - 1);
            next[m] = args.matrix.tiles + tile * args.matrix.tile_bytes + warp * F::RECORD_BYTES;
        }
    }

    DEVICE void copy_x(int super, int parity) const {
        constexpr int GROUP_BYTES = X_BYTES / 2;
        const uint8_t *x = reinterpret_cast<const uint8_t *>(args.x) + lane * 16;
        uint8_t *to = ring + parity * SUPER_X_BYTES + lane * 16;
        if (super < n_supers && lane % 8 < n_rows) {
            const int first = super * 8 - args.matrix.first_group;
            if (first >= 0 && first + 8 <= 2 * args.matrix.n_units) {
                const uint8_t *from = x + first * GROUP_BYTES;
#pragma unroll
                for (int group = 0; group < 8; group++) copy_async(to + group * GROUP_BYTES, from + group * GROUP_BYTES, true);
            } else {
#pragma unroll 1
                for (int group = 0; group < 8; group++) {
                    const uint8_t *from = x + group_of_x(args.matrix, super, group) * GROUP_BYTES;
                    copy_async(to + group * GROUP_BYTES, from, true);
                }
            }
        }
        copy_commit();
    }
    // In the place of rows that are not there, anything is read: their products are not stored.
    DEVICE void load_x(uint32_t (&b)[4], int parity, int group) const {
        load_matrices(b, ring + parity * SUPER_X_BYTES + group * (X_BYTES / 2), CORE_BYTES, 2 * CORE_BYTES, lane);
    }

    DEVICE void advance() {
#pragma unroll
        for (int m = 0; m < TILES; m++) next[m] = kept_in_register(next[m] + WARPS * F::RECORD_BYTES);
    }

    // Multiplies a superblock, and loads the next one into its place as it goes, when any remain.
    DEVICE void multiply(Held (&held)[TILES], int super, int parity) {
        const bool is_more = super + WARPS < n_supers;
        float part[TILES][4] = {};
        SumsOfX<F::PER_HALF> of_x;
#pragma unroll
        for (int unit = 0; unit < SUPER_UNITS; unit++) {
            uint32_t b[2][4];
            load_x(b[0], parity, unit * 2);
            load_x(b[1], parity, unit * 2 + 1);
            if constexpr (F::MIN) {
                of_x.add(unit * 2, b[0], lane);
                of_x.add(unit * 2 + 1, b[1], lane);
            }
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                typename F::Factors factors;
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    uint32_t a[4];
                    if (s % F::STEPS_OF_FACTORS == 0) factors = F::factors(held[m].scales, unit, s);
                    F::operand_a(a, held[m].codes[unit], factors, s);
                    mma_bf16(part[m], a, b[s / 2][s % 2 * 2], b[s / 2][s % 2 * 2 + 1]);
                }
                if (is_more) held[m].codes[unit].load(next[m], unit, lane, ReadOnce());
            }
        }
        uint32_t sums_of_x[SumsOfX<F::PER_HALF>::WORDS];
        if constexpr (F::MIN) of_x.operand_b(sums_of_x);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            typename F::Scales &scales = held[m].scales;
            float q[4] = {}, scale[2] = {scales.scale(0), scales.scale(1)}, minimum[2] = {};
            if constexpr (F::MIN) {
                uint32_t a[4];
                F::minimums_a(a, scales);
                multiply_minimums<F>(q, a, sums_of_x);
                minimum[0] = scales.minimum(0), minimum[1] = scales.minimum(1);
            }
            if (is_more) scales.load(next[m], lane, ReadOnce());
            finish_part<F>(part[m], q, scale, minimum);
            float4 sum = make_float4(part[m][0], part[m][1], part[m][2], part[m][3]);
            if (kept_at >= 0) sums[(super * TILES + m) * n_kept + kept_at] = sum;
        }
        advance();
    }

    // The sums of tile `m`, in their order.
    DEVICE void add_up(float (&total)[4], int m) const {
        const int stretch = stretch_of(n_supers);
        for (int first = 0; first < n_supers; first += stretch) {
            float of_stretch[4] = {};
            const int end = min(first + stretch, n_supers);
#pragma unroll 4
            for (int super = first; super < end; super++) {
                float4 sum = sums[(super * TILES + m) * n_kept + kept_at];
                of_stretch[0] = __fadd_rn(of_stretch[0], sum.x), of_stretch[1] = __fadd_rn(of_stretch[1], sum.y);
                of_stretch[2] = __fadd_rn(of_stretch[2], sum.z), of_stretch[3] = __fadd_rn(of_stretch[3], sum.w);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) total[i] = first == 0 ? of_stretch[i] : __fadd_rn(total[i], of_stretch[i]);
        }
    }

    DEVICE void run() {
        Held held[TILES];
        // Weights do not depend on the kernels before: they are under way while those end.
        if (warp < n_supers) {
#pragma unroll
            for (int m = 0; m < TILES; m++) {
#pragma unroll
                for (int unit = 0; unit < SUPER_UNITS; unit++) held[m].codes[unit].load(next[m], unit, lane, ReadOnce());
                held[m].scales.load(next[m], lane, ReadOnce());
            }
            advance();
        }
        grid_wait();
        copy_x(warp, 0);
        int parity = 0;
        for (int super = warp; super < n_supers; super += WARPS, parity ^= 1) {
            copy_x(super + WARPS, parity ^ 1);
            copy_wait<1>();
            sync_warp();
            multiply(held, super, parity);
        }
        sync_block();
        if (warp >= TILES || kept_at < 0) return;
        float total[4] = {};
        add_up(total, warp);
        int tile = blockIdx.x * TILES + warp;
        if (tile < args.matrix.n_tiles) store_tile(args, total, tile, 0, lane);
    }
};

}  // namespace linear

// Shapes of the kernels; src/kernels/linear_super.rs computes grids and shared memory from the same numbers. With pairs of tiles a
// warp shares its sums of x; where tiles are few, more warps are under way without.
#define FEW_SUPER(name, F)                                      \
    KERNEL_AHEAD(linear_few_##name, LinearArgs, 128, 3) {       \
        SHARED(uint8_t, shared);                                \
        grid_release();                                         \
        linear::FewSuper<F, 2, 4>(args, shared).run();       \
    }                                                           \
    KERNEL_AHEAD(linear_few_small_##name, LinearArgs, 256, 2) { \
        SHARED(uint8_t, shared);                                \
        grid_release();                                         \
        linear::FewSuper<F, 1, 8>(args, shared).run();       \
    }

FEW_SUPER(q2_k, Q2_K)
FEW_SUPER(q3_k, Q3_K)
FEW_SUPER(q4_k, Q4_K)
FEW_SUPER(q5_k, Q5_K)
FEW_SUPER(q6_k, Q6_K)
