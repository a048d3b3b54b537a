// top-k, top-p and min-p on the device: the cut that shared/sampling/src/filter.rs finds, to the last bit. Sums have the
// order of that file: whole rows by 16 lanes, ranked tokens one by one.
#include "sampling.cuh"

// Filters of a row.
struct FilterRow {
    float temperature;
    float top_p;
    float min_p;
    uint32_t top_k;
};

struct CutArgs {
    const float *logits;     // [n_output_rows][row_stride]
    const FilterRow *rows;   // [n_output_rows]
    const BatchHeader *header;
    Cut *cuts;               // [n_output_rows]
    uint32_t *is_undecided;  // [n_output_rows], 1: the cut keeps too many tokens to be found here
    uint32_t row_stride;
    uint32_t n_tokens;
};

namespace filter {

using namespace sampling;

constexpr uint32_t THREADS = 1024;
// Most tokens that are ranked.
constexpr uint32_t MAX_RANKED = 1024;
// Most tokens that may be as good as the last ranked one by the bound that is known for it.
constexpr uint32_t CAPACITY = 8192;
// How many tokens are ranked first when only their weight says how many are needed.
constexpr uint32_t FIRST_GUESS = 64;
constexpr uint32_t LANES = 16;
constexpr uint32_t CHUNK = 2048;

struct Workspace {
    union {
        uint64_t ranked[CAPACITY];  // greater is better, no two are equal
        float chunk[2][CHUNK];
    };
    float maxima[THREADS];          // of each thread's tokens, falling
    float weights[MAX_RANKED];
    double lanes[LANES];
    uint32_t n_found;
    uint32_t n_kept;
};

// src/kernels/filter.rs asks for as much shared memory.
static_assert(sizeof(Workspace) == 73864, "bytes of a workspace");

// e^x for x <= 0, as math.rs has it.
DEVICE float exp_fixed(float x) {
    constexpr float LEAST = -87.0f, ROUNDER = 12582912.0f, LOG2_E = 1.44269504f;
    float clamped = x > LEAST ? x : LEAST;
    float n = __fsub_rn(__fadd_rn(__fmul_rn(clamped, LOG2_E), ROUNDER), ROUNDER);
    float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, LN_2_HIGH)), __fmul_rn(n, LN_2_LOW));
    float tail = __fadd_rn(1.0f / 720.0f, __fmul_rn(r, 1.0f / 5040.0f));
    tail = __fadd_rn(1.0f / 24.0f, __fmul_rn(r, __fadd_rn(1.0f / 120.0f, __fmul_rn(r, tail))));
    tail = __fadd_rn(0.5f, __fmul_rn(r, __fadd_rn(1.0f / 6.0f, __fmul_rn(r, tail))));
    float sum = __fadd_rn(1.0f, __fadd_rn(r, __fmul_rn(__fmul_rn(r, r), tail)));
    float power = __uint_as_float((uint32_t)((int)n + 127) << 23);
    return x > LEAST ? __fmul_rn(sum, power) : 0.0f;
}

// ln of a positive number, as math.rs has it.
DEVICE float ln_fixed(float x) {
    bool is_subnormal = x < 1.17549435e-38f;
    Split parts = split(is_subnormal ? __fmul_rn(x, 16777216.0f) : x);
    parts.e = __fsub_rn(parts.e, is_subnormal ? 24.0f : 0.0f);
    return ln_of_split(parts);
}

// Weight of a token relative to the likeliest one.
DEVICE float weight(float logit, float max, float temperature) {
    float below = logit == max ? 0.0f : __fsub_rn(logit, max);
    return exp_fixed(__fdiv_rn(below, temperature));
}

// Greater for a larger logit, then for a lower id; zeros are equal. Never 0.
DEVICE uint64_t rank_of(float logit, uint32_t token) {
    uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f));
    uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)key << 32 | (0xffffffffu - token);
}
DEVICE Cut token_of(uint64_t rank) {
    uint32_t key = (uint32_t)(rank >> 32);
    return {__uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key), 0xffffffffu - (uint32_t)rank};
}

// Sorts shared memory, the greatest first (Batcher's bitonic sort); `n` is a power of two.
template <class T> DEVICE void sort_falling(T *values, uint32_t n) {
    for (uint32_t size = 2; size <= n; size *= 2) {
        for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
            sync_block();
            for (uint32_t i = threadIdx.x; i < n / 2; i += THREADS) {
                uint32_t at = 2 * i - (i & (stride - 1));
                T a = values[at], b = values[at + stride];
                bool is_falling = (at & size) == 0;
                if (is_falling ? a < b : b < a) values[at] = b, values[at + stride] = a;
            }
        }
    }
    sync_block();
}

// A row and what is known of it.
struct Row {
    const float *logits;
    uint32_t n_tokens;
    FilterRow filter;
    float max;

    DEVICE float logit(uint32_t token) const { return without_nan(logits[token]); }
};

// Fills `maxima`: each is of other tokens, so the k-th largest is no more than the k-th largest logit.
DEVICE void sort_maxima(const Row &row, Workspace *work) {
    float most = NONE;
    for (uint32_t token = threadIdx.x; token < row.n_tokens; token += THREADS) most = fmaxf(most, row.logit(token));
    work->maxima[threadIdx.x] = most;
    sort_falling(work->maxima, THREADS);
}

