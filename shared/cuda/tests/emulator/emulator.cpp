// Runs blocks of fibers: who goes next, who waits for whom, what a warp computes together, and the C interface.
#include "emulator.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "fiber.h"

namespace emulator {
namespace {

constexpr uint32_t WARP = 32;
constexpr uint32_t MAX_THREADS = 1024;
constexpr uint32_t MAX_SHARED_BYTES = 227 * 1024;
// Not a power of two: the tops of all stacks would share a few cache sets.
constexpr size_t STACK_BYTES = 96 * 1024 + 17 * 64;
constexpr uint64_t STACK_MARK = 0x5ac4ed57ac4ed51eu;
constexpr unsigned char POISON = 0xff;
constexpr size_t SHARED_GUARD_BYTES = 1024;
// With fewer blocks one OS thread is as fast.
constexpr uint64_t MIN_BLOCKS_TO_SHARE = 8;
constexpr uint32_t MAX_WORKERS = 4;

struct Kernel {
    const char *name;
    size_t args_bytes;
    uint32_t max_threads;
    Body body;
};
std::vector<Kernel> &kernels() {
    static std::vector<Kernel> all;
    return all;
}

enum class Meeting { warp, block, threads, shuffle, transpose, mma_bf16, mma_half };
constexpr const char *MEETING_NAMES[] = {"sync_warp", "sync_block", "sync_threads", "shuffle_xor", "transpose", "mma_bf16", "mma_half"};

struct Copy {
    void *to;
    const void *from;
    bool valid;
    uint32_t group;
};

// A tile of a copy whose bytes a barrier counts; zeros when it comes from nowhere.
struct BarrierCopy {
    void *to;
    const void *from;
    uint32_t n_bytes;
    Barrier *barrier;
};
// A lane's part of a product of a warpgroup.
struct Product {
    float (*d)[4];
    int n_tiles;
    uint64_t a, b;
    uint32_t group;
    // Registers of the lanes with the same rows, where they hold the first operand.
    const uint32_t *registers[4];
    bool in_registers, add;
};

struct Warp;
struct Fiber {
    Position position;
    Context context;
    Warp *warp;
    uint32_t lane;
    unsigned char *stack;
    uint32_t n_groups;
    std::vector<Copy> copies;
    uint32_t n_product_groups;
    const uint32_t *registers;
    std::vector<Product> products;
};

struct Warp {
    Fiber *fibers;
    uint32_t ready;
    uint32_t waiting;
    uint32_t left;
    // The order in which ready lanes go on: first + i * stride.
    uint32_t first, stride;
    Meeting meeting;
    int mask;
    Where where;
    bool at_barrier, is_among;
    // Operands as lanes bring them, and results, which stay until the next meeting is complete.
    uint32_t values[WARP], results[WARP];
    alignas(32) uint32_t a[16][8];
    alignas(32) uint32_t b[8][8];
    alignas(32) float c[16][8];
    alignas(32) float d[16][8];
};

// What runs one block at a time: an OS thread has one.
struct Worker {
    unsigned char *stacks = nullptr;
    std::vector<Fiber> fibers{MAX_THREADS};
    std::vector<Warp> warps{MAX_THREADS / WARP};
    std::vector<unsigned char> shared_storage = std::vector<unsigned char>(MAX_SHARED_BYTES + SHARED_GUARD_BYTES + 256);
    unsigned char *shared = nullptr;
    Context main;
    const Kernel *kernel = nullptr;
    const void *args = nullptr;
    uint32_t n_warps = 0, n_at_barrier = 0, n_among = 0, n_left = 0, n_threads = 0, shared_bytes = 0;
    uint64_t random = 0;
    std::vector<BarrierCopy> barrier_copies;
    // Looks at barriers since something last happened.
    uint64_t n_looks = 0;
    bool failed = false;
    char problem[512];

