// Attention of few rows, from the product of the query, key and value matrices to the result: a block for each split, a warp of
// it for each chunk of keys. What must be in the order of keys is done by every warp for its share of the dimensions. The block
// that ends a row's last split merges them.
#pragma once
#include "attention.cuh"
#include "turn.cuh"

namespace attention {

constexpr int SPLIT_WARPS = SPLIT / CHUNK;
constexpr int SPLIT_THREADS = 32 * SPLIT_WARPS;

// Keys of the batch that pass from thread to thread; if a split has more, they take the way through the cache.
constexpr int STAGED_KEYS = BLOCK_POSITIONS;

template <int HD> struct SplitShared {
    uint4 weights[SPLIT_WARPS][BLOCKS][32];  // of each chunk: operand A of the second product
    float2 sums[SPLIT_WARPS][32];            // of each chunk and lane: sums of weights, of rows g and g + 8
    float most[SPLIT_WARPS][ROWS];           // of each chunk: the largest score of each row
    uint32_t n_done[4];
    uint32_t queries[HD / 16][32][4];        // operand A of the first product
    uint16_t new_keys[STAGED_KEYS * HD];     // like a block of the cache
    uint16_t values[SPLIT_WARPS][CHUNK * HD];
};

// What a block works on.
struct Split {
    Rows rows;
    Range seen;         // by any of the rows
    int first_key, end_key;  // of the whole split
    int first_chunk, end_chunk;
    bool is_there;

    DEVICE Split(const AttendArgs &args, uint32_t place, uint32_t kv_head, int split) {
        uint32_t tile = place / args.parts;
        is_there = false;
        if (tile >= *args.n_tiles) return;
        rows = rows_of(args, tile, place % args.parts, kv_head, ROWS);
        if (rows.first >= rows.n_rows) return;
        seen = seen_by(args, rows, rows.first, rows.n_rows);
        first_key = split * SPLIT, end_key = first_key + SPLIT;
        int first = max(first_key, seen.first), end = min(end_key, seen.end);
        first_chunk = first / CHUNK, end_chunk = (end + CHUNK - 1) / CHUNK;
        is_there = first < end;
    }
    // Of 16 rows the upper half may be empty, and nobody reads what becomes of it.
    DEVICE int n_halves() const { return rows.n_rows - rows.first > 8 ? 2 : 1; }
    // Splits that some of the rows see.
    DEVICE int n_splits() const { return (seen.end - 1) / SPLIT - seen.first / SPLIT + 1; }
    // The row of the batch that has a position, if one of this sequence has it.
    DEVICE int row_at(int position) const {
        return (int)(rows.tile.first_row + rows.tile.n_tokens) - 1 - (int)rows.tile.last_position + position;
    }
    // Positions of the split that this batch brings: the first, one past the last.
    DEVICE Range brought() const {
        int first_new = (int)rows.tile.first_new_row - row_at(0);
        return {max(first_key, first_new), min(end_key, (int)rows.tile.last_position + 1)};
    }
};

// Blocks of the cache in a warp's chunk.
struct ChunkBlocks {
    size_t at[BLOCKS];  // in keys and in values
    bool is_read[BLOCKS];

    DEVICE ChunkBlocks(const AttendArgs &args, const Split &split, uint32_t kv_head, int chunk, int head_elements) {
        bool is_there = chunk >= split.first_chunk && chunk < split.end_chunk;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            int index = chunk * BLOCKS + i;
            is_read[i] = is_there && index * BLOCK_POSITIONS < split.seen.end;
            size_t block = is_read[i] ? args.tables[split.rows.tile.table + index] : 0;
            at[i] = (block * args.n_kv_heads + kv_head) * head_elements;
        }
    }
    // Only the blocks that hold positions from `first_new` on: they are read again.
    DEVICE ChunkBlocks from(int first_new, int chunk) const {
        ChunkBlocks again = *this;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) again.is_read[i] &= (chunk * BLOCKS + i + 1) * BLOCK_POSITIONS > first_new;
        return again;
    }
};

