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
// In a file stream and scales are apart. In memory the scales of a strip, filled up to 64 bytes, lie before its
// tiles: a second stream of its own would be fetched from memory too late.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgesft::nm {

constexpr int ABI = 1;  // of the functions that linear.cpp exports
constexpr int ROWS = 16, COLUMNS = 32;
constexpr int FAR = 16384, NEAR = 1024;  // bytes of a stream fetched before they are due, see `fetch`
constexpr int FEW = 4;       // rows of x that meet a tile at a time in decode

enum Value : int { INT4 = 0, INT8 = 1, FP16 = 2, BF16 = 3 };

struct Matrix {
    const uint8_t* memory;        // strips, each its scales and then its tiles
    int64_t head, stride;         // bytes of a strip's scales, and of all of it
    int64_t rows, columns;
    int64_t tiles, strips;        // tiles of a strip
    int64_t group_tiles, groups;  // tiles that share scales; such groups in a strip
    int sparse;                   // 1: 2:4
    int value;                    // Value
    float unit;

    const uint8_t* strip(int64_t number) const { return memory + number * stride; }
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

inline int64_t spread_bytes(const Matrix& w) { return w.tiles * ROWS * COLUMNS; }

extern const Table generic;
#if defined(__x86_64__) || defined(_M_X64)
extern const Table avx2, avx512;
#elif defined(__aarch64__)
extern const Table neon, neon_dot;
#endif

}  // namespace edgesft::nm