    Worker() {
        void *memory = mmap(nullptr, STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory != MAP_FAILED) stacks = (unsigned char *)memory;
        shared = (unsigned char *)(((uintptr_t)shared_storage.data() + 255) & ~(uintptr_t)255);
    }
    ~Worker() {
        if (stacks) munmap(stacks, STACK_BYTES * MAX_THREADS);
    }
    // xorshift64*
    uint32_t draw() {
        random ^= random >> 12;
        random ^= random << 25;
        random ^= random >> 27;
        return (uint32_t)(random * 0x2545f4914f6cdd1dull >> 32);
    }
};
constinit thread_local Worker *worker __attribute__((tls_model("initial-exec"))) = nullptr;

Fiber &self() { return *(Fiber *)((unsigned char *)here - offsetof(Fiber, position)); }

// Ends the block; no fiber of it runs again.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(worker->problem, sizeof worker->problem, format, arguments);
    va_end(arguments);
    worker->failed = true;
    switch_to(self().context, worker->main);
    __builtin_unreachable();
}

const char *file_of(Where where) {
    const char *slash = strrchr(where.file_name(), '/');
    return slash ? slash + 1 : where.file_name();
}
bool same(Where a, Where b) {
    return a.line() == b.line() && a.column() == b.column() &&
           (a.file_name() == b.file_name() || !strcmp(a.file_name(), b.file_name()));
}

Fiber *take(Warp &warp) {
    uint32_t i = warp.first;
    while (!(warp.ready >> i & 1)) i = (i + warp.stride) % WARP;
    warp.first = (i + warp.stride) % WARP;
    warp.ready &= ~(1u << i);
    return &warp.fibers[i];
}
void release(Warp &warp, uint32_t lanes) {
    uint32_t random = worker->draw();
    warp.ready = lanes;
    warp.first = random % WARP;
    warp.stride = random / WARP | 1;
}

// Another warp that can go on, beginning anywhere.
Warp *other_warp() {
    uint32_t first = worker->draw() % worker->n_warps;
    for (uint32_t i = 0; i < worker->n_warps; i++) {
        Warp &warp = worker->warps[(first + i) % worker->n_warps];
        if (warp.ready) return &warp;
    }
    return nullptr;
}
void run(Fiber *from, Fiber *to) {
    here = &to->position;
    if (to != from) switch_to(from->context, to->context);
}
// Lets others run; comes back when this fiber is chosen again.
void wait(Fiber &fiber) {
    Warp *warp = fiber.warp->ready ? fiber.warp : other_warp();
    if (!warp) {
        for (uint32_t i = 0; i < worker->n_warps; i++) {
            if (!worker->warps[i].at_barrier) continue;
            Where where = worker->warps[i].where;
            fail("%u threads have left, others wait in sync_block at %s:%u", worker->n_left, file_of(where),
                 where.line());
        }
        fail("no thread can go on");
    }
    run(&fiber, take(*warp));
}

// Arrives at a meeting of the warp. True for the lane that is last: the others wait until it calls `adjourn`.
bool arrive(Meeting meeting, Where where, int mask = 0) {
    Fiber &fiber = self();
    Warp &warp = *fiber.warp;
    if (warp.left)
        fail("lane %u is in %s at %s:%u, lane %d of its warp has left", fiber.lane, MEETING_NAMES[(int)meeting],
             file_of(where), where.line(), __builtin_ctz(warp.left));
    if (!warp.waiting) {
        warp.meeting = meeting;
        warp.where = where;
        warp.mask = mask;
    } else if (warp.meeting != meeting || !same(warp.where, where)) {
        fail("the warp diverges: lane %u is in %s at %s:%u, lane %d in %s at %s:%u", fiber.lane,
             MEETING_NAMES[(int)meeting], file_of(where), where.line(), __builtin_ctz(warp.waiting),
             MEETING_NAMES[(int)warp.meeting], file_of(warp.where), warp.where.line());
    } else if (warp.mask != mask) {
        fail("lanes of a warp shuffle by %d and %d at %s:%u", mask, warp.mask, file_of(where), where.line());
    }
    warp.waiting |= 1u << fiber.lane;
    if (warp.waiting == 0xffffffffu) return true;
    wait(fiber);
    return false;
}
// Lets the lanes go on, now and then another warp first.
void adjourn() {
    Fiber &fiber = self();
    Warp &warp = *fiber.warp;
    warp.waiting = 0;
    if (worker->n_warps > 1 && worker->draw() % 4 == 0) {
        release(warp, 0xffffffffu);
        run(&fiber, take(*other_warp()));
    } else {
        release(warp, 0xffffffffu & ~(1u << fiber.lane));
    }
}

using Row = float __attribute__((vector_size(32)));
using Codes = uint16_t __attribute__((vector_size(16)));
using Wide = uint32_t __attribute__((vector_size(32)));

template <Format format> Row to_floats(const uint32_t *pairs) {
    Codes codes;
    memcpy(&codes, pairs, sizeof codes);
    Wide wide = __builtin_convertvector(codes, Wide);
    if constexpr (format == Format::bf16) return (Row)(wide << 16);
    Wide sign = (wide & 0x8000u) << 16, magnitude = wide & 0x7fffu;
    Row finite = (Row)(magnitude << 13) * 0x1p112f;
    Wide special = magnitude << 13 | 0x7f800000u;
    return (Row)(sign | (magnitude >= 0x7c00u ? special : (Wide)finite));
}

// d = c + a * b, along k in order. A product of two numbers of 16 bits is exact in a float.
template <Format format> void product(Warp &warp) {
    alignas(32) float a[16][16], columns[8][16];
    for (int i = 0; i < 16; i++)
        for (int half = 0; half < 2; half++) *(Row *)&a[i][8 * half] = to_floats<format>(&warp.a[i][4 * half]);
    for (int i = 0; i < 8; i++)
        for (int half = 0; half < 2; half++) *(Row *)&columns[i][8 * half] = to_floats<format>(&warp.b[i][4 * half]);
    Row b[16];
    for (int k = 0; k < 16; k++)
        b[k] = Row{columns[0][k], columns[1][k], columns[2][k], columns[3][k],
                   columns[4][k], columns[5][k], columns[6][k], columns[7][k]};
    for (int first = 0; first < 16; first += 8) {
        Row sums[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sums[i] = *(Row *)warp.c[first + i];
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) sums[i] += a[first + i][k] * b[k];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) *(Row *)warp.d[first + i] = sums[i];
    }
}

}  // namespace