// The keys of a warp's chunk, as operand B.
template <int HD> struct ChunkKeys {
    uint4 of[CHUNK / 8][HD / 32];

    DEVICE void clear() {
#pragma unroll
        for (int n = 0; n < CHUNK / 8; n++) {
#pragma unroll
            for (int step = 0; step < HD / 32; step++) of[n][step] = make_uint4(0, 0, 0, 0);
        }
    }
    // Blocks that are not read stay as they are.
    DEVICE void load(const uint16_t *keys, const ChunkBlocks &blocks, int lane) {
#pragma unroll
        for (int n = 0; n < CHUNK / 8; n++) {
            const uint16_t *from = keys + blocks.at[n / 2] + n % 2 * 8 * HD + lane * 8;
            if (!blocks.is_read[n / 2]) continue;
#pragma unroll
            for (int step = 0; step < HD / 32; step++) of[n][step] = *(const uint4 *)(from + step * 256);
        }
    }
    // Takes the staged keys of the positions that the batch brought.
    DEVICE void replace(const uint16_t (&staged)[STAGED_KEYS * HD], Range brought, int chunk, int lane) {
        if (chunk * CHUNK >= brought.end || (chunk + 1) * CHUNK <= brought.first) return;
#pragma unroll
        for (int n = 0; n < CHUNK / 8; n++) {
            int position = chunk * CHUNK + n * 8 + lane / 4;
            if (position < brought.first || position >= brought.end) continue;
            const uint16_t *key = staged + key_index(position - brought.first, lane % 4 * 2, HD);
#pragma unroll
            for (int step = 0; step < HD / 32; step++) of[n][step] = *(const uint4 *)(key + step * 256);
        }
    }
    DEVICE void multiply(float (&score)[CHUNK / 8][4], const uint32_t (&queries)[HD / 16][32][4], int lane) const {
#pragma unroll
        for (int n = 0; n < CHUNK / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) score[n][i] = 0;
        }
#pragma unroll
        for (int step = 0; step < HD / 32; step++) {
            uint4 low = *(const uint4 *)queries[2 * step][lane], high = *(const uint4 *)queries[2 * step + 1][lane];
            const uint32_t a[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
            for (int n = 0; n < CHUNK / 8; n++) {
                uint4 key = of[n][step];
                mma_half(score[n], a[0], key.x, key.y);
                mma_half(score[n], a[1], key.z, key.w);
            }
        }
    }
};

// Starts to copy the values of a warp's chunk; blocks that are not read stay as they are.
template <int HD> DEVICE void copy_values(const uint16_t *values, const ChunkBlocks &blocks, uint16_t *to, int lane) {
    constexpr int HEAD = BLOCK_POSITIONS * HD;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        if (!blocks.is_read[i]) continue;
#pragma unroll
        for (int element = 0; element < HEAD; element += 256) {
            int at = element + lane * 8;
            copy_async(to + i * HEAD + at, values + blocks.at[i] + at, true);
        }
    }
    copy_commit();
}
// Zeros for the values of blocks that are not read: their weights are zero, but nothing else may stand there.
template <int HD> DEVICE void clear_values(const ChunkBlocks &blocks, uint16_t *to, int lane) {
    for (int i = 0; i < BLOCKS; i++) {
        if (blocks.is_read[i]) continue;
        for (int at = lane * 8; at < BLOCK_POSITIONS * HD; at += 256) {
            *(uint4 *)(to + i * BLOCK_POSITIONS * HD + at) = make_uint4(0, 0, 0, 0);
        }
    }
}

// Pairs of 8 dimensions that a warp has at the end: warp, warp + SPLIT_WARPS, ...
template <int HD> constexpr int SPLIT_PAIRS = (HD / 16 + SPLIT_WARPS - 1) / SPLIT_WARPS;
template <int HD> struct SplitSoftmax {
    float m[2], l[2];
    float o[SPLIT_PAIRS<HD>][2][4];
};

