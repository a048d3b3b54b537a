// Packed weight matrices: how a lane finds its operands and scales in them. Nothing is multiplied here.
//
// A matrix is cut into tiles of 16 output rows and units of 64 columns. A unit of plain numbers is core matrices: the upper 8
// rows along the columns, then the lower 8. A unit of codes is stored in the order of operand A of mma.m16n8k16: for each step
// s of 16 columns, lane (g, t) has the pairs p = 0..3 of columns 2 t and 2 t + 1 (+ 8 for p >= 2) of row g (p even) or g + 8
// (p odd). The Rust side of this is src/pack.rs.
#pragma once
#include "layout.cuh"

// Where the scales of a group of 32 columns come from; the names are those of the CPU kernels' formats.
enum class ScaleKind {
    NONE,       // plain numbers
    GROUP,      // f16 d each group: {d, d} of a unit's two groups, 4 bytes a row
    GROUP_MIN,  // f16 d, m each group: 8 bytes a row
};

// Tile after tile; in each the codes of its units, then their upper bits, then their scales. K-quants: see superblock.cuh.
struct Matrix {
    const uint8_t *tiles;
    int64_t tile_bytes;
    int32_t n_tiles;
    int32_t n_units;      // of 64 columns
    int32_t n_supers;     // superblocks of a K-quant's row; they may be there in part
    int32_t first_group;  // place of the first group of 32 columns in its superblock
};

// Scales of rows g and g + 8 for a group.
struct ScalePair {
    float scale[2];
    float min[2];
};

// One unit of one tile, wherever its planes lie.
struct Unit {
    const uint8_t *codes, *high, *scales;
};

DEVICE uint32_t word_at(const uint8_t *bytes, int offset) { return *reinterpret_cast<const uint32_t *>(bytes + offset); }

