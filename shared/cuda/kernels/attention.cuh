// What the kernels of attention have in common, so that they give the same bits: a warp works for 16 rows, each a token and
// one of the query heads of a KV head, and goes through keys in the order of their positions.
//
// Within a split of 256 positions softmax is online over chunks of 64 (FlashAttention-2, Dao 2023); splits know nothing of
// each other and are merged in order (FlashDecoding, Dao et al. 2023). A chunk or split that a row does not see changes
// nothing of it, not even the sign of a zero; it may be passed over or not.
//
// Lane (g, t) of a warp holds of rows g and g + 8 the elements that mma.m16n8k16 gives it; index r = 0, 1 means those rows.
#pragma once
#include "batch.cuh"
#include "layout.cuh"

// For all kernels of attention.
struct AttendArgs {
    const uint16_t *q;           // half, [n_rows][n_heads][head_dim]
    uint16_t *keys;              // half, [block][n_kv_heads][16 * head_dim], as key_index says
    uint16_t *values;            // likewise, as value_index says
    const float *qkv;            // [n_rows][(n_heads + 2 * n_kv_heads) * head_dim]
    const float2 *rotations;     // {cos, sin}, [position][head_dim / 2]
    const AttentionTile *tiles;
    const uint32_t *n_tiles;
    const uint32_t *tables;
    const uint32_t *first_head;  // [n_kv_heads], of the query heads that share a KV head
    const uint32_t *n_heads_of;  // [n_kv_heads], their number
    float *partial;              // [n_rows][n_heads][n_splits][head_dim]
    float2 *partial_sums;        // {m, l}, [n_rows][n_heads][n_splits]
    uint32_t *n_done;            // splits of a block's rows that are done, [tile * parts][n_kv_heads]; zeros between launches
    uint16_t *out;               // bf16 as operand B, [n_rows][k_padded], column head * head_dim + dim
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t n_splits;           // of every row in `partial`
    uint32_t parts;              // blocks that share the rows of a tile
    uint32_t window;             // positions a row sees, its own included; 0: all
    uint32_t k_padded;
    float factor;                // of scores, log2(e) included
    uint32_t unused;
};

namespace attention {

constexpr int CHUNK = 64;
constexpr int SPLIT = 256;
constexpr int BLOCKS = CHUNK / BLOCK_POSITIONS;
constexpr int ROWS = 16;
constexpr float NONE = -__builtin_huge_valf();

// Some rows of a tile: `first`, and what follows it up to `n_rows` or a block's share.
struct Rows {
    AttentionTile tile;
    int first_head, group;
    int first, n_rows;

    DEVICE int token(int row) const { return row / group; }
    DEVICE int head(int row) const { return first_head + row % group; }
    DEVICE int position(int row) const { return (int)tile.last_position - (int)tile.n_tokens + 1 + token(row); }
    DEVICE size_t global_row(int row) const { return tile.first_row + token(row); }
};

// Rows of a block that has `size` of them at most; `part` is its number among the blocks of the tile.
DEVICE Rows rows_of(const AttendArgs &args, uint32_t tile, uint32_t part, uint32_t kv_head, int size) {
    Rows rows;
    rows.tile = args.tiles[tile];
    rows.first_head = (int)args.first_head[kv_head];
    rows.group = (int)args.n_heads_of[kv_head];
    rows.first = (int)part * size;
    rows.n_rows = min(rows.first + size, (int)rows.tile.n_tokens * rows.group);
    return rows;
}

// Positions that some of the rows `first .. end` see: first, one past the last.
struct Range {
    int first, end;
};
DEVICE Range seen_by(const AttendArgs &args, const Rows &rows, int first, int end) {
    int lowest = rows.position(first), highest = rows.position(end - 1);
    return {args.window ? max(0, lowest - (int)args.window + 1) : 0, highest + 1};
}

// Positions that all of the rows see. Rows beyond the tile's do not count: nobody reads what they get.
DEVICE Range seen_by_all(const AttendArgs &args, const Rows &rows, int first, int end) {
    int highest = rows.position(end - 1);
    return {args.window ? max(0, highest - (int)args.window + 1) : 0, rows.position(first) + 1};
}

// What the lane's rows see: keys with lowest <= position <= own.
struct Sight {
    int lowest[2], own[2];
};
DEVICE Sight sight_of(const AttendArgs &args, const Rows &rows, int first) {
    Sight sight;
    int g = threadIdx.x % 32 / 4;
    for (int r = 0; r < 2; r++) {
        int row = first + g + 8 * r;
        sight.own[r] = row < rows.n_rows ? rows.position(row) : -1;
        sight.lowest[r] = args.window ? sight.own[r] - (int)args.window + 1 : 0;
    }
    return sight;
}

// The queries of the warp's rows, as operand A.
template <int HD> DEVICE void load_queries(const AttendArgs &args, const Rows &rows, int first, uint32_t (&q)[HD / 16][4]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint16_t *from[2];
    bool is_row[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = first + g + 8 * r;
        is_row[r] = row < rows.n_rows;
        size_t at = is_row[r] ? rows.global_row(row) * args.n_heads + rows.head(row) : 0;
        from[r] = args.q + at * HD + 2 * t;
    }
#pragma unroll
    for (int step = 0; step < HD / 16; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            q[step][i] = is_row[i % 2] ? *(const uint32_t *)(from[i % 2] + 16 * step + i / 2 * 8) : 0;
        }
    }
}