// Goes through the chunks in order, for the warp's dimensions.
template <int HD>
DEVICE void sum_chunks(SplitSoftmax<HD> &softmax, const SplitShared<HD> &shared, const Split &split, int warp, int lane) {
    const int g = lane / 4;
    for (int r = 0; r < 2; r++) softmax.m[r] = NONE, softmax.l[r] = 0;
#pragma unroll
    for (int pair = 0; pair < SPLIT_PAIRS<HD>; pair++) {
#pragma unroll
        for (int i = 0; i < 8; i++) softmax.o[pair][i / 4][i % 4] = 0;
    }
    const int first = split.first_chunk % SPLIT_WARPS, n_halves = split.n_halves();
#pragma unroll 1
    for (int c = first; c < first + split.end_chunk - split.first_chunk; c++) {
        const float2 sums = shared.sums[c][lane];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (r == n_halves) break;
            Step step = step_of(softmax.m[r], shared.most[c][g + 8 * r]);
            softmax.m[r] = step.m;
            softmax.l[r] = fmaf(softmax.l[r], step.fade, r ? sums.y : sums.x);
#pragma unroll
            for (int pair = 0; pair < SPLIT_PAIRS<HD>; pair++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float &o = softmax.o[pair][i / 2][2 * r + i % 2];
                    o = __fmul_rn(o, step.fade);
                }
            }
        }
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
            const uint4 weights = shared.weights[c][block][lane];
            const uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
            for (int pair = 0; pair < SPLIT_PAIRS<HD>; pair++) {
                int n = warp + pair * SPLIT_WARPS;
                if (n >= HD / 16) break;
                uint4 value = *(const uint4 *)(shared.values[c] + block * BLOCK_POSITIONS * HD + n * 256 + lane * 8);
                mma_half(softmax.o[pair][0], a, value.x, value.y);
                mma_half(softmax.o[pair][1], a, value.z, value.w);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        softmax.l[r] = __fadd_rn(softmax.l[r], shuffle_xor(softmax.l[r], 1));
        softmax.l[r] = __fadd_rn(softmax.l[r], shuffle_xor(softmax.l[r], 2));
    }
}

// Writes the warp's dimensions: the result when there is but one split, as its merge with nothing is itself; else a part of it.
template <int HD>
DEVICE void write_split(const AttendArgs &args, const Split &split, const SplitSoftmax<HD> &softmax, int warp, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = split.rows.first + g + 8 * r;
        if (row >= split.rows.n_rows) continue;
        const size_t global_row = split.rows.global_row(row);
        const int head = split.rows.head(row);
        const bool is_whole = split.n_splits() == 1;
        const size_t at = (global_row * args.n_heads + head) * args.n_splits + blockIdx.z;
        const float one_by_l = __fdiv_rn(1.0f, softmax.l[r]);
        if (!is_whole && warp == 0 && t == 0) args.partial_sums[at] = make_float2(softmax.m[r], softmax.l[r]);
#pragma unroll
        for (int i = 0; i < 2 * SPLIT_PAIRS<HD>; i++) {
            int n = warp + i / 2 * SPLIT_WARPS, dim = 16 * n + i % 2 * 8 + 2 * t;
            if (n >= HD / 16) break;
            const float(&o)[4] = softmax.o[i / 2][i % 2];
            // No negative zeros.
            float2 pair = make_float2(__fadd_rn(o[2 * r], 0.0f), __fadd_rn(o[2 * r + 1], 0.0f));
            if (is_whole) write_pair(args, global_row, head * HD + dim, pair.x, pair.y, one_by_l);
            else *(float2 *)(args.partial + at * HD + dim) = pair;
        }
        if (is_whole && warp == 0 && head + 1 == (int)args.n_heads) write_padding(args, global_row, args.n_heads * HD, t, 4);
    }
}

// Merges the splits of the block's rows in order, a thread for four dimensions of a row.
template <int HD> DEVICE void merge(const AttendArgs &args, const Rows &rows) {
    constexpr int QUADS = HD / 4;
    for (int i = threadIdx.x; i < (rows.n_rows - rows.first) * QUADS; i += SPLIT_THREADS) {
        int row = rows.first + i / QUADS, quad = i % QUADS, head = rows.head(row), position = rows.position(row);
        size_t global_row = rows.global_row(row), at = (global_row * args.n_heads + head) * args.n_splits;
        int first = args.window ? max(0, position - (int)args.window + 1) : 0;
        float m = NONE, l = 0;
        float4 o = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int split = first / SPLIT; split <= position / SPLIT; split++) {
            float2 sums = load_shared_by_blocks(args.partial_sums + at + split);
            float4 next = load_shared_by_blocks((const float4 *)(args.partial + (at + split) * HD) + quad);
            if (sums.x == NONE) continue;
            Shares shares = merge_sums(m, l, sums.x, sums.y);
            o = make_float4(merge_value(o.x, next.x, shares), merge_value(o.y, next.y, shares),
                            merge_value(o.z, next.z, shares), merge_value(o.w, next.w, shares));
        }
        float one_by_l = __fdiv_rn(1.0f, l);
        write_pair(args, global_row, head * HD + 4 * quad, o.x, o.y, one_by_l);
        write_pair(args, global_row, head * HD + 4 * quad + 2, o.z, o.w, one_by_l);
        if (head + 1 == (int)args.n_heads) write_padding(args, global_row, args.n_heads * HD, quad, QUADS);
    }
}