constinit thread_local Position *here = nullptr;

Registration::Registration(const char *name, size_t args_bytes, uint32_t max_threads, Body body) {
    kernels().push_back({name, args_bytes, max_threads, body});
}

unsigned char *shared_memory() { return worker->shared; }

void meet_in_warp(Where where) {
    if (arrive(Meeting::warp, where)) adjourn();
}

void meet_in_block(Where where) {
    if (!arrive(Meeting::block, where)) return;
    Fiber &fiber = self();
    Warp &warp = *fiber.warp;
    warp.at_barrier = true;
    if (++worker->n_at_barrier < worker->n_warps) return wait(fiber);
    worker->n_at_barrier = 0;
    for (uint32_t i = 0; i < worker->n_warps; i++) {
        Warp &other = worker->warps[i];
        if (!same(other.where, where))
            fail("threads of a block wait in sync_block at %s:%u and at %s:%u", file_of(where), where.line(),
                 file_of(other.where), other.where.line());
        other.at_barrier = false;
        other.waiting = 0;
        release(other, 0xffffffffu);
    }
    run(&fiber, take(*other_warp()));
}

void meet_of(uint32_t n_threads, Where where) {
    if (!arrive(Meeting::threads, where)) return;
    Fiber &fiber = self();
    Warp &warp = *fiber.warp;
    warp.is_among = true;
    if (++worker->n_among < n_threads / WARP) return wait(fiber);
    worker->n_among = 0;
    for (uint32_t i = 0; i < worker->n_warps; i++) {
        Warp &other = worker->warps[i];
        if (!other.is_among) continue;
        if (!same(other.where, where))
            fail("threads wait in sync_threads at %s:%u and at %s:%u", file_of(where), where.line(), file_of(other.where),
                 other.where.line());
        other.is_among = false;
        other.waiting = 0;
        release(other, 0xffffffffu);
    }
    run(&fiber, take(*other_warp()));
}

uint32_t shuffle(uint32_t x, int mask, Where where) {
    Fiber &fiber = self();
    Warp &warp = *fiber.warp;
    if (mask < 0 || mask >= (int)WARP) fail("shuffle_xor by %d at %s:%u", mask, file_of(where), where.line());
    warp.values[fiber.lane] = x;
    if (arrive(Meeting::shuffle, where, mask)) {
        memcpy(warp.results, warp.values, sizeof warp.values);
        adjourn();
    }
    return warp.results[fiber.lane ^ (uint32_t)mask];
}

