// Fused Gaussian perturbation: Philox4x32-10, Box-Muller, magnitude mask and axpy in one pass.
//
// reference.py beside this file is the specification; results agree with it bit for bit. That holds on every
// CPU because only IEEE-exact operations are used (add, multiply, sqrt, integer operations) and the build
// forbids contraction into fused multiply-adds (-ffp-contract=off). Keep the order of operations.
//
// Plain C interface, loaded through ctypes. No intrinsics: inner loops are branch-free and left to the
// vectoriser; one instruction that GCC does not find by itself is spelt out in `wide_multiply`.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int BLOCKS = 64;         // Philox blocks a chunk; next to a matrix product 128 are a fifth slower
constexpr int CHUNK = 4 * BLOCKS;  // normals a chunk
constexpr int64_t PARALLEL = 1 << 15;  // fewer entries than this are not worth waking threads for
constexpr int ROUNDS = 10;
constexpr uint32_t MULTIPLIER_0 = 0xD2511F53u, MULTIPLIER_1 = 0xCD9E8D57u;
constexpr uint32_t WEYL_0 = 0x9E3779B9u, WEYL_1 = 0xBB67AE85u;

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

// Words of blocks block .. block + BLOCKS - 1; `block` is a multiple of BLOCKS, so its low word cannot wrap.
void philox(const Key& key, uint32_t tensor, uint64_t block, uint32_t (*__restrict words)[BLOCKS]) {
    const Wide m0 = Wide{} + MULTIPLIER_0, m1 = Wide{} + MULTIPLIER_1;
    // Only the counter's first word varies: half of the first two rounds is one scalar for all blocks.
    const uint64_t p1 = static_cast<uint64_t>(tensor) * MULTIPLIER_1;
    const uint64_t y0 = (p1 >> 32) ^ (block >> 32) ^ key.first[0];
    const uint64_t q0 = (y0 & 0xFFFFFFFFu) * MULTIPLIER_0;
    Wide lane{};
    for (int i = 0; i < LANES; ++i) lane[i] = static_cast<uint64_t>(i);
    for (int i = 0; i < BLOCKS; i += LANES) {
        const Wide p0 = wide_multiply(lane + (block + static_cast<uint64_t>(i)), m0);
        const Wide q1 = wide_multiply((p0 >> 32) ^ static_cast<uint64_t>(key.second[0]), m1);
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

void philox(const Key& key, uint32_t tensor, uint64_t block, uint32_t (*__restrict words)[BLOCKS]) {
    const uint32_t low = static_cast<uint32_t>(block), high = static_cast<uint32_t>(block >> 32);
#pragma omp simd
    for (int i = 0; i < BLOCKS; ++i) {
        uint32_t x0 = low + static_cast<uint32_t>(i), x1 = high, x2 = tensor, x3 = 0;
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

void normals(const Key& key, uint32_t tensor, uint64_t block, float* __restrict z) {
    alignas(64) uint32_t words[4][BLOCKS];
    philox(key, tensor, block, words);
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

// to = from + scale * z where low <= |from| <= high (false for NaN), else from. The arrays are the same or apart.
int apply(const float* from, float* to, const float* z, int count, float scale, float low, float high) {
    int active = 0;
#pragma omp simd reduction(+ : active)
    for (int i = 0; i < count; ++i) {
        const float w = from[i], size = std::fabs(w), moved = w + scale * z[i];
        const bool in = (size >= low) & (size <= high);
        to[i] = in ? moved : w;
        active += in;
    }
    return active;
}

// The part [begin, end) of a chunk that lies in [start, start + count), relative to `start`.
struct Part {
    int64_t origin, begin, end;

    Part(int64_t chunk, int64_t start, int64_t count)
        : origin(chunk * CHUNK - start),
          begin(origin < 0 ? 0 : origin),
          end(origin + CHUNK < count ? origin + CHUNK : count) {}
};

inline void fetch(const float* from, const float* to, int64_t count) {  // hides latency behind the arithmetic
    for (int64_t i = 0; i < count; i += 16) {
        __builtin_prefetch(from + i);
        __builtin_prefetch(to + i, 1);
    }
}

}  // namespace

extern "C" {

// 1 when built with OpenMP.
int edgesft_parallel() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

// to[i] = z(seed, tensor, start + i), 0 <= i < count.
void edgesft_noise(float* to, int64_t start, int64_t count, uint64_t seed, uint32_t tensor, int threads) {
    const Key key(seed);
    const int64_t first = start / CHUNK, last = (start + count + CHUNK - 1) / CHUNK;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count >= PARALLEL)
    for (int64_t chunk = first; chunk < last; ++chunk) {
        alignas(64) float z[CHUNK];
        const Part part(chunk, start, count);
        normals(key, tensor, static_cast<uint64_t>(chunk) * BLOCKS, z);
        std::memcpy(to + part.begin, z + (part.begin - part.origin), sizeof(float) * (part.end - part.begin));
    }
}

// to[i] = from[i] + scale * z(seed, tensor, start + i) where low <= |from[i]| <= high; returns how many are.
int64_t edgesft_perturb(const float* from, float* to, int64_t start, int64_t count, uint64_t seed, uint32_t tensor,
                        float scale, float low, float high, int threads) {
    const Key key(seed);
    const int64_t first = start / CHUNK, last = (start + count + CHUNK - 1) / CHUNK;
    int64_t active = 0;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : active) if (threads > 1 && count >= PARALLEL)
    for (int64_t chunk = first; chunk < last; ++chunk) {
        alignas(64) float z[CHUNK];
        const Part part(chunk, start, count);
        fetch(from + part.begin, to + part.begin, part.end - part.begin);
        normals(key, tensor, static_cast<uint64_t>(chunk) * BLOCKS, z);
        active += apply(from + part.begin, to + part.begin, z + (part.begin - part.origin),
                        static_cast<int>(part.end - part.begin), scale, low, high);
    }
    return active;
}

}  // extern "C"
