// The twin of kernels/ptx.cuh for a plain C++20 compiler: the kernels, unchanged, run on a CPU. Each thread of a block is
// a fiber; where CUDA threads meet (a barrier, a shuffle, a matrix instruction) fibers wait for each other. Nothing here
// is fast for its own sake; it is strict: what a GPU leaves undefined is an error or shows as NaN.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <source_location>
#include <type_traits>

namespace emulator {

using Where = std::source_location;

struct Dimensions {
    uint32_t x, y, z;
};
// Where in the launch a thread is.
struct Position {
    Dimensions thread, block, threads, blocks;
};
// The thread that runs now.
extern constinit thread_local Position *here __attribute__((tls_model("initial-exec")));

using Body = void (*)(const void *args);
struct Registration {
    Registration(const char *name, size_t args_bytes, uint32_t max_threads, Body body);
};

unsigned char *shared_memory();
void meet_in_block(Where where);
void meet_in_warp(Where where);
uint32_t shuffle(uint32_t x, int mask, Where where);
enum class Format { bf16, half };
void multiply(Format format, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where);
uint32_t transposed(uint32_t x, Where where);
void begin_copy(void *shared, const void *global, bool valid, Where where);
void commit_copies();
void finish_copies(int n_under_way);

// Of sm_90a, see kernels/hopper.cuh.
struct Barrier {
    uint8_t mark, phase, n_arrivals, pending;
    int32_t bytes;
};
void set_barrier(Barrier *barrier, uint32_t n_arrivals, Where where);
void arrive_at(Barrier *barrier, uint32_t n_bytes, Where where);
void await_phase(Barrier *barrier, uint32_t parity, Where where);
// Tiles in memory; `tests/support/emulated.rs` makes it.
struct alignas(64) TileMap {
    const unsigned char *first;
    uint64_t tile_bytes;
    uint32_t n_tiles, n_pieces, box_tiles, box_pieces, piece_bytes;
    uint32_t unused[23];
};
void begin_tile_copy(void *shared, const TileMap &map, int piece, int tile, Barrier *barrier, Where where);
void arrive_with_copies(Barrier *barrier, Where where);
int shared_size();
void begin_bulk_copy(void *shared, const void *global, uint32_t n_bytes, Barrier *barrier, Where where);
uint64_t operand_at(const void *shared, int along_columns, int along_rows);
void begin_product(float (*d)[4], int n_tiles, uint64_t a, uint64_t b);
void begin_product(float (*d)[4], int n_tiles, const uint32_t (&a)[4], uint64_t b, bool add, Where where);
void meet_of(uint32_t n_threads, Where where);
void commit_products();
void finish_products(int n_under_way);

}  // namespace emulator

#define HOST_DEVICE
#define DEVICE inline
#define threadIdx (emulator::here->thread)
#define blockIdx (emulator::here->block)
#define blockDim (emulator::here->threads)
#define gridDim (emulator::here->blocks)

// Kernels follow each other here: there is nothing to wait for.
#define KERNEL_AHEAD(name, Args, threads, blocks) KERNEL(name, Args, threads, blocks)
#define KERNEL(name, Args, threads, blocks)                                                   \
    static void name(const Args &args);                                                       \
    static_assert(std::is_trivially_copyable_v<Args>, "arguments are copied as bytes");       \
    static const emulator::Registration name##_registration{                                  \
        #name, sizeof(Args), threads, [](const void *args) { name(*(const Args *)args); }};   \
    static void name(const Args &args)
#define SHARED(type, name) type *name = reinterpret_cast<type *>(emulator::shared_memory())

inline void grid_wait() {}
inline void grid_release() {}

// What CUDA has beyond C++.
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) {
    using Both = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<Both>) return fmin((Both)a, (Both)b);
    return (Both)b < (Both)a ? (Both)b : (Both)a;
}
template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) {
    using Both = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<Both>) return fmax((Both)a, (Both)b);
    return (Both)a < (Both)b ? (Both)b : (Both)a;
}

// The build contracts no a * b + c, so plain operators round each result.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float __int_as_float(int bits) { return __uint_as_float((uint32_t)bits); }

// bfloat16 and IEEE half, as bits; rounded to nearest even. NaN is 0x7fff, as from PTX's cvt.
DEVICE uint16_t float_to_bf16(float x) {
    uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }
DEVICE uint16_t float_to_half(float x) {
    uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    // 65520 is half way between the greatest number and the next one there would be.
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 puts the last bit that a half has at the last bit of a float.
        uint32_t sum = __float_as_uint(__uint_as_float(magnitude) + 0.5f);
        return (uint16_t)(sign | (sum - 0x3f000000u));
    }
    return (uint16_t)(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13));
}
DEVICE float half_to_float(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Scaling by 2^112 moves the exponent's bias and is exact for subnormal numbers too.
    float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;
    return __uint_as_float(sign | __float_as_uint(scaled));
}
DEVICE uint32_t pack_bf16(float low, float high) {
    return (uint32_t)float_to_bf16(low) | (uint32_t)float_to_bf16(high) << 16;
}
DEVICE uint32_t pack_half(float low, float high) {
    return (uint32_t)float_to_half(low) | (uint32_t)float_to_half(high) << 16;
}
DEVICE uint32_t subtract_bf16(uint32_t a, uint32_t b) {
    return pack_bf16(bf16_to_float((uint16_t)a) - bf16_to_float((uint16_t)b),
                     bf16_to_float((uint16_t)(a >> 16)) - bf16_to_float((uint16_t)(b >> 16)));
}

DEVICE uint32_t multiply_add_bf16(uint32_t a, uint32_t b, uint32_t c) {
    auto number = [](uint32_t pair, int half) { return (double)bf16_to_float((uint16_t)(pair >> (16 * half))); };
    float d[2];
    for (int half = 0; half < 2; half++) d[half] = (float)(number(a, half) * number(b, half) + number(c, half));
    return pack_bf16(d[0], d[1]);
}
DEVICE uint32_t multiply_bf16(uint32_t a, uint32_t b) { return multiply_add_bf16(a, b, 0x80008000u); }
DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t which) {
    uint64_t both = (uint64_t)high << 32 | low;
    uint32_t picked = 0;
    for (int i = 0; i < 4; i++) picked |= (uint32_t)(both >> (which >> (4 * i) & 7) * 8 & 255) << (8 * i);
    return picked;
}

DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1,
                     emulator::Where where = emulator::Where::current()) {
    emulator::multiply(emulator::Format::bf16, c, a, b0, b1, where);
}
DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1,
                     emulator::Where where = emulator::Where::current()) {
    emulator::multiply(emulator::Format::half, c, a, b0, b1, where);
}

DEVICE void load_matrices(uint32_t (&r)[4], const uint8_t *first, int along_a, int along_b, int lane, int last_row = 7,
                          emulator::Where where = emulator::Where::current()) {
    // Lanes hand out what others asked for: all must be there.
    emulator::meet_in_warp(where);
    for (int i = 0; i < 4; i++) {
        memcpy(&r[i], first + i % 2 * along_a + i / 2 * along_b + (lane / 4 & last_row) * 16 + lane % 4 * 4, 4);
    }
}

DEVICE uint32_t transpose(uint32_t x, emulator::Where where = emulator::Where::current()) {
    return emulator::transposed(x, where);
}

inline const uint8_t *kept_in_register(const uint8_t *address) { return address; }
template <int n> DEVICE void load_once(uint32_t *to, const uint8_t *global) { memcpy(to, global, 4 * n); }

DEVICE void copy_async(void *shared, const void *global, bool valid,
                       emulator::Where where = emulator::Where::current()) {
    emulator::begin_copy(shared, global, valid, where);
}
DEVICE void copy_commit() { emulator::commit_copies(); }
template <int n> DEVICE void copy_wait() { emulator::finish_copies(n); }

DEVICE float4 load_shared_by_blocks(const float4 *global) { return *global; }
DEVICE float2 load_shared_by_blocks(const float2 *global) { return *global; }
DEVICE bool is_last_block(uint32_t *count, uint32_t n_blocks, uint32_t *shared,
                          emulator::Where where = emulator::Where::current()) {
    emulator::meet_in_block(where);
    if (threadIdx.x == 0) {
        // Blocks of a launch run on several threads.
        *shared = __atomic_fetch_add(count, 1u, __ATOMIC_SEQ_CST);
        if (*shared + 1 == n_blocks) __atomic_store_n(count, 0u, __ATOMIC_SEQ_CST);
    }
    emulator::meet_in_block(where);
    return *shared + 1 == n_blocks;
}
DEVICE int shared_size() { return emulator::shared_size(); }

