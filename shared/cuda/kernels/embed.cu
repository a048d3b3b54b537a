// Rows of the embedding matrix, looked up in its packed form: the residual stream begins with them.
#include "batch.cuh"
#include "superblock.cuh"

struct EmbedArgs {
    Matrix matrix;
    const BatchHeader *header;
    const uint32_t *tokens;  // [n_rows]
    float *hidden;           // [n_rows][n_embd]
    int32_t kind;            // number of the weight type, see the kernel below
    int32_t n_embd;
};

namespace embedding {

template <class F> DEVICE void row(const EmbedArgs &args) {
    int row = blockIdx.x, token = (int)args.tokens[row];
    for (int k = threadIdx.x; k < args.n_embd; k += blockDim.x) {
        args.hidden[(size_t)row * args.n_embd + k] = F::weight(args.matrix, token, k);
    }
}

}  // namespace embedding

KERNEL(embed, EmbedArgs, 256, 4) {
    if (blockIdx.x >= args.header->n_rows) return;
    // Numbers as src/pack.rs gives them (`Kind`).
    switch (args.kind) {
        case 0: return embedding::row<Bf16>(args);
        case 1: return embedding::row<Q4_0>(args);
        case 2: return embedding::row<Q4_1>(args);
        case 3: return embedding::row<Q5_0>(args);
        case 4: return embedding::row<Q5_1>(args);
        case 5: return embedding::row<Q8_0>(args);
        case 6: return embedding::row<Q2_K>(args);
        case 7: return embedding::row<Q3_K>(args);
        case 8: return embedding::row<Q4_K>(args);
        case 9: return embedding::row<Q5_K>(args);
        default: return embedding::row<Q6_K>(args);
    }
}
