// Where elements of matrices, activations and the KV cache lie in device memory. Matrices and activations consist of core
// matrices, 8 rows of 16 bytes in a row, as wgmma reads them from shared memory (PTX ISA, "Shared memory matrix layout") and
// ldmatrix hands them to mma.m16n8k16. The KV cache has the order of that instruction's fragments itself, so that a lane's
// operands are one aligned load. No shuffle or transpose stands between memory and the tensor cores.
//
// In all of them lane = 4 * g + t, with g = lane / 4 and t = lane % 4.
#pragma once
#include "ptx.cuh"

// Columns of matrices and activations are padded with zeros to a multiple of this.
constexpr int UNIT_K = 64;
// Output rows of a weight tile.
constexpr int TILE_ROWS = 16;
// Positions of a KV block.
constexpr int BLOCK_POSITIONS = 16;

// Bytes of a core matrix.
constexpr int CORE_BYTES = 128;

// Activations, elements of 16 bits: 8 rows by 8 columns are a core matrix; these follow each other along the columns, and
// then come the next 8 rows. `k_padded` is a multiple of 8.
HOST_DEVICE inline size_t operand_b_index(int row, int k, int k_padded) {
    size_t core = (size_t)(row / 8) * (k_padded / 8) + k / 8;
    return core * (CORE_BYTES / 2) + row % 8 * 8 + k % 8;
}

// Keys of one KV head in one block: the fragment of operand B with positions as rows, head_dim as columns, in tiles of 8 rows
// by 32 columns. Lane (g, t) holds row g, columns {0, 1, 8, 9, 16, 17, 24, 25} + 2 t.
HOST_DEVICE inline int key_index(int slot, int dim, int head_dim) {
    int in_k = dim % 32, half = in_k / 16, high = in_k % 16 / 8, t = in_k % 8 / 2, low = in_k % 2;
    int tile = slot / 8 * (head_dim / 32) + dim / 32;
    return tile * 256 + (slot % 8 * 4 + t) * 8 + half * 4 + high * 2 + low;
}

// Values of one KV head in one block: operand B of the second product, dimensions as rows and the 16 positions as
// columns; pairs of row tiles side by side, so that a lane loads 16 bytes. Lane (g, t) holds dimensions g and g + 8,
// positions {0, 1, 8, 9} + 2 t of each. `head_dim` is a multiple of 16.
HOST_DEVICE inline int value_index(int slot, int dim) {
    int high = slot / 8, t = slot % 8 / 2, low = slot % 2;
    int in_pair = dim % 16;
    return dim / 16 * 256 + (in_pair % 8 * 4 + t) * 8 + in_pair / 8 * 4 + high * 2 + low;
}
