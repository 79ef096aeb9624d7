// AVX2 with FMA and F16C: 64 bytes are two registers, rows 0..7 and 8..15.
#include <immintrin.h>

#include "strips.h"

namespace edgesft::nm {
namespace {

struct Avx2 {
    struct Ints {
        __m256i h[2];
    };
    using Bytes = Ints;
    struct Floats {
        __m256 h[2];
    };
    static constexpr int MANY = 2;

    template <class F>
    static Ints both(F f) {
        return {{f(0), f(1)}};
    }
    static Bytes load(const uint8_t* from) {
        return both([&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i); });
    }
    static void keep(uint8_t* to, Bytes b) {
        for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + i, b.h[i]);
    }
    static Ints words(const uint8_t* from) { return load(from); }
    static Floats zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
    static Floats spread(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
    static void store(float* to, Floats v) {
        for (int i = 0; i < 2; ++i) _mm256_storeu_ps(to + 8 * i, v.h[i]);
    }
    static __m128i eight(const uint8_t* from, int i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
    }
    static Floats halves(const uint8_t* from) {
        return {{_mm256_cvtph_ps(eight(from, 0)), _mm256_cvtph_ps(eight(from, 1))}};
    }
    static __m256 brain(__m128i v) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    }
    static Floats brains(const uint8_t* from) { return {{brain(eight(from, 0)), brain(eight(from, 1))}}; }
    static Floats floats(Ints v) { return {{_mm256_cvtepi32_ps(v.h[0]), _mm256_cvtepi32_ps(v.h[1])}}; }
    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return {{_mm256_fmadd_ps(a.h[0], b.h[0], c.h[0]), _mm256_fmadd_ps(a.h[1], b.h[1], c.h[1])}};
    }
    static Bytes low(Bytes b) {
        return both([&](int i) { return _mm256_and_si256(b.h[i], _mm256_set1_epi8(15)); });
    }
    static Bytes high(Bytes b) {
        return low(both([&](int i) { return _mm256_srli_epi16(b.h[i], 4); }));
    }
    static Bytes raise(Bytes b) {
        return both([&](int i) { return _mm256_add_epi8(b.h[i], _mm256_set1_epi8(120)); });
    }
    template <int SHIFT, int BITS>
    static Ints piece(Ints v) {
        return both([&](int i) {
            return _mm256_and_si256(_mm256_srli_epi32(v.h[i], SHIFT), _mm256_set1_epi32((1 << BITS) - 1));
        });
    }
    template <int OFFSET>
    static Ints less(Ints v) {
        return both([&](int i) { return _mm256_sub_epi32(v.h[i], _mm256_set1_epi32(OFFSET)); });
    }
    template <int P>
    static Bytes fields(Bytes b) {
        return both([&](int i) { return _mm256_and_si256(_mm256_srli_epi16(b.h[i], 2 * P), _mm256_set1_epi8(3)); });
    }
    template <int P>
    static Bytes place(Bytes b) {
        return both([&](int i) { return _mm256_or_si256(b.h[i], _mm256_set1_epi32(P % 2 ? 0x0C0C0808 : 0x04040000)); });
    }
    static Bytes pick(const int8_t* x, Bytes places) {
        const __m256i sixteen = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
        return both([&](int i) { return _mm256_shuffle_epi8(sixteen, places.h[i]); });
    }
    static Floats among(const float* four, Ints place) {
        const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
        return {{_mm256_permutevar_ps(all, place.h[0]), _mm256_permutevar_ps(all, place.h[1])}};
    }
    template <int HALF>
    static Bytes merge(Bytes codes, Bytes fields) {
        const __m256i first = each<2 * HALF>(), second = each<2 * HALF + 1>(), column = _mm256_set1_epi32(0x03020100);
        return both([&](int i) {
            const __m256i one = _mm256_cmpeq_epi8(_mm256_shuffle_epi8(fields.h[i], first), column);
            const __m256i two = _mm256_cmpeq_epi8(_mm256_shuffle_epi8(fields.h[i], second), column);
            const __m256i made = _mm256_blendv_epi8(_mm256_set1_epi8(-128), _mm256_shuffle_epi8(codes.h[i], first), one);
            return _mm256_blendv_epi8(made, _mm256_shuffle_epi8(codes.h[i], second), two);
        });
    }
    template <int S>
    static __m256i each() {  // byte S of every lane, four times
        constexpr int all = 0x01010101;
        return _mm256_broadcastsi128_si256(_mm_setr_epi32(all * S, all * (S + 4), all * (S + 8), all * (S + 12)));
    }
    static Ints widened(Ints pairs) {
        return both([&](int i) { return _mm256_madd_epi16(pairs.h[i], _mm256_set1_epi16(1)); });
    }
    // vpmaddubsw adds two products of unsigned and signed bytes in int16. int4: codes of 0..15 cannot overflow it,
    // not even eight planes together. int8: with the sign moved over to x, neither can 127 * 127 * 2.
    static __m256i pairs8(__m256i code, __m256i x) {
        const __m256i w = _mm256_xor_si256(code, _mm256_set1_epi8(-128));
        return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    }
    static __m256i four(const int8_t* x) {
        int32_t word;
        std::memcpy(&word, x, 4);
        return _mm256_set1_epi32(word);
    }
    template <int OFFSET>
    struct Sparse {
        Ints total;
        void begin(const int32_t*) { total.h[0] = total.h[1] = _mm256_setzero_si256(); }
        void add(Bytes code, Bytes x) {
            for (int i = 0; i < 2; ++i) {
                if constexpr (OFFSET == 8) {
                    const __m256i all = _mm256_maddubs_epi16(code.h[i], x.h[i]);
                    const __m256i excess = _mm256_maddubs_epi16(_mm256_set1_epi8(8), x.h[i]);
                    total.h[i] = _mm256_add_epi16(total.h[i], _mm256_sub_epi16(all, excess));
                } else {
                    const __m256i pairs = _mm256_madd_epi16(pairs8(code.h[i], x.h[i]), _mm256_set1_epi16(1));
                    total.h[i] = _mm256_add_epi32(total.h[i], pairs);
                }
            }
        }
        Ints sum() const { return OFFSET == 8 ? widened(total) : total; }
    };
    template <int OFFSET>
    struct Dense {
        Ints total;
        int32_t excess;
        void begin(const int32_t* sum) {
            total.h[0] = total.h[1] = _mm256_setzero_si256();
            excess = OFFSET == 8 ? 8 * *sum : 0;
        }
        void add(Bytes code, const int8_t* x) {
            const __m256i word = four(x);
            for (int i = 0; i < 2; ++i) {
                if constexpr (OFFSET == 8)
                    total.h[i] = _mm256_add_epi16(total.h[i], _mm256_maddubs_epi16(code.h[i], word));
                else
                    total.h[i] = _mm256_add_epi32(
                        total.h[i], _mm256_madd_epi16(pairs8(code.h[i], word), _mm256_set1_epi16(1)));
            }
        }
        Ints sum() const {
            if constexpr (OFFSET != 8) return total;
            const Ints wide = widened(total);
            return both([&](int i) { return _mm256_sub_epi32(wide.h[i], _mm256_set1_epi32(excess)); });
        }
    };
};

}  // namespace

constexpr Table avx2 = Strips<Avx2>::table("avx2");

}  // namespace edgesft::nm