// Elements i, i + 1 and i + HD / 2, i + 1 + HD / 2 of a head, and their angles.
template <int HD> struct Quad {
    float2 a, b;
    float4 rotation;

    DEVICE void load_angles(const AttendArgs &args, int position, int i) {
        rotation = *(const float4 *)(args.rotations + (size_t)position * (HD / 2) + i);
    }
    DEVICE void load(const AttendArgs &args, size_t row, uint32_t head, int i) {
        const float *from = args.qkv + (row * (args.n_heads + 2 * args.n_kv_heads) + head) * HD + i;
        a = *(const float2 *)from, b = *(const float2 *)(from + HD / 2);
    }
    DEVICE rope::Turned turned() const { return rope::turn(a, b, rotation); }
};
template <int HD> constexpr int QUADS = HD / 4;

// Turns the queries of the block's rows. A thread knows its angles before it waits.
template <int HD> struct QueryTurner {
    static constexpr int N = ROWS * QUADS<HD> / SPLIT_THREADS;
    Quad<HD> quad[N];

    DEVICE static int item(int n) { return n * SPLIT_THREADS + (int)threadIdx.x; }
    DEVICE static int row(const Rows &rows, int n) { return rows.first + item(n) / QUADS<HD>; }
    DEVICE void load_angles(const AttendArgs &args, const Rows &rows) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (row(rows, n) < rows.n_rows) quad[n].load_angles(args, rows.position(row(rows, n)), item(n) % QUADS<HD> * 2);
        }
    }
    DEVICE void load(const AttendArgs &args, const Rows &rows) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            int at = row(rows, n);
            if (at < rows.n_rows) quad[n].load(args, rows.global_row(at), (uint32_t)rows.head(at), item(n) % QUADS<HD> * 2);
        }
    }
    DEVICE void store(const Rows &rows, uint32_t (&queries)[HD / 16][32][4]) const {
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (row(rows, n) >= rows.n_rows) break;
            int place = item(n) / QUADS<HD>, i = item(n) % QUADS<HD> * 2;
            int lane = place % 8 * 4 + i % 8 / 2, of_lane = place / 8 + i % 16 / 8 * 2;
            rope::Turned turned = quad[n].turned();
            queries[i / 16][lane][of_lane] = turned.low;
            queries[i / 16 + HD / 32][lane][of_lane] = turned.high;
        }
    }
};

// Turns and stores the keys and values of the positions that the batch brings to the split, a thread for a quad of a key or a
// value; every block that needs them does it. It knows the place and the angles of its first quad before it waits.
template <int HD> struct NewKeys {
    static constexpr int OF_POSITION = 2 * QUADS<HD>;
    Range brought;
    Quad<HD> quad;
    size_t at;

    DEVICE int n_items() const { return (brought.end - brought.first) * OF_POSITION; }
    DEVICE bool are_staged() const { return brought.end - brought.first <= STAGED_KEYS; }
    DEVICE static int i_of(int item) { return item % QUADS<HD> * 2; }
    DEVICE static bool is_key(int item) { return item / QUADS<HD> % 2 == 0; }

    DEVICE void prepare(const AttendArgs &args, const Split &split, uint32_t kv_head, int item) {
        if (item >= n_items()) return;
        int position = brought.first + item / OF_POSITION;
        size_t block = args.tables[split.rows.tile.table + position / BLOCK_POSITIONS];
        at = (block * args.n_kv_heads + kv_head) * BLOCK_POSITIONS * HD;
        if (is_key(item)) quad.load_angles(args, position, i_of(item));
    }
    DEVICE void load(const AttendArgs &args, const Split &split, uint32_t kv_head, int item) {
        if (item >= n_items()) return;
        uint32_t head = args.n_heads + (is_key(item) ? 0 : args.n_kv_heads) + kv_head;
        quad.load(args, (size_t)split.row_at(brought.first + item / OF_POSITION), head, i_of(item));
    }
    DEVICE void store(const AttendArgs &args, SplitShared<HD> &shared, int item) const {
        if (item >= n_items()) return;
        const int position = brought.first + item / OF_POSITION, i = i_of(item), slot = position % BLOCK_POSITIONS;
        if (is_key(item)) {
            rope::Turned turned = quad.turned();
            rope::store_key(args.keys + at, slot, i, HD / 2, turned);
            if (are_staged()) rope::store_key(shared.new_keys, position - brought.first, i, HD / 2, turned);
        } else {
            rope::store_value(args.values + at, slot, i, HD / 2, quad.a, quad.b);
            uint16_t *block = shared.values[position % SPLIT / CHUNK] + position % CHUNK / BLOCK_POSITIONS * BLOCK_POSITIONS * HD;
            if (are_staged()) rope::store_value(block, slot, i, HD / 2, quad.a, quad.b);
        }
    }
};