DEVICE void set_barriers(uint64_t *barriers, int n, int n_arrivals, int lane,
                         emulator::Where where = emulator::Where::current()) {
    for (int i = lane; i < n; i += 32) {
        emulator::set_barrier((emulator::Barrier *)(barriers + i), (uint32_t)n_arrivals, where);
    }
}
DEVICE void arrive(uint64_t *barrier, emulator::Where where = emulator::Where::current()) {
    emulator::arrive_at((emulator::Barrier *)barrier, 0, where);
}
DEVICE void copy_range(void *shared, const void *global, int n_bytes, uint64_t *barrier, int lane,
                       emulator::Where where = emulator::Where::current()) {
    if (lane > 0) return;
    emulator::begin_bulk_copy(shared, global, (uint32_t)n_bytes, (emulator::Barrier *)barrier, where);
}
DEVICE void arrive_with_copies(uint64_t *barrier, emulator::Where where = emulator::Where::current()) {
    emulator::arrive_with_copies((emulator::Barrier *)barrier, where);
}
DEVICE void await(uint64_t *barrier, int parity, emulator::Where where = emulator::Where::current()) {
    emulator::await_phase((emulator::Barrier *)barrier, (uint32_t)parity, where);
}

// 2^x; subnormal numbers count as zero.
DEVICE float exp2_fast(float x) {
    float y = exp2f(x);
    return fabsf(y) < 0x1p-126f ? 0.0f : y;
}
DEVICE float reciprocal_fast(float x) { return 1.0f / x; }
DEVICE uint32_t shuffle_xor(uint32_t x, int mask, emulator::Where where = emulator::Where::current()) {
    return emulator::shuffle(x, mask, where);
}
DEVICE float shuffle_xor(float x, int mask, emulator::Where where = emulator::Where::current()) {
    return __uint_as_float(emulator::shuffle(__float_as_uint(x), mask, where));
}
// Blocks run on several threads.
DEVICE uint32_t fetch_add(uint32_t *number, uint32_t x) { return __atomic_fetch_add(number, x, __ATOMIC_SEQ_CST); }
DEVICE void store_for_others(float *global, float x) { __atomic_store(global, &x, __ATOMIC_RELAXED); }
DEVICE float load_of_others(const float *global) {
    float x;
    __atomic_load(global, &x, __ATOMIC_RELAXED);
    return x;
}
DEVICE void fence_device() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
DEVICE void sync_warp(emulator::Where where = emulator::Where::current()) { emulator::meet_in_warp(where); }
DEVICE void sync_block(emulator::Where where = emulator::Where::current()) { emulator::meet_in_block(where); }

namespace hopper {

using emulator::Barrier;
using emulator::Where;
typedef uint64_t Operand;

DEVICE void set_barrier(Barrier *barrier, uint32_t n_arrivals, Where where = Where::current()) {
    emulator::set_barrier(barrier, n_arrivals, where);
}
DEVICE void barriers_are_set() {}
DEVICE void arrive(Barrier *barrier, Where where = Where::current()) { emulator::arrive_at(barrier, 0, where); }
DEVICE void arrive_expecting(Barrier *barrier, uint32_t n_bytes, Where where = Where::current()) {
    emulator::arrive_at(barrier, n_bytes, where);
}
DEVICE void await(Barrier *barrier, uint32_t parity, Where where = Where::current()) {
    emulator::await_phase(barrier, parity, where);
}
using emulator::TileMap;
DEVICE void copy_tiles(void *shared, const TileMap &map, int piece, int tile, Barrier *barrier, Where where = Where::current()) {
    emulator::begin_tile_copy(shared, map, piece, tile, barrier, where);
}
template <int n> DEVICE void sync_threads(Where where = Where::current()) { emulator::meet_of(n, where); }
template <int n> DEVICE void fewer_registers() {}
template <int n> DEVICE void more_registers() {}
DEVICE Operand operand(const void *shared, int along_rows) { return emulator::operand_at(shared, 128, along_rows); }
DEVICE Operand next_step(Operand operand, int steps) { return operand + (uint64_t)steps * (2 * 128 >> 4); }
DEVICE void begin_products(Where where = Where::current()) { emulator::meet_in_warp(where); }
DEVICE void commit_products() { emulator::commit_products(); }
template <int n> DEVICE void products_wait(Where where = Where::current()) {
    // A warp's products begin and end together.
    emulator::meet_in_warp(where);
    emulator::finish_products(n);
    emulator::meet_in_warp(where);
}
template <int n_tiles> DEVICE void multiply(float (&d)[n_tiles][4], Operand a, Operand b) {
    emulator::begin_product(d, n_tiles, a, b);
}
template <int n_tiles>
DEVICE void multiply(float (&d)[n_tiles][4], const uint32_t (&a)[4], Operand b, int add, Where where = Where::current()) {
    emulator::begin_product(d, n_tiles, a, b, add != 0, where);
}

}  // namespace hopper
