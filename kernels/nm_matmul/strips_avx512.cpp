// AVX-512 with VNNI: 64 bytes are one register.
#include <immintrin.h>

#include "strips.h"

namespace edgesft::nm {
namespace {

struct Avx512 {
    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;
    static constexpr int MANY = 8;

    static Bytes load(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static void keep(uint8_t* to, Bytes b) { _mm512_storeu_si512(to, b); }
    static Ints words(const uint8_t* from) { return load(from); }
    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats spread(float x) { return _mm512_set1_ps(x); }
    static void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
    static Floats halves(const uint8_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static Floats brains(const uint8_t* from) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
    }
    static Floats floats(Ints v) { return _mm512_cvtepi32_ps(v); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Bytes low(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
    static Bytes high(Bytes b) { return low(_mm512_srli_epi16(b, 4)); }
    static Bytes raise(Bytes b) { return _mm512_add_epi8(b, _mm512_set1_epi8(120)); }
    template <int SHIFT, int BITS>
    static Ints piece(Ints v) {
        return _mm512_and_si512(_mm512_srli_epi32(v, SHIFT), _mm512_set1_epi32((1 << BITS) - 1));
    }
    template <int OFFSET>
    static Ints less(Ints v) {
        return _mm512_sub_epi32(v, _mm512_set1_epi32(OFFSET));
    }
    template <int P>
    static Bytes fields(Bytes b) {
        return _mm512_and_si512(P ? _mm512_srli_epi16(b, 2 * P) : b, _mm512_set1_epi8(3));
    }
    template <int P>
    static Bytes place(Bytes b) {
        return _mm512_or_si512(b, _mm512_set1_epi32(P % 2 ? 0x0C0C0808 : 0x04040000));
    }
    static Bytes pick(const int8_t* x, Bytes places) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), places);
    }
    static Floats among(const float* four, Ints place) {
        return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(four)), place);
    }
    template <int HALF>
    static Bytes merge(Bytes codes, Bytes fields) {
        const Bytes first = each<2 * HALF>(), second = each<2 * HALF + 1>();
        const Bytes column = _mm512_set1_epi32(0x03020100);
        const __mmask64 one = _mm512_cmpeq_epi8_mask(_mm512_shuffle_epi8(fields, first), column);
        const __mmask64 two = _mm512_cmpeq_epi8_mask(_mm512_shuffle_epi8(fields, second), column);
        const Bytes made = _mm512_mask_shuffle_epi8(_mm512_set1_epi8(-128), one, codes, first);
        return _mm512_mask_shuffle_epi8(made, two, codes, second);
    }
    // Byte S of every lane, four times.
    template <int S>
    static Bytes each() {
        constexpr int all = 0x01010101;
        return _mm512_broadcast_i32x4(
            _mm_setr_epi32(all * S, all * (S + 4), all * (S + 8), all * (S + 12)));
    }
    // vpdpbusd multiplies unsigned bytes, the codes as they are, by signed ones; what the offset adds goes again.
    template <int OFFSET>
    struct Sparse {
        Ints total, excess;
        void begin(const int32_t*) { total = excess = _mm512_setzero_si512(); }
        void add(Bytes code, Bytes x) {
            total = _mm512_dpbusd_epi32(total, code, x);
            excess = _mm512_dpbusd_epi32(excess, _mm512_set1_epi8(static_cast<char>(OFFSET)), x);
        }
        Ints sum() const { return _mm512_sub_epi32(total, excess); }
    };
    template <int OFFSET>
    struct Dense {
        Ints total;
        void begin(const int32_t* sum) { total = _mm512_set1_epi32(-OFFSET * *sum); }
        void add(Bytes code, const int8_t* x) {
            int32_t four;
            std::memcpy(&four, x, 4);
            total = _mm512_dpbusd_epi32(total, code, _mm512_set1_epi32(four));
        }
        Ints sum() const { return total; }
    };
};

}  // namespace

constexpr Table avx512 = Strips<Avx512>::table("avx512");

}  // namespace edgesft::nm