// Puts the queries of the warp's rows where `attend` finds them: 16 bytes a lane. No other lane reads what a lane writes.
template <int HD> DEVICE void stage_queries(const AttendArgs &args, const Rows &rows, int first, uint4 *to) {
    int lane = threadIdx.x % 32;
    uint32_t q[HD / 16][4];
    load_queries<HD>(args, rows, first, q);
#pragma unroll
    for (int step = 0; step < HD / 16; step++) to[32 * step + lane] = make_uint4(q[step][0], q[step][1], q[step][2], q[step][3]);
}

// Starts to copy the keys and values of a chunk to shared memory, by all `n_threads` threads of the block: four blocks'
// keys, then their values. Blocks that begin at `end` or later are not read; zeros stand for them.
template <int HD>
DEVICE void copy_chunk(const AttendArgs &args, uint32_t table, uint32_t kv_head, int chunk, int end, uint16_t *to,
                       int n_threads) {
    constexpr int HEAD = BLOCK_POSITIONS * HD;  // elements of a head in a block
    constexpr int PIECES = HEAD / 8;
    size_t block[BLOCKS];
    bool is_read[BLOCKS];
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        int index = chunk * BLOCKS + i;
        is_read[i] = index * BLOCK_POSITIONS < end;
        block[i] = is_read[i] ? args.tables[table + index] : 0;
    }
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        size_t at = (block[i] * args.n_kv_heads + kv_head) * HEAD;
        for (int piece = threadIdx.x; piece < 2 * PIECES; piece += n_threads) {
            bool is_key = piece < PIECES;
            int in_head = (is_key ? piece : piece - PIECES) * 8;
            const uint16_t *from = (is_key ? args.keys : args.values) + at + in_head;
            copy_async(to + (is_key ? 0 : BLOCKS * HEAD) + i * HEAD + in_head, from, is_read[i]);
        }
    }
}
template <int HD> constexpr int CHUNK_ELEMENTS = 2 * CHUNK * HD;

// Softmax so far: the largest score m (in powers of 2), the sum l of 2^(score - m), and the values o weighted alike.
template <int HD> struct Softmax {
    float m[2], l[2];
    float o[HD / 8][4];

    DEVICE void clear() {
        for (int r = 0; r < 2; r++) m[r] = NONE, l[r] = 0;
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
            for (int i = 0; i < 4; i++) o[n][i] = 0;
        }
    }
};

// score = q * key, for 16 rows and 64 keys.
template <int HD> DEVICE void multiply_keys(float (&score)[CHUNK / 8][4], const uint4 *queries, const uint16_t *keys) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) score[n][i] = 0;
    }
#pragma unroll
    for (int step = 0; step < HD / 32; step++) {
        uint4 low = queries[64 * step + lane], high = queries[64 * step + 32 + lane];
        const uint32_t a[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
        for (int n = 0; n < CHUNK / 8; n++) {
            uint4 key = *(const uint4 *)(keys + n * 8 * HD + step * 256 + lane * 8);
            mma_half(score[n], a[0], key.x, key.y);
            mma_half(score[n], a[1], key.z, key.w);
        }
    }
}

DEVICE void mask(float (&score)[CHUNK / 8][4], const Sight &sight, int first_key) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int key = first_key + 8 * n + 2 * t + i % 2;
            if (key < sight.lowest[i / 2] || key > sight.own[i / 2]) score[n][i] = NONE;
        }
    }
}

// The largest score of row r in the chunk.
DEVICE float largest(const float (&score)[CHUNK / 8][4], int r) {
    float most = NONE;
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++) most = fmaxf(most, fmaxf(score[n][2 * r], score[n][2 * r + 1]));
    most = fmaxf(most, shuffle_xor(most, 1));
    return fmaxf(most, shuffle_xor(most, 2));
}

// The largest score so far, and by what older sums shrink, when a chunk comes whose largest is `most`. Without any key so far
// it is -inf, and all weights are 2^-inf.
struct Step {
    float m, base, fade;
};
DEVICE Step step_of(float m, float most) {
    float next = fmaxf(m, most), base = next == NONE ? 0 : next;
    return {next, base, exp2_fast(m - base)};
}

