// The micro-kernels of the fused product: a few rows of x times a panel of W, as gemm.h describes both.

#ifndef EDGESFT_PERTURB_GEMM_TILES_H
#define EDGESFT_PERTURB_GEMM_TILES_H

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace edgesft {
namespace gemm {

// Cache lines that are wanted soon, `rows` times `lines` of them. Products fetch a few now and then into the L2
// cache, so that what comes from memory hardly costs time of its own.
class Ahead {
  public:
    Ahead() = default;
    // `bytes` of every row, `stride` bytes from one row to the next, in about `calls` calls.
    Ahead(const void* from, int64_t rows, int64_t bytes, int64_t stride, int64_t calls)
        : at_(static_cast<const char*>(from)), rows_(bytes > 0 ? rows : 0), lines_((bytes + 63) / 64), left_(lines_),
          jump_(stride - 64 * lines_), each_((rows * lines_ + calls - 1) / calls) {}

    void fetch() {
        for (int64_t i = 0; i < each_ && rows_ > 0; ++i) {
            __builtin_prefetch(at_, 0, 2);
            at_ += 64;
            if (--left_ == 0) {
                --rows_;
                left_ = lines_;
                at_ += jump_;
            }
        }
    }

  private:
    const char* at_ = nullptr;
    int64_t rows_ = 0, lines_ = 0, left_ = 0, jump_ = 0, each_ = 0;
};

constexpr int64_t PACE = 32;  // units between two fetches; of tile registers 16

// Where a tile goes: `count` rows of 16 V sums, `stride` apart, in the last vector those of `last`. Sums start from
// what is there (`add`), else from `bias` or zero.
struct Target {
    float* c;
    int64_t stride, count;
    __mmask16 last;
    const float* bias;
    bool add;
};

constexpr int ROWS = 8;  // 8 x 48 keeps both multipliers busy: 24 sums in flight, 11 loads for 24 multiply-adds

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

// Up to 8 rows of x, `stride` units apart, times a panel (depth, 16 V).
template <class Op, int V>
__attribute__((noinline)) void tile(const float* a, int64_t stride, const float* panel, int64_t depth,
                                    const Target& to, Ahead& ahead) {
    const float* row[ROWS];
    __m512 sum[ROWS][V];
    for (int r = 0; r < ROWS; ++r) {
        row[r] = a + (r < to.count ? r : to.count - 1) * stride;
        float* const c = to.c + (r < to.count ? r : 0) * to.stride;
        const float* const from = to.add ? c : to.bias;
        for (int v = 0; v < V; ++v) {
            const __mmask16 some = v == V - 1 ? to.last : 0xFFFF;
            sum[r][v] = from ? _mm512_maskz_loadu_ps(some, from + 16 * v) : _mm512_setzero_ps();
            if (!to.add) __builtin_prefetch(c + 16 * v, 1, 3);
        }
    }
    for (int64_t begin = 0; begin < depth; begin += PACE) {
        ahead.fetch();
        const int64_t end = begin + PACE < depth ? begin + PACE : depth;
#pragma GCC unroll 4
        for (int64_t k = begin; k < end; ++k) {
            __m512 w[V];
            for (int v = 0; v < V; ++v) w[v] = _mm512_load_ps(panel + (k * V + v) * 16);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < V; ++v) sum[r][v] = Op::step(row[r] + k, w[v], sum[r][v]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < V && r < to.count; ++v)
            _mm512_mask_storeu_ps(to.c + r * to.stride + 16 * v, v == V - 1 ? to.last : 0xFFFF, sum[r][v]);
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

// c (16 M, 16 V) = or += a (16 M rows of `depth` units, `stride` apart) * panel (depth, 16 V), M and V 1 or 2. c, with
// `line` numbers a row, holds float32 (PER 2) or int32 (PER 4); depth is a multiple of 16.
template <int PER, int M, int V>
__attribute__((noinline)) void tile_amx(const float* a, int64_t stride, const float* panel, int64_t depth, float* c,
                                        int64_t line, bool add, Ahead& ahead) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (add) {
        _tile_loadd(0, c, 4 * line);
        if (V == 2) _tile_loadd(1, c + 16, 4 * line);
        if (M == 2) _tile_loadd(2, c + 16 * line, 4 * line);
        if (M == 2 && V == 2) _tile_loadd(3, c + 16 * line + 16, 4 * line);
    }
#define EDGESFT_DP(c, a, b)          \
    if (PER == 2)                    \
        _tile_dpbf16ps(c, a, b);     \
    else                             \
        _tile_dpbssd(c, a, b)
    for (int64_t k = 0; k < depth; k += 16) {
        ahead.fetch();
        _tile_loadd(4, a + k, 4 * stride);
        _tile_loadd(6, panel + k * 16 * V, 64 * V);
        EDGESFT_DP(0, 4, 6);
        if (V == 2) {
            _tile_loadd(7, panel + k * 16 * V + 16, 64 * V);
            EDGESFT_DP(1, 4, 7);
        }
        if (M == 2) {
            _tile_loadd(5, a + 16 * stride + k, 4 * stride);
            EDGESFT_DP(2, 5, 6);
        }
        if (M == 2 && V == 2) {
            EDGESFT_DP(3, 5, 7);
        }
    }
#undef EDGESFT_DP
    _tile_stored(0, c, 4 * line);
    if (V == 2) _tile_stored(1, c + 16, 4 * line);
    if (M == 2) _tile_stored(2, c + 16 * line, 4 * line);
    if (M == 2 && V == 2) _tile_stored(3, c + 16 * line + 16, 4 * line);
}
#endif

}  // namespace gemm
}  // namespace edgesft

#endif