// Ranks the first `n` tokens of the row, or all if there are fewer; more than CAPACITY are not ranked. Returns how many.
DEVICE uint32_t rank(const Row &row, Workspace *work, uint32_t n) {
    float floor = work->maxima[n - 1];
    sync_block();
    if (threadIdx.x == 0) work->n_found = 0;
    sync_block();
    for (uint32_t token = threadIdx.x; token < row.n_tokens; token += THREADS) {
        float logit = row.logit(token);
        if (logit < floor) continue;
        uint32_t at = fetch_add(&work->n_found, 1);
        if (at < CAPACITY) work->ranked[at] = rank_of(logit, token);
    }
    sync_block();
    uint32_t n_found = work->n_found, size = 1;
    if (n_found > CAPACITY) return 0;
    while (size < n_found) size *= 2;
    for (uint32_t i = n_found + threadIdx.x; i < size; i += THREADS) work->ranked[i] = 0;
    sort_falling(work->ranked, size);
    return min(n, n_found);
}

// Weight of all tokens, for every thread: lane j of 16 adds tokens j, j + 16, ... in order; then lanes pairwise.
DEVICE double mass_of_row(const Row &row, Workspace *work) {
    double sum = 0;
    uint32_t stage = 0;
    for (uint32_t first = 0; first < row.n_tokens; first += CHUNK, stage ^= 1) {
        float *chunk = work->chunk[stage];
        for (uint32_t i = threadIdx.x; i < CHUNK; i += THREADS) {
            uint32_t token = first + i;
            chunk[i] = token < row.n_tokens ? weight(row.logit(token), row.max, row.filter.temperature) : 0.0f;
        }
        // Others fill the other chunk while these add.
        sync_block();
        if (threadIdx.x >= LANES) continue;
#pragma unroll 8
        for (uint32_t i = threadIdx.x; i < CHUNK; i += LANES) sum += chunk[i];
    }
    if (threadIdx.x < LANES) work->lanes[threadIdx.x] = sum;
    sync_block();
    double lanes[LANES];
    for (uint32_t lane = 0; lane < LANES; lane++) lanes[lane] = work->lanes[lane];
#pragma unroll
    for (uint32_t width = LANES / 2; width > 0; width /= 2) {
        for (uint32_t lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

DEVICE void weigh_ranked(const Row &row, Workspace *work, uint32_t n) {
    if (threadIdx.x < n) {
        Cut token = token_of(work->ranked[threadIdx.x]);
        work->weights[threadIdx.x] = weight(token.logit, row.max, row.filter.temperature);
    }
    sync_block();
}

// Weight of the first `n` ranked tokens.
DEVICE double mass_of_ranked(const Workspace *work, uint32_t n) {
    double mass = 0;
    for (uint32_t i = 0; i < n; i++) mass += work->weights[i];
    return mass;
}

// How many of `n` ranked tokens weigh `target` together; 0 when all do not.
DEVICE uint32_t prefix(const Workspace *work, uint32_t n, double target) {
    double mass = 0;
    for (uint32_t i = 0; i < n; i++) {
        mass += work->weights[i];
        if (mass >= target) return i + 1;
    }
    return 0;
}

// The result of a search; `is_found` is false when it is beyond what is ranked here.
struct Found {
    bool is_found;
    Cut cut;
};
constexpr Cut ALL = {NONE, 0xffffffffu};

DEVICE Found top_k(const Row &row, Workspace *work) {
    uint32_t k = row.filter.top_k;
    if (k > MAX_RANKED || rank(row, work, k) == 0) return {false, ALL};
    uint32_t n_kept = k;
    if (row.filter.top_p < 1.0f) {
        weigh_ranked(row, work, k);
        if (threadIdx.x == 0) work->n_kept = prefix(work, k, (double)row.filter.top_p * mass_of_ranked(work, k));
        sync_block();
        if (work->n_kept > 0) n_kept = work->n_kept;
    }
    return {true, token_of(work->ranked[n_kept - 1])};
}

DEVICE Found top_p(const Row &row, Workspace *work) {
    double target = (double)row.filter.top_p * mass_of_row(row, work);
    for (uint32_t guess = FIRST_GUESS; guess <= MAX_RANKED; guess *= MAX_RANKED / FIRST_GUESS) {
        uint32_t n = rank(row, work, guess);
        if (n == 0) break;
        weigh_ranked(row, work, n);
        if (threadIdx.x == 0) work->n_kept = prefix(work, n, target);
        sync_block();
        if (work->n_kept > 0) return {true, token_of(work->ranked[work->n_kept - 1])};
        if (n == row.n_tokens) return {true, ALL};
    }
    return {false, ALL};
}

DEVICE Found find(Row &row, Workspace *work) {
    const FilterRow &filter = row.filter;
    bool has_top_k = filter.top_k > 0 && filter.top_k < row.n_tokens;
    if (filter.temperature == 0 || !(has_top_k || filter.top_p < 1.0f || filter.min_p > 0)) return {true, ALL};
    sort_maxima(row, work);
    row.max = work->maxima[0];
    Found found = {true, ALL};
    if (has_top_k) found = top_k(row, work);
    else if (filter.top_p < 1.0f) found = top_p(row, work);
    if (filter.min_p > 0) {
        float floor = __fadd_rn(row.max, __fmul_rn(filter.temperature, ln_fixed(filter.min_p)));
        if (keeps(found.cut, floor, 0xffffffffu)) found.cut = {floor, 0xffffffffu};
    }
    return found;
}

}  // namespace filter

// A block a row. Shared: a workspace.
KERNEL(find_cuts, CutArgs, 1024, 1) {
    using namespace filter;
    uint32_t slot = blockIdx.x;
    if (slot >= args.header->n_output_rows) return;
    SHARED(Workspace, work);
    Row row = {args.logits + (size_t)slot * args.row_stride, args.n_tokens, args.rows[slot], NONE};
    Found found = find(row, work);
    if (threadIdx.x > 0) return;
    args.cuts[slot] = found.cut;
    args.is_undecided[slot] = !found.is_found;
}
