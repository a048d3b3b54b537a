// What sm_90a has beyond other devices: matrix instructions of four warps that read shared memory (wgmma), copies of whole
// boxes by a map of the memory (cp.async.bulk.tensor) and the barriers in shared memory that count them. On other devices a kernel that uses them stops:
// the host launches it on none (src/kernels/linear.rs).
//
// A warpgroup is four warps, the first of which has a number divisible by 4.
#pragma once
#include "layout.cuh"
#ifdef __CUDACC__

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ON_HOPPER(...) __VA_ARGS__
#else
#define ON_HOPPER(...) __trap()
#endif

namespace hopper {

// A barrier in shared memory: a phase ends when all arrivals and all bytes it expects are there. (PTX ISA, "mbarrier")
typedef uint64_t Barrier;

DEVICE uint32_t shared_address(const void *shared) { return (uint32_t)__cvta_generic_to_shared(shared); }

// By one thread; `barriers_are_set` after all of them, then a barrier of the block.
DEVICE void set_barrier(Barrier *barrier, uint32_t n_arrivals) {
    ON_HOPPER(asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_arrivals) : "memory"));
}
DEVICE void barriers_are_set() { ON_HOPPER(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory")); }
DEVICE void arrive(Barrier *barrier) {
    ON_HOPPER(asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory"));
}
// Arrives, and tells how many bytes this phase has to wait for.
DEVICE void arrive_expecting(Barrier *barrier, uint32_t n_bytes) {
    ON_HOPPER(asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_bytes)
                           : "memory"));
}
// Waits for the end of a phase with this parity: 0 for the first, third, ...
DEVICE void await(Barrier *barrier, uint32_t parity) {
    ON_HOPPER(asm volatile("{\n"
                           ".reg .pred done;\n"
                           "again:\n"
                           "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                           "@done bra.uni ended;\n"
                           "bra.uni again;\n"
                           "ended:\n"
                           "}" ::"r"(shared_address(barrier)), "r"(parity)
                           : "memory"));
}
// Tiles in memory, how many pieces of how many bytes they have, and how many of both a copy takes at once; the host makes it
// (Runtime::tile_map). It must be an argument of the kernel.
struct alignas(64) TileMap {
    uint64_t opaque[16];
};
// Copies the map's box from this piece and tile on, tile after tile; zeros for what is not there. The barrier counts the
// bytes of the whole box. One instruction for a stage: many small copies take turns, each for some 75 cycles.
DEVICE void copy_tiles(void *shared, const TileMap &map, int piece, int tile, Barrier *barrier) {
    ON_HOPPER(asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
            shared_address(shared)),
        "l"(&map), "r"(0), "r"(piece), "r"(tile), "r"(shared_address(barrier))
        : "memory"));
}

// A barrier of the n threads that call it.
template <int n> DEVICE void sync_threads() { ON_HOPPER(asm volatile("bar.sync 1, %0;" ::"n"(n) : "memory")); }

// Registers of each thread of the warpgroup from here on.
template <int n> DEVICE void fewer_registers() { ON_HOPPER(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n))); }
template <int n> DEVICE void more_registers() { ON_HOPPER(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n))); }

// Rows of core matrices in shared memory as an operand: along K they follow each other, the next 8 rows are `along_rows` bytes
// away. (PTX ISA, "Matrix descriptor", without swizzling)
typedef uint64_t Operand;
DEVICE Operand operand(const void *shared, int along_rows) {
    return (Operand)(shared_address(shared) >> 4 & 0x3fff) | (Operand)(CORE_BYTES >> 4) << 16 | (Operand)(along_rows >> 4) << 32;
}
// The same operand 16 columns on.
DEVICE Operand next_step(Operand operand, int steps) { return operand + steps * (2 * CORE_BYTES >> 4); }

// Before the first product, and after other instructions have written its sums.
DEVICE void begin_products() { ON_HOPPER(asm volatile("wgmma.fence.sync.aligned;" ::: "memory")); }
DEVICE void commit_products() { ON_HOPPER(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")); }
// Waits until at most `n` committed groups are under way.
template <int n> DEVICE void products_wait() { ON_HOPPER(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory")); }

#define SUMS_4(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define SUMS_16(d, j) SUMS_4(d, j), SUMS_4(d, j + 1), SUMS_4(d, j + 2), SUMS_4(d, j + 3)
#define SUMS_64(d, j) SUMS_16(d, j), SUMS_16(d, j + 4), SUMS_16(d, j + 8), SUMS_16(d, j + 12)
#define PLACES_32_0                                                                                          \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PLACES_32_1                                                                                             \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PLACES_32_2                                                                                             \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
    "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PLACES_32_3                                                                                              \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
    "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d += a * b on 64 x 16 by 16 x N, of bfloat16; both operands in shared memory. Warp w of the warpgroup has rows 16 w .. of the
// sums, in each N tile of 8 columns as mma.m16n8k16 has them.
DEVICE void multiply(float (&d)[16][4], Operand a, Operand b) {
    ON_HOPPER(asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PLACES_32_0 PLACES_32_1
                           "}, %64, %65, 1, 1, 1, 0, 0;"
                           : SUMS_64(d, 0)
                           : "l"(a), "l"(b)));
}
DEVICE void multiply(float (&d)[24][4], Operand a, Operand b) {
    ON_HOPPER(asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" PLACES_32_0 PLACES_32_1 PLACES_32_2
                           "}, %96, %97, 1, 1, 1, 0, 0;"
                           : SUMS_64(d, 0), SUMS_16(d, 16), SUMS_16(d, 20)
                           : "l"(a), "l"(b)));
}
DEVICE void multiply(float (&d)[32][4], Operand a, Operand b) {
    ON_HOPPER(asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" PLACES_32_0 PLACES_32_1 PLACES_32_2
                               PLACES_32_3 "}, %128, %129, 1, 1, 1, 0, 0;"
                           : SUMS_64(d, 0), SUMS_64(d, 16)
                           : "l"(a), "l"(b)));
}


// The same with the first operand in registers, which no one may change before the products have ended: warp w of the warpgroup
// has rows 16 w .. as mma.m16n8k16 has them. Without `add` the sums begin.
#define OPERAND_A(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
DEVICE void multiply(float (&d)[4][4], const uint32_t (&a)[4], Operand b, int add) {
    ON_HOPPER(asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"
                           "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
                           "%11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, add, 1, 1, 0;\n}"
                           : SUMS_16(d, 0)
                           : OPERAND_A(a), "l"(b), "r"(add)));
}
DEVICE void multiply(float (&d)[8][4], const uint32_t (&a)[4], Operand b, int add) {
    ON_HOPPER(asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
                           "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" PLACES_32_0
                           "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"
                           : SUMS_16(d, 0), SUMS_16(d, 4)
                           : OPERAND_A(a), "l"(b), "r"(add)));
}
DEVICE void multiply(float (&d)[16][4], const uint32_t (&a)[4], Operand b, int add) {
    ON_HOPPER(asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
                           "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PLACES_32_0 PLACES_32_1
                           "}, {%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
                           : SUMS_64(d, 0)
                           : OPERAND_A(a), "l"(b), "r"(add)));
}

}  // namespace hopper
#endif
