// Packed matrices and the work on them, shared by all instruction sets. docs/format.md describes the bytes.
//
// A matrix (rows, columns) lies in strips of 16 rows, a strip in tiles of 32 columns that follow each other, so
// that a thread reads one stream. Rows are filled up to 16 and columns to 32 with weights of 0.
//   index, 64 bytes, of 2:4 only: byte 4 row + s has four 2-bit fields p = 0..3. Field p of s = 0, 1 is the place
//     of a kept weight among columns 8p..8p+3, of s = 2, 3 among columns 8p+4..8p+7.
//   planes of codes, 64 bytes each: 2:4 has four, byte 4 row + s of plane p being the weight of that field; dense
//     has eight, byte 4 row + c of plane p being column 4p+c. int8 codes are weight + 128. int4 codes are
//     weight + 8, two planes to 64 bytes, the even one in the lower halves.
//   fp16 and bf16 (2:4 only): 16 vectors of 16 rows, vector 4p+s.
// Scales are fp16 (strip, group, 16); a weight is code * scale * unit.
//
// In a file stream and scales are apart. In memory all lies in the order of use, without a gap: processors fetch one
// stream ahead and lose it at every jump (measured: half the bandwidth). A row of x has to stay in the first-level cache
// meanwhile, so wide strips are cut into panels of at most WIDE tiles, and a few strips make a block:
//   block 0: panel 0 of its strips, panel 1 of its strips, ...; block 1: ...
// The piece of a strip in a panel has by turns 64 bytes of scales, those of two groups, and the tiles of these groups.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgesft::nm {

constexpr int ABI = 1;  // of the functions that linear.cpp exports
constexpr int ROWS = 16, COLUMNS = 32, LINE = 64;
constexpr int FEW = 4;    // rows of x that meet a tile at a time in decode
constexpr int WIDE = 32;  // tiles of a panel at most: 1 KiB of a row of x in int8
constexpr int BLOCK = 8;  // strips of a block at most

enum Value : int { INT4 = 0, INT8 = 1, FP16 = 2, BF16 = 3 };

struct Matrix {
    const uint8_t* memory;
    int64_t rows, columns;
    int64_t tiles, strips;        // tiles of a strip
    int64_t group_tiles, groups;  // tiles that share scales; such groups in a strip
    int64_t panel_tiles, panels;  // tiles of all panels but the last, which may have fewer
    int64_t block;                // strips of all blocks but the last, which may have fewer
    int64_t piece, last, whole;   // bytes of a strip in a panel, in the last panel, in all of them
    int sparse;                   // 1: 2:4
    int value;                    // Value
    float unit;

    int64_t tiles_of(int64_t panel) const { return panel + 1 < panels ? panel_tiles : tiles - panel * panel_tiles; }
    int64_t groups_of(int64_t panel) const { return (tiles_of(panel) + group_tiles - 1) / group_tiles; }
    // Bytes before the tiles of a group, scales of its pair included, when a tile takes `span`.
    int64_t before(int64_t group, int64_t span) const {
        return (value >= FP16 ? 0 : (group / 2 + 1) * LINE) + group * group_tiles * span;
    }
    // Bytes of a piece.
    int64_t extent(int64_t panel, int64_t span) const {
        return (value >= FP16 ? 0 : (groups_of(panel) + 1) / 2 * LINE) + tiles_of(panel) * span;
    }
    int64_t size_of(int64_t panel) const { return panel + 1 < panels ? piece : last; }
    // Where the piece of a strip begins.
    const uint8_t* at(int64_t strip, int64_t panel) const {
        const int64_t first = strip / block * block, together = block < strips - first ? block : strips - first;
        return memory + first * whole + panel * piece * together + (strip - first) * size_of(panel);
    }
};

// Rows of x as the kernels read them, columns filled up with zeros. Either codes, in blocks of 32 with a scale and
// the sum of the codes each, or floats.
struct Activations {
    int64_t tiles;
    const int8_t* codes;    // (m, tiles, 32), -127..127
    const float* scales;    // (m, tiles)
    const int32_t* sums;    // (m, tiles)
    const float* floats;    // (m, tiles, 32)
};

// What becomes of the products (m, strips, 16): y = product + bias + residual, or with `gate`, where strips 2i and
// 2i+1 are gate and up: y = silu(gate + bias) * (up + bias).
struct Finish {
    float* y;                // (m, width)
    const float* bias;       // (rows,) or null
    const float* residual;   // (m, width) or null
    int64_t width;           // of y: rows, or half of them with `gate`
    int gate;
};

// What an instruction set has to offer.
struct Table {
    const char* name;
    // Rows m of x times strips [first, last), read as they are packed. With `gate` both are even.
    void (*packed)(const Matrix&, const Activations&, int64_t m, int64_t first, int64_t last, const Finish&);
    // The same by way of dense int8, which pays from many rows on. int4 and int8 with codes of x only; `memory` has
    // spread_bytes(matrix) of space.
    void (*spread)(const Matrix&, const Activations&, int64_t m, int64_t first, int64_t last, const Finish&,
                   uint8_t* memory);
    // One row of x into codes, scales and sums of `tiles` blocks.
    void (*quantize)(const float* x, int64_t columns, int64_t tiles, int8_t* codes, float* scales, int32_t* sums);
    // y = x * norm / sqrt(mean(x^2) + epsilon)
    void (*normalize)(const float* x, const float* norm, float epsilon, int64_t columns, float* y);
    // Reads `bytes` of memory in one stream and sums them up, nothing else.
    uint64_t (*read)(const uint8_t* memory, size_t bytes);
};

inline int64_t tile_bytes(int sparse, int value) {
    if (value >= FP16) return 64 + 512;
    const int64_t planes = sparse ? 4 : 8;
    return (sparse ? 64 : 0) + planes * (value == INT4 ? 32 : 64);
}

// Of a strip by way of dense int8.
inline int64_t spread_bytes(const Matrix& w) { return w.panels * w.extent(0, ROWS * COLUMNS); }

extern const Table generic;
#if defined(__x86_64__) || defined(_M_X64)
extern const Table avx2, avx512;
#elif defined(__aarch64__)
extern const Table neon, neon_dot;
#endif

}  // namespace edgesft::nm
