// Pieces of 256 entries of a weight: their noise, and their numbers read from and written to any storage.

#ifndef EDGESFT_PERTURB_PIECES_H
#define EDGESFT_PERTURB_PIECES_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "noise.h"

extern "C" {

// A direction and its length. law: 0 gaussian, 1 rademacher, 2 low-rank; -1: no direction, the weight itself.
struct Term {
    uint64_t seed;
    float scale;
    int32_t law, rank, unused;
};

// w <- shrink w + the terms first .. first + count - 1. rounds: whether `rounding` seeds stochastic rounding.
struct Step {
    int64_t first, count;
    uint64_t rounding;
    float shrink;
    int32_t rounds;
};

// Which entries take part: low <= |w| <= high and, if keep < 256, byte(seed, tensor, index) < keep.
struct Rule {
    float low, high;
    int32_t keep;
    uint32_t tensor;
    uint64_t seed;
};

// A weight (rows, width), row-major. type: 0 float32, 1 bfloat16, 2 codes of 8 bits, 3 codes of 4 bits; codes
// have float16 scales (rows, ceil(width / group)), and rows of whole bytes.
struct Matrix {
    void* data;
    const uint16_t* scales;
    int64_t rows, width;
    int32_t type, group;
};

}  // extern "C"

namespace {

using namespace edgesft;

constexpr int64_t TILE = 8 * PIECE;         // entries that a thread takes at a time
constexpr int32_t NONE = -1, LOW_RANK = 2;  // laws beside those that are domains
constexpr int32_t FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2;
constexpr uint32_t LEFT = 0x75, RIGHT = 0x76;  // u and v of a low-rank direction have ids of their own

// The part [begin, end) of a piece that lies in [start, stop), relative to the piece.
struct Part {
    int64_t origin;
    int begin, end;

    Part(int64_t piece, int64_t start, int64_t stop)
        : origin(piece * PIECE),
          begin(origin < start ? static_cast<int>(start - origin) : 0),
          end(stop < origin + PIECE ? static_cast<int>(stop - origin) : PIECE) {}

    bool whole() const { return begin == 0 && end == PIECE; }
};

// f(part) for every piece with entries in [start, stop).
template <class F>
inline void pieces(int64_t start, int64_t stop, F f) {
    for (int64_t piece = start / PIECE; piece * PIECE < stop; ++piece) f(Part(piece, start, stop));
}

// The noise of one direction of one tensor.
class Source {
  public:
    Source(const Term& term, uint32_t tensor, int64_t width)
        : term_(term), key_(term.seed), tensor_(tensor), width_(width) {}

    bool draws(const Term& other) const {
        return term_.seed == other.seed && term_.law == other.law && term_.rank == other.rank;
    }

    // The entries asked for next lie in [start, stop).
    void range(int64_t start, int64_t stop) {
        if (term_.law != LOW_RANK || start >= stop) return;
        const int64_t rank = term_.rank;
        if (right_.empty()) {  // (rank, width), so that a row of z is made along memory
            right_.resize(static_cast<size_t>(rank * width_));
            gaussians(tensor_ ^ RIGHT, 0, width_ * rank,
                      [&](int64_t i, float z) { right_[static_cast<size_t>(i % rank * width_ + i / rank)] = z; });
        }
        row_ = start / width_;
        const int64_t first = row_ * rank, last = ((stop - 1) / width_ + 1) * rank;
        left_.resize(static_cast<size_t>(last - first));
        gaussians(tensor_ ^ LEFT, first, last,
                  [&](int64_t i, float z) { left_[static_cast<size_t>(i - first)] = z; });
    }

    // z of the piece; of a low-rank direction only the entries in the range.
    void unit(const Part& part, float* __restrict z) {
        if (term_.law == static_cast<int32_t>(GAUSSIAN)) {
            normals(key_, tensor_, static_cast<uint64_t>(part.origin / 4), z);
        } else if (term_.law == LOW_RANK) {
            product(part, z);
        } else {
            const uint32_t* words = bits(part);
            for (int i = 0; i < PIECE; i += 32) {
                const uint32_t word = words[i / 32];
#pragma omp simd
                for (int j = 0; j < 32; ++j) z[i + j] = signed_by(1.0f, word, j);
            }
        }
    }

    bool is_signs() const { return term_.law == static_cast<int32_t>(RADEMACHER); }

    // The 256 sign bits of the piece.
    const uint32_t* bits(const Part& part) {
        const int64_t tile = part.origin / TILE;
        if (tile != tile_) signs(key_, tensor_, static_cast<uint64_t>(tile * (TILE / 128)), TILE / 128, words_);
        tile_ = tile;
        return words_ + part.origin % TILE / 32;
    }

  private:
    template <class F>
    void gaussians(uint32_t tensor, int64_t start, int64_t stop, F put) const {
        pieces(start, stop, [&](const Part& part) {
            alignas(64) float z[PIECE];
            normals(key_, tensor, static_cast<uint64_t>(part.origin / 4), z);
            for (int i = part.begin; i < part.end; ++i) put(part.origin + i, z[i]);
        });
    }

    void product(const Part& part, float* __restrict z) const {
        const int64_t rank = term_.rank;
        const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(rank)));
        for (int at = part.begin; at < part.end;) {
            const int64_t index = part.origin + at, row = index / width_, column = index % width_;
            const int some = width_ - column < part.end - at ? static_cast<int>(width_ - column) : part.end - at;
            const float* u = left_.data() + (row - row_) * rank;
            const float* v = right_.data() + column;
            float* to = z + at;
#pragma omp simd
            for (int i = 0; i < some; ++i) to[i] = u[0] * v[i];
            for (int64_t r = 1; r < rank; ++r) {
                const float scale = u[r];
                const float* next = v + r * width_;
#pragma omp simd
                for (int i = 0; i < some; ++i) to[i] = to[i] + scale * next[i];
            }
#pragma omp simd
            for (int i = 0; i < some; ++i) to[i] = to[i] * norm;
            at += some;
        }
    }

    Term term_;
    Key key_;
    uint32_t tensor_;
    int64_t width_, tile_ = -1, row_ = 0;
    uint32_t words_[TILE / 32];
    std::vector<float> left_, right_;
};

