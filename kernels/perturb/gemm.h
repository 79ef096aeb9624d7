// Pieces of the fused product: stored weights to perturbed rows, and x to packed panels.
//
// The perturbed weight is the operand that is broadcast, row after row as it is stored, so that noise, mask and
// dequantisation run along memory; x is transposed into panels, once a call. A tile of the product is therefore
// one of y^T and is turned round when it is written.
//
// A unit is 32 bits of one row along `in`: one float32, two bfloat16 or four int8. All three kinds of
// micro-kernel see rows of units on the weight's side and (unit, 16 nv rows of x) panels on the other.

#ifndef EDGESFT_PERTURB_GEMM_H
#define EDGESFT_PERTURB_GEMM_H

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "noise.h"

namespace edgesft {
namespace gemm {

enum Type : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };
enum Law : int32_t { PLAIN, NORMAL, SIGN };

constexpr float LARGEST = 6.67f;  // no |normal| exceeds it: int8 normals are multiples of LARGEST / 127

// One group of rows of x sees W + scale * m * z(seed); `law` PLAIN: W itself.
struct Group {
    uint64_t seed;
    float scale;
    int32_t law;
};

// x: (count * rows, in), weight: (out, in), y: (count * rows, out), row-major and without gaps. scales: float16
// (out, ceil(in / width)) of INT8 and INT4 weights. bias: (out,) or null. y has the type of x.
struct Job {
    const void* x;
    const void* weight;
    const uint16_t* scales;
    const float* bias;
    void* y;
    int64_t rows, in, out, count, width;
    uint64_t mask_seed;
    uint32_t tensor;
    int32_t x_type, weight_type, keep;
    float low, high;
    int32_t threads;
    const Group* groups;
};

// Entries [k, k + length) of `rows` rows of the weight from row `first`.
struct Block {
    int64_t first, rows, k, length;
};

inline int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Memory that grows and stays, on cache lines.
class Memory {
  public:
    ~Memory() { std::free(data_); }
    // At least `bytes`, or null. What was in it is lost.
    template <class T>
    T* get(int64_t count) {
        const size_t bytes = static_cast<size_t>(up(count * static_cast<int64_t>(sizeof(T)) + 64, 4096));
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(4096, bytes);
            size_ = data_ ? bytes : 0;
        }
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

inline __mmask16 first_of(int64_t left) {
    return left >= 16 ? 0xFFFF : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

// 16 entries from entry `at` of an array as float32.
template <int TYPE>
inline __m512 widen(const void* from, int64_t at, __mmask16 some) {
    if (TYPE == FLOAT32) return _mm512_maskz_loadu_ps(some, static_cast<const float*>(from) + at);
    const __m256i half = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(from) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Entries k .. k + 15 of row `o` of the stored weight as float32; k is a multiple of 16.
template <int TYPE>
inline __m512 stored(const Job& job, int64_t o, int64_t k, __mmask16 some) {
    if (TYPE == FLOAT32 || TYPE == BFLOAT16) return widen<TYPE>(job.weight, o * job.in + k, some);
    __m512i code;
    if (TYPE == INT8) {
        const int8_t* row = static_cast<const int8_t*>(job.weight) + o * job.in;
        code = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, row + k));
    } else {
        const uint8_t* row = static_cast<const uint8_t*>(job.weight) + o * ((job.in + 1) / 2);
        const int count = __builtin_popcount(some);
        const __mmask16 bytes = static_cast<__mmask16>((1u << ((count + 1) / 2)) - 1);
        const __m128i pairs = _mm_cvtepu8_epi16(_mm_maskz_loadu_epi8(bytes, row + k / 2));
        const __m128i nibbles = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
        code = _mm512_sub_epi32(_mm512_cvtepu8_epi32(nibbles), _mm512_set1_epi32(8));
    }
    const int64_t groups = (job.in + job.width - 1) / job.width;
    const __m512 scale = _mm512_set1_ps(_cvtsh_ss(job.scales[o * groups + k / job.width]));
    return _mm512_maskz_mul_ps(some, _mm512_cvtepi32_ps(code), scale);
}

// The noise of a block: made once, read by every group of its seed. Row r starts at `at[r]` of the buffer, in
// entries (NORMAL) or bits (SIGN).
class Noise {
  public:
    bool make(const Job& job, const Block& block, const Group& group, int64_t* at) {
        at_ = at;
        const Key key(group.seed);
        const bool whole = block.length == job.in;  // rows follow each other: one range
        const int64_t ranges = whole ? 1 : block.rows;
        const int64_t length = whole ? block.rows * job.in : block.length;
        const int64_t grain = group.law == NORMAL ? PIECE : 128, room = up(length, grain) + grain;
        bits_ = nullptr;
        z_ = nullptr;
        if (group.law == NORMAL ? !(z_ = memory_.get<float>(ranges * room + 16))
                                : !(bits_ = memory_.get<uint32_t>(ranges * room / 32 + 16)))
            return false;
        for (int64_t range = 0; range < ranges; ++range) {
            const int64_t begin = (block.first + range) * job.in + block.k, from = begin / grain * grain;
            const int64_t count = (begin + length - from + grain - 1) / grain;
            at[range] = range * room + begin - from;
            if (group.law == NORMAL)
                for (int64_t i = 0; i < count; ++i)
                    normals(key, job.tensor, static_cast<uint64_t>(from + i * grain) / 4,
                            z_ + range * room + i * grain);
            else
                signs(key, job.tensor, static_cast<uint64_t>(from / grain), count, bits_ + range * room / 32);
        }
        if (whole)
            for (int64_t r = 1; r < block.rows; ++r) at[r] = at[r - 1] + job.in;
        return true;
    }