void multiply(Format format, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where) {
    Fiber &fiber = self();
    Warp &warp = *fiber.warp;
    uint32_t g = fiber.lane / 4, t = fiber.lane % 4;
    warp.a[g][t] = a[0], warp.a[g + 8][t] = a[1], warp.a[g][t + 4] = a[2], warp.a[g + 8][t + 4] = a[3];
    warp.b[g][t] = b0, warp.b[g][t + 4] = b1;
    memcpy(&warp.c[g][2 * t], &c[0], 8), memcpy(&warp.c[g + 8][2 * t], &c[2], 8);
    if (arrive(format == Format::bf16 ? Meeting::mma_bf16 : Meeting::mma_half, where)) {
        format == Format::bf16 ? product<Format::bf16>(warp) : product<Format::half>(warp);
        adjourn();
    }
    memcpy(&c[0], &warp.d[g][2 * t], 8), memcpy(&c[2], &warp.d[g + 8][2 * t], 8);
}

// The copy is made when it is waited for; until then its target holds poison. So a missing wait shows, and so does a
// target that somebody still reads.
void begin_copy(void *shared, const void *global, bool valid, Where where) {
    unsigned char *to = (unsigned char *)shared;
    if ((uintptr_t)to % 16 || (uintptr_t)global % 16)
        fail("copy_async at %s:%u from %p to shared + %td: not aligned to 16", file_of(where), where.line(), global,
             to - worker->shared);
    if (to < worker->shared || to + 16 > worker->shared + worker->shared_bytes)
        fail("copy_async at %s:%u to shared + %td, of %u bytes", file_of(where), where.line(), to - worker->shared,
             worker->shared_bytes);
    memset(to, POISON, 16);
    Fiber &fiber = self();
    fiber.copies.push_back({shared, global, valid, fiber.n_groups});
}
void commit_copies() { self().n_groups++; }
void finish_copies(int n_under_way) {
    Fiber &fiber = self();
    size_t n_done = 0;
    for (const Copy &copy : fiber.copies) {
        if ((int64_t)copy.group >= (int64_t)fiber.n_groups - n_under_way) break;
        copy.valid ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
        n_done++;
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + (ptrdiff_t)n_done);
}

uint32_t transposed(uint32_t x, Where where) {
    Fiber &fiber = self();
    Warp &warp = *fiber.warp;
    warp.values[fiber.lane] = x;
    if (arrive(Meeting::transpose, where)) {
        memcpy(warp.results, warp.values, sizeof warp.values);
        adjourn();
    }
    uint32_t row = fiber.lane / 4, column = fiber.lane % 4 * 2;
    auto element = [&](uint32_t r, uint32_t c) { return warp.results[r * 4 + c / 2] >> (16 * (c % 2)) & 0xffffu; };
    return element(column, row) | element(column + 1, row) << 16;
}

constexpr uint8_t BARRIER_MARK = 0xb5;

