// Products of K-quants with more than few rows on Hopper: a thread copies, two warpgroups unpack codes to registers and multiply
// these by wgmma, which rounds as mma.sync does (tests/device/mma_bits.cu).
#include "hopper.cuh"
#include "linear_super.cuh"

namespace linear {

// Arguments of the kernels. The maps' boxes: a superblock of a block's tiles of weights, a unit of its tiles of x, a superblock
// of the sums of these.
struct WideSuperArgs {
    hopper::TileMap weights, x, sums_of_x;
    LinearArgs linear;
    int32_t is_split;  // whether a block of outputs may be several thread blocks' work
    int32_t unused[3];
};

constexpr int WIDE_SUPER_GROUPS = 2, WIDE_SUPER_THREADS = 128 * (WIDE_SUPER_GROUPS + 1);
constexpr int WIDE_SUPER_TILES = 4 * WIDE_SUPER_GROUPS, WIDE_SUPER_MULTIPLIERS = 128 * WIDE_SUPER_GROUPS;

// Blocks stay: each takes item after item, quarters of the superblocks of 128 outputs by N rows, and the copies for the next one
// go on while results are written. A block that has all quarters of its outputs adds them up; else they go to memory, and who
// brings the last one adds.
// Shared: sums of quarters where registers are short; stages of units of x; stages of superblocks; barriers.
template <class F, int N, int SUPER_STAGES, int X_STAGES> struct WideSuper {
    static constexpr int N_TILES = N / 8, SUMS = N_TILES * 4;
    static constexpr bool QUARTERS_IN_REGISTERS = N <= 64;
    static constexpr int WEIGHT_BYTES = WIDE_SUPER_TILES * F::RECORD_BYTES, SUMS_OF_X_BYTES = N_TILES * F::SUM_WORDS * CORE_BYTES;
    static constexpr int SUPER_BYTES = WEIGHT_BYTES + SUMS_OF_X_BYTES, UNIT_BYTES = N_TILES * X_BYTES;
    static constexpr int X_AT = QUARTERS_IN_REGISTERS ? 0 : SUMS * WIDE_SUPER_MULTIPLIERS * 4;
    static constexpr int SUPERS_AT = X_AT + X_STAGES * UNIT_BYTES, BARRIERS_AT = SUPERS_AT + SUPER_STAGES * SUPER_BYTES;
    static_assert(SUPER_BYTES % CORE_BYTES == 0, "copies of boxes begin at whole core matrices");

    // A stage in a ring, and the parity of the phase it is in.
    template <int STAGES> struct Place {
        int stage = 0;
        uint32_t parity = 0;

        DEVICE void advance() {
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    };
    // What a lane has of a superblock when it begins: its scales, and operand A of the first unit.
    struct Ahead {
        typename F::Scales scales;
        uint32_t a[2][4][4];
    };

    const WideSuperArgs &wide;
    const LinearArgs &args;
    uint8_t *const shared;
    hopper::Barrier *const barriers;
    const int n_supers, quarter, n_quarters, n_blocks_n;
    int first_item, end_item;

    DEVICE WideSuper(const WideSuperArgs &wide, uint8_t *shared)
        : wide(wide), args(wide.linear), shared(shared), barriers(reinterpret_cast<hopper::Barrier *>(shared + BARRIERS_AT)),
          n_supers(args.matrix.n_supers), quarter(quarter_of(n_supers)), n_quarters((n_supers + quarter - 1) / quarter),
          n_blocks_n((args.n_rows + N - 1) / N) {
        int n_blocks = n_blocks_n * ((args.matrix.n_tiles + WIDE_SUPER_TILES - 1) / WIDE_SUPER_TILES);
        auto edge = [&](int block) {
            int64_t n_items = wide.is_split ? (int64_t)n_blocks * n_quarters : n_blocks;
            return (int)(n_items * block / gridDim.x) * (wide.is_split ? 1 : n_quarters);
        };
        first_item = edge(blockIdx.x), end_item = edge(blockIdx.x + 1);
    }

    DEVICE hopper::Barrier *super_full(int stage) const { return barriers + stage; }
    DEVICE hopper::Barrier *super_empty(int stage) const { return barriers + SUPER_STAGES + stage; }
    DEVICE hopper::Barrier *x_full(int stage) const { return barriers + 2 * SUPER_STAGES + stage; }
    DEVICE hopper::Barrier *x_empty(int stage) const { return barriers + 2 * SUPER_STAGES + X_STAGES + stage; }
    DEVICE uint8_t *super_at(int stage) const { return shared + SUPERS_AT + stage * SUPER_BYTES; }
    DEVICE uint8_t *unit_at(int stage) const { return shared + X_AT + stage * UNIT_BYTES; }

    DEVICE int first_m(int item) const { return item / n_quarters / n_blocks_n * WIDE_SUPER_TILES; }
    DEVICE int first_n(int item) const { return item / n_quarters % n_blocks_n * N_TILES; }
    DEVICE int first_super(int item) const { return item % n_quarters * quarter; }
    DEVICE int end_super(int item) const { return min(first_super(item) + quarter, n_supers); }

    // One thread copies.
    DEVICE void copy() const {
        // Weights do not depend on the kernels before: they are under way while those end.
        int n_ahead = 0;
        for (int item = first_item; item < end_item; item++) {
            for (int super = first_super(item); super < end_super(item) && n_ahead < SUPER_STAGES; super++) {
                copy_weights(item, super, n_ahead++);
            }
        }
        grid_wait();
        Place<SUPER_STAGES> place;
        Place<X_STAGES> x_place;
        int n_before = 0;
        for (int item = first_item; item < end_item; item++) {
            for (int super = first_super(item); super < end_super(item); super++) {
                if (n_before++ >= n_ahead) {
                    // Of a barrier nobody has arrived at, the phase before counts as ended.
                    hopper::await(super_empty(place.stage), place.parity ^ 1);
                    copy_weights(item, super, place.stage);
                }
                copy_sums(item, super, place.stage);
                place.advance();
                for (int unit = 0; unit < SUPER_UNITS; unit++) {
                    hopper::await(x_empty(x_place.stage), x_place.parity ^ 1);
                    copy_x(item, super * SUPER_UNITS + unit, x_place.stage);
                    x_place.advance();
                }
            }
        }
    }
    DEVICE void copy_weights(int item, int super, int stage) const {
        hopper::arrive_expecting(super_full(stage), SUPER_BYTES);
        // A record is two pieces of its map.
        hopper::copy_tiles(super_at(stage), wide.weights, super * 2, first_m(item), super_full(stage));
    }
    DEVICE void copy_sums(int item, int super, int stage) const {
        if constexpr (F::MIN) {
            uint8_t *to = super_at(stage) + WEIGHT_BYTES;
            hopper::copy_tiles(to, wide.sums_of_x, super * F::SUM_WORDS, first_n(item), super_full(stage));
        }
    }
    DEVICE void copy_x(int item, int unit, int stage) const {
        hopper::arrive_expecting(x_full(stage), UNIT_BYTES);
        int core = (unit * 2 - args.matrix.first_group) * (X_BYTES / 2 / CORE_BYTES);
        hopper::copy_tiles(unit_at(stage), wide.x, core, first_n(item), x_full(stage));
    }

    DEVICE void unpack(uint32_t (&a)[4][4], const typename F::Scales &scales, const uint8_t *record, int unit, int lane) const {
        typename F::Codes codes;
        codes.load(record, unit, lane, Read());
        typename F::Factors factors;
#pragma unroll
        for (int s = 0; s < 4; s++) {
            if (s % F::STEPS_OF_FACTORS == 0) factors = F::factors(scales, unit, s);
            F::operand_a(a[s], codes, factors, s);
        }
    }
    DEVICE void begin(Ahead &ahead, const Place<SUPER_STAGES> &place, int warp, int lane) const {
        hopper::await(super_full(place.stage), place.parity);
        const uint8_t *record = super_at(place.stage) + warp * F::RECORD_BYTES;
        ahead.scales.load(record, lane, Read());
        unpack(ahead.a[0], ahead.scales, record, 0, lane);
    }

    // Multiplies a superblock into its part; then the next one has begun, when any remain.
    DEVICE void multiply(float (&part)[N_TILES][4], Ahead &ahead, int stage, const Place<SUPER_STAGES> &next,
                         Place<X_STAGES> &x_place, int n_remaining, int warp, int lane) const {
        const uint8_t *record = super_at(stage) + warp * F::RECORD_BYTES;
        int before = 0;
#pragma unroll
        for (int unit = 0; unit < SUPER_UNITS; unit++) {
            hopper::await(x_full(x_place.stage), x_place.parity);
            hopper::Operand b = hopper::operand(unit_at(x_place.stage), X_BYTES);
            hopper::begin_products();
#pragma unroll
            for (int s = 0; s < 4; s++) {
                hopper::multiply(part, ahead.a[unit % 2][s], hopper::next_step(b, s), unit + s > 0);
            }
            hopper::commit_products();
            if (unit > 0) {
                // The unit before has been read, from shared memory and from registers.
                hopper::products_wait<1>();
                if (lane == 0) hopper::arrive(x_empty(before));
            }
            before = x_place.stage;
            x_place.advance();
            if (unit + 1 < SUPER_UNITS) {
                unpack(ahead.a[(unit + 1) % 2], ahead.scales, record, unit + 1, lane);
            } else if (n_remaining > 0) {
                begin(ahead, next, warp, lane);
            }
        }
        hopper::products_wait<0>();
        if (lane == 0) hopper::arrive(x_empty(before));
    }

    // Warp `warp` of those that multiply: it has a tile of 16 outputs.
    DEVICE void multiply(int warp, int lane) const {
        Place<SUPER_STAGES> place;
        Place<X_STAGES> x_place;
        Ahead ahead;
        float total[N_TILES][4], grand[QUARTERS_IN_REGISTERS ? N_TILES : 1][4];
        grid_wait();
        if (first_item < end_item) begin(ahead, place, warp, lane);
        for (int item = first_item; item < end_item; item++) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) total[i / 4][i % 4] = 0.0f;
            for (int super = first_super(item); super < end_super(item); super++) {
                float part[N_TILES][4], scale[2] = {ahead.scales.scale(0), ahead.scales.scale(1)}, minimum[2] = {};
                uint32_t a[4] = {};
                if constexpr (F::MIN) {
                    F::minimums_a(a, ahead.scales);
                    minimum[0] = ahead.scales.minimum(0), minimum[1] = ahead.scales.minimum(1);
                }
                const int stage = place.stage;
                place.advance();
                const int n_remaining = end_super(item) - super - 1 + end_item - item - 1;
                multiply(part, ahead, stage, place, x_place, n_remaining, warp, lane);
                const uint8_t *sums_of_x = super_at(stage) + WEIGHT_BYTES + lane * 4;
#pragma unroll
                for (int n = 0; n < N_TILES; n++) {
                    float q[4] = {};
                    if constexpr (F::MIN) {
                        uint32_t b[F::SUM_WORDS];
#pragma unroll
                        for (int i = 0; i < F::SUM_WORDS; i++) b[i] = word_at(sums_of_x, (n * F::SUM_WORDS + i) * CORE_BYTES);
                        multiply_minimums<F>(q, a, b);
                    }
                    finish_part<F>(part[n], q, scale, minimum);
#pragma unroll
                    for (int i = 0; i < 4; i++) total[n][i] = __fadd_rn(total[n][i], part[n][i]);
                }
                sync_warp();
                if (lane == 0) hopper::arrive(super_empty(stage));
            }
            if (end_quarter(grand, total, item)) store(total, first_m(item) + warp, first_n(item), lane);
        }
    }