template <int BITS_, int OFFSET_, ScaleKind SCALES_> struct Format {
    static constexpr int BITS = BITS_, OFFSET = OFFSET_;
    static constexpr ScaleKind SCALES = SCALES_;
    static constexpr bool QUANTIZED = SCALES != ScaleKind::NONE;
    // Bits of the lower plane, and of the plane above it.
    static constexpr int LOW = BITS == 5 ? 4 : BITS;
    static constexpr int HIGH = BITS - LOW;
    // Bytes of a unit of a tile.
    static constexpr int CODE_BYTES = TILE_ROWS * UNIT_K * LOW / 8;
    static constexpr int HIGH_BYTES = TILE_ROWS * UNIT_K * HIGH / 8;
    static constexpr int SCALE_BYTES = !QUANTIZED ? 0 : SCALES == ScaleKind::GROUP_MIN ? 128 : 64;
    static constexpr bool MIN = SCALES == ScaleKind::GROUP_MIN;
    // A unit as it lies in shared memory: codes, upper bits, scales.
    static constexpr int HIGH_AT = CODE_BYTES;
    static constexpr int SCALES_AT = HIGH_AT + HIGH_BYTES;
    static constexpr int STAGED_BYTES = SCALES_AT + SCALE_BYTES;

    // A unit in global memory.
    DEVICE static Unit unit_of(const Matrix &matrix, int tile, int unit) {
        const uint8_t *codes = matrix.tiles + tile * matrix.tile_bytes;
        const uint8_t *high = codes + (size_t)matrix.n_units * CODE_BYTES;
        const uint8_t *scales = high + (size_t)matrix.n_units * HIGH_BYTES;
        return {codes + unit * CODE_BYTES, high + unit * HIGH_BYTES, scales + unit * SCALE_BYTES};
    }

    // A unit in shared memory.
    DEVICE static Unit staged(const uint8_t *unit) {
        return {unit, unit + HIGH_AT, unit + SCALES_AT};
    }

    // Where 16 bytes of a staged unit come from.
    DEVICE static const uint8_t *source(const Unit &unit, int offset) {
        if (offset < HIGH_AT) return unit.codes + offset;
        if (offset < SCALES_AT) return unit.high + (offset - HIGH_AT);
        return unit.scales + (offset - SCALES_AT);
    }

    // Codes of pair p, in the lower halves of two 16-bit lanes.
    DEVICE static uint32_t code_pair(const Unit &unit, int lane, int s, int p) {
        uint32_t codes;
        if constexpr (LOW == 8) {
            codes = (word_at(unit.codes, s * 256 + lane * 8 + p / 2 * 4) >> (p % 2 * 8)) & 0x00ff00ffu;
        } else {
            codes = (word_at(unit.codes, s * 128 + lane * 4) >> (4 * p)) & 0x000f000fu;
        }
        if constexpr (HIGH == 1) codes |= ((word_at(unit.high, lane * 4) >> (s * 4 + p)) & 0x00010001u) << LOW;
        return codes;
    }

    // Operand A of step s of a staged unit. Codes become exact bfloat16 numbers: the bits of 128 + c are 0x4300 | c, from
    // which 128 + OFFSET is subtracted.
    DEVICE static void operand_a(uint32_t (&a)[4], const Unit &unit, int lane, int s) {
        if constexpr (!QUANTIZED) {
            load_matrices(a, unit.codes + s * 2 * CORE_BYTES, CODE_BYTES / 2, CORE_BYTES, lane);
        } else {
#pragma unroll
            for (int p = 0; p < 4; p++) {
                uint32_t codes = code_pair(unit, lane, s, p);
                if constexpr (BITS == 8) {
                    // Only 7 bits fit under the exponent of 128: the eighth chooses what is subtracted, 128 or 256.
                    a[p] = subtract_bf16((codes & 0x007f007fu) | 0x43004300u, (codes & 0x00800080u) ^ 0x43804380u);
                } else {
                    a[p] = subtract_bf16(codes | 0x43004300u, 0x43004300u | (uint32_t)(OFFSET << 16 | OFFSET));
                }
            }
        }
    }

    // Scales of rows g and g + 8 in group `group` of a staged unit.
    DEVICE static ScalePair scales(const Unit &unit, int g, int group) {
        ScalePair pair;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = g + 8 * i;
            pair.min[i] = 0.0f;
            if constexpr (SCALES == ScaleKind::GROUP) {
                pair.scale[i] = half_to_float((uint16_t)(word_at(unit.scales, row * 4) >> (16 * group)));
            } else if constexpr (SCALES == ScaleKind::GROUP_MIN) {
                uint32_t both = word_at(unit.scales, row * 8 + group * 4);
                pair.scale[i] = half_to_float((uint16_t)both);
                pair.min[i] = half_to_float((uint16_t)(both >> 16));
            }
        }
        return pair;
    }

    // One weight of a matrix in global memory, as a number: what the products mean.
    DEVICE static float weight(const Matrix &matrix, int row, int k) {
        int r = row % TILE_ROWS, s = k % UNIT_K / 16, kk = k % 16;
        int lane = r % 8 * 4 + kk % 8 / 2, p = kk / 8 * 2 + r / 8, low = kk % 2;
        Unit unit = unit_of(matrix, row / TILE_ROWS, k / UNIT_K);
        if constexpr (!QUANTIZED) {
            int core = r / 8 * (CODE_BYTES / 2) + k % UNIT_K / 8 * CORE_BYTES;
            return bf16_to_float((uint16_t)(word_at(unit.codes, core + lane * 4) >> (16 * low)));
        } else {
            int code = (int)(code_pair(unit, lane, s, p) >> (16 * low) & 255);
            ScalePair pair = scales(unit, r % 8, k % UNIT_K / 32);
            float product = __fmul_rn(pair.scale[r / 8], (float)(code - OFFSET));
            return MIN ? __fadd_rn(product, pair.min[r / 8]) : product;
        }
    }
};

// Names as in src/pack.rs.
typedef Format<16, 0, ScaleKind::NONE> Bf16;
typedef Format<4, 8, ScaleKind::GROUP> Q4_0;
typedef Format<4, 0, ScaleKind::GROUP_MIN> Q4_1;
typedef Format<5, 16, ScaleKind::GROUP> Q5_0;
typedef Format<5, 0, ScaleKind::GROUP_MIN> Q5_1;
typedef Format<8, 128, ScaleKind::GROUP> Q8_0;
