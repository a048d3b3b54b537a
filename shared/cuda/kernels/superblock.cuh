// K-quants, packed: a tile is a record for each superblock of 256 columns, which holds all there is to know about these
// columns of its 16 rows. How a lane finds its operands in a record; nothing is multiplied here.
//
// What is multiplied are the numbers of the file, but for one rounding: of code times small scale, to bfloat16. The scale and
// the minimum of the superblock stay out of the products. Codes are never converted: a bfloat16 number of whose bits only the
// lower 8 may be set is that integer times 2^-133, whether it is subnormal or not. So a fused multiplication with a scale that
// is 2^120 times too large gives the rounded product times 2^-13, and what is left is a factor of 2^13 for the superblock.
#pragma once
#include "matrix.cuh"

// Superblocks have this many units.
constexpr int SUPER_UNITS = 4;

// Small scales of a superblock, and what they are for.
enum class SmallScales {
    BYTES_MIN,    // u8 scale and minimum of each group of 32 columns
    NIBBLES_MIN,  // the same of 4 bits for each half group
    SIGNED,       // i8 scale of each half group
};

// How words are read: from global memory for the one time they are needed, or from anywhere.
struct ReadOnce {
    template <int n> DEVICE static void words(uint32_t *to, const uint8_t *at) { load_once<n>(to, at); }
};
struct Read {
    template <int n> DEVICE static void words(uint32_t *to, const uint8_t *at) {
        if constexpr (n == 4) {
            uint4 w = *reinterpret_cast<const uint4 *>(at);
            to[0] = w.x, to[1] = w.y, to[2] = w.z, to[3] = w.w;
        } else if constexpr (n == 2) {
            uint2 w = *reinterpret_cast<const uint2 *>(at);
            to[0] = w.x, to[1] = w.y;
        } else {
            to[0] = *reinterpret_cast<const uint32_t *>(at);
        }
    }
};

