// The end of a sum over ranks, when each device has gathered the partial sums of all: they are added in the order of the
// plan's tree, so that no bit depends on how they were brought together.
#include "batch.cuh"

struct SumTreeArgs {
    const float *parts;         // [n_parts][part_elements]
    const int32_t *steps;       // [n_steps]: the number of a part to hold, or below 0 to add the two held last
    float *out;                 // [n_rows][n_embd]
    const BatchHeader *header;
    uint64_t part_elements;     // from one part to the next
    uint32_t n_embd;            // a multiple of 4
    uint32_t n_steps;
};

namespace tree {

constexpr int THREADS = 128;

DEVICE float4 add(float4 left, float4 right) {
    return make_float4(__fadd_rn(left.x, right.x), __fadd_rn(left.y, right.y), __fadd_rn(left.z, right.z),
                       __fadd_rn(left.w, right.w));
}

}  // namespace tree

// A thread has four columns of a row. Dynamic shared memory: a float4 for each thread and sum that is held.
KERNEL(sum_tree, SumTreeArgs, 128, 8) {
    SHARED(float4, held);
    size_t at = 4 * ((size_t)blockIdx.x * tree::THREADS + threadIdx.x);
    if (at >= (size_t)args.header->n_rows * args.n_embd) return;
    float4 *next = held + threadIdx.x;
    for (uint32_t step = 0; step < args.n_steps; step++) {
        int32_t part = args.steps[step];
        if (part < 0) {
            next -= tree::THREADS;
            next[-tree::THREADS] = tree::add(next[-tree::THREADS], *next);
        } else {
            *next = *(const float4 *)(args.parts + (size_t)part * args.part_elements + at);
            next += tree::THREADS;
        }
    }
    *(float4 *)(args.out + at) = held[threadIdx.x];
}