// Makes weights of the scores of row r in a chunk and returns their sum, apart for each lane.
DEVICE float weights_of(float (&score)[CHUNK / 8][4], float factor, float base, int r) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; i++) {
            score[n][i] = exp2_fast(fmaf(score[n][i], factor, -base));
            sum = __fadd_rn(sum, score[n][i]);
        }
    }
    return sum;
}

// Makes weights of the scores of row r and updates m and l; l stays apart for each lane until `close`.
template <int HD> DEVICE void weigh(Softmax<HD> &softmax, float (&score)[CHUNK / 8][4], float factor, int r) {
    Step step = step_of(softmax.m[r], __fmul_rn(largest(score, r), factor));
    float sum = weights_of(score, factor, step.base, r);
    softmax.m[r] = step.m;
    softmax.l[r] = fmaf(softmax.l[r], step.fade, sum);
#pragma unroll
    for (int n = 0; n < HD / 8; n++) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; i++) softmax.o[n][i] = __fmul_rn(softmax.o[n][i], step.fade);
    }
}

// Operand A of the second product for the keys of a block of the chunk.
DEVICE void pack_weights(uint32_t (&a)[4], const float (&weight)[CHUNK / 8][4], int block) {
    const float(&low)[4] = weight[2 * block], (&high)[4] = weight[2 * block + 1];
    a[0] = pack_half(low[0], low[1]), a[1] = pack_half(low[2], low[3]);
    a[2] = pack_half(high[0], high[1]), a[3] = pack_half(high[2], high[3]);
}

// o += weight * value
template <int HD>
DEVICE void multiply_values(Softmax<HD> &softmax, const float (&weight)[CHUNK / 8][4], const uint16_t *values) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        uint32_t a[4];
        pack_weights(a, weight, block);
#pragma unroll
        for (int n = 0; n < HD / 16; n++) {
            uint4 value = *(const uint4 *)(values + block * BLOCK_POSITIONS * HD + n * 256 + lane * 8);
            mma_half(softmax.o[2 * n], a, value.x, value.y);
            mma_half(softmax.o[2 * n + 1], a, value.z, value.w);
        }
    }
}

// The warp's rows see the chunk that lies at `kv`; all of them see the positions `all`.
template <int HD>
DEVICE void attend(Softmax<HD> &softmax, const uint4 *queries, const uint16_t *kv, const Sight &sight, Range all,
                   int first_key, float factor) {
    float score[CHUNK / 8][4];
    multiply_keys<HD>(score, queries, kv);
    if (first_key < all.first || first_key + CHUNK > all.end) mask(score, sight, first_key);
#pragma unroll
    for (int r = 0; r < 2; r++) weigh(softmax, score, factor, r);
    multiply_values(softmax, score, kv + CHUNK * HD);
}

// Ends a split: l of all lanes, no negative zeros.
template <int HD> DEVICE void close(Softmax<HD> &softmax) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        softmax.l[r] = __fadd_rn(softmax.l[r], shuffle_xor(softmax.l[r], 1));
        softmax.l[r] = __fadd_rn(softmax.l[r], shuffle_xor(softmax.l[r], 2));
    }
#pragma unroll
    for (int n = 0; n < HD / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) softmax.o[n][i] = __fadd_rn(softmax.o[n][i], 0.0f);
    }
}

// Merging the next split into the total: o = o * total + o_split * split. A split without keys must not come here.
struct Shares {
    float total, split;
};
DEVICE Shares merge_sums(float &m, float &l, float m_split, float l_split) {
    float most = fmaxf(m, m_split);
    Shares shares = {exp2_fast(m - most), exp2_fast(m_split - most)};
    m = most;
    l = fmaf(l, shares.total, __fmul_rn(l_split, shares.split));
    return shares;
}
DEVICE float merge_value(float total, float split, Shares shares) {
    return fmaf(total, shares.total, __fmul_rn(split, shares.split));
}

// Writes two neighbouring dimensions of a head, divided by l.
DEVICE void write_pair(const AttendArgs &args, size_t row, int column, float first, float second, float one_by_l) {
    size_t at = operand_b_index((int)row, column, (int)args.k_padded);
    *(uint32_t *)(args.out + at) = pack_bf16(__fmul_rn(first, one_by_l), __fmul_rn(second, one_by_l));
}
// Zeros in the columns behind the last head, by `n` threads of which this is number `i`.
DEVICE void write_padding(const AttendArgs &args, size_t row, int first_column, int i, int n) {
    for (int k = first_column + 2 * i; k < (int)args.k_padded; k += 2 * n) write_pair(args, row, k, 0, 0, 0);
}

}  // namespace attention