void check(const Barrier *barrier, Where where) {
    const unsigned char *at = (const unsigned char *)barrier;
    if ((uintptr_t)at % 8 || at < worker->shared || at + 8 > worker->shared + worker->shared_bytes)
        fail("the barrier at %s:%u lies at shared + %td, of %u bytes", file_of(where), where.line(), at - worker->shared,
             worker->shared_bytes);
    if (barrier->mark != BARRIER_MARK) fail("the barrier at %s:%u was never set", file_of(where), where.line());
}
void end_phase_if_complete(Barrier *barrier) {
    worker->n_looks = 0;
    if (barrier->pending || barrier->bytes) return;
    barrier->phase ^= 1;
    barrier->pending = barrier->n_arrivals;
}
void set_barrier(Barrier *barrier, uint32_t n_arrivals, Where where) {
    barrier->mark = BARRIER_MARK;
    check(barrier, where);
    barrier->phase = 0;
    barrier->n_arrivals = barrier->pending = (uint8_t)n_arrivals;
    barrier->bytes = 0;
}
void arrive_at(Barrier *barrier, uint32_t n_bytes, Where where) {
    check(barrier, where);
    if (!barrier->pending) fail("one arrival too many at %s:%u", file_of(where), where.line());
    barrier->pending--;
    barrier->bytes += (int32_t)n_bytes;
    end_phase_if_complete(barrier);
}
// Copies are made while somebody waits for a barrier; until then the target holds poison.
void begin_tile_copy(void *shared, const TileMap &map, int piece, int tile, Barrier *barrier, Where where) {
    check(barrier, where);
    unsigned char *to = (unsigned char *)shared;
    uint32_t n_bytes = map.box_pieces * map.piece_bytes;
    if ((to - worker->shared) % 128 || (uintptr_t)map.first % 16 || map.tile_bytes % 16 || map.piece_bytes % 16)
        fail("copy_tiles at %s:%u from %p by %llu to shared + %td: not aligned", file_of(where), where.line(), map.first,
             (unsigned long long)map.tile_bytes, to - worker->shared);
    if (to < worker->shared || to + map.box_tiles * n_bytes > worker->shared + worker->shared_bytes)
        fail("copy_tiles at %s:%u of %u times %u bytes to shared + %td, of %u bytes", file_of(where), where.line(),
             map.box_tiles, n_bytes, to - worker->shared, worker->shared_bytes);
    memset(to, POISON, map.box_tiles * n_bytes);
    for (int64_t i = 0; i < map.box_tiles; i++) {
        for (int64_t j = 0; j < map.box_pieces; j++, to += map.piece_bytes) {
            // Negative places are beyond too.
            bool is_there = (uint64_t)(tile + i) < map.n_tiles && (uint64_t)(piece + j) < map.n_pieces;
            const unsigned char *from = map.first + (tile + i) * (int64_t)map.tile_bytes + (piece + j) * (int64_t)map.piece_bytes;
            worker->barrier_copies.push_back({to, is_there ? from : nullptr, map.piece_bytes, barrier});
        }
    }
}
void begin_bulk_copy(void *shared, const void *global, uint32_t n_bytes, Barrier *barrier, Where where) {
    check(barrier, where);
    unsigned char *to = (unsigned char *)shared;
    if ((uintptr_t)to % 16 || (uintptr_t)global % 16 || n_bytes % 16 || !n_bytes)
        fail("copy_range at %s:%u of %u bytes from %p to shared + %td: not in pieces of 16", file_of(where), where.line(),
             n_bytes, global, to - worker->shared);
    if (to < worker->shared || to + n_bytes > worker->shared + worker->shared_bytes)
        fail("copy_range at %s:%u of %u bytes to shared + %td, of %u bytes", file_of(where), where.line(), n_bytes,
             to - worker->shared, worker->shared_bytes);
    memset(to, POISON, n_bytes);
    barrier->bytes += (int32_t)n_bytes;
    worker->barrier_copies.push_back({shared, global, n_bytes, barrier});
}
// The lane's copies of 16 bytes that are under way count too.
void arrive_with_copies(Barrier *barrier, Where where) {
    check(barrier, where);
    for (const Copy &copy : self().copies) {
        if (!copy.valid) fail("arrive_with_copies at %s:%u behind a copy of zeros", file_of(where), where.line());
        worker->barrier_copies.push_back({copy.to, copy.from, 16, barrier});
        barrier->bytes += 16;
    }
    self().copies.clear();
    arrive_at(barrier, 0, where);
}
int shared_size() { return (int)worker->shared_bytes; }
void await_phase(Barrier *barrier, uint32_t parity, Where where) {
    check(barrier, where);
    Fiber &fiber = self();
    while (barrier->phase == parity) {
        if (!worker->barrier_copies.empty()) {
            std::vector<BarrierCopy> &copies = worker->barrier_copies;
            std::swap(copies[worker->draw() % copies.size()], copies.back());
            BarrierCopy copy = copies.back();
            copies.pop_back();
            copy.from ? memcpy(copy.to, copy.from, copy.n_bytes) : memset(copy.to, 0, copy.n_bytes);
            copy.barrier->bytes -= (int32_t)copy.n_bytes;
            end_phase_if_complete(copy.barrier);
        } else if (worker->n_looks++ > 64 * (uint64_t)worker->n_threads) {
            fail("nobody ends the phase awaited at %s:%u", file_of(where), where.line());
        }
        fiber.warp->ready |= 1u << fiber.lane;
        run(&fiber, take(*other_warp()));
    }
}