// A record has, in this order,
//   codes    of each unit the first 2 or 4 words of each lane, then of each unit the others. A lane has as many words in a unit
//            as a code has bits; `code_at` tells which bits are whose.
//   scales   for g = 0..7 [unit][2 groups][rows g, g + 8] u8, or [unit][rows g, g + 8][4 steps] i8 or nibbles
//   minimums for each lane (g, t) [rows g, g + 8][groups 2 t, 2 t + 1] u8, or
//            [rows g, g + 8][half groups 2 t, 2 t + 1, 2 t + 8, 2 t + 9] nibbles
//   supers   for g = 0..7 of rows g and g + 8 f16 d, and f16 m where there are minimums
template <int BITS_, int OFFSET_, SmallScales SMALL_> struct SuperFormat {
    static constexpr int BITS = BITS_, OFFSET = OFFSET_;
    static constexpr SmallScales SMALL = SMALL_;
    static constexpr bool MIN = SMALL != SmallScales::SIGNED, PER_HALF = SMALL != SmallScales::BYTES_MIN;
    static constexpr int FIRST_WORDS = BITS >= 4 ? 4 : 2, OTHER_WORDS = BITS - FIRST_WORDS;
    static constexpr int FIRST_BYTES = 128 * FIRST_WORDS, OTHER_BYTES = 128 * OTHER_WORDS;
    static constexpr int SCALE_WORDS = SMALL == SmallScales::SIGNED ? 8 : 4;
    static constexpr int OTHERS_AT = SUPER_UNITS * FIRST_BYTES;
    static constexpr int SCALES_AT = OTHERS_AT + SUPER_UNITS * OTHER_BYTES;
    static constexpr int MINIMUMS_AT = SCALES_AT + 32 * SCALE_WORDS;
    static constexpr int SUPERS_AT = MINIMUMS_AT + (MIN ? 128 : 0);
    static constexpr int RECORD_BYTES = SUPERS_AT + (MIN ? 64 : 32);
    // Core matrices of the sums of activations that minimums are multiplied with, for 8 rows and a superblock.
    static constexpr int SUM_WORDS = !MIN ? 0 : PER_HALF ? 4 : 2;

    // A lane's codes of a unit.
    struct Codes {
        uint32_t words[BITS];

        template <class Way> DEVICE void load(const uint8_t *record, int unit, int lane, Way) {
            Way::template words<FIRST_WORDS>(words, record + unit * FIRST_BYTES + lane * 4 * FIRST_WORDS);
            if constexpr (OTHER_WORDS > 0) {
                const uint8_t *others = record + OTHERS_AT + unit * OTHER_BYTES;
                Way::template words<OTHER_WORDS>(words + FIRST_WORDS, others + lane * 4 * OTHER_WORDS);
            }
        }
    };

    // A lane's scales of a superblock.
    struct Scales {
        uint32_t small[SCALE_WORDS], minimums, super[MIN ? 2 : 1];

        template <class Way> DEVICE void load(const uint8_t *record, int lane, Way) {
            const uint8_t *at = record + SCALES_AT + lane / 4 * 4 * SCALE_WORDS;
            Way::template words<4>(small, at);
            if constexpr (SCALE_WORDS == 8) Way::template words<4>(small + 4, at + 16);
            if constexpr (MIN) Way::template words<1>(&minimums, record + MINIMUMS_AT + lane * 4);
            Way::template words<(MIN ? 2 : 1)>(super, record + SUPERS_AT + lane / 4 * (MIN ? 8 : 4));
        }
        // 2^13 d of row g + 8 half.
        DEVICE float scale(int half) const {
            uint32_t bits = MIN ? super[half % (MIN ? 2 : 1)] : super[0] >> (16 * half);
            return __fmul_rn(half_to_float((uint16_t)bits), 8192.0f);
        }
        // -m of row g + 8 half.
        DEVICE float minimum(int half) const { return -half_to_float((uint16_t)(super[half % (MIN ? 2 : 1)] >> 16)); }
    };

    // What makes operand A of codes in one step: for rows g and g + 8, two equal numbers each.
    struct Factors {
        uint32_t scale[2], zero[2];
    };

    DEVICE static Factors factors(const Scales &scales, int unit, int s) {
        Factors factors;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Where rows g + 8 have codes times 16.
            constexpr uint32_t POWER_120 = 0x7b807b80u, POWER_116 = 0x79807980u, MINUS_POWER_127 = 0xff00ff00u,
                               MINUS_POWER_123 = 0xfd00fd00u;
            const bool is_sixteenth = BITS == 4 && half == 1;
            factors.zero[half] = 0x80008000u;
            if constexpr (SMALL == SmallScales::SIGNED) {
                uint32_t code = pick_bytes(scales.small[2 * unit + half] ^ 0x80808080u, 0, 0x4040 + 0x0101 * s);
                // Now the scale + 128; then it is 2^-6 times the scale.
                uint32_t small = multiply_add_bf16(code, 0x7f007f00u, 0xc000c000u);
                factors.scale[half] = multiply_bf16(small, 0x7e807e80u);
                constexpr uint32_t ZERO = OFFSET == 32 ? 0xbe80u : 0xbd00u;
                static_assert(OFFSET == 32 || OFFSET == 4, "the bits of -2^-7 OFFSET");
                factors.zero[half] = multiply_bf16(small, ZERO << 16 | ZERO);
            } else {
                // The bits of 128 + scale.
                uint32_t bits;
                if constexpr (SMALL == SmallScales::BYTES_MIN) {
                    bits = pick_bytes(scales.small[unit], 0x43434343u, 0x4040 + 0x0101 * (s / 2 * 2 + half));
                } else {
                    uint32_t both = pick_bytes(scales.small[unit], 0, 0x4040 + 0x0101 * (half * 2 + s / 2));
                    bits = (both >> (s % 2 * 4) & 0x000f000fu) | 0x43004300u;
                }
                factors.scale[half] = is_sixteenth ? multiply_add_bf16(bits, POWER_116, MINUS_POWER_123)
                                                   : multiply_add_bf16(bits, POWER_120, MINUS_POWER_127);
            }
        }
        return factors;
    }

    // Codes of register r = 4 s + p of a unit: pairs of columns 2 t and 2 t + 1 (+ 8 for p >= 2) in step s, of row g (p even) or
    // g + 8. In the halves of each word lie 16 / BITS registers; what is left over of all words is the rest of the registers.
    DEVICE static uint32_t codes_of(const Codes &codes, int r) {
        constexpr int FIELDS = 16 / BITS, WHOLE = FIELDS * BITS;
        constexpr uint32_t MASK = (1u << BITS) - 1;
        if constexpr (BITS == 4) {
            uint32_t word = r % 4 / 2 ? codes.words[r / 4] >> 8 : codes.words[r / 4];
            return word & (r % 2 ? 0x00f000f0u : 0x000f000fu);
        } else if (r < WHOLE) {
            return codes.words[r / FIELDS] >> (r % FIELDS * BITS) & (MASK << 16 | MASK);
        } else if constexpr (BITS == 6) {
            int i = r - WHOLE;
            uint32_t low = codes.words[i % 4] >> 12 & 0x000f000fu;
            return low | (codes.words[4 + i / 2 % 2] >> (8 + i % 2 * 2) & 0x00300030u);
        } else {
            uint32_t bits = 0;
#pragma unroll
            for (int bit = 0; bit < BITS; bit++) bits |= codes.words[bit] >> (15 - bit) & (0x00010001u << bit);
            return bits;
        }
    }

    // Operand A of step s: 2^-13 times the rounded products of codes, less OFFSET, and small scales.
    DEVICE static void operand_a(uint32_t (&a)[4], const Codes &codes, const Factors &factors, int s) {
#pragma unroll
        for (int p = 0; p < 4; p++) {
            a[p] = multiply_add_bf16(codes_of(codes, 4 * s + p), factors.scale[p % 2], factors.zero[p % 2]);
        }
    }
    // Operand A of all units of 64 columns has factors for each step, or each other step.
    static constexpr int STEPS_OF_FACTORS = PER_HALF ? 1 : 2;

    // Minimums as operand A: columns 0..7 and 8..15 are the 8 groups, twice; or the 16 half groups.
    DEVICE static void minimums_a(uint32_t (&a)[4], const Scales &scales) {
#pragma unroll
        for (int p = 0; p < 4; p++) {
            uint32_t bits;
            if constexpr (PER_HALF) {
                uint32_t both = pick_bytes(scales.minimums, 0, 0x4040 + 0x0101 * (p % 2 * 2 + p / 2));
                bits = (both & 0x0000000fu) | (both >> 4 & 0x000f0000u) | 0x43004300u;
            } else {
                bits = pick_bytes(scales.minimums, 0x43434343u, 0x4140 + 0x0202 * (p % 2));
            }
            a[p] = subtract_bf16(bits, 0x43004300u);
        }
    }

    // One weight, as a number: what the products mean, without their rounding.
    DEVICE static float weight(const Matrix &matrix, int row, int k) {
        int column = matrix.first_group * 32 + k, unit = column % 256 / UNIT_K, s = column % UNIT_K / 16, kk = column % 16;
        int g = row % 8, half = row % TILE_ROWS / 8, p = kk / 8 * 2 + half;
        const uint8_t *record = matrix.tiles + row / TILE_ROWS * matrix.tile_bytes + (int64_t)(column / 256) * RECORD_BYTES;
        Codes codes;
        codes.load(record, unit, g * 4 + kk % 8 / 2, Read());
        Scales scales;
        int group = SMALL == SmallScales::NIBBLES_MIN ? column % 256 / 16 : column % 256 / 32;
        scales.load(record, g * 4 + group % 8 / 2, Read());
        int code = (int)(codes_of(codes, 4 * s + p) >> (16 * (kk % 2)) & 0xffu) >> (BITS == 4 ? 4 * half : 0);
        float scale = __fmul_rn(scales.scale(half), 0x1p-13f);
        uint32_t small = scales.small[SMALL == SmallScales::SIGNED ? 2 * unit + half : unit];
        if constexpr (SMALL == SmallScales::SIGNED) {
            return __fmul_rn(__fmul_rn(scale, (float)(int8_t)(small >> (8 * s))), (float)(code - OFFSET));
        } else {
            bool is_byte = SMALL == SmallScales::BYTES_MIN;
            uint32_t factor = is_byte ? small >> (s / 2 * 16 + half * 8) & 255 : small >> (16 * half + 4 * s) & 15;
            uint32_t minimum = is_byte ? scales.minimums >> (16 * half + group % 2 * 8) & 255
                                       : scales.minimums >> (16 * half + group / 8 * 8 + group % 2 * 4) & 15;
            float product = __fmul_rn(__fmul_rn(scale, (float)factor), (float)code);
            return __fadd_rn(product, __fmul_rn(scales.minimum(half), (float)minimum));
        }
    }
};

// Names as in src/pack.rs.
typedef SuperFormat<2, 0, SmallScales::NIBBLES_MIN> Q2_K;
typedef SuperFormat<3, 4, SmallScales::SIGNED> Q3_K;
typedef SuperFormat<4, 0, SmallScales::BYTES_MIN> Q4_K;
typedef SuperFormat<5, 0, SmallScales::BYTES_MIN> Q5_K;
typedef SuperFormat<6, 32, SmallScales::SIGNED> Q6_K;
