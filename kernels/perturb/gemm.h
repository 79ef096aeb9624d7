// Pieces of the fused product: stored weights to perturbed panels, and x to units.
//
// Rows of x are what the micro-kernels broadcast, as they lie in memory (float32) or converted once a call; rows of
// y come out as they are to be written. Of W, which goes through registers anyway to be perturbed, panels are made
// that run across the rows.
//
// A unit is 32 bits of one row along `in`: one float32, two bfloat16 or four int8. All three kinds of
// micro-kernel see rows of units of x and (unit, 16 V rows of W) panels.

#ifndef EDGESFT_PERTURB_GEMM_H
#define EDGESFT_PERTURB_GEMM_H

#include <immintrin.h>

#include <algorithm>
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

// Row `o` of the stored weight as float32.
template <int TYPE>
class Stored {
  public:
    Stored() = default;
    Stored(const Job& job, int64_t o) : width_(job.width) {
        const int64_t bytes = TYPE == FLOAT32    ? 4 * job.in
                              : TYPE == BFLOAT16 ? 2 * job.in
                              : TYPE == INT8     ? job.in
                                                 : (job.in + 1) / 2;
        row_ = static_cast<const char*>(job.weight) + o * bytes;
        if (TYPE == INT8 || TYPE == INT4) scales_ = job.scales + o * ((job.in + width_ - 1) / width_);
    }