    // Adds a quarter to those before it; true when that were all, and `total` is the result.
    DEVICE bool end_quarter(float (&grand)[QUARTERS_IN_REGISTERS ? N_TILES : 1][4], float (&total)[N_TILES][4], int item) const {
        const int block = item / n_quarters, of_block = item % n_quarters;
        if (block * n_quarters < first_item || (block + 1) * n_quarters > end_item) return add_in_memory(total, block, of_block);
        float *in_shared = reinterpret_cast<float *>(shared) + threadIdx.x % WIDE_SUPER_MULTIPLIERS;
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            float &sum = total[i / 4][i % 4];
            if constexpr (QUARTERS_IN_REGISTERS) {
                if (of_block > 0) sum = __fadd_rn(grand[i / 4][i % 4], sum);
                grand[i / 4][i % 4] = sum;
            } else {
                if (of_block > 0) sum = __fadd_rn(in_shared[i * WIDE_SUPER_MULTIPLIERS], sum);
                in_shared[i * WIDE_SUPER_MULTIPLIERS] = sum;
            }
        }
        return of_block + 1 == n_quarters;
    }
    // The same where quarters are several blocks' work. It is done by all threads that multiply.
    DEVICE bool add_in_memory(float (&total)[N_TILES][4], int block, int of_block) const {
        const int thread = threadIdx.x % WIDE_SUPER_MULTIPLIERS;
        float *sums = args.workspace.quarters + (int64_t)block * 4 * SUMS * WIDE_SUPER_MULTIPLIERS + thread;
        auto at = [&](int quarter, int i) { return sums + (quarter * SUMS + i) * WIDE_SUPER_MULTIPLIERS; };
#pragma unroll
        for (int i = 0; i < SUMS; i++) store_for_others(at(of_block, i), total[i / 4][i % 4]);
        uint32_t *n_there = reinterpret_cast<uint32_t *>(barriers + 2 * (SUPER_STAGES + X_STAGES));
        fence_device();
        hopper::sync_threads<WIDE_SUPER_MULTIPLIERS>();
        if (thread == 0) *n_there = fetch_add(args.workspace.arrivals + block, 1) + 1;
        hopper::sync_threads<WIDE_SUPER_MULTIPLIERS>();
        const bool is_last = *n_there == (uint32_t)n_quarters;
        // Nobody writes the number again before all have read it.
        hopper::sync_threads<WIDE_SUPER_MULTIPLIERS>();
        if (!is_last) return false;
        fence_device();
        if (thread == 0) args.workspace.arrivals[block] = 0;
#pragma unroll
        for (int i = 0; i < SUMS; i++) total[i / 4][i % 4] = load_of_others(at(0, i));
        for (int quarter = 1; quarter < n_quarters; quarter++) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) total[i / 4][i % 4] = __fadd_rn(total[i / 4][i % 4], load_of_others(at(quarter, i)));
        }
        return true;
    }

    DEVICE void store(const float (&total)[N_TILES][4], int tile, int first_n, int lane) const {
        if (tile >= args.matrix.n_tiles) return;
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            if ((first_n + n) * 8 >= args.n_rows) continue;
            args.gated ? store_gated_tile(args, total[n], tile, first_n + n, lane)
                       : store_tile(args, total[n], tile, (first_n + n) * 8, lane);
        }
    }

    DEVICE void run() const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        constexpr int MULTIPLYING_WARPS = WIDE_SUPER_MULTIPLIERS / 32;
        if (threadIdx.x == 0) {
            for (int i = 0; i < SUPER_STAGES; i++) {
                hopper::set_barrier(super_full(i), 1);
                hopper::set_barrier(super_empty(i), MULTIPLYING_WARPS);
            }
            for (int i = 0; i < X_STAGES; i++) {
                hopper::set_barrier(x_full(i), 1);
                hopper::set_barrier(x_empty(i), MULTIPLYING_WARPS);
            }
            hopper::barriers_are_set();
        }
        sync_block();
        if (warp >= MULTIPLYING_WARPS) {
            hopper::fewer_registers<40>();
            threadIdx.x == WIDE_SUPER_MULTIPLIERS ? copy() : grid_wait();
        } else {
            hopper::more_registers<232>();
            multiply(warp, lane);
        }
    }
};

}  // namespace linear

// Shapes of the kernels; src/kernels/linear_super.rs computes grids and shared memory from the same numbers.
#define WIDE_SUPER(name, F, N, SUPER_STAGES, X_STAGES)                                                    \
    KERNEL_AHEAD(linear_wide_##N##_##name, linear::WideSuperArgs, linear::WIDE_SUPER_THREADS, 1) {       \
        SHARED(uint8_t, shared);                                                                          \
        grid_release();                                                                                   \
        linear::WideSuper<F, N, SUPER_STAGES, X_STAGES>(args, shared).run();                              \
    }
#define WIDE_SUPERS(name, F)         \
    WIDE_SUPER(name, F, 32, 4, 8)    \
    WIDE_SUPER(name, F, 64, 4, 8)    \
    WIDE_SUPER(name, F, 128, 2, 6)

WIDE_SUPERS(q2_k, Q2_K)
WIDE_SUPERS(q3_k, Q3_K)
WIDE_SUPERS(q4_k, Q4_K)
WIDE_SUPERS(q5_k, Q5_K)
WIDE_SUPERS(q6_k, Q6_K)