    // One row of it. By value: vector stores may alias what is behind a reference.
    struct Row {
        const float* z;
        const uint8_t* bytes;
        int shift;

        __m512 normal(int64_t k) const { return _mm512_loadu_ps(z + k); }
        // Sign bits of entries k .. k + 15 in the lower half; k is a multiple of 16.
        uint32_t sign(int64_t k) const {
            uint32_t word;
            std::memcpy(&word, bytes + k / 8, sizeof word);
            return word >> shift;
        }
    };

    Row row(int64_t r) const {
        if (z_) return {z_ + at_[r], nullptr, 0};
        if (bits_) return {nullptr, reinterpret_cast<const uint8_t*>(bits_) + at_[r] / 8, static_cast<int>(at_[r] % 8)};
        return {nullptr, nullptr, 0};
    }

  private:
    Memory memory_;
    const int64_t* at_ = nullptr;
    float* z_ = nullptr;
    uint32_t* bits_ = nullptr;
};

// Which entries of a block take part: 16 a word, block.length / 16 words a row. The mask is that of the stored W.
template <int TYPE>
inline bool choose(const Job& job, const Block& block, Memory& memory, Memory& random, __mmask16*& active) {
    const int64_t words = up(block.length, 16) / 16;
    uint8_t* bytes = job.keep < 256 ? random.get<uint8_t>(block.length + 64) : nullptr;
    active = memory.get<__mmask16>(block.rows * words);
    if (!active || (job.keep < 256 && !bytes)) return false;
    const Key key(job.mask_seed);
    const __m512 low = _mm512_set1_ps(job.low), high = _mm512_set1_ps(job.high);
    const __m128i keep = _mm_set1_epi8(static_cast<char>(job.keep));
    for (int64_t r = 0; r < block.rows; ++r) {
        const int64_t begin = (block.first + r) * job.in + block.k;
        if (bytes)
            mask_bytes(key, job.tensor, static_cast<uint64_t>(begin / 16),
                       (begin + block.length + 15) / 16 - begin / 16, bytes);
        for (int64_t i = 0; i < words; ++i) {
            const __mmask16 some = first_of(block.length - 16 * i);
            const __m512 size = _mm512_abs_ps(stored<TYPE>(job, block.first + r, block.k + 16 * i, some));
            __mmask16 in = _mm512_mask_cmp_ps_mask(some, size, low, _CMP_GE_OQ);
            in = _mm512_mask_cmp_ps_mask(in, size, high, _CMP_LE_OQ);
            if (bytes) {
                const void* here = bytes + begin % 16 + 16 * i;
                in &= _mm_cmplt_epu8_mask(_mm_loadu_si128(static_cast<const __m128i*>(here)), keep);
            }
            active[r * words + i] = in;
        }
    }
    return true;
}

// Where perturbed rows go: float32, or rounded to bfloat16 (subnormals to zero, as the products treat them).
inline void put(float* to, __m512 value) { _mm512_store_ps(to, value); }
#if defined(__AVX512BF16__)
inline void put(uint16_t* to, __m512 value) {
    const __m256bh half = _mm512_cvtneps_pbh(value);
    std::memcpy(to, &half, sizeof half);
}
#endif

// Rows of W + scales[c] * m * z for COUNT scales, each operation rounded once to float32; `stride` entries a
// row, zeros behind the end as far as `stride`.
template <int TYPE, int LAW, bool MASKED, int COUNT, class To>
void fill(const Job& job, const Block& block, const Noise& noise, const float* scales, const __mmask16* active,
          To* const* to, int64_t stride) {
    const Job own = job;
    __m512 plus[COUNT], minus[COUNT];
    for (int c = 0; c < COUNT; ++c) {
        plus[c] = _mm512_set1_ps(scales[c]);
        minus[c] = _mm512_set1_ps(-scales[c]);
    }
    const int64_t whole = block.length / 16, words = up(block.length, 16) / 16;
    for (int64_t r = 0; r < block.rows; ++r) {
        const int64_t o = block.first + r, k = block.k;
        const Noise::Row z = LAW == PLAIN ? Noise::Row{} : noise.row(r);
        const __mmask16* in = MASKED ? active + r * words : nullptr;
        To* rows[COUNT];
        for (int c = 0; c < COUNT; ++c) rows[c] = to[c] + r * stride;
        const auto one = [=](int64_t i, __mmask16 some) __attribute__((always_inline)) {
            const __m512 w = stored<TYPE>(own, o, k + 16 * i, some);
            if (MASKED) some = in[i];
            for (int c = 0; c < COUNT; ++c) {
                __m512 moved = w;
                if (LAW == SIGN) {
                    const __mmask16 negative = static_cast<__mmask16>(z.sign(16 * i));
                    moved = _mm512_mask_add_ps(w, some, w, _mm512_mask_blend_ps(negative, plus[c], minus[c]));
                } else if (LAW == NORMAL) {
                    moved = _mm512_mask_add_ps(w, some, w, _mm512_mul_ps(plus[c], z.normal(16 * i)));
                }
                put(rows[c] + 16 * i, moved);
            }
        };
#pragma GCC unroll 2
        for (int64_t i = 0; i < whole; ++i) one(i, 0xFFFF);
        if (whole < words) one(whole, first_of(block.length - 16 * whole));
        for (int c = 0; c < COUNT; ++c)
            for (int64_t i = 16 * words; i < stride; i += 16) put(rows[c] + i, _mm512_setzero_ps());
    }
}

// --- 8 bits -------------------------------------------------------------------------------------------------

// From the largest |entry| as bits: the step of 8-bit codes and its inverse. What is not finite makes the step
// NaN, so that it is not lost.
inline void step_of(uint32_t largest, float& step, float& inverse) {
    step = inverse = 0.0f;
    if (largest >= 0x7F800000u)
        step = as_float(0x7FC00000);
    else if (largest >= 0x00800000u) {
        step = as_float(static_cast<int32_t>(largest)) / 127.0f;
        inverse = 127.0f / as_float(static_cast<int32_t>(largest));
        if (!(inverse <= 3e38f)) step = inverse = 0.0f;  // next to the smallest numbers
    }
}

template <class Load>  // load(k, some): 16 floats
inline void step_of_row(int64_t length, Load load, float& step, float& inverse) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t k = 0; k < length; k += 16)
        largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(load(k, first_of(length - k)))));
    step_of(_mm512_reduce_max_epu32(largest), step, inverse);
}

