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
    int32_t is_split;  // whether blocks that are left over are several thread blocks' work
    int32_t unused[3];
};

constexpr int WIDE_SUPER_GROUPS = 2, WIDE_SUPER_THREADS = 128 * (WIDE_SUPER_GROUPS + 1);
constexpr int WIDE_SUPER_TILES = 4 * WIDE_SUPER_GROUPS, WIDE_SUPER_MULTIPLIERS = 128 * WIDE_SUPER_GROUPS;

// Blocks stay. Each takes whole blocks of 128 outputs by N rows in turn, of which all have the same number. Of the blocks that
// are left over the stretches are dealt out: their sums go to memory, and who brings the last of a block adds them up. The copies
// for the next work go on while results are written.
// Shared: sums of stretches where registers are short; stages of units of x; stages of superblocks; barriers.
template <class F, int N, int X_STAGES, int REGISTERS> struct WideSuper {
    static constexpr int N_TILES = N / 8, SUMS = N_TILES * 4;
    static constexpr bool STRETCHES_IN_REGISTERS = N == 64;
    static constexpr int WEIGHT_BYTES = WIDE_SUPER_TILES * F::RECORD_BYTES, SUMS_OF_X_BYTES = N_TILES * F::SUM_WORDS * CORE_BYTES;
    static constexpr int SUPER_BYTES = WEIGHT_BYTES + SUMS_OF_X_BYTES, UNIT_BYTES = N_TILES * X_BYTES;
    static constexpr int X_AT = STRETCHES_IN_REGISTERS ? 0 : SUMS * WIDE_SUPER_MULTIPLIERS * 4;
    static constexpr int SUPERS_AT = X_AT + X_STAGES * UNIT_BYTES;
    // As many as there is room for; with few rows two blocks share a multiprocessor.
    static constexpr int SUPERS_THAT_FIT = ((N == 32 ? 111 : 225) * 1024 - SUPERS_AT) / SUPER_BYTES;
    static constexpr int SUPER_STAGES = SUPERS_THAT_FIT < 6 ? SUPERS_THAT_FIT : 6;
    static constexpr int BARRIERS_AT = SUPERS_AT + SUPER_STAGES * SUPER_BYTES;
    static_assert(SUPER_BYTES % CORE_BYTES == 0, "copies of boxes begin at whole core matrices");
    static_assert(SUPER_STAGES >= 2, "a superblock begins before the one before it ends");

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
    const int n_supers, stretch, n_stretches, n_blocks_n;
    // Whole blocks for each thread block, and the stretches of the rest: from the first to before the last.
    int n_whole, first_shared, end_shared;

    DEVICE WideSuper(const WideSuperArgs &wide, uint8_t *shared)
        : wide(wide), args(wide.linear), shared(shared), barriers(reinterpret_cast<hopper::Barrier *>(shared + BARRIERS_AT)),
          n_supers(args.matrix.n_supers), stretch(stretch_of(n_supers)), n_stretches((n_supers + stretch - 1) / stretch),
          n_blocks_n((args.n_rows + N - 1) / N) {
        const int grid = gridDim.x, mine = blockIdx.x;
        const int n_blocks = n_blocks_n * ((args.matrix.n_tiles + WIDE_SUPER_TILES - 1) / WIDE_SUPER_TILES);
        const int n_left = n_blocks % grid;
        n_whole = n_blocks / grid + (!wide.is_split && mine < n_left);
        first_shared = wide.is_split ? n_left * n_stretches * mine / grid : 0;
        end_shared = wide.is_split ? n_left * n_stretches * (mine + 1) / grid : 0;
    }

    // Items: the stretches of whole blocks, then those that are shared.
    DEVICE int n_items() const { return n_whole * n_stretches + end_shared - first_shared; }
    DEVICE bool is_whole(int item) const { return item < n_whole * n_stretches; }
    DEVICE int shared_item(int item) const { return first_shared + item - n_whole * n_stretches; }
    DEVICE int block_of(int item) const {
        int round = is_whole(item) ? item / n_stretches : n_whole;
        return round * (int)gridDim.x + (is_whole(item) ? (int)blockIdx.x : shared_item(item) / n_stretches);
    }
    DEVICE int stretch_of_block(int item) const { return (is_whole(item) ? item : shared_item(item)) % n_stretches; }

    DEVICE hopper::Barrier *super_full(int stage) const { return barriers + stage; }
    DEVICE hopper::Barrier *super_empty(int stage) const { return barriers + SUPER_STAGES + stage; }
    DEVICE hopper::Barrier *x_full(int stage) const { return barriers + 2 * SUPER_STAGES + stage; }
    DEVICE hopper::Barrier *x_empty(int stage) const { return barriers + 2 * SUPER_STAGES + X_STAGES + stage; }
    DEVICE uint8_t *super_at(int stage) const { return shared + SUPERS_AT + stage * SUPER_BYTES; }
    DEVICE uint8_t *unit_at(int stage) const { return shared + X_AT + stage * UNIT_BYTES; }

    DEVICE int first_m(int item) const { return block_of(item) / n_blocks_n * WIDE_SUPER_TILES; }
    DEVICE int first_n(int item) const { return block_of(item) % n_blocks_n * N_TILES; }
    DEVICE int first_super(int item) const { return stretch_of_block(item) * stretch; }
    DEVICE int end_super(int item) const { return min(first_super(item) + stretch, n_supers); }

    // One thread copies.
    DEVICE void copy() const {
        // Weights do not depend on the kernels before: they are under way while those end.
        int n_ahead = 0;
        for (int item = 0; item < n_items(); item++) {
            for (int super = first_super(item); super < end_super(item) && n_ahead < SUPER_STAGES; super++) {
                copy_weights(item, super, n_ahead++);
            }
        }
        grid_wait();
        Place<SUPER_STAGES> place;
        Place<X_STAGES> x_place;
        int n_before = 0;
        for (int item = 0; item < n_items(); item++) {
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
        float total[N_TILES][4], grand[STRETCHES_IN_REGISTERS ? N_TILES : 1][4];
        grid_wait();
        if (n_items() > 0) begin(ahead, place, warp, lane);
        for (int item = 0; item < n_items(); item++) {
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
                const int n_remaining = end_super(item) - super - 1 + n_items() - item - 1;
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
            if (end_stretch(grand, total, item)) store(total, first_m(item) + warp, first_n(item), lane);
        }
    }

    // Adds a stretch to those before it; true when that were all, and `total` is the result.
    DEVICE bool end_stretch(float (&grand)[STRETCHES_IN_REGISTERS ? N_TILES : 1][4], float (&total)[N_TILES][4], int item) const {
        if (!is_whole(item)) return add_in_memory(total, shared_item(item) / n_stretches, shared_item(item) % n_stretches);
        const int of_block = stretch_of_block(item);
        float *in_shared = reinterpret_cast<float *>(shared) + threadIdx.x % WIDE_SUPER_MULTIPLIERS;
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            float &sum = total[i / 4][i % 4];
            if constexpr (STRETCHES_IN_REGISTERS) {
                if (of_block > 0) sum = __fadd_rn(grand[i / 4][i % 4], sum);
                grand[i / 4][i % 4] = sum;
            } else {
                if (of_block > 0) sum = __fadd_rn(in_shared[i * WIDE_SUPER_MULTIPLIERS], sum);
                in_shared[i * WIDE_SUPER_MULTIPLIERS] = sum;
            }
        }
        return of_block + 1 == n_stretches;
    }
    // The same for the `block`-th of those whose stretches are dealt out. All threads that multiply do it.
    DEVICE bool add_in_memory(float (&total)[N_TILES][4], int block, int of_block) const {
        const int thread = threadIdx.x % WIDE_SUPER_MULTIPLIERS;
        float *sums = args.workspace.stretches + (int64_t)block * STRETCHES * SUMS * WIDE_SUPER_MULTIPLIERS + thread;
        auto at = [&](int which, int i) { return sums + (which * SUMS + i) * WIDE_SUPER_MULTIPLIERS; };
#pragma unroll
        for (int i = 0; i < SUMS; i++) store_for_others(at(of_block, i), total[i / 4][i % 4]);
        uint32_t *n_there = reinterpret_cast<uint32_t *>(barriers + 2 * (SUPER_STAGES + X_STAGES));
        fence_device();
        hopper::sync_threads<WIDE_SUPER_MULTIPLIERS>();
        if (thread == 0) *n_there = fetch_add(args.workspace.arrivals + block, 1) + 1;
        hopper::sync_threads<WIDE_SUPER_MULTIPLIERS>();
        const bool is_last = *n_there == (uint32_t)n_stretches;
        // Nobody writes the number again before all have read it.
        hopper::sync_threads<WIDE_SUPER_MULTIPLIERS>();
        if (!is_last) return false;
        fence_device();
        if (thread == 0) args.workspace.arrivals[block] = 0;
#pragma unroll
        for (int i = 0; i < SUMS; i++) total[i / 4][i % 4] = load_of_others(at(0, i));
        for (int which = 1; which < n_stretches; which++) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) total[i / 4][i % 4] = __fadd_rn(total[i / 4][i % 4], load_of_others(at(which, i)));
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
            hopper::more_registers<REGISTERS>();
            multiply(warp, lane);
        }
    }
};

}  // namespace linear

// Shapes of the kernels; src/kernels/linear_super.rs computes grids and shared memory from the same numbers.
#define WIDE_SUPER(name, F, N, X_STAGES, REGISTERS, BLOCKS)                                               \
    KERNEL_AHEAD(linear_wide_##N##_##name, linear::WideSuperArgs, linear::WIDE_SUPER_THREADS, BLOCKS) {   \
        SHARED(uint8_t, shared);                                                                          \
        grid_release();                                                                                   \
        linear::WideSuper<F, N, X_STAGES, REGISTERS>(args, shared).run();                                 \
    }
#define WIDE_SUPERS(name, F)             \
    WIDE_SUPER(name, F, 32, 6, 96, 2)    \
    WIDE_SUPER(name, F, 64, 8, 232, 1)   \
    WIDE_SUPER(name, F, 128, 6, 232, 1)

WIDE_SUPERS(q2_k, Q2_K)
WIDE_SUPERS(q3_k, Q3_K)
WIDE_SUPERS(q4_k, Q4_K)
WIDE_SUPERS(q5_k, Q5_K)
WIDE_SUPERS(q6_k, Q6_K)
