// The numbers of the perturbation, all inline: Philox4x32-10, normals, signs, mask bytes, rounding.
//
// reference.py beside this file is the specification; results agree with it bit for bit. That holds on every
// CPU because only IEEE-exact operations are used (add, multiply, sqrt, integer operations) and the build
// forbids contraction into fused multiply-adds (-ffp-contract=off). Keep the order of operations.
//
// A number is a function of (seed, tensor, index, domain) alone. The domain keeps independent what one seed is
// used for. No intrinsics: inner loops are branch-free and left to the vectoriser; one instruction that GCC
// does not find by itself is spelt out in `wide_multiply`.

#ifndef EDGESFT_PERTURB_NOISE_H
#define EDGESFT_PERTURB_NOISE_H

#include <cmath>
#include <cstdint>
#include <cstring>

namespace edgesft {

constexpr int BLOCKS = 64;         // Philox blocks of a piece; next to a matrix product 128 are a fifth slower
constexpr int PIECE = 4 * BLOCKS;  // entries whose noise is made together
constexpr int ROUNDS = 10;
constexpr uint32_t MULTIPLIER_0 = 0xD2511F53u, MULTIPLIER_1 = 0xCD9E8D57u;
constexpr uint32_t WEYL_0 = 0x9E3779B9u, WEYL_1 = 0xBB67AE85u;

// The last word of the counter.
constexpr uint32_t GAUSSIAN = 0, RADEMACHER = 1, ROUNDING = 2, MASK = 3;

// The round keys of a seed.
struct Key {
    uint32_t first[ROUNDS], second[ROUNDS];