// As PTX has it: address, distance of core matrices along the columns, along the rows, in 16 bytes.
uint64_t operand_at(const void *shared, int along_columns, int along_rows) {
    uint64_t offset = (uint64_t)((const unsigned char *)shared - worker->shared);
    return (offset >> 4 & 0x3fff) | (uint64_t)(along_columns >> 4) << 16 | (uint64_t)(along_rows >> 4) << 32;
}
// A product is made when it is waited for: who changes its operands or reads its sums before does not get away with it.
void begin_product(float (*d)[4], int n_tiles, uint64_t a, uint64_t b) {
    Fiber &fiber = self();
    fiber.products.push_back({d, n_tiles, a, b, fiber.n_product_groups, {}, false, true});
}
void begin_product(float (*d)[4], int n_tiles, const uint32_t (&a)[4], uint64_t b, bool add, Where where) {
    Fiber &fiber = self();
    fiber.registers = a;
    meet_in_warp(where);
    Product product{d, n_tiles, 0, b, fiber.n_product_groups, {}, true, add};
    for (uint32_t t = 0; t < 4; t++) product.registers[t] = fiber.warp->fibers[fiber.lane / 4 * 4 + t].registers;
    fiber.products.push_back(product);
    meet_in_warp(where);
}
void commit_products() { self().n_product_groups++; }
// Sixteen numbers of a row of an operand.
static void row_of(float (&numbers)[16], uint64_t operand, uint32_t row) {
    uint32_t along_columns = (uint32_t)(operand >> 16 & 0x3fff) << 4, along_rows = (uint32_t)(operand >> 32 & 0x3fff) << 4;
    uint32_t first = (uint32_t)(operand & 0x3fff) << 4, core = first + row / 8 * along_rows + row % 8 * 16;
    for (uint32_t k = 0; k < 16; k++) {
        uint16_t bits;
        memcpy(&bits, worker->shared + core + k / 8 * along_columns + k % 8 * 2, 2);
        numbers[k] = bf16_to_float(bits);
    }
}
static void make(const Product &product, uint32_t warp, uint32_t lane) {
    uint32_t g = lane / 4, t = lane % 4;
    float a[2][16], b[16];
    for (uint32_t i = 0; i < 2; i++) {
        if (!product.in_registers) row_of(a[i], product.a, warp * 16 + g + 8 * i);
        for (uint32_t k = 0; product.in_registers && k < 16; k++) {
            uint32_t pair = product.registers[k % 8 / 2][k / 8 * 2 + i];
            a[i][k] = bf16_to_float((uint16_t)(pair >> (16 * (k % 2))));
        }
    }
    for (int tile = 0; tile < product.n_tiles; tile++) {
        for (uint32_t column = 0; column < 2; column++) {
            row_of(b, product.b, (uint32_t)tile * 8 + 2 * t + column);
            for (uint32_t i = 0; i < 2; i++) {
                float sum = product.add ? product.d[tile][2 * i + column] : 0.0f;
                for (int k = 0; k < 16; k++) sum += a[i][k] * b[k];
                product.d[tile][2 * i + column] = sum;
            }
        }
    }
}
void finish_products(int n_under_way) {
    Fiber &fiber = self();
    size_t n_done = 0;
    for (const Product &product : fiber.products) {
        if ((int64_t)product.group >= (int64_t)fiber.n_product_groups - n_under_way) break;
        make(product, fiber.position.thread.x / WARP % 4, fiber.lane);
        n_done++;
    }
    fiber.products.erase(fiber.products.begin(), fiber.products.begin() + (ptrdiff_t)n_done);
}