// To the nearest code, ties to even.
inline __m128i codes(__m512 value, __m512 inverse) {
    return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(value, inverse)));
}

// Rows of round(W / step) with one step a row; zeros behind the end.
template <int TYPE>
void quantise(const Job& job, const Block& block, const float* inverse, int8_t* to, int64_t stride) {
    const Job own = job;
    for (int64_t r = 0; r < block.rows; ++r)
        for (int64_t k = 0; k < stride; k += 16) {
            const __mmask16 some = first_of(block.length - k);
            const __m512 w = some ? stored<TYPE>(own, block.first + r, block.k + k, some) : _mm512_setzero_ps();
            _mm_store_si128(reinterpret_cast<__m128i*>(to + r * stride + k), codes(w, _mm512_set1_ps(inverse[r])));
        }
}

// Rows of m * z as 8-bit codes: exactly +-1, or normals in steps of LARGEST / 127; zeros behind the end.
inline void directions(const Block& block, const Noise& noise, int law, const __mmask16* active, int8_t* to,
                       int64_t stride) {
    const int64_t words = up(block.length, 16) / 16;
    const __m128i plus = _mm_set1_epi8(1), minus = _mm_set1_epi8(-1);
    const __m512 inverse = _mm512_set1_ps(127.0f / LARGEST);
    for (int64_t r = 0; r < block.rows; ++r) {
        const Noise::Row z = noise.row(r);
        for (int64_t k = 0; k < stride; k += 16) {
            __mmask16 some = first_of(block.length - k);
            if (some && active) some &= active[r * words + k / 16];
            __m128i code = _mm_setzero_si128();
            if (some && law == SIGN)
                code = _mm_mask_blend_epi8(static_cast<__mmask16>(z.sign(k)), plus, minus);
            else if (some)
                code = codes(z.normal(k), inverse);
            _mm_store_si128(reinterpret_cast<__m128i*>(to + r * stride + k), _mm_maskz_mov_epi8(some, code));
        }
    }
}