    explicit Key(uint64_t seed) {
        uint32_t a = static_cast<uint32_t>(seed), b = static_cast<uint32_t>(seed >> 32);
        for (int r = 0; r < ROUNDS; ++r, a += WEYL_0, b += WEYL_1) {
            first[r] = a;
            second[r] = b;
        }
    }
};

#if defined(__AVX2__)

// One 64-bit lane a word. Products leave rubbish in the upper halves, which the next product ignores: no
// shuffle is needed between rounds, against four a round when words are packed.
#if defined(__AVX512F__)
constexpr int BYTES = 64;
#define EDGESFT_REGISTER "v"
#else
constexpr int BYTES = 32;
#define EDGESFT_REGISTER "x"
#endif
typedef uint64_t Wide __attribute__((vector_size(BYTES)));
typedef uint32_t Narrow __attribute__((vector_size(BYTES / 2)));
constexpr int LANES = BYTES / 8;

// 32 x 32 -> 64 bits of the lower halves. GCC makes a three times slower 64-bit multiply of the plain form.
inline Wide wide_multiply(Wide a, Wide b) {
    Wide product;
    asm("vpmuludq %2, %1, %0" : "=" EDGESFT_REGISTER(product) : EDGESFT_REGISTER(a), EDGESFT_REGISTER(b));
    return product;
}

inline void store(uint32_t* to, Wide x) {
    const Narrow low = __builtin_convertvector(x, Narrow);
    std::memcpy(to, &low, sizeof low);
}

// Word w of block `block` + i is words[w][i], i < N. `block` is a multiple of N: its low word cannot wrap.
template <int N>
inline void philox(const Key& key, uint32_t tensor, uint32_t domain, uint64_t block,
                   uint32_t (*__restrict words)[N]) {
    static_assert(N % LANES == 0 && (N & (N - 1)) == 0, "a power of two");
    const Wide m0 = Wide{} + MULTIPLIER_0, m1 = Wide{} + MULTIPLIER_1;
    // Only the counter's first word varies: half of the first two rounds is one scalar for all blocks.
    const uint64_t p1 = static_cast<uint64_t>(tensor) * MULTIPLIER_1;
    const uint64_t y0 = (p1 >> 32) ^ (block >> 32) ^ key.first[0];
    const uint64_t q0 = (y0 & 0xFFFFFFFFu) * MULTIPLIER_0;
    Wide lane{};
    for (int i = 0; i < LANES; ++i) lane[i] = static_cast<uint64_t>(i);
    for (int i = 0; i < N; i += LANES) {
        const Wide p0 = wide_multiply(lane + (block + static_cast<uint64_t>(i)), m0);
        const Wide q1 = wide_multiply((p0 >> 32) ^ static_cast<uint64_t>(key.second[0] ^ domain), m1);
        Wide x0 = (q1 >> 32) ^ (p1 ^ key.first[1]), x1 = q1;
        Wide x2 = p0 ^ ((q0 >> 32) ^ key.second[1]), x3 = Wide{} + q0;
#pragma GCC unroll 8
        for (int r = 2; r < ROUNDS; ++r) {
            const Wide p0 = wide_multiply(x0, m0), p1 = wide_multiply(x2, m1);
            x0 = (p1 >> 32) ^ x1 ^ static_cast<uint64_t>(key.first[r]);
            x2 = (p0 >> 32) ^ x3 ^ static_cast<uint64_t>(key.second[r]);
            x1 = p1;
            x3 = p0;
        }
        store(&words[0][i], x0);
        store(&words[1][i], x1);
        store(&words[2][i], x2);
        store(&words[3][i], x3);
    }
}

#else

template <int N>
inline void philox(const Key& key, uint32_t tensor, uint32_t domain, uint64_t block,
                   uint32_t (*__restrict words)[N]) {
    static_assert((N & (N - 1)) == 0, "a power of two");
    const uint32_t low = static_cast<uint32_t>(block), high = static_cast<uint32_t>(block >> 32);
#pragma omp simd
    for (int i = 0; i < N; ++i) {
        uint32_t x0 = low + static_cast<uint32_t>(i), x1 = high, x2 = tensor, x3 = domain;
#pragma GCC unroll 10
        for (int r = 0; r < ROUNDS; ++r) {
            const uint64_t p0 = static_cast<uint64_t>(x0) * MULTIPLIER_0;
            const uint64_t p1 = static_cast<uint64_t>(x2) * MULTIPLIER_1;
            x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ key.first[r];
            x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ key.second[r];
            x1 = static_cast<uint32_t>(p1);
            x3 = static_cast<uint32_t>(p0);
        }
        words[0][i] = x0;
        words[1][i] = x1;
        words[2][i] = x2;
        words[3][i] = x3;
    }
}

#endif

inline float as_float(int32_t x) {
    float y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

inline int32_t as_int(float x) {
    int32_t y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// sqrt(-2 ln u), u = (top 31 bits of `word` + 1/2) / 2^31, in (0, 1].
inline float radius(uint32_t word) {
    const float u = static_cast<float>(static_cast<int32_t>(word >> 1)) * 0x1p-31f + 0x1p-32f;
    const int32_t bits = as_int(u);
    const int32_t exponent = (bits - 0x3F3504F3) & static_cast<int32_t>(0xFF800000u);  // mantissa in [0.707, 1.414)
    const float f = as_float(bits - exponent) - 1.0f;
    float p = 0x1.9dfa68p-3f;  // minimax of -2 ln(1 + f) / f
    p = p * f + -0x1.4c3d04p-2f;
    p = p * f + 0x1.614c08p-2f;
    p = p * f + -0x1.978e2ep-2f;
    p = p * f + 0x1.ff623cp-2f;
    p = p * f + -0x1.5559dcp-1f;
    p = p * f + 0x1.00007ap+0f;
    p = p * f + -0x1.fffffep+0f;
    return std::sqrt(p * f + static_cast<float>(exponent) * -0x1.62e43p-23f);  // exponent is scaled by 2^23
}

// Two independent normals. The low 30 bits of `turn` are an angle in [-pi/4, pi/4), bit 31 the sign of its
// cosine, bit 30 swaps cosine and sine: together a uniform direction.
inline void normal_pair(uint32_t word, uint32_t turn, float& first, float& second) {
    const float r = radius(word);
    const float x = static_cast<float>(static_cast<int32_t>(turn << 2)) * 0x1p-31f;  // in units of pi/4
    const float y = x * x;
    const float sine = (((-0x1.2d930cp-15f * y + 0x1.465e92p-9f) * y + -0x1.4abbbap-4f) * y + 0x1.921fb6p-1f) * x;
    const float even = ((-0x1.4e35dcp-12f * y + 0x1.03ae64p-6f) * y + -0x1.3bd38cp-2f) * y + 0x1.fffffep-1f;
    const float cosine = as_float(as_int(even) ^ static_cast<int32_t>(turn & 0x80000000u));
    const bool swap = (turn & 0x40000000u) != 0;
    first = r * (swap ? sine : cosine);
    second = r * (swap ? cosine : sine);
}

// z(seed, tensor, 4 * block + i), i < 256; `block` is a multiple of 64.
inline void normals(const Key& key, uint32_t tensor, uint64_t block, float* __restrict z) {
    alignas(64) uint32_t words[4][BLOCKS];
    philox(key, tensor, GAUSSIAN, block, words);
#pragma omp simd
    for (int i = 0; i < BLOCKS; ++i) {
        float a, b, c, d;
        normal_pair(words[0][i], words[1][i], a, b);
        normal_pair(words[2][i], words[3][i], c, d);
        z[4 * i] = a;
        z[4 * i + 1] = b;
        z[4 * i + 2] = c;
        z[4 * i + 3] = d;
    }
}

// The four words of each of `count` blocks from `block` on (any), one block after the other.
inline void uniform(const Key& key, uint32_t tensor, uint32_t domain, uint64_t block, int64_t count,
                    uint32_t* __restrict to) {
    constexpr int GROUP = 16;
    alignas(64) uint32_t words[4][GROUP], mixed[4 * GROUP];
    while (count > 0) {
        const int skip = static_cast<int>(block % GROUP);
        const int64_t some = count < GROUP - skip ? count : GROUP - skip;
        philox(key, tensor, domain, block - static_cast<uint64_t>(skip), words);
#pragma omp simd
        for (int i = 0; i < GROUP; ++i) {
            mixed[4 * i] = words[0][i];
            mixed[4 * i + 1] = words[1][i];
            mixed[4 * i + 2] = words[2][i];
            mixed[4 * i + 3] = words[3][i];
        }
        std::memcpy(to, mixed + 4 * skip, sizeof(uint32_t) * 4 * static_cast<size_t>(some));
        to += 4 * some;
        block += static_cast<uint64_t>(some);
        count -= some;
    }
}

// 128 sign bits a block, lowest bit of the first word first; a set bit is -1. Entry i: bit i of block i / 128.
inline void signs(const Key& key, uint32_t tensor, uint64_t block, int64_t count_blocks, uint32_t* words) {
    uniform(key, tensor, RADEMACHER, block, count_blocks, words);
}

// `value`, or -`value` where bit `at` of `word` is set.
inline float signed_by(float value, uint32_t word, int at) {
    return as_float(as_int(value) ^ static_cast<int32_t>((word >> at) << 31));
}

// 32 random bits an entry for stochastic rounding, 4 entries a block.
inline void rounding_words(const Key& key, uint32_t tensor, uint64_t block, int64_t count_blocks, uint32_t* words) {
    uniform(key, tensor, ROUNDING, block, count_blocks, words);
}

// A byte an entry, 16 entries a block; an entry is kept if its byte is below `keep` (0 .. 256).
inline void mask_bytes(const Key& key, uint32_t tensor, uint64_t block, int64_t count_blocks, uint8_t* bytes) {
    constexpr int SOME = 16;
    uint32_t words[4 * SOME];
    for (int64_t at = 0; at < count_blocks; at += SOME) {
        const int64_t some = count_blocks - at < SOME ? count_blocks - at : SOME;
        uniform(key, tensor, MASK, block + static_cast<uint64_t>(at), some, words);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        for (int64_t i = 0; i < 4 * some; ++i) words[i] = __builtin_bswap32(words[i]);
#endif
        std::memcpy(bytes + 16 * at, words, 16 * static_cast<size_t>(some));
    }
}

// bfloat16 is the upper half of a float32.
inline float from_bf16(uint16_t x) { return as_float(static_cast<int32_t>(static_cast<uint32_t>(x) << 16)); }

// To nearest, ties to even.
inline uint16_t to_bf16(float x) {
    const uint32_t bits = static_cast<uint32_t>(as_int(x));
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Up or down with the probabilities that keep the mean; the upper 16 bits of `random` decide.
inline uint16_t to_bf16(float x, uint32_t random) {
    const uint32_t bits = static_cast<uint32_t>(as_int(x));
    const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
    const uint32_t rounded = (bits + (random >> 16)) >> 16;
    return finite ? static_cast<uint16_t>(rounded) : to_bf16(x);
}

// The code of x / scale in [low, high]: to nearest, ties to even.
inline float to_code(float x, float scale, float low, float high) {
    const float t = std::nearbyint(x / scale);
    return t < low ? low : t > high ? high : t;
}

// Up or down with the probabilities that keep the mean; the upper 24 bits of `random` decide.
inline float to_code(float x, float scale, float low, float high, uint32_t random) {
    const float t = x / scale, below = std::floor(t);
    const float u = static_cast<float>(static_cast<int32_t>(random >> 8)) * 0x1p-24f;
    const float up = below + (u < t - below ? 1.0f : 0.0f);
    return up < low ? low : up > high ? high : up;
}

}  // namespace edgesft

#endif
