// Everything a kernel needs from the device beyond plain C++: declarations of kernels and shared memory, number formats
// of 16 bits, matrix instructions, asynchronous copies. All inline PTX of the project is here. When a plain C++ compiler
// builds the kernels (tests/emulator), the emulator's twin of this file takes its place; both offer the same names.
#pragma once
#ifndef __CUDACC__
#include "emulator.h"
#else
#include <stddef.h>
#include <stdint.h>

#define HOST_DEVICE __host__ __device__
#define DEVICE __device__ __forceinline__

// Waits until the kernels before have ended and their results are there; and allows the kernel behind to begin, which waits
// likewise. A kernel that is launched ahead may do before its wait what does not depend on other kernels. (PTX ISA,
// griddepcontrol; before sm_90 kernels follow each other anyway.)
DEVICE void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void grid_release() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Defines kernel `name` over one struct of arguments, for blocks of `threads` threads of which at least `blocks` fit on a
// multiprocessor. Kernels use no static shared memory; `SHARED` declares the dynamic one. The body of a KERNEL_AHEAD must
// call `grid_wait` on every path, before it touches what other kernels read or write.
#define KERNEL_AHEAD(name, Args, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args args)
#define KERNEL(name, Args, threads, blocks)          \
    static DEVICE void name##_body(const Args &args); \
    KERNEL_AHEAD(name, Args, threads, blocks) {      \
        grid_release();                              \
        grid_wait();                                 \
        name##_body(args);                           \
    }                                                \
    static DEVICE void name##_body(const Args &args)
#define SHARED(type, name)                                       \
    extern __shared__ __align__(128) unsigned char shared_bytes[]; \
    type *name = reinterpret_cast<type *>(shared_bytes)

// bfloat16 and IEEE half, as bits; rounded to nearest even.
DEVICE uint16_t float_to_bf16(float x) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }
DEVICE uint16_t float_to_half(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
DEVICE float half_to_float(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
// Two numbers in one register, `low` in the lower half.
DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
DEVICE uint32_t pack_half(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
// a - b for two bfloat16 each; used where the result is exact.
DEVICE uint32_t subtract_bf16(uint32_t a, uint32_t b) {
    uint32_t d;
    // a * 1 + (-b): every architecture from sm_80 on has the fused form.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
    return d;
}

// a * b + c for two bfloat16 each, rounded once; subnormal numbers count.
DEVICE uint32_t multiply_add_bf16(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE uint32_t multiply_bf16(uint32_t a, uint32_t b) { return multiply_add_bf16(a, b, 0x80008000u); }
// Four of the eight bytes of `low` and `high`, by the digits of `which`.
DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t which) { return __byte_perm(low, high, which); }

// c += a * b on 16 x 16 by 16 x 8, sums in f32.
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four core matrices in shared memory, where `b`, `a` in {0, 1} tell matrix 2 b + a: at first + a * along_a + b * along_b. Lane
// (g, t) gets columns 2 t and 2 t + 1 of row g of each: operand A when rows are along a, two steps of operand B along columns.
// Of matrices with fewer than 8 rows, 1, 2 or 4, all rows from 0 to `last_row` stand for the others too.
DEVICE void load_matrices(uint32_t (&r)[4], const uint8_t *first, int along_a, int along_b, int lane, int last_row = 7) {
    const uint8_t *row = first + lane / 8 % 2 * along_a + lane / 16 * along_b + (lane & last_row) * 16;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

// A matrix of 8 x 8 elements of 16 bits, of which lane (g, t) has columns 2 t and 2 t + 1 of row g, transposed.
DEVICE uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// The same address, which the compiler may not compute anew where it is used.
DEVICE const uint8_t *kept_in_register(const uint8_t *address) {
    asm("" : "+l"(address));
    return address;
}
// Loads 1, 2 or 4 words of global memory that are needed this one time, and that no kernel under way writes.
template <int n> DEVICE void load_once(uint32_t *to, const uint8_t *global) {
    if constexpr (n == 4) {
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "l"(global));
    } else if constexpr (n == 2) {
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(global));
    } else {
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0]) : "l"(global));
    }
}

// Copies 16 bytes from global to shared memory without waiting; zeros instead when not `valid`.
DEVICE void copy_async(void *shared, const void *global, bool valid) {
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    int n_bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(n_bytes) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `n` groups are under way.
template <int n> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); }

// What other blocks of the grid, or the kernel before, have just written: not from this multiprocessor's own cache.
DEVICE float4 load_shared_by_blocks(const float4 *global) { return __ldcg(global); }
DEVICE float2 load_shared_by_blocks(const float2 *global) { return __ldcg(global); }
// Counts the block in, in global memory, after everything that its threads have written, when all of them call it; for every
// thread, whether it was the last of `n_blocks`, which sees what all have written and finds the count at zero for the next
// time. `shared` is room for a word.
DEVICE bool is_last_block(uint32_t *count, uint32_t n_blocks, uint32_t *shared) {
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t before;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
        *shared = before;
        if (before + 1 == n_blocks) *count = 0;
    }
    __syncthreads();
    return *shared + 1 == n_blocks;
}

// Bytes of dynamic shared memory of the block.
DEVICE int shared_size() {
    uint32_t n_bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(n_bytes));
    return (int)n_bytes;
}

// Barriers in shared memory between the warp that copies and those that use it. A phase ends when all arrivals are there, and
// what they brought. (PTX ISA, "mbarrier"; copies of a whole range are sm_90's, before it lanes copy 16 bytes each.)
DEVICE uint32_t shared_address(const void *shared) { return (uint32_t)__cvta_generic_to_shared(shared); }
// By a warp, before a barrier of the block.
DEVICE void set_barriers(uint64_t *barriers, int n, int n_arrivals, int lane) {
    for (int i = lane; i < n; i += 32) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barriers + i)), "r"(n_arrivals) : "memory");
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
DEVICE void arrive(uint64_t *barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(barrier)) : "memory");
}
// Copies `n_bytes`, a multiple of 16, from global to shared memory, by all lanes of a warp, which then `arrive_with_copies`.
DEVICE void copy_range(void *shared, const void *global, int n_bytes, uint64_t *barrier, int lane) {
#if __CUDA_ARCH__ >= 900
    if (lane > 0) return;
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(n_bytes), "r"(shared_address(barrier))
                 : "memory");
#else
    for (int at = lane * 16; at < n_bytes; at += 512) copy_async((uint8_t *)shared + at, (const uint8_t *)global + at, true);
#endif
}
// Arrives when the thread's copies are done, those by `copy_async` too.
DEVICE void arrive_with_copies(uint64_t *barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
#if __CUDA_ARCH__ >= 900
#define LOOK_AT_BARRIER "mbarrier.try_wait.parity.shared.b64"
#else
#define LOOK_AT_BARRIER "mbarrier.test_wait.parity.shared.b64"
#endif
// Waits for the end of a phase with this parity: 0 for the first, third, ...
DEVICE void await(uint64_t *barrier, int parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n" LOOK_AT_BARRIER " done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

// 2^x, about 2 ulp; -inf gives 0.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x, about 1 ulp.
DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// Adds to a number and returns what it was, in one step.
DEVICE uint32_t fetch_add(uint32_t *number, uint32_t x) { return atomicAdd(number, x); }
// Numbers in global memory that other blocks read or have written in this launch: with a fence between these and the step that
// tells the others.
DEVICE void store_for_others(float *global, float x) { __stcg(global, x); }
DEVICE float load_of_others(const float *global) { return __ldcg(global); }
DEVICE void fence_device() { __threadfence(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
#endif
