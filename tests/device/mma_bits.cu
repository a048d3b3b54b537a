// Whether the tensor cores round the same way by three roads: mma.sync, mma.sync with its operands exchanged, and wgmma.
// Sums of 2,048 products of bfloat16 numbers are chained 16 at a time; the results are compared bit for bit. On equal bits a
// kernel may take any of the three without changing a token.
//
//   nvcc -gencode arch=compute_90a,code=sm_90a -std=c++17 -o mma_bits tests/device/mma_bits.cu && ./mma_bits
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime.h>

constexpr int K = 2048, N_OUTPUTS = 64, N_ROWS = 8;

__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Descriptor of an operand without swizzle: core matrices of 8 rows by 16 bytes, so far apart along K and along the rows.
__device__ uint64_t descriptor(const void *shared, int along_k, int along_rows) {
    uint64_t address = (uint64_t)__cvta_generic_to_shared(shared);
    return (address >> 4 & 0x3fff) | (uint64_t)(along_k >> 4) << 16 | (uint64_t)(along_rows >> 4) << 32;
}

__device__ void wgmma(float (&d)[4], uint64_t a, uint64_t b) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "l"(a), "l"(b));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// weights [N_OUTPUTS][K], x [N_ROWS][K]; results [N_OUTPUTS][N_ROWS] by each road. One group of four warps.
__global__ void sums(const uint16_t *weights, const uint16_t *x, float *by_wgmma, float *by_mma, float *exchanged) {
    __shared__ __align__(128) uint16_t staged_weights[N_OUTPUTS * 16], staged_x[N_ROWS * 16];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float c[4] = {}, d[4] = {}, e[4] = {};
    for (int first = 0; first < K; first += 16) {
        __syncthreads();
        for (int i = threadIdx.x; i < N_OUTPUTS * 16; i += blockDim.x) {
            int row = i / 16, k = i % 16;
            staged_weights[(k / 8 * 8 + row / 8) * 64 + row % 8 * 8 + k % 8] = weights[row * K + first + k];
        }
        for (int i = threadIdx.x; i < N_ROWS * 16; i += blockDim.x) {
            int row = i / 16, k = i % 16;
            staged_x[k / 8 * 64 + row * 8 + k % 8] = x[row * K + first + k];
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        wgmma(d, descriptor(staged_weights, 1024, 128), descriptor(staged_x, 128, 128));
        auto weight = [&](int row, int k) { return *(const uint32_t *)(weights + (16 * warp + row) * K + first + k); };
        auto of_x = [&](int row, int k) { return *(const uint32_t *)(x + row * K + first + k); };
        uint32_t a[4] = {weight(g, 2 * t), weight(g + 8, 2 * t), weight(g, 2 * t + 8), weight(g + 8, 2 * t + 8)};
        mma(c, a, of_x(g, 2 * t), of_x(g, 2 * t + 8));
        // Eight rows of x and eight of zeros as the first operand, the warp's first eight outputs as the second.
        uint32_t rows[4] = {of_x(g, 2 * t), 0, of_x(g, 2 * t + 8), 0};
        mma(e, rows, weight(g, 2 * t), weight(g, 2 * t + 8));
    }
    for (int i = 0; i < 4; i++) {
        int at = (16 * warp + g + 8 * (i / 2)) * N_ROWS + 2 * t + i % 2;
        by_wgmma[at] = d[i], by_mma[at] = c[i];
    }
    for (int i = 0; i < 2; i++) exchanged[(16 * warp + 2 * t + i) * N_ROWS + g] = e[i];
}

static uint16_t random_bf16() {
    // Mostly of ordinary size, one in seven up to a hundred times larger, so that sums lose bits.
    float x = (float)(rand() % 20001 - 10000) / 7000.0f * (rand() % 7 ? 1.0f : (float)(rand() % 100));
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(bits >> 16);
}

int main() {
    uint16_t *weights, *x;
    float *results;
    constexpr int N = N_OUTPUTS * N_ROWS;
    if (cudaMallocHost(&weights, sizeof(uint16_t) * N_OUTPUTS * K) || cudaMallocHost(&x, sizeof(uint16_t) * N_ROWS * K) ||
        cudaMallocHost(&results, sizeof(float) * 3 * N)) {
        printf("no memory on a GPU\n");
        return 1;
    }
    int by_wgmma = 0, exchanged = 0, n_exchanged = 0, n_runs = 20;
    for (int run = 0; run < n_runs; run++) {
        for (int i = 0; i < N_OUTPUTS * K; i++) weights[i] = random_bf16();
        for (int i = 0; i < N_ROWS * K; i++) x[i] = random_bf16();
        sums<<<1, 128>>>(weights, x, results, results + N, results + 2 * N);
        if (cudaError_t error = cudaDeviceSynchronize()) {
            printf("%s\n", cudaGetErrorString(error));
            return 1;
        }
        for (int i = 0; i < N; i++) {
            by_wgmma += memcmp(results + i, results + N + i, 4) != 0;
            if (i / N_ROWS % 16 >= 8) continue;
            n_exchanged++;
            exchanged += memcmp(results + 2 * N + i, results + N + i, 4) != 0;
        }
    }
    printf("of mma.sync's sums wgmma's differ in %d of %d, those with exchanged operands in %d of %d\n", by_wgmma,
           n_runs * N, exchanged, n_exchanged);
    return by_wgmma + exchanged != 0;
}
