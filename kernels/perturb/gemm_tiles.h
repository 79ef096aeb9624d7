// The micro-kernels of the fused product: a few rows of W times a panel of the packed x, as gemm.h describes both.

#ifndef EDGESFT_PERTURB_GEMM_TILES_H
#define EDGESFT_PERTURB_GEMM_TILES_H

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace edgesft {
namespace gemm {

// c (8, 16 V) = or += a (8 rows of `depth` units, `stride` apart) * panel (depth, 16 V). 8 x 48 keeps both
// multipliers busy: 24 sums in flight, 11 loads for 24 multiply-adds. One line in 4 units is fetched from `ahead`.
struct Float {
    static __m512 step(const float* a, __m512 x, __m512 sum) { return _mm512_fmadd_ps(_mm512_set1_ps(*a), x, sum); }
};

#if defined(__AVX512BF16__)
struct Half {
    static __m512 step(const float* a, __m512 x, __m512 sum) {
        const __m512 w = _mm512_set1_ps(*a);
        __m512bh w_, x_;
        std::memcpy(&w_, &w, sizeof w);
        std::memcpy(&x_, &x, sizeof x);
        return _mm512_dpbf16_ps(sum, w_, x_);
    }
};
#endif

template <class Op, int V>
__attribute__((noinline)) void tile(const float* a, int64_t stride, const float* panel, int64_t depth, float* c,
                                    bool add, const float* ahead) {
    constexpr int ROWS = 8;
    __m512 sum[ROWS][V];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < V; ++v)
            sum[r][v] = add ? _mm512_load_ps(c + (r * V + v) * 16) : _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k) {
        if (k % 4 == 0) __builtin_prefetch(ahead + 4 * k, 0, 2);
        __m512 x[V];
        for (int v = 0; v < V; ++v) x[v] = _mm512_load_ps(panel + (k * V + v) * 16);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < V; ++v) sum[r][v] = Op::step(a + r * stride + k, x[v], sum[r][v]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < V; ++v) _mm512_store_ps(c + (r * V + v) * 16, sum[r][v]);
}

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define EDGESFT_AMX 1

// The layout of the tile registers, all 16 rows of 64 bytes, while it lives; then whatever it was before.
class Tiles {
  public:
    Tiles() {
        _tile_storeconfig(before_);
        alignas(64) uint8_t mine[64] = {1};
        for (int i = 0; i < 8; ++i) {
            mine[16 + 2 * i] = 64;
            mine[48 + i] = 16;
        }
        _tile_loadconfig(mine);
    }
    ~Tiles() {
        if (before_[0])
            _tile_loadconfig(before_);
        else
            _tile_release();
    }

  private:
    alignas(64) uint8_t before_[64];
};

// c (32, 16 V) = or += a (32 rows of `depth` units, `stride` apart) * panel (depth, 16 V), V = 1 or 2. c holds
// float32 (PER 2) or int32 (PER 4); depth is a multiple of 16.
template <int PER, int V>
__attribute__((noinline)) void tile_amx(const float* a, int64_t stride, const float* panel, int64_t depth, float* c,
                                        bool add) {
    constexpr int line = 64 * V;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (add) {
        _tile_loadd(0, c, line);
        _tile_loadd(2, c + 256 * V, line);
        if (V == 2) _tile_loadd(1, c + 16, line);
        if (V == 2) _tile_loadd(3, c + 256 * V + 16, line);
    }
#define EDGESFT_DP(c, a, b)          \
    if (PER == 2)                    \
        _tile_dpbf16ps(c, a, b);     \
    else                             \
        _tile_dpbssd(c, a, b)
    for (int64_t k = 0; k < depth; k += 16) {
        _tile_loadd(4, a + k, 4 * stride);
        _tile_loadd(6, panel + k * 16 * V, line);
        EDGESFT_DP(0, 4, 6);
        if (V == 2) {
            _tile_loadd(7, panel + k * 16 * V + 16, line);
            EDGESFT_DP(1, 4, 7);
        }
        _tile_loadd(5, a + 16 * stride + k, 4 * stride);
        EDGESFT_DP(2, 5, 6);
        if (V == 2) {
            EDGESFT_DP(3, 5, 7);
        }
    }
#undef EDGESFT_DP
    _tile_stored(0, c, line);
    _tile_stored(2, c + 256 * V, line);
    if (V == 2) _tile_stored(1, c + 16, line);
    if (V == 2) _tile_stored(3, c + 256 * V + 16, line);
}
#endif

}  // namespace gemm
}  // namespace edgesft

#endif
