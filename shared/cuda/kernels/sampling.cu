// The token of a row on the device, to the last bit what shared/sampling takes: penalties and bias as its adjust.rs, noise
// as its noise.rs and math.rs, the best token as its sample.rs. Every operation that rounds is written out, so that no
// compiler joins two of them.
#include "sampling.cuh"

// How a row is sampled.
struct SampleRow {
    uint64_t seed;
    uint32_t position;  // of the token to be sampled
    float temperature;
};

struct Candidate {
    float value;  // logit with noise
    uint32_t token;
};

struct BestArgs {
    const float *logits;    // [n_output_rows][row_stride]
    const SampleRow *rows;  // [n_output_rows]
    const Cut *cuts;        // [n_output_rows]; null keeps all tokens
    const BatchHeader *header;
    Candidate *of_part;     // [n_output_rows][n_parts]
    Candidate *best;        // [n_output_rows]
    uint32_t row_stride;
    uint32_t vocab_start;   // token of the first logit
    uint32_t n_tokens;      // logits that are tokens
    uint32_t n_parts;       // blocks that share a row
};

// A token that occurs before the sampled one, or has a bias.
struct Adjustment {
    uint32_t row;
    uint32_t column;    // token - vocab_start
    uint32_t n_output;  // how often the token is in the output
    uint32_t kinds;     // 1: penalties, 2: bias
    float repetition, presence, frequency, bias;
};

struct AdjustArgs {
    float *logits;  // [n_output_rows][row_stride]
    const Adjustment *adjustments;
    float *before;  // [n_adjustments], the logits as they were
    uint32_t row_stride;
    uint32_t n_adjustments;
};

namespace sampling {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
// Tokens whose noise one draw of the generator makes.
constexpr uint32_t DRAWN = 4;
constexpr float MAX_NOISE = 22.2f;

struct Words {
    uint32_t word[4];
};

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011).
DEVICE Words philox(uint32_t block, uint32_t position, uint64_t seed) {
    uint32_t a = block, b = position, c = 0, d = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)a * 0xD2511F53u, p1 = (uint64_t)c * 0xCD9E8D57u;
        a = (uint32_t)(p1 >> 32) ^ b ^ k0;
        b = (uint32_t)p1;
        c = (uint32_t)(p0 >> 32) ^ d ^ k1;
        d = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{a, b, c, d}};
}

DEVICE float gumbel_of(uint32_t word) {
    constexpr float SCALE = 1.0f / 2147483648.0f;
    int j = (int)(word >> 1);
    float w = __fmul_rn(__fadd_rn((float)j, 0.5f), SCALE);
    float u = __fmul_rn(__fadd_rn((float)(0x7fffffff - j), 0.5f), SCALE);
    Split x = split(u);
    // Near u = 1 the logarithm of 1 - w is exact where u is not.
    if (w < 0.29f) x = {-w, 0.0f};
    return -ln_of_split(split(-ln_of_split(x)));
}

DEVICE bool beats(Candidate a, Candidate b) { return a.value > b.value || (a.value == b.value && a.token < b.token); }

// The better of the best so far and the tokens of a group that are in first .. end. Noise is only made where it can
// matter.
DEVICE Candidate visit(const SampleRow &row, Cut cut, Candidate best, uint32_t group, uint32_t first, uint32_t end,
                       const float *logits) {
    float logit[DRAWN];
    float most = NONE;
    for (uint32_t i = 0; i < DRAWN; i++) {
        uint32_t token = group * DRAWN + i;
        logit[i] = token >= first && token < end ? without_nan(logits[token - first]) : NONE;
        most = fmaxf(most, logit[i]);
    }
    if (__fadd_rn(most, __fmul_rn(row.temperature, MAX_NOISE)) < best.value || most < cut.logit) return best;
    bool has_noise = row.temperature != 0;
    Words words = {};
    if (has_noise) words = philox(group, row.position, row.seed);
    for (uint32_t i = 0; i < DRAWN; i++) {
        uint32_t token = group * DRAWN + i;
        if (token < first || token >= end) continue;
        float noise = has_noise ? gumbel_of(words.word[i]) : 0.0f;
        Candidate next = {__fadd_rn(logit[i], __fmul_rn(row.temperature, noise)), token};
        if (beats(next, best) && keeps(cut, logit[i], token)) best = next;
    }
    return best;
}

DEVICE Candidate best_of_warp(Candidate best) {
    for (int mask = 16; mask > 0; mask /= 2) {
        Candidate other = {shuffle_xor(best.value, mask), shuffle_xor(best.token, mask)};
        if (beats(other, best)) best = other;
    }
    return best;
}

}  // namespace sampling

// Grid: (output rows, parts). Shared: a candidate for each warp.
KERNEL(best_of_parts, BestArgs, 256, 4) {
    using namespace sampling;
    uint32_t slot = blockIdx.x;
    if (slot >= args.header->n_output_rows) return;
    SHARED(Candidate, of_warp);
    SampleRow row = args.rows[slot];
    Cut cut = {NONE, 0xffffffffu};
    if (args.cuts) cut = args.cuts[slot];
    const float *logits = args.logits + (size_t)slot * args.row_stride;
    uint32_t first = args.vocab_start, end = first + args.n_tokens;
    Candidate best = {NONE, first};
    uint32_t stride = args.n_parts * THREADS;
    for (uint32_t group = first / DRAWN + blockIdx.y * THREADS + threadIdx.x; group * DRAWN < end; group += stride) {
        best = visit(row, cut, best, group, first, end, logits);
    }
    best = best_of_warp(best);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
    sync_block();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < WARPS; warp++) {
        if (beats(of_warp[warp], best)) best = of_warp[warp];
    }
    args.of_part[(size_t)slot * args.n_parts + blockIdx.y] = best;
}

// A warp a row.
KERNEL(best_of_rows, BestArgs, 32, 1) {
    using namespace sampling;
    uint32_t slot = blockIdx.x;
    if (slot >= args.header->n_output_rows) return;
    Candidate best = {NONE, args.vocab_start};
    for (uint32_t part = threadIdx.x; part < args.n_parts; part += 32) {
        Candidate next = args.of_part[(size_t)slot * args.n_parts + part];
        if (beats(next, best)) best = next;
    }
    best = best_of_warp(best);
    if (threadIdx.x == 0) args.best[slot] = best;
}

// A thread an adjustment. No two are of the same token of a row.
KERNEL(adjust_logits, AdjustArgs, 256, 4) {
    uint32_t i = blockIdx.x * 256 + threadIdx.x;
    if (i >= args.n_adjustments) return;
    Adjustment it = args.adjustments[i];
    float *at = args.logits + (size_t)it.row * args.row_stride + it.column;
    float logit = *at;
    args.before[i] = logit;
    if (it.kinds & 1) {
        logit = logit < 0 ? __fmul_rn(logit, it.repetition) : __fdiv_rn(logit, it.repetition);
        float presence = it.n_output > 0 ? it.presence : 0.0f;
        logit = __fsub_rn(__fsub_rn(logit, presence), __fmul_rn(it.frequency, (float)it.n_output));
    }
    if (it.kinds & 2) logit = __fadd_rn(logit, it.bias);
    *at = sampling::without_nan(logit);
}

// Undoes adjust_logits.
KERNEL(restore_logits, AdjustArgs, 256, 4) {
    uint32_t i = blockIdx.x * 256 + threadIdx.x;
    if (i >= args.n_adjustments) return;
    Adjustment it = args.adjustments[i];
    args.logits[(size_t)it.row * args.row_stride + it.column] = args.before[i];
}