inline float from_half(uint16_t x) {  // finite or not, subnormal too
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, rest = x & 0x7FFFu;
    if (rest >= 0x7C00u) return as_float(static_cast<int32_t>(sign | 0x7F800000u | (rest & 0x3FFu) << 13));
    // Five bits of exponent end up in the place of eight: the product puts the bias right.
    const float size = as_float(static_cast<int32_t>(rest << 13)) * 0x1p112f;
    return as_float(static_cast<int32_t>(sign | static_cast<uint32_t>(as_int(size))));
}

// The entries of a piece, made ready for work.
struct Cell {
    alignas(64) float w[PIECE];
    alignas(64) float scale[PIECE];  // of codes
    alignas(64) int32_t code[PIECE];
    alignas(64) uint8_t bytes[PIECE];  // that choose the share of the mask
    alignas(64) uint32_t random[PIECE];
    alignas(64) float z[PIECE];
    alignas(64) float sum[PIECE];
};

// f(row, column, group, at, some): runs of entries of one row and one group. Divides once a piece.
template <class F>
inline void runs(const Matrix& m, const Part& part, F f) {
    const int64_t index = part.origin + part.begin;
    int64_t row = index / m.width, column = index % m.width, group = column / m.group;
    int64_t room = (group + 1) * m.group - column;
    for (int at = part.begin; at < part.end;) {
        int64_t some = room < m.width - column ? room : m.width - column;
        if (some > part.end - at) some = part.end - at;
        f(row, column, group, at, static_cast<int>(some));
        at += static_cast<int>(some);
        column += some;
        ++group;
        room = m.group;
        if (column == m.width) {
            ++row;
            column = group = 0;
        }
    }
}

inline void unpack(const uint8_t* row, int64_t column, int some, int32_t* __restrict to) {
    int i = 0;
    if (column & 1) to[i++] = row[column / 2] >> 4;
    const uint8_t* from = row + (column + i) / 2;
    const int pairs = (some - i) / 2;
    int32_t* out = to + i;
#pragma omp simd
    for (int p = 0; p < pairs; ++p) {
        out[2 * p] = from[p] & 15;
        out[2 * p + 1] = from[p] >> 4;
    }
    i += 2 * pairs;
    if (i < some) to[i] = row[(column + i) / 2] & 15;
    for (int j = 0; j < some; ++j) to[j] -= 8;
}

inline void pack(uint8_t* row, int64_t column, int some, const int32_t* from) {
    int i = 0;
    if (column & 1) {
        row[column / 2] = static_cast<uint8_t>((row[column / 2] & 15) | (from[0] + 8) << 4);
        i = 1;
    }
    uint8_t* to = row + (column + i) / 2;
    const int pairs = (some - i) / 2;
    const int32_t* in = from + i;
#pragma omp simd
    for (int p = 0; p < pairs; ++p) to[p] = static_cast<uint8_t>((in[2 * p] + 8) | (in[2 * p + 1] + 8) << 4);
    i += 2 * pairs;
    if (i < some) row[(column + i) / 2] = static_cast<uint8_t>((row[(column + i) / 2] & 0xF0) | (from[i] + 8));
}

inline int64_t row_bytes(const Matrix& m) { return m.type == INT8 ? m.width : (m.width + 1) / 2; }

// The weights of a piece as float32: in place, or made in the cell.
inline const float* load(const Matrix& m, const Part& part, Cell& cell) {
    if (m.type == FLOAT32) return static_cast<const float*>(m.data) + part.origin;
    if (m.type == BFLOAT16) {
        const uint16_t* from = static_cast<const uint16_t*>(m.data) + part.origin;
#pragma omp simd
        for (int i = part.begin; i < part.end; ++i) cell.w[i] = from_bf16(from[i]);
        return cell.w;
    }
    const int64_t groups = (m.width + m.group - 1) / m.group;
    runs(m, part, [&](int64_t row, int64_t column, int64_t group, int at, int some) {
        const uint8_t* data = static_cast<const uint8_t*>(m.data) + row * row_bytes(m);
        const float scale = from_half(m.scales[row * groups + group]);
        if (m.type == INT8) {
            const int8_t* codes = reinterpret_cast<const int8_t*>(data) + column;
#pragma omp simd
            for (int i = 0; i < some; ++i) cell.code[at + i] = codes[i];
        } else {
            unpack(data, column, some, cell.code + at);
        }
#pragma omp simd
        for (int i = at; i < at + some; ++i) {
            cell.scale[i] = scale;
            cell.w[i] = static_cast<float>(cell.code[i]) * scale;
        }
    });
    return cell.w;
}

inline void store_codes(const Matrix& m, const Part& part, const Cell& cell) {
    runs(m, part, [&](int64_t row, int64_t column, int64_t, int at, int some) {
        uint8_t* data = static_cast<uint8_t*>(m.data) + row * row_bytes(m);
        if (m.type == INT8) {
            int8_t* codes = reinterpret_cast<int8_t*>(data) + column;
#pragma omp simd
            for (int i = 0; i < some; ++i) codes[i] = static_cast<int8_t>(cell.code[at + i]);
        } else {
            pack(data, column, some, cell.code + at);
        }
    });
}

}  // namespace

#endif