// What a warp has of a chunk before and after the kernels before have ended.
template <int HD>
DEVICE void load_chunk(const AttendArgs &args, const Split &split, uint32_t kv_head, ChunkKeys<HD> &keys, SplitShared<HD> &shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunk = split.first_key / CHUNK + warp;
    const ChunkBlocks blocks(args, split, kv_head, chunk, BLOCK_POSITIONS * HD);
    QueryTurner<HD> queries;
    NewKeys<HD> fresh;
    fresh.brought = split.brought();
    queries.load_angles(args, split.rows);
    fresh.prepare(args, split, kv_head, threadIdx.x);
    keys.clear();
    keys.load(args.keys, blocks, lane);
    clear_values<HD>(blocks, shared.values[warp], lane);
    copy_values<HD>(args.values, blocks, shared.values[warp], lane);
    copy_wait<0>();
    sync_block();

    grid_wait();
    queries.load(args, split.rows);
    fresh.load(args, split, kv_head, threadIdx.x);
    queries.store(split.rows, shared.queries);
    fresh.store(args, shared, threadIdx.x);
    for (int item = threadIdx.x + SPLIT_THREADS; item < fresh.n_items(); item += SPLIT_THREADS) {
        fresh.prepare(args, split, kv_head, item);
        fresh.load(args, split, kv_head, item);
        fresh.store(args, shared, item);
    }
    sync_block();
    if (fresh.are_staged()) {
        keys.replace(shared.new_keys, fresh.brought, chunk, lane);
    } else {
        const ChunkBlocks again = blocks.from(fresh.brought.first, chunk);
        keys.load(args.keys, again, lane);
        copy_values<HD>(args.values, again, shared.values[warp], lane);
    }
}

// Makes the weights of a warp's chunk, for all warps.
template <int HD> DEVICE void weigh_chunk(const AttendArgs &args, const Split &split, const ChunkKeys<HD> &keys, SplitShared<HD> &shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, n_halves = split.n_halves();
    const int first_key = split.first_key + warp * CHUNK, first_chunk = split.first_chunk % SPLIT_WARPS;
    float score[CHUNK / 8][4];
    keys.multiply(score, shared.queries, lane);
    const Range all = seen_by_all(args, split.rows, split.rows.first, split.rows.n_rows);
    if (first_key < all.first || first_key + CHUNK > all.end) mask(score, sight_of(args, split.rows, split.rows.first), first_key);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (r == n_halves) break;
        float most = __fmul_rn(largest(score, r), args.factor);
        if (lane % 4 == 0) shared.most[warp][g + 8 * r] = most;
    }
    sync_block();
    float sums[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (r == n_halves) break;
        float m = NONE;
        for (int c = first_chunk; c <= warp; c++) m = fmaxf(m, shared.most[c][g + 8 * r]);
        sums[r] = weights_of(score, args.factor, m == NONE ? 0 : m, r);
    }
    shared.sums[warp][lane] = make_float2(sums[0], sums[1]);
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        uint32_t a[4];
        pack_weights(a, score, block);
        shared.weights[warp][block][lane] = make_uint4(a[0], a[1], a[2], a[3]);
    }
}

// Grid: (tiles * parts, KV heads, splits), for up to 16 rows each.
template <int HD> DEVICE void split(const AttendArgs &args) {
    const uint32_t kv_head = blockIdx.y;
    const Split split(args, blockIdx.x, kv_head, (int)blockIdx.z);
    if (!split.is_there) return grid_wait();
    SHARED(SplitShared<HD>, shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    ChunkKeys<HD> keys;
    load_chunk(args, split, kv_head, keys, *shared);
    weigh_chunk(args, split, keys, *shared);
    copy_wait<0>();
    sync_block();
    SplitSoftmax<HD> softmax;
    sum_chunks(softmax, *shared, split, warp, lane);
    write_split(args, split, softmax, warp, lane);
    if (split.n_splits() == 1) return;
    uint32_t *n_done = args.n_done + blockIdx.x * args.n_kv_heads + kv_head;
    if (is_last_block(n_done, (uint32_t)split.n_splits(), shared->n_done)) merge<HD>(args, split.rows);
}

}  // namespace attention
