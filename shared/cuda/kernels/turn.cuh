// Rotary embedding (Su et al. 2021) of a few elements: what it does to a number is said here once.
#pragma once
#include "layout.cuh"

namespace rope {

// The greatest half: what the cache holds stays finite, so that a weight of zero hides it whatever it is.
constexpr float HALF_MAX = 65504.0f;
DEVICE float finite(float x) { return fminf(fmaxf(x, -HALF_MAX), HALF_MAX); }

struct Turned {
    uint32_t low, high;
};

// Elements i, i + 1 (`a`) and i + head_dim / 2, i + 1 + head_dim / 2 (`b`) of a head, turned by {cos, sin} of i and of i + 1.
DEVICE Turned turn(float2 a, float2 b, float4 rotation) {
    float low_x = fmaf(a.x, rotation.x, -__fmul_rn(b.x, rotation.y));
    float low_y = fmaf(a.y, rotation.z, -__fmul_rn(b.y, rotation.w));
    float high_x = fmaf(b.x, rotation.x, __fmul_rn(a.x, rotation.y));
    float high_y = fmaf(b.y, rotation.z, __fmul_rn(a.y, rotation.w));
    return {pack_half(finite(low_x), finite(low_y)), pack_half(finite(high_x), finite(high_y))};
}

// Puts four elements of a value where the cache has them, `at` the values of the block and head.
DEVICE void store_value(uint16_t *at, int slot, int i, int half_dim, float2 a, float2 b) {
    at[value_index(slot, i)] = float_to_half(finite(a.x));
    at[value_index(slot, i + 1)] = float_to_half(finite(a.y));
    at[value_index(slot, i + half_dim)] = float_to_half(finite(b.x));
    at[value_index(slot, i + half_dim + 1)] = float_to_half(finite(b.y));
}
// And two pairs of a key.
DEVICE void store_key(uint16_t *at, int slot, int i, int half_dim, Turned turned) {
    *(uint32_t *)(at + key_index(slot, i, 2 * half_dim)) = turned.low;
    *(uint32_t *)(at + key_index(slot, i + half_dim, 2 * half_dim)) = turned.high;
}

}  // namespace rope
