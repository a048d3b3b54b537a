// Where elements of matrices, activations and the KV cache lie in device memory. The layouts are those of the operands
// of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type"), so that a lane's operands
// are one aligned load and no shuffle or transpose stands between memory and the tensor cores.
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

// Elements of 16 bits with the fragment of operand B: tiles of 8 rows by 32 columns, 512 bytes each, in lane order; row
// tile by row tile, in each along the columns. Lane (g, t) holds row g, columns {0, 1, 8, 9, 16, 17, 24, 25} + 2 t.
// `k_padded` is a multiple of 32.
HOST_DEVICE inline size_t operand_b_index(int row, int k, int k_padded) {
    int in_row = row % 8, in_k = k % 32;
    int half = in_k / 16, high = in_k % 16 / 8, t = in_k % 8 / 2, low = in_k % 2;
    size_t tile = (size_t)(row / 8) * (k_padded / 32) + k / 32;
    return tile * 256 + (in_row * 4 + t) * 8 + half * 4 + high * 2 + low;
}

// Keys of one KV head in one block: operand B with positions as rows, head_dim as columns.
HOST_DEVICE inline int key_index(int slot, int dim, int head_dim) {
    return (int)operand_b_index(slot, dim, head_dim);
}

// Values of one KV head in one block: operand B of the second product, dimensions as rows and the 16 positions as
// columns; pairs of row tiles side by side, so that a lane loads 16 bytes. Lane (g, t) holds dimensions g and g + 8,
// positions {0, 1, 8, 9} + 2 t of each. `head_dim` is a multiple of 16.
HOST_DEVICE inline int value_index(int slot, int dim) {
    int high = slot / 8, t = slot % 8 / 2, low = slot % 2;
    int in_pair = dim % 16;
    return dim / 16 * 256 + (in_pair % 8 * 4 + t) * 8 + in_pair / 8 * 4 + high * 2 + low;
}