// --- x ------------------------------------------------------------------------------------------------------

// 16 x 16 words, in place.
__attribute__((always_inline)) inline void transpose(__m512* row) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
            row[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            row[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 4; ++i) {  // row[4 q + i]: columns i, i + 4, .. of rows 4 q .. 4 q + 3
        const __m512 a = _mm512_shuffle_f32x4(row[i], row[i + 4], 0x88);
        const __m512 b = _mm512_shuffle_f32x4(row[i], row[i + 4], 0xDD);
        const __m512 c = _mm512_shuffle_f32x4(row[i + 8], row[i + 12], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(row[i + 8], row[i + 12], 0xDD);
        t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
        t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
    for (int i = 0; i < 16; ++i) row[i] = t[i];
}

// 16 units of a row of x from entry `at` of it on, `left` entries before its end.
template <int PER, int TYPE>
inline __m512 units(const void* row, int64_t at, int64_t left, float inverse) {
    if (PER == 1) return widen<TYPE>(row, at, first_of(left));
    alignas(64) uint8_t bytes[64];
    if (PER == 2) {
#if defined(__AVX512BF16__)
        const __m512bh both = _mm512_cvtne2ps_pbh(widen<TYPE>(row, at + 16, first_of(left - 16)),
                                                  widen<TYPE>(row, at, first_of(left)));
        std::memcpy(bytes, &both, sizeof both);
#endif
    } else {
        const __m512 by = _mm512_set1_ps(inverse);
        for (int i = 0; i < 4; ++i)
            _mm_store_si128(reinterpret_cast<__m128i*>(bytes + 16 * i),
                            codes(widen<TYPE>(row, at + 16 * i, first_of(left - 16 * i)), by));
    }
    return _mm512_load_ps(reinterpret_cast<const float*>(bytes));
}

// `count` <= 16 rows of x from row `first` as `depth` units each into one column of a panel that is 16 * vectors
// wide; missing rows are zero. steps: 16 steps of their 8-bit codes.
template <int PER, int TYPE>
void pack(const Job& job, int64_t first, int64_t count, int64_t depth, float* to, int vectors, float* steps) {
    const size_t size = TYPE == FLOAT32 ? 4 : 2;
    const int64_t in = job.in;
    const char* x = static_cast<const char*>(job.x) + size * static_cast<size_t>(first * in);
    float inverse[16] = {};
    for (int r = 0; r < 16; ++r) {
        steps[r] = 0.0f;
        if (PER == 4 && r < count) {
            const char* row = x + size * static_cast<size_t>(r * in);
            step_of_row(in, [&](int64_t k, __mmask16 some) { return widen<TYPE>(row, k, some); }, steps[r],
                        inverse[r]);
        }
    }
    for (int64_t unit = 0; unit < depth; unit += 16) {
        __m512 part[16];
        for (int r = 0; r < 16; ++r)
            part[r] = r < count ? units<PER, TYPE>(x + size * static_cast<size_t>(r * in), PER * unit,
                                                   in - PER * unit, inverse[r])
                                : _mm512_setzero_ps();
        transpose(part);
        for (int j = 0; j < 16 && unit + j < depth; ++j) _mm512_store_ps(to + (unit + j) * 16 * vectors, part[j]);
    }
}

}  // namespace gemm
}  // namespace edgesft

#endif