    // Entries k .. k + 15; k is a multiple of 16.
    __m512 at(int64_t k, __mmask16 some) const {
        if (TYPE == FLOAT32 || TYPE == BFLOAT16) return widen<TYPE>(row_, k, some);
        __m512i code;
        if (TYPE == INT8) {
            code = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, row_ + k));
        } else {
            const int count = __builtin_popcount(some);
            const __mmask16 bytes = static_cast<__mmask16>((1u << ((count + 1) / 2)) - 1);
            const __m128i pairs = _mm_cvtepu8_epi16(_mm_maskz_loadu_epi8(bytes, row_ + k / 2));
            const __m128i nibbles = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
            code = _mm512_sub_epi32(_mm512_cvtepu8_epi32(nibbles), _mm512_set1_epi32(8));
        }
        const __m512 scale = _mm512_set1_ps(_cvtsh_ss(scales_[k / width_]));
        return _mm512_maskz_mul_ps(some, _mm512_cvtepi32_ps(code), scale);
    }

  private:
    const char* row_ = nullptr;
    const uint16_t* scales_ = nullptr;
    int64_t width_ = 1;
};

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
        if (group.law == NORMAL ? !(z_ = memory_.get<float>(ranges * room + 64))
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
        const float* z = nullptr;
        const uint8_t* bytes = nullptr;
        int shift = 0;

        __m512 normal(int64_t k) const { return _mm512_loadu_ps(z + k); }
        // Sign bits of entries k .. k + 15 in the lower half; k is a multiple of 16.
        uint32_t sign(int64_t k) const {
            uint32_t word;
            std::memcpy(&word, bytes + k / 8, sizeof word);
            return word >> shift;
        }
        // Those of 64 entries.
        uint64_t signs(int64_t k) const {
            uint64_t word;
            std::memcpy(&word, bytes + k / 8, sizeof word);
            return shift ? word >> shift | static_cast<uint64_t>(bytes[k / 8 + 8]) << (64 - shift) : word;
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
        const Stored<TYPE> row(job, block.first + r);
        const int64_t begin = (block.first + r) * job.in + block.k;
        if (bytes)
            mask_bytes(key, job.tensor, static_cast<uint64_t>(begin / 16),
                       (begin + block.length + 15) / 16 - begin / 16, bytes);
        for (int64_t i = 0; i < words; ++i) {
            const __mmask16 some = first_of(block.length - 16 * i);
            const __m512 size = _mm512_abs_ps(row.at(block.k + 16 * i, some));
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

// To the nearest code, ties to even: 32 bits each.
inline __m512i codes(__m512 value, __m512 inverse) { return _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse)); }

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

// 16 units of bfloat16 pairs or of four 8-bit codes. part(i): 16 entries from 16 i on.
#if defined(__AVX512BF16__)
template <class Part>
inline __m512 pairs_of(Part part) {
    const __m512 high = part(1);
    const __m512bh both = _mm512_cvtne2ps_pbh(high, part(0));
    __m512 words;
    std::memcpy(&words, &both, sizeof words);
    return words;
}
#endif

template <class Part>
inline __m512 fours_of(Part part) {
    const __m512i low = _mm512_packs_epi32(part(0), part(1)), high = _mm512_packs_epi32(part(2), part(3));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
}

// Rows [first, last) of x in units of bfloat16 or codes, `stride` units a row, zeros behind the end. steps: of the codes.
template <int PER, int TYPE>
void convert(const Job& job, int64_t first, int64_t last, int64_t stride, float* to, float* steps) {
    const size_t size = TYPE == FLOAT32 ? 4 : 2;
    for (int64_t r = first; r < last; ++r) {
        const char* const x = static_cast<const char*>(job.x) + size * static_cast<size_t>(r * job.in);
        const auto entries = [&](int64_t k) { return widen<TYPE>(x, k, first_of(job.in - k)); };
        float inverse = 0.0f;
        if (PER == 4)
            step_of_row(job.in, [&](int64_t k, __mmask16 some) { return widen<TYPE>(x, k, some); }, steps[r], inverse);
        const __m512 by = _mm512_set1_ps(inverse);
        for (int64_t unit = 0; PER * unit < job.in; unit += 16) {
            float* const at = to + r * stride + unit;
#if defined(__AVX512BF16__)
            if (PER == 2) _mm512_store_ps(at, pairs_of([&](int i) { return entries(2 * unit + 16 * i); }));
#endif
            if (PER == 4) _mm512_store_ps(at, fours_of([&](int i) { return codes(entries(4 * unit + 16 * i), by); }));
        }
    }
}

// --- W ------------------------------------------------------------------------------------------------------

// A block of W, perturbed, lies in panels of at most 48 rows (tile registers: 32), and a panel by units of `in`: for
// each 16 V numbers, V vectors of 16 rows; rows past the end are zeros. No panel of 16 next to one of 48: two of
// 32 are faster.
inline int width_of(int64_t left, bool tiles) {
    if (tiles) return left >= 2 ? 2 : 1;
    return left == 4 || left == 2 ? 2 : left >= 3 ? 3 : 1;
}

// of.row(r): what is known of row r of the block; of.at<WHOLE>(row, k): the unit of entries from k on and the 15
// after it; without WHOLE they may reach past the end.
template <int PER, class Of>
void lay(const Block& block, bool tiles, float* to, const Of& of) {
    const int64_t columns = up(block.rows, 16) / 16;
    const int64_t depth = PER == 1 ? block.length : up(block.length, 16 * PER) / PER;
    const int64_t whole = block.length / (16 * PER) * 16;
    for (int64_t column = 0; column < columns;) {
        const int vectors = width_of(columns - column, tiles);
        for (int v = 0; v < vectors; ++v) {
            float* const panel = to + 16 * (column * depth + v);
            decltype(of.row(0)) row[16];
            for (int64_t r = 0; r < 16; ++r) row[r] = of.row(std::min(block.rows - 1, 16 * (column + v) + r));
            __m512 part[16];
            for (int64_t unit = 0; unit < whole; unit += 16) {
                for (int r = 0; r < 16; ++r) part[r] = of.template at<true>(row[r], PER * unit);
                transpose(part);
                for (int64_t j = 0; j < 16; ++j) _mm512_store_ps(panel + (unit + j) * vectors * 16, part[j]);
            }
            if (whole == depth) continue;
            for (int r = 0; r < 16; ++r) part[r] = of.template at<false>(row[r], PER * whole);
            transpose(part);
            for (int64_t j = 0; j < depth - whole; ++j)
                _mm512_store_ps(panel + (whole + j) * vectors * 16, part[j]);
        }
        column += vectors;
    }
}

enum Masked { ALL, BAND, CHOSEN };  // every entry takes part; those between the thresholds; those in `active`

template <bool WHOLE>
inline __mmask16 some_of(int64_t left) {
    return WHOLE ? 0xFFFF : first_of(left);
}

// W + scale * m * z in a block, each operation rounded once to float32, in units of float32 or bfloat16 (subnormals
// to zero, as the products treat them).
template <int PER, int TYPE, int LAW, int MASKED>
struct Moved {
    const Job& job;
    const Block& block;
    const Noise& noise;
    const __mmask16* active;
    const __m512 plus, minus, low, high;

    Moved(const Job& job, const Block& block, const Noise& noise, const __mmask16* active, float scale)
        : job(job), block(block), noise(noise), active(active), plus(_mm512_set1_ps(scale)),
          minus(_mm512_set1_ps(-scale)), low(_mm512_set1_ps(job.low)), high(_mm512_set1_ps(job.high)) {}

    struct Row {
        Stored<TYPE> stored;
        Noise::Row z;
        const __mmask16* active;
    };

    Row row(int64_t r) const {
        return {Stored<TYPE>(job, block.first + r), LAW == PLAIN ? Noise::Row() : noise.row(r),
                MASKED == CHOSEN ? active + r * (up(block.length, 16) / 16) : nullptr};
    }

    template <bool WHOLE>
    __m512 part(const Row& row, int64_t k) const {
        __mmask16 some = some_of<WHOLE>(block.length - k);
        if (!WHOLE && !some) return _mm512_setzero_ps();
        const __m512 w = row.stored.at(block.k + k, some);
        if (LAW == PLAIN) return w;
        if (MASKED == BAND) {
            const __m512 size = _mm512_abs_ps(w);
            some = _mm512_mask_cmp_ps_mask(some, size, low, _CMP_GE_OQ);
            some = _mm512_mask_cmp_ps_mask(some, size, high, _CMP_LE_OQ);
        }
        if (MASKED == CHOSEN) some = row.active[k / 16];
        if (LAW == NORMAL) return _mm512_mask_add_ps(w, some, w, _mm512_mul_ps(plus, row.z.normal(k)));
        const __mmask16 negative = static_cast<__mmask16>(row.z.sign(k));
        return _mm512_mask_add_ps(w, some, w, _mm512_mask_blend_ps(negative, plus, minus));
    }

    template <bool WHOLE>
    __m512 at(const Row& row, int64_t k) const {
#if defined(__AVX512BF16__)
        if (PER == 2) return pairs_of([&](int i) { return part<WHOLE>(row, k + 16 * i); });
#endif
        return part<WHOLE>(row, k);
    }
};

// round(W / step), one step a row.
template <int TYPE>
struct Rounded {
    const Job& job;
    const Block& block;
    const float* inverse;

    struct Row {
        Stored<TYPE> stored;
        float inverse;
    };

    Row row(int64_t r) const { return {Stored<TYPE>(job, block.first + r), inverse[r]}; }

    template <bool WHOLE>
    __m512 at(const Row& row, int64_t k) const {
        const __m512 by = _mm512_set1_ps(row.inverse);
        return fours_of([&](int i) {
            const int64_t from = k + 16 * i;
            return codes(row.stored.at(block.k + from, some_of<WHOLE>(block.length - from)), by);
        });
    }
};

// m * z in 8 bits: exactly +-1, or normals in steps of LARGEST / 127.
template <int LAW>
struct Direction {
    const Block& block;
    const Noise& noise;
    const __mmask16* active;

    struct Row {
        Noise::Row z;
        const __mmask16* active;
    };

    Row row(int64_t r) const {
        return {noise.row(r), active ? active + r * (up(block.length, 16) / 16) : nullptr};
    }

    template <bool WHOLE>
    __m512 at(const Row& row, int64_t k) const {
        __mmask64 some = ~0ull;
        if (!WHOLE) some = block.length - k >= 64 ? ~0ull : (1ull << (block.length - k)) - 1;
        if (row.active) {
            uint64_t chosen;
            std::memcpy(&chosen, row.active + k / 16, sizeof chosen);  // past the row: not in `some`
            some &= chosen;
        }
        __m512i code;
        if (LAW == SIGN) {
            code = _mm512_mask_blend_epi8(row.z.signs(k), _mm512_set1_epi8(1), _mm512_set1_epi8(-1));
        } else {
            const __m512 inverse = _mm512_set1_ps(127.0f / LARGEST);
            code = _mm512_castps_si512(fours_of([&](int i) { return codes(row.z.normal(k + 16 * i), inverse); }));
        }
        return _mm512_castsi512_ps(_mm512_maskz_mov_epi8(some, code));
    }
};

}  // namespace gemm
}  // namespace edgesft

#endif