namespace {

void leave() {
    Fiber &fiber = self();
    Warp &warp = *fiber.warp;
    warp.left |= 1u << fiber.lane;
    worker->n_left++;
    if (warp.waiting)
        fail("lane %u leaves, lane %d of its warp waits in %s at %s:%u", fiber.lane, __builtin_ctz(warp.waiting),
             MEETING_NAMES[(int)warp.meeting], file_of(warp.where), warp.where.line());
    if (worker->n_left == worker->n_threads) switch_to(fiber.context, worker->main);
    wait(fiber);
    __builtin_unreachable();
}
void enter() {
    worker->kernel->body(worker->args);
    leave();
}

void prepare_block(Worker &worker, const Position &position, uint64_t seed) {
    worker.random = (seed + 1) * 0x9e3779b97f4a7c15ull | 1;
    worker.n_threads = position.threads.x;
    worker.n_warps = worker.n_threads / WARP;
    worker.n_at_barrier = worker.n_among = worker.n_left = 0;
    worker.failed = false;
    worker.barrier_copies.clear();
    worker.n_looks = 0;
    memset(worker.shared, POISON, worker.shared_bytes + SHARED_GUARD_BYTES);
    for (uint32_t i = 0; i < worker.n_threads; i++) {
        Fiber &fiber = worker.fibers[i];
        fiber.position = position;
        fiber.position.thread.x = i;
        fiber.warp = &worker.warps[i / WARP];
        fiber.lane = i % WARP;
        fiber.stack = worker.stacks + i * STACK_BYTES;
        fiber.n_groups = 0;
        fiber.copies.clear();
        fiber.n_product_groups = 0;
        fiber.products.clear();
        memcpy(fiber.stack, &STACK_MARK, sizeof STACK_MARK);
        prepare(fiber.context, fiber.stack, STACK_BYTES, enter);
    }
    for (uint32_t i = 0; i < worker.n_warps; i++) {
        Warp &warp = worker.warps[i];
        warp.fibers = &worker.fibers[i * WARP];
        warp.waiting = warp.left = 0;
        warp.at_barrier = warp.is_among = false;
        release(warp, 0xffffffffu);
    }
}

// Runs one block; false when something went wrong, told in `problem`.
bool run_block(Worker &mine, const Position &position, uint64_t seed) {
    worker = &mine;
    prepare_block(mine, position, seed);
    Fiber *first = take(*other_warp());
    here = &first->position;
    switch_to(mine.main, first->context);
    uint32_t thread = here->thread.x;
    here = nullptr;
    worker = nullptr;
    char problem[sizeof mine.problem];
    for (uint32_t i = 0; i < mine.n_threads && !mine.failed; i++) {
        if (memcmp(mine.fibers[i].stack, &STACK_MARK, sizeof STACK_MARK)) {
            snprintf(mine.problem, sizeof mine.problem, "the stack of %zu bytes overflows", STACK_BYTES);
            mine.failed = true;
        }
    }
    for (size_t i = 0; i < SHARED_GUARD_BYTES && !mine.failed; i++) {
        if (mine.shared[mine.shared_bytes + i] != POISON) {
            snprintf(mine.problem, sizeof mine.problem, "something was written to shared + %zu, of %u bytes",
                     mine.shared_bytes + i, mine.shared_bytes);
            mine.failed = true;
        }
    }
    if (!mine.failed) return true;
    memcpy(problem, mine.problem, sizeof problem);
    snprintf(mine.problem, sizeof mine.problem, "kernel %s, block (%u, %u, %u), thread %u: %.400s", mine.kernel->name,
             position.block.x, position.block.y, position.block.z, thread, problem);
    return false;
}

// Workers that rest; their stacks are kept.
std::mutex resting_mutex;
std::vector<std::unique_ptr<Worker>> resting;

std::unique_ptr<Worker> borrow() {
    std::lock_guard lock(resting_mutex);
    if (resting.empty()) return std::make_unique<Worker>();
    std::unique_ptr<Worker> worker = std::move(resting.back());
    resting.pop_back();
    return worker;
}
void give_back(std::unique_ptr<Worker> worker) {
    std::lock_guard lock(resting_mutex);
    resting.push_back(std::move(worker));
}

struct Job {
    const Kernel *kernel;
    const void *args;
    Dimensions grid;
    uint32_t n_threads, shared_bytes;
    uint64_t seed, n_blocks;
    std::atomic<uint64_t> next_block{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    char problem[sizeof(Worker::problem)];
};

void work(Job &job) {
    std::unique_ptr<Worker> worker = borrow();
    worker->kernel = job.kernel;
    worker->args = job.args;
    worker->shared_bytes = job.shared_bytes;
    for (uint64_t i; !job.failed && (i = job.next_block++) < job.n_blocks;) {
        // The last block first: blocks are independent.
        uint64_t block = job.n_blocks - 1 - i;
        Position position{{0, 0, 0},
                          {(uint32_t)(block % job.grid.x), (uint32_t)(block / job.grid.x % job.grid.y),
                           (uint32_t)(block / job.grid.x / job.grid.y)},
                          {job.n_threads, 1, 1},
                          job.grid};
        if (worker->stacks && run_block(*worker, position, job.seed * 1000003 + block)) continue;
        std::lock_guard lock(job.mutex);
        if (!job.failed) snprintf(job.problem, sizeof job.problem, "%s", worker->stacks ? worker->problem : "no memory");
        job.failed = true;
    }
    give_back(std::move(worker));
}

const Kernel *find(const char *name) {
    for (const Kernel &kernel : kernels())
        if (!strcmp(kernel.name, name)) return &kernel;
    return nullptr;
}

// What a device would refuse; null when all is well.
const char *refusal(const Kernel *kernel, const Job &job, size_t args_bytes) {
    if (!kernel) return "there is no such kernel";
    if (kernel->args_bytes != args_bytes) return "the arguments have another size";
    if (job.n_threads == 0 || job.n_threads % WARP) return "threads are not a multiple of 32";
    if (job.n_threads > kernel->max_threads || job.n_threads > MAX_THREADS) return "too many threads";
    if (job.shared_bytes > MAX_SHARED_BYTES) return "too much shared memory";
    if (!job.grid.x || !job.grid.y || !job.grid.z) return "the grid is empty";
    if (job.grid.x > 0x7fffffffu || job.grid.y > 65535 || job.grid.z > 65535) return "the grid is too large";
    return nullptr;
}

}  // namespace
}  // namespace emulator

