// Rows of the embedding matrix, looked up in its packed form: the residual stream begins with them.
#include "batch.cuh"
#include "matrix.cuh"

struct EmbedArgs {
    Matrix matrix;
    const BatchHeader *header;
    const uint32_t *tokens;  // [n_rows]
    float *hidden;           // [n_rows][n_embd]
    int32_t kind;            // number of the weight type, see the kernel below
    int32_t n_embd;
};

namespace embed {

template <class F> DEVICE void row(const EmbedArgs &args) {
    int row = blockIdx.x, token = (int)args.tokens[row];
    for (int k = threadIdx.x; k < args.n_embd; k += blockDim.x) {
        args.hidden[(size_t)row * args.n_embd + k] = F::weight(args.matrix, token, k);
    }
}

}  // namespace embed

KERNEL(embed, EmbedArgs, 256, 4) {
    if (blockIdx.x >= args.header->n_rows) return;
    // Numbers as src/pack.rs gives them (`Kind`).
    switch (args.kind) {
        case 0: return embed::row<Bf16>(args);
        case 1: return embed::row<Q4_0>(args);
        case 2: return embed::row<Q4_1>(args);
        case 3: return embed::row<Q5_0>(args);
        case 4: return embed::row<Q5_1>(args);
        case 5: return embed::row<Q8_0>(args);
        case 6: return embed::row<Q2_K>(args);
        case 7: return embed::row<Q3_K>(args);
        case 8: return embed::row<Q4_K>(args);
        case 9: return embed::row<Q5_K>(args);
        default: return embed::row<Q6_K>(args);
    }
}
