// One packed linear layer, y = finish(x w^T), on whatever this machine has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "nm.h"

namespace edgesft::nm {

// A matrix as it comes from a file, before anything of it is believed.
struct Given {
    const uint8_t* stream;
    const uint16_t* scales;
    int64_t stream_bytes, scale_count;
    int64_t rows, columns;
    int64_t group;  // columns that share a scale, a multiple of 32; 0: the whole row
    int32_t sparse, value;
    float unit;
};

// Why the matrix is not one, or null. Reads all of it.
const char* problem(const Given& given);

// The matrix of a given one without a problem, whose `memory` is to be filled: `bytes` of it by `load`.
Matrix matrix(const Given& given);
inline size_t bytes(const Matrix& w) { return static_cast<size_t>(w.strips * w.whole); }
void load(const Given& given, const Matrix& w, uint8_t* memory);

// level: 4 computes with x in int8, blocks of 32 with a scale each; 0 with x as it is.
struct Call {
    const float* x;         // (m, columns)
    const float* norm;      // (columns,) or null: x is normed by its root mean square and these weights first
    const float* bias;      // (rows,) or null
    const float* residual;  // (m, rows) or null; not with `gate`
    float* y;               // (m, rows); (m, rows / 2) with `gate`
    int64_t m;
    float epsilon;
    int32_t gate, level;
};

// f(what, 0) .. f(what, count - 1), in any order, perhaps at once.
using Parallel = bool (*)(const void* host, void (*f)(void*, size_t), size_t count, void* what);

// False if `parallel` failed. Allocates only while a thread meets its largest layer for the first time; throws
// std::bad_alloc then.
bool linear(const Matrix& w, const Call& call, Parallel parallel, const void* host);

// Row `row` of the matrix, (columns,).
void read_row(const Matrix& w, int64_t row, float* y);

// The instruction set in use; EDGESFT_ISA names another one. Never one that the machine does not have.
const Table& table();
bool select(const char* name);

// Memory for weights on huge pages, 64-byte aligned; null when there is none.
void* buffer(size_t bytes);
void release(void* memory);

}  // namespace edgesft::nm