#define EXPORT extern "C" __attribute__((visibility("default")))

// Runs a kernel to its end; 0 when all went well, else `error` tells what did not.
EXPORT int emulator_launch(const char *name, uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, uint32_t n_threads,
                           uint32_t shared_bytes, const void *args, size_t args_bytes, uint64_t seed, char *error,
                           size_t error_capacity) {
    using namespace emulator;
    Job job{};
    job.kernel = find(name);
    job.grid = {grid_x, grid_y, grid_z};
    job.n_threads = n_threads;
    job.shared_bytes = shared_bytes;
    job.seed = seed;
    job.n_blocks = (uint64_t)grid_x * grid_y * grid_z;
    if (const char *why = refusal(job.kernel, job, args_bytes)) {
        snprintf(error, error_capacity,
                 "kernel %s, grid (%u, %u, %u), %u threads, %u bytes shared, %zu bytes of arguments (kernel: %zu): %s", name,
                 grid_x, grid_y, grid_z, n_threads, shared_bytes, args_bytes, job.kernel ? job.kernel->args_bytes : 0, why);
        return 1;
    }
    struct alignas(64) Line {
        unsigned char bytes[64];
    };
    std::vector<Line> aligned((args_bytes + 63) / 64);
    if (args_bytes) memcpy(aligned.data(), args, args_bytes);
    job.args = aligned.data();
    std::vector<std::thread> others;
    if (job.n_blocks >= MIN_BLOCKS_TO_SHARE)
        for (uint32_t i = 1; i < min(std::thread::hardware_concurrency(), MAX_WORKERS); i++)
            others.emplace_back([&job] { work(job); });
    work(job);
    for (std::thread &other : others) other.join();
    if (job.failed) snprintf(error, error_capacity, "%s", job.problem);
    return job.failed;
}

// Name, bytes of arguments and most threads of the kernel `index`; 0 behind the last.
EXPORT int emulator_kernel(size_t index, const char **name, size_t *args_bytes, uint32_t *max_threads) {
    if (index >= emulator::kernels().size()) return 0;
    const emulator::Kernel &kernel = emulator::kernels()[index];
    *name = kernel.name;
    *args_bytes = kernel.args_bytes;
    *max_threads = kernel.max_threads;
    return 1;
}
