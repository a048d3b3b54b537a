// What the kernels of sampling have in common: logarithms with the operations of shared/sampling/src/math.rs, cuts of
// shared/sampling/src/filter.rs. Every operation that rounds is written out, so that no compiler joins two of them.
#pragma once
#include "batch.cuh"

// The last kept token in the order (logit falling, id rising).
struct Cut {
    float logit;
    uint32_t token;
};

namespace sampling {

constexpr float NONE = -__builtin_huge_valf();

DEVICE float without_nan(float logit) { return logit == logit ? logit : NONE; }

DEVICE bool keeps(Cut cut, float logit, uint32_t token) {
    return logit > cut.logit || (logit == cut.logit && token <= cut.token);
}

// x = (1 + f) * 2^e
struct Split {
    float f, e;
};
DEVICE Split split(float x) {
    uint32_t bits = __float_as_uint(x);
    int exponent = (int)(bits - 0x3f3504f3u) >> 23;
    return {__fsub_rn(__uint_as_float(bits - ((uint32_t)exponent << 23)), 1.0f), (float)exponent};
}

constexpr float LN_2_HIGH = 0.6933594f;
constexpr float LN_2_LOW = -2.1219444e-4f;

DEVICE float ln_of_split(Split x) {
    float s = __fdiv_rn(x.f, __fadd_rn(2.0f, x.f));
    float z = __fmul_rn(s, s);
    float tail = __fadd_rn(1.0f / 7.0f, __fmul_rn(z, 1.0f / 9.0f));
    tail = __fadd_rn(1.0f / 5.0f, __fmul_rn(z, tail));
    tail = __fmul_rn(z, __fadd_rn(1.0f / 3.0f, __fmul_rn(z, tail)));
    float twice = __fadd_rn(s, s);
    float low = __fadd_rn(__fmul_rn(twice, tail), __fmul_rn(x.e, LN_2_LOW));
    return __fadd_rn(__fmul_rn(x.e, LN_2_HIGH), __fadd_rn(twice, low));
}

}  // namespace sampling
